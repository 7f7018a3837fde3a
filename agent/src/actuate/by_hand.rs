//! A limit that is written before whoever owns it has carried it out: the API is away, late, or to be told at once
//! afterwards.
//!
//! The order is the kubelet's: the pod's cgroup up before its container's, and down after it. The kubelet (1.33 and later)
//! leaves such a limit alone until it carries out the next resize of the pod, of whatever resource; then it sets what the
//! spec says, with no regard to usage, and kills. So the spec must come to say it as soon as it can, or the limit must come
//! down again. Until one of both is done a record in `/run/bellows` says that it is ours, and what was before.
//!
//! The runtime sets what it remembers, too, where it is told anything else: the kubelet's static CPU manager tells it new CPUs
//! for each container of the shared pool when a pod with whole CPUs comes or goes (`updateContainerCPUSet`,
//! pkg/kubelet/cm/cpumanager), and containerd then sets all of its own spec (`updateContainerResources`,
//! internal/cri/server/container_update_resources.go). So nothing is raised by hand where somebody says on which CPUs a
//! container runs.
//!
//! A pod's own limit follows its containers'. Whatever was before, it is never set below the sum of what they have: the
//! kubelet may have moved both meanwhile. A limit that the spec has at the pod's own level is not moved for a container.
//!
//! It must not lower what usage does not fit.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bellows_core::Bytes;
use serde::{Deserialize, Serialize};

use super::shrink;
use crate::{
    attribution,
    cgroup::{Cgroup, CgroupError, Limit},
    originals::{Recorded, Records, key_of},
};

/// Why none is written by hand there.
pub const PINNED: &str = "this node's kubelet says on which CPUs the container runs (static CPU manager): whenever it says so anew, the container's runtime sets the memory limit that it remembers";

/// A limit that was written by hand.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ByHand {
    /// The container's cgroup, or the pod's where the limit stands there.
    pub path: PathBuf,
    /// The limit before: what its owner knows.
    pub before: Bytes,
    /// The limit that was written last.
    pub to: Bytes,
    /// The one before that, which may be in force still. Another than these was set by somebody else, and stays.
    pub was: Option<Bytes>,
    /// The limit of the pod's cgroup before, where that had to be moved.
    pub pod_before: Option<Bytes>,
}

impl ByHand {
    fn becomes(&mut self, to: Bytes) {
        if self.to != to {
            self.was = Some(self.to);
            self.to = to;
        }
    }

    fn is_ours(&self, limit: Bytes) -> bool {
        limit == self.to || self.was == Some(limit)
    }
}

impl Recorded for ByHand {
    fn key(&self) -> &str {
        key_of(&self.path)
    }
}

/// Limits that were written by hand; clones share what they know.
#[derive(Clone, Debug)]
pub struct ByHands {
    records: Records<ByHand>,
    /// Held from when what a pod needs is computed until that is written.
    writing: Arc<Mutex<()>>,
}

impl Default for ByHands {
    fn default() -> Self {
        Self {
            records: Records::by_hand(),
            writing: Arc::default(),
        }
    }
}

impl ByHands {
    /// Whether a cgroup's limit is one.
    #[must_use]
    pub fn contains(&self, cgroup: &Path) -> bool {
        self.records.read(key_of(cgroup)).is_some()
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Vec<ByHand> {
        self.records.all()
    }

    /// It is not ours any more: somebody else has set it, or it is gone.
    pub fn forget(&self, cgroup: &Path) {
        let _one_at_a_time = self.turn();
        self.records.remove(key_of(cgroup));
    }

    /// Its owner knows a limit of so much. One that was raised beyond that since stays written down.
    pub fn is_known(&self, cgroup: &Path, known: Bytes) {
        let _one_at_a_time = self.turn();
        let key = key_of(cgroup);
        if self
            .records
            .read(key)
            .is_some_and(|record| record.to <= known)
        {
            self.records.remove(key);
        }
    }

    fn turn(&self) -> MutexGuard<'_, ()> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Raises a limit, and before it that of the pod where that follows. Nothing is reclaimed by this.
    ///
    /// # Errors
    ///
    /// Why not, for people. What was written down stays, so that nothing is left raised.
    pub fn raise(
        &self,
        cgroup: &Cgroup,
        to: Bytes,
        before: Bytes,
        with_pod: bool,
    ) -> Result<(), String> {
        if cgroup.is_pinned() {
            return Err(PINNED.to_owned());
        }
        let _one_at_a_time = self.turn();
        let pod = if with_pod {
            pod_of(cgroup.path())?
        } else {
            None
        };
        let known = self.records.read(key_of(cgroup.path()));
        let mut record = known.unwrap_or_else(|| ByHand {
            path: cgroup.path().to_owned(),
            before,
            to,
            was: None,
            pod_before: pod
                .as_ref()
                .map(|(pod, limit)| self.pod_before(pod, *limit)),
        });
        record.becomes(to);
        self.records.write(&record).map_err(text)?;
        if let Some((pod, limit)) = pod {
            let own = |child: &Cgroup, limit| {
                if child.id() == cgroup.id() { to } else { limit }
            };
            let needed = self.needed_in(&pod, record.pod_before.unwrap_or(limit), own);
            if limit < needed {
                pod.set_limit("memory.max", Limit::At(needed))
                    .map_err(text)?;
            }
        }
        let in_force = cgroup.limit_in_force().map_err(text)?;
        if in_force < to {
            cgroup.set_limit_and_heirs(to).map_err(text)?;
        }
        Ok(())
    }

    /// Raises the limit of a container's pod where that has less than its containers have together; returns whether it had.
    /// A container that is killed while its raise is under way is made anew with what the spec says by then, and the kubelet
    /// may leave the pod where it was (kubernetes/kubernetes#138760): it would be killed there again and again. Nothing is
    /// written down: it is what the kubelet meant to set.
    ///
    /// # Errors
    ///
    /// Why not, for people.
    pub fn make_whole(&self, cgroup: &Cgroup) -> Result<bool, String> {
        let _one_at_a_time = self.turn();
        let Some((pod, limit)) = pod_of(cgroup.path())? else {
            return Ok(false);
        };
        let needed = sum_in(&pod, |_, limit| limit);
        let is_short = limit < needed;
        if is_short {
            pod.set_limit("memory.max", Limit::At(needed))
                .map_err(text)?;
        }
        Ok(is_short)
    }

    /// Lowers a limit that was written by hand, and after it that of the pod; returns whether usage fits both. May block
    /// while page cache is given back.
    ///
    /// # Errors
    ///
    /// [`CgroupError`]; what is written down stays.
    pub fn lower(
        &self,
        cgroup: &Cgroup,
        to: Bytes,
        is_still_wanted: impl Fn() -> bool,
    ) -> Result<bool, CgroupError> {
        let Some(record) = self.records.read(key_of(cgroup.path())) else {
            return Ok(true);
        };
        let in_force = cgroup.limit_in_force()?;
        // Gibibytes of page cache take seconds: nobody else waits for that.
        if record.is_ours(in_force) && to < in_force && !shrink::make_room_in(cgroup, to)? {
            return Ok(false);
        }
        self.lower_in_room(cgroup, record, to, is_still_wanted)
    }

    /// The same once there is room, unless another raise was written down since `record` was read: that one stays, and
    /// whoever answers for it lowers it.
    fn lower_in_room(
        &self,
        cgroup: &Cgroup,
        mut record: ByHand,
        to: Bytes,
        is_still_wanted: impl Fn() -> bool,
    ) -> Result<bool, CgroupError> {
        let key = key_of(cgroup.path());
        let turn = self.turn();
        if self.records.read(key).as_ref() != Some(&record) {
            return Ok(false);
        }
        let in_force = cgroup.limit_in_force()?;
        if record.is_ours(in_force) && to < in_force {
            // Somebody may have come to be responsible for it meanwhile.
            if !is_still_wanted() || !shrink::fits(cgroup, to)? {
                return Ok(false);
            }
            // What is its owner's again needs no record.
            if to > record.before {
                record.becomes(to);
                if let Err(error) = self.records.write(&record) {
                    tracing::warn!(path = %cgroup.path().display(), %error, "a limit that was raised by hand stays");
                    return Ok(false);
                }
            }
            cgroup.set_limit_and_heirs(to)?;
        }
        drop(turn);
        if let Some(before) = record.pod_before
            && !self.lower_pod(cgroup.path(), before)?
        {
            return Ok(false);
        }
        let _one_at_a_time = self.turn();
        if self.records.read(key).is_some_and(|now| now != record) {
            return Ok(false);
        }
        // On its way down it may stay above what its owner knows.
        if to <= record.before || !record.is_ours(cgroup.limit_in_force()?) {
            self.records.remove(key);
        }
        Ok(true)
    }

    /// Brings the limit of a container's pod down to what its containers have, and no further than it was. The container may
    /// be gone.
    fn lower_pod(&self, container: &Path, before: Bytes) -> Result<bool, CgroupError> {
        let Ok(Some((pod, limit))) = pod_of(container) else {
            return Ok(true);
        };
        let needed = || self.needed_in(&pod, before, |_, limit| limit);
        if limit <= needed() {
            return Ok(true);
        }
        if !shrink::make_room_in(&pod, needed())? {
            return Ok(false);
        }
        let _one_at_a_time = self.turn();
        // Another of its containers may have been raised meanwhile.
        let to = needed();
        if !shrink::fits(&pod, to)? {
            return Ok(false);
        }
        if to < limit {
            pod.set_limit("memory.max", Limit::At(to))?;
        }
        Ok(true)
    }

    /// What a pod had before anything in it was raised by hand: a container that is killed and started again comes in another
    /// cgroup, and must not take for that what its predecessor was raised by.
    fn pod_before(&self, pod: &Cgroup, limit: Bytes) -> Bytes {
        let others = self.of_pod(pod.path()).filter_map(|other| other.pod_before);
        others.fold(limit, Bytes::min)
    }

    /// What a pod must have for what its containers have: their sum, and no less than it had `before` with what they are
    /// raised by since. Containers that are about to be started again have no cgroup now, and no limit that could be seen.
    fn needed_in(
        &self,
        pod: &Cgroup,
        before: Bytes,
        limit_of: impl Fn(&Cgroup, Bytes) -> Bytes,
    ) -> Bytes {
        let raised = self.of_pod(pod.path()).filter_map(|other| {
            let cgroup = Cgroup::open(&other.path).ok()?;
            match cgroup.limit("memory.max").ok()? {
                Limit::At(limit) => Some(limit_of(&cgroup, limit).minus(other.before)),
                Limit::Max => None,
            }
        });
        sum_in(pod, &limit_of).max(raised.fold(before, Bytes::plus))
    }

    fn of_pod<'a>(&self, pod: &'a Path) -> impl Iterator<Item = ByHand> + use<'a> {
        let all = self.all().into_iter();
        all.filter(move |record| record.path.parent() == Some(pod))
    }

    /// Forgets a container that is gone once its pod is down again; returns whether it is.
    fn is_forgotten(
        &self,
        container: &Path,
        pod_before: Option<Bytes>,
    ) -> Result<bool, CgroupError> {
        if let Some(before) = pod_before
            && !self.lower_pod(container, before)?
        {
            return Ok(false);
        }
        self.forget(container);
        Ok(true)
    }

    /// Lowers limits that nobody is responsible for any more, but for those that somebody may yet come to be responsible
    /// for; returns whether any is left.
    pub fn lower_left(
        &self,
        is_cared_for: impl Fn(&Path) -> bool,
        is_pending: impl Fn(&Path) -> bool,
    ) -> bool {
        let left = self.all().into_iter();
        let left = left.filter(|left| !is_cared_for(&left.path));
        let mut is_any_left = false;
        for record in left {
            let ByHand {
                path,
                before,
                pod_before,
                ..
            } = record;
            if is_pending(&path) {
                is_any_left = true;
                continue;
            }
            let lowered = match Cgroup::open(&path).and_then(Cgroup::with_likely_heirs) {
                Ok(cgroup) => self.lower(&cgroup, before, || !is_cared_for(&path)),
                Err(error) => Err(error),
            };
            let lowered = match lowered {
                Err(error) if error.is_gone() => self.is_forgotten(&path, pod_before),
                lowered => lowered,
            };
            match lowered {
                Ok(true) => {
                    tracing::info!(path = %path.display(), to = %before, "a limit that was raised by hand is given back");
                }
                Ok(false) => is_any_left = true,
                Err(error) => {
                    is_any_left = true;
                    tracing::warn!(path = %path.display(), %error, "a limit that was raised by hand stays for now");
                }
            }
        }
        is_any_left
    }
}

/// The pod of a container's cgroup and its limit; `None` where it has none.
fn pod_of(container: &Path) -> Result<Option<(Cgroup, Bytes)>, String> {
    let parent = container.parent();
    let name = |path: &Path| {
        path.file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let Some(pod) = parent.filter(|path| attribution::is_a_pod(&name(path))) else {
        return Ok(None);
    };
    let pod = Cgroup::open(pod).map_err(text)?;
    match pod.limit("memory.max").map_err(text)? {
        Limit::At(limit) => Ok(Some((pod, limit))),
        Limit::Max => Ok(None),
    }
}

/// What the containers of a pod may have together. Those without a limit (the sandbox) count for nothing, as with the
/// kubelet.
fn sum_in(pod: &Cgroup, limit_of: impl Fn(&Cgroup, Bytes) -> Bytes) -> Bytes {
    let children = pod.children().filter_map(Result::ok);
    let limits = children.filter_map(|child| match child.limit("memory.max") {
        Ok(Limit::At(limit)) => Some(limit_of(&child, limit)),
        Ok(Limit::Max) | Err(_) => None,
    });
    limits.fold(Bytes::ZERO, Bytes::plus)
}

#[expect(clippy::needless_pass_by_value, reason = "what `map_err` calls")]
fn text(error: impl ToString) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests {
    use std::{env, fs, process};

    use super::*;

    /// A pod with two containers, of files; and what is written down.
    struct Bed {
        directory: PathBuf,
        pod: PathBuf,
        by_hands: ByHands,
    }

    impl Bed {
        fn new(name: &str) -> Self {
            let name = format!("bellows-by-hand-{name}-{}", process::id());
            let directory = env::temp_dir().join(name);
            let pod = directory.join("kubepods").join("pod0f8c-11aa");
            let bed = Self {
                by_hands: ByHands {
                    records: Records::at(directory.join("records")),
                    writing: Arc::default(),
                },
                directory,
                pod,
            };
            for (path, limit) in [("", "96"), ("app", "64"), ("side", "32")] {
                fs::create_dir_all(bed.pod.join(path)).unwrap();
                bed.set(path, limit);
                bed.uses(path, 10);
            }
            fs::create_dir_all(bed.pod.join("pause")).unwrap();
            fs::write(bed.pod.join("pause/memory.max"), "max\n").unwrap();
            bed
        }

        fn set(&self, path: &str, mib: &str) {
            let bytes = mib.parse::<u64>().unwrap() << 20;
            fs::write(self.pod.join(path).join("memory.max"), bytes.to_string()).unwrap();
        }

        fn uses(&self, path: &str, mib: u64) {
            let directory = self.pod.join(path);
            fs::write(directory.join("memory.current"), (mib << 20).to_string()).unwrap();
            fs::write(
                directory.join("memory.stat"),
                "active_file 0\ninactive_file 0\n",
            )
            .unwrap();
        }

        fn cgroup(&self, path: &str) -> Cgroup {
            Cgroup::open(&self.pod.join(path)).unwrap()
        }

        /// Of the pod and its two containers, in MiB.
        fn limits(&self) -> [u64; 3] {
            ["", "app", "side"].map(|path| {
                let limit = self.cgroup(path).limit("memory.max").unwrap();
                limit.bytes().0 >> 20
            })
        }

        fn raise(&self, path: &str, from: u64, to: u64) {
            let cgroup = self.cgroup(path);
            let (from, to) = (Bytes::mib(from), Bytes::mib(to));
            self.by_hands.raise(&cgroup, to, from, true).unwrap();
        }

        fn lower(&self, path: &str, to: u64) -> bool {
            self.by_hands
                .lower(&self.cgroup(path), Bytes::mib(to), || true)
                .unwrap()
        }
    }

    impl Drop for Bed {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.directory).unwrap();
        }
    }

    #[test]
    fn a_pod_goes_up_with_its_container_and_comes_down_with_it() {
        let bed = Bed::new("order");
        bed.raise("app", 64, 256);
        assert_eq!(bed.limits(), [288, 256, 32]);
        bed.raise("app", 64, 512);
        assert_eq!(bed.limits(), [544, 512, 32]);
        bed.uses("app", 100);
        assert!(!bed.lower("app", 64), "usage does not fit");
        assert_eq!(bed.limits(), [544, 512, 32]);
        bed.uses("app", 10);
        assert!(bed.lower("app", 64));
        assert_eq!(bed.limits(), [96, 64, 32]);
        assert_eq!(bed.by_hands.all(), []);
    }

    #[test]
    fn a_pod_is_never_below_what_its_containers_have() {
        let bed = Bed::new("siblings");
        bed.raise("app", 64, 256);
        bed.raise("side", 32, 128);
        assert_eq!(bed.limits(), [384, 256, 128]);
        assert!(bed.lower("app", 64));
        assert_eq!(bed.limits(), [192, 64, 128]);
        assert!(bed.lower("side", 32));
        assert_eq!(bed.limits(), [96, 64, 32]);
    }

    /// Each time it is killed, a container comes back in another cgroup, with the limit of its spec.
    #[test]
    fn a_pod_does_not_grow_with_each_crash_of_its_container() {
        let bed = Bed::new("crashes");
        let (nobody, is_second) = (|_: &Path| false, |path: &Path| path.ends_with("second"));
        let comes = |name: &str| {
            fs::create_dir_all(bed.pod.join(name)).unwrap();
            bed.set(name, "64");
            bed.uses(name, 10);
        };
        let pod = || bed.cgroup("").limit("memory.max").unwrap().bytes().0 >> 20;
        bed.raise("app", 64, 256);
        assert_eq!(pod(), 288);
        fs::remove_dir_all(bed.pod.join("app")).unwrap();
        comes("second");
        bed.raise("second", 64, 256);
        assert_eq!(pod(), 288);
        // What its successor needs is not taken away with it, nor what that may come back to.
        assert!(!bed.by_hands.lower_left(is_second, nobody));
        assert_eq!((pod(), bed.by_hands.all().len()), (288, 1));
        fs::remove_dir_all(bed.pod.join("second")).unwrap();
        bed.uses("", 200);
        assert!(bed.by_hands.lower_left(nobody, nobody), "it is in use");
        assert_eq!((pod(), bed.by_hands.all().len()), (288, 1));
        bed.uses("", 10);
        assert!(!bed.by_hands.lower_left(nobody, nobody));
        assert_eq!((pod(), bed.by_hands.all().len()), (96, 0));
    }

    /// One is raised while another has no cgroup: there is room for both when that comes back.
    #[test]
    fn who_comes_back_finds_room_beside_who_was_raised_meanwhile() {
        let bed = Bed::new("both");
        bed.raise("app", 64, 256);
        bed.raise("side", 32, 128);
        fs::remove_dir_all(bed.pod.join("app")).unwrap();
        assert!(
            !bed.by_hands
                .lower_left(|path| path.ends_with("side"), |_| false)
        );
        let pod = bed.cgroup("").limit("memory.max").unwrap().bytes();
        assert_eq!(pod, Bytes::mib(64 + 128));
    }

    #[test]
    fn one_that_is_about_to_be_started_again_is_counted() {
        let bed = Bed::new("absent");
        fs::remove_dir_all(bed.pod.join("side")).unwrap();
        bed.raise("app", 64, 90);
        let pod = bed.cgroup("").limit("memory.max").unwrap().bytes();
        assert_eq!(pod, Bytes::mib(122));
    }

    #[test]
    fn one_on_its_way_down_stays_ours() {
        let bed = Bed::new("steps");
        bed.raise("app", 64, 512);
        assert!(bed.lower("app", 256));
        assert_eq!(bed.limits()[..2], [288, 256]);
        assert_eq!(bed.by_hands.all().len(), 1);
        assert!(bed.lower("app", 64));
        assert_eq!(bed.limits(), [96, 64, 32]);
        assert_eq!(bed.by_hands.all(), []);
    }

    /// Making room takes seconds, and a burst may begin in the middle.
    #[test]
    fn a_raise_that_comes_while_room_is_made_stays_and_stays_written_down() {
        let bed = Bed::new("overtaken");
        bed.raise("app", 64, 256);
        let before = bed.by_hands.all().remove(0);
        bed.raise("app", 64, 512);
        let after = bed.by_hands.all();
        let (app, to) = (bed.cgroup("app"), Bytes::mib(64));
        let lowered = bed.by_hands.lower_in_room(&app, before, to, || true);
        assert!(!lowered.unwrap());
        assert_eq!(bed.limits(), [544, 512, 32]);
        assert_eq!(bed.by_hands.all(), after);
        // Nor does its owner know it that has taken the one before.
        bed.by_hands.is_known(app.path(), Bytes::mib(256));
        assert_eq!(bed.by_hands.all(), after);
        bed.by_hands.is_known(app.path(), Bytes::mib(512));
        assert_eq!(bed.by_hands.all(), []);
    }

    #[test]
    fn a_pod_that_has_less_than_its_containers_is_made_whole() {
        let bed = Bed::new("whole");
        let app = bed.cgroup("app");
        assert_eq!(bed.by_hands.make_whole(&app), Ok(false));
        assert_eq!(bed.limits(), [96, 64, 32]);
        // It was made anew with what it was about to be raised to.
        bed.set("app", "512");
        assert_eq!(bed.by_hands.make_whole(&app), Ok(true));
        assert_eq!(bed.limits(), [544, 512, 32]);
        assert_eq!(bed.by_hands.all(), []);
        // One without a limit has room.
        fs::write(bed.pod.join("memory.max"), "max\n").unwrap();
        assert_eq!(bed.by_hands.make_whole(&app), Ok(false));
    }

    #[test]
    fn nothing_is_raised_where_the_kubelet_says_on_which_cpus_to_run() {
        let bed = Bed::new("pinned");
        fs::write(bed.pod.join("app/cpuset.cpus"), "1-3\n").unwrap();
        let (app, to) = (bed.cgroup("app"), Bytes::mib(256));
        let raised = bed.by_hands.raise(&app, to, Bytes::mib(64), true);
        assert_eq!(raised, Err(PINNED.to_owned()));
        assert_eq!(bed.limits(), [96, 64, 32]);
        assert_eq!(bed.by_hands.all(), []);
        // What was raised before the kubelet was told so comes down.
        fs::write(bed.pod.join("app/cpuset.cpus"), "\n").unwrap();
        bed.raise("app", 64, 256);
        fs::write(bed.pod.join("app/cpuset.cpus"), "1-3\n").unwrap();
        assert!(bed.lower("app", 64));
        assert_eq!(bed.limits(), [96, 64, 32]);
    }

    /// An agent that ends between writing down and writing.
    #[test]
    fn one_that_was_written_down_and_not_written_is_ours() {
        let bed = Bed::new("torn");
        bed.raise("app", 64, 256);
        bed.raise("app", 64, 512);
        bed.set("app", "256");
        assert!(bed.lower("app", 64));
        assert_eq!(bed.limits(), [96, 64, 32]);
    }

    #[test]
    fn what_somebody_else_has_set_stays() {
        let bed = Bed::new("foreign");
        bed.raise("app", 64, 256);
        bed.set("app", "1024");
        bed.set("", "1056");
        assert!(bed.lower("app", 64));
        assert_eq!(bed.limits(), [1056, 1024, 32]);
        assert_eq!(bed.by_hands.all(), []);
        // Nor is anything lowered that was never raised by hand.
        assert!(bed.lower("side", 16));
        assert_eq!(bed.limits()[2], 32);
    }

    #[test]
    fn what_is_left_is_lowered_unless_somebody_is_responsible_or_may_come_to_be() {
        let bed = Bed::new("left");
        bed.raise("app", 64, 256);
        let (nobody, somebody) = (|_: &Path| false, |_: &Path| true);
        assert!(!bed.by_hands.lower_left(somebody, nobody));
        assert!(bed.by_hands.lower_left(nobody, somebody), "it is left");
        assert_eq!(bed.limits()[1], 256);
        bed.uses("app", 200);
        assert!(bed.by_hands.lower_left(nobody, nobody), "it is in use");
        bed.uses("app", 10);
        assert!(!bed.by_hands.lower_left(nobody, nobody));
        assert_eq!(bed.limits(), [96, 64, 32]);
    }
}
