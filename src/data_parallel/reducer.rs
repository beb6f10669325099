//! Averages gradients while backward runs.
//!
//! A hook on every parameter says when its gradient is there. When a bucket has all of its own, and the
//! buckets before it have gone, its exchange starts; backward goes on meanwhile. At the end of backward
//! what is left is sent, everything is waited for, and the ranks learn from the flags (see
//! [`unused`](super::unused)) whether all is well.

use std::sync::Arc;

use parking_lot::Mutex;
use tch::{Device, Kind, Tensor};

use super::DdpOptions;
use super::buckets::{self, Item, Plan};
use super::hooks::{CommHook, GradBucket};
use super::layout::{Member, Role};
use super::state::{Parameter, State};
use super::step::{Step, Substitute};
use super::unused::{Flags, Report, explain};
use crate::autograd::{self, HookHandle};
use crate::process_group::ProcessGroup;
use crate::{Error, ReduceOp, Result};

pub(super) struct Reducer {
    group: ProcessGroup,
    options: DdpOptions,
    state: Mutex<State>,
}

impl Reducer {
    pub(super) fn new(members: &[Member], group: &ProcessGroup, options: &DdpOptions) -> Result<Arc<Self>> {
        let mut classes: Vec<(Kind, Device)> = Vec::new();
        let mut parameters = Vec::new();
        for member in members.iter().filter(|member| member.role == Role::Trained) {
            let tensor = member.tensor.shallow_clone();
            let class = (tensor.kind(), tensor.device());
            let known = classes.iter().position(|&c| c == class).unwrap_or_else(|| {
                classes.push(class);
                classes.len() - 1
            });
            let bytes = tensor.numel() * class.0.elt_size_in_bytes();
            parameters.push(Parameter {
                name: member.name.clone(),
                tensor,
                item: Item { bytes, class: known },
            });
        }
        let count = parameters.len();
        let reducer = Self {
            group: group.clone(),
            options: options.clone(),
            state: Mutex::new(State {
                parameters,
                plan: Plan::default(),
                learned: false,
                expected: vec![1; count],
                used: vec![false; count],
                flats: Vec::new(),
                views: Vec::new(),
                step: None,
                paused: false,
                synced_forward: true,
                ends_itself: false,
                hook: None,
                probe: Tensor::f_zeros([], (Kind::Float, Device::Cpu))?.f_requires_grad_(true)?,
            }),
        };
        reducer.state.lock().set_plan(&buckets::reverse_order(count), options, group)?;
        Ok(Arc::new(reducer))
    }

    /// Listens to every parameter, as long as the handles live.
    pub(super) fn listen(self: &Arc<Self>) -> Result<Vec<HookHandle>> {
        let listen = |(index, parameter): (usize, &Parameter)| {
            // A strong reference would be a circle: the hook belongs to the tensor, which is ours.
            let reducer = Arc::downgrade(self);
            autograd::on_grad_accumulated(&parameter.tensor, move |_| {
                reducer.upgrade().map_or(Ok(()), |reducer| reducer.arrived(index))
            })
        };
        self.state.lock().parameters.iter().enumerate().map(listen).collect()
    }

    /// Whether a forward now would record a graph.
    pub(super) fn gradients_are_recorded(&self) -> Result<bool> {
        Ok(self.state.lock().probe.f_neg()?.requires_grad())
    }

    pub(super) fn is_paused(&self) -> bool {
        self.state.lock().paused
    }

    /// Turns `no_sync` on or off; gives what it was.
    pub(super) fn set_paused(&self, on: bool) -> bool {
        std::mem::replace(&mut self.state.lock().paused, on)
    }

    /// The backwards from here on are parts of steps that the caller ends; none is exchanged until it says so.
    pub(super) fn hold(&self) {
        let mut state = self.state.lock();
        state.paused = true;
        state.ends_itself = true;
    }

    /// A forward that records a graph is about to run.
    pub(super) fn note_forward(&self, synced: bool) {
        self.state.lock().synced_forward = synced;
    }

    /// Replaces the average of a bucket.
    pub(super) fn set_hook(&self, hook: Box<dyn CommHook>) -> Result<()> {
        let mut state = self.state.lock();
        if state.step.is_some() {
            return Err(Error::invalid("hook", "a backward is under way: set the hook between steps"));
        }
        state.hook = Some(hook);
        Ok(())
    }

    /// Ends a backward that failed on this rank, so that the ranks that wait for its buckets go on: they
    /// get an error of that backward, as this rank did.
    pub(super) fn settle(&self) -> Result<()> {
        if self.state.lock().step.is_none() {
            return Ok(());
        }
        match self.finish(Some("the backward before this forward did not reach its end".to_owned())) {
            Err(Error::Callback { .. } | Error::UnusedParameters { .. }) | Ok(()) => Ok(()),
            Err(failure) => Err(failure),
        }
    }

    /// Runs backward and ends the step, whatever becomes of backward.
    pub(super) fn backward(&self, loss: &Tensor) -> Result<()> {
        self.settle()?;
        let exchanges = {
            let mut state = self.state.lock();
            state.ends_itself = true;
            state.exchanges()
        };
        // A loss that no parameter took part in has nothing to run; it may be so on this rank alone.
        let runs = loss.requires_grad() || !exchanges;
        let result = if runs { autograd::backward(loss) } else { Ok(()) };
        self.state.lock().ends_itself = false;
        match result {
            result if !exchanges => result,
            Ok(()) => self.finish(None),
            Err(error) if error.poisons() || matches!(error, Error::Poisoned { .. }) => {
                self.reset();
                Err(error)
            }
            Err(error) => match self.finish(Some(error.to_string())) {
                // The others are told; this rank knows better.
                Ok(()) | Err(Error::Callback { .. } | Error::UnusedParameters { .. }) => Err(error),
                Err(failure) => Err(failure),
            },
        }
    }

    /// A gradient has been accumulated.
    fn arrived(self: &Arc<Self>, index: usize) -> Result<()> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.used[index] = true;
        if !state.exchanges() {
            return Ok(());
        }
        if state.parameters[index].tensor.grad().is_sparse() {
            return Err(Error::Unsupported {
                backend: "DistributedDataParallel".to_owned(),
                what: format!("the sparse gradient of {}", state.parameters[index].name),
            });
        }
        let mut step = match state.step.take() {
            Some(step) => step,
            None => {
                if !state.ends_itself {
                    let this = Arc::clone(self);
                    autograd::after_backward(move || this.finish(None))?;
                }
                Step::new(&state.plan, &state.expected)
            }
        };
        let result = self.advance(state, &mut step, index);
        state.step = Some(step);
        result
    }

    fn advance(&self, state: &mut State, step: &mut Step, index: usize) -> Result<()> {
        step.fired[index] += 1;
        let fired = step.fired[index];
        if self.is_learning(state) {
            if fired == 1 {
                step.arrival.push(index);
            }
            return Ok(());
        }
        let expected = state.expected[index];
        if fired < expected {
            return Ok(());
        }
        let Some(bucket) = state.plan.bucket_of[index].filter(|_| fired == expected) else {
            return Err(Error::Callback { reason: self.too_often(state, index, fired, expected) });
        };
        step.arrival.push(index);
        step.pending[bucket] -= 1;
        while step.pending.get(step.next) == Some(&0) {
            self.launch(state, step, false)?;
        }
        Ok(())
    }

    fn too_often(&self, state: &State, index: usize, fired: u32, expected: u32) -> String {
        let name = &state.parameters[index].name;
        if self.options.static_graph {
            format!(
                "the gradient of {name} arrived {fired} times in this backward and {expected} in the first one, but \
                 static_graph(true) promises that the graph does not change"
            )
        } else {
            format!(
                "the gradient of {name} arrived {fired} times in one backward, so it was sent before it was complete: \
                 was a backward run inside backward? If every step does the same, static_graph(true) allows it"
            )
        }
    }

    /// In the first backward of a static graph nothing is sent before the end.
    fn is_learning(&self, state: &State) -> bool {
        self.options.static_graph && !state.learned
    }

    /// Whether the ranks tell one another which parameters they used.
    fn asks_for_use(&self, state: &State) -> bool {
        if self.options.static_graph { !state.learned } else { self.options.find_unused_parameters }
    }

    /// Parameters that should have a gradient on this rank and have none.
    fn missing(&self, state: &State) -> Vec<usize> {
        if self.asks_for_use(state) {
            return Vec::new();
        }
        let planned = state.plan.buckets.iter().flatten().copied();
        let mut missing: Vec<usize> =
            planned.filter(|&index| state.expected[index] > 0 && !state.used[index]).collect();
        missing.sort_unstable();
        missing
    }

    /// Sends the next bucket, with zeros for what it lacks.
    fn launch(&self, state: &mut State, step: &mut Step, failed: bool) -> Result<()> {
        let index = step.next;
        step.next += 1;
        let is_last = step.next == state.plan.buckets.len();
        let members = state.plan.buckets[index].clone();
        let mut gradients = tch::no_grad(|| {
            members.iter().map(|&member| state.contribution(step, member)).collect::<Result<Vec<_>>>()
        })?;
        if let Some(flat) = state.flats.get(index) {
            gradients = vec![flat.shallow_clone()];
        }
        tracing::trace!(bucket = index, gradients = gradients.len(), "data parallel: bucket sent");
        let flags = match is_last {
            false => None,
            true => {
                let trouble = failed || !self.missing(state).is_empty();
                let used = if self.asks_for_use(state) { state.used.clone() } else { Vec::new() };
                let like = &state.parameters[members[0]].tensor;
                Some(Flags { trouble, used }.to_tensor(like.kind(), like.device())?)
            }
        };
        step.flags = flags.as_ref().map(Tensor::shallow_clone);
        let Some(hook) = &mut state.hook else {
            gradients.extend(flags);
            let work = self.group.all_reduce_coalesced_async(&gradients, ReduceOp::Avg)?;
            step.exchanges.push(work.into());
            return Ok(());
        };
        let bucket = GradBucket {
            index,
            is_last,
            gradients,
            parameters: members.iter().map(|&m| state.parameters[m].tensor.shallow_clone()).collect(),
            names: members.iter().map(|&m| state.parameters[m].name.clone()).collect(),
        };
        let started = hook.start(bucket, &self.group);
        if let Some(flags) = flags {
            step.exchanges.push(self.group.all_reduce_async(&flags, ReduceOp::Avg)?.into());
        }
        step.exchanges.push(started?);
        Ok(())
    }

    /// The end of backward: sends what is left, waits for everything, and agrees with the other ranks on
    /// how it went. `failure` says why backward failed on this rank, where it did.
    pub(super) fn finish(&self, failure: Option<String>) -> Result<()> {
        let result = self.conclude(failure);
        self.reset();
        result
    }

    pub(super) fn reset(&self) {
        let mut state = self.state.lock();
        state.step = None;
        state.used.fill(false);
    }

    fn conclude(&self, failure: Option<String>) -> Result<()> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let mut step = state.step.take().unwrap_or_else(|| Step::new(&state.plan, &state.expected));
        let mut hook_failure = None;
        while step.next < state.plan.buckets.len() {
            match self.launch(state, &mut step, failure.is_some()) {
                Ok(()) => {}
                // A hook of the user's that failed on this rank alone must not keep the others waiting.
                Err(error @ Error::Callback { .. }) => hook_failure = Some(error),
                Err(error) => return Err(error),
            }
        }
        let missing = self.missing(state).into_iter().map(|m| state.parameters[m].name.clone()).collect();
        // Waiting is done without the lock.
        drop(guard);
        for exchange in std::mem::take(&mut step.exchanges) {
            exchange.finish()?;
        }
        let flags = Flags::from_tensor(step.flags.as_ref().unwrap_or(&Tensor::from_slice(&[1f32])))?;
        if flags.trouble {
            return Err(explain(&Report { missing, failure }, &self.group)?);
        }
        if let Some(error) = hook_failure {
            return Err(error);
        }
        self.accept(&step, &flags)?;
        self.learn(&step, &flags)
    }

    /// Gives parameters that only other ranks used the average; leaves alone those that none used.
    fn accept(&self, step: &Step, flags: &Flags) -> Result<()> {
        let state = self.state.lock();
        tch::no_grad(|| {
            for Substitute { index, sent, original } in &step.substitutes {
                let mut tensor = state.parameters[*index].tensor.shallow_clone();
                let mut gradient = tensor.grad();
                let used_somewhere = flags.used.get(*index).copied().unwrap_or(true);
                match (used_somewhere, gradient.defined(), original) {
                    (true, true, _) => gradient.f_copy_(sent).map(drop)?,
                    (true, false, _) => autograd::set_grad(&mut tensor, Some(sent))?,
                    (false, true, Some(original)) => gradient.f_copy_(original).map(drop)?,
                    (false, ..) => {}
                }
            }
            Ok(())
        })
    }

    /// After the first step: buckets in the order in which gradients arrived on rank 0.
    fn learn(&self, step: &Step, flags: &Flags) -> Result<()> {
        if self.state.lock().learned {
            return Ok(());
        }
        let own = (self.group.rank() == 0).then(|| step.arrival.clone());
        let arrived = match own {
            Some(own) if self.group.size() == 1 => own,
            own => self.group.broadcast_object(own, 0)?,
        };
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let mut order = buckets::arrival_order(&arrived, state.parameters.len());
        if self.options.static_graph {
            state.expected.clone_from(&step.fired);
            // What no rank used is not sent any more (if nothing was used at all, there is nothing to learn).
            if flags.used.contains(&true) {
                order.retain(|&index| flags.used[index]);
            }
        }
        state.learned = true;
        state.set_plan(&order, &self.options, &self.group)
    }
}
