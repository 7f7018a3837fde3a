//! Does the brake reach into system calls?
//!
//! Above `memory.high` a task sleeps when it returns to user mode, and from Linux 5.18 on, with more than a
//! batch of debt, also within the charge (`try_charge_memcg`, mm/memcontrol.c). Without the latter one system
//! call grows as far as it likes, and neither freezer nor brake is in its way.

use std::{
    io,
    process::Child,
    thread,
    time::{Duration, Instant},
};

use bellows_core::Bytes;

use super::{
    Finding,
    touch::{self, TOUCHED, Way},
};
use crate::{
    cgroup::{Cgroup, CgroupError, Limit},
    exec::place::{Place, PlaceError},
};

const CHECK: &str = "brake in system calls";
/// Where the brake stands.
const HIGH: Bytes = Bytes::mib(8);
/// Whoever is past this was not braked: with the brake it is seconds away.
const PAST: Bytes = Bytes::mib(16);
/// How long is watched from when it has reached the brake. An unbraked call is through in a tenth of it, on an emulated machine
/// too.
const WATCHED: Duration = Duration::from_millis(600);
/// How long it may take until then: on a busy machine a process may not even have begun for seconds.
const BEGINS: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(5);

pub(super) fn finding() -> Finding {
    match grown() {
        Ok(usage) if usage < PAST => Finding::works(CHECK, "sleeps there"),
        Ok(usage) => Finding::limited(
            CHECK,
            format!("one call grew to {usage} past a brake at {HIGH} (Linux before 5.18)"),
            "what grows within one system call (MAP_POPULATE, a large write to tmpfs) is not held until the API has answered, and can be killed",
            "use a newer kernel, if it matters; `bellows exec` raises by itself and does not need it",
        ),
        Err(error) => Finding::limited(
            CHECK,
            format!("not tried: {error}"),
            "it is not known whether what grows within one system call is held",
            "make the test possible; guarding may work all the same",
        ),
    }
}

/// How far one system call gets past a brake while it is watched.
fn grown() -> Result<Bytes, PlaceError> {
    let place = Place::find()?;
    let cgroup = place.create_named("bellows-brake-test")?;
    let grown = braked(&cgroup).and_then(|mut child| {
        let watched = watch(&cgroup, &mut child);
        // It may have ended by itself, and sleeps killably if it has not.
        drop(child.kill());
        let ended = child
            .wait()
            .map_err(|source| touch::failed(&cgroup, source));
        ended.and(watched)
    });
    cgroup.remove()?;
    place.leave()?;
    Ok(grown?)
}

fn braked(cgroup: &Cgroup) -> Result<Child, CgroupError> {
    if cgroup.has("memory.swap.max") {
        // It would swap instead of sleeping.
        cgroup.write("memory.swap.max", "0")?;
    }
    cgroup.set_limit("memory.high", Limit::At(HIGH))?;
    touch::spawn(cgroup, Way::InOneCall)
}

fn watch(cgroup: &Cgroup, child: &mut Child) -> Result<Bytes, CgroupError> {
    let start = Instant::now();
    let failed = |source| touch::failed(cgroup, source);
    let mut most = Bytes::ZERO;
    let mut reached: Option<Instant> = None;
    while most < PAST && reached.is_none_or(|reached| reached.elapsed() < WATCHED) {
        if reached.is_none() && start.elapsed() > BEGINS {
            let why = format!("it did not grow to {HIGH} within {} s", BEGINS.as_secs());
            return Err(failed(io::Error::other(why)));
        }
        most = most.max(cgroup.usage()?);
        if most >= HIGH {
            reached.get_or_insert_with(Instant::now);
        }
        match child.try_wait().map_err(failed)? {
            // Between two looks, so nothing was in its way.
            Some(status) if status.success() => return Ok(TOUCHED),
            Some(status) => {
                return Err(failed(io::Error::other(format!("it ended with {status}"))));
            }
            None => {}
        }
        thread::sleep(LOOK);
    }
    Ok(most)
}
