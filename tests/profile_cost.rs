//! What a profile costs: counted here, timed by `cargo bench --bench profile`.

use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Reduction, Tensor};
use tch_distributed::data_parallel::{DdpOptions, DistributedDataParallel};
use tch_distributed::profile::{ProfileOptions, Profiler};
use tch_distributed::testing::run_threads;

/// With an event below 2 microseconds these are less than 2 % of any step longer than two milliseconds; the step is
/// one of some hundred.
#[test]
fn a_data_parallel_step_of_the_mlp_of_25_million_parameters_keeps_few_events() {
    let reports = run_threads(2, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let widths = [1024, 2048, 4096, 3072, 512];
        let net = widths.windows(2).enumerate().fold(nn::seq(), |net, (i, w)| {
            net.add(nn::linear(vs.root() / i, w[0], w[1], Default::default())).add_fn(Tensor::relu)
        });
        let parameters: usize = vs.trainable_variables().iter().map(Tensor::numel).sum();
        assert!((24_500_000..25_500_000).contains(&parameters), "{parameters}");
        let ddp = DistributedDataParallel::new(net, &vs, &group, DdpOptions::new()).unwrap();
        let mut optimizer = nn::Sgd::default().build(&vs, 1e-3).unwrap();
        let (x, y) = (
            Tensor::ones([2, 1024], (Kind::Float, Device::Cpu)),
            Tensor::zeros([2, 512], (Kind::Float, Device::Cpu)),
        );
        let step = || {
            optimizer.zero_grad();
            let loss = ddp.forward_with(|net| net.forward(&x)).unwrap().mse_loss(&y, Reduction::Mean);
            ddp.backward(&loss).unwrap();
            optimizer.step();
        };
        let mut step = step;
        step(); // the first one learns the order of the buckets
        let profiler = Profiler::new(&group, ProfileOptions::new().enabled(true)).unwrap();
        (0..2).for_each(|_| profiler.step(&mut step));
        profiler.finish().unwrap().unwrap()
    });
    let overhead = reports[0].overhead;
    // The step, and for each of the buckets its exchange and the wait for it. 95 MiB make five buckets at the most.
    let buckets = reports[0].activities.iter().map(|a| a.count).sum::<u64>() as f64 / 4.0;
    assert!((1.0..=5.0).contains(&buckets), "{}", reports[0]);
    assert_eq!(overhead.events_per_step, 1.0 + 2.0 * buckets, "{}", reports[0]);
    assert!(overhead.nanoseconds_per_event > 0.0 && overhead.share > 0.0);
    assert!(reports[0].to_string().contains("events a step x"), "{}", reports[0]);
}
