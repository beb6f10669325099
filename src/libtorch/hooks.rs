//! Gradient hooks, callbacks at the end of backward, and the gradient itself.

use std::cell::RefCell;
use std::mem::ManuallyDrop;
use std::sync::{Arc, Weak};

use parking_lot::{Mutex, ReentrantMutex};
use smallvec::SmallVec;
use tch::Tensor;

use super::list;
use super::raised::{Contained, caught, guard};
use super::tensor::{AtTensor, at, disown};
use crate::{Error, Result};

#[allow(unreachable_pub, clippy::undocumented_unsafe_blocks)]
#[cxx::bridge(namespace = "tchd")]
mod ffi {
    extern "Rust" {
        type HookList;
        fn new_hooks() -> Box<HookList>;
        fn share_hooks(hooks: &HookList) -> Box<HookList>;
        fn run_accumulated_hooks(hooks: &HookList, tensor: &Tensor) -> Result<()>;
        fn run_grad_hooks(hooks: &HookList, grad: &Tensor) -> Result<*mut Tensor>;
        type EndOfBackward;
        fn run_end_of_backward(callback: &EndOfBackward) -> Result<()>;
    }
    #[namespace = "at"]
    unsafe extern "C++" {
        include!("tch-distributed/src/libtorch/catch.h");
        include!("tch-distributed/src/libtorch/hooks.h");
        type Tensor = crate::libtorch::tensor::AtTensor;
    }
    unsafe extern "C++" {
        type Tensors = crate::libtorch::list::ffi::Tensors;
        fn grad_state(tensor: &Tensor) -> u8;
        fn accumulated_hooks(tensor: &Tensor) -> Result<Box<HookList>>;
        fn grad_hooks(tensor: &Tensor) -> Result<Box<HookList>>;
        fn in_backward() -> bool;
        fn after_backward(callback: Box<EndOfBackward>) -> Result<()>;
        fn set_grad(tensor: &Tensor, grad: &Tensor) -> Result<()>;
        fn clear_grad(tensor: &Tensor) -> Result<()>;
        fn backward(roots: &Tensors, grads: &Tensors, retain_graph: bool, create_graph: bool) -> Result<()>;
    }
}

type Callback = Box<dyn FnMut(&Tensor) -> Result<Option<Tensor>> + Send>;

/// One hook. Two backwards on two threads may fire it at once: the lock makes them take turns. It is
/// reentrant so that a hook that comes to itself is told so instead of waiting for itself.
type Hook = ReentrantMutex<Contained<RefCell<Callback>>>;

/// The hooks of one tensor, in the order in which they were registered.
#[derive(Default)]
struct Hooks {
    next: u64,
    list: SmallVec<[(u64, Arc<Hook>); 2]>,
}

/// What the one C++ hook of a tensor holds.
pub(super) struct HookList(Arc<Mutex<Hooks>>);

/// Where a hook is, to remove it. Does not keep the tensor.
pub(crate) struct Registration {
    hooks: Weak<Mutex<Hooks>>,
    id: u64,
}

impl Registration {
    /// Removes the hook. A call of it that is under way on another thread runs to its end.
    pub(crate) fn remove(&self) {
        let Some(hooks) = self.hooks.upgrade() else { return };
        let mut hooks = hooks.lock();
        let removed = hooks.list.iter().position(|(id, _)| *id == self.id).map(|at| hooks.list.remove(at));
        // What the closure holds goes after the lock, for its destructors may come back here.
        drop(hooks);
        drop(removed);
    }
}

impl HookList {
    fn register(&self, callback: Callback) -> Registration {
        let mut hooks = self.0.lock();
        let id = hooks.next;
        hooks.next += 1;
        let hook = ReentrantMutex::new(Contained::new(RefCell::new(callback)));
        hooks.list.push((id, Arc::new(hook)));
        Registration { hooks: Arc::downgrade(&self.0), id }
    }

    /// Runs the hooks; each sees what the one before it returned. No lock is held meanwhile, so that
    /// hooks may register and remove hooks.
    fn run(&self, tensor: &Tensor) -> Result<Option<Tensor>> {
        let hooks: SmallVec<[Arc<Hook>; 4]> =
            self.0.lock().list.iter().map(|(_, hook)| hook.clone()).collect();
        let mut current = None;
        for hook in hooks {
            let hook = hook.lock();
            let mut callback = hook.try_borrow_mut().map_err(|_| Error::Callback {
                reason: "a gradient hook ran a backward that came to the same hook".to_owned(),
            })?;
            if let Some(other) = callback(current.as_ref().unwrap_or(tensor))? {
                current = Some(other);
            }
        }
        Ok(current)
    }
}

fn new_hooks() -> Box<HookList> {
    Box::new(HookList(Arc::default()))
}

fn share_hooks(hooks: &HookList) -> Box<HookList> {
    Box::new(HookList(hooks.0.clone()))
}

/// A tch tensor that borrows a C++ one.
fn borrowed(tensor: &AtTensor) -> ManuallyDrop<Tensor> {
    let pointer: *const AtTensor = tensor;
    // SAFETY: the pointer is valid for as long as the borrow, and the wrapper never frees it.
    ManuallyDrop::new(unsafe { Tensor::from_ptr(pointer.cast_mut().cast()) })
}

fn run_accumulated_hooks(hooks: &HookList, tensor: &AtTensor) -> Result<(), String> {
    guard("a gradient hook", || hooks.run(&borrowed(tensor)).map(|_| ()))
}

fn run_grad_hooks(hooks: &HookList, grad: &AtTensor) -> Result<*mut AtTensor, String> {
    guard("a gradient hook", || Ok(hooks.run(&borrowed(grad))?.map_or(std::ptr::null_mut(), disown)))
}

type Once = Box<dyn FnOnce() -> Result<()> + Send>;

/// A callback for the end of backward; gone if backward fails.
pub(super) struct EndOfBackward(Contained<Mutex<Option<Once>>>);

fn run_end_of_backward(callback: &EndOfBackward) -> Result<(), String> {
    guard("a callback at the end of backward", || callback.0.lock().take().map_or(Ok(()), |f| f()))
}

/// What autograd knows of a tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GradState {
    pub(crate) defined: bool,
    pub(crate) requires_grad: bool,
    pub(crate) leaf: bool,
}

/// What autograd knows of a tensor.
pub(crate) fn grad_state(tensor: &Tensor) -> GradState {
    let bits = ffi::grad_state(at(tensor));
    GradState { defined: bits & 1 != 0, requires_grad: bits & 2 != 0, leaf: bits & 4 != 0 }
}

/// Registers a hook for after a leaf's gradient has been accumulated.
pub(crate) fn hook_accumulated(tensor: &Tensor, callback: Callback) -> Result<Registration> {
    Ok(ffi::accumulated_hooks(at(tensor)).map_err(caught)?.register(callback))
}

/// Registers a hook that sees, and may replace, the gradient on its way to a tensor.
pub(crate) fn hook_grad(tensor: &Tensor, callback: Callback) -> Result<Registration> {
    Ok(ffi::grad_hooks(at(tensor)).map_err(caught)?.register(callback))
}

/// Whether this thread is inside a backward.
pub(crate) fn in_backward() -> bool {
    ffi::in_backward()
}

/// Queues a callback for the end of the backward that this thread is in.
pub(crate) fn after_backward(callback: Once) -> Result<()> {
    ffi::after_backward(Box::new(EndOfBackward(Contained::new(Mutex::new(Some(callback)))))).map_err(caught)
}

/// Sets or clears the gradient; checks nothing.
pub(crate) fn set_grad(tensor: &Tensor, grad: Option<&Tensor>) -> Result<()> {
    match grad {
        Some(grad) => ffi::set_grad(at(tensor), at(grad)),
        None => ffi::clear_grad(at(tensor)),
    }
    .map_err(caught)
}

/// Backward from several roots; `grads` is empty or has one for each root.
pub(crate) fn backward(
    roots: &[&Tensor],
    grads: &[&Tensor],
    retain_graph: bool,
    create_graph: bool,
) -> Result<()> {
    let roots = list::to_cpp(roots.iter().copied());
    let grads = list::to_cpp(grads.iter().copied());
    ffi::backward(&roots, &grads, retain_graph, create_graph).map_err(caught)
}
