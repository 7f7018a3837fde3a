//! The ledger: what is about to be done, written before it is done.
//!
//! If the agent dies at any instant, its successor must know which limits it raised and which
//! cgroups it holds or brakes. Each line is a CRC and a JSON object; a line whose CRC does not
//! match (a torn tail) was never written. The file lies in `/run/bellows`, a tmpfs: an append is a
//! copy within memory that no disk can block, and what it describes does not survive a reboot
//! either. One append is one `write` to a file opened for appending, so two threads do not tear each
//! other's lines.
//!
//! It must not be needed to undo what the kernel forgets by itself, and reading it must never fail
//! as a whole: what can be read is used.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    path::{Path, PathBuf},
};

use bellows_core::{
    Action, Bytes, CgroupId, Nanos, Reason,
    allowance::Reached,
    arbiter::Why,
    observe::{Kill, WouldRaise},
    parallel::{Balance, ProcessId, Resumed},
    requests::RequestWhy,
};
use serde::{Deserialize, Serialize};

use crate::state::with_reserve;

/// Where ledgers are kept.
pub const DIRECTORY: &str = "/run/bellows";
/// A ledger of this size is put aside and a new one begun: it lies in memory.
const LARGEST: u64 = 4 << 20;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "record", rename_all = "PascalCase")]
pub enum Record {
    /// A cgroup is guarded from now on.
    Adopt {
        /// When.
        at: Nanos,
        /// The cgroup.
        cgroup: CgroupId,
        /// Its directory.
        path: PathBuf,
        /// What it is, for people: `NAMESPACE/POD/CONTAINER`, or a command.
        name: String,
        /// Its limit at rest.
        original: Bytes,
        /// Its limit now.
        limit: Bytes,
    },
    /// Whose `memory.high` is. Before this nobody of us has moved it.
    Brake {
        /// When.
        at: Nanos,
        /// In which cgroup.
        cgroup: CgroupId,
        /// Whether it was somebody else's when the cgroup was adopted, and is left alone.
        foreign: bool,
    },
    /// Something is about to be done.
    Intend {
        /// When.
        at: Nanos,
        /// To which cgroup.
        cgroup: CgroupId,
        /// What.
        action: Action,
        /// Why.
        reason: Reason,
        /// Demand at that time.
        demand: Bytes,
    },
    /// What was observed afterwards.
    Verify {
        /// When.
        at: Nanos,
        /// In which cgroup.
        cgroup: CgroupId,
        /// The limit that the kernel has.
        limit: Bytes,
        /// What went wrong, if anything.
        error: Option<String>,
    },
    /// A raise is not granted yet, or not at all.
    Waits {
        /// When.
        at: Nanos,
        /// Of which cgroup.
        cgroup: CgroupId,
        /// The limit.
        wanted: Bytes,
        /// Why.
        why: Why,
        /// What that waits for, for people.
        behind: Option<String>,
    },
    /// A raise is not allowed by its namespace, or not as far.
    Bounded {
        /// When.
        at: Nanos,
        /// Of which cgroup.
        cgroup: CgroupId,
        /// The limit that it would have got.
        wanted: Bytes,
        /// By what it is bounded.
        reason: Reached,
        /// The same, for people, and what to do.
        why: String,
    },
    /// A process is about to be paused.
    Pause {
        /// When.
        at: Nanos,
        /// In which cgroup.
        cgroup: CgroupId,
        /// Which.
        process: ProcessId,
        /// Its program, for people.
        program: String,
    },
    /// A process that was paused goes on.
    Resume {
        /// When.
        at: Nanos,
        /// In which cgroup.
        cgroup: CgroupId,
        /// Which.
        process: ProcessId,
        /// Why.
        why: Resumed,
    },
    /// Job tokens that are withheld from now on.
    Tokens {
        /// When.
        at: Nanos,
        /// In which cgroup.
        cgroup: CgroupId,
        /// Where they are to be given back.
        place: Place,
        /// All of them.
        taken: Vec<u8>,
    },
    /// There is not memory for all jobs at once.
    Lends {
        /// When.
        at: Nanos,
        /// In which cgroup.
        cgroup: CgroupId,
        /// How many would need how much, and how many run.
        balance: Balance,
    },
    /// A cgroup is only watched from now on.
    Observe {
        /// When.
        at: Nanos,
        /// The cgroup.
        cgroup: CgroupId,
        /// What it is, for people.
        name: String,
        /// Its limit.
        limit: Bytes,
        /// The limit that it would never exceed.
        ceiling: Bytes,
    },
    /// A raise that would have been asked for, had it been guarded.
    WouldRaise {
        /// When.
        at: Nanos,
        /// In which cgroup.
        cgroup: CgroupId,
        /// The raise.
        would: WouldRaise,
    },
    /// A kill in a cgroup that is only watched.
    ObservedKill {
        /// When.
        at: Nanos,
        /// In which cgroup.
        cgroup: CgroupId,
        /// The kill, and what would have become of it.
        kill: Kill,
    },
    /// The memory request of a container is about to change.
    Request {
        /// When.
        at: Nanos,
        /// The container's cgroup.
        cgroup: CgroupId,
        /// Its pod's uid: another pod may have the same name later.
        uid: String,
        /// What it is, for people.
        name: String,
        /// The request.
        from: Bytes,
        /// What it becomes.
        to: Bytes,
        /// Why.
        why: RequestWhy,
    },
    /// That could not be.
    RequestFailed {
        /// When.
        at: Nanos,
        /// The container's cgroup.
        cgroup: CgroupId,
        /// What it would have become.
        to: Bytes,
        /// Why not.
        why: String,
    },
    /// A container does not get back what it has lent: it is not there any more.
    Owed {
        /// When.
        at: Nanos,
        /// The container's cgroup.
        cgroup: CgroupId,
        /// What it is, for people.
        name: String,
        /// How much; nothing when it has got it back.
        owed: Bytes,
        /// Pods that came to the node since.
        users: Vec<String>,
    },
    /// A cgroup is watched no more.
    Unwatch {
        /// When.
        at: Nanos,
        /// The cgroup.
        cgroup: CgroupId,
    },
    /// A cgroup is guarded no more.
    Forget {
        /// When.
        at: Nanos,
        /// The cgroup.
        cgroup: CgroupId,
    },
}

/// Where a jobserver is, as long as its owner lives: a descriptor, and which pipe it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Place {
    /// The make or cargo that has it for others.
    pub owner: ProcessId,
    /// By which it has it.
    pub descriptor: i32,
    /// The pipe's.
    pub device: u64,
    /// The pipe's.
    pub inode: u64,
}

/// An open ledger.
#[derive(Debug)]
pub struct Ledger {
    file: File,
    path: PathBuf,
    line: Vec<u8>,
}

impl Record {
    /// The cgroup that it is about.
    #[must_use]
    pub const fn cgroup(&self) -> CgroupId {
        match self {
            Self::Adopt { cgroup, .. }
            | Self::Brake { cgroup, .. }
            | Self::Intend { cgroup, .. }
            | Self::Verify { cgroup, .. }
            | Self::Waits { cgroup, .. }
            | Self::Bounded { cgroup, .. }
            | Self::Pause { cgroup, .. }
            | Self::Resume { cgroup, .. }
            | Self::Tokens { cgroup, .. }
            | Self::Lends { cgroup, .. }
            | Self::Observe { cgroup, .. }
            | Self::WouldRaise { cgroup, .. }
            | Self::ObservedKill { cgroup, .. }
            | Self::Request { cgroup, .. }
            | Self::RequestFailed { cgroup, .. }
            | Self::Owed { cgroup, .. }
            | Self::Unwatch { cgroup, .. }
            | Self::Forget { cgroup, .. } => *cgroup,
        }
    }

    /// When it was written.
    #[must_use]
    pub const fn at(&self) -> Nanos {
        match self {
            Self::Adopt { at, .. }
            | Self::Brake { at, .. }
            | Self::Intend { at, .. }
            | Self::Verify { at, .. }
            | Self::Waits { at, .. }
            | Self::Bounded { at, .. }
            | Self::Pause { at, .. }
            | Self::Resume { at, .. }
            | Self::Tokens { at, .. }
            | Self::Lends { at, .. }
            | Self::Observe { at, .. }
            | Self::WouldRaise { at, .. }
            | Self::ObservedKill { at, .. }
            | Self::Request { at, .. }
            | Self::RequestFailed { at, .. }
            | Self::Owed { at, .. }
            | Self::Unwatch { at, .. }
            | Self::Forget { at, .. } => *at,
        }
    }
}

impl Ledger {
    /// Opens a ledger for appending, and creates it if need be.
    ///
    /// # Errors
    ///
    /// When the directory or file cannot be created.
    pub fn open(path: &Path) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let file = File::options().create(true).append(true).open(path)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            line: Vec::with_capacity(512),
        })
    }

    /// A second handle on the same file, for another thread.
    ///
    /// # Errors
    ///
    /// When the file cannot be opened again.
    pub fn another(&self) -> io::Result<Self> {
        Self::open(&self.path)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is time to [`Self::rotate`].
    ///
    /// # Errors
    ///
    /// When the file cannot be asked for its size.
    pub fn is_full(&self) -> io::Result<bool> {
        Ok(self.file.metadata()?.len() >= LARGEST)
    }

    /// Begins a new file with `first` and puts this one aside. At every instant there is a file under
    /// the ledger's name or, in its absence, the one put aside, that knows what is guarded. Other
    /// handles go on writing into the one put aside until they are replaced.
    ///
    /// # Errors
    ///
    /// When a file cannot be written or renamed; this handle is still good then.
    pub fn rotate(&mut self, first: &[Record]) -> io::Result<()> {
        let path = self.path.clone();
        let fresh = path.with_extension("next");
        // What a predecessor may have left of an attempt.
        remove_if_there(&fresh)?;
        let mut next = Self::open(&fresh)?;
        for record in first {
            next.append(record)?;
        }
        fs::rename(&path, previous(&path))?;
        fs::rename(&fresh, &path)?;
        *self = Self { path, ..next };
        Ok(())
    }

    /// Appends a record. Returns only after the kernel has it.
    ///
    /// # Errors
    ///
    /// When the file system is full; the caller then does not act.
    pub fn append(&mut self, record: &Record) -> io::Result<()> {
        encode(record, &mut self.line)?;
        with_reserve(|| self.file.write_all(&self.line))
    }

    /// Keeps the file for `explain` under another name: everything in it is undone.
    ///
    /// # Errors
    ///
    /// When it cannot be renamed.
    pub fn retire(self) -> io::Result<()> {
        fs::rename(&self.path, previous(&self.path))
    }

    /// Removes the file and the one put aside: everything in them is undone.
    ///
    /// # Errors
    ///
    /// When one cannot be removed.
    pub fn remove(self) -> io::Result<()> {
        // In this order: without the one the other counts.
        remove_if_there(&previous(&self.path))?;
        fs::remove_file(&self.path)
    }
}

/// Makes `line` the line of a record.
///
/// # Errors
///
/// When the record is no JSON (a path that is not UTF-8); `line` is of no use then.
pub fn encode(record: &Record, line: &mut Vec<u8>) -> io::Result<()> {
    // A line begins with a line break too: what a full file system has cut off before it must
    // not swallow it. Empty lines are skipped.
    line.clear();
    line.extend_from_slice(b"\n00000000 ");
    serde_json::to_writer(&mut *line, record)?;
    let crc = crc32fast::hash(&line[10..]);
    write!(&mut line[1..9], "{crc:08x}")?;
    line.push(b'\n');
    Ok(())
}

/// Removes a file that may not be there.
///
/// # Errors
///
/// When it is there and cannot be removed.
pub fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Where the ledger of the process before is kept.
#[must_use]
pub fn previous(path: &Path) -> PathBuf {
    path.with_extension("previous")
}

/// Where it is kept who is paused, beside the ledger at `path`: a file of its own, because its writer must not wait for
/// the controller, nor the controller for it.
#[must_use]
pub fn paused(path: &Path) -> PathBuf {
    beside(path, "paused")
}

/// Where it is kept what was done to requests, beside the ledger at `path`: a file of its own, because who was lent what must
/// be known for as long as that is not given back, and its writer is not the one who begins a new ledger.
#[must_use]
pub fn requests(path: &Path) -> PathBuf {
    beside(path, "requests")
}

fn beside(path: &Path, what: &str) -> PathBuf {
    let name = path.file_stem().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{name}-{what}.ledger"))
}

/// What a ledger file says.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Contents {
    /// Its readable records in order.
    pub records: Vec<Record>,
    /// Lines that were torn or damaged.
    pub unreadable: usize,
}

/// Reads a ledger file. What is damaged is counted and skipped.
///
/// # Errors
///
/// When the file cannot be read at all.
pub fn read(path: &Path) -> io::Result<Contents> {
    let bytes = fs::read(path)?;
    Ok(parse(&bytes))
}

/// Reads the bytes of a ledger file. What is damaged is counted and skipped.
#[must_use]
pub fn parse(bytes: &[u8]) -> Contents {
    let mut contents = Contents::default();
    for line in bytes
        .split(|&byte| byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        match parse_line(line) {
            Some(record) => contents.records.push(record),
            None => contents.unreadable += 1,
        }
    }
    contents
}

fn parse_line(line: &[u8]) -> Option<Record> {
    let (crc, rest) = line.split_at_checked(8)?;
    let json = rest.strip_prefix(b" ")?;
    let crc = u32::from_str_radix(std::str::from_utf8(crc).ok()?, 16).ok()?;
    if crc32fast::hash(json) != crc {
        return None;
    }
    serde_json::from_slice(json).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(n: u64) -> Record {
        Record::Intend {
            at: Nanos(n),
            cgroup: CgroupId(7),
            action: Action::Raise {
                from: Bytes::mib(1),
                to: Bytes::mib(2),
            },
            reason: Reason::WatermarkReached,
            demand: Bytes(n),
        }
    }

    fn written(records: &[Record]) -> Vec<u8> {
        let path = std::env::temp_dir().join(format!(
            "bellows-ledger-{}-{}",
            std::process::id(),
            records.len()
        ));
        let mut ledger = Ledger::open(&path).unwrap();
        for record in records {
            ledger.append(record).unwrap();
        }
        let bytes = fs::read(&path).unwrap();
        ledger.remove().unwrap();
        bytes
    }

    #[test]
    fn reads_back_what_was_written() {
        let records = [
            sample(1),
            Record::Forget {
                at: Nanos(2),
                cgroup: CgroupId(7),
            },
        ];
        let contents = parse(&written(&records));
        assert_eq!(
            contents,
            Contents {
                records: records.to_vec(),
                unreadable: 0
            }
        );
    }

    #[test]
    fn a_torn_tail_was_never_written() {
        let bytes = written(&[sample(1), sample(2), sample(3)]);
        let last = bytes[..bytes.len() - 1]
            .iter()
            .rposition(|&byte| byte == b'\n')
            .unwrap()
            + 1;
        for end in last + 1..bytes.len() - 1 {
            let contents = parse(&bytes[..end]);
            assert_eq!(
                (contents.records.len(), contents.unreadable),
                (2, 1),
                "cut at {end}"
            );
        }
    }

    #[test]
    fn a_rotated_ledger_knows_what_is_guarded() {
        let path = std::env::temp_dir().join(format!("bellows-rotate-{}", std::process::id()));
        let mut ledger = Ledger::open(&path).unwrap();
        let mut records = 0;
        while !ledger.is_full().unwrap() {
            ledger.append(&sample(records)).unwrap();
            records += 1;
        }
        ledger.rotate(&[sample(7)]).unwrap();
        ledger.append(&sample(8)).unwrap();
        assert!(!ledger.is_full().unwrap());
        assert_eq!(read(&path).unwrap().records, [sample(7), sample(8)]);
        let aside = read(&previous(&path)).unwrap().records.len();
        assert_eq!(u64::try_from(aside).unwrap(), records);
        fs::remove_file(previous(&path)).unwrap();
        ledger.remove().unwrap();
    }

    #[test]
    fn a_damaged_line_costs_only_itself() {
        let mut bytes = written(&[sample(1), sample(2), sample(3), sample(4)]);
        bytes[40] ^= 1;
        let contents = parse(&bytes);
        assert_eq!((contents.records.len(), contents.unreadable), (3, 1));
    }
}
