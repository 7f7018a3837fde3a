//! `cargo xtask`: everything that is done with this repository beside editing it.
//!
//! Each command sets up what it lacks and says what it does. What is fetched or built once is kept
//! in a cache outside the tree (`$BELLOWS_CACHE`, else the user's cache directory); the cache speeds
//! a second run up and is never needed.

mod arbiter;
mod bench;
mod build;
mod checks;
mod control_plane;
mod debian;
mod demo;
mod deploy;
mod fuzz;
mod guest;
mod image;
mod kubernetes;
mod prepare;
mod shell;
mod test;
mod tools;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Show a build that a fixed limit kills, without and with Bellows.
    Demo {
        /// In a pod on a real kubelet instead of around one command.
        #[arg(long)]
        pod: bool,
    },
    /// Build the kernel programs into target/ebpf/bellows.o.
    BuildEbpf,
    /// Generate what is checked in and not written by hand: the runtime's interface, the manifest of the chart.
    Codegen {
        /// Only one of them.
        #[arg(value_enum)]
        part: Option<Generated>,
        /// Only tell whether it is up to date.
        #[arg(long)]
        check: bool,
    },
    /// Make the container image, as target/image/bellows.tar.
    Image(image::Options),
    /// Fetch and build ahead what the guests of `test` need and takes minutes.
    Prepare,
    /// Run the checks: all tiers, or the named ones.
    Test {
        /// unit, kernel, node, pod; or deploy, which is not among all of them.
        tiers: Vec<test::Tier>,
        /// Run only the benches whose check has this in its name, such as 5.10.
        #[arg(long)]
        only: Option<String>,
    },
    /// Run one bench, all but the arbiter's in a guest, and write target/bench/NAME.json and NAME.jsonl.
    Bench(Box<bench::Options>),
    /// Look for bytes that break a parser, and write target/bench/fuzz.json and fuzz.jsonl.
    Fuzz(fuzz::Options),
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::BuildEbpf => build::ebpf().map(|_object| true),
        Command::Codegen { part, check } => codegen(part, check),
        Command::Demo { pod } => demo::run(pod),
        Command::Image(options) => image::command(&options),
        Command::Prepare => prepare::command(),
        Command::Test { tiers, only } => test::run(&tiers, only),
        Command::Bench(options) => bench::command(&options),
        Command::Fuzz(options) => fuzz::command(&options),
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What is generated.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Generated {
    /// The runtime's interface, from its protocol.
    Runtime,
    /// The manifests, from the chart.
    Deploy,
}

fn codegen(part: Option<Generated>, check: bool) -> Result<bool> {
    let is_wanted = |generated| part.is_none_or(|part| part == generated);
    let runtime = !is_wanted(Generated::Runtime) || runtime(check)?;
    let deploy = !is_wanted(Generated::Deploy) || deploy::codegen(check)?;
    Ok(runtime && deploy)
}

/// The generator is a program of its own: whoever does not need it does not compile it.
fn runtime(check: bool) -> Result<bool> {
    let mut command = std::process::Command::new("cargo");
    command.args(["run", "--quiet", "--locked", "-p", "bellows-codegen", "--"]);
    command.args(check.then_some("--check"));
    Ok(command.current_dir(root()?).status()?.success())
}

/// The root of the repository.
fn root() -> Result<std::path::PathBuf> {
    let manifest = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    Ok(manifest
        .parent()
        .ok_or_else(|| anyhow::anyhow!("xtask has no parent directory"))?
        .to_owned())
}
