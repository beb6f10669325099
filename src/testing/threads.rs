//! Ranks as threads of this process.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use parking_lot::Mutex;

use crate::process_group::{
    BackendSpec, InitOptions, ProcessGroup, destroy_process_group, enter_rank_thread, init_process_group,
};
use crate::store::{HashStore, Store};
use crate::{Error, Result};

/// Runs `body` once for each of `n` ranks, each on a thread of its own, over the native backend; gives
/// their results in rank order.
///
/// Each rank thread has a default group of its own, which is also what `body` gets, and its
/// intra-op parallelism is 1. Threads that a rank spawns have no default group: move the handle.
/// Tensors are made inside (they are not `Sync`).
///
/// # Panics
/// When a rank panics: the world is aborted, so that no other rank waits for ever, and the panic of the
/// rank that panicked first goes on here. Also when the ranks cannot meet, and when they leave having
/// called different things.
///
/// ```
/// use tch_distributed as dist;
/// let ranks = dist::testing::run_threads(4, |group| {
///     assert_eq!(dist::rank().unwrap(), group.rank());
///     group.rank()
/// });
/// assert_eq!(ranks, [0, 1, 2, 3]);
/// ```
#[doc(alias = "multi_threaded_pg")]
pub fn run_threads<T: Send, F: Fn(ProcessGroup) -> T + Send + Sync>(n: usize, body: F) -> Vec<T> {
    run_threads_on("native", InitOptions::new(), n, body)
}

/// [`run_threads`] over another backend and with options (store, rank and world size are its own).
///
/// # Panics
/// As there.
///
/// ```
/// use std::time::Duration;
/// use tch_distributed::{InitOptions, testing};
/// let options = InitOptions::new().timeout(Duration::from_secs(20));
/// testing::run_threads_on("native", options, 2, |group| group.barrier().unwrap());
/// ```
pub fn run_threads_on<T: Send, F: Fn(ProcessGroup) -> T + Send + Sync>(
    backend: impl Into<BackendSpec>,
    options: InitOptions,
    n: usize,
    body: F,
) -> Vec<T> {
    let world = World {
        spec: backend.into(),
        options,
        store: Arc::new(HashStore::new()),
        size: n,
        groups: Mutex::default(),
        panic: Mutex::default(),
        leaving: Mutex::default(),
        failure_seen: AtomicBool::new(false),
    };
    let results: Vec<Option<T>> = thread::scope(|scope| {
        let spawn = |rank: usize| {
            let (world, body) = (&world, &body);
            let thread = thread::Builder::new().name(format!("rank {rank}"));
            thread.spawn_scoped(scope, move || world.rank(rank, body))
        };
        let threads: Vec<_> = (0..n).map(spawn).collect();
        threads.into_iter().map(|thread| thread.ok().and_then(|t| t.join().ok().flatten())).collect()
    });
    if let Some(panic) = world.panic.into_inner() {
        resume_unwind(panic);
    }
    // Where a rank saw a failure and went on, failures were what its body is about, and that others
    // hear of it when they leave is an echo.
    if let Some(error) = world.leaving.into_inner()
        && !world.failure_seen.into_inner()
    {
        panic!("{error}");
    }
    let results: Option<Vec<T>> = results.into_iter().collect();
    results.expect("a rank thread could not be started")
}

struct World {
    spec: BackendSpec,
    options: InitOptions,
    store: Arc<HashStore>,
    size: usize,
    /// Groups of ranks that have met, for the abort.
    groups: Mutex<Vec<ProcessGroup>>,
    /// The first panic.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// What the first rank that could not leave in good order was told.
    leaving: Mutex<Option<String>>,
    /// Whether a rank's body was told of a failure and returned all the same.
    failure_seen: AtomicBool,
}

impl World {
    /// One rank's life; `None` when it panicked.
    fn rank<T>(&self, rank: usize, body: &(impl Fn(ProcessGroup) -> T + Sync)) -> Option<T> {
        enter_rank_thread();
        tch::set_num_threads(1);
        let life = || {
            let group =
                self.meet(rank).unwrap_or_else(|e| panic!("rank {rank} could not join the world: {e}"));
            self.groups.lock().push(group.clone());
            if self.panic.lock().is_some() {
                group.lose_all(rank, "another rank panicked");
            }
            let result = body(group.clone());
            if group.failure_was_told() {
                self.failure_seen.store(true, Ordering::Relaxed);
            }
            match destroy_process_group() {
                // The body may have left by itself.
                Ok(()) | Err(Error::NotInitialized) => {}
                Err(error) => {
                    self.leaving
                        .lock()
                        .get_or_insert_with(|| format!("rank {rank} could not leave the world: {error}"));
                }
            }
            result
        };
        catch_unwind(AssertUnwindSafe(life)).map_err(|panic| self.fall(rank, panic)).ok()
    }

    fn meet(&self, rank: usize) -> Result<ProcessGroup> {
        let store: Arc<dyn Store> = self.store.clone();
        let options = self.options.clone().store(store).rank(rank).world_size(self.size);
        init_process_group(self.spec.clone(), options)
    }

    /// A rank panicked: all others learn of it now.
    fn fall(&self, rank: usize, panic: Box<dyn Any + Send>) {
        let text = crate::libtorch::panic_text(&*panic);
        self.panic.lock().get_or_insert(panic);
        for group in self.groups.lock().iter() {
            group.lose_all(rank, &text);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use super::run_threads;
    use crate::process_group::{InitOptions, destroy_process_group, init_process_group};
    use crate::store::HashStore;
    use crate::{Error, is_initialized, rank};
    use std::panic::catch_unwind;

    #[test]
    fn results_come_in_rank_order_and_each_rank_has_its_own_default_group() {
        for n in [0, 1, 2, 5] {
            let results = run_threads(n, |group| (group.rank(), rank().unwrap(), group.size()));
            assert_eq!(results, (0..n).map(|r| (r, r, n)).collect::<Vec<_>>());
        }
        assert!(!is_initialized());
    }

    #[test]
    fn a_thread_that_a_rank_spawns_has_no_default_group() {
        run_threads(2, |group| {
            let seen = std::thread::scope(|s| s.spawn(rank).join().unwrap());
            assert!(matches!(seen, Err(Error::NotInitialized)));
            group.barrier().unwrap();
        });
    }

    #[test]
    fn a_call_that_only_one_rank_made_is_a_panic_when_the_ranks_leave() {
        let panic = catch_unwind(|| {
            run_threads(2, |group| {
                // Its root has sent when it returns: nobody has seen a failure yet.
                if group.rank() == 0 {
                    drop(group.broadcast_async(&tch::Tensor::from_slice(&[1.0]), 0).unwrap());
                }
            })
        })
        .unwrap_err();
        let text = panic.downcast_ref::<String>().unwrap();
        assert!(text.contains("could not leave the world"), "{text}");
    }

    #[test]
    fn a_panic_of_one_rank_frees_the_others_and_is_what_the_caller_sees() {
        let panic = catch_unwind(|| {
            run_threads(3, |group| {
                if group.rank() == 1 {
                    panic!("my own words");
                }
                let error = group.barrier().unwrap_err();
                assert!(matches!(
                    error,
                    Error::PeerLost { rank: 1, .. } | Error::Aborted | Error::Poisoned { .. }
                ));
            })
        })
        .unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"my own words"));
    }

    #[test]
    fn two_ranks_that_claim_one_number_are_both_told_at_once() {
        let (store, begin) = (Arc::new(HashStore::new()), Instant::now());
        let errors = run_threads(2, |_| {
            destroy_process_group().unwrap();
            let options = InitOptions::new().store(store.clone()).rank(1).world_size(2);
            init_process_group("native", options).unwrap_err().to_string()
        });
        assert!(errors.iter().all(|text| text.contains("two threads claim rank 1")), "{errors:?}");
        assert!(begin.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn threads_of_a_process_that_want_to_be_ranks_are_told_how() {
        let (store, begin) = (Arc::new(HashStore::new()), Instant::now());
        let both = std::sync::Barrier::new(2);
        let join = |rank| {
            let options = InitOptions::new().store(store.clone()).rank(rank).world_size(2);
            both.wait();
            init_process_group("native", options.timeout(Duration::from_secs(4))).unwrap_err().to_string()
        };
        let texts: Vec<String> = std::thread::scope(|scope| {
            let join = &join;
            let ranks = [0, 1].map(|rank| scope.spawn(move || join(rank)));
            ranks.map(|rank| rank.join().unwrap()).into()
        });
        assert!(texts.iter().any(|text| text.contains("testing::run_threads")), "{texts:?}");
        assert!(texts.iter().any(|text| text.contains("did not come")), "{texts:?}");
        assert!(begin.elapsed() < Duration::from_secs(20));
    }
}
