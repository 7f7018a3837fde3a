//! Parse, set up diagnostics, run.

use std::{env, io, path::Path, process::ExitCode};

use bellows::{
    cli::{Cli, Command},
    doctor, exec, explain, policies, run,
};
use clap::Parser as _;
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    layer::SubscriberExt as _,
    util::SubscriberInitExt as _,
};

/// `env` and `timeout` report their own failures with this code.
const OWN_FAILURE: u8 = 125;
/// `EX_USAGE` of sysexits.h.
const USAGE: u8 = 64;

fn main() -> ExitCode {
    tracing_subscriber::registry()
        .with(tracing_subscriber::fmt::layer().with_writer(io::stderr))
        .with(log_filter())
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
        Command::Run(arguments) => {
            let Some(options) = arguments.options() else {
                eprintln!(
                    "bellows: no node: set --node-name, or NODE_NAME by the downward API; without Kubernetes, --standalone and --policies"
                );
                return ExitCode::from(USAGE);
            };
            if run::supervisor::is_agent() {
                return report(run::run(&options).map_err(|error| error.to_string()));
            }
            match run::supervisor::supervise() {
                Ok(code) => ExitCode::from(code),
                Err(error) => report(Err(error.to_string())),
            }
        }
        Command::Check { file } => report(
            policies::read(&file)
                .map(|read| print!("{}", policies::told(&read)))
                .map_err(|error| error.to_string()),
        ),
        Command::Restore { runtime_endpoint } => match run::restore(runtime_endpoint) {
            Ok((lines, is_whole)) => {
                for line in &lines {
                    println!("{line}");
                }
                if lines.is_empty() {
                    println!("nothing is left to put back");
                }
                ExitCode::from(u8::from(!is_whole))
            }
            Err(error) => report(Err(error.to_string())),
        },
        Command::Uninstall { daemon_set } => uninstall(&daemon_set),
        Command::Releaser => {
            report(run::release_after_agents().map_err(|error| format!("the releaser: {error}")))
        }
        Command::Doctor { json } => diagnose(json),
        Command::Touch { way } => {
            report(doctor::touch::touch(way).map_err(|error| error.to_string()))
        }
        Command::Explain { pod } => report(
            explain::explain(Path::new(explain::LEDGER), &pod)
                .map(|text| print!("{text}"))
                .map_err(|error| error.to_string()),
        ),
        Command::Release { cgroup, ledger } => report(
            exec::releaser::wait_and_release(&cgroup, &ledger).map_err(|error| error.to_string()),
        ),
    }
}

/// What `BELLOWS_LOG` asks for: a level, or `target=level` several times, with commas between them.
fn log_filter() -> Targets {
    let warnings = Targets::new().with_default(LevelFilter::WARN);
    let Ok(text) = env::var("BELLOWS_LOG") else {
        return warnings;
    };
    text.trim_end_matches(',').parse().unwrap_or_else(|error| {
        eprintln!("bellows: BELLOWS_LOG is `{text}`: {error}; use warn, info or debug, or bellows::guard=debug");
        warnings
    })
}

fn uninstall(daemon_set: &str) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let gone = runtime
        .map_err(|error| error.to_string())
        .and_then(|runtime| {
            let gone = runtime.block_on(run::uninstall(daemon_set));
            gone.map_err(|error| error.to_string())
        });
    match gone {
        Ok(true) => println!("all agents have ended"),
        // What is to be taken away is taken away all the same.
        Ok(false) => println!(
            "some agents have not ended, on nodes that do not answer: limits may stay raised there"
        ),
        Err(error) => return report(Err(error)),
    }
    ExitCode::SUCCESS
}

fn diagnose(json: bool) -> ExitCode {
    let report = doctor::examine();
    match serde_json::to_string_pretty(&report) {
        Ok(text) if json => println!("{text}"),
        _ => print!("{report}"),
    }
    if report.verdict == doctor::Verdict::Missing {
        ExitCode::FAILURE
    } else {
        ExitCode::SUCCESS
    }
}

fn report(result: Result<(), String>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bellows: {error}");
            ExitCode::FAILURE
        }
    }
}
