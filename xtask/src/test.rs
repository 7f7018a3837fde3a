//! `cargo xtask test`: the tiers, each of whose checks passes or fails by name.
//!
//! A tier that cannot run fails, with the reason. The last line counts.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
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
    /// A real kubelet and API server.
    Pod,
}

const ALL: [Tier; 3] = [Tier::Unit, Tier::Kernel, Tier::Pod];

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
            Tier::Pod => pod(&mut checks),
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
    let tests = step("unit tests", || {
        cargo(&[
            "test",
            "--locked",
            "--workspace",
            "--exclude",
            "bellows-ebpf",
        ])
    });
    checks.check("unit tests", tests);
    let clippy = step("clippy", || {
        cargo(&[
            "clippy",
            "--locked",
            "--workspace",
            "--exclude",
            "bellows-ebpf",
            "--all-targets",
            "--",
            "-D",
            "warnings",
        ])
    });
    checks.check("clippy", clippy);
    tools::rust_src()?;
    let linker = tools::bpf_linker()?;
    let clippy = step("clippy for the BPF target", || {
        quiet(
            build::bpf_cargo(&linker, "clippy")?
                .args(["--", "-D", "warnings"])
                .current_dir(root()?),
        )
    });
    checks.check("clippy for the BPF target", clippy);
    Ok(())
}

fn options(name: Name, kernel: &str, n: Option<u64>, seed: u64) -> bench::Options {
    bench::Options {
        kernel: kernel.to_owned(),
        n,
        seed: Some(seed),
        ..bench::Options::of(name)
    }
}

fn kernel(checks: &mut Checks) -> Result<()> {
    tools::packages()?;
    let binaries = build::binaries()?;
    for release in bench::KERNELS {
        let smoke = bench::Options {
            kernel: release.to_owned(),
            ..bench::Options::of(Name::Smoke)
        };
        judge(
            checks,
            &binaries,
            &format!("every program attaches on {release}, and doctor finds nothing lacking"),
            &smoke,
            |summary| {
                at_least(summary, "complete", 1.0)?;
                at_least(summary, "findings", 10.0)?;
                ensure!(
                    summary["lacking"].as_array().is_some_and(Vec::is_empty),
                    "something is lacking"
                );
                Ok(())
            },
        );
    }
    let exec = bench::Options::of(Name::ExecCli);
    edges(checks, &binaries, &exec, "exec");
    let systemd = bench::Options {
        systemd: true,
        ..exec
    };
    edges(checks, &binaries, &systemd, "exec under systemd");
    benches(checks, &binaries);
    Ok(())
}

fn at_most(summary: &Value, key: &str, most: f64) -> Result<()> {
    let value = summary[key].as_f64();
    ensure!(
        value.is_some_and(|value| value <= most),
        "{key} is {}, more than {most}",
        summary[key]
    );
    Ok(())
}

fn at_least(summary: &Value, key: &str, least: f64) -> Result<()> {
    let value = summary[key].as_f64();
    ensure!(
        value.is_some_and(|value| value >= least),
        "{key} is {}, less than {least}",
        summary[key]
    );
    Ok(())
}

/// Runs a bench and judges its summary.
fn judge(
    checks: &mut Checks,
    binaries: &Binaries,
    name: &str,
    options: &bench::Options,
    judge: impl FnOnce(&Value) -> Result<()>,
) {
    let result = bench::run(options, binaries).and_then(|file| {
        let summary = &file["summary"];
        judge(summary).with_context(|| format!("summary {summary}"))
    });
    checks.check(name, result);
}

/// Each edge of the command line is a check of its own.
fn edges(checks: &mut Checks, binaries: &Binaries, options: &bench::Options, command: &str) {
    match bench::run(options, binaries) {
        Ok(file) => {
            let failures = file["summary"]["failures"]
                .as_object()
                .cloned()
                .unwrap_or_default();
            for name in file["summary"]["cases"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(Value::as_str)
            {
                let failure = failures.get(name).map(|why| anyhow::anyhow!("{why}"));
                checks.check(&format!("{command}: {name}"), failure.map_or(Ok(()), Err));
            }
        }
        Err(error) => checks.check(&format!("{command}: its edges"), Err(error)),
    }
}

/// Killed at the fixed limit, alive with Bellows, in every case.
fn survived(summary: &Value) -> Result<()> {
    ensure!(
        summary["kills_without"] == summary["bursts"],
        "a burst survives its fixed limit"
    );
    at_most(summary, "kills_with", 0.0)
}

fn benches(checks: &mut Checks, binaries: &Binaries) {
    let of = |bench, n, seed| options(bench, "6.12", Some(n), seed);
    judge(
        checks,
        binaries,
        "bursts survive under bellows exec",
        &of(Name::Bursts, 8, 11),
        |summary| {
            ensure!(
                summary["kills_without"] == summary["bursts"],
                "a burst survives its fixed limit"
            );
            at_most(summary, "kills_with", 0.0)?;
            at_most(summary, "raises_max", 5.0)?;
            at_most(summary, "sleeps_p50", 0.0)?;
            at_most(summary, "overgrant_p50", 1.35)?;
            at_most(summary, "final_ratio_p50", 1.5)
        },
    );
    for (delay, n, kind) in [(600, 8, "all"), (2000, 2, "anonymous")] {
        let delayed = bench::Options {
            actuation_delay_ms: Some(delay),
            kind: Some(kind.to_owned()),
            ..of(Name::Bursts, n, 12)
        };
        judge(
            checks,
            binaries,
            &format!("bursts of kind {kind} survive raises that are {delay} ms late"),
            &delayed,
            |summary| {
                at_most(summary, "kills_with", 0.0)?;
                at_most(summary, "stall_vs_delay_p50", 1.5)
            },
        );
    }
    let every_kind = bench::Options {
        kind: Some("all".to_owned()),
        ..of(Name::Bursts, 8, 16)
    };
    judge(
        checks,
        binaries,
        "growth of every kind survives",
        &every_kind,
        survived,
    );
    let without_bpf = bench::Options {
        without_bpf: true,
        ..of(Name::Bursts, 4, 17)
    };
    judge(
        checks,
        binaries,
        "bursts survive without kernel programs",
        &without_bpf,
        survived,
    );
    judge(
        checks,
        binaries,
        "page cache that thrashes is served, and what does not help is taken back",
        &of(Name::Thrash, 1, 18),
        |summary| {
            at_most(summary, "killed", 0.0)?;
            ensure!(summary["raised"] == true && summary["hopeless_taken_back"] == true);
            at_most(summary, "time_ratio", 1.5)
        },
    );
    judge(
        checks,
        binaries,
        "at the ceiling everything is as without Bellows",
        &of(Name::Ceiling, 4, 13),
        |summary| {
            for key in ["same_outcome", "killed_fixed", "timed"] {
                ensure!(
                    summary[key] == summary["cases"],
                    "{key} is {}",
                    summary[key]
                );
            }
            at_most(summary, "time_to_kill_ratio_p50", 1.5)
        },
    );
    judge(
        checks,
        binaries,
        "page cache is no demand",
        &of(Name::PageCache, 2, 15),
        |summary| {
            at_most(summary, "killed", 0.0)?;
            at_most(summary, "raises_cache_only", 0.0)?;
            at_least(summary, "mixed_grant_ratio", 0.8)?;
            at_most(summary, "mixed_grant_ratio", 1.25)
        },
    );
    let build = bench::Options {
        without_unlimited: true,
        ..bench::Options::of(Name::Build)
    };
    judge(
        checks,
        binaries,
        "a C++ build passes that a fixed limit kills",
        &build,
        |summary| {
            ensure!(summary["fixed_limit_passed"] == false && summary["bellows_passed"] == true);
            at_most(summary, "bellows_kills", 0.0)
        },
    );
}

fn pod(checks: &mut Checks) -> Result<()> {
    tools::packages()?;
    let binaries = build::binaries()?;
    let bursts = options(Name::PodBursts, "6.12", Some(4), 21);
    judge(
        checks,
        &binaries,
        "bursts in pods survive through API resizes",
        &bursts,
        |summary| {
            ensure!(
                summary["kills_without"] == summary["bursts"],
                "a burst survives its fixed limit"
            );
            ensure!(
                summary["restored"] == summary["bursts"],
                "a limit was not restored"
            );
            for key in ["kills_with", "restarts", "kills_shrinking"] {
                at_most(summary, key, 0.0)?;
            }
            at_most(summary, "raise_patches_max_x8", 2.0)?;
            at_most(summary, "raise_patches_max_x16", 3.0)?;
            at_most(summary, "overgrant_p50", 1.35)
        },
    );
    edges(
        checks,
        &binaries,
        &bench::Options::of(Name::PodEdges),
        "run",
    );
    let plateau = bench::Options {
        seconds: Some(120),
        ..bench::Options::of(Name::Plateau)
    };
    judge(
        checks,
        &binaries,
        "a plateau is no burst",
        &plateau,
        |summary| {
            at_least(summary, "completed", 3.0)?;
            at_least(summary, "guarded_pods", 3.0)?;
            for key in ["raises", "sleeps", "patches"] {
                at_most(summary, key, 0.0)?;
            }
            Ok(())
        },
    );
    let deaths = options(Name::Deaths, "6.12", Some(6), 23);
    judge(
        checks,
        &binaries,
        "whatever ends the agent, what it holds is let go within a second",
        &deaths,
        |summary| {
            at_most(summary, "brake_release_max_s", 1.0)?;
            at_most(summary, "left_raised", 0.0)?;
            at_most(summary, "wrong_state", 0.0)
        },
    );
    let kill = options(Name::Kill, "6.12", Some(3), 22);
    judge(
        checks,
        &binaries,
        "a killed agent leaves nothing held, raised or unreadable",
        &kill,
        |summary| {
            at_most(summary, "released_after_start_max_s", 1.0)?;
            at_most(summary, "left_raised", 0.0)?;
            at_most(summary, "ledger_unreadable", 0.0)
        },
    );
    Ok(())
}
