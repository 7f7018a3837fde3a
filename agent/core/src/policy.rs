//! What a guarded container is allowed, and how its limit can be moved.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::{
    elastic::Parallelism,
    patience::{LONGEST, Patience},
    units::{Bytes, Nanos},
};

/// Where growth is seen. It decides how much room a reaction needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Signals {
    /// Kernel programs tell of each charge above the watermark, in microseconds.
    Programs,
    /// `memory.events` tells of a crossed brake, at most once in 10 ms (`CGROUP_FILE_NOTIFY_MIN_INTV`,
    /// kernel/cgroup/cgroup.c).
    Files,
}

/// How a raise reaches the kernel. It decides the size of a step: on a slow path every raise costs
/// the container a stall, on a direct one it costs microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Actuation {
    /// A write to `memory.max`, carried out by the reflex.
    Direct,
    /// A request to somebody else (the Kubernetes API), during which the container is held.
    Requested {
        /// 95th percentile of the time from the request to the new `memory.max`.
        p95: Nanos,
    },
}

/// The rules for one guarded container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Policy {
    /// The limit at rest: never shrunk below it.
    pub original: Bytes,
    /// The limit that is never exceeded.
    pub ceiling: Bytes,
    /// How a raise reaches the kernel.
    pub actuation: Actuation,
    /// Where growth is seen.
    pub signals: Signals,
    /// How long it may be held.
    pub patience: Patience,
    /// Online CPUs: each may hold a stock of 64 charged but unused pages.
    pub cpus: u64,
    /// Time without new growth after which a burst is over.
    pub shrink_after: Nanos,
    /// The share of the limit at which somebody else throttles (the kubelet's MemoryQoS keeps
    /// `memory.high` there and moves it with the limit), in thousandths; [`WHOLE`] where nobody does.
    pub usable_per_mille: u64,
    /// How long a raise that was asked for may be on its way before it is written by hand; at once with zero. `None`
    /// where only whoever is asked may raise, or does that by itself.
    pub by_hand_after: Option<Nanos>,
    /// Its pod's: where there is not enough for all, the higher ones come first.
    pub priority: i32,
    /// What becomes of its jobs where there is not memory for all of them at once.
    pub parallelism: Parallelism,
    /// The limit with which runs like the one under way have been served ([`crate::learnt`]).
    pub learnt: Option<Bytes>,
}

/// What a run has needed must be so much more than what is used already, or it is one like none before.
const LEARNT_PER_MILLE: u64 = 1100;

/// The share of a container's patience after which its raise is written by hand, however short that is.
const PATIENT_PER_MILLE: u64 = 750;

/// The same where a smaller limit may still come after it, and kill: each moment more may be the one in which that comes, and
/// does no harm (an API that stood still for ten seconds, on a slow node: the kubelet set the smaller one half a second after
/// the raise).
const WARY_PER_MILLE: u64 = 900;
/// What is left for that at least.
const WARY_LEFT: Nanos = Nanos::millis(400);

/// All of a limit can be used.
pub const WHOLE: u64 = 1000;

/// Why limits make no policy.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PolicyError {
    /// The ceiling is below the limit.
    #[error(
        "the maximum of {ceiling} is below the limit of {original}: raise the maximum or lower the limit"
    )]
    CeilingBelowOriginal {
        /// The limit at rest.
        original: Bytes,
        /// The maximum.
        ceiling: Bytes,
    },
    /// The limit cannot hold a process.
    #[error("a limit of {original} is too small to start a process: use at least 1Mi")]
    TooSmall {
        /// The limit at rest.
        original: Bytes,
    },
}

impl Policy {
    /// What of a limit can be used without being throttled by somebody else.
    #[must_use]
    pub fn usable(&self, limit: Bytes) -> Bytes {
        limit.per_mille(self.usable_per_mille)
    }

    /// The limit of which `usable` can be used.
    #[must_use]
    pub fn limit_for(&self, usable: Bytes) -> Bytes {
        usable.scaled(WHOLE, self.usable_per_mille)
    }

    /// The limit that runs like this one have needed, where that is enough for what is used now, and for some more.
    #[must_use]
    pub fn learnt_for(&self, demand: Bytes) -> Option<Bytes> {
        let is_enough = |learnt: &Bytes| self.usable(*learnt) >= demand.per_mille(LEARNT_PER_MILLE);
        let learnt = self.learnt.filter(is_enough)?;
        Some(learnt.min(self.ceiling))
    }

    /// How long it may be held.
    #[must_use]
    pub fn allowance(&self) -> Nanos {
        let allowed = if self.patience.may_freeze() {
            self.patience.frozen
        } else {
            self.patience.braked
        };
        self.patience.left(allowed, Nanos(0))
    }

    /// After which part of that its raise must be there.
    #[must_use]
    pub fn last_moment(&self) -> Nanos {
        last_moment(self.allowance())
    }

    /// The same where another limit may still come that is smaller.
    #[must_use]
    pub fn very_last_moment(&self) -> Nanos {
        very_last_moment(self.allowance())
    }

    /// How long an answer is waited for: who may be held for longer than is usual may wait for memory, not for whoever is
    /// to raise it.
    #[must_use]
    pub fn answer_within(&self) -> Nanos {
        last_moment(self.allowance().min(LONGEST))
    }

    /// The same where another limit may still come that is smaller.
    #[must_use]
    pub fn answer_within_at_last(&self) -> Nanos {
        very_last_moment(self.allowance().min(LONGEST))
    }

    /// Checks that the limits are possible, and rounds them down to pages as the kernel will, whose pages have this size.
    ///
    /// # Errors
    ///
    /// [`PolicyError`] when the ceiling is below the limit, or the limit below 1 MiB.
    pub const fn validate(self, page: Bytes) -> Result<Self, PolicyError> {
        let (original, ceiling) = (self.original.floor_to(page), self.ceiling.floor_to(page));
        if original.0 < Bytes::mib(1).0 {
            return Err(PolicyError::TooSmall { original });
        }
        if ceiling.0 < original.0 {
            return Err(PolicyError::CeilingBelowOriginal { original, ceiling });
        }
        Ok(Self {
            original,
            ceiling,
            ..self
        })
    }
}

fn last_moment(allowance: Nanos) -> Nanos {
    allowance.per_mille(PATIENT_PER_MILLE)
}

fn very_last_moment(allowance: Nanos) -> Nanos {
    let left = allowance.since(WARY_LEFT);
    left.min(allowance.per_mille(WARY_PER_MILLE))
        .max(last_moment(allowance))
}

#[cfg(test)]
impl Policy {
    /// A policy for tests: raises by writing on two CPUs, nobody else throttles.
    pub(crate) const fn direct(original: Bytes, ceiling: Bytes) -> Self {
        Self {
            original,
            ceiling,
            actuation: Actuation::Direct,
            signals: Signals::Programs,
            patience: Patience::UNPROBED,
            cpus: 2,
            shrink_after: Nanos::millis(2000),
            usable_per_mille: WHOLE,
            by_hand_after: None,
            priority: 0,
            parallelism: Parallelism::Unchanged,
            learnt: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_become_what_the_kernel_will_make_of_them() {
        let policy = Policy::direct(Bytes(100_000_000), Bytes(4_000_000_001));
        let Policy {
            original, ceiling, ..
        } = policy.validate(Bytes(4096)).unwrap();
        assert_eq!((original.0, ceiling.0), (99_999_744, 3_999_997_952));
        let policy = policy.validate(Bytes(65_536)).unwrap();
        assert_eq!(policy.original.0, 99_942_400);
    }
}
