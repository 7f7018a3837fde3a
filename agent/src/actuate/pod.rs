//! A pod's own limit, which follows what its containers have.
//!
//! The steps are core's ([`pod_step`]); here they are taken, one at a time for each pod. A step that fails is taken
//! again by whoever comes next: nothing depends on who began it.
//!
//! Memory goes through systemd where that owns the slice ([`pod_cgroup`]). A CPU quota is written: it must be there
//! within a millisecond, and when systemd sets its own again, the next throttled period brings ours back.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
    sync::{
        Mutex as SyncMutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bellows_core::{
    Amount as _, Bytes, Cpu,
    moved::{MovedLimit, PodStep, pod_step},
};
use thiserror::Error;
use tokio::{sync::Mutex, task::spawn_blocking};

use super::{
    pod_cgroup::{self, PodCgroupError},
    shrink,
};
use crate::{
    cgroup::{Cgroup, CgroupError, Limit},
    originals::{MovedQuota, PodOriginal, PodQuota, Records, key_of},
};

/// Why a pod's limit is not what it should be.
#[derive(Debug, Error)]
pub enum PodError {
    /// A cgroup file.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// It could not be set.
    #[error(transparent)]
    Set(#[from] PodCgroupError),
    /// It could not be written down.
    #[error("{0}")]
    Record(#[from] std::io::Error),
    /// A thread.
    #[error("no thread can be had to make room for a lower limit: {0}")]
    Thread(#[from] tokio::task::JoinError),
}

/// How far a pod's limit may be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum May {
    /// Up only: a container is about to be raised.
    Rise,
    /// Up and down.
    Fall,
}

/// Whose raises are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Containers that are guarded.
    Guarded,
    /// Those that were, too: what is written down of them is read, which takes longer.
    All,
}

/// By how much each container of a pod is raised.
pub type Raised<'a> = &'a (dyn Fn(Who) -> Vec<Bytes> + Send + Sync);

/// What the containers of a pod have of CPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares {
    /// By how much each is raised.
    pub raised: Vec<Cpu>,
    /// What they have together at rest, where a kubelet gives their pod no less.
    pub at_rest: Cpu,
    /// Whether all are meant to be at rest, and whoever owns them knows it: no older quota is on its way.
    pub are_settled: bool,
}

/// By so much what containers have may be rounded up from what their pod has.
const ROUNDING: Cpu = Cpu::millis(10);

/// The cgroup of a pod.
#[derive(Debug)]
pub struct Pod {
    cgroup: Cgroup,
    /// One at a time: what is set takes its time.
    order: Mutex<()>,
    /// `None` while it has no limit.
    limit: SyncMutex<Option<MovedLimit<Bytes>>>,
    /// The same.
    quota: SyncMutex<Option<MovedQuota>>,
    /// Whether a limit was written that systemd does not know: it would set its own at its next reload.
    is_untold: AtomicBool,
    records: PodRecords,
}

/// Where pods are written down.
#[derive(Clone, Debug)]
pub struct PodRecords {
    /// Their memory limits.
    pub limits: Records<PodOriginal>,
    /// Their CPU quotas.
    pub quotas: Records<PodQuota>,
}

impl PodRecords {
    /// Those that live, of all that are written down; those that are gone are removed.
    #[must_use]
    pub fn living(&self) -> Vec<Pod> {
        let limits = self.limits.all().into_iter().map(|pod| pod.path);
        let quotas = self.quotas.all().into_iter().map(|pod| pod.path);
        let paths: BTreeSet<PathBuf> = limits.chain(quotas).collect();
        let living = paths.iter().filter_map(|path| match Cgroup::open(path) {
            Ok(cgroup) => Some(Pod::new(cgroup, self.clone())),
            Err(error) => {
                if error.is_gone() {
                    self.remove(path);
                }
                None
            }
        });
        living.collect()
    }

    fn remove(&self, pod: &Path) {
        self.limits.remove(key_of(pod));
        self.quotas.remove(key_of(pod));
    }
}

impl Pod {
    /// A pod, with what is written down of it.
    #[must_use]
    pub fn new(cgroup: Cgroup, records: PodRecords) -> Self {
        let key = key_of(cgroup.path());
        let limit = records.limits.read(key).map(|recorded| recorded.limit);
        let quota = records.quotas.read(key).map(|recorded| recorded.quota);
        Self {
            cgroup,
            order: Mutex::new(()),
            limit: SyncMutex::new(limit),
            quota: SyncMutex::new(quota),
            is_untold: AtomicBool::new(false),
            records,
        }
    }

    /// Its cgroup.
    #[must_use]
    pub const fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Writes down what the limit is before any of its containers is moved.
    ///
    /// # Errors
    ///
    /// [`PodError`].
    pub fn adopt(&self) -> Result<(), PodError> {
        let mut known = self.limit();
        if let (None, Limit::At(limit)) = (&*known, self.cgroup.limit("memory.max")?) {
            self.write(known.insert(MovedLimit::new(limit)))?;
        }
        Ok(())
    }

    fn limit(&self) -> MutexGuard<'_, Option<MovedLimit<Bytes>>> {
        self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Brings the limit to where it must be for what its containers are raised by. Usage that is too high
    /// for a lower limit is no error: it stays for now.
    ///
    /// # Errors
    ///
    /// [`PodError`].
    pub async fn settle(&self, raised: Raised<'_>, may: May) -> Result<(), PodError> {
        if let PodStep::Lower(to) = self.step(raised, may)? {
            // Without the order: a raise must not wait for it.
            if !self.make_room(to).await? {
                return Ok(());
            }
        }
        let _turn = self.order.lock().await;
        match self.step(raised, may)? {
            PodStep::Raise(to) => self.set(to).await,
            PodStep::Lower(to) if shrink::fits(&self.cgroup, to)? => self.set(to).await,
            PodStep::Lower(_) | PodStep::Keep if may == May::Fall && self.is_untold() => {
                match self.cgroup.limit("memory.max")? {
                    Limit::At(in_force) => self.set(in_force).await,
                    Limit::Max => Ok(()),
                }
            }
            PodStep::Lower(_) | PodStep::Keep | PodStep::Foreign(_) => Ok(()),
        }
    }

    /// Raises the limit by writing it, in nobody's order: where systemd is late a container must not wait for it.
    ///
    /// # Errors
    ///
    /// [`PodError`].
    pub fn raise_by_hand(&self, raised: Raised<'_>) -> Result<(), PodError> {
        if let PodStep::Raise(to) = self.step(raised, May::Rise)? {
            self.ask(to)?;
            self.is_untold.store(true, Ordering::Relaxed);
            self.cgroup.set_limit("memory.max", Limit::At(to))?;
        }
        Ok(())
    }

    /// What is to be done now; what somebody else has set is taken over.
    fn step(&self, raised: Raised<'_>, may: May) -> Result<PodStep<Bytes>, PodError> {
        let mut known = self.limit();
        let Limit::At(in_force) = self.cgroup.limit("memory.max")? else {
            // Whatever it was: it holds everything now.
            *known = None;
            return Ok(PodStep::Keep);
        };
        let limit = known.get_or_insert_with(|| MovedLimit::new(in_force));
        let mut step = pod_step(limit, in_force, raised(Who::Guarded));
        if let PodStep::Foreign(theirs) = step {
            tracing::info!(path = %self.cgroup.path().display(), %theirs, "the limit of a pod was changed by somebody else, which is the new original");
            *limit = MovedLimit::new(theirs);
            self.write(limit)?;
            step = pod_step(limit, in_force, raised(Who::Guarded));
        }
        if step == PodStep::Keep && in_force == limit.at_rest && !limit.asked.is_empty() {
            limit.rest();
            self.write(limit)?;
        }
        if matches!(step, PodStep::Lower(_)) {
            if may == May::Rise {
                return Ok(PodStep::Keep);
            }
            step = pod_step(limit, in_force, raised(Who::All));
        }
        Ok(step)
    }

    /// Writes down what will be asked for, before it is.
    fn ask(&self, to: Bytes) -> Result<(), PodError> {
        let mut known = self.limit();
        let in_force = self.cgroup.limit("memory.max")?.bytes();
        if let Some(limit) = &mut *known {
            limit.ask(to, in_force);
            self.write(limit)?;
        }
        Ok(())
    }

    async fn set(&self, to: Bytes) -> Result<(), PodError> {
        self.ask(to)?;
        // What is written by hand meanwhile is to be told again.
        let was_untold = self.is_untold.swap(false, Ordering::Relaxed);
        let set = pod_cgroup::set_limit(&self.cgroup, to).await;
        self.is_untold
            .fetch_or(was_untold && set.is_err(), Ordering::Relaxed);
        Ok(set?)
    }

    fn is_untold(&self) -> bool {
        self.is_untold.load(Ordering::Relaxed)
    }

    async fn make_room(&self, to: Bytes) -> Result<bool, PodError> {
        let cgroup = self.cgroup.clone();
        Ok(spawn_blocking(move || shrink::make_room_in(&cgroup, to)).await??)
    }

    fn write(&self, limit: &MovedLimit<Bytes>) -> std::io::Result<()> {
        self.records.limits.write(&PodOriginal {
            limit: limit.clone(),
            path: self.cgroup.path().to_owned(),
        })
    }

    /// Brings the CPU quota to where it must be for what its containers have.
    ///
    /// # Errors
    ///
    /// [`PodError`].
    pub fn settle_quota(&self, shares: impl FnOnce() -> Shares, may: May) -> Result<(), PodError> {
        let mut known = self.quota.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(in_force) = self.cgroup.quota()? else {
            *known = None;
            return Ok(());
        };
        let quota = known.get_or_insert_with(|| MovedQuota::new(in_force));
        // systemd rounds what it sets.
        let own = quota.meant_by(in_force).unwrap_or_else(|| {
            *quota = MovedQuota::new(in_force);
            in_force.cpu
        });
        let Shares {
            mut raised,
            at_rest,
            are_settled,
        } = shares();
        // The kubelet's new one may be the same as one of ours, and be taken for that.
        let short = at_rest.minus(quota.cpu.at_rest);
        raised.extend(Some(short).filter(|&short| short > ROUNDING));
        let to = match pod_step(&quota.cpu, own, raised) {
            PodStep::Raise(to) => to,
            PodStep::Lower(to) if may == May::Fall => to,
            PodStep::Lower(_) | PodStep::Keep | PodStep::Foreign(_) => own,
        };
        if to != own {
            let wanted = in_force.with(to);
            quota.cpu.ask(wanted.cpu, in_force.cpu);
            self.write_quota(quota)?;
            self.cgroup.set_quota(wanted)?;
        }
        if to == quota.cpu.at_rest && are_settled && !quota.cpu.asked.is_empty() {
            quota.cpu.rest();
            self.write_quota(quota)?;
        }
        Ok(())
    }

    fn write_quota(&self, quota: &MovedQuota) -> std::io::Result<()> {
        self.records.quotas.write(&PodQuota {
            quota: quota.clone(),
            path: self.cgroup.path().to_owned(),
        })
    }

    /// Forgets a pod none of whose containers is guarded, once it is at rest or gone; returns whether it is.
    pub fn is_left(&self) -> bool {
        let is_left = self.has_limit_at_rest() && self.has_quota_at_rest();
        if is_left {
            self.records.remove(self.cgroup.path());
        }
        is_left
    }

    fn has_limit_at_rest(&self) -> bool {
        let known = self.limit();
        match (self.cgroup.limit("memory.max"), &*known) {
            (Ok(Limit::At(in_force)), Some(limit)) => in_force == limit.at_rest,
            (Ok(_), _) => true,
            (Err(error), _) => error.is_gone(),
        }
    }

    fn has_quota_at_rest(&self) -> bool {
        let known = self.quota.lock().unwrap_or_else(PoisonError::into_inner);
        match (self.cgroup.quota(), &*known) {
            (Ok(Some(in_force)), Some(quota)) => in_force.cpu == quota.cpu.at_rest,
            // Without the controller there is no quota.
            (Ok(_) | Err(_), _) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{env, fs, process};

    use super::*;

    /// A directory that looks like a pod's cgroup.
    struct Bed {
        directory: PathBuf,
        pod: Pod,
    }

    impl Bed {
        fn new(name: &str, file: &str, limit: &str) -> Self {
            let name = format!("bellows-pod-{name}-{}", process::id());
            let directory = env::temp_dir().join(name);
            let path = directory.join("pod0f8c");
            fs::create_dir_all(&path).unwrap();
            fs::write(path.join(file), limit).unwrap();
            let records = PodRecords {
                limits: Records::at(directory.join("limits")),
                quotas: Records::at(directory.join("quotas")),
            };
            let pod = Pod::new(Cgroup::open(&path).unwrap(), records);
            Self { directory, pod }
        }
    }

    impl Drop for Bed {
        fn drop(&mut self) {
            drop(fs::remove_dir_all(&self.directory));
        }
    }

    /// With its next reload systemd sets the limit that it knows, and the pod kills who was raised.
    #[tokio::test]
    async fn what_was_raised_by_hand_is_told_afterwards() {
        let bed = Bed::new("told", "memory.max", &Bytes::mib(96).0.to_string());
        let pod = &bed.pod;
        pod.adopt().unwrap();
        let raised = |_| vec![Bytes::mib(32)];
        pod.raise_by_hand(&raised).unwrap();
        assert!(pod.is_untold());
        // Nobody who is to be raised waits for that.
        pod.settle(&raised, May::Rise).await.unwrap();
        assert!(pod.is_untold());
        pod.settle(&raised, May::Fall).await.unwrap();
        assert!(!pod.is_untold());
        let limit = pod.cgroup.limit("memory.max").unwrap();
        assert_eq!(limit, Limit::At(Bytes::mib(128)));
    }

    #[test]
    fn a_kubelets_new_quota_is_not_taken_for_ours() {
        let bed = Bed::new("quota", "cpu.max", "50000 100000\n");
        let pod = &bed.pod;
        let shares = |raised, at_rest, are_settled| Shares {
            raised: vec![Cpu::millis(raised)],
            at_rest: Cpu::millis(at_rest),
            are_settled,
        };
        let quota = || pod.cgroup.quota().unwrap().unwrap().cpu;
        let settled = |shares: Shares| {
            pod.settle_quota(|| shares, May::Fall).unwrap();
            quota()
        };
        let sets = |text| fs::write(pod.cgroup.path().join("cpu.max"), text).unwrap();
        assert_eq!(settled(shares(500, 500, false)), Cpu::millis(1000));
        assert_eq!(settled(shares(0, 500, false)), Cpu::millis(500));
        // What it was told of the raise it may still set.
        sets("100000 100000\n");
        assert_eq!(settled(shares(0, 500, false)), Cpu::millis(500));
        assert_eq!(settled(shares(0, 500, true)), Cpu::millis(500));
        sets("100000 100000\n");
        assert_eq!(settled(shares(0, 0, true)), Cpu::millis(1000));
        // In the middle of a burst it is the same as ours, and its containers have as much.
        assert_eq!(settled(shares(500, 1000, false)), Cpu::millis(1500));
        sets("150000 100000\n");
        assert_eq!(settled(shares(0, 1500, true)), Cpu::millis(1500));
        assert_eq!(settled(shares(500, 1500, false)), Cpu::millis(2000));
        assert_eq!(settled(shares(0, 1005, true)), Cpu::millis(1000));
    }
}
