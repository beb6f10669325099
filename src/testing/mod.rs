//! Worlds for tests: several ranks in one process, or several processes from one test.

mod threads;

pub use threads::{run_threads, run_threads_on};
