//! `hook-cost`: what the growth hook costs whoever allocates.
//!
//! The guest has one CPU and its clock counts executed instructions (QEMU's `-icount shift=0`): a
//! nanosecond is an instruction, whatever the machine beneath is doing. An allocator touches fresh
//! memory page by page where a container of a pod would be: in a cgroup that is tracked, with a
//! watermark that is not reached; two cgroups below such a one; in one that is not tracked; and without
//! our programs. The programs count their own instructions, with their helpers and without
//! (`ebpf/src/cost.rs`).

use std::{fs, process::Stdio};

use anyhow::{Context as _, Result, ensure};
use bellows::{
    cgroup::{Cgroup, Limit},
    signal::programs::{Kernel, Purpose},
};
use bellows_core::{Bytes, Signals, Thresholds};
use clap::Args;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    inside,
    record::{Records, parsed, percentile, rounded},
    runner::set_thp,
};
use crate::load::BurstResult;

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Allocators of each kind.
    #[arg(long, default_value_t = 8)]
    n: u64,
    /// Seed of the order.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Where an allocator runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Variant {
    /// No program is attached.
    Detached,
    /// In a cgroup that is not tracked.
    Untracked,
    /// In one that is.
    Tracked,
    /// Two cgroups below one that is.
    Nested,
}

/// Costs and how many calls had them.
type Costs = Vec<(u32, u64)>;
/// Index of the costs without helpers in [`Kernel::costs`].
const OWN: usize = 2;

/// One allocator.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Record {
    index: u64,
    seed: u64,
    variant: Variant,
    touched: Bytes,
    /// Instructions that the guest executed meanwhile, to the thousand.
    instructions: u64,
    /// Calls that the tracked cgroup counted.
    charges: u64,
    /// Instructions of each call of the growth program, by number of calls.
    costs: Costs,
    /// The same without those of its helpers, where the cgroup is tracked.
    own: Costs,
}

const TOUCHED: Bytes = Bytes::mib(64);
/// As deep as containers are.
const POD: &str = "kubepods/burstable/podhook-cost";
const CLOCK: &str = "/sys/devices/system/clocksource/clocksource0/current_clocksource";

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    let clock = fs::read_to_string(CLOCK)?;
    ensure!(
        clock.trim() == "tsc",
        "the guest's clock is {}, which does not count every instruction",
        clock.trim()
    );
    set_thp(false)?;
    let place = |name: &str| -> Result<Cgroup> {
        let cgroup = inside::create(&format!("{POD}/{name}"))?;
        Ok(cgroup)
    };
    let (untracked, tracked) = (place("untracked")?, place("tracked")?);
    let outer = place("outer")?;
    let nested = place("outer/docker/inner")?;
    for cgroup in [&untracked, &tracked, &outer] {
        cgroup.set_limit("memory.max", Limit::At(TOUCHED.scaled(4, 1)))?;
    }
    let mut random = fastrand::Rng::with_seed(options.seed);
    for index in 0..options.n {
        let mut write = |variant, instructions, charges, [costs, own]: [Costs; 2]| {
            records.write(&Record {
                index,
                seed: options.seed,
                variant,
                touched: TOUCHED,
                instructions,
                charges,
                costs,
                own,
            })
        };
        write(
            Variant::Detached,
            allocate(&untracked)?,
            0,
            Default::default(),
        )?;
        let mut programs = Programs::attach(&[&tracked, &outer])?;
        // What is done once after attaching belongs to no allocator.
        allocate(&tracked)?;
        let mut order = [
            (Variant::Untracked, &untracked, &untracked),
            (Variant::Tracked, &tracked, &tracked),
            (Variant::Nested, &nested, &outer),
        ];
        random.shuffle(&mut order);
        for (variant, cgroup, counted) in order {
            programs.take(counted);
            let instructions = allocate(cgroup)?;
            let (charges, costs) = programs.take(counted);
            write(variant, instructions, charges, costs)?;
        }
        eprintln!("case {index}: done");
    }
    Ok(())
}

/// Runs an allocator; returns the instructions from its first to its last page.
fn allocate(cgroup: &Cgroup) -> Result<u64> {
    let peak = TOUCHED.0.to_string();
    let words = [
        "burst",
        "--rest",
        "0",
        "--peak",
        &peak,
        "--rest-ms",
        "0",
        "--hold-ms",
        "0",
    ];
    let output = inside::load(cgroup, &words)?
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().last().context("the allocator said nothing")?;
    let result: BurstResult = serde_json::from_str(last)?;
    Ok(result.growth_us * 1000)
}

/// The attached programs, and what they had counted at the last look.
struct Programs {
    kernel: Kernel,
    seen: [Costs; 3],
    charges: u64,
}

impl Programs {
    fn attach(tracked: &[&Cgroup]) -> Result<Self> {
        let (mut kernel, mut reflexes) = Kernel::load(Purpose::GuardAndCountCost)?;
        for cgroup in tracked {
            let limit = cgroup.limit("memory.max")?.bytes();
            kernel.track(cgroup.id())?;
            reflexes.guards.set(
                cgroup.id(),
                Some(Thresholds::of(limit, 1, Signals::Programs).watermarks()),
            )?;
        }
        Ok(Self {
            kernel,
            seen: Default::default(),
            charges: 0,
        })
    }

    /// What was counted since the last look: charges of a cgroup, costs of all calls, and those of the
    /// program alone.
    fn take(&mut self, cgroup: &Cgroup) -> (u64, [Costs; 2]) {
        let growth = self.kernel.growth(cgroup.id());
        let charges = growth.map_or(0, |growth| growth.charges);
        let counted = charges.saturating_sub(self.charges);
        self.charges = charges;
        let costs = self.kernel.costs();
        let mut new = [Costs::new(), Costs::new()];
        for (kind, (costs, seen)) in costs.iter().zip(&self.seen).enumerate() {
            let before = |cost: u32| {
                let known = seen.iter().find(|&&(seen, _)| seen == cost);
                known.map_or(0, |&(_, calls)| calls)
            };
            new[usize::from(kind == OWN)].extend(
                costs
                    .iter()
                    .map(|&(cost, calls)| (cost, calls - before(cost)))
                    .filter(|&(_, calls)| calls > 0),
            );
        }
        self.seen = costs;
        (counted, new)
    }
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let of = |variant| {
        records
            .iter()
            .filter(move |record| record.variant == variant)
    };
    let instructions = |variant| {
        let values: Vec<f64> = of(variant)
            .map(|record| record.instructions as f64)
            .collect();
        percentile(&values, 50.0)
    };
    let ratio = |variant, to| {
        let ratio = instructions(variant) / instructions(to);
        (ratio * 1e5).round() / 1e5
    };
    let calls_per_mib = |variant| {
        let values: Vec<f64> = of(variant)
            .map(|record| record.charges as f64 / (record.touched.0 >> 20) as f64)
            .collect();
        rounded(percentile(&values, 100.0))
    };
    let cost = |variant, costs: fn(&Record) -> &Costs, percent| {
        let calls: Vec<f64> = of(variant)
            .flat_map(costs)
            .flat_map(|&(cost, calls)| (0..calls).map(move |_| f64::from(cost)))
            .collect();
        percentile(&calls, percent)
    };
    let all: fn(&Record) -> &Costs = |record| &record.costs;
    let own: fn(&Record) -> &Costs = |record| &record.own;
    let worst = |costs| cost(Variant::Tracked, costs, 99.0).max(cost(Variant::Nested, costs, 99.0));
    let mut summary = json!({
        "allocators": records.len(),
        "calls_per_mib": calls_per_mib(Variant::Tracked).max(calls_per_mib(Variant::Nested)),
        "insns_per_call": worst(own),
        "insns_per_call_with_helpers": worst(all),
        "guest_insns_ratio": ratio(Variant::Tracked, Variant::Untracked),
        "guest_insns_ratio_nested": ratio(Variant::Nested, Variant::Untracked),
        "guest_insns_ratio_detached": ratio(Variant::Tracked, Variant::Detached),
        "guest_insns_ratio_detached_untracked": ratio(Variant::Untracked, Variant::Detached),
        "guest_insns_per_mib": instructions(Variant::Detached) / (TOUCHED.0 >> 20) as f64,
    });
    for (variant, name) in [
        (Variant::Untracked, "untracked"),
        (Variant::Tracked, "tracked"),
        (Variant::Nested, "nested"),
    ] {
        summary[format!("insns_{name}")] = json!({
            "p50": cost(variant, all, 50.0),
            "p99": cost(variant, all, 99.0),
            "max": cost(variant, all, 100.0),
        });
    }
    Ok(summary)
}
