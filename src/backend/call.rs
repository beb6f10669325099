//! What a backend is asked to do: one validated operation on flat contiguous buffers.

use crate::profile::Activity;
use std::fmt;
use std::time::Duration;

use smallvec::SmallVec;
use tch::{Kind, Tensor};

use crate::libtorch::{Facts, facts, storage_offset};
use crate::{Error, ReduceOp, Result};

/// A collective operation. Roots are ranks of the group.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Op {
    /// Combine `outputs[0]` of all ranks in place; all ranks get the result.
    AllReduce(ReduceOp),
    /// Combine `inputs[0]` of all ranks into `outputs[0]` of `dst`, which is the same memory there; elsewhere
    /// `outputs` is empty.
    Reduce {
        /// How to combine.
        op: ReduceOp,
        /// The rank that gets the result.
        dst: usize,
    },
    /// `outputs[0]` of `src` goes to `outputs[0]` of every other rank.
    Broadcast {
        /// The rank that has the data.
        src: usize,
    },
    /// `inputs[0]` of rank r goes to `outputs[r]` of every rank; sizes may differ by rank.
    AllGather,
    /// `inputs[0]` of rank r goes to `outputs[r]` of `dst`; elsewhere `outputs` is empty.
    Gather {
        /// The rank that gets the data.
        dst: usize,
    },
    /// `inputs[r]` of `src` goes to `outputs[0]` of rank r; elsewhere `inputs` is empty.
    Scatter {
        /// The rank that has the data.
        src: usize,
    },
    /// `inputs[r]` of all ranks are combined into `outputs[0]` of rank r; sizes may differ by r.
    ReduceScatter(ReduceOp),
    /// `inputs[r]` of rank s goes to `outputs[s]` of rank r; sizes may differ by pair.
    AllToAll,
    /// Nobody leaves before everybody has come. No buffers.
    Barrier,
}

impl Op {
    /// The operation's name as a user knows it, e.g. `all_reduce`.
    pub fn name(&self) -> &'static str {
        self.activity().name()
    }

    pub(crate) fn activity(&self) -> Activity {
        match self {
            Self::AllReduce(_) => Activity::AllReduce,
            Self::Reduce { .. } => Activity::Reduce,
            Self::Broadcast { .. } => Activity::Broadcast,
            Self::AllGather => Activity::AllGather,
            Self::Gather { .. } => Activity::Gather,
            Self::Scatter { .. } => Activity::Scatter,
            Self::ReduceScatter(_) => Activity::ReduceScatter,
            Self::AllToAll => Activity::AllToAll,
            Self::Barrier => Activity::Barrier,
        }
    }

    /// How operands are combined, where they are.
    pub fn reduce_op(&self) -> Option<ReduceOp> {
        match *self {
            Self::AllReduce(op) | Self::Reduce { op, .. } | Self::ReduceScatter(op) => Some(op),
            _ => None,
        }
    }

    /// The root, where there is one.
    pub fn root(&self) -> Option<usize> {
        match *self {
            Self::Reduce { dst: root, .. }
            | Self::Broadcast { src: root }
            | Self::Gather { dst: root }
            | Self::Scatter { src: root } => Some(root),
            _ => None,
        }
    }
}

impl Op {
    /// What of it must be alike on all ranks, in words: the factor of `PremulSum` is each rank's own.
    pub(crate) fn alike(&self) -> String {
        let text = self.to_string();
        match self.reduce_op() {
            Some(own @ ReduceOp::PremulSum(_)) => text.replace(&own.to_string(), "PremulSum"),
            _ => text,
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match (self.reduce_op(), self.root()) {
            (Some(op), Some(root)) => write!(f, "({op}, root {root})"),
            (Some(op), None) => write!(f, "({op})"),
            (None, Some(root)) => write!(f, "(root {root})"),
            (None, None) => Ok(()),
        }
    }
}

/// A dense contiguous run of elements, in CPU or device memory: a tensor or part of one, borrowed
/// for a blocking call or held for an asynchronous one.
pub struct Buffer<'a> {
    tensor: Holder<'a>,
    data: *mut u8,
    numel: usize,
    bytes: usize,
}

enum Holder<'a> {
    Borrowed(&'a Tensor),
    Owned(Tensor),
}

// SAFETY: a buffer that owns its tensor is as `Send` as `tch::Tensor` is; `data` points into it.
unsafe impl Send for Buffer<'static> {}

impl<'a> Buffer<'a> {
    /// Holds a tensor, for a backend that wraps another and makes calls of its own.
    ///
    /// # Errors
    /// `InvalidArgument` when the tensor is not contiguous, or sparse, or undefined.
    ///
    /// ```
    /// use tch_distributed::backend::Buffer;
    /// let buffer = Buffer::new(tch::Tensor::zeros([2, 3], (tch::Kind::Float, tch::Device::Cpu)))?;
    /// assert_eq!((buffer.numel(), buffer.bytes()), (6, 24));
    /// # Ok::<(), tch_distributed::Error>(())
    /// ```
    pub fn new(tensor: Tensor) -> Result<Buffer<'static>> {
        match facts(&tensor) {
            Ok(facts) if facts.plain => Ok(Buffer::owned_with(tensor, &facts)),
            _ => Err(Error::invalid("tensor", "a buffer must be contiguous and dense")),
        }
    }

    /// Borrows a tensor, which the caller has found to be contiguous.
    pub(crate) fn borrowed(tensor: &'a Tensor, facts: &Facts) -> Self {
        Self::with(Holder::Borrowed(tensor), facts)
    }

    /// Borrows `numel` elements from element `start` on.
    pub(crate) fn part(tensor: &'a Tensor, facts: &Facts, start: usize, numel: usize) -> Self {
        Self::with(Holder::Borrowed(tensor), facts).slice(facts.element, start, numel)
    }

    /// Holds a tensor, which the caller has found to be contiguous.
    pub(crate) fn owned_with(tensor: Tensor, facts: &Facts) -> Self {
        Self::with(Holder::Owned(tensor), facts)
    }

    /// Only the elements from `start` on.
    pub(crate) fn slice(mut self, element: usize, start: usize, numel: usize) -> Self {
        let inside = start.checked_add(numel).is_some_and(|end| end <= self.numel);
        assert!(inside, "{numel} elements from {start} on, of {}", self.numel);
        self.data = if numel == 0 { std::ptr::null_mut() } else { self.data.wrapping_add(start * element) };
        self.numel = numel;
        self.bytes = numel * element;
        self
    }

    /// A buffer of its own for the elements from `start` on.
    pub(crate) fn part_of(&self, element: usize, start: usize, numel: usize) -> Buffer<'static> {
        let whole = match &self.tensor {
            Holder::Borrowed(t) => t,
            Holder::Owned(t) => t,
        };
        let tensor = Holder::Owned(whole.shallow_clone());
        Buffer { tensor, data: self.data, numel: self.numel, bytes: self.bytes }.slice(element, start, numel)
    }

    fn with(tensor: Holder<'a>, facts: &Facts) -> Self {
        debug_assert!(facts.plain);
        Self { tensor, data: facts.data, numel: facts.numel, bytes: facts.numel * facts.element }
    }

    /// Where the first element is; null when there is none.
    pub fn data_ptr(&self) -> *mut u8 {
        self.data
    }

    /// How many elements.
    pub fn numel(&self) -> usize {
        self.numel
    }

    /// How many bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// A flat tensor over the same memory. Writing to it is what outputs are for.
    pub fn tensor(&self) -> Tensor {
        let whole = match &self.tensor {
            Holder::Borrowed(t) => t,
            Holder::Owned(t) => t,
        };
        // Not a view: where a dimension has one element its stride may be anything.
        let whole = whole.detach();
        let start = match (self.numel, whole.numel()) {
            (0, _) | (_, 0) => 0,
            _ => (self.data as usize - whole.data_ptr() as usize) / (self.bytes / self.numel),
        };
        let offset = if whole.numel() == 0 { None } else { Some(storage_offset(&whole) + start as i64) };
        whole.as_strided([self.numel as i64], [1], offset)
    }

    /// The same buffer, holding its tensor.
    pub fn into_owned(self) -> Buffer<'static> {
        let tensor = match self.tensor {
            Holder::Borrowed(t) => t.shallow_clone(),
            Holder::Owned(t) => t,
        };
        Buffer { tensor: Holder::Owned(tensor), data: self.data, numel: self.numel, bytes: self.bytes }
    }
}

impl fmt::Debug for Buffer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} elements)", self.numel)
    }
}

/// A list of buffers that stands for their concatenation.
pub type Segment<'a> = SmallVec<[Buffer<'a>; 1]>;

/// One segment, or one for each rank: see [`Op`].
pub type Segments<'a> = SmallVec<[Segment<'a>; 1]>;

/// The number of elements in a segment.
pub fn segment_numel(segment: &[Buffer<'_>]) -> usize {
    segment.iter().map(Buffer::numel).sum()
}

/// One collective operation on this rank's buffers, checked: ranks are in range, kinds agree,
/// buffers are contiguous and dense, outputs do not overlap one another, a 0-element call is a call
/// all the same. Inputs share no memory with outputs, but for these: in `AllGather` and `Gather` the
/// input may be exactly `outputs[rank]`; in `Reduce` it is exactly the output on `dst`.
///
/// How a segment is cut into buffers is this rank's own business: ranks agree on the number of
/// elements of a segment, not on its cuts.
#[derive(Debug)]
pub struct Call<'a> {
    /// What to do.
    pub op: Op,
    /// The kind of every element of every buffer.
    pub kind: Kind,
    /// What is read.
    pub inputs: Segments<'a>,
    /// What is written (and, for `AllReduce` and `Broadcast`, read).
    pub outputs: Segments<'a>,
    /// How long the operation may take.
    pub timeout: Duration,
}

impl Call<'_> {
    /// The bytes of this rank's side: of its inputs, or of its outputs where those are more.
    pub(crate) fn own_bytes(&self) -> usize {
        let bytes = |segments: &Segments<'_>| segments.iter().flatten().map(Buffer::bytes).sum::<usize>();
        bytes(&self.inputs).max(bytes(&self.outputs))
    }

    /// The same call, holding its tensors.
    pub fn into_owned(self) -> Call<'static> {
        fn own(segments: Segments<'_>) -> Segments<'static> {
            segments.into_iter().map(|s| s.into_iter().map(Buffer::into_owned).collect()).collect()
        }
        Call {
            op: self.op,
            kind: self.kind,
            inputs: own(self.inputs),
            outputs: own(self.outputs),
            timeout: self.timeout,
        }
    }
}

/// One side of a point-to-point message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Direction {
    /// To a rank of the group (this one too).
    Send {
        /// The receiver.
        dst: usize,
    },
    /// From a rank of the group, or from any.
    Recv {
        /// The sender; any where `None`.
        src: Option<usize>,
    },
}

/// A point-to-point message: matched by (source, tag), in order among messages of the same two, and
/// outside the order of the collectives.
#[derive(Debug)]
pub struct Transfer {
    /// Which side this is.
    pub direction: Direction,
    /// The label that both sides give.
    pub tag: u32,
    /// The kind of its elements, which both sides give.
    pub kind: Kind,
    /// The data.
    pub buffer: Buffer<'static>,
    /// How long it may take.
    pub timeout: Duration,
    /// To be told of the end.
    pub done: super::Completion,
}
