//! `DistributedSampler` deals out what PyTorch's does.

use dist::data_parallel::DistributedSampler;
use tch_distributed as dist;

#[test]
fn indices_are_those_of_pytorch_for_the_same_seed_and_epoch() {
    // Written by the script beside it.
    let cases = include_str!("../fixtures/sampler.txt");
    let mut compared = 0;
    for line in cases.lines() {
        let (case, expected) = line.split_once(':').unwrap();
        let case: Vec<u64> = case.split_whitespace().map(|n| n.parse().unwrap()).collect();
        let expected: Vec<i64> = expected.split_whitespace().map(|n| n.parse().unwrap()).collect();
        let &[samples, ranks, rank, shuffle, seed, epoch, drop_last] = case.as_slice() else {
            panic!("{line}")
        };
        let sampler =
            DistributedSampler::with_ranks(samples as usize, rank as usize, ranks as usize).unwrap();
        let mut sampler = sampler.shuffle(shuffle == 1).seed(seed).drop_last(drop_last == 1);
        sampler.set_epoch(epoch);
        assert_eq!(sampler.indices(), expected, "{line}");
        assert_eq!(sampler.len(), expected.len(), "{line}");
        compared += 1;
    }
    assert_eq!(compared, 44);
}

#[test]
fn uneven_ranks_see_each_sample_exactly_once() {
    for samples in [0, 1, 5, 16, 97] {
        for ranks in 1..=5 {
            let mut seen: Vec<i64> = Vec::new();
            for rank in 0..ranks {
                let sampler = DistributedSampler::with_ranks(samples, rank, ranks).unwrap();
                let sampler = sampler.even(false).seed(3).drop_last(rank % 2 == 0);
                let indices = sampler.indices();
                assert_eq!(sampler.len(), indices.len());
                assert_eq!(sampler.is_empty(), indices.is_empty());
                seen.extend(indices);
            }
            seen.sort_unstable();
            assert_eq!(seen, (0..samples as i64).collect::<Vec<_>>());
        }
    }
}

#[test]
fn a_rank_beyond_the_world_is_an_error() {
    let error = DistributedSampler::with_ranks(10, 4, 4).unwrap_err();
    assert!(matches!(error, dist::Error::RankOutOfRange { rank: 4, size: 4 }));
}

#[test]
fn a_sampler_takes_its_rank_from_the_group() {
    let lengths = dist::testing::run_threads(2, |group| DistributedSampler::new(7, &group).even(false).len());
    assert_eq!(lengths, [4, 3]);
}
