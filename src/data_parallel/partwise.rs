//! Gradients whose backward comes in parts, as a pipeline's does: averaged while the last part still runs.

use std::sync::Arc;

use tch::{Tensor, nn};

use super::DdpOptions;
use super::buffers::broadcast_together;
use super::ddp::prepare;
use super::layout::Role;
use super::reducer::Reducer;
use crate::autograd::HookHandle;
use crate::{Error, ProcessGroup, Result};

/// The average over the copies of a model, of steps that somebody else divides into backwards.
pub(crate) struct PartwiseAverage {
    // First, so that hooks go before what they refer to.
    _hooks: Vec<HookHandle>,
    reducer: Arc<Reducer>,
    group: ProcessGroup,
    /// Given to every rank before each step; empty where that is not asked for.
    buffers: Vec<Tensor>,
}

impl PartwiseAverage {
    /// As `DistributedDataParallel::new`.
    pub(crate) fn new(vs: &nn::VarStore, group: &ProcessGroup, options: &DdpOptions) -> Result<Self> {
        let (members, reducer) = prepare(vs, group, options)?;
        let hooks = reducer.listen()?;
        reducer.hold();
        let buffers = members.into_iter().filter(|m| m.role == Role::Buffer && options.broadcast_buffers);
        let buffers = buffers.map(|member| member.tensor).collect();
        Ok(Self { _hooks: hooks, reducer, group: group.clone(), buffers })
    }

    /// A step begins.
    pub(crate) fn begin(&self) -> Result<()> {
        match self.buffers.is_empty() {
            true => Ok(()),
            false => broadcast_together(&self.buffers, &self.group),
        }
    }

    /// Whether the gradients of the backward that begins now are complete with it.
    pub(crate) fn exchange(&self, complete: bool) {
        self.reducer.set_paused(!complete);
    }

    /// The step's last backward is done: sends what is left, and waits for everything.
    pub(crate) fn end(&self) -> Result<()> {
        let ended = self.reducer.finish_step();
        // What is differentiated between steps is nobody else's business.
        self.reducer.hold();
        ended
    }

    /// The step failed on this rank, and what it should have sent will not come: the other copies end too.
    pub(crate) fn give_up(&self, error: &Error) {
        self.reducer.reset();
        self.reducer.hold();
        let source = Some(std::io::Error::other(error.to_string()));
        let op = "its copy of the model".to_owned();
        self.group.abort_because(Error::PeerLost { rank: self.group.rank(), op, source });
    }
}
