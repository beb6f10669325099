//! Who reads and writes the lines: the progress engine, or a thread that waits for a message and has nothing else to do.

use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::{After, LINGER, SocketControl};
use crate::Error;
use crate::backend::Helper;
use crate::backend::native::cause::Cause;
use crate::backend::native::progress::{self, Task, Turn};
use crate::backend::native::tcp::wait;
use crate::backend::native::transport::Watch;

/// For how long the progress engine looks again soon whether a helping thread has gone: then that need
/// not tell it each time.
const BRIEF: Duration = Duration::from_millis(10);
/// How soon that is.
const RETURN: Duration = Duration::from_millis(2);
/// How often a helping thread looks whether its message has ended otherwise.
const GLANCE: Duration = Duration::from_millis(20);
/// How long it naps where data comes around the sockets and nobody knocks.
const NAP: Duration = Duration::from_micros(50);
/// How often it tries before it sleeps.
const TRIES: u32 = 40;

impl Task for SocketControl {
    fn advance(&self, ready: bool) -> Turn {
        let turn = self.turn(ready);
        let helped = self.helped.load(Ordering::SeqCst);
        self.known.store(helped, Ordering::SeqCst);
        match turn {
            // A thread that helps may go without a word, as long as that was brief.
            Turn::Idle(None) if helped && self.help_began.lock().elapsed() < BRIEF => {
                Turn::Idle(Some(Instant::now() + RETURN))
            }
            turn => turn,
        }
    }

    fn watch(&self, set: &mut Vec<Watch>) -> bool {
        let before = set.len();
        let state = self.state.lock();
        state.watch(set);
        let helped = self.helped.load(Ordering::SeqCst);
        if helped {
            // The helping thread reads.
            let writes = |watch: &Watch| watch.write;
            let kept = set.split_off(before).into_iter().filter(writes);
            set.extend(kept.map(|watch| Watch { read: false, ..watch }));
        }
        // Of help that began since, the last turn said nothing: it might end without a word as well.
        !state.streaming() && (!helped || self.known.load(Ordering::SeqCst))
    }

    fn broken(&self, why: &Error) {
        if let Some(listener) = self.listener.get().and_then(Weak::upgrade) {
            listener.failed(&Cause::of(why, self.rank));
        }
    }
}

impl SocketControl {
    /// Moves on what can be, for the progress engine or for who comes by.
    pub(super) fn turn(&self, ready: bool) -> Turn {
        let mut after = After::default();
        let mut state = self.state.lock();
        if ready {
            state.read(&self.ledger, &mut after);
        }
        let state_now = &mut *state;
        let pumped = match &mut state_now.streams {
            Some(streams) => streams.pump(&mut state_now.messages, &mut after.deeds),
            None => false,
        };
        let busy = state.perform(&mut after);
        let moved = pumped || !after.deeds.is_empty() || after.changed || !after.failures.is_empty();
        let turn = match state.closing {
            Some(until) if !busy || Instant::now() >= until => {
                state.lines.fill_with(|| None);
                Turn::Ended
            }
            Some(until) => Turn::Idle(Some(until)),
            None if moved => Turn::Moved,
            // Nobody knocks: the progress engine spins a little, then looks again and again.
            None if state.streaming() => Turn::Idle(Some(Instant::now() + LINGER)),
            None => Turn::Idle(None),
        };
        drop(state);
        self.dispatch(after);
        turn
    }
}

impl Helper for SocketControl {
    fn help(&self, done: &dyn Fn() -> bool, until: Option<Instant>) {
        if self.helped.load(Ordering::SeqCst) {
            return;
        }
        let began = {
            let mut began = self.help_began.lock();
            *began = Instant::now();
            *began
        };
        if self.helped.swap(true, Ordering::SeqCst) {
            return;
        }
        let mut idle = 0;
        while !done() {
            match self.turn(true) {
                Turn::Moved => idle = 0,
                Turn::Idle(_) => idle += 1,
                Turn::Ended => break,
            }
            let now = Instant::now();
            if done() || until.is_some_and(|until| now >= until) {
                break;
            }
            if idle > TRIES {
                let mut set = Vec::new();
                let state = self.state.lock();
                state.watch(&mut set);
                let glance = now + if state.streaming() { NAP } else { GLANCE };
                drop(state);
                wait(&set, None, until.map_or(glance, |until| until.min(glance)));
            } else if idle > 0 {
                std::thread::yield_now();
            }
        }
        self.helped.store(false, Ordering::SeqCst);
        // What this thread began goes on without it.
        let state = self.state.lock();
        let more = state.busy() || state.streaming();
        drop(state);
        if more || began.elapsed() > BRIEF / 2 {
            progress::nudge();
        }
    }
}
