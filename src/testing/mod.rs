//! Worlds for tests: several ranks in one process, or several processes from one test.

mod processes;
mod threads;

pub use processes::run_processes;
pub use threads::{run_threads, run_threads_on};
