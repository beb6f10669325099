//! Which other rank's process has gone, for a receive from any rank: Gloo ends what waits for one rank when its
//! connection closes, and not what waits for any. So where such a receive takes long, one that nobody will ever send to
//! is posted for each other rank of this crate, and its end tells.
//!
//! A rank that leaves in good order says so before, in the store: then others may still send.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tch::{Device, Kind, Tensor};

use super::combine::Flavor;
use super::engine::{CUT_TAG, Shared, alone_at_the_recorder, millis};
use super::waiters;
use crate::libtorch::{C10dWork, Told};

/// What nobody sends.
pub(super) const WATCH_TAG: i32 = CUT_TAG - 1;

#[derive(Default)]
pub(super) struct Peers(Mutex<State>);

#[derive(Default)]
struct State {
    watched: bool,
    ended: bool,
    works: Vec<Arc<C10dWork>>,
    /// The first that went without a word.
    gone: Option<usize>,
}

impl Peers {
    /// Whether this is the first to watch them.
    fn begin(&self) -> bool {
        let mut state = self.0.lock();
        !state.ended && !std::mem::replace(&mut state.watched, true)
    }

    /// Whether it is to be waited for: not where the watch has ended.
    fn add(&self, work: &Arc<C10dWork>) -> bool {
        let mut state = self.0.lock();
        if !state.ended {
            state.works.push(work.clone());
        }
        !state.ended
    }

    /// Ends the watch: connections close from now on.
    pub(super) fn end(&self) {
        let works = {
            let mut state = self.0.lock();
            state.ended = true;
            std::mem::take(&mut state.works)
        };
        for work in works {
            if let Err(text) = work.abort() {
                tracing::debug!("abort of a watch: {text}");
            }
        }
    }

    /// The rank that went without a word, where one is known.
    pub(super) fn gone(&self) -> Option<usize> {
        self.0.lock().gone
    }

    /// Whether that is news.
    fn lose(&self, rank: usize) -> bool {
        let mut state = self.0.lock();
        let news = !state.ended && state.gone.is_none();
        if news {
            state.gone = Some(rank);
        }
        news
    }
}

impl Shared {
    /// From now on a rank of this crate whose process goes ends the group. Gloo's; one thread for each rank.
    pub(super) fn watch_peers(self: &Arc<Self>) {
        if self.flavor != Flavor::Gloo || !self.peers.begin() {
            return;
        }
        let absent = self.witness.absent();
        let own = self.witness.rank;
        for rank in (0..self.witness.size).filter(|rank| *rank != own && !absent.contains(rank)) {
            let work = match self.listen_to(rank) {
                Ok(work) => Arc::new(work),
                Err(text) => {
                    self.closed(rank, &text);
                    continue;
                }
            };
            if !self.peers.add(&work) {
                return;
            }
            let shared = Arc::downgrade(self);
            waiters::run(move || {
                let ended = work.wait(millis(Duration::MAX));
                drop(work);
                if let (Err(text), Some(shared)) = (ended, shared.upgrade()) {
                    shared.closed(rank, &text);
                }
            });
        }
    }

    fn listen_to(&self, rank: usize) -> Told<C10dWork> {
        let backend = self.backend.as_ref().ok_or("the group is gone")?;
        let place = Tensor::f_empty([1], (Kind::Uint8, Device::Cpu)).map_err(|error| error.to_string())?;
        let _order = self.order.lock();
        let _alone = alone_at_the_recorder();
        backend.recv(&place, Some(rank), WATCH_TAG)
    }

    /// The connection to a rank has closed.
    fn closed(&self, rank: usize, text: &str) {
        // Gloo closes all connections of a rank where one of its operations times out: that says nothing of others.
        if text.contains("Application timeout") {
            return;
        }
        // Where the store does not answer nobody knows whether the rank went in good order.
        if self.cause().is_none() && matches!(self.witness.has_left(rank), Ok(false)) && self.peers.lose(rank)
        {
            tracing::debug!(rank, "a rank went without a word");
            self.cut();
        }
    }
}
