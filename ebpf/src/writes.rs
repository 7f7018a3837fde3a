//! Writes to a tracked cgroup's limit or brake, whoever makes them.
//!
//! A runtime, systemd (each operation on a scope drops a `memory.high` that it did not set itself) or a
//! person may move what we have set, and nothing else in the kernel tells of it. Our own writes are told
//! too; whoever looks finds them as they should be.

use aya_ebpf::{macros::fentry, programs::FEntryContext};
use bellows_ebpf_common::{KIND_WRITTEN, loss};

use crate::{
    emit, life,
    maps::GUARDS,
    memcg::{self, Address},
    offsets::{ABSENT, OFF_KERNFS_ID, OFF_KERNFS_PARENT, OFF_OPEN_FILE_NODE},
};

#[fentry(function = "memory_max_write")]
pub(crate) fn max_written(ctx: FEntryContext) -> i32 {
    written(ctx.arg(0))
}

#[fentry(function = "memory_high_write")]
pub(crate) fn high_written(ctx: FEntryContext) -> i32 {
    written(ctx.arg(0))
}

#[inline(always)]
fn written(open_file: Address) -> i32 {
    if OFF_OPEN_FILE_NODE.load() == ABSENT || OFF_KERNFS_PARENT.load() == ABSENT {
        return 0;
    }
    match cgroup_of(open_file) {
        Ok(id) => {
            if GUARDS.get_ptr(id).is_some() {
                emit::life(&life::event(KIND_WRITTEN, 0, id));
            }
        }
        Err(_) => emit::lost(loss::READ_FAILED),
    }
    0
}

/// Id of the cgroup whose file was opened.
#[inline(always)]
fn cgroup_of(open_file: Address) -> Result<u64, i32> {
    let file: Address = memcg::read(open_file.wrapping_add(OFF_OPEN_FILE_NODE.load()))?;
    let directory: Address = memcg::read(file.wrapping_add(OFF_KERNFS_PARENT.load()))?;
    memcg::read(directory.wrapping_add(OFF_KERNFS_ID.load()))
}
