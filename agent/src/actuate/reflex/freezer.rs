//! Freezing and thawing, on a thread of its own.
//!
//! The kernel takes `cgroup_mutex` for a write to `cgroup.freeze` (`cgroup_freeze_write`, kernel/cgroup/cgroup.c), and
//! whoever moves a process into a cgroup holds that for a grace period of RCU (`cgroup_attach_lock`, which takes the
//! writer's side of `cgroup_threadgroup_rwsem`): each container that starts, and each probe that executes something.
//! Measured on 6.12 beside eight of them a second, one write of a hundred takes 20 ms and more, which is all of the way
//! from a watermark to the OOM killer; a write to `memory.high`, which does not take it (nor does one to `memory.max`),
//! took 0.9 ms at most. So the reflex says what it wants, and goes on: whoever grows while the freeze is late is braked.
//!
//! What is wanted is a state and no queue of orders: a thaw that overtakes its freeze leaves nothing to write. Only what
//! was frozen here is thawed here. Whoever is not guarded any more is forgotten when it is thawed, and not before: a
//! successor releases what was not forgotten, and nothing else.

use std::{
    io,
    sync::{
        Arc, Mutex, PoisonError, TryLockError,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{self, SyncSender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bellows_core::{CgroupId, Nanos};

use crate::{
    cgroup::{Cgroup, CgroupError, Control},
    clock::now,
    priority,
};

/// Cgroups that may wait for the thread; each waits once.
const WAITING: usize = 1024;
/// How often, and after which times, a thaw is tried again.
const THAWS: usize = 3;
const THAW_AGAIN: Duration = Duration::from_millis(10);

/// What the thread has to tell.
pub(super) enum Told {
    /// What is wanted could not be written.
    Failed(CgroupId, CgroupError),
    /// One that leaves is thawed.
    Left(CgroupId),
}

/// The freezer of one cgroup: what is wanted of it, and what was written.
#[derive(Debug)]
pub(super) struct Freeze {
    cgroup: CgroupId,
    /// Held from a look at what is wanted until that is written: nobody writes what is no longer wanted.
    control: Mutex<Control>,
    is_wanted: AtomicBool,
    is_waiting: AtomicBool,
    /// Whether it is to be told when what is wanted is written.
    leaves: AtomicBool,
    /// When it was frozen, in nanoseconds; 0 while it is not.
    frozen_at: AtomicU64,
}

impl Freeze {
    pub(super) fn open(cgroup: &Cgroup) -> Result<Self, CgroupError> {
        Ok(Self {
            cgroup: cgroup.id(),
            control: Mutex::new(Control::open(cgroup, "cgroup.freeze")?),
            is_wanted: AtomicBool::new(false),
            is_waiting: AtomicBool::new(false),
            leaves: AtomicBool::new(false),
            frozen_at: AtomicU64::new(0),
        })
    }

    /// Since when the kernel freezes it; its threads may still be on their way.
    pub(super) fn frozen_at(&self) -> Option<Nanos> {
        let at = self.frozen_at.load(Ordering::Acquire);
        (at > 0).then_some(Nanos(at))
    }

    /// Writes what is wanted, if that is not so yet. May wait for `cgroup_mutex`.
    pub(super) fn settle(&self) -> Result<(), CgroupError> {
        // Whoever panicked has left a file behind, which is as good as before.
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        let is_wanted = self.is_wanted.load(Ordering::Acquire);
        if is_wanted == self.frozen_at().is_some() {
            return Ok(());
        }
        control.set_flag(is_wanted)?;
        let at = if is_wanted { now().0 } else { 0 };
        self.frozen_at.store(at, Ordering::Release);
        Ok(())
    }

    /// Whether it is thawed, and nobody is about to write otherwise. Never waits.
    fn is_thawed(&self) -> bool {
        let is_free = !matches!(self.control.try_lock(), Err(TryLockError::WouldBlock));
        is_free && self.frozen_at().is_none()
    }

    /// The same as [`Freeze::settle`]; a thaw that fails is tried again, for nobody else will.
    fn settle_at_last(&self) -> Result<(), CgroupError> {
        for _ in 0..THAWS {
            match self.settle() {
                Err(error) if !error.is_gone() && !self.is_wanted.load(Ordering::Acquire) => {
                    thread::sleep(THAW_AGAIN);
                }
                settled => return settled,
            }
        }
        self.settle()
    }

    /// Thaws it, and returns when that is written. May wait for `cgroup_mutex`.
    pub(super) fn release(&self) -> Result<(), CgroupError> {
        self.is_wanted.store(false, Ordering::Release);
        self.settle()
    }
}

/// The thread; it writes what is still wanted, and ends, when this is dropped.
pub(super) struct Freezer {
    waiting: Option<SyncSender<Arc<Freeze>>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Freezer {
    fn drop(&mut self) {
        self.end();
    }
}

impl Freezer {
    /// Starts it.
    pub(super) fn start(tell: impl Fn(Told) + Send + 'static) -> io::Result<Self> {
        let (waiting, receiver) = mpsc::sync_channel::<Arc<Freeze>>(WAITING);
        let thread = thread::Builder::new()
            .name("freezer".to_owned())
            .spawn(move || {
                if let Err(error) = priority::try_real_time(priority::FREEZER) {
                    tracing::debug!(%error, "no real-time priority for the freezer");
                }
                for freeze in receiver {
                    // Before the look at what is wanted: who wants something else after it waits again, and what was wanted
                    // by who has found it waiting is seen.
                    freeze.is_waiting.swap(false, Ordering::AcqRel);
                    let leaves = freeze.leaves.swap(false, Ordering::AcqRel);
                    match freeze.settle_at_last() {
                        Err(error) if !error.is_gone() => tell(Told::Failed(freeze.cgroup, error)),
                        _ if leaves => tell(Told::Left(freeze.cgroup)),
                        _ => {}
                    }
                }
            })?;
        Ok(Self {
            waiting: Some(waiting),
            thread: Some(thread),
        })
    }

    /// Ends the thread, and returns when all is written.
    pub(super) fn end(&mut self) {
        self.waiting = None;
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the freezer's thread panicked");
        }
    }

    /// One whose thread never comes to write.
    #[cfg(test)]
    pub(super) fn stuck() -> (Self, mpsc::Receiver<Arc<Freeze>>) {
        Self::without_thread(4)
    }

    #[cfg(test)]
    fn without_thread(room: usize) -> (Self, mpsc::Receiver<Arc<Freeze>>) {
        let (waiting, queue) = mpsc::sync_channel(room);
        let freezer = Self {
            waiting: Some(waiting),
            thread: None,
        };
        (freezer, queue)
    }

    /// Asks for a freeze; never waits. Returns whether it comes: where there is no room it does not.
    pub(super) fn freeze(&self, freeze: &Arc<Freeze>) -> bool {
        freeze.is_wanted.store(true, Ordering::Release);
        let comes = self.ask(freeze);
        if !comes {
            freeze.is_wanted.store(false, Ordering::Release);
        }
        comes
    }

    /// Asks for a thaw, which comes in any case.
    pub(super) fn thaw(&self, freeze: &Arc<Freeze>) -> Result<(), CgroupError> {
        freeze.is_wanted.store(false, Ordering::Release);
        if self.ask(freeze) {
            Ok(())
        } else {
            freeze.settle()
        }
    }

    /// Asks for the thaw of one that is not guarded any more. Returns whether it is thawed already; if not, it is told when it
    /// is. Never waits where there is room.
    pub(super) fn leave(&self, freeze: &Arc<Freeze>) -> Result<bool, CgroupError> {
        freeze.is_wanted.store(false, Ordering::Release);
        if freeze.is_thawed() {
            return Ok(true);
        }
        freeze.leaves.store(true, Ordering::Release);
        if self.ask(freeze) {
            return Ok(false);
        }
        freeze.leaves.store(false, Ordering::Release);
        freeze.settle().map(|()| true)
    }

    fn ask(&self, freeze: &Arc<Freeze>) -> bool {
        if freeze.is_waiting.swap(true, Ordering::AcqRel) {
            return true;
        }
        let waiting = self.waiting.as_ref();
        let is_queued = waiting.is_some_and(|waiting| waiting.try_send(Arc::clone(freeze)).is_ok());
        if !is_queued {
            freeze.is_waiting.store(false, Ordering::Release);
        }
        is_queued
    }
}

#[cfg(test)]
mod tests {
    use std::{env, fs, process};

    use super::*;

    /// A cgroup's freezer on a directory of this name.
    fn stand_in(name: &str) -> (std::path::PathBuf, Arc<Freeze>) {
        let directory = env::temp_dir().join(format!("bellows-freezer-{name}-{}", process::id()));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("cgroup.freeze"), "0").unwrap();
        let freeze = Freeze::open(&Cgroup::stand_in(&directory, CgroupId(7))).unwrap();
        (directory, Arc::new(freeze))
    }

    #[test]
    fn only_what_is_still_wanted_is_written() {
        let (directory, freeze) = stand_in("wanted");
        let content = || fs::read_to_string(directory.join("cgroup.freeze")).unwrap();
        let (freezer, queue) = Freezer::stuck();
        assert!(freezer.freeze(&freeze));
        freezer.thaw(&freeze).unwrap();
        assert_eq!(queue.try_iter().count(), 1);
        freeze.settle().unwrap();
        assert_eq!(content(), "0");
        assert_eq!(freeze.frozen_at(), None);
        assert!(freezer.freeze(&freeze));
        freeze.settle().unwrap();
        assert_eq!(content(), "1");
        assert!(freeze.frozen_at().is_some());
        freeze.release().unwrap();
        assert_eq!(content(), "0");
        // What somebody else has frozen stays so.
        fs::write(directory.join("cgroup.freeze"), "1").unwrap();
        freeze.release().unwrap();
        assert_eq!(content(), "1");
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_thaw_comes_where_there_is_no_room_for_it() {
        let (directory, freeze) = stand_in("full");
        let (other, first) = stand_in("first");
        let (freezer, queue) = Freezer::without_thread(1);
        assert!(freezer.freeze(&freeze));
        freeze.settle().unwrap();
        drop(queue.recv().unwrap());
        freeze.is_waiting.store(false, Ordering::Release);
        assert!(freezer.freeze(&first));
        freezer.thaw(&freeze).unwrap();
        assert_eq!(
            fs::read_to_string(directory.join("cgroup.freeze")).unwrap(),
            "0"
        );
        // Nor does a freeze wait for room.
        assert!(!freezer.freeze(&freeze));
        freeze.settle().unwrap();
        assert_eq!(freeze.frozen_at(), None);
        fs::remove_dir_all(directory).unwrap();
        fs::remove_dir_all(other).unwrap();
    }

    #[test]
    fn the_thread_writes_what_it_is_asked_for() {
        let (directory, freeze) = stand_in("thread");
        let (told, left) = mpsc::channel();
        let freezer = Freezer::start(move |it| told.send(it).unwrap()).unwrap();
        let is = |wanted: &str| {
            let start = now();
            while fs::read_to_string(directory.join("cgroup.freeze")).unwrap() != wanted {
                assert!(
                    now().since(start) < Nanos::millis(3000),
                    "it is never {wanted}"
                );
                thread::sleep(Duration::from_millis(1));
            }
        };
        assert!(freezer.freeze(&freeze));
        is("1");
        freezer.thaw(&freeze).unwrap();
        is("0");
        // One that leaves is told of when it is thawed.
        assert!(freezer.freeze(&freeze));
        is("1");
        while !freezer.leave(&freeze).unwrap() {
            let told = left.recv_timeout(Duration::from_secs(3)).unwrap();
            assert!(matches!(told, Told::Left(CgroupId(7))));
            is("0");
        }
        assert!(left.try_recv().is_err());
        // Whatever is wanted is written before the thread ends.
        assert!(freezer.freeze(&freeze));
        freezer.thaw(&freeze).unwrap();
        drop(freezer);
        is("0");
        fs::remove_dir_all(&directory).unwrap();
    }
}
