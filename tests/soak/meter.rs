//! What a process holds, as the kernel tells it.

use std::fmt;
use std::fs;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// What must not grow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holdings {
    /// Bytes of memory that are really there.
    pub resident: u64,
    pub descriptors: usize,
    pub threads: usize,
    /// Mappings of shared memory of ours.
    pub segments: usize,
    /// Keys in the store where the groups meet.
    pub keys: usize,
}

impl Holdings {
    /// Of this process, now.
    pub fn now(keys: usize) -> Self {
        let entries = |folder: &str| fs::read_dir(folder).expect("procfs").count();
        let status = fs::read_to_string("/proc/self/status").expect("procfs");
        let resident: u64 = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:")?.split_whitespace().next()?.parse().ok())
            .expect("a number of kB");
        let maps = fs::read_to_string("/proc/self/maps").expect("procfs");
        Self {
            resident: resident << 10,
            // Reading the folder takes one itself.
            descriptors: entries("/proc/self/fd") - 1,
            threads: entries("/proc/self/task"),
            segments: maps.lines().filter(|line| line.contains("memfd:tch-distributed")).count(),
            keys,
        }
    }

    /// What has grown since `first`, in words. The memory only where it counts.
    pub fn growth(&self, first: &Self, memory: bool) -> Vec<String> {
        let mut grown = Vec::new();
        let mut counted = |what: &str, then: usize, now: usize| {
            if now > then {
                grown.push(format!("{what}: {then} have become {now}"));
            }
        };
        counted("descriptors", first.descriptors, self.descriptors);
        counted("threads", first.threads, self.threads);
        counted("segments of shared memory", first.segments, self.segments);
        // The last groups' keys go with the next group.
        counted("keys in the store", first.keys + 16, self.keys);
        if memory && self.resident as f64 > first.resident as f64 * 1.01 {
            grown.push(format!(
                "resident memory: {:.1} MiB have become {:.1} MiB, more than 1 %",
                mebi(first.resident),
                mebi(self.resident)
            ));
        }
        grown
    }
}

/// How long connections that were closed take to go, at most, with what is still to be said over them.
pub const LAST_WORDS: Duration = Duration::from_millis(1500);

/// How often the descriptors are looked at after the store was asked for its keys: that takes a connection, and
/// where the server is this process it closes its end of it some time later.
const GLANCES: usize = 5;

/// Measures; later than the first time once nothing has grown any more, or after a while.
pub fn settled(first: Option<&Holdings>, keys: impl Fn() -> usize) -> Holdings {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        let keys = keys();
        let mut least = None::<Holdings>;
        for _ in 0..GLANCES {
            std::thread::sleep(Duration::from_millis(20));
            let now = Holdings::now(keys);
            if first.is_some_and(|first| now.growth(first, false).is_empty()) {
                return now;
            }
            least = least.into_iter().chain([now]).min_by_key(|seen| seen.descriptors);
        }
        if let Some(least) = least
            && (first.is_none() || Instant::now() > until)
        {
            return least;
        }
    }
}

fn mebi(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

impl fmt::Display for Holdings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resident, descriptors, threads, segments, keys } = self;
        write!(f, "{:>12.2}{descriptors:>13}{threads:>9}{segments:>10}{keys:>6}", mebi(*resident))
    }
}

/// The head of a table of holdings.
pub const HEAD: &str = "resident MiB  descriptors  threads  segments  keys";
