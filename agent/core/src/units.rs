//! Units, so that no bare number crosses a signature.

use core::fmt;

use serde::{Deserialize, Serialize};

/// An amount of memory. Arithmetic saturates: a size read from a kernel or a user is never a
/// reason to panic.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Bytes(pub u64);

/// Size of a page on every platform that the kernel programs run on.
const PAGE: u64 = 4096;

impl Bytes {
    /// Zero.
    pub const ZERO: Self = Self(0);

    /// `n` mebibytes.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// `n` pages of 4 KiB.
    #[must_use]
    pub const fn from_pages(n: u64) -> Self {
        Self(n.saturating_mul(PAGE))
    }

    /// Whole pages of 4 KiB in it.
    #[must_use]
    pub const fn pages(self) -> u64 {
        self.0 / PAGE
    }

    /// The sum.
    #[must_use]
    pub const fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The difference, at least zero.
    #[must_use]
    pub const fn minus(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// `self` times `numerator / denominator`, rounded down.
    ///
    /// A zero denominator gives zero.
    #[must_use]
    pub fn scaled(self, numerator: u64, denominator: u64) -> Self {
        let scaled =
            (u128::from(self.0) * u128::from(numerator)).checked_div(u128::from(denominator));
        Self(scaled.map_or(0, |value| u64::try_from(value).unwrap_or(u64::MAX)))
    }

    /// `self` times `per_mille / 1000`, rounded down.
    #[must_use]
    pub fn per_mille(self, per_mille: u64) -> Self {
        self.scaled(per_mille, 1000)
    }

    /// Rounded down to whole pages, as the kernel does with every limit (`page_counter_memparse`,
    /// mm/page_counter.c); a limit that is not is read back as another.
    #[must_use]
    pub const fn page_floor(self) -> Self {
        self.floor_to(Self(PAGE))
    }

    /// Rounded down to a multiple of `unit`; one of nothing leaves it.
    #[must_use]
    pub const fn floor_to(self, unit: Self) -> Self {
        match self.0.checked_rem(unit.0) {
            Some(rest) => Self(self.0 - rest),
            None => self,
        }
    }

    /// Rounded up to whole mebibytes, so that a limit reads well in a pod and in `kubectl`.
    #[must_use]
    pub const fn round_up_mib(self) -> Self {
        match self.0.checked_next_multiple_of(1 << 20) {
            Some(rounded) => Self(rounded),
            None => self,
        }
    }
}

impl fmt::Display for Bytes {
    /// Binary units with at most one decimal: `256 MiB`, `1.5 GiB`.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u64, &str); 3] = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        for (shift, unit) in UNITS {
            let one = 1_u64 << shift;
            if self.0 >= one {
                // Round to the nearest tenth first, so that 1023.97 MiB does not print a carry.
                let tenths = (u128::from(self.0) * 10 + u128::from(one / 2)) >> shift;
                let (whole, tenth) = (tenths / 10, tenths % 10);
                return if tenth == 0 {
                    write!(formatter, "{whole} {unit}")
                } else {
                    write!(formatter, "{whole}.{tenth} {unit}")
                };
            }
        }
        write!(formatter, "{} B", self.0)
    }
}

/// What can be moved, counted and given to somebody: memory, or CPU time. Arithmetic saturates.
pub trait Amount: Copy + Ord {
    /// Nothing.
    const ZERO: Self;

    /// The sum.
    #[must_use]
    fn plus(self, other: Self) -> Self;

    /// The difference, at least zero.
    #[must_use]
    fn minus(self, other: Self) -> Self;
}

impl Amount for Bytes {
    const ZERO: Self = Self::ZERO;

    fn plus(self, other: Self) -> Self {
        self.plus(other)
    }

    fn minus(self, other: Self) -> Self {
        self.minus(other)
    }
}

/// CPU time per time, in millionths of a CPU: fine enough that every quota of the kernel's, in microseconds of a
/// period of at most a second, is one again when it is written back.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Cpu(pub u64);

/// Millionths of a CPU in one.
const MILLIONTHS: u64 = 1_000_000;
/// And in a hundredth of one.
pub const PERCENT: u64 = MILLIONTHS / 100;

impl Cpu {
    /// Thousandths of a CPU, as Kubernetes counts.
    #[must_use]
    pub const fn millis(n: u64) -> Self {
        Self(n.saturating_mul(1000))
    }

    /// What a quota in a period is, both in microseconds; `None` for a period that is none.
    #[must_use]
    pub fn of_quota(quota: u64, period: u64) -> Option<Self> {
        let scaled =
            (u128::from(quota) * u128::from(MILLIONTHS)).checked_div(u128::from(period))?;
        Some(Self(u64::try_from(scaled).unwrap_or(u64::MAX)))
    }

    /// The quota in a period, both in microseconds, rounded up.
    #[must_use]
    pub fn quota(self, period: u64) -> u64 {
        let quota = (u128::from(self.0) * u128::from(period)).div_ceil(u128::from(MILLIONTHS));
        u64::try_from(quota).unwrap_or(u64::MAX)
    }

    /// The rate at which CPU time was used.
    #[must_use]
    pub fn of_usage(used: Nanos, window: Nanos) -> Self {
        let scaled =
            (u128::from(used.0) * u128::from(MILLIONTHS)).checked_div(u128::from(window.0));
        Self(scaled.map_or(0, |rate| u64::try_from(rate).unwrap_or(u64::MAX)))
    }

    /// Rounded up to whole hundredths of a CPU, as a limit is that is handed to systemd (`CPUQuota=` in per cent; runc's
    /// `addCPUQuota`, opencontainers/cgroups systemd/common.go). What is none is set by hand beside that, until systemd sets
    /// its own again, as with each daemon-reload.
    #[must_use]
    pub const fn round_up_percent(self) -> Self {
        match self.0.checked_next_multiple_of(PERCENT) {
            Some(rounded) => Self(rounded),
            None => self,
        }
    }

    /// The same rounded down.
    #[must_use]
    pub const fn round_down_percent(self) -> Self {
        Self(self.0 - self.0 % PERCENT)
    }

    /// Rounded to whole thousandths of a CPU, as it is displayed, and written into a pod.
    #[must_use]
    pub const fn round_millis(self) -> Self {
        Self::millis(self.0.saturating_add(500) / 1000)
    }

    /// Whether a quota that is in force can be this one, as it was set in a period of so many microseconds: whole
    /// microseconds, rounded up or down, or what systemd makes of it.
    #[must_use]
    pub fn is_set_as(self, in_force: Self, period: u64) -> bool {
        let is_near = |own: Self| own.quota(period).abs_diff(in_force.quota(period)) <= 1;
        is_near(self) || is_near(self.round_up_percent())
    }

    /// `self` times `numerator / denominator`, rounded down. A zero denominator gives zero.
    #[must_use]
    pub fn scaled(self, numerator: u64, denominator: u64) -> Self {
        Self(Bytes(self.0).scaled(numerator, denominator).0)
    }

    /// `self` times `per_mille / 1000`, rounded down.
    #[must_use]
    pub fn per_mille(self, per_mille: u64) -> Self {
        self.scaled(per_mille, 1000)
    }
}

impl Amount for Cpu {
    const ZERO: Self = Self(0);

    fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    fn minus(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }
}

impl fmt::Display for Cpu {
    /// Thousandths, rounded: `250m`.
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}m", self.round_millis().0 / 1000)
    }
}

/// A point on `CLOCK_MONOTONIC`, or a length of time, in nanoseconds.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Nanos(pub u64);

impl Nanos {
    /// `n` milliseconds.
    #[must_use]
    pub const fn millis(n: u64) -> Self {
        Self(n.saturating_mul(1_000_000))
    }

    /// Time since `earlier`, at least zero.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Self {
        Self(self.0.saturating_sub(earlier.0))
    }

    /// `self` times `per_mille / 1000`, rounded down.
    #[must_use]
    pub const fn per_mille(self, per_mille: u64) -> Self {
        Self(self.0.saturating_mul(per_mille) / 1000)
    }

    /// Whole milliseconds in it.
    #[must_use]
    pub const fn as_millis(self) -> u64 {
        self.0 / 1_000_000
    }
}

/// Id of a cgroup: the inode number of its directory in cgroup v2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CgroupId(pub u64);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_known_again_however_others_have_rounded_it() {
        let millis = Cpu::millis;
        for (limit, in_force, period) in [
            (millis(250), millis(250), 100_000),
            (millis(125), millis(130), 100_000),
            (millis(333), millis(340), 100_000),
            // Rounded down, by a kubelet.
            (millis(255), Cpu::of_quota(8499, 33_333).unwrap(), 33_333),
        ] {
            assert!(limit.is_set_as(in_force, period), "{limit} as {in_force}");
        }
        for (limit, in_force) in [(125, 120), (125, 126), (130, 140), (250, 260)] {
            assert!(
                !millis(limit).is_set_as(millis(in_force), 100_000),
                "{limit} as {in_force}"
            );
        }
        assert_eq!(Cpu(u64::MAX).round_up_percent(), Cpu(u64::MAX));
    }

    #[test]
    fn every_quota_is_itself_again() {
        for period in [1000, 10_000, 33_333, 50_000, 100_000, 1_000_000] {
            for quota in [1000, 1001, 2500, 33_333, 99_999, 100_000, 1_234_567] {
                let cpu = Cpu::of_quota(quota, period).unwrap();
                assert_eq!(cpu.quota(period), quota, "{quota} of {period}");
            }
        }
        assert_eq!(Cpu::of_quota(1, 0), None);
        assert_eq!(Cpu::of_quota(25_000, 100_000), Some(Cpu::millis(250)));
        let half = Cpu::of_usage(Nanos::millis(50), Nanos::millis(100));
        assert_eq!(
            (half, half.to_string()),
            (Cpu::millis(500), "500m".to_owned())
        );
    }

    #[test]
    fn prints_binary_units() {
        let cases = [
            (0, "0 B"),
            (1023, "1023 B"),
            (256 << 20, "256 MiB"),
            (3 << 29, "1.5 GiB"),
            ((1 << 30) - 1, "1024 MiB"),
            (u64::MAX, "17179869184 GiB"),
        ];
        for (value, text) in cases {
            assert_eq!(Bytes(value).to_string(), text);
        }
    }

    #[test]
    fn arithmetic_saturates() {
        assert_eq!(Bytes(u64::MAX).plus(Bytes(1)), Bytes(u64::MAX));
        assert_eq!(Bytes(1).minus(Bytes(2)), Bytes::ZERO);
        assert_eq!(Bytes(u64::MAX).per_mille(2000), Bytes(u64::MAX));
        assert_eq!(Bytes(5).scaled(1, 0), Bytes::ZERO);
    }
}
