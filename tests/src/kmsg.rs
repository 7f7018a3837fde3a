//! When the kernel killed whom for want of memory, from its log.
//!
//! Whoever looks at `memory.events` from time to time learns of a kill late, and seconds late where a dozen kills keep two
//! emulated CPUs busy: then a raise of what was dead already looks like one of what was killed after it.
//!
//! The line that names the cgroup is one of ten in five seconds at most (`oom_kill_process`, mm/oom_kill.c); that which
//! names the process is told of each.

use std::{
    collections::BTreeMap,
    fs::{File, OpenOptions},
    io::{ErrorKind, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use bellows::clock::now;
use bellows_core::Nanos;

const TRIES: usize = 10;
/// In which what was written can be read.
const READABLE: Nanos = Nanos::millis(5000);

/// When each process was killed since it was begun.
pub(crate) struct OomKills {
    log: File,
    /// `CLOCK_MONOTONIC` when the clock of the log began.
    began: Nanos,
    killed: BTreeMap<u32, Nanos>,
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
        // Who loses its CPU meanwhile knows the time less well: the best of some counts.
        let mut best = Nanos(u64::MAX);
        for _ in 0..TRIES {
            let (stamp, before, after) = own.stamp()?;
            let took = after.since(before);
            if took < best {
                (best, own.began) = (took, after.since(stamp));
            }
        }
        Ok(own)
    }

    /// The log's time between two times.
    fn stamp(&mut self) -> Result<(Nanos, Nanos, Nanos)> {
        let before = now();
        let mark = format!("bellows-tests: it is {}\n", before.0);
        // A line that has not ended could go on, and is not read before the next (`vprintk_store`, kernel/printk/printk.c).
        self.log.write_all(mark.as_bytes())?;
        let after = now();
        // What another CPU has begun to write keeps what follows from being read.
        while now().since(after) < READABLE {
            let Some(record) = self.record()? else {
                thread::sleep(Duration::from_millis(1));
                continue;
            };
            if record.contains(mark.trim_end()) {
                let (stamp, _) = parsed(&record).context("a record without a time")?;
                return Ok((stamp, before, after));
            }
        }
        anyhow::bail!("/dev/kmsg does not have what was written into it");
    }

    /// Reads on: the log keeps no more than its buffer has room for.
    pub(crate) fn look(&mut self) -> Result<()> {
        while let Some(record) = self.record()? {
            if let Some((at, Some(process))) = parsed(&record) {
                let at = Nanos(self.began.0 + at.0);
                self.killed.insert(process, at);
            }
        }
        Ok(())
    }

    /// The first kill of any of these.
    pub(crate) fn of(&self, processes: &[u32]) -> Option<Nanos> {
        let killed = processes.iter().filter_map(|one| self.killed.get(one));
        killed.min().copied()
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

/// When a record is from, and the process that it tells to be killed (`__oom_kill_process`, mm/oom_kill.c).
fn parsed(record: &str) -> Option<(Nanos, Option<u32>)> {
    let (head, text) = record.split_once(';')?;
    let micros: u64 = head.split(',').nth(2)?.parse().ok()?;
    let (_, killed) = text.split_once("ut of memory: Killed process ").unzip();
    let process = killed.and_then(|killed| killed.split_whitespace().next()?.parse().ok());
    Some((Nanos(micros * 1000), process))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kill_is_told_from_other_records() {
        let kill = "3,1234,143804000,-;Memory cgroup out of memory: Killed process 1085 (load) total-vm:383028kB, anon-rss:47748kB, UID:0\n";
        let at = Nanos::millis(143_804);
        assert_eq!(parsed(kill), Some((at, Some(1085))));
        let other = "4,1235,143804000,-;Memory cgroup stats for /kubepods/pod1/c:\n";
        assert_eq!(parsed(other), Some((at, None)));
        assert_eq!(parsed("nothing"), None);
    }
}
