//! Numbers for whoever watches over the agents of many nodes (Prometheus, `bellows run --metrics`).
//!
//! What an agent loses (a record that found its ring full, a runtime that does not answer, a raise that nobody was
//! told of) is not seen from outside: the container lives, or does not, either way. So each loss has a counter of its
//! own, which should stay at zero.
//!
//! No series may name a container, a pod or a cgroup: a node sees thousands of them, and each would stay for ever.
//! Counting must not wait: the thread that reacts counts, too.

use std::{
    fmt,
    sync::{LazyLock, atomic::AtomicU64},
};

use bellows_core::observe::Would;
use bellows_ebpf_common::loss;
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Metric, Registry},
};

/// Those of this process.
pub static METRICS: LazyLock<Metrics> = LazyLock::new(Metrics::new);

/// Where something was lost.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Place {
    /// Its name.
    pub place: &'static str,
}

/// A call, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Call {
    /// What was called.
    pub call: &'static str,
    /// `ok`, `refused` or `silent`.
    pub result: &'static str,
}

/// Which way a limit was moved.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Move {
    /// `memory` or `cpu`.
    pub resource: &'static str,
    /// `up` or `down`.
    pub direction: &'static str,
}

/// A kill that was observed.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Observed {
    /// What would have become of it: [`Would`] in small letters.
    pub would: &'static str,
}

impl Observed {
    const fn of(would: Would) -> Self {
        let would = match would {
            Would::Live => "live",
            Would::AtCeiling => "at_ceiling",
            Would::Impatient => "impatient",
            Would::TooFast => "too_fast",
            Would::Unseen => "unseen",
        };
        Self { would }
    }
}

/// What is counted.
pub struct Metrics {
    registry: Registry,
    /// Containers whose memory is guarded now.
    pub guarded: Gauge,
    /// Containers that are not guarded as their policy wants it, now.
    pub refused: Gauge,
    /// Limits that were moved.
    pub moves: Family<Move, Counter>,
    /// Seconds from the request of a raise to the limit in force.
    pub raise_seconds: Histogram,
    /// Holds.
    pub holds: Counter,
    /// Seconds for which containers were held.
    pub held_seconds: Counter<f64, AtomicU64>,
    /// Times that the OOM killer was entered for a guarded container.
    pub ooms: Counter,
    /// Raises that were written by hand because the runtime was late or failed.
    pub raises_by_hand: Counter,
    /// Processes that were paused for want of memory.
    pub pauses: Counter,
    /// Job tokens that were withheld for want of memory.
    pub tokens_withheld: Counter,
    /// Raises for which there was no room at once.
    pub raises_waiting: Counter,
    /// Raises for which there was none for as long as the container could be held.
    pub raises_without_room: Counter,
    /// Raises that a LimitRange or a ResourceQuota did not allow, or not as far.
    pub raises_bounded: Counter,
    /// Requests for a limit that were refused, or of which nothing came.
    pub requests_failed: Counter,
    /// Calls of the container runtime that were waited for no longer.
    pub runtime_late: Counter,
    /// Calls of the container runtime.
    pub runtime_calls: Family<Call, Counter>,
    /// Times that a change waited because this node has asked for many.
    pub api_waits: Counter,
    /// Calls of the Kubernetes API that change something.
    pub api_calls: Family<Call, Counter>,
    /// Events that were lost on their way to the agent.
    pub events_lost: Family<Place, Counter>,
    /// Writes of the agent's own state that failed. What cannot be written down is not done.
    pub state_failures: Counter,
    /// Times that room had to be made for the agent's own state.
    pub state_full: Counter,
    /// Whether there is room left for that.
    pub reserve_kept: Gauge,
    /// Kills in containers that are only watched.
    pub observed_kills: Family<Observed, Counter>,
    /// Containers that were told at their creation by which limit heaps are sized.
    pub heaps_sized: Counter,
    /// Containers that should have been and were not, because they were made before.
    pub heaps_missed: Counter,
    /// Policies that could not be read, and changed nothing.
    pub policies_rejected: Counter,
}

impl fmt::Debug for Metrics {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Metrics").finish_non_exhaustive()
    }
}

/// Where the programs count what they lose, by slot of [`loss`].
const LOSSES: [&str; loss::SLOTS as usize] = [
    "memory_ring",
    "life_ring",
    "read",
    "throttle_ring",
    "start_ring",
];
/// How a call ended: with what was asked for, with an error, or without an answer.
pub const OK: &str = "ok";
/// See [`OK`].
pub const REFUSED: &str = "refused";
/// See [`OK`].
pub const SILENT: &str = "silent";
/// All that may become of a container that is only watched.
const WOULD: [Would; 5] = [
    Would::Live,
    Would::AtCeiling,
    Would::Impatient,
    Would::TooFast,
    Would::Unseen,
];
/// Where a verdict of the reflex is lost, or a record that it does not know.
pub const VERDICTS: &str = "verdicts";

impl Metrics {
    fn new() -> Self {
        let mut registry = Registry::with_prefix("bellows");
        let all = &mut registry;
        let metrics = Self {
            guarded: of(
                all,
                "guarded_containers",
                "Containers whose memory is guarded now",
            ),
            refused: of(
                all,
                "refused_containers",
                "Containers that are not guarded as their policy wants it, now",
            ),
            moves: of(all, "moves", "Limits that were moved"),
            raise_seconds: add(
                all,
                "raise_seconds",
                "From the request of a raise to the limit in force",
                Histogram::new(exponential_buckets(0.01, 2.0, 12)),
            ),
            holds: of(all, "holds", "Times that a container was held"),
            held_seconds: of(all, "held_seconds", "Time for which containers were held"),
            ooms: of(
                all,
                "ooms",
                "Times that the OOM killer was entered for a guarded container",
            ),
            raises_by_hand: of(
                all,
                "raises_by_hand",
                "Raises that were written by hand: the runtime or the API was late or failed, or the policy raises first",
            ),
            api_waits: of(
                all,
                "api_waits",
                "Times that a change waited because this node has asked the Kubernetes API for many",
            ),
            pauses: of(
                all,
                "pauses",
                "Processes that were paused because there was not memory for all jobs at once",
            ),
            tokens_withheld: of(
                all,
                "tokens_withheld",
                "Job tokens that were withheld because there was not memory for all jobs at once",
            ),
            raises_waiting: of(
                all,
                "raises_waiting",
                "Raises for which there was no room at once",
            ),
            raises_without_room: of(
                all,
                "raises_without_room",
                "Raises for which there was no room for as long as the container could be held",
            ),
            raises_bounded: of(
                all,
                "raises_bounded",
                "Raises that a LimitRange or a ResourceQuota did not allow, or not as far",
            ),
            requests_failed: of(
                all,
                "requests_failed",
                "Requests for a limit that were refused, or of which nothing came",
            ),
            runtime_late: of(
                all,
                "runtime_late",
                "Updates by the container runtime that took so long that they were waited for no longer",
            ),
            runtime_calls: of(all, "runtime_calls", "Calls of the container runtime"),
            api_calls: of(
                all,
                "api_calls",
                "Calls of the Kubernetes API that change something",
            ),
            events_lost: of(
                all,
                "events_lost",
                "Events that were lost on their way to the agent",
            ),
            state_failures: of(
                all,
                "state_failures",
                "Writes of the agent's own state that failed; what cannot be written down is not done",
            ),
            state_full: of(
                all,
                "state_full",
                "Times that the reserve was given up to make room for the agent's own state",
            ),
            reserve_kept: of(
                all,
                "reserve_kept",
                "Whether there is room left for the agent's own state when its file system is full",
            ),
            observed_kills: of(
                all,
                "observed_kills",
                "Kills in containers that are only watched, by what mode Act would have made of them",
            ),
            heaps_sized: of(
                all,
                "heaps_sized",
                "Containers that were told at their creation by which limit heaps are sized",
            ),
            heaps_missed: of(
                all,
                "heaps_missed",
                "Containers whose policy sizes heaps and that were made before the agent was there",
            ),
            policies_rejected: of(
                all,
                "policies_rejected",
                "Files of policies that could not be read, and changed nothing",
            ),
            registry,
        };
        metrics.begin();
        metrics
    }

    /// What a counter counts first must be seen as a change.
    fn begin(&self) {
        self.lost([0; loss::SLOTS as usize], 0);
        for result in [OK, REFUSED, SILENT] {
            let calls = ["UpdateContainerResources", "ListContainers"];
            for call in calls {
                drop(self.runtime_calls.get_or_create(&Call { call, result }));
            }
            let call = "resize";
            drop(self.api_calls.get_or_create(&Call { call, result }));
        }
        for would in WOULD {
            drop(self.observed_kills.get_or_create(&Observed::of(would)));
        }
    }

    /// Counts what the programs and the reflex have lost since they started.
    pub fn lost(&self, by_programs: [u64; loss::SLOTS as usize], verdicts: u64) {
        let places = LOSSES.into_iter().zip(by_programs);
        for (place, lost) in places.chain([(VERDICTS, verdicts)]) {
            let counter = self.events_lost.get_or_create_owned(&Place { place });
            counter.inc_by(lost.saturating_sub(counter.get()));
        }
    }

    /// Counts a limit that was moved.
    pub fn moved(&self, resource: &'static str, is_raise: bool) {
        let direction = if is_raise { "up" } else { "down" };
        let moved = Move {
            resource,
            direction,
        };
        self.moves.get_or_create(&moved).inc();
    }

    /// Counts a kill in a container that is only watched.
    pub fn observed(&self, would: Would) {
        self.observed_kills
            .get_or_create(&Observed::of(would))
            .inc();
    }

    /// As Prometheus reads them (OpenMetrics 1.0).
    #[must_use]
    pub fn text(&self) -> String {
        let mut written = String::new();
        if text::encode(&mut written, &self.registry).is_err() {
            tracing::error!("the metrics cannot be written as text");
        }
        written
    }
}

/// A metric that begins at zero.
fn of<M: Metric + Clone + Default>(registry: &mut Registry, name: &str, help: &str) -> M {
    add(registry, name, help, M::default())
}

fn add<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_lost_is_counted_once() {
        let metrics = Metrics::new();
        metrics.lost([0, 0, 0, 0, 3], 1);
        metrics.lost([0, 0, 0, 0, 5], 1);
        let text = metrics.text();
        for line in [
            "bellows_events_lost_total{place=\"start_ring\"} 5",
            "bellows_events_lost_total{place=\"verdicts\"} 1",
            "bellows_events_lost_total{place=\"memory_ring\"} 0",
            "bellows_raises_by_hand_total 0",
            "# EOF",
        ] {
            assert!(text.lines().any(|said| said == line), "{line}: {text}");
        }
    }

    #[test]
    fn moves_are_told_apart() {
        let metrics = Metrics::new();
        metrics.moved("memory", true);
        metrics.moved("memory", true);
        metrics.moved("cpu", false);
        let text = metrics.text();
        let up = "bellows_moves_total{resource=\"memory\",direction=\"up\"} 2";
        assert!(text.contains(up), "{text}");
    }
}
