//! Requests that are not carried out in time, and what is asked for then.
//!
//! A kubelet that has refused a lowering says so late or not at all, and looks again only when the pod changes; one that is
//! busy has refused nothing, and who takes back what it has not come to yet makes it busier.
//!
//! It must not take a request for lost that may still come: what is asked for next would be overtaken by it.

use bellows_core::{Bytes, Nanos};

use super::Guarded;

/// A raise that is not in force after this long got lost or was deferred.
const RAISE_LOST: Nanos = Nanos::millis(15_000);
/// A lowering that is not in force after this long is asked for again: the kubelet compares with usage that
/// it read up to 15 s before, reports a refusal after 12.9 s (measured on 1.37), and looks again only when the
/// pod changes.
const LOWERING_LOST: Nanos = Nanos::millis(7_000);
/// A kubelet that carries out twenty resizes takes its time over each (one a second where 20 pods give back at once, on
/// two emulated CPUs): as long as any other comes into force none is lost, for so many times as long at most. Who takes
/// his own back meanwhile doubles what it has to do.
const LOWERING_LAST: u64 = 4;
/// So many lowerings in a row are waited for as long: by then the kubelet has read its figures again.
const LOWERINGS: u32 = 3;
/// From then on each is waited for twice as long as the one before, so many times.
const LOWERING_DOUBLES: u32 = 5;
/// How much more than a lost lowering is asked for where the limit in force may not be had back.
const LOWERED_ANEW_BY: Bytes = Bytes::mib(1);

impl Guarded {
    /// The request that was not carried out in time, where any other was carried out last at `others`.
    pub(in crate::guard) fn lost(&self, at: Nanos, others: Nanos) -> Option<Bytes> {
        let (to, asked) = self.requested?;
        let (mut since, mut last) = (asked, Nanos(u64::MAX));
        let patience = if to < self.limit {
            let doubles = self
                .lost_lowerings
                .saturating_add(1)
                .saturating_sub(LOWERINGS);
            let patience = LOWERING_LOST.0 << doubles.min(LOWERING_DOUBLES);
            since = since.max(others);
            last = Nanos(patience.saturating_mul(LOWERING_LAST));
            Nanos(patience)
        } else {
            RAISE_LOST
        };
        (at.since(since) >= patience || at.since(asked) >= last).then_some(to)
    }

    /// A lowering was not carried out in time, and no more than `most` may be asked for in its place. Returns a limit a
    /// little above it, since who has refused the one looks again only at another; `None` where that is not allowed either,
    /// and it waits on.
    pub(in crate::guard) fn lowers_anew(
        &mut self,
        at: Nanos,
        to: Bytes,
        most: Bytes,
    ) -> Option<Bytes> {
        let anew = to.plus(LOWERED_ANEW_BY);
        let anew = (anew <= most && anew < self.limit).then_some(anew);
        self.requested = Some((anew.unwrap_or(to), at));
        // The lost one may still come.
        self.lowering = Some(self.lowering.map_or(to, |known| known.min(to)));
        self.lost_lowerings = self.lost_lowerings.saturating_add(1);
        anew
    }

    /// A lowering was refused that took the place of a lower one: returns whether it waits on for that, which its owner knows.
    pub(in crate::guard) fn waits_on(&mut self, at: Nanos, refused: Bytes) -> bool {
        let known = self
            .lowering
            .filter(|&known| known < refused && refused < self.limit);
        self.requested = known.map(|known| (known, at)).or(self.requested);
        known.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::guarded, *};

    fn patience_seconds(to: Bytes, lost_lowerings: u32) -> Option<u64> {
        let guarded = guarded(to, lost_lowerings);
        let lost = |seconds| guarded.lost(Nanos::millis(seconds * 1000), Nanos(0));
        (0..1000).find(|&seconds| lost(seconds).is_some())
    }

    /// Twenty that are given back at once are carried out one after another.
    #[test]
    fn a_lowering_is_not_lost_while_others_are_carried_out() {
        let seconds = |at: u64| Nanos::millis(at * 1000);
        let waits = |others| {
            let guarded = guarded(Bytes::mib(64), 0);
            (0..1000).find(|&at| guarded.lost(seconds(at), others).is_some())
        };
        assert_eq!(waits(seconds(9)), Some(16));
        assert_eq!(waits(seconds(600)), Some(28));
        let raise = guarded(Bytes::mib(512), 0);
        assert_eq!(raise.lost(seconds(15), seconds(14)), Some(Bytes::mib(512)));
    }

    #[test]
    fn a_lowering_is_asked_for_again_soon_and_then_ever_more_seldom() {
        let patience = |lost| patience_seconds(Bytes::mib(64), lost).unwrap();
        assert_eq!([0, 1, 2, 3, 4].map(patience), [7, 7, 7, 14, 28]);
        assert_eq!(patience(u32::MAX), 224);
    }

    #[test]
    fn a_lost_lowering_is_asked_for_a_little_otherwise_as_far_as_that_is_allowed() {
        let at = Nanos::millis(7000);
        let mut lowered = guarded(Bytes::mib(64), 0);
        let allowed = lowered.lowers_anew(at, Bytes::mib(64), Bytes::mib(65));
        assert_eq!(allowed, Some(Bytes::mib(65)));
        assert_eq!(lowered.requested, Some((Bytes::mib(65), at)));
        assert_eq!(lowered.lowering, Some(Bytes::mib(64)), "it may still come");
        let again = lowered.lowers_anew(at, Bytes::mib(65), Bytes::mib(65));
        assert_eq!((again, lowered.lost_lowerings), (None, 2));
        assert_eq!(lowered.requested, Some((Bytes::mib(65), at)));
        assert!(
            lowered.waits_on(at, Bytes::mib(65)),
            "the first one is known"
        );
        assert_eq!(lowered.requested, Some((Bytes::mib(64), at)));
        assert!(
            !lowered.waits_on(at, Bytes::mib(64)),
            "and is refused itself"
        );
    }

    #[test]
    fn a_raise_is_waited_for_longer_than_a_lowering() {
        assert_eq!(patience_seconds(Bytes::mib(512), 3), Some(15));
    }
}
