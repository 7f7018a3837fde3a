//! How long a container may be held before its own probes would kill it.
//!
//! Whoever is held answers no probe, and a liveness or startup probe that fails `failureThreshold` times
//! in a row ends in a kill by another hand. A frozen container fails an `exec` probe at once (runc
//! refuses to execute in a paused container); a probe over the network fails only when the hold outlasts
//! its `timeoutSeconds`; under the brake processes are slow and not still, so every probe gets its
//! timeout. Probes come once a `periodSeconds` (kubelet pkg/kubelet/prober/worker.go, 1.37), so of a hold
//! of length h at most `floor((h - timeout) / period) + 1` fail, and that must stay below the threshold.
//!
//! Readiness probes do not count: a container out of service for a moment is less harm than one that is
//! killed. Holds that follow each other before a probe can have succeeded in between are one hold.

use serde::{Deserialize, Serialize};

use crate::units::Nanos;

/// How a probe reaches its container.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProbeKind {
    /// A command executed inside.
    Exec,
    /// HTTP, TCP or gRPC from outside.
    Network,
}

/// A probe whose failure kills: liveness or startup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// How it reaches the container.
    pub kind: ProbeKind,
    /// `periodSeconds`.
    pub period: Nanos,
    /// `timeoutSeconds`.
    pub timeout: Nanos,
    /// `failureThreshold`, at least 1.
    pub failures: u64,
}

/// How long a container may be held, in one hold or in several that follow each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Patience {
    /// By the freezer.
    pub frozen: Nanos,
    /// By the brake alone.
    pub braked: Nanos,
    /// Holds that are less than this apart share one allowance.
    pub recovery: Nanos,
    /// One hold, whatever the probes allow.
    pub longest: Nanos,
}

/// One hold, where nobody says anything else: a client outside waits too. On a busy node (four bursts at once on two CPUs)
/// answers took up to 6 s, and who is let go before the answer is killed.
pub const LONGEST: Nanos = Nanos::millis(10_000);
/// A freeze that must end this soon is not worth its failed probe.
const SHORTEST_FREEZE: Nanos = Nanos::millis(200);
/// What is left to jitter of the kubelet's timers.
const CAUTION_PER_MILLE: u64 = 800;

impl Patience {
    /// For a container without probes.
    pub const UNPROBED: Self = Self {
        frozen: Nanos(u64::MAX),
        braked: Nanos(u64::MAX),
        recovery: Nanos(0),
        longest: LONGEST,
    };

    /// For a container with these probes.
    #[must_use]
    pub fn with(probes: &[Probe]) -> Self {
        probes.iter().fold(Self::UNPROBED, |patience, probe| {
            let spare = Nanos(
                probe
                    .period
                    .0
                    .saturating_mul(probe.failures.saturating_sub(1)),
            );
            let with_timeout = Nanos(spare.0.saturating_add(probe.timeout.0));
            let frozen = match probe.kind {
                ProbeKind::Exec => spare,
                ProbeKind::Network => with_timeout,
            };
            Self {
                frozen: patience.frozen.min(frozen.per_mille(CAUTION_PER_MILLE)),
                braked: patience
                    .braked
                    .min(with_timeout.per_mille(CAUTION_PER_MILLE)),
                recovery: patience.recovery.max(probe.period),
                ..patience
            }
        })
    }

    /// The same where a policy says how long one hold may last. Who waits for memory that others have is worth a longer one
    /// than who waits for an answer; whose client waits with him, perhaps a shorter one.
    #[must_use]
    pub fn for_at_most(self, longest: Option<Nanos>) -> Self {
        Self {
            longest: longest.unwrap_or(self.longest),
            ..self
        }
    }

    /// Whether it may be frozen at all; if not, only the brake is left.
    #[must_use]
    pub fn may_freeze(&self) -> bool {
        self.frozen >= SHORTEST_FREEZE
    }

    /// How long a hold may last after so much of the allowance was spent.
    #[must_use]
    pub fn left(&self, allowed: Nanos, spent: Nanos) -> Nanos {
        allowed.since(spent).min(self.longest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn probe(kind: ProbeKind, period: u64, timeout: u64, failures: u64) -> Probe {
        Probe {
            kind,
            period: Nanos::millis(period * 1000),
            timeout: Nanos::millis(timeout * 1000),
            failures,
        }
    }

    /// Probes that fail if a hold of this length begins at the worst moment.
    fn failed(probe: Probe, frozen: Nanos) -> u64 {
        let answered_until = match probe.kind {
            ProbeKind::Exec => Nanos(0),
            ProbeKind::Network => probe.timeout,
        };
        match frozen.0.checked_sub(answered_until.0) {
            None => 0,
            Some(late) => late / probe.period.0 + 1,
        }
    }

    #[test]
    fn no_hold_makes_a_probe_fail_too_often() {
        for kind in [ProbeKind::Exec, ProbeKind::Network] {
            for period in [1, 2, 10] {
                for timeout in [1, 3] {
                    for failures in [1, 2, 3] {
                        let probe = probe(kind, period, timeout, failures);
                        let patience = Patience::with(&[probe]);
                        if patience.may_freeze() {
                            assert!(failed(probe, patience.frozen) < failures, "{probe:?}");
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn one_strike_exec_probes_forbid_the_freezer_and_defaults_do_not() {
        let strict = Patience::with(&[probe(ProbeKind::Exec, 10, 1, 1)]);
        assert!(!strict.may_freeze());
        assert_eq!(strict.braked, Nanos::millis(800));
        let default = Patience::with(&[probe(ProbeKind::Exec, 10, 1, 3)]);
        assert_eq!(default.frozen, Nanos::millis(16_000));
        let network = Patience::with(&[probe(ProbeKind::Network, 1, 1, 1)]);
        assert_eq!(network.frozen, Nanos::millis(800));
    }

    #[test]
    fn the_strictest_probe_counts() {
        let probes = [
            probe(ProbeKind::Network, 1, 1, 2),
            probe(ProbeKind::Exec, 30, 5, 3),
        ];
        let patience = Patience::with(&probes);
        assert_eq!(patience.frozen, Nanos::millis(1600));
        assert_eq!(patience.recovery, Nanos::millis(30_000));
    }
}
