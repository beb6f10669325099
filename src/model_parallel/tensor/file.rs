//! A split model in one ordinary safetensors file.
//!
//! The format (<https://github.com/huggingface/safetensors>): eight bytes, the header's length (u64, little
//! endian); the header, JSON, which gives each tensor's kind, shape and place; the tensors' bytes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use serde::Deserialize;
use tch::{Kind, Tensor, nn};

use super::layout::{Layout, check_fits};
use crate::{Error, ProcessGroup, Result};

/// A header longer than this is no header.
const LONGEST_HEADER: u64 = 100 << 20;

#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<i64>,
    data_offsets: [u64; 2],
}

/// The kinds that a file can have here, by the format's names for them.
const KINDS: [(&str, Kind); 10] = [
    ("BOOL", Kind::Bool),
    ("U8", Kind::Uint8),
    ("I8", Kind::Int8),
    ("I16", Kind::Int16),
    ("I32", Kind::Int),
    ("I64", Kind::Int64),
    ("BF16", Kind::BFloat16),
    ("F16", Kind::Half),
    ("F32", Kind::Float),
    ("F64", Kind::Double),
];

/// What a rank says of a parameter that it will send: its name, its kind's number in [`KINDS`], its full size.
type Look = (String, Option<usize>, Vec<i64>);

/// A file whose tensors can be read in part.
struct Source {
    file: File,
    entries: BTreeMap<String, Entry>,
    data: u64,
}

impl Layout {
    /// Reads the model's parameters from a safetensors file of full tensors. Each rank reads the bytes of its shards
    /// only. Kinds are converted; tensors that the model does not have are passed over.
    ///
    /// # Errors
    /// `Io` where the file cannot be read; `Object` where it is no safetensors file; `InvalidArgument` that names a
    /// parameter which is not in it; `ShapeMismatch`.
    #[doc(alias = "load_state_dict")]
    pub fn load(&self, vs: &nn::VarStore, path: impl AsRef<Path>) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        let source = Source::open(path.as_ref())?;
        for (name, mut variable) in vs.variables() {
            let own = source.read(&name, self)?;
            check_fits(&name, &own.size(), &variable.size())?;
            variable.f_copy_(&own)?;
        }
        Ok(())
    }

    /// Writes the whole model to one safetensors file, as one process would. `model` holds all ranks of one copy of
    /// the model (of a mesh, its tensor and pipeline axes flattened), and all of them call it; its rank 0 writes.
    /// Stages must give their parameters different names, except copies ([`mark_copy`](Self::mark_copy)).
    ///
    /// # Errors
    /// `InvalidArgument` on every rank for a name that two stages give, and for a kind that the format does not have;
    /// `Object` on every rank where the file cannot be written; those of the groups' collectives.
    #[doc(alias = "save_state_dict")]
    pub fn save(&self, vs: &nn::VarStore, path: impl AsRef<Path>, model: &ProcessGroup) -> Result<()> {
        const TAG: u32 = 1 << 28;
        let _no_grad = tch::no_grad_guard();
        let variables: BTreeMap<_, _> =
            vs.variables().into_iter().filter(|(name, _)| !self.is_copy(name)).collect();
        let speaks = self.group().rank() == 0;
        let kind = |t: &Tensor| KINDS.iter().position(|(_, kind)| *kind == t.kind());
        let looks: Vec<Look> = variables
            .iter()
            .filter(|_| speaks)
            .map(|(name, t)| (name.clone(), kind(t), self.full_size(name, t)))
            .collect();
        let all = model.all_gather_object(&looks)?;
        // All ranks see the same looks, and so agree whether to go on.
        check_looks(&all)?;
        let mut whole = Vec::new();
        for (name, variable) in &variables {
            let full = self.full(name, variable)?.f_contiguous()?;
            match (speaks, model.rank()) {
                (true, 0) => whole.push((name.clone(), full)),
                (true, _) => model.send(&full, 0, TAG)?,
                _ => {}
            }
        }
        if model.rank() == 0 {
            for (rank, looks) in all.into_iter().enumerate().skip(1) {
                for (name, kind, size) in looks {
                    let kind = kind.map_or(Kind::Float, |k| KINDS[k].1);
                    let mut full = Tensor::f_empty(&size, (kind, vs.device()))?;
                    model.recv(&mut full, rank, TAG)?;
                    whole.push((name, full));
                }
            }
        }
        let written = (model.rank() == 0).then(|| write(&whole, path.as_ref()).err().map(|e| e.to_string()));
        match model.broadcast_object(written, 0)? {
            None => Ok(()),
            Some(reason) => {
                Err(Error::Object { reason: format!("rank 0 could not save the model: {reason}") })
            }
        }
    }

    fn full_size(&self, name: &str, own: &Tensor) -> Vec<i64> {
        let mut size = own.size();
        if let Some(shard) = self.shard(name) {
            size[shard.dim()] = shard.full_len();
        }
        size
    }
}

/// Whether one file can hold what these ranks have.
fn check_looks(all: &[Vec<Look>]) -> Result<()> {
    let mut owners = BTreeMap::new();
    let mut twice = Vec::new();
    for (rank, looks) in all.iter().enumerate() {
        for (name, kind, _) in looks {
            if kind.is_none() {
                let reason = format!("{name} of rank {rank} has a kind that a safetensors file cannot hold");
                return Err(Error::invalid("vs", reason));
            }
            if let Some(owner) = owners.insert(name, rank) {
                twice.push(format!("{name} (ranks {owner} and {rank})"));
            }
        }
    }
    if twice.is_empty() {
        return Ok(());
    }
    let reason = format!(
        "two stages have parameters of one name: {}. Give each stage a path of its own; what is a copy is marked \
         with mark_copy",
        twice.join(", ")
    );
    Err(Error::invalid("vs", reason))
}

/// The file appears whole or not at all.
fn write(tensors: &[(String, Tensor)], path: &Path) -> Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    Tensor::write_safetensors(tensors, &part)?;
    Ok(std::fs::rename(&part, path)?)
}

impl Source {
    fn open(path: &Path) -> Result<Self> {
        let mut file = File::open(path)?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let length = u64::from_le_bytes(length);
        let size = file.metadata()?.len();
        let odd = |reason: String| Error::Object { reason: format!("{} {reason}", path.display()) };
        if length > LONGEST_HEADER || length + 8 > size {
            return Err(odd(format!("is no safetensors file: its header would have {length} bytes")));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header)?;
        let header: BTreeMap<String, serde_json::Value> =
            serde_json::from_slice(&header).map_err(|e| odd(format!("is no safetensors file: {e}")))?;
        let mut entries = BTreeMap::new();
        for (name, value) in header.into_iter().filter(|(name, _)| name != "__metadata__") {
            let entry: Entry =
                serde_json::from_value(value).map_err(|e| odd(format!("has a damaged entry {name}: {e}")))?;
            let [start, end] = entry.data_offsets;
            let place = end.checked_sub(start).filter(|_| end <= size - 8 - length);
            let fits = match (elements(&entry.shape), kind_of(&entry.dtype)) {
                (Some(n), Some(kind)) => {
                    place.is_some()
                        && n.checked_mul(kind.elt_size_in_bytes() as i64).map(|b| b as u64) == place
                }
                // Of another kind: passed over, unless the model asks for it.
                (Some(_), None) => place.is_some(),
                (None, _) => false,
            };
            if !fits {
                return Err(odd(format!("has a damaged entry {name}")));
            }
            entries.insert(name, entry);
        }
        Ok(Self { file, entries, data: 8 + length })
    }

    /// This rank's part of a tensor.
    fn read(&self, name: &str, layout: &Layout) -> Result<Tensor> {
        let entry = self.entries.get(name);
        let entry = entry.ok_or_else(|| {
            let hint = if layout.is_copy(name) { ": a copy is read by its own name" } else { "" };
            Error::invalid("path", format!("the file has no tensor {name}{hint}"))
        })?;
        let kind = kind_of(&entry.dtype)
            .ok_or_else(|| Error::invalid("path", format!("{name} has the unknown kind {}", entry.dtype)))?;
        let mut size = entry.shape.clone();
        let mut pieces = Vec::new();
        match layout.shard(name) {
            None => pieces.push(entry.data_offsets[0]..entry.data_offsets[1]),
            Some(shard) => {
                let (dim, split) = (shard.dim(), &shard.split);
                if size.get(dim) != Some(&shard.full_len()) {
                    return Err(Error::ShapeMismatch {
                        argument: "path",
                        expected: format!("{} in dimension {dim} of {name}", shard.full_len()),
                        got: format!("{size:?}"),
                    });
                }
                let inner = size[dim + 1..].iter().product::<i64>() as u64 * kind.elt_size_in_bytes() as u64;
                let outer = size[..dim].iter().product::<i64>() as u64;
                let row = shard.full_len() as u64 * inner;
                let ranges = split.ranges(layout.group().rank());
                for o in 0..outer {
                    let start = entry.data_offsets[0] + o * row;
                    pieces.extend(
                        ranges.iter().map(|r| start + r.start as u64 * inner..start + r.end as u64 * inner),
                    );
                }
                size[dim] = split.len(layout.group().rank());
            }
        }
        let total: u64 = pieces.iter().map(|p| p.end - p.start).sum();
        let mut bytes = vec![0; total as usize];
        let mut rest = &mut bytes[..];
        for piece in pieces {
            let (now, later) = rest.split_at_mut((piece.end - piece.start) as usize);
            self.file.read_exact_at(now, self.data + piece.start)?;
            rest = later;
        }
        Ok(Tensor::f_from_data_size(&bytes, &size, kind)?)
    }
}

fn kind_of(dtype: &str) -> Option<Kind> {
    KINDS.iter().find(|(name, _)| *name == dtype).map(|(_, kind)| *kind)
}

/// How many elements a tensor of this shape has; `None` for no shape at all.
fn elements(shape: &[i64]) -> Option<i64> {
    // Also without its zeros it must be a number, for its parts are counted too.
    let most = shape.iter().try_fold(1_i64, |n, &d| n.checked_mul(d.max(1)).filter(|_| d >= 0))?;
    Some(if shape.contains(&0) { 0 } else { most })
}
