//! Reading the kernel's memory cgroup structures by resolved offsets.
//!
//! Every read is `bpf_probe_read_kernel`: a pointer that is not what it seems (a page counter of
//! another kind, a structure of another kernel) yields an error or a number that no map knows,
//! never a fault.

use aya_ebpf::helpers::bpf_probe_read_kernel;

use crate::offsets::{
    ABSENT, NODES, OFF_CGROUP_KN, OFF_COUNTER_MAX, OFF_COUNTER_PARENT, OFF_COUNTER_USAGE,
    OFF_KERNFS_ID, OFF_LRU_ZONE_SIZE, OFF_LRUGEN_PAGES, OFF_MEMCG_CGROUP, OFF_MEMCG_MEMORY,
    OFF_MEMCG_NODEINFO, ZONES,
};

/// Zones read per node; the kernel has five or six (`MAX_NR_ZONES`).
const MAX_ZONES: usize = 6;
/// NUMA nodes summed over; beyond them page cache counts as demand (safe: it raises too early).
const MAX_NODES: u64 = 8;
/// Generations of the multi-gen LRU (`MAX_NR_GENS`, include/linux/mmzone.h).
const GENERATIONS: u64 = 4;
/// Index of `LRU_INACTIVE_FILE` among a zone's lists; `LRU_ACTIVE_FILE` follows it.
const INACTIVE_FILE: u64 = 2;
/// Lists of a zone in `lru_zone_size` (`NR_LRU_LISTS`).
const LISTS: u64 = 5;

/// Memory cgroups below the tracked one whose page cache is told from demand.
const LEVELS_BELOW: usize = 5;

/// Address of a kernel object.
pub(crate) type Address = u64;

#[inline(always)]
pub(crate) fn read<T>(address: Address) -> Result<T, i32> {
    // SAFETY: the helper checks the source address itself and fails instead of faulting.
    unsafe { bpf_probe_read_kernel(address as *const T) }
}

/// The memory cgroup that a page counter belongs to, if it is its `memory` counter.
#[inline(always)]
pub(crate) fn of_counter(counter: Address) -> Address {
    counter.wrapping_sub(OFF_MEMCG_MEMORY.load())
}

/// Id of a cgroup: the inode number of its directory.
#[inline(always)]
pub(crate) fn cgroup_id(cgroup: Address) -> Result<u64, i32> {
    let node: u64 = read(cgroup.wrapping_add(OFF_CGROUP_KN.load()))?;
    read(node.wrapping_add(OFF_KERNFS_ID.load()))
}

#[inline(always)]
pub(crate) fn id(memcg: Address) -> Result<u64, i32> {
    let cgroup: u64 = read(memcg.wrapping_add(OFF_MEMCG_CGROUP.load()))?;
    cgroup_id(cgroup)
}

#[inline(always)]
pub(crate) fn counter(memcg: Address) -> Address {
    memcg.wrapping_add(OFF_MEMCG_MEMORY.load())
}

#[inline(always)]
pub(crate) fn usage(counter: Address) -> Result<u64, i32> {
    read(counter.wrapping_add(OFF_COUNTER_USAGE.load()))
}

#[inline(always)]
pub(crate) fn limit(counter: Address) -> Result<u64, i32> {
    read(counter.wrapping_add(OFF_COUNTER_MAX.load()))
}

#[inline(always)]
pub(crate) fn parent(counter: Address) -> Result<Address, i32> {
    read(counter.wrapping_add(OFF_COUNTER_PARENT.load()))
}

/// Pages on the file lists of a memory cgroup, without flushing its statistics.
///
/// The classic and the multi-gen LRU are both summed: whichever is off is empty, so flipping
/// `/sys/kernel/mm/lru_gen/enabled` at run time needs nothing from us (measured on 6.12).
#[inline(always)]
pub(crate) fn file_pages(memcg: Address) -> Result<u64, i32> {
    let nodes = NODES.load();
    let mut sum = 0;
    for index in 0..MAX_NODES {
        if index >= nodes {
            break;
        }
        let slot = memcg
            .wrapping_add(OFF_MEMCG_NODEINFO.load())
            .wrapping_add(index * 8);
        let node: u64 = read(slot)?;
        if node != 0 {
            sum += classic_file_pages(node)? + generation_file_pages(node)?;
        }
    }
    Ok(sum)
}

/// The same of a memory cgroup and those on the way down to the one of `charged`, whose lists the kernel keeps
/// apart. What others beside that way have cached counts as demand (safe: it raises too early).
#[inline(always)]
pub(crate) fn file_pages_between(counter: Address, charged: Address) -> Result<u64, i32> {
    let mut sum = file_pages(of_counter(counter))?;
    let mut at = charged;
    for _ in 0..LEVELS_BELOW {
        if at == counter || at == 0 {
            break;
        }
        sum += file_pages(of_counter(at))?;
        at = parent(at)?;
    }
    Ok(sum)
}

#[inline(always)]
fn classic_file_pages(node: Address) -> Result<u64, i32> {
    let zones = ZONES.load();
    let sizes = node.wrapping_add(OFF_LRU_ZONE_SIZE.load());
    let mut sum = 0;
    for zone in 0..MAX_ZONES as u64 {
        if zone >= zones {
            break;
        }
        let [inactive, active]: [u64; 2] =
            read(sizes.wrapping_add((zone * LISTS + INACTIVE_FILE) * 8))?;
        sum += inactive + active;
    }
    Ok(sum)
}

#[inline(always)]
fn generation_file_pages(node: Address) -> Result<u64, i32> {
    let offset = OFF_LRUGEN_PAGES.load();
    if offset == ABSENT {
        return Ok(0);
    }
    let zones = ZONES.load();
    let mut sum: i64 = 0;
    for generation in 0..GENERATIONS {
        // nr_pages[generation][type][zone]; type 1 is file.
        let row = (generation * 2 + 1) * zones * 8;
        let pages: [i64; MAX_ZONES] = read(node.wrapping_add(offset).wrapping_add(row))?;
        for (zone, count) in pages.iter().enumerate() {
            if (zone as u64) < zones {
                sum += count;
            }
        }
    }
    // Transiently negative while pages move between generations.
    Ok(if sum < 0 { 0 } else { sum.unsigned_abs() })
}
