//! What each collective does with its streams: fill slots, reduce what others filled, gather.

use std::ops::Range;

use smallvec::{SmallVec, smallvec};

use super::lists::List;
use crate::backend::native::kernels::PAST_CACHE;
use crate::backend::{Call, Op};

/// A range of bytes of one of the lists.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    pub(super) list: usize,
    pub(super) range: Range<usize>,
}

impl Stream {
    fn whole(lists: &[List], list: usize) -> Self {
        Self { list, range: 0..lists[list].bytes() }
    }

    /// What of it belongs to a step, counted from the start of its list.
    pub(super) fn chunk(&self, step: usize, chunk: usize) -> Range<usize> {
        let start = (self.range.start + step * chunk).min(self.range.end);
        start..(start + chunk).min(self.range.end)
    }

    fn steps(&self, chunk: usize) -> usize {
        self.range.len().div_ceil(chunk)
    }
}

/// What this rank puts into its slots.
#[derive(Debug)]
pub(super) enum Fill {
    /// Nothing.
    None,
    /// Something else for each rank; its own entry is not used.
    Each(SmallVec<[Stream; 4]>),
    /// The same for all.
    All(Stream),
}

/// Reducing the share of this rank.
#[derive(Debug)]
pub(super) struct Reduce {
    /// Its own operand.
    pub(super) own: Stream,
    /// Where it keeps the result, if it does.
    pub(super) keep: Option<Stream>,
    /// Whether it puts the result into its slot for all.
    pub(super) share: bool,
}

/// A collective, seen by one rank.
#[derive(Debug)]
pub(super) struct Stages {
    pub(super) lists: SmallVec<[List; 2]>,
    pub(super) fill: Fill,
    pub(super) reduce: Option<Reduce>,
    /// Where what comes from each rank goes; its own entry is not used. Empty where nothing comes.
    pub(super) gather: SmallVec<[Option<Stream>; 4]>,
    /// Whether what comes lies in the sources' slots for this rank rather than in those for all.
    pub(super) comes_apart: bool,
    /// What is copied on the spot: from, to.
    pub(super) local: Option<(Stream, Stream)>,
    /// Which ranks read what this rank fills and shares.
    pub(super) readers: Readers,
    /// Whether results are written into the tensors that are lent.
    pub(super) results_in_place: bool,
    /// Whether what is gathered goes past the caches: it is more than they hold, and was not touched before.
    pub(super) past_cache: bool,
    /// How many steps its streams take, at least one: a root may have a lot for itself alone.
    pub(super) steps: usize,
}

/// Whose reading frees the slots of this rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Readers {
    All,
    One(usize),
}

impl Readers {
    pub(super) fn contain(self, rank: usize) -> bool {
        match self {
            Self::All => true,
            Self::One(one) => one == rank,
        }
    }
}

/// The share of one rank: equal parts, cut at cache lines.
fn share(bytes: usize, rank: usize, ranks: usize) -> Range<usize> {
    let each = bytes.div_ceil(ranks).next_multiple_of(64);
    (rank * each).min(bytes)..((rank + 1) * each).min(bytes)
}

impl Stages {
    pub(super) fn new(call: &Call<'_>, rank: usize, ranks: usize, chunk: usize) -> Self {
        let inputs = call.inputs.iter().map(|s| List::new(s));
        let outputs = call.outputs.iter().map(|s| List::new(s));
        let mut stages = Self {
            lists: SmallVec::new(),
            fill: Fill::None,
            reduce: None,
            gather: SmallVec::new(),
            comes_apart: matches!(call.op, Op::Scatter { .. } | Op::AllToAll),
            local: None,
            readers: Readers::All,
            results_in_place: matches!(call.op, Op::AllReduce(_)),
            past_cache: !matches!(call.op, Op::AllReduce(_)) && call.own_bytes() >= PAST_CACHE,
            steps: 0,
        };
        let lists = &mut stages.lists;
        let shares = |list: usize, bytes| -> SmallVec<[Stream; 4]> {
            (0..ranks).map(|r| Stream { list, range: share(bytes, r, ranks) }).collect()
        };
        match call.op {
            Op::AllReduce(_) => {
                lists.extend(outputs);
                let streams = shares(0, lists[0].bytes());
                let own = streams[rank].clone();
                stages.reduce = Some(Reduce { own: own.clone(), keep: Some(own), share: true });
                stages.gather = streams.iter().cloned().map(Some).collect();
                stages.fill = Fill::Each(streams);
            }
            Op::Reduce { dst, .. } => {
                lists.extend(inputs);
                lists.extend(outputs);
                let streams = shares(0, lists[0].bytes());
                let mut results = shares(1, lists[0].bytes());
                let keep = (rank == dst).then(|| results[rank].clone());
                let own = streams[rank].clone();
                stages.reduce = Some(Reduce { own, keep, share: rank != dst });
                stages.fill = Fill::Each(streams);
                stages.readers = Readers::One(dst);
                if rank == dst {
                    stages.gather = results.drain(..).map(Some).collect();
                }
            }
            Op::ReduceScatter(_) => {
                lists.extend(inputs);
                lists.extend(outputs);
                let own = Stream::whole(lists, rank);
                let keep = Some(Stream::whole(lists, ranks));
                stages.reduce = Some(Reduce { own, keep, share: false });
                stages.fill = Fill::Each((0..ranks).map(|r| Stream::whole(lists, r)).collect());
            }
            Op::Broadcast { src } => {
                lists.extend(outputs);
                let whole = Stream::whole(lists, 0);
                if rank == src {
                    stages.fill = Fill::All(whole);
                } else {
                    stages.gather = smallvec![None; ranks];
                    stages.gather[src] = Some(whole);
                }
            }
            Op::AllGather | Op::Gather { .. } => {
                lists.extend(inputs);
                lists.extend(outputs);
                let own = Stream::whole(lists, 0);
                let dst = call.op.root();
                if dst.is_none_or(|dst| dst == rank) {
                    stages.gather = (0..ranks).map(|r| Some(Stream::whole(lists, 1 + r))).collect();
                    stages.local = Some((own.clone(), Stream::whole(lists, 1 + rank)));
                }
                if dst != Some(rank) {
                    stages.fill = Fill::All(own);
                }
                stages.readers = dst.map_or(Readers::All, Readers::One);
            }
            Op::Scatter { src } => {
                lists.extend(inputs);
                lists.extend(outputs);
                if rank == src {
                    stages.fill = Fill::Each((0..ranks).map(|r| Stream::whole(lists, r)).collect());
                    stages.local = Some((Stream::whole(lists, rank), Stream::whole(lists, ranks)));
                } else {
                    stages.gather = smallvec![None; ranks];
                    stages.gather[src] = Some(Stream::whole(lists, 0));
                }
            }
            Op::AllToAll => {
                lists.extend(inputs);
                lists.extend(outputs);
                stages.fill = Fill::Each((0..ranks).map(|r| Stream::whole(lists, r)).collect());
                stages.gather = (0..ranks).map(|r| Some(Stream::whole(lists, ranks + r))).collect();
                stages.local = Some((Stream::whole(lists, rank), Stream::whole(lists, ranks + rank)));
            }
            Op::Barrier => {}
        }
        stages.steps = stages.count_steps(rank, chunk).max(1);
        stages
    }

    fn count_steps(&self, rank: usize, chunk: usize) -> usize {
        let filled = match &self.fill {
            Fill::None => 0,
            Fill::All(stream) => stream.steps(chunk),
            Fill::Each(streams) => {
                let others = streams.iter().enumerate().filter(|&(r, _)| r != rank);
                others.map(|(_, s)| s.steps(chunk)).max().unwrap_or(0)
            }
        };
        let reduced = self.reduce.as_ref().map_or(0, |r| r.own.steps(chunk));
        let gathered = self.gather.iter().enumerate().filter(|&(r, _)| r != rank);
        let gathered = gathered.filter_map(|(_, s)| s.as_ref()).map(|s| s.steps(chunk)).max();
        filled.max(reduced).max(gathered.unwrap_or(0))
    }
}
