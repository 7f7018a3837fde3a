//! What reaches the controller, and whom it asks.
//!
//! Everything that happens to a guard is one [`Input`], so that it happens in one order, whoever has seen or done it. What the
//! controller wants of others goes out through [`Requester`], which must not block: what comes of it is an input again. So
//! whoever guards something else than containers in Kubernetes brings a requester, and nothing of the controller changes.
//!
//! The reflex does not wait for room in the channel: what finds none is lost to the controller, and counted.
//!
//! It must not hold state, nor decide.

use std::sync::mpsc::SyncSender;

use bellows_core::{Bytes, CgroupId, Nanos, Policy, allowance::Bound, decide::ByHand};
use thiserror::Error;
use tokio::sync::oneshot;

use super::{counts::Counts, observed::Watching};
use crate::{
    actuate::reflex::{Sink, Verdict},
    cgroup::{Cgroup, CgroupError},
    ledger::Record,
    signal::programs::LoadError,
};

/// Room for inputs that the controller has not taken yet.
pub const INPUTS: usize = 4096;

/// Whatever reaches the controller.
#[derive(Debug)]
pub enum Input {
    /// The reflex saw or did something.
    Verdict(Verdict),
    /// A request was answered.
    Answered {
        /// For which cgroup.
        cgroup: CgroupId,
        /// The limit that was asked for.
        to: Bytes,
        /// Whether it is in force, and why not.
        result: Result<(), Refused>,
    },
    /// Page cache was given back for a shrink to `to`, or could not be.
    RoomMade {
        /// In which cgroup.
        cgroup: CgroupId,
        /// The limit that room was made for.
        to: Bytes,
        /// Whether there is room now, and what went wrong.
        result: Result<bool, String>,
    },
    /// Guard a cgroup from now on.
    Adopt(Cgroup, Policy, Named),
    /// Watch a cgroup, with the rules that it would have.
    Observe(Watching),
    /// A guarded cgroup's rules have changed.
    Policy(CgroupId, Policy),
    /// A guarded cgroup's limit is below the one at rest, and not because somebody else wants it so: raise it.
    ToRest(CgroupId),
    /// What namespaces allow has changed.
    Bounds,
    /// Guard or watch it no more.
    Forget(CgroupId),
    /// Jobs are paused or resumed for want of memory.
    Lent(Record),
    /// Somebody asks what all guards are together.
    Count(oneshot::Sender<Counts>),
    /// Somebody asks whether the controller and the reflex go round: the reflex answers.
    Alive(oneshot::Sender<()>),
    /// End.
    Stop,
}

/// What a guarded cgroup is called.
#[derive(Clone, Debug)]
pub struct Named {
    /// For people.
    pub name: String,
    /// What outlives it, and has needed as much before: `NAMESPACE/WORKLOAD/CONTAINER`, or a plain word.
    pub workload: String,
}

/// Why a request was not carried out.
#[derive(Clone, Debug)]
pub struct Refused {
    /// What to tell people.
    pub why: String,
    /// Whether it may be carried out all the same: nobody has answered.
    pub uncertain: bool,
    /// Whether the same may be granted later: whoever was asked is away, or busy.
    pub is_passing: bool,
}

/// Carries changes to limits that somebody else owns.
pub trait Requester {
    /// What bounds a limit beside its policy, at this moment. What is asked for counts from then on.
    fn bound(&self, _cgroup: CgroupId) -> Option<Bound> {
        None
    }

    /// Asks for a raise. The answer comes as [`Input::Answered`]; must not block. Where the requester raises by hand of its
    /// own accord it must have done so after `patience`: who is held for it can wait no longer.
    fn raise(&mut self, cgroup: &Cgroup, to: Bytes, patience: Nanos);

    /// Lowers the limit; usage has been brought below `to` already. Must not block.
    fn lower(&mut self, cgroup: &Cgroup, to: Bytes);

    /// Takes back a request for `to` that was not carried out in time: the limit is still `limit`.
    fn take_back(&mut self, cgroup: &Cgroup, to: Bytes, limit: Bytes);

    /// Whether others are guarded on the same node: then each raise must find room beside theirs.
    fn shares_the_node(&self) -> bool {
        true
    }

    /// Whether a raise to `to` that was asked for may be written by hand. Never, where that is the requester's own affair.
    fn by_hand(&self, _cgroup: CgroupId, _to: Bytes) -> ByHand {
        ByHand::No
    }

    /// Raises a limit by hand that was asked for, and sees to it that its owner comes to know it. Must not block.
    ///
    /// # Errors
    ///
    /// Why not, for people.
    fn raise_by_hand(&mut self, _cgroup: &Cgroup, _to: Bytes) -> Result<(), String> {
        Err("limits are not raised by hand here".to_owned())
    }

    /// Takes note of what was decided and observed, for people.
    fn record(&mut self, cgroup: &Cgroup, record: &Record);

    /// Takes note that a cgroup is neither guarded nor watched, although it should be.
    fn not_guarded(&mut self, cgroup: CgroupId);
}

/// Why a cgroup cannot be guarded.
#[derive(Debug, Error)]
pub enum GuardError {
    /// A cgroup file.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// A map.
    #[error(transparent)]
    Kernel(#[from] LoadError),
    /// A thread.
    #[error("no thread can be had to make room for a lower limit: {0}")]
    Thread(#[source] std::io::Error),
    /// The ledger.
    #[error("the ledger cannot be written, so nothing is guarded: {0}; free memory on /run")]
    Ledger(#[from] std::io::Error),
}

/// Makes the sink through which the reflex reaches a controller.
#[must_use]
pub fn sink(inputs: SyncSender<Input>) -> Sink {
    Box::new(move |verdict| inputs.try_send(Input::Verdict(verdict)).is_ok())
}
