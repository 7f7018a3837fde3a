//! Page cache given back without `memory.reclaim`, which Linux has since 5.19: by a `memory.high` that stands for a moment.
//!
//! The kernel reclaims in whoever writes it (`memory_high_write`, mm/memcontrol.c), and lets those sleep that charge above it
//! meanwhile. So it is put back at once. An agent that dies in between would leave a brake that nobody lifts: it is written
//! down in `/run/bellows` first, and put back by whoever learns of the death first ([`crate::recover`]).
//!
//! It must not lift a brake that is lower, nor touch one that somebody else has set meanwhile.

use std::{
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use bellows_core::Bytes;
use serde::{Deserialize, Serialize};

use crate::{
    cgroup::{Cgroup, CgroupError, Limit},
    machine,
    originals::{Recorded, Records, key_of},
};

/// Two at once in one cgroup would put back each other's.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A `memory.high` that stands for a moment.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Squeezed {
    /// The cgroup.
    path: PathBuf,
    /// What stood there; `None` for `max`.
    was: Option<Bytes>,
    /// What stands there now.
    to: Bytes,
}

impl Recorded for Squeezed {
    fn key(&self) -> &str {
        key_of(&self.path)
    }
}

impl Squeezed {
    fn let_go(&self) -> Result<(), CgroupError> {
        let cgroup = Cgroup::open(&self.path)?;
        if cgroup.limit("memory.high")? != Limit::At(self.to) {
            return Ok(());
        }
        cgroup.set_limit("memory.high", self.was.map_or(Limit::Max, Limit::At))
    }
}

/// Brings usage down to `to` as far as page cache goes. May block for as long as that takes.
///
/// # Errors
///
/// [`CgroupError`] when the file cannot be read or written.
pub(super) fn squeeze(
    cgroup: &Cgroup,
    to: Bytes,
    records: &Records<Squeezed>,
) -> Result<(), CgroupError> {
    let _one_at_a_time = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let was = cgroup.limit("memory.high")?;
    let squeezed = Squeezed {
        path: cgroup.path().to_owned(),
        was: match was {
            Limit::Max => None,
            Limit::At(was) => Some(was),
        },
        to: machine::page_floor(to),
    };
    if was.bytes() <= squeezed.to {
        return Ok(());
    }
    if let Err(error) = records.write(&squeezed) {
        tracing::warn!(path = %cgroup.path().display(), %error, "page cache is not given back");
        return Ok(());
    }
    let tried = cgroup.set_limit("memory.high", Limit::At(squeezed.to));
    squeezed.let_go()?;
    records.remove(squeezed.key());
    tried
}

/// Puts back what a dead agent has left.
pub fn let_go_all(records: &Records<Squeezed>) {
    for squeezed in records.all() {
        match squeezed.let_go() {
            Err(error) if !error.is_gone() => {
                tracing::error!(path = %squeezed.path.display(), %error, "a predecessor's brake cannot be lifted");
            }
            Ok(()) | Err(_) => records.remove(squeezed.key()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{env, fs, path::Path, process, thread};

    use rustix::fs::{CWD, FileType, Mode, mknodat};

    use super::*;

    fn bed(name: &str) -> (PathBuf, Cgroup, Records<Squeezed>) {
        let name = format!("bellows-squeeze-{name}-{}", process::id());
        let directory = env::temp_dir().join(name);
        let pod = directory.join("pod0f8c");
        fs::create_dir_all(&pod).unwrap();
        let records = Records::at(directory.join("squeezed"));
        (directory, Cgroup::open(&pod).unwrap(), records)
    }

    /// What the kernel says and is told, in turns: each open of the file meets the other side's.
    fn kernel(high: &Path, was: &'static str) -> thread::JoinHandle<[String; 2]> {
        let high = high.to_owned();
        thread::spawn(move || {
            fs::write(&high, was).unwrap();
            let squeezed = fs::read_to_string(&high).unwrap();
            fs::write(&high, &squeezed).unwrap();
            [squeezed, fs::read_to_string(&high).unwrap()]
        })
    }

    #[test]
    fn a_brake_stands_for_a_moment_and_is_what_it_was() {
        for was in ["max", "1073741824"] {
            let (directory, cgroup, records) = bed(was);
            let high = cgroup.path().join("memory.high");
            mknodat(CWD, &high, FileType::Fifo, Mode::RWXU, 0).unwrap();
            let kernel = kernel(&high, was);
            squeeze(&cgroup, Bytes::mib(64), &records).unwrap();
            let told = kernel.join().unwrap();
            assert_eq!(told, [Bytes::mib(64).0.to_string(), was.to_owned()]);
            assert_eq!(records.all(), []);
            fs::remove_dir_all(&directory).unwrap();
        }
    }

    #[test]
    fn a_lower_brake_stays() {
        let (directory, cgroup, records) = bed("lower");
        let high = cgroup.path().join("memory.high");
        fs::write(&high, "4096").unwrap();
        squeeze(&cgroup, Bytes::mib(64), &records).unwrap();
        assert_eq!(fs::read_to_string(&high).unwrap(), "4096");
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn what_a_dead_agent_has_left_is_put_back_unless_somebody_else_has_set_it() {
        let (directory, cgroup, records) = bed("dead");
        let high = cgroup.path().join("memory.high");
        let left = Squeezed {
            path: cgroup.path().to_owned(),
            was: None,
            to: Bytes::mib(64),
        };
        for (now, then) in [("67108864", "max"), ("12345", "12345")] {
            fs::write(&high, now).unwrap();
            records.write(&left).unwrap();
            let_go_all(&records);
            assert_eq!(fs::read_to_string(&high).unwrap(), then);
            assert_eq!(records.all(), []);
        }
        records.write(&left).unwrap();
        fs::remove_dir_all(cgroup.path()).unwrap();
        let_go_all(&records);
        assert_eq!(records.all(), [], "it is gone");
        fs::remove_dir_all(&directory).unwrap();
    }
}
