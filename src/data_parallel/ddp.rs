//! The wrapper that users train with.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tch::{Tensor, nn};

use super::DdpOptions;
use super::buffers::{broadcast_each, broadcast_together};
use super::hooks::CommHook;
use super::layout::{Member, Role, layout};
use super::reducer::Reducer;
use super::verify::verify;
use crate::autograd::HookHandle;
use crate::libtorch;
use crate::process_group::ProcessGroup;
use crate::{Error, Result};

/// A model that is trained on several ranks at once, each with its own data.
///
/// Making one gives every rank rank 0's parameters and buffers. From then on every backward averages the
/// gradients of all ranks, bucket by bucket, while it runs; so the same optimizer step on every rank keeps
/// the parameters equal, to the bit on the native engine. Several ranks with a batch of B/N each train as
/// one with a batch of B does, for losses that are means over the batch.
///
/// The model and its optimizer stay plain `tch`; the wrapper holds the group it was given and never looks
/// for the default one. Dropping it, or [`into_inner`](Self::into_inner), takes the hooks off.
///
/// # Which backward
/// [`backward`](Self::backward) gives typed errors and always ends the step: also on a rank where backward
/// fails, or where the loss depends on no parameter at all, so that the other ranks do not wait. Plain
/// `loss.backward()` exchanges gradients as well. It panics on any failure (`f_backward` does not), and it
/// cannot know of a step in which no gradient arrives on this rank: then the other ranks wait until the
/// group's timeout. Nor does it know the end of a backward within which others run (activations computed
/// again do so): use [`backward`](Self::backward) there, with
/// [`static_graph`](DdpOptions::static_graph) where a parameter's gradient arrives in several parts.
///
/// What keeps a rank from sending its gradients (memory is short, a [communication hook](CommHook) fails)
/// ends the group: this rank gets that error, the others one that names this rank and the cause.
///
/// # What a step costs
/// Each bucket is one operation on the list of its gradients, without a copy. One more element in the last
/// bucket tells whether a parameter is missing anywhere; names are exchanged only then, and the error
/// [`UnusedParameters`](Error::UnusedParameters) is the same on every rank, in that same step. The group
/// stays usable; gradients are then undefined, so zero them.
///
/// # What is different from PyTorch
/// * A parameter without a gradient is an error at the end of that backward, not at the next forward.
/// * Several forwards may precede their backwards; each backward is averaged.
/// * A backward is exchanged unless it runs inside [`no_sync`](Self::no_sync), or the last forward in training
///   before it did. (PyTorch asks the last forward alone.) So do not run one forward inside and another
///   outside, and then both backwards.
/// * Gradients of gradients (`create_graph`) are not averaged, as in PyTorch; sparse gradients are refused.
///
/// Algorithm: Li et al., *PyTorch Distributed: Experiences on Accelerating Data Parallel Training* (VLDB 2020).
/// An example is at [the module](super).
#[doc(alias = "DDP")]
pub struct DistributedDataParallel<M> {
    // First, so that hooks go before what they refer to.
    _hooks: Vec<HookHandle>,
    reducer: Arc<Reducer>,
    module: M,
    group: ProcessGroup,
    buffers: Vec<Tensor>,
    frozen: Vec<(String, Tensor)>,
    broadcast_buffers: bool,
    /// Whether the next forward in training begins with the buffers: not within an accumulation.
    buffers_due: AtomicBool,
}

/// The parameters and buffers of a model, equal on every rank from here on, and what averages their gradients.
pub(super) fn prepare(
    vs: &nn::VarStore,
    group: &ProcessGroup,
    options: &DdpOptions,
) -> Result<(Vec<Member>, Arc<Reducer>)> {
    let members = layout(vs, &options.ignore);
    verify(&members, options, group)?;
    let members = members?;
    let tensors: Vec<&Tensor> = members.iter().map(|member| &member.tensor).collect();
    broadcast_each(&tensors, group)?;
    let reducer = Reducer::new(&members, group, options)?;
    Ok((members, reducer))
}

impl<M> DistributedDataParallel<M> {
    /// Makes `module`, whose variables are those of `vs`, data parallel over `group`. Every rank of the
    /// group calls this with the same model and options.
    ///
    /// Parameters are `vs.trainable_variables()`, in that order; those that do not require a gradient now
    /// are broadcast but not averaged. Everything else in `vs` is a buffer.
    ///
    /// # Errors
    /// The same on every rank: `ShapeMismatch`, `KindMismatch`, `DeviceMismatch` (each rank may have its own
    /// GPU, but of the same type) or `InvalidArgument` that names the first tensor in which a rank differs from
    /// rank 0; `InvalidArgument` when there is nothing to train, a bucket's size is negative or no number, or
    /// options differ.
    pub fn new(module: M, vs: &nn::VarStore, group: &ProcessGroup, options: DdpOptions) -> Result<Self> {
        let (members, reducer) = prepare(vs, group, &options)?;
        let of_role = |role| members.iter().filter(move |member| member.role == role);
        let buffers = of_role(Role::Buffer).map(|m| m.tensor.shallow_clone()).collect();
        let frozen = of_role(Role::Frozen).map(|m| (m.name.clone(), m.tensor.shallow_clone())).collect();
        Ok(Self {
            _hooks: reducer.listen()?,
            reducer,
            module,
            group: group.clone(),
            buffers,
            frozen,
            broadcast_buffers: options.broadcast_buffers,
            buffers_due: AtomicBool::new(true),
        })
    }

    /// Runs the model in any way: several inputs, several outputs, parts of it.
    ///
    /// A forward in training, which is one that records a graph, first gives every rank rank 0's buffers,
    /// when there are any: then every rank must call it. While gradients are accumulated in
    /// [`no_sync`](Self::no_sync), only the first forward of a step does. To run the model on one rank alone
    /// do so under `tch::no_grad`, or use [`module`](Self::module).
    ///
    /// # Errors
    /// Those of the exchange of buffers; `InvalidArgument` when a parameter was frozen when this was made and
    /// is not any more, and inside a backward.
    pub fn forward_with<T>(&self, run: impl FnOnce(&M) -> T) -> Result<T> {
        self.before_forward()?;
        Ok(run(&self.module))
    }

    /// Runs backward from `loss` and leaves in every parameter the average of all ranks' gradients. Inside
    /// [`no_sync`](Self::no_sync), or when the last forward was inside it, gradients are only accumulated.
    ///
    /// # Errors
    /// [`UnusedParameters`](Error::UnusedParameters) when a parameter has no gradient on some rank, and
    /// `Callback` when another rank's backward failed: the group stays usable. What backward itself fails
    /// with. Failures of the exchange, which poison the group. `InvalidArgument` inside another backward.
    pub fn backward(&self, loss: &Tensor) -> Result<()> {
        self.reducer.backward(loss)
    }

    /// Accumulates gradients without exchanging them, for steps of several small batches: forward and
    /// backward of all but the last run inside. The backward after it averages the accumulated total.
    ///
    /// ```
    /// # use tch::{Device, Kind, Tensor, nn};
    /// # use tch_distributed as dist;
    /// # use dist::data_parallel::{DdpOptions, DistributedDataParallel};
    /// let gradients = dist::testing::run_threads(2, |group| {
    ///     let vs = nn::VarStore::new(Device::Cpu);
    ///     let model = nn::linear(vs.root(), 1, 1, nn::LinearConfig { bias: false, ..Default::default() });
    ///     let ddp = DistributedDataParallel::new(model, &vs, &group, DdpOptions::new()).unwrap();
    ///     let step = || ddp.backward(&ddp.forward(&Tensor::from_slice(&[group.rank() as f32 + 1.0])).unwrap());
    ///     ddp.no_sync(step).unwrap(); // 1 and 2
    ///     step().unwrap(); // 1 and 2 again: 2 and 4 in all
    ///     f64::try_from(ddp.module().ws.grad().sum(Kind::Double)).unwrap()
    /// });
    /// assert_eq!(gradients, [3.0, 3.0]);
    /// ```
    pub fn no_sync<T>(&self, run: impl FnOnce() -> T) -> T {
        struct Restore<'a>(&'a Reducer, bool);
        impl Drop for Restore<'_> {
            fn drop(&mut self) {
                self.0.set_paused(self.1);
            }
        }
        let _restore = Restore(&self.reducer, self.reducer.set_paused(true));
        run()
    }

    /// The model.
    pub fn module(&self) -> &M {
        &self.module
    }

    /// The model, as it was before: no more exchange.
    pub fn into_inner(self) -> M {
        self.module
    }

    /// Exchanges gradients in another way from the next backward on. Every rank sets the same hook.
    ///
    /// # Errors
    /// `InvalidArgument` while a backward is under way.
    #[doc(alias = "register_comm_hook")]
    pub fn set_comm_hook(&self, hook: impl CommHook) -> Result<()> {
        self.reducer.set_hook(Box::new(hook))
    }

    fn before_forward(&self) -> Result<()> {
        self.reducer.refuse_inside_backward("input")?;
        let thawed = |(_, tensor): &&(String, Tensor)| tensor.requires_grad();
        if let Some((name, _)) = self.frozen.iter().find(thawed) {
            return Err(Error::invalid(
                "vs",
                format!(
                    "parameter {name} was frozen when the model was made data parallel and requires a gradient now, \
                     which nothing would average: make a new DistributedDataParallel"
                ),
            ));
        }
        self.reducer.settle()?;
        if !libtorch::grad_enabled() {
            return Ok(());
        }
        let synced = self.reducer.note_forward();
        let due = self.buffers_due.swap(synced, Ordering::Relaxed);
        if due && self.broadcast_buffers && !self.buffers.is_empty() {
            broadcast_together(&self.buffers, &self.group)?;
        }
        Ok(())
    }
}

impl<M: nn::Module> DistributedDataParallel<M> {
    /// Runs the model. See [`forward_with`](Self::forward_with).
    pub fn forward(&self, input: &Tensor) -> Result<Tensor> {
        self.forward_with(|module| module.forward(input))
    }
}

impl<M: nn::ModuleT> DistributedDataParallel<M> {
    /// Runs a model that behaves differently in training. See [`forward_with`](Self::forward_with).
    pub fn forward_t(&self, input: &Tensor, train: bool) -> Result<Tensor> {
        self.forward_with(|module| module.forward_t(input, train))
    }
}

impl<M: fmt::Debug> fmt::Debug for DistributedDataParallel<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DistributedDataParallel")
            .field("module", &self.module)
            .field("group", &self.group)
            .finish_non_exhaustive()
    }
}
