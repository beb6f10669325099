//! A small model whose numbers are formulas, so that every rank and one process alone agree on them.

use std::sync::mpsc;
use std::time::Duration;

use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};

/// Ends a test that hangs, with a panic on its own thread.
pub(crate) fn within(seconds: u64, test: impl FnOnce() + Send + 'static) {
    let (ended, end) = mpsc::channel();
    let running = std::thread::spawn(move || {
        test();
        let _ = ended.send(());
    });
    match end.recv_timeout(Duration::from_secs(seconds)) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("not finished after {seconds} s"),
        _ => running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
    }
}

/// `count` numbers between -1 and 1 that look random.
pub(crate) fn numbers(count: i64, seed: f64) -> Tensor {
    let index = Tensor::arange(count, (Kind::Double, Device::Cpu));
    ((index + 1.0) * (12.9898 + seed)).sin() * 0.9
}

/// Three layers, the middle one used twice, six parameters, no buffer.
#[derive(Debug)]
pub(crate) struct Net {
    pub(crate) first: nn::Linear,
    pub(crate) middle: nn::Linear,
    pub(crate) last: nn::Linear,
}

impl Net {
    pub(crate) fn new(vs: &nn::VarStore) -> Self {
        let linear = |name: &str, from, to| nn::linear(vs.root() / name, from, to, Default::default());
        Self { first: linear("first", 6, 16), middle: linear("middle", 16, 16), last: linear("last", 16, 3) }
    }
}

impl Module for Net {
    fn forward(&self, input: &Tensor) -> Tensor {
        let hidden = input.apply(&self.first).tanh();
        let hidden = hidden.apply(&self.middle).tanh();
        hidden.apply(&self.middle).tanh().apply(&self.last)
    }
}

/// Gives every variable of `vs` numbers that depend on its name's order and on `seed` alone.
pub(crate) fn fill(vs: &nn::VarStore, seed: f64) {
    let mut variables: Vec<_> = vs.variables().into_iter().collect();
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    tch::no_grad(|| {
        for (index, (_, mut tensor)) in variables.into_iter().enumerate() {
            let values = numbers(tensor.numel() as i64, seed + index as f64) * 0.4;
            tensor.copy_(&values.view(tensor.size().as_slice()));
        }
    });
}

/// Inputs `[rows, 6]` and targets `[rows, 3]` of one step.
pub(crate) fn batch(step: usize, rows: i64, kind: Kind) -> (Tensor, Tensor) {
    let shaped = |columns, seed: f64| numbers(rows * columns, seed).view([rows, columns]).to_kind(kind);
    (shaped(6, step as f64 * 0.37), shaped(3, 100.0 + step as f64 * 0.61))
}

/// The values of every variable, by name.
pub(crate) fn values(vs: &nn::VarStore) -> Vec<(String, Vec<f64>)> {
    let mut values: Vec<_> = vs.variables().into_iter().map(|(name, tensor)| (name, flat(&tensor))).collect();
    values.sort_by(|a, b| a.0.cmp(&b.0));
    values
}

pub(crate) fn set(tensor: &Tensor, value: f64) {
    tch::no_grad(|| drop(tensor.shallow_clone().fill_(value)));
}

pub(crate) fn flat(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.detach().to_kind(Kind::Double).flatten(0, -1)).unwrap()
}

pub(crate) fn scalar(tensor: &Tensor) -> f64 {
    f64::try_from(tensor.to_kind(Kind::Double).sum(Kind::Double)).unwrap()
}

/// `max|a - b| <= tolerance * max|b|` for every tensor.
pub(crate) fn assert_close(a: &[(String, Vec<f64>)], b: &[(String, Vec<f64>)], tolerance: f64, what: &str) {
    assert_eq!(a.len(), b.len());
    for ((name, a), (_, b)) in a.iter().zip(b) {
        let largest = b.iter().fold(0.0f64, |m, v| m.max(v.abs()));
        let error = a.iter().zip(b).fold(0.0f64, |m, (a, b)| m.max((a - b).abs()));
        assert!(error <= tolerance * largest, "{what}, {name}: off by {error:e}, largest {largest:e}");
        assert!(a.iter().all(|v| v.is_finite()));
    }
}
