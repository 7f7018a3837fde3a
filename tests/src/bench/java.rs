//! `java`: Tomcat in a container with a quarter of a CPU, which needs more than one to start: without a limit, at the
//! limit, and with a start boost; alone, or several at once on two CPUs.
//!
//! How many CPUs a JVM believes to have is decided once, at its start, and so are the number of its collector's
//! threads and the collector itself: what it has seen is what it says itself (`-Xlog:gc+init`).
//!
//! An emulator that runs the CPUs of its guest side by side (QEMU 7.2) may run a stale translation of code that a JVM
//! has just compiled or patched. The JVM dies of it (SIGSEGV, SIGILL): it is counted and started again.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    net::TcpStream,
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bellows::clock::now;
use bellows_core::{Bytes, Cpu, Nanos};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    record::{Records, parsed, percentile, rounded},
    throttle::has_cpu,
};
use crate::{
    containers::{Machine, Spec, Standalone, Started, policy_of},
    node::shell,
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Times that each is run.
    #[arg(long, default_value_t = 5)]
    n: u64,
    /// Containers that start at once.
    #[arg(long, default_value_t = 1)]
    starts: u64,
    /// Ask it for pages afterwards, once it is at rest: boosted at its start, and never boosted.
    #[arg(long)]
    steady: bool,
    /// Leave out the start at the fixed limit, which is made once (it takes ten times as long as any other), and those
    /// at the quota that is lent.
    #[arg(long)]
    without_fixed: bool,
    /// Only once at the fixed limit and once with a boost.
    #[arg(long)]
    without_unlimited: bool,
}

const LIMIT: Cpu = Cpu::millis(250);
const MEMORY: Bytes = Bytes::mib(512);
/// CPUs that the policy gives a start.
const BOOST: u64 = 2;
const GUARDED: &str = "java";
/// A Tomcat that takes longer is taken for stuck.
const LONGEST: Nanos = Nanos::millis(900_000);
/// The quiet time after which the policy ends a boost, and how long all may take to be at rest then.
const IDLE: Nanos = Nanos::millis(5000);
const RESTORED: Nanos = Nanos::millis(60_000);
/// Pages that are asked for, and those before them.
const PAGES: u64 = 600;
const PAGES_BEFORE: u64 = 200;
/// What counts for a page that is not answered.
const UNANSWERED: Nanos = Nanos::millis(10_000);
/// How often a JVM may die before the bench fails, and the exit code of one that does.
const MOST_CRASHES: u64 = 5;
const ABORTED: i32 = 134;
/// Where Tomcat has its configuration and its pages.
const BASE: &str = "/srv/tomcat";
const FIRST_PORT: u64 = 8100;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum How {
    Unlimited,
    Fixed,
    /// Without Bellows, at the quota that it would lend: what a quota costs by itself.
    Quota,
    Boosted,
    /// The same container started a second time.
    BoostedAgain,
}

/// One start.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    index: u64,
    how: How,
    /// Containers that started at once.
    at_once: u64,
    /// From the request to start it to its first page.
    ready_ms: u64,
    /// CPUs that the JVM has seen at its start.
    cpus_seen: Option<u64>,
    /// What the policy means it to see.
    cpus_meant: Option<u64>,
    /// Time for which it was throttled until its first page, its own quota and its pod's.
    throttled_us: u64,
    /// From its first page until its limit was what it was, in its cgroup, its pod's and for its runtime.
    restored_ms: Option<u64>,
    /// Starts before this one in which a JVM has died.
    crashes: u64,
    /// How long pages took afterwards, in microseconds.
    pages_us: Vec<u64>,
}

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    prepare()?;
    let mut bench = Bench {
        machine: Machine::start()?,
        ports: 0,
        is_steady: options.steady,
        is_restarted: !options.without_unlimited,
    };
    let boost = format!(
        "boosts: [{{on: {{start: true}}, cpu: {BOOST}, until: {{idle: {}s, atMost: 15m}}}}]",
        IDLE.as_millis() / 1000
    );
    let mut agent = Standalone::start(&policy_of(GUARDED, &boost))?;
    for index in 0..options.n {
        let has_fixed = index == 0 && !options.without_fixed;
        let hows = [
            (How::Unlimited, !options.without_unlimited),
            (How::Boosted, true),
            (
                How::Quota,
                !options.without_unlimited && !options.without_fixed,
            ),
            (How::Fixed, has_fixed),
        ];
        for (how, is_run) in hows {
            if !is_run {
                continue;
            }
            agent.check()?;
            for record in bench.starts(index, how, options.starts)? {
                eprintln!("{record:?}");
                records.write(&record)?;
            }
        }
    }
    Ok(())
}

/// A Tomcat of its own: Debian's is configured for a service of the machine.
pub(super) fn prepare() -> Result<()> {
    let home = "/var/lib/tomcat11";
    ensure!(Path::new(home).exists(), "the guest's disk has no Tomcat");
    for directory in ["conf", "webapps", "logs", "temp", "work"] {
        fs::create_dir_all(Path::new(BASE).join(directory))?;
    }
    shell(&format!("cp -r /etc/tomcat11/. {BASE}/conf"))?;
    shell(&format!("cp -r {home}/webapps/ROOT {BASE}/webapps"))?;
    let path = Path::new(BASE).join("conf/server.xml");
    let server = fs::read_to_string(&path)?;
    let ours = server
        .replace("port=\"8080\"", "port=\"${bellows.port}\"")
        .replace("port=\"8005\"", "port=\"-1\"");
    ensure!(ours != server, "Tomcat's server.xml is not what it was");
    fs::write(&path, ours)?;
    // What it reads at its start comes from the disk once, outside of the measurement.
    let library = Path::new("/usr/lib/jvm/java-21-openjdk-amd64/lib");
    for file in ["modules", "server/libjvm.so", "server/classes.jsa"] {
        let path = library.join(file);
        let mut file = File::open(&path).with_context(|| path.display().to_string())?;
        io::copy(&mut file, &mut io::sink())?;
    }
    Ok(())
}

struct Bench {
    machine: Machine,
    ports: u64,
    /// Whether pages are asked for once it is at rest.
    is_steady: bool,
    /// Whether a boosted one is started a second time.
    is_restarted: bool,
}

/// A Tomcat that was started.
struct Tomcat {
    started: Started,
    port: u64,
    ready: Option<Nanos>,
    throttled_us: u64,
}

impl Bench {
    /// Starts so many at once, waits for all to be ready and at rest, and ends them.
    fn starts(&mut self, index: u64, how: How, at_once: u64) -> Result<Vec<Record>> {
        for crashes in 0..MOST_CRASHES {
            let first = (0..at_once).map(|_| self.start(how));
            let mut tomcats = first.collect::<Result<Vec<_>>>()?;
            let mut records = self.finish(index, how, crashes, &mut tomcats)?;
            if how == How::Boosted && self.is_restarted && !records.is_empty() {
                let again = tomcats.into_iter().map(|before| self.start_again(&before));
                tomcats = again.collect::<Result<Vec<_>>>()?;
                let again = self.finish(index, How::BoostedAgain, crashes, &mut tomcats)?;
                records = if again.is_empty() {
                    again
                } else {
                    [records, again].concat()
                };
            }
            for tomcat in tomcats {
                self.machine.remove(&tomcat.started)?;
            }
            if !records.is_empty() {
                return Ok(records);
            }
            eprintln!("case {index}, {how:?}: a JVM has died; again");
        }
        bail!("a JVM has died in {MOST_CRASHES} starts of {MOST_CRASHES}")
    }

    /// None if one has died.
    fn finish(
        &self,
        index: u64,
        how: How,
        crashes: u64,
        tomcats: &mut [Tomcat],
    ) -> Result<Vec<Record>> {
        let mut records = Vec::new();
        if !wait_ready(&self.machine, tomcats)? {
            return Ok(records);
        }
        let at_once = u64::try_from(tomcats.len())?;
        let is_boosted = matches!(how, How::Boosted | How::BoostedAgain);
        for tomcat in tomcats.iter() {
            let ready = tomcat.ready.context("it is ready")?;
            let restored_ms = if is_boosted {
                restored_after(&self.machine, &tomcat.started, ready)?
            } else {
                None
            };
            let is_asked = self.is_steady && matches!(how, How::Fixed | How::Boosted);
            let pages_us = if is_asked {
                pages(tomcat.port)
            } else {
                Vec::new()
            };
            if has_died(&self.machine, &tomcat.started)? {
                return Ok(Vec::new());
            }
            records.push(Record {
                index,
                how,
                at_once,
                ready_ms: ready.since(tomcat.started.at).as_millis(),
                cpus_seen: cpus_seen(&Machine::log(&tomcat.started)),
                cpus_meant: is_boosted.then_some(BOOST),
                throttled_us: tomcat.throttled_us,
                restored_ms,
                crashes,
                pages_us,
            });
        }
        Ok(records)
    }

    fn spec(&mut self, how: How) -> (Spec, u64) {
        self.ports += 1;
        let port = FIRST_PORT + self.ports;
        let command = tomcat(port);
        let is_boosted = how == How::Boosted;
        let guard = is_boosted.then(|| ("guard".to_owned(), GUARDED.to_owned()));
        let system = ["/usr", "/lib", "/lib64", "/etc", "/srv", "/var/lib"];
        let spec = Spec {
            limit: Some(MEMORY),
            cpu: match how {
                How::Unlimited => None,
                How::Quota => Some(Cpu::millis(BOOST * 1000)),
                How::Fixed | How::Boosted | How::BoostedAgain => Some(LIMIT),
            },
            binds: system.map(|path| (path, path)).to_vec(),
            labels: guard.into_iter().collect(),
            ..Spec::of(&format!("tomcat-{port}"), command)
        };
        (spec, port)
    }

    fn start(&mut self, how: How) -> Result<Tomcat> {
        let (spec, port) = self.spec(how);
        Ok(Tomcat {
            started: self.machine.run(&spec)?,
            port,
            ready: None,
            throttled_us: 0,
        })
    }

    /// A new container in the pod of one that is ended, as a kubelet restarts it.
    fn start_again(&mut self, before: &Tomcat) -> Result<Tomcat> {
        self.machine.stop(&before.started)?;
        let (spec, port) = self.spec(How::Boosted);
        Ok(Tomcat {
            started: self.machine.run_beside(&before.started, &spec)?,
            port,
            ready: None,
            throttled_us: 0,
        })
    }
}

/// What runs Tomcat at a port.
pub(super) fn tomcat(port: u64) -> Vec<String> {
    let words = [
        "/usr/bin/java",
        "-Xlog:gc+init",
        // As development environments have it: its fast compiler only. (It halves the time in an emulator.)
        "-XX:TieredStopAtLevel=1",
        "-XX:-UsePerfData",
        "-cp",
        "/usr/share/tomcat11/bin/bootstrap.jar:/usr/share/tomcat11/bin/tomcat-juli.jar",
        "-Dcatalina.home=/usr/share/tomcat11",
    ];
    let mut command = words.map(str::to_owned).to_vec();
    command.extend([
        format!("-Dcatalina.base={BASE}"),
        format!("-Djava.io.tmpdir={BASE}/temp"),
        format!("-Dbellows.port={port}"),
        "org.apache.catalina.startup.Bootstrap".to_owned(),
        "start".to_owned(),
    ]);
    command
}

/// Returns whether all are; one may have died.
fn wait_ready(machine: &Machine, tomcats: &mut [Tomcat]) -> Result<bool> {
    let begun = now();
    while tomcats.iter().any(|tomcat| tomcat.ready.is_none()) {
        for tomcat in tomcats.iter_mut().filter(|tomcat| tomcat.ready.is_none()) {
            if is_ready(tomcat.port) {
                tomcat.ready = Some(now());
                tomcat.throttled_us = tomcat.started.throttled_us()?;
            } else if has_died(machine, &tomcat.started)? {
                return Ok(false);
            }
        }
        ensure!(now().since(begun) < LONGEST, "Tomcat does not start");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(true)
}

/// Whether the JVM has died of the emulator; fails if it has ended in any other way.
fn has_died(machine: &Machine, started: &Started) -> Result<bool> {
    let Some(code) = machine.exit_code(started)? else {
        return Ok(false);
    };
    died_of_emulator(code, &Machine::log(started))?;
    Ok(true)
}

/// Fails if a JVM has ended in any other way than of the emulator.
pub(super) fn died_of_emulator(code: i32, log: &str) -> Result<()> {
    ensure!(
        code == ABORTED
            && ["SIGSEGV", "SIGILL"]
                .iter()
                .any(|signal| log.contains(signal)),
        "Tomcat has ended with {code}:\n{log}"
    );
    Ok(())
}

/// Whether it answers with a page.
pub(super) fn is_ready(port: u64) -> bool {
    let asked = || -> io::Result<String> {
        let mut stream = TcpStream::connect(format!("127.0.0.1:{port}"))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
        let mut answer = String::new();
        stream.take(64).read_to_string(&mut answer)?;
        Ok(answer)
    };
    asked().is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
}

/// Asks for a page every tenth of a second, and says how long each took, or how long it was waited for. The first are
/// left out: they are still being compiled.
fn pages(port: u64) -> Vec<u64> {
    let mut took = Vec::new();
    for number in 0..PAGES_BEFORE + PAGES {
        let begun = now();
        let time = if is_ready(port) {
            now().since(begun)
        } else {
            UNANSWERED
        };
        if number >= PAGES_BEFORE {
            took.push(time.0 / 1000);
        }
        thread::sleep(Duration::from_millis(100).saturating_sub(Duration::from_nanos(time.0)));
    }
    took
}

/// `CPUs: 4 total, 2 available`.
pub(super) fn cpus_seen(log: &str) -> Option<u64> {
    let (_, said) = log.split_once("CPUs: ")?;
    let (_, available) = said.split_once("total, ")?;
    available.split_whitespace().next()?.parse().ok()
}

fn restored_after(machine: &Machine, started: &Started, ready: Nanos) -> Result<Option<u64>> {
    while now().since(ready) < RESTORED {
        if has_died(machine, started)? {
            break;
        }
        if has_cpu(machine, started, LIMIT)? {
            return Ok(Some(now().since(ready).as_millis()));
        }
        thread::sleep(Duration::from_millis(200));
    }
    Ok(None)
}

/// The most CPUs that any has seen.
fn seen_by(records: &[&Record]) -> Option<u64> {
    records.iter().filter_map(|record| record.cpus_seen).max()
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let of = |hows: &[How]| -> Vec<&Record> {
        records
            .iter()
            .filter(|record| hows.contains(&record.how))
            .collect()
    };
    let boosted = of(&[How::Boosted, How::BoostedAgain]);
    // The slowest of those that start at once, at each time.
    let slowest = |hows: &[How]| -> Vec<f64> {
        let mut by_time = std::collections::BTreeMap::new();
        for record in of(hows) {
            let again = record.how == How::BoostedAgain;
            let slowest: &mut u64 = by_time.entry((record.index, again)).or_default();
            *slowest = record.ready_ms.max(*slowest);
        }
        by_time.into_values().map(|ms| ms as f64).collect()
    };
    let median = |hows: &[How]| percentile(&slowest(hows), 50.0);
    let unlimited = median(&[How::Unlimited]);
    let ratio_of = |ms: f64, of: f64| (ms > 0.0 && of > 0.0).then(|| rounded(ms / of));
    let ratio = |ms: f64| ratio_of(ms, unlimited);
    let boosted_ms = median(&[How::Boosted, How::BoostedAgain]);
    let with = ratio(boosted_ms);
    let at_once = records.iter().map(|record| record.at_once).max();
    let seen = boosted
        .iter()
        .filter(|record| record.cpus_seen == record.cpus_meant);
    let restored = boosted.iter().filter(|record| record.restored_ms.is_some());
    let mut summary = json!({
        "starts": boosted.len(),
        "ready_unlimited_s": rounded(unlimited / 1000.0),
        "ready_with_s": rounded(boosted_ms / 1000.0),
        "ready_fixed_s": rounded(median(&[How::Fixed]) / 1000.0),
        "ready_ratio_with_vs_quota": ratio_of(boosted_ms, median(&[How::Quota])),
        "cpus_seen_with": seen_by(&boosted),
        "cpus_seen_fixed": seen_by(&of(&[How::Fixed])),
        "ready_ratio_without": ratio(median(&[How::Fixed])),
        "cpus_seen_as_policy": seen.count(),
        "restore_ok": restored.count() == boosted.len(),
        "restored_max_ms": boosted.iter().filter_map(|record| record.restored_ms).max(),
        "jvm_crashes": records.iter().map(|record| record.crashes).max(),
        "throttled_max_ms": boosted.iter().map(|record| record.throttled_us / 1000).max(),
    });
    let key = match at_once {
        Some(1) | None => "ready_ratio_with".to_owned(),
        Some(many) => format!("slowest_ratio_{many}"),
    };
    summary[key] = json!(with);
    let p99 = |how| -> Option<f64> {
        let pages = of(&[how]).into_iter().flat_map(|record| &record.pages_us);
        let pages: Vec<f64> = pages.map(|&us| us as f64).collect();
        (!pages.is_empty()).then(|| percentile(&pages, 99.0))
    };
    if let (Some(boosted), Some(fixed)) = (p99(How::Boosted), p99(How::Fixed)) {
        summary["p99_ratio"] = json!(rounded(boosted / fixed));
        summary["p99_ms_never_boosted"] = json!(rounded(fixed / 1000.0));
    }
    let worst = slowest(&[How::Boosted, How::BoostedAgain]).into_iter();
    summary["worst_ratio_with"] = json!(ratio(worst.fold(0.0, f64::max)));
    Ok(summary)
}
