//! `cpu.max` and `cpu.stat`.

use bellows_core::{Cpu, Nanos, cpu::CpuCounters};

use super::{Cgroup, CgroupError, field};

/// A CPU quota, and the period that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quota {
    /// The quota.
    pub cpu: Cpu,
    /// Microseconds.
    pub period: u64,
}

impl Quota {
    /// The same period with another quota, as it will be read back: rounded up to whole microseconds.
    #[must_use]
    pub fn with(self, cpu: Cpu) -> Self {
        let whole = Cpu::of_quota(cpu.quota(self.period), self.period);
        Self {
            cpu: whole.unwrap_or(cpu),
            ..self
        }
    }

    fn text(self) -> String {
        format!("{} {}", self.cpu.quota(self.period), self.period)
    }
}

impl Cgroup {
    /// The quota in force: the least of its own `cpu.max` and of that of its [inner](Cgroup::inner) cgroup; `None` without
    /// one.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read, as where the controller is not enabled, or makes no sense.
    pub fn quota(&self) -> Result<Option<Quota>, CgroupError> {
        let own = self.own_quota()?;
        // One that has none, or not yet, limits nothing.
        let inner = self.inner().and_then(|inner| inner.own_quota().ok()?);
        Ok(match (own, inner) {
            (Some(own), Some(inner)) if inner.cpu < own.cpu => Some(inner),
            (own, inner) => own.or(inner),
        })
    }

    fn own_quota(&self) -> Result<Option<Quota>, CgroupError> {
        let content = self.read("cpu.max")?;
        parse_quota(&content).ok_or_else(|| self.unparsable("cpu.max", &content, "CPU quota"))
    }

    /// Sets `cpu.max`, also that of its [inner](Cgroup::inner) cgroup where that has a quota. A raise ends the wait of
    /// whoever is throttled at once.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`] when it cannot be written.
    pub fn set_quota(&self, quota: Quota) -> Result<(), CgroupError> {
        self.write("cpu.max", &quota.text())?;
        let inner = self.inner();
        match inner.filter(|inner| matches!(inner.own_quota(), Ok(Some(_)))) {
            Some(inner) => inner.write("cpu.max", &quota.text()),
            None => Ok(()),
        }
    }

    /// `cpu.stat`. Periods count where they are throttled: in the [inner](Cgroup::inner) cgroup, too.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read or does not tell of use.
    pub fn cpu_counters(&self) -> Result<CpuCounters, CgroupError> {
        let own = self.own_counters()?;
        let inner = self.inner().and_then(|inner| inner.own_counters().ok());
        let throttled = inner.map_or(0, |inner| inner.throttled);
        Ok(CpuCounters {
            throttled: own.throttled.saturating_add(throttled),
            ..own
        })
    }

    fn own_counters(&self) -> Result<CpuCounters, CgroupError> {
        let content = self.read("cpu.stat")?;
        parse_counters(&content)
            .ok_or_else(|| self.unparsable("cpu.stat", &content, "CPU counters"))
    }
}

/// What `cpu.max` contains: `Some(None)` is no quota; `None` if it makes no sense.
#[must_use]
pub fn parse_quota(content: &str) -> Option<Option<Quota>> {
    let mut words = content.split_whitespace();
    let (quota, period) = (words.next()?, words.next()?);
    let period = period.parse().ok().filter(|&period| period > 0)?;
    if words.next().is_some() {
        return None;
    }
    if quota == "max" {
        return Some(None);
    }
    let cpu = Cpu::of_quota(quota.parse().ok()?, period)?;
    Some(Some(Quota { cpu, period }))
}

/// Reads `cpu.stat`; what only a cgroup with the controller has is zero elsewhere, as in the root.
#[must_use]
pub fn parse_counters(content: &str) -> Option<CpuCounters> {
    let field = |name| field(content, name);
    Some(CpuCounters {
        used: Nanos(field("usage_usec")?.saturating_mul(1000)),
        periods: field("nr_periods").unwrap_or(0),
        throttled: field("nr_throttled").unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_read_as_they_are_written() {
        assert_eq!(parse_quota("max 100000\n"), Some(None));
        for text in ["25000 100000", "1000 1000000", "150000 33333"] {
            let quota = parse_quota(&format!("{text}\n")).flatten().unwrap();
            assert_eq!(quota.text(), text);
        }
        for bad in [
            "",
            "max",
            "25000",
            "25000 0",
            "-1 100000",
            "max max",
            "1 2 3",
        ] {
            assert_eq!(parse_quota(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_is_set_is_what_is_read_back() {
        for period in [100_000, 33_333] {
            let before = Quota {
                cpu: Cpu::millis(250),
                period,
            };
            for millionths in [841_234, 333_333, 1_500_001] {
                let set = before.with(Cpu(millionths));
                assert!(set.cpu >= Cpu(millionths));
                assert_eq!(parse_quota(&set.text()).flatten(), Some(set));
            }
        }
    }

    #[test]
    fn counters_that_are_not_there_are_zero() {
        let root = parse_counters("usage_usec 5\nuser_usec 1\n").unwrap();
        assert_eq!((root.used, root.periods), (Nanos(5000), 0));
        let all = parse_counters("usage_usec 5\nnr_periods 7\nnr_throttled 2\n").unwrap();
        assert_eq!((all.periods, all.throttled), (7, 2));
        assert_eq!(parse_counters("nr_periods 7\n"), None);
    }
}
