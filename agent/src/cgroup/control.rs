//! An open file of a cgroup, for writes that must not resolve a path or allocate.
//!
//! Opened once and kept: a raise must not resolve a path, and a path may be reused by another cgroup while
//! an open file keeps failing with `ENODEV`. There are ten a guarded cgroup, so the path, which only an
//! error tells, is shared.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use bellows_core::Bytes;
use rustix::fs::OFlags;

use super::{Cgroup, CgroupError, Limit, parse_limit};

/// An open file of a cgroup.
#[derive(Debug)]
pub struct Control {
    file: File,
    directory: Arc<Path>,
    name: &'static str,
}

impl Control {
    /// Opens the file `name` of `cgroup`, for writes that do not wait where the kernel offers that: a limit or brake
    /// below usage is then in force at once, and whoever is charged next reclaims in place of the writer (6.16:
    /// `memory_high_write`, mm/memcontrol.c). Older kernels reclaim in the writer all the same.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`] when it cannot be opened for reading and writing.
    pub fn open(cgroup: &Cgroup, name: &'static str) -> Result<Self, CgroupError> {
        let without_waiting = OFlags::NONBLOCK.bits().cast_signed();
        Self::open_in(
            &cgroup.path,
            name,
            File::options()
                .read(true)
                .write(true)
                .custom_flags(without_waiting),
        )
    }

    /// Opens the limits of those that have inherited the limit of `cgroup`, for reading only. One that
    /// is gone is left out.
    #[must_use]
    pub fn open_heirs(cgroup: &Cgroup) -> Vec<Self> {
        let limit_of = |heir: &PathBuf| {
            Self::open_in(
                &heir.as_path().into(),
                "memory.max",
                File::options().read(true),
            )
        };
        let heirs = cgroup.heirs.iter();
        heirs.filter_map(|heir| limit_of(heir).ok()).collect()
    }

    /// Opens the file `name` of `cgroup` for reading only.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`] when it cannot be opened.
    pub fn open_read(cgroup: &Cgroup, name: &'static str) -> Result<Self, CgroupError> {
        Self::open_in(&cgroup.path, name, File::options().read(true))
    }

    fn open_in(
        directory: &Arc<Path>,
        name: &'static str,
        options: &OpenOptions,
    ) -> Result<Self, CgroupError> {
        match options.open(directory.join(name)) {
            Ok(file) => Ok(Self {
                file,
                directory: Arc::clone(directory),
                name,
            }),
            Err(source) => Err(CgroupError::Io {
                action: "open",
                path: directory.join(name),
                source,
            }),
        }
    }

    fn path(&self) -> PathBuf {
        self.directory.join(self.name)
    }

    fn failed(&self, action: &'static str) -> impl FnOnce(io::Error) -> CgroupError {
        move |source| CgroupError::Io {
            action,
            path: self.path(),
            source,
        }
    }

    /// Writes a limit.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`] when the kernel refuses it.
    pub fn set(&self, limit: Limit) -> Result<(), CgroupError> {
        let mut buffer = [0_u8; 24];
        let mut cursor = io::Cursor::new(&mut buffer[..]);
        let formatted = match limit {
            Limit::Max => cursor.write_all(b"max"),
            Limit::At(Bytes(bytes)) => write!(cursor, "{bytes}"),
        };
        let length = usize::try_from(cursor.position()).unwrap_or(0);
        formatted
            .and_then(|()| self.file.write_all_at(&buffer[..length], 0))
            .map_err(self.failed("write"))
    }

    /// Writes `0` or `1`.
    ///
    /// # Errors
    ///
    /// [`CgroupError::Io`] when the kernel refuses it.
    pub fn set_flag(&self, on: bool) -> Result<(), CgroupError> {
        let text: &[u8] = if on { b"1" } else { b"0" };
        self.file
            .write_all_at(text, 0)
            .map_err(self.failed("write"))
    }

    /// Reads the limit again.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read or is no limit.
    pub fn get(&self) -> Result<Limit, CgroupError> {
        let mut buffer = [0_u8; 24];
        let length = self
            .file
            .read_at(&mut buffer, 0)
            .map_err(self.failed("read"))?;
        let content = String::from_utf8_lossy(&buffer[..length]);
        parse_limit(&content).ok_or_else(|| CgroupError::Parse {
            path: self.path(),
            content: content.trim().to_owned(),
            expected: "limit",
        })
    }

    /// Whether it has this line; only the first 64 bytes are looked at.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when it cannot be read.
    pub fn has_line(&self, line: &str) -> Result<bool, CgroupError> {
        let mut buffer = [0_u8; 64];
        let length = self
            .file
            .read_at(&mut buffer, 0)
            .map_err(self.failed("read"))?;
        let mut lines = buffer[..length].split(|&byte| byte == b'\n');
        Ok(lines.any(|found| found == line.as_bytes()))
    }

    /// What `parse` makes of its first 128 bytes; `None` also where it cannot be read.
    pub fn parsed<T>(&self, parse: impl FnOnce(&str) -> Option<T>) -> Option<T> {
        let mut buffer = [0_u8; 128];
        let length = self.file.read_at(&mut buffer, 0).ok()?;
        parse(std::str::from_utf8(&buffer[..length]).ok()?)
    }
}
