//! What a failure was. These engines say that a connection closed or a wait took too long; which rank is
//! to blame, the ranks find out through the store, where each that fails says how far it was.
//!
//! Keys, under the group's own: `tchd/here/RANK` from a rank of this crate when it joins (Python ranks set
//! none), `tchd/begun/RANK` when it comes to its first operation on NCCL, `tchd/connected/RANK` when it has
//! connected, `tchd/left/RANK` when it leaves in good order, `tchd/failed/RANK` with its [`Status`] from a rank
//! that fails, and then `tchd/over`, `tchd/cause` from the first that aborts.

use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use crate::Error;
use crate::store::Store;

/// How long the others have to say how they failed.
const PATIENCE: Duration = Duration::from_millis(1500);

/// Set where a rank has failed.
const OVER: &str = "tchd/over";

/// How an engine's words begin to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Timeout,
    Closed,
    Other,
}

impl Class {
    pub(super) fn of(text: &str) -> Self {
        let text = text.to_lowercase();
        let any = |words: &[&str]| words.iter().any(|word| text.contains(word));
        if any(&["timed out", "timeout"]) && !text.contains("application timeout") {
            Self::Timeout
        } else if any(&["closed", "reset", "broken pipe", "refused", "application timeout", "remote"]) {
            Self::Closed
        } else {
            Self::Other
        }
    }

    fn letter(self) -> &'static str {
        match self {
            Self::Timeout => "T",
            Self::Closed => "C",
            Self::Other => "O",
        }
    }
}

/// What a rank was doing when it failed.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    pub(super) op: String,
    pub(super) seq: u64,
    /// The operation, the kind and the number of elements, as all ranks should have them; empty for
    /// point-to-point.
    pub(super) print: String,
    pub(super) elapsed: Duration,
    pub(super) text: String,
    /// Who is to blame if it is one of those that say nothing.
    pub(super) suspect: Option<usize>,
}

/// What a failing rank leaves in the store.
struct Status {
    class: String,
    seq: u64,
    print: String,
}

impl Status {
    fn read(bytes: &[u8]) -> Option<Self> {
        let text = String::from_utf8_lossy(bytes);
        let mut lines = text.split('\n');
        let (class, seq, print) = (lines.next()?, lines.next()?, lines.next()?);
        Some(Self { class: class.to_owned(), seq: seq.parse().ok()?, print: print.to_owned() })
    }
}

/// The group, as far as an inquest needs it.
#[derive(Clone)]
pub(super) struct Witness {
    pub(super) store: Arc<dyn Store>,
    pub(super) rank: usize,
    pub(super) size: usize,
    /// The place in this group of the world's rank 0, which serves the store in all but odd arrangements.
    pub(super) server: Option<usize>,
}

impl Witness {
    /// Says that this rank has come.
    pub(super) fn arrive(&self) -> crate::Result<()> {
        self.store.set(&format!("tchd/here/{}", self.rank), b"1")
    }

    /// Says that this rank has connected to all others.
    pub(super) fn settle(&self) -> crate::Result<()> {
        self.store.set(&format!("tchd/connected/{}", self.rank), b"1")
    }

    /// Says that this rank leaves in good order: its connections will close, and nothing is wrong.
    pub(super) fn leave(&self) {
        if let Err(error) = self.store.set(&format!("tchd/left/{}", self.rank), b"1") {
            tracing::debug!("cannot tell the other ranks that this one leaves: {error}");
        }
    }

    /// Whether a rank has said so.
    pub(super) fn has_left(&self, rank: usize) -> crate::Result<bool> {
        self.store.check(&[&format!("tchd/left/{rank}")])
    }

    /// Waits until the other ranks of this crate have connected too: a rank that leaves before is taken
    /// for one that crashed.
    pub(super) fn see_others_settled(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let there = |what: &str, rank: usize| self.store.check(&[&format!("tchd/{what}/{rank}")]);
        for rank in (0..self.size).filter(|&rank| rank != self.rank) {
            while there("here", rank).unwrap_or(false)
                && !there("connected", rank).unwrap_or(true)
                && Instant::now() < deadline
            {
                thread::sleep(Duration::from_millis(5));
            }
        }
    }

    /// Waits until the other ranks of this crate have come to their first operation too, or it is over. Of ranks that are
    /// not here nothing can be known: those of Python say nothing.
    pub(super) fn meet(&self, timeout: Duration, over: impl Fn() -> bool) -> Result<(), String> {
        let started = Instant::now();
        let told = |error: Error| error.to_string();
        self.store.set(&format!("tchd/begun/{}", self.rank), b"1").map_err(told)?;
        let mut pause = Duration::from_millis(1);
        loop {
            let absent = self.absent();
            if self.without("begun").iter().all(|rank| absent.contains(rank)) {
                return Ok(());
            }
            if over() {
                return Err("the group was aborted".to_owned());
            }
            if started.elapsed() > timeout {
                return Err("timed out: not all ranks came to the first operation of the group".to_owned());
            }
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }

    /// The ranks of this crate that have not come.
    pub(super) fn absent(&self) -> Vec<usize> {
        self.without("here")
    }

    fn without(&self, what: &str) -> Vec<usize> {
        (0..self.size)
            .filter(|&rank| rank != self.rank)
            .filter(|rank| !self.store.check(&[&format!("tchd/{what}/{rank}")]).unwrap_or(false))
            .collect()
    }

    /// Leaves the cause for the others. The first one stays.
    pub(super) fn announce(&self, cause: &Error) {
        let text = match cause {
            Error::PeerLost { rank, op, .. } => format!("lost\n{rank}\n{op}"),
            _ => "aborted".to_owned(),
        };
        let said = self.store.compare_set("tchd/cause", b"", text.as_bytes());
        if let Err(error) = said.and_then(|_| self.store.set(OVER, b"1")) {
            tracing::debug!("cannot tell the other ranks why the group failed: {error}");
        }
    }

    /// Whether a rank has said that the group failed.
    pub(super) fn is_over(&self) -> bool {
        self.store.check(&[OVER]).unwrap_or(false)
    }

    fn announced(&self) -> Option<Error> {
        if !self.store.check(&["tchd/cause"]).ok()? {
            return None;
        }
        let text = self.store.get("tchd/cause").ok()?;
        let text = String::from_utf8_lossy(&text);
        let mut lines = text.split('\n');
        match (lines.next(), lines.next().and_then(|rank| rank.parse().ok())) {
            (Some("lost"), Some(rank)) if rank != self.rank => {
                Some(Error::PeerLost { rank, op: lines.next().unwrap_or_default().to_owned(), source: None })
            }
            _ => Some(Error::Aborted),
        }
    }

    /// Finds out what the failure was. Blocks for a moment. `cut` closes this rank's connections: ranks
    /// that wait for this one then fail too, and speak.
    pub(super) fn inquire(&self, failure: &Failure, cut: impl FnOnce()) -> Error {
        let class = Class::of(&failure.text);
        let status = format!("{}\n{}\n{}", class.letter(), failure.seq, failure.print);
        let said = self.store.set(&format!("tchd/failed/{}", self.rank), status.as_bytes());
        let said = said.and_then(|()| self.store.set(OVER, b"1"));
        cut();
        if let Err(error) = said {
            tracing::debug!("the store is gone too: {error}");
            return self.cut_off(failure);
        }
        let deadline = Instant::now() + PATIENCE;
        let mut silent = self.without("failed");
        while !silent.is_empty() && Instant::now() < deadline {
            if let Some(cause) = self.announced() {
                return cause;
            }
            thread::sleep(Duration::from_millis(20));
            silent = self.without("failed");
        }
        if let Some(cause) = self.announced() {
            return cause;
        }
        let others: Vec<(usize, Status)> = (0..self.size)
            .filter(|rank| *rank != self.rank && !silent.contains(rank))
            .filter_map(|rank| {
                Some((rank, Status::read(&self.store.get(&format!("tchd/failed/{rank}")).ok()?)?))
            })
            .collect();
        if let Some(desync) = self.desync(failure, &others) {
            return desync;
        }
        let absent = self.absent();
        // A rank of Python says nothing at any time: it is blamed only when nobody else can be.
        let (mut ours, theirs): (Vec<_>, Vec<_>) =
            silent.into_iter().partition(|rank| !absent.contains(rank));
        if ours.is_empty() && class == Class::Closed {
            ours = theirs;
        }
        if class == Class::Timeout || others.iter().any(|(_, status)| status.class == "T") {
            return self.timeout(failure, ours);
        }
        // Who has left says nothing more; others may only be slow.
        let left = || ours.iter().find(|rank| self.has_left(**rank).unwrap_or(false));
        let suspect = failure.suspect.filter(|rank| ours.contains(rank));
        match suspect.or_else(|| left().or(ours.first()).copied()) {
            Some(rank) => self.lost(failure, rank),
            None => self.unknown(failure),
        }
    }

    /// What is said of it where the store does not answer.
    pub(super) fn cut_off(&self, failure: &Failure) -> Error {
        match Class::of(&failure.text) {
            Class::Timeout => self.timeout(failure, Vec::new()),
            // Whoever the operation waited for; else the store's server has gone too.
            _ => match failure.suspect.or(self.server).filter(|rank| *rank != self.rank) {
                Some(rank) => self.lost(failure, rank),
                None => self.unknown(failure),
            },
        }
    }

    /// Where nobody is known to be to blame.
    fn unknown(&self, failure: &Failure) -> Error {
        Error::Torch(tch::TchError::Torch(format!("{}: {}", failure.op, failure.text)))
    }

    fn timeout(&self, failure: &Failure, missing: Vec<usize>) -> Error {
        Error::Timeout { op: failure.op.clone(), seq: failure.seq, elapsed: failure.elapsed, missing }
    }

    fn lost(&self, failure: &Failure, rank: usize) -> Error {
        let source = io::Error::new(io::ErrorKind::ConnectionReset, failure.text.clone());
        Error::PeerLost { rank, op: failure.op.clone(), source: Some(source) }
    }

    /// Whether a rank did something else at the same number; where most agree, the odd one.
    fn desync(&self, failure: &Failure, others: &[(usize, Status)]) -> Option<Error> {
        if failure.print.is_empty() {
            return None;
        }
        let mut said: Vec<(usize, &str)> = others
            .iter()
            .filter(|(_, status)| status.seq == failure.seq && !status.print.is_empty())
            .map(|(rank, status)| (*rank, status.print.as_str()))
            .collect();
        said.push((self.rank, &failure.print));
        said.sort_unstable();
        if said.iter().all(|(_, print)| *print == failure.print) {
            return None;
        }
        let votes = |print: &str| said.iter().filter(|(_, p)| *p == print).count();
        // Everybody counts the same votes, and of equals takes the one of the lowest rank.
        let most = said.iter().map(|(_, print)| votes(print)).max().unwrap_or(0);
        let usual = said.iter().find(|(_, print)| votes(print) == most).map_or("", |(_, print)| print);
        let (rank, theirs) = if failure.print == usual {
            *said.iter().find(|(_, print)| *print != usual)?
        } else {
            *said.iter().find(|(_, print)| *print == usual)?
        };
        Some(Error::Desync {
            op: failure.op.clone(),
            seq: failure.seq,
            rank,
            theirs: theirs.to_owned(),
            ours: failure.print.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::HashStore;

    #[test]
    fn without_a_store_the_rank_that_was_waited_for_is_blamed_then_its_server_and_never_oneself() {
        let blamed = |rank, server, suspect| {
            let witness = Witness { store: Arc::new(HashStore::new()), rank, size: 2, server };
            let failure = Failure {
                op: "recv".to_owned(),
                seq: 1,
                print: String::new(),
                elapsed: Duration::ZERO,
                text: "Connection closed by peer".to_owned(),
                suspect,
            };
            match witness.cut_off(&failure) {
                Error::PeerLost { rank, .. } => Some(rank),
                error => {
                    assert!(error.to_string().contains("closed by peer"), "{error}");
                    None
                }
            }
        };
        assert_eq!(blamed(0, None, Some(1)), Some(1));
        assert_eq!(blamed(1, Some(0), None), Some(0));
        assert_eq!(blamed(0, None, None), None);
        assert_eq!(blamed(0, Some(0), None), None);
    }
}
