//! Each collective as one operation of the engine, and what is left to do when it has ended.

use tch::{Device, Kind, Tensor};

use super::combine::{Combine, Flavor, combine};
use super::flat::{Written, bytes, padded, read, unpad, whole};
use super::messages::at_once;
use crate::backend::{Call, Direction, Op, Segment, segment_numel};
use crate::libtorch::{C10dBackend, C10dWork, Told};
use crate::{Error, ReduceOp, Result};

/// What is done when the engine's operation has ended well.
pub(super) type Finish = Box<dyn FnOnce() -> Result<()> + Send>;

/// An operation under way. The tensors it works on are kept by `finish`.
pub(super) struct Started {
    pub(super) work: C10dWork,
    pub(super) finish: Finish,
}

/// Why an operation did not start.
pub(super) enum Refusal {
    /// It cannot be done; nothing was sent.
    Error(Error),
    /// The engine says so.
    Told(String),
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl From<tch::TchError> for Refusal {
    fn from(error: tch::TchError) -> Self {
        Self::Error(error.into())
    }
}

fn told<T>(result: Told<T>) -> Result<T, Refusal> {
    result.map_err(Refusal::Told)
}

/// This rank's place, and how long the operation may take.
pub(super) struct Site<'a> {
    pub(super) backend: &'a C10dBackend,
    pub(super) flavor: Flavor,
    pub(super) rank: usize,
    pub(super) size: usize,
    pub(super) device: Device,
    /// Whether every rank is one of this crate.
    pub(super) pure: bool,
    pub(super) ms: i64,
}

impl Site<'_> {
    /// Whether the engine's operation is all there is to a call: no copies before or after it.
    pub(super) fn is_alone(&self, call: &Call<'_>) -> bool {
        let single = |segments: &[Segment<'_>]| matches!(segments, [one] if one.len() == 1);
        let plain = |op: ReduceOp| self.combine(op, call.kind).is_ok_and(|combine| combine.is_all());
        match call.op {
            Op::AllReduce(op) => single(&call.outputs) && plain(op),
            Op::Broadcast { .. } => single(&call.outputs),
            Op::AllGather => single(&call.inputs) && self.gathers_flat(call).is_some(),
            Op::ReduceScatter(op) => {
                let even = even(&call.inputs);
                single(&call.outputs) && plain(op) && even && whole(&call.inputs).is_some()
            }
            Op::AllToAll => whole(&call.inputs).is_some() && whole(&call.outputs).is_some(),
            Op::Barrier => true,
            _ => false,
        }
    }

    /// Where an all-gather writes, if that is one piece of memory, cut evenly.
    fn gathers_flat(&self, call: &Call<'_>) -> Option<Tensor> {
        (self.flavor == Flavor::Nccl && even(&call.outputs)).then(|| whole(&call.outputs)).flatten()
    }

    pub(super) fn start(&self, call: &Call<'_>) -> Result<Started, Refusal> {
        match call.op {
            Op::AllReduce(op) => self.all_reduce(call, op),
            Op::Reduce { op, dst } => self.reduce(call, op, dst),
            Op::Broadcast { src } => self.broadcast(call, src),
            Op::AllGather => self.all_gather(call),
            Op::Gather { dst } => self.gather(call, dst),
            Op::Scatter { src } => self.scatter(call, src),
            Op::ReduceScatter(op) => self.reduce_scatter(call, op),
            Op::AllToAll => self.all_to_all(call),
            Op::Barrier => {
                let cuda = match self.device {
                    Device::Cuda(index) => Some(index),
                    _ => None,
                };
                let work = told(self.backend.barrier(cuda, self.ms))?;
                Ok(Started { work, finish: Box::new(|| Ok(())) })
            }
        }
    }

    fn combine(&self, op: ReduceOp, kind: Kind) -> Result<Combine> {
        combine(self.flavor, op, kind, self.size, self.pure).map_err(|what| self.unsupported(what))
    }

    fn unsupported(&self, what: String) -> Error {
        Error::Unsupported { backend: self.flavor.name().to_owned(), what }
    }

    fn read(&self, call: &Call<'_>, index: usize) -> Result<Tensor> {
        read(&call.inputs[index], call.kind, self.device)
    }

    fn write(&self, call: &Call<'_>, index: usize) -> Result<Written> {
        Written::new(&call.outputs[index], false, call.kind, self.device)
    }

    fn empty(&self, numel: usize, kind: Kind) -> Result<Tensor> {
        Ok(Tensor::f_empty([numel as i64], (kind, self.device))?)
    }

    fn all_reduce(&self, call: &Call<'_>, op: ReduceOp) -> Result<Started, Refusal> {
        let combine = self.combine(op, call.kind)?;
        let mut out = Written::new(&call.outputs[0], true, call.kind, self.device)?;
        let mut view = combine.view(&out.flat)?;
        combine.prepare(&mut view)?;
        let work = told(self.backend.all_reduce(&view, combine.how, self.ms))?;
        let finish = Box::new(move || {
            combine.finish(&mut view, &mut out.flat)?;
            out.deliver()
        });
        Ok(Started { work, finish })
    }

    fn reduce(&self, call: &Call<'_>, op: ReduceOp, dst: usize) -> Result<Started, Refusal> {
        let combine = self.combine(op, call.kind)?;
        let input = self.read(call, 0)?;
        // The engine leaves partial results on every rank: never in the input.
        let out = if self.rank == dst { Some(self.write(call, 0)?) } else { None };
        let mut scratch = match &out {
            Some(out) => out.flat.shallow_clone(),
            None => self.empty(input.numel(), call.kind)?,
        };
        scratch.f_copy_(&input)?;
        let mut view = combine.view(&scratch)?;
        combine.prepare(&mut view)?;
        let work = told(self.backend.reduce(&view, combine.how, dst, self.ms))?;
        let finish = Box::new(move || {
            let Some(out) = out else {
                drop(view);
                return Ok(());
            };
            combine.finish(&mut view, &mut scratch)?;
            out.deliver()
        });
        Ok(Started { work, finish })
    }

    fn broadcast(&self, call: &Call<'_>, src: usize) -> Result<Started, Refusal> {
        let root = self.rank == src;
        let out = Written::new(&call.outputs[0], root, call.kind, self.device)?;
        let work = told(self.backend.broadcast(&bytes(&out.flat)?, src, self.ms))?;
        let finish = Box::new(move || if root { Ok(()) } else { out.deliver() });
        Ok(Started { work, finish })
    }

    fn all_gather(&self, call: &Call<'_>) -> Result<Started, Refusal> {
        let input = self.read(call, 0)?;
        if let Some(all) = self.gathers_flat(call) {
            let input = bytes(&input)?;
            let work = told(self.backend.all_gather_flat(&bytes(&all)?, &input, self.ms))?;
            let finish = Box::new(move || {
                drop(input);
                Ok(())
            });
            return Ok(Started { work, finish });
        }
        let gathered = Gathered::new(self, call)?;
        let input = bytes(&gathered.fit(&input)?)?;
        let work = told(self.backend.all_gather(&gathered.places()?, &input, self.ms))?;
        Ok(Started {
            work,
            finish: Box::new(move || {
                drop(input);
                gathered.deliver()
            }),
        })
    }

    /// Other ranks than the root do not know whether all inputs are of one size. Where they are not, the root of Gloo's
    /// pads, alone: a message may be shorter than the place it is received in.
    fn gather(&self, call: &Call<'_>, dst: usize) -> Result<Started, Refusal> {
        let input = self.read(call, 0)?;
        if self.rank != dst {
            let input = bytes(&input)?;
            let work = told(self.backend.gather(&[], &input, dst, self.ms))?;
            return Ok(Started {
                work,
                finish: Box::new(move || {
                    drop(input);
                    Ok(())
                }),
            });
        }
        if self.flavor == Flavor::Nccl && !even(&call.outputs) {
            return self.gather_as_messages(call, &input);
        }
        let gathered = Gathered::new(self, call)?;
        let input = bytes(&gathered.fit(&input)?)?;
        let work = told(self.backend.gather(&gathered.places()?, &input, dst, self.ms))?;
        Ok(Started {
            work,
            finish: Box::new(move || {
                drop(input);
                gathered.deliver()
            }),
        })
    }

    /// NCCL's gather is messages to the root, all at once. libtorch lets the root receive such of one size only.
    fn gather_as_messages(&self, call: &Call<'_>, input: &Tensor) -> Result<Started, Refusal> {
        let mut outs = (0..self.size).map(|i| self.write(call, i)).collect::<Result<Vec<_>>>()?;
        outs[self.rank].flat.f_copy_(input)?;
        let mut messages = Vec::new();
        for src in (0..self.size).filter(|src| *src != self.rank) {
            messages.push((Direction::Recv { src: Some(src) }, bytes(&outs[src].flat)?));
        }
        let work = told(at_once(self.backend, &messages))?;
        Ok(Started {
            work,
            finish: Box::new(move || {
                drop(messages);
                outs.into_iter().try_for_each(Written::deliver)
            }),
        })
    }

    /// Other ranks than the root do not know whether all are of one size. Among ranks of this crate Gloo's goes the way of
    /// an all-to-all, which takes any; one that Python takes part in must be even.
    fn scatter(&self, call: &Call<'_>, src: usize) -> Result<Started, Refusal> {
        if self.pure {
            return self.scatter_unevenly(call, src);
        }
        let out = self.write(call, 0)?;
        let mut inputs = Vec::new();
        if self.rank == src {
            let numel = segment_numel(&call.outputs[0]);
            if call.inputs.iter().any(|segment| segment_numel(segment) != numel) {
                if self.flavor == Flavor::Nccl {
                    return self.scatter_as_messages(call, out);
                }
                return Err(self.unsupported("scatter of tensors of different sizes".to_owned()).into());
            }
            for index in 0..self.size {
                inputs.push(bytes(&self.read(call, index)?)?);
            }
        }
        let work = told(self.backend.scatter(&bytes(&out.flat)?, &inputs, src, self.ms))?;
        let finish = Box::new(move || {
            drop(inputs);
            out.deliver()
        });
        Ok(Started { work, finish })
    }

    /// NCCL's scatter is messages from the root, all at once. libtorch lets the root send such of one size only.
    fn scatter_as_messages(&self, call: &Call<'_>, mut out: Written) -> Result<Started, Refusal> {
        out.flat.f_copy_(&self.read(call, self.rank)?)?;
        let mut messages = Vec::new();
        for dst in (0..self.size).filter(|dst| *dst != self.rank) {
            messages.push((Direction::Send { dst }, bytes(&self.read(call, dst)?)?));
        }
        let work = told(at_once(self.backend, &messages))?;
        Ok(Started {
            work,
            finish: Box::new(move || {
                drop(messages);
                out.deliver()
            }),
        })
    }

    fn scatter_unevenly(&self, call: &Call<'_>, src: usize) -> Result<Started, Refusal> {
        let element = call.kind.elt_size_in_bytes();
        let out = self.write(call, 0)?;
        let place = bytes(&out.flat)?;
        let (mut ins, mut outs) = (vec![0; self.size], vec![0; self.size]);
        outs[src] = place.numel() as i64;
        let mut parts = Vec::new();
        if self.rank == src {
            ins = call.inputs.iter().map(|segment| (segment_numel(segment) * element) as i64).collect();
            parts = (0..self.size).map(|index| self.read(call, index)).collect::<Result<_>>()?;
        }
        let input = match &parts[..] {
            [] => self.empty(0, Kind::Uint8)?,
            parts => bytes(&Tensor::f_cat(parts, 0)?)?,
        };
        let work = told(self.backend.all_to_all(&place, &input, &outs, &ins, self.ms))?;
        let finish = Box::new(move || {
            drop(input);
            out.deliver()
        });
        Ok(Started { work, finish })
    }

    fn reduce_scatter(&self, call: &Call<'_>, op: ReduceOp) -> Result<Started, Refusal> {
        let combine = self.combine(op, call.kind)?;
        let sizes: Vec<usize> = call.inputs.iter().map(|segment| segment_numel(segment)).collect();
        if self.flavor == Flavor::Nccl
            && combine.is_all()
            && even(&call.inputs)
            && let Some(input) = whole(&call.inputs)
        {
            let out = self.write(call, 0)?;
            let (view, input) = (combine.view(&out.flat)?, combine.view(&input)?);
            let work = told(self.backend.reduce_scatter(&view, &input, combine.how, self.ms))?;
            let finish = Box::new(move || {
                drop((view, input));
                out.deliver()
            });
            return Ok(Started { work, finish });
        }
        let parts = (0..self.size).map(|i| self.read(call, i)).collect::<Result<Vec<_>>>()?;
        if self.flavor == Flavor::Gloo {
            return self.reduce_and_keep(call, combine, &parts, &sizes);
        }
        let most = sizes.iter().copied().max().unwrap_or(0);
        let fits = sizes.iter().all(|size| *size == most);
        let parts = match fits {
            true => parts,
            false => parts.iter().map(|part| padded(part, most)).collect::<Result<_>>()?,
        };
        let out = self.write(call, 0)?;
        let mut input = combine.view(&Tensor::f_cat(&parts, 0)?)?;
        if combine.prepares() && self.size == 1 {
            input = padded(&input, input.numel())?;
        }
        combine.prepare(&mut input)?;
        let mut result = if fits { out.flat.shallow_clone() } else { self.empty(most, call.kind)? };
        let mut view = combine.view(&result)?;
        let work = told(self.backend.reduce_scatter(&view, &input, combine.how, self.ms))?;
        let finish = Box::new(move || {
            drop(input);
            combine.finish(&mut view, &mut result)?;
            let mut out = out;
            if !fits {
                unpad(&result, &mut out.flat)?;
            }
            out.deliver()
        });
        Ok(Started { work, finish })
    }

    /// Gloo's own reduce-scatter is this too, but tells nobody of its end.
    fn reduce_and_keep(
        &self,
        call: &Call<'_>,
        combine: Combine,
        parts: &[Tensor],
        sizes: &[usize],
    ) -> Result<Started, Refusal> {
        let mut out = self.write(call, 0)?;
        let mut all = self.empty(sizes.iter().sum(), call.kind)?;
        let mut start = 0;
        for (part, size) in parts.iter().zip(sizes) {
            all.f_narrow(0, start, *size as i64)?.f_copy_(part)?;
            start += *size as i64;
        }
        let mut view = combine.view(&all)?;
        combine.prepare(&mut view)?;
        let work = told(self.backend.all_reduce(&view, combine.how, self.ms))?;
        let start: usize = sizes[..self.rank].iter().sum();
        let finish = Box::new(move || {
            combine.finish(&mut view, &mut all)?;
            let numel = out.flat.numel() as i64;
            out.flat.f_copy_(&all.f_narrow(0, start as i64, numel)?)?;
            out.deliver()
        });
        Ok(Started { work, finish })
    }

    fn all_to_all(&self, call: &Call<'_>) -> Result<Started, Refusal> {
        let element = call.kind.elt_size_in_bytes();
        let sizes = |segments: &[Segment<'_>]| -> Vec<i64> {
            segments.iter().map(|segment| (segment_numel(segment) * element) as i64).collect()
        };
        let (mut ins, mut outs) = (sizes(&call.inputs), sizes(&call.outputs));
        let input = match whole(&call.inputs) {
            Some(input) => input,
            None => {
                let parts = (0..self.size).map(|i| self.read(call, i)).collect::<Result<Vec<_>>>()?;
                Tensor::f_cat(&parts, 0)?
            }
        };
        let input = bytes(&input)?;
        let splits = outs.clone();
        if ins.iter().chain(&outs).all(|n| *n == ins[0]) {
            ins.clear();
            outs.clear();
        }
        if let Some(output) = whole(&call.outputs) {
            let work = told(self.backend.all_to_all(&bytes(&output)?, &input, &outs, &ins, self.ms))?;
            let finish = Box::new(move || {
                drop(input);
                Ok(())
            });
            return Ok(Started { work, finish });
        }
        let output = self.empty(splits.iter().sum::<i64>() as usize, Kind::Uint8)?;
        let places = (0..self.size).map(|i| self.write(call, i)).collect::<Result<Vec<_>>>()?;
        let work = told(self.backend.all_to_all(&output, &input, &outs, &ins, self.ms))?;
        let finish = Box::new(move || {
            drop(input);
            let mut start = 0;
            for (place, numel) in places.into_iter().zip(splits) {
                bytes(&place.flat)?.f_copy_(&output.f_narrow(0, start, numel)?)?;
                place.deliver()?;
                start += numel;
            }
            Ok(())
        });
        Ok(Started { work, finish })
    }
}

/// Whether all segments are of one size.
fn even(segments: &[Segment<'_>]) -> bool {
    segments.windows(2).all(|pair| segment_numel(&pair[0]) == segment_numel(&pair[1]))
}

/// One place for each rank, of one size, because these engines take no others.
struct Gathered {
    outs: Vec<Written>,
    /// Where the engine writes, when sizes differ.
    scratch: Vec<Tensor>,
    most: usize,
    padded: bool,
}

impl Gathered {
    fn new(site: &Site<'_>, call: &Call<'_>) -> Result<Self> {
        let sizes: Vec<usize> = call.outputs.iter().map(|segment| segment_numel(segment)).collect();
        let most = sizes.iter().copied().max().unwrap_or(0);
        let padded = sizes.iter().any(|size| *size != most);
        let outs = (0..sizes.len()).map(|i| site.write(call, i)).collect::<Result<Vec<_>>>()?;
        let scratch = match padded {
            false => Vec::new(),
            true => outs.iter().map(|_| site.empty(most, call.kind)).collect::<Result<_>>()?,
        };
        Ok(Self { outs, scratch, most, padded })
    }

    fn fit(&self, input: &Tensor) -> Result<Tensor> {
        if self.padded { padded(input, self.most) } else { Ok(input.shallow_clone()) }
    }

    fn places(&self) -> Result<Vec<Tensor>> {
        match self.padded {
            true => self.scratch.iter().map(bytes).collect(),
            false => self.outs.iter().map(|out| bytes(&out.flat)).collect(),
        }
    }

    fn deliver(self) -> Result<()> {
        let mut scratch = self.scratch.into_iter();
        for mut out in self.outs {
            if let Some(from) = scratch.next() {
                unpad(&from, &mut out.flat)?;
            }
            out.deliver()?;
        }
        Ok(())
    }
}
