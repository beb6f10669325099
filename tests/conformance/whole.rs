//! The whole product on one backend and world, as a table: what `cargo xtask conformance` runs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::Duration;

use tch_distributed::{InitOptions, destroy_process_group, init_process_group, testing};

use super::backends;
use super::model::KINDS;
use super::product::{self, Case};
use super::suite;

fn from_environment(name: &str, default: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| default.to_owned())
}

#[test]
fn the_product_as_a_table() {
    let backend = from_environment("TCHD_CONFORMANCE_BACKEND", "native");
    let size: usize = from_environment("TCHD_CONFORMANCE_WORLD", "2").parse().expect("a number of ranks");
    // Without being asked for all of it, as many as show that every pair of factors works.
    let limit = std::env::var("TCHD_CONFORMANCE_TIMEOUT").ok();
    let asked = std::env::var_os("TCHD_CONFORMANCE_WORLD").is_some() || limit.is_some();
    let mut cases = if asked { product::whole() } else { product::pairwise() };
    let from: usize = from_environment("TCHD_CONFORMANCE_FROM", "0").parse().expect("the number of a case");
    let from = from % cases.len();
    cases.rotate_left(from);
    suite::know_our_own();
    let as_a_process = |place: Option<&Path>| {
        let limit = limit
            .as_deref()
            .map_or(suite::LIMIT, |text| Duration::from_secs(text.parse().expect("a number of seconds")));
        let group = init_process_group(backend.as_str(), InitOptions::new().timeout(limit)).unwrap();
        if let Some(sign) = std::env::var_os("TCHD_CONFORMANCE_SIGN") {
            // All ranks are there: what happens to them from now on happens in the middle of the product.
            group.barrier().unwrap();
            if group.rank() == 0 {
                std::fs::write(sign, "").unwrap();
            }
        }
        let ran = suite::product_on(&group, &cases);
        if let Some(path) = std::env::var_os("TCHD_CONFORMANCE_RECORD") {
            backends::record(&group, Path::new(&path));
        }
        let mut text = table(&cases, ran.cases, &ran.failures);
        if place.is_some() && ran.failures.is_empty() {
            let named = suite::run_cases_on(&group, promises(&backend));
            let _ = write!(text, "\n{named} named cases passed");
        }
        if group.rank() == 0 {
            match place {
                // The launching process shows nothing of what ranks print that end well.
                Some(place) => std::fs::write(place, text).unwrap(),
                None => println!("{text}"),
            }
        }
        suite::assert_no_failures(&ran.failures, &backend, group.size());
        destroy_process_group().unwrap();
    };
    match from_environment("TCHD_CONFORMANCE_RANKS", "threads").as_str() {
        "processes" => {
            let parent = from_environment("TCH_DISTRIBUTED_PARENT", &std::process::id().to_string());
            let place = std::env::temp_dir().join(format!("tchd-conformance-{parent}"));
            let name = "the_product_as_a_table";
            let ended = catch_unwind(AssertUnwindSafe(|| {
                testing::run_processes(size, name, || as_a_process(Some(&place)));
            }));
            // None where rank 0 did not come so far.
            let text = std::fs::read_to_string(&place).unwrap_or_default();
            let _ = std::fs::remove_file(&place);
            println!("{backend}, {size} ranks as processes\n{text}");
            return ended.unwrap_or_else(|panic| resume_unwind(panic));
        }
        // A launcher has started this process as one of the ranks: the suite once, or the product with a
        // time limit of its own.
        "launched" if limit.is_none() => return suite::run_in_process(&backend, promises(&backend)),
        "launched" | "launched-product" => return as_a_process(None),
        _ => {}
    }
    let ran = suite::world(&backend, size, |group| suite::product_on(&group, &cases));
    let least = ran.iter().map(|ran| ran.cases).min().unwrap_or_default();
    let failures: Vec<_> = ran.into_iter().flat_map(|ran| ran.failures).collect();
    println!("{backend}, {size} ranks as threads\n{}", table(&cases, least, &failures));
    suite::assert_no_failures(&failures, &backend, size);
    println!("{} named cases passed", suite::run_cases(&backend, size, promises(&backend)));
}

/// Whether a backend promises more than an end when ranks disagree or do not come.
fn promises(backend: &str) -> bool {
    backend.starts_with("native")
}

/// Collective and operation down, kind across: how many cases passed, how many did not. The first `ran`
/// cases were run.
fn table(cases: &[Case], ran: usize, failures: &[(Case, String)]) -> String {
    let row = |case: &Case| match case.op {
        Some(op) => format!("{:?} {op}", case.collective),
        None => format!("{:?}", case.collective),
    };
    let mut rows: BTreeMap<String, BTreeMap<String, (usize, usize)>> = BTreeMap::new();
    let mut failed = 0;
    for case in &cases[..ran] {
        let cell = rows.entry(row(case)).or_default().entry(format!("{:?}", case.kind)).or_default();
        // On one rank or on several.
        if failures.iter().any(|(of, _)| of == case) {
            cell.1 += 1;
            failed += 1;
        } else {
            cell.0 += 1;
        }
    }
    let mut text = format!("{:<32}", "passed (failed)");
    KINDS.iter().for_each(|kind| {
        let _ = write!(text, "{:>14}", format!("{kind:?}"));
    });
    for (name, cells) in &rows {
        let _ = write!(text, "\n{name:<32}");
        for kind in KINDS {
            let (passed, failed) = cells.get(&format!("{kind:?}")).copied().unwrap_or_default();
            let cell = if failed == 0 { passed.to_string() } else { format!("{passed} ({failed})") };
            let _ = write!(text, "{cell:>14}");
        }
    }
    let _ = write!(text, "\n{ran} of {} cases ran, {failed} failed", cases.len());
    text
}
