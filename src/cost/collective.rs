//! The time of a collective by algorithm.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Link;

/// A collective, as the model knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Collective {
    /// Bytes: of one rank's tensor.
    AllReduce,
    /// Bytes: of the tensor.
    Broadcast,
    /// Bytes: of one rank's tensor.
    Reduce,
    /// Bytes: of the output.
    AllGather,
    /// Bytes: of the input.
    ReduceScatter,
    /// Bytes: of one rank's input.
    AllToAll,
    /// Bytes: of the message.
    SendRecv,
    /// Bytes do not matter.
    Barrier,
}

impl Collective {
    /// Every collective.
    pub const ALL: [Self; 8] = [
        Self::AllReduce,
        Self::Broadcast,
        Self::Reduce,
        Self::AllGather,
        Self::ReduceScatter,
        Self::AllToAll,
        Self::SendRecv,
        Self::Barrier,
    ];
}

impl fmt::Display for Collective {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::AllReduce => "all_reduce",
            Self::Broadcast => "broadcast",
            Self::Reduce => "reduce",
            Self::AllGather => "all_gather",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllToAll => "all_to_all",
            Self::SendRecv => "send_recv",
            Self::Barrier => "barrier",
        })
    }
}

/// How a collective is made of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Algorithm {
    /// Neighbour to neighbour, `n − 1` rounds of `1/n` of the data: least bytes.
    Ring,
    /// Every rank sends each other rank its share at once: the ring's bytes, one round of latency.
    Direct,
    /// Everybody sends everything to everybody: one round, most bytes.
    OneShot,
    /// Partners at distance 1, 2, 4 …: `⌈log2 n⌉` rounds of all the data.
    RecursiveDoubling,
    /// A tree from the root: `⌈log2 n⌉` rounds of all the data.
    BinomialTree,
    /// Empty messages at distance 1, 2, 4 …: a barrier.
    Dissemination,
}

/// What an algorithm costs: so many latencies, so many bytes sent one after another, so many combined.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Terms {
    pub(crate) messages: f64,
    pub(crate) bytes: f64,
    pub(crate) combined: f64,
}

impl Algorithm {
    /// Every algorithm.
    pub const ALL: [Self; 6] = [
        Self::Ring,
        Self::Direct,
        Self::OneShot,
        Self::RecursiveDoubling,
        Self::BinomialTree,
        Self::Dissemination,
    ];

    /// The predicted seconds of a collective on `bytes` among `ranks`; `None` where the algorithm does not
    /// do that collective. What `bytes` counts is said at [`Collective`].
    pub fn time(self, collective: Collective, bytes: usize, ranks: usize, link: &Link) -> Option<f64> {
        self.terms(collective, bytes, ranks).map(|terms| link.time(terms))
    }

    /// The quickest algorithm for a collective, with its time.
    pub fn best(collective: Collective, bytes: usize, ranks: usize, link: &Link) -> (Self, f64) {
        Self::ALL
            .into_iter()
            .filter_map(|a| Some((a, a.time(collective, bytes, ranks, link)?)))
            .min_by(|a, b| a.1.total_cmp(&b.1))
            .unwrap_or((Self::Direct, 0.0))
    }

    pub(crate) fn terms(self, collective: Collective, bytes: usize, ranks: usize) -> Option<Terms> {
        use Collective as C;
        if ranks <= 1 {
            return Some(Terms::default());
        }
        let (n, s) = (ranks as f64, bytes as f64);
        let rounds = f64::from((ranks - 1).ilog2() + 1); // ⌈log2 n⌉
        let share = s * (n - 1.0) / n;
        let terms = |messages, bytes, combined| Some(Terms { messages, bytes, combined });
        match (self, collective) {
            (_, C::SendRecv) => terms(1.0, s, 0.0),
            (Self::Ring, C::AllReduce) => terms(2.0 * (n - 1.0), 2.0 * share, share),
            (Self::Ring, C::AllGather) => terms(n - 1.0, share, 0.0),
            (Self::Ring, C::ReduceScatter) => terms(n - 1.0, share, share),
            (Self::Direct, C::AllReduce) => terms(2.0, 2.0 * share, share),
            (Self::Direct, C::AllGather | C::AllToAll) => terms(1.0, share, 0.0),
            (Self::Direct, C::ReduceScatter) => terms(1.0, share, share),
            (Self::OneShot, C::AllReduce) => terms(1.0, s * (n - 1.0), s * (n - 1.0)),
            (Self::RecursiveDoubling, C::AllReduce) => terms(rounds, rounds * s, rounds * s),
            (Self::BinomialTree, C::Broadcast) => terms(rounds, rounds * s, 0.0),
            (Self::BinomialTree, C::Reduce) => terms(rounds, rounds * s, rounds * s),
            (Self::Dissemination, C::Barrier) => terms(rounds, 0.0, 0.0),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link { latency: 1e-6, bandwidth: 1e9, combine: 2e9 };

    #[test]
    fn every_collective_has_an_algorithm_and_costs_nothing_alone() {
        for c in Collective::ALL {
            assert!(Algorithm::ALL.iter().any(|a| a.terms(c, 1 << 20, 4).is_some()), "{c}");
            assert_eq!(Algorithm::best(c, 1 << 20, 1, &LINK).1, 0.0, "{c}");
        }
    }

    #[test]
    fn a_ring_all_reduce_of_four_is_what_the_textbook_says() {
        // 2 · 3 latencies, 2 · 3/4 of 4 MB at 1 GB/s, 3/4 of 4 MB added at 2 GB/s
        let t = Algorithm::Ring.time(Collective::AllReduce, 4_000_000, 4, &LINK).unwrap();
        assert!((t - (6e-6 + 6e-3 + 1.5e-3)).abs() < 1e-12, "{t}");
    }

    #[test]
    fn trees_take_the_logarithm_rounded_up() {
        for (ranks, rounds) in [(2, 1.0), (3, 2.0), (4, 2.0), (5, 3.0), (8, 3.0), (9, 4.0)] {
            let terms = Algorithm::BinomialTree.terms(Collective::Broadcast, 8, ranks).unwrap();
            assert_eq!((terms.messages, terms.bytes), (rounds, rounds * 8.0), "{ranks} ranks");
        }
    }
}
