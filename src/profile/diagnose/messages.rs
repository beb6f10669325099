//! Messages: who waits for whom, and whether the other side has called.

use std::collections::BTreeSet;

use super::super::flight::Activity;
use super::words::{self, call, seconds, stuck};
use super::{Cause, Findings, FlightEntry, GroupRecord, Record, State};

pub(super) fn examine(name: &str, records: &[Record<'_>], out: &mut Findings) {
    for record in records {
        // Messages between two ranks keep their order, so the oldest open one is what those after it wait for.
        let mut seen = BTreeSet::new();
        let open = |e: &&FlightEntry| e.state != State::Completed;
        for entry in messages(record.1).filter(open) {
            if seen.insert((entry.activity, entry.peer, entry.tag)) {
                explain(name, record, entry, records, out);
            }
        }
    }
}

/// Says of an open message what the rank at its other end does.
fn explain(name: &str, record: &Record<'_>, entry: &FlightEntry, records: &[Record<'_>], out: &mut Findings) {
    let (dump, group) = *record;
    let what = call(entry, group);
    let since = seconds(dump.at_ns, entry.started_ns);
    let waits = format!("group {name}: rank {} {} in {what} since {since:.1} s", dump.rank, stuck(entry));
    let Some(peer) = entry.peer else { return out.say(Cause::Communication, waits) };
    let other = group.ranks.get(peer).copied().unwrap_or(peer);
    let Some(&(their_dump, their_group)) = records.iter().find(|(dump, _)| dump.rank == other) else {
        return out.say(Cause::HeldUp, format!("{waits}, for a rank that left no record"));
    };
    let here = group.ranks.iter().position(|&rank| rank == dump.rank);
    let sent = entry.activity == Activity::Send;
    let theirs = if sent { Activity::Recv } else { Activity::Send };
    let answers = |e: &&FlightEntry| {
        e.activity == theirs && e.tag == entry.tag && (e.peer == here || (sent && e.peer.is_none()))
    };
    if their_group.entries.iter().filter(answers).any(|e| e.state != State::Completed) {
        // Both sides say so; the receiver speaks.
        if !sent {
            let finding =
                format!("{waits}, and rank {other} in the send of it: the hang is in the communication");
            out.say(Cause::Communication, finding);
        }
        return;
    }
    if !sent && more_sent_than_received(group, their_group, entry, here) {
        let finding = format!("{waits}, and rank {other} has sent it: the hang is in the communication");
        return out.say(Cause::Communication, finding);
    }
    let (cause, instead) = words::instead(their_dump);
    if cause == Cause::OwnCode {
        out.suspects.insert(other);
    }
    out.held_up.insert(dump.rank);
    let missing = if sent { "received" } else { "sent" };
    out.say(cause, format!("{waits}, which rank {other} has not {missing}: {instead}"));
}

fn messages(group: &GroupRecord) -> impl Iterator<Item = &FlightEntry> {
    group.entries.iter().filter(|e| !e.activity.is_collective())
}

/// Whether more of these messages have left the sender than have come to the receiver: known where both records go back
/// to the first message.
fn more_sent_than_received(
    group: &GroupRecord,
    their_group: &GroupRecord,
    entry: &FlightEntry,
    here: Option<usize>,
) -> bool {
    let whole = |group: &GroupRecord| messages(group).next().is_none_or(|e| e.seq == 0);
    let from_any = messages(group).any(|e| e.activity == Activity::Recv && e.peer.is_none());
    let done = |group: &GroupRecord, activity: Activity, peer: Option<usize>| {
        let like = |e: &&FlightEntry| e.activity == activity && e.tag == entry.tag && e.peer == peer;
        messages(group).filter(like).filter(|e| e.state == State::Completed).count()
    };
    whole(group)
        && whole(their_group)
        && !from_any
        && done(their_group, Activity::Send, here) > done(group, Activity::Recv, entry.peer)
}
