//! The end of the process, while threads that nobody waits for still use libtorch.
//!
//! When `main` has returned, libtorch's statics go one by one. Whoever then takes an engine down, or asks the device how
//! far it is, uses what is no longer there: an exception in a destructor, and a process that had done all its work ends
//! with an abort. So such a thread comes in here, and the end of the process waits for those that are inside.

use std::ffi::c_int;
use std::sync::Once;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

/// How long the end of the process waits.
const PATIENCE: Duration = Duration::from_secs(5);

struct State {
    inside: usize,
    ending: bool,
}

static STATE: Mutex<State> = Mutex::new(State { inside: 0, ending: false });
static LEFT: Condvar = Condvar::new();
static WATCH: Once = Once::new();

unsafe extern "C" {
    fn atexit(function: extern "C" fn()) -> c_int;
}

/// Runs before the statics of libraries that were there when it was registered are destroyed.
extern "C" fn end() {
    let mut state = STATE.lock();
    state.ending = true;
    let deadline = Instant::now() + PATIENCE;
    while state.inside > 0 && !LEFT.wait_until(&mut state, deadline).timed_out() {}
}

struct Inside;

impl Drop for Inside {
    fn drop(&mut self) {
        STATE.lock().inside -= 1;
        LEFT.notify_all();
    }
}

/// What a task gives, or `None` where the process is ending: then it is not begun.
pub(crate) fn unless_ending<T>(task: impl FnOnce() -> T) -> Option<T> {
    WATCH.call_once(|| {
        // SAFETY: `end` takes nothing, does not unwind, and lives as long as the program. Where it cannot be registered, the
        // process ends as it would without it.
        unsafe { atexit(end) };
    });
    {
        let mut state = STATE.lock();
        if state.ending {
            return None;
        }
        state.inside += 1;
    }
    let _inside = Inside;
    Some(task())
}
