//! A pipeline as its users see it.

use std::cell::{Cell, RefCell};
use std::fmt;

use tch::{Device, Tensor, nn};

use super::batch::{as_slice, join, mean, micro_batches, one_and_one};
use super::execute::{LossOf, Run};
use super::stats::gather;
use super::tie::Tie;
use super::wire::Wire;
use super::{Loss, Plan, Schedule, Stage, StepStats, Timeline};
use crate::data_parallel::{DdpOptions, PartwiseAverage};
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
/// If a stage fails, the group is aborted, and every rank's `step` returns an error that names the rank and the stage;
/// on a rank that has nothing left to do in this step, its next one. The groups in which this rank meets no other of
/// the pipeline end with it, so that nobody waits there: a tensor-parallel one, or that of the copies of the model.
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
    pub(super) stages: Vec<Stage>,
    pub(super) plan: Plan,
    eval_plan: Plan,
    pub(super) group: ProcessGroup,
    pub(super) device: Device,
    pub(super) wire: RefCell<Wire>,
    pub(super) ties: RefCell<Vec<Tie>>,
    pub(super) average: Option<PartwiseAverage>,
    pub(super) loss_scale: Cell<f64>,
    pub(super) stats: RefCell<StepStats>,
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
        // Before anything is refused: all ranks see the same, and so refuse the same.
        let mine = (stages.len(), micro_batches, schedule.to_string());
        let all = group.all_gather_object(&mine)?;
        if let Some(other) = all.iter().position(|a| *a != all[0]) {
            let reason = format!(
                "(stages, micro-batches, schedule) must be the same on all ranks, but rank 0 has {:?} and rank {other} {:?}",
                all[0], all[other]
            );
            return Err(Error::invalid("stages", reason));
        }
        let plan = Plan::new(schedule, group.size(), stages.len(), micro_batches)?;
        if schedule == Schedule::ZeroBubble {
            return Err(Error::Unsupported {
                backend: group.backend_name(),
                what: "running a zero-bubble schedule: it exists as a Plan".to_owned(),
            });
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
            average: None,
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

    /// Averages the gradients of `vs` over `copies` in every step, bucket by bucket, while the backward of the last
    /// micro-batch still runs. `copies` are the ranks that have the same stages in other copies of the model: of a
    /// mesh, its data axis. Begins by giving all copies the parameters of the group's rank 0.
    ///
    /// Every rank of `copies` calls it, with the same model and options. A parameter that several stages of this rank
    /// share needs [`static_graph`](DdpOptions::static_graph). Where a copy's pipeline fails, the others end with it.
    ///
    /// ```
    /// use tch::{Device, Kind, Reduction, Tensor, nn};
    /// use tch_distributed::data_parallel::DdpOptions;
    /// use tch_distributed::model_parallel::{DeviceMesh, pipeline::{Pipeline, Schedule, Stage}};
    /// use tch_distributed::testing;
    ///
    /// testing::run_threads(4, |world| {
    ///     let mesh = DeviceMesh::new(&world, &[("dp", 2), ("pp", 2)]).unwrap();
    ///     let vs = nn::VarStore::new(Device::Cpu);
    ///     let stage = Stage::new(nn::linear(vs.root(), 4, 4, Default::default()));
    ///     let pipeline = Pipeline::new(vec![stage], 2, Schedule::OneFOneB, &mesh.group("pp").unwrap())
    ///         .and_then(|p| p.data_parallel(&vs, &mesh.group("dp").unwrap(), DdpOptions::new()))
    ///         .unwrap();
    ///     // Each copy of the model has a batch of its own.
    ///     let xs = Tensor::ones([6, 4], (Kind::Float, Device::Cpu)) * mesh.rank("dp").unwrap() as f64;
    ///     pipeline.step(Some(&xs), Some(&xs), |ys: &Tensor, ts: &Tensor| ys.mse_loss(ts, Reduction::Mean)).unwrap();
    /// });
    /// ```
    ///
    /// # Errors
    /// Those of [`DistributedDataParallel::new`](crate::data_parallel::DistributedDataParallel::new).
    pub fn data_parallel(
        mut self,
        vs: &nn::VarStore,
        copies: &ProcessGroup,
        options: DdpOptions,
    ) -> Result<Self> {
        self.average = Some(PartwiseAverage::new(vs, copies, &options)?);
        Ok(self)
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
    /// gives one number (or a result of one). Where the last stage [recomputes](Stage::recompute), it is called twice
    /// for each micro-batch.
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
        let ties = self.ties.borrow();
        ties.iter().try_for_each(Tie::begin)?;
        let mut summed = 0;
        let done = self.train(run).and_then(|losses| {
            for tie in ties.iter() {
                let stages = self.stages_of(self.group.rank());
                let doing = format!("sum of the gradients of a weight that stage {stages} shares");
                tie.end().map_err(|error| self.failed(&doing, error))?;
                summed += 1;
            }
            mean(&losses)
        });
        if done.is_err() {
            ties[summed..].iter().try_for_each(Tie::undo)?;
        }
        done
    }

    /// Forwards and backwards, and the average over the copies of the model.
    fn train(&self, run: Run<'_>) -> Result<Vec<Tensor>> {
        let Some(average) = &self.average else { return Ok(self.execute(&self.plan, run)?.0) };
        let averaging = |error| {
            let stages = self.stages_of(self.group.rank());
            self.failed(&format!("averaging of the gradients of stage {stages} over the copies"), error)
        };
        let done = average.begin().map_err(averaging).and_then(|()| {
            let (losses, _) = self.execute(&self.plan, run)?;
            average.end().map_err(averaging)?;
            Ok(losses)
        });
        done.inspect_err(|error| average.give_up(error))
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
        join(&outputs)
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
        Ok(Run::new(train, inputs, targets, loss, keep_outputs))
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
