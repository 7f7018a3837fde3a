//! One agent a node, and somebody who notices its death.
//!
//! The agent holds a lock (`flock`) for as long as it lives. The kernel frees it however the agent
//! ends: a signal, a panic, the death of its container's first process, `cgroup.kill`. So the same lock
//! keeps two agents from acting at once, and tells the releaser, which waits for it in another
//! container, of the death within microseconds, without polling and without a process id that another
//! container could not see.
//!
//! It cannot tell of an agent that is stopped or frozen: the [`super::supervisor`] can of the former.

use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{FlockOperation, flock},
    io::Errno,
};
use signal_hook::consts::SIGTERM;

use crate::{explain::LEDGER, ledger, recover::recover};

const LOCK: &str = "/run/bellows/run.lock";
/// How long an agent waits for its predecessor's end, or for a releaser at work.
const PATIENCE: Duration = Duration::from_secs(5);
const TRY_AGAIN: Duration = Duration::from_millis(20);
/// Who keeps the lock for so long after a death is no dying agent.
const OTHERS: Duration = Duration::from_millis(500);
/// Above every other descriptor of the agent, below every usual limit.
pub(super) const HIGH: i32 = 900;
/// How often the releaser looks whether an agent has come.
const NO_AGENT: Duration = Duration::from_millis(500);

/// Held by the living agent.
#[derive(Debug)]
pub(super) struct AgentLock {
    _file: File,
}

impl AgentLock {
    /// Takes the lock; `None` if another agent keeps it.
    pub(super) fn take() -> io::Result<Option<Self>> {
        let Some(file) = taken_within(PATIENCE)? else {
            return Ok(None);
        };
        Ok(Some(Self {
            _file: last(&file)?,
        }))
    }
}

/// The same file under a high number, and no other. The kernel closes a dying process's files from the
/// last to the first (`close_files` queues them as task work, which runs backwards), and taking a kernel
/// program off its function takes tenths of a second: what tells of the death must not wait for that.
pub(super) fn last(file: &impl AsFd) -> io::Result<File> {
    let high = rustix::io::fcntl_dupfd_cloexec(file, HIGH)?;
    Ok(File::from(high))
}

/// Takes the lock after the death of who has held it; `None` where somebody else keeps it: who does that has released all
/// that was left, or is at it, and writes ledgers of its own.
pub(super) fn after_death() -> io::Result<Option<File>> {
    taken_within(OTHERS)
}

fn taken_within(patience: Duration) -> io::Result<Option<File>> {
    let file = open()?;
    let start = Instant::now();
    while !try_lock(&file)? {
        if start.elapsed() >= patience {
            return Ok(None);
        }
        thread::sleep(TRY_AGAIN);
    }
    Ok(Some(file))
}

fn open() -> io::Result<File> {
    fs::create_dir_all(ledger::DIRECTORY)?;
    File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(LOCK)
}

fn try_lock(file: &File) -> io::Result<bool> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(true),
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// The body of `bellows releaser`: releases whatever an agent leaves when it dies, for ever. What it cannot
/// release it tries again: it must not end where the next death would find nobody. Told to end (SIGTERM), it
/// does so with the agent beside it, which is told at the same time: a pod that waits for it keeps its successor away.
///
/// # Errors
///
/// When the lock cannot be used.
pub fn release_after_agents() -> io::Result<()> {
    let is_ending = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(SIGTERM, Arc::clone(&is_ending))?;
    let mut is_released = false;
    loop {
        let file = open()?;
        let nobody_lives = try_lock(&file)?;
        if !nobody_lives {
            // Returns at the agent's death, at the latest moment at which it could still act.
            flock(&file, FlockOperation::LockExclusive)?;
            is_released = false;
        }
        // What is released once stays released until an agent has begun a ledger.
        if !is_released || Path::new(LEDGER).exists() {
            match recover(Path::new(LEDGER)) {
                Ok(recovered) => {
                    tracing::info!(?recovered, "no agent runs: released what the last one held");
                    is_released = true;
                }
                Err(error) => tracing::error!(%error, "the ledger cannot be read: tried again"),
            }
        }
        drop(file);
        if is_released && is_ending.load(Ordering::Relaxed) {
            return Ok(());
        }
        if nobody_lives {
            thread::sleep(NO_AGENT);
        }
    }
}
