//! What the flight records of all ranks say together, in words.

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
    let mut out = Diagnosis { findings: Vec::new(), suspects: Vec::new() };
    let world = dumps.iter().map(|d| d.world_size).max().unwrap_or(0);
    let present: BTreeSet<usize> = dumps.iter().map(|d| d.rank).collect();
    for rank in (0..world).filter(|r| !present.contains(r)) {
        out.suspects.push(rank);
        out.findings.push(format!("rank {rank} left no record: it was killed, or never started"));
    }
    let mut groups: BTreeMap<(&str, &[usize]), Vec<Record<'_>>> = BTreeMap::new();
    for dump in dumps {
        for group in &dump.groups {
            groups.entry((&group.name, &group.ranks)).or_default().push((dump, group));
        }
    }
    for ((name, _), records) in &groups {
        examine(name, records, &mut out);
    }
    out.suspects.sort_unstable();
    out.suspects.dedup();
    if out.findings.is_empty() {
        out.findings.push("every rank finished the same calls in every group: nothing hangs".to_owned());
    }
    out
}

/// A rank's record of a group, with the dump it comes from.
type Record<'a> = (&'a FlightDump, &'a GroupRecord);

/// The last collective of a rank.
fn last(group: &GroupRecord) -> Option<&FlightEntry> {
    group.entries.iter().filter(|e| e.activity.is_collective()).max_by_key(|e| e.seq)
}

fn examine(name: &str, records: &[Record<'_>], out: &mut Diagnosis) {
    disagreements(name, records, out);
    let Some(furthest) = records.iter().filter_map(|(_, g)| last(g)).map(|e| e.seq).max() else { return };
    let waiting: Vec<_> = records
        .iter()
        .filter_map(|(d, g)| {
            last(g).filter(|e| e.seq == furthest && e.state != State::Completed).map(|e| (*d, e))
        })
        .collect();
    let behind: Vec<_> = records.iter().filter(|(_, g)| last(g).is_none_or(|e| e.seq < furthest)).collect();
    for (dump, group) in &behind {
        out.suspects.push(dump.rank);
        let Some((_, ahead)) =
            records.iter().find_map(|(d, g)| last(g).filter(|e| e.seq == furthest).map(|e| (d, e)))
        else {
            continue;
        };
        let others = ranks_in_words(waiting.iter().map(|(d, _)| d.rank));
        let elsewhere =
            if others.is_empty() { "others have finished".to_owned() } else { format!("{others} waits") };
        out.findings.push(match last(group) {
            None => format!(
                "group {name}: rank {} has called no collective, while {elsewhere} in {} number {} ({}): the hang is in the rank's own code before its first collective",
                dump.rank, ahead.activity.name(), ahead.seq, ahead.site
            ),
            Some(e) if e.state == State::Completed => format!(
                "group {name}: rank {} finished {} number {} ({}) {:.1} s ago and has not called {} number {} ({}), where {elsewhere}: the hang is in the rank's own code between the two",
                dump.rank, e.activity.name(), e.seq, e.site, seconds(dump.at_ns, e.ended_ns), ahead.activity.name(), ahead.seq, ahead.site
            ),
            Some(e) => format!(
                "group {name}: rank {} is {} in {} number {} ({}) since {:.1} s, while {elsewhere} in {} number {}",
                dump.rank, stuck(e), e.activity.name(), e.seq, e.site, seconds(dump.at_ns, e.started_ns), ahead.activity.name(), ahead.seq
            ),
        });
    }
    if behind.is_empty() && !waiting.is_empty() {
        let (dump, entry) = waiting[0];
        let who = ranks_in_words(waiting.iter().map(|(d, _)| d.rank));
        let all = records.first().is_some_and(|(_, g)| records.len() == g.ranks.len());
        let place = format!(
            "{} number {} ({}) for {:.1} s",
            entry.activity.name(),
            entry.seq,
            entry.site,
            seconds(dump.at_ns, entry.started_ns)
        );
        out.findings.push(if all {
            format!("group {name}: every rank has called {place} and {who} has not got out of it: the hang is in the communication")
        } else {
            format!("group {name}: {who} waits in {place} for ranks that left no record")
        });
    }
}

fn stuck(entry: &FlightEntry) -> &'static str {
    if entry.state == State::Failed { "failed" } else { "waiting" }
}

fn seconds(now: u64, then: u64) -> f64 {
    now.saturating_sub(then) as f64 / 1e9
}

/// The first collective at which ranks called different things.
fn disagreements(name: &str, records: &[Record<'_>], out: &mut Diagnosis) {
    let mut calls: BTreeMap<u64, Vec<(usize, &FlightEntry)>> = BTreeMap::new();
    for (dump, group) in records {
        for entry in group.entries.iter().filter(|e| e.activity.is_collective()) {
            calls.entry(entry.seq).or_default().push((dump.rank, entry));
        }
    }
    for (seq, entries) in calls {
        let mut kinds: BTreeMap<_, Vec<&(usize, &FlightEntry)>> = BTreeMap::new();
        for call in &entries {
            kinds.entry(call.1.activity).or_default().push(call);
        }
        if kinds.len() > 1 {
            let most = kinds.values().map(Vec::len).max().unwrap_or(0);
            let said: Vec<_> = kinds
                .values()
                .map(|calls| {
                    let who = ranks_in_words(calls.iter().map(|(rank, _)| *rank));
                    format!("{who} called {} ({})", calls[0].1.activity.name(), calls[0].1.site)
                })
                .collect();
            out.suspects.extend(kinds.values().filter(|c| c.len() < most).flatten().map(|(rank, _)| *rank));
            out.findings.push(format!(
                "group {name}: ranks disagree at collective number {seq}: {}",
                said.join("; ")
            ));
            return;
        }
    }
}

fn ranks_in_words(ranks: impl Iterator<Item = usize>) -> String {
    let ranks: Vec<_> = ranks.map(|r| r.to_string()).collect();
    match &ranks[..] {
        [] => String::new(),
        [one] => format!("rank {one}"),
        many => format!("each of ranks {}", many.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::flight::Activity;
    use super::*;

    fn entry(seq: u64, activity: Activity, state: State) -> FlightEntry {
        let ended_ns = if state == Completed { seq * 1_000_000_000 + 500 } else { 0 };
        let site = format!("train.rs:{}", 10 + seq);
        FlightEntry { seq, activity, bytes: 4, state, started_ns: seq * 1_000_000_000, ended_ns, site }
    }

    fn dump(rank: usize, entries: Vec<FlightEntry>) -> FlightDump {
        let group = GroupRecord { name: "0".to_owned(), ranks: vec![0, 1, 2], entries };
        FlightDump {
            rank,
            world_size: 3,
            pid: 1,
            reason: "request".to_owned(),
            at_ns: 60_000_000_000,
            groups: vec![group],
        }
    }

    use Activity::{AllReduce, Barrier, Broadcast};
    use State::{Completed, Started};

    #[test]
    fn a_rank_that_skips_a_collective_is_named_with_the_call_it_did_not_make() {
        let waits = || vec![entry(0, AllReduce, Completed), entry(1, Barrier, Started)];
        let d =
            diagnose(&[dump(0, waits()), dump(1, vec![entry(0, AllReduce, Completed)]), dump(2, waits())]);
        assert_eq!(d.suspects, [1]);
        let text = d.to_string();
        for part in [
            "rank 1 finished all_reduce number 0 (train.rs:10)",
            "has not called barrier number 1",
            "own code",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn a_hang_of_all_ranks_in_one_call_is_the_communications() {
        let waits = || vec![entry(4, AllReduce, Started)];
        let d = diagnose(&[dump(0, waits()), dump(1, waits()), dump(2, waits())]);
        assert!(d.to_string().contains("the hang is in the communication"), "{d}");
        assert!(d.suspects.is_empty());
    }

    #[test]
    fn a_rank_without_a_record_is_named() {
        let waits = || vec![entry(4, AllReduce, Started)];
        let d = diagnose(&[dump(0, waits()), dump(2, waits())]);
        assert_eq!(d.suspects, [1]);
        assert!(d.findings[0].contains("rank 1 left no record"), "{d}");
    }

    #[test]
    fn the_odd_one_of_a_disagreement_is_named() {
        let d = diagnose(&[
            dump(0, vec![entry(7, AllReduce, Started)]),
            dump(1, vec![entry(7, Broadcast, Started)]),
            dump(2, vec![entry(7, AllReduce, Started)]),
        ]);
        assert_eq!(d.suspects, [1]);
        assert!(d.findings[0].contains("rank 1 called broadcast (train.rs:17)"), "{d}");
    }

    #[test]
    fn ranks_that_all_finished_are_no_finding() {
        let done = || vec![entry(0, AllReduce, Completed)];
        let d = diagnose(&[dump(0, done()), dump(1, done()), dump(2, done())]);
        assert!(d.suspects.is_empty() && d.to_string().contains("nothing hangs"), "{d}");
    }
}
