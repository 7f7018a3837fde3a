//! What the machine has, however little of it this process may use.

use bellows_core::Bytes;

/// In bytes, the pages that core and the kernel programs count in. Other kernels of arm64 have 16 or 64 KiB.
pub const COUNTED_PAGE: usize = 4096;

/// So many pages of this kernel's, as it counts them in `/proc` and in `memory.stat`.
#[must_use]
pub fn pages(count: u64) -> Bytes {
    let size = u64::try_from(rustix::param::page_size()).unwrap_or(u64::MAX);
    Bytes(count.saturating_mul(size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_have_the_size_that_this_kernel_gives_them() {
        assert_eq!(pages(3).0, 3 * rustix::param::page_size() as u64);
        assert_eq!(pages(u64::MAX), Bytes(u64::MAX));
    }
}
