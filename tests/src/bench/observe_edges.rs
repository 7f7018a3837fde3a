//! What the modes promise that change nothing (`container-edges`).

use std::{fs, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bellows::cgroup::Limit;

use super::{
    container_edges::{Bed, Case, GUARD, LIMIT, MAX, bellows, recorded, wait_guarded},
    deaths::is_held,
    gate,
};
use crate::{
    containers::{POLICIES, Started, policy},
    node::{log_text, wait},
};

pub(super) const CASES: [Case; 2] = [
    (
        "a kill in a container that is only watched is told with what would have become of it",
        watched,
    ),
    ("a mode that is changed is followed", changed),
];

const WATCHED: &str = "watched";
/// The exit code of who is ended by SIGKILL.
const KILLED: i32 = 137;
/// The agent looks at the file of its policies every 10 s where the runtime tells of containers.
const LOOKED: Duration = Duration::from_secs(40);

fn policies(mode: &str) -> String {
    let watching = policy(WATCHED, MAX).replace("mode: Act", &format!("mode: {mode}"));
    format!("{}---\n{watching}", policy(GUARD, MAX))
}

/// Waits until it is watched for the n-th time.
fn wait_watched(name: &str, times: usize) -> Result<()> {
    let container = format!("dev/{name}/{name}");
    wait("it is watched", LOOKED, || {
        let log = log_text("bellows");
        let lines = log.lines().filter(|line| line.contains(" watched "));
        Ok(lines.filter(|line| line.contains(&container)).count() >= times)
    })
}

/// What of it has been touched.
fn touched(started: &Started) -> Result<()> {
    let limit = |name| started.cgroup.limit(name);
    ensure!(
        limit("memory.max")? == Limit::At(LIMIT),
        "its limit was moved"
    );
    ensure!(limit("memory.high")? == Limit::Max, "it is braked");
    let pod = started.pod.limit("memory.max")?;
    ensure!(pod == Limit::At(LIMIT), "its pod's limit was moved");
    ensure!(recorded(started).is_none(), "it has a record");
    ensure!(!is_held(&started.cgroup), "it is held");
    Ok(())
}

fn watched(bed: &mut Bed) -> Result<()> {
    fs::write(POLICIES, policies("Recommend"))?;
    let started = bed.burst("observed", WATCHED)?;
    wait("it is in the ledger", LOOKED, || {
        let log = log_text("bellows");
        let mut records = log.lines().filter(|line| line.contains("Observe {"));
        Ok(records.any(|record| record.contains("dev/observed/observed")))
    })?;
    // That is told a moment before it is true.
    thread::sleep(Duration::from_secs(1));
    gate::open(&started.cgroup)?;
    let code = loop {
        let looked = touched(&started);
        if let Some(code) = bed.machine.exit_code(&started)? {
            break code;
        }
        // It has not ended: what was seen of it holds.
        if started.cgroup.path().exists() {
            looked?;
        }
        thread::sleep(Duration::from_millis(10));
    };
    ensure!(code == KILLED, "it has ended with {code}");
    let mut told = (false, String::new());
    let is_told = wait("its kill is told", Duration::from_secs(10), || {
        told = bellows(&["explain", "dev/observed"])?;
        Ok(told.1.contains("it would have lived"))
    });
    is_told.with_context(|| told.1.clone())?;
    for words in [
        "only watched: limit 64 MiB",
        "would be raised to",
        "killed at 64 MiB",
    ] {
        ensure!(told.1.contains(words), "`{words}` is not in {}", told.1);
    }
    bed.machine.remove(&started)?;
    // And so it does, in mode Act.
    let proof = bed.guarded_burst("proof")?;
    bed.survives(&proof)?;
    bed.machine.remove(&proof)?;
    fs::write(POLICIES, policy(GUARD, MAX))?;
    Ok(())
}

fn changed(bed: &mut Bed) -> Result<()> {
    fs::write(POLICIES, policies("Observe"))?;
    let started = bed.burst("changed", WATCHED)?;
    wait_watched("changed", 1)?;
    touched(&started)?;
    fs::write(POLICIES, policies("Act"))?;
    wait_guarded(&started)?;
    wait("it is braked", LOOKED, || {
        Ok(started.cgroup.limit("memory.high")? != Limit::Max)
    })?;
    fs::write(POLICIES, policies("Observe"))?;
    wait("nothing of it is touched", LOOKED, || {
        Ok(touched(&started).is_ok())
    })?;
    wait_watched("changed", 2)?;
    fs::write(POLICIES, policies("Recommend"))?;
    wait_watched("changed", 3)?;
    fs::write(POLICIES, policy(GUARD, MAX))?;
    bed.machine.remove(&started)
}
