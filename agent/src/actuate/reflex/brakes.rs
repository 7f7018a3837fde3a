//! Setting a brake below usage, on a thread of its own.
//!
//! Such a write takes effect at once and then reclaims in the writer until usage is below it, or until
//! that is hopeless (`memory_high_write`, mm/memcontrol.c): milliseconds to seconds, in which the reflex
//! must not be away. A brake that comes too late is worse than none, so each job carries the state of
//! its row when it was asked for: if that has moved on, the brake is lifted again and the reflex asked to
//! put it where it belongs. One that has been asked for anew meanwhile is left out: other containers wait.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, SyncSender},
    },
    thread,
};

use bellows_core::{Bytes, CgroupId};

use crate::{
    cgroup::{Control, Limit},
    priority,
};

/// Jobs that may wait; more are not needed: the next charge asks again.
const WAITING: usize = 64;

/// What a row still wants of its jobs.
#[derive(Debug, Clone, Default)]
pub(super) struct Epoch(Arc<Counters>);

#[derive(Debug, Default)]
struct Counters {
    /// Moves on whenever what was asked for before is no longer wanted.
    epoch: AtomicU64,
    /// Jobs asked for.
    jobs: AtomicU64,
}

impl Epoch {
    pub(super) fn next(&self) {
        self.0.epoch.fetch_add(1, Ordering::AcqRel);
    }

    fn now(&self) -> u64 {
        self.0.epoch.load(Ordering::Acquire)
    }

    fn next_job(&self) -> u64 {
        self.0.jobs.fetch_add(1, Ordering::AcqRel) + 1
    }

    /// The one before is the latest again; only the reflex asks for jobs.
    fn take_back_job(&self) {
        self.0.jobs.fetch_sub(1, Ordering::AcqRel);
    }

    fn latest_job(&self) -> u64 {
        self.0.jobs.load(Ordering::Acquire)
    }
}

struct Job {
    cgroup: CgroupId,
    control: Arc<Control>,
    high: Bytes,
    epoch: Epoch,
    asked_in: u64,
    number: u64,
}

/// The thread; it ends when this is dropped.
pub(super) struct Brakes {
    jobs: SyncSender<Job>,
}

impl Brakes {
    /// Starts it. `put_back` is told of a cgroup whose brake came too late.
    pub(super) fn start(put_back: impl Fn(CgroupId) + Send + 'static) -> io::Result<Self> {
        let (jobs, receiver) = mpsc::sync_channel::<Job>(WAITING);
        thread::Builder::new()
            .name("brakes".to_owned())
            .spawn(move || {
                // It has work only while somebody grows into the last percent of a limit, and reclaims then.
                if let Err(error) = priority::try_real_time(priority::BRAKES) {
                    tracing::debug!(%error, "no real-time priority for the brakes");
                }
                for job in receiver {
                    if !job.set() {
                        put_back(job.cgroup);
                    }
                }
            })?;
        Ok(Self { jobs })
    }

    /// Asks for a brake, and says whether it will come; never waits.
    pub(super) fn set(
        &self,
        cgroup: CgroupId,
        control: &Arc<Control>,
        high: Bytes,
        epoch: &Epoch,
    ) -> bool {
        let job = Job::new(cgroup, control, high, epoch);
        let is_queued = self.jobs.try_send(job).is_ok();
        if !is_queued {
            epoch.take_back_job();
        }
        is_queued
    }
}

impl Job {
    fn new(cgroup: CgroupId, control: &Arc<Control>, high: Bytes, epoch: &Epoch) -> Self {
        Self {
            cgroup,
            control: Arc::clone(control),
            high,
            epoch: epoch.clone(),
            asked_in: epoch.now(),
            number: epoch.next_job(),
        }
    }

    /// Whether the brake stands, or was not wanted any more before it was set.
    fn set(&self) -> bool {
        if self.epoch.now() != self.asked_in || self.epoch.latest_job() != self.number {
            return true;
        }
        if let Err(error) = self.control.set(Limit::At(self.high)) {
            tracing::debug!(%error, "a brake could not be set");
        }
        if self.epoch.now() == self.asked_in {
            return true;
        }
        if let Err(error) = self.control.set(Limit::Max) {
            tracing::debug!(%error, "a late brake could not be lifted");
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use std::{env, fs, process};

    use super::*;
    use crate::cgroup::Cgroup;

    #[test]
    fn only_the_latest_brake_is_set() {
        let directory = env::temp_dir().join(format!("bellows-brakes-{}", process::id()));
        fs::create_dir_all(&directory).unwrap();
        let file = directory.join("memory.high");
        fs::write(&file, "max").unwrap();
        let content = || fs::read_to_string(&file).unwrap();
        let cgroup = Cgroup::stand_in(&directory, CgroupId(7));
        let control = Arc::new(Control::open(&cgroup, "memory.high").unwrap());
        let epoch = Epoch::default();
        let job = |mib| Job::new(cgroup.id(), &control, Bytes::mib(mib), &epoch);
        let jobs = [40, 30].map(job);
        assert!(jobs[0].set());
        assert_eq!(content(), "max");
        assert!(jobs[1].set());
        assert_eq!(content(), Bytes::mib(30).0.to_string());
        // One that found no room in the queue makes nothing of the one before.
        drop(job(20));
        epoch.take_back_job();
        fs::write(&file, "max").unwrap();
        assert!(jobs[1].set());
        assert_eq!(content(), Bytes::mib(30).0.to_string());
        // Nor any whose hold has ended.
        fs::write(&file, "max").unwrap();
        epoch.next();
        assert!(jobs[1].set());
        assert_eq!(content(), "max");
        fs::remove_dir_all(&directory).unwrap();
    }
}
