//! The promise that a backend keeps: told once how an operation ended.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Weak};
use std::task::Waker;
use std::time::Instant;

use once_cell::sync::OnceCell;
use parking_lot::{Condvar, Mutex};

use crate::libtorch::panic_text;
use crate::{Error, Result};

/// What is known of an operation that ended well.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Receipt {
    /// For a receive: the rank of the group that sent.
    pub source: Option<usize>,
}

type Finisher = Box<dyn FnOnce(Result<Receipt>) -> Result<Receipt> + Send>;

/// Copies outputs to where the user wants them.
pub(crate) type WriteBack = Box<dyn FnOnce() -> Result<()> + Send>;

/// Puts what a thread's current stream does from now on behind an operation of the device.
pub(crate) type Order = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// The backend's end of an asynchronous operation. Calling [`complete`](Self::complete) ends it;
/// dropping it without that ends it with [`Error::Aborted`].
pub struct Completion {
    state: Arc<State>,
    write_back: Option<WriteBack>,
    finisher: Option<Finisher>,
    completed: bool,
}

/// The caller's end.
#[derive(Clone)]
pub(crate) struct Ticket {
    state: Arc<State>,
}

/// Moves an operation on, on the thread that waits for it.
pub(crate) trait Helper: Send + Sync {
    /// Does so until `done`, or the time has come, or there is nothing to do for this thread.
    fn help(&self, done: &dyn Fn() -> bool, until: Option<Instant>);
}

#[derive(Default)]
struct State {
    slot: Mutex<Slot>,
    ended: Condvar,
    helper: OnceCell<Weak<dyn Helper>>,
}

#[derive(Default)]
struct Slot {
    result: Option<Result<Receipt, Arc<Error>>>,
    /// For an operation that a device was given: how to wait without blocking, and what will be known of it.
    given: Option<(Order, Receipt)>,
    /// Of who polled last.
    waker: Option<Waker>,
}

/// Runs what a user gave; a panic becomes an error.
pub(crate) fn contained<T>(body: impl FnOnce() -> T) -> Result<T> {
    catch_unwind(AssertUnwindSafe(body)).map_err(|panic| Error::Callback {
        reason: format!("it panicked at the end of an operation: {}", panic_text(&*panic)),
    })
}

impl Completion {
    /// A promise and its ticket. `finisher` runs once, on the thread that completes, before anyone
    /// learns of the end: it copies outputs back to where the user wants them and records failures.
    pub(crate) fn new(finisher: Option<Finisher>) -> (Self, Ticket) {
        let state = Arc::<State>::default();
        (Self { state: state.clone(), write_back: None, finisher, completed: false }, Ticket { state })
    }

    /// Runs `write_back` when the operation has ended well, before the finisher.
    pub(crate) fn writing(mut self, write_back: Option<WriteBack>) -> Self {
        self.write_back = write_back;
        self
    }

    /// Takes over what is to be done at the end: an engine of a device gives it to the device, behind the operation.
    pub(crate) fn take_write_back(&mut self) -> Option<WriteBack> {
        self.write_back.take()
    }

    /// The operation is on the device, all of it: who waits from now on orders a stream and goes on. The end is told as
    /// ever, by [`complete`](Self::complete).
    pub(crate) fn given(&self, receipt: Receipt, order: Order) {
        self.state.slot.lock().given = Some((order, receipt));
        self.state.ended.notify_all();
    }

    /// A promise that runs `then` when it is kept: for a backend that wraps another and has something
    /// to do between the other's end and its own.
    ///
    /// ```
    /// use tch_distributed::backend::{Completion, Receipt};
    /// let (sender, receiver) = std::sync::mpsc::channel();
    /// let done = Completion::from_fn(move |result| sender.send(result.is_ok()).unwrap());
    /// done.complete(Ok(Receipt::default()));
    /// assert!(receiver.recv().unwrap());
    /// ```
    pub fn from_fn(then: impl FnOnce(Result<Receipt>) + Send + 'static) -> Self {
        Self::new(Some(Box::new(move |result| {
            then(result);
            Ok(Receipt::default())
        })))
        .0
    }

    /// Says who lets a thread that waits move the operation on itself.
    pub(crate) fn helped_by(&self, helper: Weak<dyn Helper>) {
        // The first stays.
        let _ = self.state.helper.set(helper);
    }

    /// Ends the operation and wakes those who wait.
    pub fn complete(mut self, result: Result<Receipt>) {
        self.finish(result);
    }

    fn finish(&mut self, result: Result<Receipt>) {
        self.completed = true;
        // A panic in what others gave must not end the thread that drives every group.
        let result = match (result, self.write_back.take()) {
            (Ok(receipt), Some(write_back)) => {
                contained(write_back).and_then(|written| written).map(|()| receipt)
            }
            (result, _) => result,
        };
        let result = match self.finisher.take() {
            Some(finisher) => contained(|| finisher(result)).and_then(|result| result),
            None => result,
        };
        let waker = {
            let mut slot = self.state.slot.lock();
            slot.result = Some(result.map_err(Arc::new));
            slot.waker.take()
        };
        self.state.ended.notify_all();
        if let Some(Err(error)) = waker.map(|waker| contained(|| waker.wake())) {
            tracing::error!(%error, "a waker panicked");
        }
    }
}

impl Drop for Completion {
    fn drop(&mut self) {
        if !self.completed {
            self.finish(Err(Error::Aborted));
        }
    }
}

impl fmt::Debug for Completion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Completion")
    }
}

impl Ticket {
    /// The result, once there is one.
    pub(crate) fn result(&self) -> Option<Result<Receipt>> {
        self.state.slot.lock().result.as_ref().map(Self::read)
    }

    /// Waits as a caller on a device does: where the operation has been given to the device, this thread's stream is
    /// ordered behind it and the host goes on; else for the end.
    pub(crate) fn settle(&self) -> Result<Receipt> {
        self.help(None);
        let mut slot = self.state.slot.lock();
        loop {
            if let Some(result) = &slot.result {
                return Self::read(result);
            }
            if let Some((order, receipt)) = slot.given.clone() {
                drop(slot);
                return order().map(|()| receipt);
            }
            self.state.ended.wait(&mut slot);
        }
    }

    /// Waits for the end, until `deadline` where there is one; `None` when that passed first.
    pub(crate) fn wait_until(&self, deadline: Option<Instant>) -> Option<Result<Receipt>> {
        self.help(deadline);
        let mut slot = self.state.slot.lock();
        loop {
            if let Some(result) = &slot.result {
                return Some(Self::read(result));
            }
            match deadline {
                None => self.state.ended.wait(&mut slot),
                Some(deadline) => {
                    if self.state.ended.wait_until(&mut slot, deadline).timed_out() {
                        return slot.result.as_ref().map(Self::read);
                    }
                }
            }
        }
    }

    /// Moves the operation on, where there is a way for the thread that waits to do so.
    fn help(&self, deadline: Option<Instant>) {
        let ended = || self.state.slot.lock().result.is_some();
        if let Some(helper) = self.state.helper.get().and_then(Weak::upgrade)
            && !ended()
        {
            helper.help(&ended, deadline);
        }
    }

    /// The result, or a promise to wake.
    pub(crate) fn poll(&self, waker: &Waker) -> Option<Result<Receipt>> {
        let mut slot = self.state.slot.lock();
        if slot.result.is_none() && !slot.waker.as_ref().is_some_and(|w| w.will_wake(waker)) {
            slot.waker = Some(waker.clone());
        }
        slot.result.as_ref().map(Self::read)
    }

    fn read(result: &Result<Receipt, Arc<Error>>) -> Result<Receipt> {
        result.as_ref().map(|r| *r).map_err(|e| e.duplicate())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    use super::*;

    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    struct Panic;

    impl Wake for Panic {
        fn wake(self: Arc<Self>) {
            panic!("in a waker");
        }
    }

    #[test]
    fn who_waits_for_what_a_device_was_given_orders_a_stream_and_does_not_wait_for_the_end() {
        let (done, ticket) = Completion::new(None);
        let orders = Arc::new(AtomicUsize::new(0));
        let counted = orders.clone();
        let order = move || {
            counted.fetch_add(1, Ordering::Relaxed);
            Ok(())
        };
        done.given(Receipt { source: Some(3) }, Arc::new(order));
        assert_eq!(ticket.settle().unwrap().source, Some(3));
        assert!(ticket.result().is_none(), "it has not ended");
        done.complete(Err(Error::Aborted));
        assert!(matches!(ticket.settle(), Err(Error::Aborted)), "how it ended is what counts now");
        assert_eq!(orders.load(Ordering::Relaxed), 1);
    }

    /// Ends the operation that it is to help with.
    struct Ends(Mutex<Option<Completion>>, AtomicUsize);

    impl Helper for Ends {
        fn help(&self, done: &dyn Fn() -> bool, _until: Option<Instant>) {
            self.1.fetch_add(1, Ordering::SeqCst);
            assert!(!done());
            if let Some(completion) = self.0.lock().take() {
                completion.complete(Ok(Receipt { source: Some(2) }));
            }
            assert!(done());
        }
    }

    #[test]
    fn who_waits_for_a_message_helps_with_it_first_with_and_without_a_time_limit() {
        let hour = || Some(Instant::now() + std::time::Duration::from_secs(3600));
        type Wait = fn(&Ticket, Option<Instant>) -> Option<Result<Receipt>>;
        let waits: [Wait; 2] = [|t, _| Some(t.settle()), Ticket::wait_until];
        for wait in waits {
            let (done, ticket) = Completion::new(None);
            let ends = Arc::new(Ends(Mutex::new(None), AtomicUsize::new(0)));
            let helper: Arc<dyn Helper> = ends.clone();
            done.helped_by(Arc::downgrade(&helper));
            *ends.0.lock() = Some(done);
            let (sender, receiver) = std::sync::mpsc::channel();
            std::thread::spawn(move || {
                let _ = sender.send((wait(&ticket, hour()), wait(&ticket, hour())));
            });
            let limit = std::time::Duration::from_secs(60);
            let (first, second) = receiver.recv_timeout(limit).expect("nobody helps");
            assert_eq!([first, second].map(|r| r.unwrap().unwrap().source), [Some(2); 2]);
            assert_eq!(ends.1.load(Ordering::SeqCst), 1, "what has ended needs no help");
        }
    }

    #[test]
    fn outputs_are_written_at_a_good_end_unless_the_engine_took_that_over() {
        let written = Arc::new(AtomicUsize::new(0));
        let write = || -> WriteBack {
            let written = written.clone();
            Box::new(move || {
                written.fetch_add(1, Ordering::Relaxed);
                Ok(())
            })
        };
        Completion::new(None).0.writing(Some(write())).complete(Ok(Receipt::default()));
        assert_eq!(written.load(Ordering::Relaxed), 1);
        Completion::new(None).0.writing(Some(write())).complete(Err(Error::Aborted));
        let mut taken = Completion::new(None).0.writing(Some(write()));
        taken.take_write_back().unwrap()().unwrap();
        taken.complete(Ok(Receipt::default()));
        assert_eq!(written.load(Ordering::Relaxed), 2);
    }

    #[test]
    fn whoever_polled_last_is_woken_and_nobody_else() {
        let (done, ticket) = Completion::new(None);
        let counts = [0, 0].map(|n| Arc::new(Count(AtomicUsize::new(n))));
        for count in &counts {
            assert!(ticket.poll(&Waker::from(count.clone())).is_none());
        }
        done.complete(Ok(Receipt::default()));
        assert_eq!(counts.map(|count| count.0.load(Ordering::SeqCst)), [0, 1]);
    }

    #[test]
    fn a_panic_in_a_waker_or_a_finisher_stays_with_the_operation() {
        let (done, ticket) = Completion::new(None);
        assert!(ticket.poll(&Waker::from(Arc::new(Panic))).is_none());
        done.complete(Ok(Receipt::default()));
        assert!(matches!(ticket.result(), Some(Ok(_))));
        let (done, ticket) = Completion::new(Some(Box::new(|_| panic!("in a finisher"))));
        done.complete(Ok(Receipt::default()));
        let Some(Err(Error::Callback { reason })) = ticket.result() else { panic!("it ended well") };
        assert!(reason.contains("in a finisher"), "{reason}");
    }
}
