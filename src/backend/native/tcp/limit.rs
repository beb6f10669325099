//! The number of descriptors a process may have: raised where sockets run into it.

use std::io;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Opens something; where the process may have no more descriptors, once more with as many allowed as the
/// system lets it have.
///
/// # Errors
/// Those of `open`; which limit was met, where that is why.
pub(super) fn open<T>(mut open: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let exhausted = |e: &io::Error| Errno::from_io_error(e) == Some(Errno::MFILE);
    match open() {
        Err(error) if exhausted(&error) && raise() => open(),
        Err(error) if exhausted(&error) => {
            let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
            let words =
                format!("this process may have {limit} descriptors (ulimit -n) and has them: {error}");
            Err(io::Error::other(words))
        }
        other => other,
    }
}

/// Raises the limit as far as it goes; whether that is further.
fn raise() -> bool {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let more = match (current, maximum) {
        (Some(current), Some(maximum)) => current < maximum,
        (Some(_), None) => true,
        (None, _) => false,
    };
    more && setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).is_ok()
}
