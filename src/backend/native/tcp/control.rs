//! The control channel over sockets: notes, presence and messages, driven by the progress engine.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use once_cell::sync::OnceCell;
use parking_lot::Mutex;

use super::channel::{Event, Line};
use super::messages::{Deed, Messages};
use super::streams::Streams;
use super::wire::Note;
use crate::backend::native::bulk::Bulk;
use crate::backend::native::cause::Cause;
use crate::backend::native::control::{Control, Listener, Overdue, Presence, Stranded, nobody_sends};
use crate::backend::native::ledger::{Ledger, Report};
use crate::backend::native::progress::{self, Task, Turn};
use crate::backend::native::transport::Watch;
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
    this: Weak<Self>,
}

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

struct State {
    lines: Vec<Option<Line>>,
    messages: Messages,
    /// A way around the lines, where there is one.
    streams: Option<Streams>,
    presence: Vec<Presence>,
    /// The last question, and the answers to it.
    asked: u64,
    answers: Vec<Option<Report>>,
    /// Closed: gone when all is written, at the latest then.
    closing: Option<Instant>,
    /// A peer has told of a failure.
    failed: bool,
    /// Failures that were told before there was a listener.
    missed: Vec<Cause>,
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

impl Helper for SocketControl {
    fn help(&self, done: &dyn Fn() -> bool, until: Option<Instant>) {
        if self.helped.load(Ordering::SeqCst) {
            return;
        }
        *self.help_began.lock() = Instant::now();
        if self.helped.swap(true, Ordering::SeqCst) {
            return;
        }
        let began = Instant::now();
        let mut idle = 0;
        while !done() {
            match self.advance(true) {
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
                super::wait(&set, None, until.map_or(glance, |until| until.min(glance)));
            } else if idle > 0 {
                std::thread::yield_now();
            }
        }
        self.helped.store(false, Ordering::SeqCst);
        if began.elapsed() > BRIEF / 2 {
            progress::nudge();
        }
    }
}

impl State {
    /// What to sleep on.
    fn watch(&self, set: &mut Vec<Watch>) {
        for line in self.lines.iter().flatten().filter(|l| !l.ended) {
            set.push(Watch { fd: line.fd.clone(), read: true, write: line.busy() });
        }
    }

    /// Queues what the deeds ask for and writes; keeps the deeds that are for later. Whether something
    /// is left to write.
    fn perform(&mut self, after: &mut After) -> bool {
        loop {
            let mut more = false;
            for deed in std::mem::take(&mut after.deeds) {
                match deed {
                    Deed::Note(to, note, raw) => self.send(to, &note, &raw),
                    Deed::Stream(to, id) => {
                        let bytes = self.messages.outgoing.get(&id).map_or(0, |(p, _)| p.buffer.bytes());
                        if let Some(streams) = self.streams.as_mut().filter(|s| s.carry(bytes)) {
                            streams.send(to, id);
                        } else if let Some(line) = &mut self.lines[to] {
                            line.stream(id);
                        }
                    }
                    other => after.deeds.push(other),
                }
            }
            for line in self.lines.iter_mut().flatten().filter(|l| l.busy()) {
                let before = after.deeds.len();
                line.flush(&mut self.messages, &mut after.deeds);
                more |= after.deeds[before..].iter().any(|d| matches!(d, Deed::Note(..) | Deed::Stream(..)));
            }
            if !more {
                return self.lines.iter().flatten().any(Line::busy);
            }
        }
    }

    /// Whether messages are under way around the lines.
    fn streaming(&self) -> bool {
        self.streams.as_ref().is_some_and(Streams::busy)
    }

    /// Messages are given up.
    fn give_up(&mut self) {
        self.lines.iter_mut().flatten().for_each(Line::give_up);
        self.streams.iter_mut().for_each(Streams::give_up);
    }

    fn send(&mut self, to: usize, note: &Note, raw: &[u8]) {
        if let Some(line) = &mut self.lines[to] {
            line.send(note, raw);
        }
    }

    fn send_all(&mut self, note: &Note) {
        for line in self.lines.iter_mut().flatten() {
            line.send(note, &[]);
        }
    }

    /// Reads what has come on every line.
    fn read(&mut self, ledger: &Ledger, after: &mut After) {
        let mut events = Vec::new();
        for peer in 0..self.lines.len() {
            let Some(line) = &mut self.lines[peer] else { continue };
            line.read(&mut self.messages, &mut after.deeds, &mut events);
            for event in events.drain(..) {
                match event {
                    Event::Note(note) => self.heard(peer, note, ledger, after),
                    Event::Ended(words) => {
                        // Ranks of a group that has failed close: none of them is lost for that.
                        if self.presence[peer] == Presence::Here && !self.failed {
                            self.presence[peer] = Presence::Lost(words);
                        }
                        after.changed = true;
                    }
                }
            }
        }
    }

    fn heard(&mut self, peer: usize, note: Note, ledger: &Ledger, after: &mut After) {
        match note {
            Note::Ask { seq } => {
                self.send(peer, &Note::Answer { seq, report: ledger.report(seq) }, &[]);
            }
            Note::Answer { seq, report } => {
                if seq == self.asked {
                    self.answers[peer] = Some(report);
                }
            }
            Note::Failed(cause) => {
                self.failed = true;
                after.failures.push(cause);
            }
            // The failure is told in a moment, when nothing is locked: until then nobody has left well.
            Note::Left { .. } | Note::Closed { .. } if self.failed => {}
            Note::Left { calls } => {
                self.presence[peer] = Presence::Left(calls);
                after.changed = true;
            }
            Note::Closed { completed } => {
                // Who has left in good order closes as well, later.
                if self.presence[peer] == Presence::Here {
                    self.presence[peer] = Presence::Closed(completed);
                    after.changed = true;
                }
            }
            Note::Stream { id, stream } => {
                if let Some(streams) = &mut self.streams {
                    streams.expect(peer, id, stream);
                }
            }
            // The line itself has dealt with these.
            Note::Offer { .. }
            | Note::Grant { .. }
            | Note::Data { .. }
            | Note::Eager { .. }
            | Note::Credit { .. } => {}
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
        let _ = self.advance(true);
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

impl Task for SocketControl {
    fn advance(&self, ready: bool) -> Turn {
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
            // A thread that helps may go without a word.
            None if self.helped.load(Ordering::SeqCst) && self.help_began.lock().elapsed() < BRIEF => {
                Turn::Idle(Some(Instant::now() + RETURN))
            }
            None => Turn::Idle(None),
        };
        drop(state);
        self.dispatch(after);
        turn
    }

    fn watch(&self, set: &mut Vec<Watch>) -> bool {
        let before = set.len();
        let state = self.state.lock();
        state.watch(set);
        if self.helped.load(Ordering::SeqCst) {
            // The helping thread reads.
            let writes = |watch: &Watch| watch.write;
            let kept = set.split_off(before).into_iter().filter(writes);
            set.extend(kept.map(|watch| Watch { read: false, ..watch }));
        }
        !state.streaming()
    }

    fn broken(&self, why: &Error) {
        if let Some(listener) = self.listener.get().and_then(Weak::upgrade) {
            listener.failed(&Cause::of(why, self.rank));
        }
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
