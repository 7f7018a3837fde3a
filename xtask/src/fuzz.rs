//! `cargo xtask fuzz`: libFuzzer over the targets in `tests/fuzz`.
//!
//! libFuzzer is linked in and driven from here instead of by cargo-fuzz: that would compile and
//! instrument the whole Kubernetes client once more, and wants a nightly compiler. Here the pinned
//! compiler instruments our own crates and nothing else (`tests/fuzz/rustc`); whatever `cargo test` has
//! built below them is used as it is.
//!
//! What is found on the way stays in the cache, so that a second run goes on where the first ended;
//! `--keep` brings what covers more into `tests/fuzz/corpus`. A crash is an artifact below
//! `target/fuzz`, never overwritten, and fails the command.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};

use crate::{
    root,
    shell::{has, quiet, step, tail},
    tools,
};

const CORPUS: &str = "tests/fuzz/corpus";
/// Artifacts and logs.
const DIRECTORY: &str = "target/fuzz";
/// Seconds for one input, many times what the slowest takes: the machine may be busy.
const TIMEOUT: u64 = 20;
/// How the names of artifacts begin that are failures. (`slow-unit-` is none.)
const FAILURES: [&str; 4] = ["crash-", "timeout-", "oom-", "leak-"];
/// This kernel's own BTF; the target that damages it has nothing to do on a machine without.
const KERNEL_BTF: (&str, &str) = ("btf-kernel", "/sys/kernel/btf/vmlinux");

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Only this target (a directory in tests/fuzz/corpus); all of them unless given.
    target: Option<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 600)]
    seconds: u64,
    /// Keep the fewest inputs that cover what was covered, in tests/fuzz/corpus.
    #[arg(long)]
    keep: bool,
}

/// Fuzzes; returns whether nothing crashed.
pub(crate) fn command(options: &Options) -> Result<bool> {
    let targets = targets(options)?;
    let program = build()?;
    let mut records = Vec::new();
    for target in &targets {
        let run = Run::new(target, &program)?;
        let what = format!("fuzz {target} for {} s", options.seconds);
        let record = step(&what, || run.fuzz(options.seconds))?;
        println!("{}", line(&record));
        records.push(record);
        if options.keep {
            step(&format!("keep what {target} needs"), || run.keep())?;
        }
    }
    let summary = write(options, &records)?;
    println!("{}", serde_json::to_string_pretty(&summary)?);
    for record in &records {
        for artifact in record["artifacts"].as_array().into_iter().flatten() {
            let (target, artifact) = (text(&record["target"]), text(artifact));
            println!(
                "{artifact}: show it again by\n  cp {artifact} {CORPUS}/{target}/ && cargo test -p bellows-fuzz"
            );
        }
    }
    Ok(summary["crashes"] == 0)
}

/// The targets are the directories of the kept corpus; a test in `tests/fuzz` holds them to it.
fn targets(options: &Options) -> Result<Vec<String>> {
    let mut all: Vec<String> = files(&root()?.join(CORPUS))?
        .iter()
        .filter_map(|path| Some(path.file_name()?.to_string_lossy().into_owned()))
        .collect();
    all.sort();
    match &options.target {
        Some(target) => {
            ensure!(
                all.contains(target),
                "`{target}` is no target; there are {}",
                all.join(", ")
            );
            Ok(vec![target.clone()])
        }
        None => {
            let (name, btf) = KERNEL_BTF;
            if !Path::new(btf).exists() {
                println!("{name}: left out, this machine has no {btf}");
                all.retain(|target| target != name);
            }
            Ok(all)
        }
    }
}

/// Builds the program that holds every target.
fn build() -> Result<PathBuf> {
    if !has("c++") {
        tools::install(&["g++"])?;
    }
    let root = root()?;
    let mut command = Command::new("cargo");
    command
        .args(["build", "--locked", "-p", "bellows-fuzz"])
        .args(["--features", "libfuzzer"])
        .env("RUSTC_WORKSPACE_WRAPPER", root.join("tests/fuzz/rustc"))
        .env("CARGO_INCREMENTAL", "0")
        .env_remove("CARGO_TARGET_DIR")
        .current_dir(&root);
    step("build the fuzz targets", || quiet(&mut command))?;
    Ok(root.join("target/debug/bellows-fuzz"))
}

/// One target and its directories.
struct Run<'a> {
    target: &'a str,
    program: &'a Path,
    /// In the repository.
    kept: PathBuf,
    /// Outside of it: all that has been found.
    found: PathBuf,
    artifacts: PathBuf,
    log: PathBuf,
}

impl<'a> Run<'a> {
    fn new(target: &'a str, program: &'a Path) -> Result<Self> {
        let (root, cache) = (root()?, tools::cache()?);
        let directory = root.join(DIRECTORY);
        let run = Self {
            target,
            program,
            kept: root.join(CORPUS).join(target),
            found: cache.join("fuzz").join(target),
            artifacts: directory.join("artifacts").join(target),
            log: directory.join(format!("{target}.log")),
        };
        fs::create_dir_all(&run.found)?;
        fs::create_dir_all(&run.artifacts)?;
        Ok(run)
    }

    fn libfuzzer(&self) -> Command {
        let mut command = Command::new(self.program);
        command
            .env("BELLOWS_FUZZ_TARGET", self.target)
            .arg(format!("-artifact_prefix={}/", self.artifacts.display()))
            .arg(format!("-timeout={TIMEOUT}"))
            .args(["-rss_limit_mb=512", "-max_len=4096", "-print_final_stats=1"]);
        command
    }

    fn fuzz(&self, seconds: u64) -> Result<Value> {
        let before = self.failures()?;
        let log = File::create(&self.log).with_context(|| self.log.display().to_string())?;
        let status = self
            .libfuzzer()
            .arg(format!("-max_total_time={seconds}"))
            .args([&self.found, &self.kept])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .status()?;
        let said = fs::read(&self.log)?;
        let said = String::from_utf8_lossy(&said);
        let root = root()?;
        let artifacts: Vec<PathBuf> = self
            .failures()?
            .difference(&before)
            .map(|path| path.strip_prefix(&root).unwrap_or(path).to_owned())
            .collect();
        if !status.success() {
            let end = tail(&said, 20);
            ensure!(!artifacts.is_empty(), "libFuzzer failed ({status}):\n{end}");
            eprintln!("{end}");
        }
        let progress = Progress::of(&said);
        Ok(json!({
            "target": self.target,
            "seconds": seconds,
            "executions": progress.executions,
            "edges": progress.edges,
            "features": progress.features,
            "corpus": files(&self.found)?.len(),
            "kept": files(&self.kept)?.len(),
            "crashes": artifacts.len(),
            "artifacts": artifacts,
        }))
    }

    fn failures(&self) -> Result<BTreeSet<PathBuf>> {
        let is_failure = |path: &PathBuf| {
            let name = path.file_name().map(|name| name.to_string_lossy());
            name.is_some_and(|name| FAILURES.iter().any(|prefix| name.starts_with(prefix)))
        };
        Ok(files(&self.artifacts)?
            .into_iter()
            .filter(is_failure)
            .collect())
    }

    /// Makes the kept corpus as small as its coverage allows. Files with a name that a person gave
    /// them stay; others are named by libFuzzer after their content.
    fn keep(&self) -> Result<()> {
        let fresh = self.found.with_extension("fresh");
        remove(&fresh)?;
        fs::create_dir_all(&fresh)?;
        let mut replaced = Vec::new();
        for path in files(&self.kept)? {
            let name = path
                .file_name()
                .context("a file has a name")?
                .to_string_lossy();
            let hash = name.len() == 40 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
            if hash {
                replaced.push(path);
            } else {
                fs::copy(&path, fresh.join(&*name))?;
            }
        }
        // Edges alone: how often each was taken would keep ten times as many.
        let mut merge = self.libfuzzer();
        merge.args(["-set_cover_merge=1", "-use_counters=0"]).args([
            &fresh,
            &self.found,
            &self.kept,
        ]);
        quiet(&mut merge)?;
        for path in replaced {
            fs::remove_file(path)?;
        }
        for path in files(&fresh)? {
            let name = path.file_name().context("a file has a name")?;
            fs::copy(&path, self.kept.join(name))?;
        }
        remove(&fresh)
    }
}

fn remove(directory: &Path) -> Result<()> {
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            bail!("{}: {error}", directory.display())
        }
        _ => Ok(()),
    }
}

fn files(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

/// What libFuzzer says of a run.
#[derive(Debug, Default, PartialEq, Eq)]
struct Progress {
    executions: u64,
    edges: u64,
    features: u64,
}

impl Progress {
    /// From lines such as `#8192 pulse cov: 110 ft: 250 corp: …`; a crash has no final statistics.
    fn of(said: &str) -> Self {
        let mut progress = Self::default();
        for line in said.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let after = |label: &str| {
                let at = words.iter().position(|word| *word == label)?;
                words.get(at + 1)?.parse::<u64>().ok()
            };
            let first = words.first().and_then(|word| word.strip_prefix('#'));
            if let Some(count) = first.and_then(|count| count.parse().ok()) {
                progress.executions = progress.executions.max(count);
            }
            if let Some(count) = after("stat::number_of_executed_units:") {
                progress.executions = count;
            }
            progress.edges = progress.edges.max(after("cov:").unwrap_or(0));
            progress.features = progress.features.max(after("ft:").unwrap_or(0));
        }
        progress
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn line(record: &Value) -> String {
    format!(
        "{:<14} {:>11} executions  {:>5} edges  {:>4} inputs  {} crashes",
        text(&record["target"]),
        record["executions"],
        record["edges"],
        record["corpus"],
        record["crashes"]
    )
}

/// Writes the records and their summary; a run of one target has files of its own.
fn write(options: &Options, records: &[Value]) -> Result<Value> {
    let directory = root()?.join("target/bench");
    fs::create_dir_all(&directory)?;
    let name = match &options.target {
        Some(target) => format!("fuzz-{target}"),
        None => "fuzz".to_owned(),
    };
    let lines: String = records.iter().map(|record| format!("{record}\n")).collect();
    fs::write(directory.join(format!("{name}.jsonl")), lines)?;
    let sum = |key: &str| -> u64 {
        records
            .iter()
            .filter_map(|record| record[key].as_u64())
            .sum()
    };
    let summary = json!({
        "targets": records.len(),
        "seconds_each": options.seconds,
        "executions": sum("executions"),
        "crashes": sum("crashes"),
    });
    let file = json!({ "bench": name, "summary": summary });
    fs::write(
        directory.join(format!("{name}.json")),
        format!("{}\n", serde_json::to_string_pretty(&file)?),
    )?;
    Ok(summary)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_libfuzzer_says() {
        let crashed = "INFO: seed corpus: files: 3\n#2\tINITED cov: 80 ft: 90 corp: 1/1b\n#4096\tpulse  cov: 110 ft: 250 corp: 7/9b\nSUMMARY: libFuzzer: deadly signal\n";
        let expected = |executions| Progress {
            executions,
            edges: 110,
            features: 250,
        };
        assert_eq!(Progress::of(crashed), expected(4096));
        let ended = format!("{crashed}stat::number_of_executed_units: 5000\n");
        assert_eq!(Progress::of(&ended), expected(5000));
    }
}
