//! `bellows exec`: one command in its own cgroup, with the guard around it.
//!
//! The command's limit is what `--memory` says until the command grows into it; then it is raised
//! step by step, never above `--max-memory`. When the command ends, whatever it left behind in
//! the cgroup is ended too, and one line says what happened. Exit codes follow `env` and `timeout`:
//! 125 when Bellows fails, 126 when the command cannot be run, 127 when it is not found, 128 + n
//! when it died of signal n. Where that was a Ctrl-C (SIGINT, or SIGQUIT) Bellows dies of it, too: a shell goes on with its
//! loop after whoever has exited.
//!
//! It must leave nothing in cgroupfs, whatever happens to it: see [`releaser`].

pub(crate) mod place;
pub mod releaser;

use std::{
    ffi::OsString,
    io::{self, Write as _},
    os::unix::process::ExitStatusExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus},
    sync::mpsc::{self, SyncSender},
    thread,
    time::{Duration, Instant},
};

use bellows_core::{
    Actuation, Bytes, CgroupId, Nanos, Patience, Policy, Signals, WHOLE, elastic::Parallelism,
    policy::PolicyError,
};
use signal_hook::consts::{SIGINT, SIGQUIT};
use thiserror::Error;

use crate::{
    actuate::reflex::Reflex,
    cgroup::{Cgroup, CgroupError, Limit},
    doctor::swap_devices,
    guard::{self, Controller, GuardError, Input, Named, Refused, Report, Requester, told_balance},
    ledger::{self, Ledger, Record},
    machine::{self, online_cpus},
    signal::{
        files::Files,
        programs::{Kernel, LoadError, Purpose},
        source::Source,
    },
    signals,
};
use place::Place;
use releaser::Releaser;

/// What `bellows exec` is asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// The limit at rest.
    pub memory: Bytes,
    /// The limit that is never exceeded.
    pub max_memory: Bytes,
    /// Quiet time after which a raised limit is lowered again.
    pub shrink_after: Nanos,
    /// Holds every raise back by this time, as an API might.
    pub actuation_delay: Option<Nanos>,
    /// What becomes of its jobs where there is not memory for all of them at once.
    pub parallelism: Parallelism,
    /// Works from cgroup files instead of kernel programs.
    pub without_bpf: bool,
    /// Writes the report as JSON to this file.
    pub report: Option<PathBuf>,
    /// The command and its arguments.
    pub command: Vec<OsString>,
}

/// Why the command could not be run under a guard.
#[derive(Debug, Error)]
pub enum ExecError {
    /// The limits are impossible.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// Not root.
    #[error("bellows exec needs root, for cgroups and BPF (this is user id {0}): run it with sudo")]
    NotRoot(u32),
    /// No place for the cgroup.
    #[error(transparent)]
    Place(#[from] place::PlaceError),
    /// A cgroup file.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// The kernel programs.
    #[error("{0}. --without-bpf works from cgroup files instead, slower")]
    Kernel(#[from] LoadError),
    /// The guard.
    #[error(transparent)]
    Guard(#[from] GuardError),
    /// Something of the operating system.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
    /// The command is not there.
    #[error("{command}: command not found")]
    NotFound {
        /// The command.
        command: String,
    },
    /// The command cannot be run.
    #[error("{command}: {source}")]
    NotRunnable {
        /// The command.
        command: String,
        /// Why.
        source: io::Error,
    },
}

impl ExecError {
    /// The exit code by the convention of `env` and `timeout`.
    #[must_use]
    pub const fn code(&self) -> u8 {
        match self {
            Self::NotFound { .. } => 127,
            Self::NotRunnable { .. } => 126,
            _ => 125,
        }
    }
}

/// Runs the command; returns the exit code to pass on. Does not return if the command was interrupted.
///
/// # Errors
///
/// [`ExecError`]; nothing is left in cgroupfs then.
pub fn run(options: &Options) -> Result<u8, ExecError> {
    let policy = policy(options)?;
    let user = rustix::process::geteuid();
    if !user.is_root() {
        return Err(ExecError::NotRoot(user.as_raw()));
    }
    signals::await_children()
        .map_err(|error| ExecError::System("cannot wait for children", error))?;
    place::enter_scope()?;
    // Before there is anything to leave behind.
    let forwarder = signals::Forwarder::start()
        .map_err(|error| ExecError::System("cannot take signals", error))?;
    let place = Place::find()?;
    let cgroup = place.create_named("bellows-exec")?;
    let outcome = run_in(options, policy, &cgroup, &forwarder);
    let cleared = clear(&cgroup).and_then(|()| place.leave());
    // What went wrong first is what to tell.
    let (status, report, end) = outcome?;
    cleared?;
    if let Some(path) = &options.report {
        write_report(path, &report, &end)
            .map_err(|error| ExecError::System("cannot write the report", error))?;
    }
    // Who reads it may be gone; the command has ended as it has.
    drop(writeln!(
        io::stderr(),
        "bellows: {}",
        summary(options, &report, &end)
    ));
    if let Some(signal @ (SIGINT | SIGQUIT)) = status.signal() {
        signals::die_of(signal)
            .map_err(|error| ExecError::System("cannot die as the command has", error))?;
    }
    Ok(exit_code(status))
}

fn policy(options: &Options) -> Result<Policy, PolicyError> {
    Policy {
        original: options.memory,
        ceiling: options.max_memory,
        actuation: options
            .actuation_delay
            .map_or(Actuation::Direct, |p95| Actuation::Requested { p95 }),
        signals: if options.without_bpf {
            Signals::Files
        } else {
            Signals::Programs
        },
        patience: Patience::UNPROBED,
        cpus: online_cpus(),
        shrink_after: options.shrink_after,
        usable_per_mille: WHOLE,
        by_hand_after: None,
        priority: 0,
        parallelism: options.parallelism,
        learnt: None,
    }
    .validate(machine::pages(1))
}

fn signals(options: &Options) -> Result<(Option<Kernel>, Source), ExecError> {
    if options.without_bpf {
        let files = Files::new().map_err(|error| ExecError::System("cannot watch files", error))?;
        Ok((None, Source::Files(files)))
    } else {
        let (kernel, reflexes) = Kernel::load(Purpose::GuardAndMeasure)?;
        Ok((Some(kernel), Source::Programs(Box::new(reflexes))))
    }
}

/// What the cgroup said at the end.
#[derive(Clone, Copy, Debug, serde::Serialize)]
struct End {
    peak: Option<Bytes>,
    events: crate::cgroup::MemoryEvents,
    /// Whether it could swap: then a limit does not kill at once.
    may_swap: bool,
}

fn run_in(
    options: &Options,
    policy: Policy,
    cgroup: &Cgroup,
    forwarder: &signals::Forwarder,
) -> Result<(ExitStatus, Report, End), ExecError> {
    cgroup.set_limit("memory.max", Limit::At(options.memory))?;
    // Loading takes a moment: it happens before the command can grow.
    let (kernel, source) = signals(options)?;
    let path = Path::new(ledger::DIRECTORY).join(format!("exec-{}.ledger", std::process::id()));
    let ledger = Ledger::open(&path)
        .map_err(|error| ExecError::System("cannot open the ledger in /run/bellows", error))?;
    let releaser = Releaser::start(cgroup, &path)
        .map_err(|error| ExecError::System("cannot start the releaser", error))?;
    let (inputs, receiver) = mpsc::sync_channel(guard::INPUTS);
    let another = ledger
        .another()
        .map_err(|error| ExecError::System("cannot open the ledger in /run/bellows", error))?;
    let reflex = Reflex::start(source, another, guard::sink(inputs.clone()))
        .map_err(|error| ExecError::System("cannot start the reflex thread", error))?;
    let requester = Delayed {
        delay: options.actuation_delay.unwrap_or_default(),
        inputs: inputs.clone(),
    };
    let mut controller = Controller::new(
        kernel,
        reflex,
        ledger,
        (inputs.clone(), receiver),
        requester,
    );
    controller.adopt(cgroup.clone(), policy, named(&options.command))?;
    let controller = thread::Builder::new()
        .name("controller".to_owned())
        .spawn(move || controller.run())
        .map_err(|error| ExecError::System("cannot start the controller thread", error))?;

    let status = run_command(options, cgroup, forwarder);
    let end = status.as_ref().ok().map(|_status| end(cgroup)).transpose();
    if inputs.send(Input::Stop).is_err() {
        tracing::error!("the controller has ended before the command");
    }
    let reports = controller.join().unwrap_or_default();
    releaser.finish();
    // Everything in it is undone, and the summary tells the rest.
    drop(std::fs::remove_file(ledger::previous(&path)));
    let report = reports.get(&cgroup.id()).cloned().unwrap_or_default();
    let (status, end) = (
        status?,
        end?.unwrap_or(End {
            peak: None,
            events: Default::default(),
            may_swap: false,
        }),
    );
    Ok((status, report, end))
}

/// What a command is called. It has needed as much before if the same words were run in the same directory.
fn named(command: &[OsString]) -> Named {
    let program = command.first().map(|word| word.to_string_lossy());
    let name = program.unwrap_or_default().into_owned();
    let mut words = crc32fast::Hasher::new();
    let directory = std::env::current_dir().unwrap_or_default();
    for word in std::iter::once(directory.as_os_str()).chain(command.iter().map(|word| &**word)) {
        words.update(word.as_encoded_bytes());
        words.update(&[0]);
    }
    let workload = format!("exec_{:08x}", words.finalize());
    Named { name, workload }
}

fn end(cgroup: &Cgroup) -> Result<End, CgroupError> {
    Ok(End {
        peak: cgroup.peak()?,
        events: cgroup.events()?,
        may_swap: !swap_devices().is_empty()
            && cgroup.has("memory.swap.max")
            && cgroup.limit("memory.swap.max")?.bytes() > Bytes::ZERO,
    })
}

fn run_command(
    options: &Options,
    cgroup: &Cgroup,
    forwarder: &signals::Forwarder,
) -> Result<ExitStatus, ExecError> {
    let mut child = spawn(&options.command, cgroup, forwarder)?;
    forwarder
        .forward_to(&child)
        .map_err(|error| ExecError::System("cannot pass signals on to the command", error))?;
    child
        .wait()
        .map_err(|error| ExecError::System("cannot wait for the command", error))
}

fn spawn(
    words: &[OsString],
    cgroup: &Cgroup,
    forwarder: &signals::Forwarder,
) -> Result<Child, ExecError> {
    let Some((program, arguments)) = words.split_first() else {
        return Err(ExecError::NotFound {
            command: String::new(),
        });
    };
    let mut command = Command::new(program);
    command.args(arguments).env_remove(place::SCOPE_VARIABLE);
    cgroup.admit(&mut command)?;
    forwarder.begin_as_this(&mut command);
    command.spawn().map_err(|source| {
        let command = program.to_string_lossy().into_owned();
        match source.kind() {
            io::ErrorKind::NotFound => ExecError::NotFound { command },
            _ => ExecError::NotRunnable { command, source },
        }
    })
}

/// Ends what the command left behind, and removes the cgroup.
fn clear(cgroup: &Cgroup) -> Result<(), CgroupError> {
    // A frozen or braked straggler must be able to die.
    cgroup.set_limit("memory.high", Limit::Max)?;
    cgroup.write("cgroup.freeze", "0")?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while cgroup.populated()? && Instant::now() < deadline {
        cgroup.kill()?;
        thread::sleep(Duration::from_millis(5));
    }
    place::remove_tree(cgroup)
}

fn exit_code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| status.signal().map(|signal| 128 + signal))
        .unwrap_or(125);
    u8::try_from(code & 0xff).unwrap_or(125)
}

fn summary(options: &Options, report: &Report, end: &End) -> String {
    let Options {
        memory, max_memory, ..
    } = options;
    let peak = end.peak.unwrap_or(report.peak_demand);
    let last = report
        .limits
        .iter()
        .map(|&(_, limit)| limit)
        .max()
        .unwrap_or(*memory);
    let mut text = format!("peak {peak}, limit {memory}");
    if report.raises > 0 {
        text += &format!(
            " raised to {last} in {} raise{}",
            report.raises,
            plural(report.raises)
        );
    }
    text += &if options.without_bpf {
        ", sleeps not counted without BPF".to_owned()
    } else {
        format!(", {} sleep{}", report.sleeps, plural(report.sleeps))
    };
    if report.holds > 0 {
        text += &format!(
            ", held {} time{} for {} ms",
            report.holds,
            plural(report.holds),
            report.held.as_millis()
        );
    }
    if let Some(balance) = &report.lent {
        text += &format!("; {}", told_balance(balance));
    }
    if end.events.oom_kill > 0 {
        text += &format!(
            "; {} process{} killed at the maximum of {max_memory}: raise --max-memory",
            end.events.oom_kill,
            if end.events.oom_kill == 1 { "" } else { "es" }
        );
    } else if report.peak_demand >= *memory && end.may_swap {
        text += &format!("; a fixed limit of {memory} would have made it swap, or killed it");
    } else if report.peak_demand >= *memory {
        text += &format!("; a fixed limit of {memory} would have killed it");
    } else {
        text += &format!("; a fixed limit of {memory} would have sufficed");
    }
    for error in report.errors.iter().take(3) {
        text += &format!("\nbellows: {error}");
    }
    text
}

const fn plural(count: u64) -> &'static str {
    if count == 1 { "" } else { "s" }
}

fn write_report(path: &Path, report: &Report, end: &End) -> io::Result<()> {
    let value = serde_json::json!({ "report": report, "peak": end.peak, "events": end.events });
    std::fs::write(path, format!("{value}\n"))
}

/// Raises by a write after a delay; without a delay the reflex raises and nothing is requested.
struct Delayed {
    delay: Nanos,
    inputs: SyncSender<Input>,
}

impl Requester for Delayed {
    fn raise(&mut self, cgroup: &Cgroup, to: Bytes, _patience: Nanos) {
        self.set_later(cgroup, to);
    }

    fn lower(&mut self, cgroup: &Cgroup, to: Bytes) {
        self.set_later(cgroup, to);
    }

    fn take_back(&mut self, cgroup: &Cgroup, _to: Bytes, limit: Bytes) {
        self.set_later(cgroup, limit);
    }

    fn shares_the_node(&self) -> bool {
        false
    }

    fn record(&mut self, _cgroup: &Cgroup, record: &Record) {
        tracing::debug!(?record, "ledger");
    }

    fn not_guarded(&mut self, cgroup: CgroupId) {
        tracing::error!(cgroup.id = cgroup.0, "the command is not guarded");
    }
}

impl Delayed {
    fn set_later(&self, cgroup: &Cgroup, to: Bytes) {
        let (cgroup, inputs, delay) = (cgroup.clone(), self.inputs.clone(), self.delay);
        thread::spawn(move || {
            thread::sleep(Duration::from_nanos(delay.0));
            let result = cgroup
                .set_limit("memory.max", Limit::At(to))
                .map_err(|error| Refused {
                    why: error.to_string(),
                    uncertain: false,
                    is_passing: false,
                });
            let cgroup: CgroupId = cgroup.id();
            // A controller that has ended does not need the answer.
            drop(inputs.send(Input::Answered { cgroup, to, result }));
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_words_are_the_same_workload() {
        let workload = |words: &[&str]| {
            let words: Vec<OsString> = words.iter().map(OsString::from).collect();
            named(&words).workload
        };
        assert_eq!(workload(&["make", "-j8"]), workload(&["make", "-j8"]));
        assert_ne!(workload(&["make", "-j8"]), workload(&["make", "-j", "8"]));
        assert_ne!(workload(&["make", "-j8"]), workload(&["make-j8"]));
        // It names a file.
        let plain = workload(&["../x", "a/b"]);
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
        assert!(plain.chars().all(is_plain), "{plain}");
    }
}
