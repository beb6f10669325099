//! Collectives: who is behind the others, and who calls something else than they.

use std::collections::BTreeMap;

use super::words::{self, call, seconds, stuck};
use super::{Cause, Findings, FlightEntry, GroupRecord, Record, State, open_call};

/// The last collective of a rank.
fn last(group: &GroupRecord) -> Option<&FlightEntry> {
    group.entries.iter().filter(|e| e.activity.is_collective()).max_by_key(|e| e.seq)
}

pub(super) fn examine(name: &str, records: &[Record<'_>], out: &mut Findings) {
    disagreements(name, records, out);
    let lasts = || records.iter().filter_map(|(dump, group)| last(group).map(|e| (*dump, *group, e)));
    let Some((_, at, ahead)) = lasts().max_by_key(|(_, _, e)| e.seq) else { return };
    let waiting: Vec<_> =
        lasts().filter(|(_, _, e)| e.seq == ahead.seq && e.state != State::Completed).collect();
    let behind: Vec<_> = records.iter().filter(|(_, g)| last(g).is_none_or(|e| e.seq < ahead.seq)).collect();
    let others = words::ranks(waiting.iter().map(|(dump, ..)| dump.rank));
    let others =
        if others.is_empty() { "others have finished".to_owned() } else { format!("{others} waits") };
    let ahead_of = call(ahead, at);
    for (dump, group) in &behind {
        let rank = dump.rank;
        if let Some(e) = last(group).filter(|e| e.state != State::Completed) {
            let (what, since) = (call(e, group), seconds(dump.at_ns, e.started_ns));
            let finding = format!(
                "group {name}: rank {rank} {} in {what} since {since:.1} s, while {others} in {ahead_of}",
                stuck(e)
            );
            out.suspects.insert(rank);
            out.say(Cause::Communication, finding);
        } else if open_call(dump).is_some() {
            let (cause, instead) = words::instead(dump);
            out.held_up.insert(rank);
            out.say(
                cause,
                format!("group {name}: rank {rank} has not called {ahead_of}, where {others}: {instead}"),
            );
        } else {
            out.suspects.insert(rank);
            out.say(Cause::OwnCode, match last(group) {
                None => format!(
                    "group {name}: rank {rank} has called no collective, while {others} in {ahead_of}: the hang is in the rank's own code before its first collective"
                ),
                Some(e) => format!(
                    "group {name}: rank {rank} finished {} {:.1} s ago and has not called {ahead_of}, where {others}: the hang is in the rank's own code between the two",
                    call(e, group),
                    seconds(dump.at_ns, e.ended_ns)
                ),
            });
        }
    }
    if let (true, Some((dump, group, entry))) = (behind.is_empty(), waiting.first()) {
        let who = words::ranks(waiting.iter().map(|(dump, ..)| dump.rank));
        let place = format!("{} for {:.1} s", call(entry, group), seconds(dump.at_ns, entry.started_ns));
        let all = records.len() == group.ranks.len();
        out.say(Cause::Communication, match all {
            true => format!("group {name}: every rank has called {place} and {who} has not got out of it: the hang is in the communication"),
            false => format!("group {name}: {who} waits in {place} for ranks that left no record"),
        });
    }
}

/// The first collective at which ranks called different things.
fn disagreements(name: &str, records: &[Record<'_>], out: &mut Findings) {
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
                    let who = words::ranks(calls.iter().map(|(rank, _)| *rank));
                    format!("{who} called {} ({})", calls[0].1.activity.name(), calls[0].1.site)
                })
                .collect();
            out.suspects.extend(kinds.values().filter(|c| c.len() < most).flatten().map(|(rank, _)| *rank));
            out.say(
                Cause::Disagreement,
                format!("group {name}: ranks disagree at collective number {seq}: {}", said.join("; ")),
            );
            return;
        }
    }
}
