//! Random number generators of one's own.

use cxx::UniquePtr;
use tch::{Device, Tensor};

use super::raised::caught;
use super::tensor::{at, own};
use crate::Result;

#[allow(unreachable_pub, clippy::undocumented_unsafe_blocks)]
#[cxx::bridge(namespace = "tchd")]
mod ffi {
    #[namespace = "at"]
    unsafe extern "C++" {
        include!("tch-distributed/src/libtorch/catch.h");
        include!("tch-distributed/src/libtorch/generator.h");
        type Tensor = crate::libtorch::tensor::AtTensor;
    }
    unsafe extern "C++" {
        type RandomGenerator;
        fn new_generator(cuda: i32, seed: u64) -> Result<UniquePtr<RandomGenerator>>;
        fn manual_seed(self: &RandomGenerator, seed: u64) -> Result<()>;
        fn initial_seed(self: &RandomGenerator) -> Result<u64>;
        fn state(self: &RandomGenerator) -> Result<*mut Tensor>;
        fn set_state(self: &RandomGenerator, state: &Tensor) -> Result<()>;
        fn randperm(self: &RandomGenerator, out: &Tensor) -> Result<()>;
        fn uniform(self: &RandomGenerator, out: &Tensor, low: f64, high: f64) -> Result<()>;
        fn normal(self: &RandomGenerator, out: &Tensor, mean: f64, std: f64) -> Result<()>;
        fn bernoulli(self: &RandomGenerator, out: &Tensor, p: f64) -> Result<()>;
        fn random(self: &RandomGenerator, out: &Tensor, low: i64, high: i64) -> Result<()>;
    }
}

// SAFETY: the generator is reference-counted heap memory with nothing tied to a thread.
unsafe impl Send for ffi::RandomGenerator {}
// SAFETY: every access takes the generator's own mutex: libtorch where numbers are drawn, generator.cpp
// elsewhere.
unsafe impl Sync for ffi::RandomGenerator {}

/// A generator; see [`crate::random::Generator`], its public face.
pub(crate) struct RawGenerator(UniquePtr<ffi::RandomGenerator>);

impl RawGenerator {
    pub(crate) fn new(device: Device, seed: u64) -> Result<Self> {
        let cuda = match device {
            Device::Cuda(index) => i32::try_from(index).unwrap_or(i32::MAX),
            _ => -1,
        };
        Ok(Self(ffi::new_generator(cuda, seed).map_err(caught)?))
    }

    pub(crate) fn manual_seed(&self, seed: u64) -> Result<()> {
        self.0.manual_seed(seed).map_err(caught)
    }

    pub(crate) fn initial_seed(&self) -> Result<u64> {
        self.0.initial_seed().map_err(caught)
    }

    pub(crate) fn state(&self) -> Result<Tensor> {
        let state = self.0.state().map_err(caught)?;
        // SAFETY: `state` gives a new tensor that is ours.
        Ok(unsafe { own(state) }.unwrap_or_default())
    }

    pub(crate) fn set_state(&self, state: &Tensor) -> Result<()> {
        self.0.set_state(at(state)).map_err(caught)
    }

    pub(crate) fn randperm(&self, out: &Tensor) -> Result<()> {
        self.0.randperm(at(out)).map_err(caught)
    }

    pub(crate) fn uniform(&self, out: &Tensor, low: f64, high: f64) -> Result<()> {
        self.0.uniform(at(out), low, high).map_err(caught)
    }

    pub(crate) fn normal(&self, out: &Tensor, mean: f64, std: f64) -> Result<()> {
        self.0.normal(at(out), mean, std).map_err(caught)
    }

    pub(crate) fn bernoulli(&self, out: &Tensor, p: f64) -> Result<()> {
        self.0.bernoulli(at(out), p).map_err(caught)
    }

    pub(crate) fn random(&self, out: &Tensor, low: i64, high: i64) -> Result<()> {
        self.0.random(at(out), low, high).map_err(caught)
    }
}
