//! Running commands: what failed is named with its command line and output.

use std::{
    io::{self, IsTerminal as _, Write as _},
    path::PathBuf,
    process::{Command, Output, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

/// Runs a command with its output hidden; on failure the error has it.
pub(crate) fn quiet(command: &mut Command) -> Result<()> {
    output(command).map(drop)
}

/// Runs a command and returns its standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let text = describe(command);
    let Output {
        status,
        stdout,
        stderr,
    } = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {text}"))?;
    if !status.success() {
        let (out, err) = (
            String::from_utf8_lossy(&stdout),
            String::from_utf8_lossy(&stderr),
        );
        bail!(
            "{text} failed ({status}):\n{}\n{}",
            tail(&out, 20),
            tail(&err, 60)
        );
    }
    Ok(String::from_utf8_lossy(&stdout).into_owned())
}

/// Whether a program can be found.
pub(crate) fn has(program: &str) -> bool {
    find(program).is_some()
}

pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    // Where Debian keeps administrators' tools, which are not on everybody's path.
    let directories = std::env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    directories
        .map(|directory| directory.join(program))
        .find(|file| file.is_file())
}

fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(|word| word.to_string_lossy())
        .collect::<Vec<_>>()
        .join(" ")
}

/// The last lines of a text.
pub(crate) fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.trim_end().lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// Says what is being done, and how long it took.
pub(crate) fn step<T>(what: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    let terminal = io::stderr().is_terminal();
    if terminal {
        eprint!("  … {what}");
    } else {
        eprintln!("  … {what}");
    }
    let start = Instant::now();
    let result = work();
    let mark = if result.is_ok() { "✓" } else { "✗" };
    let back = if terminal { "\r\u{1b}[K" } else { "" };
    eprintln!(
        "{back}  {mark} {what} ({:.1} s)",
        start.elapsed().as_secs_f64()
    );
    // A terminal that is gone is no reason to stop.
    drop(io::stderr().flush());
    result
}
