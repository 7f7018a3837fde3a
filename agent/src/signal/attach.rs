//! Which program goes where, and what is lost without it.
//!
//! Whether a function can be hooked is found out by hooking it, never from a version: distributions
//! carry patches back, and a compiler may have inlined what another has not.

use aya::{
    Btf, Ebpf,
    programs::{BtfTracePoint, FEntry, FExit, Program, ProgramError},
};

use super::{
    btf::Btf as Types,
    offsets::{ABSENT, Offsets},
};

/// How a program is attached.
#[derive(Clone, Copy)]
enum Hook {
    Entry,
    Exit,
    Tracepoint,
}

/// A program, its hook, the kernel functions to try in order, and what is lost without it.
pub(super) struct Spec {
    program: &'static str,
    hook: Hook,
    functions: &'static [&'static str],
    lost: &'static str,
}

const fn spec(
    program: &'static str,
    hook: Hook,
    functions: &'static [&'static str],
    lost: &'static str,
) -> Spec {
    Spec {
        program,
        hook,
        functions,
        lost,
    }
}

/// From 6.18 on the body of the first is the second.
const OVER_HIGH: &[&str] = &[
    "mem_cgroup_handle_over_high",
    "__mem_cgroup_handle_over_high",
];
const RECLAIM: &[&str] = &["try_to_free_mem_cgroup_pages"];
const OOM: &[&str] = &["mem_cgroup_out_of_memory"];
pub(super) const GROWTH_FUNCTION: &str = "page_counter_try_charge";

const NO_GUARD: &str = "nothing can be guarded";
const NO_OOM: &str = "an OOM kill is not told by itself";
const NO_EXIT: &str = "the end of a process is seen at the next tick only";
const NO_LIFE: &str =
    "programs and cgroups are not seen as they come and go, nor boosted as they begin";
const NO_WRITES: &str =
    "a limit or brake that somebody else moves is not put right before the next raise";
const NO_RECLAIM: &str = "page cache that does not fit its limit is not seen to thrash";
/// The programs that are called where nobody may sleep: under a runqueue's lock, or by a tracepoint.
const ATOMIC: [&str; 5] = [
    THROTTLED_PROGRAM,
    "exec",
    "exit",
    "cgroup_created",
    "cgroup_removed",
];
/// The programs that tell of what begins.
pub(super) const START_PROGRAMS: [&str; 2] = ["exec", "cgroup_created"];
pub(super) const THROTTLED_PROGRAM: &str = "throttled";
const THROTTLED: &[&str] = &["throttle_cfs_rq"];
const NO_THROTTLES: &str =
    "a CPU quota that is used up is seen at the next look at its counters only, up to 250 ms later";
const NO_HOLDS: &str = "sleeps are not counted in full";

pub(super) const GUARD_PROGRAMS: &[Spec] = &[
    spec("growth", Hook::Entry, &[GROWTH_FUNCTION], NO_GUARD),
    spec("oom", Hook::Exit, OOM, NO_OOM),
    spec("reclaim", Hook::Entry, RECLAIM, NO_RECLAIM),
    spec("max_written", Hook::Entry, &["memory_max_write"], NO_WRITES),
    spec(
        "high_written",
        Hook::Entry,
        &["memory_high_write"],
        NO_WRITES,
    ),
    spec("throttled", Hook::Entry, &["throttle_cfs_rq"], NO_THROTTLES),
    spec("exec", Hook::Tracepoint, &["sched_process_exec"], NO_LIFE),
    spec("exit", Hook::Tracepoint, &["sched_process_exit"], NO_EXIT),
    spec(
        "cgroup_created",
        Hook::Tracepoint,
        &["cgroup_mkdir"],
        NO_LIFE,
    ),
    spec(
        "cgroup_removed",
        Hook::Tracepoint,
        &["cgroup_rmdir"],
        NO_LIFE,
    ),
];

pub(super) const HOLD_PROGRAMS: &[Spec] = &[
    spec("over_high_enter", Hook::Entry, OVER_HIGH, NO_HOLDS),
    spec("over_high_leave", Hook::Exit, OVER_HIGH, NO_HOLDS),
    spec("reclaim_enter", Hook::Entry, RECLAIM, NO_HOLDS),
    spec("reclaim_leave", Hook::Exit, RECLAIM, NO_HOLDS),
    spec("oom_enter", Hook::Entry, OOM, NO_HOLDS),
    spec("oom_leave", Hook::Exit, OOM, NO_HOLDS),
];

/// A program that could not be attached, and why.
#[derive(Debug)]
pub struct Missing {
    /// The program.
    pub program: &'static str,
    /// The functions that were tried.
    pub functions: &'static [&'static str],
    /// What is lost without it.
    pub lost: &'static str,
    /// The last failure.
    pub why: String,
}

/// What is attached and sees nothing, because the kernel does not have the fields that it reads.
pub(super) fn without_offsets(offsets: &Offsets) -> Option<Missing> {
    let lacking = ["OFF_CFS_RQ_GROUP", "OFF_GROUP_CGROUP"];
    let mut globals = offsets.globals().iter();
    let lacks = globals.any(|&(name, value)| lacking.contains(&name) && value == ABSENT);
    lacks.then(|| Missing {
        program: THROTTLED_PROGRAM,
        functions: THROTTLED,
        lost: NO_THROTTLES,
        why: "this kernel has no `cfs_rq.tg`".to_owned(),
    })
}

/// Whether a program that puts a record into a ring buffer may sleep there: with PREEMPT_RT a lock does that unless it is a
/// raw one, which that of a ring buffer has become late (`struct bpf_ringbuf`, kernel/bpf/ringbuf.c; read, not tried).
pub(super) fn rings_sleep(types: &Types<'_>) -> bool {
    // A raw lock has no such member, nor has one that does not sleep.
    types.field("bpf_ringbuf", "spinlock.lock").is_ok()
}

/// Attaches programs; returns those that could not be. Fails only for the growth program, without which
/// nothing can be guarded.
pub(super) fn attach_all(
    programs: &mut Ebpf,
    specs: &[Spec],
    btf: &Btf,
    rings_sleep: bool,
) -> Result<Vec<Missing>, ProgramError> {
    let mut missing = Vec::new();
    for spec in specs {
        if rings_sleep && ATOMIC.contains(&spec.program) {
            missing.push(Missing {
                program: spec.program,
                functions: spec.functions,
                lost: spec.lost,
                why: "it would sleep where nobody may: this kernel is PREEMPT_RT, and its BPF ring buffers do not have raw locks yet".to_owned(),
            });
            continue;
        }
        if let Err(error) = attach_any(programs, spec, btf) {
            if spec.functions == [GROWTH_FUNCTION] {
                return Err(error);
            }
            tracing::warn!(program = spec.program, %error, "a kernel program is not available");
            missing.push(Missing {
                program: spec.program,
                functions: spec.functions,
                lost: spec.lost,
                why: reason(&error),
            });
        }
    }
    Ok(missing)
}

/// Loads and attaches a program to the first of its functions that the kernel has.
fn attach_any(programs: &mut Ebpf, spec: &Spec, btf: &Btf) -> Result<(), ProgramError> {
    let mut result = Err(ProgramError::NotLoaded);
    for function in spec.functions {
        let program = programs
            .program_mut(spec.program)
            .ok_or(ProgramError::NotLoaded)?;
        result = attach(program, spec.hook, function, btf);
        if result.is_ok() {
            return result;
        }
    }
    result
}

fn attach(
    program: &mut Program,
    hook: Hook,
    function: &str,
    btf: &Btf,
) -> Result<(), ProgramError> {
    match hook {
        Hook::Entry => {
            let program: &mut FEntry = program.try_into()?;
            program.load(function, btf)?;
            program.attach().map(drop)
        }
        Hook::Exit => {
            let program: &mut FExit = program.try_into()?;
            program.load(function, btf)?;
            program.attach().map(drop)
        }
        Hook::Tracepoint => {
            let program: &mut BtfTracePoint = program.try_into()?;
            program.load(function, btf)?;
            program.attach().map(drop)
        }
    }
}

/// Why a program was refused: of the verifier's pages, the line that it ends with.
fn reason(error: &ProgramError) -> String {
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return error.to_string();
    };
    let log = verifier_log.to_string();
    let is_statistics = |line: &&str| {
        ["verification time", "stack depth", "processed "]
            .iter()
            .any(|word| line.starts_with(word))
    };
    match log
        .lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty() && !is_statistics(line))
    {
        Some(line) => format!("{io_error}: {line}"),
        None => io_error.to_string(),
    }
}
