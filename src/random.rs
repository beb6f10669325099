//! Random numbers from a generator of one's own.
//!
//! libtorch's default generator is one for the whole process: ranks that are threads of it interleave,
//! and no rank's numbers can be told in advance. A [`Generator`] has its own state. Its numbers are those
//! of PyTorch's `torch.Generator` with the same seed.
//!
//! ```
//! use tch_distributed::random::Generator;
//!
//! // torch.randperm(10, generator=torch.Generator().manual_seed(0))
//! let order = Vec::<i64>::try_from(&Generator::new(0)?.randperm(10)?)?;
//! assert_eq!(order, [4, 1, 7, 5, 3, 9, 0, 8, 6, 2]);
//! # Ok::<(), tch_distributed::Error>(())
//! ```

mod repeat;

use std::fmt;

use tch::{Device, Kind, Tensor};

pub(crate) use self::repeat::Draws;
use crate::libtorch::RawGenerator;
use crate::{Error, Result};

/// A random number generator with its own state, on the CPU or on one CUDA device.
///
/// It may be shared among threads; then the order in which they draw is theirs to arrange.
#[doc(alias = "torch.Generator")]
pub struct Generator {
    raw: RawGenerator,
    device: Device,
}

impl Generator {
    /// A generator for the CPU.
    ///
    /// # Errors
    /// [`Torch`](Error::Torch) if libtorch cannot make one.
    pub fn new(seed: u64) -> Result<Self> {
        Self::on(Device::Cpu, seed)
    }

    /// A generator for tensors of a device.
    ///
    /// # Errors
    /// [`InvalidArgument`](Error::InvalidArgument) for devices other than the CPU and CUDA,
    /// [`Torch`](Error::Torch) if the device is not there.
    pub fn on(device: Device, seed: u64) -> Result<Self> {
        if !matches!(device, Device::Cpu | Device::Cuda(_)) {
            return Err(Error::invalid(
                "device",
                format_args!("{device:?} was given; Cpu or Cuda is expected"),
            ));
        }
        Ok(Self { raw: RawGenerator::new(device, seed)?, device })
    }

    /// The device whose tensors it fills.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Starts again from a seed.
    ///
    /// # Errors
    /// [`Torch`](Error::Torch) for libtorch's own.
    pub fn manual_seed(&self, seed: u64) -> Result<()> {
        self.raw.manual_seed(seed)
    }

    /// The seed it started from.
    ///
    /// # Errors
    /// [`Torch`](Error::Torch) for libtorch's own.
    pub fn initial_seed(&self) -> Result<u64> {
        self.raw.initial_seed()
    }

    /// The state, as a tensor of bytes on the CPU: for a checkpoint.
    ///
    /// # Errors
    /// [`Torch`](Error::Torch) for libtorch's own.
    #[doc(alias = "get_rng_state")]
    pub fn get_state(&self) -> Result<Tensor> {
        self.raw.state()
    }

    /// Goes on from a state.
    ///
    /// ```
    /// use tch_distributed::random::Generator;
    /// let generator = Generator::new(3)?;
    /// let state = generator.get_state()?;
    /// let first = generator.randperm(100)?;
    /// generator.set_state(&state)?;
    /// assert_eq!(generator.randperm(100)?, first);
    /// # Ok::<(), tch_distributed::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Torch`](Error::Torch) if the tensor is not a state of such a generator.
    #[doc(alias = "set_rng_state")]
    pub fn set_state(&self, state: &Tensor) -> Result<()> {
        if !state.defined() {
            return Err(Error::invalid("state", "the tensor is undefined"));
        }
        self.raw.set_state(state)
    }

    /// A random order of `0..n`, as an Int64 tensor.
    ///
    /// # Errors
    /// [`Torch`](Error::Torch) for libtorch's own.
    pub fn randperm(&self, n: usize) -> Result<Tensor> {
        let out = self.empty(&[n as i64], Kind::Int64)?;
        repeat::draw(&self.raw, |raw| raw.randperm(&out))?;
        Ok(out)
    }

    /// A tensor of numbers between 0 and 1 (which is excluded), of a floating-point kind.
    ///
    /// # Errors
    /// [`Torch`](Error::Torch) for a negative size or another kind.
    pub fn rand(&self, size: &[i64], kind: Kind) -> Result<Tensor> {
        let out = self.empty(size, kind)?;
        repeat::draw(&self.raw, |raw| raw.uniform(&out, 0.0, 1.0))?;
        Ok(out)
    }

    /// A tensor of numbers with mean 0 and variance 1, of a floating-point kind.
    ///
    /// ```
    /// use tch::Kind;
    /// use tch_distributed::random::Generator;
    /// let x = Generator::new(0)?.randn(&[3], Kind::Float)?;
    /// // torch.randn(3, generator=torch.Generator().manual_seed(0))
    /// assert!((x.double_value(&[0]) - 1.5410).abs() < 1e-4);
    /// # Ok::<(), tch_distributed::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Torch`](Error::Torch) for a negative size or another kind.
    pub fn randn(&self, size: &[i64], kind: Kind) -> Result<Tensor> {
        let out = self.empty(size, kind)?;
        repeat::draw(&self.raw, |raw| raw.normal(&out, 0.0, 1.0))?;
        Ok(out)
    }

    /// A tensor of whole numbers from `low` to `high` (which is excluded).
    ///
    /// # Errors
    /// [`Torch`](Error::Torch) for a negative size, or if there is no such number.
    pub fn randint(&self, low: i64, high: i64, size: &[i64], kind: Kind) -> Result<Tensor> {
        let out = self.empty(size, kind)?;
        repeat::draw(&self.raw, |raw| raw.random(&out, low, high))?;
        Ok(out)
    }

    /// Fills a tensor with numbers between `low` and `high`, as under `no_grad`: for initial weights.
    ///
    /// # Errors
    /// [`DeviceMismatch`](Error::DeviceMismatch), or [`Torch`](Error::Torch) if `low` exceeds `high`.
    #[doc(alias = "uniform_")]
    pub fn fill_uniform(&self, tensor: &mut Tensor, low: f64, high: f64) -> Result<()> {
        self.check(tensor)?;
        repeat::draw(&self.raw, |raw| raw.uniform(tensor, low, high))
    }

    /// Fills a tensor with numbers of a normal distribution, as under `no_grad`: for initial weights.
    ///
    /// # Errors
    /// [`DeviceMismatch`](Error::DeviceMismatch), or [`Torch`](Error::Torch) if `std` is negative.
    #[doc(alias = "normal_")]
    pub fn fill_normal(&self, tensor: &mut Tensor, mean: f64, std: f64) -> Result<()> {
        self.check(tensor)?;
        repeat::draw(&self.raw, |raw| raw.normal(tensor, mean, std))
    }

    /// Fills a tensor with ones, each with probability `p`, and zeros.
    ///
    /// # Errors
    /// [`DeviceMismatch`](Error::DeviceMismatch), or [`Torch`](Error::Torch) if `p` is no probability.
    #[doc(alias = "bernoulli_")]
    pub fn fill_bernoulli(&self, tensor: &mut Tensor, p: f64) -> Result<()> {
        self.check(tensor)?;
        repeat::draw(&self.raw, |raw| raw.bernoulli(tensor, p))
    }

    /// Sets each element to zero with probability `p` and scales the others by `1 / (1 - p)`; gives the
    /// tensor back as it is where `train` is false. Differentiable.
    ///
    /// ```
    /// use tch::{Device, Kind, Tensor};
    /// use tch_distributed::random::Generator;
    /// let x = Tensor::ones([1000], (Kind::Float, Device::Cpu));
    /// let y = Generator::new(7)?.dropout(&x, 0.5, true)?;
    /// assert!(y.max().double_value(&[]) == 2.0 && y.min().double_value(&[]) == 0.0);
    /// # Ok::<(), tch_distributed::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`DeviceMismatch`](Error::DeviceMismatch); [`InvalidArgument`](Error::InvalidArgument) if `p` is
    /// no probability, or the tensor is not of a floating-point kind.
    pub fn dropout(&self, x: &Tensor, p: f64, train: bool) -> Result<Tensor> {
        if !(0.0..=1.0).contains(&p) {
            return Err(Error::invalid("p", format_args!("{p} was given; a probability is expected")));
        }
        self.check(x)?;
        if !x.is_floating_point() {
            let kind = x.f_kind()?;
            return Err(Error::invalid(
                "x",
                format_args!("its kind is {kind:?}; a floating-point one is expected"),
            ));
        }
        if !train || p == 0.0 {
            return Ok(x.shallow_clone());
        }
        if p == 1.0 {
            return Ok(x.f_mul(&x.f_zeros_like()?)?);
        }
        let mask = x.f_detach()?.f_empty_like()?;
        repeat::draw(&self.raw, |raw| raw.bernoulli(&mask, 1.0 - p))?;
        let scale = Tensor::f_from_slice(&[1.0 / (1.0 - p)])?.f_to_device(self.device)?;
        let scale = scale.f_to_kind(x.f_kind()?)?.f_reshape([] as [i64; 0])?;
        Ok(x.f_mul(&mask.f_mul(&scale)?)?)
    }

    fn empty(&self, size: &[i64], kind: Kind) -> Result<Tensor> {
        Ok(Tensor::f_empty(size, (kind, self.device))?)
    }

    fn check(&self, tensor: &Tensor) -> Result<()> {
        match crate::libtorch::facts(tensor) {
            Ok(facts) if facts.device == self.device => Ok(()),
            Ok(facts) => Err(Error::DeviceMismatch {
                argument: "tensor",
                expected: format!("{:?}", self.device),
                got: format!("{:?}", facts.device),
            }),
            Err(_) => Err(Error::invalid("tensor", "it is undefined, or has no memory of its own")),
        }
    }
}

impl fmt::Debug for Generator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generator").field("device", &self.device).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;
    use crate::autograd::backward;

    #[test]
    fn threads_with_generators_of_one_seed_draw_the_same_numbers() {
        let draw = || {
            let generator = Generator::new(42).unwrap();
            let all = (0..100).map(|_| generator.rand(&[10], Kind::Double).unwrap());
            Vec::<f64>::try_from(&Tensor::cat(&all.collect::<Vec<_>>(), 0)).unwrap()
        };
        let expected = draw();
        let threads: Vec<_> = (0..4).map(|_| thread::spawn(draw)).collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), expected);
        }
    }

    #[test]
    fn the_numbers_are_those_of_the_default_generator_with_the_same_seed() {
        // Another test may draw from the default generator meanwhile, but not seed it: try until
        // nobody came between.
        let same = (0..50).any(|_| {
            tch::manual_seed(123);
            Tensor::randperm(50, (Kind::Int64, Device::Cpu))
                == Generator::new(123).unwrap().randperm(50).unwrap()
        });
        assert!(same);
    }

    #[test]
    fn seeding_again_starts_again() {
        let generator = Generator::new(5).unwrap();
        let first = generator.randint(0, 1000, &[20], Kind::Int64).unwrap();
        assert_ne!(generator.randint(0, 1000, &[20], Kind::Int64).unwrap(), first);
        generator.manual_seed(5).unwrap();
        assert_eq!(generator.initial_seed().unwrap(), 5);
        assert_eq!(generator.randint(0, 1000, &[20], Kind::Int64).unwrap(), first);
    }

    #[test]
    fn dropout_keeps_the_mean_and_its_gradient_is_its_mask() {
        let x = Tensor::ones([10_000], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let generator = Generator::new(1).unwrap();
        let y = generator.dropout(&x, 0.25, true).unwrap();
        assert!((y.mean(Kind::Float).double_value(&[]) - 1.0).abs() < 0.05);
        backward(&y.sum(Kind::Float)).unwrap();
        assert_eq!(x.grad(), y.detach());
        assert_eq!(generator.dropout(&x, 0.25, false).unwrap(), x);
        assert_eq!(generator.dropout(&x, 1.0, true).unwrap().sum(Kind::Float).double_value(&[]), 0.0);
    }

    #[test]
    fn wrong_arguments_are_errors() {
        let generator = Generator::new(1).unwrap();
        assert!(matches!(
            generator.dropout(&Tensor::from(1.0), 1.5, true),
            Err(Error::InvalidArgument { .. })
        ));
        for whole in [Tensor::from_slice(&[1i64, 2]), Tensor::from_slice(&[true])] {
            let error = generator.dropout(&whole, 0.5, true).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { argument: "x", .. }), "{error}");
        }
        assert!(generator.rand(&[-1], Kind::Float).is_err());
        assert!(generator.rand(&[2], Kind::Int64).is_err());
        assert!(generator.set_state(&Tensor::from(1.0)).is_err());
        assert!(generator.set_state(&Tensor::new()).is_err());
        assert!(matches!(
            generator.fill_normal(&mut Tensor::new(), 0.0, 1.0),
            Err(Error::InvalidArgument { .. })
        ));
        assert!(Generator::on(Device::Mps, 1).is_err());
        if !tch::Cuda::is_available() {
            assert!(Generator::on(Device::Cuda(0), 1).is_err());
        }
    }

    #[test]
    fn initial_weights_are_filled_without_a_graph() {
        let generator = Generator::new(1).unwrap();
        let mut w = Tensor::zeros([100], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        generator.fill_uniform(&mut w, 2.0, 3.0).unwrap();
        assert!(w.min().double_value(&[]) >= 2.0 && w.max().double_value(&[]) < 3.0);
        generator.fill_normal(&mut w, 50.0, 1.0).unwrap();
        assert!(w.min().double_value(&[]) > 40.0);
        generator.fill_bernoulli(&mut w, 1.0).unwrap();
        assert_eq!(w.min().double_value(&[]), 1.0);
    }
}
