//! A program that starts its own ranks.

use std::collections::HashMap;
use std::fmt::Debug;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::panic::{AssertUnwindSafe, Location, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::Command;

use parking_lot::Mutex;

use super::signals::die_of;
use super::supervise::{End, RankCommand, Terms, describe, supervise};
use super::{PARENT, Seat, die_with_parent, is_child_of, nonce, number};
use crate::libtorch::panic_text;
use crate::rendezvous::environment;
use crate::store::TcpStore;
use crate::{Error, Result};

/// Tells a process that it is a rank: of which call, and where to leave its error.
const CALL: &str = "TCH_DISTRIBUTED_LAUNCH";
const ERROR: &str = "TCH_DISTRIBUTED_ERROR_FILE";

/// How often each place in the program has called.
static CALLS: Mutex<Option<HashMap<String, usize>>> = Mutex::new(None);

/// Names this call: the place in the program, and which time round it is.
fn name(place: &Location<'_>) -> String {
    let place = place.to_string();
    let mut calls = CALLS.lock();
    let count = calls.get_or_insert_default().entry(place.clone()).or_insert(0);
    *count += 1;
    format!("{place}#{count}")
}

/// Runs `body` in `n` processes of this machine, the ranks of one world.
///
/// Each rank is this program again, with the same arguments, up to this very call: there it runs
/// `body`, which calls `init_process_group` itself, and ends. The first process runs no rank; it
/// waits for them and then goes on. What should happen once goes behind the call, what every rank needs
/// goes before it or into `body`. Other calls of `local` on a rank's way there do nothing.
///
/// Under torchrun, `tchrun`, `mpirun` or `srun`, whose variables are set, this process is a rank already:
/// `body` just runs.
///
/// # Errors
/// [`Error::RankFailed`] with the rank that failed first and its error; the others are ended. A rank whose
/// program ended without coming to this call has failed too. On Ctrl-C
/// and `SIGTERM` all ranks end, and this process too.
///
/// ```no_run
/// use tch_distributed as dist;
/// fn main() -> dist::Result<()> {
///     dist::launch::local(2, || {
///         let group = dist::init_process_group("native", dist::InitOptions::new())?;
///         println!("I am {} of {}", group.rank(), group.size());
///         dist::destroy_process_group()
///     })
/// }
/// ```
#[doc(alias = "spawn")]
#[doc(alias = "torch.multiprocessing.spawn")]
#[track_caller]
pub fn local<E: Debug>(n: usize, body: impl FnOnce() -> Result<(), E>) -> Result<()> {
    if n == 0 {
        return Err(Error::invalid("n", "it is 0, expected at least one rank"));
    }
    let call = name(Location::caller());
    let inherited = std::env::var(CALL).ok().zip(number(PARENT));
    if let Some((own, parent)) = &inherited
        && is_child_of(*parent)
    {
        return if call == *own { be_a_rank(*parent, body) } else { Ok(()) };
    }
    // A program that a rank starts has its rank's variables too, but is no rank.
    if inherited.is_none() && environment::launched(&environment::process) {
        let rank = environment::rank(&environment::process)?.unwrap_or(0);
        return body().map_err(|error| Error::RankFailed { rank, reason: format!("{error:?}") });
    }
    let errors = Errors::new()?;
    let store = TcpStore::server("127.0.0.1", 0, crate::store::DEFAULT_TIMEOUT)?;
    let ranks = commands(n, &call, store.port(), &errors.0)?;
    let terms =
        Terms { success: 0, limit: None, print: true, keep: 20, signals: true, interrupted: &|| None };
    let report = supervise(ranks, &terms)?;
    match report.end {
        End::Success => match (0..n).find(|&rank| !errors.came(rank)) {
            None => Ok(()),
            Some(rank) => {
                let reason = "its program ended well, but without coming to this call of launch::local: what \
                              stands before the call must lead every rank to it";
                Err(Error::RankFailed { rank, reason: reason.to_owned() })
            }
        },
        End::Signal(signal) => {
            drop(errors); // a process that dies of a signal cleans up nothing
            die_of(signal)
        }
        End::Failed(failure) => {
            let how = describe(failure.status);
            let reason = failure.error.unwrap_or_else(|| match failure.stderr.as_slice() {
                [] => how,
                lines => format!("{how}; it last said:\n{}", lines.join("\n")),
            });
            Err(Error::RankFailed { rank: failure.rank, reason })
        }
        End::Interrupted(reason) => Err(Error::Rendezvous { reason }),
        End::Limit(ranks) => Err(Error::Rendezvous { reason: format!("ranks {ranks:?} did not end") }),
    }
}

/// Runs the body as a rank, leaves its error for the launcher, and ends.
fn be_a_rank<E: Debug>(parent: u32, body: impl FnOnce() -> Result<(), E>) -> ! {
    die_with_parent(parent);
    let file = std::env::var_os(ERROR);
    if let Some(file) = &file {
        // Empty: it came here. Where it cannot be written the launcher says that nobody came.
        let _ = std::fs::write(file, "");
    }
    let (code, error) = match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => (0, None),
        Ok(Err(error)) => (1, Some(format!("{error:?}"))),
        Err(panic) => (101, Some(format!("it panicked: {}", panic_text(&*panic)))),
    };
    if let (Some(error), Some(file)) = (error, file) {
        // Without the file the launcher still has the exit status and stderr.
        let _ = std::fs::write(file, error);
    }
    std::process::exit(code)
}

/// The folder where ranks leave their errors, removed at the end.
struct Errors(PathBuf);

impl Errors {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("tchd-launch-{}", nonce()));
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self(path))
    }

    /// Whether the rank came to the call.
    fn came(&self, rank: usize) -> bool {
        self.0.join(rank.to_string()).exists()
    }
}

impl Drop for Errors {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn commands(n: usize, call: &str, port: u16, errors: &Path) -> Result<Vec<RankCommand>> {
    let program = std::env::current_exe()?;
    let run_id = nonce();
    let command = |rank: usize| {
        let mut command = Command::new(&program);
        command.args(std::env::args_os().skip(1));
        Seat::on_this_host(rank, n, port, &run_id, true).give(&mut command);
        let file = errors.join(rank.to_string());
        command.env(CALL, call).env(PARENT, std::process::id().to_string()).env(ERROR, &file);
        RankCommand { rank, command, error_file: Some(file) }
    };
    Ok((0..n).map(command).collect())
}
