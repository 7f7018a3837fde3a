//! `cargo xtask test`: the tiers, each of whose checks passes or fails by name.
//!
//! A tier that cannot run fails, with the reason. The last line counts.

use std::process::Command;

use anyhow::{Result, ensure};
use clap::ValueEnum;
use serde_json::Value;

use crate::{
    bench::{self, Name},
    build::{self, Binaries},
    root,
    shell::{quiet, step},
    tools,
};

/// What to check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Tier {
    /// Formatting, lints, unit and property tests.
    Unit,
    /// Real kernels in guests.
    Kernel,
}

const ALL: [Tier; 2] = [Tier::Unit, Tier::Kernel];

/// Counts checks by name.
#[derive(Default)]
pub(crate) struct Checks {
    passed: u32,
    failed: Vec<String>,
}

impl Checks {
    fn check(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => {
                self.passed += 1;
                println!("ok      {name}");
            }
            Err(error) => {
                println!("FAILED  {name}: {error:#}");
                self.failed.push(name.to_owned());
            }
        }
    }
}

/// Runs tiers; returns whether all checks passed.
pub(crate) fn run(tiers: &[Tier]) -> Result<bool> {
    let tiers = if tiers.is_empty() { &ALL[..] } else { tiers };
    let mut checks = Checks::default();
    for tier in tiers {
        let result = match tier {
            Tier::Unit => unit(&mut checks),
            Tier::Kernel => kernel(&mut checks),
        };
        if let Err(error) = result {
            checks.check(&format!("the {tier:?} tier can run"), Err(error));
        }
    }
    for name in &checks.failed {
        println!("failed: {name}");
    }
    println!("{} passed, {} failed", checks.passed, checks.failed.len());
    Ok(checks.failed.is_empty())
}

fn cargo(arguments: &[&str]) -> Result<()> {
    quiet(Command::new("cargo").args(arguments).current_dir(root()?))
}

fn unit(checks: &mut Checks) -> Result<()> {
    checks.check("rustfmt", cargo(&["fmt", "--all", "--check"]));
    let tests = step("unit tests", || cargo(&["test", "--locked", "--workspace", "--exclude", "bellows-ebpf"]));
    checks.check("unit tests", tests);
    let clippy = step("clippy", || {
        cargo(&["clippy", "--locked", "--workspace", "--exclude", "bellows-ebpf", "--all-targets", "--", "-D", "warnings"])
    });
    checks.check("clippy", clippy);
    tools::rust_src()?;
    let linker = tools::bpf_linker()?;
    let clippy = step("clippy for the BPF target", || {
        quiet(build::bpf_cargo(&linker, "clippy")?.args(["--", "-D", "warnings"]).current_dir(root()?))
    });
    checks.check("clippy for the BPF target", clippy);
    Ok(())
}

fn options(name: Name, kernel: &str, n: Option<u64>, seed: u64) -> bench::Options {
    bench::Options { name, kernel: kernel.to_owned(), n, seed: Some(seed), actuation_delay_ms: None, seconds: None }
}

fn kernel(checks: &mut Checks) -> Result<()> {
    tools::packages()?;
    let binaries = build::binaries()?;
    for release in ["6.1", "6.12", "7.2"] {
        let result = bench::run(&options(Name::Smoke, release, None, 1), &binaries);
        let complete = result.and_then(|file| {
            ensure!(file["summary"]["complete"] == 1, "not every program attaches: {file}");
            Ok(())
        });
        checks.check(&format!("every program attaches on {release}"), complete);
    }
    bursts(checks, &binaries);
    Ok(())
}

fn at_most(summary: &Value, key: &str, most: f64) -> Result<()> {
    let value = summary[key].as_f64();
    ensure!(value.is_some_and(|value| value <= most), "{key} is {}, more than {most}", summary[key]);
    Ok(())
}

fn bursts(checks: &mut Checks, binaries: &Binaries) {
    let result = bench::run(&options(Name::Bursts, "6.12", Some(8), 11), binaries).and_then(|file| {
        let summary = &file["summary"];
        ensure!(summary["kills_without"] == summary["bursts"], "a burst survives its fixed limit: {summary}");
        at_most(summary, "kills_with", 0.0)?;
        at_most(summary, "raises_max", 5.0)?;
        at_most(summary, "overgrant_p50", 1.35)
    });
    checks.check("bursts survive under bellows exec", result);
    let delayed = bench::Options { actuation_delay_ms: Some(600), ..options(Name::Bursts, "6.12", Some(6), 12) };
    let result = bench::run(&delayed, binaries).and_then(|file| {
        let summary = &file["summary"];
        at_most(summary, "kills_with", 0.0)?;
        at_most(summary, "stall_vs_delay_p50_small_pages", 1.5)
    });
    checks.check("bursts survive raises that are 600 ms late", result);
}
