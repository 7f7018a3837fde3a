//! The processes of a cgroup: who they are, and how one begins or ends in it.
//!
//! Whoever begins there moves itself, before its program is executed, so that nothing of it is ever charged elsewhere. Who is
//! killed one by one, where the kernel cannot kill a whole cgroup, is frozen before: no id becomes another process's then.
//!
//! It must not allocate or take a lock between fork and exec.

use std::{fs::File, io::Write as _, os::unix::process::CommandExt as _, process::Command};

use rustix::process::{Pid, Signal, kill_process};

use super::{Cgroup, CgroupError, field};

impl Cgroup {
    /// Whether a process lives in it or below.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read.
    pub fn populated(&self) -> Result<bool, CgroupError> {
        Ok(field(&self.read("cgroup.events")?, "populated") == Some(1))
    }

    /// Kills every process in it and below: by `cgroup.kill`, or before Linux 5.14, which does not have it,
    /// one by one. A process that is made meanwhile is there at the next call.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when a file cannot be read or written.
    pub fn kill(&self) -> Result<(), CgroupError> {
        if self.has("cgroup.kill") {
            return self.write("cgroup.kill", "1");
        }
        // Who is frozen neither forks nor ends, so that no id becomes another process's; it dies all the same.
        self.write("cgroup.freeze", "1")?;
        let killed = self.kill_one_by_one();
        self.write("cgroup.freeze", "0")?;
        killed
    }

    fn kill_one_by_one(&self) -> Result<(), CgroupError> {
        let procs = self.read("cgroup.procs")?;
        let ids = procs.lines().filter_map(|line| line.parse().ok());
        for process in ids.filter_map(Pid::from_raw) {
            if let Err(errno) = kill_process(process, Signal::KILL) {
                tracing::debug!(%errno, "it has ended by itself");
            }
        }
        self.children()
            .try_for_each(|child| child?.kill_one_by_one())
    }

    /// The processes in it and below; those below that cannot be read are left out.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when its own cannot be read.
    pub fn processes(&self) -> Result<Vec<u32>, CgroupError> {
        let own = self.read("cgroup.procs")?;
        let mut all: Vec<u32> = own.lines().filter_map(|line| line.parse().ok()).collect();
        for child in self.children().filter_map(Result::ok) {
            all.extend(child.processes().unwrap_or_default());
        }
        Ok(all)
    }

    /// A process in it or below; `None` if there is none.
    #[must_use]
    pub fn a_process(&self) -> Option<u32> {
        let processes = self.read("cgroup.procs").ok()?;
        let own = processes.lines().find_map(|line| line.parse().ok());
        own.or_else(|| self.children().find_map(|child| child.ok()?.a_process()))
    }

    /// Makes a command start in it: the process moves itself between fork and exec, so that nothing of the
    /// command is ever charged elsewhere.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`] when its `cgroup.procs` cannot be opened.
    pub fn admit(&self, command: &mut Command) -> Result<(), CgroupError> {
        let path = self.path.join("cgroup.procs");
        let procs = match File::options().write(true).open(&path) {
            Ok(procs) => procs,
            Err(source) => {
                return Err(CgroupError::Io {
                    action: "open",
                    path,
                    source,
                });
            }
        };
        // SAFETY: between fork and exec the closure only makes one write system call, which is
        // async-signal-safe; it touches no lock and does not allocate.
        unsafe { command.pre_exec(move || (&procs).write_all(b"0")) };
        Ok(())
    }
}
