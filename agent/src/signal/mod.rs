//! From the kernel to typed facts: loading the programs, reading their rings and counters.
//!
//! Nothing here knows pods, policies or limits that could be changed.

pub mod btf;
pub mod offsets;
pub mod programs;
