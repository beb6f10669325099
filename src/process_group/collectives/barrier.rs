//! Nobody leaves before everybody has come.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use tch::Kind;

use super::super::draft::Draft;
use super::super::{ProcessGroup, Work};
use crate::backend::Op;
use crate::store::Store;
use crate::{Error, Result};

/// How long rank 0 waits for others to read its verdict.
const TO_READ: Duration = Duration::from_secs(2);

impl ProcessGroup {
    /// Returns when every rank has called it.
    ///
    /// # Errors
    /// Failures of the group.
    ///
    /// ```
    /// tch_distributed::testing::run_threads(3, |group| group.barrier().unwrap());
    /// ```
    #[track_caller]
    pub fn barrier(&self) -> Result<()> {
        self.barrier_draft()?.run()
    }

    /// [`barrier`](Self::barrier), asynchronously.
    ///
    /// # Errors
    /// As there, from the [`Work`].
    #[track_caller]
    pub fn barrier_async(&self) -> Result<Work> {
        self.barrier_draft()?.launch()
    }

    fn barrier_draft(&self) -> Result<Draft<'_>> {
        self.inner.usable()?;
        self.draft_on(Op::Barrier, Kind::Uint8, self.inner.backends.any()?)
    }

    /// A barrier that tells, on every rank, which ranks did not come within `timeout`. It goes through
    /// the store, whatever the backend, and is for finding out, not for speed.
    ///
    /// With `wait_all_ranks` the error names every missing rank, without it only the first.
    ///
    /// # Errors
    /// `Timeout` with the missing ranks, which poisons the group; `Store` when the store is gone.
    ///
    /// ```
    /// use std::time::Duration;
    /// tch_distributed::testing::run_threads(3, |group| {
    ///     group.monitored_barrier(Duration::from_secs(10), true).unwrap();
    /// });
    /// ```
    pub fn monitored_barrier(&self, timeout: Duration, wait_all_ranks: bool) -> Result<()> {
        self.inner.usable()?;
        let seq = self.inner.monitored.fetch_add(1, Ordering::Relaxed);
        let begin = Instant::now();
        let store = &self.inner.store;
        let key = |what: &str| format!("tchd/monitored/{seq}/{what}");
        let here = |rank: usize| key(&rank.to_string());
        store.set(&here(self.rank()), b"here")?;
        let verdict = key("verdict");
        // The first verdict counts for all: rank 0 may come just as others have given it up.
        let decide = |missing: &[usize]| -> Result<Vec<usize>> {
            let text = missing.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
            let text = store.compare_set(&verdict, b"", format!("missing:{text}").as_bytes())?;
            Ok(ranks_of(&text))
        };
        let missing = if self.rank() == 0 {
            let mut missing = Vec::new();
            for rank in 1..self.size() {
                if !came(&**store, &here(rank), timeout.saturating_sub(begin.elapsed()))? {
                    missing.push(rank);
                    if !wait_all_ranks {
                        break;
                    }
                }
            }
            decide(&missing)?
        } else {
            // Rank 0 decides within its own timeout, which begins when it comes.
            let patience = timeout.saturating_add(timeout / 4).saturating_add(Duration::from_secs(1));
            if came(&**store, &here(0), patience)? && came(&**store, &verdict, patience)? {
                ranks_of(&store.get(&verdict)?)
            } else {
                decide(&[0])?
            }
        };
        if missing.is_empty() {
            // Who reads the verdict last leaves nothing behind.
            if let Err(error) = self.tidy(key) {
                // All have come. Rank 0 may have gone on, and the store with it.
                tracing::debug!(%error, "keys of a monitored barrier are left");
            }
            return Ok(());
        }
        let read = if self.rank() == 0 { self.see_read(key) } else { store.add(&key("read"), 1).map(|_| ()) };
        if let Err(error) = read {
            tracing::debug!(%error, "the verdict of a monitored barrier may be lost to others");
        }
        let op = "monitored_barrier".to_owned();
        Err(self.inner.fail(Error::Timeout { op, seq, elapsed: begin.elapsed(), missing }))
    }

    /// Waits a little until who has come has read the verdict: rank 0 may be the store, and go because of it.
    fn see_read(&self, key: impl Fn(&str) -> String) -> Result<()> {
        let store = &self.inner.store;
        let until = Instant::now() + TO_READ;
        loop {
            let mut here = 0;
            for rank in 1..self.size() {
                here += i64::from(store.check(&[&key(&rank.to_string())])?);
            }
            if store.add(&key("read"), 0)? >= here || Instant::now() >= until {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Who reads the verdict of a monitored barrier last deletes its keys.
    fn tidy(&self, key: impl Fn(&str) -> String) -> Result<()> {
        let store = &self.inner.store;
        if store.add(&key("read"), 1)? < self.size() as i64 {
            return Ok(());
        }
        let ranks = (0..self.size()).map(|rank| key(&rank.to_string()));
        for name in ranks.chain(["verdict", "read"].map(&key)) {
            store.delete(&name)?;
        }
        Ok(())
    }
}

/// The ranks that a verdict names.
fn ranks_of(verdict: &[u8]) -> Vec<usize> {
    let text = String::from_utf8_lossy(verdict);
    text.trim_start_matches("missing:").split(',').filter_map(|rank| rank.parse().ok()).collect()
}

/// Whether a key is there within a time. A store that is gone is an error, and no missing rank.
fn came(store: &dyn Store, key: &str, left: Duration) -> Result<bool> {
    // Once the time is up a look is enough; after a wait that failed it tells why.
    if !left.is_zero() && store.wait(&[key], left).is_ok() {
        return Ok(true);
    }
    store.check(&[key])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing;

    #[test]
    fn all_ranks_that_come_to_a_monitored_barrier_name_the_one_that_does_not() {
        let both = std::sync::Barrier::new(2);
        let errors = testing::run_threads(3, |group| {
            (group.rank() != 2).then(|| {
                both.wait();
                group.monitored_barrier(Duration::from_secs(3), true).unwrap_err()
            })
        });
        for error in errors.into_iter().flatten() {
            assert!(matches!(&error, Error::Timeout { missing, .. } if missing == &[2]), "{error}");
        }
    }

    #[test]
    fn rank_0_that_comes_when_it_was_given_up_is_told_so_as_well() {
        let given_up = std::sync::Barrier::new(2);
        let errors = testing::run_threads(2, |group| {
            if group.rank() == 0 {
                given_up.wait();
            }
            let error = group.monitored_barrier(Duration::from_millis(100), true).unwrap_err();
            if group.rank() == 1 {
                given_up.wait();
            }
            error
        });
        for error in errors {
            let root = if let Error::Poisoned { cause } = &error { cause } else { &error };
            assert!(matches!(root, Error::Timeout { missing, .. } if missing == &[0]), "{error}");
        }
    }

    #[test]
    fn a_monitored_barrier_leaves_no_keys_in_the_store() {
        testing::run_threads(3, |group| {
            let count = || {
                group.barrier().unwrap();
                let keys = group.inner.store.num_keys().unwrap();
                group.barrier().unwrap();
                keys
            };
            let before = count();
            for wait_all_ranks in [true, false] {
                group.monitored_barrier(Duration::from_secs(20), wait_all_ranks).unwrap();
            }
            assert_eq!(count(), before);
        });
    }
}
