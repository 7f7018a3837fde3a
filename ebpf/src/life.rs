//! Life of processes and cgroups: when a tracked cgroup executes something, when one of its
//! processes ends, when a cgroup comes or goes.
//!
//! BTF tracepoints and not the classic ones: those need tracefs mounted. `sched_process_exit` has a
//! second argument from 6.18 on, so only the first is read.

use aya_ebpf::{
    helpers::bpf_probe_read_kernel_str_bytes, macros::btf_tracepoint,
    programs::BtfTracePointContext,
};
use bellows_ebpf_common::{
    KIND_CGROUP_CREATED, KIND_CGROUP_REMOVED, KIND_EXEC, KIND_EXIT, LifeEvent, NAME_BYTES, loss,
};

use crate::{
    emit::{self, now, process_and_thread},
    known,
    maps::{BOOSTED, GUARDS},
    memcg::{self, Address},
    offsets::OFF_BPRM_FILENAME,
    starts::{self, nearest},
};

#[inline(always)]
pub(crate) fn event(kind: u32, pid: u32, cgroup_id: u64) -> LifeEvent {
    LifeEvent {
        kind,
        pid,
        cgroup_id,
        at_ns: now(),
        name: [0; NAME_BYTES],
    }
}

#[btf_tracepoint(function = "sched_process_exec")]
pub(crate) fn exec(ctx: BtfTracePointContext) -> i32 {
    let (guarded, boosted) = (nearest(&GUARDS), nearest(&BOOSTED));
    if guarded.is_none() && boosted.is_none() {
        return 0;
    }
    let bprm: Address = ctx.arg(2);
    let (pid, _) = process_and_thread();
    let Ok(file) = memcg::read::<u64>(bprm.wrapping_add(OFF_BPRM_FILENAME.load())) else {
        emit::lost(loss::READ_FAILED);
        return 0;
    };
    if let Some(cgroup_id) = boosted {
        starts::tell(KIND_EXEC, pid, cgroup_id, file);
    }
    let Some(cgroup_id) = guarded else {
        return 0;
    };
    let mut event = event(KIND_EXEC, pid, cgroup_id);
    // SAFETY: the helper checks the source address and bounds the copy by the buffer.
    if unsafe { bpf_probe_read_kernel_str_bytes(file as *const u8, &mut event.name) }.is_err() {
        emit::lost(loss::READ_FAILED);
    }
    emit::life(&event);
    0
}

#[btf_tracepoint(function = "sched_process_exit")]
pub(crate) fn exit(_ctx: BtfTracePointContext) -> i32 {
    let (process, thread) = process_and_thread();
    if process == thread
        && let Some(cgroup_id) = nearest(&GUARDS)
    {
        emit::life(&event(KIND_EXIT, process, cgroup_id));
    }
    0
}

#[btf_tracepoint(function = "cgroup_mkdir")]
pub(crate) fn cgroup_created(ctx: BtfTracePointContext) -> i32 {
    let id = cgroup(ctx.arg(0), KIND_CGROUP_CREATED);
    starts::created(KIND_CGROUP_CREATED, id, ctx.arg(1));
    0
}

#[btf_tracepoint(function = "cgroup_rmdir")]
pub(crate) fn cgroup_removed(ctx: BtfTracePointContext) -> i32 {
    cgroup(ctx.arg(0), KIND_CGROUP_REMOVED);
    0
}

#[inline(always)]
fn cgroup(cgroup: Address, kind: u32) -> u64 {
    known::cgroups_changed();
    let id = memcg::cgroup_id(cgroup).unwrap_or(0);
    if id == 0 {
        emit::lost(loss::READ_FAILED);
    } else {
        emit::life(&event(kind, 0, id));
    }
    id
}
