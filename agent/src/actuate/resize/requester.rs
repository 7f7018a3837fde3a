//! What the controller asks for, as requests of the API, raises by hand, and words for people.

use bellows_core::{
    Bytes, CgroupId, Nanos, allowance::Bound, arbiter::Why, bucket::Urgency, decide::ByHand,
    pod::way::Way,
};

use super::{Observed, Resizer};
use crate::{
    cgroup::Cgroup,
    guard::{Input, Refused, Requester, told_balance, told_bound, told_kill, told_raise, told_why},
    ledger::Record,
};

impl Requester for Resizer {
    fn bound(&self, cgroup: CgroupId) -> Option<Bound> {
        let (uid, container) = self.targets.of(cgroup, |target| target.key())?;
        self.allowances.memory((&uid, &container))
    }

    fn raise(&mut self, cgroup: &Cgroup, to: Bytes, _patience: Nanos) {
        let id = cgroup.id();
        if let Some((uid, container)) = self.targets.of(id, |target| target.key()) {
            self.allowances.ask_memory((&uid, &container), to);
        }
        if self.targets.of(id, |target| target.way) != Some(Way::Node) {
            return self.send(id, to, Urgency::Urgent);
        }
        if let Err(why) = self.raise_by_hand(cgroup, to) {
            let result = Err(Refused {
                why,
                uncertain: false,
                is_passing: true,
            });
            // A controller that has ended needs no answer, and one that is late asks again.
            drop(self.inputs.try_send(Input::Answered {
                cgroup: id,
                to,
                result,
            }));
        }
    }

    fn lower(&mut self, cgroup: &Cgroup, to: Bytes) {
        self.send(cgroup.id(), to, Urgency::Later);
    }

    fn take_back(&mut self, cgroup: &Cgroup, to: Bytes, limit: Bytes) {
        self.is_not_taken(cgroup.id(), to, true);
        self.send(cgroup.id(), limit, Urgency::Later);
    }

    fn by_hand(&self, cgroup: CgroupId, to: Bytes) -> ByHand {
        let may = self.targets.of(cgroup, |target| {
            (target.may_be_raised_by_hand(to), target.cgroup.clone())
        });
        match may {
            Some((may, cgroup)) if may == ByHand::No || !cgroup.is_pinned() => may,
            Some(_) | None => ByHand::No,
        }
    }

    fn raise_by_hand(&mut self, cgroup: &Cgroup, to: Bytes) -> Result<(), String> {
        let id = cgroup.id();
        let target = self.targets.of(id, |target| target.clone());
        let target = target.ok_or("the pod is gone")?;
        let before = target.in_spec().ok_or("its limit is no size")?;
        let to = to.page_floor();
        self.by_hands
            .raise(&target.cgroup, to, before, target.pod_follows)?;
        self.note(id, |target| {
            target.by_hand = Some(to);
            target.is_refused = false;
        });
        if target.way == Way::Node {
            return Ok(());
        }
        self.agree(id);
        let note = format!(
            "container {}: limit raised to {to} on the node, before the API",
            target.container
        );
        // A watch that has ended tells nobody.
        drop(self.observed.send((id, Observed::ByHand(note))));
        Ok(())
    }

    fn record(&mut self, cgroup: &Cgroup, record: &Record) {
        tracing::info!(path = %cgroup.path().display(), ?record, "ledger");
        let observed = match record {
            Record::ObservedKill { kill, .. } => Observed::Kill(told_kill(kill)),
            Record::WouldRaise { would, .. } => Observed::Raise(told_raise(would)),
            Record::Waits {
                wanted,
                why,
                behind,
                ..
            } => {
                let note = told_why(*wanted, *why, behind.as_deref());
                match why {
                    Why::KeptForBursts(..) | Why::Leaks => Observed::Stopped(note),
                    _ => Observed::Waits(note),
                }
            }
            Record::Lends { balance, .. } => Observed::Waits(told_balance(balance)),
            Record::Bounded {
                wanted,
                reason,
                why,
                ..
            } => Observed::Bounded(reason.reason(), told_bound(*wanted, why)),
            _ => return,
        };
        // A watch that has ended tells nobody.
        drop(self.observed.send((cgroup.id(), observed)));
    }

    fn not_guarded(&mut self, cgroup: CgroupId) {
        // A watch that has ended tries nobody again.
        drop(self.observed.send((cgroup, Observed::NotGuarded)));
    }
}

#[cfg(test)]
mod tests {
    use std::{env, fs, process};

    use super::*;
    use crate::actuate::resize::{Target, target::tests::target, tests::resizer};

    #[tokio::test]
    async fn nothing_is_raised_by_hand_that_a_runtime_would_undo() {
        let directory = env::temp_dir().join(format!("bellows-may-{}", process::id()));
        fs::create_dir_all(&directory).unwrap();
        let resizer = resizer();
        let target = Target {
            cgroup: Cgroup::open(&directory).unwrap(),
            ..target()
        };
        resizer
            .targets
            .with(|targets| targets.insert(CgroupId(1), target));
        let may = |cpus: &str| {
            fs::write(directory.join("cpuset.cpus"), cpus).unwrap();
            resizer.by_hand(CgroupId(1), Bytes::mib(128))
        };
        assert_eq!(may("\n"), ByHand::Yes);
        assert_eq!(may("0-2\n"), ByHand::No);
        assert_eq!(resizer.by_hand(CgroupId(2), Bytes::mib(128)), ByHand::No);
        fs::remove_dir_all(&directory).unwrap();
    }
}
