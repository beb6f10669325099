//! Ranks that fail: the others learn, and name the rank that failed first.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::{Rank, none, ranks, segments};
use crate::backend::{Call, Completion, Direction, Op};
use crate::{Error, ReduceOp};

fn tensor(len: i64) -> Tensor {
    Tensor::ones([len], (Kind::Float, Device::Cpu))
}

/// Waits until the others have given up.
fn comes_too_late(rank: &Rank) {
    while rank.backend.failure().is_none() {
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn a_rank_that_never_comes_is_named_by_the_timeout_of_all_others() {
    let both = std::sync::Barrier::new(2);
    let errors = ranks(3, move |rank| {
        if rank.rank == 2 {
            comes_too_late(&rank);
            return rank.barrier().unwrap_err();
        }
        both.wait();
        let call = Call {
            op: Op::AllReduce(ReduceOp::Sum),
            kind: Kind::Float,
            inputs: none(),
            outputs: segments(&[tensor(100)]),
            timeout: Duration::from_millis(1500),
        };
        rank.backend.run(call).unwrap_err()
    });
    for error in &errors[..2] {
        assert!(matches!(error, Error::Timeout { missing, seq: 1, .. } if *missing == [2]), "{error}");
    }
    assert!(matches!(&errors[2], Error::Poisoned { cause } if matches!(**cause, Error::Timeout { .. })));
}

fn an_asynchronous_call_times_out_too() {
    let errors = ranks(2, |rank| {
        if rank.rank == 1 {
            comes_too_late(&rank);
            return rank.barrier().unwrap_err();
        }
        let mut call = Rank::call(Op::Barrier, Kind::Float, none(), none());
        call.timeout = Duration::from_millis(300);
        rank.submit(call).wait().unwrap_err()
    });
    assert!(matches!(&errors[0], Error::Timeout { missing, .. } if *missing == [1]), "{}", errors[0]);
}

/// A barrier that may take as long.
fn barrier_within(timeout: Duration) -> Call<'static> {
    Call { timeout, ..Rank::call(Op::Barrier, Kind::Float, none(), none()) }
}

fn calls_queued_behind_one_another_all_name_the_rank_that_never_came() {
    let errors = ranks(2, |rank| {
        if rank.rank == 1 {
            comes_too_late(&rank);
            return vec![];
        }
        let pending: Vec<_> =
            (0..3).map(|_| rank.submit(barrier_within(Duration::from_millis(300)))).collect();
        pending.into_iter().map(|p| p.wait().unwrap_err()).collect()
    });
    assert_eq!(errors[0].len(), 3);
    for error in &errors[0] {
        assert!(matches!(error, Error::Timeout { seq: 1, missing, .. } if *missing == [1]), "{error}");
    }
}

fn a_call_that_is_late_behind_a_patient_one_names_whom_that_one_waits_for() {
    let errors = ranks(2, |rank| {
        if rank.rank == 1 {
            comes_too_late(&rank);
            return vec![];
        }
        std::thread::scope(|scope| {
            let patient = scope.spawn(|| rank.barrier().unwrap_err());
            std::thread::sleep(Duration::from_millis(100));
            let late = rank.submit(barrier_within(Duration::from_millis(200))).wait().unwrap_err();
            vec![patient.join().unwrap(), late]
        })
    });
    assert_eq!(errors[0].len(), 2);
    for error in &errors[0] {
        assert!(matches!(error, Error::Timeout { seq: 1, missing, .. } if *missing == [1]), "{error}");
    }
}

fn a_call_without_a_limit_waits_behind_another() {
    ranks(2, |rank| {
        if rank.rank == 1 {
            std::thread::sleep(Duration::from_millis(200));
        }
        std::thread::scope(|scope| {
            let first = scope.spawn(|| rank.backend.run(barrier_within(Duration::MAX)));
            let second = rank.submit(barrier_within(Duration::MAX));
            first.join().unwrap().unwrap();
            second.wait().unwrap();
        });
    });
}

/// The failure that an error is or that poisoned the group.
fn cause(error: Error) -> Error {
    match error {
        Error::Poisoned { cause } => cause.duplicate(),
        error => error,
    }
}

fn a_rank_that_drops_its_group_has_not_called_what_the_others_call_and_is_not_lost() {
    let settled = Arc::new(std::sync::Barrier::new(4));
    let errors = ranks(4, move |rank| {
        rank.barrier().unwrap();
        let all_reduce = || {
            let outputs = segments(&[tensor(1000)]);
            rank.submit(Rank::call(Op::AllReduce(ReduceOp::Sum), Kind::Float, none(), outputs))
        };
        let pending = (rank.rank != 3).then(all_reduce);
        // Nobody is in that barrier any more when the first finds out that rank 3 is gone, and all others have called.
        settled.wait();
        Some(pending?.wait().and_then(|_| rank.barrier()).unwrap_err())
    });
    for error in errors.into_iter().flatten().map(cause) {
        let Error::Desync { op, seq: 2, rank: 3, theirs, .. } = &error else { panic!("{error}") };
        assert_eq!(
            (op.as_str(), theirs.as_str()),
            ("all_reduce", "nothing (it left the group after 1 call)")
        );
    }
}

fn a_message_that_waits_for_a_rank_that_left_is_told_so() {
    let errors = ranks(2, |rank| {
        rank.barrier().unwrap();
        if rank.rank == 1 {
            return None;
        }
        Some(rank.transfer(Direction::Recv { src: Some(1) }, 4, &tensor(3)).wait().unwrap_err())
    });
    let error = errors.into_iter().flatten().next().map(cause).unwrap();
    let Error::Desync { op, rank: 1, theirs, ours, .. } = &error else { panic!("{error}") };
    assert_eq!(op, "recv");
    assert!(theirs.starts_with("nothing (it left the group"), "{theirs}");
    assert!(ours.contains("from rank 1 (tag 4)"), "{ours}");
}

fn a_receive_from_any_rank_ends_when_all_the_others_have_left() {
    let errors = ranks(3, |rank| {
        rank.barrier().unwrap();
        match rank.rank {
            0 => Some(rank.transfer(Direction::Recv { src: None }, 0, &tensor(3)).wait().unwrap_err()),
            _ => None,
        }
    });
    let error = errors.into_iter().flatten().next().map(cause).unwrap();
    assert!(matches!(&error, Error::Desync { rank: 1, ours, .. } if ours.contains("any rank")), "{error}");
}

fn a_receive_from_any_rank_waits_for_those_who_are_still_there() {
    let left = Arc::new(std::sync::Barrier::new(2));
    ranks(3, move |rank| {
        rank.barrier().unwrap();
        match rank.rank {
            0 => {
                let into = Tensor::zeros([3], (Kind::Float, Device::Cpu));
                let receipt = rank.transfer(Direction::Recv { src: None }, 0, &into).wait().unwrap();
                assert_eq!((receipt.source, into), (Some(2), tensor(3)));
            }
            1 => {
                drop(rank);
                left.wait();
            }
            _ => {
                left.wait();
                // It takes a moment for rank 0 to learn of it.
                std::thread::sleep(Duration::from_millis(100));
                rank.transfer(Direction::Send { dst: 0 }, 0, &tensor(3)).wait().unwrap();
            }
        }
    });
}

fn a_panic_at_the_end_of_one_operation_leaves_the_others_alone() {
    ranks(2, |rank| {
        let barrier = || Rank::call(Op::Barrier, Kind::Float, none(), none());
        for _ in 0..3 {
            let done = Completion::from_fn(|_| panic!("at the end of a barrier"));
            rank.backend.submit(barrier(), done);
            rank.submit(barrier()).wait().unwrap();
        }
        rank.shutdown().unwrap();
    });
}

fn a_rank_that_has_finished_may_go_before_the_others_have() {
    for _ in 0..50 {
        ranks(3, |rank| rank.all_reduce(&tensor(20_000), ReduceOp::Sum).unwrap());
    }
}

fn abort_from_another_thread_ends_what_is_pending_on_every_rank() {
    let started = Instant::now();
    let both = std::sync::Barrier::new(3);
    let errors = ranks(3, move |rank| {
        if rank.rank == 2 {
            both.wait();
            rank.backend.abort(&Arc::new(Error::Aborted));
            return (Error::Aborted, rank.barrier().unwrap_err());
        }
        let pending = rank.submit(Rank::call(Op::Barrier, Kind::Float, none(), none()));
        let message = rank.transfer(Direction::Recv { src: Some(2) }, 0, &tensor(3));
        both.wait();
        // Begun before the abort or after it.
        let blocked = cause(rank.barrier().unwrap_err());
        assert!(matches!(pending.wait(), Err(Error::Aborted)));
        assert!(matches!(message.wait(), Err(Error::Aborted)));
        (blocked, rank.barrier().unwrap_err())
    });
    for (pending, later) in errors {
        assert!(matches!(pending, Error::Aborted), "{pending}");
        assert!(matches!(&later, Error::Poisoned { cause } if matches!(**cause, Error::Aborted)), "{later}");
    }
    assert!(started.elapsed() < Duration::from_secs(10));
}

fn the_first_cause_stays() {
    ranks(2, |rank| {
        rank.barrier().unwrap();
        if rank.rank == 0 {
            let cause = Arc::new(Error::PeerLost { rank: 1, op: "first".into(), source: None });
            rank.backend.abort(&cause);
        }
        while rank.backend.failure().is_none() {
            std::thread::yield_now();
        }
        rank.backend.abort(&Arc::new(Error::Aborted));
        let failure = rank.backend.failure().unwrap();
        assert!(matches!(*failure, Error::PeerLost { rank: 1, .. }));
        assert!(matches!(rank.barrier(), Err(Error::Poisoned { .. })));
        rank.shutdown().unwrap();
    });
}

on_every_transport! {
    a_rank_that_never_comes_is_named_by_the_timeout_of_all_others,
    an_asynchronous_call_times_out_too,
    calls_queued_behind_one_another_all_name_the_rank_that_never_came,
    a_call_that_is_late_behind_a_patient_one_names_whom_that_one_waits_for,
    a_call_without_a_limit_waits_behind_another,
    a_rank_that_drops_its_group_has_not_called_what_the_others_call_and_is_not_lost,
    a_message_that_waits_for_a_rank_that_left_is_told_so,
    a_receive_from_any_rank_ends_when_all_the_others_have_left,
    a_receive_from_any_rank_waits_for_those_who_are_still_there,
    a_panic_at_the_end_of_one_operation_leaves_the_others_alone,
    a_rank_that_has_finished_may_go_before_the_others_have,
    abort_from_another_thread_ends_what_is_pending_on_every_rank,
    the_first_cause_stays,
}
