//! What the flight records of all ranks say together, in words.

mod collectives;
mod messages;
#[cfg(test)]
mod tests;
mod words;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::flight::{FlightEntry, State};
use crate::{Error, Result};

/// The calls that one rank remembers: what a dump file holds, as JSON.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct FlightDump {
    /// The rank in the world.
    pub rank: usize,
    /// The size of the world.
    pub world_size: usize,
    /// The process.
    pub pid: u32,
    /// Why it was dumped: the failure in words, or `request`.
    pub reason: String,
    /// When it was dumped, on the clock of the entries.
    pub at_ns: u64,
    /// Each group that the rank belongs to.
    pub groups: Vec<GroupRecord>,
}

/// The calls of one group.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GroupRecord {
    /// The group's name, the same on all its ranks.
    pub name: String,
    /// The world ranks of its members.
    pub ranks: Vec<usize>,
    /// Its last calls, oldest first.
    pub entries: Vec<FlightEntry>,
}

/// What was found, one sentence each, the likeliest cause first.
///
/// Made by [`diagnose`]; `Display` prints the sentences.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diagnosis {
    /// The sentences.
    pub findings: Vec<String>,
    /// World ranks that stopped where others went on, or left no record.
    pub suspects: Vec<usize>,
    /// Whether something hangs or failed: what the findings are of.
    pub hangs: bool,
}

impl fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.findings.iter().try_for_each(|finding| writeln!(f, "{finding}"))
    }
}

/// Reads every dump (`flight-rank-*.json`) in a folder and diagnoses them.
pub fn diagnose_folder(folder: &Path) -> Result<Diagnosis> {
    let mut dumps = Vec::new();
    for file in std::fs::read_dir(folder)? {
        let path = file?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with("flight-rank-") && name.ends_with(".json") {
            let dump = serde_json::from_slice(&std::fs::read(&path)?)
                .map_err(|e| Error::Object { reason: format!("{name} is no flight record: {e}") })?;
            dumps.push(dump);
        }
    }
    if dumps.is_empty() {
        return Err(Error::invalid("folder", format!("{} holds no flight-rank-*.json", folder.display())));
    }
    Ok(diagnose(&dumps))
}

/// Compares the records of all ranks: which rank stopped where, and whether the hang is in a rank's own
/// code or in communication.
pub fn diagnose(dumps: &[FlightDump]) -> Diagnosis {
    let mut out = Findings::default();
    let world = dumps.iter().map(|d| d.world_size).max().unwrap_or(0);
    let present: BTreeSet<usize> = dumps.iter().map(|d| d.rank).collect();
    for rank in (0..world).filter(|r| !present.contains(r)) {
        out.suspects.insert(rank);
        out.say(Cause::Missing, format!("rank {rank} left no record: it was killed, or never started"));
    }
    let mut groups: BTreeMap<(&str, &[usize]), Vec<Record<'_>>> = BTreeMap::new();
    for dump in dumps {
        for group in &dump.groups {
            groups.entry((&group.name, &group.ranks)).or_default().push((dump, group));
        }
    }
    for ((name, _), records) in &groups {
        collectives::examine(name, records, &mut out);
        messages::examine(name, records, &mut out);
    }
    out.diagnosis()
}

/// A rank's record of a group, with the dump it comes from.
type Record<'a> = (&'a FlightDump, &'a GroupRecord);

/// How much a finding explains: the first of these is the likeliest cause of the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Cause {
    Missing,
    Disagreement,
    OwnCode,
    Communication,
    /// A rank is held up by another.
    HeldUp,
}

#[derive(Default)]
struct Findings {
    said: Vec<(Cause, String)>,
    suspects: BTreeSet<usize>,
    /// Ranks that stopped where others went on, because they wait for something else.
    held_up: BTreeSet<usize>,
}

impl Findings {
    fn say(&mut self, cause: Cause, finding: String) {
        self.said.push((cause, finding));
    }

    fn diagnosis(mut self) -> Diagnosis {
        self.said.sort_by_key(|(cause, _)| *cause);
        let hangs = !self.said.is_empty();
        let mut findings: Vec<_> = self.said.into_iter().map(|(_, finding)| finding).collect();
        if !hangs {
            findings.push("every rank finished the same calls in every group: nothing hangs".to_owned());
        }
        // Ranks that wait for each other in a circle are the cause themselves.
        let suspects = if self.suspects.is_empty() { self.held_up } else { self.suspects };
        Diagnosis { findings, suspects: suspects.into_iter().collect(), hangs }
    }
}

/// The calls of a rank, each with its group.
fn calls(dump: &FlightDump) -> impl Iterator<Item = (&GroupRecord, &FlightEntry)> {
    dump.groups.iter().flat_map(|group| group.entries.iter().map(move |e| (group, e)))
}

/// The call that a rank made last of those that have not ended well, and the group of it.
fn open_call(dump: &FlightDump) -> Option<(&GroupRecord, &FlightEntry)> {
    calls(dump).filter(|(_, e)| e.state != State::Completed).max_by_key(|(_, e)| e.started_ns)
}

/// The call that a rank made last, and the group of it.
fn last_call(dump: &FlightDump) -> Option<(&GroupRecord, &FlightEntry)> {
    calls(dump).max_by_key(|(_, e)| e.started_ns)
}
