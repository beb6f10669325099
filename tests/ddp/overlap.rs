//! Buckets travel while backward runs: seen by a backend that watches another.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tch::{Device, Kind, nn};
use tch_distributed as dist;

use dist::backend::{BackendContext, Call, CollectiveBackend, Completion, Op, Transfer};
use dist::data_parallel::{DdpOptions, DistributedDataParallel};

use crate::support::{Net, batch, within};

/// How many averages have been executed, over all ranks.
static EXECUTED: AtomicUsize = AtomicUsize::new(0);

/// The native engine, counted.
struct Watched(Arc<dyn CollectiveBackend>);

impl CollectiveBackend for Watched {
    fn name(&self) -> &str {
        "watched"
    }

    fn submit(&self, call: Call<'static>, done: Completion) {
        let average = matches!(call.op, Op::AllReduce(dist::ReduceOp::Avg));
        let then = Completion::from_fn(move |result| {
            if average && result.is_ok() {
                EXECUTED.fetch_add(1, Ordering::SeqCst);
            }
            done.complete(result);
        });
        self.0.submit(call, then);
    }

    fn transfer(&self, transfers: Vec<Transfer>) {
        self.0.transfer(transfers);
    }

    fn failure(&self) -> Option<Arc<dist::Error>> {
        self.0.failure()
    }

    fn abort(&self, cause: &Arc<dist::Error>) {
        self.0.abort(cause);
    }

    fn shutdown(&self, timeout: Duration) -> dist::Result<()> {
        self.0.shutdown(timeout)
    }
}

#[test]
fn the_first_bucket_has_been_averaged_before_the_last_gradient_hook_of_the_same_backward() {
    within(100, || {
        dist::register_backend("watched", |context: BackendContext| {
            let inner = dist::backend::native::create(context)?;
            Ok(Arc::new(Watched(inner)) as Arc<dyn CollectiveBackend>)
        })
        .unwrap();
        let buckets = dist::testing::run_threads_on("watched", dist::InitOptions::new(), 2, |group| {
            let vs = nn::VarStore::new(Device::Cpu);
            let net = Net::new(&vs);
            let first_layer = [net.first.ws.shallow_clone(), net.first.bs.as_ref().unwrap().shallow_clone()];
            // Every parameter has a bucket of its own: six.
            let options = DdpOptions::new().bucket_cap_mb(0.00001);
            let ddp = DistributedDataParallel::new(net, &vs, &group, options).unwrap();
            // The first layer's gradients come last. Their hook does not return, and so backward does not
            // end, until a bucket has been averaged: had it to wait for the end of backward, it never would.
            let _hooks = first_layer.map(|parameter| {
                let deadline = Instant::now() + Duration::from_secs(60);
                dist::autograd::on_grad_accumulated(&parameter, move |_| {
                    while EXECUTED.load(Ordering::SeqCst) == 0 {
                        assert!(Instant::now() < deadline, "no bucket was averaged while backward ran");
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    Ok(())
                })
                .unwrap()
            });
            let (input, target) = batch(0, 4, Kind::Float);
            ddp.backward(&(ddp.forward(&input).unwrap() - target).square().mean(Kind::Float)).unwrap();
            group.barrier().unwrap();
            EXECUTED.load(Ordering::SeqCst) / group.size()
        });
        assert_eq!(buckets, [6, 6]);
    });
}
