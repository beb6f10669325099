//! Buffers come from rank 0, when they are due.

use tch::{Device, Kind, Tensor, nn};
use tch_distributed as dist;

use dist::data_parallel::{DdpOptions, DistributedDataParallel};

use crate::support::{flat, scalar, set, within};

#[test]
fn buffers_come_from_rank_0_at_the_start_and_before_every_forward_in_training() {
    within(60, || {
        dist::testing::run_threads(3, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let norm = nn::batch_norm1d(vs.root() / "norm", 2, Default::default());
            let counter = Tensor::from_slice(&[group.rank() as i64]);
            let counter = vs.root().add("counter", counter, false);
            let rank = group.rank() as f64;
            set(&norm.running_mean, rank + 7.0);
            let ddp = DistributedDataParallel::new(norm, &vs, &group, DdpOptions::new()).unwrap();
            assert_eq!(flat(&ddp.module().running_mean), [7.0; 2]);
            assert_eq!(flat(&counter), [0.0]);
            set(&ddp.module().running_mean, rank + 3.0);
            set(&counter, rank + 5.0);
            let seen = ddp.forward_with(|norm| flat(&norm.running_mean)).unwrap();
            assert_eq!((seen, flat(&counter)), (vec![3.0; 2], vec![5.0]));
            // Training goes on: every rank updates the running mean with data of its own.
            let input = Tensor::ones([4, 2], (Kind::Float, Device::Cpu)) * rank;
            for _ in 0..2 {
                ddp.backward(&ddp.forward_t(&input, true).unwrap().square().sum(Kind::Float)).unwrap();
            }
            // An evaluation on rank 0 alone, without gradients, waits for nobody.
            if group.rank() == 0 {
                let _ = tch::no_grad(|| ddp.forward_t(&input, false)).unwrap();
            }
        });
    });
}

#[test]
fn buffers_may_be_left_to_each_rank() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let norm = nn::batch_norm1d(vs.root() / "norm", 2, Default::default());
            let options = DdpOptions::new().broadcast_buffers(false);
            let ddp = DistributedDataParallel::new(norm, &vs, &group, options).unwrap();
            let rank = group.rank() as f64;
            set(&ddp.module().running_mean, rank);
            assert_eq!(ddp.forward_with(|norm| flat(&norm.running_mean)).unwrap(), [rank; 2]);
        });
    });
}

#[test]
fn under_accumulation_the_first_forward_of_every_step_gives_out_the_buffers() {
    within(60, || {
        dist::testing::run_threads(2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let weight = vs.root().ones("weight", &[1]);
            let counter = vs.root().zeros_no_train("counter", &[1]);
            let ddp = DistributedDataParallel::new((), &vs, &group, DdpOptions::new()).unwrap();
            let rank = group.rank() as f64;
            // The buffer as a forward sees it that begins with a number for each rank.
            let step = |number: f64| {
                set(&counter, number + rank);
                let loss =
                    ddp.forward_with(|()| (&weight * &counter.detach().copy()).sum(Kind::Float)).unwrap();
                ddp.backward(&loss).unwrap();
                scalar(&counter)
            };
            for cycle in 0..3 {
                let start = 100.0 * f64::from(cycle);
                let seen =
                    [ddp.no_sync(|| step(start)), ddp.no_sync(|| step(start + 10.0)), step(start + 20.0)];
                // PyTorch: only the forward behind one whose backward was exchanged.
                assert_eq!(seen, [start, start + 10.0 + rank, start + 20.0 + rank]);
            }
            // Every step is one forward: every forward gives them out.
            assert_eq!([step(7.0), step(8.0)], [7.0, 8.0]);
            // Right behind a step, an evaluation on one rank waits for nobody and takes nothing away.
            set(&counter, 50.0 + rank);
            if group.rank() == 1 {
                assert_eq!(tch::no_grad(|| ddp.forward_with(|()| scalar(&counter))).unwrap(), 51.0);
            }
            assert_eq!(step(60.0), 60.0);
        });
    });
}
