//! Holds: how long the memory controller keeps tasks of a cgroup inside a charge.
//!
//! Three places hold a task: `mem_cgroup_handle_over_high` (the sleep of `memory.high`; on 6.18 and
//! later its body is `__mem_cgroup_handle_over_high`), reclaim inside a charge
//! (`try_to_free_mem_cgroup_pages`), and the OOM path. They nest, so a depth per thread is kept and
//! only the outermost call is counted. This measures; it must never be needed for a decision.
//!
//! The first is entered on many returns to user mode and mostly has nothing to do: on a busy machine a thread
//! is preempted inside it now and then for longer than a hold (twice in an hour of six busy loads far below their
//! brakes, on two emulated CPUs). So without reclaim it counts as long only if the thread went to sleep by
//! itself, which the kernel counts as a voluntary switch.

use aya_ebpf::{
    helpers::{bpf_get_current_cgroup_id, bpf_get_current_task},
    macros::{fentry, fexit},
    programs::{FEntryContext, FExitContext},
};
use bellows_ebpf_common::LONG_HOLD_NS;

use crate::{
    emit::{now, process_and_thread},
    maps::{HOLD_START, HOLDS, HoldStart},
    memcg,
    offsets::{ABSENT, OFF_TASK_VOLUNTARY},
};

macro_rules! hold {
    ($function:literal, $enter:ident, $leave:ident, reclaims: $reclaims:literal) => {
        #[fentry(function = $function)]
        pub(crate) fn $enter(_ctx: FEntryContext) -> i32 {
            enter($reclaims);
            0
        }

        #[fexit(function = $function)]
        pub(crate) fn $leave(_ctx: FExitContext) -> i32 {
            leave();
            0
        }
    };
}

hold!(
    "mem_cgroup_handle_over_high",
    over_high_enter,
    over_high_leave,
    reclaims: false
);
hold!(
    "try_to_free_mem_cgroup_pages",
    reclaim_enter,
    reclaim_leave,
    reclaims: true
);
hold!(
    "mem_cgroup_out_of_memory",
    oom_enter,
    oom_leave,
    reclaims: true
);

#[inline(always)]
fn current() -> (u64, u32) {
    // SAFETY: takes no argument and cannot fail.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    (cgroup, process_and_thread().1)
}

/// How often the current thread has gone to sleep by itself; `None` if this kernel does not tell.
#[inline(always)]
fn sleeps() -> Option<u64> {
    let offset = OFF_TASK_VOLUNTARY.load();
    if offset == ABSENT {
        return None;
    }
    // SAFETY: takes no argument and cannot fail.
    let task = unsafe { bpf_get_current_task() };
    memcg::read(task.wrapping_add(offset)).ok()
}

#[inline(always)]
fn enter(reclaims: bool) {
    let (cgroup, thread) = current();
    if HOLDS.get_ptr(cgroup).is_none() {
        return;
    }
    if let Some(start) = HOLD_START.get_ptr_mut(thread) {
        // SAFETY: the entry is this thread's own, valid while the program runs.
        let start = unsafe { &mut *start };
        start.depth += 1;
        start.reclaims |= u64::from(reclaims);
        return;
    }
    let start = HoldStart {
        at_ns: now(),
        depth: 1,
        reclaims: u64::from(reclaims),
        sleeps: sleeps().unwrap_or(0),
    };
    // A full LRU map forgets another thread's start: that hold goes uncounted.
    let _forgotten = HOLD_START.insert(thread, start, 0);
}

#[inline(always)]
fn leave() {
    let (cgroup, thread) = current();
    let Some(start) = HOLD_START.get_ptr_mut(thread) else {
        return;
    };
    // SAFETY: the entry is this thread's own, valid while the program runs.
    let start = unsafe { &mut *start };
    start.depth = start.depth.saturating_sub(1);
    if start.depth > 0 {
        return;
    }
    let held = now().wrapping_sub(start.at_ns);
    let was_held = start.reclaims != 0 || sleeps().is_none_or(|sleeps| sleeps != start.sleeps);
    let _gone = HOLD_START.remove(thread);
    let Some(holds) = HOLDS.get_ptr_mut(cgroup) else {
        return;
    };
    // SAFETY: a map value stays valid while the program runs; a lost update is one hold.
    let holds = unsafe { &mut *holds };
    holds.holds += 1;
    holds.total_ns += held;
    if held >= LONG_HOLD_NS && was_held {
        holds.long_holds += 1;
    }
    if held > holds.longest_ns {
        holds.longest_ns = held;
    }
}
