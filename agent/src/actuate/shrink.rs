//! Lowering a limit without killing what lives under it.
//!
//! Writing `memory.max` below usage reclaims in the writer and then kills. So `memory.high` goes
//! down first: it reclaims page cache and never kills. Only when usage has really come down is the
//! limit lowered; otherwise everything is put back. This may block for as long as reclaim takes and
//! must not run on the reflex thread.

use bellows_core::{Bytes, Thresholds};

use crate::cgroup::{Cgroup, CgroupError, Limit};

/// What became of a shrink.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shrunk {
    /// The limit is lowered.
    Done,
    /// Usage did not come down to where it would have to be; nothing has changed.
    Refused {
        /// Usage after reclaim.
        usage: Bytes,
    },
}

/// Brings usage under the watermark of `to`, so that [`Cgroup::set_limit`] can follow.
///
/// # Errors
///
/// [`CgroupError`] when a file cannot be read or written; the brake is put back.
pub fn make_room(
    cgroup: &Cgroup,
    from: Option<Thresholds>,
    to: Bytes,
    cpus: u64,
) -> Result<Shrunk, CgroupError> {
    let target = Thresholds::of(to, cpus);
    cgroup.set_limit("memory.high", Limit::At(target.high))?;
    let usage = cgroup.usage();
    match usage {
        Ok(usage) if usage <= target.watermark => Ok(Shrunk::Done),
        other => {
            let before = from.map_or(Limit::Max, |thresholds| Limit::At(thresholds.high));
            cgroup.set_limit("memory.high", before)?;
            other.map(|usage| Shrunk::Refused { usage })
        }
    }
}

/// Lowers the limit of a cgroup that nobody else manages.
///
/// # Errors
///
/// [`CgroupError`] when a file cannot be read or written.
pub fn direct(
    cgroup: &Cgroup,
    from: Option<Thresholds>,
    to: Bytes,
    cpus: u64,
) -> Result<Shrunk, CgroupError> {
    let shrunk = make_room(cgroup, from, to, cpus)?;
    if shrunk == Shrunk::Done {
        cgroup.set_limit("memory.max", Limit::At(to))?;
    }
    Ok(shrunk)
}
