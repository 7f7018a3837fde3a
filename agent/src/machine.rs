//! What the machine has, however little of it this process may use.

use std::{fs, thread};

use bellows_core::Bytes;

/// In bytes, the pages that core and the kernel programs count in. Other kernels of arm64 have 16 or 64 KiB.
pub const COUNTED_PAGE: usize = 4096;

/// CPUs that are online, in the kernel's own notation. glibc reads the same (`sysconf`, `_SC_NPROCESSORS_ONLN`).
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// So many pages of this kernel's, as it counts them in `/proc` and in `memory.stat`.
#[must_use]
pub fn pages(count: u64) -> Bytes {
    let size = u64::try_from(rustix::param::page_size()).unwrap_or(u64::MAX);
    Bytes(count.saturating_mul(size))
}

/// Rounded down to whole pages of this kernel's, as it reads limits back.
#[must_use]
pub fn page_floor(size: Bytes) -> Bytes {
    Bytes(size.0 - size.0 % pages(1).0)
}

/// How many CPUs containers may run on. Not how many this process may: the kubelet's static CPU manager and a CPU limit
/// leave an agent with one of sixty-four, and what is counted by CPU (the kernel's stocks, what is idle) is the node's.
#[must_use]
pub fn online_cpus() -> u64 {
    let list = fs::read_to_string(ONLINE).ok();
    let own = || thread::available_parallelism().map_or(1, |cpus| cpus.get() as u64);
    list.and_then(|list| cpus_in(&list)).unwrap_or_else(own)
}

/// How many numbers a list such as `0-3,8` has; `None` if it is no list.
fn cpus_in(list: &str) -> Option<u64> {
    let mut ranges = list.trim().split(',').map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u64, u64) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    });
    ranges.try_fold(0_u64, |sum, count| sum.checked_add(count?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpus_are_counted_as_the_kernel_lists_them() {
        for (list, count) in [("0\n", 1), ("0-63\n", 64), ("0-3,8,10-11\n", 7), ("2,4", 2)] {
            assert_eq!(cpus_in(list), Some(count), "{list}");
        }
        for bad in [
            "",
            "\n",
            "a",
            "3-1",
            "0-",
            "-1",
            "0,,1",
            "0-18446744073709551615",
        ] {
            assert_eq!(cpus_in(bad), None, "{bad}");
        }
    }

    /// Affinity is what the static CPU manager takes away, and a thread's own.
    #[test]
    fn cpus_that_this_thread_may_not_use_count() {
        use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
        let before = online_cpus();
        let all = sched_getaffinity(None).unwrap();
        let first = (0..CpuSet::MAX_CPU).find(|&cpu| all.is_set(cpu)).unwrap();
        let mut one = CpuSet::new();
        one.set(first);
        sched_setaffinity(None, &one).unwrap();
        assert_eq!(thread::available_parallelism().unwrap().get(), 1);
        assert_eq!(online_cpus(), before);
        sched_setaffinity(None, &all).unwrap();
    }

    #[test]
    fn pages_have_the_size_that_this_kernel_gives_them() {
        assert_eq!(pages(3).0, 3 * rustix::param::page_size() as u64);
        assert_eq!(pages(u64::MAX), Bytes(u64::MAX));
        assert_eq!(page_floor(pages(3).plus(Bytes(1))), pages(3));
    }
}
