//! Several hosts, pretended: which ranks share memory, and that results do not show it.

use std::sync::Arc;
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use super::{Rank, altered, context, none, ranks_with, segments};
use crate::backend::native::Options;
use crate::backend::{Call, Op};
use crate::store::{HashStore, Store};
use crate::{Error, ReduceOp};

/// Hosts of different sizes, in no order: three ranks, one, two.
const LAYOUT: [&str; 6] = ["a", "b", "a", "c", "c", "a"];

fn on_hosts<T: Send + 'static>(body: impl Fn(Rank) -> T + Send + Sync + 'static) -> Vec<T> {
    ranks_with(LAYOUT.len(), |rank| Options::new().host(LAYOUT[rank]), body)
}

/// Numbers without a pattern, different on every rank.
fn noise(rank: usize, numel: i64, kind: Kind) -> Tensor {
    let n = Tensor::arange(numel, (Kind::Double, Device::Cpu));
    ((n * 12.9898 + rank as f64 * 78.233).sin() * 43_758.545_3).frac().to_kind(kind)
}

/// Every rank's operand of [`noise`], in double precision.
fn operands(numel: i64, kind: Kind) -> Vec<Tensor> {
    (0..LAYOUT.len()).map(|r| noise(r, numel, kind).to_kind(Kind::Double)).collect()
}

#[test]
fn sums_over_hosts_have_the_same_bits_on_every_rank_and_in_every_run() {
    let run = || {
        on_hosts(|rank| {
            let tensors = [3, 1000, 300_001].map(|numel| noise(rank.rank, numel, Kind::Float));
            for tensor in &tensors {
                rank.all_reduce(tensor, ReduceOp::Sum).unwrap();
            }
            rank.shutdown().unwrap();
            tensors.map(|t| Vec::<f32>::try_from(t).unwrap())
        })
    };
    let results = [run(), run()].concat();
    for (n, numel) in [3, 1000, 300_001].into_iter().enumerate() {
        let bits = |r: &[Vec<f32>; 3]| r[n].iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        assert!(results.iter().all(|r| bits(r) == bits(&results[0])), "{numel} elements");
        let exact = operands(numel, Kind::Float).into_iter().reduce(|a, b| a + b).unwrap();
        let off = (Tensor::from_slice(&results[0][n]).to_kind(Kind::Double) - exact).abs().max();
        assert!(off.double_value(&[]) < 1e-6, "{numel} elements, off by {off}");
    }
}

#[test]
fn halves_are_rounded_once_over_all_hosts() {
    for kind in [Kind::BFloat16, Kind::Half] {
        let results = on_hosts(move |rank| {
            let sum = noise(rank.rank, 70_000, kind);
            rank.all_reduce(&sum, ReduceOp::Sum).unwrap();
            let mean = noise(rank.rank, 5, kind);
            rank.all_reduce(&mean, ReduceOp::Avg).unwrap();
            let part = Tensor::zeros([500], (kind, Device::Cpu));
            let inputs: Vec<Tensor> = noise(rank.rank, 3000, kind).chunk(6, 0);
            let op = Op::ReduceScatter(ReduceOp::Sum);
            rank.run(op, kind, segments(&inputs), segments(&[part.shallow_clone()])).unwrap();
            rank.shutdown().unwrap();
            [sum, mean, part].map(|t| Vec::<f32>::try_from(t.to_kind(Kind::Float)).unwrap())
        });
        // In f32 the order of additions shows in the last bit at most, which rounding hides but for ties:
        // f64 rounded once is what any order of f32 sums rounds to, within one unit of the half kind.
        let total = |numel| operands(numel, kind).into_iter().reduce(|a, b| a + b).unwrap();
        let rounded = |t: Tensor| Vec::<f32>::try_from(t.to_kind(kind).to_kind(Kind::Float)).unwrap();
        let differ = |a: &[f32], b: &[f32]| a.iter().zip(b).filter(|(a, b)| a != b).count();
        for (rank, [sum, mean, part]) in results.iter().enumerate() {
            assert_eq!(sum, &results[0][0], "{kind:?}, rank {rank}");
            // Rounding at every host too would change a third of them.
            assert!(differ(sum, &rounded(total(70_000))) < 100, "{kind:?}, rank {rank}");
            assert_eq!(mean, &rounded(total(5) / 6.0), "{kind:?}, rank {rank}");
            let mine = total(3000).chunk(6, 0).swap_remove(rank);
            assert!(differ(part, &rounded(mine)) < 5, "{kind:?}, rank {rank}");
        }
    }
}

#[test]
fn each_rank_may_give_a_factor_of_its_own_over_hosts() {
    let results = on_hosts(|rank| {
        let tensor = Tensor::ones([9], (Kind::Double, Device::Cpu));
        rank.all_reduce(&tensor, ReduceOp::PremulSum(10f64.powi(rank.rank as i32))).unwrap();
        rank.shutdown().unwrap();
        Vec::<f64>::try_from(tensor).unwrap()
    });
    assert!(results.iter().all(|r| *r == [111_111.0; 9]), "{results:?}");
}

#[test]
fn a_list_of_tensors_is_reduced_in_place_over_hosts() {
    let results = on_hosts(|rank| {
        let tensors =
            [7, 0, 40_000, 1].map(|n| Tensor::full([n], 1 + rank.rank as i64, (Kind::Int64, Device::Cpu)));
        let outputs = [super::segment(&tensors.each_ref())].into_iter().collect();
        rank.run(Op::AllReduce(ReduceOp::Sum), Kind::Int64, none(), outputs).unwrap();
        rank.shutdown().unwrap();
        tensors.iter().all(|t| *t == t.full_like(21))
    });
    assert_eq!(results, [true; 6]);
}

#[test]
fn hosts_that_call_different_things_are_told_so() {
    let results = on_hosts(|rank| {
        let op = if rank.rank == 3 { Op::Barrier } else { Op::AllReduce(ReduceOp::Sum) };
        let tensor = Tensor::ones([9], (Kind::Double, Device::Cpu));
        let outputs = if op == Op::Barrier { none() } else { segments(&[tensor]) };
        let call = Call { op, kind: Kind::Double, inputs: none(), outputs, timeout: Duration::from_secs(20) };
        rank.backend.run(call).unwrap_err().to_string()
    });
    for (rank, said) in results.iter().enumerate() {
        let other = if rank == 3 { "rank 0 called all_reduce" } else { "rank 3 called barrier" };
        assert!(said.contains(other), "rank {rank}: {said}");
    }
}

#[test]
fn what_ranks_of_one_host_do_not_agree_about_is_told_with_their_numbers_in_the_group() {
    let hosts = ["a", "a", "b", "b"];
    let results = ranks_with(
        4,
        move |rank| Options::new().host(hosts[rank]),
        |rank| {
            // Rank 3 gives five for rank 2, which expects four.
            let longer = |to: usize| if (rank.rank, to) == (3, 2) { 5 } else { 4 };
            let inputs = [0, 1, 2, 3].map(|to| Tensor::ones([longer(to)], (Kind::Float, Device::Cpu)));
            let outputs = [4; 4].map(|n| Tensor::zeros([n], (Kind::Float, Device::Cpu)));
            let call = Rank::call(Op::AllToAll, Kind::Float, segments(&inputs), segments(&outputs));
            // Who has all that it needs learns by its next call.
            rank.backend.run(call).and_then(|()| rank.barrier()).unwrap_err()
        },
    );
    for (rank, error) in results.into_iter().enumerate() {
        let error = match error {
            Error::Poisoned { cause } => cause.duplicate(),
            other => other,
        };
        let Error::Desync { rank: named, theirs, ours, .. } = &error else { panic!("rank {rank}: {error}") };
        let words = ["all_to_all with 20 bytes for rank 2", "all_to_all with 16 bytes expected from rank 3"];
        let told = if *named == 3 { [theirs, ours] } else { [ours, theirs] };
        assert_eq!(told, words, "rank {rank}: {error}");
        assert!([2, 3].contains(named), "rank {rank}: {error}");
    }
}

#[test]
fn a_group_whose_hosts_refuse_to_share_memory_leaves_no_keys_either() {
    let store: Arc<dyn Store> = Arc::new(HashStore::new());
    let hosts = ["a", "a", "b"];
    let ranks: Vec<_> = (0..3)
        .map(|rank| {
            // What a rank offers whose process has used up its memory for slots.
            let poor = altered(store.clone(), |key, value| match key.contains("shm/offer") {
                true => postcard::to_stdvec(&(0_usize, None::<String>)).unwrap(),
                false => value,
            });
            std::thread::spawn(move || {
                let backend = Options::new().host(hosts[rank]).create(context(poor, rank, 3)).unwrap();
                let rank = Rank { backend, rank, world: 3 };
                rank.barrier().unwrap();
                rank.shutdown().unwrap();
            })
        })
        .collect();
    ranks.into_iter().for_each(|rank| rank.join().unwrap());
    assert_eq!(store.num_keys().unwrap(), 0);
}
