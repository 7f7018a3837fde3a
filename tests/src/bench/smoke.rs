//! `smoke`: does this kernel take every program?

use anyhow::Result;
use bellows::signal::programs::{Kernel, Purpose};
use serde_json::{Value, json};

use super::record::Records;

pub(crate) fn run(records: &mut Records) -> Result<()> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let record = match Kernel::load(Purpose::GuardAndMeasure) {
        Ok((kernel, _reflexes)) => {
            let missing: Vec<String> = kernel
                .missing()
                .iter()
                .map(|missing| format!("{}: {}", missing.program, missing.why))
                .collect();
            json!({ "kernel": release.trim(), "loaded": true, "missing": missing })
        }
        Err(error) => {
            json!({ "kernel": release.trim(), "loaded": false, "missing": [error.to_string()] })
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
    Ok(json!({ "kernels": records.len(), "complete": records.iter().filter(complete).count() }))
}
