//! `exec-cli`: what `bellows exec` promises at its edges, one record a promise.

use std::{
    fs,
    os::unix::process::ExitStatusExt as _,
    path::PathBuf,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bellows::cgroup::{Cgroup, Limit};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{
    record::{Records, parsed},
    runner::BELLOWS,
};
use crate::node::{has_systemd, wait};

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Record {
    pub(super) case: String,
    pub(super) failure: Option<String>,
}

const ROOT: &str = "/sys/fs/cgroup";

type Case = (&'static str, fn() -> Result<()>);

const CASES: [Case; 13] = [
    ("the exit code is passed through", || {
        expect(&["sh", "-c", "exit 7"], 7, "bellows: peak")
    }),
    ("death by signal n is 128 + n", || {
        expect(&["sh", "-c", "kill -9 $$"], 137, "bellows: peak")
    }),
    ("who was interrupted dies of that", interrupted),
    ("a command that does not exist is 127", || {
        expect(&["/no/such"], 127, "/no/such: command not found")
    }),
    ("a command that cannot be run is 126", || {
        expect(&["/proc/version"], 126, "/proc/version")
    }),
    (
        "standard input and output are the command's",
        standard_streams,
    ),
    ("a size that does not parse is named", || {
        refuse(&["--memory", "64MB", "--max-memory", "1Gi"], "`64MB`")
    }),
    ("a maximum below the limit is named", || {
        refuse(
            &["--memory", "64Mi", "--max-memory", "32Mi"],
            "32 MiB is below",
        )
    }),
    ("without cgroup v2 it refuses", without_cgroup2),
    ("SIGTERM reaches the command", sigterm),
    ("what the command left behind is ended", stragglers),
    ("after SIGKILL of bellows the brake is released", killed),
    ("nothing is left in cgroupfs", nothing_left),
];

pub(crate) fn run(records: &mut Records) -> Result<()> {
    for (case, check) in CASES {
        let failure = check().err().map(|error| format!("{error:#}"));
        eprintln!("case {case}: {}", failure.as_deref().unwrap_or("ok"));
        records.write(&Record {
            case: case.to_owned(),
            failure,
        })?;
    }
    Ok(())
}

fn exec(options: &[&str], words: &[&str]) -> Command {
    let mut command = Command::new(BELLOWS);
    command
        .arg("exec")
        .args(options)
        .arg("--")
        .args(words)
        .stdin(Stdio::null());
    command
}

const SIZES: [&str; 4] = ["--memory", "64Mi", "--max-memory", "256Mi"];

fn judge(output: &Output, code: i32, text: &str) -> Result<()> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(code),
        "{} instead of {code}: {stderr}",
        output.status
    );
    ensure!(stderr.contains(text), "no `{text}` in: {stderr}");
    Ok(())
}

fn expect(words: &[&str], code: i32, text: &str) -> Result<()> {
    judge(&exec(&SIZES, words).output()?, code, text)
}

fn refuse(options: &[&str], text: &str) -> Result<()> {
    judge(&exec(options, &["true"]).output()?, 125, text)
}

fn standard_streams() -> Result<()> {
    let input = fs::File::open("/proc/version")?;
    let output = exec(&SIZES, &["cat"]).stdin(input).output()?;
    ensure!(
        output.stdout == fs::read("/proc/version")?,
        "{}",
        String::from_utf8_lossy(&output.stdout)
    );
    Ok(())
}

fn without_cgroup2() -> Result<()> {
    // In a mount namespace of its own, with something else where cgroup v2 is expected.
    let script = format!(
        "mount -t tmpfs none {ROOT} && exec {BELLOWS} exec --memory 64Mi --max-memory 256Mi -- true"
    );
    let output = Command::new("unshare")
        .args(["-m", "sh", "-c", &script])
        .output()?;
    judge(&output, 125, "mount cgroup2")
}

fn sigterm() -> Result<()> {
    let script = "trap 'exit 42' TERM; echo ready; while :; do sleep 0.05; done";
    let mut child = exec(&SIZES, &["sh", "-c", script])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut stdout = child.stdout.take().context("no output")?;
    std::io::Read::read_exact(&mut stdout, &mut [0; 6])?;
    let process = Pid::from_raw(i32::try_from(child.id())?).context("no process")?;
    kill_process(process, Signal::TERM)?;
    let status = child.wait()?;
    ensure!(status.code() == Some(42), "{status}");
    Ok(())
}

fn interrupted() -> Result<()> {
    let output = exec(&SIZES, &["sh", "-c", "kill -INT $$"]).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.signal() == Some(Signal::INT.as_raw()),
        "{}: {stderr}",
        output.status
    );
    ensure!(stderr.contains("bellows: peak"), "{stderr}");
    Ok(())
}

fn stragglers() -> Result<()> {
    let start = Instant::now();
    let status = exec(
        &SIZES,
        &["sh", "-c", "sleep 987 </dev/null >/dev/null 2>&1 & exit 3"],
    )
    .stderr(Stdio::null())
    .status()?;
    ensure!(status.code() == Some(3), "{status}");
    ensure!(
        start.elapsed() < Duration::from_secs(20),
        "it waited for what the command left behind"
    );
    let left = processes()?
        .into_iter()
        .filter(|line| line.contains("987"))
        .count();
    ensure!(left == 0, "{left} processes are left");
    Ok(())
}

/// The command lines of all processes.
fn processes() -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        // One that ends meanwhile is not left.
        lines.extend(
            fs::read(entry.path().join("cmdline"))
                .ok()
                .map(|line| String::from_utf8_lossy(&line).replace('\0', " ")),
        );
    }
    Ok(lines)
}

fn killed() -> Result<()> {
    // It says when it runs: between fork and exec it still holds what its parent holds.
    let mut child = exec(&SIZES, &["sh", "-c", "echo ready; exec sleep 30"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut stdout = child.stdout.take().context("no output")?;
    std::io::Read::read_exact(&mut stdout, &mut [0; 6])?;
    let mut path = PathBuf::new();
    wait("the command's cgroup", Duration::from_secs(10), || {
        let name = format!("bellows-exec-{}", child.id());
        path = cgroups_of_exec()
            .into_iter()
            .find(|path| path.ends_with(&name))
            .unwrap_or_default();
        Ok(path.is_dir())
    })?;
    let in_scope = path
        .parent()
        .is_some_and(|parent| parent.extension().is_some());
    ensure!(
        in_scope == has_systemd(),
        "{} is not where it belongs",
        path.display()
    );
    let until = |what: &str, is_met: &dyn Fn(&Cgroup) -> bool| -> Result<()> {
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) {
            if Cgroup::open(&path).is_ok_and(|cgroup| is_met(&cgroup)) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(2));
        }
        anyhow::bail!("{what}: not within 10 s")
    };
    let high = |cgroup: &Cgroup| cgroup.limit("memory.high").ok();
    until("the brake is set", &|cgroup| {
        matches!(high(cgroup), Some(Limit::At(_)))
    })?;
    let cgroup = Cgroup::open(&path)?;
    cgroup.write("cgroup.freeze", "1")?;
    child.kill()?;
    child.wait()?;
    let start = Instant::now();
    until("brake and hold are released", &|cgroup| {
        high(cgroup) == Some(Limit::Max)
            && cgroup
                .read("cgroup.freeze")
                .is_ok_and(|text| text.trim() == "0")
    })?;
    ensure!(
        start.elapsed() < Duration::from_secs(1),
        "released after {:?}",
        start.elapsed()
    );
    // Its guard is gone; when it has ended, the releaser removes what is left of it.
    cgroup.write("cgroup.kill", "1")?;
    wait(
        "the releaser removes the cgroup",
        Duration::from_secs(10),
        || Ok(!path.exists()),
    )
}

fn nothing_left() -> Result<()> {
    // systemd removes a scope when it hears that it is empty.
    wait("an empty cgroupfs", Duration::from_secs(5), || {
        Ok(cgroups_of_exec().is_empty())
    })
    .with_context(|| format!("{:?}", cgroups_of_exec()))
}

/// Every cgroup that `bellows exec` or systemd has made for it, wherever.
fn cgroups_of_exec() -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut directories = vec![PathBuf::from(ROOT)];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                if entry
                    .file_name()
                    .to_string_lossy()
                    .starts_with("bellows-exec")
                {
                    found.push(entry.path());
                }
                directories.push(entry.path());
            }
        }
    }
    found
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let mut failures = Map::new();
    for record in &records {
        if let Some(failure) = &record.failure {
            failures.insert(record.case.clone(), json!(failure));
        }
    }
    let cases: Vec<&str> = records.iter().map(|record| record.case.as_str()).collect();
    Ok(json!({ "cases": cases, "failures": failures }))
}
