//! Finds ranks that called different things long before a timeout. The ranks then wait for one another, and no
//! message tells them why. So a rank whose collective takes more than a second writes down, in the store, which it is,
//! and reads what its two neighbours wrote. Where two differ at the same number, connections are cut: every rank's call
//! fails, and the inquest finds the odd one. What is quick writes nothing.
//!
//! What waits for a rank that works on hears nothing of another that aborts or fails, and an operation of NCCL of none:
//! where one takes long, the sentry reads whether a rank has failed. A receive from any rank hears nothing of connections
//! that close either: where one takes long, [`peers`](super::peers) are watched too.
//!
//! Keys, under the group's own: `tchd/at/RANK`, the number and the print of the collective that a rank is stuck in.

use std::sync::Arc;
use std::sync::Weak;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;

use parking_lot::Mutex;

use super::engine::Shared;
use super::inquest::Witness;
use super::waiters;

/// How long a collective may take before it is written down, and how often its neighbours' are read.
const QUICK: Duration = Duration::from_secs(1);
const TICK: Duration = Duration::from_millis(500);

/// Every group of this process that has one of these engines, and whether a thread looks after them.
static GROUPS: Mutex<(Vec<Weak<Shared>>, bool)> = Mutex::new((Vec::new(), false));

pub(super) fn watch(group: &Arc<Shared>) {
    let mut groups = GROUPS.lock();
    groups.0.push(Arc::downgrade(group));
    if !groups.1 {
        let made = thread::Builder::new().name("tchd-c10d-sentry".to_owned()).spawn(stand);
        match made {
            Ok(_) => groups.1 = true,
            Err(error) => tracing::debug!("disagreements will be found by timeouts alone: {error}"),
        }
    }
}

fn stand() {
    loop {
        thread::sleep(TICK);
        let alive: Vec<Arc<Shared>> = {
            let mut groups = GROUPS.lock();
            groups.0.retain(|group| group.strong_count() > 0);
            if groups.0.is_empty() {
                groups.1 = false;
                return;
            }
            groups.0.iter().filter_map(Weak::upgrade).collect()
        };
        for group in alive {
            let (stuck, (waits, from_any)) = (group.stuck(QUICK), group.waits_for_long(QUICK));
            if stuck.is_none() && !waits || group.asking.swap(true, Ordering::AcqRel) {
                continue;
            }
            // Its store may be slow, or gone.
            waiters::run(move || {
                if let Some((seq, print)) = stuck
                    && differs(&group.witness, seq, &print)
                {
                    tracing::debug!("ranks called different things at number {seq}");
                    group.cut();
                } else {
                    if from_any {
                        group.watch_peers();
                    }
                    if group.witness.is_over() {
                        group.cut();
                    }
                }
                group.asking.store(false, Ordering::Release);
            });
        }
    }
}

/// Whether a neighbour is stuck at the same number in something else. In a ring, any difference is one between
/// neighbours.
fn differs(witness: &Witness, seq: u64, print: &str) -> bool {
    let Witness { store, rank, size, .. } = witness;
    let mine = format!("{seq}\n{print}");
    if store.set(&format!("tchd/at/{rank}"), mine.as_bytes()).is_err() {
        return false;
    }
    [(rank + 1) % size, (rank + size - 1) % size].into_iter().any(|neighbour| {
        let key = format!("tchd/at/{neighbour}");
        if !store.check(&[&key]).unwrap_or(false) {
            return false;
        }
        let Ok(theirs) = store.get(&key) else { return false };
        let theirs = String::from_utf8_lossy(&theirs).into_owned();
        theirs != mine && theirs.split('\n').next() == Some(seq.to_string().as_str())
    })
}
