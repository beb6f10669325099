//! Threads that wait for what an engine can only be waited for.

use std::collections::VecDeque;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

type Job = Box<dyn FnOnce() + Send>;

/// Jobs nobody has taken yet, and how many threads have nothing to do.
struct Queue {
    jobs: VecDeque<Job>,
    idle: usize,
}

static QUEUE: Mutex<Queue> = Mutex::new(Queue { jobs: VecDeque::new(), idle: 0 });
static COME: Condvar = Condvar::new();
const LINGER: Duration = Duration::from_secs(5);

/// Runs a job that may block for long, beside all others. One thread a job while they block; threads
/// without a job stay for a moment.
pub(super) fn run(job: impl FnOnce() + Send + 'static) {
    let mut queue = QUEUE.lock();
    queue.jobs.push_back(Box::new(job));
    if queue.idle >= queue.jobs.len() {
        COME.notify_one();
        return;
    }
    drop(queue);
    let made = thread::Builder::new().name("tchd-c10d-wait".to_owned()).spawn(serve);
    if let Err(error) = made {
        tracing::warn!("no thread to wait for an operation, waiting here: {error}");
        let job = QUEUE.lock().jobs.pop_back();
        if let Some(job) = job {
            job();
        }
    }
}

/// What a job gives, if that takes no longer than this. A store beyond a dead line never answers.
pub(super) fn within<T: Send + 'static>(
    limit: Duration,
    job: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (told, end) = channel();
    run(move || drop(told.send(job())));
    end.recv_timeout(limit).ok()
}

fn serve() {
    let mut queue = QUEUE.lock();
    loop {
        if let Some(job) = queue.jobs.pop_front() {
            drop(queue);
            job();
            queue = QUEUE.lock();
            continue;
        }
        queue.idle += 1;
        let late = COME.wait_for(&mut queue, LINGER).timed_out();
        queue.idle -= 1;
        if late && queue.jobs.is_empty() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::sync::{Arc, Barrier};
    use std::time::Duration;

    #[test]
    fn nobody_waits_longer_than_the_limit_for_what_does_not_end() {
        let (hold, held) = channel::<()>();
        assert_eq!(super::within(Duration::from_millis(20), move || held.recv()), None);
        drop(hold);
        assert_eq!(super::within(Duration::from_secs(20), || 7), Some(7));
    }

    #[test]
    fn jobs_that_wait_for_one_another_all_run() {
        let barrier = Arc::new(Barrier::new(9));
        for _ in 0..8 {
            let barrier = barrier.clone();
            super::run(move || {
                barrier.wait();
            });
        }
        barrier.wait();
    }
}
