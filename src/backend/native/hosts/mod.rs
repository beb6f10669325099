//! Ranks on several hosts: collectives in stages, on each host through its shared memory, between hosts
//! over sockets. [`super::plan::hosts`] says which; this runs them.

mod run;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use tch::{Kind, Tensor};

use self::run::HostsRun;
use super::plan::hosts::Layout;
use super::shm::SharedMemory;
use super::tcp::Sockets;
use super::transport::{Run, Stamp, Transport, Watch};
use crate::Result;
use crate::backend::Call;

/// The transport of one rank of a group of several hosts.
pub(crate) struct Hosts {
    inner: Arc<Inner>,
}

struct Inner {
    rank: usize,
    layout: Layout,
    /// To the ranks of this host; `None` where there are no others.
    local: Option<SharedMemory>,
    /// To those of other hosts.
    away: Sockets,
    /// Whether the call under way is in a stage on this host.
    at_home: AtomicBool,
    /// Scratch of calls that have ended.
    spare: Mutex<Vec<Tensor>>,
}

impl Hosts {
    pub(crate) fn new(rank: usize, layout: Layout, local: Option<SharedMemory>, away: Sockets) -> Self {
        let at_home = AtomicBool::new(false);
        Self { inner: Arc::new(Inner { rank, layout, local, away, at_home, spare: Mutex::default() }) }
    }
}

impl Inner {
    /// Where the call under way waits.
    fn here(&self) -> &dyn Transport {
        match &self.local {
            Some(local) if self.at_home.load(Ordering::Acquire) => local,
            _ => &self.away,
        }
    }
}

impl Transport for Hosts {
    fn start<'a>(&self, call: Call<'a>, stamp: Stamp) -> Result<Box<dyn Run + 'a>> {
        Ok(Box::new(HostsRun::new(self.inner.clone(), call.into_owned(), stamp)?))
    }

    fn allocate(&self, size: &[i64], kind: Kind) -> Option<Result<Tensor>> {
        self.inner.local.as_ref()?.allocate(size, kind)
    }

    fn park(&self, until: Instant) {
        self.inner.here().park(until);
    }

    fn interrupt(&self) {
        if let Some(local) = &self.inner.local {
            local.interrupt();
        }
        self.inner.away.interrupt();
    }

    fn fail(&self) {
        if let Some(local) = &self.inner.local {
            local.fail();
        }
        self.inner.away.fail();
    }

    fn watch(&self, set: &mut Vec<Watch>) -> bool {
        self.inner.here().watch(set)
    }
}
