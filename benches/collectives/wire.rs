//! The raw rate of the loopback: what a socket engine on one host cannot beat.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use super::member;
use super::report::median;

/// How many bytes one system call moves.
const CHUNK: usize = 1 << 20;
/// How many bytes go each way, over all tries.
const BUDGET: usize = 64 << 20;

/// Microseconds in which two threads, each on a core of its own, send each other so many bytes at the same time over
/// one connection, or with `one_way` the first to the second only; `None` where there is no loopback.
pub(crate) fn micros(bytes: usize, one_way: bool) -> Option<f64> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).ok()?;
    let caller = TcpStream::connect(listener.local_addr().ok()?).ok()?;
    let (called, _) = listener.accept().ok()?;
    for socket in [&caller, &called] {
        socket.set_nodelay(true).and_then(|()| socket.set_nonblocking(true)).ok()?;
    }
    let tries = (BUDGET / bytes.max(1)).clamp(3, 200);
    let barrier = Barrier::new(2);
    let run = |me: usize, mut socket: TcpStream| {
        member::pin_to(me, 2);
        let (source, mut sink) = (vec![1_u8; bytes.min(CHUNK)], vec![0_u8; bytes.min(CHUNK)]);
        let mut times = Vec::with_capacity(tries);
        for _ in 0..tries {
            barrier.wait();
            let start = Instant::now();
            let (mut sent, mut received) = match (one_way, me) {
                (false, _) => (0, 0),
                (true, 0) => (0, bytes),
                (true, _) => (bytes, 0),
            };
            while sent < bytes || received < bytes {
                if sent < bytes {
                    sent += moved(socket.write(&source[..source.len().min(bytes - sent)]));
                }
                if received < bytes {
                    let wanted = sink.len().min(bytes - received);
                    received += moved(socket.read(&mut sink[..wanted]));
                }
            }
            times.push(start.elapsed().as_secs_f64() * 1e6);
        }
        median(&times)
    };
    let run = &run;
    thread::scope(|scope| {
        let threads = [scope.spawn(move || run(0, caller)), scope.spawn(move || run(1, called))];
        threads.into_iter().map(|t| t.join().ok()).try_fold(0.0, |most: f64, t| Some(most.max(t?)))
    })
}

fn moved(result: std::io::Result<usize>) -> usize {
    match result {
        Ok(n) => n,
        Err(error) if error.kind() == ErrorKind::WouldBlock => 0,
        Err(error) => panic!("the loopback failed: {error}"),
    }
}
