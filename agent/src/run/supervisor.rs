//! The parent of the agent: lifts what a dead or stopped agent has left, at once.
//!
//! `bellows run` is two processes. The child is the agent. The parent does nothing but wait for it,
//! so it needs next to no memory, shares no heap or lock with it, and survives its panic, its kill and
//! its own OOM. A parent is also the only one who is told, without polling, that a process was
//! *stopped*: a stopped agent guards nobody and cannot let go of what it holds, so it is taken for dead.
//! That it has *ended* it learns from a pipe: a parent is told of it only after the kernel has taken every
//! program off its function, which takes a second together.
//!
//! What it lifts is what the ledgers say, and it does that under the agent's lock: without it they may be those of a
//! successor, or of another agent because of which this one has ended. A stopped agent keeps the lock, and writes nothing.
//!
//! It must not guard, decide or talk to anybody. If the parent dies, the child is told to end
//! (`PR_SET_PDEATHSIG`) and releases by itself; if both die at once (their container's end), the
//! releaser beside them or the next agent does.

use std::{
    env,
    fs::File,
    io::{self, Read as _},
    os::{fd::IntoRawFd as _, unix::process::CommandExt as _},
    path::Path,
    process::Command,
    sync::mpsc,
    thread,
};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, WaitIdStatus, waitid};

use super::{
    RunError,
    lock::{self, HIGH},
};
use crate::{
    explain::LEDGER,
    recover::{Recovered, release_all},
    signals::{Forwarder, await_children},
};

/// Set in the child.
const AGENT_VARIABLE: &str = "BELLOWS_RUN_AGENT";

/// Whether this process is the child.
#[must_use]
pub fn is_agent() -> bool {
    env::var_os(AGENT_VARIABLE).is_some()
}

/// Runs the agent as a child with the same arguments; returns the exit code to pass on.
///
/// # Errors
///
/// [`RunError::System`] when no child can be started or waited for.
pub fn supervise() -> Result<u8, RunError> {
    let failed = |what| move |error| RunError::System(what, error);
    // Each huge page under a stack or a heap that is hardly used is 2 MiB more of a node's memory; the child
    // inherits this.
    if let Err(errno) = rustix::thread::disable_transparent_huge_pages(true) {
        tracing::debug!(%errno, "huge pages stay on");
    }
    await_children().map_err(failed("cannot wait for children"))?;
    let forwarder = Forwarder::start().map_err(failed("cannot take signals"))?;
    let executable = env::current_exe().map_err(failed("cannot find this program"))?;
    let (alive, held_by_agent) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
        .map_err(|errno| RunError::System("cannot make a pipe", errno.into()))?;
    let mut command = Command::new(executable);
    command
        .args(env::args_os().skip(1))
        .env(AGENT_VARIABLE, "1");
    // SAFETY: three system calls between fork and exec, which are async-signal-safe and do not allocate.
    unsafe {
        command.pre_exec(move || {
            rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
            let inherited = fcntl_dupfd_cloexec(&held_by_agent, HIGH)?;
            fcntl_setfd(&inherited, FdFlags::empty())?;
            // The agent's for as long as it lives.
            let _agents = inherited.into_raw_fd();
            Ok(())
        })
    };
    let mut agent = command.spawn().map_err(failed("cannot start the agent"))?;
    // With it goes our own end of the pipe that the agent has.
    drop(command);
    forwarder
        .forward_to(&agent)
        .map_err(failed("cannot pass signals on to the agent"))?;
    let was_stopped = wait_for_end(agent.id(), File::from(alive));
    let lock = if was_stopped {
        None
    } else {
        lock::after_death().map_err(failed("cannot use the agent's lock"))?
    };
    let recovered = if was_stopped || lock.is_some() {
        release_all(Path::new(LEDGER)).map_err(failed("cannot read the ledger"))?
    } else {
        Recovered::default()
    };
    drop(lock);
    if was_stopped {
        tracing::error!("the agent was stopped, which is as good as dead: it is ended");
        // It has ended if this fails.
        drop(agent.kill());
    }
    let status = agent.wait().map_err(failed("cannot wait for the agent"))?;
    if recovered.released > 0 {
        tracing::warn!(?recovered, %status, "the agent has ended: released what it held");
    }
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}

/// Waits until the agent has ended (left for the caller to reap) or was stopped; says which.
fn wait_for_end(agent: u32, mut alive: File) -> bool {
    let (stop, end) = mpsc::channel();
    let ended = stop.clone();
    thread::spawn(move || {
        // Whatever ends the pipe, an error included, is the end of the agent.
        drop(alive.read(&mut [0]));
        ended.send(false)
    });
    thread::spawn(move || match stopped(agent) {
        Ok(was_stopped) => stop.send(was_stopped),
        // It has ended, which the pipe tells.
        Err(_) => Ok(()),
    });
    end.recv().unwrap_or(false)
}

fn stopped(agent: u32) -> io::Result<bool> {
    let id = i32::try_from(agent).ok().and_then(Pid::from_raw);
    let id = WaitId::Pid(id.ok_or(io::ErrorKind::NotFound)?);
    let options = WaitIdOptions::EXITED | WaitIdOptions::STOPPED | WaitIdOptions::NOWAIT;
    loop {
        match waitid(id.clone(), options) {
            Ok(status) => return Ok(status.as_ref().is_some_and(WaitIdStatus::stopped)),
            Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
}
