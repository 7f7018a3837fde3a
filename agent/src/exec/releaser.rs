//! A process that lifts brake and hold, and resumes who is paused, if `bellows exec` dies.
//!
//! A command whose guard was killed would stay braked, or frozen, for ever. The releaser is this
//! same binary, waiting on a pipe whose other end only `bellows exec` has: end of file without a
//! farewell means that it died. It runs in a session of its own, so that a Ctrl-C or a hang-up of
//! the terminal does not take it along. When the orphaned command has ended, it removes its cgroup.

use std::{
    env,
    io::{self, Read as _, Write as _},
    os::unix::process::CommandExt as _,
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    thread,
    time::Duration,
};

use super::place::remove_tree;
use crate::{
    cgroup::{Cgroup, CgroupError},
    ledger, parallel,
    recover::release,
};

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "release-on-death-of-parent";
const FAREWELL: &[u8] = b"done";
/// How often the releaser looks whether an orphaned command has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A running releaser.
#[derive(Debug)]
pub(super) struct Releaser {
    child: Child,
    /// Closed without a farewell, it means death.
    pipe: Option<ChildStdin>,
}

impl Releaser {
    pub(super) fn start(cgroup: &Cgroup, ledger: &Path) -> io::Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command
            .arg(SUBCOMMAND)
            .arg(cgroup.path())
            .arg(ledger)
            .stdin(Stdio::piped());
        // SAFETY: setsid is async-signal-safe and does not allocate.
        unsafe {
            command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from))
        };
        let mut child = command.spawn()?;
        let pipe = child.stdin.take();
        Ok(Self { child, pipe })
    }

    /// Ends it: there is nothing left to release.
    pub(super) fn finish(mut self) {
        if let Some(mut pipe) = self.pipe.take()
            && let Err(error) = pipe.write_all(FAREWELL)
        {
            tracing::debug!(%error, "the releaser has ended already");
        }
    }
}

impl Drop for Releaser {
    /// Waits for it, so that it does not linger in the cgroup that its parent leaves.
    fn drop(&mut self) {
        drop(self.pipe.take());
        if let Err(error) = self.child.wait() {
            tracing::debug!(%error, "the releaser has ended already");
        }
    }
}

/// The body of the releaser process: waits for the end of its parent, then releases.
///
/// # Errors
///
/// [`CgroupError`] when a file cannot be written; a cgroup that is gone is no error.
pub fn wait_and_release(path: &Path, ledger: &Path) -> Result<(), CgroupError> {
    let mut said = Vec::new();
    // Whatever ends the pipe, an error included, is the end of the parent.
    drop(io::stdin().read_to_end(&mut said));
    if said == FAREWELL {
        return Ok(());
    }
    let released = release(path);
    let resume = || {
        let resumed = parallel::resume_all(&ledger::paused(ledger));
        if let Err(error) = &resumed {
            tracing::error!(%error, "those that were paused may stay so");
        }
        resumed.is_ok()
    };
    let mut is_resumed = resume();
    released?;
    // Nobody else is left to remove the command's cgroup when the command has ended.
    while Cgroup::open(path)
        .and_then(|cgroup| cgroup.populated())
        .unwrap_or(false)
    {
        thread::sleep(LOOK_AGAIN);
        is_resumed = is_resumed || resume();
    }
    match Cgroup::open(path).and_then(|cgroup| remove_tree(&cgroup)) {
        Err(error) if !error.is_gone() => Err(error),
        _ => Ok(()),
    }
}
