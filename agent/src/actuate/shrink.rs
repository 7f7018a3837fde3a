//! Making room for a lower limit without killing or braking what lives under it.
//!
//! Writing `memory.max` below usage reclaims in the writer and then kills. So page cache and the kernel's caches of
//! names and inodes are given back first, by `memory.reclaim` (Linux 5.19), which throttles nobody; then `memory.high` keeps a
//! reader from filling it again at once, close to usage by then, so that nobody sleeps for it. Before
//! 5.19 `memory.high` does both, and in a cgroup whose brake is not ours only for as long as it takes. This may block for as long as reclaim takes and must not run on the
//! reflex thread; it changes no limit.

use std::path::Path;

use bellows_core::{Bytes, Policy, Thresholds};

use super::squeeze::squeeze;
use crate::{
    cgroup::{Cgroup, CgroupError, Limit},
    explain::LEDGER,
    originals::Records,
};

const RECLAIM: &str = "memory.reclaim";
/// So often it is reclaimed what a reader has charged meanwhile.
const RECLAIMS: usize = 3;

/// A limit that is fuller than this is not set: more may be charged while it is.
const FULL_PER_MILLE: u64 = 970;

/// Brings usage under the watermark of `to`; returns whether that succeeded. The caller arms the
/// reflex afterwards, which puts the brake back where it belongs; a brake that is somebody else's is not
/// moved.
///
/// # Errors
///
/// [`CgroupError`] when a file cannot be read or written.
pub fn make_room(
    cgroup: &Cgroup,
    to: Bytes,
    policy: &Policy,
    foreign_brake: bool,
) -> Result<bool, CgroupError> {
    let target = Thresholds::under(policy, to);
    let stat = cgroup.stat()?;
    if stat.least() > target.watermark {
        return Ok(false);
    }
    if stat.usage > target.watermark {
        for _ in 0..RECLAIMS {
            reclaim(cgroup, cgroup.usage()?.minus(target.watermark));
        }
        // Dirty pages may not be given back so soon, and the next burst may have begun meanwhile: far above it everybody
        // would sleep for two seconds with each charge. A reader has charged little since.
        if cgroup.has(RECLAIM) && cgroup.usage()? > to {
            return Ok(false);
        }
        if !foreign_brake {
            cgroup.set_limit("memory.high", Limit::At(target.high))?;
        }
    }
    Ok(cgroup.usage()? <= target.watermark)
}

/// The same for a cgroup that nobody guards and whose brake is not ours: brings usage below a share of `to` that
/// leaves room for what is charged meanwhile.
///
/// # Errors
///
/// [`CgroupError`] when a file cannot be read.
pub fn make_room_in(cgroup: &Cgroup, to: Bytes) -> Result<bool, CgroupError> {
    let target = to.per_mille(FULL_PER_MILLE);
    let stat = cgroup.stat()?;
    if stat.least() > target {
        return Ok(false);
    }
    let excess = stat.usage.minus(target);
    if excess > Bytes::ZERO {
        if cgroup.has(RECLAIM) {
            reclaim(cgroup, excess);
        } else {
            squeeze(cgroup, target, &Records::squeezed(Path::new(LEDGER)))?;
        }
    }
    Ok(cgroup.usage()? <= target)
}

/// Whether usage leaves room for what is charged while a limit is set: nobody looks before it is lowered, and the
/// kernel kills.
///
/// # Errors
///
/// [`CgroupError`] when usage cannot be read.
pub fn fits(cgroup: &Cgroup, limit: Bytes) -> Result<bool, CgroupError> {
    Ok(cgroup.usage()? <= limit.per_mille(FULL_PER_MILLE))
}

/// Gives page cache back, and no memory that is in use: what is swapped out is not missed at once, and the limit would follow
/// it down to where its owner can only swap. Older kernels do not know the word, and reclaim as they do.
fn reclaim(cgroup: &Cgroup, excess: Bytes) {
    if excess == Bytes::ZERO || !cgroup.has(RECLAIM) {
        return;
    }
    let asked = cgroup.write(RECLAIM, &format!("{} swappiness=0", excess.0));
    let asked = match asked {
        Err(error) if error.is_invalid() => cgroup.write(RECLAIM, &excess.0.to_string()),
        asked => asked,
    };
    // EAGAIN says that less was reclaimed than asked for, which the look at usage shows.
    if let Err(error) = asked {
        tracing::debug!(%error, "reclaimed less than asked for");
    }
}
