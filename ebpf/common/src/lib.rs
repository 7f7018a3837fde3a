//! The wire contract between the kernel programs and the agent.
//!
//! Both sides are built from this one file, so the layouts cannot drift; a record that crosses
//! the ring buffer is nevertheless treated as untrusted bytes by the agent (a program of another
//! build may still be attached). Kinds are plain `u32` constants: an enum would be undefined
//! behaviour for a value that the other side does not know.
//!
//! This crate must not contain behaviour that one side needs and the other does not, and must not
//! hold pointers or kernel types.
#![no_std]

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A tracked memory cgroup came within its watermark.
pub const KIND_WATERMARK: u32 = 1;
/// The OOM killer was entered for a tracked memory cgroup (`mem_cgroup_out_of_memory`).
pub const KIND_OOM: u32 = 2;
/// A process of a tracked cgroup executed a program (`sched_process_exec`).
pub const KIND_EXEC: u32 = 3;
/// A process (thread group leader) of a tracked cgroup exited (`sched_process_exit`).
pub const KIND_EXIT: u32 = 4;
/// A cgroup was created (`cgroup_mkdir`); sent for every cgroup.
pub const KIND_CGROUP_CREATED: u32 = 5;
/// A cgroup was removed (`cgroup_rmdir`); sent for every cgroup.
pub const KIND_CGROUP_REMOVED: u32 = 6;

/// Memory is being reclaimed from a tracked cgroup on its own account
/// (`try_to_free_mem_cgroup_pages`): it is at its limit or its brake.
pub const KIND_RECLAIM: u32 = 7;

/// Somebody writes a tracked cgroup's `memory.max` or `memory.high`.
pub const KIND_WRITTEN: u32 = 8;

/// A tracked cgroup has used its CPU quota up (`throttle_cfs_rq`): sent through a ring of its own, which wakes.
pub const KIND_THROTTLED: u32 = 9;

/// It is not known how the task that is charged for came into the kernel.
pub const ENTRY_UNKNOWN: u32 = 0;
/// By a page fault: it is back in user mode, where it can be frozen, as soon as that is served.
pub const ENTRY_FAULT: u32 = 1;
/// By a system call, which may go on growing for as long as it takes; a frozen cgroup does not stop it.
pub const ENTRY_CALL: u32 = 2;

/// Pages that the kernel charges at once for small ones (`MEMCG_CHARGE_BATCH`, include/linux/memcontrol.h).
pub const BATCH_PAGES: u64 = 64;

/// The value of [`Guard::watermark_pages`] that never triggers.
pub const WATERMARK_OFF: u64 = u64::MAX;

/// Bytes kept of an executed file's name.
pub const NAME_BYTES: usize = 64;

/// Bytes kept of a path: a systemd driver's in a nested node has 350.
pub const TEXT_BYTES: usize = 512;

/// An urgent memory event: it wakes the reflex thread.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MemoryEvent {
    /// [`KIND_WATERMARK`] or [`KIND_OOM`].
    pub kind: u32,
    /// Pages of the charge that triggered the event (64 for a batch, 512 for a huge page).
    pub charge_pages: u32,
    /// Inode number of the cgroup's directory, as `bpf_get_current_cgroup_id` has it.
    pub cgroup_id: u64,
    /// `CLOCK_MONOTONIC` at the trigger, in nanoseconds.
    pub at_ns: u64,
    /// `memory.current` in pages, the charge included.
    pub usage_pages: u64,
    /// Pages on the cgroup's file LRU lists: page cache that reclaim can give back.
    pub file_pages: u64,
    /// `memory.max` in pages as the kernel has it.
    pub limit_pages: u64,
    /// Pages by which usage grew over the last complete window.
    pub window_pages: u64,
    /// Length of that window in nanoseconds; 0 when there is none yet.
    pub window_ns: u64,
    /// [`ENTRY_UNKNOWN`], [`ENTRY_FAULT`] or [`ENTRY_CALL`].
    pub entry: u32,
    /// Id of the thread that is charged for; 0 where nobody is.
    pub thread: u32,
}

/// An event of a process's or a cgroup's life: read at the tick, never urgent.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LifeEvent {
    /// [`KIND_EXEC`], [`KIND_EXIT`], [`KIND_CGROUP_CREATED`], [`KIND_CGROUP_REMOVED`],
    /// [`KIND_RECLAIM`], [`KIND_WRITTEN`] or [`KIND_THROTTLED`].
    pub kind: u32,
    /// Thread group id; 0 for cgroup events.
    pub pid: u32,
    /// The tracked cgroup, or the one created or removed.
    pub cgroup_id: u64,
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    pub at_ns: u64,
    /// The executed file's name, NUL-padded; empty for other kinds.
    pub name: [u8; NAME_BYTES],
}

/// Something begins: it wakes its reader.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct StartEvent {
    /// What, where and when.
    pub head: StartHead,
    /// The executed file's name as it was asked for, or the cgroup's path; ends with a NUL, after which anything may
    /// follow.
    pub text: [u8; TEXT_BYTES],
}

/// The beginning of a [`StartEvent`]: the programs write the two parts one after the other, because both together do
/// not fit on their stack.
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct StartHead {
    /// [`KIND_EXEC`] or [`KIND_CGROUP_CREATED`].
    pub kind: u32,
    /// Thread group id; 0 for a cgroup.
    pub pid: u32,
    /// The cgroup that the agent has named, or the one created.
    pub cgroup_id: u64,
    /// `CLOCK_MONOTONIC`, in nanoseconds.
    pub at_ns: u64,
}

/// What the agent asks the kernel to watch in one cgroup. Written by the agent only.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Guard {
    /// Demand (usage without page cache) in pages from which on the agent is woken.
    pub watermark_pages: u64,
    /// The same for a charge of more than [`BATCH_PAGES`]: the next huge page may not fit any more.
    pub huge_watermark_pages: u64,
}

/// What the kernel programs know of one tracked cgroup. Written by the programs only.
///
/// Updates from several CPUs may interleave: a lost increment or a window that mixes two
/// CPUs' views is acceptable, because every decision is checked again against `memory.current`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Growth {
    /// Calls of `page_counter_try_charge` for this cgroup or one below it.
    pub charges: u64,
    /// Highest usage seen, in pages.
    pub peak_pages: u64,
    /// Highest demand (usage without page cache) seen above the watermark, in pages.
    pub peak_demand_pages: u64,
    /// When the last event was sent, `CLOCK_MONOTONIC` nanoseconds.
    pub last_event_ns: u64,
    /// When usage last rose above its previous highest value.
    pub last_peak_ns: u64,
    /// Start of the running window.
    pub window_start_ns: u64,
    /// Usage at the start of the running window, in pages.
    pub window_start_pages: u64,
    /// Growth over the last complete window, in pages.
    pub window_pages: u64,
    /// Length of the last complete window, in nanoseconds.
    pub window_ns: u64,
    /// When the last [`KIND_RECLAIM`] was sent.
    pub last_reclaim_ns: u64,
}

/// Time that tasks of one cgroup were held by the kernel's memory controller.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Holds {
    /// Holds of 10 ms or more.
    pub long_holds: u64,
    /// All holds.
    pub holds: u64,
    /// Sum of all holds, in nanoseconds.
    pub total_ns: u64,
    /// Longest hold, in nanoseconds.
    pub longest_ns: u64,
}

/// From which length on a hold counts as a sleep: the kernel itself skips shorter ones
/// (`mem_cgroup_handle_over_high`, mm/memcontrol.c: `penalty_jiffies <= HZ / 100`).
pub const LONG_HOLD_NS: u64 = 10_000_000;

/// Slots of the map `COSTS` for each kind of call.
pub const COST_SLOTS: u32 = 4096;
/// Kinds of calls: in no tracked cgroup, in a tracked one, and the latter without its helpers.
pub const COST_KINDS: u32 = 3;

/// Slots of the array `CHANGES`, whose sum tells whether what was found out before still holds.
pub mod changes {
    /// Changes of the guards: counted by the agent, after each.
    pub const GUARDS: u32 = 0;
    /// Cgroups that came or went: counted by the programs.
    pub const CGROUPS: u32 = 1;
    /// Number of slots.
    pub const SLOTS: u32 = 2;
}

/// Losses and errors of the programs, one slot each in the per-CPU array `LOSSES`.
pub mod loss {
    /// A memory event found its ring full.
    pub const MEMORY_RING_FULL: u32 = 0;
    /// A life event found its ring full.
    pub const LIFE_RING_FULL: u32 = 1;
    /// A kernel read failed where it should not.
    pub const READ_FAILED: u32 = 2;
    /// A throttled cgroup found its ring full.
    pub const THROTTLE_RING_FULL: u32 = 3;
    /// Something that begins found its ring full.
    pub const START_RING_FULL: u32 = 4;
    /// Number of slots.
    pub const SLOTS: u32 = 5;
}

const _: () = {
    assert!(size_of::<MemoryEvent>() == 72);
    assert!(size_of::<LifeEvent>() == 24 + NAME_BYTES);
    assert!(size_of::<StartHead>() == 24);
    assert!(size_of::<StartEvent>() == 24 + TEXT_BYTES);
    assert!(size_of::<Growth>() == 80);
    assert!(size_of::<Holds>() == 32);
};

#[cfg(feature = "user")]
mod pod {
    use super::{Growth, Guard, Holds};

    // SAFETY: `repr(C)`, only `u64` fields (zerocopy's derives prove that there is no padding),
    // valid for every bit pattern.
    unsafe impl aya::Pod for Guard {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Growth {}
    // SAFETY: as above.
    unsafe impl aya::Pod for Holds {}
}
