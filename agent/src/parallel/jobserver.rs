//! Job tokens: a make that may run eight jobs has seven in a pipe, and whoever takes one keeps a job from beginning.
//!
//! The protocol is make's ("POSIX Jobserver Interaction", in its manual), which cargo and ninja speak too: one byte a
//! token, in a pipe whose descriptors `MAKEFLAGS` names (`--jobserver-auth=R,W`; before 4.2 `--jobserver-fds`) or in a
//! fifo (`--jobserver-auth=fifo:PATH`, the default since 4.4). A byte is given back as it was taken. The pipe is opened
//! anew, through `/proc`: not to block must be said for this end only, make may rely on its own.
//!
//! What `MAKEFLAGS` says is a container's word. Nothing but a pipe is read, a path is resolved within the container's
//! own root, and no more is taken than is withheld, whatever lies in the pipe. A jobserver that hands out nothing costs
//! nothing: who begins a job too many is paused then.
//!
//! Tokens must not outlive their jobserver in here, nor be kept when a build winds down: make counts them at its end.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::fs::{FileTypeExt as _, OpenOptionsExt as _},
    },
    path::{Path, PathBuf},
};

use bellows_core::parallel::ProcessId;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

use super::process::{Process, Tree, descriptors, read};

/// No build is slowed down by more.
const MOST: usize = 256;
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

/// A jobserver, and what was taken from it.
#[derive(Debug)]
pub(super) struct Jobserver {
    /// To read from only.
    pipe: File,
    /// To write to, while something is taken: so make waits for it at its end.
    back: Option<File>,
    /// Where it can be opened for as long as its owner lives.
    pub(super) place: PathBuf,
    pub(super) owner: ProcessId,
    pub(super) taken: Vec<u8>,
}

impl Jobserver {
    /// The one that a job belongs to.
    pub(super) fn of(job: ProcessId, tree: &Tree) -> Option<Self> {
        let auth = parse(&make_flags(job.pid)?)?;
        let ancestors = tree.ancestors(job);
        let owner = ancestors
            .iter()
            .rev()
            .find(|process| is_master(process))?
            .id;
        let place = match auth {
            Auth::Fifo(path) => Some(root_of(owner.pid).join(path.strip_prefix("/").ok()?)),
            Auth::Pipe(from, to) if from >= 0 && to >= 0 => {
                let holders = [job]
                    .into_iter()
                    .chain(ancestors.iter().map(|process| process.id));
                holders
                    .map(|id| descriptor(id.pid, from))
                    .find(|place| is_pipe(place))
            }
            // Make tells those that may not have it so, since 4.3.
            Auth::Pipe(..) => None,
        };
        let place = place.or_else(|| {
            let masters = ancestors.iter().filter(|process| is_master(process));
            masters.map(|process| process.id.pid).find_map(own_pipe)
        })?;
        let pipe = reopen(&place, owner, Way::Take).ok()?;
        Some(Self::at(pipe, place, owner))
    }

    pub(super) const fn at(pipe: File, place: PathBuf, owner: ProcessId) -> Self {
        Self {
            pipe,
            back: None,
            place,
            owner,
            taken: Vec::new(),
        }
    }

    /// Whether its owner lives.
    pub(super) fn is_there(&self) -> bool {
        read(self.owner.pid).is_some_and(|process| process.id == self.owner)
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
        let back = match self.back.take() {
            Some(back) => back,
            None => reopen(&self.place, self.owner, Way::GiveBack)?,
        };
        let mut token = [0];
        let is_taken = match self.pipe.read(&mut token) {
            Ok(count) => count == 1,
            Err(error) if is_passing(&error) => false,
            Err(error) => return Err(error),
        };
        if is_taken {
            self.taken.push(token[0]);
        }
        self.back = Some(back).filter(|_| !self.taken.is_empty());
        Ok(is_taken)
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
pub(super) fn return_to(place: &Path, owner: ProcessId, tokens: &[u8]) -> io::Result<()> {
    if tokens.is_empty() || read(owner.pid).is_none_or(|process| process.id != owner) {
        return Ok(());
    }
    reopen(place, owner, Way::GiveBack)?.write_all(tokens)
}

/// What a pipe is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Take,
    GiveBack,
}

/// Opens the pipe of a jobserver, by a descriptor or as a fifo in its owner's root.
fn reopen(place: &Path, owner: ProcessId, way: Way) -> io::Result<File> {
    let root = root_of(owner.pid);
    match place.strip_prefix(&root) {
        Ok(path) => {
            let fifo = in_root(&root, path)?;
            let opened = format!("/proc/self/fd/{}", fifo.as_raw_fd());
            open(Path::new(&opened), way)
        }
        Err(_) => open(place, way),
    }
}

fn root_of(pid: i32) -> PathBuf {
    PathBuf::from(format!("/proc/{pid}/root"))
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

fn is_pipe(place: &Path) -> bool {
    fs::metadata(place).is_ok_and(|metadata| metadata.file_type().is_fifo())
}

/// The pipe of which a process has both ends: a make's own.
fn own_pipe(pid: i32) -> Option<PathBuf> {
    let pipes: Vec<(i32, PathBuf)> = descriptors(pid)
        .into_iter()
        .filter(|(number, target)| *number > 2 && target.to_string_lossy().starts_with("pipe:"))
        .collect();
    let has_twin = |(number, target): &&(i32, PathBuf)| {
        pipes
            .iter()
            .any(|(other, same)| other != number && same == target)
    };
    pipes
        .iter()
        .find(has_twin)
        .map(|(number, _)| descriptor(pid, *number))
}

/// A path within a root, whatever links are on the way, opened as a place only.
fn in_root(root: &Path, path: &Path) -> io::Result<File> {
    let root = File::options()
        .read(true)
        .custom_flags(libc::O_PATH | libc::O_DIRECTORY)
        .open(root)?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(&root, path, flags, Mode::empty(), resolve)?.into())
}

/// Opens a pipe one way.
///
/// At its end make closes its own writing end and reads until there is no other (`jobserver_acquire_all`, src/posixos.c),
/// so it waits for whoever holds one open. That must be who has tokens, so that make finds them, and nobody else.
fn open(place: &Path, way: Way) -> io::Result<File> {
    // Before it is opened: to open a device can do things.
    if !is_pipe(place) {
        return Err(io::Error::other(format!("{} is no pipe", place.display())));
    }
    let file = File::options()
        .read(way == Way::Take)
        .write(way == Way::GiveBack)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
        .open(place)?;
    // It may have been exchanged.
    if !file.metadata()?.file_type().is_fifo() {
        return Err(io::Error::other(format!(
            "{} is no pipe any more",
            place.display()
        )));
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

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
        read(i32::try_from(std::process::id()).unwrap()).unwrap().id
    }

    /// A jobserver with these tokens, and the end of make's.
    fn jobserver(tokens: &[u8]) -> (Jobserver, File, File) {
        let (from, to) = rustix::pipe::pipe().unwrap();
        let (from, mut to) = (File::from(from), File::from(to));
        to.write_all(tokens).unwrap();
        let place = descriptor(own().pid, from.as_raw_fd());
        let pipe = open(&place, Way::Take).unwrap();
        (Jobserver::at(pipe, place, own()), from, to)
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
    fn what_is_no_pipe_is_not_opened() {
        for place in ["/dev/null", "/proc/self/exe", "/no/such", "/"] {
            let error = open(Path::new(place), Way::Take).unwrap_err();
            assert!(error.to_string().contains("is no pipe"), "{error}");
        }
    }

    #[test]
    fn a_jobserver_that_vanishes_gets_nothing_back() {
        let (jobserver, from, to) = jobserver(b"abc");
        let place = jobserver.place.clone();
        assert!(jobserver.back.is_none(), "make would wait for it");
        return_to(&place, own(), b"x").unwrap();
        let gone = ProcessId {
            began: own().began + 1,
            ..own()
        };
        assert!(jobserver.is_there());
        return_to(&place, gone, b"y").unwrap();
        drop(to);
        // Nobody but us could write: make sees the end of it.
        let Jobserver { mut pipe, .. } = jobserver;
        let mut left = [0; 8];
        let count = pipe.read(&mut left).unwrap();
        assert_eq!(&left[..count], b"abcx");
        assert_eq!(pipe.read(&mut left).unwrap(), 0);
        drop(from);
        return_to(&place, own(), b"z").unwrap_err();
    }
}
