//! `heaps`: by which limit a JVM sizes its heap that starts while its container is raised for somebody else's burst, and
//! what becomes of containers that are made while the agent that tells them is away; one record a promise.

use std::{fs, path::Path, thread, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bellows::{cgroup::Cgroup, clock::now};
use bellows_core::{Bytes, Nanos};

use super::{bursts::burst_words, container_edges::keep, gate, record::Records};
use crate::{
    containers::{Machine, POLICIES, Spec, Standalone, Started, policy_of},
    node::{log_text, wait},
};

/// A quarter of it is a JVM's heap; of much less it would be a half.
const LIMIT: Bytes = Bytes::mib(512);
const PEAK: Bytes = Bytes::mib(900);
const MAX: Bytes = Bytes::mib(2048);
/// What is mounted into containers, and tells them to go on.
const GO: &str = "/tmp/go";
const LONG: Duration = Duration::from_secs(120);
/// What a runtime waits for a plugin that does not answer, and then makes the container.
const PATIENCE: Nanos = Nanos::millis(2000);
/// What a container takes to be made here, at most.
const MADE: Nanos = Nanos::millis(8000);
pub(super) const CONNECTED: &str = "heaps are sized by policies";

struct Bed {
    machine: Machine,
    agent: Standalone,
    /// The agent's and its parent's, who takes a stopped agent for dead.
    both: Cgroup,
}

type Case = (&'static str, fn(&mut Bed) -> Result<()>);

const CASES: [Case; 5] = [
    (
        "a JVM that starts during a burst sizes its heap by the raised limit, if no policy names another",
        |bed| {
            let heap = heap_of(bed, "plain")?;
            let least = LIMIT.0 / 4 * 3 / 2;
            ensure!(heap > least, "its heap is {heap} bytes: it was not raised");
            Ok(())
        },
    ),
    (
        "a JVM that starts during a burst sizes its heap by the limit that its policy names",
        |bed| {
            let heap = heap_of(bed, "original")?;
            ensure!(heap == LIMIT.0 / 4, "its heap is {heap} bytes");
            Ok(())
        },
    ),
    (
        "each container is told when it is made, also one that is made again in the same pod, and after the runtime",
        made_again,
    ),
    (
        "an agent that stands still holds a container up for two seconds, and what it has missed is told",
        stopped,
    ),
    ("a runtime has no plugin that no policy needs", unneeded),
];

fn policies() -> String {
    let of = |name: &str, heap: &str| policy_of(name, &format!("memory: {{max: {}{heap}}}", MAX.0));
    [
        of("plain", ""),
        of("original", ", heap: Original"),
        of("maximum", ", heap: Maximum"),
    ]
    .join("---\n")
}

pub(crate) fn run(records: &mut Records) -> Result<()> {
    fs::create_dir_all(GO)?;
    let machine = Machine::start()?;
    let both = Cgroup::open(Path::new("/sys/fs/cgroup"))?.create_child("agent")?;
    let agent = Standalone::start_with(&policies(), &[], Some(&both))?;
    let mut bed = Bed {
        machine,
        agent,
        both,
    };
    wait_connections(1)?;
    for (name, case) in CASES {
        keep(records, name, case(&mut bed))?;
    }
    Ok(())
}

/// Waits until the agent has been made a plugin so often.
fn wait_connections(times: usize) -> Result<()> {
    wait("the agent is a plugin of the runtime", LONG, || {
        Ok(connections() >= times)
    })
}

fn connections() -> usize {
    let log = log_text("bellows");
    log.lines().filter(|line| line.contains(CONNECTED)).count()
}

fn spec(name: &str, guard: &str, script: &str) -> Spec {
    let system = ["/usr", "/bin", "/lib", "/lib64", "/etc", "/var/lib", GO];
    Spec {
        limit: Some(LIMIT),
        binds: system.map(|path| (path, path)).to_vec(),
        labels: vec![("guard".to_owned(), guard.to_owned())],
        ..Spec::of(name, ["/bin/sh", "-c", script].map(str::to_owned).to_vec())
    }
}

/// The heap of a JVM in a container of this label, which bursts meanwhile; in its own words, bytes.
fn heap_of(bed: &mut Bed, guard: &str) -> Result<u64> {
    bed.agent.check()?;
    let burst = burst_words(Bytes::mib(16), PEAK, 2).join(" ");
    let go = Path::new(GO).join(guard);
    let script = format!(
        "/bellows-guest load {burst} {} --hold-ms 60000 & \
         until [ -e {} ]; do sleep 0.2; done; \
         /usr/bin/java -XX:TieredStopAtLevel=1 -XX:-UsePerfData -XX:+PrintFlagsFinal -XshowSettings:vm -version 2>&1 | \
         grep -E ' MaxHeapSize |Max. Heap|Picked up'; echo over; sleep 600",
        gate::closed().join(" "),
        go.display()
    );
    let started = bed.machine.run(&spec(guard, guard, &script))?;
    gate::open_when_braked(&started.cgroup)?;
    wait("it is at its peak, and raised", LONG, || {
        let limit = started.cgroup.limit("memory.max")?.bytes();
        Ok(limit > LIMIT && started.cgroup.usage()? >= PEAK)
    })?;
    let raised = started.cgroup.limit("memory.max")?.bytes();
    fs::write(&go, "")?;
    let said = said(&started)?;
    eprintln!(
        "      limit raised to {raised} of {LIMIT}: {}",
        said.join(" | ")
    );
    bed.machine.remove(&started)?;
    let flag = said.iter().find(|line| line.contains(" MaxHeapSize "));
    let value = flag.and_then(|flag| flag.split_once("= ")?.1.split_whitespace().next());
    Ok(value
        .context("it has not said how large its heap is")?
        .parse()?)
}

/// What a container has printed until it said that this is all.
fn said(started: &Started) -> Result<Vec<String>> {
    let mut said = Vec::new();
    wait("it has said all", LONG, || {
        let log = Machine::log(started);
        let lines = log.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
        said = lines.map(|line| line.trim().to_owned()).collect();
        Ok(said.iter().any(|line| line == "over"))
    })?;
    said.retain(|line| line != "over");
    Ok(said)
}

/// What programs of a container find in their environment.
const OPTIONS: &str = "echo \"java=$JAVA_TOOL_OPTIONS node=$NODE_OPTIONS\"; echo over; sleep 600";

fn told(memory: Bytes, node_mib: u64) -> String {
    format!(
        "java=-XX:MaxRAM={} node=--max-old-space-size={node_mib}",
        memory.0
    )
}

fn is_told(started: &Started, memory: Bytes, node_mib: u64) -> Result<()> {
    let (said, wanted) = (said(started)?, told(memory, node_mib));
    ensure!(said == [wanted.clone()], "{said:?} in place of {wanted}");
    Ok(())
}

fn made_again(bed: &mut Bed) -> Result<()> {
    let first = bed.machine.run(&spec("first", "original", OPTIONS))?;
    is_told(&first, LIMIT, 256)?;
    bed.machine.stop(&first)?;
    let again = spec("again", "original", OPTIONS);
    let again = bed.machine.run_beside(&first, &again)?;
    is_told(&again, LIMIT, 256)?;
    bed.machine.remove(&again)?;
    let before = connections();
    bed.machine.kill_containerd()?;
    bed.machine.start_containerd()?;
    wait_connections(before + 1)?;
    let largest = bed.machine.run(&spec("largest", "maximum", OPTIONS))?;
    is_told(&largest, MAX, 1024)?;
    bed.machine.remove(&largest)?;
    let plain = bed.machine.run(&spec("untold", "plain", OPTIONS))?;
    let said = said(&plain)?;
    ensure!(said == ["java= node="], "{said:?}");
    bed.machine.remove(&plain)
}

fn stopped(bed: &mut Bed) -> Result<()> {
    let connected = connections();
    bed.both.write("cgroup.freeze", "1")?;
    let made = |bed: &mut Bed, name| -> Result<(Started, Nanos)> {
        let before = now();
        let started = bed.machine.run(&spec(name, "original", OPTIONS))?;
        Ok((started, now().since(before)))
    };
    let both = made(bed, "held-up").and_then(|first| Ok((first, made(bed, "not-held-up")?)));
    bed.both.write("cgroup.freeze", "0")?;
    let ((first, held), (second, after)) = both?;
    eprintln!(
        "      made in {} ms while the agent stood still, the next in {} ms",
        held.as_millis(),
        after.as_millis()
    );
    ensure!(held.0 <= PATIENCE.0 + MADE.0, "it took {held:?}");
    ensure!(after.0 <= MADE.0, "the next one took {after:?}");
    let said = said(&first)?;
    ensure!(said == ["java= node="], "{said:?}");
    wait_connections(connected + 1)?;
    wait("it is told that they were missed", LONG, || {
        let log = log_text("bellows");
        let told = log.lines().filter(|line| line.contains("was made before"));
        let told: Vec<&str> = told.collect();
        Ok([&first, &second]
            .iter()
            .all(|one| told.iter().any(|line| line.contains(&one.id))))
    })?;
    bed.machine.remove(&first)?;
    bed.machine.remove(&second)
}

fn unneeded(bed: &mut Bed) -> Result<()> {
    let connected = connections();
    fs::write(
        POLICIES,
        policy_of("plain", &format!("memory: {{max: {}}}", MAX.0)),
    )?;
    wait("it is no plugin any more", LONG, || {
        Ok(log_text("bellows").contains("no policy sizes heaps any more"))
    })?;
    thread::sleep(Duration::from_secs(2));
    let started = bed.machine.run(&spec("unneeded", "original", OPTIONS))?;
    let said = said(&started)?;
    ensure!(said == ["java= node="], "{said:?}");
    ensure!(connections() == connected, "it has come back");
    bed.agent.check()?;
    bed.machine.remove(&started)
}
