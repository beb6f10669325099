//! Every operation against a model that can be checked by eye.

use tch::{Device, Kind, Tensor};

use super::{Rank, none, ranks, segment, segments};
use crate::ReduceOp;
use crate::backend::Op;

/// Lengths that reach every algorithm: empty, fewer than ranks, odd, one message, several chunks.
const LENGTHS: [i64; 6] = [0, 1, 3, 1000, 40_003, 700_001];

/// Rank r's elements: r + 1, r + 2, …, small enough that f32 sums are exact.
fn data(rank: usize, len: i64) -> Tensor {
    (Tensor::arange(len, (Kind::Int64, Device::Cpu)).remainder(64) + (rank as i64 + 1)).to_kind(Kind::Float)
}

fn total(world: usize, len: i64) -> Tensor {
    (0..world).fold(Tensor::zeros([len], (Kind::Float, Device::Cpu)), |sum, r| sum + data(r, len))
}

fn everywhere(body: fn(&Rank, i64)) {
    for world in [1, 2, 3, 5] {
        ranks(world, move |rank| {
            for len in LENGTHS {
                body(&rank, len);
            }
            rank.shutdown().unwrap();
        });
    }
}

fn all_reduce_gives_every_rank_the_sum() {
    everywhere(|rank, len| {
        let tensor = data(rank.rank, len);
        rank.all_reduce(&tensor, ReduceOp::Sum).unwrap();
        assert_eq!(tensor, total(rank.world, len));
        rank.all_reduce(&tensor, ReduceOp::Avg).unwrap();
        assert_eq!(tensor, total(rank.world, len));
    });
}

fn premul_sum_applies_each_rank_s_own_factor() {
    everywhere(|rank, len| {
        let tensor = data(rank.rank, len);
        rank.all_reduce(&tensor, ReduceOp::PremulSum((rank.rank + 1) as f64)).unwrap();
        let expected = (0..rank.world)
            .fold(Tensor::zeros([len], (Kind::Float, Device::Cpu)), |s, r| s + data(r, len) * (r + 1) as f64);
        assert_eq!(tensor, expected);
    });
}

fn a_segment_of_many_buffers_is_reduced_as_their_concatenation() {
    everywhere(|rank, len| {
        let tensor = data(rank.rank, len);
        // Cut differently on every rank.
        let cut = (len * (rank.rank as i64 + 1) / (rank.world as i64 + 2)).min(len);
        let parts = [
            tensor.narrow(0, 0, cut / 2),
            tensor.narrow(0, cut / 2, cut - cut / 2),
            tensor.narrow(0, cut, len - cut),
        ];
        let outputs = std::iter::once(segment(&[&parts[0], &parts[1], &parts[2]])).collect();
        rank.run(Op::AllReduce(ReduceOp::Sum), Kind::Float, none(), outputs).unwrap();
        assert_eq!(tensor, total(rank.world, len));
    });
}

fn reduce_gives_the_root_the_sum_and_leaves_others_alone() {
    everywhere(|rank, len| {
        for dst in 0..rank.world {
            let tensor = data(rank.rank, len);
            let output = tensor.zeros_like();
            let outputs = if rank.rank == dst { segments(&[output.shallow_clone()]) } else { none() };
            let op = Op::Reduce { op: ReduceOp::Sum, dst };
            rank.run(op, Kind::Float, segments(&[tensor.shallow_clone()]), outputs).unwrap();
            assert_eq!(tensor, data(rank.rank, len));
            if rank.rank == dst {
                assert_eq!(output, total(rank.world, len));
            }
        }
    });
}

fn broadcast_gives_every_rank_the_root_s_data() {
    everywhere(|rank, len| {
        for src in 0..rank.world {
            let tensor = data(rank.rank, len);
            rank.run(Op::Broadcast { src }, Kind::Float, none(), segments(&[tensor.shallow_clone()]))
                .unwrap();
            assert_eq!(tensor, data(src, len));
        }
    });
}

/// A length of its own for each rank.
fn uneven(rank: usize, len: i64) -> i64 {
    len / (rank as i64 + 1) + rank as i64 % 2
}

fn all_gather_collects_inputs_of_any_length_in_rank_order() {
    everywhere(|rank, len| {
        let input = data(rank.rank, uneven(rank.rank, len));
        let outputs: Vec<Tensor> = (0..rank.world).map(|r| data(0, uneven(r, len)).zeros_like()).collect();
        rank.run(Op::AllGather, Kind::Float, segments(&[input]), segments(&outputs)).unwrap();
        for (r, output) in outputs.iter().enumerate() {
            assert_eq!(*output, data(r, uneven(r, len)));
        }
    });
}

fn gather_and_scatter_move_to_and_from_the_root() {
    everywhere(|rank, len| {
        for root in 0..rank.world {
            let mine = data(rank.rank, uneven(rank.rank, len));
            let all: Vec<Tensor> = match rank.rank == root {
                true => (0..rank.world).map(|r| data(0, uneven(r, len)).zeros_like()).collect(),
                false => Vec::new(),
            };
            let input = segments(&[mine.shallow_clone()]);
            rank.run(Op::Gather { dst: root }, Kind::Float, input, segments(&all)).unwrap();
            for (r, output) in all.iter().enumerate() {
                assert_eq!(*output, data(r, uneven(r, len)));
            }
            let back = mine.zeros_like();
            let output = segments(&[back.shallow_clone()]);
            rank.run(Op::Scatter { src: root }, Kind::Float, segments(&all), output).unwrap();
            assert_eq!(back, mine);
        }
    });
}

fn reduce_scatter_gives_each_rank_the_sum_of_its_share() {
    everywhere(|rank, len| {
        let lens: Vec<i64> = (0..rank.world).map(|r| uneven(r, len)).collect();
        let inputs: Vec<Tensor> = lens.iter().map(|&l| data(rank.rank, l)).collect();
        let output = inputs[rank.rank].zeros_like();
        let op = Op::ReduceScatter(ReduceOp::Sum);
        rank.run(op, Kind::Float, segments(&inputs), segments(&[output.shallow_clone()])).unwrap();
        assert_eq!(output, total(rank.world, lens[rank.rank]));
    });
}

fn all_to_all_moves_a_piece_of_its_own_length_between_every_two_ranks() {
    everywhere(|rank, len| {
        let cut = |from: usize, to: usize| uneven(from, len) / (to as i64 + 1);
        let inputs: Vec<Tensor> =
            (0..rank.world).map(|to| data(rank.rank + 10 * to, cut(rank.rank, to))).collect();
        let outputs: Vec<Tensor> =
            (0..rank.world).map(|from| data(0, cut(from, rank.rank)).zeros_like()).collect();
        rank.run(Op::AllToAll, Kind::Float, segments(&inputs), segments(&outputs)).unwrap();
        for (from, output) in outputs.iter().enumerate() {
            assert_eq!(*output, data(from + 10 * rank.rank, cut(from, rank.rank)));
        }
    });
}

fn halves_are_summed_in_f32_and_rounded_once() {
    for len in [5, 100_000] {
        ranks(3, move |rank| {
            // 2048 + 1 + 1: in f16 each step would round back to 2048.
            let value = if rank.rank == 0 { 2048.0 } else { 1.0 };
            let tensor = Tensor::full([len], value, (Kind::Half, Device::Cpu));
            rank.all_reduce(&tensor, ReduceOp::Sum).unwrap();
            assert_eq!(tensor, Tensor::full([len], 2050.0, (Kind::Half, Device::Cpu)));
        });
    }
}

fn thousands_of_asynchronous_calls_take_effect_in_order_mixed_with_blocking_ones() {
    for world in [1, 3] {
        ranks(world, |rank| {
            let tensor = Tensor::ones([10], (Kind::Double, Device::Cpu));
            let mut pending = Vec::new();
            for n in 0..2000 {
                let op = if n % 2 == 0 { ReduceOp::Sum } else { ReduceOp::Avg };
                if n % 100 == 99 {
                    rank.all_reduce(&tensor, op).unwrap();
                } else {
                    let call = Rank::call(
                        Op::AllReduce(op),
                        Kind::Double,
                        none(),
                        segments(&[tensor.shallow_clone()]),
                    );
                    pending.push(rank.submit(call));
                }
                if n % 2 == 1 {
                    let call = Rank::call(
                        Op::Broadcast { src: 0 },
                        Kind::Double,
                        none(),
                        segments(&[tensor.shallow_clone()]),
                    );
                    pending.push(rank.submit(call));
                }
            }
            for work in pending {
                work.wait().unwrap();
            }
            // Sum and Avg in turn: times world, then divided by it once averaged over equal values.
            let expected = (rank.world as f64).powi(1000).min(f64::INFINITY);
            assert_eq!(tensor.double_value(&[0]), expected);
            rank.shutdown().unwrap();
        });
    }
}

on_every_transport! {
    all_reduce_gives_every_rank_the_sum,
    premul_sum_applies_each_rank_s_own_factor,
    a_segment_of_many_buffers_is_reduced_as_their_concatenation,
    reduce_gives_the_root_the_sum_and_leaves_others_alone,
    broadcast_gives_every_rank_the_root_s_data,
    all_gather_collects_inputs_of_any_length_in_rank_order,
    gather_and_scatter_move_to_and_from_the_root,
    reduce_scatter_gives_each_rank_the_sum_of_its_share,
    all_to_all_moves_a_piece_of_its_own_length_between_every_two_ranks,
    halves_are_summed_in_f32_and_rounded_once,
    thousands_of_asynchronous_calls_take_effect_in_order_mixed_with_blocking_ones,
}
