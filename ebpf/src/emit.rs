//! Sending records: reserve, fill, submit; a full ring is counted and survived.

use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns};
use bellows_ebpf_common::{LifeEvent, MemoryEvent, loss};

use crate::maps::{LIFE_EVENTS, LOSSES, MEMORY_EVENTS};

/// `BPF_RB_NO_WAKEUP`: the reader looks at its tick.
const NO_WAKEUP: u64 = 1;

#[inline(always)]
pub(crate) fn now() -> u64 {
    // SAFETY: takes no argument and cannot fail.
    unsafe { bpf_ktime_get_ns() }
}

/// The current thread group's id (what userspace calls a process) and the thread's.
#[inline(always)]
pub(crate) fn process_and_thread() -> (u32, u32) {
    let ids = bpf_get_current_pid_tgid();
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the two halves of the helper's result"
    )]
    let halves = ((ids >> 32) as u32, ids as u32);
    halves
}

/// Counts a loss in `slot` of [`LOSSES`].
#[inline(always)]
pub(crate) fn lost(slot: u32) {
    if let Some(count) = LOSSES.get_ptr_mut(slot) {
        // SAFETY: the element belongs to this CPU, and the pointer is valid for the program's run.
        unsafe { *count += 1 };
    }
}

/// Sends an urgent event and wakes its reader.
#[inline(always)]
pub(crate) fn memory(event: &MemoryEvent) {
    match MEMORY_EVENTS.reserve::<MemoryEvent>(0) {
        Some(mut entry) => {
            entry.write(*event);
            entry.submit(0);
        }
        None => lost(loss::MEMORY_RING_FULL),
    }
}

/// Sends a life event without waking its reader.
#[inline(always)]
pub(crate) fn life(event: &LifeEvent) {
    match LIFE_EVENTS.reserve::<LifeEvent>(0) {
        Some(mut entry) => {
            entry.write(*event);
            entry.submit(NO_WAKEUP);
        }
        None => lost(loss::LIFE_RING_FULL),
    }
}
