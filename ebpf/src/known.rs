//! What was found out of a page counter: which tracked cgroups its charges are for.
//!
//! Kept per CPU in a table that the counter's address selects from, so there is neither a lock nor a
//! hash to compute, and nobody else writes an entry while it is read: a program does not migrate, and
//! the kernel does not let it interrupt itself on one CPU (from Linux 5.12 on; before, a charge in an
//! interrupt may meet the same slot, and one counter is then taken for another's for a second at most).
//!
//! An entry holds while nothing has changed that it rests on: no guard, and no cgroup that came or went
//! (an address is used again only after its cgroup went). Whatever else may happen, such as a controller
//! switched off and on or a tracepoint that is missing, it is found out again within seconds.

use aya_ebpf::helpers::generated::bpf_jiffies64;
use bellows_ebpf_common::changes;

use crate::{
    maps::{CHANGES, GUARDS, KNOWN},
    memcg::{self, Address},
};

/// Counters that one CPU remembers.
pub(crate) const SLOTS: u32 = 256;
/// How deep below a tracked cgroup a charge may happen and still be seen.
const LEVELS: usize = 10;
/// Tracked cgroups above one another that a charge is looked at for: a container, its pod, and one more.
const NESTED: usize = 3;
/// An entry is old when so many bits of the kernel's ticks have passed: a quarter of a second to two
/// and a half, by `CONFIG_HZ`.
const TICK_BITS: u32 = 8;

/// A tracked cgroup.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Tracked {
    /// Its id; 0 for none.
    pub(crate) id: u64,
    pub(crate) counter: Address,
    pub(crate) watermark_pages: u64,
    pub(crate) huge_watermark_pages: u64,
}

/// What is known of one page counter.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Known {
    /// Which one: its distance from an address of our own. A verifier that knows the type of the
    /// counter's address lets nothing be computed from it but its difference to another one.
    key: u64,
    /// The changes up to which this holds.
    at_change: u64,
    /// The nearest tracked cgroup and those above it.
    pub(crate) tracked: [Tracked; NESTED],
}

/// Looks a counter up that is a program's argument, or finds out.
#[inline(always)]
pub(crate) fn of(counter: Address) -> Option<&'static Known> {
    let guards = CHANGES.get_ptr(changes::GUARDS)?;
    let cgroups = CHANGES.get_ptr(changes::CGROUPS)?;
    let key = counter.wrapping_sub(guards as u64);
    // SAFETY: the elements of an array are always there; the agent writes whole numbers.
    let guard_changes = unsafe { guards.read_volatile() };
    // SAFETY: as above; programs write whole numbers.
    let cgroup_changes = unsafe { cgroups.read_volatile() };
    // SAFETY: takes no argument and cannot fail.
    let ticks = unsafe { bpf_jiffies64() } >> TICK_BITS;
    // Each only grows, so the sum changes when one does.
    let change = guard_changes
        .wrapping_add(cgroup_changes)
        .wrapping_add(ticks);
    let slot = (key >> 11) ^ (key >> 19);
    #[expect(clippy::cast_possible_truncation, reason = "masked")]
    let slot = (slot & u64::from(SLOTS - 1)) as u32;
    let known = KNOWN.get_ptr_mut(slot)?;
    // SAFETY: the element belongs to this CPU, and the pointer is valid for the program's run.
    let known = unsafe { &mut *known };
    if known.key != key || known.at_change != change {
        known.key = key;
        known.at_change = change;
        find_out(counter, &mut known.tracked);
    }
    Some(known)
}

/// A cgroup came or went. The kernel's tracepoints for that are under one lock.
#[inline(always)]
pub(crate) fn cgroups_changed() {
    if let Some(count) = CHANGES.get_ptr_mut(changes::CGROUPS) {
        // SAFETY: the pointer is valid for the program's run, and nobody else writes.
        unsafe { *count += 1 };
    }
}

/// Walks up the hierarchy.
#[inline(always)]
fn find_out(counter: Address, tracked: &mut [Tracked; NESTED]) {
    for entry in &mut *tracked {
        entry.id = 0;
    }
    let mut found = 0;
    let mut at = counter;
    for _ in 0..LEVELS {
        // A counter that is not a memory cgroup's gives an error or an unknown id.
        if let Ok(id) = memcg::id(memcg::of_counter(at))
            && let Some(guard) = GUARDS.get_ptr(id)
            && let Some(entry) = tracked.get_mut(found)
        {
            // SAFETY: a map value stays readable while the program runs.
            let guard = unsafe { *guard };
            entry.id = id;
            entry.counter = at;
            entry.watermark_pages = guard.watermark_pages;
            entry.huge_watermark_pages = guard.huge_watermark_pages;
            found += 1;
        }
        match memcg::parent(at) {
            Ok(parent) if parent != 0 => at = parent,
            _ => break,
        }
    }
}
