//! What a policy promises that lets a container wait for memory (`holdAtMost`); a part of `container-edges`.

use std::{path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bellows::{
    attribution::CGROUP_ROOT,
    cgroup::{Cgroup, Limit},
};
use bellows_core::Bytes;
use rustix::process::{Pid, Signal, kill_process};

use super::{
    bursts::burst_words,
    container_edges::{Bed, Case, GUARD, LIMIT, MAX, PEAK, wait_guarded},
    deaths::is_held,
    gate,
};
use crate::{
    containers::{POLICIES, Spec, policy, policy_of},
    node::wait,
};

pub(super) const CASES: [Case; 2] = [
    (
        "who may wait for memory is held until it is there, for longer than others",
        waits,
    ),
    ("who is told to end while it waits is let go", ended),
];

const NAME: &str = "waiting";
/// Longer than anybody is held whose policy does not say so.
const BEYOND: Duration = Duration::from_secs(13);
const HELD: Duration = Duration::from_secs(60);
/// The exit code of who has ended by its own word.
const GOODBYE: i32 = 7;

/// Too little to be worth a raise.
const LEFT: Bytes = Bytes::mib(4);

/// No room above all containers but for what one of them has to its limit, for as long as it lives.
struct Full(Cgroup);

impl Full {
    fn but_for(container: &Cgroup) -> Result<Self> {
        let full = Self(Cgroup::open(&Path::new(CGROUP_ROOT).join("kubepods"))?);
        let used = |cgroup: &Cgroup| -> Result<Bytes> {
            let stat = cgroup.stat()?;
            Ok(stat.usage.minus(stat.file))
        };
        // It may not have all that it has at rest yet.
        let rest = LIMIT.minus(used(container)?);
        let limit = used(&full.0)?.plus(rest).plus(LEFT);
        full.0.set_limit("memory.max", Limit::At(limit))?;
        Ok(full)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        if let Err(error) = self.0.set_limit("memory.max", Limit::Max) {
            eprintln!("what is above all containers stays limited: {error}");
        }
    }
}

fn policies() -> String {
    let waiting = policy_of(NAME, &format!("memory: {{max: {}, holdAtMost: 2m}}", MAX.0));
    format!("{}---\n{waiting}", policy(GUARD, MAX))
}

fn waits(bed: &mut Bed) -> Result<()> {
    std::fs::write(POLICIES, policies())?;
    let started = bed.burst("waits", NAME)?;
    wait_guarded(&started)?;
    let full = Full::but_for(&started.cgroup)?;
    gate::open_when_braked(&started.cgroup)?;
    wait("it is held", HELD, || Ok(is_held(&started.cgroup)))?;
    thread::sleep(BEYOND);
    // Whoever is let go grows on at once.
    ensure!(started.cgroup.events()?.oom_kill == 0, "it was let go");
    drop(full);
    bed.survives(&started)?;
    bed.machine.remove(&started)
}

fn ended(bed: &mut Bed) -> Result<()> {
    let words = burst_words(LIMIT.per_mille(500), PEAK, 1).join(" ");
    let gate = gate::closed().join(" ");
    let script = format!(
        "trap 'exit {GOODBYE}' TERM; /bellows-guest load {words} {gate} --after-ms 300000 & wait"
    );
    let started = bed.machine.run(&Spec {
        limit: Some(LIMIT),
        binds: ["/usr", "/bin", "/lib", "/lib64"]
            .map(|path| (path, path))
            .to_vec(),
        labels: vec![("guard".to_owned(), NAME.to_owned())],
        ..Spec::of(
            "ended",
            ["/bin/sh", "-c", &script].map(str::to_owned).to_vec(),
        )
    })?;
    wait_guarded(&started)?;
    let shell = *started
        .cgroup
        .processes()?
        .iter()
        .min()
        .context("no shell")?;
    let full = Full::but_for(&started.cgroup)?;
    gate::open_when_braked(&started.cgroup)?;
    wait("it is held", HELD, || Ok(is_held(&started.cgroup)))?;
    let pid = Pid::from_raw(i32::try_from(shell)?).context("its number is none")?;
    kill_process(pid, Signal::TERM)?;
    let mut code = None;
    let ends = wait("it ends", Duration::from_secs(20), || {
        code = bed.machine.exit_code(&started)?;
        Ok(code.is_some())
    });
    drop(full);
    ends?;
    ensure!(code == Some(GOODBYE), "it has ended with {code:?}");
    std::fs::write(POLICIES, policy(GUARD, MAX))?;
    bed.machine.remove(&started)
}
