//! One call of a runtime at a time for each container.
//!
//! A call that is late is not over: what it asked for is set whenever the runtime comes to it, and the kernel kills who uses
//! more than the limit that is written (`memory_max_write`, mm/memcontrol.c), however soon a higher one follows. Seen: on a
//! node that had stood still for seconds, a raise to 134 MiB came into force 0.2 s after the next one, to 395 MiB, was written
//! by hand, and its container was killed. So nothing higher is in force, by hand or otherwise, before the call before it is
//! over; the container is held meanwhile.
//!
//! That cannot go on for ever. A call that takes longer than [`HANGS`] is given up, and its successor takes its turn. What it
//! asked for may still come then: a runtime that has not begun with it learns that nobody waits any more, one that has
//! begun cannot be stopped (`runc` is a process of its own).

use std::{
    sync::{Arc, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Mutex, OwnedMutexGuard},
    task::AbortHandle,
    time::{Instant, timeout_at},
};

/// A call that takes longer is not waited for.
const HANGS: Duration = Duration::from_secs(8);

/// Held until a call is over.
pub(super) type Turn = OwnedMutexGuard<()>;

/// Whose call it is for one container; clones are the same.
#[derive(Clone, Debug, Default)]
pub(super) struct Turns {
    turn: Arc<Mutex<()>>,
    running: Arc<std::sync::Mutex<Option<Running>>>,
}

#[derive(Debug)]
struct Running {
    begun: Instant,
    call: AbortHandle,
}

impl Turns {
    /// Waits until the call before is over or given up.
    pub(super) async fn next(&self) -> Turn {
        loop {
            let turn = Arc::clone(&self.turn).lock_owned();
            match timeout_at(self.hangs_from(), turn).await {
                Ok(turn) => return turn,
                Err(_elapsed) => self.give_up(),
            }
        }
    }

    /// The turn, if no call is under way.
    pub(super) fn at_once(&self) -> Option<Turn> {
        Arc::clone(&self.turn).try_lock_owned().ok()
    }

    /// Whether a call is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.turn.try_lock().is_err()
    }

    /// A call was begun by whoever has its turn.
    pub(super) fn began(&self, call: AbortHandle) {
        let begun = Instant::now();
        self.with(|running| *running = Some(Running { begun, call }));
    }

    fn hangs_from(&self) -> Instant {
        let begun = self.with(|running| running.as_ref().map(|running| running.begun));
        begun.unwrap_or_else(Instant::now) + HANGS
    }

    fn give_up(&self) {
        if let Some(running) = self.with(Option::take) {
            tracing::warn!("the runtime hangs: what it was asked for may still come");
            running.call.abort();
        }
    }

    fn with<T>(&self, change: impl FnOnce(&mut Option<Running>) -> T) -> T {
        change(&mut self.running.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use super::*;

    #[tokio::test]
    async fn a_call_waits_for_the_one_before_it() {
        let turns = Turns::default();
        let first = turns.next().await;
        let other = turns.clone();
        let second = tokio::spawn(async move { drop(other.next().await) });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!second.is_finished());
        drop(first);
        second.await.unwrap();
    }

    #[tokio::test]
    async fn a_call_that_hangs_is_given_up() {
        let turns = Turns::default();
        let turn = turns.next().await;
        let call = tokio::spawn(async move {
            let _turn = turn;
            pending::<()>().await;
        });
        turns.began(call.abort_handle());
        let before = Instant::now();
        let soon = before + Duration::from_millis(100);
        turns.with(|running| running.as_mut().unwrap().begun = soon - HANGS);
        drop(turns.next().await);
        assert!(Instant::now() >= soon && before.elapsed() < HANGS);
        assert!(call.await.unwrap_err().is_cancelled());
    }
}
