//! What begins, as the kernel tells: cgroups that are made, and programs that are executed in cgroups that were named.

use std::os::fd::{AsFd as _, BorrowedFd};

use aya::{
    Ebpf,
    maps::{Array, HashMap, MapData, RingBuf},
};
use bellows_core::{CgroupId, Nanos};
use bellows_ebpf_common::{KIND_CGROUP_CREATED, KIND_EXEC, StartEvent};
use zerocopy::FromBytes as _;

use super::programs::{LoadError, map};

/// What has begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Begun {
    /// A cgroup, with its path below the root of the hierarchy.
    Cgroup(String),
    /// A program.
    Program {
        /// In this cgroup or one below.
        cgroup: CgroupId,
        /// Its process.
        process: u32,
        /// The file as it was asked for.
        file: String,
        /// When.
        at: Nanos,
    },
}

/// The ring, and where programs are told of.
pub struct Starts {
    ring: RingBuf<MapData>,
    named: HashMap<MapData, u64, u8>,
}

impl std::fmt::Debug for Starts {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Starts").finish_non_exhaustive()
    }
}

impl Starts {
    pub(super) fn of(programs: &mut Ebpf) -> Result<Self, LoadError> {
        let mut wanted: Array<MapData, u32> = map(programs, "TELL_STARTS")?;
        let set = wanted.set(0, 1, 0);
        set.map_err(|source| LoadError::Map {
            name: "TELL_STARTS",
            source,
        })?;
        Ok(Self {
            ring: map(programs, "STARTS")?,
            named: map(programs, "BOOSTED")?,
        })
    }

    /// Readable when something begins.
    #[must_use]
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }

    /// Tells of programs in a cgroup from now on.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`] when the map is full (8192 cgroups).
    pub fn watch(&mut self, cgroup: CgroupId) -> Result<(), LoadError> {
        let named = self.named.insert(cgroup.0, 0, 0);
        named.map_err(|source| LoadError::Map {
            name: "BOOSTED",
            source,
        })
    }

    /// Tells of them no more.
    pub fn forget(&mut self, cgroup: CgroupId) {
        if let Err(error) = self.named.remove(&cgroup.0) {
            tracing::debug!(cgroup.id = cgroup.0, %error, "the cgroup was not watched");
        }
    }

    /// The next that has begun; never waits. A record of another build is skipped.
    pub fn take(&mut self) -> Option<Begun> {
        loop {
            let item = self.ring.next()?;
            match begun(&item) {
                Some(begun) => return Some(begun),
                None => tracing::warn!(bytes = item.len(), "an unknown event was skipped"),
            }
        }
    }
}

/// Decodes an event; `None` for a record of another build.
#[must_use]
pub fn begun(bytes: &[u8]) -> Option<Begun> {
    let StartEvent { head, text } = StartEvent::ref_from_bytes(bytes).ok()?;
    let end = text.iter().position(|&byte| byte == 0)?;
    let text = String::from_utf8_lossy(text.get(..end)?).into_owned();
    match head.kind {
        KIND_CGROUP_CREATED => Some(Begun::Cgroup(text)),
        KIND_EXEC => Some(Begun::Program {
            cgroup: CgroupId(head.cgroup_id),
            process: head.pid,
            file: text,
            at: Nanos(head.at_ns),
        }),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bellows_ebpf_common::{StartHead, TEXT_BYTES};
    use zerocopy::IntoBytes as _;

    #[test]
    fn what_is_no_event_is_none() {
        let event = |kind, text: [u8; TEXT_BYTES]| StartEvent {
            head: StartHead {
                kind,
                pid: 7,
                cgroup_id: 9,
                at_ns: 11,
            },
            text,
        };
        let mut text = [b'x'; TEXT_BYTES];
        assert_eq!(begun(event(KIND_EXEC, text).as_bytes()), None);
        // What follows the end is whatever was there.
        text[..5].copy_from_slice(b"/a/b\0");
        let program = Begun::Program {
            cgroup: CgroupId(9),
            process: 7,
            file: "/a/b".to_owned(),
            at: Nanos(11),
        };
        assert_eq!(begun(event(KIND_EXEC, text).as_bytes()), Some(program));
        let cgroup = begun(event(KIND_CGROUP_CREATED, text).as_bytes());
        assert_eq!(cgroup, Some(Begun::Cgroup("/a/b".to_owned())));
        assert_eq!(begun(event(77, text).as_bytes()), None);
        assert_eq!(begun(&event(KIND_EXEC, text).as_bytes()[1..]), None);
        assert_eq!(begun(&[]), None);
    }
}
