//! A `memory.high` that is somebody else's.
//!
//! The kubelet's MemoryQoS sets it at a share of the limit and moves it with the limit
//! (`generateLinuxContainerResources`, pkg/kubelet/kuberuntime/kuberuntime_container_linux.go, 1.37). Above it
//! the kernel throttles, so a burst would crawl for minutes through what is left between it and a watermark at
//! 97 % of the limit. So what can be used ends there: watermarks stand below it, and a raise goes further by
//! as much.
//!
//! One that stays where it is when the limit is raised was set by hand, for a reason that we do not know. No
//! raise gets the container past it, so it must not count: the limit would climb to the ceiling for nothing.

use bellows_core::{Bytes, Nanos, WHOLE};

/// Whoever moves it with the limit has done so after this time: the container runtime writes both in one
/// request.
const FOLLOWS_WITHIN: Nanos = Nanos::millis(2000);

/// What is known of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct ForeignBrake {
    /// The limit under which it was first seen, and where it stood.
    seen: Option<(Bytes, Bytes)>,
    /// Since when another limit is in force with the brake where it was.
    unmoved_since: Option<Nanos>,
    /// Whether it does not move with the limit.
    stays: bool,
}

impl ForeignBrake {
    /// Looks at limit and brake; returns the share of the limit that can be used.
    pub(super) fn look(&mut self, at: Nanos, limit: Bytes, high: Bytes) -> u64 {
        let (limit_before, high_before) = *self.seen.get_or_insert((limit, high));
        if high != high_before {
            *self = Self {
                seen: Some((limit, high)),
                ..Self::default()
            };
        } else if self.stays {
            return WHOLE;
        } else if limit == limit_before {
            self.unmoved_since = None;
        }
        if self.seen == Some((limit, high)) {
            return share(high, limit);
        }
        let since = *self.unmoved_since.get_or_insert(at);
        self.stays = at.since(since) >= FOLLOWS_WITHIN;
        if self.stays {
            WHOLE
        } else {
            share(high_before, limit_before)
        }
    }
}

/// All at most, and never less than half: so deep a brake is no MemoryQoS, and the first raise, which comes
/// before it was seen to stay, must not be large.
fn share(high: Bytes, limit: Bytes) -> u64 {
    u64::try_from(u128::from(high.0) * u128::from(WHOLE) / u128::from(limit.0.max(1)))
        .unwrap_or(WHOLE)
        .clamp(WHOLE / 2, WHOLE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_that_moves_with_the_limit_is_the_end_of_what_can_be_used() {
        let mut brake = ForeignBrake::default();
        let look = |brake: &mut ForeignBrake, ms, limit, high| {
            brake.look(Nanos::millis(ms), Bytes::mib(limit), Bytes::mib(high))
        };
        assert_eq!(look(&mut brake, 0, 100, 90), 900);
        // The limit is written before the brake.
        assert_eq!(look(&mut brake, 100, 400, 90), 900);
        assert_eq!(look(&mut brake, 200, 400, 360), 900);
        assert_eq!(look(&mut brake, 60_000, 400, 360), 900);
        assert_eq!(look(&mut brake, 60_100, 100, 360), 900);
        assert_eq!(look(&mut brake, 60_200, 100, 90), 900);
    }

    #[test]
    fn one_that_stays_does_not_count() {
        let mut brake = ForeignBrake::default();
        let look = |brake: &mut ForeignBrake, ms, limit| {
            brake.look(Nanos::millis(ms), Bytes::mib(limit), Bytes::mib(48))
        };
        assert_eq!(look(&mut brake, 0, 64), 750);
        assert_eq!(look(&mut brake, 1000, 200), 750);
        assert_eq!(look(&mut brake, 3000, 200), WHOLE);
        assert_eq!(look(&mut brake, 9000, 64), WHOLE);
        // It moves after all.
        let moved = brake.look(Nanos::millis(9100), Bytes::mib(100), Bytes::mib(90));
        assert_eq!(moved, 900);
    }

    #[test]
    fn a_deep_one_makes_no_large_raise() {
        let mut brake = ForeignBrake::default();
        let high = Bytes::mib(16);
        assert_eq!(brake.look(Nanos(0), Bytes::mib(256), high), 500);
    }

    #[test]
    fn one_above_the_limit_is_none() {
        let mut brake = ForeignBrake::default();
        let high = Bytes(u64::MAX);
        assert_eq!(brake.look(Nanos(0), Bytes::mib(64), high), WHOLE);
    }
}
