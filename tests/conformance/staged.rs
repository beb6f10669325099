//! NCCL under this suite, whose tensors are on the CPU: every call is made on copies on this rank's CUDA device.
//!
//! `TCHD_CONFORMANCE_BACKEND=nccl-staged` in the program that `cargo xtask gpu-bundle` packs. It takes a GPU.

use std::sync::Arc;
use std::time::Duration;

use smallvec::{SmallVec, smallvec};
use tch::{Cuda, Device, Kind, Tensor, no_grad};
use tch_distributed::backend::{
    self, BackendContext, Buffer, Call, CollectiveBackend, Completion, Direction, Op, Segments, Transfer,
};
use tch_distributed::{Error, Result};

pub fn create(context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
    // Several ranks may share a device.
    let device = Device::Cuda(context.ranks[context.rank] % Cuda::device_count().max(1) as usize);
    over("nccl", context, device)
}

/// Any backend under copies on a device.
pub fn over(name: &str, context: BackendContext, device: Device) -> Result<Arc<dyn CollectiveBackend>> {
    Ok(Arc::new(Staged { inner: backend::create(name, context)?, device }))
}

struct Staged {
    inner: Arc<dyn CollectiveBackend>,
    device: Device,
}

/// What the caller gave, and its copy on the device.
type Pair = (Tensor, Tensor);

impl Staged {
    fn copy(&self, tensor: &Tensor) -> Result<Pair> {
        let copy = no_grad(|| tensor.f_detach_copy()?.f_to_device(self.device))?;
        Ok((tensor.shallow_clone(), copy))
    }

    fn copies(&self, segments: &Segments<'_>) -> Result<(Segments<'static>, Vec<Pair>)> {
        let mut pairs = Vec::new();
        let mut copies = Segments::new();
        for segment in segments {
            let mut copied: SmallVec<[Buffer<'static>; 1]> = smallvec![];
            for buffer in segment {
                let pair = self.copy(&buffer.tensor())?;
                copied.push(Buffer::new(pair.1.shallow_clone())?);
                pairs.push(pair);
            }
            copies.push(copied);
        }
        Ok((copies, pairs))
    }
}

fn copy_back(pairs: Vec<Pair>) -> Result<()> {
    no_grad(|| {
        for (mut to, from) in pairs {
            to.f_copy_(&from)?;
        }
        Ok(())
    })
}

impl CollectiveBackend for Staged {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn supports(&self, op: &Op, kind: Kind) -> Result<(), String> {
        self.inner.supports(op, kind)
    }

    fn submit(&self, call: Call<'static>, done: Completion) {
        let copied = self.copies(&call.inputs).and_then(|ins| Ok((ins, self.copies(&call.outputs)?)));
        let ((inputs, _), (outputs, pairs)) = match copied {
            Ok(copied) => copied,
            Err(error) => return done.complete(Err(error)),
        };
        let Call { op, kind, timeout, .. } = call;
        let done = Completion::from_fn(move |result| {
            drop(call);
            done.complete(result.and_then(|receipt| copy_back(pairs).map(|()| receipt)));
        });
        self.inner.submit(Call { op, kind, inputs, outputs, timeout }, done);
    }

    fn transfer(&self, transfers: Vec<Transfer>) {
        let mut staged = Vec::new();
        for transfer in transfers {
            let Transfer { direction, tag, kind, buffer, timeout, done } = transfer;
            let copied = self.copy(&buffer.tensor()).and_then(|(whole, copy)| {
                let copied = Buffer::new(copy.shallow_clone())?;
                Ok(((whole, copy), copied))
            });
            let (pair, copied) = match copied {
                Ok(copied) => copied,
                Err(error) => {
                    done.complete(Err(error));
                    continue;
                }
            };
            let done = Completion::from_fn(move |result| {
                drop(buffer);
                let pairs = if matches!(direction, Direction::Recv { .. }) { vec![pair] } else { vec![] };
                done.complete(result.and_then(|receipt| copy_back(pairs).map(|()| receipt)));
            });
            staged.push(Transfer { direction, tag, kind, buffer: copied, timeout, done });
        }
        self.inner.transfer(staged);
    }

    fn failure(&self) -> Option<Arc<Error>> {
        self.inner.failure()
    }

    fn abort(&self, cause: &Arc<Error>) {
        self.inner.abort(cause);
    }

    fn shutdown(&self, timeout: Duration) -> Result<()> {
        self.inner.shutdown(timeout)
    }
}
