//! Which of a model's parameters are shards, and of what.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use tch::{Tensor, nn};

use super::split::Split;
use crate::{Error, ProcessGroup, Result, libtorch};

thread_local! {
    static RECORDING: RefCell<Vec<BTreeMap<String, Shard>>> = const { RefCell::new(Vec::new()) };
}

/// One parameter that is split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shard {
    pub(super) split: Split,
}

impl Shard {
    /// The dimension that is split.
    pub fn dim(&self) -> usize {
        self.split.dim
    }

    /// The length of that dimension in the full tensor.
    pub fn full_len(&self) -> i64 {
        self.split.full()
    }
}

/// Which parameters of a model are shards, by name; all others are whole on every rank of the tensor-parallel
/// group.
///
/// Saving, loading and clipping need to know. The split layers say it themselves while a model is built:
///
/// ```
/// use tch::{Device, nn};
/// use tch_distributed::model_parallel::tensor::{ColumnParallelLinear, Layout, ParallelLinearConfig};
/// use tch_distributed::testing;
///
/// testing::run_threads(2, |group| {
///     let vs = nn::VarStore::new(Device::Cpu);
///     let (layer, layout) = Layout::record(&group, || {
///         ColumnParallelLinear::new(vs.root() / "up", 4, 8, ParallelLinearConfig::default(), &group)
///     });
///     layer.unwrap();
///     assert_eq!(layout.shard("up.weight").unwrap().full_len(), 8);
/// });
/// ```
#[derive(Clone, Debug)]
pub struct Layout {
    group: ProcessGroup,
    shards: BTreeMap<String, Shard>,
    copies: BTreeSet<String>,
}

impl Layout {
    /// Builds a model, and notes which of its parameters are shards. `group` is the tensor-parallel group.
    pub fn record<T>(group: &ProcessGroup, build: impl FnOnce() -> T) -> (T, Self) {
        let recording = Recording::start();
        let model = build();
        let shards = recording.end();
        (model, Self { group: group.clone(), shards, copies: BTreeSet::new() })
    }

    /// Notes that a parameter is a copy of one that another rank of the model owns, such as the head's copy of a
    /// tied embedding on the last pipeline stage: it is not counted in norms and not saved. Loading reads it by its own
    /// name, so give it the name that its owner has.
    pub fn mark_copy(&mut self, name: &str) {
        self.copies.insert(name.to_owned());
    }

    /// The tensor-parallel group.
    pub fn group(&self) -> &ProcessGroup {
        &self.group
    }

    /// How a parameter is split; `None` where it is whole.
    pub fn shard(&self, name: &str) -> Option<&Shard> {
        self.shards.get(name)
    }

    /// Whether a parameter is a copy that is owned elsewhere.
    pub fn is_copy(&self, name: &str) -> bool {
        self.copies.contains(name)
    }

    /// Whether this rank is the one that counts the parameter: all ranks of a shard do, of a whole one the first.
    pub(crate) fn counts(&self, name: &str) -> bool {
        !self.is_copy(name) && (self.group.rank() == 0 || self.shards.contains_key(name))
    }

    /// This rank's shard of a full tensor; the tensor itself where it is whole.
    ///
    /// # Errors
    /// `ShapeMismatch` where the full tensor has another size.
    pub fn take(&self, name: &str, full: &Tensor) -> Result<Tensor> {
        match self.shards.get(name) {
            Some(shard) => shard.split.take(full, self.group.rank()),
            None => Ok(full.shallow_clone()),
        }
    }

    /// The full tensor, from the shards of all ranks; every rank of the group calls it and gets it.
    ///
    /// # Errors
    /// Those of [`ProcessGroup::all_gather`].
    pub fn full(&self, name: &str, own: &Tensor) -> Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let Some(Shard { split }) = self.shards.get(name) else { return Ok(own.f_detach()?) };
        let all = crate::functional::gather_parts(&own.f_detach()?, split.dim, &split.lens(), &self.group)?;
        split.join(&all, split.dim)
    }

    /// The gradients (or the parameters) of a whole model by name, from all ranks of the group: for comparing and
    /// for looking. Parameters without a gradient are left out.
    ///
    /// # Errors
    /// As [`full`](Self::full).
    pub fn full_gradients(&self, vs: &nn::VarStore) -> Result<BTreeMap<String, Tensor>> {
        let named: BTreeMap<_, _> = vs.variables().into_iter().collect();
        let grads = named.into_iter().map(|(name, t)| (name, t.grad())).filter(|(_, g)| g.defined());
        grads.map(|(name, grad)| Ok((name.clone(), self.full(&name, &grad)?))).collect()
    }

    /// Copies full tensors into the model's parameters, each rank its shards.
    ///
    /// # Errors
    /// `InvalidArgument` that names a parameter which `full` does not give; `ShapeMismatch`.
    pub fn fill(&self, vs: &nn::VarStore, full: impl Fn(&str) -> Option<Tensor>) -> Result<()> {
        let _no_grad = tch::no_grad_guard();
        for (name, mut variable) in vs.variables() {
            let given = full(&name).ok_or_else(|| {
                Error::invalid("full", format!("there is no tensor for the parameter {name}"))
            })?;
            let own = self.take(&name, &given)?;
            check_fits(&name, &own.size(), &variable.size())?;
            variable.f_copy_(&own)?;
        }
        Ok(())
    }
}

/// Whether what was given for a parameter has its shape.
pub(super) fn check_fits(name: &str, got: &[i64], expected: &[i64]) -> Result<()> {
    match got == expected {
        true => Ok(()),
        false => Err(Error::ShapeMismatch {
            argument: "full",
            expected: format!("{expected:?} for this rank's part of {name}"),
            got: format!("{got:?}"),
        }),
    }
}

/// Adds a shard to the model's parameters, and to the recording that is going on, if one is.
pub(super) fn add_shard(path: &nn::Path<'_>, name: &str, shard: Tensor, split: &Split) -> Tensor {
    let taken = path.get(name).is_some();
    let shard = path.add(name, shard, true);
    RECORDING.with_borrow_mut(|recordings| {
        if let Some(recording) = recordings.last_mut() {
            let name = if taken { renamed(path, name, &shard) } else { name.to_owned() };
            recording.insert(path.path(&name), Shard { split: split.clone() });
        }
    });
    shard
}

/// The name that tch gave a parameter because another has its own: `name__N`, N the parameters there were.
fn renamed(path: &nn::Path<'_>, name: &str, added: &Tensor) -> String {
    let mut number = 1;
    loop {
        let name = format!("{name}__{number}");
        if path.get(&name).is_some_and(|t| libtorch::same(&t, added)) {
            return name;
        }
        number += 1;
    }
}

/// A recording ends even if building the model panics.
struct Recording {
    depth: usize,
}

impl Recording {
    fn start() -> Self {
        RECORDING.with_borrow_mut(|r| {
            r.push(BTreeMap::new());
            Self { depth: r.len() }
        })
    }

    fn end(self) -> BTreeMap<String, Shard> {
        RECORDING.with_borrow_mut(|r| r.pop().unwrap_or_default())
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        RECORDING.with_borrow_mut(|r| r.truncate(self.depth - 1));
    }
}
