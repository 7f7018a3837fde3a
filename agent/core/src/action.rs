//! Actions as data, each with its reason.

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// Why something was done. Closed: whatever has no reason here is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub enum Reason {
    /// Demand reached the watermark of the limit.
    WatermarkReached,
    /// Demand reached the hold threshold while a raise is under way.
    RaiseUnderWay,
    /// A working set of page cache does not fit the limit.
    CacheThrashes,
    /// Growth goes on although the container is held: inside a system call, or before the freezer has come.
    GrowsWhileHeld,
    /// The raise that was asked for is late.
    AnswerLate,
    /// The raise that was asked for could not be, for a passing reason.
    RequestFailed,
    /// The policy wants the limit raised first, and asked for at once.
    RaisedFirst,
    /// The raise that a hold waited for has arrived.
    RaiseArrived,
    /// The raise did not arrive within the time that a hold may last.
    HoldExpired,
    /// There is no room for the raise, on the node or above the container.
    NoRoom,
    /// A signal to end waits for it.
    AskedToEnd,
    /// No growth for the quiet period.
    BurstOver,
    /// Demand rose again while the limit was being lowered.
    GrewWhileShrinking,
    /// A CPU quota was used up before its period was over.
    Throttled,
    /// A CPU quota is not used.
    Unused,
    /// A CPU quota is below the one at rest.
    BelowRest,
    /// Whoever owns a CPU quota will not have it raised.
    Refused,
    /// A start or a program is lent more than at rest.
    Boosted,
    /// The guard ends.
    Ended,
}

impl Reason {
    /// Whether who is released for this is let go: not held again for a while, whatever becomes of it.
    #[must_use]
    pub const fn lets_go(self) -> bool {
        matches!(self, Self::HoldExpired | Self::NoRoom | Self::AskedToEnd)
    }
}

/// What can be done to one guarded cgroup.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub enum Action {
    /// Raise the limit to `to`. Undone by [`Action::Shrink`] to `from`.
    Raise {
        /// The limit before.
        from: Bytes,
        /// The limit after.
        to: Bytes,
    },
    /// Raise the limit to `to`, which was asked for, without waiting for the answer. Undone by [`Action::Shrink`] to `from`.
    RaiseByHand {
        /// The limit before.
        from: Bytes,
        /// The limit after.
        to: Bytes,
    },
    /// Lower the limit to `to`. Undone by [`Action::Raise`] to `from`.
    Shrink {
        /// The limit before.
        from: Bytes,
        /// The limit after.
        to: Bytes,
    },
    /// Freeze the container. Undone by [`Action::Release`].
    Hold,
    /// Set the brake of a held container below its usage. Undone by [`Action::Release`].
    Brake {
        /// `memory.high`.
        high: Bytes,
    },
    /// Thaw the container, and put its brake back where its limit wants it.
    Release,
}
