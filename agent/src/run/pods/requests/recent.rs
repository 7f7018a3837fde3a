//! What a container has used of late.

use std::collections::VecDeque;

use bellows_core::Bytes;

/// So many looks count: a minute's.
const LOOKS: usize = 12;
/// Who uses more than before by this share of it grows, in thousandths.
const GROWS_PER_MILLE: u64 = 60;

/// What was seen at the last looks, the latest last.
#[derive(Clone, Debug, Default)]
pub(super) struct Recent(VecDeque<Bytes>);

impl Recent {
    pub(super) fn saw(&mut self, used: Bytes) {
        if self.0.len() == LOOKS {
            self.0.pop_front();
        }
        self.0.push_back(used);
    }

    pub(super) fn is_any(&self) -> bool {
        !self.0.is_empty()
    }

    /// The most of it.
    pub(super) fn peak(&self) -> Bytes {
        self.0.iter().copied().max().unwrap_or_default()
    }

    /// Whether it used notably more at the last look than before.
    pub(super) fn is_growing(&self) -> bool {
        let mut latest = self.0.iter().rev();
        let (Some(&last), Some(&before)) = (latest.next(), latest.next()) else {
            return false;
        };
        last > before.plus(before.per_mille(GROWS_PER_MILLE))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_a_minute_ago_counts_and_what_was_before_does_not() {
        let mut recent = Recent::default();
        assert_eq!((recent.peak(), recent.is_growing()), (Bytes::ZERO, false));
        recent.saw(Bytes::mib(90));
        for _ in 1..LOOKS {
            recent.saw(Bytes::mib(10));
            assert_eq!(recent.peak(), Bytes::mib(90));
        }
        recent.saw(Bytes::mib(10));
        assert_eq!(recent.peak(), Bytes::mib(10));
    }

    #[test]
    fn a_burst_is_growth_and_a_leak_is_not() {
        let mut recent = Recent::default();
        let mut after = |mib| {
            recent.saw(Bytes::mib(mib));
            recent.is_growing()
        };
        assert_eq!(
            [100, 105, 150, 150].map(&mut after),
            [false, false, true, false]
        );
    }
}
