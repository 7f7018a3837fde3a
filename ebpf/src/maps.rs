//! Every map, with its key, value, writer, and what happens when it is full.

use aya_ebpf::{
    macros::map,
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use bellows_ebpf_common::{Growth, Guard, Holds, changes, loss};

use crate::known::{self, Known};

/// Cgroup id → what to watch. Written by the agent. Full: the agent's insert fails and says so.
#[map]
pub(crate) static GUARDS: HashMap<u64, Guard> = HashMap::with_max_entries(4096, 0);

/// Cgroup id → what was seen. The agent inserts the zeroed entry, the programs update it.
#[map]
pub(crate) static GROWTH: HashMap<u64, Growth> = HashMap::with_max_entries(4096, 0);

/// Changes of what the next map's answers rest on: by the agent in [`GUARDS`], and of cgroups as the
/// programs see them come and go.
#[map]
pub(crate) static CHANGES: Array<u64> = Array::with_max_entries(changes::SLOTS, 0);

/// Page counter → which tracked cgroups it is for, per CPU (see [`crate::known`]). Two counters that fall into one slot
/// displace each other.
#[map]
pub(crate) static KNOWN: PerCpuArray<Known> = PerCpuArray::with_max_entries(known::SLOTS, 0);

/// Cgroup id → holds. The agent (or a bench) inserts the zeroed entry, the programs update it.
#[map]
pub(crate) static HOLDS: HashMap<u64, Holds> = HashMap::with_max_entries(4096, 0);

/// Thread id → start of its outermost hold. Full: the oldest is forgotten, one hold is not counted.
#[map]
pub(crate) static HOLD_START: LruHashMap<u32, HoldStart> = LruHashMap::with_max_entries(8192, 0);

/// Urgent events ([`bellows_ebpf_common::MemoryEvent`]). Full: counted, sent again by the next charge.
#[map]
pub(crate) static MEMORY_EVENTS: RingBuf = RingBuf::with_byte_size(256 * 1024, 0);

/// Life events ([`bellows_ebpf_common::LifeEvent`]). Full: counted; the agent rescans on its tick.
#[map]
pub(crate) static LIFE_EVENTS: RingBuf = RingBuf::with_byte_size(1024 * 1024, 0);

/// Cgroup id → when it was told of last that it is throttled. Written by the agent, which inserts zero, and by the
/// programs.
#[map]
pub(crate) static QUOTAS: HashMap<u64, u64> = HashMap::with_max_entries(8192, 0);

/// Throttled cgroups ([`bellows_ebpf_common::LifeEvent`]). Full: counted, sent again when it is throttled next.
#[map]
pub(crate) static THROTTLES: RingBuf = RingBuf::with_byte_size(64 * 1024, 0);

/// Cgroup id → nothing: where programs that are executed are told of. Written by the agent. Full: the agent's insert
/// fails and says so.
#[map]
pub(crate) static BOOSTED: HashMap<u64, u8> = HashMap::with_max_entries(8192, 0);

/// Whether somebody reads of new cgroups in the next map. Written by the agent.
#[map]
pub(crate) static TELL_STARTS: Array<u32> = Array::with_max_entries(1, 0);

/// What begins ([`bellows_ebpf_common::StartEvent`]). Full: counted. A container is found when its runtime is asked, and
/// its start boosted late; a program that was not told of is not boosted.
#[map]
pub(crate) static STARTS: RingBuf = RingBuf::with_byte_size(512 * 1024, 0);

/// Slot of [`loss`] → count, per CPU. Written by the programs.
#[map]
pub(crate) static LOSSES: PerCpuArray<u64> = PerCpuArray::with_max_entries(loss::SLOTS, 0);

/// Cost → calls of the growth program, per CPU: those in no tracked cgroup, then the others, then the others
/// again without their helpers. The loader makes it large for the bench that reads it.
#[map]
pub(crate) static COSTS: PerCpuArray<u64> = PerCpuArray::with_max_entries(1, 0);

/// The running hold of one thread.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct HoldStart {
    /// When the outermost call began, nanoseconds.
    pub(crate) at_ns: u64,
    /// Calls entered and not yet left.
    pub(crate) depth: u64,
    /// Whether one of them reclaims.
    pub(crate) reclaims: u64,
    /// How often the thread had gone to sleep by itself before.
    pub(crate) sleeps: u64,
}
