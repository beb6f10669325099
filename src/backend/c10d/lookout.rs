//! Looks after the operations of a device: one thread a group asks whether they have ended, tells those who wait for
//! that, and breaks off what takes too long. Callers who only order their stream never come here.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::engine::{Keep, Underway};
use super::inquest::Failure;
use crate::backend::Completion;
use crate::libtorch::{C10dWork, Mark, Told, use_device};

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
        if self.start.elapsed().as_millis() as i64 > self.ms {
            shared.cut();
            return Some(Err("the operation timed out".to_owned()));
        }
        shared.cause().map(|_| Err("the group was aborted".to_owned()))
    }

    fn end(self, result: Told<()>) {
        let failure = Failure { elapsed: self.start.elapsed(), ..self.failure };
        self.underway.end(result, self.keep, failure, self.done);
    }
}

#[derive(Default)]
pub(super) struct Lookout {
    state: Mutex<State>,
    come: Condvar,
}

#[derive(Default)]
struct State {
    new: Vec<Charge>,
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

    /// The thread ends when nothing is left.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.come.notify_one();
    }

    fn serve(&self, device: usize) {
        if let Err(text) = use_device(device) {
            tracing::debug!("cuda device {device}: {text}");
        }
        let mut charges: Vec<Charge> = Vec::new();
        let mut pause = PAUSES[0];
        loop {
            {
                let mut state = self.state.lock();
                if state.new.is_empty() && charges.is_empty() {
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
                charges.append(&mut state.new);
            }
            // In any order: a message may wait for what follows the end of a collective behind it.
            let mut ended = Vec::new();
            let mut index = 0;
            while index < charges.len() {
                match charges[index].poll() {
                    None => index += 1,
                    Some(result) => ended.push((charges.remove(index), result)),
                }
            }
            pause = if ended.is_empty() { (pause * 2).min(PAUSES[1]) } else { PAUSES[0] };
            ended.into_iter().for_each(|(charge, result)| charge.end(result));
        }
    }
}
