//! Pipeline parallelism: stages of a model on different ranks, micro-batches flowing through them.
//!
//! What each rank does in which order is a [`Plan`]: a pure value that is made, checked, drawn and timed
//! without a tensor.
//!
//! ```
//! use tch_distributed::model_parallel::pipeline::{Costs, Plan, Schedule};
//!
//! let plan = Plan::new(Schedule::OneFOneB, 4, 1, 8).unwrap();
//! let timeline = plan.timeline(&Costs::default());
//! assert!((timeline.bubble_share() - 3.0 / 11.0).abs() < 1e-12);
//! println!("{timeline}");
//! ```

mod batch;
mod execute;
mod failure;
mod lanes;
mod picture;
mod plan;
mod run;
mod schedule;
mod stage;
mod stats;
mod tie;
mod timeline;
mod wire;

pub use plan::{Action, Pass, Plan};
pub use run::Pipeline;
pub use schedule::Schedule;
pub use stage::{Loss, Stage};
pub use stats::StepStats;
pub use timeline::{Costs, Slot, Timeline};
