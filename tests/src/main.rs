//! What runs inside a guest: PID 1, the loads, and the benches that measure them.
//!
//! One static binary, so that a guest needs nothing but it, busybox and `bellows`. As PID 1 it
//! prepares the machine and runs what the kernel command line asks for; the same binary is each
//! load, and on the host it recomputes the summary of a bench from its raw records.

mod agent;
mod api_proxy;
mod bench;
mod containers;
mod control_plane;
mod fake;
mod heartbeat;
mod init;
mod kmsg;
mod load;
mod node;
mod pods;
mod proxy;
mod sampler;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "bellows-guest", about = "Loads and benches of Bellows")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Use memory in a stated way.
    #[command(subcommand)]
    Load(load::Load),
    /// Run a bench and write one JSON record per case.
    Bench {
        /// Where the records go.
        #[arg(long, default_value = "/dev/stdout")]
        records: PathBuf,
        #[command(subcommand)]
        bench: bench::Bench,
    },
    /// Run what the guest was booted for, and end the guest (called by systemd).
    #[command(hide = true)]
    InService,
    /// Recompute the summary of a bench from its records.
    Summarize {
        /// The bench.
        name: String,
        /// Its records, one JSON object a line.
        records: PathBuf,
    },
}

fn main() -> ExitCode {
    // The kernel starts its first process by this name; the first process of a container has another.
    if std::env::args().next().as_deref() == Some("/init") {
        init::run();
    }
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_writer(std::io::stderr)
        .init();
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bellows-guest: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Load(load) => load::run(&load),
        Command::InService => init::run_in_service(),
        Command::Bench { records, bench } => bench::run(&bench, &records),
        Command::Summarize { name, records } => {
            println!(
                "{}",
                serde_json::to_string_pretty(&bench::summarize(&name, &records)?)?
            );
            Ok(())
        }
    }
}
