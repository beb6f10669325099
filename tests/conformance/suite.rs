//! How a backend is put through the suite.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use tch_distributed::backend::{BackendContext, native};
use tch_distributed::{
    InitOptions, ProcessGroup, destroy_process_group, init_process_group, is_backend_available,
    register_backend, testing,
};

use super::product::{self, Case};
use super::{cases, custom_backend, plain_backend, programs, staged};

/// How long a test may take before it is a failure: nothing here comes near it.
pub const LIMIT: Duration = Duration::from_secs(100);

/// Backends of this suite's own, known by name like any other.
pub fn know_our_own() {
    if !is_backend_available("plain") {
        // Another test of this process may have been first.
        let _ = register_backend("native-tcp", |context| native::create_over(context, "tcp"));
        let _ = register_backend("native-unix", |context| native::create_over(context, "unix"));
        // Pretends that ranks of even and of odd numbers are on two hosts.
        let _ = register_backend("native-hosts", |context: BackendContext| {
            native::Options::new().host(format!("host {}", context.rank % 2)).create(context)
        });
        let _ = register_backend("nccl-staged", staged::create);
        let _ = register_backend("gloo-staged", |context| staged::over("gloo", context, tch::Device::Cpu));
        let _ = register_backend("compressing", custom_backend::create);
        let _ = register_backend("plain", plain_backend::create);
    }
}

/// Runs ranks as threads over a backend, with a watchdog instead of an endless wait.
pub fn world<T: Send>(backend: &str, size: usize, body: impl Fn(ProcessGroup) -> T + Send + Sync) -> Vec<T> {
    know_our_own();
    testing::run_threads_on(backend, InitOptions::new().timeout(LIMIT), size, body)
}

/// Runs cases of the product, all in one world; gives how many ran, or the first that failed.
pub fn run_product(backend: &str, size: usize, list: &[Case]) -> usize {
    let ran = world(backend, size, |group| product_on(&group, list));
    let failures: Vec<_> = ran.into_iter().flat_map(|ran| ran.failures).collect();
    assert_no_failures(&failures, backend, size);
    list.len()
}

/// What became of cases of the product on one rank.
#[derive(Default)]
pub struct Ran {
    /// How many ran: after an error of the group itself none does.
    pub cases: usize,
    /// What went wrong.
    pub failures: Vec<(Case, String)>,
}

/// Runs cases of the product on a group.
pub fn product_on(group: &ProcessGroup, list: &[Case]) -> Ran {
    let (mut cases, mut failures) = (0, Vec::new());
    for case in list {
        cases += 1;
        match product::run(*case, group) {
            Ok(Ok(())) => {}
            Ok(Err(wrong)) => failures.push((*case, wrong)),
            Err(error) => {
                failures.push((*case, format!("rank {} failed: {error}", group.rank())));
                let _ = group.abort();
                break;
            }
        }
    }
    Ran { cases, failures }
}

pub fn assert_no_failures(failures: &[(Case, String)], backend: &str, size: usize) {
    let shown: Vec<String> =
        failures.iter().take(5).map(|(case, wrong)| format!("{case}: {wrong}")).collect();
    assert!(
        failures.is_empty(),
        "{} failures on {backend}, world {size}:\n{}",
        failures.len(),
        shown.join("\n")
    );
}

/// Runs every named case for which the world is large enough, each in a world of its own; tells which
/// one failed. Cases about failures only where the backend promises to name the rank and the reason.
pub fn run_cases(backend: &str, size: usize, failures: bool) -> usize {
    let list = cases::of(backend, size, failures);
    for case in &list {
        let outcome = catch_unwind(AssertUnwindSafe(|| world(backend, size, |group| (case.body)(&group))));
        if let Err(panic) = outcome {
            eprintln!("FAILED on {backend}, world {size}: {}", case.name);
            resume_unwind(panic);
        }
    }
    list.len()
}

/// Runs the whole suite in a world of processes, of which this is one.
pub fn run_in_process(backend: &str, failures: bool) {
    know_our_own();
    let group = init_process_group(backend, InitOptions::new().timeout(LIMIT)).unwrap();
    let size = group.size();
    assert_no_failures(&product_on(&group, &product::pairwise()).failures, backend, size);
    run_cases_on(&group, failures);
    programs::run_on(&group, 12);
    destroy_process_group().unwrap();
}

/// Runs every named case, each in a group of its own; how many.
pub fn run_cases_on(group: &ProcessGroup, failures: bool) -> usize {
    let size = group.size();
    let all: Vec<usize> = (0..size).collect();
    let list = cases::of(&group.backend_name(), size, failures);
    for case in &list {
        // Printed by the harness only where a case fails.
        println!("case {}", case.name);
        let own = group.new_group(&all).unwrap().unwrap();
        // Gloo's ranks connect one after another: one that left before the others had connected would
        // cut them off.
        own.barrier().unwrap();
        (case.body)(&own);
        own.destroy().unwrap();
    }
    list.len()
}

/// Modules of tests, one for each backend: ranks as threads, and where the backend can, as processes.
/// `failures` says whether it promises more than an end when ranks disagree or do not come.
macro_rules! suites {
    ($($name:ident: $backend:literal, threads $threads:expr$(, processes $processes:expr)?, failures $failures:literal;)*) => {$(
        mod $name {
            use crate::{product, programs, suite};

            #[test]
            fn every_pair_of_factors_gives_what_the_model_gives() {
                let cases = product::pairwise();
                let ran: usize = $threads.iter().map(|&n| suite::run_product($backend, n, &cases)).sum();
                println!("{ran} cases of the product ran on {}", $backend);
            }

            #[test]
            fn every_named_case_holds() {
                let ran: usize = $threads.iter().map(|&n| suite::run_cases($backend, n, $failures)).sum();
                println!("{ran} named cases ran on {}", $backend);
            }

            #[test]
            fn random_programs_give_what_the_model_gives() {
                for n in $threads {
                    programs::run($backend, n, 12);
                }
            }

            $(
            #[test]
            fn the_whole_suite_holds_between_processes() {
                let worlds: &[usize] = &$processes;
                for &n in worlds {
                    let name = "the_whole_suite_holds_between_processes";
                    tch_distributed::testing::run_processes(n, name, || suite::run_in_process($backend, $failures));
                }
            }
            )?
        }
    )*};
}
pub(crate) use suites;
