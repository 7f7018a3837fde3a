//! Runs that say nothing of the guard: the machine itself stood still, and then somebody was killed.
//!
//! Such a run is repeated, and kept. It must not excuse anything else: what counts is a CPU that gave nobody of the guest
//! time ([`crate::heartbeat`]), shortly before a kill. How many were excused is part of each summary, and a test allows
//! hardly any.

use anyhow::Result;
use bellows_core::Nanos;

/// Longer than any sleep of a brake that stands where it should: 60 ms at the limit, 3 % over it
/// (`bellows_core::thresholds`). A kill after a CPU gave nobody time for so long is not the guard's.
const STOOD_STILL: Nanos = Nanos::millis(100);
/// So many runs of a case may say nothing.
const MOST: usize = 2;

/// Whether a kill is none of the guard's after a CPU stood still for so long.
pub(super) fn is_excuse(stood_still: Nanos) -> bool {
    stood_still > STOOD_STILL
}

/// How a run ended.
pub(super) trait Ended {
    /// Whether its load was killed.
    fn killed(&self) -> bool;

    /// The longest time for which a CPU of the machine stood still shortly before the kill, if that was seen.
    fn stood_still(&self) -> Nanos;
}

/// The first run that says something, after those that do not. Each is told how many were before it: it must not be taken
/// for one of those by whoever learns from them.
pub(super) fn repeated<E: Ended>(mut run: impl FnMut(usize) -> Result<E>) -> Result<(E, Vec<E>)> {
    let mut excused = Vec::new();
    loop {
        let ended = run(excused.len())?;
        let says_nothing = ended.killed() && is_excuse(ended.stood_still());
        if !says_nothing || excused.len() == MOST {
            return Ok((ended, excused));
        }
        let time = ended.stood_still().as_millis();
        eprintln!("the machine stood still for {time} ms before a kill: once more");
        excused.push(ended);
    }
}

/// The name of a run of a case, after so many that say nothing.
pub(super) fn name(variant: &str, case: u64, before: usize) -> String {
    if before == 0 {
        format!("{variant}-{case}")
    } else {
        format!("{variant}-{case}-after-{before}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Ended for (bool, u64) {
        fn killed(&self) -> bool {
            self.0
        }

        fn stood_still(&self) -> Nanos {
            Nanos::millis(self.1)
        }
    }

    #[test]
    fn only_a_kill_after_a_standstill_is_excused_and_not_for_ever() {
        let of = |runs: &[(bool, u64)]| {
            let mut runs = runs.iter().copied();
            let mut told = 0;
            let run = |before| {
                assert_eq!(before, told);
                told += 1;
                Ok(runs.next().unwrap())
            };
            let (ended, excused) = repeated(run).unwrap();
            (ended, excused.len())
        };
        assert_eq!(of(&[(true, 100)]), ((true, 100), 0));
        assert_eq!(of(&[(false, 900)]), ((false, 900), 0));
        assert_eq!(of(&[(true, 101), (false, 0)]), ((false, 0), 1));
        assert_eq!(of(&[(true, 101); 3]), ((true, 101), 2));
    }
}
