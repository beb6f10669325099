//! Averages gradients while backward runs.
//!
//! A hook on every parameter says when its gradient is there. When a bucket has all of its own, and the
//! buckets before it have gone, its exchange starts; backward goes on meanwhile. At the end of backward
//! what is left is sent, the last bucket always, everything is waited for, and the ranks learn from the
//! flags (see [`unused`](super::unused)) whether all is well. This file follows a backward; what is sent and
//! how it ends is in [`exchange`](super::exchange).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, ReentrantMutex};
use tch::{Device, Kind, Tensor};

use super::DdpOptions;
use super::apart::keep_apart;
use super::buckets::{self, Item, Plan};
use super::hooks::CommHook;
use super::layout::{Member, Role};
use super::state::{Parameter, State};
use super::step::Step;
use crate::autograd::{self, HookHandle};
use crate::libtorch;
use crate::process_group::ProcessGroup;
use crate::{Error, Result};

pub(super) struct Reducer {
    pub(super) group: ProcessGroup,
    pub(super) options: DdpOptions,
    pub(super) state: Mutex<State>,
    /// Held by the thread that runs a communication hook, which holds `state` too as a rule: what the hook
    /// does to this model is refused, where it would wait for itself.
    pub(super) hooking: ReentrantMutex<()>,
    /// Inside `no_sync`.
    paused: AtomicBool,
    /// Whether the last forward that recorded a graph was outside of `no_sync`.
    synced_forward: AtomicBool,
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
        let mut state = State {
            parameters,
            plan: Plan::default(),
            learned: false,
            expected: vec![1; count],
            used: vec![false; count],
            flats: Vec::new(),
            views: Vec::new(),
            step: None,
            ends_itself: false,
            hook: None,
        };
        state.set_plan(&buckets::reverse_order(count), options, group)?;
        Ok(Arc::new(Self {
            group: group.clone(),
            options: options.clone(),
            state: Mutex::new(state),
            hooking: ReentrantMutex::new(()),
            paused: AtomicBool::new(false),
            synced_forward: AtomicBool::new(true),
        }))
    }

    /// Listens to every parameter, as long as the handles live.
    pub(super) fn listen(self: &Arc<Self>) -> Result<Vec<HookHandle>> {
        let mut handles = Vec::new();
        for (index, parameter) in self.state.lock().parameters.iter().enumerate() {
            handles.push(keep_apart(&parameter.tensor)?);
            // A strong reference would be a circle: the hook belongs to the tensor, which is ours.
            let reducer = Arc::downgrade(self);
            handles.push(autograd::on_grad_accumulated(&parameter.tensor, move |_| {
                reducer.upgrade().map_or(Ok(()), |reducer| reducer.arrived(index))
            })?);
        }
        Ok(handles)
    }

    /// Turns `no_sync` on or off; gives what it was.
    pub(super) fn set_paused(&self, on: bool) -> bool {
        self.paused.swap(on, Ordering::Relaxed)
    }

    /// The backwards from here on are parts of steps that the caller ends; none is exchanged until it says so.
    pub(super) fn hold(&self) {
        self.set_paused(true);
        self.state.lock().ends_itself = true;
    }

    /// A forward that records a graph is about to run; gives whether it is outside of `no_sync`.
    pub(super) fn note_forward(&self) -> bool {
        let synced = !self.paused.load(Ordering::Relaxed);
        self.synced_forward.store(synced, Ordering::Relaxed);
        synced
    }

    /// Whether a backward now is exchanged.
    fn exchanges(&self) -> bool {
        !self.paused.load(Ordering::Relaxed) && self.synced_forward.load(Ordering::Relaxed)
    }

    /// Replaces the average of a bucket.
    pub(super) fn set_hook(&self, hook: Box<dyn CommHook>) -> Result<()> {
        let under_way = || Error::invalid("hook", "a backward is under way: set the hook between steps");
        if self.hooking.is_owned_by_current_thread() {
            return Err(under_way());
        }
        let mut state = self.state.lock();
        if state.step.is_some() {
            return Err(under_way());
        }
        state.hook = Some(hook);
        Ok(())
    }

    /// Steps cannot be nested: refuses a forward or backward of this model within a backward.
    pub(super) fn refuse_inside_backward(&self, argument: &'static str) -> Result<()> {
        if libtorch::in_backward() || self.hooking.is_owned_by_current_thread() {
            return Err(Error::invalid(
                argument,
                "a DistributedDataParallel was called inside a backward (in a gradient hook, the backward of a \
                 Function, or a communication hook): call its module, or autograd::backward, there",
            ));
        }
        Ok(())
    }

    /// Ends a backward that failed on this rank, so that the ranks that wait for its buckets go on: they
    /// get an error of that backward, as this rank did.
    pub(super) fn settle(&self) -> Result<()> {
        if self.state.lock().step.is_none() {
            return Ok(());
        }
        self.finish(Some("the backward before this forward did not reach its end".to_owned())).map(drop)
    }

    /// Runs backward and ends the step, whatever becomes of backward.
    pub(super) fn backward(&self, loss: &Tensor) -> Result<()> {
        self.refuse_inside_backward("loss")?;
        self.settle()?;
        self.state.lock().ends_itself = true;
        let exchanges = self.exchanges();
        // A loss that no parameter took part in has nothing to run; it may be so on this rank alone.
        let runs = loss.requires_grad() || !exchanges;
        let result = if runs { autograd::backward(loss) } else { Ok(()) };
        self.state.lock().ends_itself = false;
        if !exchanges {
            return result;
        }
        let Err(error) = result else { return self.finish_step() };
        // The others are told; this rank knows better, whatever else goes wrong now.
        if let Err(later) = self.finish(Some(error.to_string())) {
            tracing::debug!(%later, "data parallel: a step that failed could not be ended in good order");
        }
        Err(error)
    }

    /// The end of a backward that did not fail here.
    pub(super) fn finish_step(&self) -> Result<()> {
        self.finish(None)?.map_or(Ok(()), Err)
    }

    /// A gradient has been accumulated.
    fn arrived(self: &Arc<Self>, index: usize) -> Result<()> {
        if self.hooking.is_owned_by_current_thread() {
            return Err(Error::Callback {
                reason: "a communication hook ran a backward through the model whose gradients it exchanges"
                    .into(),
            });
        }
        let mut guard = self.state.lock();
        let state = &mut *guard;
        state.used[index] = true;
        if !self.exchanges() {
            return Ok(());
        }
        let mut step = match state.step.take() {
            Some(step) => step,
            None => {
                if !state.ends_itself {
                    let this = Arc::clone(self);
                    autograd::after_backward(move || this.finish_step())?;
                }
                Step::new(&state.plan, &state.expected)
            }
        };
        let result = self.advance(state, &mut step, index);
        state.step = Some(step);
        result
    }

    fn advance(&self, state: &mut State, step: &mut Step, index: usize) -> Result<()> {
        if state.parameters[index].tensor.grad().is_sparse() {
            return Err(Error::Unsupported {
                backend: "DistributedDataParallel".to_owned(),
                what: format!("the sparse gradient of {}", state.parameters[index].name),
            });
        }
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
        // Not the last one: its flags say whether this backward failed, and it may still do so.
        let last = state.plan.buckets.len() - 1;
        while step.next < last && step.pending[step.next] == 0 {
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
    pub(super) fn asks_for_use(&self, state: &State) -> bool {
        if self.options.static_graph { !state.learned } else { self.options.find_unused_parameters }
    }

    /// Parameters that should have a gradient on this rank and have none.
    pub(super) fn missing(&self, state: &State) -> Vec<usize> {
        if self.asks_for_use(state) {
            return Vec::new();
        }
        let planned = state.plan.buckets.iter().flatten().copied();
        let mut missing: Vec<usize> =
            planned.filter(|&index| state.expected[index] > 0 && !state.used[index]).collect();
        missing.sort_unstable();
        missing
    }
}
