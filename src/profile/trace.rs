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

/// One rank is a process of the trace; its steps, its waiting and its communication are threads of it.
const LANES: [&str; 3] = ["steps", "waiting", "communication"];

/// The trace of all ranks as JSON.
pub(crate) fn to_json(ranks: &[RankEvents]) -> serde_json::Result<String> {
    let origin = ranks.iter().flat_map(|r| r.spans.iter().map(|s| s.from_ns)).min().unwrap_or(0);
    let mut lines: Vec<String> = Vec::new();
    for rank in ranks {
        let mut names = vec![(0, "process_name", format!("rank {}", rank.rank))];
        names.extend(LANES.iter().enumerate().map(|(tid, lane)| (tid, "thread_name", (*lane).to_owned())));
        for (tid, name, value) in names {
            lines.push(serde_json::to_string(&Metadata {
                name,
                ph: "M",
                pid: rank.rank,
                tid,
                args: Name { name: value },
            })?);
        }
        for span in &rank.spans {
            lines.push(serde_json::to_string(&event(rank, span, origin))?);
        }
    }
    Ok(format!("{{\"traceEvents\":[\n{}\n]}}\n", lines.join(",\n")))
}

fn event<'a>(rank: &RankEvents, span: &'a Span, origin: u64) -> TraceEvent<'a> {
    let (name, cat, tid, args) = match &span.event {
        Event::Step { .. } => ("step", "step", 0, None),
        Event::Blocked => ("wait", "wait", 1, None),
        Event::Communication { activity, group, seq, bytes } => {
            (activity.name(), "communication", 2, Some(Args { group, seq: *seq, bytes: *bytes }))
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
                },
            },
        ];
        let ranks: Vec<_> =
            (0..2).map(|rank| RankEvents { rank, event_ns: 0.0, spans: spans.clone() }).collect();
        let json: serde_json::Value = serde_json::from_str(&to_json(&ranks).unwrap()).unwrap();
        let events = json["traceEvents"].as_array().unwrap();
        let reduce = events.iter().find(|e| e["name"] == "all_reduce" && e["pid"] == 1).unwrap();
        assert_eq!((reduce["ts"].as_f64(), reduce["dur"].as_f64()), (Some(1.0), Some(2.5)));
        assert_eq!((reduce["args"]["seq"].as_u64(), reduce["args"]["bytes"].as_u64()), (Some(3), Some(64)));
        assert_eq!(events.iter().filter(|e| e["name"] == "process_name").count(), 2);
    }
}
