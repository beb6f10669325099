//! Why a group failed, as one rank tells the others; each makes its own error of it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::stamp;
use super::transport::Stamp;
use crate::Error;

/// The first failure of a group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Cause {
    /// Ranks called different things at one number: what each called (`None`: nothing yet).
    Desync {
        /// The number.
        seq: u64,
        /// The fingerprint of each rank's call.
        calls: Vec<Option<u128>>,
        /// The ranks that left the group before, each after how many calls.
        gone: Vec<(usize, u64)>,
    },
    /// Two ranks disagree about a message between them.
    Disagree {
        /// The operation.
        op: String,
        /// Its number.
        seq: u64,
        /// The rank that found out, and what it called.
        by: (usize, String),
        /// The rank it disagrees with, and what that one called.
        with: (usize, String),
    },
    /// An operation did not end in time.
    Timeout {
        /// The operation.
        op: String,
        /// Its number.
        seq: u64,
        /// How long it was waited for.
        elapsed: Duration,
        /// The ranks that had not come.
        missing: Vec<usize>,
    },
    /// A rank went away.
    Lost {
        /// The rank.
        rank: usize,
        /// The system's words, or those it left.
        words: String,
        /// How many calls it is known to have ended before.
        after: u64,
    },
    /// Somebody called `abort`.
    Aborted,
}

impl Cause {
    /// What `rank` tells the others about an error that it found itself.
    pub(crate) fn of(error: &Error, rank: usize) -> Self {
        match error {
            Error::Aborted => Self::Aborted,
            Error::Timeout { op, seq, elapsed, missing } => {
                Self::Timeout { op: op.clone(), seq: *seq, elapsed: *elapsed, missing: missing.clone() }
            }
            Error::Desync { op, seq, rank: other, theirs, ours } => Self::Disagree {
                op: op.clone(),
                seq: *seq,
                by: (rank, ours.clone()),
                with: (*other, theirs.clone()),
            },
            Error::PeerLost { rank, source, .. } => Self::Lost {
                rank: *rank,
                words: source.as_ref().map(ToString::to_string).unwrap_or_default(),
                after: 0,
            },
            Error::Poisoned { cause } => Self::of(cause, rank),
            other => Self::Lost { rank, words: other.to_string(), after: 0 },
        }
    }

    /// The error that `rank` sees, whose call with this stamp (if any) it ended.
    pub(crate) fn error(&self, rank: usize, ours: Option<Stamp>) -> Error {
        match self {
            Self::Desync { seq, calls, gone } => desync(*seq, calls, gone, rank),
            Self::Disagree { op, seq, by, with } => {
                // A third rank called what one of them did, if not something else of the same words.
                let mine =
                    ours.filter(|s| s.seq == *seq && rank != by.0).map(|s| stamp::words(s.fingerprint));
                let sides_with = with.0 == rank || mine.is_some_and(|mine| mine == with.1);
                let (theirs, ours) = if sides_with { (by, &with.1) } else { (with, &by.1) };
                Error::Desync {
                    op: op.clone(),
                    seq: *seq,
                    rank: theirs.0,
                    theirs: theirs.1.clone(),
                    ours: ours.clone(),
                }
            }
            Self::Timeout { op, seq, elapsed, missing } => {
                Error::Timeout { op: op.clone(), seq: *seq, elapsed: *elapsed, missing: missing.clone() }
            }
            Self::Lost { rank, words, .. } => Error::PeerLost {
                rank: *rank,
                op: ours.map_or_else(|| "no operation".to_owned(), |s| s.label()),
                source: (!words.is_empty()).then(|| io::Error::other(words.clone())),
            },
            Self::Aborted => Error::Aborted,
        }
    }

    /// How many calls this failure has nothing to do with: whoever is still in one of them has, or will
    /// get, all that it needs.
    pub(crate) fn spares(&self) -> u64 {
        match self {
            Self::Lost { after, .. } => *after,
            Self::Desync { seq, .. } | Self::Disagree { seq, .. } => seq.saturating_sub(1),
            Self::Timeout { .. } | Self::Aborted => 0,
        }
    }

    /// The same in fewer words, where all of them are too many to tell.
    pub(crate) fn shortened(&self) -> Self {
        let cut = |words: &str| words.chars().take(1000).collect::<String>();
        match self.clone() {
            // Whom rank 0 would name.
            Self::Desync { .. } => Self::of(&self.error(0, None), 0),
            Self::Disagree { op, seq, by, with } => {
                Self::Disagree { op, seq, by: (by.0, cut(&by.1)), with: (with.0, cut(&with.1)) }
            }
            Self::Lost { rank, words, after } => Self::Lost { rank, words: cut(&words), after },
            Self::Timeout { op, seq, elapsed, mut missing } => {
                missing.truncate(1000);
                Self::Timeout { op, seq, elapsed, missing }
            }
            Self::Aborted => Self::Aborted,
        }
    }

    /// The same, shared.
    pub(crate) fn shared(&self, rank: usize, ours: Option<Stamp>) -> Arc<Error> {
        Arc::new(self.error(rank, ours))
    }
}

/// The verdict as `rank` sees it: the ranks that agree name the odd one; the odd one names the first
/// of those it differs from.
fn desync(seq: u64, calls: &[Option<u128>], gone: &[(usize, u64)], rank: usize) -> Error {
    let ours = calls.get(rank).copied().flatten();
    let votes = |call: Option<u128>| calls.iter().filter(|&&c| c == call).count();
    let alone = |call: Option<u128>| std::cmp::Reverse(votes(call));
    let after = |rank: usize| gone.iter().find(|(r, _)| *r == rank).map(|(_, calls)| *calls);
    // The one with the fewest votes that differs from us; the first of them where several do. Who has
    // called nothing may still come, unless it has left.
    let odd = (0..calls.len()).filter(|&r| calls[r] != ours).max_by_key(|&r| {
        let seen = calls[r].is_some();
        (seen, after(r).is_some(), alone(calls[r]), std::cmp::Reverse(r))
    });
    let tell = |rank: usize| match (calls.get(rank).copied().flatten(), after(rank)) {
        (Some(call), _) => stamp::words(call),
        (None, Some(calls)) => words_of_absence(calls),
        (None, None) => "nothing".to_owned(),
    };
    let odd = odd.unwrap_or(rank);
    Error::Desync {
        op: ours.or(calls.get(odd).copied().flatten()).map_or("no operation", stamp::op_name).to_owned(),
        seq,
        rank: odd,
        theirs: tell(odd),
        ours: tell(rank),
    }
}

/// What a rank called that is alive and has left the group after this many calls.
pub(super) fn words_of_absence(calls: u64) -> String {
    let plural = if calls == 1 { "call" } else { "calls" };
    format!("nothing (it left the group after {calls} {plural})")
}

/// The finding that a rank ended without a word, or with these of the system.
pub(super) fn lost(rank: usize, words: &str) -> Error {
    Error::PeerLost { rank, op: String::new(), source: Some(io::Error::other(words.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ranks_that_agree_name_the_odd_one() {
        let barrier = Some(8);
        let broadcast = Some(2 | 6 << 4 | 1 << 20 | 4 << 44);
        let cause = Cause::Desync { seq: 9, calls: vec![barrier, broadcast, barrier], gone: vec![] };
        for (rank, named) in [(0, 1), (1, 0), (2, 1)] {
            let Error::Desync { seq: 9, rank: odd, theirs, ours, .. } = cause.error(rank, None) else {
                panic!("not a desync")
            };
            assert_eq!(odd, named);
            assert_ne!(theirs, ours);
        }
    }

    #[test]
    fn a_failure_spares_the_calls_before_the_one_that_it_is_about() {
        assert_eq!(Cause::Desync { seq: 9, calls: Vec::new(), gone: Vec::new() }.spares(), 8);
        assert_eq!(Cause::Lost { rank: 1, words: String::new(), after: 4 }.spares(), 4);
        assert_eq!(Cause::Aborted.spares(), 0, "an abort ends whatever there is");
    }

    #[test]
    fn a_rank_that_called_nothing_is_named_where_all_others_agree() {
        let cause = Cause::Desync { seq: 2, calls: vec![Some(8), None, Some(8)], gone: vec![] };
        let Error::Desync { rank: 1, theirs, ours, .. } = cause.error(0, None) else { panic!() };
        assert_eq!((theirs.as_str(), ours.as_str()), ("nothing", "barrier"));
        let Error::Desync { rank: 0, op, .. } = cause.error(1, None) else { panic!() };
        assert_eq!(op, "barrier");
    }

    #[test]
    fn of_two_that_called_nothing_the_one_that_left_is_named() {
        let calls = vec![Some(8), None, None, Some(8)];
        let cause = Cause::Desync { seq: 5, calls, gone: vec![(2, 4)] };
        let Error::Desync { rank: 2, theirs, .. } = cause.error(0, None) else { panic!() };
        assert_eq!(theirs, "nothing (it left the group after 4 calls)");
    }
}
