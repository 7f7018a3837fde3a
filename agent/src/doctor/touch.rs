//! Touching memory in a cgroup, for the checks that watch what the kernel does about it.
//!
//! A process of its own does it, because memory belongs to the cgroup of the process that touches it.

use std::{
    env,
    hint::black_box,
    io,
    process::{Child, Command},
};

use bellows_core::Bytes;
use clap::ValueEnum;
use rustix::{
    mm::{MapFlags, ProtFlags, mmap_anonymous},
    thread::disable_transparent_huge_pages,
};

use crate::cgroup::{Cgroup, CgroupError};

/// The hidden subcommand.
pub const TOUCH: &str = "touch-for-self-test";
/// How much it touches.
pub const TOUCHED: Bytes = Bytes::mib(32);

/// How memory is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Way {
    /// Each page by an instruction.
    PageByPage,
    /// All pages by one system call.
    InOneCall,
}

/// Starts a process that touches [`TOUCHED`] in a cgroup and ends.
pub(super) fn spawn(cgroup: &Cgroup, way: Way) -> Result<Child, CgroupError> {
    let failed = |source| failed(cgroup, source);
    let mut command = Command::new(env::current_exe().map_err(failed)?);
    command.arg(TOUCH);
    if let Some(value) = way.to_possible_value() {
        command.arg(value.get_name());
    }
    cgroup.admit(&mut command)?;
    command.spawn().map_err(failed)
}

pub(super) fn failed(cgroup: &Cgroup, source: io::Error) -> CgroupError {
    CgroupError::Io {
        action: "run the self-test in",
        path: cgroup.path().to_owned(),
        source,
    }
}

/// The body of the hidden subcommand.
///
/// # Errors
///
/// When the memory cannot be had.
pub fn touch(way: Way) -> io::Result<()> {
    let size = usize::try_from(TOUCHED.0).unwrap_or(0);
    match way {
        Way::PageByPage => drop(black_box(vec![1_u8; size])),
        Way::InOneCall => {
            // A charge that may not wait, as that of a huge page, does not sleep on any kernel: it fails
            // near the limit instead, and small pages follow.
            disable_transparent_huge_pages(true)?;
            let protection = ProtFlags::READ | ProtFlags::WRITE;
            let flags = MapFlags::PRIVATE | MapFlags::POPULATE;
            // SAFETY: a new mapping at an address of the kernel's choice; nobody else knows it.
            unsafe { mmap_anonymous(std::ptr::null_mut(), size, protection, flags) }?;
        }
    }
    Ok(())
}
