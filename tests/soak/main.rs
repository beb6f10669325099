//! Nothing leaks: hundreds of groups come, go and fail, and a process holds what it held. `cargo xtask soak` does
//! the same for long, and looks at the memory too.

mod life;
mod meter;
mod slots;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tch_distributed::store::{Store, TcpStore};
use tch_distributed::{
    InitOptions, ProcessGroup, backend::native, destroy_process_group, init_process_group, register_backend,
    testing,
};

const COLLECTIVES: usize = 1_000;
const GROUPS: usize = 200;
const FAILURES: usize = 60;

fn options() -> InitOptions {
    InitOptions::new().timeout(Duration::from_secs(60))
}

/// A short life, after which nothing may be there that was not there after its first tenth.
fn live(group: &ProcessGroup, store: &dyn Store) {
    for looks in [
        life::watched(group, store, COLLECTIVES, life::collective).unwrap(),
        life::watched(group, store, GROUPS, life::one_group).unwrap(),
        life::watched(group, store, FAILURES, life::failed_group).unwrap(),
    ] {
        let grown = looks[looks.len() - 1].growth(&looks[0], false);
        assert!(grown.is_empty(), "rank {}: {grown:?}\n{}\n{looks:#?}", group.rank(), meter::HEAD);
    }
}

/// In a world of processes, of which this is one.
fn as_a_process(backend: &str) {
    for transport in ["unix", "tcp"] {
        register_backend(transport, move |context| native::create_over(context, transport)).unwrap();
    }
    let variable = |name: &str| std::env::var(name).unwrap();
    let group = init_process_group(backend, options()).unwrap();
    let port = variable("MASTER_PORT").parse().unwrap();
    let store = TcpStore::connect(variable("MASTER_ADDR"), port, Duration::from_secs(10)).unwrap();
    live(&group, &store);
    destroy_process_group().unwrap();
}

#[test]
fn groups_that_come_and_go_leak_nothing_between_processes_that_share_memory() {
    let name = "groups_that_come_and_go_leak_nothing_between_processes_that_share_memory";
    testing::run_processes(3, name, || as_a_process("native"));
}

#[test]
fn groups_that_come_and_go_leak_nothing_between_processes_with_sockets() {
    let name = "groups_that_come_and_go_leak_nothing_between_processes_with_sockets";
    testing::run_processes(2, name, || as_a_process("unix"));
    testing::run_processes(2, name, || as_a_process("tcp"));
}

#[test]
fn groups_that_come_and_go_leak_nothing_among_threads() {
    let name = "groups_that_come_and_go_leak_nothing_among_threads";
    // In a process of their own: other tests have descriptors too.
    testing::run_processes(1, name, || {
        let store: Arc<Mutex<Option<Arc<dyn Store>>>> = Arc::default();
        let seen = store.clone();
        let watched = move |context: tch_distributed::backend::BackendContext| {
            seen.lock().get_or_insert_with(|| context.store.clone());
            native::create(context)
        };
        register_backend("watched", watched).unwrap();
        testing::run_threads_on("watched", options(), 3, |group| {
            let store = store.lock().clone().expect("the world has a store");
            live(&group, &*store);
        });
    });
}
