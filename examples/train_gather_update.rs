//! The loop behind all data parallelism, by hand: hand each worker its batches, train, gather the results,
//! update the model. (`DistributedDataParallel` does this while backward runs.)

use tch::{Device, Kind, Tensor};
use tch_distributed as dist;

fn main() -> dist::Result<()> {
    dist::launch::local(2, || {
        let group = dist::init_process_group("native", dist::InitOptions::new())?;
        let inputs = Tensor::arange(8, (Kind::Float, Device::Cpu)) / 8.0;
        let targets = &inputs * 3.0;
        let mut weight = Tensor::from(0f32);
        for _ in 0..50 {
            let mine = |t: &Tensor| t.chunk(group.size() as i64, 0).swap_remove(group.rank());
            let error = mine(&inputs) * &weight - mine(&targets);
            let gradient = (error * mine(&inputs)).mean(Kind::Float);
            let mut gradients: Vec<Tensor> = (0..group.size()).map(|_| gradient.zeros_like()).collect();
            group.all_gather(&mut gradients, &gradient)?;
            weight -= Tensor::stack(&gradients, 0).mean(Kind::Float) * 2.0;
        }
        println!("rank {}: the weight is {:.3}", group.rank(), weight.double_value(&[]));
        dist::destroy_process_group()
    })
}
