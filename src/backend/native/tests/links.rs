//! Links that are slow, or silent: between two ranks stands a relay.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::{Rank, altered, context, none, options, ranks_with, segments};
use crate::backend::{Call, Direction, Op};
use crate::store::{HashStore, Store};
use crate::{Error, ReduceOp};

/// Tags (2), the address (4), and the port, seven bits a byte.
const PORT: usize = 6;

/// The port in an internet address that a rank has published.
pub(super) fn port_of(address: &[u8]) -> u16 {
    address[PORT..].iter().enumerate().fold(0, |port, (n, byte)| port | u16::from(byte & 0x7f) << (7 * n))
}

pub(super) fn with_port(address: &[u8], port: u16) -> Vec<u8> {
    let mut address = address[..PORT].to_vec();
    address.extend([port as u8 | 0x80, (port >> 7) as u8 | 0x80, (port >> 14) as u8]);
    address
}

/// What two ranks share besides their link.
struct Between {
    /// The link takes bytes and passes none on.
    silent: AtomicBool,
    /// Where both ranks meet without it.
    both: Barrier,
}

/// Passes bytes on, a page every two milliseconds; none while it is silent.
fn pump(mut from: TcpStream, mut to: TcpStream, silent: &AtomicBool) {
    let mut page = [0; 4096];
    while let Ok(n) = from.read(&mut page)
        && n > 0
    {
        std::thread::sleep(Duration::from_millis(2));
        if !silent.load(Ordering::SeqCst) && to.write_all(&page[..n]).is_err() {
            break;
        }
    }
    // The other side may have gone first.
    let _ = to.shutdown(Shutdown::Write);
}

/// A relay to a port of this host for the two connections of a pair of ranks; where it listens.
fn relay(to: u16, between: Arc<Between>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    std::thread::spawn(move || {
        for caller in listener.incoming().take(2) {
            let caller = caller.unwrap();
            let called = TcpStream::connect(("127.0.0.1", to)).unwrap();
            for (from, to) in [
                (caller.try_clone().unwrap(), called.try_clone().unwrap()),
                (called.try_clone().unwrap(), caller.try_clone().unwrap()),
            ] {
                let between = between.clone();
                std::thread::spawn(move || pump(from, to, &between.silent));
            }
        }
    });
    port
}

/// Two ranks with such a relay between them.
fn pair<T: Send + 'static>(body: fn(Rank, &Between) -> T) -> Vec<T> {
    let between = Arc::new(Between { silent: AtomicBool::new(false), both: Barrier::new(2) });
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    let detour = {
        let between = between.clone();
        move |key: &str, value: Vec<u8>| match key {
            "native/address/0" => with_port(&value, relay(port_of(&value), between.clone())),
            _ => value,
        }
    };
    let stores: [Arc<dyn Store>; 2] = [store.clone(), altered(store, detour)];
    let ranks: Vec<_> = stores
        .into_iter()
        .enumerate()
        .map(|(rank, store)| {
            let between = between.clone();
            std::thread::spawn(move || {
                let backend = options("tcp", rank).create(context(store, rank, 2)).unwrap();
                body(Rank { backend, rank, world: 2 }, &between)
            })
        })
        .collect();
    ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
}

#[test]
fn a_slow_link_is_slow_and_nothing_else() {
    pair(|rank, _| {
        let other = 1 - rank.rank;
        let tensor = Tensor::ones([50_000], (Kind::Float, Device::Cpu));
        let message = Tensor::zeros([20_000], (Kind::Float, Device::Cpu));
        let pending = match rank.rank {
            0 => rank.transfer(Direction::Send { dst: other }, 0, &message.full_like(7)),
            _ => rank.transfer(Direction::Recv { src: Some(other) }, 0, &message),
        };
        for _ in 0..3 {
            rank.all_reduce(&tensor, ReduceOp::Sum).unwrap();
        }
        pending.wait().unwrap();
        assert_eq!(tensor, tensor.full_like(8));
        assert!(rank.rank == 0 || message == message.full_like(7));
        rank.shutdown().unwrap();
    });
}

#[test]
fn a_link_that_goes_silent_is_a_timeout_that_names_the_rank_behind_it() {
    let begin = Instant::now();
    let errors = pair(|rank, between| {
        rank.barrier().unwrap();
        between.both.wait();
        between.silent.store(true, Ordering::SeqCst);
        between.both.wait();
        let call = Call {
            op: Op::Barrier,
            kind: Kind::Float,
            inputs: none(),
            outputs: segments(&[]),
            timeout: Duration::from_secs(1),
        };
        let error = rank.backend.run(call).unwrap_err();
        // Who goes first would be lost to the other.
        between.both.wait();
        (1 - rank.rank, error)
    });
    for (other, error) in errors {
        assert!(matches!(&error, Error::Timeout { missing, .. } if *missing == [other]), "{error}");
    }
    assert!(begin.elapsed() < Duration::from_secs(20));
}

/// Runs `call` on two ranks over TCP, of which rank 1 comes much later than a link may be without an answer.
fn with_a_late_rank(call: fn(&Rank)) {
    const CUT: Duration = Duration::from_millis(500);
    let connected = |_| {
        let mut options = options("tcp", 0);
        options.cut = Some(CUT);
        options
    };
    ranks_with(2, connected, move |rank| {
        rank.barrier().unwrap();
        if rank.rank == 1 {
            std::thread::sleep(CUT * 4);
        }
        call(&rank);
        rank.barrier().unwrap();
        rank.shutdown().unwrap();
    });
}

#[test]
fn a_rank_that_comes_to_a_large_reduction_later_than_a_link_may_be_silent_is_waited_for() {
    with_a_late_rank(|rank| {
        // More than the buffers of both kernels hold.
        let tensor = Tensor::full([16 << 20], 1 + rank.rank as i64, (Kind::Float, Device::Cpu));
        rank.all_reduce(&tensor, ReduceOp::Sum).unwrap();
        assert_eq!(tensor, tensor.full_like(3));
    });
}

#[test]
fn a_rank_that_comes_later_than_a_link_may_be_silent_gets_what_was_broadcast() {
    with_a_late_rank(|rank| {
        let tensor = Tensor::full([256 << 10], 7 * (1 - rank.rank as i64), (Kind::Float, Device::Cpu));
        let outputs = segments(&[tensor.shallow_clone()]);
        rank.run(Op::Broadcast { src: 0 }, Kind::Float, none(), outputs).unwrap();
        assert_eq!(tensor, tensor.full_like(7));
    });
}
