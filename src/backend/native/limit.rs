//! The number of descriptors a process may have. A group wants some for every peer, and who sets it up is many
//! calls, some of them not ours, so room is made before the first of them.

use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit as far as the system lets the process have it, as the runtimes of Go and Java do.
pub(super) fn raise() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum
        && let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })
    {
        tracing::debug!(%error, "the limit of descriptors stays as it is");
    }
}

/// What opening something came to; where the process may have no more descriptors, the error says so.
///
/// # Errors
/// That of `opened`; which limit was met, where that is why.
pub(super) fn explain<T>(opened: io::Result<T>) -> io::Result<T> {
    opened.map_err(|error| match Errno::from_io_error(&error) {
        Some(Errno::MFILE) => {
            let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
            io::Error::other(format!(
                "this process may have {limit} descriptors (ulimit -n) and has them: {error}"
            ))
        }
        _ => error,
    })
}
