//! The task that is being charged for.

use aya_ebpf::{
    bindings::task_struct,
    helpers::{
        bpf_get_current_cgroup_id, bpf_get_current_pid_tgid,
        generated::{bpf_get_current_task_btf, bpf_task_pt_regs},
    },
};
use bellows_ebpf_common::{ENTRY_CALL, ENTRY_FAULT, ENTRY_UNKNOWN};

use crate::{
    memcg::{Address, read},
    offsets::{ABSENT, OFF_REGS_SYSCALL},
};

/// Its thread id.
#[inline(always)]
#[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
pub(crate) fn thread() -> u32 {
    bpf_get_current_pid_tgid() as u32
}

/// Whether it is in no container: a kernel thread (`khugepaged` is one), or the host's own.
#[inline(always)]
pub(crate) fn is_in_root_cgroup() -> bool {
    /// The inode of the root of a cgroup hierarchy (`kernfs_create_root`, fs/kernfs/dir.c).
    const ROOT: u64 = 1;
    // SAFETY: takes no argument and cannot fail.
    let cgroup = unsafe { bpf_get_current_cgroup_id() };
    cgroup == ROOT
}

/// How it came into the kernel. The registers that it left user mode with have the number of its system
/// call, or -1 if it was no system call. A kernel thread, which never returns to user mode, is in call 0.
#[inline(always)]
pub(crate) fn entry() -> u32 {
    let offset = OFF_REGS_SYSCALL.load();
    if offset == ABSENT {
        return ENTRY_UNKNOWN;
    }
    // SAFETY: the helper takes nothing.
    let task: *mut task_struct = unsafe { bpf_get_current_task_btf() };
    // SAFETY: the current task is alive.
    let registers = unsafe { bpf_task_pt_regs(task) };
    let address: Address = registers.cast_unsigned();
    match read::<i32>(address.wrapping_add(offset)) {
        Ok(number) if number >= 0 => ENTRY_CALL,
        Ok(_none) => ENTRY_FAULT,
        Err(_) => ENTRY_UNKNOWN,
    }
}
