//! A process that lifts brake and hold if `bellows exec` dies.
//!
//! A command whose guard was killed would stay braked, or frozen, for ever. The releaser is this
//! same binary, waiting on a pipe whose other end only `bellows exec` has: end of file without a
//! farewell means that it died. It runs in a session of its own, so that a Ctrl-C or a hang-up of
//! the terminal does not take it along.

use std::{
    env,
    io::{self, Read as _, Write as _},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
};

use crate::cgroup::{Cgroup, CgroupError, Limit};

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "release-on-death-of-parent";
const FAREWELL: &[u8] = b"done";

/// A running releaser.
#[derive(Debug)]
pub(super) struct Releaser {
    child: Child,
    pipe: ChildStdin,
}

impl Releaser {
    pub(super) fn start(cgroup: &Cgroup) -> io::Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command
            .arg(SUBCOMMAND)
            .arg(cgroup.path())
            .stdin(Stdio::piped());
        // SAFETY: setsid is async-signal-safe and does not allocate.
        unsafe {
            command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from))
        };
        let mut child = command.spawn()?;
        let pipe = child
            .stdin
            .take()
            .ok_or_else(|| io::Error::other("no pipe to the releaser"))?;
        Ok(Self { child, pipe })
    }

    /// Ends it: there is nothing left to release.
    pub(super) fn finish(self) {
        let Self {
            mut child,
            mut pipe,
        } = self;
        let farewell = pipe.write_all(FAREWELL);
        drop(pipe);
        if let Err(error) = farewell.and_then(|()| child.wait()) {
            tracing::debug!(%error, "the releaser has ended already");
        }
    }
}

/// The body of the releaser process: waits for the end of its parent, then releases.
///
/// # Errors
///
/// [`CgroupError`] when a file cannot be written; a cgroup that is gone is no error.
pub fn wait_and_release(path: &Path) -> Result<(), CgroupError> {
    let mut said = Vec::new();
    // Whatever ends the pipe, an error included, is the end of the parent.
    drop(io::stdin().read_to_end(&mut said));
    if said == FAREWELL {
        return Ok(());
    }
    release(path)
}

/// Lifts the brake and the hold of a cgroup.
///
/// # Errors
///
/// [`CgroupError`] when a file cannot be written; a cgroup that is gone is no error.
pub fn release(path: &Path) -> Result<(), CgroupError> {
    let released = Cgroup::open(path).and_then(|cgroup| {
        cgroup.set_limit("memory.high", Limit::Max)?;
        cgroup.write("cgroup.freeze", "0")
    });
    match released {
        Err(error) if !error.is_gone() => Err(error),
        _ => Ok(()),
    }
}
