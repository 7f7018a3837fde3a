//! Real-time priority of the threads that must be in time on a busy machine.
//!
//! Niceness would not do: the scheduler weighs cgroups, and sessions (`sched_autogroup`), before it weighs their tasks, and
//! what bursts is in another one. Whoever has such a priority takes the CPU from all others, so none of these threads may
//! work for long without sleeping.

use std::io;

/// The reflex: above every ordinary task, below the kernel's own threads.
pub const REFLEX: i32 = 10;
/// Freezes: short, or asleep for a lock of the kernel's; the reflex waits for none of them, and must not keep one waiting.
pub const FREEZER: i32 = 11;
/// Writes that may reclaim: the reflex must be able to interrupt them.
pub const BRAKES: i32 = 9;
/// Who looks at jobs: eight of them grow by megabytes in the time that an ordinary thread waits for its turn.
pub const JOBS: i32 = 1;

/// The kernel's `struct sched_param` (include/uapi/linux/sched/types.h).
#[repr(C)]
struct SchedParam {
    priority: libc::c_int,
}

/// Gives the calling thread real-time priority.
///
/// # Errors
///
/// When it is not permitted (`CAP_SYS_NICE`, or a cgroup without real-time runtime).
pub fn try_real_time(priority: i32) -> io::Result<()> {
    let parameters = SchedParam { priority };
    // SAFETY: the system call reads one live structure of the kernel's layout; thread 0 is the
    // calling one. The C library's wrapper is not used: musl's always fails.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_setscheduler,
            0,
            libc::SCHED_FIFO,
            &raw const parameters,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
