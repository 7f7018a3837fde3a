//! When the kernel killed whom for want of memory, from its log.
//!
//! Whoever looks at `memory.events` from time to time learns of a kill late, and seconds late where a dozen kills keep two
//! emulated CPUs busy: then a raise of what was dead already looks like one of what was killed after it.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result};
use bellows::{attribution::CGROUP_ROOT, clock::now};
use bellows_core::Nanos;

/// The first kill in each cgroup since it was begun.
pub(crate) struct OomKills {
    log: File,
    /// `CLOCK_MONOTONIC` when the clock of the log began.
    began: Nanos,
    killed: BTreeMap<PathBuf, Nanos>,
}

impl OomKills {
    pub(crate) fn begin() -> Result<Self> {
        let mut log = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open("/dev/kmsg")?;
        log.seek(SeekFrom::End(0))?;
        let mut own = Self {
            log,
            began: Nanos(0),
            killed: BTreeMap::new(),
        };
        let at = now();
        let mark = format!("bellows-tests: it is {}\n", at.0);
        // A line that has not ended could go on, and is not read before the next (`vprintk_store`, kernel/printk/printk.c).
        own.log.write_all(mark.as_bytes())?;
        while let Some(record) = own.record()? {
            if record.contains(mark.trim_end()) {
                own.began = at.since(parsed(&record).context("a record without a time")?.0);
                return Ok(own);
            }
        }
        anyhow::bail!("/dev/kmsg does not have what was written into it");
    }

    /// Reads on: the log keeps no more than its buffer has room for.
    pub(crate) fn look(&mut self) -> Result<()> {
        while let Some(record) = self.record()? {
            if let Some((at, Some(cgroup))) = parsed(&record) {
                let at = Nanos(self.began.0 + at.0);
                self.killed.entry(cgroup).or_insert(at);
            }
        }
        Ok(())
    }

    pub(crate) fn of(&self, cgroup: &Path) -> Option<Nanos> {
        self.killed.get(cgroup).copied()
    }

    /// The next record; `None` if there is none yet.
    fn record(&mut self) -> Result<Option<String>> {
        let mut buffer = [0; 8192];
        loop {
            match self.log.read(&mut buffer) {
                Ok(length) => {
                    let text = String::from_utf8_lossy(&buffer[..length]);
                    return Ok(Some(text.into_owned()));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                // Some were overwritten before they were read (Documentation/ABI/testing/dev-kmsg).
                Err(error) if error.kind() == ErrorKind::BrokenPipe => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// When a record is from, and the cgroup whose limit it tells a kill for (`dump_oom_summary`, mm/oom_kill.c).
fn parsed(record: &str) -> Option<(Nanos, Option<PathBuf>)> {
    let (head, text) = record.split_once(';')?;
    let micros: u64 = head.split(',').nth(2)?.parse().ok()?;
    let fields = text.strip_prefix("oom-kill:");
    let mut fields = fields.into_iter().flat_map(|fields| fields.split(','));
    let of = fields.find_map(|field| field.strip_prefix("oom_memcg="));
    let cgroup = of.map(|path| Path::new(CGROUP_ROOT).join(path.trim_start_matches('/')));
    Some((Nanos(micros * 1000), cgroup))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_is_told_from_other_records() {
        let kill = "6,1234,143804000,-;oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=a,mems_allowed=0,oom_memcg=/kubepods/pod1/c,task_memcg=/kubepods/pod1/c,task=load,pid=7,uid=0\n";
        let at = Nanos::millis(143_804);
        let cgroup = PathBuf::from("/sys/fs/cgroup/kubepods/pod1/c");
        assert_eq!(parsed(kill), Some((at, Some(cgroup))));
        let other = "4,1235,143804000,-;Memory cgroup stats for /kubepods/pod1/c:\n";
        assert_eq!(parsed(other), Some((at, None)));
        let of_the_node = "6,1,2,-;oom-kill:constraint=CONSTRAINT_NONE,global_oom,task_memcg=/a\n";
        assert_eq!(parsed(of_the_node), Some((Nanos(2000), None)));
        assert_eq!(parsed("nothing"), None);
    }
}
