//! Nothing leaks: hundreds of groups come, go and fail, and a process holds what it held. `cargo xtask soak` does
//! the same for long, and looks at the memory too.

mod life;
mod meter;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tch::{Device, Kind, Tensor};
use tch_distributed::store::{Store, TcpStore};
use tch_distributed::{
    InitOptions, P2pOp, ProcessGroup, ReduceOp, backend::native, destroy_process_group, init_process_group,
    register_backend, testing,
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
fn the_slots_of_many_groups_take_no_more_than_their_limit_together_and_nothing_before_they_are_used() {
    let name =
        "the_slots_of_many_groups_take_no_more_than_their_limit_together_and_nothing_before_they_are_used";
    testing::run_processes(2, name, || {
        const GROUPS: u64 = 50;
        /// What a group has besides slots: headers, with room for small messages.
        const HEADERS: u64 = 64 << 10;
        const LIMIT: u64 = 32 << 20;
        let group = init_process_group("native", options()).unwrap();
        let (me, other) = (group.rank(), 1 - group.rank());
        let mut groups = Vec::new();
        for n in 0..GROUPS {
            let before = meter::slots();
            let own = group.new_group(&[0, 1]).unwrap().unwrap();
            own.barrier().unwrap();
            let made = meter::slots();
            assert!(made <= before + HEADERS, "group {n}, not used yet, takes {} bytes", made - before);
            // Enough for every slot, of collectives and of messages.
            let mut sum = Tensor::full([1 << 20], me as i64 + 1, (Kind::Float, Device::Cpu));
            let got = sum.zeros_like();
            let both = vec![P2pOp::recv(&got, other, 0), P2pOp::send(&sum.copy(), other, 0)];
            own.batch_isend_irecv(both).unwrap().iter().for_each(|work| work.wait().unwrap());
            own.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
            assert!(sum.equal(&sum.full_like(3.0)) && got.equal(&got.full_like(other as f64 + 1.0)));
            groups.push(own);
        }
        group.barrier().unwrap();
        let used = meter::slots();
        group.barrier().unwrap();
        assert!(used > LIMIT / 2, "{used} bytes: {GROUPS} groups should have used up most of the limit");
        assert!(used <= LIMIT + (GROUPS + 1) * HEADERS, "the slots of {GROUPS} groups take {used} bytes");
        destroy_process_group().unwrap();
    });
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
