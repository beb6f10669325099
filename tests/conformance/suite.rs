//! How a backend is put through the suite.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use tch_distributed::{InitOptions, ProcessGroup, is_backend_available, register_backend, testing};

use super::product::{self, Case};
use super::{cases, plain_backend};

/// How long a test may take before it is a failure: nothing here comes near it.
pub const LIMIT: Duration = Duration::from_secs(100);

/// Runs ranks as threads over a backend, with a watchdog instead of an endless wait.
pub fn world<T: Send>(backend: &str, size: usize, body: impl Fn(ProcessGroup) -> T + Send + Sync) -> Vec<T> {
    if backend == "plain" && !is_backend_available("plain") {
        // Another test of this process may have been first.
        let _ = register_backend("plain", plain_backend::create);
    }
    testing::run_threads_on(backend, InitOptions::new().timeout(LIMIT), size, body)
}

/// Runs cases of the product, all in one world; gives how many ran, or the first that failed.
pub fn run_product(backend: &str, size: usize, list: &[Case]) -> usize {
    let failures = world(backend, size, |group| {
        let mut failures = Vec::new();
        for case in list {
            match product::run(*case, &group) {
                Ok(Ok(())) => {}
                Ok(Err(wrong)) => failures.push(format!("{case}: {wrong}")),
                Err(error) => {
                    failures.push(format!("{case}: rank {} failed: {error}", group.rank()));
                    let _ = group.abort();
                    break;
                }
            }
        }
        failures
    });
    let failures: Vec<String> = failures.concat();
    let shown: Vec<&str> = failures.iter().take(5).map(String::as_str).collect();
    assert!(
        failures.is_empty(),
        "{} failures on {backend}, world {size}:\n{}",
        failures.len(),
        shown.join("\n")
    );
    list.len()
}

/// Runs every named case for which the world is large enough; tells which one failed. Cases about
/// failures only where the backend promises to name the rank and the reason.
pub fn run_cases(backend: &str, size: usize, failures: bool) -> usize {
    let list: Vec<_> =
        cases::all().into_iter().filter(|case| case.ranks <= size && (failures || !case.failure)).collect();
    for case in &list {
        let outcome = catch_unwind(AssertUnwindSafe(|| world(backend, size, |group| (case.body)(&group))));
        if let Err(panic) = outcome {
            eprintln!("FAILED on {backend}, world {size}: {}", case.name);
            resume_unwind(panic);
        }
    }
    list.len()
}

/// One module of tests for each backend; `failures` says whether it promises more than an end when
/// ranks disagree or do not come.
macro_rules! suites {
    ($($name:ident: $backend:literal, worlds $worlds:expr, failures: $failures:literal;)*) => {$(
        mod $name {
            use crate::{product, programs, suite};

            #[test]
            fn every_pair_of_factors_gives_what_the_model_gives() {
                let cases = product::pairwise();
                let ran: usize = $worlds.iter().map(|&n| suite::run_product($backend, n, &cases)).sum();
                println!("{ran} cases of the product ran on {}", $backend);
            }

            #[test]
            fn every_named_case_holds() {
                let ran: usize = $worlds.iter().map(|&n| suite::run_cases($backend, n, $failures)).sum();
                println!("{ran} named cases ran on {}", $backend);
            }

            #[test]
            fn random_programs_give_what_the_model_gives() {
                for n in $worlds {
                    programs::run($backend, n, 12);
                }
            }
        }
    )*};
}
pub(crate) use suites;
