//! `cargo xtask bench arbiter`: the arbiter's properties on many random cases, and whether its tests can fail.
//!
//! Both run on the host: the arbiter is a pure function. The cases are the unit tests' own (`arbiter::tests` in
//! `agent/core`), only more of them: a record has the seed of its batch's first case, and `--seed` with `--n` runs any of
//! them again. The mutants are those of cargo-mutants; each is a changed arbiter, and is caught if a unit test fails.

use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};

use crate::{
    bench::Options,
    root,
    shell::{output, step},
    tools,
};

const CASES: u64 = 1_000_000;
/// Those of the unit tests begin at zero.
const SEED: u64 = 1_000_000;
/// What is changed.
const SOURCES: [&str; 2] = [
    "agent/core/src/arbiter.rs",
    "agent/core/src/arbiter/bursts.rs",
];
/// What may notice.
const TESTS: [&str; 3] = ["--lib", "--", "arbiter::"];

/// Runs it; returns whether nothing was wrong.
pub(crate) fn command(options: &Options) -> Result<bool> {
    let (seed, cases) = (options.seed.unwrap_or(SEED), options.n.unwrap_or(CASES));
    let what = format!("{cases} cases from seed {seed}");
    let mut records = step(&what, || batches(seed, cases))?;
    if !options.without_mutants {
        records.extend(step("mutants", mutants)?);
    }
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    fs::write(options.evidence("jsonl")?, lines)?;
    let summary = summary(&records);
    let file = json!({ "bench": "arbiter", "seed": seed, "summary": summary });
    let text = serde_json::to_string_pretty(&file)?;
    fs::write(options.evidence("json")?, format!("{text}\n"))?;
    println!("{text}");
    Ok(summary["violations"] == 0)
}

/// One record for each batch.
fn batches(seed: u64, cases: u64) -> Result<Vec<Value>> {
    let mut command = Command::new("cargo");
    command
        .args([
            "test",
            "--locked",
            "--release",
            "-p",
            "bellows-core",
            "--lib",
        ])
        .args(["arbiter::tests::batches", "--", "--ignored", "--nocapture"])
        .env("BELLOWS_SEED", seed.to_string())
        .env("BELLOWS_CASES", cases.to_string())
        .current_dir(root()?);
    let records = told(&output(&mut command)?);
    let sum: u64 = records
        .iter()
        .filter_map(|record| record["cases"].as_u64())
        .sum();
    ensure!(sum == cases, "only {sum} of {cases} cases were told of");
    Ok(records)
}

/// From lines such as `batch 1000000 10000 0`, each followed by what was wrong.
fn told(text: &str) -> Vec<Value> {
    let mut records: Vec<Value> = Vec::new();
    for line in text.lines() {
        if let Some(what) = line.strip_prefix("violation ") {
            let wrong = records
                .last_mut()
                .and_then(|record| record["first"].as_array_mut());
            wrong.into_iter().for_each(|wrong| wrong.push(what.into()));
        } else if let Some(numbers) = line.strip_prefix("batch ") {
            let numbers: Vec<u64> = numbers
                .split(' ')
                .filter_map(|number| number.parse().ok())
                .collect();
            if let [seed, cases, violations] = numbers[..] {
                let (kind, first) = ("batch", json!([]));
                records.push(json!({
                    "kind": kind, "seed": seed, "cases": cases, "violations": violations, "first": first,
                }));
            }
        }
    }
    records
}

/// One record for each mutant.
fn mutants() -> Result<Vec<Value>> {
    let program = tools::cargo_mutants()?;
    let directory = root()?.join("target/arbiter");
    fs::create_dir_all(&directory)?;
    let mut command = Command::new(program);
    command
        .args(["mutants", "-p", "bellows-core", "--no-shuffle", "--output"])
        .arg(&directory);
    for source in SOURCES {
        command.args(["--file", source]);
    }
    let status = command
        .args(["--minimum-test-timeout", "60", "--"])
        .args(TESTS)
        .env_remove("CARGO_TARGET_DIR")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .current_dir(root()?)
        .status()?;
    // 2 for mutants that were missed, 3 for some that ran too long.
    ensure!(
        matches!(status.code(), Some(0 | 2 | 3)),
        "cargo-mutants failed ({status}); see {}",
        directory.join("mutants.out/log").display()
    );
    outcomes(&directory.join("mutants.out/outcomes.json"))
}

fn outcomes(file: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let all: Value = serde_json::from_str(&text).with_context(|| file.display().to_string())?;
    let all = all["outcomes"].as_array().context("no outcomes")?;
    let mutants = all
        .iter()
        .filter(|outcome| outcome["scenario"]["Mutant"].is_object());
    let record = |outcome: &Value| {
        let mutant = &outcome["scenario"]["Mutant"];
        json!({ "kind": "mutant", "mutant": mutant["name"], "outcome": outcome["summary"] })
    };
    Ok(mutants.map(record).collect())
}

fn summary(records: &[Value]) -> Value {
    let sum = |key: &str| -> u64 {
        records
            .iter()
            .filter_map(|record| record[key].as_u64())
            .sum()
    };
    let mut outcomes: BTreeMap<&str, u64> = BTreeMap::new();
    for outcome in records
        .iter()
        .filter_map(|record| record["outcome"].as_str())
    {
        *outcomes.entry(outcome).or_default() += 1;
    }
    let count = |name: &str| outcomes.get(name).copied().unwrap_or(0);
    // One that runs for ever does not pass either; one that does not compile is none.
    let caught = count("CaughtMutant") + count("Timeout");
    let all = caught + count("MissedMutant");
    let per_mille = (caught * 1000).checked_div(all);
    let ratio = per_mille.map(|per_mille| per_mille as f64 / 1000.0);
    json!({
        "cases": sum("cases"),
        "violations": sum("violations"),
        "mutants": all,
        "mutants_caught_ratio": ratio,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_summary_counts_what_is_told_and_what_does_not_compile_is_no_mutant() {
        let text = "running 1 test\nbatch 7 10 1\nviolation seed 9: \"x\"\nbatch 17 5 0\ntest ok\n";
        let mut records = told(text);
        assert_eq!(records.len(), 2);
        assert_eq!(records[0]["first"], json!(["seed 9: \"x\""]));
        assert_eq!(summary(&records)["mutants_caught_ratio"], Value::Null);
        for outcome in ["CaughtMutant", "Timeout", "MissedMutant", "Unviable"] {
            records.push(json!({ "kind": "mutant", "outcome": outcome }));
        }
        let expected = json!({
            "cases": 15, "violations": 1, "mutants": 3, "mutants_caught_ratio": 0.666,
        });
        assert_eq!(summary(&records), expected);
    }
}
