//! Several groups at once, and setting a group up: late ranks, strangers, other settings.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use socket2::{Domain, Socket, Type};
use tch::{Device, Kind, Tensor};

use super::links::{port_of, with_port};
use super::{Rank, TRANSPORT, altered, context, none, options, ranks, segments};
use crate::backend::native::{self, Options};
use crate::backend::{CollectiveBackend, Op};
use crate::store::{HashStore, PrefixStore, Store};
use crate::{Error, ReduceOp, Result};

fn make(
    store: &Arc<dyn Store>,
    rank: usize,
    world: usize,
    transport: &str,
) -> Result<Arc<dyn CollectiveBackend>> {
    options(transport, rank).create(context(store.clone(), rank, world))
}

fn asynchronous_calls_on_two_groups_may_come_in_different_orders() {
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    let transport = TRANSPORT.get();
    ranks(3, move |rank| {
        let group = |name: &str| {
            let store: Arc<dyn Store> = Arc::new(PrefixStore::new(name, store.clone()));
            let backend = make(&store, rank.rank, rank.world, transport).unwrap();
            Rank { backend, rank: rank.rank, world: rank.world }
        };
        let groups = [group("a"), group("b")];
        for _ in 0..50 {
            let tensors = [
                Tensor::ones([5], (Kind::Float, Device::Cpu)),
                Tensor::ones([70_000], (Kind::Float, Device::Cpu)),
            ];
            let order = if rank.rank == 1 { [1, 0] } else { [0, 1] };
            let pending = order.map(|g| {
                let outputs = segments(&[tensors[g].shallow_clone()]);
                groups[g].submit(Rank::call(Op::AllReduce(ReduceOp::Sum), Kind::Float, none(), outputs))
            });
            pending.into_iter().for_each(|p| assert!(p.wait().is_ok()));
            for tensor in tensors {
                assert_eq!(tensor, tensor.full_like(3));
            }
        }
        groups.iter().for_each(|g| g.shutdown().unwrap());
    });
}

fn groups_come_and_go_without_leaving_descriptors() {
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    let transport = TRANSPORT.get();
    let open = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let round = |n: usize| {
        let store: Arc<dyn Store> = Arc::new(PrefixStore::new(format!("round{n}"), store.clone()));
        ranks(2, move |rank| {
            let backend = make(&store, rank.rank, rank.world, transport).unwrap();
            let group = Rank { backend, rank: rank.rank, world: rank.world };
            group.barrier().unwrap();
            group.shutdown().unwrap();
            rank.shutdown().unwrap();
        });
    };
    round(0);
    let before = open();
    for n in 1..=40 {
        round(n);
    }
    // Other tests open and close theirs meanwhile, and the last words of a group may take a moment: a
    // leak would be of 4 at least for each of the 40 rounds.
    let limit = Instant::now() + Duration::from_secs(20);
    while open() > before + 100 {
        assert!(Instant::now() < limit, "{before} descriptors before, {} after", open());
        std::thread::sleep(Duration::from_millis(50));
    }
}

on_every_transport! {
    asynchronous_calls_on_two_groups_may_come_in_different_orders,
    groups_come_and_go_without_leaving_descriptors,
}

#[test]
fn a_rank_that_does_not_come_is_named_when_the_group_is_set_up() {
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    let mut context = context(store, 0, 3);
    context.timeout = Duration::from_millis(300);
    let error = Options::new().create(context).err().unwrap();
    assert!(matches!(&error, Error::Timeout { missing, .. } if *missing == [1, 2]), "{error}");
}

#[test]
fn ranks_that_force_different_transports_are_told() {
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    let other = store.clone();
    let rank = std::thread::spawn(move || make(&other, 1, 2, "tcp").err().unwrap().to_string());
    let errors = [make(&store, 0, 2, "unix").err().unwrap().to_string(), rank.join().unwrap()];
    for error in errors {
        assert!(error.contains("TCH_DISTRIBUTED_TRANSPORT"), "{error}");
    }
}

#[test]
fn ranks_that_call_or_wait_for_calls_learn_why_another_has_given_up() {
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    // Bound, so that nobody else has it, and not listened at: rank 1 calls it in vain, and rank 0 waits for its call.
    let closed = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    closed.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
    let port = closed.local_addr().unwrap().as_socket().unwrap().port();
    let (connecting, is_connecting) = std::sync::mpsc::channel();
    let ranks: Vec<_> = (0..2)
        .map(|rank| {
            let connecting = connecting.clone();
            let store = altered(store.clone(), move |key, value| match key {
                "native/address/0" => with_port(&value, port),
                "native/address/1" => {
                    connecting.send(()).unwrap();
                    value
                }
                _ => value,
            });
            std::thread::spawn(move || make(&store, rank, 2, "tcp").err().unwrap())
        })
        .collect();
    for _ in 0..2 {
        is_connecting.recv_timeout(Duration::from_secs(60)).unwrap();
    }
    let words = Error::Rendezvous { reason: "no descriptors are left".to_owned() };
    native::give_up(&*store, 7, &words);
    for error in ranks.into_iter().map(|rank| rank.join().unwrap()) {
        assert!(matches!(error, Error::Rendezvous { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains("rank 7 gave up") && text.contains("no descriptors"), "{text}");
    }
}

/// The address that rank 0 publishes, as soon as it has.
fn address_of_rank_0(store: &Arc<dyn Store>, transport: &str) -> Vec<u8> {
    let topic = if transport == "unix" { "local" } else { "address" };
    let key = format!("native/{topic}/0");
    store.wait(&[&key], Duration::from_secs(20)).unwrap();
    store.get(&key).unwrap()
}

/// Connects to it.
fn call_rank_0(bytes: &[u8], transport: &str) -> Box<dyn ReadWrite> {
    if transport == "unix" {
        // A tag and a length, then the name.
        let name = &bytes[2..];
        return Box::new(UnixStream::connect_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap());
    }
    let port = port_of(bytes);
    Box::new(TcpStream::connect(("127.0.0.1", port)).unwrap())
}

trait ReadWrite: Read + Write + Send {}
impl<T: Read + Write + Send> ReadWrite for T {}

#[test]
fn strangers_at_the_address_are_turned_away_and_do_no_harm() {
    for transport in ["tcp", "unix"] {
        let store: Arc<dyn Store> = Arc::new(HashStore::new());
        let first = {
            let store = store.clone();
            std::thread::spawn(move || make(&store, 0, 2, transport))
        };
        // Rank 1 says hello, so that rank 0 goes on to listen, but calls after the strangers.
        let (strangers_called, its_turn) = std::sync::mpsc::channel::<()>();
        let second = {
            let its_turn = parking_lot::Mutex::new(its_turn);
            let late = altered(store.clone(), move |key, value| {
                if !key.contains("hello") {
                    // That the test has let go of its end is the sign.
                    let _ = its_turn.lock().recv_timeout(Duration::from_secs(60));
                }
                value
            });
            std::thread::spawn(move || make(&late, 1, 2, transport))
        };
        let address = address_of_rank_0(&store, transport);
        let mut garbage = call_rank_0(&address, transport);
        let mut silent = call_rank_0(&address, transport);
        drop(call_rank_0(&address, transport));
        garbage
            .write_all(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n and much more than any hello is long")
            .unwrap();
        // It is closed on, by a reset or an end.
        assert!(matches!(garbage.read(&mut [0; 64]), Ok(0) | Err(_)));
        drop(strangers_called);
        let groups = [first, second].map(|rank| rank.join().unwrap().unwrap());
        let ranks: Vec<_> = groups
            .into_iter()
            .enumerate()
            .map(|(rank, backend)| {
                std::thread::spawn(move || {
                    let rank = Rank { backend, rank, world: 2 };
                    rank.barrier().unwrap();
                    rank.shutdown().unwrap();
                })
            })
            .collect();
        ranks.into_iter().for_each(|rank| rank.join().unwrap());
        // Who said nothing was kept no longer than the set-up.
        assert!(matches!(silent.read(&mut [0; 64]), Ok(0) | Err(_)));
    }
}
