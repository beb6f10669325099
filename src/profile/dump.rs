//! Writing the flight record: on request, on a failure, on a signal.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};

use once_cell::sync::Lazy;
use parking_lot::Mutex;

use super::clock;
use super::diagnose::FlightDump;
use super::instrument::RankInstrument;
use crate::{Error, ProcessGroup, Result};

/// Where failures and SIGUSR1 write to; nothing is written without it.
const FOLDER: &str = "TCH_DISTRIBUTED_FLIGHT_DIR";

/// Writes what this rank's flight recorders remember to `flight-rank-R.json` in `folder`, which is made
/// where it is not there, and gives the file's path. R is the rank in the world. Not a collective.
///
/// ```
/// use tch_distributed::{self as dist, profile};
/// let folder = std::env::temp_dir().join(format!("flight-doc-{}", std::process::id()));
/// dist::testing::run_threads(2, |group| {
///     group.barrier().unwrap();
///     profile::dump(&group, &folder).unwrap();
/// });
/// assert!(profile::diagnose_folder(&folder)?.suspects.is_empty());
/// # std::fs::remove_dir_all(folder)?;
/// # Ok::<(), dist::Error>(())
/// ```
pub fn dump(group: &ProcessGroup, folder: impl AsRef<Path>) -> Result<PathBuf> {
    let world = group.global_world_size();
    let rank = group.ranks()[group.rank()];
    write(group.instrument().shared(), rank, world, "request", folder.as_ref())
}

fn write(
    rank: &RankInstrument,
    number: usize,
    world_size: usize,
    reason: &str,
    folder: &Path,
) -> Result<PathBuf> {
    let dump = FlightDump {
        rank: number,
        world_size,
        pid: std::process::id(),
        reason: reason.to_owned(),
        at_ns: clock::now_ns(),
        groups: rank.records(),
    };
    let json = serde_json::to_vec_pretty(&dump).map_err(|e| Error::Object { reason: e.to_string() })?;
    std::fs::create_dir_all(folder)?;
    let path = folder.join(format!("flight-rank-{number}.json"));
    // Written beside and moved, so that a reader never sees half a record.
    let partial = folder.join(format!(".flight-rank-{number}.{}", std::process::id()));
    std::fs::write(&partial, json)?;
    std::fs::rename(&partial, &path)?;
    Ok(path)
}

/// Writes the record where the environment asks for it: a group of this rank has failed. A record that
/// cannot be written does not add a failure to the one there is; it is only logged.
pub(crate) fn dump_on_failure(rank: &RankInstrument, number: usize, world_size: usize, cause: &Error) {
    let Some(folder) = std::env::var_os(FOLDER).filter(|f| !f.is_empty()) else { return };
    if let Err(error) = write(rank, number, world_size, &cause.to_string(), Path::new(&folder)) {
        tracing::warn!(%error, "the flight record could not be written");
    }
}

type Ranks = Mutex<Vec<(Weak<RankInstrument>, usize, usize)>>;

/// The ranks of this process (one, or several where ranks are threads) that SIGUSR1 dumps.
static RANKS: Lazy<Ranks> = Lazy::new(Ranks::default);

/// With the folder set, SIGUSR1 makes every rank of this process write its record, also while it hangs: a
/// thread of its own waits for the signal. Without the folder nothing is installed.
pub(crate) fn dump_on_signal(rank: &Arc<RankInstrument>, number: usize, world_size: usize) {
    static INSTALL: std::sync::Once = std::sync::Once::new();
    let Some(folder) = std::env::var_os(FOLDER).filter(|f| !f.is_empty()) else { return };
    {
        let mut ranks = RANKS.lock();
        ranks.retain(|(weak, ..)| weak.strong_count() > 0);
        ranks.push((Arc::downgrade(rank), number, world_size));
    }
    INSTALL.call_once(|| {
        let signals = signal_hook::iterator::Signals::new([signal_hook::consts::SIGUSR1]);
        let Ok(mut signals) = signals else { return };
        let wait = move || {
            for _ in signals.forever() {
                for (rank, number, world_size) in RANKS.lock().iter() {
                    if let Some(rank) = rank.upgrade()
                        && let Err(error) = write(&rank, *number, *world_size, "SIGUSR1", Path::new(&folder))
                    {
                        tracing::warn!(%error, "the flight record could not be written");
                    }
                }
            }
        };
        // Without the thread there is no dump on a signal; training goes on all the same.
        let _ = std::thread::Builder::new().name("tchd-flight".to_owned()).spawn(wait);
    });
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::profile::diagnose_folder;
    use crate::testing::run_threads;

    #[test]
    fn a_skipped_collective_is_named_by_the_merged_records() {
        let folder = tempfile::tempdir().unwrap();
        run_threads(3, |group| {
            group.barrier().unwrap();
            if group.rank() == 1 {
                std::thread::sleep(Duration::from_millis(1500)); // its own code, in which it hangs
            } else {
                group.with_timeout(Duration::from_millis(500)).barrier().unwrap_err();
            }
            dump(&group, &folder).unwrap();
        });
        let diagnosis = diagnose_folder(folder.path()).unwrap();
        assert_eq!(diagnosis.suspects, [1], "{diagnosis}");
        assert!(diagnosis.to_string().contains("the hang is in the rank's own code"), "{diagnosis}");
    }

    #[test]
    fn a_folder_without_records_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = diagnose_folder(folder.path()).unwrap_err();
        assert!(error.to_string().contains("flight-rank-"), "{error}");
    }
}
