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
    /// A call, from its beginning to its end, whoever drove it; a message has another side.
    Communication { activity: Activity, group: String, seq: u64, bytes: u64, other: Option<Other> },
}

/// The other side of a message.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Other {
    /// Its rank in the world; `None` for a receive from any.
    pub(crate) rank: Option<usize>,
    pub(crate) tag: u32,
}

/// The spans of one rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RankEvents {
    /// In the profiled group.
    pub(crate) rank: usize,
    /// In the world.
    pub(crate) world_rank: usize,
    /// What it costs to keep a span.
    pub(crate) event_ns: f64,
    pub(crate) spans: Vec<Span>,
}

/// Spans of time without overlap, in order.
pub(crate) struct Union(Vec<(u64, u64)>);

impl Union {
    /// What these cover, which may overlap one another.
    pub(crate) fn new(spans: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let mut spans: Vec<_> = spans.into_iter().filter(|(from, to)| from < to).collect();
        spans.sort_unstable();
        let mut apart: Vec<(u64, u64)> = Vec::with_capacity(spans.len());
        for (from, to) in spans {
            match apart.last_mut() {
                Some((_, end)) if from <= *end => *end = to.max(*end),
                _ => apart.push((from, to)),
            }
        }
        Self(apart)
    }

    /// The parts of it within a window.
    pub(crate) fn within(&self, from: u64, to: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let first = self.0.partition_point(|&(_, end)| end <= from);
        self.0[first..].iter().map(move |&(a, b)| (a.max(from), b.min(to))).take_while(|(a, b)| a < b)
    }

    /// How much of a window it covers.
    pub(crate) fn covers(&self, from: u64, to: u64) -> u64 {
        self.within(from, to).map(|(a, b)| b - a).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::Union;

    #[test]
    fn overlapping_spans_are_counted_once_and_cut_to_the_window() {
        let covered = |spans: &[(u64, u64)]| Union::new(spans.iter().copied()).covers(10, 20);
        assert_eq!(covered(&[(19, 40), (11, 15), (14, 16), (0, 12)]), 7);
        assert_eq!(covered(&[]), 0);
        assert_eq!(covered(&[(0, 40), (12, 13)]), 10);
        assert_eq!(covered(&[(0, 10), (20, 30), (15, 15)]), 0);
    }
}
