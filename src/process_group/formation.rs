//! How a group comes about: its ranks agree on what it is, and make its backends.

use std::sync::Arc;
use std::time::Duration;

use super::ProcessGroup;
use super::spec::{BackendSpec, Backends};
use super::state::{AGREEMENT, Inner, Parts, Universe};
use crate::backend::{BackendContext, CollectiveBackend, Placement, factory, make, native, split_nccl};
use crate::rendezvous::this_host;
use crate::store::{PrefixStore, Store};
use crate::{Error, Result};

/// What is known of a group before its backends exist.
pub(super) struct Formation {
    pub(super) name: String,
    pub(super) rank: usize,
    /// Global ranks.
    pub(super) ranks: Vec<usize>,
    /// Keys of this group alone.
    pub(super) store: Arc<dyn Store>,
    pub(super) spec: BackendSpec,
    pub(super) timeout: Duration,
    pub(super) universe: Arc<Universe>,
    pub(super) detail: bool,
    pub(super) high_priority_stream: bool,
    /// The backend whose communicator all its ranks split, and the new group's ranks there.
    pub(super) split_from: Option<(Arc<dyn CollectiveBackend>, Vec<usize>)>,
    /// Whether this is a default group, whose store may have served one before.
    pub(super) world: bool,
}

/// Agrees with the other ranks on what the group is, and makes its backends.
pub(super) fn form(mut formation: Formation) -> Result<ProcessGroup> {
    let (cpu, cuda) = formation.spec.resolve()?;
    // Before anything is waited for: a name that nobody knows is an error on the spot.
    for name in [&cpu, &cuda].into_iter().flatten() {
        factory(name)?;
    }
    let lasting = formation.store.clone();
    let generation = if formation.world { Some(Generation::claim(&formation)?) } else { None };
    if let Some(generation) = &generation {
        formation.store = generation.store(&lasting);
    }
    let result = assemble(formation);
    if let (Err(_), Some(generation)) = (&result, generation) {
        generation.give_up(&lasting);
    }
    result
}

/// Makes the group's backends.
fn assemble(formation: Formation) -> Result<ProcessGroup> {
    let (cpu, cuda) = formation.spec.resolve()?;
    formation.universe.sweep();
    if let Err(error) = agree(&formation) {
        // Who agrees with the first waits for this rank. For a world it may still come, with the right arguments.
        for device in ["cpu", "cuda"].into_iter().filter(|_| !formation.world) {
            let store = PrefixStore::new(format!("{device}/"), formation.store.clone());
            native::give_up(&store, formation.rank, &error);
        }
        return Err(error);
    }
    let count_hosts = formation.world && !formation.universe.knows_local_rank();
    if count_hosts {
        formation.store.set(&host_key(formation.rank), this_host().as_bytes())?;
    }
    let placement =
        Placement { high_priority_stream: formation.high_priority_stream, ..formation.universe.placement() };
    let create = |name: Option<String>, device: &str| -> Result<Option<Arc<dyn CollectiveBackend>>> {
        let Some(name) = name else { return Ok(None) };
        let context = BackendContext {
            store: Arc::new(PrefixStore::new(device, formation.store.clone())),
            rank: formation.rank,
            size: formation.ranks.len(),
            ranks: formation.ranks.clone(),
            timeout: formation.timeout,
            group_name: formation.name.clone(),
        };
        if name == "nccl"
            && let Some((parent, members)) = &formation.split_from
        {
            return split_nccl(&**parent, members, context, placement).map(Some);
        }
        make(&name, context, placement).map(Some)
    };
    let backends = Backends { cpu: create(cpu, "cpu/")?, cuda: create(cuda, "cuda/")? };
    if count_hosts && let Some(local_rank) = local_rank(&formation)? {
        formation.universe.set_local_rank(local_rank);
    }
    Ok(ProcessGroup::of(Inner::new(Parts {
        name: formation.name,
        rank: formation.rank,
        ranks: formation.ranks,
        backends,
        spec: formation.spec,
        store: formation.store,
        universe: formation.universe,
        detail: formation.detail,
        timeout: formation.timeout,
    })))
}

fn host_key(rank: usize) -> String {
    format!("tchd/host/{rank}")
}

/// How many ranks before this one are on its host, where all of them have said where they are: they have before they
/// connected.
fn local_rank(formation: &Formation) -> Result<Option<usize>> {
    let own = this_host();
    let mut before = 0;
    for rank in 0..formation.rank {
        let key = host_key(rank);
        if !formation.store.check(&[&key])? {
            return Ok(None);
        }
        before += usize::from(formation.store.get(&key)? == own.as_bytes());
    }
    Ok(Some(before))
}

/// Which world of its store a default group is: a store that was used before holds the keys of an earlier one.
struct Generation {
    number: i64,
    rank: usize,
    size: i64,
}

impl Generation {
    /// The next one of which this rank is not yet a member.
    fn claim(formation: &Formation) -> Result<Self> {
        let (rank, size) = (formation.rank, formation.ranks.len() as i64);
        let store = &formation.store;
        let number = (store.add("tchd/joined", 1)? - 1) / size;
        let this = Self { number, rank, size };
        if store.add(&this.member(), 1)? > 1 {
            this.take_back(store);
            let reason = format!(
                "two processes claim rank {rank} of {size}: give each its own rank (or, where ranks of Python were \
                 in an earlier world of this store, give the new world a store of its own)"
            );
            return Err(Error::Rendezvous { reason });
        }
        Ok(this)
    }

    fn member(&self) -> String {
        format!("tchd/joined/{}/{}", self.number, self.rank)
    }

    /// The first has PyTorch's own keys.
    fn store(&self, lasting: &Arc<dyn Store>) -> Arc<dyn Store> {
        match self.number {
            0 => lasting.clone(),
            n => Arc::new(PrefixStore::new(format!("tchd/generation/{n}"), lasting.clone())),
        }
    }

    /// Where a world has not come about since some never came, its members may try again in the same generation.
    fn give_up(&self, lasting: &Arc<dyn Store>) {
        if lasting.add("tchd/joined", 0).is_ok_and(|joined| joined < (self.number + 1) * self.size) {
            self.take_back(lasting);
        }
    }

    /// As if this rank had not come.
    fn take_back(&self, lasting: &Arc<dyn Store>) {
        let undone = lasting.add(&self.member(), -1).and_then(|_| lasting.add("tchd/joined", -1));
        if let Err(error) = undone {
            tracing::debug!("cannot take back that rank {} came: {error}", self.rank);
        }
    }
}

/// The first rank to come writes down what it takes the group to be; the others compare.
fn agree(formation: &Formation) -> Result<()> {
    let (cpu, cuda) = formation.spec.resolve()?;
    let backend = [cpu, cuda].map(|name| name.unwrap_or_else(|| "-".to_owned())).join(" ");
    let fields = [
        ("backend", backend),
        ("world_size", formation.ranks.len().to_string()),
        ("ranks", format!("{:?}", formation.ranks)),
        ("debug_detail", formation.detail.to_string()),
    ];
    let mine = fields.iter().map(|(_, value)| value.as_str()).collect::<Vec<_>>().join("\n");
    let mine = format!("{mine}\n{}", formation.ranks[formation.rank]);
    let first = formation.store.compare_set(AGREEMENT, b"", mine.as_bytes())?;
    let first = String::from_utf8_lossy(&first);
    let theirs: Vec<&str> = first.split('\n').collect();
    let other = theirs.get(fields.len()).copied().unwrap_or("?");
    for (i, (argument, value)) in fields.iter().enumerate() {
        if theirs.get(i) != Some(&value.as_str()) {
            return Err(Error::invalid(
                argument,
                format!(
                    "ranks disagree about group {}: here it is {value:?}, global rank {other} said {:?}",
                    formation.name,
                    theirs.get(i).copied().unwrap_or_default()
                ),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{GroupOptions, register_backend, testing};

    #[test]
    fn who_gives_up_a_group_is_named_by_its_rank_in_that_group() {
        const OTHER: &str = "native-by-another-name";
        register_backend(OTHER, native::create).unwrap();
        let told = testing::run_threads(3, |group| {
            let options = match group.rank() {
                2 => GroupOptions::new().backend(OTHER),
                _ => GroupOptions::new(),
            };
            group.new_group_with(&[1, 2], options).err()
        });
        // Whoever came second gave up, rank 0 or rank 1 of the two; the other waited for it.
        let refused = |error: &Option<Error>| matches!(error, Some(Error::InvalidArgument { .. }));
        let second = told.iter().position(refused).expect("the ranks disagree");
        let Some(Error::Rendezvous { reason }) = &told[3 - second] else { panic!("{told:?}") };
        assert!(reason.contains(&format!("rank {} gave up", second - 1)), "{reason}");
    }
}
