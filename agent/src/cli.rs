//! The command line.

use std::{ffi::OsString, net::SocketAddr, path::PathBuf};

use bellows_core::{Bytes, Nanos, elastic::Parallelism, quantity};
use clap::{Args, Parser, Subcommand};

use crate::{doctor, exec, policies, run};

/// Lets containers breathe: raises memory limits before the OOM killer acts, and lowers them again.
#[derive(Debug, Parser)]
#[command(name = "bellows", version, about, disable_help_subcommand = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What is logged.
const LOG: &str = "\
BELLOWS_LOG says what is logged, to the standard error: warn (the default), info or debug; or of a part of it, with commas
between several: bellows::guard=debug,warn";

/// The subcommands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run one command in its own cgroup, with the guard around it.
    Exec(Exec),
    /// Guard the pods of this node that opt in, or the containers that policies select.
    #[command(after_help = LOG)]
    Run(Run),
    /// Check a file with policies, and tell what they say.
    #[command(after_help = policies::EXAMPLE)]
    Check {
        /// The file.
        file: PathBuf,
    },
    /// Put the containers that `run --standalone` has guarded back to the limits that they had.
    Restore {
        /// The runtime's socket [default: where containerd or CRI-O have theirs].
        #[arg(long, value_name = "PATH")]
        runtime_endpoint: Option<PathBuf>,
    },
    /// Delete a DaemonSet, and wait until its agents have given limits back (used by the chart).
    #[command(hide = true)]
    Uninstall {
        /// Its name, in this pod's namespace.
        daemon_set: String,
    },
    /// Stay beside `bellows run` and lift brakes and holds when it dies (a second container).
    Releaser,
    /// Tell what works on this machine, what does not, and what to do.
    Doctor {
        /// As JSON.
        #[arg(long)]
        json: bool,
    },
    /// Tell what happened to a pod, with its numbers.
    Explain {
        /// The pod: NAMESPACE/POD.
        pod: String,
    },
    /// Touch memory (used by `doctor`).
    #[command(name = doctor::touch::TOUCH, hide = true)]
    Touch {
        /// How.
        #[arg(value_enum)]
        way: doctor::touch::Way,
    },
    /// Wait for the end of the parent, then release a cgroup (used by `exec`).
    #[command(name = exec::releaser::SUBCOMMAND, hide = true)]
    Release {
        /// The cgroup's directory.
        cgroup: PathBuf,
        /// The ledger of the parent.
        ledger: PathBuf,
    },
}

/// `bellows exec`.
#[derive(Debug, Args)]
pub struct Exec {
    /// The memory limit at rest, such as 256Mi.
    #[arg(long, value_parser = quantity::parse, value_name = "SIZE")]
    memory: Bytes,
    /// The limit that is never exceeded, such as 4Gi.
    #[arg(long, value_parser = quantity::parse, value_name = "SIZE")]
    max_memory: Bytes,
    /// Seconds without growth after which a raised limit is lowered again.
    #[arg(long, default_value_t = 2, value_name = "SECONDS")]
    shrink_after: u64,
    /// Hold every raise back by this many milliseconds, as an API might.
    #[arg(long, value_name = "MS", hide = true)]
    actuation_delay_ms: Option<u64>,
    /// Have some jobs wait for others where the maximum is not enough for all of them at once.
    #[arg(long)]
    elastic: bool,
    /// Work from cgroup files instead of kernel programs: slower, and it brakes at 90 % of the limit.
    #[arg(long)]
    without_bpf: bool,
    /// Write what happened as JSON to this file.
    #[arg(long, value_name = "FILE", hide = true)]
    report: Option<PathBuf>,
    /// The command and its arguments.
    #[arg(trailing_var_arg = true, required = true, value_name = "CMD")]
    words: Vec<OsString>,
}

/// `bellows run`.
#[derive(Debug, Args)]
pub struct Run {
    /// The node whose pods are guarded [default: $NODE_NAME].
    #[arg(long)]
    node_name: Option<String>,
    /// Without Kubernetes: guard the containers that --policies select, through their runtime (CRI).
    #[arg(long, requires = "policies", conflicts_with = "node_name")]
    standalone: bool,
    /// The file with the policies; it is read again when it changes.
    #[arg(long, value_name = "FILE", requires = "standalone")]
    policies: Option<PathBuf>,
    /// The runtime's socket [default: where containerd or CRI-O have theirs].
    #[arg(long, value_name = "PATH", requires = "standalone")]
    runtime_endpoint: Option<PathBuf>,
    /// Seconds without growth after which a raised limit is lowered again of a pod that no policy means [default: 5].
    #[arg(long, value_name = "SECONDS", conflicts_with = "standalone")]
    shrink_after: Option<u64>,
    /// Serve metrics for Prometheus at http://ADDRESS/metrics, such as 127.0.0.1:9464 [default: none are served].
    #[arg(long, value_name = "ADDRESS:PORT")]
    metrics: Option<SocketAddr>,
    /// Serve /healthz at this address, such as [::]:9465, for whoever starts an agent again that hangs, and /readyz.
    #[arg(long, value_name = "ADDRESS:PORT")]
    health: Option<SocketAddr>,
    /// Change nothing, whatever policies and annotations say: mode Act counts as Observe.
    #[arg(long, conflicts_with = "standalone")]
    observe: bool,
    /// Give limits back at the end if this DaemonSet, in the agent's own namespace, is deleted then.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["standalone", "observe"])]
    restore_with: Option<String>,
    /// Change memory requests of pods where a policy asks for it (memory.requests). The API must allow it: requests.enabled
    /// of the chart.
    #[arg(long, conflicts_with_all = ["standalone", "observe"])]
    requests: bool,
    /// Be a plugin of the container runtime (NRI), so that heaps are sized where a policy asks for it (memory.heap). Its
    /// socket must be there: nri.enabled of the chart. Standalone it is one where policies need it.
    #[arg(long, conflicts_with_all = ["standalone", "observe"])]
    nri: bool,
    /// Work from cgroup files instead of kernel programs: slower, and it brakes at 90 % of the limit.
    /// Chosen by itself, with a warning, where the kernel does not take the programs.
    #[arg(long)]
    without_bpf: bool,
}

/// Seconds.
const SHRINK_AFTER: u64 = 5;

impl Run {
    /// What was typed, as options; `None` without a node's name.
    #[must_use]
    pub fn options(self) -> Option<run::Options> {
        let Self {
            node_name,
            standalone: _,
            policies,
            runtime_endpoint: endpoint,
            shrink_after,
            metrics,
            health,
            observe,
            restore_with,
            requests,
            nri,
            without_bpf,
        } = self;
        let of = match policies {
            Some(policies) => run::Of::Machine { policies, endpoint },
            None => run::Of::Node {
                name: node_name.or_else(run::node_from_environment)?,
                shrink_after: Nanos::millis(
                    shrink_after.unwrap_or(SHRINK_AFTER).saturating_mul(1000),
                ),
                only_observes: observe,
                moves_requests: requests,
                sizes_heaps: nri,
                daemon_set: restore_with,
            },
        };
        Some(run::Options {
            of,
            metrics,
            health,
            without_bpf,
        })
    }
}

impl Exec {
    /// What was typed, as options.
    #[must_use]
    pub fn options(self) -> exec::Options {
        let Self {
            memory,
            max_memory,
            shrink_after,
            actuation_delay_ms,
            elastic,
            without_bpf,
            report,
            words,
        } = self;
        exec::Options {
            memory,
            max_memory,
            shrink_after: Nanos::millis(shrink_after.saturating_mul(1000)),
            actuation_delay: actuation_delay_ms.map(Nanos::millis),
            parallelism: if elastic {
                Parallelism::Elastic
            } else {
                Parallelism::Unchanged
            },
            without_bpf,
            report,
            command: words,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(words: &[&str]) -> Result<Command, clap::Error> {
        let words = ["bellows"].iter().chain(words);
        Cli::try_parse_from(words).map(|cli| cli.command)
    }

    #[test]
    fn what_is_installed_is_understood() {
        let manifest = include_str!("../../deploy/bellows.yaml");
        let documents: Vec<serde_json::Value> = serde_saphyr::from_multiple(manifest).unwrap();
        let daemons = documents
            .iter()
            .find(|document| document["kind"] == "DaemonSet")
            .unwrap();
        let containers = &daemons["spec"]["template"]["spec"]["containers"];
        let commands = containers.as_array().unwrap().iter().map(|container| {
            let words = container["args"].as_array().unwrap().iter();
            let words: Vec<&str> = words.map(|word| word.as_str().unwrap()).collect();
            parsed(&words).unwrap()
        });
        let commands: Vec<Command> = commands.collect();
        assert!(matches!(commands[..], [Command::Run(_), Command::Releaser]));
        // Where nothing may be changed, and at the end.
        let only_observes = parsed(&["run", "--observe", "--health", "[::]:9465"]).unwrap();
        let Command::Run(run) = only_observes else {
            panic!("{only_observes:?}");
        };
        assert!(run.observe);
        assert!(parsed(&["uninstall", "agent"]).is_ok());
        assert!(parsed(&["run", "--observe", "--restore-with", "agent"]).is_err());
        assert!(parsed(&["run", "--observe", "--requests"]).is_err());
        assert!(parsed(&["run", "--observe", "--nri"]).is_err());
    }
}
