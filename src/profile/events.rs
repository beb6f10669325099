//! What a profiled rank keeps: spans on its own clock.

use serde::{Deserialize, Serialize};

use super::flight::Activity;

/// Something that took time.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Span {
    pub(crate) from_ns: u64,
    pub(crate) to_ns: u64,
    pub(crate) event: Event,
}

/// What it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) enum Event {
    /// A training step; how long its thread was on a core.
    Step { cpu_ns: u64 },
    /// A thread waited for communication: in a blocking call, in `Work::wait`.
    Blocked,
    /// A call, from its beginning to its end, whoever drove it.
    Communication { activity: Activity, group: String, seq: u64, bytes: u64 },
}

/// The spans of one rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RankEvents {
    pub(crate) rank: usize,
    /// What it costs to keep a span.
    pub(crate) event_ns: f64,
    pub(crate) spans: Vec<Span>,
}

/// The overlap of a span with others, which may overlap one another: counted once.
pub(crate) fn covered(from: u64, to: u64, others: impl Iterator<Item = (u64, u64)>) -> u64 {
    let mut inside: Vec<(u64, u64)> =
        others.map(|(a, b)| (a.max(from), b.min(to))).filter(|(a, b)| a < b).collect();
    inside.sort_unstable();
    let (mut total, mut end) = (0, from);
    for (a, b) in inside {
        total += b.saturating_sub(a.max(end));
        end = end.max(b);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::covered;

    #[test]
    fn overlapping_spans_are_counted_once_and_cut_to_the_window() {
        assert_eq!(covered(10, 20, [(0, 12), (11, 15), (14, 16), (19, 40)].into_iter()), 7);
        assert_eq!(covered(10, 20, std::iter::empty()), 0);
        assert_eq!(covered(10, 20, [(0, 40), (12, 13)].into_iter()), 10);
    }
}
