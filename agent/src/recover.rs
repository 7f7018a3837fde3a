//! What a dead agent left behind: brakes and holds, lifted before anything else is done.
//!
//! An agent that was killed cannot release what it held. Its ledger names every cgroup that it
//! guarded; those that it did not forget are released at once, by whoever learns of its death first:
//! its parent, the releaser beside it, or its successor before that loads kernel programs or asks the
//! API, because processes may stand still. Doing it twice does no harm. Limits stay as they are: who
//! adopts the container next knows its original and lowers it when its burst is over.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use bellows_core::CgroupId;

use crate::{
    actuate::squeeze,
    cgroup::{Cgroup, CgroupError, Limit},
    ledger::{self, Contents, Record},
    originals::Records,
    parallel,
};

/// What was found and done.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// Cgroups whose brake and hold were lifted.
    pub released: usize,
    /// Processes that were paused, and go on.
    pub resumed: usize,
    /// Lines of the ledger that were torn or damaged.
    pub unreadable: usize,
}

/// Releases everything that the ledger at `path` holds, and puts the ledger aside: only for who holds the
/// agent's lock, since the next agent begins a ledger under the same name.
///
/// # Errors
///
/// When the ledger exists but cannot be read or put aside.
pub fn recover(path: &Path) -> io::Result<Recovered> {
    let recovered = release_all(path)?;
    match fs::rename(path, ledger::previous(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(recovered),
    }
}

/// Releases everything that the ledger at `path` holds, and leaves the ledger to whoever else does the
/// same at the same time.
///
/// # Errors
///
/// When the ledger exists but cannot be read.
pub fn release_all(path: &Path) -> io::Result<Recovered> {
    let contents = match read_if_there(path)? {
        Some(contents) => contents,
        // The predecessor died between putting its ledger aside and beginning the next.
        None => read_if_there(&ledger::previous(path))?.unwrap_or_default(),
    };
    let guarded = left_by(&contents.records);
    for Left { path, braked, .. } in guarded.values() {
        let released = if *braked { release(path) } else { thaw(path) };
        if let Err(error) = released {
            tracing::error!(path = %path.display(), %error, "a predecessor's brake cannot be lifted");
        }
    }
    squeeze::let_go_all(&Records::squeezed(path));
    // After the holds: what fails here must not keep anybody held.
    let resumed = parallel::resume_all(&ledger::paused(path)).unwrap_or_else(|error| {
        tracing::error!(%error, "those that a predecessor has paused may stay so");
        0
    });
    Ok(Recovered {
        released: guarded.len(),
        resumed,
        unreadable: contents.unreadable,
    })
}

/// What records say that a dead agent has left behind.
fn left_by(records: &[Record]) -> BTreeMap<CgroupId, Left> {
    let mut guarded: BTreeMap<CgroupId, Left> = BTreeMap::new();
    for record in records {
        match record {
            Record::Adopt { cgroup, path, .. } => {
                let left = guarded.entry(*cgroup).or_insert_with(|| Left {
                    path: path.clone(),
                    braked: false,
                    forgotten: false,
                });
                left.forgotten = false;
            }
            Record::Brake {
                cgroup, foreign, ..
            } => {
                if let Some(left) = guarded.get_mut(cgroup) {
                    left.braked = !foreign;
                    left.forgotten = false;
                }
            }
            Record::Forget { cgroup, .. } => {
                if let Some(left) = guarded.get_mut(cgroup) {
                    left.forgotten = true;
                    left.braked = false;
                }
            }
            Record::Intend { .. }
            | Record::Verify { .. }
            | Record::Waits { .. }
            | Record::Bounded { .. }
            | Record::Pause { .. }
            | Record::Resume { .. }
            | Record::Tokens { .. }
            | Record::Lends { .. }
            | Record::Observe { .. }
            | Record::WouldRaise { .. }
            | Record::ObservedKill { .. }
            | Record::Request { .. }
            | Record::RequestFailed { .. }
            | Record::Owed { .. }
            | Record::Unwatch { .. } => {}
        }
    }
    guarded.retain(|_, left| !left.forgotten);
    guarded
}

/// A cgroup that a dead agent guarded.
struct Left {
    path: PathBuf,
    /// Whether its brake may have been moved by us.
    braked: bool,
    /// One that is adopted again at once may be so before it was forgotten: the controller writes the one, the
    /// reflex the other.
    forgotten: bool,
}

fn read_if_there(path: &Path) -> io::Result<Option<Contents>> {
    match ledger::read(path) {
        Ok(contents) => Ok(Some(contents)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Lifts the brake and the hold of a cgroup.
///
/// # Errors
///
/// [`CgroupError`] when a file cannot be written; a cgroup that is gone is no error.
pub fn release(path: &Path) -> Result<(), CgroupError> {
    unless_gone(Cgroup::open(path).and_then(|cgroup| cgroup.set_limit("memory.high", Limit::Max)))
        .and(thaw(path))
}

fn thaw(path: &Path) -> Result<(), CgroupError> {
    unless_gone(Cgroup::open(path).and_then(|cgroup| cgroup.write("cgroup.freeze", "0")))
}

fn unless_gone(result: Result<(), CgroupError>) -> Result<(), CgroupError> {
    match result {
        Err(error) if !error.is_gone() => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::{env, process};

    use bellows_core::{Bytes, Nanos};

    use super::*;
    use crate::ledger::Ledger;

    /// Whatever the instant of the death, a brake that is somebody else's stays.
    #[test]
    fn a_brake_is_lifted_only_where_it_was_ours() {
        let (at, cgroup) = (Nanos(1), CgroupId(7));
        let adopt = Record::Adopt {
            at,
            cgroup,
            path: PathBuf::from("a"),
            name: String::new(),
            original: Bytes(1),
            limit: Bytes(1),
        };
        let brake = |foreign| Record::Brake {
            at,
            cgroup,
            foreign,
        };
        let braked = |records: &[Record]| left_by(records).get(&cgroup).map(|left| left.braked);
        let [ours, theirs] = [false, true].map(brake);
        assert_eq!(braked(std::slice::from_ref(&adopt)), Some(false));
        assert_eq!(braked(&[adopt.clone(), theirs]), Some(false));
        assert_eq!(braked(&[adopt.clone(), ours.clone()]), Some(true));
        let again = [adopt.clone(), ours.clone(), adopt.clone()];
        assert_eq!(braked(&again), Some(true));
        let forget = Record::Forget { at, cgroup };
        let forgotten = [adopt.clone(), ours.clone(), forget.clone()];
        assert_eq!(braked(&forgotten), None);
        let overtaken = [adopt.clone(), ours.clone(), adopt, forget, ours];
        assert_eq!(braked(&overtaken), Some(true));
    }

    #[test]
    fn whoever_is_held_goes_on_though_it_cannot_be_read_who_is_paused() {
        let directory = env::temp_dir().join(format!("bellows-unreadable-{}", process::id()));
        let cgroup = directory.join("cgroup");
        fs::create_dir_all(&cgroup).unwrap();
        let read = |file: &str| fs::read_to_string(cgroup.join(file)).unwrap();
        fs::write(cgroup.join("memory.high"), "4096").unwrap();
        fs::write(cgroup.join("cgroup.freeze"), "1").unwrap();
        let path = directory.join("ledger");
        fs::create_dir_all(ledger::paused(&path)).unwrap();
        let mut ledger = Ledger::open(&path).unwrap();
        let (at, id) = (Nanos(1), CgroupId(7));
        let adopt = Record::Adopt {
            at,
            cgroup: id,
            path: cgroup.clone(),
            name: String::new(),
            original: Bytes(1),
            limit: Bytes(1),
        };
        ledger.append(&adopt).unwrap();
        let brake = Record::Brake {
            at,
            cgroup: id,
            foreign: false,
        };
        ledger.append(&brake).unwrap();
        assert_eq!(recover(&path).unwrap().released, 1);
        assert_eq!(read("memory.high").trim(), "max");
        assert_eq!(read("cgroup.freeze").trim(), "0");
        fs::remove_dir_all(&directory).unwrap();
    }

    /// Parent and releaser learn of a death at the same time.
    #[test]
    fn two_may_release_at_once() {
        let directory = env::temp_dir().join(format!("bellows-recover-{}", process::id()));
        fs::create_dir_all(&directory).unwrap();
        let path = directory.join("ledger");
        drop(Ledger::open(&path).unwrap());
        let unlocked = release_all(&path).unwrap();
        assert!(path.exists(), "it is the releaser's to put aside");
        assert_eq!(recover(&path).unwrap(), unlocked);
        assert!(!path.exists());
        // Nor is it a failure that nothing is left to do.
        release_all(&path).unwrap();
        recover(&path).unwrap();
        fs::remove_dir_all(&directory).unwrap();
    }
}
