//! How ranks find each other: who this rank is, where they meet, and that they are all there.
//!
//! Whatever can be seen to be wrong is an error before anything is waited for. A wait says after ten
//! seconds, and then every thirty, which ranks it is for.

mod claim;
pub(crate) mod environment;
mod hello;
pub(crate) mod patience;
mod place;

#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use once_cell::sync::Lazy;
use parking_lot::Mutex;

pub(crate) use claim::Claim;
use environment::Lookup;
use hello::{Hello, Meeting, Venue, failed, mixed};
pub(crate) use hello::{list, this_host};
use patience::Patience;
use place::{Method, Place};

use crate::notice::notice;
use crate::store::wire::{self, NoWire, Wire};
use crate::store::{FileStore, HashStore, PrefixStore, Store, TcpStore, place as address};
use crate::{Error, Result};

/// What a rank was told.
pub(crate) struct RendezvousRequest {
    pub(crate) init_method: Option<String>,
    pub(crate) store: Option<Arc<dyn Store>>,
    pub(crate) rank: Option<usize>,
    pub(crate) world_size: Option<usize>,
    pub(crate) timeout: Duration,
    pub(crate) group_name: String,
    /// The backend as the user wrote it: all ranks must have the same.
    pub(crate) backend_name: String,
    /// Every backend is libtorch's own, so that Python ranks can be in the world: the store holds
    /// PyTorch's keys and nothing of ours.
    pub(crate) pytorch_keys: bool,
    /// Where NCCL has a part in it: whether the user named this rank's device.
    pub(crate) names_device: Option<bool>,
}

/// A world whose ranks have met.
pub(crate) struct Rendezvous {
    /// Keys of this world alone; for worlds with PyTorch's keys what PyTorch hands to its groups.
    pub(crate) store: Arc<dyn Store>,
    pub(crate) rank: usize,
    pub(crate) world_size: usize,
    /// Among the ranks of this host: from the launcher, or counted. `None` where nobody can tell.
    pub(crate) local_rank: Option<usize>,
    /// This rank's number among the threads of this process; held until the rank leaves the world.
    pub(crate) claim: Option<Claim>,
}

/// The stores that this process serves: those of worlds that live, and the last one. That outlives its world:
/// other ranks may still read, and the next world of this process meets in it, if it is one of the same sort.
static SERVED: Lazy<Mutex<Vec<Served>>> = Lazy::new(Mutex::default);

struct Served {
    store: Arc<TcpStore>,
    pytorch_keys: bool,
    /// How many ranks have joined the earlier worlds, as PyTorch counts.
    joined: i64,
}

/// At which addresses this process has met a rank 0 that serves the store, and whether the last world there had PyTorch's
/// keys.
static LAST: Lazy<Mutex<HashMap<String, bool>>> = Lazy::new(Mutex::default);

/// Meets the other ranks.
pub(crate) fn rendezvous(request: RendezvousRequest) -> Result<Rendezvous> {
    rendezvous_in(request, &environment::process)
}

fn rendezvous_in(request: RendezvousRequest, env: Lookup<'_>) -> Result<Rendezvous> {
    if request.store.is_some() && request.init_method.is_some() {
        return Err(Error::invalid("store", "a store and an init method cannot both be given"));
    }
    let method = Method::read(request.init_method.as_deref().unwrap_or("env://"))?;
    let world_size = choose("world_size", request.world_size, method.world_size)?;
    let world_size = match world_size {
        None => environment::world_size(env)?,
        given => given,
    };
    let rank = match choose("rank", request.rank, method.rank)? {
        None => environment::rank(env)?,
        given => given,
    };
    let (rank, world_size) = match (rank, world_size) {
        (None, Some(1)) => (0, 1),
        (None, _) => {
            return Err(Error::MissingArgument {
                argument: "rank",
                builder: "InitOptions::rank",
                variable: "RANK",
            });
        }
        (Some(_), None) => {
            return Err(Error::MissingArgument {
                argument: "world_size",
                builder: "InitOptions::world_size",
                variable: "WORLD_SIZE",
            });
        }
        (Some(rank), Some(size)) => (rank, size),
    };
    if world_size == 0 {
        return Err(Error::invalid("world_size", "it is 0, expected at least one rank"));
    }
    if rank >= world_size {
        return Err(Error::RankOutOfRange { rank, size: world_size });
    }
    let local_rank = environment::local_rank(env)?;
    if world_size == 1 {
        let store = request.store.unwrap_or_else(|| Arc::new(HashStore::new()));
        return Ok(Rendezvous { store, rank, world_size, local_rank: local_rank.or(Some(0)), claim: None });
    }
    let venue = |store, served, name| Venue { store, served, name, restarts: environment::restarts(env) };
    let venue = match request.store.clone() {
        Some(store) => venue(store, None, "the given store".to_owned()),
        None => match method.place.find(env)? {
            Place::File(path) => {
                let store = Arc::new(FileStore::with_workers(&path, Some(world_size))?);
                venue(store, None, format!("file {}", path.display()))
            }
            Place::Tcp { host, port, agent } => {
                let name = address(&host, port);
                let store = tcp(&host, port, rank, agent, &request)?;
                let served = (!agent).then(|| store.clone());
                venue(store, served, name)
            }
            Place::Environment => return Err(failed("env:// has no address")),
        },
    };
    let met_here = venue.served.as_ref().filter(|_| rank != 0).map(|_| venue.name.clone());
    let has_met = || {
        if let Some(place) = met_here {
            LAST.lock().insert(place, request.pytorch_keys);
        }
    };
    if request.pytorch_keys {
        if let Some(served) = &venue.served {
            join_pytorch(&venue, served, rank, world_size, request.timeout).inspect_err(|_| {
                // Who came counts for no other world: the next one is to begin with a new store.
                SERVED.lock().retain(|own| !Arc::ptr_eq(&own.store, served));
            })?;
        }
        has_met();
        // A store of the user's is the groups' own; else PyTorch puts this before all.
        let store: Arc<dyn Store> = match request.store {
            Some(store) => store,
            None => Arc::new(PrefixStore::new("default_pg", venue.store)),
        };
        return Ok(Rendezvous { store, rank, world_size, local_rank, claim: None });
    }
    let claim = Claim::new();
    let mut hello =
        Hello::new(world_size, request.backend_name, request.group_name, environment::run_id(env), &claim);
    hello.names_device = request.names_device;
    let met = Meeting::new(&venue, rank, hello, request.timeout).run()?;
    has_met();
    let counted = met.hosts.get(rank).map(|own| met.hosts[..rank].iter().filter(|host| *host == own).count());
    let local_rank = local_rank.or(counted);
    Ok(Rendezvous { store: met.store, rank, world_size, local_rank, claim: Some(claim) })
}

/// What was given in the options or in the address, if not both differently.
fn choose(argument: &'static str, option: Option<usize>, query: Option<usize>) -> Result<Option<usize>> {
    match (option, query) {
        (Some(option), Some(query)) if option != query => Err(Error::invalid(
            argument,
            format!("{option} is given with InitOptions::{argument}, and {query} in the init method"),
        )),
        _ => Ok(option.or(query)),
    }
}

/// The store of a TCP address: rank 0 serves it, unless the launcher does.
fn tcp(
    host: &str,
    port: u16,
    rank: usize,
    agent: bool,
    request: &RendezvousRequest,
) -> Result<Arc<TcpStore>> {
    let place = address(host, port);
    let addresses = wire::resolve(host, port).map_err(|reason| failed(format!("{place}: {reason}")))?;
    let timeout = request.timeout;
    if rank == 0 && !agent {
        if !wire::is_here(&addresses) {
            notice(format_args!(
                "rank 0 serves the store, but {host} is not an address of this machine: others may look elsewhere"
            ));
        }
        return serve(host, port, request);
    }
    let mut patience = Patience::new(timeout);
    let who = if agent { "the launcher's store".to_owned() } else { "rank 0".to_owned() };
    loop {
        let knock = Wire::knock(host, port, patience.left(), |error| {
            patience.speak(|| format!("{who} at {place} ({error})"));
        });
        knock.map_err(|error| match error {
            NoWire::Wrong(reason) => failed(format!("{place}: {reason}")),
            NoWire::Late(error) => failed(format!(
                "{who} did not come to {place} within {timeout:?} ({error}): is it running, and is this its address?"
            )),
        })?;
        let store = TcpStore::client(host, port, timeout)?;
        if agent || !is_left_over(&place, &store, request.pytorch_keys, &mut patience) {
            return Ok(Arc::new(store));
        }
    }
}

/// Whether this is what rank 0 served for the last world here, which was of the other sort: then it will serve another.
/// Waits for that as long as there is time; after it, or where that world was none of this process, the two sorts meet.
fn is_left_over(place: &str, store: &TcpStore, pytorch_keys: bool, patience: &mut Patience) -> bool {
    if LAST.lock().get(place) != Some(&!pytorch_keys) {
        return false;
    }
    let job = format!("tchd/{}/job", environment::restarts(&environment::process));
    let mut wire = if pytorch_keys { None } else { store.wire().ok() };
    loop {
        let of_the_other_sort = match &mut wire {
            _ if pytorch_keys => store.check(&[&job]).ok(),
            Some(wire) => wire.workers().ok().map(|workers| workers > 0),
            None => None,
        };
        match of_the_other_sort {
            Some(true) => {}
            Some(false) => return false,
            None => return true, // it has gone
        }
        patience.speak(|| format!("rank 0 to leave the last world at {place}"));
        if !patience.pause() {
            return false;
        }
    }
}

fn serve(host: &str, port: u16, request: &RendezvousRequest) -> Result<Arc<TcpStore>> {
    let made = {
        // Held while a socket is bound, and no longer: other worlds of this process want to serve too.
        let mut served = SERVED.lock();
        let own = served.iter().find(|own| own.store.port() == port);
        if let Some(own) = own.filter(|own| own.pytorch_keys == request.pytorch_keys) {
            own.store.set_timeout(request.timeout);
            return Ok(own.store.clone());
        }
        // Ranks of the two sorts must not meet.
        served.retain(|own| own.store.port() != port && Arc::strong_count(&own.store) > 1);
        let made = TcpStore::server(host, port, request.timeout).map(Arc::new);
        if let Ok(store) = &made {
            served.push(Served { store: store.clone(), pytorch_keys: request.pytorch_keys, joined: 0 });
        }
        made
    };
    match made {
        Err(Error::Store { reason, .. }) => {
            // Another rank 0 of this job? Then both are to know.
            if !request.pytorch_keys
                && Wire::knock("127.0.0.1", port, Duration::from_secs(1), |_| ()).is_ok()
                && let Ok(store) = TcpStore::client("127.0.0.1", port, Duration::from_secs(5))
                && store.check(&[&format!("tchd/{}/job", environment::restarts(&environment::process))])?
            {
                return Ok(Arc::new(store));
            }
            Err(failed(format!("rank 0 cannot serve the store at {}: {reason}", address(host, port))))
        }
        made => made,
    }
}

/// Joins as PyTorch's ranks join. Rank 0 waits for all; that there is a native rank is seen here.
fn join_pytorch(venue: &Venue, store: &TcpStore, rank: usize, size: usize, timeout: Duration) -> Result<()> {
    let lost = |e: std::io::Error| failed(format!("lost the store at {}: {e}", venue.name));
    let base = hello::base(venue);
    let mut wire = store.wire().map_err(lost)?;
    let mut joined = wire.join().map_err(lost)?;
    let mut patience = Patience::new(timeout);
    let mut earlier = 0;
    if let Some(own) = SERVED.lock().iter_mut().find(|own| rank == 0 && std::ptr::eq(&*own.store, store)) {
        earlier = own.joined;
        own.joined += size as i64;
    }
    loop {
        if base.check(&["job"])? || base.check(&["python"])? {
            return Err(failed(mixed("native", &venue.name)));
        }
        let here = joined - earlier;
        if rank != 0 || here >= size as i64 {
            return Ok(());
        }
        let absent = size as i64 - here;
        patience.speak(|| format!("{absent} of {size} ranks at {}", venue.name));
        if !patience.pause() {
            return Err(failed(format!(
                "{here} of {size} ranks came to {} within {timeout:?}: who is missing cannot be told where \
                 PyTorch's own process groups meet",
                venue.name
            )));
        }
        joined = wire.workers().map_err(lost)?;
    }
}
