//! Carrying actions out.
//!
//! [`reflex`] raises, brakes and holds, in microseconds, from a table armed beforehand;
//! [`shrink`] lowers, which reclaims in the writer and may take long. Nothing here decides what a
//! limit should be.

pub mod reflex;
pub mod resize;
pub mod shrink;
