//! Ranks as processes, over sockets: two connections between any two ranks of a group, one for the
//! data of collectives, one for control and point-to-point. On one host they may be unix sockets.

mod address;
mod channel;
mod control;
mod data;
mod handshake;
mod messages;
mod stream;
mod streams;
mod wire;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

pub(crate) use address::Listen;
pub(crate) use control::SocketControl;
pub(crate) use handshake::{Channel, connect};

use self::data::SocketLinks;
use super::executor::{Executor, Wiring};
use super::limit;
use super::plan::{Plan, Tuning};
use super::transport::{Run, Stamp, Transport, Watch};
use crate::Result;
use crate::backend::Call;

/// The transport of one rank of one group.
pub(crate) struct Sockets {
    wiring: Arc<Wiring<SocketLinks>>,
    /// Ends a `park`.
    wake: OwnedFd,
    parked: AtomicBool,
    signalled: AtomicBool,
}

impl Sockets {
    /// `sockets[r]` leads to rank r; `None` for this rank.
    pub(crate) fn new(rank: usize, tuning: Tuning, sockets: Vec<Option<OwnedFd>>) -> Result<Self> {
        let world = sockets.len();
        let wiring = Arc::new(Wiring::new(rank, world, tuning, SocketLinks::new(sockets)));
        let wake =
            limit::explain(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(Into::into))?;
        Ok(Self { wiring, wake, parked: AtomicBool::new(false), signalled: AtomicBool::new(false) })
    }
}

impl Sockets {
    pub(crate) fn tuning(&self) -> &Tuning {
        &self.wiring.tuning
    }

    /// Begins a collective whose plan was made elsewhere.
    pub(crate) fn start_plan<'a>(
        &self,
        call: Call<'a>,
        stamp: Stamp,
        plan: Plan,
    ) -> Result<Box<dyn Run + 'a>> {
        Ok(Box::new(Executor::with_plan(self.wiring.clone(), call, stamp, plan)?))
    }
}

impl Transport for Sockets {
    fn start<'a>(&self, call: Call<'a>, stamp: Stamp) -> Result<Box<dyn Run + 'a>> {
        Ok(Box::new(Executor::new(self.wiring.clone(), call, stamp)?))
    }

    fn park(&self, until: Instant) {
        self.parked.store(true, Ordering::SeqCst);
        if !self.signalled.swap(false, Ordering::SeqCst) {
            let mut set = Vec::new();
            self.watch(&mut set);
            wait(&set, Some(&self.wake), until);
        }
        self.parked.store(false, Ordering::SeqCst);
        self.signalled.store(false, Ordering::SeqCst);
        // Nothing to read where nobody interrupted.
        let _ = rustix::io::read(&self.wake, &mut [0; 8]);
    }

    fn interrupt(&self) {
        self.signalled.store(true, Ordering::SeqCst);
        if self.parked.load(Ordering::SeqCst) {
            // The counter cannot overflow in the time of one sleep.
            let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
        }
    }

    fn watch(&self, set: &mut Vec<Watch>) -> bool {
        self.wiring.links.lock().watch(set);
        true
    }
}

/// Sleeps until a descriptor is ready or the time has come.
fn wait(set: &[Watch], wake: Option<&OwnedFd>, until: Instant) {
    let mut fds: Vec<PollFd<'_>> =
        set.iter().map(|w| PollFd::from_borrowed_fd(w.fd.as_fd(), w.flags())).collect();
    fds.extend(wake.map(|fd| PollFd::new(fd, PollFlags::IN)));
    let left = until.saturating_duration_since(Instant::now());
    let timeout = Timespec { tv_sec: left.as_secs() as _, tv_nsec: left.subsec_nanos().into() };
    // Interrupted: the caller looks around and comes again.
    let _ = poll(&mut fds, Some(&timeout));
}
