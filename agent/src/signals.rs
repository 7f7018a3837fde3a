//! Passing signals on to a child: the command of `exec`, the agent of `run`.
//!
//! A signal from the terminal (Ctrl-C) reaches the whole foreground process group, the child
//! included, by itself: passing it on would deliver it twice. A signal from another process was
//! meant for the child and is passed on. Either way the parent stays until the child has ended.
//! Before there is a child all are kept for it: a Ctrl-C while the kernel programs load must end what
//! was asked for. One that comes while the child is begun may reach it twice, but is not lost.
//!
//! What this process was told to ignore (by `nohup`, by a shell of what it runs in the background) stays
//! ignored: a handler of ours would make the child, which is begun without handlers, die of it.

use std::{
    fs, io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use rustix::process::{DumpableBehavior, Pid, Signal, kill_process, set_dumpable_behavior};
use signal_hook::{
    consts::{SIGALRM, SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH},
    iterator::{SignalsInfo, exfiltrator::WithOrigin},
    low_level::{emulate_default_handler, siginfo::Cause},
};

const FORWARDED: [i32; 9] = [
    SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGALRM, SIGCONT, SIGWINCH,
];

/// Takes signals from its start on; those that come before the child runs are passed on once
/// it does.
pub(crate) struct Forwarder {
    target: Arc<AtomicU32>,
    thread: thread::Thread,
}

impl Forwarder {
    pub(crate) fn start() -> io::Result<Self> {
        let ignored = ignored(&fs::read_to_string("/proc/self/status")?);
        let forwarded = FORWARDED.iter().filter(|&&signal| !has(ignored, signal));
        let mut signals = SignalsInfo::<WithOrigin>::new(forwarded)?;
        let target = Arc::new(AtomicU32::new(0));
        let shared = Arc::clone(&target);
        let handle = thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for origin in signals.forever() {
                    let is_from_terminal =
                        matches!(origin.cause, Cause::Kernel) && origin.signal != SIGHUP;
                    if is_from_terminal && shared.load(Ordering::Acquire) != 0 {
                        continue;
                    }
                    while shared.load(Ordering::Acquire) == 0 {
                        thread::park();
                    }
                    pass_on(shared.load(Ordering::Acquire), origin.signal);
                }
            })?;
        Ok(Self {
            target,
            thread: handle.thread().clone(),
        })
    }

    pub(crate) fn forward_to(&self, process: u32) {
        self.target.store(process, Ordering::Release);
        self.thread.unpark();
    }
}

/// Ends this process by a signal of which its child has died, without a core of its own.
///
/// # Errors
///
/// When it could not be.
pub(crate) fn die_of(signal: i32) -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    emulate_default_handler(signal)
}

/// The signals that are ignored, by a process's `status`: a bit for each, the lowest for the first.
fn ignored(status: &str) -> u64 {
    let lines = status.lines();
    let mask = lines.filter_map(|line| line.strip_prefix("SigIgn:")).next();
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

const fn has(mask: u64, signal: i32) -> bool {
    mask & 1 << (signal - 1) != 0
}

fn pass_on(process: u32, signal: i32) {
    let process = i32::try_from(process).ok().and_then(Pid::from_raw);
    if let (Some(process), Some(signal)) = (process, Signal::from_named_raw(signal))
        && let Err(errno) = kill_process(process, signal)
    {
        tracing::debug!(%errno, "the child has ended before the signal reached it");
    }
}

#[cfg(test)]
mod tests {
    use std::{
        env,
        os::unix::process::ExitStatusExt as _,
        process::{Command, ExitStatus, Stdio},
        time::Duration,
    };

    use super::*;

    /// Runs a test again in a process of its own; `None` there.
    fn again(test: &str) -> Option<ExitStatus> {
        const AGAIN: &str = "BELLOWS_TEST_AGAIN";
        if env::var_os(AGAIN).is_some() {
            return None;
        }
        let mut command = Command::new(env::current_exe().unwrap());
        command.args(["--exact", &format!("signals::tests::{test}")]);
        command.env(AGAIN, "1").stdout(Stdio::null());
        Some(command.status().unwrap())
    }

    /// As a ^C is while the kernel programs load.
    #[test]
    fn what_the_kernel_sends_before_there_is_a_child_is_kept_for_it() {
        if let Some(status) = again("what_the_kernel_sends_before_there_is_a_child_is_kept_for_it")
        {
            return assert!(status.success(), "{status}");
        }
        let forwarder = Forwarder::start().unwrap();
        // SAFETY: it has the kernel send a signal in a second, for which there is a handler.
        let _before = unsafe { libc::alarm(1) };
        thread::sleep(Duration::from_millis(1500));
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        forwarder.forward_to(child.id());
        assert_eq!(child.wait().unwrap().signal(), Some(SIGALRM));
    }

    #[test]
    fn who_passes_signals_on_can_die_of_one() {
        if let Some(status) = again("who_passes_signals_on_can_die_of_one") {
            return assert_eq!(status.signal(), Some(SIGQUIT), "{status}");
        }
        let _forwarder = Forwarder::start().unwrap();
        die_of(SIGQUIT).unwrap();
    }

    #[test]
    fn what_is_ignored_is_known() {
        // Of a process under `nohup`: SIGHUP, and SIGPIPE as of any program in Rust.
        let mask = ignored("Name:\tx\nSigBlk:\tffffffffffffffff\nSigIgn:\t0000000000001001\n");
        assert!(has(mask, SIGHUP) && !has(mask, SIGTERM) && !has(mask, SIGINT));
        assert_eq!((ignored(""), ignored("SigIgn:\tx")), (0, 0));
    }
}
