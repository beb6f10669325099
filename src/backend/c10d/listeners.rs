//! Gloo's receives from any rank. Gloo ends what waits for a rank when its connection closes, and not what waits for any:
//! that would last until its own timeout, however the group ended.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::libtorch::C10dWork;

#[derive(Default)]
pub(super) struct Listeners(Mutex<State>);

#[derive(Default)]
struct State {
    waiting: Vec<(Arc<C10dWork>, Instant)>,
    ended: bool,
}

/// A receive that is known of while this is there.
pub(super) struct Listening(Arc<Listeners>, Arc<C10dWork>);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.0.lock().waiting.retain(|(work, _)| !Arc::ptr_eq(work, &self.1));
    }
}

impl Listeners {
    pub(super) fn add(self: &Arc<Self>, work: &Arc<C10dWork>) -> Listening {
        let mut state = self.0.lock();
        if state.ended {
            end(work);
        }
        state.waiting.push((work.clone(), Instant::now()));
        Listening(self.clone(), work.clone())
    }

    /// Ends those under way, and those to come: connections have been closed.
    pub(super) fn end(&self) {
        let mut state = self.0.lock();
        state.ended = true;
        state.waiting.iter().for_each(|(work, _)| end(work));
    }

    /// Whether one has waited for longer than this, and goes on.
    pub(super) fn wait_for_long(&self, quick: Duration) -> bool {
        let state = self.0.lock();
        !state.ended && state.waiting.iter().any(|(_, since)| since.elapsed() > quick)
    }
}

fn end(work: &C10dWork) {
    if let Err(text) = work.abort() {
        tracing::debug!("abort of a receive: {text}");
    }
}
