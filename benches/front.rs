//! What a call costs in front of the backend: checks, buffers, dispatch. The backend does nothing.

use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use tch::{Device, Kind, Tensor};
use tch_distributed as dist;
use tch_distributed::backend::{Call, CollectiveBackend, Completion, Receipt, Transfer};

struct Nothing;

impl CollectiveBackend for Nothing {
    fn name(&self) -> &str {
        "nothing"
    }
    fn submit(&self, _: Call<'static>, done: Completion) {
        done.complete(Ok(Receipt::default()));
    }
    fn run(&self, _: Call<'_>) -> dist::Result<()> {
        Ok(())
    }
    fn transfer(&self, transfers: Vec<Transfer>) {
        transfers.into_iter().for_each(|t| t.done.complete(Ok(Receipt::default())));
    }
    fn abort(&self, _: &Arc<dist::Error>) {}
    fn shutdown(&self, _: Duration) -> dist::Result<()> {
        Ok(())
    }
}

fn front(c: &mut Criterion) {
    dist::register_backend("nothing", |_| Ok(Arc::new(Nothing) as Arc<dyn CollectiveBackend>)).unwrap();
    let group = dist::init_process_group("nothing", dist::InitOptions::new().rank(0).world_size(1)).unwrap();
    let mut t = Tensor::ones([1024], (Kind::Float, Device::Cpu));
    let out = t.copy();
    c.bench_function("front/all_reduce", |b| {
        b.iter(|| group.all_reduce(&mut t, dist::ReduceOp::Sum).unwrap())
    });
    c.bench_function("front/all_gather_into_tensor", |b| {
        let mut out = out.shallow_clone();
        b.iter(|| group.all_gather_into_tensor(&mut out, &t).unwrap());
    });
    c.bench_function("front/all_reduce_async", |b| {
        b.iter(|| group.all_reduce_async(&out, dist::ReduceOp::Sum).unwrap().wait().unwrap());
    });
    c.bench_function("front/barrier on the default group", |b| b.iter(|| dist::barrier().unwrap()));
}

criterion_group! {
    name = benches;
    config = Criterion::default().measurement_time(Duration::from_secs(1)).warm_up_time(Duration::from_millis(300)).sample_size(30);
    targets = front
}
criterion_main!(benches);
