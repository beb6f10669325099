//! Switching a profile on, marking steps, gathering the result.

use std::path::PathBuf;
use std::sync::Arc;

use super::clock;
use super::events::{Event, RankEvents, Span};
use super::instrument::{RankInstrument, nanoseconds_per_event};
use super::report::Report;
use crate::{ProcessGroup, Result};

/// How to profile.
#[derive(Clone, Debug, Default)]
pub struct ProfileOptions {
    enabled: Option<bool>,
    trace_file: Option<PathBuf>,
}

impl ProfileOptions {
    /// As `TCH_DISTRIBUTED_PROFILE` says: unset, empty or `0`: off; `1`: on; else on, with that trace file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Switches the profile on or off, whatever the variable says.
    pub fn enabled(mut self, on: bool) -> Self {
        self.enabled = Some(on);
        self
    }

    /// Rank 0 writes the trace of all ranks there at the end.
    pub fn trace_file(mut self, path: impl Into<PathBuf>) -> Self {
        self.trace_file = Some(path.into());
        self
    }
}

/// Profiles the steps of a training loop on every rank of a group.
///
/// Everything that this rank sends through any of its groups is counted, whoever sends it: the loop, DDP,
/// a pipeline. See the [module](super) for an example.
#[derive(Debug)]
pub struct Profiler {
    group: ProcessGroup,
    on: bool,
    trace_file: Option<PathBuf>,
    clock_ahead_ns: i64,
    event_ns: f64,
}

impl Profiler {
    /// Begins to profile. A collective where the profile is on: every rank of the group calls it, with the
    /// profile on, or none.
    pub fn new(group: &ProcessGroup, options: ProfileOptions) -> Result<Self> {
        let variable = std::env::var("TCH_DISTRIBUTED_PROFILE").ok().filter(|v| !v.is_empty() && v != "0");
        let on = options.enabled.unwrap_or(variable.is_some());
        let trace_file = options.trace_file.or_else(|| variable.filter(|v| v != "1").map(PathBuf::from));
        let mut profiler = Self { group: group.clone(), on, trace_file, clock_ahead_ns: 0, event_ns: 0.0 };
        if on {
            profiler.event_ns = nanoseconds_per_event();
            profiler.clock_ahead_ns = clock::offset_ns(group)?;
            group.barrier()?;
            let rank = profiler.rank();
            rank.take_spans();
            rank.start_profiling();
        }
        Ok(profiler)
    }

    fn rank(&self) -> &Arc<RankInstrument> {
        self.group.instrument().shared()
    }

    /// Runs one training step. With the profile off, nothing more than a span for a collector.
    pub fn step<T>(&self, step: impl FnOnce() -> T) -> T {
        let _span = tracing::debug_span!(target: "tch_distributed", "step").entered();
        if !self.on {
            return step();
        }
        let (from_ns, from_cpu) = (clock::now_ns(), clock::thread_cpu_ns());
        let result = step();
        let cpu_ns = clock::thread_cpu_ns().saturating_sub(from_cpu);
        self.rank().push(Span { from_ns, to_ns: clock::now_ns(), event: Event::Step { cpu_ns } });
        result
    }

    /// Whether it is on.
    pub fn is_enabled(&self) -> bool {
        self.on
    }

    /// Ends the profile and gathers it from all ranks, each of which gets it; `None` with the profile off.
    /// Rank 0 writes the trace file where one was asked for. A collective where the profile is on.
    pub fn finish(mut self) -> Result<Option<Report>> {
        if !std::mem::take(&mut self.on) {
            return Ok(None);
        }
        let rank = self.rank();
        rank.set_profiling(false);
        let ahead = self.clock_ahead_ns;
        let mut spans = rank.take_spans();
        for span in &mut spans {
            span.from_ns = span.from_ns.saturating_add_signed(-ahead);
            span.to_ns = span.to_ns.saturating_add_signed(-ahead);
        }
        let rank = self.group.rank();
        let world_rank = self.group.ranks()[rank];
        let own = RankEvents { rank, world_rank, event_ns: self.event_ns, spans };
        let report = Report::new(self.group.all_gather_object(&own)?);
        if let (0, Some(path)) = (self.group.rank(), &self.trace_file) {
            report.write_trace(path)?;
        }
        Ok(Some(report))
    }
}

impl Drop for Profiler {
    fn drop(&mut self) {
        if self.on {
            self.rank().set_profiling(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tch::Tensor;

    use super::*;
    use crate::InitOptions;
    use crate::ReduceOp;
    use crate::testing::{run_threads, run_threads_on};

    #[test]
    fn a_slowed_rank_is_named_and_others_are_seen_to_wait() {
        let reports = run_threads(3, |group| {
            let profiler = Profiler::new(&group, ProfileOptions::new().enabled(true)).unwrap();
            for _ in 0..4 {
                profiler.step(|| {
                    if group.rank() == 1 {
                        std::thread::sleep(Duration::from_millis(200));
                    }
                    let mut t = Tensor::from_slice(&[1.0f32; 256]);
                    group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
                });
            }
            profiler.finish().unwrap().unwrap()
        });
        assert_eq!(reports[0], reports[2]);
        let report = &reports[0];
        assert_eq!(report.slowest().map(|s| s.0), Some(1), "{report}");
        assert!(report.ranks[0].waiting > report.ranks[1].waiting, "{report}");
        assert!(report.ranks[1].idle > report.ranks[0].idle, "{report}");
        let reduce = report.activities.iter().find(|a| a.activity.name() == "all_reduce").unwrap();
        assert_eq!((reduce.count, reduce.bytes), (12, 12 * 1024));
    }

    #[test]
    fn a_slowed_stage_is_named_also_where_the_others_wait_for_messages() {
        let reports = run_threads(3, |group| {
            let profiler = Profiler::new(&group, ProfileOptions::new().enabled(true)).unwrap();
            let mut t = Tensor::from_slice(&[1.0f32; 256]);
            for _ in 0..4 {
                // From rank 2 by rank 1 to rank 0; rank 2 is slow, and rank 1 waits too.
                profiler.step(|| match group.rank() {
                    0 => drop(group.recv(&mut t, 1, 0).unwrap()),
                    1 => {
                        group.recv(&mut t, 2, 0).unwrap();
                        group.send(&t, 0, 0).unwrap();
                    }
                    _ => {
                        std::thread::sleep(Duration::from_millis(400));
                        group.send(&t, 1, 0).unwrap();
                    }
                });
            }
            profiler.finish().unwrap().unwrap()
        });
        assert_eq!(reports[0].slowest().map(|s| s.0), Some(2), "{}", reports[0]);
    }

    #[test]
    fn a_group_over_gloo_is_profiled_too() {
        let reports = run_threads_on("gloo", InitOptions::new(), 2, |group| {
            let profiler = Profiler::new(&group, ProfileOptions::new().enabled(true)).unwrap();
            let mut t = Tensor::from_slice(&[1.0f32; 4]);
            profiler.step(|| group.all_reduce(&mut t, ReduceOp::Sum).unwrap());
            profiler.finish().unwrap().unwrap()
        });
        assert_eq!(reports[0], reports[1]);
        let reduce = reports[0].activities.iter().find(|a| a.activity.name() == "all_reduce").unwrap();
        assert_eq!((reduce.count, reduce.bytes), (2, 2 * 16));
    }

    #[test]
    fn switched_off_it_passes_steps_through() {
        run_threads(2, |group| {
            let profiler = Profiler::new(&group, ProfileOptions::new().enabled(false)).unwrap();
            assert_eq!(profiler.step(|| 7), 7);
            assert!(profiler.finish().unwrap().is_none());
        });
    }

    #[test]
    fn the_trace_holds_the_steps_of_all_ranks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.json");
        run_threads(2, |group| {
            let options = ProfileOptions::new().enabled(true).trace_file(&path);
            let profiler = Profiler::new(&group, options).unwrap();
            profiler.step(|| group.barrier().unwrap());
            profiler.finish().unwrap();
        });
        let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let steps = json["traceEvents"].as_array().unwrap().iter().filter(|e| e["name"] == "step").count();
        assert_eq!(steps, 2);
    }
}
