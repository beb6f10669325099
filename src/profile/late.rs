//! Who was late, and how long others waited for it.

use std::collections::BTreeMap;

use super::events::{Event, Other, RankEvents, Union};
use super::flight::Activity;
use super::report::{RankReport, blocked, seconds};

/// A call of a rank, by its place in the list: from when to when.
type Call = (usize, u64, u64);

/// The messages of one tag from one rank of the world to another in one group.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Way<'a> {
    group: &'a str,
    from: usize,
    to: usize,
    tag: u32,
}

/// For each collective, who called last, and for each message, whether it was sent after its receiver asked for it:
/// others were blocked until then.
pub(super) fn find(events: &[RankEvents], reports: &mut [RankReport]) {
    let blocked: Vec<Union> = events.iter().map(blocked).collect();
    let mut waits: Vec<Vec<(u64, u64)>> = vec![Vec::new(); events.len()];
    let mut note = |waiter: usize, late: usize, from: u64, to: u64| {
        let parts = blocked[waiter].within(from, to);
        waits[waiter].extend(parts);
        reports[late].caused += seconds(blocked[waiter].covers(from, to));
    };

    let mut collectives: BTreeMap<(&str, u64), Vec<Call>> = BTreeMap::new();
    let mut messages: BTreeMap<Way<'_>, [Vec<Call>; 2]> = BTreeMap::new();
    for (index, rank) in events.iter().enumerate() {
        for span in &rank.spans {
            let Event::Communication { activity, group, seq, other, .. } = &span.event else { continue };
            let call = (index, span.from_ns, span.to_ns);
            match *other {
                None if activity.is_collective() => collectives.entry((group, *seq)).or_default().push(call),
                Some(Other { rank: Some(other), tag }) => {
                    let sent = *activity == Activity::Send;
                    let (from, to) = if sent { (rank.world_rank, other) } else { (other, rank.world_rank) };
                    let way = Way { group, from, to, tag };
                    messages.entry(way).or_default()[usize::from(!sent)].push(call);
                }
                // A receive from any rank could not know for whom it waits.
                _ => {}
            }
        }
    }
    for calls in collectives.values() {
        let Some(&(last, at, _)) = calls.iter().max_by_key(|(_, from, _)| *from) else { continue };
        for &(index, from, to) in calls.iter().filter(|(index, ..)| *index != last) {
            note(index, last, from, to.min(at));
        }
    }
    for (way, [sent, received]) in &mut messages {
        if way.from == way.to {
            continue;
        }
        // They arrive in the order in which they were sent, and are kept here as they ended.
        sent.sort_by_key(|(_, from, _)| *from);
        received.sort_by_key(|(_, from, _)| *from);
        for (&(sender, at, _), &(receiver, from, to)) in sent.iter().zip(&*received) {
            note(receiver, sender, from, to.min(at));
        }
    }
    for (report, waits) in reports.iter_mut().zip(waits) {
        report.waiting = seconds(Union::new(waits).covers(0, u64::MAX));
    }
}
