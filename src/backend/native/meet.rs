//! How the ranks of a new group find one another: what each says of itself through the store.

use std::cell::{Cell, RefCell};
use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::time::{Duration, Instant};

use once_cell::sync::Lazy;
use serde::{Deserialize, Serialize};

use super::options::Options;
use crate::backend::BackendContext;
use crate::rendezvous::{list, patience::Patience};
use crate::store::{Store, absent};
use crate::{Error, Result};

/// The version of everything ranks say to one another.
pub(super) const VERSION: u32 = 3;

/// A number of this process's own.
static PROCESS: Lazy<u128> = Lazy::new(random);

/// What a rank says of itself, at key `native/hello/RANK`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) version: u32,
    /// The process it is in.
    pub(super) process: u128,
    /// The host it is on, as far as shared memory and unix sockets are concerned.
    pub(super) host: String,
    /// The machine it is on, as far as addresses are concerned.
    pub(super) machine: String,
    /// A secret of the group: rank 0's counts. Who does not know it is turned away.
    pub(super) token: u128,
    /// The transport forced by its environment.
    pub(super) forced: Option<String>,
    /// Its tuning, in short.
    pub(super) tuning: u64,
}

/// 128 bits that nobody guesses (the standard library seeds its hashers from the system).
pub(super) fn random() -> u128 {
    let half = || u128::from(RandomState::new().build_hasher().finish());
    half() << 64 | half()
}

/// What says whether two processes see the same memory and sockets: the boot and the namespaces.
fn host() -> String {
    let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let namespaces = ["ipc", "net", "pid", "mnt"].map(|name| {
        let link = std::fs::read_link(format!("/proc/self/ns/{name}")).unwrap_or_default();
        link.to_string_lossy().into_owned()
    });
    format!("{} {}", boot.trim(), namespaces.join(" "))
}

/// How long a wait lasts before it looks whether it is still worth it.
const SLICE: Duration = Duration::from_secs(1);
/// Why a rank gave the group up, for those who wait for it.
const GIVEN_UP: &str = "native/given-up";

/// Tells the ranks that wait at this store for a rank that it does not come.
pub(crate) fn give_up(store: &dyn Store, rank: usize, reason: &Error) {
    let words = format!("rank {rank} gave up: {reason}");
    if let Err(error) = store.compare_set(GIVEN_UP, b"", words.as_bytes()) {
        tracing::debug!("cannot tell the other ranks that the group is not to be: {error}");
    }
}

/// One rank's side of the meeting.
pub(super) struct Meeting {
    store: Arc<dyn Store>,
    rank: usize,
    size: usize,
    group: String,
    started: Instant,
    deadline: Instant,
    /// What the ranks leave in the store.
    keys: RefCell<Vec<String>>,
    /// When this rank last looked whether one has given up.
    looked: Cell<Instant>,
}

impl Meeting {
    pub(super) fn new(context: &BackendContext) -> Self {
        let started = Instant::now();
        let long = Duration::from_secs(60 * 60 * 24);
        Self {
            store: context.store.clone(),
            rank: context.rank,
            size: context.size,
            group: context.group_name.clone(),
            started,
            deadline: started + context.timeout.min(long),
            keys: RefCell::default(),
            looked: Cell::new(started),
        }
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn size(&self) -> usize {
        self.size
    }

    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Publishes what this rank says under a topic and returns what all say.
    pub(super) fn exchange<T: Serialize + for<'a> Deserialize<'a>>(
        &self,
        topic: &str,
        ours: &T,
    ) -> Result<Vec<T>> {
        let key = |rank: usize| format!("native/{topic}/{rank}");
        let bytes = postcard::to_stdvec(ours).map_err(|e| self.failed(&e.to_string()))?;
        self.store.set(&key(self.rank), &bytes)?;
        let keys: Vec<String> = (0..self.size).map(key).collect();
        self.leaves(&keys);
        let names: Vec<&str> = keys.iter().map(String::as_str).collect();
        self.await_all(&names, &|rank| rank)?;
        names
            .iter()
            .map(|name| {
                let bytes = self.store.get(name)?;
                postcard::from_bytes(&bytes).map_err(|_| {
                    self.failed(&format!("{name} holds something that this version did not write"))
                })
            })
            .collect()
    }

    /// Waits for keys, each left by a rank that `whose` names; says after a while who is missing.
    ///
    /// # Errors
    /// `Timeout` naming the ranks that did not; `Rendezvous` when one of them has given up; what the store fails
    /// with.
    fn await_all(&self, keys: &[&str], whose: &dyn Fn(usize) -> usize) -> Result<()> {
        let mut patience = Patience::new(self.deadline.saturating_duration_since(Instant::now()));
        loop {
            let slice = SLICE.min(patience.left()).max(Duration::from_millis(1));
            let Err(error) = self.store.wait(keys, slice) else { return Ok(()) };
            let missing: Vec<usize> = absent(&*self.store, keys)?.into_iter().map(whose).collect();
            if missing.is_empty() {
                // They came just now, or the store has another complaint.
                return self.store.wait(keys, slice).map_err(|_| error);
            }
            if let Some(error) = self.given_up()? {
                return Err(error);
            }
            patience.speak(|| format!("{} of group {}", list(&missing), self.group));
            if patience.left().is_zero() {
                return Err(self.timeout(missing));
            }
        }
    }

    /// That a rank has given up, in its words.
    fn given_up(&self) -> Result<Option<Error>> {
        if !self.store.check(&[GIVEN_UP])? {
            return Ok(None);
        }
        let reason = self.store.get(GIVEN_UP)?;
        Ok(Some(self.failed(&String::from_utf8_lossy(&reason))))
    }

    /// The same for who waits for ranks, but not at the store: a store that is gone says nothing.
    pub(super) fn hopeless(&self) -> Option<Error> {
        self.looked.set(Instant::now());
        self.given_up().unwrap_or_else(|error| {
            tracing::debug!(group = self.group, %error, "cannot ask whether a rank has given up");
            None
        })
    }

    /// [`hopeless`](Self::hopeless), asked once a second at most.
    pub(super) fn glance(&self) -> Option<Error> {
        if self.looked.get().elapsed() < SLICE { None } else { self.hopeless() }
    }

    /// What rank `from` leaves at a key.
    pub(super) fn get(&self, key: &str, from: usize) -> Result<Vec<u8>> {
        self.await_all(&[key], &|_| from)?;
        self.store.get(key)
    }

    /// Tells the ranks that wait for this one that it does not come.
    pub(super) fn give_up(&self, reason: &Error) {
        if matches!(reason, Error::Timeout { .. }) {
            return; // they find out themselves, and name the rank
        }
        give_up(&*self.store, self.rank, reason);
    }

    /// Remembers keys that are of no use once the group is there.
    pub(super) fn leaves(&self, keys: &[String]) {
        self.keys.borrow_mut().extend_from_slice(keys);
    }

    /// The group is there. The last rank to say so sweeps up: nobody reads any more.
    pub(super) fn adjourn(&self) {
        const UP: &str = "native/up";
        let swept = self.store.add(UP, 1).and_then(|up| {
            if up < self.size as i64 {
                return Ok(());
            }
            let keys = self.keys.borrow();
            keys.iter().map(String::as_str).chain([UP]).try_for_each(|key| self.store.delete(key).map(|_| ()))
        });
        if let Err(error) = swept {
            // A store that is gone, or that cannot delete, keeps them; the group does not need it.
            tracing::debug!(group = self.group, %error, "keys stay in the store");
        }
    }

    /// That some ranks did not come in time.
    pub(super) fn timeout(&self, missing: Vec<usize>) -> Error {
        Error::Timeout {
            op: format!("setting up group {}", self.group),
            seq: 0,
            elapsed: self.started.elapsed(),
            missing,
        }
    }

    pub(super) fn failed(&self, reason: &str) -> Error {
        Error::Rendezvous { reason: format!("group {}: {reason}", self.group) }
    }

    /// What all ranks say of themselves, compared.
    pub(super) fn hello(&self, options: &Options, tuning: u64) -> Result<Vec<Hello>> {
        let machine = host();
        let ours = Hello {
            version: VERSION,
            process: *PROCESS,
            host: options.host.clone().unwrap_or_else(|| machine.clone()),
            machine,
            token: random(),
            forced: options.transport.clone(),
            tuning,
        };
        let all = self.exchange("hello", &ours)?;
        type What = fn(&Hello) -> String;
        let differs = |what: What, name: &str| {
            let odd = all.iter().position(|h| what(h) != what(&all[0]));
            odd.map(|rank| {
                let (a, b) = (what(&all[0]), what(&all[rank]));
                self.failed(&format!("ranks differ in {name}: rank 0 has {a}, rank {rank} has {b}"))
            })
        };
        let checks: [(What, &str); 3] = [
            (|h| h.version.to_string(), "the version of the native engine"),
            (|h| format!("{:?}", h.forced), "TCH_DISTRIBUTED_TRANSPORT"),
            (|h| format!("{:x}", h.tuning), "their tuning table"),
        ];
        match checks.iter().find_map(|(what, name)| differs(*what, name)) {
            Some(error) => Err(error),
            None => Ok(all),
        }
    }
}
