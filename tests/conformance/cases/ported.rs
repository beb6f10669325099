//! What PyTorch's own tests assert and no other case here does; `PYTORCH.md` says which covers which.

use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tch_distributed::{Error, P2pOp, ProcessGroup, ReduceOp, Work};

use super::{list, numbers, read, room};

list! {
    1 every_rank_can_be_the_root;
    2 every_collective_works_within_a_subgroup;
    2 objects_work_within_a_subgroup;
    2 messages_within_a_subgroup_name_its_ranks;
    1 many_calls_of_different_sizes_in_flight_stay_apart;
    1 a_barrier_orders_itself_after_what_was_started_before;
    2 nobody_passes_a_barrier_before_everybody_has_come;
    1 collectives_run_under_no_grad_and_on_results_of_a_graph;
    2 monitored_barriers_work_within_a_subgroup;
    3 a_monitored_barrier_that_does_not_wait_for_all_names_the_first;
    2 a_batch_of_sends_alone_or_of_receives_alone_is_a_batch;
    2 a_barrier_that_one_rank_misses_times_out_with_its_name;
    1 complex_tensors_travel_and_add_up;
    1 a_tensor_list_may_be_strided_throughout;
    1 results_are_ready_when_a_work_has_been_waited_for;
}

/// All ranks but the first, where there are more than two; all where there are two.
fn others(group: &ProcessGroup) -> Vec<usize> {
    (usize::from(group.size() > 2)..group.size()).collect()
}

// distributed_test.py: test_broadcast, test_reduce_*, test_gather, test_scatter loop over all roots.
fn every_rank_can_be_the_root(group: &ProcessGroup) {
    let (me, n) = (group.rank(), group.size());
    for root in 0..n {
        let mut t = numbers(&[me as i64, 1]);
        group.broadcast(&mut t, root).unwrap();
        assert_eq!(read(&t), [root as i64, 1]);
        let mut t = numbers(&[2, me as i64]);
        group.reduce(&mut t, root, ReduceOp::Max).unwrap();
        assert_eq!(read(&t), [2, if me == root { n - 1 } else { me } as i64]);
        let mut outs: Vec<Tensor> = (0..n).map(|_| room(1)).collect();
        group.gather((me == root).then_some(&mut outs[..]), &numbers(&[me as i64 + 5]), root).unwrap();
        if me == root {
            assert_eq!(outs.iter().flat_map(read).collect::<Vec<_>>(), (5..5 + n as i64).collect::<Vec<_>>());
        }
        let parts: Vec<Tensor> = (0..n).map(|r| numbers(&[10 * root as i64 + r as i64])).collect();
        let mut mine = room(1);
        group.scatter(&mut mine, (me == root).then_some(&parts[..]), root).unwrap();
        assert_eq!(read(&mine), [(10 * root + me) as i64]);
    }
}

// distributed_test.py: the `_group` variant of every collective.
fn every_collective_works_within_a_subgroup(group: &ProcessGroup) {
    let Some(inner) = group.new_group(&others(group)).unwrap() else { return };
    let (me, n) = (inner.rank() as i64, inner.size() as i64);
    let sum = n * (n - 1) / 2;
    let mut t = numbers(&[me]);
    inner.all_reduce(&mut t, ReduceOp::Sum).unwrap();
    assert_eq!(read(&t), [sum]);
    let mut all = room(n);
    inner.all_gather_into_tensor(&mut all, &numbers(&[me])).unwrap();
    assert_eq!(read(&all), (0..n).collect::<Vec<_>>());
    let mut swapped = room(n);
    inner.all_to_all_single(&mut swapped, &(&all + 10 * me), None, None).unwrap();
    assert_eq!(read(&swapped), (0..n).map(|from| 10 * from + me).collect::<Vec<_>>());
    let mut part = room(1);
    inner.reduce_scatter_tensor(&mut part, &all, ReduceOp::Sum).unwrap();
    assert_eq!(read(&part), [n * me]);
    inner.barrier().unwrap();
}

// test_c10d_object_collectives.py: the subgroup variants.
fn objects_work_within_a_subgroup(group: &ProcessGroup) {
    let Some(inner) = group.new_group(&others(group)).unwrap() else { return };
    let (me, n) = (inner.rank(), inner.size());
    assert_eq!(inner.all_gather_object(&group.rank()).unwrap(), inner.ranks());
    assert_eq!(inner.broadcast_object((me == n - 1).then(|| "last".to_owned()), n - 1).unwrap(), "last");
    assert_eq!(inner.gather_object(&me, 0).unwrap(), (me == 0).then(|| (0..n).collect()));
    let list = (me == 0).then(|| (0..n).map(|r| vec![r; r]).collect());
    assert_eq!(inner.scatter_object(list, 0).unwrap(), vec![me; me]);
}

// test_c10d_object_collectives.py and distributed_test.py: send and receive with group ranks.
fn messages_within_a_subgroup_name_its_ranks(group: &ProcessGroup) {
    let Some(inner) = group.new_group(&others(group)).unwrap() else { return };
    if inner.size() < 2 {
        return;
    }
    inner.barrier().unwrap(); // NCCL's first operation is one for all ranks
    match inner.rank() {
        0 => inner.send(&numbers(&[group.rank() as i64]), 1, 0).unwrap(),
        1 => {
            let mut t = room(1);
            assert_eq!(inner.recv(&mut t, 0, 0).unwrap(), 0, "a rank of the group");
            assert_eq!(read(&t), [inner.ranks()[0] as i64]);
        }
        _ => {}
    }
}

// test_c10d_gloo.py: test_allreduce_stress, test_broadcast_stress, test_allgather_stress.
fn many_calls_of_different_sizes_in_flight_stay_apart(group: &ProcessGroup) {
    let (me, n) = (group.rank() as i64, group.size() as i64);
    let calls: Vec<(Tensor, Tensor, Work, Work)> = (0..60)
        .map(|i| {
            let sum = Tensor::full([1 + i * 37 % 500], me + i, (Kind::Int64, Device::Cpu));
            let sent = Tensor::full([1 + i * 53 % 300], me * 100 + i, (Kind::Int64, Device::Cpu));
            let works = (
                group.all_reduce_async(&sum, ReduceOp::Sum).unwrap(),
                group.broadcast_async(&sent, (i % n) as usize).unwrap(),
            );
            (sum, sent, works.0, works.1)
        })
        .collect();
    for (i, (sum, sent, first, second)) in (0..).zip(calls) {
        second.wait().unwrap();
        first.wait().unwrap();
        let expected = n * i + n * (n - 1) / 2;
        assert!(read(&sum).iter().all(|&x| x == expected));
        assert!(read(&sent).iter().all(|&x| x == i % n * 100 + i));
    }
}

// test_c10d_gloo.py: test_barrier_implies_wait.
fn a_barrier_orders_itself_after_what_was_started_before(group: &ProcessGroup) {
    let n = group.size() as i64;
    let tensors: Vec<Tensor> = (0..20).map(|i| Tensor::full([1000], i, (Kind::Int64, Device::Cpu))).collect();
    let works: Vec<Work> =
        tensors.iter().map(|t| group.all_reduce_async(t, ReduceOp::Sum).unwrap()).collect();
    group.barrier().unwrap();
    if group.backend_name() == "gloo" {
        works.iter().for_each(|w| w.wait().unwrap()); // its ends are reported one by one
    }
    for (i, (t, work)) in (0..).zip(tensors.iter().zip(&works)) {
        assert!(work.is_completed());
        assert_eq!(read(t), vec![n * i; 1000]);
    }
}

/// What a clock shows that all processes of a machine share and that nobody sets.
fn now() -> (i64, i64) {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (now.tv_sec, now.tv_nsec)
}

// distributed_test.py: test_barrier.
fn nobody_passes_a_barrier_before_everybody_has_come(group: &ProcessGroup) {
    let late = Duration::from_millis(60);
    for root in 0..group.size().min(3) {
        // The late one says when it came; nobody may have left before.
        if group.rank() == root {
            std::thread::sleep(late);
        }
        let came = now();
        group.barrier().unwrap();
        let left = now();
        let came = group.broadcast_object(Some(came), root).unwrap();
        assert!(left >= came, "left the barrier before rank {root} had come");
    }
}

// test_c10d_gloo.py: test_allgather_inference_mode; functional use within training loops.
fn collectives_run_under_no_grad_and_on_results_of_a_graph(group: &ProcessGroup) {
    let n = group.size() as f64;
    let weight = Tensor::ones([3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let result = &weight * 2.0;
    let mut all = Tensor::zeros([3 * group.size() as i64], (Kind::Float, Device::Cpu));
    tch::no_grad(|| group.all_gather_into_tensor(&mut all, &result)).unwrap();
    assert_eq!(all.sum(Kind::Float).double_value(&[]), 6.0 * n);
    let mut loss = result.sum(Kind::Float);
    group.all_reduce(&mut loss, ReduceOp::Sum).unwrap();
    assert_eq!(loss.double_value(&[]), 6.0 * n);
    loss.backward();
    assert_eq!(weight.grad().double_value(&[0]), 2.0, "the graph is what it was");
}

// distributed_test.py: test_monitored_barrier_gloo_subgroup.
fn monitored_barriers_work_within_a_subgroup(group: &ProcessGroup) {
    let Some(inner) = group.new_group(&others(group)).unwrap() else { return };
    inner.monitored_barrier(Duration::from_secs(20), false).unwrap();
    inner.monitored_barrier(Duration::from_secs(20), true).unwrap();
}

// distributed_test.py: test_monitored_barrier_failure_order.
fn a_monitored_barrier_that_does_not_wait_for_all_names_the_first(group: &ProcessGroup) {
    let all: Vec<usize> = (0..group.size()).collect();
    let own = group.new_group(&all).unwrap().unwrap();
    if group.rank() == 0 {
        let error = own.monitored_barrier(Duration::from_millis(150), false).unwrap_err();
        assert!(matches!(&error, Error::Timeout { missing, .. } if missing == &[1]), "{error:?}");
    }
    group.barrier().unwrap();
}

// distributed_test.py: test_batch_isend_irecv_*.
fn a_batch_of_sends_alone_or_of_receives_alone_is_a_batch(group: &ProcessGroup) {
    let n = group.size();
    if group.rank() == 0 {
        let ops = (1..n).map(|to| P2pOp::send(&numbers(&[to as i64]), to, 0)).collect();
        group.batch_isend_irecv(ops).unwrap().iter().for_each(|w| w.wait().unwrap());
    } else {
        let t = room(1);
        let works = group.batch_isend_irecv(vec![P2pOp::recv(&t, 0, 0)]).unwrap();
        assert_eq!(works.len(), 1);
        works[0].wait().unwrap();
        assert_eq!((read(&t), works[0].source_rank()), (vec![group.rank() as i64], Some(0)));
    }
}

// distributed_test.py: test_barrier_timeout_group.
fn a_barrier_that_one_rank_misses_times_out_with_its_name(group: &ProcessGroup) {
    if group.backend_name() == "plain" {
        return; // names the first it waited for
    }
    let all: Vec<usize> = (0..group.size()).collect();
    let own = group.new_group(&all).unwrap().unwrap().with_timeout(Duration::from_secs(3));
    let last = group.size() - 1;
    // Those who come, come together.
    group.barrier().unwrap();
    if group.rank() != last {
        match own.barrier().unwrap_err() {
            Error::Timeout { missing, .. } => assert_eq!(missing, [last]),
            Error::Poisoned { cause } => assert!(matches!(*cause, Error::Timeout { .. }), "{cause:?}"),
            other => panic!("{other:?}"),
        }
    }
    group.barrier().unwrap();
}

// distributed_test.py: test_all_reduce_complex, test_scatter_complex, test_all_gather_complex.
fn complex_tensors_travel_and_add_up(group: &ProcessGroup) {
    let n = group.size() as f64;
    let z = |re: f64, im: f64| Tensor::complex(&Tensor::from_slice(&[re]), &Tensor::from_slice(&[im]));
    let parts = |t: &Tensor| Vec::<f64>::try_from(t.view_as_real().view([-1])).unwrap();
    let mut sum = z(1.0, group.rank() as f64);
    group.all_reduce(&mut sum, ReduceOp::Sum).unwrap();
    assert_eq!(parts(&sum), [n, n * (n - 1.0) / 2.0]);
    let mut all: Vec<Tensor> = (0..group.size()).map(|_| z(0.0, 0.0)).collect();
    group.all_gather(&mut all, &z(0.5, group.rank() as f64)).unwrap();
    assert!(all.iter().enumerate().all(|(r, t)| parts(t) == [0.5, r as f64]));
}

// test_c10d_gloo.py: test_gather_noncontiguous_input, test_allgather_noncontiguous_input.
fn a_tensor_list_may_be_strided_throughout(group: &ProcessGroup) {
    let (me, n) = (group.rank() as i64, group.size() as i64);
    let grid = Tensor::zeros([4, n], (Kind::Int64, Device::Cpu));
    let mut columns: Vec<Tensor> = (0..n).map(|c| grid.select(1, c)).collect();
    let input = Tensor::full([2, 4], me, (Kind::Int64, Device::Cpu)).transpose(0, 1).select(1, 0);
    group.all_gather(&mut columns, &input).unwrap();
    assert_eq!(read(&grid), (0..n).collect::<Vec<_>>().repeat(4));
}

// test_c10d_common.py: results are visible after wait, from any thread.
fn results_are_ready_when_a_work_has_been_waited_for(group: &ProcessGroup) {
    let n = group.size() as i64;
    for size in [1, 10_000, 300_000] {
        let t = Tensor::ones([size], (Kind::Int64, Device::Cpu));
        let work = group.all_reduce_async(&t, ReduceOp::Sum).unwrap();
        work.wait().unwrap();
        assert_eq!(t.sum(Kind::Int64).int64_value(&[]), n * size);
    }
}
