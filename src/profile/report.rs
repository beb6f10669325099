//! Where the time of each step went, on each rank.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::events::{Event, RankEvents, Union};
use super::flight::Activity;
use super::{late, trace};
use crate::{Error, Result};

/// The time of one rank over all its profiled steps, in seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RankReport {
    /// The rank of the profiled group.
    pub rank: usize,
    /// How many steps there were.
    pub steps: usize,
    /// From each step's beginning to its end.
    pub wall: f64,
    /// On a core and not waiting.
    pub compute: f64,
    /// Operations in flight, hidden behind computing or not; overlapping ones counted once.
    pub communication: f64,
    /// Spent waiting in a blocking call or in `Work::wait`: not hidden by computing.
    pub exposed: f64,
    /// The part of `exposed` before the last rank had called, or the sender of a message: waiting for stragglers.
    pub waiting: f64,
    /// Neither computing nor waiting for communication: asleep, reading, or another process had the core.
    pub idle: f64,
    /// How long other ranks waited because this one called last.
    pub caused: f64,
}

/// All calls of one name, over all ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActivityReport {
    /// What was called.
    pub activity: Activity,
    /// How often, on all ranks together.
    pub count: u64,
    /// Bytes of each rank's side, added up.
    pub bytes: u64,
    /// From call to end, added up, in seconds.
    pub seconds: f64,
}

impl ActivityReport {
    /// Bytes a second, over calls that took time; 0 where none did.
    pub fn bandwidth(&self) -> f64 {
        if self.seconds > 0.0 { self.bytes as f64 / self.seconds } else { 0.0 }
    }
}

/// What the profile itself costs: events kept times the cost of one, which is measured when the profile begins.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Overhead {
    /// Events kept in a step, on the rank that keeps most.
    pub events_per_step: f64,
    /// Nanoseconds an event, on the slowest rank.
    pub nanoseconds_per_event: f64,
    /// Their product as a share of a step.
    pub share: f64,
}

impl Overhead {
    fn new(events: &[RankEvents], ranks: &[RankReport]) -> Self {
        let steps = |r: &RankReport| r.steps.max(1) as f64;
        let kept = events.iter().zip(ranks).map(|(e, r)| e.spans.len() as f64 / steps(r));
        let events_per_step = kept.fold(0.0, f64::max);
        let nanoseconds_per_event = events.iter().map(|e| e.event_ns).fold(0.0, f64::max);
        let step = ranks.iter().map(|r| r.wall / steps(r)).fold(0.0, f64::max);
        let cost = events_per_step * nanoseconds_per_event / 1e9;
        Self { events_per_step, nanoseconds_per_event, share: if step > 0.0 { cost / step } else { 0.0 } }
    }
}

/// What a profile says: see [`Profiler::finish`](super::Profiler::finish). `Display` prints a table.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// One for each rank, in order.
    pub ranks: Vec<RankReport>,
    /// One for each operation that was called.
    pub activities: Vec<ActivityReport>,
    /// What the profile itself costs.
    pub overhead: Overhead,
    events: Vec<RankEvents>,
}

impl Report {
    pub(crate) fn new(events: Vec<RankEvents>) -> Self {
        let mut ranks: Vec<RankReport> = events.iter().map(rank_report).collect();
        late::find(&events, &mut ranks);
        let overhead = Overhead::new(&events, &ranks);
        Self { ranks, activities: activities(&events), overhead, events }
    }

    /// The rank that others waited for longest, and for how many seconds; `None` where nobody waited. A rank that is late
    /// because it waited itself, as a stage of a pipeline behind a slow one, is not it: what it waited is taken off.
    pub fn slowest(&self) -> Option<(usize, f64)> {
        let own = |r: &RankReport| r.caused - r.waiting;
        let late = self.ranks.iter().filter(|r| r.caused > 0.0);
        late.max_by(|a, b| own(a).total_cmp(&own(b))).map(|worst| (worst.rank, worst.caused))
    }

    /// Writes the trace of all ranks, on one clock: open it in Perfetto or chrome://tracing.
    pub fn write_trace(&self, path: impl AsRef<Path>) -> Result<()> {
        let json = trace::to_json(&self.events).map_err(|e| Error::Object { reason: e.to_string() })?;
        Ok(std::fs::write(path, json)?)
    }
}

pub(super) fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// When a rank was blocked by communication.
pub(super) fn blocked(rank: &RankEvents) -> Union {
    let spans = rank.spans.iter().filter(|s| s.event == Event::Blocked);
    Union::new(spans.map(|s| (s.from_ns, s.to_ns)))
}

fn rank_report(rank: &RankEvents) -> RankReport {
    let mut report = RankReport { rank: rank.rank, ..RankReport::default() };
    let flying = rank.spans.iter().filter(|s| matches!(s.event, Event::Communication { .. }));
    let (flying, blocked) = (Union::new(flying.map(|s| (s.from_ns, s.to_ns))), blocked(rank));
    for span in &rank.spans {
        let Event::Step { cpu_ns } = span.event else { continue };
        let (from, to) = (span.from_ns, span.to_ns);
        let exposed = seconds(blocked.covers(from, to));
        let wall = seconds(to.saturating_sub(from));
        // Waiting may spin on a core, so only what lies outside it can be computing.
        let compute = seconds(cpu_ns).min(wall - exposed).max(0.0);
        report.steps += 1;
        report.wall += wall;
        report.compute += compute;
        report.exposed += exposed;
        report.communication += seconds(flying.covers(from, to));
        report.idle += (wall - exposed - compute).max(0.0);
    }
    report
}

fn activities(events: &[RankEvents]) -> Vec<ActivityReport> {
    let mut all: BTreeMap<Activity, ActivityReport> = BTreeMap::new();
    for span in events.iter().flat_map(|r| &r.spans) {
        if let Event::Communication { activity, bytes, .. } = span.event {
            let entry =
                all.entry(activity).or_insert(ActivityReport { activity, count: 0, bytes: 0, seconds: 0.0 });
            entry.count += 1;
            entry.bytes += bytes;
            entry.seconds += seconds(span.to_ns.saturating_sub(span.from_ns));
        }
    }
    all.into_values().collect()
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "milliseconds a step")?;
        writeln!(
            f,
            "{:>5} {:>6} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "rank", "steps", "step", "compute", "comm", "exposed", "waiting", "idle"
        )?;
        for r in &self.ranks {
            let ms = |s: f64| s * 1e3 / r.steps.max(1) as f64;
            writeln!(
                f,
                "{:>5} {:>6} {:>9.3} {:>9.3} {:>9.3} {:>9.3} {:>9.3} {:>9.3}",
                r.rank,
                r.steps,
                ms(r.wall),
                ms(r.compute),
                ms(r.communication),
                ms(r.exposed),
                ms(r.waiting),
                ms(r.idle)
            )?;
        }
        writeln!(f, "{:>14} {:>9} {:>12} {:>11} {:>9}", "operation", "calls", "bytes", "mean (us)", "GB/s")?;
        for a in &self.activities {
            let mean = a.seconds * 1e6 / a.count.max(1) as f64;
            writeln!(
                f,
                "{:>14} {:>9} {:>12} {:>11.1} {:>9.3}",
                a.activity.name(),
                a.count,
                a.bytes,
                mean,
                a.bandwidth() / 1e9
            )?;
        }
        let Overhead { events_per_step, nanoseconds_per_event, share } = self.overhead;
        writeln!(
            f,
            "profiling: {events_per_step:.1} events a step x {nanoseconds_per_event:.0} ns each, {:.4} % of a step",
            100.0 * share
        )?;
        match self.slowest() {
            Some((rank, caused)) => {
                writeln!(f, "slowest: rank {rank}, for which others waited {:.3} ms in all", caused * 1e3)
            }
            None => writeln!(f, "slowest: none, nobody waited"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::events::{Other, Span};
    use super::*;

    const MS: u64 = 1_000_000;

    fn call(seq: u64, from: u64, to: u64) -> [Span; 2] {
        let group = "0".to_owned();
        let event =
            Event::Communication { activity: Activity::AllReduce, group, seq, bytes: 1000, other: None };
        [
            Span { from_ns: from * MS, to_ns: to * MS, event },
            Span { from_ns: from * MS, to_ns: to * MS, event: Event::Blocked },
        ]
    }

    fn message(activity: Activity, rank: usize, from: u64, to: u64) -> [Span; 2] {
        let (group, other) = ("0".to_owned(), Some(Other { rank: Some(rank), tag: 0 }));
        let event = Event::Communication { activity, group, seq: 0, bytes: 8, other };
        [
            Span { from_ns: from * MS, to_ns: to * MS, event },
            Span { from_ns: from * MS, to_ns: to * MS, event: Event::Blocked },
        ]
    }

    fn events(rank: usize, event_ns: f64, spans: impl IntoIterator<Item = Span>) -> RankEvents {
        RankEvents { rank, world_rank: rank, event_ns, spans: spans.into_iter().collect() }
    }

    fn step(from: u64, to: u64, cpu: u64) -> Span {
        Span { from_ns: from * MS, to_ns: to * MS, event: Event::Step { cpu_ns: cpu * MS } }
    }

    #[test]
    fn the_late_rank_is_the_slowest_and_the_others_waited_for_it() {
        let [a, b] = call(0, 10, 42);
        let [c, d] = call(0, 40, 42);
        let report = Report::new(vec![
            events(0, 500.0, [step(0, 50, 15), a, b]),
            events(1, 400.0, [step(0, 50, 45), c, d]),
        ]);
        assert_eq!(report.slowest().map(|(rank, _)| rank), Some(1));
        let first = &report.ranks[0];
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        assert!(near(first.waiting, 0.030) && near(first.exposed, 0.032), "{first:?}");
        assert!(near(first.compute, 0.015) && near(first.idle, 0.003), "{first:?}");
        assert_eq!((report.activities[0].count, report.activities[0].bytes), (2, 2000));
        assert!(report.to_string().contains("slowest: rank 1"), "{report}");
        // Three events of 500 ns in a step of 50 ms.
        let Overhead { events_per_step, nanoseconds_per_event, share } = report.overhead;
        assert_eq!((events_per_step, nanoseconds_per_event), (3.0, 500.0));
        assert!(near(share, 1500e-9 / 50e-3), "{share}");
    }

    #[test]
    fn communication_behind_computing_is_not_exposed() {
        let [hidden, _] = call(0, 10, 30);
        let report = Report::new(vec![events(0, 500.0, [step(0, 40, 40), hidden])]);
        assert_eq!(report.ranks[0].exposed, 0.0);
        assert!((report.ranks[0].communication - 0.020).abs() < 1e-9);
        assert_eq!(report.slowest(), None);
    }

    #[test]
    fn the_stage_that_sends_late_is_the_slowest_and_not_the_one_between() {
        // Rank 2 sends to rank 1 at 40 ms, and rank 1 to rank 0 at 42 ms.
        let [a, b] = message(Activity::Send, 1, 40, 41);
        let [c, d] = message(Activity::Recv, 2, 0, 41);
        let [e, f] = message(Activity::Send, 0, 42, 43);
        let [g, h] = message(Activity::Recv, 1, 1, 43);
        let report = Report::new(vec![
            events(0, 0.0, [step(0, 50, 5), g, h]),
            events(1, 0.0, [step(0, 50, 5), c, d, e, f]),
            events(2, 0.0, [step(0, 50, 45), a, b]),
        ]);
        let near = |a: f64, b: f64| (a - b).abs() < 1e-9;
        let waiting: Vec<_> = report.ranks.iter().map(|r| r.waiting).collect();
        assert!(near(waiting[0], 0.041) && near(waiting[1], 0.040) && near(waiting[2], 0.0), "{report}");
        let (rank, caused) = report.slowest().unwrap();
        assert!(rank == 2 && near(caused, 0.040), "{report}");
    }
}
