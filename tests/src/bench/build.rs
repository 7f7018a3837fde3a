//! `build`: a real `make -j8` whose compilers exceed the limit together.

use std::{fs, path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use bellows::cgroup::Limit;
use bellows_core::{Bytes, quantity};
use clap::Args;
use rustix::mount::{MountFlags, mount};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    record::{Records, rounded},
    runner::{Outcome, Runner},
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// The fixed limit.
    #[arg(long, value_parser = quantity::parse, default_value = "256Mi")]
    memory: Bytes,
    /// The ceiling.
    #[arg(long, value_parser = quantity::parse, default_value = "3Gi")]
    max_memory: Bytes,
    /// Jobs.
    #[arg(long, default_value_t = 8)]
    jobs: u64,
    /// Translation units, 3 at least.
    #[arg(long, default_value_t = 12)]
    units: u64,
    /// Leave out the build without a limit.
    #[arg(long)]
    without_unlimited: bool,
}

#[derive(Debug, Serialize, Deserialize)]
struct Record {
    memory: Bytes,
    max_memory: Bytes,
    jobs: u64,
    units: u64,
    unlimited: Option<Outcome>,
    fixed: Outcome,
    bellows: Outcome,
}

pub(super) const ROOT: &str = "/disk";
pub(super) const SOURCES: &str = "/build-load";

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let Options {
        memory,
        max_memory,
        jobs,
        units,
        without_unlimited,
    } = *options;
    prepare()?;
    let runner = Runner::new()?;
    let build = |out: &str| -> Vec<String> {
        let jobs = format!("-j{jobs}");
        let units = format!("UNITS={units}");
        let out = format!("O=/tmp/{out}");
        [
            "chroot", ROOT, "make", "--silent", "-C", SOURCES, &units, &jobs, &out,
        ]
        .map(str::to_owned)
        .to_vec()
    };
    // Once outside of the measurement: compiler and headers come from the disk, and their page cache
    // belongs to no measured cgroup. A limit full of cache would thrash for minutes before it kills.
    let words = build("warm");
    let warm = Command::new(&words[0])
        .args(&words[1..words.len() - 2])
        .args([
            "-j2",
            "O=/tmp/warm",
            "/tmp/warm/unit-1.o",
            "/tmp/warm/main.o",
        ])
        .status()?;
    ensure!(warm.success(), "the guest's compiler does not work: {warm}");
    eprintln!("build -j{jobs} at a fixed limit of {memory}");
    let fixed = runner.fixed(Limit::At(memory), &build("fixed"))?;
    eprintln!("build -j{jobs} under bellows exec, {memory} to {max_memory}");
    let bellows = runner.bellows(memory, max_memory, &[], &build("bellows"))?;
    let unlimited = if without_unlimited {
        None
    } else {
        eprintln!("build -j{jobs} without a limit");
        Some(runner.fixed(Limit::Max, &build("unlimited"))?)
    };
    eprintln!("{}", bellows.stderr);
    records.write(&Record {
        memory,
        max_memory,
        jobs,
        units,
        unlimited,
        fixed,
        bellows,
    })
}

/// Makes the disk a root to compile in.
pub(super) fn prepare() -> Result<()> {
    ensure!(
        Path::new("/disk/usr/bin/make").exists(),
        "the guest's disk has no compiler"
    );
    for (source, target, kind) in [
        ("proc", "/disk/proc", "proc"),
        ("devtmpfs", "/disk/dev", "devtmpfs"),
        ("tmpfs", "/disk/run", "tmpfs"),
    ] {
        mount(
            source,
            target,
            kind,
            MountFlags::empty(),
            None::<&std::ffi::CStr>,
        )
        .with_context(|| target.to_owned())?;
    }
    let sources = format!("{ROOT}{SOURCES}");
    fs::create_dir_all(&sources)?;
    for entry in fs::read_dir(SOURCES)? {
        let entry = entry?;
        fs::copy(entry.path(), Path::new(&sources).join(entry.file_name()))?;
    }
    Ok(())
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let record: Record = serde_json::from_value(records.first().context("no record")?.clone())?;
    let Record {
        unlimited,
        fixed,
        bellows,
        ..
    } = record;
    let ratio = unlimited
        .as_ref()
        .map(|unlimited| bellows.wall_us as f64 / unlimited.wall_us.max(1) as f64);
    let seconds = |outcome: &Outcome| rounded(outcome.wall_us as f64 / 1e6);
    Ok(json!({
        "fixed_limit_passed": fixed.code == 0,
        "bellows_passed": bellows.code == 0,
        "time_ratio": ratio.map(rounded),
        "fixed_seconds": seconds(&fixed),
        "bellows_seconds": seconds(&bellows),
        "unlimited_seconds": unlimited.as_ref().map(seconds),
        "fixed_kills": fixed.oom_kill,
        "bellows_kills": bellows.oom_kill,
        "sleeps": bellows.sleeps,
        "raises": bellows.report["report"]["raises"],
        "peak": bellows.samples.last().map(|sample| sample.peak),
        "limit_reached": bellows.samples.iter().filter(|sample| sample.limit != u64::MAX).map(|sample| sample.limit).max(),
        "summary_line": bellows.stderr.lines().last(),
    }))
}
