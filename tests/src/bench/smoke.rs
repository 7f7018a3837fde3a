//! `smoke`: does this kernel take every program, and what does `bellows doctor` say of it?

use std::process::Command;

use anyhow::{Context as _, Result};
use bellows::signal::programs::{Kernel, Purpose};
use serde_json::{Value, json};

use super::{record::Records, runner::BELLOWS};

pub(crate) fn run(records: &mut Records) -> Result<()> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let doctor = Command::new(BELLOWS).args(["doctor", "--json"]).output()?;
    let said = String::from_utf8_lossy(&doctor.stdout);
    let doctor: Value = serde_json::from_str(&said).with_context(|| said.into_owned())?;
    let record = match Kernel::load(Purpose::GuardAndMeasure) {
        Ok((kernel, _reflexes)) => {
            let missing: Vec<String> = kernel
                .missing()
                .iter()
                .map(|missing| format!("{}: {}", missing.program, missing.why))
                .collect();
            json!({ "kernel": release.trim(), "loaded": true, "missing": missing, "doctor": doctor })
        }
        Err(error) => {
            json!({ "kernel": release.trim(), "loaded": false, "missing": [error.to_string()], "doctor": doctor })
        }
    };
    records.write(&record)
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
    let lacking: Vec<Value> = records
        .iter()
        .flat_map(findings)
        .filter(|finding| finding["verdict"] != "works")
        .collect();
    Ok(json!({
        "kernels": records.len(),
        "complete": records.iter().filter(complete).count(),
        "findings": records.iter().flat_map(findings).count(),
        "lacking": lacking,
    }))
}
