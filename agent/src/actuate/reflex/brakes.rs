//! Setting a brake below usage, on a thread of its own.
//!
//! Such a write takes effect at once and then reclaims in the writer until usage is below it, or until
//! that is hopeless (`memory_high_write`, mm/memcontrol.c): milliseconds to seconds, in which the reflex
//! must not be away. A brake that comes too late is worse than none, so each job carries the state of
//! its row when it was asked for: if that has moved on, the brake is lifted again and the reflex asked to
//! put it where it belongs.

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

use super::{PRIORITY, try_real_time};
use crate::cgroup::{Control, Limit};

/// Jobs that may wait; more are not needed: the next charge asks again.
const WAITING: usize = 64;

/// Moves on whenever what was asked for before is no longer wanted.
#[derive(Debug, Clone, Default)]
pub(super) struct Epoch(Arc<AtomicU64>);

impl Epoch {
    pub(super) fn next(&self) {
        self.0.fetch_add(1, Ordering::AcqRel);
    }

    fn now(&self) -> u64 {
        self.0.load(Ordering::Acquire)
    }
}

struct Job {
    cgroup: CgroupId,
    control: Arc<Control>,
    high: Bytes,
    epoch: Epoch,
    asked_in: u64,
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
                // It has work only while somebody grows into the last percent of a limit, and reclaims then:
                // the reflex must be able to interrupt it.
                if let Err(error) = try_real_time(PRIORITY - 1) {
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
        let job = Job {
            cgroup,
            control: Arc::clone(control),
            high,
            epoch: epoch.clone(),
            asked_in: epoch.now(),
        };
        self.jobs.try_send(job).is_ok()
    }
}

impl Job {
    /// Whether the brake stands, or was not wanted any more before it was set.
    fn set(&self) -> bool {
        if self.epoch.now() != self.asked_in {
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
