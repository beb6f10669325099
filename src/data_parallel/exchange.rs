//! What is sent in a step, and how the step ends.
//!
//! A step that fails before its last bucket ends in good order: the flags tell the other ranks, and all get
//! an error. Where a rank cannot send its part at all (memory is short, a communication hook failed), the
//! others cannot know what to wait for: then the group is ended, and everybody learns at once.

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::buckets;
use super::hooks::GradBucket;
use super::reducer::Reducer;
use super::state::State;
use super::step::{Step, Substitute};
use super::unused::{Flags, Report, explain};
use crate::libtorch::panic_text;
use crate::{Error, ReduceOp, Result, autograd};

impl Reducer {
    /// Sends the next bucket, with zeros for what it lacks. An error ends the group.
    pub(super) fn launch(&self, state: &mut State, step: &mut Step, failed: bool) -> Result<()> {
        let sent = self.send(state, step, failed);
        if let Err(error) = &sent {
            self.break_off(error);
        }
        sent
    }

    fn send(&self, state: &mut State, step: &mut Step, failed: bool) -> Result<()> {
        let index = step.next;
        step.next += 1;
        let is_last = step.next == state.plan.buckets.len();
        let members = state.plan.buckets[index].clone();
        let mut gradients = tch::no_grad(|| {
            members.iter().map(|&member| state.contribution(step, member)).collect::<Result<Vec<_>>>()
        })?;
        if let Some(flat) = state.flats.get(index) {
            gradients = vec![flat.shallow_clone()];
        }
        tracing::trace!(bucket = index, gradients = gradients.len(), "data parallel: bucket sent");
        let flags = match is_last {
            false => None,
            true => {
                let trouble = failed || !self.missing(state).is_empty();
                let used = if self.asks_for_use(state) { state.used.clone() } else { Vec::new() };
                let like = &state.parameters[members[0]].tensor;
                let own = Flags { trouble, used };
                let sent = own.to_tensor(like.kind(), like.device())?;
                step.flags = Some((own, sent.shallow_clone()));
                Some(sent)
            }
        };
        let Some(hook) = &mut state.hook else {
            gradients.extend(flags);
            let work = self.group.all_reduce_coalesced_async(&gradients, ReduceOp::Avg)?;
            step.exchanges.push(work.into());
            return Ok(());
        };
        let bucket = GradBucket {
            index,
            is_last,
            gradients,
            parameters: members.iter().map(|&m| state.parameters[m].tensor.shallow_clone()).collect(),
            names: members.iter().map(|&m| state.parameters[m].name.clone()).collect(),
        };
        step.exchanges.push(self.run_hook(index, || hook.start(bucket, &self.group))?);
        if let Some(flags) = flags {
            step.exchanges.push(self.group.all_reduce_async(&flags, ReduceOp::Avg)?.into());
        }
        Ok(())
    }

    /// Runs a part of a communication hook; a panic becomes an error. Grad mode is off, whichever thread this is
    /// and whether backward still runs.
    fn run_hook<T>(&self, bucket: usize, part: impl FnOnce() -> Result<T>) -> Result<T> {
        let _here = self.hooking.lock();
        let _no_grad = tch::no_grad_guard();
        catch_unwind(AssertUnwindSafe(part)).unwrap_or_else(|panic| {
            let text = panic_text(&*panic);
            Err(Error::Callback {
                reason: format!("the communication hook of bucket {bucket} panicked: {text}"),
            })
        })
    }

    /// This rank did not do its part, and the others cannot know which: ends the group with this cause,
    /// unless it has failed already.
    fn break_off(&self, error: &Error) {
        self.group.abort_because(Error::PeerLost {
            rank: self.group.rank(),
            op: "a data-parallel backward".to_owned(),
            source: Some(std::io::Error::other(format!("its data-parallel backward failed: {error}"))),
        });
    }

    /// The end of backward: sends what is left, waits for everything, and agrees with the other ranks on
    /// how it went. `failure` says why backward failed on this rank, where it did. Gives the error that all
    /// ranks agreed on, if they did; fails where they could not, which ends the group.
    pub(super) fn finish(&self, failure: Option<String>) -> Result<Option<Error>> {
        let result = self.conclude(failure);
        if let Err(error) = &result {
            self.break_off(error);
        }
        self.reset();
        result
    }

    pub(super) fn reset(&self) {
        let mut state = self.state.lock();
        state.step = None;
        state.used.fill(false);
    }

    fn conclude(&self, failure: Option<String>) -> Result<Option<Error>> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let mut step = state.step.take().unwrap_or_else(|| Step::new(&state.plan, &state.expected));
        let mut ended = Ok(());
        while ended.is_ok() && step.next < state.plan.buckets.len() {
            ended = self.launch(state, &mut step, failure.is_some());
        }
        let missing = self.missing(state).into_iter().map(|m| state.parameters[m].name.clone()).collect();
        // Waiting is done without the lock, and for all: their memory is in use until then.
        drop(guard);
        for (bucket, exchange) in std::mem::take(&mut step.exchanges).into_iter().enumerate() {
            let one = self.run_hook(bucket, || exchange.finish());
            ended = ended.and(one);
        }
        ended?;
        // No bucket, no flags: nothing was exchanged.
        let Some((own, average)) = &step.flags else { return Ok(None) };
        // Alone there is nobody to hear of, and to read from a device is to wait for it.
        let flags = if self.group.size() == 1 { own.clone() } else { Flags::from_tensor(average)? };
        if flags.trouble {
            return explain(&Report { missing, failure }, &self.group).map(Some);
        }
        self.accept(&step, &flags)?;
        self.learn(&step, &flags)?;
        Ok(None)
    }

    /// Gives parameters that only other ranks used the average; leaves alone those that none used.
    fn accept(&self, step: &Step, flags: &Flags) -> Result<()> {
        let state = self.state.lock();
        tch::no_grad(|| {
            for Substitute { index, sent, original } in &step.substitutes {
                let mut tensor = state.parameters[*index].tensor.shallow_clone();
                let mut gradient = tensor.grad();
                let used_somewhere = flags.used.get(*index).copied().unwrap_or(true);
                match (used_somewhere, gradient.defined(), original) {
                    (true, true, _) => gradient.f_copy_(sent).map(drop)?,
                    (true, false, _) => autograd::set_grad(&mut tensor, Some(sent))?,
                    (false, true, Some(original)) => gradient.f_copy_(original).map(drop)?,
                    (false, ..) => {}
                }
            }
            Ok(())
        })
    }

    /// After the first step: buckets in the order in which gradients arrived on rank 0.
    fn learn(&self, step: &Step, flags: &Flags) -> Result<()> {
        // A static graph that nothing has run through on any rank is not known yet.
        let unknown = self.options.static_graph && !flags.used.contains(&true);
        if self.state.lock().learned || unknown {
            return Ok(());
        }
        let own = (self.group.rank() == 0).then(|| step.arrival.clone());
        let arrived = match own {
            Some(own) if self.group.size() == 1 => own,
            own => self.group.broadcast_object(own, 0)?,
        };
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let mut order = buckets::arrival_order(&arrived, state.parameters.len());
        if self.options.static_graph {
            state.expected.clone_from(&step.fired);
            // What no rank used is not sent any more.
            order.retain(|&index| flags.used[index]);
        }
        state.learned = true;
        state.set_plan(&order, &self.options, &self.group)
    }
}
