//! Ranks as threads of one process: messages are lent, not copied; a receiver reads straight from the
//! sender's buffer.

mod event;
mod link;
mod mail;
mod room;

use std::sync::Arc;
use std::time::Instant;

pub(crate) use room::{JOIN_GRACE, Room, Seat};

use self::link::ThreadLinks;
use super::executor::{Executor, Wiring};
use super::plan::Tuning;
use super::transport::{Run, Stamp, Transport, Watch};
use crate::Result;
use crate::backend::Call;

/// The transport of one rank of a room.
pub(crate) struct Threads {
    seat: Arc<Seat>,
    wiring: Arc<Wiring<ThreadLinks>>,
}

impl Threads {
    pub(crate) fn new(seat: Arc<Seat>, tuning: Tuning) -> Self {
        let links = ThreadLinks::new(seat.clone());
        let wiring = Wiring::new(seat.rank(), seat.size(), tuning, links);
        Self { seat, wiring: Arc::new(wiring) }
    }
}

impl Transport for Threads {
    fn start<'a>(&self, call: Call<'a>, stamp: Stamp) -> Result<Box<dyn Run + 'a>> {
        Ok(Box::new(Executor::new(self.wiring.clone(), call, stamp)?))
    }

    fn park(&self, until: Instant) {
        self.seat.event().park(until);
    }

    fn interrupt(&self) {
        self.seat.event().notify();
    }

    fn watch(&self, _set: &mut Vec<Watch>) -> bool {
        // Every event of a room nudges the progress engine.
        true
    }
}
