//! What is done with gradients between backward and the optimizer, over all axes of a mesh.

use std::collections::HashMap;

use tch::{Kind, Tensor, nn};

use super::tensor::Layout;
use crate::autograd::set_grad;
use crate::{Error, ProcessGroup, ReduceOp, Result, libtorch};

/// Averages the gradients of all parameters over `group`: data parallelism in one call after backward.
///
/// For models whose backward runs in a pipeline; elsewhere
/// [`DistributedDataParallel`](crate::data_parallel::DistributedDataParallel) does it while backward still runs. A
/// parameter without a gradient counts as zero where another rank has one.
///
/// ```
/// use tch::{Device, Kind, nn};
/// use tch_distributed::{model_parallel::sync_gradients, testing};
///
/// testing::run_threads(2, |group| {
///     let vs = nn::VarStore::new(Device::Cpu);
///     let w = vs.root().zeros("w", &[2]);
///     (&w * (group.rank() as f64)).sum(Kind::Float).backward();
///     sync_gradients(&vs, &group).unwrap();
///     assert_eq!(Vec::<f32>::try_from(w.grad()).unwrap(), [0.5, 0.5]);
/// });
/// ```
///
/// # Errors
/// Those of the group's collectives.
pub fn sync_gradients(vs: &nn::VarStore, group: &ProcessGroup) -> Result<()> {
    if group.size() == 1 {
        return Ok(());
    }
    let _no_grad = tch::no_grad_guard();
    let mut parameters = distinct(vs);
    // Which parameters have a gradient on any rank, so that all ranks send the same.
    let mine: Vec<u8> = parameters.iter().map(|p| u8::from(p.grad().defined())).collect();
    let mut used = Tensor::f_from_slice(&mine)?.f_to_device(vs.device())?;
    group.all_reduce(&mut used, ReduceOp::Max)?;
    let used = Vec::<u8>::try_from(used)?;
    let mut used = used.into_iter();
    parameters.retain(|_| used.next() != Some(0));
    for parameter in parameters.iter_mut().filter(|p| !p.grad().defined()) {
        let zeros = parameter.f_detach()?.f_zeros_like()?;
        set_grad(parameter, Some(&zeros))?;
    }
    keep_apart(&mut parameters)?;
    let mut grads: Vec<_> = parameters.iter().map(Tensor::grad).collect();
    group.all_reduce_coalesced(&mut grads, ReduceOp::Avg)
}

/// Scales the gradients down so that the norm of all of them together, over every rank of the model, is at most
/// `max_norm`; gives the norm they had. As `torch.nn.utils.clip_grad_norm_`, on a model that is split.
///
/// `group` holds all ranks of one copy of the model: of a mesh, its tensor and pipeline axes flattened. Shards count on
/// each rank, whole parameters once, and copies of a tied weight once, as `layout` says. A norm that is not
/// finite leaves the gradients as they are.
///
/// ```
/// use tch::{Device, Kind, nn};
/// use tch_distributed::model_parallel::{clip_grad_norm, tensor::Layout};
/// use tch_distributed::testing;
///
/// testing::run_threads(2, |group| {
///     let vs = nn::VarStore::new(Device::Cpu);
///     let (w, layout) = Layout::record(&group, || vs.root().zeros("w", &[2]));
///     (&w * 3.0).sum(Kind::Float).backward(); // the same on both ranks: it counts once
///     let norm = clip_grad_norm(&vs, &layout, 1.0, &group).unwrap();
///     assert!((norm - 18_f64.sqrt()).abs() < 1e-6);
///     assert!((w.grad().norm().double_value(&[]) - 1.0).abs() < 1e-3);
/// });
/// ```
///
/// # Errors
/// `InvalidArgument` for a `max_norm` that is not positive; those of the group's collectives.
#[doc(alias = "clip_grad_norm_")]
pub fn clip_grad_norm(
    vs: &nn::VarStore,
    layout: &Layout,
    max_norm: f64,
    group: &ProcessGroup,
) -> Result<f64> {
    if max_norm.is_nan() || max_norm <= 0.0 {
        return Err(Error::invalid("max_norm", format!("{max_norm} is not positive")));
    }
    let _no_grad = tch::no_grad_guard();
    let mut squares = Tensor::f_zeros([1], (Kind::Double, vs.device()))?;
    let mut variables: Vec<_> = vs.variables().into_iter().collect();
    // One order on every run, so that the sum is rounded alike.
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    let mut counted = Distinct::default();
    for (name, variable) in &variables {
        let grad = variable.grad();
        if grad.defined() && layout.counts(name) && counted.is_new(variable) {
            let square = grad.f_to_kind(Kind::Double)?.f_square()?.f_sum(Kind::Double)?;
            let _ = squares.f_add_(&square)?;
        }
    }
    group.all_reduce(&mut squares, ReduceOp::Sum)?;
    let norm = squares.f_double_value(&[0])?.sqrt();
    let scale = max_norm / (norm + 1e-6);
    if norm.is_finite() && scale < 1.0 {
        scale_gradients(vs, scale)?;
    }
    Ok(norm)
}

fn scale_gradients(vs: &nn::VarStore, scale: f64) -> Result<()> {
    let mut parameters = distinct(vs);
    keep_apart(&mut parameters)?;
    for parameter in &parameters {
        let mut grad = parameter.grad();
        if grad.defined() {
            let _ = grad.f_mul_scalar_(scale)?;
        }
    }
    Ok(())
}

/// Finds tensors that were there before: one may be registered under several names.
#[derive(Default)]
struct Distinct(HashMap<usize, Vec<Tensor>>);

impl Distinct {
    fn is_new(&mut self, t: &Tensor) -> bool {
        let near = self.0.entry(t.data_ptr() as usize).or_default();
        let new = !near.iter().any(|other| libtorch::same(other, t));
        if new {
            near.push(t.shallow_clone());
        }
        new
    }
}

/// The trainable parameters, each once.
fn distinct(vs: &nn::VarStore) -> Vec<Tensor> {
    let mut seen = Distinct::default();
    vs.trainable_variables().into_iter().filter(|parameter| seen.is_new(parameter)).collect()
}

/// Gives a gradient that lies in another one's memory its own, so that each may be written to. Autograd makes such:
/// with `a.unsqueeze(0) + b.unsqueeze(0)` one tensor becomes the gradient of both.
fn keep_apart(parameters: &mut [Tensor]) -> Result<()> {
    let mut spans = Vec::new();
    for (index, parameter) in parameters.iter().enumerate() {
        let grad = parameter.grad();
        if grad.defined() && !grad.is_sparse() && grad.numel() > 0 {
            let steps = grad.size().into_iter().zip(grad.stride()).map(|(n, stride)| (n - 1) * stride);
            let bytes = (1 + steps.sum::<i64>()) as usize * grad.kind().elt_size_in_bytes();
            let start = grad.data_ptr() as usize;
            spans.push((start, start + bytes, index));
        }
    }
    spans.sort_unstable();
    let mut end = 0;
    for (start, own_end, index) in spans {
        if start < end {
            let grad = parameters[index].grad();
            let mut copy = grad.f_empty_like()?;
            copy.f_copy_(&grad)?;
            set_grad(&mut parameters[index], Some(&copy))?;
        } else {
            end = own_end;
        }
    }
    Ok(())
}

/// Keeps the gradients of half-precision training away from zero: the loss is multiplied by a scale, the gradients
/// divided by it again; a step whose gradients overflowed anywhere is left out everywhere, and the scale halved.
///
/// After `growth_interval` good steps in a row the scale doubles. As `torch.amp.GradScaler`.
///
/// ```
/// use tch::{Device, Kind, nn, nn::OptimizerConfig};
/// use tch_distributed::{model_parallel::LossScaler, testing};
///
/// testing::run_threads(2, |group| {
///     let vs = nn::VarStore::new(Device::Cpu);
///     let w = vs.root().zeros("w", &[1]);
///     let mut optimizer = nn::Sgd::default().build(&vs, 1.0).unwrap();
///     let mut scaler = LossScaler::new(1024.0);
///     // Rank 1 overflows: nobody steps.
///     let slope = if group.rank() == 1 { f64::INFINITY } else { 1.0 };
///     (&w * slope * scaler.scale()).sum(Kind::Float).backward();
///     assert!(!scaler.unscale(&vs, &group).unwrap());
///     assert_eq!(scaler.scale(), 512.0);
///     # optimizer.zero_grad();
/// });
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct LossScaler {
    scale: f64,
    good_steps: usize,
    growth_interval: usize,
}

impl LossScaler {
    /// A scaler that begins with this scale (PyTorch's: 65536) and doubles it after 2000 good steps.
    pub fn new(scale: f64) -> Self {
        Self { scale, good_steps: 0, growth_interval: 2000 }
    }

    /// After how many good steps in a row the scale doubles.
    pub fn growth_interval(mut self, steps: usize) -> Self {
        self.growth_interval = steps.max(1);
        self
    }

    /// What the loss must be multiplied by
    /// ([`Pipeline::set_loss_scale`](super::pipeline::Pipeline::set_loss_scale)).
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Divides the gradients by the scale, and says whether they are finite on all ranks of `group` (the whole mesh):
    /// only then may the optimizer step. Adjusts the scale for the next step.
    ///
    /// # Errors
    /// Those of the group's collectives.
    pub fn unscale(&mut self, vs: &nn::VarStore, group: &ProcessGroup) -> Result<bool> {
        let _no_grad = tch::no_grad_guard();
        let mut bad = Tensor::f_zeros([1], (Kind::Float, vs.device()))?;
        for parameter in vs.trainable_variables() {
            let grad = parameter.grad();
            if grad.defined() {
                let odd = grad.f_isfinite()?.f_logical_not()?.f_any()?.f_to_kind(Kind::Float)?;
                bad = bad.f_maximum(&odd)?;
            }
        }
        group.all_reduce(&mut bad, ReduceOp::Max)?;
        if bad.f_double_value(&[0])? > 0.0 {
            self.scale /= 2.0;
            self.good_steps = 0;
            return Ok(false);
        }
        scale_gradients(vs, 1.0 / self.scale)?;
        self.good_steps += 1;
        if self.good_steps == self.growth_interval {
            self.good_steps = 0;
            self.scale *= 2.0;
        }
        Ok(true)
    }
}
