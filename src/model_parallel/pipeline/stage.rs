//! One stage of a model.

use std::fmt;

use tch::{Tensor, nn};

use crate::{Error, Result};

/// What a stage computes.
trait Body: Send {
    fn run(&self, inputs: &[Tensor], train: bool) -> Result<Vec<Tensor>>;
}

/// One stage of a model: from some tensors to some tensors.
///
/// ```
/// use tch::{Device, nn};
/// use tch_distributed::model_parallel::pipeline::Stage;
///
/// let vs = nn::VarStore::new(Device::Cpu);
/// let _one = Stage::new(nn::linear(vs.root() / "first", 4, 8, Default::default()));
///
/// // Several tensors between stages: a value and a mask, for instance.
/// let layer = nn::linear(vs.root() / "second", 4, 8, Default::default());
/// let _two = Stage::from_fn(move |inputs, _train| {
///     let hidden = inputs[0].f_linear(&layer.ws, layer.bs.as_ref())?;
///     Ok(vec![hidden, inputs[1].shallow_clone()])
/// });
/// ```
#[doc(alias = "PipelineStage")]
pub struct Stage {
    body: Box<dyn Body>,
    pub(super) recompute: bool,
}

impl Stage {
    /// A stage of one tensor in and one out, from any tch module.
    pub fn new(module: impl nn::Module + 'static) -> Self {
        Self::of(OneToOne(move |xs: &Tensor, _| module.forward(xs)))
    }

    /// The same from a module that behaves differently in training: `step` trains, `eval` does not.
    pub fn new_t(module: impl nn::ModuleT + 'static) -> Self {
        Self::of(OneToOne(move |xs: &Tensor, train| module.forward_t(xs, train)))
    }

    /// A stage with any number of tensors, of any shape and kind, in and out; the second argument says whether
    /// this is training. Tensors that do not require a gradient get none sent back.
    pub fn from_fn(body: impl Fn(&[Tensor], bool) -> Result<Vec<Tensor>> + Send + 'static) -> Self {
        Self::of(Many(body))
    }

    fn of(body: impl Body + 'static) -> Self {
        Self { body: Box::new(body), recompute: false }
    }

    /// Keep only the inputs of a forward, and compute it again for the backward: less memory, a third more work
    /// (Chen et al., "Training deep nets with sublinear memory cost", 2016).
    ///
    /// What the stage draws from a [`Generator`](crate::random::Generator), as the dropout of this crate does, it
    /// draws a second time. What it draws from libtorch's default generator, as tch's dropout does, would be drawn
    /// anew, and the gradients would be those of another forward.
    #[doc(alias = "checkpoint")]
    pub fn recompute(mut self, recompute: bool) -> Self {
        self.recompute = recompute;
        self
    }

    pub(super) fn run(&self, inputs: &[Tensor], train: bool) -> Result<Vec<Tensor>> {
        let outputs = crate::model_parallel::escape::catch(|| self.body.run(inputs, train))?;
        match outputs.is_empty() || !outputs.iter().all(Tensor::defined) {
            true => {
                Err(Error::Callback { reason: "the stage gave no output, or an undefined one".to_owned() })
            }
            false => Ok(outputs),
        }
    }
}

impl fmt::Debug for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stage").field("recompute", &self.recompute).finish_non_exhaustive()
    }
}

struct OneToOne<F>(F);

impl<F: Fn(&Tensor, bool) -> Tensor + Send> Body for OneToOne<F> {
    fn run(&self, inputs: &[Tensor], train: bool) -> Result<Vec<Tensor>> {
        match inputs {
            [one] => Ok(vec![self.0(one, train)]),
            many => Err(Error::invalid(
                "inputs",
                format!("a module takes one tensor, got {}: make the stage with from_fn", many.len()),
            )),
        }
    }
}

struct Many<F>(F);

impl<F: Fn(&[Tensor], bool) -> Result<Vec<Tensor>> + Send> Body for Many<F> {
    fn run(&self, inputs: &[Tensor], train: bool) -> Result<Vec<Tensor>> {
        self.0(inputs, train)
    }
}

/// What a loss function may return: a tensor, or a result with one.
pub trait Loss {
    /// The loss, one number.
    fn into_loss(self) -> Result<Tensor>;
}

impl Loss for Tensor {
    fn into_loss(self) -> Result<Tensor> {
        Ok(self)
    }
}

impl<E: Into<Error>> Loss for Result<Tensor, E> {
    fn into_loss(self) -> Result<Tensor> {
        self.map_err(Into::into)
    }
}
