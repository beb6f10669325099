//! Initial weights of split layers. One test in a process of its own: all threads share libtorch's seed.

use tch::{Device, nn};
use tch_distributed::model_parallel::tensor::{
    ColumnParallelLinear, Layout, ParallelLinearConfig, RowParallelLinear, VocabParallelEmbedding,
};
use tch_distributed::testing::run_threads;

#[test]
fn the_same_seed_gives_the_weights_of_the_unsplit_layer() {
    for n in [1, 2, 3] {
        run_threads(n, |group| {
            let full = |name: &str, vs: &nn::VarStore, layout: &Layout| {
                layout.full(name, &vs.variables()[name]).unwrap()
            };
            let vs = nn::VarStore::new(Device::Cpu);
            group.barrier().unwrap();
            tch::manual_seed(17);
            let ((), layout) = Layout::record(&group, || {
                let (root, config) = (vs.root(), ParallelLinearConfig::default());
                ColumnParallelLinear::new(&root / "a", 5, 7, config, &group).unwrap();
                RowParallelLinear::new(&root / "b", 7, 5, config, &group).unwrap();
                VocabParallelEmbedding::new(&root / "c", 9, 4, config, &group).unwrap();
            });
            group.barrier().unwrap();
            if group.rank() == 0 {
                tch::manual_seed(17);
            }
            let one = nn::VarStore::new(Device::Cpu);
            if group.rank() == 0 {
                let _ = nn::linear(one.root() / "a", 5, 7, Default::default());
                let _ = nn::linear(one.root() / "b", 7, 5, Default::default());
                let _ = nn::embedding(one.root() / "c", 9, 4, Default::default());
            }
            for name in ["a.weight", "a.bias", "b.weight", "b.bias", "c.weight"] {
                let split = full(name, &vs, &layout);
                if group.rank() == 0 {
                    assert_eq!(split, one.variables()[name], "{name}");
                }
            }
        });
    }
}
