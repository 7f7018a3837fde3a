//! Reclaim: a tracked cgroup is at its limit, and the kernel takes memory back from it.
//!
//! That alone says little: a reader of one large file is there all the time and loses nothing. It says
//! *when to look* for a working set of page cache that does not fit, so that a quiet cgroup costs no
//! look at all. Told at most twice a second for one cgroup, and without waking anybody: thrash is demand
//! of the slow kind.

use aya_ebpf::{macros::fentry, programs::FEntryContext};
use bellows_ebpf_common::KIND_RECLAIM;

use crate::{
    emit::{self, now},
    life,
    maps::{GROWTH, GUARDS},
    memcg::{self, Address},
};

/// Shortest time between two events of one cgroup.
const EVENT_INTERVAL_NS: u64 = 500_000_000;

#[fentry(function = "try_to_free_mem_cgroup_pages")]
pub(crate) fn reclaim(ctx: FEntryContext) -> i32 {
    let memcg: Address = ctx.arg(0);
    let Ok(id) = memcg::id(memcg) else {
        return 0;
    };
    if GUARDS.get_ptr(id).is_none() {
        return 0;
    }
    let Some(growth) = GROWTH.get_ptr_mut(id) else {
        return 0;
    };
    // SAFETY: a map value stays valid while the program runs; a lost update is one event more.
    let growth = unsafe { &mut *growth };
    let at_ns = now();
    if at_ns.wrapping_sub(growth.last_reclaim_ns) < EVENT_INTERVAL_NS {
        return 0;
    }
    growth.last_reclaim_ns = at_ns;
    emit::life(&life::event(KIND_RECLAIM, 0, id));
    0
}
