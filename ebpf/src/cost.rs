//! What a call of the growth program costs, for the bench `hook-cost` and for nobody else.
//!
//! A machine that counts instructions as time (QEMU's `-icount shift=0`) makes the kernel's clock a
//! counter of executed instructions, so the clock at entry and at the end is the cost of a call, helpers
//! included; what one reading of the clock costs is taken off. What the helpers of a call in one tracked cgroup
//! cost (a look-up, a read, the clock) is measured by calling them again, which leaves the instructions of
//! the program itself, as compiled for the processor. [`COUNT_COST`] is frozen before loading: where
//! it is 0, the verifier removes all of this.

use crate::{
    emit::now,
    known::Tracked,
    maps::{COSTS, GROWTH},
    memcg,
    offsets::COUNT_COST,
};

/// Slots for calls of one kind; the last one counts whatever is dearer.
const SLOTS: u64 = bellows_ebpf_common::COST_SLOTS as u64;

/// The begin of a call.
pub(crate) struct Began {
    at: u64,
    /// What a reading of the clock costs.
    reading: u64,
}

#[inline(always)]
pub(crate) fn begin() -> Began {
    if COUNT_COST.load() == 0 {
        return Began { at: 0, reading: 0 };
    }
    let before = now();
    let at = now();
    let reading = at.wrapping_sub(before);
    Began { at, reading }
}

/// The end of a call, with the nearest tracked cgroup if there was one.
#[inline(always)]
pub(crate) fn end(began: &Began, tracked: Option<&Tracked>) {
    if COUNT_COST.load() == 0 {
        return;
    }
    let cost = now().wrapping_sub(began.at).wrapping_sub(began.reading);
    let Some(tracked) = tracked else {
        return count(0, cost);
    };
    count(SLOTS, cost);
    let before = now();
    let known = GROWTH.get_ptr(tracked.id).is_some();
    let read = memcg::usage(tracked.counter).is_ok();
    let helpers = now().wrapping_sub(before);
    if known && read {
        count(2 * SLOTS, cost.saturating_sub(helpers));
    }
}

#[inline(always)]
fn count(first: u64, cost: u64) {
    let slot = if cost < SLOTS { cost } else { SLOTS - 1 };
    #[expect(clippy::cast_possible_truncation, reason = "below thrice the slots")]
    let index = (first + slot) as u32;
    if let Some(count) = COSTS.get_ptr_mut(index) {
        // SAFETY: the element belongs to this CPU, and the pointer is valid for the program's run.
        unsafe { *count += 1 };
    }
}
