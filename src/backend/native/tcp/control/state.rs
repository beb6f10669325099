//! What is known of the peers, and what has come and is to go on their lines. Under the control's lock.

use std::time::Instant;

use super::After;
use crate::backend::native::cause::Cause;
use crate::backend::native::control::Presence;
use crate::backend::native::ledger::{Ledger, Report};
use crate::backend::native::tcp::channel::{Event, Line};
use crate::backend::native::tcp::messages::{Deed, Messages};
use crate::backend::native::tcp::streams::Streams;
use crate::backend::native::tcp::wire::Note;
use crate::backend::native::transport::Watch;

pub(super) struct State {
    pub(super) lines: Vec<Option<Line>>,
    pub(super) messages: Messages,
    /// A way around the lines, where there is one.
    pub(super) streams: Option<Streams>,
    pub(super) presence: Vec<Presence>,
    /// The last question, and the answers to it.
    pub(super) asked: u64,
    pub(super) answers: Vec<Option<Report>>,
    /// Closed: gone when all is written, at the latest then.
    pub(super) closing: Option<Instant>,
    /// A peer has told of a failure.
    pub(super) failed: bool,
    /// Failures that were told before there was a listener.
    pub(super) missed: Vec<Cause>,
}

impl State {
    /// What to sleep on.
    pub(super) fn watch(&self, set: &mut Vec<Watch>) {
        for line in self.lines.iter().flatten().filter(|l| !l.ended) {
            set.push(Watch { fd: line.fd.clone(), read: true, write: line.busy() });
        }
    }

    /// Queues what the deeds ask for and writes; keeps the deeds that are for later. Whether something
    /// is left to write.
    pub(super) fn perform(&mut self, after: &mut After) -> bool {
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
                return self.busy();
            }
        }
    }

    /// Whether something is left to write.
    pub(super) fn busy(&self) -> bool {
        self.lines.iter().flatten().any(Line::busy)
    }

    /// Whether messages are under way around the lines.
    pub(super) fn streaming(&self) -> bool {
        self.streams.as_ref().is_some_and(Streams::busy)
    }

    /// Messages are given up.
    pub(super) fn give_up(&mut self) {
        self.lines.iter_mut().flatten().for_each(Line::give_up);
        self.streams.iter_mut().for_each(Streams::give_up);
    }

    fn send(&mut self, to: usize, note: &Note, raw: &[u8]) {
        if let Some(line) = &mut self.lines[to] {
            line.send(note, raw);
        }
    }

    pub(super) fn send_all(&mut self, note: &Note) {
        for line in self.lines.iter_mut().flatten() {
            line.send(note, &[]);
        }
    }

    /// Reads what has come on every line.
    pub(super) fn read(&mut self, ledger: &Ledger, after: &mut After) {
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
