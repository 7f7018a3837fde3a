//! The ways in which a process can grow, each by its own path through the kernel.

use std::{
    env,
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::fd::{AsRawFd as _, OwnedFd},
    path::Path,
    process::{Child, Command, Stdio},
    ptr,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bellows_core::Bytes;
use clap::ValueEnum;
use rustix::{
    fs::{MemfdFlags, memfd_create},
    pipe::{fcntl_setpipe_size, pipe},
    process::{Resource, Rlimit, setrlimit},
};
use serde::{Deserialize, Serialize};

use super::{MIB, say};

pub(super) const PAGE: usize = 4096;
/// Memory of one child of a fork storm.
const CHILD: usize = 16 * MIB;
/// A pipe of this size holds as much kernel memory when it is full.
const PIPE: usize = MIB;
/// Files for the pipes of all threads together: the limit is the process's.
const PIPE_FILES: u64 = 1 << 16;
/// Bytes that one write call copies: the kernel does not return to user mode in between.
const WRITE: usize = 64 * MIB;

/// What grows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Kind {
    /// Private anonymous memory, touched page by page.
    Anonymous,
    /// Shared memory, touched page by page.
    Shmem,
    /// A file on tmpfs, written with large writes: the growth happens inside one system call.
    Tmpfs,
    /// A mapping that the kernel fills inside one system call (`MAP_POPULATE`).
    Populate,
    /// Anonymous memory that asks for huge pages, whatever the system's default.
    Huge,
    /// Many processes, each with a part.
    Forks,
    /// Kernel memory: full pipes.
    Kernel,
    /// Anonymous memory in a cgroup below the limited one.
    Nested,
}

impl Kind {
    /// Whether it grows by more than a page while it does not return to user mode.
    pub(crate) const fn grows_in_system_calls(self) -> bool {
        matches!(self, Self::Tmpfs | Self::Populate | Self::Kernel)
    }

    /// As it is typed.
    pub(crate) fn text(self) -> String {
        let value = self.to_possible_value();
        value.map_or_else(String::new, |value| value.get_name().to_owned())
    }
}

/// Memory that grows in one way; given back when dropped.
pub(super) enum Growth {
    Touched { mapping: Mapping, used: usize },
    Populated { mappings: Vec<Mapping>, used: usize },
    Written { file: File, used: usize },
    Forked { children: Vec<Child>, used: usize },
    Piped { pipes: Vec<(OwnedFd, OwnedFd)> },
}

impl Growth {
    pub(super) fn new(kind: Kind, largest: usize) -> Result<Self> {
        Ok(match kind {
            Kind::Anonymous | Kind::Nested => Self::Touched {
                mapping: Mapping::new(largest)?,
                used: 0,
            },
            Kind::Huge => {
                let mapping = Mapping::new(largest)?;
                mapping.want_huge_pages()?;
                Self::Touched { mapping, used: 0 }
            }
            Kind::Shmem => Self::Touched {
                mapping: Mapping::shared(largest)?,
                used: 0,
            },
            Kind::Populate => Self::Populated {
                mappings: Vec::new(),
                used: 0,
            },
            Kind::Tmpfs => Self::Written {
                file: File::from(memfd_create("burst", MemfdFlags::CLOEXEC)?),
                used: 0,
            },
            Kind::Forks => Self::Forked {
                children: Vec::new(),
                used: 0,
            },
            Kind::Kernel => {
                let limit = Rlimit {
                    current: Some(PIPE_FILES),
                    maximum: Some(PIPE_FILES),
                };
                setrlimit(Resource::Nofile, limit).context("files for the pipes")?;
                Self::Piped { pipes: Vec::new() }
            }
        })
    }

    /// Grows to `to` bytes; returns the longest time that one step took.
    pub(super) fn grow_to(&mut self, to: usize) -> Result<Duration> {
        let mut steps = Steps::start();
        match self {
            Self::Touched { mapping, used } => {
                let from = std::mem::replace(used, to);
                return Ok(mapping.touch(from, to));
            }
            Self::Populated { mappings, used } => {
                if to > *used {
                    mappings.push(Mapping::populated(to - *used)?);
                    *used = to;
                }
            }
            Self::Written { file, used } => {
                // Never touched, so that what is written costs no memory of its own.
                let source = Mapping::new(WRITE)?;
                let chunk = source.untouched();
                while *used < to {
                    *used += file.write(&chunk[..chunk.len().min(to - *used)])?;
                    steps.done();
                }
            }
            Self::Forked { children, used } => {
                while *used < to {
                    children.push(fork(CHILD.min(to - *used))?);
                    *used += CHILD;
                    steps.done();
                }
            }
            Self::Piped { pipes } => {
                let chunk = vec![1_u8; PIPE];
                while pipes.len() * PIPE < to {
                    let (reader, writer) = pipe()?;
                    fcntl_setpipe_size(&writer, PIPE).context("a pipe of 1 MiB")?;
                    let written = rustix::io::write(&writer, &chunk)?;
                    ensure!(written == PIPE, "a pipe took {written} bytes");
                    pipes.push((reader, writer));
                    steps.done();
                }
            }
        }
        steps.done();
        Ok(steps.longest)
    }
}

impl Drop for Growth {
    fn drop(&mut self) {
        if let Self::Forked { children, .. } = self {
            for child in children {
                // The end of its input is its end.
                drop(child.stdin.take());
                drop(child.wait());
            }
        }
    }
}

/// The longest of several steps.
struct Steps {
    last: Instant,
    longest: Duration,
}

impl Steps {
    fn start() -> Self {
        Self {
            last: Instant::now(),
            longest: Duration::ZERO,
        }
    }

    fn done(&mut self) {
        let now = Instant::now();
        self.longest = self.longest.max(now - self.last);
        self.last = now;
    }
}

/// A child that has touched `size` bytes when this returns.
fn fork(size: usize) -> Result<Child> {
    let mut child = Command::new(env::current_exe()?)
        .args(["load", "touch", &size.to_string()])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("a child of the storm")?;
    let mut stdout = child.stdout.take().context("no output")?;
    let mut said = [0];
    let read = stdout.read(&mut said)?;
    ensure!(read == 1, "a child of the storm has died");
    Ok(child)
}

/// The body of such a child.
pub(super) fn touch_and_wait(size: Bytes) -> Result<()> {
    let mapping = Mapping::new(super::size(size)?)?;
    mapping.touch(0, mapping.length);
    say(&"touched")?;
    io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Goes into a cgroup below its own that has the memory controller, as a nested runtime would.
pub(super) fn enter_nested_cgroup() -> Result<()> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let path = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .context("not in cgroup v2")?;
    let own = Path::new("/sys/fs/cgroup").join(path);
    let inner = own.join("inner");
    fs::create_dir(&inner)?;
    fs::write(inner.join("cgroup.procs"), "0")?;
    fs::write(own.join("cgroup.subtree_control"), "+memory")?;
    Ok(())
}

/// A mapping that gives its memory back when dropped.
pub(super) struct Mapping {
    start: *mut u8,
    pub(super) length: usize,
}

// SAFETY: the mapping is owned by this value alone and has no thread affinity.
unsafe impl Send for Mapping {}

impl Mapping {
    pub(super) fn new(length: usize) -> Result<Self> {
        Self::map(
            length,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
            -1,
        )
    }

    fn populated(length: usize) -> Result<Self> {
        Self::map(
            length,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
            -1,
        )
    }

    fn shared(length: usize) -> Result<Self> {
        let file = memfd_create("burst", MemfdFlags::CLOEXEC)?;
        rustix::fs::ftruncate(&file, u64::try_from(length.max(PAGE))?)?;
        Self::map(length, libc::MAP_SHARED, file.as_raw_fd())
    }

    fn map(length: usize, flags: libc::c_int, file: libc::c_int) -> Result<Self> {
        let length = length.max(PAGE);
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                file,
                0,
            )
        };
        ensure!(
            start != libc::MAP_FAILED,
            "mmap of {length} bytes: {}",
            io::Error::last_os_error()
        );
        Ok(Self {
            start: start.cast(),
            length,
        })
    }

    /// Its bytes: zeros of the one zero page where nothing was touched.
    fn untouched(&self) -> &[u8] {
        // SAFETY: the mapping is readable over its length for as long as it lives, and nobody writes to it
        // while it is borrowed: touching is done by its owner only.
        unsafe { std::slice::from_raw_parts(self.start, self.length) }
    }

    fn want_huge_pages(&self) -> Result<()> {
        // SAFETY: advice on a mapping of our own.
        let result = unsafe { libc::madvise(self.start.cast(), self.length, libc::MADV_HUGEPAGE) };
        ensure!(result == 0, "madvise: {}", io::Error::last_os_error());
        Ok(())
    }

    /// Touches the pages of a range; returns the longest time between two touched MiB.
    pub(super) fn touch(&self, from: usize, to: usize) -> Duration {
        let mut longest = Duration::ZERO;
        let mut last = Instant::now();
        for (page, offset) in (from..to.min(self.length)).step_by(PAGE).enumerate() {
            let page_start = self.start.wrapping_add(offset);
            // SAFETY: the offset is inside the mapping, which is writable and ours alone.
            unsafe { ptr::write_volatile(page_start, 1) };
            if page % (MIB / PAGE) == 0 {
                let now = Instant::now();
                longest = longest.max(now - last);
                last = now;
            }
        }
        longest.max(last.elapsed())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps what `new` has mapped; no reference into it exists.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}
