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
    checks::{Checks, at_least, at_most, edges, judge},
    deploy,
    prepare::Ahead,
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
    /// A real containerd, without Kubernetes.
    Node,
    /// A real kubelet and API server.
    Pod,
    /// The chart and what is made of it; only if it is named, because Helm is built for minutes.
    Deploy,
}

/// What is run if none is named.
const ALL: [Tier; 4] = [Tier::Unit, Tier::Kernel, Tier::Node, Tier::Pod];

/// Runs tiers; returns whether all checks passed.
pub(crate) fn run(tiers: &[Tier], only: Option<String>) -> Result<bool> {
    let tiers = if tiers.is_empty() { &ALL[..] } else { tiers };
    let is_first = |tier: &Tier| matches!(tier, Tier::Unit | Tier::Kernel);
    let needs_more = |tier: &Tier| matches!(tier, Tier::Node | Tier::Pod);
    let begins_ahead = is_first(&tiers[0]) && tiers.iter().any(needs_more) && only.is_none();
    let mut ahead = begins_ahead.then(Ahead::begin).flatten();
    let mut checks = Checks::new(only);
    for tier in tiers {
        if let Some(ahead) = ahead.take_if(|_| !is_first(tier)) {
            ahead.wait()?;
        }
        let result = match tier {
            Tier::Unit => unit(&mut checks),
            Tier::Kernel => kernel(&mut checks),
            Tier::Node => node(&mut checks),
            Tier::Pod => pod(&mut checks),
            Tier::Deploy => deploy::tier(&mut checks),
        };
        if let Err(error) = result {
            checks.check(&format!("the {tier:?} tier can run"), Err(error));
        }
    }
    Ok(checks.conclude())
}

fn cargo(arguments: &[&str]) -> Result<()> {
    quiet(Command::new("cargo").args(arguments).current_dir(root()?))
}

fn unit(checks: &mut Checks) -> Result<()> {
    // One of the tests runs make.
    tools::packages()?;
    checks.check("rustfmt", cargo(&["fmt", "--all", "--check"]));
    let tests = step("unit tests", || {
        cargo(&[
            "test",
            "--locked",
            "--workspace",
            "--exclude",
            "bellows-ebpf",
            // See its own documentation.
            "--exclude",
            "bellows-codegen",
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
            "--exclude",
            "bellows-codegen",
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
                at_least(summary, "full_rings_survived", 1.0)?;
                at_least(summary, "huge_pages_told", 1.0)?;
                at_least(summary, "findings", 10.0)?;
                ensure!(
                    summary["lacking"].as_array().is_some_and(Vec::is_empty),
                    "something is lacking"
                );
                Ok(())
            },
        );
    }
    judge(
        checks,
        &binaries,
        "growth is seen on 5.10, and doctor names what is not there",
        &bench::Options {
            kernel: "5.10".to_owned(),
            ..bench::Options::of(Name::Smoke)
        },
        |summary| {
            at_least(summary, "full_rings_survived", 1.0)?;
            at_least(summary, "huge_pages_told", 1.0)?;
            let lacking = summary["lacking"].as_array().cloned().unwrap_or_default();
            let is_lacking = |check: &str| lacking.iter().any(|finding| finding["check"] == check);
            for check in ["memory.reclaim", "brake in system calls", "exec"] {
                ensure!(is_lacking(check), "{check} is not named");
            }
            ensure!(
                lacking
                    .iter()
                    .all(|finding| finding["verdict"] == "limited"),
                "something is missing altogether"
            );
            Ok(())
        },
    );
    let exec = bench::Options::of(Name::ExecCli);
    edges(checks, &binaries, &exec, "exec");
    benches(checks, &binaries);
    // What needs a root file system comes last: it may be made still (`prepare`).
    let systemd = bench::Options {
        systemd: true,
        ..exec
    };
    edges(checks, &binaries, &systemd, "exec under systemd");
    Ok(())
}

/// Killed at the fixed limit, alive with Bellows, in every case.
fn survived(summary: &Value) -> Result<()> {
    killed_without(summary)?;
    at_most(summary, "kills_with", 0.0)
}

/// The same, where hardly any run may be excused by a machine that stood still.
fn survived_unexcused(summary: &Value) -> Result<()> {
    survived(summary)?;
    hardly_excused(summary)
}

fn hardly_excused(summary: &Value) -> Result<()> {
    at_most(summary, "stood_still", 1.0)
}

fn killed_without(summary: &Value) -> Result<()> {
    ensure!(
        summary["kills_without"] == summary["bursts"],
        "a burst survives its fixed limit"
    );
    Ok(())
}

fn benches(checks: &mut Checks, binaries: &Binaries) {
    let of = |bench, n, seed| options(bench, "6.12", Some(n), seed);
    judge(
        checks,
        binaries,
        "bursts survive under bellows exec",
        &bench::Options {
            without_unlimited: true,
            ..of(Name::Bursts, 6, 11)
        },
        |summary| {
            survived_unexcused(summary)?;
            at_most(summary, "raises_max", 5.0)?;
            // Sixty have none in the median; of six, on a machine that does something else besides, most may have one.
            at_most(summary, "sleeps_p50", 1.0)?;
            at_most(summary, "overgrant_p50", 1.35)?;
            at_most(summary, "final_ratio_p50", 1.5)
        },
    );
    for (delay, n, kind, brake_suffices) in [(600, 8, "all", 6.0), (2000, 2, "anonymous", 2.0)] {
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
                killed_without(summary)?;
                hardly_excused(summary)?;
                at_most(summary, "kills_where_brake_suffices", 0.0)?;
                at_least(summary, "where_brake_suffices", brake_suffices)?;
                at_most(summary, "stall_vs_delay_p50", 1.5)
            },
        );
    }
    // 6.12 has every kind above, with late raises.
    for kernel in ["6.1", "6.18", "7.2"] {
        let every_kind = bench::Options {
            kernel: kernel.to_owned(),
            kind: Some("all".to_owned()),
            without_unlimited: true,
            ..of(Name::Bursts, 8, 16)
        };
        judge(
            checks,
            binaries,
            &format!("growth of every kind survives on kernel {kernel}"),
            &every_kind,
            survived_unexcused,
        );
    }
    let without_bpf = bench::Options {
        without_bpf: true,
        without_unlimited: true,
        ..of(Name::Bursts, 4, 17)
    };
    judge(
        checks,
        binaries,
        "bursts survive without kernel programs",
        &without_bpf,
        survived_unexcused,
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
        "the growth hook is cheap in a tracked cgroup and below it",
        // An allocator makes 263 calls. One or two find out anew whose counter it is, ten times as dear,
        // and a tick of the clock may fall into another: of one allocator that is more than the 99th
        // percentile has room for.
        &of(Name::HookCost, 4, 1),
        |summary| {
            // One charge is 64 pages at most (MEMCG_CHARGE_BATCH, mm/memcontrol.c): four calls for each MiB.
            at_least(summary, "calls_per_mib", 3.0)?;
            at_most(summary, "calls_per_mib", 8.0)?;
            at_least(summary, "insns_per_call", 20.0)?;
            at_most(summary, "insns_per_call", 300.0)?;
            at_most(summary, "insns_per_call_with_helpers", 800.0)?;
            at_most(summary, "guest_insns_ratio", 1.01)?;
            at_most(summary, "guest_insns_ratio_nested", 1.02)
        },
    );
    let page_cache = bench::Options {
        flip_lru: true,
        nested: true,
        ..of(Name::PageCache, 1, 15)
    };
    judge(
        checks,
        binaries,
        "page cache of a nested cgroup is no demand of the outer one, whichever LRU is switched to meanwhile",
        &page_cache,
        |summary| {
            at_least(summary, "flips", 2.0)?;
            at_most(summary, "killed", 0.0)?;
            at_most(summary, "demand_cache_only_per_mille_max", 500.0)?;
            at_most(summary, "raises_cache_only", 0.0)?;
            at_least(summary, "mixed_grant_ratio", 0.8)?;
            at_most(summary, "mixed_grant_ratio", 1.25)
        },
    );
    // A third of the demo's.
    let build = bench::Options {
        without_unlimited: true,
        units: Some(4),
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

fn node(checks: &mut Checks) -> Result<()> {
    tools::packages()?;
    let binaries = build::binaries()?;
    for (what, systemd, old_containerd, seed) in [
        ("systemd", true, false, 12),
        ("cgroupfs, containerd 1.6", false, true, 13),
    ] {
        let bursts = bench::Options {
            systemd,
            old_containerd,
            ..options(Name::ContainerBursts, "6.12", Some(1), seed)
        };
        judge(
            checks,
            &binaries,
            &format!("bursts in containers survive while their runtime raises them ({what})"),
            &bursts,
            |summary| {
                at_least(summary, "bursts", 1.0)?;
                at_least(summary, "kills_without", 1.0)?;
                at_most(summary, "kills_with", 0.0)?;
                at_most(summary, "kills_unlimited", 0.0)?;
                at_least(summary, "restored", 1.0)?;
                at_most(summary, "raises_max", 5.0)?;
                at_most(summary, "stall_vs_cri_max", 3.0)?;
                hardly_excused(summary)
            },
        );
    }
    let faults = bench::Options {
        systemd: true,
        few: true,
        ..options(Name::Faults, "6.12", Some(1), 41)
    };
    judge(
        checks,
        &binaries,
        "whatever happens to the node under it, the agent kills nobody, comes to rest and tells what it lost",
        &faults,
        |summary| {
            at_least(summary, "attempts", 6.0)?;
            for key in [
                "avoidable_kills",
                "never_agreed",
                "wrong_state",
                "losses_uncounted",
            ] {
                at_most(summary, key, 0.0)?;
            }
            at_most(summary, "unguarded_max_s", 30.0)?;
            hardly_excused(summary)?;
            at_most(summary, "recovery_vs_cri_p99", 10.0)
        },
    );
    let throttle = bench::Options {
        n: Some(1),
        seconds: Some(20),
        ..bench::Options::of(Name::Throttle)
    };
    judge(
        checks,
        &binaries,
        "a CPU limit at the mean throttles nobody",
        &throttle,
        |summary| {
            at_most(summary, "throttled_vs_fixed", 0.1)?;
            at_most(summary, "throttled_vs_burst", 0.2)?;
            at_least(summary, "restored", 1.0)
        },
    );
    let churn = bench::Options {
        starts: Some(5),
        ..options(Name::Churn, "6.12", Some(400), 31)
    };
    judge(
        checks,
        &binaries,
        "containers that come and go are told apart and leave nothing behind",
        &churn,
        |summary| {
            at_least(summary, "attempts", 405.0)?;
            // How many depends on the machine.
            at_least(summary, "guarded", 105.0)?;
            // Those that were guarded.
            at_least(summary, "bursts", 1.0)?;
            for key in ["misattributed", "missed_real", "fd_growth", "bursts_killed"] {
                at_most(summary, key, 0.0)?;
            }
            Ok(())
        },
    );
    edges(
        checks,
        &binaries,
        &bench::Options::of(Name::ContainerEdges),
        "bellows run --standalone",
    );
    edges(
        checks,
        &binaries,
        &bench::Options::of(Name::Crio),
        "the agent beside CRI-O",
    );
    edges(checks, &binaries, &bench::Options::of(Name::Heaps), "heaps");
    Ok(())
}

fn pod(checks: &mut Checks) -> Result<()> {
    tools::packages()?;
    let binaries = build::binaries()?;
    // Of each way through the kernel one: page faults, shared ones, long system calls.
    let bursts = bench::Options {
        kind: Some("all".to_owned()),
        without_unlimited: true,
        ..options(Name::PodBursts, "6.12", Some(4), 21)
    };
    judge(
        checks,
        &binaries,
        "bursts in pods survive through API resizes",
        &bursts,
        |summary| {
            survived_unexcused(summary)?;
            ensure!(
                summary["restored"] == summary["bursts"],
                "a limit was not restored"
            );
            for key in ["restarts", "kills_shrinking"] {
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
    edges(
        checks,
        &binaries,
        &bench::Options::of(Name::Daemonset),
        "the DaemonSet",
    );
    let faults = bench::Options {
        few: true,
        ..options(Name::PodFaults, "6.12", Some(1), 51)
    };
    judge(
        checks,
        &binaries,
        "whatever happens to the API, bursts in pods survive, and all comes to agree",
        &faults,
        |summary| {
            at_least(summary, "attempts", 3.0)?;
            at_least(summary, "by_hand", 3.0)?;
            for key in ["kills", "failed", "restarts", "left_raised"] {
                at_most(summary, key, 0.0)?;
            }
            at_most(summary, "agree_vs_sync", 2.0)
        },
    );
    let java = bench::Options {
        n: Some(1),
        ..bench::Options::of(Name::PodJava)
    };
    judge(
        checks,
        &binaries,
        "a JVM in a pod starts with the CPUs that the policy lends it, and gives them back",
        &java,
        |summary| {
            at_least(summary, "starts", 2.0)?;
            at_least(summary, "cpus_seen_as_policy", 2.0)?;
            at_most(summary, "ready_ratio_with", 1.6)?;
            at_most(summary, "api_writes_per_minute", 6.0)?;
            at_most(summary, "restart_count_total", 0.0)?;
            ensure!(summary["restore_ok"] == true, "a limit was not restored");
            Ok(())
        },
    );
    let plateau = bench::Options {
        seconds: Some(20),
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
            at_least(summary, "peak_per_mille_of_limit_min", 940.0)?;
            for key in ["raises", "sleeps", "patches"] {
                at_most(summary, key, 0.0)?;
            }
            Ok(())
        },
    );
    // Every way to die, at rest and at a hold.
    let deaths = options(Name::Deaths, "6.12", Some(14), 23);
    judge(
        checks,
        &binaries,
        "whatever ends the agent, what it holds is let go within a second",
        &deaths,
        |summary| {
            at_least(summary, "restrained_at_death", 12.0)?;
            at_least(summary, "held_at_death", 5.0)?;
            at_most(summary, "brake_release_max_s", 1.0)?;
            at_most(summary, "left_raised", 0.0)?;
            at_most(summary, "wrong_state", 0.0)
        },
    );
    Ok(())
}
