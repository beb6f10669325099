//! The whole product on one backend and world, as a table: what `cargo xtask conformance` runs.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

use tch_distributed::{InitOptions, destroy_process_group, init_process_group, testing};

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
    let cases = if asked { product::whole() } else { product::pairwise() };
    let as_a_process = || {
        let limit = limit
            .as_deref()
            .map_or(suite::LIMIT, |text| Duration::from_secs(text.parse().expect("a number of seconds")));
        let group = init_process_group(backend.as_str(), InitOptions::new().timeout(limit)).unwrap();
        let failures = suite::product_on(&group, &cases);
        if group.rank() == 0 {
            println!("{}", table(&cases, &failures));
        }
        suite::assert_no_failures(&failures, &backend, group.size());
        destroy_process_group().unwrap();
    };
    match from_environment("TCHD_CONFORMANCE_RANKS", "threads").as_str() {
        "processes" => return testing::run_processes(size, "the_product_as_a_table", as_a_process),
        // A launcher has started this process as one of the ranks: the suite once, or the product with a
        // time limit of its own.
        "launched" if limit.is_none() => return suite::run_in_process(&backend, true),
        "launched" | "launched-product" => return as_a_process(),
        _ => {}
    }
    let failures = suite::world(&backend, size, |group| suite::product_on(&group, &cases)).concat();
    println!("{backend}, {size} ranks as threads\n{}", table(&cases, &failures));
    suite::assert_no_failures(&failures, &backend, size);
}

/// Collective and operation down, kind across: how many cases passed, how many did not.
fn table(cases: &[Case], failures: &[(Case, String)]) -> String {
    let row = |case: &Case| match case.op {
        Some(op) => format!("{:?} {op}", case.collective),
        None => format!("{:?}", case.collective),
    };
    let mut rows: BTreeMap<String, BTreeMap<String, (usize, usize)>> = BTreeMap::new();
    for case in cases {
        let cell = rows.entry(row(case)).or_default().entry(format!("{:?}", case.kind)).or_default();
        cell.0 += 1;
    }
    for (case, _) in failures {
        if let Some(cell) =
            rows.get_mut(&row(case)).and_then(|cells| cells.get_mut(&format!("{:?}", case.kind)))
        {
            cell.1 += 1;
        }
    }
    let mut text = format!("{:<32}", "passed (failed)");
    KINDS.iter().for_each(|kind| {
        let _ = write!(text, "{:>14}", format!("{kind:?}"));
    });
    for (name, cells) in &rows {
        let _ = write!(text, "\n{name:<32}");
        for kind in KINDS {
            let (ran, failed) = cells.get(&format!("{kind:?}")).copied().unwrap_or_default();
            let cell =
                if failed == 0 { ran.to_string() } else { format!("{} ({failed})", ran - failed.min(ran)) };
            let _ = write!(text, "{cell:>14}");
        }
    }
    let _ = write!(text, "\n{} cases, {} failures", cases.len(), failures.len());
    text
}
