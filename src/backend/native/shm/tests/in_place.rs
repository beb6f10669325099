//! Tensors that the engine allocated: others read them where they lie.

use super::*;
use crate::backend::native::shm::{Inner, pool, tensor};

/// The same values in memory that others can read.
fn lent(from: &Tensor) -> Tensor {
    let mut to = tensor(&from.size(), from.kind()).unwrap();
    to.copy_(from);
    to
}

fn lent_all(tensors: &[Tensor]) -> Vec<Tensor> {
    tensors.iter().map(lent).collect()
}

/// A list as the parts of one tensor in such memory, in order.
fn lent_together(tensors: &[Tensor]) -> Vec<Tensor> {
    if tensors.is_empty() {
        return Vec::new();
    }
    let sizes: Vec<i64> = tensors.iter().map(|t| t.numel() as i64).collect();
    lent(&Tensor::cat(tensors, 0)).split_with_sizes(&sizes, 0)
}

#[test]
fn every_collective_gives_what_the_model_gives_whoever_has_tensors_of_the_engine() {
    for ranks in [2, 3, 4] {
        let group = group(ranks, 4096);
        on_all(&group, |me, rank| {
            let mut seq = 0;
            // Who has such tensors: all, one, all but one.
            for having in [0b1111, 0b0001, 0b1110_usize] {
                for n in [0, 3, 2500, 30_000] {
                    for op in all_ops(ranks) {
                        for kind in [Kind::Int, Kind::BFloat16] {
                            if kind == Kind::BFloat16 && op.reduce_op().is_some() {
                                continue;
                            }
                            seq += 1;
                            let mut case = case(op, me, ranks, n, kind);
                            if having >> me & 1 == 1 {
                                case.inputs = lent_together(&case.inputs);
                                case.outputs = lent_all(&case.outputs);
                            }
                            let call = call(op, kind, &case.inputs, &case.outputs, seq as usize);
                            run(rank, call, seq, seq % 2 == me as u64 % 2).unwrap();
                            for (i, (got, want)) in case.outputs.iter().zip(&case.want).enumerate() {
                                assert!(
                                    got.equal(want),
                                    "{op} of {n}, rank {me} of {ranks}, {having:b}, output {i}"
                                );
                            }
                        }
                    }
                }
            }
        });
    }
}

/// How many slabs of others a rank has mapped.
fn mapped(inner: &Inner) -> usize {
    inner.atlas.lock().len()
}

#[test]
fn a_large_tensor_of_the_engine_is_lent_and_a_private_or_small_one_or_one_without_pages_of_its_own_is_not() {
    let group = group(2, 4096);
    on_all(&group, |me, rank| {
        let op = Op::AllReduce(ReduceOp::Sum);
        let sum = |seq, tensor: &Tensor| {
            run(rank, call(op, Kind::Float, &[], &[tensor.shallow_clone()], 0), seq, false).unwrap();
        };
        sum(1, &data(me, 0, 100_000, Kind::Float));
        sum(2, &lent(&data(me, 0, 100, Kind::Float)));
        assert_eq!(mapped(&rank.inner), 0);
        // Parts of one: where a part shares its pages with others, those who reduce do not write there.
        let whole = lent(&data(me, 0, 204_800, Kind::Float));
        let same = |start, len| {
            let both = |r| data(r, 0, 204_800, Kind::Float).narrow(0, start, len);
            whole.narrow(0, start, len).equal(&(both(0) + both(1)))
        };
        sum(3, &whole.narrow(0, 51_300, 51_100));
        assert_eq!(mapped(&rank.inner), 0);
        assert!(same(51_300, 51_100));
        sum(4, &whole.narrow(0, 102_400, 102_400));
        assert_eq!(mapped(&rank.inner), 1);
        assert!(same(102_400, 102_400) && same(51_300, 51_100));
        assert!(whole.narrow(0, 0, 51_300).equal(&data(me, 0, 51_300, Kind::Float)));
    });
}

#[test]
fn who_comes_late_to_a_reduction_writes_nothing_to_the_tensor_of_a_rank_that_gave_up() {
    let group = group(2, 4096);
    // In slabs of their own: from what is left of one that others share, other tests could lend nothing more.
    let n = 3 << 20;
    let lend = |me| lent(&data(me, 0, n, Kind::Float));
    let sum =
        |tensor: &Tensor| call(Op::AllReduce(ReduceOp::Sum), Kind::Float, &[], &[tensor.shallow_clone()], 0);
    // Rank 0 lends its tensor and gives up in vain; it keeps its values, and may be used for something else.
    let mut tensor = lend(0);
    let first = sum(&tensor);
    let stamp = Stamp { seq: 1, fingerprint: fingerprint(&first) };
    let error = group[0].run_inline(first, stamp, &Deadline::after(Duration::from_millis(30))).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    assert!(tensor.equal(&data(0, 0, n, Kind::Float)));
    let _ = tensor.fill_(7.0);
    // Rank 1 comes late, with a tensor of its own or of the engine: it reduces its share, and learns of it.
    let late = lend(1);
    let late = sum(&late);
    let stamp = Stamp { seq: 1, fingerprint: fingerprint(&late) };
    let error = group[1].run_inline(late, stamp, &Deadline::after(Duration::from_millis(500))).unwrap_err();
    assert!(matches!(error, Error::Aborted | Error::Timeout { .. }), "{error}");
    assert!(tensor.equal(&tensor.full_like(7.0)));
    assert_eq!(mapped(&group[1].inner), 1);
}

#[test]
fn what_a_rank_lent_before_it_gave_up_is_not_taken_for_a_result() {
    let group = group(2, 4096);
    let lend = |me| lent(&data(me, 0, 50_000, Kind::Float));
    let broadcast =
        |tensor: &Tensor| call(Op::Broadcast { src: 0 }, Kind::Float, &[], &[tensor.shallow_clone()], 0);
    // Rank 0 lends its tensor, waits in vain, and uses the tensor for something else.
    let mut tensor = lend(0);
    let first = broadcast(&tensor);
    let stamp = Stamp { seq: 1, fingerprint: fingerprint(&first) };
    let error = group[0].run_inline(first, stamp, &Deadline::after(Duration::from_millis(30))).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    let _ = tensor.fill_(7.0);
    // Rank 1 comes late: all that it needs is there, but it is not what was lent.
    let error = run(&group[1], broadcast(&lend(1)), 1, false).unwrap_err();
    assert!(matches!(error, Error::Aborted), "{error}");
}

#[test]
fn who_reads_nothing_of_a_lent_tensor_does_not_look_for_it() {
    let (group, kind) = (group(3, 4096), Kind::Float);
    // Large enough for slabs of their own, which go with them.
    let mine = |me| data(me, 0, 3 << 20, kind);
    let gather = |input: &Tensor, outputs: &[Tensor]| {
        call(Op::Gather { dst: 0 }, kind, std::slice::from_ref(input), outputs, 0)
    };
    // Rank 2 has begun the call and sleeps; its tensor needs nothing of it, so the others end.
    let last = gather(&lent(&mine(2)), &[]);
    let stamp = Stamp { seq: 1, fingerprint: fingerprint(&last) };
    let mut last = group[2].start(last, stamp).unwrap();
    assert_eq!(last.advance().unwrap(), Progress::Idle);
    on_all(&group[..2], |me, rank| match me {
        0 => {
            let all: Vec<Tensor> = (0..3).map(|_| blank(3 << 20, kind)).collect();
            run(rank, gather(&mine(0), &all), 1, false).unwrap();
            assert!(all.iter().zip(0..).all(|(got, r)| got.equal(&mine(r))));
        }
        _ => run(rank, gather(&lent(&mine(1)), &[]), 1, false).unwrap(),
    });
    // The tensor of rank 1 is gone.
    while last.advance().unwrap() != Progress::Done {}
}

#[test]
fn who_gives_up_and_takes_its_tensor_along_is_said_to_have_given_up() {
    let group = group(2, 4096);
    // In a slab of its own, which goes with it.
    let gone =
        call(Op::Broadcast { src: 0 }, Kind::Float, &[], &[lent(&data(0, 0, 3 << 20, Kind::Float))], 0);
    let stamp = Stamp { seq: 1, fingerprint: fingerprint(&gone) };
    let error = group[0].run_inline(gone, stamp, &Deadline::after(Duration::from_millis(30))).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    let late = call(Op::Broadcast { src: 0 }, Kind::Float, &[], &[blank(3 << 20, Kind::Float)], 0);
    let error = run(&group[1], late, 1, false).unwrap_err();
    assert!(matches!(error, Error::Aborted), "{error}");
}

#[test]
fn a_driven_call_that_is_given_up_takes_its_tensor_back() {
    let group = group(2, 4096);
    let tensor = lent(&data(0, 0, 50_000, Kind::Float));
    let call = call(Op::Broadcast { src: 0 }, Kind::Float, &[], &[tensor], 0);
    let stamp = Stamp { seq: 1, fingerprint: fingerprint(&call) };
    let mut run = group[0].start(call, stamp).unwrap();
    assert_eq!(run.advance().unwrap(), Progress::Idle);
    assert!(!group[1].inner.segment.withdrawn(0, 1));
    drop(run);
    assert!(group[1].inner.segment.withdrawn(0, 1));
}

#[test]
fn who_gives_up_a_call_takes_back_nothing_that_an_earlier_one_lent() {
    let group = group(2, 4096);
    let segment = &group[1].inner.segment;
    segment.withdraw(0, 7);
    assert!(!segment.withdrawn(0, 6));
    assert!(segment.withdrawn(0, 7) && segment.withdrawn(0, 8));
    // A later one that is given up as well changes nothing; an earlier one does.
    segment.withdraw(0, 9);
    assert!(segment.withdrawn(0, 7));
    segment.withdraw(0, 3);
    assert!(segment.withdrawn(0, 3) && !segment.withdrawn(0, 2));
}

#[test]
fn a_tensor_that_dies_gives_its_memory_back_though_others_have_mapped_it() {
    let group = group(2, 4096);
    // Large enough for slabs of their own.
    let data_of = |me| data(me, 0, 3 << 20, Kind::Float);
    on_all(&group, |me, rank| {
        let tensor = lent(&data_of(me));
        let op = Op::AllReduce(ReduceOp::Sum);
        run(rank, call(op, Kind::Float, &[], &[tensor.shallow_clone()], 0), 1, false).unwrap();
        let site = pool::find(tensor.data_ptr().cast(), 1).unwrap().site;
        let path = format!("/proc/self/fd/{}", site.descriptor);
        let memory = std::fs::File::open(path).unwrap();
        let taken = || rustix::fs::fstat(&memory).unwrap().st_blocks * 512;
        assert!(taken() >= 12 << 20);
        // A view keeps it.
        let view = tensor.narrow(0, 5, 2);
        drop(tensor);
        assert!(taken() >= 12 << 20);
        drop(view);
        assert!(taken() < 1 << 20, "{} bytes are left", taken());
    });
}

#[test]
fn a_size_that_no_memory_has_is_refused() {
    for size in [vec![i64::MAX, 2], vec![1 << 40, 1 << 40]] {
        let error = tensor(&size, Kind::Float).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { .. }), "{error}");
    }
    assert_eq!(tensor(&[0, 5], Kind::Float).unwrap().numel(), 0);
    assert_eq!(tensor(&[], Kind::Int64).unwrap().size(), Vec::<i64>::new());
}
