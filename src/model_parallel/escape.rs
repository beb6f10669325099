//! Errors through code that cannot return them: tch's `Module::forward` gives a tensor and nothing else.

use std::any::Any;
use std::cell::RefCell;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::{Error, Result};

thread_local! {
    static ESCAPING: RefCell<Option<Error>> = const { RefCell::new(None) };
}

/// The value, or a panic whose error [`catch`] finds again, with its type.
#[track_caller]
pub(crate) fn or_raise<T>(result: Result<T>) -> T {
    match result {
        Ok(value) => value,
        Err(error) => {
            let words = error.to_string();
            ESCAPING.with_borrow_mut(|slot| *slot = Some(error));
            panic!("{words}");
        }
    }
}

/// Runs user code; a panic in it becomes an error, and keeps the type of an error that was raised.
pub(crate) fn catch<T>(body: impl FnOnce() -> Result<T>) -> Result<T> {
    ESCAPING.with_borrow_mut(|slot| *slot = None);
    catch_unwind(AssertUnwindSafe(body)).unwrap_or_else(|panic| {
        let raised = ESCAPING.with_borrow_mut(Option::take);
        Err(raised.unwrap_or_else(|| Error::Callback { reason: words(&*panic) }))
    })
}

fn words(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "panic without a message".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_raised_error_keeps_its_type_and_a_panic_its_words() {
        let error = catch(|| -> Result<()> { or_raise(Err(Error::Aborted)) }).unwrap_err();
        assert!(matches!(error, Error::Aborted));
        let error = catch(|| -> Result<()> { panic!("shape {}", 3) }).unwrap_err();
        assert_eq!(error.to_string(), "callback failed: shape 3");
    }
}
