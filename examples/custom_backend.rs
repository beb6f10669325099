//! A backend written outside the crate: it wraps the native one, logs every operation with its bytes,
//! and sends `all_reduce` sums of `f32` as `bf16`, half the bytes.
//!
//! `cargo run --example custom_backend`. The conformance suite runs on it too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tch::{Kind, Tensor};
use tch_distributed as dist;
use tch_distributed::backend::{
    BackendContext, Buffer, Call, CollectiveBackend, Completion, Op, Receipt, Segment, Transfer, native,
};
use tch_distributed::{Error, ReduceOp, Result};

/// Operations seen by all ranks of this process.
static SEEN: AtomicUsize = AtomicUsize::new(0);
/// Whether each is printed.
static LOGGING: AtomicBool = AtomicBool::new(false);

struct Compressing {
    below: Arc<dyn CollectiveBackend>,
    rank: usize,
}

impl CollectiveBackend for Compressing {
    fn name(&self) -> &str {
        "compressing"
    }

    fn supports(&self, op: &Op, kind: Kind) -> Result<(), String> {
        self.below.supports(op, kind)
    }

    fn submit(&self, call: Call<'static>, done: Completion) {
        let bytes: usize = call.inputs.iter().chain(&call.outputs).flatten().map(Buffer::bytes).sum();
        SEEN.fetch_add(1, Ordering::Relaxed);
        if LOGGING.load(Ordering::Relaxed) {
            println!("rank {}: {} of {bytes} bytes of {:?}", self.rank, call.op, call.kind);
        }
        if call.op != Op::AllReduce(ReduceOp::Sum) || call.kind != Kind::Float {
            return self.below.submit(call, done);
        }
        match compress(&call) {
            Err(error) => done.complete(Err(error)),
            Ok((small, packed)) => {
                // When the small one is done, its result goes back into the buffers of the large one.
                let unpack = move |result: Result<Receipt>| {
                    let result = result.and_then(|receipt| unpack(&call, &packed).map(|()| receipt));
                    done.complete(result);
                };
                self.below.submit(small, Completion::from_fn(unpack));
            }
        }
    }

    fn transfer(&self, transfers: Vec<Transfer>) {
        self.below.transfer(transfers);
    }

    fn failure(&self) -> Option<Arc<Error>> {
        self.below.failure()
    }

    fn abort(&self, cause: &Arc<Error>) {
        self.below.abort(cause);
    }

    fn shutdown(&self, timeout: Duration) -> Result<()> {
        self.below.shutdown(timeout)
    }
}

/// The same call on bf16 copies of its buffers, and those copies.
fn compress(call: &Call<'static>) -> Result<(Call<'static>, Vec<Tensor>)> {
    let packed: Vec<Tensor> =
        call.outputs.iter().flatten().map(|b| b.tensor().to_kind(Kind::BFloat16)).collect();
    let segment = packed.iter().map(|t| Buffer::new(t.shallow_clone())).collect::<Result<Segment<'_>>>()?;
    let outputs = std::iter::once(segment).collect();
    let op = call.op;
    let small = Call { op, kind: Kind::BFloat16, inputs: Default::default(), outputs, timeout: call.timeout };
    Ok((small, packed))
}

fn unpack(call: &Call<'static>, packed: &[Tensor]) -> Result<()> {
    for (buffer, result) in call.outputs.iter().flatten().zip(packed) {
        buffer.tensor().f_copy_(result)?;
    }
    Ok(())
}

/// The factory: every rank of a new group calls it.
pub fn create(context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
    let rank = context.rank;
    Ok(Arc::new(Compressing { below: native::create(context)?, rank }))
}

fn main() -> Result<()> {
    LOGGING.store(true, Ordering::Relaxed);
    dist::register_backend("compressing", create)?;

    let sums = dist::testing::run_threads_on("compressing", dist::InitOptions::new(), 3, |group| {
        let mut sum = Tensor::from_slice(&[1.0f32, 0.1]);
        group.all_reduce(&mut sum, ReduceOp::Sum)?;
        // Everything else comes through as it is.
        let names = group.all_gather_object(&format!("rank {}", group.rank()))?;
        assert_eq!(names, ["rank 0", "rank 1", "rank 2"]);
        Ok::<_, Error>(Vec::<f32>::try_from(sum)?)
    });
    for sum in sums {
        let sum = sum?;
        assert_eq!(sum[0], 3.0);
        // A bf16 has eight significant bits.
        assert!((sum[1] - 0.3).abs() < 0.3 / 128.0 && sum[1] != 0.3, "{}", sum[1]);
    }
    assert!(SEEN.load(Ordering::Relaxed) >= 9);
    println!("a backend of our own summed in bf16 on three ranks");
    Ok(())
}
