//! From a first finding to the failure: asks the other ranks before it blames one.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cause::{Cause, lost, words_of_absence};
use super::control::{Overdue, Presence, Stranded};
use super::engine::Engine;
use super::ledger::{DEPTH, Report};
use super::stamp;
use super::transport::Stamp;
use crate::Error;

/// How long the rank that failed first has to say so.
const GRACE: Duration = Duration::from_millis(400);
/// How often the question is asked again.
const AGAIN: Duration = Duration::from_millis(20);
/// How many times as long who has withdrawn a message may take to say why: it may have to ask first.
const WITHDRAWN: u32 = 4;

/// How long ranks have to answer where it depends on all answers who is to blame: a rank of a busy machine is not to be
/// taken for one that is gone. Where all have answered, nobody waits.
const PATIENCE: Duration = Duration::from_secs(2);
/// After a call that has waited in vain it is this part of that time, and this at least.
const PART: u32 = 8;
const LEAST: Duration = Duration::from_secs(1);

/// An investigation. Meanwhile a peer may tell the cause, which then counts.
pub(crate) struct Diagnosis {
    finding: Error,
    stamp: Stamp,
    /// The number that is asked about.
    seq: u64,
    about: About,
    entered: Instant,
    until: Instant,
    ask: Instant,
    /// Whether all that had come by `until` has been heard.
    heard: bool,
    _examined: Arc<()>,
}

/// What does not end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum About {
    Call,
    /// A message, and the peer, where it is not any.
    Message(Option<usize>),
}

impl Diagnosis {
    /// Into why a call fails.
    pub(crate) fn new(engine: &Engine, finding: Error, stamp: Stamp, entered: Instant) -> Self {
        Self::begin(engine, finding, stamp, entered, About::Call)
    }

    /// Into why a message takes so long.
    pub(crate) fn of_message(engine: &Engine, overdue: Overdue, stamp: Stamp, now: Instant) -> Self {
        let Overdue { what, elapsed, peer } = overdue;
        let finding = Error::Timeout { op: what, seq: stamp.seq, elapsed, missing: Vec::new() };
        Self::begin(engine, finding, stamp, now - elapsed, About::Message(peer))
    }

    /// Whether it is about a message, which may come meanwhile.
    pub(crate) fn is_about_a_message(&self) -> bool {
        self.about != About::Call
    }

    fn begin(engine: &Engine, finding: Error, stamp: Stamp, entered: Instant, about: About) -> Self {
        let seq = match &finding {
            Error::Desync { seq, .. } => *seq,
            _ => stamp.seq,
        };
        let now = Instant::now();
        let examined = engine.examine();
        engine.control.ask(seq);
        let grace = match &finding {
            Error::Aborted => GRACE * WITHDRAWN,
            Error::Desync { .. } => PATIENCE,
            Error::Timeout { .. } => (now.duration_since(entered) / PART).clamp(LEAST, PATIENCE),
            _ => GRACE,
        };
        Self {
            finding,
            stamp,
            seq,
            about,
            entered,
            until: now + grace,
            ask: now + AGAIN,
            heard: false,
            _examined: examined,
        }
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
        let own = engine.ledger.call(self.seq);
        // This rank may have gone on with many calls that nobody waits for.
        let remembered = (self.stamp.seq == self.seq).then_some(self.stamp.fingerprint);
        let own = own.or(remembered.filter(|&call| call != stamp::UNKNOWN));
        let called = |rank: usize| match (answers[rank].map(|a| (a.entered, a.call)), &presence[rank]) {
            _ if rank == engine.rank => own,
            (Some((_, Some(call))), _) => Some(call),
            // It has called something, and cannot tell what: that proves nothing against it.
            (Some((entered, None)), _) if entered >= self.seq => own,
            (_, Presence::Left(calls) | Presence::Closed(calls)) if *calls >= self.seq => own,
            _ => None,
        };
        let calls: Vec<Option<u128>> = (0..engine.size).map(called).collect();
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
        let Error::Timeout { op, missing: unseen, .. } = &self.finding else { return None };
        let gone = |presence| match presence {
            // It has said itself how far it came.
            Presence::Left(calls) | Presence::Closed(calls) => {
                Some(Report { completed: calls, entered: calls, call: None })
            }
            Presence::Here | Presence::Lost(_) => None,
        };
        let presence = engine.control.presence().into_iter();
        let reports = engine.control.answers().into_iter().zip(presence);
        let mut reports: Vec<_> =
            reports.map(|(answer, presence)| answer.or_else(|| gone(presence))).collect();
        reports[engine.rank] = Some(engine.ledger.report(self.seq));
        if !unseen.is_empty() {
            // The transport has seen the others come: they need not answer.
            let came = Report { completed: self.seq.saturating_sub(1), entered: self.seq, call: None };
            for (_, report) in reports.iter_mut().enumerate().filter(|(rank, _)| !unseen.contains(rank)) {
                report.get_or_insert(came);
            }
        }
        if !late && reports.iter().any(Option::is_none) {
            return None;
        }
        let (call, missing) = match self.about {
            About::Message(Some(peer)) => blame_for_message(peer, engine.rank, &reports),
            About::Message(None) | About::Call => blame(self.seq, &reports),
        };
        let call = call.and_then(|seq| engine.ledger.call(seq).map(|call| (seq, call)));
        Some(Cause::Timeout {
            op: call.map_or_else(|| op.clone(), |(_, call)| stamp::op_name(call).to_owned()),
            seq: call.map_or(self.seq, |(seq, _)| seq),
            elapsed: now.duration_since(self.entered),
            missing,
        })
    }
}

/// Who has not come to a call, or does not answer.
fn not_in(seq: u64, reports: &[Option<Report>]) -> Vec<usize> {
    (0..reports.len()).filter(|&rank| reports[rank].is_none_or(|r| r.entered < seq)).collect()
}

/// Who keeps call `seq` from ending, and in which earlier call, where it is one.
///
/// Ranks leave a call one after another. One that still waits in an earlier call is late because that does not
/// end: who keeps it from ending is to blame. Unless everybody has come to the earlier call, which then can end.
fn blame(seq: u64, reports: &[Option<Report>]) -> (Option<u64>, Vec<usize>) {
    let first = reports.iter().flatten().filter_map(Report::under_way).fold(seq, u64::min);
    // Nobody is further ahead of another than the ledger remembers.
    let earlier = first.max(seq.saturating_sub(DEPTH as u64))..seq;
    let stuck =
        earlier.map(|call| (Some(call), not_in(call, reports))).find(|(_, missing)| !missing.is_empty());
    stuck.unwrap_or_else(|| (None, not_in(seq, reports)))
}

/// The same for a message between `rank` and `peer`. The peer is to blame, unless it waits itself: in a call that
/// this rank has come to and others have not, or, as far as can be seen, for a rank that does not answer.
fn blame_for_message(peer: usize, rank: usize, reports: &[Option<Report>]) -> (Option<u64>, Vec<usize>) {
    let (Some(theirs), Some(ours)) = (reports[peer], reports[rank]) else { return (None, vec![peer]) };
    let call = theirs.under_way().filter(|&call| call <= ours.entered);
    match not_in(call.unwrap_or(0), reports) {
        nobody if nobody.is_empty() => (None, vec![peer]),
        missing => (call, missing),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The answer of a rank that ended so many calls and entered so many.
    fn at(completed: u64, entered: u64) -> Option<Report> {
        Some(Report { completed, entered, call: None })
    }

    #[test]
    fn a_rank_that_waits_in_an_earlier_call_for_ranks_that_do_not_answer_is_not_to_blame() {
        // Rank 2 is one call ahead of rank 3; ranks 0 and 1 are behind a cut cable.
        let reports = [None, None, at(7, 8), at(6, 7)];
        assert_eq!(blame(8, &reports), (Some(7), vec![0, 1]), "as rank 2 sees it");
        assert_eq!(blame(7, &reports), (None, vec![0, 1]), "as rank 3 sees it");
    }

    #[test]
    fn a_rank_that_waits_in_an_earlier_call_for_one_that_has_not_called_it_is_not_to_blame() {
        assert_eq!(blame(8, &[at(7, 8), at(6, 7), at(6, 6)]), (Some(7), vec![2]));
    }

    #[test]
    fn a_rank_that_has_called_nothing_since_the_call_before_is_to_blame() {
        assert_eq!(blame(8, &[at(7, 8), at(7, 8), at(7, 7)]), (None, vec![2]));
    }

    #[test]
    fn a_rank_in_an_earlier_call_that_all_have_come_to_is_late_itself() {
        assert_eq!(blame(8, &[at(7, 8), at(6, 7), at(7, 8)]), (None, vec![1]));
    }

    #[test]
    fn of_ranks_in_several_earlier_calls_who_keeps_the_first_that_cannot_end_is_to_blame() {
        // All have come to call 6; rank 1 waits in call 7 for rank 2.
        assert_eq!(blame(8, &[at(7, 8), at(6, 7), at(5, 6)]), (Some(7), vec![2]));
    }

    #[test]
    fn a_rank_that_has_entered_calls_ahead_waits_in_the_first_of_them() {
        assert_eq!(blame(5, &[at(4, 5), at(3, 9), at(3, 3), at(4, 5)]), (Some(4), vec![2]));
    }

    #[test]
    fn who_does_not_send_is_to_blame_for_a_message_that_does_not_come() {
        assert_eq!(blame_for_message(1, 0, &[at(4, 4), at(4, 4), at(4, 4)]), (None, vec![1]));
        assert_eq!(blame_for_message(1, 0, &[at(4, 4), None, at(4, 4)]), (None, vec![1]));
        // It waits in a barrier, for this rank too.
        assert_eq!(blame_for_message(1, 0, &[at(4, 4), at(4, 5), at(4, 4)]), (None, vec![1]));
    }

    #[test]
    fn who_cannot_send_because_of_another_is_not_to_blame() {
        // Rank 3 is still in a call that rank 2 has left, and waits for ranks behind a cut cable.
        assert_eq!(blame_for_message(3, 2, &[None, None, at(7, 7), at(6, 7)]), (Some(7), vec![0, 1]));
        // Rank 3 waits for a message from one of those.
        assert_eq!(blame_for_message(3, 2, &[None, None, at(7, 7), at(7, 7)]), (None, vec![0, 1]));
    }
}
