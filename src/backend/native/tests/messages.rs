//! Point-to-point: matched by source and tag, in order, in any order of posting.

use std::time::Duration;

use tch::{Device, Kind, Tensor};

use super::ranks;
use crate::Error;
use crate::backend::Direction::{Recv, Send};

fn full(len: i64, value: i64) -> Tensor {
    Tensor::full([len], value, (Kind::Int64, Device::Cpu))
}

fn empty(len: i64) -> Tensor {
    full(len, -1)
}

fn a_ring_and_all_pairs_at_once_do_not_deadlock() {
    for len in [0, 1, 5000, 300_000] {
        ranks(4, move |rank| {
            let mut pending = Vec::new();
            let mut came = Vec::new();
            for peer in 0..rank.world {
                let data = full(len, (10 * rank.rank + peer) as i64);
                let into = empty(len);
                // Some receives before their sends, some after; oneself included.
                if (rank.rank + peer) % 2 == 0 {
                    pending.push(rank.transfer(Send { dst: peer }, 7, &data));
                    pending.push(rank.transfer(Recv { src: Some(peer) }, 7, &into));
                } else {
                    pending.push(rank.transfer(Recv { src: Some(peer) }, 7, &into));
                    pending.push(rank.transfer(Send { dst: peer }, 7, &data));
                }
                came.push(into);
            }
            for work in pending {
                work.wait().unwrap();
            }
            for (peer, into) in came.iter().enumerate() {
                assert_eq!(*into, full(len, (10 * peer + rank.rank) as i64));
            }
            rank.shutdown().unwrap();
        });
    }
}

fn messages_of_one_tag_keep_their_order_and_tags_keep_apart() {
    ranks(2, |rank| {
        if rank.rank == 0 {
            let sends: Vec<_> =
                (0..20).map(|n| rank.transfer(Send { dst: 1 }, n % 2, &full(3, n.into()))).collect();
            sends.into_iter().for_each(|s| assert!(s.wait().is_ok()));
        } else {
            for tag in [1, 0] {
                for n in 0..10 {
                    let into = empty(3);
                    let receipt = rank.transfer(Recv { src: Some(0) }, tag, &into).wait().unwrap();
                    assert_eq!(receipt.source, Some(0));
                    assert_eq!(into, full(3, i64::from(2 * n + tag)));
                }
            }
        }
        rank.shutdown().unwrap();
    });
}

fn a_receive_from_any_source_says_who_sent() {
    ranks(4, |rank| {
        if rank.rank == 0 {
            let mut seen = vec![];
            for _ in 1..4 {
                let into = empty(2);
                let source = rank.transfer(Recv { src: None }, 0, &into).wait().unwrap().source.unwrap();
                assert_eq!(into, full(2, source as i64));
                seen.push(source);
            }
            seen.sort_unstable();
            assert_eq!(seen, [1, 2, 3]);
        } else {
            rank.transfer(Send { dst: 0 }, 0, &full(2, rank.rank as i64)).wait().unwrap();
        }
        rank.shutdown().unwrap();
    });
}

fn a_message_does_not_wait_for_a_collective() {
    ranks(2, |rank| {
        use crate::backend::Op;
        let barrier = super::Rank::call(Op::Barrier, Kind::Float, super::none(), super::none());
        if rank.rank == 0 {
            let pending = rank.submit(barrier);
            let into = empty(1);
            rank.transfer(Recv { src: Some(1) }, 0, &into).wait().unwrap();
            rank.transfer(Send { dst: 1 }, 0, &into).wait().unwrap();
            pending.wait().unwrap();
        } else {
            rank.transfer(Send { dst: 0 }, 0, &full(1, 5)).wait().unwrap();
            let into = empty(1);
            rank.transfer(Recv { src: Some(0) }, 0, &into).wait().unwrap();
            assert_eq!(into, full(1, 5));
            rank.submit(barrier).wait().unwrap();
        }
    });
}

fn a_receive_of_another_size_or_kind_names_both_sides() {
    for (len, kind) in [(5, Kind::Int64), (4, Kind::Float)] {
        let words = format!("{len} {kind:?}");
        let errors = ranks(2, move |rank| {
            if rank.rank == 0 {
                // A small message may have gone before anyone could object.
                let sent = rank.transfer(Send { dst: 1 }, 3, &full(4, 1)).wait();
                match sent.and_then(|_| rank.barrier()).unwrap_err() {
                    Error::Poisoned { cause } => cause.duplicate(),
                    error => error,
                }
            } else {
                rank.transfer(Recv { src: Some(0) }, 3, &Tensor::zeros([len], (kind, Device::Cpu)))
                    .wait()
                    .unwrap_err()
            }
        });
        for error in errors {
            assert!(matches!(error, Error::Desync { .. }), "{error}");
            let text = error.to_string();
            assert!(text.contains(&words) && text.contains("4 Int64"), "{text}");
        }
    }
}

fn a_message_that_never_comes_times_out() {
    ranks(2, |rank| {
        if rank.rank == 0 {
            let pending =
                rank.transfer_within(Recv { src: Some(1) }, 9, &empty(1), Duration::from_millis(300));
            let error = pending.wait().unwrap_err();
            assert!(matches!(&error, Error::Timeout { missing, .. } if *missing == [1]), "{error}");
            assert!(error.to_string().contains("tag 9"), "{error}");
        } else {
            while rank.backend.failure().is_none() {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    });
}

on_every_transport! {
    a_ring_and_all_pairs_at_once_do_not_deadlock,
    messages_of_one_tag_keep_their_order_and_tags_keep_apart,
    a_receive_from_any_source_says_who_sent,
    a_message_does_not_wait_for_a_collective,
    a_receive_of_another_size_or_kind_names_both_sides,
    a_message_that_never_comes_times_out,
}
