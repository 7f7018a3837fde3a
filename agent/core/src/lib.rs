//! What Bellows decides, as pure functions of what was observed.
//!
//! The shell around this crate reads the kernel and the API and carries actions out; this crate
//! holds everything that can be right or wrong about *which* actions. The same [`Snapshot`] gives
//! the same [`Plan`], byte for byte, so a decision can be replayed and argued about afterwards.
//!
//! It must not read a clock, do IO, use floating point or iterate in hash order. Its manifest and
//! its `clippy.toml` enforce that.
#![forbid(unsafe_code)]
#![warn(missing_docs, clippy::float_arithmetic)]

pub mod action;
pub mod allowance;
pub mod arbiter;
pub mod autoscalers;
pub mod boost;
pub mod brake;
pub mod bucket;
pub mod cpu;
pub mod decide;
pub mod elastic;
pub mod growth;
pub mod heap;
pub mod history;
pub mod learnt;
pub mod moved;
pub mod observe;
pub mod parallel;
pub mod patience;
pub mod pod;
pub mod policy;
pub mod quantity;
pub mod reflex;
pub mod requests;
pub mod thrash;
pub mod thresholds;
pub mod units;
pub mod workload;

pub use action::{Action, Reason};
pub use decide::{Plan, Snapshot, decide};
pub use history::History;
pub use learnt::Learnt;
pub use patience::Patience;
pub use policy::{Actuation, Policy, Signals, WHOLE};
pub use reflex::{Reaction, Rung};
pub use thrash::Thrash;
pub use thresholds::{Thresholds, Watermark};
pub use units::{Amount, Bytes, CgroupId, Cpu, Nanos};
