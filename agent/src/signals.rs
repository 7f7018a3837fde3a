//! Passing signals on to a child: the command of `exec`, the agent of `run`.
//!
//! A signal from the terminal (Ctrl-C) reaches the whole foreground process group, the child
//! included, by itself: passing it on would deliver it twice. A signal from another process was
//! meant for the child and is passed on. Either way the parent stays until the child has ended.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    thread,
};

use rustix::process::{Pid, Signal, kill_process};
use signal_hook::{
    consts::{SIGALRM, SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGUSR1, SIGUSR2, SIGWINCH},
    iterator::{SignalsInfo, exfiltrator::WithOrigin},
    low_level::siginfo::Cause,
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
        let mut signals = SignalsInfo::<WithOrigin>::new(FORWARDED)?;
        let target = Arc::new(AtomicU32::new(0));
        let shared = Arc::clone(&target);
        let handle = thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                for origin in signals.forever() {
                    if matches!(origin.cause, Cause::Kernel) && origin.signal != SIGHUP {
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

fn pass_on(process: u32, signal: i32) {
    let process = i32::try_from(process).ok().and_then(Pid::from_raw);
    if let (Some(process), Some(signal)) = (process, Signal::from_named_raw(signal))
        && let Err(errno) = kill_process(process, signal)
    {
        tracing::debug!(%errno, "the child has ended before the signal reached it");
    }
}
