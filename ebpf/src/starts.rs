//! What begins: cgroups as they are made, with their path, and programs as they are executed in the cgroups that the
//! agent has named.
//!
//! Each is told through a ring that wakes: who looks a tick later finds a program that has counted its CPUs already.

use aya_ebpf::{
    helpers::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id,
        generated::bpf_probe_read_kernel_str,
    },
    maps::HashMap,
};
use bellows_ebpf_common::{StartEvent, StartHead, TEXT_BYTES, loss};

use crate::{
    emit::{self, now},
    maps::{STARTS, TELL_STARTS},
    memcg::Address,
};

/// How deep in the hierarchy a cgroup may stand that the agent has named.
const LEVELS: i32 = 12;

/// The nearest cgroup above the current task that is a key of a map.
#[inline(always)]
pub(crate) fn nearest<T>(map: &HashMap<u64, T>) -> Option<u64> {
    // SAFETY: takes no argument and cannot fail.
    let own = unsafe { bpf_get_current_cgroup_id() };
    if map.get_ptr(own).is_some() {
        return Some(own);
    }
    for level in 1..LEVELS {
        // SAFETY: an ancestor level that does not exist yields 0.
        let ancestor = unsafe { bpf_get_current_ancestor_cgroup_id(level) };
        if ancestor == 0 {
            break;
        }
        if map.get_ptr(ancestor).is_some() {
            return Some(ancestor);
        }
    }
    None
}

/// Tells of a new cgroup, if the agent wants to know.
#[inline(always)]
pub(crate) fn created(kind: u32, cgroup: u64, path: Address) {
    if TELL_STARTS.get(0).is_some_and(|&wanted| wanted != 0) {
        tell(kind, 0, cgroup, path);
    }
}

/// Tells of something that begins, by its name.
#[inline(always)]
pub(crate) fn tell(kind: u32, process: u32, cgroup_id: u64, text: Address) {
    let Some(mut entry) = STARTS.reserve::<StartEvent>(0) else {
        emit::lost(loss::START_RING_FULL);
        return;
    };
    let event = entry.as_mut_ptr();
    let head = StartHead {
        kind,
        pid: process,
        cgroup_id,
        at_ns: now(),
    };
    // SAFETY: the entry is this program's until it is submitted, and begins with its head.
    unsafe { event.cast::<StartHead>().write(head) };
    let to = event.cast::<u8>().wrapping_add(size_of::<StartHead>());
    #[expect(clippy::cast_possible_truncation, reason = "a small constant")]
    let bytes = TEXT_BYTES as u32;
    // SAFETY: so many bytes follow the head; the helper checks the source address, and ends what it copies.
    let read = unsafe { bpf_probe_read_kernel_str(to.cast(), bytes, text as *const _) };
    if read < 0 {
        emit::lost(loss::READ_FAILED);
        entry.discard(0);
    } else {
        entry.submit(0);
    }
}
