//! Whether a node has room for a raise: what the arbiter is told, and what becomes of its verdict.
//!
//! The arbiter is asked once a burst, for as much as that is expected to need: what was learnt of the last one, or one step
//! more than it asks for. Whoever had begun with the first step only would wait, held, for those who cannot end either, and
//! a hold lasts for ten seconds, unless a policy says otherwise (`storm`: of twenty bursts at once with memory for eight, four were served). What is
//! expected and not there is given up when patience ends: then what it asks for is enough.
//!
//! A raise that is granted and not there kills whoever happens to be chosen by the node's OOM killer, or has the kubelet
//! evict a pod. So each is asked for of [`bellows_core::arbiter`], with all guarded containers as claims. Who waits stays
//! held; who cannot be served is let go at once and told why, so that it is killed where it would have been without Bellows.
//!
//! It must not be asked for what is at rest: that was promised before Bellows came.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

use bellows_core::{
    Actuation, Bytes, CgroupId, Nanos, Reason,
    arbiter::{
        Claim, DEFAULT_WEIGHT, NodeMemory, Place, RESERVED_FOR, Rooms, Verdict, Why, arbitrate,
        cgroup_room, node_room,
    },
    decide::REQUEST_STEP_MIN_PER_MILLE,
    growth::{Nature, Spell, UNTRIGGERED},
};

use super::{Controller, Guarded, Requester, growers::Growers};
use crate::{
    actuate::reflex::Command,
    attribution::{self, CGROUP_ROOT},
    cgroup::{Cgroup, Limit},
    clock::now,
    ledger::Record,
    machine,
    metrics::METRICS,
};

/// What is left to others, and to the kernel: a twentieth of the node.
const RESERVE_PER_MILLE: u64 = 50;
/// No less than the kubelet's own threshold (`memory.available<100Mi`, pkg/kubelet/apis/config/v1beta1/defaults_linux.go).
const LEAST_RESERVE: Bytes = Bytes::mib(128);
/// Who was let go for want of room asks again after this time: it may be there by then.
const NO_ROOM_FOR: Nanos = Nanos::millis(1000);
/// The same for one that may never end.
const STOPPED_FOR: Nanos = Nanos::millis(10_000);
/// What is expected beyond what is asked for is waited for no longer than this: who could go on stands still for it.
const EXPECTED_FOR: Nanos = Nanos::millis(60_000);
/// Who has waited for long asks again so often: to ask is to look at all others.
const SELDOM: Nanos = Nanos::millis(500);
/// A raise of one that may never end goes to this multiple of the demand.
const SUSPECTS_STEP_PER_MILLE: u64 = 1250;
/// Who waits for a raise is judged again after this time.
const JUDGED_EVERY: Nanos = Nanos::millis(1000);
/// Whoever waits is frozen again so often where the brake has replaced that.
const FROZEN_EVERY: Nanos = Nanos::millis(1000);
/// A raise by less than this share is not worth a request.
const WORTH_PER_MILLE: u64 = 1125;

/// A raise that is not granted yet.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiting {
    /// Since when.
    since: Nanos,
    /// The limit.
    wanted: Bytes,
    /// When it was asked for last.
    asked: Nanos,
    /// When it was frozen again, if its freeze has been replaced.
    frozen: Nanos,
    /// What it was told.
    pub(super) told: Option<Why>,
}

/// The ancestors whose limits are somebody else's: a pod's moves with its containers.
pub(super) fn ancestors(cgroup: &Cgroup) -> Vec<PathBuf> {
    let above = cgroup.path().ancestors().skip(1);
    let above =
        above.take_while(|path| path.starts_with(CGROUP_ROOT) && *path != Path::new(CGROUP_ROOT));
    let is_pod = |path: &&Path| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        attribution::is_a_pod(&name)
    };
    above
        .filter(|path| !is_pod(path))
        .map(Path::to_owned)
        .collect()
}

impl Guarded {
    /// What a burst is expected to need that asks for `to`; no more than that once it cannot wait any longer.
    fn expected(&self, at: Nanos, to: Bytes) -> Bytes {
        let in_vain_after = self.policy.last_moment().min(EXPECTED_FOR);
        let waits = |waiting: Waiting| at.since(waiting.since) >= in_vain_after;
        if self.waiting.is_some_and(waits) {
            return to;
        }
        // One step more.
        let unlearnt = || to.per_mille(REQUEST_STEP_MIN_PER_MILLE);
        let expected = self.policy.learnt.unwrap_or_else(unlearnt);
        expected.min(self.policy.ceiling).max(to)
    }

    /// The limit that its bursts need: the largest that was learnt, else one step.
    fn usual(&self) -> Bytes {
        let learnt = self.learnt.largest();
        let learnt = learnt.map(|needed| self.policy.limit_for(needed).round_up_mib());
        let step = || self.policy.original.per_mille(REQUEST_STEP_MIN_PER_MILLE);
        learnt.unwrap_or_else(step).min(self.policy.ceiling)
    }

    /// Judges its growth when it asks for more. Who can be seen to grow is looked at only when it matters.
    fn judge(&mut self, at: Nanos) {
        // Who is held does not grow older.
        let at = self.held_since.unwrap_or(at);
        let spell = *self
            .spell
            .get_or_insert(Spell::begin(at, self.history.demand));
        if at.since(self.judged) < JUDGED_EVERY {
            return;
        }
        self.judged = at;
        if spell.age(at) < UNTRIGGERED {
            self.nature = Nature::Burst;
            return;
        }
        let growers = Growers::of(&self.cgroup);
        let young = growers.map(|growers| growers.younger_than(spell.young_from(at)));
        self.is_thought(spell.nature(at, young));
        if self.nature != Nature::Burst {
            // What was kept for it as a burst is for others.
            self.reserved = None;
        }
    }

    /// How far the raise of one that may never end goes at most.
    fn small_step(&self) -> Bytes {
        let step = self.history.demand.per_mille(SUSPECTS_STEP_PER_MILLE);
        self.policy.limit_for(step).round_up_mib()
    }

    /// What it is as a claim; `places` are the indices of its ancestors with a limit.
    fn claim(&self, at: Nanos, ancestors: BTreeSet<usize>) -> Claim {
        let raised = |limit: Bytes| limit > self.policy.original;
        let asked = self.requested.map(|(to, _)| to);
        let highest = [Some(self.limit), asked, self.lowering, self.reserved]
            .into_iter()
            .flatten()
            .filter(|limit| raised(*limit))
            .max();
        let waiting = self.waiting.map(|waiting| waiting.since);
        let wanted = self.waiting.map_or(self.limit, |waiting| waiting.wanted);
        Claim {
            ancestors,
            priority: self.policy.priority,
            weight: DEFAULT_WEIGHT,
            since: self.burst_since.unwrap_or(at),
            moved_at: self.history.last_growth.max(waiting.unwrap_or(Nanos(0))),
            may_wait: self.policy.allowance(),
            at_rest: self.policy.original,
            used: self.history.demand,
            promised: highest.unwrap_or(Bytes::ZERO),
            wanted,
            most: wanted,
            nature: self.nature,
            usual: self.usual(),
        }
    }
}

impl<R: Requester> Controller<R> {
    /// How far a raise that is to be asked for may go now; `None` if it waits, or cannot be.
    pub(super) fn room_for(
        &mut self,
        id: CgroupId,
        from: Bytes,
        to: Bytes,
        reason: Reason,
    ) -> Option<Bytes> {
        let guarded = self.guards.get_mut(&id)?;
        if guarded.policy.actuation == Actuation::Direct || !self.requester.shares_the_node() {
            return Some(to);
        }
        let at = now();
        // A lowering is on its way: what is in force is promised already, and another limit than that answers it.
        let promised = (from < guarded.limit).then(|| guarded.limit.minus(Bytes::mib(1)));
        let is_burst = reason != Reason::CacheThrashes;
        let mut to = to;
        if is_burst {
            guarded.burst_since.get_or_insert(at);
            guarded.judge(at);
            if guarded.nature != Nature::Burst {
                to = to.min(guarded.small_step());
            }
        }
        if guarded.reserved.is_some_and(|reserved| to <= reserved) {
            guarded.waiting = None;
            return Some(to);
        }
        let expected = if is_burst && guarded.nature == Nature::Burst {
            guarded.expected(at, to)
        } else {
            to
        };
        let waiting = guarded.waiting.get_or_insert(Waiting {
            since: at,
            wanted: expected,
            asked: Nanos(0),
            frozen: Nanos(0),
            told: None,
        });
        if at.since(waiting.since) >= RESERVED_FOR && at.since(waiting.asked) < SELDOM {
            return promised;
        }
        waiting.asked = at;
        waiting.wanted = expected;
        let verdict = match self.claims(at) {
            Ok((rooms, mut claims)) => {
                let own = claims.get_mut(&id)?;
                // More than all there is is never granted; what there is may be.
                let whole = whole(&rooms, own);
                own.wanted = own.wanted.min(whole);
                own.most = own.wanted;
                let verdict = arbitrate(at, &rooms, &claims).remove(&id);
                let is_beyond = verdict.is_none() && to > whole;
                verdict.or_else(|| {
                    is_beyond.then_some(Verdict::Refused(Why::ExceedsRoom(Place::Node)))
                })
            }
            Err(error) => {
                // Without figures there is nothing to judge by: the kernel decides, as it would without an arbiter.
                tracing::warn!(error, "what the node has left is not known");
                None
            }
        };
        let guarded = self.guards.get_mut(&id)?;
        let (granted, why) = match verdict {
            None => (Some(to), None),
            Some(Verdict::Granted(granted)) => {
                guarded.reserved = Some(granted);
                (Some(granted.min(to)), None)
            }
            Some(
                Verdict::Waits(_, why @ Why::NoRoom(_, least))
                | Verdict::Refused(why @ (Why::NoRoom(_, least) | Why::KeptForBursts(_, least))),
            ) if least > from.per_mille(WORTH_PER_MILLE) => {
                let granted = machine::page_floor(least).min(to);
                guarded.reserved = Some(granted);
                (Some(granted), Some(why))
            }
            Some(Verdict::Waits(_, why)) => {
                if let Some(waiting) = &mut guarded.waiting
                    && at.since(waiting.since.max(waiting.frozen)) >= FROZEN_EVERY
                {
                    waiting.frozen = at;
                    self.reflex.send(Command::FreezeAgain(id));
                }
                (None, Some(why))
            }
            Some(Verdict::Refused(why)) if !is_burst => (None, Some(why)),
            Some(Verdict::Refused(why)) => {
                let again = match why {
                    Why::KeptForBursts(..) | Why::Leaks => STOPPED_FOR,
                    _ => NO_ROOM_FOR,
                };
                guarded.raise_not_before = Nanos(at.0.saturating_add(again.0));
                if promised.is_none() {
                    // Held or not, as far as is known here.
                    self.reflex.send(Command::Release(id, Reason::NoRoom));
                }
                METRICS.raises_without_room.inc();
                (None, Some(why))
            }
        };
        if let Some(why) = why {
            self.tell_of_room(id, to, why);
        }
        let guarded = self.guards.get_mut(&id)?;
        let granted = match (granted, promised) {
            (None, Some(promised)) => Some(promised),
            (Some(granted), Some(promised)) if granted == guarded.limit => Some(promised),
            (granted, _) => granted,
        };
        if granted.is_some() || !is_burst || at < guarded.raise_not_before {
            guarded.waiting = None;
        }
        granted
    }

    /// Tells why there is no room, once for each reason.
    fn tell_of_room(&mut self, id: CgroupId, wanted: Bytes, why: Why) {
        let behind = match why {
            Why::Behind(other) | Why::WouldStrand(other) => {
                self.guards.get(&other).map(|other| other.name.clone())
            }
            Why::ExceedsRoom(_) | Why::NoRoom(..) | Why::KeptForBursts(..) | Why::Leaks => None,
        };
        let Some(guarded) = self.guards.get_mut(&id) else {
            return;
        };
        let is_same = |told: Why| std::mem::discriminant(&told) == std::mem::discriminant(&why);
        let Some(waiting) = &mut guarded.waiting else {
            return;
        };
        if waiting.told.is_some_and(is_same) {
            return;
        }
        if waiting.told.is_none() {
            METRICS.raises_waiting.inc();
        }
        if matches!(why, Why::KeptForBursts(..) | Why::Leaks) {
            // It asks again every few seconds for as long as it grows.
            if guarded.told_stop.replace(why).is_some_and(is_same) {
                return;
            }
            let name = &guarded.name;
            tracing::warn!(name, "{}", told_why(wanted, why, None));
        }
        waiting.told = Some(why);
        let record = Record::Waits {
            at: now(),
            cgroup: id,
            wanted,
            why,
            behind,
        };
        if let Err(error) = self.ledger.append(&record) {
            guarded.report.failed(error.to_string());
        }
        self.requester.record(&guarded.cgroup, &record);
    }

    /// All guarded containers, and the rooms that they are in. Use is known before what is free is read.
    fn claims(&mut self, at: Nanos) -> Result<(Rooms, BTreeMap<CgroupId, Claim>), String> {
        for guarded in self.guards.values_mut() {
            // What is kept for one that does not grow any more is for others; it asks anew.
            if at.since(guarded.history.last_growth) >= RESERVED_FOR {
                guarded.reserved = None;
            }
        }
        let mut rooms = Rooms::default();
        let mut places: BTreeMap<&Path, Option<usize>> = BTreeMap::new();
        let mut claims = BTreeMap::new();
        for (&id, guarded) in &self.guards {
            let mut own = BTreeSet::new();
            for path in &guarded.ancestors {
                let place = *places.entry(path.as_path()).or_insert_with(|| {
                    let room = ancestor_room(path)?;
                    rooms.ancestors.push(room);
                    Some(rooms.ancestors.len() - 1)
                });
                own.extend(place);
            }
            claims.insert(id, guarded.claim(at, own));
        }
        rooms.node = node_room(&node_memory()?);
        Ok((rooms, claims))
    }
}

/// The least that any room of a claim has, were it empty.
fn whole(rooms: &Rooms, claim: &Claim) -> Bytes {
    let above = claim.ancestors.iter();
    let above = above.filter_map(|&index| rooms.ancestors.get(index));
    let sizes = above.map(|room| room.size);
    machine::page_floor(sizes.fold(rooms.node.size, Bytes::min))
}

/// `None` for one without a limit, or that is gone.
fn ancestor_room(path: &Path) -> Option<bellows_core::arbiter::Room> {
    let cgroup = Cgroup::open(path).ok()?;
    let Limit::At(limit) = cgroup.limit("memory.max").ok()? else {
        return None;
    };
    let stat = cgroup.stat().ok()?;
    Some(cgroup_room(limit, stat.usage, stat.file))
}

pub(super) fn node_memory() -> Result<NodeMemory, String> {
    let text = fs::read_to_string("/proc/meminfo").map_err(|error| error.to_string())?;
    parse_meminfo(&text).ok_or_else(|| "/proc/meminfo has no MemTotal or MemAvailable".to_owned())
}

fn parse_meminfo(text: &str) -> Option<NodeMemory> {
    let field = |name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(Bytes(kib.saturating_mul(1024)))
    };
    let (total, available) = (field("MemTotal:")?, field("MemAvailable:")?);
    Some(NodeMemory {
        total,
        available,
        reserve: total.per_mille(RESERVE_PER_MILLE).max(LEAST_RESERVE),
        kubelet: None,
    })
}

/// Why there is no room, for people.
#[must_use]
pub fn told_why(wanted: Bytes, why: Why, behind: Option<&str>) -> String {
    let place = |place: Place| match place {
        Place::Node => "the node".to_owned(),
        Place::Ancestor(_) => "a cgroup above it".to_owned(),
    };
    let other = behind.unwrap_or("another container");
    match why {
        Why::ExceedsRoom(whole) => format!(
            "{wanted} is more than {} has: no raise; lower its maximum, or have more memory there",
            place(whole)
        ),
        Why::NoRoom(whole, least) => format!(
            "no {wanted} left in {}: {least} at most; lower maxima, or have fewer pods there",
            place(whole)
        ),
        Why::Behind(_) => format!("waits for {wanted}, behind {other}"),
        Why::WouldStrand(_) => format!("waits for {wanted}: {other} could not end without it"),
        Why::KeptForBursts(whole, least) => format!(
            "no {wanted}, {least} at most: it grows for minutes, nothing was started for it and nothing given back, and what is left in {} is for bursts that end. Look for a leak, or give it a higher limit of its own",
            place(whole)
        ),
        Why::Leaks => format!(
            "no {wanted}: it grows for more than a quarter of an hour, nothing was started for it and nothing given back, which is a leak. Restart it, or give it a higher limit of its own"
        ),
    }
}

#[cfg(test)]
mod tests {
    use bellows_core::learnt::Part;

    use super::*;

    #[test]
    fn what_the_kernel_says_of_memory_is_read() {
        let text = "MemTotal:        4000000 kB\nMemFree:          100000 kB\nMemAvailable:    2000000 kB\n";
        let memory = parse_meminfo(text).unwrap();
        assert_eq!(memory.available, Bytes(2_000_000 << 10));
        assert_eq!(memory.reserve, Bytes(4_000_000 << 10).per_mille(50));
        let small = parse_meminfo("MemTotal: 500000 kB\nMemAvailable: 1 kB\n").unwrap();
        assert_eq!(small.reserve, LEAST_RESERVE);
        for text in ["", "MemTotal: x kB\nMemAvailable: 1 kB", "MemTotal: 1 kB\n"] {
            assert_eq!(parse_meminfo(text), None, "{text}");
        }
    }

    #[test]
    fn a_pods_own_cgroup_is_no_room_of_somebody_elses() {
        let path = "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0f8c_11aa.slice/cri-containerd-1.scope";
        let cgroup = Cgroup::stand_in(Path::new(path), CgroupId(1));
        let above: Vec<String> = ancestors(&cgroup)
            .iter()
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(above, ["kubepods-burstable.slice", "kubepods.slice"]);
    }

    const AT_REST: Bytes = Bytes::mib(64);

    fn guarded(limit: Bytes) -> Guarded {
        let mut guarded = Guarded::stand_in(limit);
        guarded.policy.priority = 7;
        guarded
    }

    #[test]
    fn what_grows_for_long_without_a_trigger_is_judged_and_loses_what_was_kept_for_it() {
        // Its processes are not to be seen.
        let mut leak = guarded(AT_REST);
        let start = Nanos::millis(1_000_000);
        leak.history.demand = Bytes::mib(63);
        leak.judge(start);
        leak.limit_is(start, Bytes::mib(256));
        for after in 1..15 {
            leak.history.demand = Bytes::mib(63 + 13 * after);
            leak.look_at_burst(Nanos(start.0 + Nanos::millis(60_000 * after).0));
        }
        for (after, nature, reserved) in [
            (890_000, Nature::Burst, Some(Bytes::mib(800))),
            (899_500, Nature::Burst, Some(Bytes::mib(800))),
            // It was judged less than a second before.
            (900_400, Nature::Burst, Some(Bytes::mib(800))),
            (900_500, Nature::Suspect, None),
        ] {
            let at = Nanos(start.0 + Nanos::millis(after).0);
            leak.reserved = Some(Bytes::mib(800));
            leak.history.demand = Bytes::mib(250);
            leak.look_at_burst(at);
            leak.judge(at);
            assert_eq!((leak.nature, leak.reserved), (nature, reserved), "{after}");
        }
        assert_eq!(leak.small_step(), Bytes::mib(313));
        let claim = leak.claim(start, BTreeSet::new());
        assert_eq!(claim.nature, Nature::Suspect);
        // It gives back: what follows is another matter.
        let at = Nanos(start.0 + Nanos::millis(950_000).0);
        leak.history.demand = Bytes::mib(200);
        leak.look_at_burst(at);
        assert_eq!(leak.nature, Nature::Burst);
        leak.limit_is(at, AT_REST);
        assert_eq!(leak.spell, None);
    }

    #[test]
    fn of_a_leak_nothing_is_learnt() {
        for (nature, learnt) in [
            (Nature::Burst, true),
            (Nature::Suspect, true),
            (Nature::Leak, false),
        ] {
            let mut guarded = guarded(AT_REST);
            guarded.limit_is(Nanos(1), Bytes::mib(512));
            guarded.history.demand = Bytes::mib(400);
            guarded.look_at_burst(Nanos(2));
            guarded.is_thought(nature);
            // It was killed, and has fallen.
            guarded.nature = Nature::Burst;
            guarded.limit_is(Nanos(3), AT_REST);
            assert_eq!(guarded.learnt.largest().is_some(), learnt, "{nature:?}");
            // Of the next one.
            guarded.limit_is(Nanos(4), Bytes::mib(512));
            guarded.look_at_burst(Nanos(5));
            guarded.limit_is(Nanos(6), AT_REST);
            assert!(guarded.learnt.largest().is_some());
        }
    }

    #[test]
    fn whose_growth_is_stopped_is_told_what_to_do() {
        let wanted = Bytes::mib(500);
        let kept = told_why(
            wanted,
            Why::KeptForBursts(Place::Node, Bytes::mib(400)),
            None,
        );
        assert!(kept.starts_with("no 500 MiB, 400 MiB at most: "), "{kept}");
        assert!(kept.contains("left in the node"), "{kept}");
        for told in [kept, told_why(wanted, Why::Leaks, None)] {
            assert!(
                told.ends_with("give it a higher limit of its own"),
                "{told}"
            );
        }
    }

    #[test]
    fn what_is_kept_for_a_burst_is_what_was_learnt_or_a_step() {
        let mut at_rest = guarded(AT_REST);
        assert_eq!(
            at_rest.usual(),
            AT_REST.per_mille(REQUEST_STEP_MIN_PER_MILLE)
        );
        let part = |mib| Part {
            peak: Bytes::mib(mib),
            ..Part::default()
        };
        at_rest.learnt.ended("make", part(400));
        assert_eq!(at_rest.usual(), Bytes::mib(460));
        at_rest.learnt.ended("make", part(4000));
        assert_eq!(at_rest.usual(), at_rest.policy.ceiling);
    }

    #[test]
    fn what_is_promised_is_what_may_be_used() {
        let promised = |guarded: &Guarded| {
            let claim = guarded.claim(Nanos(0), BTreeSet::new());
            assert_eq!((claim.priority, claim.at_rest), (7, AT_REST));
            claim.promised
        };
        assert_eq!(promised(&guarded(AT_REST)), Bytes::ZERO);
        let mut raised = guarded(Bytes::mib(256));
        assert_eq!(promised(&raised), Bytes::mib(256));
        raised.requested = Some((Bytes::mib(512), Nanos(0)));
        assert_eq!(promised(&raised), Bytes::mib(512));
        // A lowering that is on its way has not come.
        raised.requested = Some((AT_REST, Nanos(0)));
        raised.lowering = Some(AT_REST);
        assert_eq!(promised(&raised), Bytes::mib(256));
        raised.reserved = Some(Bytes::mib(800));
        assert_eq!(promised(&raised), Bytes::mib(800));
    }

    #[test]
    fn a_burst_is_expected_to_need_more_than_its_first_step_until_it_cannot_wait() {
        let mut waiting = guarded(AT_REST);
        let to = Bytes::mib(200);
        assert_eq!(waiting.expected(Nanos(0), to), Bytes::mib(620));
        assert_eq!(
            waiting.expected(Nanos(0), Bytes::mib(500)),
            Bytes::mib(1024)
        );
        waiting.policy.learnt = Some(Bytes::mib(300));
        assert_eq!(waiting.expected(Nanos(0), to), Bytes::mib(300));
        waiting.policy.learnt = Some(Bytes::mib(100));
        assert_eq!(
            waiting.expected(Nanos(0), to),
            to,
            "it has come to need more"
        );
        waiting.policy.learnt = None;
        waiting.waiting = Some(Waiting {
            since: Nanos(0),
            wanted: Bytes::mib(620),
            asked: Nanos(0),
            frozen: Nanos(0),
            told: None,
        });
        assert_eq!(waiting.expected(Nanos::millis(7_499), to), Bytes::mib(620));
        assert_eq!(waiting.expected(Nanos::millis(7_500), to), to);
    }

    #[test]
    fn nobody_asks_for_more_than_there_is() {
        let room = |mib| bellows_core::arbiter::Room {
            free: Bytes::ZERO,
            size: Bytes::mib(mib),
        };
        let rooms = Rooms {
            node: room(900),
            ancestors: vec![room(700), room(100)],
        };
        let mut claim = guarded(AT_REST).claim(Nanos(0), BTreeSet::new());
        assert_eq!(whole(&rooms, &claim), Bytes::mib(900));
        claim.ancestors = [0, 9].into();
        assert_eq!(whole(&rooms, &claim), Bytes::mib(700));
    }
}
