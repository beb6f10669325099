//! The trace file that Perfetto and chrome://tracing open.

use serde::Serialize;

use super::events::{Event, RankEvents, Span};

/// One complete event ("ph": "X") of the Trace Event Format; times in microseconds.
#[derive(Serialize)]
struct TraceEvent<'a> {
    name: &'a str,
    cat: &'a str,
    ph: &'static str,
    ts: f64,
    dur: f64,
    pid: usize,
    tid: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    args: Option<Args<'a>>,
}

#[derive(Serialize)]
struct Args<'a> {
    group: &'a str,
    seq: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct Metadata {
    name: &'static str,
    ph: &'static str,
    pid: usize,
    tid: usize,
    args: Name,
}

#[derive(Serialize)]
struct Name {
    name: String,
}

/// What the threads of a rank's process in the trace show, and the first of each; where spans of one sort overlap, there
/// are more threads of it, for a viewer wants spans of a thread inside or after each other.
const LANES: [&str; 3] = ["steps", "waiting", "communication"];

/// The trace of all ranks as JSON.
pub(crate) fn to_json(ranks: &[RankEvents]) -> serde_json::Result<String> {
    let origin = ranks.iter().flat_map(|r| r.spans.iter().map(|s| s.from_ns)).min().unwrap_or(0);
    let mut lines: Vec<String> = Vec::new();
    for rank in ranks {
        let mut name = |tid: usize, name, value: String| {
            let args = Name { name: value };
            serde_json::to_string(&Metadata { name, ph: "M", pid: rank.rank, tid, args })
                .map(|l| lines.push(l))
        };
        name(0, "process_name", format!("rank {}", rank.rank))?;
        let mut spans: Vec<&Span> = rank.spans.iter().collect();
        spans.sort_by_key(|span| (span.from_ns, std::cmp::Reverse(span.to_ns)));
        let mut free: [Vec<u64>; LANES.len()] = Default::default();
        let mut events = Vec::with_capacity(spans.len());
        for span in spans {
            let lane = lane(&span.event);
            let which = free[lane].iter().position(|&end| end <= span.from_ns).unwrap_or_else(|| {
                free[lane].push(0);
                free[lane].len() - 1
            });
            free[lane][which] = span.to_ns;
            events.push(event(rank, span, lane + LANES.len() * which, origin));
        }
        for (lane, threads) in free.iter().enumerate() {
            for which in 0..threads.len() {
                let number = if which == 0 { String::new() } else { format!(" {}", which + 1) };
                name(lane + LANES.len() * which, "thread_name", format!("{}{number}", LANES[lane]))?;
            }
        }
        for event in events {
            lines.push(serde_json::to_string(&event)?);
        }
    }
    Ok(format!("{{\"traceEvents\":[\n{}\n]}}\n", lines.join(",\n")))
}

fn lane(event: &Event) -> usize {
    match event {
        Event::Step { .. } => 0,
        Event::Blocked => 1,
        Event::Communication { .. } => 2,
    }
}

fn event<'a>(rank: &RankEvents, span: &'a Span, tid: usize, origin: u64) -> TraceEvent<'a> {
    let (name, cat, args) = match &span.event {
        Event::Step { .. } => ("step", "step", None),
        Event::Blocked => ("wait", "wait", None),
        Event::Communication { activity, group, seq, bytes, .. } => {
            (activity.name(), "communication", Some(Args { group, seq: *seq, bytes: *bytes }))
        }
    };
    let ts = span.from_ns.saturating_sub(origin) as f64 / 1e3;
    let dur = span.to_ns.saturating_sub(span.from_ns) as f64 / 1e3;
    TraceEvent { name, cat, ph: "X", ts, dur, pid: rank.rank, tid, args }
}

#[cfg(test)]
mod tests {
    use super::super::flight::Activity;
    use super::*;

    #[test]
    fn the_trace_is_json_with_a_process_for_each_rank() {
        let spans = vec![
            Span { from_ns: 1_000, to_ns: 9_000, event: Event::Step { cpu_ns: 5_000 } },
            Span {
                from_ns: 2_000,
                to_ns: 4_500,
                event: Event::Communication {
                    activity: Activity::AllReduce,
                    group: "0".into(),
                    seq: 3,
                    bytes: 64,
                    other: None,
                },
            },
        ];
        let ranks: Vec<_> = (0..2)
            .map(|rank| RankEvents { rank, world_rank: rank, event_ns: 0.0, spans: spans.clone() })
            .collect();
        let json: serde_json::Value = serde_json::from_str(&to_json(&ranks).unwrap()).unwrap();
        let events = json["traceEvents"].as_array().unwrap();
        let reduce = events.iter().find(|e| e["name"] == "all_reduce" && e["pid"] == 1).unwrap();
        assert_eq!((reduce["ts"].as_f64(), reduce["dur"].as_f64()), (Some(1.0), Some(2.5)));
        assert_eq!((reduce["args"]["seq"].as_u64(), reduce["args"]["bytes"].as_u64()), (Some(3), Some(64)));
        assert_eq!(events.iter().filter(|e| e["name"] == "process_name").count(), 2);
    }
    #[test]
    fn spans_that_overlap_are_on_threads_of_their_own() {
        let call = |from_ns, to_ns| {
            let (activity, group) = (Activity::AllReduce, "0".to_owned());
            let event = Event::Communication { activity, group, seq: from_ns, bytes: 4, other: None };
            Span { from_ns, to_ns, event }
        };
        // The first two overlap; the third begins where the first ends.
        let spans = vec![call(10, 30), call(20, 50), call(30, 40)];
        let json = to_json(&[RankEvents { rank: 0, world_rank: 0, event_ns: 0.0, spans }]).unwrap();
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        let events = json["traceEvents"].as_array().unwrap();
        let thread = |seq: u64| &events.iter().find(|e| e["args"]["seq"] == seq).unwrap()["tid"];
        assert_eq!([thread(10), thread(20), thread(30)], [2, 5, 2]);
        let names = events.iter().filter(|e| e["name"] == "thread_name").map(|e| e["args"]["name"].as_str());
        assert_eq!(names.flatten().collect::<Vec<_>>(), ["communication", "communication 2"]);
    }
}
