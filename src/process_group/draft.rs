//! From checked tensors to a backend's call, and from its end back to the tensors. The blocking and
//! the asynchronous form of every collective are one draft, ended by `run` or by `launch`.

use std::panic::Location;
use std::sync::Arc;

use smallvec::{SmallVec, smallvec};
use tch::{Device, Kind, Tensor};

use super::checks::{Seen, disjoint};
use super::state::Inner;
use super::{ProcessGroup, Work};
use crate::backend::{
    Buffer, Call, CollectiveBackend, Completion, Op, Receipt, Segment, Segments, Ticket, WriteBack,
};
use crate::libtorch::{Facts, empty_pinned_like, facts};
use crate::profile::Watch;
use crate::{Error, Result};

/// A collective being put together.
pub(super) struct Draft<'a> {
    pub(super) group: &'a ProcessGroup,
    pub(super) backend: &'a Arc<dyn CollectiveBackend>,
    pub(super) call: Call<'a>,
    /// What ranks that check everything compare besides the operation and the kind.
    pub(super) shape: Option<&'a Tensor>,
    pub(super) memory: Memory<'a>,
}

/// Where a backend finds tensors' elements in order: in place, or in copies that are copied back.
pub(super) struct Memory<'a> {
    backend: &'a dyn CollectiveBackend,
    write_back: Vec<Output>,
}

/// An output that the backend could not write in place.
struct Output {
    to: Tensor,
    from: Tensor,
}

/// A tensor's elements in order, in place or in a copy.
pub(super) enum Flat<'a> {
    Place(&'a Tensor, Facts),
    Copy(Tensor, Facts),
}

impl<'a> Flat<'a> {
    /// All elements.
    #[inline(always)]
    pub(super) fn whole(self) -> Buffer<'a> {
        match self {
            Self::Place(tensor, facts) => Buffer::borrowed(tensor, &facts),
            Self::Copy(tensor, facts) => Buffer::owned_with(tensor, &facts),
        }
    }

    /// `numel` elements from `start` on.
    pub(super) fn part(&self, start: usize, numel: usize) -> Buffer<'a> {
        match self {
            Self::Place(tensor, facts) => Buffer::part(tensor, facts, start, numel),
            Self::Copy(tensor, facts) => {
                Buffer::owned_with(tensor.shallow_clone(), facts).slice(facts.element, start, numel)
            }
        }
    }
}

impl ProcessGroup {
    /// Begins a call on tensors like this one; refuses what means nothing or what the backend cannot do.
    #[inline(always)]
    pub(super) fn draft<'a>(&'a self, op: Op, like: &Seen<'a>) -> Result<Draft<'a>> {
        let kind = like.facts.kind;
        let backend = self.inner.backends.of(like.facts.device)?;
        if let Some(reduce) = op.reduce_op()
            && !reduce.supports(kind)
        {
            return Err(Error::Unsupported {
                backend: backend.name().to_owned(),
                what: format!("{reduce} on {kind:?} (in {})", op.name()),
            });
        }
        self.draft_on(op, kind, backend)
    }

    #[inline(always)]
    pub(super) fn draft_on<'a>(
        &'a self,
        op: Op,
        kind: Kind,
        backend: &'a Arc<dyn CollectiveBackend>,
    ) -> Result<Draft<'a>> {
        if let Err(what) = backend.supports(&op, kind) {
            return Err(Error::Unsupported { backend: backend.name().to_owned(), what });
        }
        let call =
            Call { op, kind, inputs: Segments::new(), outputs: Segments::new(), timeout: self.timeout() };
        Ok(Draft { group: self, backend, call, shape: None, memory: Memory::new(&**backend) })
    }
}

impl<'a> Memory<'a> {
    pub(super) fn new(backend: &'a dyn CollectiveBackend) -> Self {
        Self { backend, write_back: Vec::new() }
    }

    /// Takes over what the other has to copy back.
    pub(super) fn merge(&mut self, other: Self) {
        self.write_back.extend(other.write_back);
    }

    /// The elements of a tensor that is read.
    pub(super) fn read<'t>(&self, seen: &Seen<'t>) -> Result<Flat<'t>> {
        if seen.facts.plain && self.backend.accepts(seen.facts.device) {
            return Ok(Flat::Place(seen.tensor, seen.facts));
        }
        let copy = self.copy(seen)?;
        let facts = plain_facts(&copy, seen.argument)?;
        Ok(Flat::Copy(copy, facts))
    }

    /// The elements of a tensor that is written and, if `also_read`, read before.
    #[inline(always)]
    pub(super) fn write<'t>(&mut self, seen: &Seen<'t>, also_read: bool) -> Result<Flat<'t>> {
        if seen.facts.plain && self.backend.accepts(seen.facts.device) {
            return Ok(Flat::Place(seen.tensor, seen.facts));
        }
        let copy = if also_read { self.copy(seen)? } else { self.room(seen)? };
        let facts = plain_facts(&copy, seen.argument)?;
        self.write_back.push(Output { to: seen.tensor.shallow_clone(), from: copy.shallow_clone() });
        Ok(Flat::Copy(copy, facts))
    }

    /// A dense copy of its own, where the backend can reach it.
    fn copy(&self, seen: &Seen<'_>) -> Result<Tensor> {
        tch::no_grad(|| {
            let mut copy = self.room(seen)?;
            copy.f_copy_(seen.tensor)?;
            Ok(copy)
        })
    }

    /// A tensor of this shape and kind in memory that the backend reaches. For a CUDA tensor on a backend of the CPU
    /// that memory is pinned: the device copies to and from it by itself.
    fn room(&self, seen: &Seen<'_>) -> Result<Tensor> {
        let device = seen.facts.device;
        if self.backend.accepts(device) || device == Device::Cpu {
            return Ok(Tensor::f_empty(seen.tensor.size(), (seen.facts.kind, device))?);
        }
        empty_pinned_like(seen.tensor)
    }

    /// A promise for an asynchronous operation on these tensors, and its ticket. At the end, and before anyone learns of
    /// it, outputs are written and a failure is recorded.
    pub(super) fn promise(self, inner: Arc<Inner>, watch: Watch) -> (Completion, Ticket) {
        let finisher = move |result: Result<Receipt>| {
            inner.instrument.end(watch, result.is_ok());
            result.inspect_err(|error| inner.note(error))
        };
        let (done, ticket) = Completion::new(Some(Box::new(finisher)));
        let outputs = self.write_back;
        let write: Option<WriteBack> = match outputs.is_empty() {
            true => None,
            false => Some(Box::new(move || write_back(outputs))),
        };
        (done.writing(write), ticket)
    }
}

impl<'a> Draft<'a> {
    /// The elements of a tensor that is read.
    pub(super) fn read(&self, seen: &Seen<'a>) -> Result<Flat<'a>> {
        self.memory.read(seen)
    }

    /// The elements of a tensor that is written and, if `also_read`, read before.
    #[inline(always)]
    pub(super) fn write(&mut self, seen: &Seen<'a>, also_read: bool) -> Result<Flat<'a>> {
        self.memory.write(seen, also_read)
    }

    /// Adds a segment of one buffer to what is read.
    pub(super) fn input(&mut self, buffer: Buffer<'a>) {
        self.call.inputs.push(smallvec![buffer]);
    }

    /// Adds a segment of one buffer to what is written.
    #[inline(always)]
    pub(super) fn output(&mut self, buffer: Buffer<'a>) {
        self.call.outputs.push(smallvec![buffer]);
    }

    /// Each of the tensors is a segment that is read.
    pub(super) fn inputs(&mut self, seen: &[Seen<'a>]) -> Result<()> {
        for one in seen {
            let buffer = self.read(one)?.whole();
            self.input(buffer);
        }
        Ok(())
    }

    /// Each of the tensors is a segment that is written.
    pub(super) fn outputs(&mut self, seen: &[Seen<'a>]) -> Result<()> {
        disjoint(seen)?;
        for one in seen {
            let buffer = self.write(one, false)?.whole();
            self.output(buffer);
        }
        Ok(())
    }

    /// All of the tensors together are one segment that is read and written.
    pub(super) fn coalesced(&mut self, seen: &[Seen<'a>]) -> Result<()> {
        disjoint(seen)?;
        let mut segment = Segment::with_capacity(seen.len());
        for one in seen {
            segment.push(self.write(one, true)?.whole());
        }
        self.call.outputs.push(segment);
        Ok(())
    }

    /// Copies inputs that share memory with outputs, but for those that are exactly the output that
    /// belongs to them: the buffer at the same place of segment `in_place`.
    pub(super) fn separate(mut self, in_place: Option<usize>) -> Self {
        let range = |b: &Buffer<'_>| (b.data_ptr() as usize, b.data_ptr() as usize + b.bytes());
        let span = |segments: &Segments<'_>| {
            segments
                .iter()
                .flatten()
                .filter(|b| b.numel() > 0)
                .map(range)
                .fold((usize::MAX, 0), |all, one| (all.0.min(one.0), all.1.max(one.1)))
        };
        let written = span(&self.call.outputs);
        let read = span(&self.call.inputs);
        if read.0 >= written.1 || written.0 >= read.1 {
            return self;
        }
        let own: SmallVec<[_; 8]> = match in_place.and_then(|i| self.call.outputs.get(i)) {
            Some(segment) => segment.iter().map(range).collect(),
            None => SmallVec::new(),
        };
        let outputs: SmallVec<[(usize, usize); 8]> = self.call.outputs.iter().flatten().map(range).collect();
        let inputs = self.call.inputs.iter_mut().flat_map(|segment| segment.iter_mut().enumerate());
        for (place, buffer) in inputs {
            let (begin, end) = range(buffer);
            let shared = outputs.iter().any(|&(from, to)| begin < to && from < end);
            if shared && own.get(place) != Some(&(begin, end)) {
                let copy = buffer.tensor().copy();
                if let Ok(facts) = facts(&copy) {
                    *buffer = Buffer::owned_with(copy, &facts);
                }
            }
        }
        self
    }

    /// Runs the call on this thread.
    #[track_caller]
    pub(super) fn run(self) -> Result<()> {
        let site = Location::caller();
        let inner = &*self.group.inner;
        if inner.detail {
            super::debug::compare(&self, site)?;
        }
        let watch = inner.instrument.begin(self.call.op.activity(), self.call.own_bytes(), site);
        let ended = inner.universe.instrument.blocked(|| self.backend.run(self.call));
        inner.instrument.end(watch, ended.is_ok());
        match ended {
            Ok(()) if self.memory.write_back.is_empty() => Ok(()),
            Ok(()) => write_back(self.memory.write_back),
            Err(error) => Err(inner.fail(error)),
        }
    }

    /// Starts the call.
    #[track_caller]
    pub(super) fn launch(self) -> Result<Work> {
        let site = Location::caller();
        if self.group.inner.detail {
            super::debug::compare(&self, site)?;
        }
        let inner = self.group.inner.clone();
        let watch = inner.instrument.begin(self.call.op.activity(), self.call.own_bytes(), site);
        let (done, ticket) = self.memory.promise(inner, watch);
        self.backend.submit(self.call.into_owned(), done);
        Ok(Work::new(self.group.clone(), smallvec![ticket]))
    }
}

fn write_back(outputs: Vec<Output>) -> Result<()> {
    tch::no_grad(|| {
        for Output { mut to, from } in outputs {
            to.f_copy_(&from)?;
        }
        Ok(())
    })
}

fn plain_facts(tensor: &Tensor, argument: &'static str) -> Result<Facts> {
    match facts(tensor) {
        Ok(facts) if facts.plain => Ok(facts),
        _ => Err(Error::invalid(argument, "the tensor cannot be made contiguous")),
    }
}
