//! Typed errors on their way through C++: an exception carries a number, the error waits here.

use std::collections::VecDeque;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};

use parking_lot::Mutex;
use tch::TchError;

use super::store::panic_text;
use crate::{Error, Result};

/// Errors that nobody has caught yet, by number. tch's own `f_backward` reads only the text, so that
/// some are never fetched: the oldest go when there are many.
static RAISED: Mutex<(u64, VecDeque<(u64, Error)>)> = Mutex::new((0, VecDeque::new()));
const KEPT: usize = 1024;
const MARK: &str = " [callback error ";

/// Leaves an error for [`caught`] and gives the text that the exception shall carry.
pub(super) fn raise(error: Error) -> String {
    let mut raised = RAISED.lock();
    raised.0 += 1;
    let number = raised.0;
    let text = format!("{error}{MARK}{number}]");
    if raised.1.len() == KEPT {
        raised.1.pop_front();
    }
    raised.1.push_back((number, error));
    text
}

/// The error behind the text of an exception: the typed one where a callback of ours raised it.
pub(super) fn typed(text: &str) -> Error {
    let number = text
        .rfind(MARK)
        .and_then(|at| text[at + MARK.len()..].split(']').next())
        .and_then(|digits| digits.parse::<u64>().ok());
    if let Some(number) = number {
        let mut raised = RAISED.lock();
        if let Some(at) = raised.1.iter().position(|(n, _)| *n == number)
            && let Some((_, error)) = raised.1.remove(at)
        {
            return error;
        }
    }
    Error::Torch(TchError::Torch(text.to_owned()))
}

/// The error behind an exception.
pub(super) fn caught(exception: cxx::Exception) -> Error {
    typed(exception.what())
}

/// Runs a callback that C++ called. A panic becomes [`Error::Callback`], unless it comes from a typed
/// error that tch turned into a panic: then it is that error.
pub(super) fn guard<T>(what: &str, body: impl FnOnce() -> Result<T>) -> Result<T, String> {
    let error = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => return Ok(value),
        Ok(Err(error)) => error,
        Err(panic) => {
            let text = panic_text(&*panic);
            match typed(&text) {
                Error::Torch(_) => Error::Callback { reason: format!("{what} panicked: {text}") },
                error => error,
            }
        }
    };
    Err(raise(error))
}

/// A value whose destructor may panic although C++ drops it.
pub(super) struct Contained<T>(ManuallyDrop<T>);

impl<T> Contained<T> {
    pub(super) fn new(value: T) -> Self {
        Self(ManuallyDrop::new(value))
    }
}

impl<T> std::ops::Deref for Contained<T> {
    type Target = T;
    fn deref(&self) -> &T {
        &self.0
    }
}

impl<T> Drop for Contained<T> {
    fn drop(&mut self) {
        // SAFETY: the value is dropped here, once, and not used after.
        let dropped = catch_unwind(AssertUnwindSafe(|| unsafe { ManuallyDrop::drop(&mut self.0) }));
        if let Err(panic) = dropped {
            tracing::error!("a callback panicked when it was dropped: {}", panic_text(&*panic));
        }
    }
}
