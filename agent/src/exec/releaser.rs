//! A process that lifts brake and hold, and resumes who is paused, if `bellows exec` dies or is stopped.
//!
//! A command whose guard was killed would stay braked, or frozen, for ever. The releaser is this
//! same binary, waiting on a pipe whose other end only `bellows exec` has: end of file without a
//! farewell means that it died. It runs in a session of its own, so that a Ctrl-C or a hang-up of
//! the terminal does not take it along. When the orphaned command has ended, it removes its cgroup.
//!
//! One that is stopped lets go of nothing and may go on at any moment, with what it believes: so nothing of its is taken
//! away, and what is lifted it sets again. Nobody tells of that, unlike of its end, so it is looked at. Where the command
//! itself is stopped, as all are by ^Z, those that were paused stay so: they would go on alone, and grow with nobody to
//! raise their limit.

use std::{
    env,
    io::{self, Write as _},
    os::unix::process::{CommandExt as _, parent_id},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, poll},
    io::Errno,
    time::Timespec,
};

use super::place::remove_tree;
use crate::{
    cgroup::{Cgroup, CgroupError, Limit},
    ledger,
    parallel::{
        self,
        process::{Process, Tree, read},
    },
    recover::release,
};

/// The hidden subcommand.
pub const SUBCOMMAND: &str = "release-on-death-of-parent";
const FAREWELL: &[u8] = b"done";
/// How often the releaser looks whether an orphaned command has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// How often it looks whether its parent is stopped.
const BETWEEN_LOOKS: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 100_000_000,
};
/// ^Z stops one after the other: only what is so at so many looks on end counts.
const STOPPED_AT: u32 = 2;
/// So often those that were paused are resumed: a thread may have been about to pause one when its process was stopped.
const RESUMED: u32 = 3;

/// A running releaser.
#[derive(Debug)]
pub(super) struct Releaser {
    child: Child,
    /// Closed without a farewell, it means death.
    pipe: Option<ChildStdin>,
}

impl Releaser {
    pub(super) fn start(cgroup: &Cgroup, ledger: &Path) -> io::Result<Self> {
        let mut command = Command::new(env::current_exe()?);
        command
            .arg(SUBCOMMAND)
            .arg(cgroup.path())
            .arg(ledger)
            .stdin(Stdio::piped());
        // SAFETY: setsid is async-signal-safe and does not allocate.
        unsafe {
            command.pre_exec(|| rustix::process::setsid().map(drop).map_err(io::Error::from))
        };
        let mut child = command.spawn()?;
        let pipe = child.stdin.take();
        Ok(Self { child, pipe })
    }

    /// Ends it: there is nothing left to release.
    pub(super) fn finish(mut self) {
        if let Some(mut pipe) = self.pipe.take()
            && let Err(error) = pipe.write_all(FAREWELL)
        {
            tracing::debug!(%error, "the releaser has ended already");
        }
    }
}

impl Drop for Releaser {
    /// Waits for it, so that it does not linger in the cgroup that its parent leaves.
    fn drop(&mut self) {
        drop(self.pipe.take());
        if let Err(error) = self.child.wait() {
            tracing::debug!(%error, "the releaser has ended already");
        }
    }
}

/// The body of the releaser process: waits for the end of its parent, then releases.
///
/// # Errors
///
/// [`CgroupError`] when a file cannot be written; a cgroup that is gone is no error.
pub fn wait_and_release(path: &Path, ledger: &Path) -> Result<(), CgroupError> {
    if listen(path, ledger) == FAREWELL {
        return Ok(());
    }
    let released = release(path);
    let resume = || {
        let resumed = parallel::resume_all(&ledger::paused(ledger));
        if let Err(error) = &resumed {
            tracing::error!(%error, "those that were paused may stay so");
        }
        resumed.is_ok()
    };
    let mut is_resumed = resume();
    released?;
    // Nobody else is left to remove the command's cgroup when the command has ended.
    while Cgroup::open(path)
        .and_then(|cgroup| cgroup.populated())
        .unwrap_or(false)
    {
        thread::sleep(LOOK_AGAIN);
        is_resumed = is_resumed || resume();
    }
    match Cgroup::open(path).and_then(|cgroup| remove_tree(&cgroup)) {
        Err(error) if !error.is_gone() => Err(error),
        _ => Ok(()),
    }
}

/// Returns what the parent has said before its end, and lets go for it while it is stopped.
fn listen(path: &Path, ledger: &Path) -> Vec<u8> {
    let mut standing = Standing::of(parent_id());
    let mut said = Vec::new();
    let stdin = io::stdin();
    loop {
        let mut polled = [PollFd::new(&stdin, PollFlags::IN)];
        match poll(&mut polled, Some(&BETWEEN_LOOKS)) {
            Ok(0) => {
                standing.look(path, ledger);
                continue;
            }
            Err(Errno::INTR) => continue,
            Ok(_) => {}
            Err(_) => return said,
        }
        let mut some = [0; 64];
        match rustix::io::read(&stdin, &mut some) {
            Err(Errno::INTR) => {}
            Ok(count) if count > 0 => said.extend_from_slice(&some[..count]),
            // Whatever ends the pipe, an error included, is the end of the parent.
            Ok(_) | Err(_) => return said,
        }
    }
}

/// A parent that may stand still.
struct Standing {
    parent: i32,
    /// At so many looks on end it was stopped, and its command was not.
    looks: u32,
}

impl Standing {
    fn of(parent: u32) -> Self {
        Self {
            parent: i32::try_from(parent).unwrap_or(0),
            looks: 0,
        }
    }

    /// Lifts brake and hold while the parent is stopped, and resumes who is paused while the command is not.
    fn look(&mut self, path: &Path, ledger: &Path) {
        let is_stopped =
            read(self.parent).is_ok_and(|parent| parent.is_some_and(|parent| parent.is_stopped()));
        let Some(cgroup) = is_stopped.then(|| Cgroup::open(path).ok()).flatten() else {
            self.looks = 0;
            return;
        };
        // At each look: a thread may have been in the middle of a write when its process was stopped.
        if !is_at_rest(&cgroup)
            && let Err(error) = release(path)
        {
            tracing::error!(%error, "what a stopped guard holds may stay held");
        }
        self.looks = if self.is_command_stopped(&cgroup) {
            0
        } else {
            self.looks.saturating_add(1)
        };
        if (STOPPED_AT..STOPPED_AT + RESUMED).contains(&self.looks)
            && let Err(error) = parallel::resume_paused(&ledger::paused(ledger))
        {
            tracing::error!(%error, "those that a stopped guard has paused may stay so");
        }
    }

    fn is_command_stopped(&self, cgroup: &Cgroup) -> bool {
        let tree = Tree::of(cgroup).unwrap_or_default();
        let mut commands = tree.all().filter(|known| known.parent == self.parent);
        commands.any(Process::is_stopped)
    }
}

fn is_at_rest(cgroup: &Cgroup) -> bool {
    cgroup
        .limit("memory.high")
        .is_ok_and(|high| high == Limit::Max)
        && cgroup
            .read("cgroup.freeze")
            .is_ok_and(|freeze| freeze.trim() == "0")
}

#[cfg(test)]
mod tests {
    use std::{fs, path::PathBuf};

    use bellows_core::{CgroupId, Nanos};
    use rustix::process::{Pid, Signal, kill_process};

    use super::*;
    use crate::{
        ledger::{Ledger, Record},
        parallel::process::tests::until,
    };

    /// A guard (a shell), its command, and one that it has paused.
    struct Stage {
        directory: PathBuf,
        guard: Child,
        command: i32,
        paused: Child,
        standing: Standing,
    }

    impl Stage {
        fn new(name: &str) -> Self {
            let name = format!("bellows-releaser-{name}-{}", std::process::id());
            let directory = env::temp_dir().join(name);
            fs::create_dir_all(&directory).unwrap();
            let mut guard = Command::new("sh");
            guard.args(["-c", "sleep 60 & echo $! > pid; wait"]);
            let guard = guard.current_dir(&directory).process_group(0).spawn();
            let guard = guard.unwrap();
            let told = directory.join("pid");
            until("the command runs", || {
                fs::read_to_string(&told).is_ok_and(|told| told.ends_with('\n'))
            });
            let command = fs::read_to_string(&told).unwrap().trim().parse().unwrap();
            let paused = Command::new("sleep").arg("60").spawn().unwrap();
            let stage = Self {
                standing: Standing::of(guard.id()),
                directory,
                guard,
                command,
                paused,
            };
            fs::write(stage.file("cgroup.procs"), format!("{command}\n")).unwrap();
            let pid = i32::try_from(stage.paused.id()).unwrap();
            let pause = Record::Pause {
                at: Nanos(1),
                cgroup: CgroupId(7),
                process: read(pid).unwrap().unwrap().id,
                program: String::new(),
            };
            let mut ledger = Ledger::open(&ledger::paused(&stage.file("ledger"))).unwrap();
            ledger.append(&pause).unwrap();
            stage.hold();
            stop(pid);
            stage
        }

        fn file(&self, name: &str) -> PathBuf {
            self.directory.join(name)
        }

        fn hold(&self) {
            fs::write(self.file("memory.high"), "4096").unwrap();
            fs::write(self.file("cgroup.freeze"), "1").unwrap();
        }

        fn is_held(&self) -> bool {
            !is_at_rest(&Cgroup::open(&self.directory).unwrap())
        }

        fn looks(&mut self, count: u32) {
            for _ in 0..count {
                let (path, ledger) = (self.directory.clone(), self.file("ledger"));
                self.standing.look(&path, &ledger);
            }
        }

        fn is_paused(&self) -> bool {
            is_stopped(i32::try_from(self.paused.id()).unwrap())
        }
    }

    impl Drop for Stage {
        fn drop(&mut self) {
            for pid in [self.command, i32::try_from(self.paused.id()).unwrap()] {
                kill_process(Pid::from_raw(pid).unwrap(), Signal::KILL).unwrap();
            }
            self.guard.kill().unwrap();
            self.guard.wait().unwrap();
            self.paused.wait().unwrap();
            fs::remove_dir_all(&self.directory).unwrap();
        }
    }

    fn stop(pid: i32) {
        kill_process(Pid::from_raw(pid).unwrap(), Signal::STOP).unwrap();
        until("it stops", || is_stopped(pid));
    }

    fn is_stopped(pid: i32) -> bool {
        read(pid).unwrap().is_some_and(|known| known.is_stopped())
    }

    #[test]
    fn a_stopped_guards_holds_are_lifted_and_whom_it_has_paused_goes_on() {
        let mut stage = Stage::new("stopped");
        stage.looks(4);
        assert!(stage.is_held() && stage.is_paused(), "it guards");
        stop(i32::try_from(stage.guard.id()).unwrap());
        stage.looks(1);
        assert!(!stage.is_held());
        // A write that was under way.
        stage.hold();
        stage.looks(2);
        assert!(!stage.is_held());
        until("it goes on", || !stage.is_paused());
        assert!(ledger::paused(&stage.file("ledger")).exists());
    }

    /// ^Z stops all: nobody must go on alone.
    #[test]
    fn whoever_is_paused_stays_so_while_the_command_is_stopped_too() {
        let mut stage = Stage::new("all");
        stop(i32::try_from(stage.guard.id()).unwrap());
        stop(stage.command);
        stage.looks(9);
        assert!(!stage.is_held());
        thread::sleep(Duration::from_millis(50));
        assert!(stage.is_paused());
        // The command alone is continued.
        kill_process(Pid::from_raw(stage.command).unwrap(), Signal::CONT).unwrap();
        until("it goes on", || !is_stopped(stage.command));
        stage.looks(3);
        until("it goes on", || !stage.is_paused());
    }
}
