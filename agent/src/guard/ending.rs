//! Whoever is held and is told to end is let go.
//!
//! A signal waits for whoever is frozen. A container that is stopped while it is held would see nothing of it until its
//! grace is over, and then be killed without having said goodbye; somebody who presses ^C would have pressed it in vain.
//! Who is thawed takes its signals before it goes on with anything else.
//!
//! In Kubernetes a pod that is deleted is no longer guarded, so this is for those of other runtimes, and for signals that
//! come from inside. Where processes are not to be seen nobody is found here.
//!
//! Who is stopped (SIGSTOP) would not take its signal if it were thawed, and one that keeps a signal blocked may never: each
//! process lets its container go once.
//!
//! It must not wait for a memory lock: `status` does not take it.

use std::{collections::BTreeSet, fs};

use bellows_core::{Nanos, Reason};

use super::{Controller, Requester};
use crate::{actuate::reflex::Command, signals::set};

/// Holds that are shorter than this are over before anybody has noticed; the longer ones are looked at so often.
const EVERY: Nanos = Nanos::millis(1000);
/// So many processes at each look, a file each: milliseconds of the controller's time, for which all others wait.
const MOST: usize = 1000;
/// SIGHUP, SIGINT, SIGQUIT and SIGTERM, as bits of a signal set.
const TO_END: u64 = 1 << 0 | 1 << 1 | 1 << 2 | 1 << 14;

impl<R: Requester> Controller<R> {
    /// Lets those go for whom a signal to end is waiting.
    pub(super) fn look_for_endings(&mut self, at: Nanos) {
        let mut left = MOST;
        for (&id, guarded) in &mut self.guards {
            let Some(since) = guarded.held_since else {
                continue;
            };
            if at.since(since.max(guarded.endings_looked)) < EVERY {
                continue;
            }
            let processes = guarded.cgroup.processes().unwrap_or_default();
            if processes.len() > MOST {
                guarded.endings_looked = at;
                continue;
            }
            // Those that are left are looked at with the next tick.
            if processes.len() > left {
                continue;
            }
            guarded.endings_looked = at;
            left -= processes.len();
            let asked: BTreeSet<u32> = processes
                .into_iter()
                .filter(|&pid| is_asked_to_end(pid))
                .collect();
            if !asked.is_subset(&guarded.asked_to_end) {
                self.reflex.send(Command::Release(id, Reason::AskedToEnd));
            }
            guarded.asked_to_end = asked;
        }
    }
}

/// Whether a signal to end waits for a process that would take it.
fn is_asked_to_end(pid: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status"));
    status.is_ok_and(|status| pending(&status) & TO_END != 0 && !is_stopped(&status))
}

fn is_stopped(status: &str) -> bool {
    let state = status.lines().find_map(|line| line.strip_prefix("State:"));
    state.is_some_and(|state| state.trim_start().starts_with('T'))
}

/// The signals that wait for its first thread, and for all of it.
fn pending(status: &str) -> u64 {
    set(status, "SigPnd:") | set(status, "ShdPnd:")
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use rustix::process::{Pid, Signal, kill_process};

    use super::*;

    struct Sleeper(Child);

    impl Sleeper {
        fn signal(&self, signal: Signal) {
            kill_process(Pid::from_child(&self.0), signal).unwrap();
        }
    }

    impl Drop for Sleeper {
        fn drop(&mut self) {
            drop(self.0.kill());
            drop(self.0.wait());
        }
    }

    #[test]
    fn a_signal_that_waits_is_seen_and_only_one_to_end() {
        let child = Sleeper(Command::new("sleep").arg("60").spawn().unwrap());
        let pid = child.0.id();
        let status = || fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        // It takes no signal, like one that is frozen; and would take none if it were thawed.
        child.signal(Signal::STOP);
        while !is_stopped(&status()) {
            std::thread::yield_now();
        }
        for (signal, is_to_end) in [
            (Signal::WINCH, false),
            (Signal::USR1, false),
            (Signal::TERM, true),
        ] {
            child.signal(signal);
            assert_eq!(pending(&status()) & TO_END != 0, is_to_end);
            assert!(!is_asked_to_end(pid));
        }
        let frozen = status().replace("T (stopped)", "S (sleeping)");
        assert!(!is_stopped(&frozen), "{frozen}");
    }

    #[test]
    fn what_is_no_set_of_signals_has_none() {
        assert_eq!(
            pending("SigPnd:\t0000000000000002\nShdPnd:\t0000000000004000\n"),
            0x4002
        );
        for status in ["", "SigPnd:\n", "ShdPnd:\tx", "SigBlk:\t0000000000004000"] {
            assert_eq!(pending(status), 0, "{status}");
        }
    }
}
