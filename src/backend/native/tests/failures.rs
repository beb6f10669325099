//! Ranks that fail: the others learn, and name the rank that failed first.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use super::{Rank, none, ranks, segments};
use crate::backend::{Call, Direction, Op};
use crate::{Error, ReduceOp};

fn tensor(len: i64) -> Tensor {
    Tensor::ones([len], (Kind::Float, Device::Cpu))
}

fn a_rank_that_never_comes_is_named_by_the_timeout_of_all_others() {
    let errors = ranks(3, |rank| {
        if rank.rank == 2 {
            std::thread::sleep(Duration::from_millis(1500));
            return rank.barrier().unwrap_err();
        }
        let call = Call {
            op: Op::AllReduce(ReduceOp::Sum),
            kind: Kind::Float,
            inputs: none(),
            outputs: segments(&[tensor(100)]),
            timeout: Duration::from_millis(300),
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
            std::thread::sleep(Duration::from_millis(1200));
            return rank.barrier().unwrap_err();
        }
        let mut call = Rank::call(Op::Barrier, Kind::Float, none(), none());
        call.timeout = Duration::from_millis(300);
        rank.submit(call).wait().unwrap_err()
    });
    assert!(matches!(&errors[0], Error::Timeout { missing, .. } if *missing == [1]), "{}", errors[0]);
}

fn a_rank_that_drops_its_group_is_lost_to_those_who_need_it() {
    let errors = ranks(4, |rank| {
        rank.barrier().unwrap();
        if rank.rank == 3 {
            return None;
        }
        Some(rank.all_reduce(&tensor(1000), ReduceOp::Sum).and_then(|()| rank.barrier()).unwrap_err())
    });
    let mut first = 0;
    for error in errors.into_iter().flatten() {
        match &error {
            // Another rank had found out before this one called.
            Error::Poisoned { cause } if matches!(**cause, Error::PeerLost { rank: 3, .. }) => {}
            Error::PeerLost { rank: 3, .. } => {
                assert!(error.to_string().contains("all_reduce (sequence number 2)"), "{error}");
                first += 1;
            }
            _ => panic!("{error}"),
        }
    }
    assert!(first > 0);
}

fn a_rank_that_has_finished_may_go_before_the_others_have() {
    for _ in 0..50 {
        ranks(3, |rank| rank.all_reduce(&tensor(20_000), ReduceOp::Sum).unwrap());
    }
}

fn abort_from_another_thread_ends_what_is_pending_on_every_rank() {
    let started = Instant::now();
    let errors = ranks(3, |rank| {
        if rank.rank == 2 {
            std::thread::sleep(Duration::from_millis(100));
            rank.backend.abort(&Arc::new(Error::Aborted));
            return (Error::Aborted, rank.barrier().unwrap_err());
        }
        let pending = rank.submit(Rank::call(Op::Barrier, Kind::Float, none(), none()));
        let message = rank.transfer(Direction::Recv { src: Some(2) }, 0, &tensor(3));
        let blocked = rank.barrier().unwrap_err();
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
    a_rank_that_drops_its_group_is_lost_to_those_who_need_it,
    a_rank_that_has_finished_may_go_before_the_others_have,
    abort_from_another_thread_ends_what_is_pending_on_every_rank,
    the_first_cause_stays,
}
