//! Job tokens: a make that may run eight jobs has seven in a pipe, and whoever takes one keeps a job from beginning.
//!
//! The protocol is make's ("POSIX Jobserver Interaction", in its manual), which cargo and ninja speak too: one byte a
//! token, in a pipe whose descriptors `MAKEFLAGS` names (`--jobserver-auth=R,W`; before 4.2 `--jobserver-fds`) or in a
//! fifo (`--jobserver-auth=fifo:PATH`, the default since 4.4). A byte is given back as it was taken. The pipe is opened
//! anew, through `/proc`: not to block must be said for this end only, make may rely on its own.
//!
//! What `MAKEFLAGS` says is a container's word, and it may be stale: a make before 4.4 tells descriptors to a recipe that
//! does not have them, where the same numbers are anything, a compiler's output for one. So a jobserver is only what a
//! make or cargo above the job has open itself, and it is reached through the topmost that has: those between may end
//! before it. If that was told of the jobserver itself, it is somebody's outside, and left alone: who learns of the agent's
//! death could not give tokens back through a make that may have ended. A path is never followed, and no more is taken than is withheld, whatever lies in the pipe. A jobserver
//! that hands out nothing costs nothing: who begins a job too many is paused then.
//!
//! Tokens must not outlive their jobserver in here, nor be kept when a build winds down: make counts them at its end.
//! They must not be written into any other pipe: what is opened is compared with what was found.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsFd as _, BorrowedFd},
        unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _},
    },
    path::PathBuf,
};

use bellows_core::parallel::ProcessId;

use super::process::{Process, Tree, descriptors, is_there};
use crate::ledger::Place;

/// No build is slowed down by more.
pub(super) const MOST: usize = 256;
/// Those that have a jobserver for others.
const MASTERS: [&str; 3] = ["make", "gmake", "cargo"];

/// Where a jobserver is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Auth {
    /// A fifo, in the root of whoever says so.
    Fifo(PathBuf),
    /// Descriptors to read from and to write to.
    Pipe(i32, i32),
}

/// What `MAKEFLAGS` says of a jobserver: the last word counts.
#[must_use]
pub(super) fn parse(flags: &str) -> Option<Auth> {
    let words = flags.split_ascii_whitespace().rev();
    let mut said = words.filter_map(|word| {
        word.strip_prefix("--jobserver-auth=")
            .or_else(|| word.strip_prefix("--jobserver-fds="))
    });
    let said = said.next()?;
    if let Some(path) = said.strip_prefix("fifo:") {
        return path
            .starts_with('/')
            .then(|| Auth::Fifo(PathBuf::from(path)));
    }
    let (from, to) = said.split_once(',')?;
    Some(Auth::Pipe(from.parse().ok()?, to.parse().ok()?))
}

impl Auth {
    /// The descriptor by which a process has this jobserver, if it has it.
    fn within(&self, pid: i32) -> Option<i32> {
        match *self {
            Self::Fifo(ref path) => descriptors(pid)
                .into_iter()
                .find(|(_, target)| target.file_name() == path.file_name())
                .map(|(number, _)| number),
            Self::Pipe(from, to) if from >= 0 && to >= 0 => {
                let is_one = from != to && pipe(pid, from)? == pipe(pid, to)?;
                is_one.then_some(from)
            }
            // Make tells those that may not have it so, since 4.4 (`jobserver_get_invalid_auth`, src/posixos.c).
            Self::Pipe(..) => own_pipe(pid),
        }
    }

    /// Where a process has it.
    fn place(&self, owner: ProcessId) -> Option<Place> {
        let descriptor = self.within(owner.pid)?;
        let (device, inode) = pipe(owner.pid, descriptor)?;
        Some(Place {
            owner,
            descriptor,
            device,
            inode,
        })
    }
}

/// A jobserver, and what was taken from it.
#[derive(Debug)]
pub(super) struct Jobserver {
    /// To read from only.
    pipe: File,
    /// To write to, while something is taken: so make waits for it at its end.
    back: Option<File>,
    pub(super) place: Place,
    pub(super) taken: Vec<u8>,
}

impl Jobserver {
    /// The one that a job belongs to: what the nearest make or cargo has, by the topmost that has the same. None if that has
    /// it from somebody who is not in the tree.
    pub(super) fn of(job: ProcessId, tree: &Tree) -> Option<Self> {
        let auth = parse(&make_flags(job.pid)?)?;
        let ancestors = tree.ancestors(job);
        let masters = ancestors.iter().filter(|process| is_master(process));
        let mut places = masters.filter_map(|process| auth.place(process.id));
        let nearest = places.next()?;
        let place = places
            .rfind(|place| (place.device, place.inode) == (nearest.device, nearest.inode))
            .unwrap_or(nearest);
        if was_told(place) {
            return None;
        }
        Self::at(place).ok()
    }

    pub(super) fn at(place: Place) -> io::Result<Self> {
        Ok(Self {
            pipe: open(place, Way::Take)?,
            back: None,
            place,
            taken: Vec::new(),
        })
    }

    /// What is readable when there is a token.
    pub(super) fn source(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// Whether its owner lives, as far as can be told.
    pub(super) fn is_there(&self) -> bool {
        is_there(self.place.owner).unwrap_or(true)
    }

    /// Takes one token, if there is one to be had and no more than `wanted` are taken then.
    ///
    /// # Errors
    ///
    /// When the pipe cannot be read.
    pub(super) fn take(&mut self, wanted: usize) -> io::Result<bool> {
        if self.taken.len() >= wanted.min(MOST) {
            return Ok(false);
        }
        if self.back.is_none() {
            self.back = Some(open(self.place, Way::GiveBack)?);
        }
        let mut token = [0];
        let read = self.pipe.read(&mut token);
        self.taken
            .extend(token.iter().filter(|_| matches!(read, Ok(1))));
        if self.taken.is_empty() {
            self.back = None;
        }
        match read {
            Err(error) if is_passing(&error) => Ok(false),
            read => Ok(read? == 1),
        }
    }

    /// Gives back what is more than `wanted`; returns how many were given back.
    ///
    /// # Errors
    ///
    /// When tokens cannot be given back: they are lost then, since a full pipe has more than there ever were, and one
    /// without a reader needs none.
    pub(super) fn give_back(&mut self, wanted: usize) -> io::Result<usize> {
        let tokens = self.taken.split_off(wanted.min(self.taken.len()));
        let written = match &mut self.back {
            Some(back) => back.write_all(&tokens),
            None => Ok(()),
        };
        if self.taken.is_empty() {
            self.back = None;
        }
        written.map(|()| tokens.len())
    }
}

/// Gives tokens of a jobserver back that whoever took them has not, if its owner still lives.
///
/// # Errors
///
/// When it is there and takes none.
pub(super) fn return_to(place: Place, tokens: &[u8]) -> io::Result<()> {
    if tokens.is_empty() || !is_there(place.owner)? {
        return Ok(());
    }
    open(place, Way::GiveBack)?.write_all(tokens)
}

/// What a pipe is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Take,
    GiveBack,
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

fn is_master(process: &Process) -> bool {
    MASTERS.contains(&&*process.program)
}

/// Whether who has a jobserver was told of it when it began.
fn was_told(place: Place) -> bool {
    let told = make_flags(place.owner.pid).and_then(|flags| parse(&flags));
    // Without numbers it was told that it may not have one.
    let told = told.filter(|auth| !matches!(auth, Auth::Pipe(from, _) if *from < 0));
    let told = told.and_then(|auth| auth.place(place.owner));
    told.is_some_and(|told| (told.device, told.inode) == (place.device, place.inode))
}

/// The value of `MAKEFLAGS` in a process's environment.
fn make_flags(pid: i32) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
    let mut variables = environment.split(|&byte| byte == 0);
    let flags = |name: &'static [u8]| move |variable: &&[u8]| variable.starts_with(name);
    let variable = variables
        .clone()
        .find(flags(b"MAKEFLAGS="))
        .or_else(|| variables.find(flags(b"CARGO_MAKEFLAGS=")))?;
    Some(
        String::from_utf8_lossy(variable)
            .split_once('=')?
            .1
            .to_owned(),
    )
}

fn descriptor(pid: i32, number: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/fd/{number}"))
}

/// Which pipe a descriptor is, if it is one: device and inode.
fn pipe(pid: i32, number: i32) -> Option<(u64, u64)> {
    let metadata = fs::metadata(descriptor(pid, number)).ok()?;
    let is_fifo = metadata.file_type().is_fifo();
    is_fifo.then(|| (metadata.dev(), metadata.ino()))
}

/// The pipe of which a process has both ends, if there is one such: a make's own.
fn own_pipe(pid: i32) -> Option<i32> {
    let mut pipes: Vec<(PathBuf, i32)> = descriptors(pid)
        .into_iter()
        .filter(|(number, target)| *number > 2 && target.to_string_lossy().starts_with("pipe:"))
        .map(|(number, target)| (target, number))
        .collect();
    pipes.sort_unstable();
    let mut twins = pipes
        .chunk_by(|(one, _), (other, _)| one == other)
        .filter(|same| same.len() > 1);
    let (Some([(_, number), ..]), None) = (twins.next(), twins.next()) else {
        return None;
    };
    Some(*number)
}

/// Opens a jobserver's pipe one way.
///
/// At its end make closes its own writing end and reads until there is no other (`jobserver_acquire_all`, src/posixos.c),
/// so it waits for whoever holds one open. That must be who has tokens, so that make finds them, and nobody else.
fn open(place: Place, way: Way) -> io::Result<File> {
    let Place {
        owner,
        descriptor: number,
        device,
        inode,
    } = place;
    let gone = || io::Error::other(format!("the jobserver of {} is gone", owner.pid));
    // Before it is opened: to open a device can do things.
    if !is_there(owner)? || pipe(owner.pid, number) != Some((device, inode)) {
        return Err(gone());
    }
    let file = File::options()
        .read(way == Way::Take)
        .write(way == Way::GiveBack)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(descriptor(owner.pid, number))?;
    // It may have been exchanged.
    let metadata = file.metadata()?;
    if (metadata.dev(), metadata.ino()) != (device, inode) {
        return Err(gone());
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::{
        os::{fd::AsRawFd as _, unix::process::CommandExt as _},
        process::{Child, Command, Stdio},
        thread,
        time::{Duration, Instant},
    };

    use rustix::{fs::OFlags, process::Signal};

    use super::{
        super::process::{self, read},
        *,
    };

    #[test]
    fn both_ways_to_name_a_jobserver_are_understood_and_nothing_else() {
        let pipe = |from, to| Some(Auth::Pipe(from, to));
        let fifo = |path: &str| Some(Auth::Fifo(PathBuf::from(path)));
        for (flags, expected) in [
            (
                " -j8 --jobserver-auth=fifo:/tmp/GMfifo17 -- A=b",
                fifo("/tmp/GMfifo17"),
            ),
            ("s -j8 --jobserver-auth=3,4", pipe(3, 4)),
            ("-j --jobserver-fds=7,8 --jobserver-auth=7,8", pipe(7, 8)),
            ("--jobserver-fds=3,4 -j", pipe(3, 4)),
            // The last one counts.
            ("--jobserver-auth=3,4 --jobserver-auth=fifo:/a", fifo("/a")),
            ("-j8 --jobserver-auth=-2,-2", pipe(-2, -2)),
            ("-j8", None),
            ("", None),
            ("--jobserver-auth=", None),
            ("--jobserver-auth=3", None),
            ("--jobserver-auth=a,b", None),
            ("--jobserver-auth=fifo:relative", None),
        ] {
            assert_eq!(parse(flags), expected, "{flags}");
        }
    }

    fn own() -> ProcessId {
        let pid = i32::try_from(std::process::id()).unwrap();
        read(pid).unwrap().unwrap().id
    }

    /// Where a file of this process is.
    fn place(file: &File) -> Place {
        let metadata = file.metadata().unwrap();
        Place {
            owner: own(),
            descriptor: file.as_raw_fd(),
            device: metadata.dev(),
            inode: metadata.ino(),
        }
    }

    /// A jobserver with these tokens, and make's ends.
    fn jobserver(tokens: &[u8]) -> (Jobserver, File, File) {
        let (from, to) = rustix::pipe::pipe().unwrap();
        let (from, mut to) = (File::from(from), File::from(to));
        to.write_all(tokens).unwrap();
        let place = place(&from);
        (Jobserver::at(place).unwrap(), from, to)
    }

    /// A make that runs this makefile, and its processes.
    struct Make {
        directory: PathBuf,
        child: Child,
    }

    impl Make {
        fn start(name: &str, makefile: &str) -> Self {
            let name = format!("bellows-{name}-{}", std::process::id());
            let directory = std::env::temp_dir().join(name);
            fs::create_dir_all(&directory).unwrap();
            fs::write(directory.join("Makefile"), makefile).unwrap();
            let mut make = Command::new("make");
            make.arg("-j3").current_dir(&directory).process_group(0);
            make.env_remove("MAKEFLAGS").env_remove("CARGO_MAKEFLAGS");
            let child = make.stdout(Stdio::null()).spawn().unwrap();
            Self { directory, child }
        }

        fn id(&self) -> ProcessId {
            let pid = i32::try_from(self.child.id()).unwrap();
            read(pid).unwrap().unwrap().id
        }

        /// Its processes, and the job among them, when that has begun.
        fn job(&self) -> (ProcessId, Tree) {
            let start = Instant::now();
            loop {
                let tree = Tree::below(self.id().pid);
                if let Some(job) = tree.named("sleep") {
                    return (job, tree);
                }
                assert!(start.elapsed() < Duration::from_secs(10), "it begins");
                thread::sleep(Duration::from_millis(2));
            }
        }

        /// What the job's jobserver must be: what this make has of it.
        fn own(&self) -> Place {
            let flags = self.job().0;
            let auth = Auth::Pipe(-2, -2);
            let fifo = || parse(&make_flags(flags.pid)?)?.place(self.id());
            auth.place(self.id()).or_else(fifo).unwrap()
        }
    }

    impl Drop for Make {
        fn drop(&mut self) {
            let group = rustix::process::Pid::from_child(&self.child);
            rustix::process::kill_process_group(group, Signal::KILL).unwrap();
            self.child.wait().unwrap();
            fs::remove_dir_all(&self.directory).unwrap();
        }
    }

    /// What a recipe's processes have under the numbers that `MAKEFLAGS` names may be anything: a compiler's output.
    #[test]
    fn only_what_make_has_is_its_jobserver() {
        let make = Make::start(
            "plain",
            "all:\n\t@tail -f /dev/null | (exec sleep 60 3<&0 4<&0)\n",
        );
        let (job, tree) = make.job();
        assert_eq!(Jobserver::of(job, &tree).unwrap().place, make.own());
        // Nobody above it has one.
        let lie =
            "all:\n\t@tail -f /dev/null | (MAKEFLAGS=--jobserver-auth=0,5 exec sleep 60 5<&0)\n";
        let make = Make::start("lie", lie);
        let (job, tree) = make.job();
        assert!(Jobserver::of(job, &tree).is_none());
    }

    #[test]
    fn make_need_not_say_which_pipe_it_has() {
        let makefile = "all:\n\t@MAKEFLAGS=--jobserver-auth=-2,-2 sleep 60\n";
        let make = Make::start("unsaid", makefile);
        let (job, tree) = make.job();
        let place = Jobserver::of(job, &tree).map(|jobserver| jobserver.place);
        // One with a fifo has no such pipe.
        assert_eq!(place, Auth::Pipe(-2, -2).place(make.id()));
    }

    /// The one in between ends before the other.
    #[test]
    fn a_jobserver_is_its_topmost_owners() {
        let makefile = "all:\n\t@+$(MAKE) sub; sleep 30\nsub:\n\t@sleep 60\n";
        let make = Make::start("sub", makefile);
        let (job, tree) = make.job();
        let names = |id| {
            tree.ancestors(id)
                .iter()
                .filter(|known| is_master(known))
                .count()
        };
        assert_eq!(names(job), 2);
        let mut jobserver = Jobserver::of(job, &tree).unwrap();
        assert_eq!(jobserver.place, make.own());
        assert!(jobserver.take(1).unwrap());
        let sub = tree.ancestors(job)[0].id;
        for id in [job, sub] {
            process::signal(id, Signal::KILL).unwrap();
        }
        while is_there(sub).unwrap() {
            thread::sleep(Duration::from_millis(2));
        }
        return_to(jobserver.place, &jobserver.taken).unwrap();
        jobserver.taken.clear();
        jobserver.back = None;
        let mut taken = 0;
        while jobserver.take(9).unwrap() {
            taken += 1;
        }
        assert!(taken >= 1);
    }

    /// As one is that `make` has begun around the guard.
    #[test]
    fn the_jobserver_of_somebody_who_is_not_seen_is_left_alone() {
        let makefile = "all:\n\t@+$(MAKE) sub; sleep 30\nsub:\n\t@sleep 60\n";
        let make = Make::start("outside", makefile);
        let (job, tree) = make.job();
        let sub = tree.ancestors(job)[0].id;
        assert_ne!(sub, make.id());
        assert!(Jobserver::of(job, &tree).is_some());
        assert!(Jobserver::of(job, &Tree::below(sub.pid)).is_none());
    }

    #[test]
    fn no_more_is_taken_than_is_withheld_and_all_is_given_back_as_it_was() {
        let (mut jobserver, mut from, _to) = jobserver(b"abcdefg");
        while jobserver.take(3).unwrap() {}
        assert_eq!(jobserver.taken, b"abc");
        assert!(!jobserver.take(2).unwrap());
        assert_eq!(jobserver.give_back(1).unwrap(), 2);
        assert_eq!(jobserver.give_back(0).unwrap(), 1);
        let mut left = [0; 7];
        from.read_exact(&mut left).unwrap();
        left.sort_unstable();
        assert_eq!(&left, b"abcdefg");
    }

    #[test]
    fn an_empty_jobserver_is_not_waited_for() {
        let (mut jobserver, _from, _to) = jobserver(b"");
        assert!(!jobserver.take(8).unwrap());
        assert_eq!(jobserver.give_back(0).unwrap(), 0);
    }

    /// It says that there are eight and is full of them.
    #[test]
    fn a_jobserver_that_lies_is_not_drained_and_not_waited_for() {
        let (mut jobserver, _from, mut to) = jobserver(&[b'+'; 4096]);
        while jobserver.take(usize::MAX).unwrap() {}
        assert_eq!(jobserver.taken.len(), MOST);
        // Somebody else fills it up meanwhile.
        let flags = rustix::fs::fcntl_getfl(to.as_fd()).unwrap();
        rustix::fs::fcntl_setfl(to.as_fd(), flags | OFlags::NONBLOCK).unwrap();
        while to.write(&[b'+'; 4096]).is_ok_and(|written| written > 0) {}
        while to.write(b"+").is_ok_and(|written| written > 0) {}
        let error = jobserver.give_back(0).unwrap_err();
        assert!(is_passing(&error), "{error}");
    }

    #[test]
    fn nothing_but_the_pipe_that_was_found_is_opened() {
        let (jobserver, _from, _to) = jobserver(b"");
        let (other, _end) = rustix::pipe::pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        let meant = jobserver.place;
        for wrong in [
            place(&null),
            Place {
                descriptor: other.as_raw_fd(),
                ..meant
            },
            Place {
                descriptor: 1 << 20,
                ..meant
            },
            Place {
                owner: gone(),
                ..meant
            },
        ] {
            let error = open(wrong, Way::Take).unwrap_err();
            assert!(error.to_string().contains("is gone"), "{error}");
        }
    }

    fn gone() -> ProcessId {
        ProcessId {
            began: own().began + 1,
            ..own()
        }
    }

    #[test]
    fn a_jobserver_that_vanishes_gets_nothing_back() {
        let (jobserver, from, to) = jobserver(b"abc");
        let place = jobserver.place;
        assert!(jobserver.back.is_none(), "make would wait for it");
        return_to(place, b"x").unwrap();
        let stranger = Place {
            owner: gone(),
            ..place
        };
        assert!(jobserver.is_there());
        return_to(stranger, b"y").unwrap();
        drop(to);
        // Nobody but us could write: make sees the end of it.
        let Jobserver { mut pipe, .. } = jobserver;
        let mut left = [0; 8];
        let count = pipe.read(&mut left).unwrap();
        assert_eq!(&left[..count], b"abcx");
        assert_eq!(pipe.read(&mut left).unwrap(), 0);
        drop(from);
        return_to(place, b"z").unwrap_err();
    }
}
