//! The schedules: in which order a rank works through its stages and micro-batches.

use std::fmt;
use std::str::FromStr;

use super::Costs;
use super::plan::{Action, Pass};
use crate::{Error, Result};

/// The order in which forwards and backwards are done.
///
/// With `p` ranks, `m` micro-batches and `v` stages on each rank:
///
/// | schedule | bubble, as a share of the step | micro-batches held by rank `r` |
/// |---|---|---|
/// | `GPipe` | (p-1) / (m v + p-1) | m v |
/// | `OneFOneB` | (p-1) / (m + p-1) | p - r |
/// | `Interleaved` | (p-1) / (m v + p-1) | (v-1) p + 2 (p-r) - 1 |
/// | `ZeroBubble` | a third of 1F1B's | p |
///
/// The name parses: `"gpipe"`, `"1f1b"`, `"interleaved"`, `"zero-bubble"`.
///
/// ```
/// use tch_distributed::model_parallel::pipeline::Schedule;
/// assert_eq!("1f1b".parse::<Schedule>().unwrap(), Schedule::OneFOneB);
/// assert_eq!(Schedule::OneFOneB.to_string(), "1f1b");
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Schedule {
    /// All forwards, then all backwards (Huang et al., "GPipe", 2019). With several stages on a rank it goes
    /// breadth first through them.
    #[doc(alias = "ScheduleGPipe")]
    #[doc(alias = "ScheduleLoopedBFS")]
    GPipe,
    /// One forward, one backward (Narayanan et al., "PipeDream", 2019): the bubble of GPipe with the memory of
    /// at most `p` micro-batches. One stage on each rank.
    #[default]
    #[doc(alias = "Schedule1F1B")]
    OneFOneB,
    /// Several stages on each rank, dealt out in rounds (Narayanan et al., "Efficient large-scale language model
    /// training on GPU clusters", 2021): the bubble shrinks by the number of stages on a rank.
    #[doc(alias = "ScheduleInterleaved1F1B")]
    Interleaved,
    /// The backward is cut into the gradients of inputs and of weights, and the second fills the bubble (Qi et
    /// al., "Zero bubble pipeline parallelism", 2023, ZB-H1). It exists as a plan; a
    /// pipeline cannot run it yet and says so.
    #[doc(alias = "ScheduleInterleavedZeroBubble")]
    ZeroBubble,
}

impl Schedule {
    /// Every schedule there is.
    pub const ALL: [Self; 4] = [Self::GPipe, Self::OneFOneB, Self::Interleaved, Self::ZeroBubble];

    /// The share of the step that a rank waits, by the formula of the paper; `ranks` at most `micro_batches`.
    ///
    /// ```
    /// use tch_distributed::model_parallel::pipeline::{Costs, Schedule};
    /// let costs = Costs::default();
    /// assert_eq!(Schedule::GPipe.predicted_bubble(4, 1, 4, &costs), 3.0 / 7.0);
    /// assert_eq!(Schedule::Interleaved.predicted_bubble(4, 2, 4, &costs), 3.0 / 11.0);
    /// ```
    pub fn predicted_bubble(self, ranks: usize, chunks: usize, micro_batches: usize, costs: &Costs) -> f64 {
        let (p, v, m) = (ranks as f64, chunks as f64, micro_batches as f64);
        match self {
            Self::GPipe | Self::OneFOneB | Self::Interleaved => (p - 1.0) / (m * v + p - 1.0),
            Self::ZeroBubble => {
                let weight = costs.backward * costs.weight_share;
                let lost = (p - 1.0) * (costs.forward + costs.backward - 2.0 * weight);
                lost / (m * (costs.forward + costs.backward) + lost)
            }
        }
    }

    /// The actions of every rank, in order. The arguments are checked already.
    pub(super) fn actions(self, ranks: usize, chunks: usize, micro_batches: usize) -> Vec<Vec<Action>> {
        match self {
            Self::GPipe => (0..ranks).map(|rank| gpipe(rank, ranks, chunks, micro_batches)).collect(),
            Self::OneFOneB | Self::Interleaved => {
                (0..ranks).map(|rank| one_f_one_b(rank, ranks, chunks, micro_batches)).collect()
            }
            Self::ZeroBubble => (0..ranks).map(|rank| zero_bubble(rank, ranks, micro_batches)).collect(),
        }
    }

    /// What the schedule asks of its arguments.
    pub(super) fn check(self, ranks: usize, chunks: usize, micro_batches: usize) -> Result<()> {
        if ranks == 0 || chunks == 0 {
            return Err(Error::invalid("stages", "every rank needs at least one stage"));
        }
        if micro_batches == 0 {
            return Err(Error::invalid("micro_batches", "there must be at least one"));
        }
        match self {
            Self::OneFOneB | Self::ZeroBubble if chunks > 1 => Err(Error::invalid(
                "stages",
                format!("{self} takes one stage on each rank, got {chunks}: use interleaved or gpipe"),
            )),
            Self::Interleaved if chunks > 1 && !micro_batches.is_multiple_of(ranks) => Err(Error::invalid(
                "micro_batches",
                format!("interleaved needs a multiple of the {ranks} ranks, got {micro_batches}"),
            )),
            _ => Ok(()),
        }
    }
}

fn gpipe(rank: usize, ranks: usize, chunks: usize, micro_batches: usize) -> Vec<Action> {
    let stage = |chunk: usize| chunk * ranks + rank;
    let one = |pass, chunk: usize| {
        (0..micro_batches).map(move |micro_batch| Action { pass, stage: stage(chunk), micro_batch })
    };
    let forwards = (0..chunks).flat_map(|c| one(Pass::Forward, c));
    let backwards = (0..chunks).rev().flat_map(|c| one(Pass::Backward, c));
    forwards.chain(backwards).collect()
}

/// 1F1B, interleaved where there are several chunks: some forwards to warm up, then a forward and a
/// backward in turn, then the backwards left.
fn one_f_one_b(rank: usize, ranks: usize, chunks: usize, micro_batches: usize) -> Vec<Action> {
    let total = micro_batches * chunks;
    let warm_up = match chunks {
        1 => ranks - rank - 1,
        _ => 2 * (ranks - rank - 1) + (chunks - 1) * ranks,
    }
    .min(total);
    // The k-th piece of work: rounds of `ranks` micro-batches through each chunk in turn.
    let work = |k: usize, pass: Pass| {
        let (micro_batch, chunk) = match chunks {
            1 => (k, 0),
            _ => (k / (ranks * chunks) * ranks + k % ranks, k / ranks % chunks),
        };
        let chunk = if pass == Pass::Forward { chunk } else { chunks - 1 - chunk };
        Action { pass, stage: chunk * ranks + rank, micro_batch }
    };
    let mut actions: Vec<_> = (0..warm_up).map(|k| work(k, Pass::Forward)).collect();
    for k in 0..total {
        if warm_up + k < total {
            actions.push(work(warm_up + k, Pass::Forward));
        }
        actions.push(work(k, Pass::Backward));
    }
    actions
}

/// ZB-H1: 1F1B whose gradients of weights lag those of inputs by the rank, so that every rank holds as many
/// micro-batches as the first, and the lagging ones fill the end.
fn zero_bubble(rank: usize, ranks: usize, micro_batches: usize) -> Vec<Action> {
    let work = |pass, micro_batch| Action { pass, stage: rank, micro_batch };
    let warm_up = (ranks - rank).min(micro_batches);
    let mut actions: Vec<_> = (0..warm_up).map(|k| work(Pass::Forward, k)).collect();
    for k in 0..micro_batches {
        actions.push(work(Pass::BackwardInput, k));
        if k >= rank {
            actions.push(work(Pass::BackwardWeight, k - rank));
        }
        if k + warm_up < micro_batches {
            actions.push(work(Pass::Forward, k + warm_up));
        }
    }
    actions
        .extend((micro_batches.saturating_sub(rank)..micro_batches).map(|k| work(Pass::BackwardWeight, k)));
    actions
}

impl fmt::Display for Schedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GPipe => "gpipe",
            Self::OneFOneB => "1f1b",
            Self::Interleaved => "interleaved",
            Self::ZeroBubble => "zero-bubble",
        })
    }
}

impl FromStr for Schedule {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|s| s.to_string() == name.to_ascii_lowercase()).ok_or_else(|| {
            Error::invalid(
                "schedule",
                format!("{name:?} is unknown: known are gpipe, 1f1b, interleaved, zero-bubble"),
            )
        })
    }
}
