//! Work.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};
use tch_distributed::{ProcessGroup, ReduceOp, Work};

use super::{is_libtorchs, list, numbers, read, room};

list! {
    1 a_work_can_be_awaited_by_any_executor;
    1 waiting_twice_gives_the_same;
    1 thousands_may_be_outstanding;
    1 a_work_that_is_dropped_completes_and_fills_strided_outputs;
    1 tensors_are_kept_alive_until_the_operation_is_done;
    1 blocking_and_asynchronous_calls_keep_their_order;
    1 a_work_may_be_moved_to_another_thread;
    2 works_may_be_waited_for_in_any_order;
    1 several_collectives_start_as_one;

    free order:
    2 waiting_for_a_time_does_not_end_the_operation;
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The smallest executor.
fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}

fn a_work_can_be_awaited_by_any_executor(group: &ProcessGroup) {
    let (a, b) = (numbers(&[1]), numbers(&[2]));
    let n = group.size() as i64;
    block_on(async {
        group.all_reduce_async(&a, ReduceOp::Sum)?.await?;
        group.all_reduce_async(&b, ReduceOp::Sum)?.await?;
        group.barrier_async()?.await
    })
    .unwrap();
    assert_eq!((read(&a), read(&b)), (vec![n], vec![2 * n]));
}

fn waiting_twice_gives_the_same(group: &ProcessGroup) {
    let work = group.barrier_async().unwrap();
    work.wait().unwrap();
    work.wait().unwrap();
    assert!(work.is_completed() && work.wait_timeout(Duration::ZERO).unwrap());
    assert_eq!(work.source_rank(), None);
}

fn waiting_for_a_time_does_not_end_the_operation(group: &ProcessGroup) {
    let t = numbers(&[1]);
    if group.rank() == 0 {
        let work = group.all_reduce_async(&t, ReduceOp::Sum).unwrap();
        assert!(!work.wait_timeout(Duration::from_millis(30)).unwrap(), "nobody else has come");
        assert!(!work.is_completed());
        group.send(&numbers(&[1]), 1, 0).unwrap();
        work.wait().unwrap();
    } else {
        if group.rank() == 1 {
            group.recv(&mut room(1), 0, 0).unwrap();
        }
        group.all_reduce_async(&t, ReduceOp::Sum).unwrap().wait().unwrap();
    }
    assert_eq!(read(&t), [group.size() as i64]);
}

fn thousands_may_be_outstanding(group: &ProcessGroup) {
    let count = if group.backend_name() == "plain" { 100 } else { 3000 };
    let tensors: Vec<Tensor> = (0..count).map(|i| numbers(&[i, 1])).collect();
    let works: Vec<Work> =
        tensors.iter().map(|t| group.all_reduce_async(t, ReduceOp::Sum).unwrap()).collect();
    works.iter().for_each(|w| w.wait().unwrap());
    let n = group.size() as i64;
    assert!(tensors.iter().enumerate().all(|(i, t)| read(t) == [n * i as i64, n]));
}

fn a_work_that_is_dropped_completes_and_fills_strided_outputs(group: &ProcessGroup) {
    let n = group.size() as i64;
    let grid = Tensor::ones([5, 2], (Kind::Int64, Device::Cpu));
    let column = grid.select(1, 0);
    drop(group.all_reduce_async(&column, ReduceOp::Sum).unwrap());
    drop(column);
    group.barrier().unwrap();
    let (expected, until) = ([n, 1].repeat(5), Instant::now() + Duration::from_secs(60));
    // Gloo's barrier does not wait for earlier calls.
    while group.backend_name() == "gloo" && read(&grid) != expected && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(read(&grid), expected);
}

fn tensors_are_kept_alive_until_the_operation_is_done(group: &ProcessGroup) {
    let mut works = Vec::new();
    for i in 0..50 {
        let input = Tensor::full([5000], i, (Kind::Int64, Device::Cpu));
        let output = room(5000 * group.size() as i64);
        works.push(group.all_gather_into_tensor_async(&output, &input).unwrap());
        // Both go out of scope here; what the allocator hands out next must not be written to.
    }
    let fresh: Vec<Tensor> = (0..50).map(|_| Tensor::full([5000], -1, (Kind::Int64, Device::Cpu))).collect();
    works.iter().for_each(|w| w.wait().unwrap());
    assert!(fresh.iter().all(|t| t.max().int64_value(&[]) == -1 && t.min().int64_value(&[]) == -1));
}

fn blocking_and_asynchronous_calls_keep_their_order(group: &ProcessGroup) {
    // Gloo's asynchronous calls end in any order; NCCL stands here under copies, made when a call is.
    if is_libtorchs(group) {
        return;
    }
    let n = group.size() as i64;
    let mut t = numbers(&[1]);
    let mut expected = 1i64;
    for turn in 0..40 {
        if turn % 3 == 0 {
            group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
        } else {
            // Two in flight on the same tensor: the second sees what the first left.
            let first = group.all_reduce_async(&t, ReduceOp::Sum).unwrap();
            expected = expected.wrapping_mul(n);
            group.all_reduce_async(&t, ReduceOp::Sum).unwrap().wait().unwrap();
            assert!(first.is_completed(), "they complete in order");
        }
        expected = expected.wrapping_mul(n);
    }
    assert_eq!(read(&t), [expected]);
}

fn a_work_may_be_moved_to_another_thread(group: &ProcessGroup) {
    let t = numbers(&[1]);
    let work = group.all_reduce_async(&t, ReduceOp::Sum).unwrap();
    std::thread::spawn(move || work.wait()).join().unwrap().unwrap();
    assert_eq!(read(&t), [group.size() as i64]);
}

fn works_may_be_waited_for_in_any_order(group: &ProcessGroup) {
    let tensors: Vec<Tensor> = (0..20).map(|i| numbers(&[i])).collect();
    let works: Vec<Work> = tensors.iter().map(|t| group.broadcast_async(t, 1).unwrap()).collect();
    works.iter().rev().for_each(|w| w.wait().unwrap());
    assert!(tensors.iter().enumerate().all(|(i, t)| read(t) == [i as i64]));
}

fn several_collectives_start_as_one(group: &ProcessGroup) {
    let n = group.size() as i64;
    let (a, b) = (numbers(&[1]), numbers(&[2, 3]).view([1, 2]).transpose(0, 1));
    let (small, gathered) = (numbers(&[group.rank() as i64]), room(n));
    let (whole, part) = (Tensor::arange(n, (Kind::Int64, Device::Cpu)), room(1));
    let mut batch = group.coalescing();
    batch.all_reduce(&a, ReduceOp::Sum).unwrap();
    batch.all_gather_into_tensor(&gathered, &small).unwrap();
    batch.all_reduce(&b, ReduceOp::Sum).unwrap();
    batch.reduce_scatter_tensor(&part, &whole, ReduceOp::Sum).unwrap();
    batch.launch().unwrap().wait().unwrap();
    assert_eq!((read(&a), read(&b)), (vec![n], vec![2 * n, 3 * n]));
    assert_eq!((read(&gathered), read(&part)), ((0..n).collect(), vec![n * group.rank() as i64]));
}
