//! Seeing what distributed training costs: where each step's time goes, which rank is late, what it hung on.
//!
//! * [`Profiler`]: per step and rank, computing, communication, the exposed part of it, waiting for
//!   stragglers, idling; per operation, count, bytes, time; a table that names the slowest rank; a trace for
//!   Perfetto. Off unless asked for (`TCH_DISTRIBUTED_PROFILE` or the builder), and then one branch a call.
//! * `tracing` spans of the target `tch_distributed`, for those who have a collector of their own: `step`; at the
//!   level `TRACE` every call (`collective`, with its activity, group, number, bytes and whether it went well, from its
//!   beginning to its end), every wait for one (`wait`) and every pass of a pipeline (`pass`). They need no profile.
//! * The flight recorder: the last calls of each group ([`FlightEntry`]), always on (a few stores a call;
//!   `TCH_DISTRIBUTED_FLIGHT_RECORDER=N` keeps N, 0 none). [`dump`] writes them; with
//!   `TCH_DISTRIBUTED_FLIGHT_DIR` set every failure and SIGUSR1 does. [`diagnose_folder`], also as `tchrun
//!   diagnose DIR`, says in words which rank stopped where.
//!
//! ```
//! use tch::{Device, Kind, Tensor};
//! use tch_distributed::{self as dist, ReduceOp, profile::{ProfileOptions, Profiler}};
//!
//! let reports = dist::testing::run_threads(2, |group| {
//!     let profiler = Profiler::new(&group, ProfileOptions::new().enabled(true)).unwrap();
//!     for _ in 0..3 {
//!         profiler.step(|| {
//!             let mut gradient = Tensor::ones([1000], (Kind::Float, Device::Cpu));
//!             group.all_reduce(&mut gradient, ReduceOp::Avg).unwrap();
//!         });
//!     }
//!     profiler.finish().unwrap().unwrap()
//! });
//! assert_eq!(reports[0].ranks[1].steps, 3);
//! println!("{}", reports[0]);
//! ```

mod clock;
mod diagnose;
mod dump;
mod events;
mod flight;
mod instrument;
mod late;
mod profiler;
mod report;
mod trace;

pub use diagnose::{Diagnosis, FlightDump, GroupRecord, diagnose, diagnose_folder};
pub use dump::dump;
pub(crate) use dump::{dump_on_failure, dump_on_signal};
pub(crate) use flight::Envelope;
pub use flight::{Activity, FlightEntry, State};
pub(crate) use instrument::{GroupInstrument, RankInstrument, Watch};
pub use profiler::{ProfileOptions, Profiler};
pub use report::{ActivityReport, Overhead, RankReport, Report};
