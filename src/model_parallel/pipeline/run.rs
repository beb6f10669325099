//! A pipeline at work.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;

use tch::{Device, Tensor};

use super::stats::{gather, now};
use super::tie::Tie;
use super::wire::{Key, Look, Wire, looks_of};
use super::{Action, Loss, Pass, Plan, Schedule, Slot, Stage, StepStats, Timeline};
use crate::autograd::backward_with_grad;
use crate::model_parallel::escape::catch;
use crate::{Error, ProcessGroup, Result};

/// A model given as stages on the ranks of a group, trained on micro-batches that flow through them.
///
/// Stage `s` of the whole model lives on rank `s % size`; each rank gives its own stages in order, and all ranks
/// give as many. `step` splits the batch along its first dimension, runs forwards and backwards as the schedule
/// says, and leaves in the parameters the gradients of the mean loss, added to those that were there, as
/// `backward` does. The optimizer is the user's.
///
/// Shapes need not be told: each message between stages says what it is, unless
/// [`fixed_shapes`](Self::fixed_shapes).
///
/// If a stage fails, the group is aborted, and every rank's `step` returns an error that names the rank and the stage.
///
/// ```
/// use tch::{Device, Kind, Reduction, Tensor, nn};
/// use tch_distributed::model_parallel::pipeline::{Pipeline, Schedule, Stage};
/// use tch_distributed::testing;
///
/// testing::run_threads(2, |group| {
///     let vs = nn::VarStore::new(Device::Cpu);
///     let stage = Stage::new(nn::linear(vs.root(), 4, 4, Default::default()));
///     let pipeline = Pipeline::new(vec![stage], 2, Schedule::OneFOneB, &group).unwrap();
///     let xs = Tensor::ones([6, 4], (Kind::Float, Device::Cpu));
///     let first = (group.rank() == 0).then_some(&xs);
///     let last = (group.rank() == 1).then_some(&xs);
///     let loss = pipeline.step(first, last, |ys: &Tensor, ts: &Tensor| ys.mse_loss(ts, Reduction::Mean)).unwrap();
///     assert_eq!(loss.is_some(), group.rank() == 1);
///     assert!(vs.trainable_variables().iter().all(|w| w.grad().defined()));
/// });
/// ```
#[doc(alias = "PipelineSchedule")]
pub struct Pipeline {
    stages: Vec<Stage>,
    plan: Plan,
    eval_plan: Plan,
    group: ProcessGroup,
    device: Device,
    wire: RefCell<Wire>,
    ties: RefCell<Vec<Tie>>,
    loss_scale: Cell<f64>,
    stats: RefCell<StepStats>,
}

/// What a stage keeps of a micro-batch between its forward and its backward.
struct Held {
    inputs: Vec<Tensor>,
    /// Which inputs want a gradient sent back.
    input_looks: Vec<Look>,
    /// Empty where the stage computes them again.
    outputs: Vec<Tensor>,
    output_looks: Vec<Look>,
    bytes: usize,
}

/// The loss of a micro-batch, of the last stage's outputs and the targets.
type LossOf<'a> = dyn FnMut(&[Tensor], &[Tensor]) -> Result<Tensor> + 'a;

/// One run of a plan.
struct Run<'a> {
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

impl Pipeline {
    /// This rank's stages (one, or several where the schedule takes them), in the order of the model.
    ///
    /// Every rank of the group calls it with as many stages, the same number of micro-batches and the same schedule.
    ///
    /// # Errors
    /// `InvalidArgument` for what the schedule cannot take, and on every rank where ranks differ; `Unsupported` for
    /// [`Schedule::ZeroBubble`], which exists as a [`Plan`] only; those of the group's collectives.
    pub fn new(
        stages: Vec<Stage>,
        micro_batches: usize,
        schedule: Schedule,
        group: &ProcessGroup,
    ) -> Result<Self> {
        let plan = Plan::new(schedule, group.size(), stages.len(), micro_batches)?;
        if schedule == Schedule::ZeroBubble {
            return Err(Error::Unsupported {
                backend: group.backend_name(),
                what: "running a zero-bubble schedule: it exists as a Plan".to_owned(),
            });
        }
        let mine = (stages.len(), micro_batches, schedule.to_string());
        let all = group.all_gather_object(&mine)?;
        if let Some(other) = all.iter().position(|a| *a != all[0]) {
            let reason = format!(
                "(stages, micro-batches, schedule) must be the same on all ranks, but rank 0 has {:?} and rank {other} {:?}",
                all[0], all[other]
            );
            return Err(Error::invalid("stages", reason));
        }
        let eval_plan = Plan::forward_only(group.size(), stages.len(), micro_batches)?;
        let wire = RefCell::new(Wire::new(group, Device::Cpu, micro_batches, false));
        Ok(Self {
            stages,
            plan,
            eval_plan,
            group: group.clone(),
            device: Device::Cpu,
            wire,
            ties: RefCell::default(),
            loss_scale: Cell::new(1.0),
            stats: RefCell::default(),
        })
    }

    /// Where tensors from other stages are put (default: the CPU).
    pub fn device(mut self, device: Device) -> Self {
        self.device = device;
        let wire = self.wire.borrow().again(device);
        self.wire.replace(wire);
        self
    }

    /// Exchange shapes at the first use only, in training and in evaluation each. Later batches must have the same
    /// shapes, or the step fails and says so. Saves a message for each micro-batch and lets tensors come in while
    /// another micro-batch is computed. Every rank gives the same.
    pub fn fixed_shapes(mut self, fixed: bool) -> Self {
        self.wire = RefCell::new(Wire::new(&self.group, self.device, self.plan.micro_batches(), fixed));
        self
    }

    /// Ties a weight that some stages share, such as the embedding of the first stage and the head of the last: each of
    /// their ranks holds a copy. The copies get the value of the first stage's now, and after each step the sum of
    /// all copies' gradients, so that the same optimizer keeps them equal.
    ///
    /// Every rank of the group calls it with the same `stages`; the ranks that have one of them give their copy. A rank
    /// that has several of the stages uses one tensor for all. A tied weight counts once in norms
    /// ([`Layout::mark_copy`](crate::model_parallel::tensor::Layout::mark_copy) on all ranks but the first).
    ///
    /// # Errors
    /// `InvalidArgument` for a stage that is not there, and on every rank where a copy is missing or differs in shape or
    /// kind; those of making a group.
    pub fn tie(&self, stages: &[usize], weight: Option<&Tensor>) -> Result<()> {
        if let Some(stage) = stages.iter().find(|&&s| s >= self.plan.stages()) {
            return Err(Error::invalid(
                "stages",
                format!("there is no stage {stage} of {}", self.plan.stages()),
            ));
        }
        let mut ranks: Vec<usize> = stages.iter().map(|s| s % self.plan.ranks()).collect();
        ranks.sort_unstable();
        ranks.dedup();
        self.ties.borrow_mut().extend(Tie::new(weight, &ranks, &self.group)?);
        Ok(())
    }

    /// Multiplies the loss before its backward (default: 1), for half precision. The loss that `step` gives stays
    /// what it is; the gradients must be divided again
    /// ([`LossScaler`](crate::model_parallel::LossScaler)).
    pub fn set_loss_scale(&self, scale: f64) {
        self.loss_scale.set(scale);
    }

    /// Forwards and backwards of one batch. `inputs` are needed where the first stage is, `targets` where the last
    /// is; elsewhere they are not looked at. `loss` gets the last stage's outputs and the targets of a micro-batch, and
    /// gives one number (or a result of one).
    ///
    /// Gives the mean loss over the micro-batches where the last stage is, elsewhere `None`.
    ///
    /// # Errors
    /// `InvalidArgument`, before anything is sent, where inputs or targets are missing or their first dimension does not
    /// divide by the micro-batches. Everything else ends the pipeline on all ranks: `Callback` on the rank whose stage
    /// failed, naming both; `PeerLost` on the others.
    pub fn step<L: Loss>(
        &self,
        inputs: Option<&Tensor>,
        targets: Option<&Tensor>,
        mut loss: impl FnMut(&Tensor, &Tensor) -> L,
    ) -> Result<Option<Tensor>> {
        let (inputs, targets) = (as_slice(&inputs), as_slice(&targets));
        self.step_with(&inputs, &targets, |ys, ts| one_and_one(ys, ts, &mut loss))
    }

    /// The same with any number of inputs and targets, each split along its first dimension.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn step_with<L: Loss>(
        &self,
        inputs: &[Tensor],
        targets: &[Tensor],
        mut loss: impl FnMut(&[Tensor], &[Tensor]) -> L,
    ) -> Result<Option<Tensor>> {
        let mut loss = |ys: &[Tensor], ts: &[Tensor]| loss(ys, ts).into_loss();
        let run = self.prepare(true, inputs, targets, &mut loss, false)?;
        let mut ties = self.ties.borrow_mut();
        ties.iter_mut().try_for_each(Tie::begin)?;
        let done = self.execute(&self.plan, run);
        let (losses, _) = match done {
            Ok(done) => done,
            Err(error) => {
                ties.iter_mut().try_for_each(Tie::undo)?;
                return Err(error);
            }
        };
        ties.iter_mut().try_for_each(Tie::end)?;
        mean(&losses)
    }

    /// The forwards only, without gradients and not in training: the mean loss where the last stage is.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn eval<L: Loss>(
        &self,
        inputs: Option<&Tensor>,
        targets: Option<&Tensor>,
        mut loss: impl FnMut(&Tensor, &Tensor) -> L,
    ) -> Result<Option<Tensor>> {
        let (inputs, targets) = (as_slice(&inputs), as_slice(&targets));
        let mut loss = |ys: &[Tensor], ts: &[Tensor]| one_and_one(ys, ts, &mut loss);
        let run = self.prepare(false, &inputs, &targets, &mut loss, false)?;
        let (losses, _) = tch::no_grad(|| self.execute(&self.eval_plan, run))?;
        mean(&losses)
    }

    /// The whole model's outputs where the last stage is, without gradients and not in training; the outputs of
    /// micro-batches are put together along their first dimension.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn forward(&self, inputs: Option<&Tensor>) -> Result<Option<Vec<Tensor>>> {
        let inputs = as_slice(&inputs);
        let mut loss = |_: &[Tensor], _: &[Tensor]| Ok(Tensor::new());
        let run = self.prepare(false, &inputs, &[], &mut loss, true)?;
        let (_, outputs) = tch::no_grad(|| self.execute(&self.eval_plan, run))?;
        let Some(first) = outputs.first() else { return Ok(None) };
        let whole = (0..first.len()).map(|i| {
            let parts: Vec<_> = outputs.iter().map(|micro| &micro[i]).collect();
            Ok(Tensor::f_cat(&parts, 0)?)
        });
        whole.collect::<Result<Vec<_>>>().map(Some)
    }

    /// The plan that steps follow.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// What this rank did in its last step.
    pub fn last_step(&self) -> StepStats {
        self.stats.borrow().clone()
    }

    /// The last step of all ranks as it was measured; every rank calls it, and one host's clock is assumed.
    ///
    /// # Errors
    /// Those of the group's collectives.
    pub fn measured(&self) -> Result<Timeline> {
        gather(&self.plan, &self.stats.borrow().slots, &self.group)
    }

    /// Whether this rank has the first stage, and whether it has the last.
    pub fn ends(&self) -> (bool, bool) {
        (self.group.rank() == 0, self.group.rank() + 1 == self.group.size())
    }

    fn prepare<'a>(
        &self,
        train: bool,
        inputs: &[Tensor],
        targets: &[Tensor],
        loss: &'a mut LossOf<'a>,
        keep_outputs: bool,
    ) -> Result<Run<'a>> {
        let (first, last) = self.ends();
        let m = self.plan.micro_batches();
        let inputs = if first { micro_batches("inputs", inputs, m)? } else { Vec::new() };
        let targets = if last && !keep_outputs { micro_batches("targets", targets, m)? } else { Vec::new() };
        Ok(Run {
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
        })
    }

    /// Does what the plan says, one action after another. The first failure ends the pipeline on all ranks.
    fn execute(&self, plan: &Plan, mut run: Run<'_>) -> Result<(Vec<Tensor>, Vec<Vec<Tensor>>)> {
        let mut wire = self.wire.borrow_mut();
        run.stats.start = now();
        let actions = plan.actions(self.group.rank());
        for (i, &action) in actions.iter().enumerate() {
            let done = self.expect_next(&mut wire, &run, actions.get(i + 1).copied()).and_then(|()| {
                match action.pass {
                    Pass::Forward => self.forward_one(&mut wire, &mut run, action),
                    _ => self.backward_one(&mut wire, &mut run, action),
                }
            });
            if let Err(error) = done {
                *wire = wire.again(self.device);
                return Err(self.failed(&action.to_string(), error));
            }
        }
        if let Err(error) = wire.settle(true) {
            *wire = wire.again(self.device);
            return Err(self.failed("last sends of the step", error));
        }
        run.stats.end = now();
        run.stats.bytes_sent = wire.take_bytes_sent();
        self.stats.replace(run.stats);
        Ok((run.losses, run.outputs))
    }

    /// Ends the pipeline everywhere, and says where it failed.
    fn failed(&self, doing: &str, error: Error) -> Error {
        let rank = self.group.rank();
        match error {
            Error::PeerLost { rank: lost, op, source } => {
                let stages: Vec<_> =
                    (0..self.stages.len()).map(|c| (c * self.group.size() + lost).to_string()).collect();
                let op = match op.contains("stage") {
                    true => op,
                    false => format!(
                        "{op} (it has stage {}; rank {rank} was in the {doing})",
                        stages.join(" and ")
                    ),
                };
                Error::PeerLost { rank: lost, op, source }
            }
            Error::Poisoned { cause } => match cause.duplicate() {
                cause @ Error::PeerLost { .. } => self.failed(doing, cause),
                _ => Error::Poisoned { cause },
            },
            other if other.poisons() => other,
            other => {
                let source = Some(std::io::Error::other(other.to_string()));
                self.group.abort_because(Error::PeerLost { rank, op: format!("the {doing}"), source });
                Error::Callback { reason: format!("rank {rank}, {doing}: {other}") }
            }
        }
    }

    fn rank_of(&self, stage: usize) -> usize {
        stage % self.group.size()
    }

    /// Lets the next action's tensors come in already, where it is known what they look like.
    fn expect_next(&self, wire: &mut Wire, run: &Run<'_>, next: Option<Action>) -> Result<()> {
        let Some(Action { pass, stage, micro_batch }) = next else { return Ok(()) };
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
        let outputs = if recompute { tch::no_grad(|| compute(run))? } else { compute(run)? };
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
            run.held.insert((stage, micro_batch), Held { inputs, input_looks, outputs, output_looks, bytes });
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
            held.outputs = tch::with_grad(|| self.compute(run, action, &held.inputs))?;
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

impl fmt::Debug for Pipeline {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pipeline")
            .field("stages", &self.stages)
            .field("schedule", &self.plan.schedule())
            .field("micro_batches", &self.plan.micro_batches())
            .field("group", &self.group)
            .finish_non_exhaustive()
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

fn as_slice(t: &Option<&Tensor>) -> Vec<Tensor> {
    t.iter().map(|t| t.shallow_clone()).collect()
}

fn one_and_one<L: Loss>(
    ys: &[Tensor],
    ts: &[Tensor],
    loss: &mut impl FnMut(&Tensor, &Tensor) -> L,
) -> Result<Tensor> {
    match (ys, ts) {
        ([y], [t]) => loss(y, t).into_loss(),
        _ => {
            let reason = format!("the last stage gives {} tensors: use step_with", ys.len());
            Err(Error::invalid("loss", reason))
        }
    }
}

/// Each tensor cut along its first dimension, as one list a micro-batch.
fn micro_batches(argument: &'static str, tensors: &[Tensor], count: usize) -> Result<Vec<Vec<Tensor>>> {
    if tensors.is_empty() {
        let which = if argument == "inputs" { "first" } else { "last" };
        return Err(Error::invalid(argument, format!("the rank with the {which} stage must give them")));
    }
    let mut all: Vec<Vec<Tensor>> = (0..count).map(|_| Vec::new()).collect();
    for t in tensors {
        let size = t.size();
        let batch = size.first().copied().unwrap_or(0);
        if batch == 0 || batch % count as i64 != 0 {
            let reason = format!("the first dimension of {size:?} must divide by the {count} micro-batches");
            return Err(Error::invalid(argument, reason));
        }
        let each = batch / count as i64;
        for (i, micro) in all.iter_mut().enumerate() {
            micro.push(t.f_narrow(0, i as i64 * each, each)?);
        }
    }
    Ok(all)
}

fn mean(losses: &[Tensor]) -> Result<Option<Tensor>> {
    match losses.is_empty() {
        true => Ok(None),
        false => {
            let losses = losses.iter().map(|l| l.f_reshape([1])).collect::<Result<Vec<_>, _>>()?;
            let all = Tensor::f_cat(&losses, 0)?;
            Ok(Some(all.f_mean(all.kind())?))
        }
    }
}
