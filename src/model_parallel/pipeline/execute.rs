//! Working off a plan: one action after another.

use std::collections::HashMap;

use tch::Tensor;

use super::stats::now;
use super::wire::{Key, Look, Wire, looks_of};
use super::{Action, Pass, Pipeline, Plan, Slot, StepStats};
use crate::autograd::backward_with_grad;
use crate::model_parallel::escape::catch;
use crate::random::Draws;
use crate::{Error, Result};

/// What a stage keeps of a micro-batch between its forward and its backward.
struct Held {
    inputs: Vec<Tensor>,
    /// Which inputs want a gradient sent back.
    input_looks: Vec<Look>,
    /// Empty where the stage computes them again.
    outputs: Vec<Tensor>,
    output_looks: Vec<Look>,
    /// What random numbers the forward began with, where the stage computes it again.
    draws: Draws,
    bytes: usize,
}

/// The loss of a micro-batch, of the last stage's outputs and the targets.
pub(super) type LossOf<'a> = dyn FnMut(&[Tensor], &[Tensor]) -> Result<Tensor> + 'a;

/// One run of a plan.
pub(super) struct Run<'a> {
    train: bool,
    inputs: Vec<Vec<Tensor>>,
    targets: Vec<Vec<Tensor>>,
    /// Micro-batches between forward and backward, by stage and micro-batch.
    held: HashMap<(usize, usize), Held>,
    /// What goes to a stage on this same rank.
    local: HashMap<Key, (Vec<Tensor>, Vec<Look>)>,
    loss: &'a mut LossOf<'a>,
    /// Evaluation without a loss gives the last stage's outputs, one row a micro-batch.
    keep_outputs: bool,
    outputs: Vec<Vec<Tensor>>,
    losses: Vec<Tensor>,
    stats: StepStats,
}

impl<'a> Run<'a> {
    pub(super) fn new(
        train: bool,
        inputs: Vec<Vec<Tensor>>,
        targets: Vec<Vec<Tensor>>,
        loss: &'a mut LossOf<'a>,
        keep_outputs: bool,
    ) -> Self {
        Self {
            train,
            inputs,
            targets,
            held: HashMap::new(),
            local: HashMap::new(),
            loss,
            keep_outputs,
            outputs: Vec::new(),
            losses: Vec::new(),
            stats: StepStats::default(),
        }
    }
}

impl Pipeline {
    /// Does what the plan says, one action after another. The first failure ends the pipeline on all ranks.
    pub(super) fn execute(&self, plan: &Plan, mut run: Run<'_>) -> Result<(Vec<Tensor>, Vec<Vec<Tensor>>)> {
        let mut wire = self.wire.borrow_mut();
        if let Err(error) = wire.open(plan) {
            return Err(self.end(&mut wire, "beginning of its first step", error));
        }
        run.stats.start = now();
        let actions = plan.actions(self.group.rank());
        for (i, &action) in actions.iter().enumerate() {
            let Action { stage, micro_batch, .. } = action;
            let pass = if action.pass == Pass::Forward { "forward" } else { "backward" };
            let _span =
                tracing::trace_span!(target: "tch_distributed", "pass", pass, stage, micro_batch).entered();
            // In the order of the plan: this action's tensors before the next one's.
            let due = [Some(action), actions.get(i + 1).copied()];
            let expected = due.into_iter().flatten().try_for_each(|due| self.expect(&mut wire, &run, due));
            let done = expected.and_then(|()| {
                if action.pass == Pass::Forward {
                    return self.forward_one(&mut wire, &mut run, action);
                }
                if let Some(average) = &self.average {
                    let more = |a: &Action| a.pass == action.pass && a.stage == action.stage;
                    average.exchange(!actions[i + 1..].iter().any(more));
                }
                self.backward_one(&mut wire, &mut run, action)
            });
            if let Err(error) = done {
                return Err(self.end(&mut wire, &action.to_string(), error));
            }
        }
        if let Err(error) = wire.settle(true) {
            let doing = format!("last sends of stage {}", self.stages_of(self.group.rank()));
            return Err(self.end(&mut wire, &doing, error));
        }
        run.stats.end = now();
        run.stats.bytes_sent = wire.take_bytes_sent();
        self.stats.replace(run.stats);
        Ok((run.losses, run.outputs))
    }

    /// Ends the pipeline everywhere, and what is under way.
    fn end(&self, wire: &mut Wire, doing: &str, error: Error) -> Error {
        let error = self.failed(doing, error);
        wire.give_up(&error.to_string());
        error
    }

    fn rank_of(&self, stage: usize) -> usize {
        stage % self.group.size()
    }

    /// Lets an action's tensors come in already, where it is known what they look like.
    fn expect(&self, wire: &mut Wire, run: &Run<'_>, action: Action) -> Result<()> {
        let Action { pass, stage, micro_batch } = action;
        let backward = pass != Pass::Forward;
        let key = Key { backward, stage, micro_batch };
        let src = match backward {
            false if stage == 0 => return Ok(()),
            false => self.rank_of(stage - 1),
            true if stage + 1 == self.plan.stages() => return Ok(()),
            true => self.rank_of(stage + 1),
        };
        match run.held.get(&(stage, micro_batch)) {
            _ if src == self.group.rank() => Ok(()),
            Some(held) if backward => wire.expect(key, src, &wanted(&held.output_looks)),
            _ if backward => Ok(()),
            _ => wire.expect_known(key, src, run.train),
        }
    }

    fn forward_one(&self, wire: &mut Wire, run: &mut Run<'_>, action: Action) -> Result<()> {
        let Action { stage, micro_batch, .. } = action;
        let body = &self.stages[stage / self.group.size()];
        let key = Key { backward: false, stage, micro_batch };
        let (inputs, input_looks) = if stage == 0 {
            (std::mem::take(&mut run.inputs[micro_batch]), Vec::new())
        } else if self.rank_of(stage - 1) == self.group.rank() {
            run.local.remove(&key).ok_or_else(|| lost("input"))?
        } else {
            wire.receive(key, self.rank_of(stage - 1), run.train)?
        };
        let inputs = inputs
            .into_iter()
            .enumerate()
            .map(|(i, t)| match input_looks.get(i).is_some_and(|l| l.wants_grad && run.train) {
                true => Ok(t.f_set_requires_grad(true)?),
                false => Ok(t),
            })
            .collect::<Result<Vec<_>>>()?;

        let start = now();
        let last = stage + 1 == self.plan.stages();
        let recompute = body.recompute && run.train;
        let compute = |run: &mut Run<'_>| self.compute(run, action, &inputs);
        let (outputs, draws) = match recompute {
            true => Draws::record(|| tch::no_grad(|| compute(run))),
            false => (compute(run), Draws::default()),
        };
        let outputs = outputs?;
        run.stats.slots.push(Slot { action, start, end: now() });

        let differentiable = |t: &Tensor| {
            run.train && (t.requires_grad() || (recompute && (t.is_floating_point() || t.is_complex())))
        };
        let output_looks = if last { Vec::new() } else { looks_of(&outputs, differentiable) };
        if last {
            match run.keep_outputs {
                true => run.outputs.push(outputs.iter().map(Tensor::shallow_clone).collect()),
                false => run.losses.push(outputs[0].f_detach()?),
            }
        } else {
            let next = Key { stage: stage + 1, ..key };
            if self.rank_of(stage + 1) == self.group.rank() {
                let passed = outputs.iter().map(Tensor::f_detach).collect::<Result<Vec<_>, _>>()?;
                run.local.insert(next, (passed, output_looks.clone()));
            } else {
                wire.send(next, self.rank_of(stage + 1), run.train, &outputs, &output_looks)?;
            }
        }
        if run.train {
            let outputs = if recompute { Vec::new() } else { outputs };
            let bytes = inputs.iter().chain(&outputs).map(|t| t.numel() * t.kind().elt_size_in_bytes()).sum();
            let held = Held { inputs, input_looks, outputs, output_looks, draws, bytes };
            run.held.insert((stage, micro_batch), held);
            let stats = &mut run.stats;
            stats.peak_in_flight = stats.peak_in_flight.max(run.held.len());
            stats.peak_held_bytes = stats.peak_held_bytes.max(run.held.values().map(|h| h.bytes).sum());
        }
        Ok(())
    }

    /// The stage's outputs; of the last stage the loss, where one is asked for.
    fn compute(&self, run: &mut Run<'_>, action: Action, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        let outputs = self.stages[action.stage / self.group.size()].run(inputs, run.train)?;
        if action.stage + 1 < self.plan.stages() || run.keep_outputs {
            return Ok(outputs);
        }
        let targets = &run.targets[action.micro_batch];
        let loss = catch(|| (run.loss)(&outputs, targets))?;
        match loss.numel() {
            1 => Ok(vec![loss]),
            _ => Err(Error::ShapeMismatch {
                argument: "loss",
                expected: "one number".to_owned(),
                got: format!("{:?}", loss.size()),
            }),
        }
    }

    fn backward_one(&self, wire: &mut Wire, run: &mut Run<'_>, action: Action) -> Result<()> {
        let Action { stage, micro_batch, .. } = action;
        let mut held = run.held.remove(&(stage, micro_batch)).ok_or_else(|| lost("forward"))?;
        let last = stage + 1 == self.plan.stages();
        let key = Key { backward: true, stage, micro_batch };
        let looks = wanted(&held.output_looks);
        let mut grads = if last {
            Vec::new()
        } else if self.rank_of(stage + 1) == self.group.rank() {
            run.local.remove(&key).ok_or_else(|| lost("gradient"))?.0
        } else {
            wire.receive_tensors(key, self.rank_of(stage + 1), &looks)?
        };

        let start = now();
        if held.outputs.is_empty() {
            let compute = || tch::with_grad(|| self.compute(run, action, &held.inputs));
            held.outputs = std::mem::take(&mut held.draws).repeat(compute)?;
        }
        let mut outputs: Vec<&Tensor> = if last {
            let scale = self.loss_scale.get() / self.plan.micro_batches() as f64;
            grads = vec![held.outputs[0].f_detach()?.f_full_like(scale)?];
            held.outputs.iter().collect()
        } else {
            held.outputs
                .iter()
                .zip(&held.output_looks)
                .filter(|(_, l)| l.wants_grad)
                .map(|(t, _)| t)
                .collect()
        };
        // Frozen stages at the front have nothing to differentiate.
        let mut keep = outputs.iter().map(|t| t.requires_grad()).collect::<Vec<_>>().into_iter();
        outputs.retain(|t| t.requires_grad());
        grads.retain(|_| keep.next().unwrap_or(true));
        if !outputs.is_empty() {
            backward_with_grad(&outputs, &grads.iter().collect::<Vec<_>>())?;
        }
        run.stats.slots.push(Slot { action, start, end: now() });
        if stage == 0 {
            return Ok(());
        }
        let back = held
            .inputs
            .iter()
            .zip(&held.input_looks)
            .filter(|(_, look)| look.wants_grad)
            .map(|(t, _)| if t.grad().defined() { Ok(t.grad()) } else { Ok(t.f_detach()?.f_zeros_like()?) })
            .collect::<Result<Vec<_>>>()?;
        let previous = Key { stage: stage - 1, ..key };
        if self.rank_of(stage - 1) == self.group.rank() {
            run.local.insert(previous, (back, Vec::new()));
            return Ok(());
        }
        wire.send_tensors(previous, self.rank_of(stage - 1), &back)
    }
}

/// The looks of those that want a gradient.
fn wanted(looks: &[Look]) -> Vec<Look> {
    looks.iter().filter(|l| l.wants_grad).cloned().collect()
}

/// A plan that was verified never asks for what is not there.
fn lost(what: &str) -> Error {
    Error::Callback { reason: format!("the plan needs a {what} that was not made") }
}
