//! CUDA streams and events; a libtorch without CUDA has none.

use cxx::UniquePtr;

use super::c10d::{Told, told};

#[allow(unreachable_pub, clippy::undocumented_unsafe_blocks)]
#[cxx::bridge(namespace = "tchd")]
mod ffi {
    unsafe extern "C++" {
        include!("tch-distributed/src/libtorch/catch.h");
        include!("tch-distributed/src/libtorch/streams.h");

        type Mark;
        fn passed(self: &Mark) -> Result<bool>;
        fn order(self: &Mark) -> Result<()>;

        type SideStream;
        fn enter(self: &SideStream) -> Result<()>;
        fn leave(self: &SideStream) -> Result<UniquePtr<Mark>>;

        fn new_side_stream(device: i32, high_priority: bool) -> Result<UniquePtr<SideStream>>;
        fn use_device(device: i32) -> Result<()>;
    }
}

// SAFETY: a CUDA event may be queried and waited for by any thread.
unsafe impl Send for ffi::Mark {}
// SAFETY: as above; both methods only read it.
unsafe impl Sync for ffi::Mark {}
// SAFETY: a stream belongs to the device. What ties it to a thread is there during `run` only, which takes
// it for itself.
unsafe impl Send for ffi::SideStream {}

/// A point in a stream's work.
pub(crate) struct Mark(UniquePtr<ffi::Mark>);

impl Mark {
    /// Whether the device has come to it.
    pub(crate) fn passed(&self) -> Told<bool> {
        self.0.passed().map_err(told)
    }

    /// What this thread's current stream does from now on comes after it. Does not block.
    pub(crate) fn order(&self) -> Told<()> {
        self.0.order().map_err(told)
    }
}

/// A stream beside the one that the program computes on.
pub(crate) struct SideStream(UniquePtr<ffi::SideStream>);

impl SideStream {
    pub(crate) fn new(device: usize, high_priority: bool) -> Told<Self> {
        ffi::new_side_stream(device as i32, high_priority).map(Self).map_err(told)
    }

    /// What `body` gives the device goes to this stream, after all that this thread's current stream was given;
    /// the mark is its end.
    pub(crate) fn run<T>(&mut self, body: impl FnOnce() -> T) -> Told<(T, Mark)> {
        /// Leaves also where the body panics.
        struct Entered<'a>(&'a ffi::SideStream);
        impl Drop for Entered<'_> {
            fn drop(&mut self) {
                let _ = self.0.leave();
            }
        }
        self.0.enter().map_err(told)?;
        let entered = Entered(&self.0);
        let result = body();
        std::mem::forget(entered);
        let mark = self.0.leave().map_err(told)?;
        Ok((result, Mark(mark)))
    }
}

/// Makes it this thread's current CUDA device: nothing is then allocated on another unasked.
pub(crate) fn use_device(device: usize) -> Told<()> {
    ffi::use_device(device as i32).map_err(told)
}
