//! What begins, as the kernel tells: cgroups that are made, and programs that are executed in cgroups that were named.

use aya::{
    Ebpf,
    maps::{Array, MapData},
};
use bellows_core::{CgroupId, Nanos};
use bellows_ebpf_common::{KIND_CGROUP_CREATED, KIND_EXEC, StartEvent};
use zerocopy::FromBytes as _;

use super::{
    programs::{LoadError, map},
    told::Event,
};

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

impl Event for Begun {
    const RING: &'static str = "STARTS";
    const NAMED: &'static str = "BOOSTED";
    type Kept = u8;

    fn decode(record: &[u8]) -> Option<Self> {
        begun(record)
    }
}

/// Has the programs tell of new cgroups, too: of these nobody knows a name before.
pub(super) fn tell_of_cgroups(programs: &mut Ebpf) -> Result<(), LoadError> {
    let mut wanted: Array<MapData, u32> = map(programs, "TELL_STARTS")?;
    let set = wanted.set(0, 1, 0);
    set.map_err(|source| LoadError::Map {
        name: "TELL_STARTS",
        source,
    })
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
