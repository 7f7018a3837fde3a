//! The agent: the IO around [`bellows_core`].
//!
//! ```text
//! kernel ─ring─▶ signal ─▶ guard (history → decide, pure in core) ─▶ ledger ─▶ actuate ─▶ verify
//!    ├──────────▶ actuate::reflex (table armed beforehand) ──verdicts──▲
//!    └──────────▶ quota (throttled → decide) ─▶ actuate::quota
//! ```
//!
//! A stage does not import the stages after it; `exec` and `run` are the composition roots
//! and the only modules that know them all.

pub mod actuate;
pub mod attribution;
pub mod cgroup;
pub mod cli;
pub mod clock;
pub mod cri;
pub mod doctor;
pub mod exec;
pub mod explain;
pub mod guard;
pub mod ledger;
pub mod machine;
pub mod metrics;
pub mod nri;
pub mod originals;
pub mod parallel;
pub mod policies;
pub mod priority;
pub mod quota;
pub mod recover;
pub mod run;
pub mod serve;
pub mod signal;
mod signals;
pub mod state;
mod wake;
