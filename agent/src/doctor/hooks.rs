//! The kernel side, tried out: types, programs, and whether growth is seen where it happens.

use std::{
    env,
    fs::File,
    io::{self, Write as _},
    os::unix::process::CommandExt as _,
    process::Command,
};

use bellows_core::Bytes;

use super::Finding;
use crate::{
    cgroup::{Cgroup, CgroupError},
    exec::place::{Place, PlaceError},
    signal::programs::{Guards, Kernel, LoadError, Purpose},
};

/// The hidden subcommand that touches memory for the self-test.
pub const TOUCH: &str = "touch-for-self-test";
/// How much it touches.
pub const TOUCHED: Bytes = Bytes::mib(32);
/// The hook runs once for a batch of 64 pages: 4 times per MiB with small pages, less with huge ones.
/// A kernel that calls it for every page (256 times) has moved its stock elsewhere.
const MOST_CALLS_PER_MIB: u64 = 8;

pub(super) fn findings() -> Vec<Finding> {
    let (mut kernel, mut reflexes) = match Kernel::load(Purpose::GuardAndMeasure) {
        Ok(loaded) => loaded,
        Err(error) => return vec![refused(&error)],
    };
    let mut findings = vec![Finding::works(
        "kernel programs",
        "loaded, offsets from this kernel's BTF",
    )];
    for missing in kernel.missing() {
        findings.push(Finding::limited(
            missing.program,
            format!("cannot be attached ({})", missing.why),
            missing.lost,
            "use a kernel that has one of its functions, if it matters",
        ));
    }
    findings.push(self_test(&mut kernel, &mut reflexes.guards));
    let skipped = kernel.recursion_misses();
    findings.push(if skipped == 0 {
        Finding::works("skipped program runs", "none")
    } else {
        Finding::limited(
            "skipped program runs",
            skipped.to_string(),
            "watermarks are level-triggered: an event is late by one charge",
            "nothing",
        )
    });
    findings
}

fn refused(error: &LoadError) -> Finding {
    Finding::missing(
        "kernel programs",
        error.to_string(),
        "nothing is seen before the kill",
        "see there",
    )
}

/// Touches memory in a cgroup of its own and counts what the growth hook saw of it.
pub(crate) fn self_test(kernel: &mut Kernel, guards: &mut Guards) -> Finding {
    const CHECK: &str = "growth hook";
    let lost = "growth is not seen as it happens";
    let calls = match calls(kernel, guards) {
        Ok(calls) => calls,
        Err(error) => {
            let remedy = "make the self-test possible; guarding may work all the same";
            return Finding::limited(CHECK, format!("not tried: {error}"), lost, remedy);
        }
    };
    let per_mib = calls.div_ceil(TOUCHED.0 >> 20);
    let found = format!("{calls} calls for {TOUCHED}");
    if calls == 0 {
        Finding::missing(
            CHECK,
            found,
            lost,
            "report it with the output of `uname -a`",
        )
    } else if per_mib > MOST_CALLS_PER_MIB {
        Finding::limited(
            CHECK,
            found,
            "the hook costs more than it should",
            "report it with the output of `uname -a`",
        )
    } else {
        Finding::works(CHECK, found)
    }
}

fn calls(kernel: &mut Kernel, guards: &mut Guards) -> Result<u64, PlaceError> {
    let place = Place::find()?;
    let cgroup = place.create_named("bellows-self-test")?;
    let counted = kernel
        .track(cgroup.id())
        .and_then(|()| guards.set(cgroup.id(), None))
        .map_err(|error| failed(&cgroup, io::Error::other(error)))
        .and_then(|()| touch_in(&cgroup));
    let growth = kernel.growth(cgroup.id()).unwrap_or_default();
    guards.remove(cgroup.id());
    kernel.forget(cgroup.id());
    cgroup.remove()?;
    place.leave()?;
    counted?;
    Ok(growth.charges)
}

fn failed(cgroup: &Cgroup, source: io::Error) -> CgroupError {
    CgroupError::Io {
        action: "run the self-test in",
        path: cgroup.path().to_owned(),
        source,
    }
}

fn touch_in(cgroup: &Cgroup) -> Result<(), CgroupError> {
    let failed = |source| failed(cgroup, source);
    let procs = File::options()
        .write(true)
        .open(cgroup.path().join("cgroup.procs"))
        .map_err(failed)?;
    let mut command = Command::new(env::current_exe().map_err(failed)?);
    command.arg(TOUCH);
    // SAFETY: one write between fork and exec; no allocation, no lock.
    unsafe { command.pre_exec(move || (&procs).write_all(b"0")) };
    let status = command.status().map_err(failed)?;
    if status.success() {
        Ok(())
    } else {
        Err(failed(io::Error::other(format!("it ended with {status}"))))
    }
}

/// The body of the hidden subcommand.
pub fn touch() {
    let size = usize::try_from(TOUCHED.0).unwrap_or(0);
    std::hint::black_box(vec![1_u8; size]);
}
