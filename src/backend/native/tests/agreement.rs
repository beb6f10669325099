//! Ranks that call different things find out, and say what each called.

use std::time::Duration;

use tch::{Device, Kind, Tensor};

use super::{LONG, Rank, none, ranks, segments};
use crate::backend::{Call, Op};
use crate::{Error, ReduceOp};

fn tensor(len: i64, kind: Kind) -> Tensor {
    Tensor::ones([len], (kind, Device::Cpu))
}

/// Rank 1 of 3 makes a call of its own; who fails at once and who later, all name the odd one.
fn odd_one(usual: fn(&Rank) -> Call<'static>, odd: fn(&Rank) -> Call<'static>, words: [&'static str; 2]) {
    let errors = ranks(3, move |rank| {
        let first = rank.barrier();
        assert!(first.is_ok());
        let call = if rank.rank == 1 { odd(&rank) } else { usual(&rank) };
        // Ranks that only send learn by their next call at the latest.
        let result = rank.backend.run(call).and_then(|()| rank.barrier());
        result.expect_err("ranks disagree")
    });
    for (rank, error) in errors.iter().enumerate() {
        let error = match error {
            Error::Poisoned { cause } => cause,
            other => other,
        };
        let Error::Desync { seq, rank: named, theirs, ours, .. } = error else {
            panic!("rank {rank}: {error}")
        };
        assert_eq!(*seq, 2, "rank {rank}: {error}");
        if rank == 1 {
            assert_ne!(*named, 1, "{error}");
            assert!(ours.contains(words[1]) && theirs.contains(words[0]), "rank {rank}: {error}");
        } else {
            assert_eq!(*named, 1, "{error}");
            assert!(ours.contains(words[0]) && theirs.contains(words[1]), "rank {rank}: {error}");
        }
    }
}

fn all_reduce(len: i64, kind: Kind, op: ReduceOp) -> Call<'static> {
    Rank::call(Op::AllReduce(op), kind, none(), segments(&[tensor(len, kind)]))
}

fn broadcast(src: usize) -> Call<'static> {
    Rank::call(Op::Broadcast { src }, Kind::Float, none(), segments(&[tensor(4, Kind::Float)]))
}

fn a_different_operation_is_told_in_words() {
    odd_one(
        |_| all_reduce(4, Kind::Float, ReduceOp::Sum),
        |_| broadcast(0),
        ["all_reduce(Sum)", "broadcast(root 0)"],
    );
    odd_one(
        |_| Rank::call(Op::Barrier, Kind::Float, none(), none()),
        |_| broadcast(2),
        ["barrier", "broadcast"],
    );
}

fn a_different_root_is_told_in_words() {
    odd_one(|_| broadcast(0), |_| broadcast(1), ["root 0", "root 1"]);
}

fn a_different_count_is_told_in_words() {
    odd_one(
        |_| all_reduce(4, Kind::Float, ReduceOp::Sum),
        |_| all_reduce(5, Kind::Float, ReduceOp::Sum),
        ["4 Float", "5 Float"],
    );
    odd_one(
        |_| all_reduce(100_000, Kind::Float, ReduceOp::Sum),
        |_| all_reduce(100_001, Kind::Float, ReduceOp::Sum),
        ["100000 Float", "100001 Float"],
    );
}

fn a_different_kind_or_reduce_op_is_told_in_words() {
    odd_one(
        |_| all_reduce(4, Kind::Float, ReduceOp::Sum),
        |_| all_reduce(4, Kind::Int, ReduceOp::Sum),
        ["Float", "Int"],
    );
    odd_one(
        |_| all_reduce(4, Kind::Float, ReduceOp::Sum),
        |_| all_reduce(4, Kind::Float, ReduceOp::Max),
        ["Sum", "Max"],
    );
}

fn lengths_that_two_ranks_disagree_about_are_told_to_both() {
    let errors = ranks(2, |rank| {
        let len = |other: usize| if rank.rank == 0 && other == 1 { 3 } else { 4 };
        let inputs: Vec<Tensor> = (0..2).map(|r| tensor(len(r), Kind::Float)).collect();
        let outputs: Vec<Tensor> = (0..2).map(|_| tensor(4, Kind::Float)).collect();
        let result = rank.run(Op::AllToAll, Kind::Float, segments(&inputs), segments(&outputs));
        result.and_then(|()| rank.barrier()).expect_err("3 elements for 4").to_string()
    });
    for error in errors {
        let told = |elements, bytes| error.contains(elements) || error.contains(bytes);
        assert!(told("all_to_all with 3 elements", "all_to_all with 12 bytes"), "{error}");
        assert!(told("4 elements", "16 bytes"), "{error}");
    }
}

fn lengths_that_two_ranks_disagree_about_are_told_though_a_third_is_done_and_gone() {
    let errors = ranks(3, |rank| {
        let len = |other: usize| if rank.rank == 0 && other == 1 { 3 } else { 4 };
        let inputs: Vec<Tensor> = (0..3).map(|r| tensor(len(r), Kind::Float)).collect();
        let outputs: Vec<Tensor> = (0..3).map(|_| tensor(4, Kind::Float)).collect();
        let result = rank.run(Op::AllToAll, Kind::Float, segments(&inputs), segments(&outputs));
        // Rank 2 may find nothing, and leave without a word.
        (rank.rank < 2)
            .then(|| result.and_then(|()| rank.barrier()).expect_err("3 elements for 4").to_string())
    });
    for error in errors.into_iter().flatten() {
        let told = |elements, bytes| error.contains(elements) || error.contains(bytes);
        assert!(told("all_to_all with 3 elements", "all_to_all with 12 bytes"), "{error}");
        assert!(told("4 elements", "16 bytes"), "{error}");
    }
}

fn the_odd_one_is_named_by_ranks_that_have_gone_on_with_many_calls() {
    let errors = ranks(3, |rank| {
        let kind = if rank.rank == 1 { Kind::Double } else { Kind::Float };
        let first = rank.submit(all_reduce(4, kind, ReduceOp::Sum));
        // More than a rank remembers of what it called.
        let more: Vec<_> = (0..150).map(|_| rank.submit(all_reduce(4, Kind::Float, ReduceOp::Sum))).collect();
        let error = first.wait().expect_err("ranks disagree");
        assert!(more.into_iter().all(|call| call.wait().is_err()));
        error
    });
    for (rank, error) in errors.iter().enumerate() {
        let error = match error {
            Error::Poisoned { cause } => cause,
            other => other,
        };
        let Error::Desync { seq: 1, rank: named, theirs, ours, .. } = error else {
            panic!("rank {rank}: {error}")
        };
        // A rank that does not remember its own call may be told in the words of the two that found out.
        let both = [theirs, ours].map(|words| words.contains("Double"));
        assert!(both[0] != both[1] && *named < 3, "rank {rank}: {error}");
        assert!(rank != 1 || (*named != 1 && both[1]), "rank {rank}: {error}");
    }
}

fn a_skipped_last_call_is_found_at_shutdown() {
    let errors = ranks(3, |rank| {
        rank.barrier().unwrap();
        // A broadcast's root needs nobody.
        if rank.rank != 1 {
            let call = Rank::call(
                Op::Broadcast { src: 0 },
                Kind::Float,
                none(),
                segments(&[tensor(4, Kind::Float)]),
            );
            if let Err(error) = rank.backend.run(call) {
                return error.to_string();
            }
        }
        rank.shutdown().expect_err("rank 1 skipped a call").to_string()
    });
    for (rank, error) in errors.iter().enumerate() {
        assert!(error.contains("sequence number 2") && error.contains("nothing"), "rank {rank}: {error}");
        assert!(rank == 1 || error.contains("rank 1"), "rank {rank}: {error}");
    }
}

fn a_skipped_last_call_is_found_however_soon_the_others_go() {
    for round in 0..50 {
        let found = ranks(2, move |rank| {
            rank.barrier().unwrap();
            if rank.rank == 0 {
                // Fails in the call, and goes.
                let call = rank.all_reduce(&tensor(1, Kind::Float), ReduceOp::Sum);
                return call.and(rank.shutdown()).is_err();
            }
            std::thread::sleep(Duration::from_micros(round * 20));
            rank.shutdown().is_err()
        });
        assert_eq!(found, [true, true], "round {round}");
    }
}

fn a_rank_that_calls_twice_is_found() {
    let errors = ranks(2, |rank| {
        if rank.rank == 1 {
            rank.barrier()?;
        }
        rank.all_reduce(&tensor(4, Kind::Float), ReduceOp::Sum)?;
        rank.barrier()?;
        rank.backend.shutdown(LONG)
    });
    for error in errors {
        assert!(matches!(error, Err(Error::Desync { seq: 1, .. })), "{error:?}");
    }
}

fn shutdown_of_ranks_that_agree_is_quiet_and_repeatable() {
    ranks(4, |rank| {
        rank.barrier().unwrap();
        rank.backend.shutdown(Duration::from_secs(10)).unwrap();
        rank.backend.shutdown(Duration::from_secs(10)).unwrap();
        assert!(rank.barrier().is_err());
    });
}

on_every_transport! {
    a_different_operation_is_told_in_words,
    a_different_root_is_told_in_words,
    a_different_count_is_told_in_words,
    a_different_kind_or_reduce_op_is_told_in_words,
    lengths_that_two_ranks_disagree_about_are_told_to_both,
    lengths_that_two_ranks_disagree_about_are_told_though_a_third_is_done_and_gone,
    the_odd_one_is_named_by_ranks_that_have_gone_on_with_many_calls,
    a_skipped_last_call_is_found_at_shutdown,
    a_skipped_last_call_is_found_however_soon_the_others_go,
    a_rank_that_calls_twice_is_found,
    shutdown_of_ranks_that_agree_is_quiet_and_repeatable,
}
