//! From the kernel to typed facts: loading the programs, reading their rings and counters, or reading
//! cgroup files where there are no programs.
//!
//! Nothing here knows pods, policies or limits that could be changed.

pub mod attach;
pub mod btf;
pub mod files;
pub mod guards;
pub mod offsets;
pub mod programs;
pub mod source;
pub mod starts;
pub mod throttles;
pub mod told;
