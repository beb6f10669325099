//! The control channel over sockets: notes, presence and messages. What is known is in [`state`]; [`drive`] moves it.

mod drive;
mod state;

use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use once_cell::sync::OnceCell;
use parking_lot::Mutex;

use self::state::State;
use super::channel::Line;
use super::messages::{Deed, Messages};
use super::streams::Streams;
use super::wire::Note;
use crate::backend::native::bulk::Bulk;
use crate::backend::native::cause::Cause;
use crate::backend::native::control::{Control, Listener, Overdue, Presence, Stranded, nobody_sends};
use crate::backend::native::ledger::{Ledger, Report};
use crate::backend::native::progress;
use crate::backend::{Helper, Transfer};
use crate::{Error, Result};

/// How long the last words may take after a group was closed.
const LINGER: Duration = Duration::from_secs(1);

/// One rank's end of the control connections of a group.
pub(crate) struct SocketControl {
    rank: usize,
    ledger: Arc<Ledger>,
    listener: OnceCell<Weak<dyn Listener>>,
    state: Mutex<State>,
    /// Whether a thread that waits for a message reads the lines, so that the progress engine need not.
    helped: AtomicBool,
    /// Since when.
    help_began: Mutex<Instant>,
    /// Whether the progress engine's last turn found that it is so.
    known: AtomicBool,
    this: Weak<Self>,
}

/// What is done when the state is not locked.
#[derive(Default)]
struct After {
    deeds: Vec<Deed>,
    failures: Vec<Cause>,
    changed: bool,
}

impl SocketControl {
    /// `sockets[r]` leads to rank r. Watched by the progress engine from now on until closed.
    /// Large messages go by `bulk`, if there is such a way.
    pub(crate) fn new(
        rank: usize,
        sockets: Vec<Option<OwnedFd>>,
        bulk: Option<Arc<dyn Bulk>>,
        ledger: Arc<Ledger>,
    ) -> Result<Arc<Self>> {
        let world = sockets.len();
        let lines = sockets.into_iter().enumerate();
        let state = State {
            lines: lines.map(|(peer, fd)| fd.map(|fd| Line::new(peer, fd))).collect(),
            messages: Messages::new(rank, world),
            streams: bulk.map(Streams::new),
            presence: vec![Presence::Here; world],
            asked: 0,
            answers: vec![None; world],
            closing: None,
            failed: false,
            missed: Vec::new(),
        };
        let control = Arc::new_cyclic(|this| Self {
            rank,
            ledger,
            listener: OnceCell::new(),
            state: Mutex::new(state),
            helped: AtomicBool::new(false),
            help_began: Mutex::new(Instant::now()),
            known: AtomicBool::new(false),
            this: this.clone(),
        });
        progress::enlist(control.clone())?;
        Ok(control)
    }

    /// Changes the state, writes what can be written, and then does what must not be done locked.
    fn with<R>(&self, change: impl FnOnce(&mut State, &mut After) -> R) -> R {
        let mut after = After::default();
        let mut state = self.state.lock();
        let result = change(&mut state, &mut after);
        let busy = state.perform(&mut after);
        drop(state);
        if busy {
            // The progress engine writes on.
            progress::nudge();
        }
        self.dispatch(after);
        result
    }

    fn dispatch(&self, mut after: After) {
        let listener = || self.listener.get().and_then(Weak::upgrade);
        if !after.failures.is_empty() {
            let mut state = self.state.lock();
            if self.listener.get().is_none() {
                state.missed.append(&mut after.failures);
            }
        }
        // A failure first: what ends because of it then finds the group failed.
        for cause in &after.failures {
            if let Some(listener) = listener() {
                listener.failed(cause);
            }
        }
        for deed in after.deeds {
            match deed {
                Deed::Ended(done, result) => done.complete(result),
                Deed::Differ(cause) => {
                    if let Some(listener) = listener() {
                        listener.failed(&cause);
                    }
                }
                Deed::Note(..) | Deed::Stream(..) => {}
            }
        }
        if after.changed
            && let Some(listener) = listener()
        {
            listener.changed();
        }
    }
}

impl Control for SocketControl {
    fn attach(&self, listener: Weak<dyn Listener>) {
        // Attached once, by the engine that is made with it.
        let _ = self.listener.set(listener);
        self.with(|state, after| {
            after.changed = state.presence.iter().any(|p| *p != Presence::Here);
            after.failures.append(&mut state.missed);
        });
    }

    fn ask(&self, seq: u64) {
        self.with(|state, _| {
            if state.asked != seq {
                state.asked = seq;
                state.answers.fill(None);
            }
            state.send_all(&Note::Ask { seq });
        });
    }

    fn answers(&self) -> Vec<Option<Report>> {
        self.state.lock().answers.clone()
    }

    fn presence(&self) -> Vec<Presence> {
        self.state.lock().presence.clone()
    }

    fn listen(&self) -> bool {
        // What the turn would tell the progress engine it finds out itself.
        let _ = self.turn(true);
        self.state.lock().failed
    }

    fn tell(&self, cause: &Cause) {
        self.with(|state, _| state.send_all(&Note::Failed(cause.clone())));
    }

    fn leave(&self, calls: u64) {
        self.with(|state, _| state.send_all(&Note::Left { calls }));
    }

    fn transfer(&self, transfers: Vec<Transfer>) {
        self.with(|state, after| {
            for transfer in transfers {
                state.messages.post(transfer, &mut after.deeds);
            }
        });
    }

    fn helper(&self) -> Option<Weak<dyn Helper>> {
        Some(self.this.clone())
    }

    fn deadline(&self) -> Option<Instant> {
        self.state.lock().messages.deadline()
    }

    fn overdue(&self, now: Instant) -> Option<Overdue> {
        self.state.lock().messages.overdue(now)
    }

    fn stranded(&self) -> Option<Stranded> {
        let state = self.state.lock();
        let nobody = nobody_sends(&state.presence, self.rank);
        state.messages.stranded(|peer| state.presence[peer] != Presence::Here, nobody)
    }

    fn pending(&self) -> usize {
        self.state.lock().messages.pending()
    }

    fn fail_transfers(&self, error: &Arc<Error>) {
        let pending = self.with(|state, _| {
            state.give_up();
            state.messages.drain()
        });
        for done in pending {
            done.complete(Err(error.duplicate()));
        }
    }

    fn close(&self, completed: u64) {
        self.with(|state, _| {
            state.give_up();
            if state.closing.is_none() {
                state.send_all(&Note::Closed { completed });
                state.closing = Some(Instant::now() + LINGER);
            }
        });
        progress::nudge();
    }
}

impl std::fmt::Debug for SocketControl {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SocketControl(rank {})", self.rank)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::backend::native::control::Heard;

    #[test]
    fn who_listens_after_a_failure_was_told_hears_of_it() {
        let (a, b) = UnixStream::pair().unwrap();
        for socket in [&a, &b] {
            socket.set_nonblocking(true).unwrap();
        }
        let end = |rank: usize, socket: UnixStream| {
            let mut sockets = vec![None, None];
            sockets[1 - rank] = Some(socket.into());
            SocketControl::new(rank, sockets, None, Arc::new(Ledger::new())).unwrap()
        };
        let (teller, late) = (end(0, a), end(1, b));
        teller.tell(&Cause::Aborted);
        let until = Instant::now() + Duration::from_secs(60);
        while !late.listen() {
            assert!(Instant::now() < until, "the note does not come");
            std::thread::yield_now();
        }
        let heard = Heard::new();
        late.attach(heard.listener());
        // Whoever has read the note may be just about to tell.
        while heard.causes().is_empty() {
            assert!(Instant::now() < until, "the failure is not told");
            std::thread::yield_now();
        }
        assert_eq!(heard.causes(), [Cause::Aborted]);
        teller.close(0);
        late.close(0);
    }
}
