//! A limit that is guarded, as the API has it, and what may still come of what was asked for.

use std::{sync::Arc, time::Duration};

use bellows_core::{
    Bytes,
    decide::ByHand,
    pod::{self, Level, MANAGER, Wish, way::Way},
    quantity,
};
use tokio::time::Instant;

use super::change::Change;
use crate::cgroup::Cgroup;

/// For so long the kubelet may be about to carry out what the API has taken (0.3 to 1.5 s on an idle node).
pub(crate) const CARRIED_OUT: Duration = Duration::from_secs(2);
/// For so long after a raise another may follow. Who stands above rest for longer has settled there.
const BURSTS: Duration = Duration::from_secs(60);

/// Held while a request of a pod is under way.
pub type Order = Arc<tokio::sync::Mutex<()>>;

/// Where a guarded cgroup's limit is written in the API.
#[derive(Clone, Debug)]
pub struct Target {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// Its uid: another may have its name.
    pub uid: String,
    /// The guarded cgroup.
    pub cgroup: Cgroup,
    /// The container.
    pub container: String,
    /// Where its limit stands in the spec.
    pub level: Level,
    /// How it is changed.
    pub way: Way,
    /// The limit in the spec, as last seen or written.
    pub limit: String,
    /// When that was raised last, or, if it has not been since, seen first.
    pub(super) raised_at: Instant,
    /// Whether what that was before we move it is on the pod. It is not where somebody else has just set it.
    pub is_recorded: bool,
    /// The limit at rest, as it was written: what to write back.
    pub original: (Bytes, String),
    /// The limit that was written by hand and that the spec does not say.
    pub by_hand: Option<Bytes>,
    /// Whether the limit of the pod's cgroup is the sum of its containers', and not the spec's own.
    pub pod_follows: bool,
    /// Whether the kubelet says that it cannot have what the spec says: there is no room.
    pub is_pending: bool,
    /// The number of the last request: an older one that was kept waiting is not made any more.
    pub(super) latest: u64,
    /// What is asked for and not answered.
    pub(super) asking: Vec<Bytes>,
    /// The smallest that was asked for without a certain answer: an API server that was given up may still carry it out
    /// (seen: a patch that was waited for 8 s, and stored when etcd went on).
    pub(super) uncertain: Option<Bytes>,
    /// What the API took of late, and when: the kubelet may be about to carry out the one before the last.
    pub(super) taken: Vec<(Bytes, Instant)>,
    /// Whether a task asks the API to say what was raised by hand.
    pub(super) is_agreeing: bool,
    /// Whether the API refuses to: it is not asked for beside what others ask for.
    pub(super) is_refused: bool,
    /// Whether the kubelet is about to carry out what the spec says, or tries to.
    pub is_in_progress: bool,
    /// One request of a pod at a time: a raise must not overtake the lowering that it answers, and the kubelet carries
    /// out all of a pod's resize or nothing of it.
    pub order: Order,
}

impl Target {
    /// One that nothing was asked for yet.
    #[must_use]
    pub fn new(
        pod: &pod::Pod,
        wish: &Wish,
        cgroup: Cgroup,
        (rest, way): (Bytes, Way),
        order: Order,
    ) -> Self {
        Self {
            namespace: pod.namespace.clone(),
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            cgroup,
            container: wish.container.clone(),
            level: wish.level,
            way,
            limit: wish.limit_text.clone(),
            raised_at: Instant::now(),
            is_recorded: wish.recorded,
            original: (rest, wish.rest_text.clone()),
            by_hand: None,
            pod_follows: wish.level != Level::Pod && pod.memory_limit.is_none(),
            is_pending: pod.is_resize_pending,
            latest: 0,
            asking: Vec::new(),
            uncertain: None,
            taken: Vec::new(),
            is_agreeing: false,
            is_refused: false,
            is_in_progress: pod.is_resize_in_progress,
            order,
        }
    }

    /// The pod's uid and the container's name.
    pub(super) fn key(&self) -> (String, String) {
        (self.uid.clone(), self.container.clone())
    }

    /// What the spec says, as the kernel has it.
    pub(super) fn in_spec(&self) -> Option<Bytes> {
        let limit = quantity::parse(&self.limit).ok()?;
        Some(limit.page_floor())
    }

    /// Takes over what the watch of pods says. What somebody else has set is on its way like what we have asked for: raised
    /// beyond it by hand, the container would be killed when the kubelet sets it.
    pub fn follow(&mut self, seen: &pod::Pod, wish: &Wish, rest: Bytes) {
        self.is_pending = seen.is_resize_pending;
        self.is_in_progress = seen.is_resize_in_progress;
        // What the API says just after our own change may be older than that.
        if !self.was_just_taken() || wish.foreign {
            let is_new = self.limit != wish.limit_text;
            self.says(wish.limit_text.clone());
            if let Some(limit) = self.in_spec().filter(|_| wish.foreign && is_new) {
                self.takes(limit);
            }
        }
        // It says nothing of another limit.
        if self.limit == wish.limit_text {
            self.is_recorded = wish.recorded;
        }
        self.original = (rest, wish.rest_text.clone());
    }

    /// The spec says so, which the watch of pods may not have seen yet. What somebody else has set is recorded before it is
    /// changed.
    pub(super) fn is_told(&mut self, limit: String, manager: Option<&str>) {
        let is_theirs = manager.is_some_and(|manager| manager != MANAGER);
        self.is_recorded &= !is_theirs || self.limit == limit;
        self.says(limit);
    }

    fn says(&mut self, limit: String) {
        let before = self.in_spec();
        self.limit = limit;
        if self.in_spec() > before {
            self.raised_at = Instant::now();
        }
    }

    /// The API has taken a limit.
    pub(super) fn takes(&mut self, limit: Bytes) {
        self.taken.retain(|(_, at)| at.elapsed() < CARRIED_OUT);
        self.taken.push((limit, Instant::now()));
    }

    /// Whether the API has taken something so lately that what it says of the pod may be older.
    #[must_use]
    pub fn was_just_taken(&self) -> bool {
        let mut taken = self.taken.iter();
        taken.any(|(_, at)| at.elapsed() < CARRIED_OUT)
    }

    pub(super) fn may_come(&mut self, limit: Bytes) {
        let least = self.uncertain.map_or(limit, |other| other.min(limit));
        self.uncertain = Some(least);
    }

    /// Goes another way from now on, unless something is raised that could not be lowered in that; returns whether it has
    /// changed.
    #[must_use]
    pub fn goes(&mut self, way: Way) -> bool {
        let is_at_rest = self.in_spec() == Some(self.original.0.page_floor());
        let may = way != Way::Node || is_at_rest;
        let changes = way != self.way && may && self.asking.is_empty();
        if changes {
            self.way = way;
        }
        changes
    }

    /// Whether the node has more than any patch would say: with a resize of anything else of the pod the kubelet would set
    /// what the spec says, with no regard to usage.
    pub(super) fn is_only_by_hand(&self) -> bool {
        self.by_hand.is_some() && self.by_hand_change().is_none()
    }

    /// What was raised by hand to `from` was lowered to `to`; returns the key unless another raise has come meanwhile.
    pub(super) fn is_lowered(&mut self, from: Bytes, to: Bytes) -> Option<(String, String)> {
        if self.by_hand != Some(from) {
            return None;
        }
        let is_said = self.in_spec() == Some(to.page_floor());
        self.by_hand = (!is_said).then_some(to);
        Some(self.key())
    }

    /// Whether it was raised above rest of late, or is about to be.
    pub(super) fn is_bursting(&self) -> bool {
        let is_above = self.in_spec() > Some(self.original.0.page_floor());
        let is_raised = is_above && self.raised_at.elapsed() < BURSTS;
        is_raised || self.by_hand.is_some() || !self.asking.is_empty()
    }

    pub(super) fn by_hand_change(&self) -> Option<Change> {
        let is_to_be_said = !self.is_refused && self.is_recorded && self.way != Way::Node;
        let to = quantity::format(self.by_hand.filter(|_| is_to_be_said)?);
        Some(Change::memory(self.level, self.limit.clone(), to))
    }

    pub(super) fn may_be_raised_by_hand(&self, to: Bytes) -> ByHand {
        if self.is_pending {
            return ByHand::No;
        }
        let is_below = |limit: Bytes| limit.page_floor() < to.page_floor();
        let mut may_come = self.asking.iter().copied().chain(self.uncertain);
        let is_asking = may_come.any(is_below);
        let mut taken = self.taken.iter();
        let is_coming = taken.any(|&(limit, at)| is_below(limit) && at.elapsed() < CARRIED_OUT)
            || (self.is_in_progress && self.in_spec().is_some_and(is_below));
        if is_asking || is_coming {
            ByHand::NotYet
        } else {
            ByHand::Yes
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use bellows_core::CgroupId;
    use serde_json::json;

    use super::*;
    use crate::attribution::pods::convert;

    pub(in crate::actuate::resize) fn target() -> Target {
        Target {
            namespace: "dev".to_owned(),
            name: "workspace".to_owned(),
            uid: "u".to_owned(),
            cgroup: Cgroup::stand_in(std::path::Path::new("/nowhere"), CgroupId(1)),
            container: "app".to_owned(),
            level: Level::Container(0),
            way: Way::Resize,
            limit: "64Mi".to_owned(),
            raised_at: Instant::now(),
            is_recorded: true,
            original: (Bytes::mib(64), "64Mi".to_owned()),
            by_hand: None,
            pod_follows: true,
            is_pending: false,
            latest: 0,
            asking: Vec::new(),
            uncertain: None,
            taken: Vec::new(),
            is_agreeing: false,
            is_refused: false,
            is_in_progress: false,
            order: Order::default(),
        }
    }

    /// A pod whose limit was 64 MiB, and was set by somebody; what is recorded of it.
    fn wish(limit: &str, manager: &str, original: &str) -> (pod::Pod, Wish) {
        let limits = json!({ "memory": limit });
        let annotations = json!({
            pod::MODE: "Act", pod::MAX_MEMORY: "1Gi", pod::ORIGINAL: original,
        });
        let own = json!({ "f:resources": { "f:limits": { "f:memory": {} } } });
        let fields = json!({ "f:spec": { "f:containers": { r#"k:{"name":"app"}"#: own } } });
        let pod = json!({
            "metadata": {
                "name": "workspace", "namespace": "dev", "uid": "u", "annotations": annotations,
                "managedFields": [{ "manager": manager, "fieldsV1": fields }],
            },
            "spec": { "containers": [{ "name": "app", "resources": { "limits": limits } }] },
        });
        let seen = convert(&serde_json::from_value(pod).unwrap());
        let mut wishes = pod::all_wishes(&seen, &[]);
        let wish = wishes.remove("app").unwrap().unwrap();
        (seen, wish)
    }

    /// Whether a change of it may be asked for, and from which limit.
    fn follows(target: &mut Target, limit: &str, manager: &str, original: &str) -> (bool, String) {
        let (seen, wish) = wish(limit, manager, original);
        target.follow(&seen, &wish, wish.rest);
        (target.is_recorded, target.limit.clone())
    }

    #[test]
    fn what_somebody_else_has_set_is_recorded_before_it_is_changed() {
        let mut target = target();
        let is = |may, limit: &str| (may, limit.to_owned());
        assert_eq!(
            follows(&mut target, "96Mi", "kubectl", "app=64Mi"),
            is(false, "96Mi")
        );
        assert_eq!(target.original, (Bytes::mib(96), "96Mi".to_owned()));
        // Another one while that is recorded, and it is told of the one before.
        assert_eq!(
            follows(&mut target, "128Mi", "kubectl", "app=96Mi"),
            is(false, "128Mi")
        );
        assert_eq!(
            follows(&mut target, "128Mi", "kubectl", "app=128Mi"),
            is(true, "128Mi")
        );
    }

    /// The answer to a resize of something else in the pod tells of it before the watch does.
    #[test]
    fn what_the_watch_has_not_seen_yet_is_not_changed_either() {
        let mut target = target();
        target.is_told("256Mi".to_owned(), Some(MANAGER));
        assert!(target.is_recorded);
        target.is_told("96Mi".to_owned(), Some("kubectl"));
        target.takes(Bytes::mib(96));
        assert!(!target.is_recorded);
        // Older than that.
        let is = |may| (may, "96Mi".to_owned());
        assert_eq!(
            follows(&mut target, "256Mi", MANAGER, "app=64Mi"),
            is(false)
        );
        assert_eq!(
            follows(&mut target, "96Mi", "kubectl", "app=64Mi"),
            is(false)
        );
        assert_eq!(
            follows(&mut target, "96Mi", "kubectl", "app=96Mi"),
            is(true)
        );
    }

    /// Each smaller limit that may still come into force is waited for.
    #[test]
    fn nothing_is_raised_by_hand_beyond_what_may_still_come() {
        let to = Bytes::mib(256);
        let may = |change: &dyn Fn(&mut Target)| {
            let mut target = target();
            change(&mut target);
            target.may_be_raised_by_hand(to)
        };
        assert_eq!(may(&|_| {}), ByHand::Yes);
        assert_eq!(may(&|target| target.asking = vec![to]), ByHand::Yes);
        let lower = Bytes::mib(128);
        assert_eq!(
            may(&|target| target.asking = vec![to, lower]),
            ByHand::NotYet
        );
        assert_eq!(may(&|target| target.may_come(lower)), ByHand::NotYet);
        assert_eq!(may(&|target| target.takes(to)), ByHand::Yes);
        // The kubelet may have seen the first before the second.
        let both = |target: &mut Target| {
            target.takes(lower);
            target.takes(to);
        };
        assert_eq!(may(&both), ByHand::NotYet);
        assert_eq!(may(&|target| target.is_in_progress = true), ByHand::NotYet);
        assert_eq!(may(&|target| target.is_pending = true), ByHand::No);
    }

    /// The kubelet sets it with no regard to what was written meanwhile.
    #[test]
    fn nothing_is_raised_by_hand_beyond_what_somebody_else_has_just_set() {
        let mut target = target();
        let may = |target: &Target| target.may_be_raised_by_hand(Bytes::mib(256));
        follows(&mut target, "64Mi", "kubectl", "app=64Mi");
        assert_eq!(may(&target), ByHand::Yes);
        follows(&mut target, "128Mi", "kubectl", "app=64Mi");
        assert_eq!(may(&target), ByHand::NotYet);
        // What is seen again is as old as it was.
        target.taken.clear();
        follows(&mut target, "128Mi", "kubectl", "app=64Mi");
        assert_eq!(may(&target), ByHand::Yes);
    }

    #[test]
    fn a_raise_that_overtakes_a_lowering_stays_known() {
        let mut target = target();
        let (first, second, rest) = (Bytes::mib(256), Bytes::mib(512), Bytes::mib(64));
        target.by_hand = Some(second);
        assert_eq!(target.is_lowered(first, rest), None);
        assert_eq!(target.by_hand, Some(second));
        assert_eq!(target.is_lowered(second, rest), Some(target.key()));
        assert_eq!(target.by_hand, None);
        // On its way down it is above what the spec says.
        target.by_hand = Some(second);
        assert!(target.is_lowered(second, first).is_some());
        assert_eq!(target.by_hand, Some(first));
    }

    #[test]
    fn what_the_api_refuses_is_not_asked_for_beside_others() {
        let mut raised = target();
        assert!(!raised.is_only_by_hand());
        raised.by_hand = Some(Bytes::mib(256));
        assert!(raised.by_hand_change().is_some() && !raised.is_only_by_hand());
        raised.is_refused = true;
        assert!(raised.by_hand_change().is_none() && raised.is_only_by_hand());
        raised.is_refused = false;
        raised.is_recorded = false;
        assert!(raised.by_hand_change().is_none() && raised.is_only_by_hand());
        raised.is_recorded = true;
        raised.way = Way::Node;
        assert!(raised.by_hand_change().is_none() && raised.is_only_by_hand());
    }

    /// An API server of 1.33 became one of 1.34, or the other way round.
    #[test]
    fn the_way_changes_with_the_api_server() {
        let mut target = target();
        target.way = Way::Node;
        target.by_hand = Some(Bytes::mib(256));
        // The API comes to say what is raised.
        assert!(target.goes(Way::Resize) && !target.goes(Way::Resize));
        assert!(target.by_hand_change().is_some());
        target.limit = "256Mi".to_owned();
        assert!(!target.goes(Way::Node), "what the spec says stays raised");
        target.limit = "64Mi".to_owned();
        target.asking = vec![Bytes::mib(256)];
        assert!(!target.goes(Way::Node), "it may come");
        target.asking.clear();
        assert!(target.goes(Way::Node));
    }

    #[test]
    fn whoever_is_raised_or_about_to_be_bursts() {
        let bursts = |change: &dyn Fn(&mut Target)| {
            let mut target = target();
            change(&mut target);
            target.is_bursting()
        };
        assert!(!bursts(&|_| {}));
        assert!(bursts(&|target| target.limit = "128Mi".to_owned()));
        assert!(bursts(&|target| target.by_hand = Some(Bytes::mib(128))));
        assert!(bursts(&|target| target.asking = vec![Bytes::mib(128)]));
    }

    /// What it needs it may need for days.
    #[test]
    fn whoever_has_settled_above_rest_does_not_burst() {
        let mut target = target();
        let settle = |target: &mut Target| target.raised_at -= BURSTS;
        let is_told = |target: &mut Target, limit: &str| {
            target.is_told(limit.to_owned(), Some(MANAGER));
            target.is_bursting()
        };
        settle(&mut target);
        assert!(is_told(&mut target, "128Mi"));
        settle(&mut target);
        assert!(!target.is_bursting());
        // What comes down by a step is no raise.
        assert!(!is_told(&mut target, "96Mi"));
        let (seen, wish) = wish("256Mi", MANAGER, "app=64Mi");
        target.follow(&seen, &wish, wish.rest);
        assert!(target.is_bursting());
    }
}
