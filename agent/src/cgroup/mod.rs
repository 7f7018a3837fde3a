//! One cgroup v2 directory: reading what the kernel says, writing what it should do.
//!
//! Files that the kernel does not have are `None`, never zero; a count that a file of counts lacks is zero. Nothing here
//! decides. What is written again and again is a [`Control`].

mod control;
mod limits;
mod memory;
mod processes;
pub mod quota;
mod text;

use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use bellows_core::CgroupId;
use thiserror::Error;

pub use control::Control;
pub use memory::MemoryStat;
pub use text::{Limit, MemoryEvents, field, own, parse_events, parse_limit, parse_stalled};

/// The magic number of cgroup v2 (`CGROUP2_SUPER_MAGIC`, include/uapi/linux/magic.h).
const CGROUP2_SUPER_MAGIC: i64 = 0x6367_7270;

/// What went wrong with a cgroup file.
#[derive(Debug, Error)]
pub enum CgroupError {
    /// A file could not be read, written or created.
    #[error("{action} {path}: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// A file's content is not what the kernel documents.
    #[error("{path} contains `{content}`, which is no {expected}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// What it contains.
        content: String,
        /// What was expected.
        expected: &'static str,
    },
    /// The file system is not cgroup v2.
    #[error(
        "{path} is not on a cgroup v2 file system: boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 there"
    )]
    NotV2 {
        /// The path.
        path: PathBuf,
    },
}

impl CgroupError {
    /// Whether the cgroup is gone (removed while we held it).
    #[must_use]
    pub fn is_gone(&self) -> bool {
        match self {
            Self::Io { source, .. } => {
                source.kind() == io::ErrorKind::NotFound
                    || source.raw_os_error() == Some(libc::ENODEV)
            }
            Self::Parse { .. } | Self::NotV2 { .. } => false,
        }
    }

    /// Whether the kernel does not take what was written, such as a word that it does not know.
    #[must_use]
    pub fn is_invalid(&self) -> bool {
        let Self::Io { source, .. } = self else {
            return false;
        };
        source.raw_os_error() == Some(libc::EINVAL)
    }
}

/// A cgroup directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Shared: each guarded cgroup and each of its open files knows it.
    path: Arc<Path>,
    id: CgroupId,
    /// Cgroups below that have inherited its limit and follow it.
    heirs: Vec<PathBuf>,
}

impl Cgroup {
    /// The cgroup at `path`.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when there is no such directory or it is not on cgroup v2.
    pub fn open(path: &Path) -> Result<Self, CgroupError> {
        let io = |source| CgroupError::Io {
            action: "open",
            path: path.to_owned(),
            source,
        };
        let stat = rustix::fs::statfs(path).map_err(|errno| io(errno.into()))?;
        // Tests work on directories with files of the same names.
        if stat.f_type != CGROUP2_SUPER_MAGIC
            && !(cfg!(test) && path.starts_with(std::env::temp_dir()))
        {
            return Err(CgroupError::NotV2 {
                path: path.to_owned(),
            });
        }
        let id = CgroupId(fs::metadata(path).map_err(io)?.ino());
        Ok(Self {
            path: path.into(),
            id,
            heirs: Vec::new(),
        })
    }

    /// A directory with files of the same names, where there is no cgroup.
    #[cfg(test)]
    pub(crate) fn stand_in(path: &Path, id: CgroupId) -> Self {
        Self {
            path: path.into(),
            id,
            heirs: Vec::new(),
        }
    }

    /// Creates the cgroup `name` below this one.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when the directory cannot be created.
    pub fn create_child(&self, name: &str) -> Result<Self, CgroupError> {
        let path = self.path.join(name);
        fs::create_dir(&path).map_err(|source| CgroupError::Io {
            action: "create",
            path: path.clone(),
            source,
        })?;
        Self::open(&path)
    }

    /// Its directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its id.
    #[must_use]
    pub const fn id(&self) -> CgroupId {
        self.id
    }

    /// The content of one of its files.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`] when it cannot be read.
    pub fn read(&self, file: &str) -> Result<String, CgroupError> {
        let path = self.path.join(file);
        fs::read_to_string(&path).map_err(|source| CgroupError::Io {
            action: "read",
            path,
            source,
        })
    }

    /// Writes one of its files.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`] when it cannot be written.
    pub fn write(&self, file: &str, value: &str) -> Result<(), CgroupError> {
        let path = self.path.join(file);
        fs::write(&path, value).map_err(|source| CgroupError::Io {
            action: "write",
            path,
            source,
        })
    }

    /// Whether a file exists in it.
    #[must_use]
    pub fn has(&self, file: &str) -> bool {
        self.path.join(file).exists()
    }

    fn number(&self, file: &'static str) -> Result<u64, CgroupError> {
        let content = self.read(file)?;
        content
            .trim()
            .parse()
            .map_err(|_error| self.unparsable(file, &content, "number"))
    }

    fn unparsable(&self, file: &str, content: &str, expected: &'static str) -> CgroupError {
        CgroupError::Parse {
            path: self.path.join(file),
            content: content.trim().to_owned(),
            expected,
        }
    }

    /// The cgroups right below it; none if it is gone.
    pub(crate) fn children(&self) -> impl Iterator<Item = Result<Self, CgroupError>> {
        let entries = fs::read_dir(&self.path).into_iter().flatten().flatten();
        entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .map(|entry| Self::open(&entry.path()))
    }

    /// Removes it; it must be empty.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`], for example `EBUSY` while a process is left.
    pub fn remove(&self) -> Result<(), CgroupError> {
        fs::remove_dir(&self.path).map_err(|source| CgroupError::Io {
            action: "remove",
            path: self.path.to_path_buf(),
            source,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_that_is_no_cgroup_says_what_to_do() {
        let error = Cgroup::open(Path::new("/proc")).expect_err("proc is no cgroup");
        assert!(error.to_string().contains("mount cgroup2"), "{error}");
    }
}
