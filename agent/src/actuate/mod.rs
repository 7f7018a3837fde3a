//! Carrying actions out.
//!
//! [`reflex`] raises, brakes and holds, in microseconds, from a table armed beforehand;
//! [`shrink`] lowers, which reclaims in the writer and may take long. What somebody else owns is asked
//! for: of the API by [`resize`], of the container runtime by [`update`], which moves the pod's own limit
//! ([`pod`]) too. CPU quotas are written, and the runtime told later (`quota`). Nothing here decides what a limit
//! should be.

pub mod pod;
pub mod pod_cgroup;
mod quota;
pub mod reflex;
pub mod resize;
pub mod shrink;
pub mod targets;
mod tell;
pub mod update;
