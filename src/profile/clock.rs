//! One clock for all ranks.

use std::time::Instant;

use once_cell::sync::Lazy;
use tch::{Kind, Tensor};

use crate::{ProcessGroup, Result};

static ORIGIN: Lazy<(Instant, u64)> = Lazy::new(|| {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    (Instant::now(), time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64)
});

/// Nanoseconds of the host's monotonic clock: the same for every process of a host.
pub(crate) fn now_ns() -> u64 {
    let (origin, at_origin) = *ORIGIN;
    at_origin + origin.elapsed().as_nanos() as u64
}

/// The same clock to a few milliseconds, a tenth of the cost: what every call can afford.
pub(crate) fn coarse_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::MonotonicCoarse);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// Nanoseconds that the calling thread has been on a core.
pub(crate) fn thread_cpu_ns() -> u64 {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// How far this rank's clock is ahead of rank 0's, in nanoseconds: half the round trip of the quickest of
/// several exchanges (D. Mills, NTP). 0 among processes of one host, up to the exchange's own jitter.
/// A collective.
pub(crate) fn offset_ns(group: &ProcessGroup) -> Result<i64> {
    const ROUNDS: usize = 9;
    // Every backend takes it: gloo's tags end below `i32::MAX`.
    const TAG: u32 = 0x7fff_0c10;
    let device = group.object_device();
    let options = (Kind::Int64, device);
    let time = |ns: i64| Tensor::from_slice(&[ns]).f_to_device(device);
    let mut offset = 0;
    for peer in 1..group.size() {
        if group.rank() == 0 {
            for _ in 0..ROUNDS {
                let mut ask = Tensor::f_zeros([1], options)?;
                group.recv(&mut ask, peer, TAG)?;
                // On a device a receive is over when its value can be read.
                ask.f_int64_value(&[0])?;
                group.send(&time(now_ns() as i64)?, peer, TAG)?;
            }
        } else if group.rank() == peer {
            let mut quickest = i64::MAX;
            for _ in 0..ROUNDS {
                let before = now_ns() as i64;
                group.send(&time(before)?, 0, TAG)?;
                let mut theirs = Tensor::f_zeros([1], options)?;
                group.recv(&mut theirs, 0, TAG)?;
                let theirs = theirs.f_int64_value(&[0])?;
                let after = now_ns() as i64;
                if after - before < quickest {
                    quickest = after - before;
                    offset = before + quickest / 2 - theirs;
                }
            }
        }
    }
    Ok(offset)
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_clock_runs_forward() {
        let a = super::now_ns();
        let b = super::now_ns();
        assert!(a > 0 && b >= a);
    }

    #[test]
    fn ranks_of_one_process_have_one_clock() {
        let offsets = crate::testing::run_threads(3, |group| super::offset_ns(&group).unwrap());
        assert_eq!(offsets[0], 0);
        assert!(offsets.iter().all(|o| o.abs() < 50_000_000), "{offsets:?}");
    }
}
