//! The one error type. Ranks in errors are ranks of the group the call was made on.

use std::sync::Arc;
use std::time::Duration;
use std::{fmt, io};

use tch::TchError;

/// What every fallible function of this crate returns.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Everything that can go wrong, with the rank and the cause.
///
/// Three kinds of error matter to a caller:
/// * an **argument error**, found before anything was sent: the call may be corrected and repeated;
/// * a **failure** ([`Desync`](Self::Desync), [`Timeout`](Self::Timeout), [`PeerLost`](Self::PeerLost),
///   [`Aborted`](Self::Aborted)): it poisons the group on all its ranks;
/// * [`Poisoned`](Self::Poisoned): a call on a group that failed before, with the first cause.
///
/// ```
/// use tch_distributed as dist;
/// let error = dist::rank().unwrap_err();
/// assert!(matches!(error, dist::Error::NotInitialized));
/// assert!(error.to_string().contains("init_process_group"));
/// ```
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// There is no default process group on this thread or in this process.
    #[error(
        "the default process group has not been initialized: call init_process_group first \
         (a thread that a rank spawns has no default group: move the rank's ProcessGroup into it)"
    )]
    NotInitialized,
    /// `init_process_group` was called a second time without `destroy_process_group` between.
    #[error("the default process group is initialized already: call destroy_process_group first")]
    AlreadyInitialized,
    /// Something that is needed was neither given nor found in the environment.
    #[error("{argument} is missing: give it with {builder} or set {variable}")]
    MissingArgument {
        /// What is missing, e.g. `world_size`.
        argument: &'static str,
        /// The builder method that supplies it.
        builder: &'static str,
        /// The environment variable that supplies it.
        variable: &'static str,
    },
    /// An argument is wrong in itself.
    #[error("invalid {argument}: {reason}")]
    InvalidArgument {
        /// The argument's name.
        argument: &'static str,
        /// What was given and what was expected.
        reason: String,
    },
    /// A rank is not smaller than the size of its group.
    #[error("rank {rank} is out of range: the group has {size} ranks, 0 to {}", .size.saturating_sub(1))]
    RankOutOfRange {
        /// The rank given.
        rank: usize,
        /// The size of the group.
        size: usize,
    },
    /// This rank does not belong to the group.
    #[error("rank {rank} is not a member of group {group}")]
    NotMember {
        /// The global rank.
        rank: usize,
        /// The group's name.
        group: String,
    },
    /// The backend cannot do this, or it means nothing.
    #[error("backend {backend} does not support {what}")]
    Unsupported {
        /// The backend's name.
        backend: String,
        /// What was asked for.
        what: String,
    },
    /// The backend exists but cannot work here.
    #[error("backend {backend} is not available: {reason}")]
    BackendUnavailable {
        /// The backend's name.
        backend: String,
        /// Why it cannot work.
        reason: String,
    },
    /// No backend has this name.
    #[error("unknown backend {name:?}: known are {}", .known.join(", "))]
    UnknownBackend {
        /// The name given.
        name: String,
        /// The names that are known.
        known: Vec<String>,
    },
    /// A tensor has the wrong shape.
    #[error("{argument} has the wrong shape: expected {expected}, got {got}")]
    ShapeMismatch {
        /// The argument's name.
        argument: &'static str,
        /// The shape expected.
        expected: String,
        /// The shape given.
        got: String,
    },
    /// A tensor has the wrong kind (dtype).
    #[error("{argument} has the wrong kind: expected {expected}, got {got}")]
    KindMismatch {
        /// The argument's name.
        argument: &'static str,
        /// The kind expected.
        expected: String,
        /// The kind given.
        got: String,
    },
    /// A tensor is on the wrong device.
    #[error("{argument} is on the wrong device: expected {expected}, got {got}")]
    DeviceMismatch {
        /// The argument's name.
        argument: &'static str,
        /// The device expected.
        expected: String,
        /// The device given.
        got: String,
    },
    /// Ranks called different things. Poisons the group.
    #[error(
        "ranks disagree at sequence number {seq} of {op}: rank {rank} called {theirs}, this rank called {ours}"
    )]
    Desync {
        /// The operation this rank was in.
        op: String,
        /// Its sequence number.
        seq: u64,
        /// The rank that differs (the odd one, where the others agree).
        rank: usize,
        /// What that rank called.
        theirs: String,
        /// What this rank called.
        ours: String,
    },
    /// An operation did not end in time. Poisons the group.
    #[error("{op} (sequence number {seq}) timed out after {elapsed:.1?}: {}", missing_ranks(.missing))]
    Timeout {
        /// The operation.
        op: String,
        /// Its sequence number.
        seq: u64,
        /// How long it was waited for.
        elapsed: Duration,
        /// The ranks that had not arrived; empty where none is known.
        missing: Vec<usize>,
    },
    /// A rank went away. Poisons every group that contains it.
    #[error("rank {rank} was lost during {op}{}", .source.as_ref().map(|e| format!(": {e}")).unwrap_or_default())]
    PeerLost {
        /// The rank that failed first.
        rank: usize,
        /// What was going on, with its sequence number.
        op: String,
        /// The system's error, or the words the failing rank left.
        source: Option<io::Error>,
    },
    /// The group failed before; this is the first cause.
    #[error("the process group failed before and cannot be used any more: {cause}")]
    Poisoned {
        /// The first failure.
        #[source]
        cause: Arc<Self>,
    },
    /// The group was aborted.
    #[error("the process group was aborted")]
    Aborted,
    /// A store operation failed.
    #[error("store {op}({key:?}) failed: {reason}")]
    Store {
        /// The operation, e.g. `get`.
        op: String,
        /// Its key or keys.
        key: String,
        /// Why.
        reason: String,
    },
    /// The ranks could not meet.
    #[error("rendezvous failed: {reason}")]
    Rendezvous {
        /// Why, and what to do.
        reason: String,
    },
    /// A rank that a launcher has started failed first; the others were ended.
    #[error("rank {rank} failed: {reason}")]
    RankFailed {
        /// The rank.
        rank: usize,
        /// Its error, or how its process ended.
        reason: String,
    },
    /// An object could not be serialized, or what arrived is not one.
    #[error("object could not be transferred: {reason}")]
    Object {
        /// Why.
        reason: String,
    },
    /// A callback (a hook, a `Function`) failed or panicked.
    #[error("callback failed: {reason}")]
    Callback {
        /// Its message.
        reason: String,
    },
    /// In a data-parallel backward, parameters got no gradient on some ranks. All ranks get this error in
    /// the same step, and the group stays usable.
    #[error(
        "parameters got no gradient in this backward: {}. Let every parameter take part in the loss, or allow it \
         with DdpOptions::find_unused_parameters(true)",
        unused_parameters(.missing)
    )]
    UnusedParameters {
        /// The ranks, and for each the names of its parameters.
        missing: Vec<(usize, Vec<String>)>,
    },
    /// The operating system refused something.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// libtorch refused something.
    #[error(transparent)]
    Torch(#[from] TchError),
}

fn missing_ranks(missing: &[usize]) -> String {
    match missing {
        [] => "no rank is known to be missing".to_owned(),
        [one] => format!("rank {one} did not arrive"),
        many => format!(
            "ranks {} did not arrive",
            many.iter().map(usize::to_string).collect::<Vec<_>>().join(", ")
        ),
    }
}

fn unused_parameters(missing: &[(usize, Vec<String>)]) -> String {
    let of_rank = |(rank, names): &(usize, Vec<String>)| format!("{} on rank {rank}", names.join(", "));
    missing.iter().map(of_rank).collect::<Vec<_>>().join("; ")
}

impl Error {
    pub(crate) fn invalid(argument: &'static str, reason: impl fmt::Display) -> Self {
        Self::InvalidArgument { argument, reason: reason.to_string() }
    }

    /// Whether this failure makes its group unusable.
    pub(crate) fn poisons(&self) -> bool {
        matches!(self, Self::Desync { .. } | Self::Timeout { .. } | Self::PeerLost { .. } | Self::Aborted)
    }

    /// The same error again, for a second reader of the same result.
    pub(crate) fn duplicate(&self) -> Self {
        let io = |e: &io::Error| io::Error::new(e.kind(), e.to_string());
        match self {
            Self::NotInitialized => Self::NotInitialized,
            Self::AlreadyInitialized => Self::AlreadyInitialized,
            Self::MissingArgument { argument, builder, variable } => {
                Self::MissingArgument { argument, builder, variable }
            }
            Self::InvalidArgument { argument, reason } => {
                Self::InvalidArgument { argument, reason: reason.clone() }
            }
            &Self::RankOutOfRange { rank, size } => Self::RankOutOfRange { rank, size },
            Self::NotMember { rank, group } => Self::NotMember { rank: *rank, group: group.clone() },
            Self::Unsupported { backend, what } => {
                Self::Unsupported { backend: backend.clone(), what: what.clone() }
            }
            Self::BackendUnavailable { backend, reason } => {
                Self::BackendUnavailable { backend: backend.clone(), reason: reason.clone() }
            }
            Self::UnknownBackend { name, known } => {
                Self::UnknownBackend { name: name.clone(), known: known.clone() }
            }
            Self::ShapeMismatch { argument, expected, got } => {
                Self::ShapeMismatch { argument, expected: expected.clone(), got: got.clone() }
            }
            Self::KindMismatch { argument, expected, got } => {
                Self::KindMismatch { argument, expected: expected.clone(), got: got.clone() }
            }
            Self::DeviceMismatch { argument, expected, got } => {
                Self::DeviceMismatch { argument, expected: expected.clone(), got: got.clone() }
            }
            Self::Desync { op, seq, rank, theirs, ours } => Self::Desync {
                op: op.clone(),
                seq: *seq,
                rank: *rank,
                theirs: theirs.clone(),
                ours: ours.clone(),
            },
            Self::Timeout { op, seq, elapsed, missing } => {
                Self::Timeout { op: op.clone(), seq: *seq, elapsed: *elapsed, missing: missing.clone() }
            }
            Self::PeerLost { rank, op, source } => {
                Self::PeerLost { rank: *rank, op: op.clone(), source: source.as_ref().map(io) }
            }
            Self::Poisoned { cause } => Self::Poisoned { cause: cause.clone() },
            Self::Aborted => Self::Aborted,
            Self::Store { op, key, reason } => {
                Self::Store { op: op.clone(), key: key.clone(), reason: reason.clone() }
            }
            Self::Rendezvous { reason } => Self::Rendezvous { reason: reason.clone() },
            Self::RankFailed { rank, reason } => Self::RankFailed { rank: *rank, reason: reason.clone() },
            Self::Object { reason } => Self::Object { reason: reason.clone() },
            Self::Callback { reason } => Self::Callback { reason: reason.clone() },
            Self::UnusedParameters { missing } => Self::UnusedParameters { missing: missing.clone() },
            Self::Io(e) => Self::Io(io(e)),
            Self::Torch(e) => Self::Torch(TchError::Torch(e.to_string())),
        }
    }
}
