//! How the ranks of a native world meet in a store.
//!
//! Keys, under `tchd/<restarts>/`:
//!
//! | key | written by | value |
//! |---|---|---|
//! | `job` | rank 0 that serves the store, first of all | its [`Hello`] |
//! | `python` | who saw a rank of PyTorch's process groups join | text |
//! | `gen/<rank>` | counter | how often this rank has come to meet: its generation |
//! | `<generation>/hello/<rank>` | the rank | its [`Hello`] |
//! | `<generation>/outcome` | the first to know (`compare_set`) | an [`Outcome`]; the same for all |
//! | `<generation>/heard` | counter | how many have read that the world is not to be |
//! | `<generation>/…` | the world | its own keys |
//!
//! A world that ends and one that begins anew in the same processes are two generations. A generation
//! that another process has claimed before is a rank number claimed twice, and so is one that another
//! thread of this process has claimed and not left.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use once_cell::sync::Lazy;
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use super::claim::Claim;
use super::patience::Patience;
use crate::launch::nonce;
use crate::store::wire::Wire;
use crate::store::{PrefixStore, Store, TcpStore, absent};
use crate::{Error, Result};

/// Where PyTorch's Gloo ranks leave their addresses.
const GLOO: &str = "default_pg/0//cpu//0/";

/// This process, told apart from all others.
static PROCESS: Lazy<String> = Lazy::new(nonce);

/// How long rank 0 waits for those who have come to read that the world is not to be.
const PARTING: Duration = Duration::from_secs(5);

/// Who a rank is, and which world it wants to join.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Hello {
    pub(super) world_size: usize,
    pub(super) backend: String,
    pub(super) group_name: String,
    pub(super) run_id: String,
    pub(super) host: String,
    pub(super) pid: u32,
    pub(super) process: String,
    /// Which claim of its process it is.
    pub(super) claim: u64,
    /// Where NCCL has a part in the world: whether this rank's user named its device.
    pub(super) names_device: Option<bool>,
}

/// How a meeting ended.
#[derive(Debug, Serialize, Deserialize)]
enum Outcome {
    /// All are there, on these hosts.
    Met(Vec<String>),
    Failed(String),
}

fn encode(value: &impl Serialize) -> Result<Vec<u8>> {
    postcard::to_stdvec(value).map_err(|e| failed(format!("cannot be written: {e}")))
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T> {
    postcard::from_bytes(bytes).map_err(|_| {
        failed("what another rank left in the store cannot be read: ranks of different versions?")
    })
}

pub(super) fn failed(reason: impl Into<String>) -> Error {
    Error::Rendezvous { reason: reason.into() }
}

impl Hello {
    pub(super) fn new(
        world_size: usize,
        backend: String,
        group_name: String,
        run_id: String,
        claim: &Claim,
    ) -> Self {
        let host = this_host();
        let (pid, process) = (std::process::id(), PROCESS.clone());
        let claim = claim.number();
        Self { world_size, backend, group_name, run_id, host, pid, process, claim, names_device: None }
    }

    fn place(&self) -> String {
        format!("process {} on {}", self.pid, self.host)
    }

    /// Whether both carry names of jobs, and not the same.
    fn other_job(&self, other: &Self) -> bool {
        !self.run_id.is_empty() && !other.run_id.is_empty() && self.run_id != other.run_id
    }

    /// Why two ranks cannot be in one world, if they cannot.
    fn disagreement(&self, rank: usize, other: &Self, others: usize) -> Option<String> {
        let (mine, theirs) = (self.place(), other.place());
        let differ = |what: &str, a: &dyn std::fmt::Debug, b: &dyn std::fmt::Debug| {
            Some(format!(
                "ranks disagree about the {what}: rank {rank} ({mine}) has {a:?}, rank {others} ({theirs}) \
                 has {b:?}; are these two jobs at one address?"
            ))
        };
        if self.other_job(other) {
            return Some(format!(
                "two jobs meet at one address: rank {rank} ({mine}) belongs to job {:?}, rank {others} \
                 ({theirs}) to job {:?}; give each job a MASTER_PORT of its own",
                self.run_id, other.run_id
            ));
        }
        if self.world_size != other.world_size {
            return differ("world size", &self.world_size, &other.world_size);
        }
        if self.backend != other.backend {
            return differ("backend", &self.backend, &other.backend);
        }
        if self.group_name != other.group_name {
            return differ("group name", &self.group_name, &other.group_name);
        }
        // NCCL connects those that do at once, and they would wait for the first operation of those that do not.
        if let (Some(own), Some(others_own)) = (self.names_device, other.names_device)
            && own != others_own
        {
            let (names, does_not) = if own { (rank, others) } else { (others, rank) };
            return Some(format!(
                "ranks disagree about the device: rank {names} names its own (InitOptions::device), rank {does_not} \
                 does not; with nccl all ranks name theirs, or none"
            ));
        }
        None
    }
}

/// What a meeting needs to know of its store.
pub(super) struct Venue {
    pub(super) store: Arc<dyn Store>,
    /// The same where it is a TCP store of ours, whose first client is rank 0.
    pub(super) served: Option<Arc<TcpStore>>,
    /// Where it is, for messages.
    pub(super) name: String,
    pub(super) restarts: String,
}

/// One rank's way into the world.
pub(super) struct Meeting<'a> {
    venue: &'a Venue,
    /// All generations.
    base: PrefixStore<Arc<dyn Store>>,
    rank: usize,
    hello: Hello,
    patience: Patience,
    wire: Option<Wire>,
    polls: u32,
}

/// Whom a rank has met: where each rank is, and the store of this generation.
pub(super) struct Met {
    pub(super) hosts: Vec<String>,
    pub(super) store: Arc<dyn Store>,
}

pub(super) fn base(venue: &Venue) -> PrefixStore<Arc<dyn Store>> {
    PrefixStore::new(format!("tchd/{}", venue.restarts), venue.store.clone())
}

impl<'a> Meeting<'a> {
    pub(super) fn new(venue: &'a Venue, rank: usize, hello: Hello, timeout: Duration) -> Self {
        Self { venue, base: base(venue), rank, hello, patience: Patience::new(timeout), wire: None, polls: 0 }
    }

    pub(super) fn run(mut self) -> Result<Met> {
        self.meet().map_err(|error| match error {
            Error::Store { op, key, reason } if self.rank != 0 && self.venue.served.is_some() => failed(format!(
                "lost the store at {} while ranks were meeting: rank 0, which serves it, has ended ({op}({key}): \
                 {reason})",
                self.venue.name
            )),
            error => error,
        })
    }

    fn meet(&mut self) -> Result<Met> {
        if self.venue.served.is_some() {
            if self.rank == 0 {
                self.open_job()?;
            } else {
                self.find_job()?;
            }
        }
        let generation = self.claim()?;
        let outcome = format!("{generation}/outcome");
        self.base.set(&format!("{generation}/hello/{}", self.rank), &encode(&self.hello)?)?;
        let mut next = 0;
        loop {
            if self.base.check(&[&outcome])? {
                return self.end(generation, &outcome);
            }
            // Rank 0 alone looks at everybody.
            while next < self.hello.world_size
                && (self.rank == 0 || next == 0)
                && let Some(hello) = self.hello_of(generation, next)?
            {
                if let Some(reason) = self.hello.disagreement(self.rank, &hello, next) {
                    return self.fail(generation, &outcome, reason);
                }
                next += 1;
            }
            if self.rank == 0 && next == self.hello.world_size {
                let hosts: Result<Vec<_>> = (0..next)
                    .map(|rank| {
                        Ok(self.hello_of(generation, rank)?.map_or_else(String::new, |hello| hello.host))
                    })
                    .collect();
                let met = encode(&Outcome::Met(hosts?))?;
                self.base.compare_set(&outcome, b"", &met)?;
                continue;
            }
            if let Some(reason) = self.stranger()? {
                return self.fail(generation, &outcome, reason);
            }
            let (base, size) = (self.base.clone(), self.hello.world_size);
            let missing = move || missing(&base, generation, size).unwrap_or_default();
            let name = &self.venue.name;
            self.patience.speak(|| format!("{} at {name}", list(&missing())));
            if !self.patience.pause() {
                let reason = match missing().as_slice() {
                    [] => format!("all ranks came to {name}, but rank 0 did not confirm it in time"),
                    ranks => format!("{} did not come to {name} in time", list(ranks)),
                };
                return self.fail(generation, &outcome, reason);
            }
        }
    }

    /// Rank 0 says whose store this is, unless it came second.
    fn open_job(&self) -> Result<()> {
        if self.base.check(&["job"])? {
            let job: Hello = decode(&self.base.get("job")?)?;
            if job.process != self.hello.process {
                return match self.hello.disagreement(0, &job, 0) {
                    Some(reason) if self.hello.other_job(&job) => Err(failed(reason)),
                    _ => Ok(()), // the claim will show that there are two
                };
            }
        }
        self.base.set("job", &encode(&self.hello)?)
    }

    /// Waits for rank 0's first words and compares them with what this rank is, before it leaves
    /// anything in what may be another job's store.
    fn find_job(&mut self) -> Result<()> {
        loop {
            if self.base.check(&["job"])? {
                let job: Hello = decode(&self.base.get("job")?)?;
                // What else differs, both jobs should hear of.
                return match self.hello.disagreement(self.rank, &job, 0) {
                    Some(reason) if self.hello.other_job(&job) => Err(failed(reason)),
                    _ => Ok(()),
                };
            }
            if let Some(reason) = self.stranger()? {
                return Err(failed(reason));
            }
            let name = &self.venue.name;
            self.patience.speak(|| format!("rank 0 at {name}"));
            if !self.patience.pause() {
                return Err(failed(format!(
                    "a store answers at {name}, but no rank 0 of this crate's native backend came there in time"
                )));
            }
        }
    }

    /// The generation this rank is in; an error if another process has this rank's number.
    fn claim(&mut self) -> Result<i64> {
        let counter = format!("gen/{}", self.rank);
        let generation = loop {
            let generation = self.base.add(&counter, 1)?;
            if !self.met_without_us(generation)? {
                break generation;
            }
        };
        let before = generation - 1;
        if generation == 1 || self.met_without_us(before)? {
            return Ok(generation);
        }
        // The claimant writes its hello right after its claim.
        let mut grace = Patience::new(Duration::from_secs(5).min(self.patience.left()));
        let earlier = loop {
            if let Some(hello) = self.hello_of(before, self.rank)? {
                break Some(hello);
            }
            if !grace.pause() {
                break None;
            }
        };
        match earlier {
            Some(earlier) if earlier.process == self.hello.process && !Claim::holds(earlier.claim) => {
                Ok(generation)
            }
            earlier => {
                // The number stays with the one who had it.
                self.base.add(&counter, -1)?;
                let twins = earlier.as_ref().is_some_and(|earlier| earlier.process == self.hello.process);
                let other = earlier.as_ref().map_or_else(|| "another process".to_owned(), Hello::place);
                let mut reason = format!(
                    "two {} claim rank {}: {other}, and {}; each rank needs a number of its own",
                    if twins { "threads" } else { "processes" },
                    self.rank,
                    self.hello.place()
                );
                if self.venue.served.is_none() {
                    reason += &format!(" (or {} is left over from an earlier job)", self.venue.name);
                }
                if earlier.is_none_or(|earlier| !self.hello.other_job(&earlier)) {
                    let outcome = encode(&Outcome::Failed(reason.clone()))?;
                    self.base.compare_set(&format!("{before}/outcome"), b"", &outcome)?;
                }
                Err(failed(reason))
            }
        }
    }

    /// Whether the ranks of a generation have met and there was no such rank among them: the world has grown since.
    fn met_without_us(&self, generation: i64) -> Result<bool> {
        let outcome = format!("{generation}/outcome");
        if !self.base.check(&[&outcome])? {
            return Ok(false);
        }
        let outcome = decode(&self.base.get(&outcome)?)?;
        Ok(matches!(outcome, Outcome::Met(hosts) if hosts.len() <= self.rank))
    }

    fn hello_of(&self, generation: i64, rank: usize) -> Result<Option<Hello>> {
        let key = format!("{generation}/hello/{rank}");
        if self.base.check(&[&key])? { decode(&self.base.get(&key)?).map(Some) } else { Ok(None) }
    }

    /// Fails for all ranks, unless another outcome was first.
    fn fail(&self, generation: i64, outcome: &str, reason: String) -> Result<Met> {
        let mine = encode(&Outcome::Failed(reason.clone()))?;
        let first = self.base.compare_set(outcome, b"", &mine)?;
        let reason = match decode(&first)? {
            Outcome::Failed(first) => first,
            Outcome::Met(_) => reason,
        };
        self.part(generation);
        Err(failed(reason))
    }

    /// A server that goes at once takes the reason along: rank 0 waits until those who came have read it.
    fn part(&self, generation: i64) {
        if self.venue.served.is_none() {
            return;
        }
        let heard = format!("{generation}/heard");
        let all_know = || -> Result<bool> {
            let came = self.hello.world_size - missing(&self.base, generation, self.hello.world_size)?.len();
            Ok(self.base.add(&heard, 0)? >= came as i64)
        };
        let told = self.base.add(&heard, 1);
        let mut patience = Patience::new(PARTING);
        // A store that does not answer any more has nothing to tell.
        while self.rank == 0 && told.is_ok() && all_know().is_ok_and(|all| !all) && patience.pause() {}
    }

    fn end(&self, generation: i64, outcome: &str) -> Result<Met> {
        match decode(&self.base.get(outcome)?)? {
            Outcome::Failed(reason) => {
                self.part(generation);
                Err(failed(reason))
            }
            Outcome::Met(hosts) => {
                // A second claimant of this number could have overwritten the first one's hello.
                match self.hello_of(generation, self.rank)? {
                    Some(hello) if hello.process == self.hello.process => {}
                    _ => return Err(failed(format!("another process has taken rank {}", self.rank))),
                }
                let store = Arc::new(PrefixStore::new(generation.to_string(), self.base.clone()));
                Ok(Met { hosts, store })
            }
        }
    }

    /// Whether a rank of PyTorch's own process groups is among us. Looks now and then.
    fn stranger(&mut self) -> Result<Option<String>> {
        self.polls += 1;
        if self.polls % 16 != 1 {
            return Ok(None);
        }
        let found = match &self.venue.served {
            Some(served) => {
                if self.wire.is_none() {
                    self.wire = served.wire().ok();
                }
                // A wire that broke is made anew next time; a server that is gone shows elsewhere.
                match self.wire.as_mut().map_or(io::Result::Ok(0), Wire::workers) {
                    Ok(workers) => workers > 0,
                    Err(_) => {
                        self.wire = None;
                        false
                    }
                }
            }
            None => {
                let first: Vec<String> =
                    (0..self.hello.world_size.min(16)).map(|rank| format!("{GLOO}{rank}")).collect();
                let mut found = false;
                for key in first {
                    found |= self.venue.store.check(&[&key])?;
                }
                found
            }
        };
        if !found {
            return Ok(None);
        }
        self.base.set("python", b"")?;
        Ok(Some(mixed(&self.hello.backend, &self.venue.name)))
    }
}

/// What a native and a Gloo rank are told when they meet.
pub(super) fn mixed(native: &str, place: &str) -> String {
    format!(
        "ranks with backend {native:?} and ranks of PyTorch's own process groups (gloo, nccl) meet at {place}: \
         all ranks of a world need the same backend"
    )
}

fn missing(base: &PrefixStore<Arc<dyn Store>>, generation: i64, size: usize) -> Result<Vec<usize>> {
    absent(base, (0..size).map(|rank| format!("{generation}/hello/{rank}")))
}

/// This host's name.
pub(crate) fn this_host() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

/// Ranks in words.
pub(crate) fn list(ranks: &[usize]) -> String {
    const SHOWN: usize = 20;
    match ranks {
        [] => "rank 0's confirmation".to_owned(),
        [one] => format!("rank {one}"),
        many => {
            let shown: Vec<String> = many.iter().take(SHOWN).map(usize::to_string).collect();
            let more =
                if many.len() > SHOWN { format!(" and {} more", many.len() - SHOWN) } else { String::new() };
            format!("ranks {}{more}", shown.join(", "))
        }
    }
}
