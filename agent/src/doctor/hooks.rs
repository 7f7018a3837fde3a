//! The kernel side, tried out: types, programs, and whether growth is seen where it happens.

use std::io;

use bellows_core::{Bytes, Watermark};
use bellows_ebpf_common::{ENTRY_CALL, ENTRY_FAULT, Growth};

use super::{
    Finding,
    touch::{self, TOUCHED, Way},
};
use crate::{
    cgroup::{Cgroup, CgroupError},
    exec::place::{Place, PlaceError},
    signal::{
        guards::Guards,
        programs::{Kernel, LoadError, Purpose, Reflexes, memory_event},
    },
};

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
    findings.push(system_calls(&mut kernel, &mut reflexes));
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
    const CHECK: &str = "kernel programs";
    let lost = "the agent looks at cgroup files instead: containers are braked at 90 % of their limit, and a burst that is faster than a look is killed";
    let remedy = match error {
        LoadError::NotBuilt => {
            let lost = "nothing is seen before the kill";
            return Finding::missing(CHECK, error.to_string(), lost, "see there");
        }
        LoadError::Pages(_) => {
            "boot a kernel with pages of 4 KiB; `bellows exec` needs --without-bpf meanwhile"
        }
        LoadError::Growth { .. } | LoadError::Object(_) => {
            "do not boot with lockdown=confidentiality, and on arm64 use a kernel that can attach programs to functions (6.4 or newer); `bellows exec` needs --without-bpf meanwhile"
        }
        LoadError::NoBtf(_)
        | LoadError::Btf(_)
        | LoadError::Permission(_)
        | LoadError::Map { .. } => "see there; `bellows exec` needs --without-bpf meanwhile",
    };
    Finding::limited(CHECK, error.to_string(), lost, remedy)
}

/// Touches memory in a cgroup of its own and counts what the growth hook saw of it.
pub(crate) fn self_test(kernel: &mut Kernel, guards: &mut Guards) -> Finding {
    const CHECK: &str = "growth hook";
    let lost = "growth is not seen as it happens";
    let calls = match tried(kernel, guards, None, Way::PageByPage) {
        Ok(growth) => growth.charges,
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

/// Whether a charge inside a system call is told from a page fault's: by far most of either must be.
fn system_calls(kernel: &mut Kernel, reflexes: &mut Reflexes) -> Finding {
    const CHECK: &str = "system calls told from page faults";
    let lost = "a page fault under way can be taken for a system call that goes on: a frozen pod is braked too, and its raise takes up to 2 s longer";
    let mut right = |way, entry| {
        // All that is told of above 1 MiB.
        tried(kernel, &mut reflexes.guards, Some(Bytes::mib(1)), way)?;
        let (mut right, mut all) = (0, 0);
        while let Some(item) = reflexes.ring.next() {
            if let Some(event) = memory_event(&item) {
                all += 1;
                right += usize::from(event.entry == entry);
            }
        }
        Ok::<_, PlaceError>((right, all))
    };
    let faults = right(Way::PageByPage, ENTRY_FAULT);
    match faults.and_then(|faults| Ok([faults, right(Way::InOneCall, ENTRY_CALL)?])) {
        Ok(told @ [(faults, _), (calls, _)]) => {
            let found = format!("{faults} charges by page faults, {calls} in a system call");
            if told
                .iter()
                .all(|&(right, all)| right > 0 && right * 4 >= all * 3)
            {
                Finding::works(CHECK, found)
            } else {
                let found = format!("{found}, of {} and {}", told[0].1, told[1].1);
                Finding::limited(CHECK, found, lost, "use Linux 5.15 or newer, if it matters")
            }
        }
        Err(error) => {
            let remedy = "make the self-test possible; guarding may work all the same";
            Finding::limited(CHECK, format!("not tried: {error}"), lost, remedy)
        }
    }
}

/// Touches memory in a cgroup of its own that is watched from `watermark` on; returns what was seen of it.
fn tried(
    kernel: &mut Kernel,
    guards: &mut Guards,
    watermark: Option<Bytes>,
    way: Way,
) -> Result<Growth, PlaceError> {
    let place = Place::find()?;
    let cgroup = place.create_named("bellows-self-test")?;
    let counted = kernel
        .track(cgroup.id())
        .and_then(|()| guards.set(cgroup.id(), watermark.map(Watermark::alike)))
        .map_err(|error| touch::failed(&cgroup, io::Error::other(error)))
        .and_then(|()| touch_in(&cgroup, way));
    let growth = kernel.growth(cgroup.id()).unwrap_or_default();
    guards.remove(cgroup.id());
    kernel.forget(cgroup.id());
    cgroup.remove()?;
    place.leave()?;
    counted?;
    Ok(growth)
}

fn touch_in(cgroup: &Cgroup, way: Way) -> Result<(), CgroupError> {
    let failed = |source| touch::failed(cgroup, source);
    let status = touch::spawn(cgroup, way)?.wait().map_err(failed)?;
    if status.success() {
        Ok(())
    } else {
        Err(failed(io::Error::other(format!("it ended with {status}"))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Verdict;

    #[test]
    fn pages_of_another_size_are_told_with_what_to_do() {
        let finding = refused(&LoadError::Pages(65_536));
        assert_eq!(finding.verdict, Verdict::Limited);
        assert!(finding.found.contains("65536") && finding.remedy.is_some());
        let no_types = LoadError::NoBtf(io::ErrorKind::NotFound.into());
        assert_eq!(refused(&no_types).verdict, Verdict::Limited);
        assert_eq!(refused(&LoadError::NotBuilt).verdict, Verdict::Missing);
    }
}
