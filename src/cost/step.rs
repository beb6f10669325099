//! The time of a training step under each parallelism.

use serde::{Deserialize, Serialize};

use super::{Algorithm, Collective, Link};
use crate::{Error, Result};

/// What a training step does, measured on one worker.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// Seconds of forward and backward over the whole batch on one worker that has the machine alone.
    pub compute: f64,
    /// Seconds of a step that do not shrink with the batch: the optimizer, the loader.
    pub fixed: f64,
    /// Bytes of gradients.
    pub gradient_bytes: usize,
    /// Bytes of one layer's activations over the whole batch.
    pub activation_bytes: usize,
    /// Layers, each of which a tensor-parallel worker all-reduces twice forward and twice backward.
    pub layers: usize,
    /// Cores (or devices) that workers share: more workers than these take turns.
    pub cores: usize,
    /// How much slower each worker computes when all cores are busy, 1 where not at all: memory is shared.
    pub contention: f64,
}

/// How the work is spread: the product of the three is the number of workers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parallelism {
    /// Workers that each see a share of the batch.
    pub data: usize,
    /// Workers that each hold a share of every layer.
    pub tensor: usize,
    /// Workers that each hold a share of the layers.
    pub pipeline: usize,
    /// Micro-batches that go through the pipeline.
    pub micro_batches: usize,
}

impl Parallelism {
    /// `n` workers that each see a share of the batch.
    pub fn data(n: usize) -> Self {
        Self { data: n, tensor: 1, pipeline: 1, micro_batches: 1 }
    }

    /// `n` workers that each hold a share of every layer.
    pub fn tensor(n: usize) -> Self {
        Self { data: 1, tensor: n, pipeline: 1, micro_batches: 1 }
    }

    /// `n` stages and so many micro-batches.
    pub fn pipeline(n: usize, micro_batches: usize) -> Self {
        Self { data: 1, tensor: 1, pipeline: n, micro_batches }
    }

    /// How many workers there are.
    pub fn workers(&self) -> usize {
        self.data * self.tensor * self.pipeline
    }
}

/// Where a step's seconds go.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepTime {
    /// Forward, backward and what is fixed.
    pub compute: f64,
    /// Communication in all, hidden or not.
    pub communication: f64,
    /// Communication that computing does not hide.
    pub exposed: f64,
    /// Stages that wait for the pipeline to fill and drain.
    pub bubble: f64,
}

impl StepTime {
    /// The step's length.
    pub fn total(&self) -> f64 {
        self.compute + self.exposed + self.bubble
    }
}

/// The share of forward plus backward during which gradients become ready: the backward is twice the
/// forward, and its first bucket waits for the first layers.
const BACKWARD: f64 = 2.0 / 3.0;

impl Workload {
    /// Predicts a step.
    ///
    /// * data: gradients are all-reduced while the last micro-batch's backward still runs; what exceeds it is
    ///   exposed.
    /// * tensor: `4 · layers` all-reduces of a layer's activations, all exposed.
    /// * pipeline: `(stages − 1) / micro_batches` of the computing is bubble (GPipe and 1F1B alike;
    ///   D. Narayanan et al., 2021), and each micro-batch's activations cross each boundary twice.
    pub fn predict(&self, how: Parallelism, link: &Link) -> Result<StepTime> {
        for (argument, value) in [
            ("data", how.data),
            ("tensor", how.tensor),
            ("pipeline", how.pipeline),
            ("micro_batches", how.micro_batches),
            ("cores", self.cores),
        ] {
            if value == 0 {
                return Err(Error::invalid(argument, "0: at least 1 is needed"));
            }
        }
        let workers = how.workers();
        let turns = (workers as f64 / self.cores as f64).max(1.0);
        let busy = workers.min(self.cores);
        let slow = if self.cores > 1 {
            1.0 + (self.contention - 1.0) * (busy - 1) as f64 / (self.cores - 1) as f64
        } else {
            1.0
        };
        let each = turns * slow;
        let working = self.compute / workers as f64 * each;
        // Workers that take turns on a core also take turns at moving bytes.
        let shared =
            Link { latency: link.latency, bandwidth: link.bandwidth / turns, combine: link.combine / turns };

        let shard = self.gradient_bytes / (how.tensor * how.pipeline);
        let gradients = Algorithm::best(Collective::AllReduce, shard, how.data, &shared).1;
        let hidden = gradients.min(working * BACKWARD / how.micro_batches as f64);

        let layer = self.activation_bytes / (how.data * how.micro_batches);
        let layers = self.layers.div_ceil(how.pipeline) * how.micro_batches;
        let activations =
            4.0 * layers as f64 * Algorithm::best(Collective::AllReduce, layer, how.tensor, &shared).1;

        let boundary = if how.pipeline > 1 {
            let message = Algorithm::best(Collective::SendRecv, layer, 2, &shared).1;
            2.0 * how.micro_batches as f64 * message
        } else {
            0.0
        };
        let bubble = (working + activations) * (how.pipeline - 1) as f64 / how.micro_batches as f64;
        Ok(StepTime {
            compute: working + self.fixed * each,
            communication: gradients + activations + boundary,
            exposed: gradients - hidden + activations + boundary,
            bubble,
        })
    }

    /// The number of data-parallel workers, up to `limit`, past which one more makes the step longer.
    pub fn best_data_parallel(&self, limit: usize, link: &Link) -> Result<usize> {
        let mut best = (1, f64::INFINITY);
        for n in 1..=limit.max(1) {
            let time = self.predict(Parallelism::data(n), link)?.total();
            if time < best.1 {
                best = (n, time);
            }
        }
        Ok(best.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAST: Link = Link { latency: 0.0, bandwidth: 1e15, combine: 1e15 };
    const WORK: Workload = Workload {
        compute: 1.0,
        fixed: 0.0,
        gradient_bytes: 100 << 20,
        activation_bytes: 1 << 20,
        layers: 8,
        cores: 64,
        contention: 1.0,
    };

    #[test]
    fn free_communication_scales_perfectly_in_data_and_tensor() {
        for n in [1, 2, 4, 8] {
            for how in [Parallelism::data(n), Parallelism::tensor(n)] {
                let t = WORK.predict(how, &FAST).unwrap().total();
                assert!((t * n as f64 - 1.0).abs() < 1e-3, "{how:?}: {t}");
            }
        }
    }

    #[test]
    fn gradients_hide_behind_the_backward_of_the_last_micro_batch() {
        // 100 MiB over two workers: 0.1 s each way at 1 GB/s and no cost of adding.
        let link = Link { latency: 0.0, bandwidth: (100 << 20) as f64 / 0.1, combine: 1e15 };
        let exposed = |micro_batches| {
            let how = Parallelism { micro_batches, ..Parallelism::data(2) };
            WORK.predict(how, &link).unwrap().exposed
        };
        assert!(exposed(1) < 1e-9, "0.1 s behind a backward of a third of a second");
        assert!((exposed(10) - (0.1 - 1.0 / 30.0)).abs() < 1e-6, "{}", exposed(10));
    }

    #[test]
    fn the_bubble_is_stages_less_one_over_micro_batches() {
        let t = WORK.predict(Parallelism::pipeline(4, 8), &FAST).unwrap();
        assert!((t.bubble / t.compute - 3.0 / 8.0).abs() < 1e-3, "{t:?}");
    }

    #[test]
    fn more_workers_than_cores_gain_nothing() {
        let two = Workload { cores: 2, ..WORK };
        let best = two.predict(Parallelism::data(2), &FAST).unwrap().total();
        let four = two.predict(Parallelism::data(4), &FAST).unwrap().total();
        assert!(four >= best * 0.999, "{four} against {best}");
        assert_eq!(two.best_data_parallel(16, &Link { latency: 1e-3, ..FAST }).unwrap(), 2);
    }

    #[test]
    fn nought_workers_are_refused() {
        assert!(WORK.predict(Parallelism::data(0), &FAST).is_err());
    }
}
