//! Room for the agent's own state where its file system is full.
//!
//! What cannot be written down is not done, so a `/run` that somebody else has filled would cost containers their
//! lives: their raises are refused. A file of its own is kept there for that time. Whoever finds no room removes it,
//! and has its room then; it is made again when there is plenty.
//!
//! It lies in memory as all of `/run` does. Giving it up must be quick: the thread that reacts may have to. A filler that
//! goes on takes what is given up, too; then nothing helps.

use std::{
    fs::{self, File},
    io,
    path::Path,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use bellows_core::Nanos;
use rustix::fs::{FallocateFlags, fallocate, statvfs};

use crate::{clock::now, metrics::METRICS};

/// The file, beside the ledger.
const RESERVE: &str = "/run/bellows/reserve";
/// Its bytes: thousands of lines of the ledger, or records of a hundred containers, several times.
const SIZE: u64 = 1 << 20;
/// Room that there must be to make it: it must not take the last.
const PLENTY: u64 = 2 * SIZE;
/// How often that is looked at.
const INTERVAL: Nanos = Nanos::millis(5000);

/// Whether this process keeps one.
static IS_KEEPER: AtomicBool = AtomicBool::new(false);
/// Whether it is there.
static IS_KEPT: AtomicBool = AtomicBool::new(false);
static LOOKED_AT: AtomicU64 = AtomicU64::new(0);

/// Keeps a reserve from now on: for who holds the agent's lock. Not having one is no reason not to work.
pub fn keep_reserve() {
    IS_KEEPER.store(true, Ordering::Relaxed);
    if let Err(error) = make(Path::new(RESERVE)) {
        tracing::warn!(%error, "no room can be kept for when /run is full: free memory on it");
    }
}

/// Makes the reserve again if it was given up and there is plenty of room, from time to time.
pub fn renew_reserve() {
    let (at, looked_at) = (now(), Nanos(LOOKED_AT.load(Ordering::Relaxed)));
    if !IS_KEEPER.load(Ordering::Relaxed)
        || IS_KEPT.load(Ordering::Relaxed)
        || at.since(looked_at) < INTERVAL
    {
        return;
    }
    LOOKED_AT.store(at.0, Ordering::Relaxed);
    if let Err(error) = make(Path::new(RESERVE)) {
        tracing::debug!(%error, "/run is still full");
    }
}

fn make(path: &Path) -> io::Result<()> {
    let directory = path.parent().unwrap_or(path);
    fs::create_dir_all(directory)?;
    // A predecessor's is as good.
    if !fs::metadata(path).is_ok_and(|there| there.len() == SIZE) {
        let there = statvfs(directory)?;
        if there.f_bavail.saturating_mul(there.f_frsize) < PLENTY {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let new = path.with_extension("new");
        let reserved = File::create(&new)
            .and_then(|file| Ok(fallocate(&file, FallocateFlags::empty(), 0, SIZE)?))
            .and_then(|()| fs::rename(&new, path));
        if reserved.is_err() {
            // What is there of it takes the last room away from others.
            drop(fs::remove_file(&new));
        }
        reserved?;
    }
    IS_KEPT.store(true, Ordering::Relaxed);
    METRICS.reserve_kept.set(1);
    Ok(())
}

/// Writes something; again, with the reserve given up, if there is no room for it.
///
/// # Errors
///
/// Those of `write`.
pub fn with_reserve<T>(mut write: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    let written = write().or_else(|error| {
        if error.kind() != io::ErrorKind::StorageFull || !IS_KEEPER.load(Ordering::Relaxed) {
            return Err(error);
        }
        // Each thread that needs room removes it: another may have been about to.
        if fs::remove_file(RESERVE).is_ok() {
            METRICS.state_full.inc();
            METRICS.reserve_kept.set(0);
        }
        IS_KEPT.store(false, Ordering::Relaxed);
        write()
    });
    written.inspect_err(|_told_by_the_caller| {
        METRICS.state_failures.inc();
    })
}
