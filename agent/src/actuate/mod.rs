//! Carrying actions out.
//!
//! [`reflex`] raises, brakes and holds, in microseconds, from a table armed beforehand;
//! [`shrink`] lowers, which reclaims in the writer and may take long. What somebody else owns is asked
//! for: of the API by [`resize`], of the container runtime by [`update`], which moves the pod's own limit
//! ([`pod`]) too, and where the API is late the limit is raised without it ([`by_hand`]). CPU quotas are written (`quota`), and the runtime told later, or the API ([`pod_cpu`]). Nothing here decides what a limit
//! should be.

pub mod allowances;
pub mod by_hand;
pub mod containers;
pub mod pod;
pub mod pod_cgroup;
pub mod pod_cpu;
mod quota;
pub mod reflex;
pub mod requests;
pub mod resize;
pub mod shrink;
pub mod squeeze;
mod systemd;
pub mod targets;
mod tell;
mod turns;
pub mod update;
