//! Gloo among ranks that are threads, over one store.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::{Duration, Instant};

use smallvec::{SmallVec, smallvec};
use tch::{Device, Kind, Tensor};

use super::create_gloo;
use crate::backend::{
    BackendContext, Buffer, Call, CollectiveBackend, Completion, Direction, Op, Receipt, Segments, Transfer,
};
use crate::store::around::{Altered, Around};
use crate::store::{HashStore, Store};
use crate::{Error, ReduceOp, Result};

const SECONDS: Duration = Duration::from_secs(20);

fn gloo<S: Store>(store: &Arc<S>, rank: usize, size: usize, timeout: Duration) -> Arc<dyn CollectiveBackend> {
    let context = BackendContext {
        store: store.clone(),
        rank,
        size,
        ranks: (0..size).collect(),
        timeout,
        group_name: "0".into(),
    };
    create_gloo(context).unwrap()
}

/// Runs the body on every rank of a new group, once all are connected; results in rank order.
fn ranks<T: Send>(size: usize, body: impl Fn(usize, Arc<dyn CollectiveBackend>) -> T + Sync) -> Vec<T> {
    let (store, up) = (Arc::new(HashStore::new()), AtomicUsize::new(0));
    thread::scope(|scope| {
        let (store, up, body) = (&store, &up, &body);
        let run = |rank| {
            move || {
                let gloo = gloo(store, rank, size, SECONDS);
                up.fetch_add(1, Ordering::SeqCst);
                wait_for(up, size);
                body(rank, gloo)
            }
        };
        let threads: Vec<_> = (0..size).map(|rank| scope.spawn(run(rank))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Waits until so many ranks have come as far as this counts.
fn wait_for(there: &AtomicUsize, count: usize) {
    let until = Instant::now() + SECONDS * 3;
    while there.load(Ordering::SeqCst) < count {
        assert!(Instant::now() < until, "another rank does not come as far");
        thread::sleep(Duration::from_millis(5));
    }
}

fn segments(tensors: &[&Tensor]) -> Segments<'static> {
    tensors.iter().map(|t| smallvec![Buffer::new(t.shallow_clone()).unwrap()]).collect()
}

fn call(op: Op, kind: Kind, inputs: &[&Tensor], outputs: &[&Tensor]) -> Call<'static> {
    Call { op, kind, inputs: segments(inputs), outputs: segments(outputs), timeout: SECONDS }
}

fn f32s(values: &[f32]) -> Tensor {
    Tensor::from_slice(values)
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(tensor.to_kind(Kind::Double).view([-1])).unwrap()
}

#[test]
fn collectives_give_what_their_names_say() {
    ranks(3, |rank, gloo| {
        let r = rank as f32;
        let t = f32s(&[r, 10.0 * r]);
        gloo.run(call(Op::AllReduce(ReduceOp::Sum), Kind::Float, &[], &[&t])).unwrap();
        assert_eq!(values(&t), [3.0, 30.0]);
        let t = f32s(&[r, 1.0]);
        gloo.run(call(Op::AllReduce(ReduceOp::Avg), Kind::Float, &[], &[&t])).unwrap();
        assert_eq!(values(&t), [1.0, 1.0]);
        let t = f32s(&[r]);
        gloo.run(call(Op::AllReduce(ReduceOp::PremulSum(2.0)), Kind::Float, &[], &[&t])).unwrap();
        assert_eq!(values(&t), [6.0]);

        let t = f32s(&[r, r]);
        gloo.run(call(Op::Broadcast { src: 2 }, Kind::Float, &[], &[&t])).unwrap();
        assert_eq!(values(&t), [2.0, 2.0]);

        let (input, out) = (f32s(&[r + 1.0]), f32s(&[-1.0]));
        let outputs: &[&Tensor] = if rank == 1 { &[&out] } else { &[] };
        let reduce = Op::Reduce { op: ReduceOp::Product, dst: 1 };
        gloo.run(call(reduce, Kind::Float, &[&input], outputs)).unwrap();
        assert_eq!(values(&input), [f64::from(r) + 1.0], "inputs stay");
        assert_eq!(values(&out), [if rank == 1 { 6.0 } else { -1.0 }]);

        let outs = [(); 3].map(|()| f32s(&[0.0, 0.0]));
        gloo.run(call(Op::AllGather, Kind::Float, &[&f32s(&[r, -r])], &outs.each_ref())).unwrap();
        assert_eq!(outs.map(|o| values(&o)).concat(), [0., 0., 1., -1., 2., -2.]);

        let output = f32s(&[0.0]);
        let inputs = [f32s(&[r]), f32s(&[10.0 + r]), f32s(&[20.0 + r])];
        let all = inputs.each_ref();
        gloo.run(call(
            Op::Scatter { src: 1 },
            Kind::Float,
            if rank == 1 { &all[..] } else { &[] },
            &[&output],
        ))
        .unwrap();
        assert_eq!(values(&output), [10.0 * f64::from(r) + 1.0]);

        gloo.run(call(Op::ReduceScatter(ReduceOp::Max), Kind::Float, &inputs.each_ref(), &[&output]))
            .unwrap();
        assert_eq!(values(&output), [10.0 * f64::from(r) + 2.0]);

        let outs = [(); 3].map(|()| f32s(&[0.0]));
        gloo.run(call(Op::AllToAll, Kind::Float, &inputs.each_ref(), &outs.each_ref())).unwrap();
        let base = 10.0 * f64::from(r);
        assert_eq!(outs.map(|o| values(&o)).concat(), [base, base + 1.0, base + 2.0]);

        gloo.run(call(Op::Barrier, Kind::Uint8, &[], &[])).unwrap();
        gloo.shutdown(SECONDS).unwrap();
    });
}

#[test]
fn sizes_may_differ_by_rank_and_be_zero() {
    ranks(3, |rank, gloo| {
        let input = f32s(&vec![rank as f32; rank * 2]);
        let outs: Vec<Tensor> = (0..3).map(|r| f32s(&vec![-1.0; r * 2])).collect();
        let all: Vec<&Tensor> = outs.iter().collect();
        gloo.run(call(Op::AllGather, Kind::Float, &[&input], &all)).unwrap();
        for (r, out) in outs.iter().enumerate() {
            assert_eq!(values(out), vec![r as f64; r * 2]);
        }
        for dst in 0..3 {
            let outs: Vec<Tensor> = (0..3).map(|r| f32s(&vec![-1.0; r * 2])).collect();
            let all: Vec<&Tensor> = if rank == dst { outs.iter().collect() } else { vec![] };
            gloo.run(call(Op::Gather { dst }, Kind::Float, &[&input], &all)).unwrap();
            for (r, out) in outs.iter().enumerate() {
                assert_eq!(values(out), vec![if rank == dst { r as f64 } else { -1.0 }; r * 2], "to {dst}");
            }
        }
        let inputs: Vec<Tensor> = (0..3).map(|to| f32s(&vec![(10 * rank + to) as f32; to])).collect();
        let outs: Vec<Tensor> = (0..3).map(|_| f32s(&vec![-1.0; rank])).collect();
        let (ins, all): (Vec<_>, Vec<_>) = (inputs.iter().collect(), outs.iter().collect());
        gloo.run(call(Op::AllToAll, Kind::Float, &ins, &all)).unwrap();
        for (from, out) in outs.iter().enumerate() {
            assert_eq!(values(out), vec![(10 * from + rank) as f64; rank]);
        }
        let output = f32s(&vec![0.0; rank]);
        gloo.run(call(Op::ReduceScatter(ReduceOp::Sum), Kind::Float, &ins, &[&output])).unwrap();
        assert_eq!(values(&output), vec![(30 + 3 * rank) as f64; rank]);
        let empty = f32s(&[]);
        gloo.run(call(Op::AllReduce(ReduceOp::Sum), Kind::Float, &[], &[&empty])).unwrap();
        gloo.run(call(Op::Broadcast { src: 0 }, Kind::Float, &[], &[&empty])).unwrap();
        gloo.run(call(Op::AllGather, Kind::Float, &[&empty], &[&empty, &empty, &empty])).unwrap();
    });
}

#[test]
fn lists_of_buffers_are_their_concatenation() {
    ranks(2, |rank, gloo| {
        let parts = [f32s(&[1.0]), f32s(&[2.0, 3.0]), f32s(&[])];
        let mut list: SmallVec<[Buffer<'static>; 1]> = SmallVec::new();
        list.extend(parts.iter().map(|t| Buffer::new(t.shallow_clone()).unwrap()));
        // The other rank cuts the same elements otherwise.
        let whole = f32s(&[10.0, 20.0, 30.0]);
        let mut call = call(Op::AllReduce(ReduceOp::Sum), Kind::Float, &[], &[&whole]);
        if rank == 0 {
            call.outputs = smallvec![list];
        }
        gloo.run(call).unwrap();
        let all = if rank == 0 { Tensor::cat(&parts, 0) } else { whole };
        assert_eq!(values(&all), [11.0, 22.0, 33.0]);
    });
}

#[test]
fn every_kind_is_moved_and_what_can_be_is_reduced() {
    use Kind::*;
    ranks(2, |rank, gloo| {
        for kind in
            [Uint8, Int8, Int16, Int, Int64, Half, Float, Double, ComplexFloat, ComplexDouble, Bool, BFloat16]
        {
            let t = Tensor::from_slice(&[rank as i64, 1]).to_kind(kind);
            gloo.run(call(Op::Broadcast { src: 1 }, kind, &[], &[&t])).unwrap();
            assert_eq!(t, Tensor::from_slice(&[1i64, 1]).to_kind(kind), "{kind:?}");
            let sum = Op::AllReduce(ReduceOp::Sum);
            let t = Tensor::from_slice(&[rank as i64, 1]).to_kind(kind);
            gloo.run(call(sum, kind, &[], &[&t])).unwrap();
            assert_eq!(t, Tensor::from_slice(&[1i64, 2]).to_kind(kind), "{kind:?}");
        }
        let t = Tensor::from_slice(&[-3i64 - 2 * rank as i64]);
        gloo.run(call(Op::AllReduce(ReduceOp::Avg), Int64, &[], &[&t])).unwrap();
        assert_eq!(values(&t), [-4.0]);
        for (op, kind) in [(ReduceOp::BitAnd, Float), (ReduceOp::Max, ComplexFloat), (ReduceOp::Avg, Bool)] {
            assert!(gloo.supports(&Op::AllReduce(op), kind).is_err());
        }
    });
}

#[test]
fn an_average_of_halves_does_not_overflow_and_is_as_exact_as_before() {
    for size in [1, 3, 4] {
        ranks(size, |rank, gloo| {
            for kind in [Kind::Half, Kind::ComplexHalf] {
                let mean = (size as f64 + 1.0) / 2.0;
                let own = [60000.0, -65504.0, rank as f64 + 1.0, 0.25 * (rank as f64 + 1.0)];
                let expected =
                    [60000.0, -65504.0, mean, 0.25 * mean].map(|v| f32s(&[v as f32]).to_kind(Kind::Half));
                // Complex numbers as pairs of halves.
                let halves = Tensor::from_slice(&own).to_kind(Kind::Half);
                let like = || if kind == Kind::Half { halves.copy() } else { halves.view_dtype(kind).copy() };
                let found = |t: &Tensor| values(&t.view_dtype(Kind::Half));
                let expected: Vec<f64> = expected.iter().flat_map(values).collect();
                let t = like();
                gloo.run(call(Op::AllReduce(ReduceOp::Avg), kind, &[], &[&t])).unwrap();
                assert_eq!(found(&t), expected, "{size} ranks");
                let (t, out) = (like(), like());
                let reduce = Op::Reduce { op: ReduceOp::Avg, dst: 0 };
                let outputs: &[&Tensor] = if rank == 0 { &[&out] } else { &[] };
                gloo.run(call(reduce, kind, &[&t], outputs)).unwrap();
                assert_eq!(found(&t), values(&halves), "the input is not written to");
                if rank == 0 {
                    assert_eq!(found(&out), expected);
                }
                let inputs: Vec<Tensor> = (0..size).map(|_| like()).collect();
                let inputs: Vec<&Tensor> = inputs.iter().collect();
                gloo.run(call(Op::ReduceScatter(ReduceOp::Avg), kind, &inputs, &[&out])).unwrap();
                assert_eq!(found(&out), expected);
                assert_eq!(found(inputs[0]), values(&halves), "the input is not written to");
            }
        });
    }
}

#[test]
fn a_scatter_may_be_uneven_among_ranks_of_this_crate() {
    ranks(3, |rank, gloo| {
        for src in 0..3 {
            let inputs: Vec<Tensor> = (0..3).map(|to| f32s(&vec![(10 * src + to) as f32; 2 * to])).collect();
            let ins: Vec<&Tensor> = if rank == src { inputs.iter().collect() } else { vec![] };
            let output = f32s(&vec![-1.0; 2 * rank]);
            gloo.run(call(Op::Scatter { src }, Kind::Float, &ins, &[&output])).unwrap();
            assert_eq!(values(&output), vec![(10 * src + rank) as f64; 2 * rank], "from {src}");
        }
        gloo.shutdown(SECONDS).unwrap();
    });
}

#[test]
fn ranks_that_call_different_things_find_out_long_before_the_timeout() {
    let start = Instant::now();
    let errors = ranks(3, |rank, gloo| {
        let op = if rank == 2 { Op::Broadcast { src: 0 } } else { Op::AllReduce(ReduceOp::Sum) };
        gloo.run(call(op, Kind::Float, &[], &[&f32s(&[1.0])])).unwrap_err()
    });
    assert!(start.elapsed() < SECONDS * 3 / 4, "{:?}", start.elapsed());
    for (rank, error) in errors.iter().enumerate() {
        let odd = if rank == 2 { 0 } else { 2 };
        assert!(
            matches!(error, Error::Desync { rank, seq: 1, .. } if *rank == odd),
            "rank {rank}: {error:?}"
        );
    }
}

#[test]
fn factors_that_differ_by_rank_are_no_disagreement_however_late_a_rank_is() {
    ranks(3, |rank, gloo| {
        if rank == 2 {
            // Long enough for the others to ask one another what they are in.
            thread::sleep(Duration::from_millis(2500));
        }
        let t = f32s(&[1.0]);
        let own = ReduceOp::PremulSum(0.5 * (rank as f64 + 1.0));
        gloo.run(call(Op::AllReduce(own), Kind::Float, &[], &[&t])).unwrap();
        assert_eq!(values(&t), [0.5 + 1.0 + 1.5]);
    });
}

fn transfer(
    direction: Direction,
    tag: u32,
    tensor: &Tensor,
) -> (Transfer, std::sync::mpsc::Receiver<Result<Receipt>>) {
    let (tx, rx) = channel();
    let done = Completion::from_fn(move |result| tx.send(result).unwrap());
    let buffer = Buffer::new(tensor.shallow_clone()).unwrap();
    (Transfer { direction, tag, kind: Kind::Float, buffer, timeout: SECONDS, done }, rx)
}

#[test]
fn messages_go_by_tag_from_anybody_and_to_oneself() {
    ranks(3, |rank, gloo| {
        let got = [(); 3].map(|()| f32s(&[-1.0]));
        let own = f32s(&[-1.0]);
        let mut batch = Vec::new();
        let mut ends = Vec::new();
        let mut add = |(transfer, end)| {
            batch.push(transfer);
            ends.push(end);
        };
        // Tags against the order of sending; the receives come first.
        let from = (rank + 2) % 3;
        add(transfer(Direction::Recv { src: Some(from) }, 2, &got[1]));
        add(transfer(Direction::Recv { src: None }, 1, &got[0]));
        add(transfer(Direction::Recv { src: Some(rank) }, 7, &own));
        add(transfer(Direction::Send { dst: (rank + 1) % 3 }, 1, &f32s(&[rank as f32])));
        add(transfer(Direction::Send { dst: (rank + 1) % 3 }, 2, &f32s(&[10.0 + rank as f32])));
        add(transfer(Direction::Send { dst: rank }, 7, &f32s(&[70.0])));
        gloo.transfer(batch);
        let ends: Vec<_> = ends.into_iter().map(|end| end.recv_timeout(SECONDS).unwrap().unwrap()).collect();
        assert_eq!(
            ends[..3].iter().map(|r| r.source).collect::<Vec<_>>(),
            [Some(from), Some(from), Some(rank)]
        );
        assert_eq!(values(&got[0]), [from as f64]);
        assert_eq!(values(&got[1]), [10.0 + from as f64]);
        assert_eq!(values(&own), [70.0]);
        gloo.run(call(Op::Barrier, Kind::Uint8, &[], &[])).unwrap();
    });
}

#[test]
fn a_message_of_no_elements_is_received_from_anybody_and_from_a_named_rank() {
    ranks(2, |rank, gloo| {
        let none = f32s(&[]);
        if rank == 1 {
            for tag in [4, 5] {
                let (sends, end) = transfer(Direction::Send { dst: 0 }, tag, &none);
                gloo.transfer(vec![sends]);
                end.recv_timeout(SECONDS).unwrap().unwrap();
            }
        } else {
            for (tag, src) in [(4, None), (5, Some(1))] {
                let (asks, end) = transfer(Direction::Recv { src }, tag, &none);
                gloo.transfer(vec![asks]);
                assert_eq!(end.recv_timeout(SECONDS).unwrap().unwrap().source, Some(1));
            }
        }
        gloo.run(call(Op::Barrier, Kind::Uint8, &[], &[])).unwrap();
    });
}

#[test]
fn a_message_to_oneself_is_refused_while_anybody_may_send_one_with_its_tag() {
    ranks(2, |rank, gloo| {
        let got = f32s(&[-1.0]);
        let (asks, end) = transfer(Direction::Recv { src: None }, 3, &got);
        gloo.transfer(vec![asks]);
        let (own, refused) = transfer(Direction::Send { dst: rank }, 3, &f32s(&[7.0]));
        gloo.transfer(vec![own]);
        let error = refused.recv_timeout(SECONDS).unwrap().unwrap_err();
        assert!(matches!(&error, Error::Unsupported { what, .. } if what.contains("oneself")), "{error:?}");
        // Not before both were refused: what a rank sends may end the other's receive.
        gloo.run(call(Op::Barrier, Kind::Uint8, &[], &[])).unwrap();
        // The receive goes on.
        let (send, sent) = transfer(Direction::Send { dst: 1 - rank }, 3, &f32s(&[rank as f32]));
        gloo.transfer(vec![send]);
        sent.recv_timeout(SECONDS).unwrap().unwrap();
        assert_eq!(end.recv_timeout(SECONDS).unwrap().unwrap().source, Some(1 - rank));
        assert_eq!(values(&got), [(1 - rank) as f64]);
        gloo.run(call(Op::Barrier, Kind::Uint8, &[], &[])).unwrap();
    });
    ranks(1, |_, gloo| {
        let got = f32s(&[-1.0]);
        let (asks, end) = transfer(Direction::Recv { src: None }, 3, &got);
        let (own, sent) = transfer(Direction::Send { dst: 0 }, 3, &f32s(&[7.0]));
        gloo.transfer(vec![asks, own]);
        sent.recv_timeout(SECONDS).unwrap().unwrap();
        assert_eq!(end.recv_timeout(SECONDS).unwrap().unwrap().source, Some(0));
        assert_eq!(values(&got), [7.0]);
    });
}

#[test]
fn a_message_to_oneself_that_nobody_receives_times_out() {
    ranks(2, |rank, gloo| {
        let (mut own, end) = transfer(Direction::Send { dst: rank }, 3, &f32s(&[7.0]));
        own.timeout = Duration::from_millis(100);
        gloo.transfer(vec![own]);
        let error = end.recv_timeout(SECONDS).unwrap().unwrap_err();
        assert!(matches!(&error, Error::Timeout { op, .. } if op.contains("oneself")), "{error:?}");
    });
}

#[test]
fn a_rank_that_does_not_come_is_named_and_the_group_is_unusable_after() {
    let ended = AtomicUsize::new(0);
    let errors = ranks(3, |rank, gloo| {
        if rank == 1 {
            wait_for(&ended, 2);
            return None;
        }
        let mut late = call(Op::AllReduce(ReduceOp::Sum), Kind::Float, &[], &[&f32s(&[1.0])]);
        late.timeout = Duration::from_millis(1500);
        let error = gloo.run(late).unwrap_err();
        let after = gloo.run(call(Op::Barrier, Kind::Uint8, &[], &[])).unwrap_err();
        assert!(matches!(after, Error::Poisoned { .. }), "{after}");
        ended.fetch_add(1, Ordering::SeqCst);
        Some(error)
    });
    for error in errors.into_iter().flatten() {
        assert!(matches!(&error, Error::Timeout { missing, .. } if missing[..] == [1]), "{error:?}");
    }
}

/// A store whose host is unreachable from some moment on: nothing is answered, as over a cut line.
#[derive(Default)]
struct Unreachable {
    store: HashStore,
    gone: AtomicBool,
}

impl Around for Unreachable {
    fn below(&self) -> &dyn Store {
        while self.gone.load(Ordering::Relaxed) {
            thread::sleep(Duration::from_millis(20));
        }
        &self.store
    }
}

#[test]
fn a_timeout_is_told_and_the_group_closed_though_the_store_answers_nothing() {
    let store = Arc::new(Altered::<Unreachable>::default());
    let both = Barrier::new(2);
    let error = thread::scope(|scope| {
        let (store, both) = (&store, &both);
        let other = scope.spawn(move || {
            let gloo = gloo(store, 1, 2, SECONDS);
            both.wait();
            both.wait();
            drop(gloo);
        });
        let gloo = gloo(store, 0, 2, SECONDS);
        both.wait();
        store.0.gone.store(true, Ordering::Relaxed);
        let (tx, rx) = channel();
        let done = Completion::from_fn(move |result| drop(tx.send(result)));
        let mut late = call(Op::AllReduce(ReduceOp::Sum), Kind::Float, &[], &[&f32s(&[1.0])]);
        late.timeout = Duration::from_millis(1500);
        gloo.submit(late, done);
        let error = rx.recv_timeout(SECONDS * 2);
        let closed = gloo.shutdown(Duration::from_millis(300));
        store.0.gone.store(false, Ordering::Relaxed);
        both.wait();
        other.join().unwrap();
        closed.unwrap();
        error
    });
    let error = error.expect("it ends").unwrap_err();
    assert!(matches!(&error, Error::Timeout { missing, .. } if missing.is_empty()), "{error:?}");
}

#[test]
fn a_rank_that_leaves_is_named() {
    let errors = ranks(3, |rank, gloo| {
        if rank == 2 {
            return None;
        }
        Some(gloo.run(call(Op::AllReduce(ReduceOp::Sum), Kind::Float, &[], &[&f32s(&[1.0])])).unwrap_err())
    });
    for error in errors.into_iter().flatten() {
        assert!(matches!(&error, Error::PeerLost { rank: 2, .. }), "{error:?}");
    }
}

#[test]
fn an_abort_ends_what_is_pending_on_every_rank() {
    let ended = AtomicUsize::new(0);
    let errors = ranks(3, |rank, gloo| {
        if rank == 0 {
            thread::sleep(Duration::from_millis(200));
            gloo.abort(&Arc::new(Error::Aborted));
            let error = gloo.run(call(Op::Barrier, Kind::Uint8, &[], &[])).unwrap_err();
            assert!(matches!(error, Error::Poisoned { .. }), "{error}");
            // What others wait for from this rank must be answered while it is still here.
            wait_for(&ended, 2);
            return None;
        }
        let all_reduce = call(Op::AllReduce(ReduceOp::Sum), Kind::Float, &[], &[&f32s(&[1.0])]);
        let error = gloo.run(all_reduce).unwrap_err();
        ended.fetch_add(1, Ordering::SeqCst);
        Some(error)
    });
    for error in errors.into_iter().flatten() {
        assert!(matches!(error, Error::Aborted), "{error:?}");
    }
}

#[test]
fn an_abort_ends_receives_from_any_rank_on_every_rank() {
    let errors = ranks(3, |rank, gloo| {
        let (asks, end) = transfer(Direction::Recv { src: None }, 3, &f32s(&[-1.0]));
        gloo.transfer(vec![asks]);
        if rank == 0 {
            gloo.abort(&Arc::new(Error::Aborted));
        }
        // Half of what the receive itself may take.
        let error = end.recv_timeout(SECONDS / 2).expect("it ends before its own timeout").unwrap_err();
        let (asks, after) = transfer(Direction::Recv { src: None }, 3, &f32s(&[-1.0]));
        gloo.transfer(vec![asks]);
        let after = after.recv_timeout(SECONDS / 2).expect("what comes later ends too").unwrap_err();
        assert!(matches!(after, Error::Poisoned { .. }), "rank {rank}: {after:?}");
        error
    });
    for error in errors {
        assert!(matches!(error, Error::Aborted), "{error:?}");
    }
}

#[test]
fn an_abort_ends_what_waits_for_a_rank_that_works_on() {
    for message in [false, true] {
        let over = AtomicUsize::new(0);
        let ends = ranks(3, |rank, gloo| match rank {
            0 => {
                let end = if message {
                    let (mut asks, end) = transfer(Direction::Recv { src: Some(1) }, 3, &f32s(&[-1.0]));
                    asks.timeout = SECONDS * 100;
                    gloo.transfer(vec![asks]);
                    end.recv_timeout(SECONDS * 2)
                } else {
                    let broadcast = Op::Broadcast { src: 1 };
                    let mut call = call(broadcast, Kind::Float, &[], &[&f32s(&[-1.0])]);
                    call.timeout = SECONDS * 100;
                    let (ended, end) = channel();
                    gloo.submit(call, Completion::from_fn(move |result| drop(ended.send(result))));
                    end.recv_timeout(SECONDS * 2)
                };
                over.fetch_add(1, Ordering::SeqCst);
                Some(end)
            }
            // It calls nothing, and so hears of nothing.
            1 => {
                wait_for(&over, 1);
                None
            }
            _ => {
                gloo.abort(&Arc::new(Error::Aborted));
                wait_for(&over, 1);
                None
            }
        });
        let end = ends.into_iter().flatten().next().unwrap().expect("it ends long before its timeout");
        assert!(matches!(end, Err(Error::Aborted)), "message: {message}, {end:?}");
    }
}

/// A store to which a rank cannot say that it leaves in good order: to the others it looks like one that crashed.
struct Speechless(Arc<HashStore>);

impl Around for Speechless {
    fn below(&self) -> &dyn Store {
        &*self.0
    }
    fn lets_through(&self, key: &str) -> bool {
        !key.starts_with("tchd/left/")
    }
}

#[test]
fn a_receive_from_any_rank_ends_with_the_name_of_a_rank_that_goes_without_a_word() {
    let store = Arc::new(HashStore::new());
    let error = thread::scope(|scope| {
        let store = &store;
        let crashes =
            scope.spawn(move || drop(gloo(&Arc::new(Altered(Speechless(store.clone()))), 2, 3, SECONDS)));
        let (over, idle) = channel::<()>();
        let idles = scope.spawn(move || {
            let gloo = gloo(store, 1, 3, SECONDS);
            // It calls nothing, and so hears of nothing.
            let _ = idle.recv();
            drop(gloo);
        });
        let gloo = gloo(store, 0, 3, SECONDS);
        let (mut asks, end) = transfer(Direction::Recv { src: None }, 3, &f32s(&[-1.0]));
        asks.timeout = SECONDS * 10;
        gloo.transfer(vec![asks]);
        let error = end.recv_timeout(SECONDS * 5).expect("it ends long before its timeout").unwrap_err();
        drop((over, gloo));
        crashes.join().unwrap();
        idles.join().unwrap();
        error
    });
    assert!(matches!(&error, Error::PeerLost { rank: 2, .. }), "{error:?}");
}

#[test]
fn a_rank_that_leaves_in_good_order_does_not_end_a_receive_from_any_other() {
    ranks(3, |rank, gloo| match rank {
        0 => {
            let t = f32s(&[-1.0]);
            let (mut asks, end) = transfer(Direction::Recv { src: None }, 3, &t);
            asks.timeout = SECONDS * 10;
            gloo.transfer(vec![asks]);
            assert_eq!(end.recv_timeout(SECONDS * 5).unwrap().unwrap().source, Some(1));
            assert_eq!(values(&t), [7.0]);
        }
        1 => {
            // Long enough for the receive to be watched, and for rank 2 to have gone.
            thread::sleep(Duration::from_millis(2500));
            let (sends, end) = transfer(Direction::Send { dst: 0 }, 3, &f32s(&[7.0]));
            gloo.transfer(vec![sends]);
            end.recv_timeout(SECONDS * 5).unwrap().unwrap();
        }
        _ => gloo.shutdown(SECONDS).unwrap(),
    });
}

#[test]
fn calls_are_asynchronous_and_end_in_any_order() {
    ranks(2, |rank, gloo| {
        let tensors: Vec<Tensor> = (0..20).map(|i| f32s(&[(i + rank) as f32])).collect();
        let (tx, rx) = channel();
        for tensor in &tensors {
            let tx = tx.clone();
            let done = Completion::from_fn(move |result| tx.send(result).unwrap());
            gloo.submit(call(Op::AllReduce(ReduceOp::Sum), Kind::Float, &[], &[tensor]), done);
        }
        for _ in &tensors {
            rx.recv_timeout(SECONDS).unwrap().unwrap();
        }
        for (i, tensor) in tensors.iter().enumerate() {
            assert_eq!(values(tensor), [2.0 * i as f64 + 1.0]);
        }
    });
}

#[test]
fn a_group_of_one_works() {
    ranks(1, |_, gloo| {
        let t = f32s(&[5.0]);
        gloo.run(call(Op::AllReduce(ReduceOp::Avg), Kind::Float, &[], &[&t])).unwrap();
        let out = f32s(&[0.0]);
        gloo.run(call(Op::AllGather, Kind::Float, &[&t], &[&out])).unwrap();
        gloo.run(call(Op::ReduceScatter(ReduceOp::Sum), Kind::Float, &[&t], &[&out])).unwrap();
        gloo.run(call(Op::AllToAll, Kind::Float, &[&t], &[&out])).unwrap();
        assert_eq!(values(&out), [5.0]);
        gloo.run(call(Op::Barrier, Kind::Uint8, &[], &[])).unwrap();
        assert!(gloo.accepts(Device::Cpu) && !gloo.accepts(Device::Cuda(0)));
    });
}
