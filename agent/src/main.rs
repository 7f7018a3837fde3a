//! Parse, set up diagnostics, run.

use std::{io, process::ExitCode};

use bellows::{
    cli::{Cli, Command},
    exec,
};
use clap::Parser as _;
use tracing_subscriber::EnvFilter;

/// `env` and `timeout` report their own failures with this code.
const OWN_FAILURE: u8 = 125;

fn main() -> ExitCode {
    let filter =
        EnvFilter::try_from_env("BELLOWS_LOG").unwrap_or_else(|_unset| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Printing to a closed terminal is not worth another error.
            drop(error.print());
            return if error.use_stderr() {
                ExitCode::from(OWN_FAILURE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match cli.command {
        Command::Exec(arguments) => match exec::run(&arguments.options()) {
            Ok(code) => ExitCode::from(code),
            Err(error) => {
                eprintln!("bellows: {error}");
                ExitCode::from(error.code())
            }
        },
        Command::Release { cgroup } => match exec::releaser::wait_and_release(&cgroup) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("bellows: {error}");
                ExitCode::FAILURE
            }
        },
    }
}
