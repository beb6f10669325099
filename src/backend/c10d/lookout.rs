//! Looks after the operations of a device: one thread a group asks whether they have ended, tells those who wait for
//! that, and breaks off what takes too long. Callers who only order their stream never come here.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::engine::{Keep, Underway};
use super::inquest::Failure;
use crate::backend::Completion;
use crate::libtorch::{C10dWork, Mark, Told, unless_ending, use_device};

/// How long it pauses between two looks: at first, and at most.
const PAUSES: [Duration; 2] = [Duration::from_micros(20), Duration::from_micros(500)];
/// How long the thread stays when there is nothing to look after.
const LINGER: Duration = Duration::from_secs(5);

/// An operation that the device was given: the engine's own work, and what this crate added behind it.
pub(super) struct Given {
    pub(super) work: C10dWork,
    /// Where its end is, if that is not the work's.
    pub(super) mark: Option<Mark>,
}

impl Given {
    /// What this thread's current stream does from now on comes after it. Does not block.
    pub(super) fn order(&self) -> Told<()> {
        match &self.mark {
            Some(mark) => mark.order(),
            None => self.work.order(),
        }
    }

    fn poll(&self) -> Option<Told<()>> {
        match (self.work.poll()?, &self.mark) {
            (Ok(()), Some(mark)) => match mark.passed() {
                Ok(true) => Some(Ok(())),
                Ok(false) => None,
                Err(text) => Some(Err(text)),
            },
            (result, _) => Some(result),
        }
    }
}

/// An operation to look after.
pub(super) struct Charge {
    pub(super) underway: Underway,
    pub(super) given: Arc<Given>,
    pub(super) keep: Keep,
    pub(super) failure: Failure,
    pub(super) start: Instant,
    pub(super) ms: i64,
    pub(super) done: Completion,
}

impl Charge {
    fn poll(&self) -> Option<Told<()>> {
        let shared = &self.underway.0;
        if let Some(result) = self.given.poll() {
            // The kernels of an aborted communicator end as if they had worked.
            return Some(match shared.broken.load(Ordering::Acquire) {
                true => result.and_then(|()| Err("the group was aborted".to_owned())),
                false => result,
            });
        }
        if self.is_overdue(Instant::now()) {
            shared.cut();
            return Some(Err("the operation timed out".to_owned()));
        }
        shared.cause().map(|_| Err("the group was aborted".to_owned()))
    }

    fn is_overdue(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.start).as_millis() as i64 > self.ms
    }

    /// Whether the group works, as far as is known.
    fn is_well(&self) -> bool {
        let shared = &self.underway.0;
        !shared.broken.load(Ordering::Acquire) && shared.cause().is_none()
    }

    fn end(self, result: Told<()>) {
        if !self.failure.print.is_empty() {
            self.underway.0.done_with(self.failure.seq);
        }
        let failure = Failure { elapsed: self.start.elapsed(), ..self.failure };
        self.underway.end(result, self.keep, failure, self.done);
    }
}

/// Takes out those that have ended, and how. A group's operations follow one another on one stream: where all is well,
/// the first that has not ended answers for those behind it, which need not be asked.
fn take_ended<T, R>(all: &mut VecDeque<T>, in_order: bool, poll: impl Fn(&T) -> Option<R>) -> Vec<(T, R)> {
    let (mut ended, mut index) = (Vec::new(), 0);
    while let Some(one) = all.get(index) {
        match poll(one) {
            Some(result) => ended.extend(all.remove(index).map(|one| (one, result))),
            None if in_order => break,
            None => index += 1,
        }
    }
    ended
}

#[derive(Default)]
pub(super) struct Lookout {
    state: Mutex<State>,
    come: Condvar,
}

#[derive(Default)]
struct State {
    new: Vec<Charge>,
    /// When the oldest operation under way began.
    since: Option<Instant>,
    /// Whether there is a thread, and whether it sleeps until something comes.
    on_duty: bool,
    asleep: bool,
    closed: bool,
}

impl Lookout {
    pub(super) fn add(self: &Arc<Self>, device: usize, charge: Charge) {
        let mut state = self.state.lock();
        state.new.push(charge);
        if state.asleep {
            self.come.notify_one();
        }
        if state.on_duty {
            return;
        }
        state.on_duty = true;
        drop(state);
        let this = self.clone();
        let made =
            thread::Builder::new().name("tchd-nccl-watch".to_owned()).spawn(move || this.serve(device));
        if let Err(error) = made {
            // What is under way ends with `Aborted` when this is dropped.
            tracing::error!("no thread to look after operations: {error}");
            let mut state = self.state.lock();
            state.on_duty = false;
            let lost = std::mem::take(&mut state.new);
            drop(state);
            drop(lost);
        }
    }

    /// Whether an operation has been under way for longer than this.
    pub(super) fn waits_for_long(&self, quick: Duration) -> bool {
        self.state.lock().since.is_some_and(|since| since.elapsed() > quick)
    }

    /// The thread ends when nothing is left.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.come.notify_one();
    }

    fn serve(&self, device: usize) {
        if let Err(text) = use_device(device) {
            tracing::debug!("cuda device {device}: {text}");
        }
        let mut charges: VecDeque<Charge> = VecDeque::new();
        let mut pause = PAUSES[0];
        loop {
            {
                let mut state = self.state.lock();
                if state.new.is_empty() && charges.is_empty() {
                    state.since = None;
                    state.asleep = true;
                    let late = !state.closed && self.come.wait_for(&mut state, LINGER).timed_out();
                    state.asleep = false;
                    if state.new.is_empty() && (late || state.closed) {
                        state.on_duty = false;
                        return;
                    }
                } else if state.new.is_empty() {
                    self.come.wait_for(&mut state, pause);
                }
                charges.extend(state.new.drain(..));
                state.since = charges.front().map(|charge| charge.start);
            }
            let now = Instant::now();
            let well = charges.front().is_none_or(Charge::is_well);
            let in_order = well && !charges.iter().any(|charge| charge.is_overdue(now));
            let polled = unless_ending(|| take_ended(&mut charges, in_order, Charge::poll));
            let Some(ended) = polled else {
                // Their tensors cannot be freed any more either.
                return std::mem::forget(charges);
            };
            pause = if ended.is_empty() { (pause * 2).min(PAUSES[1]) } else { PAUSES[0] };
            ended.into_iter().for_each(|(charge, result)| charge.end(result));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::collections::VecDeque;

    #[test]
    fn one_that_has_not_ended_answers_for_those_behind_it_unless_the_group_failed() {
        for (in_order, taken, left, asked) in
            [(true, &[1, 2][..], &[-3, 4, -5][..], 3), (false, &[1, 2, 4], &[-3, -5], 5)]
        {
            let (mut all, polls) = (VecDeque::from([1, 2, -3, 4, -5]), Cell::new(0));
            let ended = super::take_ended(&mut all, in_order, |one: &i32| {
                polls.set(polls.get() + 1);
                (*one > 0).then_some("ended")
            });
            let ended: Vec<i32> = ended.into_iter().map(|(one, _)| one).collect();
            assert_eq!((&ended[..], &all.make_contiguous()[..], polls.get()), (taken, left, asked));
        }
    }
}
