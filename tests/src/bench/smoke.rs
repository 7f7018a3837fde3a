//! `smoke`: does this kernel take every program, what does `bellows doctor` say of it, what becomes of
//! events while nobody reads them, and have huge pages a watermark of their own?

use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use bellows::{
    cgroup::Cgroup,
    signal::programs::{Kernel, Purpose, memory_event},
};
use bellows_core::{Bytes, Watermark};
use bellows_ebpf_common::{BATCH_PAGES, loss};
use serde_json::{Value, json};

use super::{
    inside::{self, Touched},
    record::Records,
    runner::{BELLOWS, set_thp},
};

/// What a load touches each time: a few hundred events.
const TOUCHED: Bytes = Bytes::mib(64);

pub(crate) fn run(records: &mut Records) -> Result<()> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let doctor = Command::new(BELLOWS).args(["doctor", "--json"]).output()?;
    let said = String::from_utf8_lossy(&doctor.stdout);
    let doctor: Value = serde_json::from_str(&said).with_context(|| said.into_owned())?;
    let record = match Kernel::load(Purpose::GuardAndMeasure) {
        Ok((kernel, reflexes)) => {
            let missing: Vec<String> = kernel
                .missing()
                .iter()
                .map(|missing| format!("{}: {}", missing.program, missing.why))
                .collect();
            drop((kernel, reflexes));
            let (ring, huge_pages) = (full_ring()?, huge_pages()?);
            json!({ "kernel": release.trim(), "loaded": true, "missing": missing, "ring": ring,
                "huge_pages": huge_pages, "doctor": doctor })
        }
        Err(error) => {
            json!({ "kernel": release.trim(), "loaded": false, "missing": [error.to_string()], "doctor": doctor })
        }
    };
    records.write(&record)
}

/// Fills the ring while nobody reads it, then reads it and looks whether events come again.
fn full_ring() -> Result<Value> {
    set_thp(false)?;
    let (mut kernel, mut reflexes) = Kernel::load(Purpose::GuardWithSmallRing)?;
    let cgroup = inside::create("full-ring")?;
    kernel.track(cgroup.id())?;
    reflexes
        .guards
        .set(cgroup.id(), Some(Watermark::alike(Bytes::mib(1))))?;
    let mut read = || {
        drop(Touched::start(&cgroup, TOUCHED)?);
        let mut events = 0_u64;
        while reflexes.ring.next().is_some() {
            events += 1;
        }
        anyhow::Ok(events)
    };
    let kept = read()?;
    let lost = kernel.losses()[loss::MEMORY_RING_FULL as usize];
    let after = read()?;
    cgroup.remove()?;
    Ok(json!({ "kept": kept, "lost": lost, "after": after }))
}

/// Grows by huge pages, below the watermark of the one size of charges and above that of the other: how many of
/// each size are told of.
fn huge_pages() -> Result<Value> {
    set_thp(true)?;
    let (mut kernel, mut reflexes) = Kernel::load(Purpose::Guard)?;
    let cgroup = inside::create("huge-pages")?;
    kernel.track(cgroup.id())?;
    let by_faults = || Touched::start(&cgroup, TOUCHED).map(drop);
    let in_calls = || populate(&cgroup, TOUCHED);
    let mut told = |small, huge, grow: &dyn Fn() -> Result<()>| {
        let watermark = Watermark { small, huge };
        reflexes.guards.set(cgroup.id(), Some(watermark))?;
        grow()?;
        let (mut small, mut huge) = (0_u64, 0_u64);
        while let Some(item) = reflexes.ring.next() {
            let event = memory_event(&item).context("an event that cannot be read")?;
            let size = if u64::from(event.charge_pages) > BATCH_PAGES {
                &mut huge
            } else {
                &mut small
            };
            *size += 1;
        }
        anyhow::Ok(json!({ "small": small, "huge": huge }))
    };
    let (low, high) = (Bytes::from_pages(64), Bytes::mib(1024));
    let told = json!({
        "below_small": told(high, low, &by_faults)?,
        "below_huge": told(low, high, &by_faults)?,
        "in_calls": told(high, low, &in_calls)?,
    });
    drop((kernel, reflexes));
    cgroup.remove()?;
    Ok(told)
}

/// Has memory filled inside system calls.
fn populate(cgroup: &Cgroup, size: Bytes) -> Result<()> {
    let size = size.0.to_string();
    let burst = [
        "burst", "--kind", "populate", "--rest", "0", "--peak", &size,
    ];
    let status = inside::load(cgroup, &burst)?
        .stdout(Stdio::null())
        .status()
        .context("run a burst")?;
    ensure!(status.success(), "a burst: {status}");
    Ok(())
}

#[expect(
    clippy::unnecessary_wraps,
    reason = "the same shape as the other benches"
)]
pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let complete = |record: &&Value| {
        record["loaded"] == true && record["missing"].as_array().is_some_and(Vec::is_empty)
    };
    let findings = |record: &Value| {
        let findings = record["doctor"]["findings"].as_array().cloned();
        findings.unwrap_or_default().into_iter()
    };
    let is_survived = |record: &&Value| {
        let at_least_one = |key: &str| {
            record["ring"][key]
                .as_u64()
                .is_some_and(|events| events > 0)
        };
        ["kept", "lost", "after"].into_iter().all(at_least_one)
    };
    let tells_sizes = |record: &&Value| {
        let told = &record["huge_pages"];
        let none = |pass: &str, size: &str| told[pass][size] == 0;
        let some = |pass: &str, size: &str| told[pass][size].as_u64().is_some_and(|told| told > 0);
        none("below_small", "small")
            && some("below_small", "huge")
            && some("below_huge", "small")
            && none("below_huge", "huge")
            && some("in_calls", "huge")
    };
    let lacking: Vec<Value> = records
        .iter()
        .flat_map(findings)
        .filter(|finding| finding["verdict"] != "works")
        .collect();
    Ok(json!({
        "kernels": records.len(),
        "complete": records.iter().filter(complete).count(),
        "findings": records.iter().flat_map(findings).count(),
        "full_rings_survived": records.iter().filter(is_survived).count(),
        "huge_pages_told": records.iter().filter(tells_sizes).count(),
        "lacking": lacking,
    }))
}
