//! What is known between steps, and what a rank sends for each parameter.

use tch::Tensor;

use super::DdpOptions;
use super::buckets::{self, Item, Plan};
use super::hooks::CommHook;
use super::step::{Step, Substitute};
use crate::{ProcessGroup, Result, autograd};

const MIB: f64 = 1_048_576.0;

/// A parameter whose gradient is averaged.
pub(super) struct Parameter {
    pub(super) name: String,
    pub(super) tensor: Tensor,
    pub(super) item: Item,
}

/// Everything that holds tensors: they may change threads, but not be seen by two at once.
pub(super) struct State {
    pub(super) parameters: Vec<Parameter>,
    pub(super) plan: Plan,
    /// Whether the plan follows the order of a first backward, and, with a static graph, its use.
    pub(super) learned: bool,
    /// How often each gradient arrives in a backward. 0: never, on this rank.
    pub(super) expected: Vec<u32>,
    /// Which parameters have been used since the last exchange, under `no_sync` too.
    pub(super) used: Vec<bool>,
    /// The flat buffer of each bucket and the part of it for each parameter, where gradients live there.
    pub(super) flats: Vec<Tensor>,
    pub(super) views: Vec<Option<Tensor>>,
    /// The exchange under way.
    pub(super) step: Option<Step>,
    /// Inside `DistributedDataParallel::backward`, which ends the step itself.
    pub(super) ends_itself: bool,
    pub(super) hook: Option<Box<dyn CommHook>>,
}

impl State {
    /// What this rank sends for a parameter: its gradient, in place, or a substitute.
    pub(super) fn contribution(&self, step: &mut Step, index: usize) -> Result<Tensor> {
        let parameter = &self.parameters[index];
        let gradient = parameter.tensor.grad();
        let view = self.views.get(index).and_then(Option::as_ref);
        let own = gradient.defined() && !gradient.is_sparse();
        if own && self.used[index] {
            let gradient = if gradient.requires_grad() { gradient.detach() } else { gradient };
            let Some(view) = view else { return Ok(gradient) };
            if gradient.data_ptr() != view.data_ptr() {
                view.shallow_clone().f_copy_(&gradient)?;
                autograd::set_grad(&mut parameter.tensor.shallow_clone(), Some(view))?;
            }
            return Ok(view.shallow_clone());
        }
        let mut original = None;
        let sent = match view {
            Some(view) if own => {
                original = Some(gradient.f_detach_copy()?);
                let mut view = view.shallow_clone();
                view.f_copy_(&gradient)?;
                view
            }
            Some(view) => view.shallow_clone().f_zero_()?,
            None if own => gradient.f_detach_copy()?,
            None => parameter.tensor.f_zeros_like()?.detach(),
        };
        step.substitutes.push(Substitute { index, sent: sent.shallow_clone(), original });
        Ok(sent)
    }

    /// Makes buckets in this order.
    pub(super) fn set_plan(
        &mut self,
        order: &[usize],
        options: &DdpOptions,
        group: &ProcessGroup,
    ) -> Result<()> {
        let items: Vec<Item> = self.parameters.iter().map(|parameter| parameter.item).collect();
        let bytes = |mb: f64| (mb * MIB) as usize;
        let plan = buckets::plan(order, &items, bytes(options.first_bucket_mb), bytes(options.bucket_cap_mb));
        if plan == self.plan {
            return Ok(());
        }
        if options.gradient_as_bucket_view {
            (self.flats, self.views) = flat_buffers(&self.parameters, &plan, group)?;
        }
        self.plan = plan;
        Ok(())
    }
}

/// A flat buffer a bucket, in memory that suits the group, and each parameter's part of it.
fn flat_buffers(
    parameters: &[Parameter],
    plan: &Plan,
    group: &ProcessGroup,
) -> Result<(Vec<Tensor>, Vec<Option<Tensor>>)> {
    let mut flats = Vec::with_capacity(plan.buckets.len());
    let mut views: Vec<Option<Tensor>> = parameters.iter().map(|_| None).collect();
    for members in &plan.buckets {
        let like = &parameters[members[0]].tensor;
        let numel: usize = members.iter().map(|&m| parameters[m].tensor.numel()).sum();
        let flat = group.allocate_tensor(&[numel as i64], (like.kind(), like.device()))?.f_zero_()?;
        let mut start = 0;
        for &member in members {
            let tensor = &parameters[member].tensor;
            let numel = tensor.numel() as i64;
            // `data`: no view to autograd, so that optimizers may detach and zero it in place.
            let view = flat.f_narrow(0, start, numel)?.f_view(tensor.size().as_slice())?;
            views[member] = Some(view.data());
            start += numel;
        }
        flats.push(flat);
    }
    Ok((flats, views))
}
