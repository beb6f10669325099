//! Before NCCL's communicator is split: every rank of the group says what it is about to do.
//!
//! A split is one step of all ranks at once. Who does not take part, since its user named no device or gave other
//! options, leaves the others waiting in it for good. So all say in the store what they were told, and each finds the
//! same answer.
//!
//! Keys, under the new group's own: `tchd/split/RANK` with a rank's [`Intent`].

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::store::{Store, absent, failed};
use crate::{Error, Result};

/// What a rank was told of the new group.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Intent {
    /// Its backend for CUDA tensors; empty where it has none.
    pub(super) backend: String,
    /// Its ranks, by their numbers in the parent.
    pub(super) ranks: Vec<usize>,
    /// Whether this rank's user named its device.
    pub(super) names_device: bool,
}

fn key(rank: usize) -> String {
    format!("tchd/split/{rank}")
}

/// Waits for the word of all `size` ranks of the parent. Whether the communicator is split: where no rank named a device
/// there may be none yet, and the new group's ranks connect anew.
///
/// # Errors
/// The same on every rank: `InvalidArgument` where ranks were told different things; `Timeout` with the ranks that did not
/// come.
pub(super) fn agree(
    store: &dyn Store,
    rank: usize,
    size: usize,
    mine: &Intent,
    timeout: Duration,
) -> Result<bool> {
    let unreadable = |at: &str, error: &dyn std::fmt::Display| failed("split", &[at], error);
    let bytes = postcard::to_stdvec(mine).map_err(|error| unreadable(&key(rank), &error))?;
    store.set(&key(rank), &bytes)?;
    let keys: Vec<String> = (0..size).map(key).collect();
    let start = Instant::now();
    let waited = store.wait(&keys.iter().map(String::as_str).collect::<Vec<_>>(), timeout);
    if let Err(error) = waited {
        // A store that does not answer says nothing of other ranks.
        let missing = absent(store, &keys)?;
        return Err(match missing[..] {
            [] => error,
            _ => Error::Timeout {
                op: "the split of a communicator".to_owned(),
                seq: 0,
                elapsed: start.elapsed(),
                missing,
            },
        });
    }
    let said = keys.iter().map(|key| {
        let bytes = store.get(key)?;
        postcard::from_bytes(&bytes).map_err(|error| unreadable(key, &error))
    });
    decide(&said.collect::<Result<Vec<_>>>()?)
}

/// What follows from the words of all ranks, in their order.
fn decide(said: &[Intent]) -> Result<bool> {
    let Some((first, others)) = said.split_first() else { return Ok(false) };
    for (other, theirs) in others.iter().enumerate() {
        let differ = |argument, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| {
            Error::invalid(
                argument,
                format!("ranks disagree about a new group: rank 0 has {a:?}, rank {} has {b:?}", other + 1),
            )
        };
        if theirs.ranks != first.ranks {
            return Err(differ("ranks", &first.ranks, &theirs.ranks));
        }
        if theirs.backend != first.backend {
            return Err(differ("backend", &first.backend, &theirs.backend));
        }
    }
    if first.backend != "nccl" {
        return Ok(false);
    }
    let (named, unnamed): (Vec<usize>, Vec<usize>) =
        (0..said.len()).partition(|&rank| said[rank].names_device);
    match (&named[..], &unnamed[..]) {
        (_, []) => Ok(true),
        ([], _) => Ok(false),
        _ => Err(Error::invalid(
            "split_communicator",
            format!(
                "a communicator is split by all of its ranks: ranks {named:?} named their device, ranks {unnamed:?} did \
                 not. Name it on all ranks (InitOptions::device) or on none, or do not ask for the split"
            ),
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::thread;

    use super::*;
    use crate::store::HashStore;

    const LONG: Duration = Duration::from_secs(60);

    fn intent(names_device: bool) -> Intent {
        Intent { backend: "nccl".to_owned(), ranks: vec![0, 2], names_device }
    }

    /// What each rank of a group finds, all at once.
    fn all(said: &[Intent]) -> Vec<Result<bool>> {
        let store = Arc::new(HashStore::new());
        thread::scope(|scope| {
            let ranks: Vec<_> = said
                .iter()
                .enumerate()
                .map(|(rank, mine)| {
                    let store = store.clone();
                    scope.spawn(move || agree(&*store, rank, said.len(), mine, LONG))
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        })
    }

    fn same_error(said: &[Intent]) -> String {
        let mut texts: Vec<String> = all(said).into_iter().map(|r| r.unwrap_err().to_string()).collect();
        texts.dedup();
        assert_eq!(texts.len(), 1, "{texts:?}");
        texts.remove(0)
    }

    #[test]
    fn all_split_where_all_named_their_device_and_none_where_none_did() {
        for named in [true, false] {
            let found = all(&[intent(named), intent(named), intent(named)]);
            assert!(found.into_iter().all(|split| split.unwrap() == named), "{named}");
        }
    }

    #[test]
    fn where_only_some_named_their_device_every_rank_is_told_which_did_not() {
        let text = same_error(&[intent(true), intent(false), intent(true), intent(false)]);
        assert!(text.contains("ranks [0, 2] named") && text.contains("ranks [1, 3] did not"), "{text}");
    }

    #[test]
    fn ranks_that_were_told_different_things_of_the_group_are_told_so() {
        let other = Intent { ranks: vec![0, 1], ..intent(true) };
        let text = same_error(&[intent(true), intent(true), other]);
        assert!(text.contains("rank 0 has [0, 2], rank 2 has [0, 1]"), "{text}");
        let other = Intent { backend: String::new(), ..intent(true) };
        let text = same_error(&[intent(true), other, intent(true)]);
        assert!(text.contains("backend") && text.contains("rank 1 has \"\""), "{text}");
    }

    #[test]
    fn a_group_that_nccl_has_no_part_in_splits_nothing() {
        let gloo = |names_device| Intent { backend: "gloo".to_owned(), ..intent(names_device) };
        assert!(all(&[gloo(true), gloo(false)]).into_iter().all(|split| !split.unwrap()));
    }

    #[test]
    fn a_rank_that_does_not_come_is_named() {
        let store = HashStore::new();
        match agree(&store, 1, 3, &intent(true), Duration::from_millis(50)) {
            Err(Error::Timeout { missing, .. }) => assert_eq!(missing, [0, 2]),
            other => panic!("{other:?}"),
        }
    }
}
