//! Operations of ours that autograd records and differentiates.

use std::cell::RefCell;
use std::pin::Pin;

use parking_lot::ReentrantMutex;
use tch::Tensor;

use super::list::{self, ffi::Tensors};
use super::raised::{Contained, caught, guard};
use crate::{Error, Result};

#[allow(unreachable_pub, clippy::undocumented_unsafe_blocks)]
#[cxx::bridge(namespace = "tchd")]
mod ffi {
    extern "Rust" {
        type RustFunction;
        fn run_forward(
            function: &RustFunction,
            inputs: &Tensors,
            outputs: Pin<&mut Tensors>,
            saved: Pin<&mut Tensors>,
        ) -> Result<bool>;
        fn run_backward(
            function: &RustFunction,
            grads: &Tensors,
            saved: &Tensors,
            results: Pin<&mut Tensors>,
        ) -> Result<()>;
    }
    unsafe extern "C++" {
        include!("tch-distributed/src/libtorch/catch.h");
        include!("tch-distributed/src/libtorch/function.h");
        type Tensors = crate::libtorch::list::ffi::Tensors;
        fn grad_enabled() -> bool;
        fn apply_function(function: Box<RustFunction>, inputs: &Tensors) -> Result<UniquePtr<Tensors>>;
    }
}

/// What a forward gives.
pub(crate) struct Forward {
    pub(crate) outputs: Vec<Tensor>,
    /// For backward.
    pub(crate) saved: Vec<Tensor>,
    /// Whether backward gets zeros for the gradients that there are not.
    pub(crate) materialize: bool,
}

/// An operation, as autograd calls it.
pub(crate) trait RawFunction: Send {
    fn forward(&mut self, inputs: &[Tensor]) -> Result<Forward>;
    /// The gradient of each input. `None` stands for zero, on either side.
    fn backward(&mut self, saved: Vec<Tensor>, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>>;
}

/// What the graph node holds. Autograd calls it from one thread at a time: it holds a lock of the node meanwhile, so
/// that a backward within it that comes to the same node waits for itself before it gets here.
pub(super) struct RustFunction(ReentrantMutex<Contained<RefCell<Box<dyn RawFunction>>>>);

impl RustFunction {
    fn with<T>(&self, body: impl FnOnce(&mut dyn RawFunction) -> Result<T>) -> Result<T, String> {
        guard("a Function", || {
            let function = self.0.lock();
            let mut function = function.try_borrow_mut().map_err(|_| Error::Callback {
                reason: "a Function ran a backward that came to itself".to_owned(),
            })?;
            body(&mut **function)
        })
    }
}

fn run_forward(
    function: &RustFunction,
    inputs: &Tensors,
    outputs: Pin<&mut Tensors>,
    saved: Pin<&mut Tensors>,
) -> Result<bool, String> {
    function.with(|f| {
        let forward = f.forward(&defined(inputs))?;
        list::append(outputs, forward.outputs.iter().map(Some));
        list::append(saved, forward.saved.iter().map(Some));
        Ok(forward.materialize)
    })
}

fn run_backward(
    function: &RustFunction,
    grads: &Tensors,
    saved: &Tensors,
    results: Pin<&mut Tensors>,
) -> Result<(), String> {
    function.with(|f| {
        let grads = f.backward(defined(saved), &list::to_rust(grads))?;
        list::append(results, grads.iter().map(Option::as_ref));
        Ok(())
    })
}

fn defined(tensors: &Tensors) -> Vec<Tensor> {
    list::to_rust(tensors).into_iter().map(|t| t.unwrap_or_default()).collect()
}

/// Whether autograd records what this thread does.
pub(crate) fn grad_enabled() -> bool {
    ffi::grad_enabled()
}

/// Runs the operation and records it.
pub(crate) fn apply_function(function: Box<dyn RawFunction>, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    let function = RustFunction(ReentrantMutex::new(Contained::new(RefCell::new(function))));
    let inputs = list::to_cpp(inputs.iter().copied());
    Ok(defined(&*ffi::apply_function(Box::new(function), &inputs).map_err(caught)?))
}
