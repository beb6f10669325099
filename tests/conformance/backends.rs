//! The README's table of what each backend can do, made from what the suite sees: every operation on every kind, on two
//! ranks, works (against the model) or is `Unsupported`.
//!
//! `cargo xtask conformance --table` writes it into the README; the test here says when it is out of date. What NCCL can
//! do `cargo xtask gpu-simulated` has seen and kept (`tests/fixtures/nccl_kinds.txt`).

use std::fmt::Write;
use std::path::Path;

use tch::Kind;
use tch_distributed::{Error, ProcessGroup, ReduceOp};

use super::model::KINDS;
use super::product::{self, COLLECTIVES, Case, Collective, Form, Layout, Size};
use super::suite;

const BEGIN: &str = "<!-- what each backend can do: written by `cargo xtask conformance --table` -->\n";
const END: &str = "<!-- end -->\n";
/// Set to have the README written instead of compared.
const WRITE: &str = "TCHD_CONFORMANCE_WRITE_TABLE";

const BACKENDS: [&str; 2] = ["native", "gloo"];

/// What the suite saw of NCCL: [`record`].
const NCCL: &str = include_str!("../fixtures/nccl_kinds.txt");

/// What stands below the table.
const HOW_SEEN: &str = "\nSeen by the suite on two ranks; of `nccl` on simulated devices (`cargo xtask gpu-simulated`), not on a GPU.\n";

/// Kinds that are named together where all of them work.
const CLASSES: [(&str, &[Kind]); 4] = [
    ("integers", &[Kind::Uint8, Kind::Int8, Kind::Int16, Kind::Int, Kind::Int64]),
    ("floats", &[Kind::Half, Kind::BFloat16, Kind::Float, Kind::Double]),
    ("complex", &[Kind::ComplexFloat, Kind::ComplexDouble]),
    ("Bool", &[Kind::Bool]),
];

/// One row before its name is known to be its own: an operation and how it combines.
type Row = (Collective, Option<ReduceOp>);

fn rows() -> Vec<Row> {
    let mut rows = Vec::new();
    for case in product::whole() {
        if !rows.contains(&(case.collective, case.op)) {
            rows.push((case.collective, case.op));
        }
    }
    rows
}

/// The kinds on which a row works, for each row; an error that is not `Unsupported` is a failure of the suite.
fn seen(group: &ProcessGroup) -> Vec<Vec<Kind>> {
    let works = |(collective, op): Row, kind: Kind| {
        let case =
            Case { collective, kind, op, layout: Layout::Contiguous, size: Size::Odd, form: Form::Blocking };
        match product::attempt(case, group) {
            Ok(Ok(())) => true,
            Err(Error::Unsupported { .. }) => false,
            other => panic!("{case} on {}: {other:?}", group.backend_name()),
        }
    };
    rows().into_iter().map(|row| KINDS.into_iter().filter(|&kind| works(row, kind)).collect()).collect()
}

/// Writes down what a backend that is not seen in every run can do: a line for each row, with its kinds.
pub fn record(group: &ProcessGroup, path: &Path) {
    let lines: Vec<String> = seen(group).iter().map(|kinds| format!("{kinds:?}\n")).collect();
    if group.rank() == 0 {
        std::fs::write(path, lines.concat()).unwrap();
    }
}

fn recorded(text: &str) -> Vec<Vec<Kind>> {
    let kinds =
        |line: &str| KINDS.into_iter().filter(|kind| words(line).any(|w| w == format!("{kind:?}"))).collect();
    text.lines().map(kinds).collect()
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    line.split(|c: char| !c.is_alphanumeric())
}

fn kinds_in_words(kinds: &[Kind]) -> String {
    if kinds.len() == KINDS.len() {
        return "every kind".to_owned();
    }
    let mut words: Vec<String> = Vec::new();
    for (name, members) in CLASSES {
        let there: Vec<&Kind> = members.iter().filter(|kind| kinds.contains(kind)).collect();
        match there.len() {
            n if n == members.len() => words.push(name.to_owned()),
            _ => words.extend(there.iter().map(|kind| format!("{kind:?}"))),
        }
    }
    if words.is_empty() { "none: `Unsupported`".to_owned() } else { words.join(", ") }
}

fn snake(name: &str) -> String {
    let mut text = String::new();
    for c in name.chars() {
        if c.is_uppercase() && !text.is_empty() {
            text.push('_');
        }
        text.extend(c.to_lowercase());
    }
    text
}

/// As the crate calls it; several points of the product are one operation to a user.
fn operation(collective: Collective) -> String {
    match collective {
        Collective::AllGatherStacked => "all_gather_into_tensor".to_owned(),
        Collective::AllToAllSplits => "all_to_all_single".to_owned(),
        Collective::Ring => "isend`, `irecv".to_owned(),
        Collective::AllPairs => "batch_isend_irecv".to_owned(),
        other => snake(&format!("{other:?}")),
    }
}

fn how(op: ReduceOp) -> String {
    match op {
        ReduceOp::PremulSum(_) => "`PremulSum`".to_owned(),
        op => format!("`{op:?}`"),
    }
}

/// Rows that say the same are one.
fn table(columns: &[Vec<Vec<Kind>>]) -> String {
    let mut lines: Vec<(Vec<String>, Option<ReduceOp>, Vec<String>)> = Vec::new();
    for (index, (collective, op)) in rows().into_iter().enumerate() {
        let cells: Vec<String> = columns.iter().map(|column| kinds_in_words(&column[index])).collect();
        let name = format!("`{}`", operation(collective));
        match lines.iter_mut().find(|(_, of, same)| *of == op && *same == cells) {
            Some((names, ..)) if names.contains(&name) => {}
            Some((names, ..)) => names.push(name),
            None => lines.push((vec![name], op, cells)),
        }
    }
    let mut merged: Vec<(String, Vec<String>, Vec<String>)> = Vec::new();
    for (names, op, cells) in lines {
        let (names, how) = (names.join(", "), op.map(how));
        match merged.iter_mut().find(|(same, _, alike)| *same == names && *alike == cells) {
            Some((_, hows, _)) => hows.extend(how),
            None => merged.push((names, Vec::from_iter(how), cells)),
        }
    }
    let mut text = format!(
        "| operation | combined by | {} | `nccl` |\n",
        BACKENDS.map(|b| format!("`{b}`")).join(" | ")
    );
    text += "|---|---|---|---|---|\n";
    for (names, hows, cells) in merged {
        let _ = writeln!(text, "| {names} | {} | {} |", hows.join(", "), cells.join(" | "));
    }
    text + HOW_SEEN
}

#[test]
fn the_readme_says_of_every_operation_and_kind_what_the_suite_sees() {
    assert!(CLASSES.iter().map(|(_, kinds)| kinds.len()).sum::<usize>() == KINDS.len());
    assert!(COLLECTIVES.iter().all(|collective| rows().iter().any(|(row, _)| row == collective)));
    let columns = BACKENDS.map(|backend| {
        let mut seen = suite::world(backend, 2, |group| seen(&group));
        assert_eq!(seen[0], seen[1], "ranks of {backend} see different things");
        seen.swap_remove(0)
    });
    let columns = [&columns[..], &[recorded(NCCL)]].concat();
    assert!(
        columns.iter().all(|column| column.len() == rows().len()),
        "`cargo xtask gpu-simulated` sees all rows"
    );
    let table = table(&columns);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md");
    let readme = std::fs::read_to_string(&path).unwrap();
    let begin = readme.find(BEGIN).expect("the README marks the table's place") + BEGIN.len();
    let end = begin + readme[begin..].find(END).expect("the README marks the table's end");
    if std::env::var_os(WRITE).is_some() {
        std::fs::write(&path, format!("{}\n{table}\n{}", &readme[..begin], &readme[end..])).unwrap();
        return;
    }
    assert_eq!(readme[begin..end].trim(), table.trim(), "`cargo xtask conformance --table` writes it anew");
}
