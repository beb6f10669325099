mod in_place;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::connect::{BUDGET, Budget, Reserved, connect};
use super::segment::{Layout, Segment};
use super::{Inner, SharedMemory};
use crate::backend::native::meet::Meeting;
use crate::backend::native::stamp::fingerprint;
use crate::backend::native::transport::{Deadline, Progress, Stamp, Transport};
use crate::backend::{BackendContext, Buffer, Call, Op};
use crate::store::HashStore;
use crate::{Error, ReduceOp, Result};

/// A rank of a group with a segment.
fn member(segment: Segment, rank: usize) -> SharedMemory {
    let numbers = (0..segment.layout.ranks).collect();
    let reserved = Arc::new(Budget::new(BUDGET)).reserve(0);
    SharedMemory { inner: Arc::new(Inner::new(segment, rank, numbers, None, reserved)) }
}

/// The ranks of a group, each with a mapping of its own.
fn group(ranks: usize, chunk: usize) -> Vec<SharedMemory> {
    let layout = Layout::new(ranks, chunk);
    let (_, descriptor) = Segment::create(layout).unwrap();
    (0..ranks)
        .map(|rank| {
            let segment = Segment::open(&descriptor, layout).unwrap();
            member(segment, rank)
        })
        .collect()
}

/// Runs every rank on a thread of its own.
fn on_all<T: Send>(ranks: &[SharedMemory], run: impl Fn(usize, &SharedMemory) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let run = &run;
        let threads: Vec<_> =
            ranks.iter().enumerate().map(|(r, rank)| scope.spawn(move || run(r, rank))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    })
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

/// A flat tensor as a list of buffers, cut in a way that depends on `salt`.
fn cut(tensor: &Tensor, salt: usize) -> smallvec::SmallVec<[Buffer<'static>; 1]> {
    let numel = tensor.numel() as i64;
    let first = if salt == 0 { numel } else { numel * (1 + salt as i64 % 3) / 5 };
    [(0, first), (first, numel - first)]
        .into_iter()
        .filter(|&(start, _)| start == 0 || start < numel)
        .map(|(start, n)| Buffer::new(tensor.narrow(0, start, n)).unwrap())
        .collect()
}

/// Element `i` of what rank `r` has for rank `to`.
fn value(r: usize, to: usize, i: usize) -> i64 {
    ((r * 7919 + to * 613 + i * 31) % 97) as i64
}

fn data(r: usize, to: usize, n: usize, kind: Kind) -> Tensor {
    let values: Vec<i64> = (0..n).map(|i| value(r, to, i)).collect();
    Tensor::from_slice(&values).to_kind(kind)
}

fn blank(n: usize, kind: Kind) -> Tensor {
    Tensor::full([n as i64], -1, (kind, Device::Cpu))
}

/// How many elements rank `r` has for rank `to` where sizes may differ.
fn uneven(n: usize, r: usize, to: usize) -> usize {
    n * (r + 2 * to) / 3
}

/// A call, and what its outputs must be.
struct Case {
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    want: Vec<Tensor>,
}

fn case(op: Op, me: usize, ranks: usize, n: usize, kind: Kind) -> Case {
    let all = 0..ranks;
    let sum = |to: usize, n: usize| {
        let sums: Vec<i64> = (0..n).map(|i| (0..ranks).map(|r| value(r, to, i)).sum()).collect();
        Tensor::from_slice(&sums).to_kind(kind)
    };
    let (inputs, outputs, want) = match op {
        Op::AllReduce(_) => (vec![], vec![data(me, 0, n, kind)], vec![sum(0, n)]),
        Op::Reduce { dst, .. } if dst == me => {
            (vec![data(me, 0, n, kind)], vec![blank(n, kind)], vec![sum(0, n)])
        }
        Op::Reduce { .. } => (vec![data(me, 0, n, kind)], vec![], vec![]),
        Op::ReduceScatter(_) => (
            all.map(|to| data(me, to, uneven(n, 0, to), kind)).collect(),
            vec![blank(uneven(n, 0, me), kind)],
            vec![sum(me, uneven(n, 0, me))],
        ),
        Op::Broadcast { src } => (vec![], vec![data(me, 0, n, kind)], vec![data(src, 0, n, kind)]),
        Op::AllGather => (
            vec![data(me, 0, uneven(n, me, 1), kind)],
            all.clone().map(|r| blank(uneven(n, r, 1), kind)).collect(),
            all.map(|r| data(r, 0, uneven(n, r, 1), kind)).collect(),
        ),
        Op::Gather { dst } if dst == me => (
            vec![data(me, 0, uneven(n, me, 1), kind)],
            all.clone().map(|r| blank(uneven(n, r, 1), kind)).collect(),
            all.map(|r| data(r, 0, uneven(n, r, 1), kind)).collect(),
        ),
        Op::Gather { .. } => (vec![data(me, 0, uneven(n, me, 1), kind)], vec![], vec![]),
        Op::Scatter { src } => (
            if src == me { all.map(|to| data(src, to, uneven(n, 0, to), kind)).collect() } else { vec![] },
            vec![blank(uneven(n, 0, me), kind)],
            vec![data(src, me, uneven(n, 0, me), kind)],
        ),
        Op::AllToAll => (
            all.clone().map(|to| data(me, to, uneven(n, me, to), kind)).collect(),
            all.clone().map(|r| blank(uneven(n, r, me), kind)).collect(),
            all.map(|r| data(r, me, uneven(n, r, me), kind)).collect(),
        ),
        Op::Barrier => (vec![], vec![], vec![]),
    };
    Case { inputs, outputs, want }
}

fn call(op: Op, kind: Kind, inputs: &[Tensor], outputs: &[Tensor], salt: usize) -> Call<'static> {
    Call {
        op,
        kind,
        inputs: inputs.iter().map(|t| cut(t, salt)).collect(),
        outputs: outputs.iter().map(|t| cut(t, salt + 1)).collect(),
        timeout: Duration::from_secs(20),
    }
}

/// Runs a call on its caller's thread, or as the progress engine does.
fn run(rank: &SharedMemory, call: Call<'static>, seq: u64, driven: bool) -> Result<()> {
    let stamp = Stamp { seq, fingerprint: fingerprint(&call) };
    if !driven {
        assert!(rank.run_inline(call, stamp, &Deadline::after(Duration::from_secs(20)))?.is_none());
        return Ok(());
    }
    let (mut run, limit) = (rank.start(call, stamp)?, Instant::now() + Duration::from_secs(60));
    loop {
        match run.advance()? {
            Progress::Done => return Ok(()),
            Progress::Moved => {}
            Progress::Idle => rank.park(soon()),
        }
        assert!(Instant::now() < limit, "call {seq} does not end");
    }
}

fn all_ops(ranks: usize) -> Vec<Op> {
    let last = ranks - 1;
    vec![
        Op::AllReduce(ReduceOp::Sum),
        Op::Reduce { op: ReduceOp::Sum, dst: last },
        Op::ReduceScatter(ReduceOp::Sum),
        Op::Broadcast { src: last },
        Op::AllGather,
        Op::Gather { dst: 0 },
        Op::Gather { dst: last },
        Op::Scatter { src: last },
        Op::AllToAll,
        Op::Barrier,
    ]
}

#[test]
fn every_collective_of_every_size_gives_what_the_model_gives() {
    for ranks in [1, 2, 3, 4] {
        for driven in [false, true] {
            let group = group(ranks, 4096);
            on_all(&group, |me, rank| {
                let mut seq = 0;
                for n in [0, 1, 3, 70, 2048, 2049, 30_000] {
                    for op in all_ops(ranks) {
                        for kind in [Kind::Int, Kind::Float, Kind::Uint8] {
                            if kind == Kind::Uint8 && op.reduce_op().is_some() {
                                continue;
                            }
                            seq += 1;
                            let case = case(op, me, ranks, n, kind);
                            let call = call(op, kind, &case.inputs, &case.outputs, seq as usize + me);
                            run(rank, call, seq, driven).unwrap();
                            for (i, (got, want)) in case.outputs.iter().zip(&case.want).enumerate() {
                                assert!(
                                    got.equal(want),
                                    "{op} of {n} {kind:?}, rank {me} of {ranks}, output {i}, driven {driven}"
                                );
                            }
                        }
                    }
                }
            });
        }
    }
}

#[test]
fn one_rank_may_wait_on_its_thread_while_another_is_driven() {
    let group = group(2, 4096);
    on_all(&group, |me, rank| {
        for seq in 1..200 {
            let tensor = data(me, 0, 5000, Kind::Int64);
            let op = Op::AllReduce(ReduceOp::Max);
            run(rank, call(op, Kind::Int64, &[], &[tensor.shallow_clone()], 0), seq, me == 0).unwrap();
            let want: Vec<i64> = (0..5000).map(|i| value(0, 0, i).max(value(1, 0, i))).collect();
            assert!(tensor.equal(&Tensor::from_slice(&want)));
        }
    });
}

#[test]
fn every_rank_brings_its_own_factor_and_averages_are_fused() {
    for (n, kind) in [(5, Kind::Float), (9000, Kind::Float), (9000, Kind::BFloat16)] {
        let group = group(3, 4096);
        on_all(&group, |me, rank| {
            let tensor = Tensor::full([n], 4.0, (kind, Device::Cpu));
            let op = Op::AllReduce(ReduceOp::PremulSum(0.5 * (me + 1) as f64));
            run(rank, call(op, kind, &[], &[tensor.shallow_clone()], 1), 1, false).unwrap();
            assert!(tensor.equal(&Tensor::full([n], 12.0, (kind, Device::Cpu))));
            let tensor = Tensor::full([n], me as f64, (kind, Device::Cpu));
            let op = Op::AllReduce(ReduceOp::Avg);
            run(rank, call(op, kind, &[], &[tensor.shallow_clone()], 1), 2, false).unwrap();
            assert!(tensor.equal(&Tensor::ones([n], (kind, Device::Cpu))));
        });
    }
}

#[test]
fn all_ranks_get_the_same_bits() {
    for n in [64, 50_000] {
        for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
            let group = group(4, 4096);
            let results = on_all(&group, |me, rank| {
                let mut bits = Vec::new();
                let values: Vec<f32> =
                    (0..n).map(|i| ((i * 31 + me * 17) % 1013) as f32 * 0.37 - 99.0).collect();
                let tensor = Tensor::from_slice(&values).to_kind(kind);
                let op = Op::AllReduce(ReduceOp::Avg);
                run(rank, call(op, kind, &[], &[tensor.shallow_clone()], me), 1, false).unwrap();
                bits.resize(n * kind.elt_size_in_bytes(), 0_u8);
                tensor.view_dtype(Kind::Uint8).copy_data_u8(&mut bits, n * kind.elt_size_in_bytes());
                bits
            });
            assert!(results.iter().all(|r| *r == results[0]), "{kind:?} {n}");
        }
    }
}

#[test]
fn ranks_that_call_different_things_all_learn_of_it() {
    let group = group(2, 4096);
    let errors = on_all(&group, |me, rank| {
        let tensor = data(me, 0, 4 + me, Kind::Float);
        let call = call(Op::AllReduce(ReduceOp::Sum), Kind::Float, &[], &[tensor], 0);
        run(rank, call, 1, false).unwrap_err()
    });
    for (me, error) in errors.iter().enumerate() {
        let Error::Desync { rank, theirs, ours, .. } = error else { panic!("{error}") };
        assert_eq!(*rank, 1 - me);
        assert!(theirs.contains(&format!("{} Float", 5 - me)), "{theirs}");
        assert!(ours.contains(&format!("{} Float", 4 + me)), "{ours}");
    }
}

#[test]
fn a_message_of_another_size_than_expected_is_told_not_taken() {
    let group = group(2, 4096);
    let results = on_all(&group, |me, rank| {
        let inputs = [data(me, 0, 3, Kind::Float), data(me, 1, 3, Kind::Float)];
        // Rank 1 expects four elements from rank 0, which has three for it.
        let outputs = [blank(if me == 1 { 4 } else { 3 }, Kind::Float), blank(3, Kind::Float)];
        let result = run(rank, call(Op::AllToAll, Kind::Float, &inputs, &outputs, 0), 1, false);
        assert!(me == 0 || outputs[0].equal(&blank(4, Kind::Float)));
        result
    });
    let Err(Error::Desync { rank: 0, theirs, ours, .. }) = &results[1] else { panic!("{results:?}") };
    assert!(theirs.contains("12 bytes") && ours.contains("16 bytes"), "{theirs} {ours}");
}

#[test]
fn a_rank_that_does_not_come_is_missed_by_name() {
    let group = group(3, 4096);
    let both = std::sync::Barrier::new(2);
    let results = on_all(&group[..2], |me, rank| {
        let call = call(Op::Barrier, Kind::Float, &[], &[], 0);
        let stamp = Stamp { seq: 9, fingerprint: fingerprint(&call) };
        assert!(me < 2);
        both.wait();
        rank.run_inline(call, stamp, &Deadline::after(Duration::from_secs(1))).unwrap_err()
    });
    for error in results {
        let Error::Timeout { seq: 9, missing, .. } = &error else { panic!("{error}") };
        assert_eq!(*missing, [2]);
    }
}

#[test]
fn failing_ends_a_wait_that_sleeps() {
    let group = group(2, 4096);
    thread::scope(|scope| {
        let waiting = scope.spawn(|| run(&group[0], call(Op::Barrier, Kind::Float, &[], &[], 0), 1, false));
        thread::sleep(Duration::from_millis(30));
        group[0].fail();
        let start = Instant::now();
        assert!(matches!(waiting.join().unwrap(), Err(Error::Aborted)));
        assert!(start.elapsed() < Duration::from_secs(10));
    });
}

#[test]
fn parking_ends_by_an_interrupt_even_one_that_came_before() {
    let group = group(2, 4096);
    let before = Instant::now();
    group[0].interrupt();
    group[0].park(soon());
    thread::scope(|scope| {
        scope.spawn(|| group[0].park(soon()));
        thread::sleep(Duration::from_millis(20));
        group[0].interrupt();
    });
    assert!(before.elapsed() < Duration::from_secs(10));
    // And by time.
    group[0].park(Instant::now() + Duration::from_millis(5));
}

#[test]
fn an_unsupported_reduction_is_refused_and_takes_no_number() {
    let group = group(2, 4096);
    on_all(&group, |me, rank| {
        if me == 0 {
            let tensor = data(0, 0, 2, Kind::Float);
            let call = call(Op::AllReduce(ReduceOp::BitAnd), Kind::Float, &[], &[tensor], 0);
            assert!(matches!(run(rank, call, 1, false), Err(Error::Unsupported { .. })));
        }
        run(rank, call(Op::Barrier, Kind::Float, &[], &[], 0), 1, false).unwrap();
    });
}

fn contexts(ranks: usize) -> Vec<BackendContext> {
    let store = Arc::new(HashStore::new());
    (0..ranks)
        .map(|rank| BackendContext {
            store: store.clone(),
            rank,
            size: ranks,
            ranks: (0..ranks).collect(),
            timeout: Duration::from_secs(20),
            group_name: "test".to_owned(),
        })
        .collect()
}

/// The bytes of memory that a descriptor's pages take.
fn taken(memory: impl std::os::fd::AsFd) -> usize {
    rustix::fs::fstat(memory).unwrap().st_blocks as usize * 512
}

#[test]
fn a_group_takes_pages_when_it_first_moves_a_large_tensor_and_never_more_than_its_slots() {
    let layout = Layout::new(2, 256 << 10);
    let (_, descriptor) = Segment::create(layout).unwrap();
    let group: Vec<_> = (0..2)
        .map(|rank| {
            let segment = Segment::open(&descriptor, layout).unwrap();
            member(segment, rank)
        })
        .collect();
    let sum = |seq, n| {
        on_all(&group, |me, rank| {
            let tensor = data(me, 0, n, Kind::Float);
            run(rank, call(Op::AllReduce(ReduceOp::Sum), Kind::Float, &[], &[tensor], 0), seq, false)
                .unwrap();
        });
    };
    assert_eq!(taken(&descriptor), 0);
    sum(1, 1000);
    // Flags, headers and small payloads.
    assert!(taken(&descriptor) <= 64 << 10, "{}", taken(&descriptor));
    sum(2, 4 << 20);
    let slots = 2 * Layout::staging(2, 256 << 10);
    assert!((1 << 20..=(64 << 10) + slots).contains(&taken(&descriptor)), "{}", taken(&descriptor));
}

#[test]
fn the_slots_of_all_groups_of_a_process_take_at_most_32_mib() {
    for ranks in [2, 4, 16, 64] {
        // Not this process's own: other tests need theirs.
        let budget = Arc::new(Budget::new(BUDGET));
        let mut held = Vec::new();
        for _ in 0..50 {
            match budget.affordable(ranks, None) {
                // Another transport has to do.
                0 => break,
                chunk => held.push(budget.reserve(Layout::staging(ranks, chunk))),
            }
        }
        assert!(held.len() >= 10, "{} groups of {ranks}", held.len());
        let all: usize = held.iter().map(Reserved::bytes).sum();
        assert!(all <= BUDGET && BUDGET == 32 << 20, "{all} bytes for {} groups of {ranks}", held.len());
    }
}

#[test]
fn ranks_that_meet_in_a_store_share_memory() {
    let contexts = contexts(3);
    let ranks: Vec<_> = thread::scope(|scope| {
        let threads: Vec<_> = contexts
            .iter()
            .map(|c| scope.spawn(|| connect(c, &Meeting::new(c), (0..3).collect(), None).unwrap()))
            .collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    on_all(&ranks, |me, rank| {
        let tensor = data(me, 0, 1000, Kind::Float);
        let op = Op::Broadcast { src: 2 };
        run(rank, call(op, Kind::Float, &[], &[tensor.shallow_clone()], 0), 1, false).unwrap();
        assert!(tensor.equal(&data(2, 0, 1000, Kind::Float)));
    });
}

#[test]
fn if_one_rank_cannot_map_the_memory_all_ranks_are_told_why() {
    let contexts = contexts(3);
    // Somebody else's descriptor where the leader's should be: rank 0 is played by this thread.
    let played = Meeting::new(&contexts[0]);
    let segment = format!("{} 0 4096 1", std::process::id());
    contexts[0].store.set("shm/segment", segment.as_bytes()).unwrap();
    thread::scope(|scope| {
        let connect = |c| scope.spawn(move || connect(c, &Meeting::new(c), (0..3).collect(), None));
        let threads: Vec<_> = contexts[1..].iter().map(connect).collect();
        played.exchange("shm/offer", &(4096_usize, None::<String>)).unwrap();
        played.exchange("shm/refusal", &None::<String>).unwrap();
        for thread in threads {
            let Err(error) = thread.join().unwrap() else { panic!("mapped something") };
            assert!(matches!(error, Error::BackendUnavailable { .. }));
            assert!(error.to_string().contains("cannot share memory: rank"), "{error}");
        }
    });
}

#[test]
fn a_message_of_more_chunks_than_the_count_has_room_for_takes_another_way() {
    let chunk = 4096;
    let bulk = group(2, chunk).remove(0).bulk();
    // 22 bits, from 0.
    let most = chunk * ((1 << 22) - 1);
    assert!(bulk.carries(most) && !bulk.carries(most + 1));
}
