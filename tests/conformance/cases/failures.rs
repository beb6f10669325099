//! What happens when ranks disagree, do not come, or give up.

use std::time::Duration;

use tch::{Device, Kind, Tensor};
use tch_distributed::{Error, GroupOptions, ProcessGroup, ReduceOp, Result};

use super::{list, numbers, room};

list! {
    2 ranks_that_call_different_operations_are_told_on_every_rank;
    2 ranks_that_name_different_roots_are_told_on_every_rank;
    2 ranks_that_give_different_kinds_are_told_on_every_rank;
    2 ranks_that_give_different_counts_are_told_on_every_rank;
    2 ranks_that_combine_differently_are_told_on_every_rank;
    2 a_rank_that_skips_a_call_is_found;
    2 a_skipped_last_call_is_found_when_the_group_is_destroyed;
    3 the_ranks_that_agree_name_the_odd_one;
    2 a_rank_that_does_not_come_is_named_by_the_timeout;
    1 every_call_after_a_failure_returns_its_cause;
    2 abort_from_another_thread_frees_a_waiting_call_on_every_rank;
    2 abort_frees_a_rank_that_waits_in_destroy;
    2 abort_of_a_group_that_has_only_just_come_about_is_known_on_every_rank;
    2 a_message_of_another_size_or_kind_is_an_error_of_the_receiver;
    3 who_agrees_about_a_group_is_told_as_soon_that_another_does_not;
    2 a_monitored_barrier_names_every_missing_rank;
    2 an_asynchronous_failure_comes_from_the_work_and_from_nothing_else;
}

/// A group of all ranks of its own, so that what fails is not the world.
fn own_group(group: &ProcessGroup, timeout: Duration) -> ProcessGroup {
    let all: Vec<usize> = (0..group.size()).collect();
    group.new_group_with(&all, GroupOptions::new().timeout(timeout)).unwrap().unwrap()
}

/// The failure that an error is or that poisoned the group.
fn root_cause(error: &Error) -> &Error {
    match error {
        Error::Poisoned { cause } => cause,
        other => other,
    }
}

/// Every rank calls something of its own, then a barrier: by then each must have got a Desync whose
/// text holds these words.
fn told(group: &ProcessGroup, call: impl Fn(&ProcessGroup) -> Result<()>, words: [&str; 2]) {
    let own = own_group(group, Duration::from_secs(20));
    let outcome = call(&own).and_then(|()| own.barrier());
    let error = outcome.expect_err("a disagreement must not go by");
    let cause = root_cause(&error);
    assert!(matches!(cause, Error::Desync { .. }), "rank {}: {error:?}", group.rank());
    let text = cause.to_string();
    assert!(words.iter().any(|word| text.contains(word)), "{text}");
    assert!(matches!(own.barrier(), Err(Error::Poisoned { .. })), "it stays so");
    group.barrier().unwrap();
}

fn ranks_that_call_different_operations_are_told_on_every_rank(group: &ProcessGroup) {
    let call = |g: &ProcessGroup| match g.rank() {
        1 => g.broadcast(&mut numbers(&[1, 2]), 0),
        _ => g.all_reduce(&mut numbers(&[1, 2]), ReduceOp::Sum),
    };
    told(group, call, ["broadcast", "all_reduce"]);
}

fn ranks_that_name_different_roots_are_told_on_every_rank(group: &ProcessGroup) {
    told(group, |g| g.broadcast(&mut numbers(&[1]), g.rank().min(1)), ["root 0", "root 1"]);
}

fn ranks_that_give_different_kinds_are_told_on_every_rank(group: &ProcessGroup) {
    let call = |g: &ProcessGroup| {
        let kind = if g.rank() == 1 { Kind::Int } else { Kind::Float };
        g.all_reduce(&mut Tensor::ones([4], (kind, Device::Cpu)), ReduceOp::Sum)
    };
    told(group, call, ["Int", "Float"]);
}

fn ranks_that_give_different_counts_are_told_on_every_rank(group: &ProcessGroup) {
    told(group, |g| g.all_reduce(&mut room(3 + (g.rank() == 1) as i64), ReduceOp::Sum), ["3", "4"]);
}

fn ranks_that_combine_differently_are_told_on_every_rank(group: &ProcessGroup) {
    let call = |g: &ProcessGroup| {
        let op = if g.rank() == 1 { ReduceOp::Product } else { ReduceOp::Sum };
        g.all_reduce(&mut numbers(&[1]), op)
    };
    told(group, call, ["Product", "Sum"]);
}

fn a_rank_that_skips_a_call_is_found(group: &ProcessGroup) {
    let call = |g: &ProcessGroup| match g.rank() {
        1 => Ok(()),
        _ => g.all_reduce(&mut numbers(&[1]), ReduceOp::Sum),
    };
    told(group, call, ["barrier", "all_reduce"]);
}

fn a_skipped_last_call_is_found_when_the_group_is_destroyed(group: &ProcessGroup) {
    let own = own_group(group, Duration::from_secs(20));
    own.barrier().unwrap();
    let call = if own.rank() == 1 { Ok(()) } else { own.all_reduce(&mut numbers(&[1]), ReduceOp::Sum) };
    let ((Err(error), _) | (Ok(()), Err(error))) = (call, own.destroy()) else {
        panic!("rank {}: the skipped call went by", group.rank());
    };
    let cause = root_cause(&error);
    assert!(
        matches!(cause, Error::Desync { .. } | Error::PeerLost { .. }),
        "rank {}: {error:?}",
        group.rank()
    );
    group.barrier().unwrap();
}

fn the_ranks_that_agree_name_the_odd_one(group: &ProcessGroup) {
    let own = own_group(group, Duration::from_secs(20));
    let odd = group.size() - 1;
    let op = if group.rank() == odd { ReduceOp::Max } else { ReduceOp::Min };
    let mut t = numbers(&[1]);
    let error = own.all_reduce(&mut t, op).and_then(|()| own.barrier()).unwrap_err();
    if group.rank() != odd {
        match root_cause(&error) {
            Error::Desync { rank, theirs, ours, .. } => {
                assert_eq!(*rank, odd, "{error}");
                assert!(theirs.contains("Max") && ours.contains("Min"), "{error}");
            }
            other => panic!("{other:?}"),
        }
    }
    group.barrier().unwrap();
}

fn a_rank_that_does_not_come_is_named_by_the_timeout(group: &ProcessGroup) {
    let own = own_group(group, Duration::from_secs(20)).with_timeout(Duration::from_secs(3));
    // Those who come, come together.
    group.barrier().unwrap();
    if group.rank() != 1 {
        let error = own.all_reduce(&mut numbers(&[1]), ReduceOp::Sum).unwrap_err();
        match root_cause(&error) {
            Error::Timeout { op, missing, .. } => {
                assert!(op.contains("all_reduce") && missing == &[1], "{error}");
            }
            other => panic!("rank {}: {other:?}", group.rank()),
        }
        assert!(error.to_string().contains("rank 1 did not arrive"), "{error}");
        group.barrier().unwrap();
    } else {
        // The others have given up by then. What they sent before is there: this may end yet, and the next cannot.
        group.barrier().unwrap();
        let late = own.all_reduce(&mut numbers(&[1]), ReduceOp::Sum);
        let error = late.and_then(|()| own.barrier()).unwrap_err();
        assert!(matches!(root_cause(&error), Error::Timeout { .. }), "the late rank learns of it: {error:?}");
    }
    group.barrier().unwrap();
}

fn every_call_after_a_failure_returns_its_cause(group: &ProcessGroup) {
    let own = own_group(group, Duration::from_secs(20));
    group.barrier().unwrap();
    own.abort().unwrap();
    let (n, me) = (group.size(), group.rank());
    let mut t = numbers(&[1]);
    let mut outputs: Vec<Tensor> = (0..n).map(|_| room(1)).collect();
    let errors = [
        own.all_reduce(&mut t, ReduceOp::Sum).unwrap_err(),
        own.broadcast(&mut t, 0).unwrap_err(),
        own.all_gather(&mut outputs, &numbers(&[1])).unwrap_err(),
        own.barrier().unwrap_err(),
        own.isend(&t, (me + 1) % n, 0).unwrap_err(),
        own.irecv(&t, (me + 1) % n, 0).unwrap_err(),
        own.all_reduce_async(&t, ReduceOp::Sum).unwrap_err(),
        own.broadcast_object(Some(1), 0).unwrap_err(),
        own.new_group(&[0]).unwrap_err(),
        own.monitored_barrier(Duration::from_secs(1), true).unwrap_err(),
        own.batch_isend_irecv(Vec::new()).unwrap_err(),
    ];
    for error in errors {
        assert!(
            matches!(&error, Error::Poisoned { cause } if matches!(**cause, Error::Aborted)),
            "{error:?}"
        );
    }
    own.destroy().unwrap();
    group.barrier().unwrap();
}

fn abort_from_another_thread_frees_a_waiting_call_on_every_rank(group: &ProcessGroup) {
    let own = own_group(group, Duration::from_secs(60));
    if group.rank() == 0 {
        // Rank 0 never calls: it gives up while the others wait.
        std::thread::sleep(Duration::from_millis(50));
        own.abort().unwrap();
    } else {
        let other = own.clone();
        let waiting = std::thread::spawn(move || other.all_reduce(&mut numbers(&[1]), ReduceOp::Sum));
        if group.rank() == 1 {
            std::thread::sleep(Duration::from_millis(50));
            own.abort().unwrap();
        }
        let error = waiting.join().unwrap().unwrap_err();
        assert!(matches!(root_cause(&error), Error::Aborted), "{error:?}");
    }
    let error = own.barrier().unwrap_err();
    assert!(matches!(&error, Error::Poisoned { cause } if matches!(**cause, Error::Aborted)), "{error:?}");
    group.barrier().unwrap();
}

fn abort_frees_a_rank_that_waits_in_destroy(group: &ProcessGroup) {
    let own = own_group(group, Duration::from_secs(60));
    if group.rank() == 0 {
        // The others never come to destroy it.
        let other = own.clone();
        let leaving = std::thread::spawn(move || other.destroy());
        while !own.new_group(&[]).is_err_and(|error| error.to_string().contains("destroyed")) {
            std::thread::sleep(Duration::from_millis(5));
        }
        own.abort().unwrap();
        let error = leaving.join().unwrap().unwrap_err();
        assert!(matches!(root_cause(&error), Error::Aborted), "{error:?}");
        assert!(matches!(own.abort(), Err(Error::InvalidArgument { .. })), "it is destroyed now");
        own.destroy().unwrap();
    }
    group.barrier().unwrap();
}

fn a_message_of_another_size_or_kind_is_an_error_of_the_receiver(group: &ProcessGroup) {
    for (tag, sent) in [numbers(&[1, 2, 3]), Tensor::ones([2], (Kind::Float, Device::Cpu))].iter().enumerate()
    {
        let own = own_group(group, Duration::from_secs(20));
        match group.rank() {
            0 => drop(own.isend(sent, 1, tag as u32)),
            1 => {
                let error = own.recv(&mut room(2), 0, tag as u32).unwrap_err();
                assert!(matches!(root_cause(&error), Error::Desync { rank: 0, .. }), "{error:?}");
                assert!(error.to_string().contains("send"), "{error}");
            }
            _ => {}
        }
        group.barrier().unwrap();
    }
}

fn abort_of_a_group_that_has_only_just_come_about_is_known_on_every_rank(group: &ProcessGroup) {
    for turn in 0..8 {
        let own = own_group(group, Duration::from_secs(60));
        if own.rank() == turn % own.size() {
            own.abort().unwrap();
            own.destroy().unwrap();
            continue;
        }
        let error = own.barrier().unwrap_err();
        assert!(matches!(root_cause(&error), Error::Aborted), "{error}");
    }
}

fn who_agrees_about_a_group_is_told_as_soon_that_another_does_not(group: &ProcessGroup) {
    // Whoever comes first, others agree with it and wait for one that does not.
    let all: Vec<usize> = (0..group.size()).collect();
    let ranks = if group.rank() == group.size() - 1 { &all[1..] } else { &all };
    let error = group.new_group(ranks).unwrap_err();
    assert!(error.to_string().contains("disagree"), "{error}");
}

fn a_monitored_barrier_names_every_missing_rank(group: &ProcessGroup) {
    let own = own_group(group, Duration::from_secs(20));
    let missing: Vec<usize> = (1..group.size()).collect();
    if group.rank() == 0 {
        let error = own.monitored_barrier(Duration::from_millis(200), true).unwrap_err();
        assert!(matches!(&error, Error::Timeout { missing: m, .. } if *m == missing), "{error:?}");
        assert!(matches!(own.barrier(), Err(Error::Poisoned { .. })));
    }
    group.barrier().unwrap();
}

fn an_asynchronous_failure_comes_from_the_work_and_from_nothing_else(group: &ProcessGroup) {
    let own = own_group(group, Duration::from_secs(20));
    let t = room(4 + (group.rank() == 1) as i64);
    let work = own.all_reduce_async(&t, ReduceOp::Sum).expect("it starts well");
    let error = work.wait().unwrap_err();
    assert!(matches!(root_cause(&error), Error::Desync { .. }), "{error:?}");
    assert!(work.is_completed());
    assert!(work.wait_timeout(Duration::ZERO).is_err(), "asking again gives the same");
    group.barrier().unwrap();
}
