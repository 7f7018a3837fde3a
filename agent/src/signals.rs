//! Passing signals on to a child: the command of `exec`, the agent of `run`.
//!
//! A signal from the terminal (Ctrl-C) reaches the whole foreground process group, the child
//! included, by itself: passing it on would deliver it twice. A signal from another process was
//! meant for the child and is passed on. Either way the parent stays until the child has ended.
//! Before there is a child all are kept for it: a Ctrl-C while the kernel programs load must end what
//! was asked for. One that comes while the child is begun may reach it twice, but is not lost.
//!
//! What this process was told to ignore (by `nohup`, by a shell of what it runs in the background) stays
//! ignored: a handler of ours would make the child, which is begun without handlers, die of it. Not so SIGCHLD: whoever
//! ignores that is not told how a child has ended. Nor SIGTTOU, which this process alone ignores: it must not be stopped
//! for what it says to its terminal from the background (`stty tostop`).
//!
//! It must not signal by number: that may be another process's as soon as the child has been waited for.

use std::{
    fs, io,
    os::{fd::OwnedFd, unix::process::CommandExt as _},
    process::{Child, Command},
    sync::{Arc, OnceLock},
    thread,
};

use rustix::process::{
    DumpableBehavior, Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal, set_dumpable_behavior,
};
use signal_hook::{
    consts::{
        SIGALRM, SIGCHLD, SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTTOU, SIGUSR1, SIGUSR2,
        SIGWINCH,
    },
    iterator::{SignalsInfo, exfiltrator::WithOrigin},
    low_level::{emulate_default_handler, siginfo::Cause},
};

const FORWARDED: [i32; 9] = [
    SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGALRM, SIGCONT, SIGWINCH,
];

/// Takes signals from its start on; those that come before the child runs are passed on once
/// it does.
pub(crate) struct Forwarder {
    child: Arc<OnceLock<OwnedFd>>,
    /// Whether this process was begun to be stopped when it writes to its terminal from the background.
    was_stopped_by_output: bool,
}

impl Forwarder {
    pub(crate) fn start() -> io::Result<Self> {
        let ignored = ignored(&fs::read_to_string("/proc/self/status")?);
        let forwarded = FORWARDED.iter().filter(|&&signal| !has(ignored, signal));
        dispose(SIGTTOU, libc::SIG_IGN)?;
        let mut signals = SignalsInfo::<WithOrigin>::new(forwarded)?;
        let child = Arc::new(OnceLock::new());
        let shared = Arc::clone(&child);
        thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for origin in signals.forever() {
                    let is_from_terminal =
                        matches!(origin.cause, Cause::Kernel) && origin.signal != SIGHUP;
                    if is_from_terminal && shared.get().is_some() {
                        continue;
                    }
                    pass_on(shared.wait(), origin.signal);
                }
            })?;
        Ok(Self {
            child,
            was_stopped_by_output: !has(ignored, SIGTTOU),
        })
    }

    /// Has a child begin as this process was begun.
    pub(crate) fn begin_as_this(&self, command: &mut Command) {
        if self.was_stopped_by_output {
            // SAFETY: between fork and exec the closure only makes one system call, which is async-signal-safe; it
            // touches no lock and does not allocate.
            unsafe { command.pre_exec(|| dispose(SIGTTOU, libc::SIG_DFL)) };
        }
    }

    /// To this child, which has not been waited for; the first one is meant.
    ///
    /// # Errors
    ///
    /// When it cannot be opened.
    pub(crate) fn forward_to(&self, child: &Child) -> io::Result<()> {
        let opened = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
        self.child.get_or_init(|| opened);
        Ok(())
    }
}

/// From now on this process is told how its children have ended, whatever it has inherited.
///
/// # Errors
///
/// When the kernel does not take it.
pub(crate) fn await_children() -> io::Result<()> {
    dispose(SIGCHLD, libc::SIG_DFL)
}

/// Has the kernel ignore a signal (`SIG_IGN`), or do what it does by default (`SIG_DFL`).
fn dispose(signal: i32, disposition: libc::sighandler_t) -> io::Result<()> {
    // SAFETY: neither runs anything of this process.
    let before = unsafe { libc::signal(signal, disposition) };
    if before == libc::SIG_ERR {
        return Err(io::Error::last_os_error());
    }
    Ok(())
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

/// The signals that are ignored, by a process's `status`.
fn ignored(status: &str) -> u64 {
    set(status, "SigIgn:")
}

/// A set of signals in a process's `status`: a bit for each, the lowest for the first.
pub(crate) fn set(status: &str, name: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix(name));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .unwrap_or(0)
}

const fn has(mask: u64, signal: i32) -> bool {
    mask & 1 << (signal - 1) != 0
}

fn pass_on(child: &OwnedFd, signal: i32) {
    if let Some(signal) = Signal::from_named_raw(signal)
        && let Err(errno) = pidfd_send_signal(child, signal)
    {
        tracing::debug!(%errno, "the child has ended before the signal reached it");
    }
}

#[cfg(test)]
mod tests {
    use std::{
        env,
        os::unix::process::ExitStatusExt as _,
        process::{ExitStatus, Stdio},
        time::Duration,
    };

    use super::*;

    /// Runs a test again in a process of its own, as `env` begins it with these options; `None` there.
    fn again(options: &[&str], test: &str) -> Option<ExitStatus> {
        const AGAIN: &str = "BELLOWS_TEST_AGAIN";
        if env::var_os(AGAIN).is_some() {
            return None;
        }
        let mut command = Command::new("env");
        command.args(options).arg(env::current_exe().unwrap());
        command.args(["--exact", &format!("signals::tests::{test}")]);
        command.env(AGAIN, "1").stdout(Stdio::null());
        Some(command.status().unwrap())
    }

    /// As a ^C is while the kernel programs load.
    #[test]
    fn what_the_kernel_sends_before_there_is_a_child_is_kept_for_it() {
        if let Some(status) = again(
            &[],
            "what_the_kernel_sends_before_there_is_a_child_is_kept_for_it",
        ) {
            return assert!(status.success(), "{status}");
        }
        let forwarder = Forwarder::start().unwrap();
        // SAFETY: it has the kernel send a signal in a second, for which there is a handler.
        let _before = unsafe { libc::alarm(1) };
        thread::sleep(Duration::from_millis(1500));
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        forwarder.forward_to(&child).unwrap();
        assert_eq!(child.wait().unwrap().signal(), Some(SIGALRM));
    }

    #[test]
    fn only_the_child_stops_when_it_writes_from_the_background() {
        let name = "only_the_child_stops_when_it_writes_from_the_background";
        if let Some(status) = again(&[], name) {
            return assert!(status.success(), "{status}");
        }
        let forwarder = Forwarder::start().unwrap();
        let mut child = Command::new("cat");
        child.arg("/proc/self/status");
        forwarder.begin_as_this(&mut child);
        let told = String::from_utf8(child.output().unwrap().stdout).unwrap();
        assert!(!has(ignored(&told), SIGTTOU));
        let own = fs::read_to_string("/proc/self/status").unwrap();
        assert!(has(ignored(&own), SIGTTOU));
    }

    #[test]
    fn how_a_child_has_ended_is_known_whatever_was_inherited() {
        let name = "how_a_child_has_ended_is_known_whatever_was_inherited";
        if let Some(status) = again(&["--ignore-signal=CHLD"], name) {
            return assert!(status.success(), "{status}");
        }
        await_children().unwrap();
        let status = Command::new("sh").args(["-c", "exit 7"]).status().unwrap();
        assert_eq!(status.code(), Some(7));
    }

    #[test]
    fn who_passes_signals_on_can_die_of_one() {
        if let Some(status) = again(&[], "who_passes_signals_on_can_die_of_one") {
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
