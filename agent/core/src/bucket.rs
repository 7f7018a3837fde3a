//! How many changes an agent may ask of the API: a token bucket, from which the urgent may take the last.
//!
//! Every change of a pod is a write to etcd, an event for each watch, and a sync of the kubelet. A node whose pods all burst
//! must not take the API server from the others; and where it has to wait, a raise that somebody is held for comes before a
//! limit that is only given back. So the last of the tokens are for the urgent. Who has to wait asks again with what it wants
//! by then, which is how several changes become one.
//!
//! It must not keep the urgent waiting for as long as a hold may last: there are more tokens than a node has bursts at once.

use crate::units::Nanos;

/// Tokens of a full bucket.
pub const BURST: u64 = 40;
/// Of these, so many are for the urgent.
pub const URGENT: u64 = 20;
/// The time in which one comes back.
pub const REFILL: Nanos = Nanos::millis(500);

/// How urgent a change is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Urgency {
    /// Somebody is held for it, or is about to be.
    Urgent,
    /// It can wait.
    Later,
}

/// The bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bucket {
    tokens: u64,
    /// When the last token came.
    at: Nanos,
}

impl Bucket {
    /// A full one.
    #[must_use]
    pub const fn full(now: Nanos) -> Self {
        Self {
            tokens: BURST,
            at: now,
        }
    }

    /// Takes a token.
    ///
    /// # Errors
    ///
    /// How long to wait until one may be there.
    pub fn take(&mut self, now: Nanos, urgency: Urgency) -> Result<(), Nanos> {
        let come = now.since(self.at).0 / REFILL.0;
        self.at = Nanos(self.at.0.saturating_add(come.saturating_mul(REFILL.0)));
        self.tokens = self.tokens.saturating_add(come).min(BURST);
        let kept = match urgency {
            Urgency::Urgent => 0,
            Urgency::Later => URGENT,
        };
        if self.tokens > kept {
            self.tokens -= 1;
            return Ok(());
        }
        let missing = kept + 1 - self.tokens;
        Err(Nanos(
            (missing * REFILL.0).saturating_sub(now.since(self.at).0),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_are_for_the_urgent() {
        let mut bucket = Bucket::full(Nanos(0));
        let at = Nanos(7);
        let taken = (0..).take_while(|_| bucket.take(at, Urgency::Later).is_ok());
        assert_eq!(taken.count() as u64, BURST - URGENT);
        let taken = (0..).take_while(|_| bucket.take(at, Urgency::Urgent).is_ok());
        assert_eq!(taken.count() as u64, URGENT);
        assert_eq!(bucket.take(at, Urgency::Urgent), Err(Nanos(REFILL.0 - 7)));
    }

    #[test]
    fn who_waits_as_long_as_it_is_told_gets_one() {
        for urgency in [Urgency::Urgent, Urgency::Later] {
            let mut bucket = Bucket {
                tokens: 0,
                at: Nanos(0),
            };
            let mut now = Nanos(123_456);
            let wait = bucket.take(now, urgency).unwrap_err();
            now = Nanos(now.0 + wait.0 - 1);
            assert!(bucket.take(now, urgency).is_err());
            now = Nanos(now.0 + 1);
            assert_eq!(bucket.take(now, urgency), Ok(()));
        }
    }

    #[test]
    fn no_more_come_than_it_holds_nor_faster_than_they_may() {
        let mut bucket = Bucket::full(Nanos(0));
        let later = Nanos(REFILL.0 * 1000);
        let taken = (0..).take_while(|_| bucket.take(later, Urgency::Urgent).is_ok());
        assert_eq!(taken.count() as u64, BURST);
        // In an hour of asking all the time: the rate, and what it held.
        let mut bucket = Bucket::full(Nanos(0));
        let hour = Nanos::millis(3_600_000);
        let asked = (0..hour.0).step_by(50_000_000);
        let taken = asked.filter(|&at| bucket.take(Nanos(at), Urgency::Urgent).is_ok());
        assert_eq!(taken.count() as u64, BURST + hour.0 / REFILL.0 - 1);
        // A clock that goes back takes nothing away.
        assert!(bucket.take(Nanos(0), Urgency::Later).is_err());
    }
}
