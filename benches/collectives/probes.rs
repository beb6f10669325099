//! What this machine allows at this moment: the time no engine can beat.
//!
//! Floor of a collective on S bytes, n ranks on c cores, with tensors that are shared already:
//! max(L, r · pull / Bx, dram / B2). L is the time in which n threads tell each other one number; r = n / c
//! the ranks a core (at least 1); pull what a rank has to fetch from others; Bx the rate at which a core
//! copies what another has just written, at that size; dram what has to go through memory where it does not
//! fit twice into the last cache; B2 the rate of two threads that copy memory.

use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use super::cases::{Case, Collective};
use super::report::percentile;

pub(crate) struct Probes {
    world: usize,
    cores: usize,
    last_cache: usize,
    /// Bytes a microsecond: it hardly changes, and takes long to measure.
    memory: f64,
}

/// The largest buffer that a probe copies.
const MOST: usize = 64 << 20;

impl Probes {
    pub(crate) fn new(world: usize) -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let memory = (0..3).map(|_| copy_rate(MOST, false)).fold(0.0, f64::max);
        // A copy reads and writes.
        Self { world, cores, last_cache: last_cache(), memory: 2.0 * 2.0 * memory }
    }

    /// Microseconds.
    pub(crate) fn floor(&self, case: &Case) -> f64 {
        let latency = exchange_micros(self.world);
        if case.bytes == 0 {
            return latency;
        }
        let (n, s) = (self.world as f64, case.bytes as f64);
        let ranks_a_core = (n / self.cores as f64).max(1.0);
        let pull = match case.collective {
            Collective::Broadcast | Collective::SendRecv => s,
            _ => s * (n - 1.0) / n,
        };
        let dram = match case.collective {
            Collective::AllReduce | Collective::AllToAll | Collective::Reduce => 2.0 * n * s,
            Collective::AllGather | Collective::ReduceScatter => (n + 1.0) * s,
            Collective::Broadcast => n * s,
            _ => 2.0 * s,
        };
        let across = copy_rate(case.bytes.min(MOST), true);
        let memory = if dram > 2.0 * self.last_cache as f64 { dram / self.memory } else { 0.0 };
        latency.max(ranks_a_core * pull / across).max(memory)
    }
}

/// The size of the last cache, or what is usual.
fn last_cache() -> usize {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index3/size").unwrap_or_default();
    let kilobytes = text.trim().trim_end_matches('K').parse::<usize>();
    kilobytes.map_or(32 << 20, |k| k << 10)
}

#[repr(align(128))]
struct Flag(AtomicU64);

/// How long it takes `world` threads to tell each other a number.
fn exchange_micros(world: usize) -> f64 {
    const ROUNDS: u64 = 100;
    const BATCHES: u64 = 20;
    let flags: Vec<Flag> = (0..world).map(|_| Flag(AtomicU64::new(0))).collect();
    let cores = thread::available_parallelism().map_or(1, usize::from);
    let flags = &flags;
    let patience = if world > cores { 50 } else { 5000 };
    let run = |me: usize| {
        let mut times = Vec::new();
        for batch in 0..BATCHES {
            let start = Instant::now();
            for round in batch * ROUNDS + 1..=(batch + 1) * ROUNDS {
                flags[me].0.store(round, Ordering::Release);
                for other in flags {
                    let mut tries = 0;
                    while other.0.load(Ordering::Acquire) < round {
                        tries += 1;
                        if tries % patience == 0 { thread::yield_now() } else { std::hint::spin_loop() }
                    }
                }
            }
            times.push(start.elapsed().as_secs_f64() * 1e6 / ROUNDS as f64);
        }
        // Others use this machine as well: what it can do shows when they do not.
        percentile(&times, 0.2)
    };
    let run = &run;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..world).map(|me| scope.spawn(move || run(me))).collect();
        threads.into_iter().filter_map(|t| t.join().ok()).fold(0.0, f64::max)
    })
}

/// Bytes a microsecond of each of two threads that copy at the same time: what the other has just written
/// (`across`), or its own.
fn copy_rate(bytes: usize, across: bool) -> f64 {
    let bytes = bytes.max(64);
    let rounds = ((4 << 20) / bytes).clamp(3, 200);
    let flags = [Flag(AtomicU64::new(0)), Flag(AtomicU64::new(0))];
    let buffers = [Shared::new(bytes), Shared::new(bytes)];
    let meet = |me: usize, round: u64| {
        flags[me].0.store(round, Ordering::Release);
        let mut tries = 0;
        while flags[1 - me].0.load(Ordering::Acquire) < round {
            tries += 1;
            if tries % 5000 == 0 { thread::yield_now() } else { std::hint::spin_loop() }
        }
    };
    let run = |me: usize| {
        let mut private = vec![1_u8; bytes];
        let mut times = Vec::with_capacity(rounds);
        for round in 0..rounds as u64 {
            if across {
                buffers[me].write(round as u8);
            }
            meet(me, 2 * round + 1);
            let start = Instant::now();
            buffers[if across { 1 - me } else { me }].read(&mut private);
            times.push(start.elapsed().as_secs_f64() * 1e6);
            meet(me, 2 * round + 2);
        }
        std::hint::black_box(&private);
        bytes as f64 / percentile(&times, 0.2).max(1e-3)
    };
    thread::scope(|scope| {
        let threads = [scope.spawn(|| run(0)), scope.spawn(|| run(1))];
        let rates: Vec<f64> = threads.into_iter().filter_map(|t| t.join().ok()).collect();
        rates.iter().sum::<f64>() / rates.len().max(1) as f64
    })
}

/// A buffer that one thread writes and another reads, in turns.
struct Shared(std::cell::UnsafeCell<Vec<u8>>);

// SAFETY: the flags order every read after the write it sees, and the next write after the read.
unsafe impl Sync for Shared {}

impl Shared {
    fn new(bytes: usize) -> Self {
        Self(vec![0; bytes].into())
    }

    fn write(&self, value: u8) {
        // SAFETY: the other thread waits.
        unsafe { &mut *self.0.get() }.fill(value);
    }

    fn read(&self, into: &mut [u8]) {
        // SAFETY: the writer waits.
        into.copy_from_slice(unsafe { &*self.0.get() });
    }
}
