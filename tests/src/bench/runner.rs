//! Running one load in a cgroup, watched from outside.

use std::{
    env, fs, io,
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bellows::{
    cgroup::{Cgroup, Limit},
    clock::now,
    signal::programs::{Kernel, Purpose},
};
use bellows_core::{Bytes, Nanos};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::excused::Ended;
use crate::{
    heartbeat::Heartbeat,
    node::wait,
    sampler::{Sample, Sampler, Track},
};

const ROOT: &str = "/sys/fs/cgroup";
pub(crate) const BELLOWS: &str = "bellows";
/// What `bellows exec` keeps of what runs have needed.
const LEARNT: &str = "/run/bellows/learnt";
/// A CPU that stood still longer ago than this is not the cause of a kill.
const SHORTLY: Nanos = Nanos::millis(500);

/// How a load went.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Exit code, or 128 + signal.
    pub(crate) code: i32,
    /// Kills that the cgroup counted.
    pub(crate) oom_kill: u64,
    /// Calls of 10 ms or more in which the memory controller held a thread.
    pub(crate) sleeps: u64,
    /// When the first kill was seen, `CLOCK_MONOTONIC` nanoseconds; 0 for none.
    pub(crate) killed_at_ns: u64,
    /// Microseconds from the start of the command to its end.
    pub(crate) wall_us: u64,
    /// The longest time, in microseconds, for which a CPU of the machine stood still shortly before the kill, or the end.
    #[serde(default)]
    pub(crate) stood_still_us: u64,
    /// What the load said of itself.
    pub(crate) said: Value,
    /// What it was granted and used over time.
    pub(crate) samples: Vec<Sample>,
    /// What `bellows exec` reported.
    pub(crate) report: Value,
    /// Standard error.
    pub(crate) stderr: String,
}

impl Outcome {
    pub(crate) const fn killed(&self) -> bool {
        self.oom_kill > 0 || self.code != 0
    }
}

impl Ended for Outcome {
    fn killed(&self) -> bool {
        self.killed()
    }

    fn stood_still(&self) -> Nanos {
        Nanos(self.stood_still_us * 1000)
    }
}

/// The bench's own probe: counts the holds of the cgroups that it is told of, and notes when the machine stands still.
#[derive(Clone)]
pub(crate) struct Probe {
    kernel: Arc<Mutex<Kernel>>,
    heartbeat: Arc<Heartbeat>,
}

impl Probe {
    pub(crate) fn start() -> Result<Self> {
        let (probe, _rings) = Kernel::load(Purpose::MeasureHolds)?;
        anyhow::ensure!(
            probe.missing().is_empty(),
            "the bench's probe is incomplete: {:?}",
            probe.missing()
        );
        Ok(Self {
            kernel: Arc::new(Mutex::new(probe)),
            heartbeat: Arc::new(Heartbeat::start()?),
        })
    }

    /// Samples a cgroup, its sleeps included, as soon as it can be found.
    pub(crate) fn sample(&self, find: impl Fn() -> Option<Cgroup> + Send + 'static) -> Sampler {
        let (tracked, asked) = (self.clone(), self.clone());
        Sampler::start(
            find,
            move |cgroup| {
                if let Ok(mut probe) = tracked.kernel.lock()
                    && let Err(error) = probe.track_holds(cgroup.id())
                {
                    eprintln!("sleeps are not counted: {error}");
                }
            },
            move |cgroup| {
                let probe = asked.kernel.lock().ok();
                let holds = probe.and_then(|probe| probe.holds(cgroup.id()));
                holds.map_or(0, |holds| holds.long_holds)
            },
        )
    }
}

impl Probe {
    /// The longest time for which a CPU stood still shortly before `last`.
    fn stood_still_before(&self, last: Nanos) -> Nanos {
        let before = Nanos(last.0.saturating_sub(SHORTLY.0));
        self.heartbeat.longest(before, last)
    }

    /// The same before the kill that was seen; nothing where none was.
    pub(crate) fn stood_still_before_kill(&self, track: &Track) -> Nanos {
        if track.killed_at_ns > 0 {
            self.stood_still_before(Nanos(track.killed_at_ns))
        } else {
            Nanos(0)
        }
    }

    /// The same of what a CPU stood still within these times.
    pub(crate) fn stood_still_within(&self, from: Nanos, to: Nanos) -> Nanos {
        self.heartbeat.longest_after(from, to)
    }
}

/// Runs loads, with the probe beside them.
pub(crate) struct Runner {
    probe: Probe,
    executable: PathBuf,
    runs: AtomicU64,
}

impl Runner {
    pub(crate) fn new() -> Result<Self> {
        Cgroup::open(Path::new(ROOT))?.write("cgroup.subtree_control", "+memory")?;
        Ok(Self {
            probe: Probe::start()?,
            executable: env::current_exe()?,
            runs: AtomicU64::new(0),
        })
    }

    pub(crate) const fn probe(&self) -> &Probe {
        &self.probe
    }

    /// The command line of one of this binary's loads.
    pub(crate) fn load(&self, arguments: &[&str]) -> Vec<String> {
        let executable = self.executable.to_string_lossy();
        [&*executable, "load"]
            .iter()
            .chain(arguments)
            .map(|&word| word.to_owned())
            .collect()
    }

    /// Runs a command in a plain cgroup with a fixed limit.
    pub(crate) fn fixed(&self, limit: Limit, words: &[String]) -> Result<Outcome> {
        let run = self.runs.fetch_add(1, Ordering::Relaxed);
        let cgroup = Cgroup::open(Path::new(ROOT))?.create_child(&format!("bench-{run}"))?;
        cgroup.set_limit("memory.max", limit)?;
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        cgroup.admit(&mut command)?;
        let outcome = self.watch(command, cgroup.path().to_owned())?;
        cgroup.kill()?;
        remove(&cgroup)?;
        Ok(outcome)
    }

    /// Runs a command under `bellows exec`, for the first time as far as that knows.
    pub(crate) fn bellows(
        &self,
        memory: Bytes,
        max: Bytes,
        options: &[String],
        words: &[String],
    ) -> Result<Outcome> {
        forget_learnt()?;
        self.bellows_again(memory, max, options, words)
    }

    /// The same, with what it has learnt of earlier runs.
    pub(crate) fn bellows_again(
        &self,
        memory: Bytes,
        max: Bytes,
        options: &[String],
        words: &[String],
    ) -> Result<Outcome> {
        let run = self.runs.fetch_add(1, Ordering::Relaxed);
        let report = PathBuf::from(format!("/tmp/report-{run}.json"));
        let mut command = Command::new(BELLOWS);
        command
            .args([
                "exec",
                "--memory",
                &memory.0.to_string(),
                "--max-memory",
                &max.0.to_string(),
            ])
            .arg("--report")
            .arg(&report)
            .args(options)
            .arg("--")
            .args(words);
        let mut outcome = self.watch(command, PathBuf::new())?;
        outcome.report = fs::read_to_string(&report)
            .ok()
            .and_then(|text| serde_json::from_str(&text).ok())
            .unwrap_or_default();
        Ok(outcome)
    }

    fn watch(&self, mut command: Command, cgroup: PathBuf) -> Result<Outcome> {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let start = Instant::now();
        let child = command.spawn().context("run the load")?;
        let path = if cgroup.as_os_str().is_empty() {
            Path::new(ROOT).join(format!("bellows-exec-{}", child.id()))
        } else {
            cgroup
        };
        let sampler = self.probe.sample(move || Cgroup::open(&path).ok());
        let Output {
            status,
            stdout,
            stderr,
        } = child.wait_with_output()?;
        let wall_us = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        let ended = now();
        let track = sampler.finish();
        // The cgroup of `bellows exec` goes with its command: its kill may not have been seen.
        let last = if track.killed_at_ns > 0 {
            Nanos(track.killed_at_ns)
        } else {
            ended
        };
        let stood_still = self.probe.stood_still_before(last);
        Ok(Outcome {
            code: status
                .code()
                .or_else(|| status.signal().map(|signal| 128 + signal))
                .unwrap_or(-1),
            oom_kill: track.oom_kill,
            sleeps: track.sleeps,
            killed_at_ns: track.killed_at_ns,
            wall_us,
            stood_still_us: stood_still.0 / 1000,
            said: said(&stdout),
            samples: track.samples,
            report: Value::Null,
            stderr: String::from_utf8_lossy(&stderr).trim().to_owned(),
        })
    }
}

/// Removes what runs have needed: another run of the same command would begin with more.
pub(crate) fn forget_learnt() -> Result<()> {
    match fs::remove_dir_all(LEARNT) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).context(LEARNT),
        _ => Ok(()),
    }
}

/// Removes a cgroup, and the one below it that a load may have made.
fn remove(cgroup: &Cgroup) -> Result<()> {
    wait("an empty cgroup", Duration::from_secs(5), || {
        Ok(!cgroup.populated()?)
    })?;
    let inner = cgroup.path().join("inner");
    if inner.is_dir() {
        Cgroup::open(&inner)?.remove()?;
    }
    Ok(cgroup.remove()?)
}

/// The last line of a load's output that is a JSON object.
fn said(stdout: &[u8]) -> Value {
    let text = String::from_utf8_lossy(stdout);
    text.lines()
        .rev()
        .find_map(|line| serde_json::from_str(line).ok())
        .unwrap_or_default()
}

/// Which cases run with transparent huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum HugePages {
    /// Every other.
    #[default]
    Alternate,
    /// All.
    Always,
    /// None.
    Never,
}

impl HugePages {
    /// Whether the case of this turn does, where `first` tells of the first.
    pub(crate) const fn in_turn(self, turn: u64, first: bool) -> bool {
        match self {
            Self::Alternate => turn.is_multiple_of(2) == first,
            Self::Always => true,
            Self::Never => false,
        }
    }
}

/// Switches the multi-gen LRU.
pub(crate) fn set_lru_gen(on: bool) -> Result<()> {
    let value = if on { "y" } else { "n" };
    fs::write("/sys/kernel/mm/lru_gen/enabled", value).context("multi-gen LRU")
}

/// Switches transparent huge pages.
pub(crate) fn set_thp(always: bool) -> Result<()> {
    let mode = if always { "always" } else { "never" };
    fs::write("/sys/kernel/mm/transparent_hugepage/enabled", mode).context("transparent huge pages")
}
