//! Ranks as threads that meet, or should not.

use std::net::TcpListener;
use std::thread;
use std::time::Instant;

use super::hello::Met;
use super::*;

const LONG: Duration = Duration::from_secs(40);

fn request(rank: usize, size: usize) -> RendezvousRequest {
    RendezvousRequest {
        init_method: None,
        store: None,
        rank: Some(rank),
        world_size: Some(size),
        timeout: LONG,
        group_name: String::new(),
        backend_name: "native".to_owned(),
        pytorch_keys: false,
        names_device: None,
    }
}

fn at(url: &str, rank: usize, size: usize) -> RendezvousRequest {
    RendezvousRequest { init_method: Some(url.to_owned()), ..request(rank, size) }
}

fn nothing(_: &str) -> Option<String> {
    None
}

/// All ranks at once, each with its request.
fn all(requests: Vec<RendezvousRequest>) -> Vec<Result<Rendezvous>> {
    thread::scope(|scope| {
        let ranks: Vec<_> =
            requests.into_iter().map(|r| scope.spawn(move || rendezvous_in(r, &nothing))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn free() -> String {
    format!("tcp://127.0.0.1:{}", crate::launch::free_port().unwrap())
}

fn text<T>(result: Result<T>) -> String {
    match result {
        Ok(_) => panic!("that should not have worked"),
        Err(error) => error.to_string(),
    }
}

/// Every rank can read what every other has written.
fn share(met: &[Result<Rendezvous>]) {
    let met: Vec<&Rendezvous> = met.iter().map(|m| m.as_ref().unwrap()).collect();
    met.iter().for_each(|m| m.store.set(&format!("from {}", m.rank), b"x").unwrap());
    let keys: Vec<String> = met.iter().map(|m| format!("from {}", m.rank)).collect();
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    met.iter().for_each(|m| m.store.wait(&keys, LONG).unwrap());
}

#[test]
fn ranks_meet_over_tcp_in_any_order_and_count_themselves_on_their_host() {
    let url = free();
    let met = all((0..3).rev().map(|rank| at(&url, rank, 3)).collect());
    share(&met);
    let local: Vec<_> = met.iter().map(|m| m.as_ref().unwrap().local_rank).collect();
    assert_eq!(local, [Some(2), Some(1), Some(0)]);
}

#[test]
fn ranks_meet_in_a_file_and_in_a_given_store() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("file://{}", dir.path().join("meet").display());
    share(&all((0..2).map(|rank| at(&url, rank, 2)).collect()));
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    let given = |rank| RendezvousRequest { store: Some(store.clone()), ..request(rank, 4) };
    share(&all((0..4).map(given).collect()));
}

#[test]
fn the_same_ranks_meet_again_at_the_same_place_and_find_no_old_keys() {
    let url = free();
    // While a world lives, no other world of this process takes its server away.
    let mut worlds = Vec::new();
    for round in 0..3 {
        let met = all((0..2).map(|rank| at(&url, rank, 2)).collect());
        let first = met[0].as_ref().unwrap();
        assert!(!first.store.check(&["old"]).unwrap(), "round {round}");
        first.store.set("old", b"1").unwrap();
        met[1].as_ref().unwrap().store.wait(&["old"], LONG).unwrap();
        worlds.push(first.store.clone());
    }
}

#[test]
fn the_launchers_store_is_used_where_there_is_one() {
    let server = TcpStore::serve("127.0.0.1", 0).unwrap();
    let port = server.port().to_string();
    let env = move |rank: usize| {
        let port = port.clone();
        move |name: &str| {
            Some(match name {
                "RANK" | "LOCAL_RANK" => rank.to_string(),
                "WORLD_SIZE" => "2".to_owned(),
                "MASTER_ADDR" => "127.0.0.1".to_owned(),
                "MASTER_PORT" => port.clone(),
                "TORCHELASTIC_USE_AGENT_STORE" => "True".to_owned(),
                "TORCHELASTIC_RESTART_COUNT" => "5".to_owned(),
                _ => return None,
            })
        }
    };
    let met: Vec<_> = thread::scope(|scope| {
        let run = |rank| {
            let env = env(rank);
            let request = RendezvousRequest { rank: None, world_size: None, ..request(0, 1) };
            scope.spawn(move || rendezvous_in(request, &env))
        };
        let ranks: Vec<_> = (0..2).map(run).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    share(&met);
    assert!(server.check(&["tchd/5/1/hello/1"]).unwrap(), "keys carry the number of restarts");
}

#[test]
fn one_rank_needs_nothing_else() {
    let alone = RendezvousRequest { rank: None, ..request(0, 1) };
    let met = rendezvous_in(alone, &nothing).unwrap();
    assert_eq!((met.rank, met.world_size, met.local_rank), (0, 1, Some(0)));
}

#[test]
fn what_is_missing_or_impossible_is_said_before_anything_is_waited_for() {
    let started = Instant::now();
    let missing = |request| match rendezvous_in(request, &nothing) {
        Err(Error::MissingArgument { argument, .. }) => argument,
        other => panic!("{:?}", other.map(|_| ())),
    };
    assert_eq!(missing(RendezvousRequest { world_size: None, ..request(0, 1) }), "world_size");
    assert_eq!(missing(RendezvousRequest { rank: None, ..request(0, 2) }), "rank");
    assert_eq!(missing(RendezvousRequest { rank: None, world_size: None, ..request(0, 2) }), "rank");
    assert_eq!(missing(request(0, 2)), "master_addr");
    assert!(matches!(
        rendezvous_in(at("tcp://127.0.0.1:1", 2, 2), &nothing),
        Err(Error::RankOutOfRange { rank: 2, size: 2 })
    ));
    let both = RendezvousRequest { store: Some(Arc::new(HashStore::new())), ..at("env://", 0, 2) };
    assert!(text(rendezvous_in(both, &nothing)).contains("cannot both be given"));
    assert!(text(rendezvous_in(at("tcp://h:1?rank=1", 0, 2), &nothing)).contains("rank"));
    assert!(
        text(rendezvous_in(at("tcp://no-such.invalid:29500", 1, 2), &nothing)).contains("does not resolve")
    );
    assert!(
        text(rendezvous_in(at("tcp://no-such.invalid:29500", 0, 2), &nothing)).contains("does not resolve")
    );
    assert!(started.elapsed() < LONG);
}

#[test]
fn a_port_in_use_is_an_error_and_not_a_wait() {
    let other = TcpListener::bind("0.0.0.0:0").unwrap();
    let url = format!("tcp://127.0.0.1:{}", other.local_addr().unwrap().port());
    let started = Instant::now();
    let text = text(rendezvous_in(at(&url, 0, 2), &nothing));
    assert!(text.contains("in use"), "{text}");
    assert!(started.elapsed() < LONG, "whoever has the port need not answer");
}

#[test]
fn a_rank_that_does_not_come_is_named_when_the_time_is_over() {
    let url = free();
    let soon = |rank| RendezvousRequest { timeout: Duration::from_secs(3), ..at(&url, rank, 4) };
    let mut results = all(vec![soon(0), soon(2)]);
    for result in results.drain(..) {
        let text = text(result);
        assert!(text.contains("ranks 1, 3 did not come"), "{text}");
    }
    let nobody = RendezvousRequest { timeout: Duration::from_millis(300), ..at(&free(), 1, 2) };
    let text = text(rendezvous_in(nobody, &nothing));
    assert!(text.contains("rank 0 did not come to 127.0.0.1"), "{text}");
}

#[test]
fn ranks_that_disagree_about_the_world_are_told_on_both_sides() {
    let url = free();
    for result in all(vec![at(&url, 0, 2), at(&url, 1, 3)]) {
        let text = text(result);
        assert!(text.contains("world size") && text.contains("rank 1"), "{text}");
    }
    let url = free();
    let named = RendezvousRequest { group_name: "b".into(), ..at(&url, 1, 2) };
    for result in all(vec![at(&url, 0, 2), named]) {
        let text = text(result);
        assert!(text.contains("group name"), "{text}");
    }
}

#[test]
fn where_only_some_ranks_name_a_device_for_nccl_every_rank_is_told_which() {
    let url = free();
    let request = |rank| RendezvousRequest { names_device: Some(rank != 1), ..at(&url, rank, 3) };
    for result in all((0..3).map(request).collect()) {
        let text = text(result);
        assert!(text.contains("device") && text.contains("rank 1 does not"), "{text}");
    }
    // A rank without NCCL has nothing to name; who disagrees with it about backends hears that elsewhere.
    let url = free();
    let request = |rank| RendezvousRequest { names_device: (rank > 0).then_some(true), ..at(&url, rank, 3) };
    share(&all((0..3).map(request).collect()));
}

#[test]
fn a_native_rank_and_a_gloo_rank_are_told_on_both_sides() {
    for gloo in [0, 1] {
        let url = free();
        let request = |rank| RendezvousRequest {
            pytorch_keys: rank == gloo,
            backend_name: if rank == gloo { "gloo" } else { "native" }.to_owned(),
            ..at(&url, rank, 2)
        };
        let native = all(vec![request(0), request(1)]).swap_remove(1 - gloo);
        let text = text(native);
        assert!(text.contains("PyTorch's own process groups"), "{text}");
    }
    // Where rank 0 is Gloo it waits for all, and so hears of it.
    let url = free();
    let gloo = RendezvousRequest { pytorch_keys: true, backend_name: "gloo".into(), ..at(&url, 0, 2) };
    for result in all(vec![gloo, at(&url, 1, 2)]) {
        assert!(text(result).contains("PyTorch's own process groups"));
    }
}

#[test]
fn a_rank_that_comes_first_to_a_world_of_the_other_sort_at_the_same_address_waits_for_rank_0() {
    let url = free();
    for gloo in [false, true, false] {
        let request = |rank| RendezvousRequest {
            pytorch_keys: gloo,
            backend_name: if gloo { "gloo" } else { "native" }.to_owned(),
            ..at(&url, rank, 2)
        };
        let met = thread::scope(|scope| {
            let early = scope.spawn(|| rendezvous_in(request(1), &nothing));
            // Long enough for rank 1 to see what rank 0 still serves.
            thread::sleep(Duration::from_millis(500));
            [rendezvous_in(request(0), &nothing), early.join().unwrap()]
        });
        share(&met);
    }
}

#[test]
fn a_gloo_world_has_pytorchs_keys_and_nothing_of_ours() {
    let url = free();
    let gloo =
        |rank| RendezvousRequest { pytorch_keys: true, backend_name: "gloo".into(), ..at(&url, rank, 3) };
    let met = all((0..3).map(gloo).collect());
    met[0].as_ref().unwrap().store.set("0//cpu//0/0", b"x").unwrap();
    let port = url.rsplit_once(':').unwrap().1.parse().unwrap();
    let client = TcpStore::connect("127.0.0.1", port, LONG).unwrap();
    client.wait(&["default_pg/0//cpu//0/0"], LONG).unwrap();
    assert_eq!(client.num_keys().unwrap(), 1);
    assert_eq!(client.wire().unwrap().workers().unwrap(), 3);
}

/// A rank that says it is another process, or of another job.
fn meeting(store: &Arc<dyn Store>, rank: usize, size: usize, process: &str, job: &str) -> Result<Met> {
    let venue = Venue {
        store: store.clone(),
        served: None,
        name: "the given store".to_owned(),
        restarts: "0".to_owned(),
    };
    let claim = Claim::new();
    let mut hello = Hello::new(size, "native".into(), String::new(), job.into(), &claim);
    hello.process = process.to_owned();
    Meeting::new(&venue, rank, hello, LONG).run()
}

#[test]
fn two_processes_that_claim_one_rank_are_both_told() {
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    thread::scope(|scope| {
        let first = scope.spawn(|| meeting(&store, 1, 2, "a", ""));
        let second = scope.spawn(|| meeting(&store, 1, 2, "b", ""));
        for result in [first.join().unwrap(), second.join().unwrap()] {
            let text = text(result);
            assert!(text.contains("two processes claim rank 1"), "{text}");
        }
    });
}

#[test]
fn a_number_that_was_refused_to_a_stranger_stays_with_its_rank() {
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    let pair = |round: &'static str| {
        thread::scope(|scope| {
            let ranks = [0, 1].map(|rank| {
                let store = &store;
                scope.spawn(move || meeting(store, rank, 2, &format!("process {rank}"), "job").map(|_| ()))
            });
            for rank in ranks {
                rank.join().unwrap().unwrap_or_else(|e| panic!("{round}: {e}"));
            }
        });
    };
    pair("the first world");
    let refused = text(meeting(&store, 1, 2, "a stranger", "job"));
    assert!(refused.contains("two processes claim rank 1"), "{refused}");
    pair("the next one");
}

#[test]
fn a_rank_that_is_new_in_a_grown_world_meets_the_others() {
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    for size in [2, 3, 1, 3] {
        thread::scope(|scope| {
            let ranks: Vec<_> = (0..size)
                .map(|rank| {
                    let store = &store;
                    scope.spawn(move || meeting(store, rank, size, &format!("process {rank}"), "job"))
                })
                .collect();
            for rank in ranks {
                let met = rank.join().unwrap().unwrap_or_else(|e| panic!("world of {size}: {e}"));
                assert_eq!(met.hosts.len(), size);
            }
        });
    }
}

#[test]
fn a_gloo_world_meets_again_at_the_same_place_while_handles_of_the_last_one_live() {
    let url = free();
    let gloo =
        |rank| RendezvousRequest { pytorch_keys: true, backend_name: "gloo".into(), ..at(&url, rank, 3) };
    let first = all((0..3).map(gloo).collect());
    let second = all((0..3).map(gloo).collect());
    share(&second);
    drop(first);
    share(&all((0..3).map(gloo).collect()));
}

#[test]
fn two_threads_that_claim_one_rank_are_both_told_at_once() {
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    let url = free();
    let given = |_| RendezvousRequest { store: Some(store.clone()), ..request(1, 2) };
    let served = |_| at(&url, 0, 2);
    let started = Instant::now();
    for (rank, pair) in [(1, all((0..2).map(given).collect())), (0, all((0..2).map(served).collect()))] {
        for result in pair {
            let text = text(result);
            assert!(text.contains(&format!("two threads claim rank {rank}")), "{text}");
        }
    }
    assert!(started.elapsed() < LONG / 2, "nobody waits for the timeout");
}

#[test]
fn a_rank_that_comes_late_to_a_number_that_is_taken_is_told_and_the_world_goes_on() {
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    let given = |rank| RendezvousRequest { store: Some(store.clone()), ..request(rank, 2) };
    let met = all((0..2).map(given).collect());
    let late = text(rendezvous_in(given(1), &nothing));
    assert!(late.contains("two threads claim rank 1"), "{late}");
    share(&met);
    drop(met);
    share(&all((0..2).map(given).collect()));
}

#[test]
fn two_jobs_at_one_place_are_told_apart() {
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    thread::scope(|scope| {
        let first = scope.spawn(|| meeting(&store, 0, 2, "a", "job 1"));
        let second = scope.spawn(|| meeting(&store, 1, 2, "b", "job 2"));
        for result in [first.join().unwrap(), second.join().unwrap()] {
            let text = text(result);
            assert!(text.contains("two jobs") && text.contains("job 1") && text.contains("job 2"), "{text}");
        }
    });
}

#[test]
fn a_wait_says_now_and_then_what_it_is_for() {
    // Ten seconds are long for a test: the words alone.
    assert_eq!(list(&[3]), "rank 3");
    assert_eq!(list(&[1, 2]), "ranks 1, 2");
    assert!(list(&(0..30).collect::<Vec<_>>()).ends_with("and 10 more"));
}
