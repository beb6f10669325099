//! Large calls: data moves in steps through slots, or is read and written where it lies.

use smallvec::{SmallVec, smallvec};

use super::headers::by_rank;
use super::{Machine, Phase, copy_local};
use crate::Error;
use crate::Result;
use crate::backend::native::kernels::{Operand, Reducer};
use crate::backend::native::shm::Inner;
use crate::backend::native::shm::combine::Operands;
use crate::backend::native::shm::direct::Direct;
use crate::backend::native::shm::protocol::{STEP_BITS, Word, mark, steps_of, tell};
use crate::backend::native::shm::segment::DEPTH;
use crate::backend::native::shm::stages::{Fill, Stages, Stream};
use crate::backend::native::transport::Progress;

const FILLED: usize = 0;
const REDUCED: usize = 1;
const GATHERED: usize = 2;

/// How far a call that moves in steps is.
pub(super) struct Position {
    steps: usize,
    done: [usize; 3],
    /// How many sources of the current step have been gathered.
    sources: usize,
    /// The last known progress of every rank, by stage.
    seen: [SmallVec<[usize; 8]>; 3],
    factors: SmallVec<[f64; 8]>,
    /// Whose data is lent.
    direct: Direct,
}

impl Machine<'_> {
    /// Where the data of the others is lent, and whether this rank's is.
    fn locate(&self, inner: &Inner, stages: &Stages) -> Result<Direct> {
        let mut direct = Direct::new(inner.ranks(), self.direct);
        // Who lends waits for those who read. For the others its tensor may be gone by now.
        let reads = |r: usize| stages.reduce.is_some() || matches!(stages.gather.get(r), Some(Some(_)));
        for r in (0..inner.ranks()).filter(|&r| r != inner.rank && reads(r)) {
            let bytes = self.header(inner, r).extent;
            if bytes & ((1 << STEP_BITS) - 1) == 0 {
                // It came with the header.
                continue;
            }
            let (segment, bytes) = match by_rank(self.call.op) {
                true => (inner.rank, self.size_for(inner, r, inner.rank).1),
                false => (0, (bytes >> STEP_BITS) as usize),
            };
            direct.look_up(inner, r, self.round, segment, bytes)?;
        }
        Ok(direct)
    }

    pub(super) fn begin_steps(&mut self, inner: &Inner, steps: usize) -> Result<()> {
        let (rank, ranks, chunk) = (inner.rank, inner.ranks(), inner.segment.layout.chunk);
        let stages = self.stages.take();
        let stages = stages.unwrap_or_else(|| Box::new(Stages::new(&self.call, rank, ranks, chunk)));
        if let Some((from, to)) = &stages.local {
            copy_local(
                &stages.lists[from.list],
                from.range.clone(),
                &stages.lists[to.list],
                to.range.clone(),
            );
        }
        let direct = self.locate(inner, &stages)?;
        let unless = |there: bool| if there { 0 } else { steps };
        // The others write what this rank would gather to its tensor, if it is lent for that.
        let gathers = !(stages.gather.is_empty() || self.direct && stages.results_in_place);
        let done = [
            unless(!matches!(stages.fill, Fill::None) && !self.direct),
            unless(stages.reduce.is_some()),
            unless(gathers),
        ];
        self.stages = Some(stages);
        self.phase = Phase::Moving(Box::new(Position {
            steps,
            done,
            sources: 0,
            seen: std::array::from_fn(|_| smallvec![0; ranks]),
            factors: (0..ranks).map(|r| self.factor(inner, r)).collect(),
            direct,
        }));
        Ok(())
    }

    /// Does one thing that can be done: what frees slots first.
    pub(super) fn step(&mut self, inner: &Inner) -> Result<Progress> {
        let Phase::Moving(position) = &mut self.phase else { return Ok(Progress::Done) };
        let Some(stages) = &self.stages else { return Ok(Progress::Done) };
        let mut view = View { inner, round: self.round, stages, position };
        let moved = view.gather() || view.reduce(self.reducer.as_ref()) || view.fill();
        if view.position.done.iter().all(|&d| d == view.position.steps) && view.let_go() {
            // What was read in place was what its owner lent, unless it had given up by now.
            return match view.position.direct.sources().any(|(r, _)| inner.segment.withdrawn(r, self.round)) {
                true => Err(Error::Aborted),
                false => Ok(Progress::Done),
            };
        }
        Ok(if moved { Progress::Moved } else { Progress::Idle })
    }
}

/// A call in steps, for the length of one of them.
struct View<'m> {
    inner: &'m Inner,
    round: u64,
    stages: &'m Stages,
    position: &'m mut Position,
}

impl View<'_> {
    /// Whether a rank has done a stage of `steps` steps.
    fn reached(&mut self, rank: usize, stage: usize, steps: usize) -> bool {
        let there = stage == FILLED || (stage == GATHERED && self.stages.results_in_place);
        if there && self.position.direct.of(rank).is_some() {
            // It has nothing to fill, or gathers nothing.
            return true;
        }
        let seen = &mut self.position.seen[stage][rank];
        if *seen < steps {
            *seen = steps_of(self.inner.segment.progress(rank, stage).read(), self.round) as usize;
        }
        *seen >= steps
    }

    fn others(&self) -> impl Iterator<Item = usize> + use<> {
        let rank = self.inner.rank;
        (0..self.inner.ranks()).filter(move |&r| r != rank)
    }

    fn advance(&mut self, stage: usize) {
        self.position.done[stage] += 1;
        let word = self.inner.segment.progress(self.inner.rank, stage);
        tell(word, mark(self.round, self.position.done[stage] as u64), self.inner.other_bells());
    }

    /// Whether those who read a slot have read what was there [`DEPTH`] steps ago.
    fn free(&mut self, step: usize, stage: usize) -> bool {
        let readers = self.stages.readers;
        step < DEPTH
            || self.others().all(|r| {
                (stage == GATHERED && !readers.contain(r)) || self.reached(r, stage, step + 1 - DEPTH)
            })
    }

    /// Whether the others are done with this rank's tensors, if it has lent them.
    fn let_go(&mut self) -> bool {
        let (steps, readers) = (self.position.steps, self.stages.readers);
        let reduces = self.stages.reduce.is_some();
        !self.position.direct.own
            || self.others().all(|r| match reduces {
                true => self.reached(r, REDUCED, steps),
                false => !readers.contain(r) || self.reached(r, GATHERED, steps),
            })
    }

    fn fill(&mut self) -> bool {
        let step = self.position.done[FILLED];
        let stage = if self.stages.reduce.is_some() { REDUCED } else { GATHERED };
        if step == self.position.steps || !self.free(step, stage) {
            return false;
        }
        let (segment, rank) = (&self.inner.segment, self.inner.rank);
        let fill = |stream: &Stream, slot| {
            let list = &self.stages.lists[stream.list];
            // SAFETY: a slot of this rank that has been read, and a chunk fits in it.
            unsafe { list.read(stream.chunk(step, segment.layout.chunk), slot) };
        };
        match &self.stages.fill {
            Fill::None => {}
            Fill::All(stream) => fill(stream, segment.chunk_for_all(rank, step)),
            Fill::Each(streams) => {
                for r in self.others() {
                    fill(&streams[r], segment.chunk_for(rank, r, step));
                }
            }
        }
        self.advance(FILLED);
        true
    }

    fn reduce(&mut self, reducer: Option<&Reducer>) -> bool {
        let step = self.position.done[REDUCED];
        let (Some(reduce), Some(reducer)) = (&self.stages.reduce, reducer) else { return false };
        // To whom it does not go directly finds the result in a slot.
        let lent = |r| self.stages.results_in_place && self.position.direct.of(r).is_some();
        let share = reduce.share && !self.others().all(lent);
        if step == self.position.steps
            || !self.others().all(|r| self.reached(r, FILLED, step + 1))
            || (share && !self.free(step, GATHERED))
        {
            return false;
        }
        let (segment, rank) = (&self.inner.segment, self.inner.rank);
        let part = |s: &Stream| s.chunk(step, segment.layout.chunk);
        let start = part(&reduce.own).start;
        let place = |r| match self.position.direct.of(r) {
            // SAFETY: `Direct` has compared the size of what is there with what the header said.
            Some(base) => unsafe { base.add(start).cast_const() },
            None => segment.chunk_for(r, rank, step).cast_const(),
        };
        let mut copies: SmallVec<[*mut u8; 8]> = SmallVec::new();
        if self.stages.results_in_place {
            // SAFETY: as above.
            copies.extend(self.position.direct.sources().map(|(_, base)| unsafe { base.add(start) }));
        }
        copies.extend(share.then(|| segment.chunk_for_all(rank, step)));
        let factors = self.position.factors.iter().enumerate();
        let all = factors.map(|(r, &factor)| Operand { data: place(r), factor });
        let operands = Operands { reducer, rank, all: all.collect() };
        let lists = &self.stages.lists;
        let keep = reduce.keep.as_ref().map(|k| (&lists[k.list], part(k)));
        // SAFETY: every rank has filled its slot for this step and waits for this rank before it fills
        // it again, or has lent its tensor until this rank is done, this part of it to nobody else; the slot for
        // all has been read; `keep` is `own` or does not overlap it.
        unsafe { operands.combine((&lists[reduce.own.list], part(&reduce.own)), keep, &copies) };
        self.advance(REDUCED);
        true
    }

    fn gather(&mut self) -> bool {
        let step = self.position.done[GATHERED];
        if step == self.position.steps {
            return false;
        }
        let (segment, rank, ranks) = (&self.inner.segment, self.inner.rank, self.inner.ranks());
        // Results of reductions and what is the same for all lie in the slots for all.
        let reduced = self.stages.reduce.is_some();
        let each = self.stages.comes_apart;
        let mut moved = false;
        while self.position.sources + 1 < ranks {
            let source = (rank + 1 + self.position.sources) % ranks;
            if let Some(stream) = &self.stages.gather[source] {
                if !self.reached(source, if reduced { REDUCED } else { FILLED }, step + 1) {
                    return moved;
                }
                let chunk = stream.chunk(step, segment.layout.chunk);
                let from = match self.position.direct.of(source).filter(|_| !reduced) {
                    // SAFETY: `Direct` has compared the size of what is there with what the header said.
                    Some(base) => unsafe { base.add(chunk.start).cast_const() },
                    None if each => segment.chunk_for(source, rank, step).cast_const(),
                    None => segment.chunk_for_all(source, step).cast_const(),
                };
                let list = &self.stages.lists[stream.list];
                // SAFETY: the slot was filled for this step and is not filled again before this rank
                // says that it has gathered, and a chunk fits; or the tensor is lent until then.
                unsafe { list.write(chunk, from, self.stages.past_cache) };
                moved = true;
            }
            self.position.sources += 1;
        }
        self.position.sources = 0;
        self.advance(GATHERED);
        true
    }
}
