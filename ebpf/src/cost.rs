//! What a call of the growth program costs, for the bench `hook-cost` and for nobody else.
//!
//! A machine that counts instructions as time (QEMU's `-icount shift=0`) makes the kernel's clock a
//! counter of executed instructions, so the clock at entry and at the end is the cost of a call, the
//! helpers and one reading of the clock itself included. [`COUNT_COST`] is frozen before loading: where
//! it is 0, the verifier removes all of this.

use crate::{emit::now, maps::COSTS, offsets::COUNT_COST};

/// Slots for calls in one kind of cgroup; the last one counts whatever is dearer.
const SLOTS: u64 = bellows_ebpf_common::COST_SLOTS as u64;

#[inline(always)]
pub(crate) fn begin() -> u64 {
    if COUNT_COST.load() == 0 { 0 } else { now() }
}

#[inline(always)]
pub(crate) fn end(began: u64, tracked: bool) {
    if COUNT_COST.load() == 0 {
        return;
    }
    let cost = now().wrapping_sub(began);
    let slot = if cost < SLOTS { cost } else { SLOTS - 1 };
    let kind = if tracked { SLOTS } else { 0 };
    #[expect(clippy::cast_possible_truncation, reason = "below twice the slots")]
    let index = (kind + slot) as u32;
    if let Some(count) = COSTS.get_ptr_mut(index) {
        // SAFETY: the element belongs to this CPU, and the pointer is valid for the program's run.
        unsafe { *count += 1 };
    }
}
