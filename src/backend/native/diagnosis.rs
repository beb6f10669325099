//! From a first finding to the failure: asks the other ranks before it blames one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cause::{Cause, lost, words_of_absence};
use super::control::{Presence, Stranded};
use super::engine::Engine;
use super::transport::Stamp;
use crate::Error;

/// How long the rank that failed first has to say so, or others to answer.
const GRACE: Duration = Duration::from_millis(400);
/// How often the question is asked again.
const AGAIN: Duration = Duration::from_millis(20);
/// How many times as long who has withdrawn a message may take to say why: it may have to ask first.
const WITHDRAWN: u32 = 4;

/// An investigation. Meanwhile a peer may tell the cause, which then counts.
pub(crate) struct Diagnosis {
    finding: Error,
    stamp: Stamp,
    /// The number that is asked about.
    seq: u64,
    entered: Instant,
    until: Instant,
    ask: Instant,
    /// Whether all that had come by `until` has been heard.
    heard: bool,
}

impl Diagnosis {
    pub(crate) fn new(engine: &Engine, finding: Error, stamp: Stamp, entered: Instant) -> Self {
        let seq = match &finding {
            Error::Desync { seq, .. } => *seq,
            _ => stamp.seq,
        };
        let now = Instant::now();
        engine.examine();
        engine.control.ask(seq);
        let grace = if matches!(finding, Error::Aborted) { GRACE * WITHDRAWN } else { GRACE };
        Self { finding, stamp, seq, entered, until: now + grace, ask: now + AGAIN, heard: false }
    }

    /// The failure when a message waits for a peer that is gone: one that left is not lost, it did not
    /// do its side.
    pub(crate) fn absent_peer(engine: &Engine, stranded: Stranded) -> Error {
        let Stranded { what, peer } = stranded;
        match engine.control.presence().swap_remove(peer) {
            Presence::Left(calls) | Presence::Closed(calls) => Error::Desync {
                op: what.split(' ').next().unwrap_or_default().to_owned(),
                // What was called before it left has nothing to do with this.
                seq: calls + 1,
                rank: peer,
                theirs: words_of_absence(calls),
                ours: what,
            },
            Presence::Lost(words) => lost(peer, &words),
            Presence::Here => lost(peer, ""),
        }
    }

    /// The verdict, once there is one; the group has failed then.
    pub(crate) fn advance(&mut self, engine: &Engine) -> Option<Error> {
        if let Some(error) = engine.failed(Some(self.stamp)) {
            return Some(error);
        }
        let now = Instant::now();
        let late = now >= self.until;
        if late && !self.heard {
            // On a busy machine the progress engine may be behind: what peers have said counts first.
            self.heard = true;
            if engine.control.listen() {
                self.until = now + GRACE;
            }
            return None;
        }
        if let Error::PeerLost { rank, .. } = self.finding
            && let Presence::Left(calls) | Presence::Closed(calls) = engine.control.presence()[rank]
            && calls < self.seq
        {
            // Its connection has ended because it left, not because it died.
            self.finding = engine.not_called(rank, self.seq, calls);
        }
        let (cause, error) = match &self.finding {
            Error::Desync { .. } => (self.vote(engine, late)?, None),
            Error::Timeout { .. } => (self.missing(engine, late, now)?, None),
            // Who goes because of another says so before it closes its control channel. Once that is
            // closed there is nothing more to come.
            Error::PeerLost { rank, source, .. } => {
                if !late && engine.control.presence()[*rank] == Presence::Here {
                    return None;
                }
                let words = source.as_ref().map(ToString::to_string).unwrap_or_default();
                let after = match engine.control.presence()[*rank] {
                    Presence::Left(calls) | Presence::Closed(calls) => calls,
                    Presence::Here | Presence::Lost(_) => 0,
                };
                (Cause::Lost { rank: *rank, words, after }, None)
            }
            // A peer withdrew: it has failed and will say why.
            Error::Aborted if !late => return None,
            other => (Cause::of(other, engine.rank), Some(Arc::new(other.duplicate()))),
        };
        engine.fail(cause, error);
        engine.failed(Some(self.stamp))
    }

    /// What every rank called, once all that can have answered.
    fn vote(&mut self, engine: &Engine, late: bool) -> Option<Cause> {
        let answers = engine.control.answers();
        let presence = engine.control.presence();
        let settled = (0..engine.size).all(|rank| match presence[rank] {
            _ if rank == engine.rank => true,
            Presence::Left(calls) if calls < self.seq => true,
            Presence::Here | Presence::Left(_) => answers[rank].is_some_and(|a| a.entered >= self.seq),
            Presence::Closed(_) | Presence::Lost(_) => true,
        });
        if !settled && !late {
            let now = Instant::now();
            if now >= self.ask {
                engine.control.ask(self.seq);
                self.ask = now + AGAIN;
            }
            return None;
        }
        let mut calls: Vec<Option<u128>> = answers.iter().map(|a| a.and_then(|a| a.call)).collect();
        calls[engine.rank] = engine.ledger.call(self.seq);
        if calls.iter().all(|call| *call == calls[0]) {
            // All agree on the call: the two disagree about a message in it.
            return Some(Cause::of(&self.finding, engine.rank));
        }
        let gone = presence.iter().enumerate().filter_map(|(rank, presence)| match *presence {
            Presence::Left(calls) | Presence::Closed(calls) if calls < self.seq => Some((rank, calls)),
            _ => None,
        });
        Some(Cause::Desync { seq: self.seq, calls, gone: gone.collect() })
    }

    /// Who has not come, once all that can have answered.
    fn missing(&self, engine: &Engine, late: bool, now: Instant) -> Option<Cause> {
        let answers = engine.control.answers();
        let others = || (0..engine.size).filter(|&rank| rank != engine.rank);
        if !late && others().any(|rank| answers[rank].is_none()) {
            return None;
        }
        let missing = others().filter(|&r| answers[r].is_none_or(|a| a.entered < self.seq)).collect();
        Some(Cause::Timeout {
            op: super::stamp::op_name(self.stamp.fingerprint).to_owned(),
            seq: self.seq,
            elapsed: now.duration_since(self.entered),
            missing,
        })
    }
}
