//! CPU quotas that are used up.
//!
//! A runqueue of the group is throttled here, under the lock of its CPU; whoever raises the quota takes the same lock
//! to go on, so an answer cannot come too early. No tracepoint tells of it in any kernel up to 7.3.

use aya_ebpf::{macros::fentry, programs::FEntryContext};
use bellows_ebpf_common::{KIND_THROTTLED, LifeEvent, loss};

use crate::{
    emit, life,
    maps::{QUOTAS, THROTTLES},
    memcg::{self, Address},
    offsets::{ABSENT, OFF_CFS_RQ_GROUP, OFF_GROUP_CGROUP},
};

/// One event in so many nanoseconds: each CPU of a group is throttled by itself.
const INTERVAL: u64 = 1_000_000;

#[fentry(function = "throttle_cfs_rq")]
pub(crate) fn throttled(ctx: FEntryContext) -> i32 {
    if OFF_CFS_RQ_GROUP.load() == ABSENT || OFF_GROUP_CGROUP.load() == ABSENT {
        return 0;
    }
    match cgroup_of(ctx.arg(0)) {
        Ok(id) => tell(id),
        Err(_) => emit::lost(loss::READ_FAILED),
    }
    0
}

/// Id of the cgroup whose runqueue it is.
#[inline(always)]
fn cgroup_of(runqueue: Address) -> Result<u64, i32> {
    let group: Address = memcg::read(runqueue.wrapping_add(OFF_CFS_RQ_GROUP.load()))?;
    let cgroup: Address = memcg::read(group.wrapping_add(OFF_GROUP_CGROUP.load()))?;
    memcg::cgroup_id(cgroup)
}

#[inline(always)]
fn tell(id: u64) {
    let Some(last) = QUOTAS.get_ptr_mut(id) else {
        return;
    };
    let event: LifeEvent = life::event(KIND_THROTTLED, 0, id);
    // SAFETY: a map value stays there while the program runs; two CPUs that write at once send one event more.
    let before = unsafe { *last };
    if event.at_ns.wrapping_sub(before) < INTERVAL {
        return;
    }
    // SAFETY: as above.
    unsafe { *last = event.at_ns };
    match THROTTLES.reserve::<LifeEvent>(0) {
        Some(mut entry) => {
            entry.write(event);
            entry.submit(0);
        }
        None => emit::lost(loss::THROTTLE_RING_FULL),
    }
}
