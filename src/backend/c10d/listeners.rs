//! Gloo's messages under way. Gloo ends what waits for a rank when its connection closes, and not what waits for any: that
//! would last until its own timeout, however the group ended.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use crate::libtorch::C10dWork;

#[derive(Default)]
pub(super) struct Listeners(Mutex<State>);

#[derive(Default)]
struct State {
    waiting: Vec<Message>,
    ended: bool,
}

struct Message {
    work: Arc<C10dWork>,
    since: Instant,
    /// A receive from any rank.
    from_any: bool,
}

/// A message that is known of while this is there.
pub(super) struct Listening(Arc<Listeners>, Arc<C10dWork>);

impl Drop for Listening {
    fn drop(&mut self) {
        self.0.0.lock().waiting.retain(|message| !Arc::ptr_eq(&message.work, &self.1));
    }
}

impl Listeners {
    pub(super) fn add(self: &Arc<Self>, work: &Arc<C10dWork>, from_any: bool) -> Listening {
        let mut state = self.0.lock();
        if state.ended && from_any {
            end(work);
        }
        state.waiting.push(Message { work: work.clone(), since: Instant::now(), from_any });
        Listening(self.clone(), work.clone())
    }

    /// Ends receives from any rank under way, and those to come: connections have been closed.
    pub(super) fn end(&self) {
        let mut state = self.0.lock();
        state.ended = true;
        state.waiting.iter().filter(|message| message.from_any).for_each(|message| end(&message.work));
    }

    /// Whether one has waited for longer than this, and goes on; and whether one from any rank has.
    pub(super) fn wait_for_long(&self, quick: Duration) -> (bool, bool) {
        let state = self.0.lock();
        let mut long = state.waiting.iter().filter(|message| message.since.elapsed() > quick).peekable();
        let any = !state.ended && long.peek().is_some();
        (any, any && long.any(|message| message.from_any))
    }
}

fn end(work: &C10dWork) {
    if let Err(text) = work.abort() {
        tracing::debug!("abort of a receive: {text}");
    }
}
