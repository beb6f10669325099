//! What a user should read without having set up anything.

use std::fmt;
use std::io::{self, Write};

/// A warning through `tracing` where the program listens to that, and on stderr where it does not.
pub(crate) fn notice(text: fmt::Arguments<'_>) {
    if tracing::dispatcher::has_been_set() {
        tracing::warn!("{text}");
    } else {
        // Where nobody reads it, nobody is told; `eprintln` would panic.
        let _ = writeln!(io::stderr(), "tch-distributed: {text}");
    }
}
