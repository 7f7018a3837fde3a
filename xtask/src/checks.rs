//! Checks by name: benches are run and their summaries judged, and the last line counts.
//!
//! What was left out on request is told, so that nobody takes a part for the whole.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::{bench, build::Binaries};

/// Counts checks by name.
#[derive(Default)]
pub(crate) struct Checks {
    passed: u32,
    /// What failed, and why.
    failed: Vec<(String, String)>,
    /// Only benches whose checks have this in their name are run.
    only: Option<String>,
    left_out: u32,
    /// Restarts of containers, of each bench that counts them.
    restarts: Vec<u64>,
}

impl Checks {
    pub(crate) fn new(only: Option<String>) -> Self {
        Self {
            only,
            ..Self::default()
        }
    }

    /// Whether a bench is to be run for a check; counts those that are not.
    fn wants(&mut self, name: &str) -> bool {
        let wanted = self.only.as_ref().is_none_or(|only| name.contains(only));
        self.left_out += u32::from(!wanted);
        wanted
    }

    pub(crate) fn check(&mut self, name: &str, result: Result<()>) {
        match result {
            Ok(()) => {
                self.passed += 1;
                println!("ok      {name}");
            }
            Err(error) => {
                let why = format!("{error:#}");
                println!("FAILED  {name}: {why}");
                self.failed.push((name.to_owned(), why));
            }
        }
    }

    /// Prints once more what failed, and the counts; returns whether all passed. Nothing is no success. Names come last:
    /// of a long log often only the end is kept.
    pub(crate) fn conclude(&self) -> bool {
        for (name, why) in &self.failed {
            println!("failed: {name}: {why}");
        }
        if let Some(only) = &self.only {
            println!(
                "left out, not having `{only}` in their names: {}",
                self.left_out
            );
        }
        if !self.restarts.is_empty() {
            println!(
                "restart_count_total {} in {} benches of pods",
                self.restarts.iter().sum::<u64>(),
                self.restarts.len()
            );
        }
        if !self.failed.is_empty() {
            let names: Vec<_> = self.failed.iter().map(|(name, _)| &**name).collect();
            println!("failed: {}", names.join(" | "));
        }
        println!("{} passed, {} failed", self.passed, self.failed.len());
        self.failed.is_empty() && self.passed > 0
    }
}

pub(crate) fn at_most(summary: &Value, key: &str, most: f64) -> Result<()> {
    let value = summary[key].as_f64();
    ensure!(
        value.is_some_and(|value| value <= most),
        "{key} is {}, more than {most}",
        summary[key]
    );
    Ok(())
}

pub(crate) fn at_least(summary: &Value, key: &str, least: f64) -> Result<()> {
    let value = summary[key].as_f64();
    ensure!(
        value.is_some_and(|value| value >= least),
        "{key} is {}, less than {least}",
        summary[key]
    );
    Ok(())
}

/// Runs a bench and judges its summary.
pub(crate) fn judge(
    checks: &mut Checks,
    binaries: &Binaries,
    name: &str,
    options: &bench::Options,
    judge: impl FnOnce(&Value) -> Result<()>,
) {
    if !checks.wants(name) {
        return;
    }
    let result = bench::run(options, binaries).and_then(|file| {
        let summary = &file["summary"];
        let restarts = ["restarts", "restart_count_total"].map(|key| summary[key].as_u64());
        checks.restarts.extend(restarts.into_iter().flatten());
        judge(summary).with_context(|| format!("summary {summary}"))
    });
    checks.check(name, result);
}

/// Each edge of the command line is a check of its own.
pub(crate) fn edges(
    checks: &mut Checks,
    binaries: &Binaries,
    options: &bench::Options,
    command: &str,
) {
    if !checks.wants(command) {
        return;
    }
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
