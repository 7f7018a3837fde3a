//! What was raised by hand comes to be what the API says, or comes down by hand.
//!
//! Until the API says it the kubelet may set the smaller limit that the spec has, at any resize of the pod. So the API is asked
//! again and again, ever more seldom, until it has taken it, refuses it, or the burst is over.

use std::sync::Arc;

use bellows_core::{Bytes, CgroupId, allowance::What, bucket::Urgency, pod::way::Way};
use tokio::{task::spawn_blocking, time::sleep};

use super::{AGREE, LONGEST_AGREE, Resizer};
use crate::guard::Refused;

impl Resizer {
    /// Lowers a limit to what the spec says all the time: nobody else would. Where limits are moved on the node alone, to
    /// whatever is wanted, and while nothing may be asked of the API because what somebody else has set is not recorded, to
    /// what the spec says at least: it would stay where it is for as long as that is refused.
    pub(super) async fn is_lowered_by_hand(
        &self,
        cgroup: CgroupId,
        to: Bytes,
    ) -> Result<bool, Refused> {
        let raised = self.target(cgroup, |target| {
            let by_hand = target.by_hand?;
            let in_spec = target.in_spec()?;
            let is_said = to.page_floor() == in_spec;
            let is_above = !target.is_recorded && to.page_floor() > in_spec;
            let is_lowering = to < by_hand && (is_said || is_above || target.way == Way::Node);
            is_lowering.then(|| (target.cgroup.clone(), by_hand))
        })?;
        let Some((own, by_hand)) = raised else {
            return Ok(false);
        };
        let by_hands = self.by_hands.clone();
        let lowered = spawn_blocking(move || by_hands.lower(&own, to, || true)).await;
        let refused = |why: String| Refused {
            why,
            uncertain: false,
            is_passing: false,
        };
        match lowered.map(|lowered| lowered.map_err(|error| error.to_string())) {
            Ok(Ok(true)) => {
                let key = self
                    .targets
                    .of(cgroup, |target| target.is_lowered(by_hand, to));
                if let Some((uid, container)) = key.flatten() {
                    let key = (uid.as_str(), container.as_str());
                    self.allowances.lowered(key, What::MemoryLimit, to.0);
                }
                Ok(true)
            }
            Ok(Ok(false)) => Err(refused(
                "usage has grown meanwhile, or the limit was raised again".to_owned(),
            )),
            Ok(Err(why)) => Err(refused(why)),
            Err(error) => Err(refused(error.to_string())),
        }
    }

    /// Sees to it that the API comes to say what was raised by hand.
    pub fn agree(&self, cgroup: CgroupId) {
        let is_new = self.targets.of(cgroup, |target| {
            !std::mem::replace(&mut target.is_agreeing, true)
        });
        if is_new == Some(true) {
            drop(self.runtime.spawn(self.clone().until_agreed(cgroup)));
        }
    }

    pub(super) async fn until_agreed(self, cgroup: CgroupId) {
        let mut wait = AGREE;
        loop {
            sleep(wait).await;
            wait = (wait * 2).min(LONGEST_AGREE);
            match self.is_agreed(cgroup).await {
                Ok(true) => return,
                Ok(false) => {}
                Err(refused) if refused.is_passing => {
                    tracing::debug!(
                        why = refused.why,
                        "the API does not say yet what was raised by hand"
                    );
                }
                Err(Refused { why, .. }) => {
                    tracing::warn!(
                        why,
                        "the API refuses what was raised by hand: it is lowered when the burst is over"
                    );
                    return self.note(cgroup, |target| {
                        target.is_agreeing = false;
                        target.is_refused = true;
                    });
                }
            }
        }
    }

    pub(super) async fn is_agreed(&self, cgroup: CgroupId) -> Result<bool, Refused> {
        let order = self.target(cgroup, |target| Arc::clone(&target.order))?;
        self.may_ask(Urgency::Later).await;
        let _turn = order.lock().await;
        let by_hand = self.target(cgroup, |target| {
            target.is_agreeing = target.by_hand.is_some();
            target.by_hand
        })?;
        let Some(to) = by_hand else {
            return Ok(true);
        };
        self.note(cgroup, |target| target.asking.push(to));
        let resized = self.resize_in_turn(cgroup, to).await;
        self.is_answered(cgroup, to);
        resized.map(|()| false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::actuate::resize::{Target, target::tests::target, tests::resizer};

    #[tokio::test]
    async fn what_was_raised_by_hand_comes_down_while_nothing_is_recorded() {
        let resizer = resizer();
        let by_hand = Bytes::mib(512);
        let lowered = async |is_recorded, to| {
            let raised = Target {
                by_hand: Some(by_hand),
                is_recorded,
                ..target()
            };
            let targets = &resizer.targets;
            targets.with(|targets| targets.insert(CgroupId(1), raised));
            let is_lowered = resizer
                .is_lowered_by_hand(CgroupId(1), Bytes::mib(to))
                .await;
            let left = targets.of(CgroupId(1), |target| target.by_hand);
            (is_lowered.unwrap(), left.flatten())
        };
        assert_eq!(lowered(true, 256).await, (false, Some(by_hand)));
        assert_eq!(lowered(false, 256).await, (true, Some(Bytes::mib(256))));
        assert_eq!(lowered(false, 64).await, (true, None));
        // The spec would still say more.
        assert_eq!(lowered(false, 32).await, (false, Some(by_hand)));
    }
}
