//! Ranks and calls in words.

use super::super::flight::Activity;
use super::{Cause, FlightDump, FlightEntry, GroupRecord, State};

pub(super) fn ranks(ranks: impl Iterator<Item = usize>) -> String {
    let ranks: Vec<_> = ranks.map(|r| r.to_string()).collect();
    match &ranks[..] {
        [] => String::new(),
        [one] => format!("rank {one}"),
        many => format!("each of ranks {}", many.join(", ")),
    }
}

/// `barrier number 3 (train.rs:10)`, `recv number 0 from rank 2 with tag 7 (train.rs:11)`.
pub(super) fn call(entry: &FlightEntry, group: &GroupRecord) -> String {
    let FlightEntry { activity, seq, site, peer, tag, .. } = entry;
    let name = activity.name();
    let Some(tag) = tag else { return format!("{name} number {seq} ({site})") };
    let way = if *activity == Activity::Send { "to" } else { "from" };
    let peer = match peer {
        None => "any rank".to_owned(),
        Some(peer) => match group.ranks.get(*peer) {
            Some(rank) => format!("rank {rank}"),
            None => format!("rank {peer} of the group"),
        },
    };
    format!("{name} number {seq} {way} {peer} with tag {tag} ({site})")
}

/// What a rank does instead of the call that another waits for, and where that puts the hang.
pub(super) fn instead(dump: &FlightDump) -> (Cause, String) {
    let place = |group: &GroupRecord, entry| format!("{} of group {}", call(entry, group), group.name);
    if let Some((group, entry)) = super::open_call(dump) {
        let (place, since) = (place(group, entry), seconds(dump.at_ns, entry.started_ns));
        return (
            Cause::HeldUp,
            match entry.state {
                State::Failed => format!("it failed in {place}, which it had called {since:.1} s before"),
                _ => format!(
                    "it is in {place} since {since:.1} s and hangs there, or, if it does not wait for that, in its own code"
                ),
            },
        );
    }
    let text = match super::last_call(dump) {
        None => format!("it has made no call: the hang is in the own code of rank {}", dump.rank),
        Some((group, entry)) => format!(
            "its last call, {}, ended {:.1} s ago: the hang is in the own code of rank {} after that",
            place(group, entry),
            seconds(dump.at_ns, entry.ended_ns),
            dump.rank
        ),
    };
    (Cause::OwnCode, text)
}

/// To follow the name of a rank.
pub(super) fn stuck(entry: &FlightEntry) -> &'static str {
    if entry.state == State::Failed { "failed" } else { "waits" }
}

pub(super) fn seconds(now: u64, then: u64) -> f64 {
    now.saturating_sub(then) as f64 / 1e9
}
