//! Elastic parallelism: when there is not memory for all jobs of a burst, some of them wait ([`bellows_core::parallel`]).
//!
//! Two means, for different jobs. Those that have not begun are kept from beginning by their job tokens
//! ([`jobserver`]). Those that run, or have no jobserver, are stopped (SIGSTOP) and go on as others end. A stopped process
//! keeps its memory but no lock on it, unlike one that sleeps in the brake; a probe is not stopped, unlike by the freezer.
//!
//! It is a thread of its own: reading a process tree takes milliseconds, for which no raise may wait. It looks only at
//! who asked for it by policy, only while that is raised (or cannot be), and at its processes only while it uses a
//! quarter of what it may have.
//!
//! **Whoever is paused goes on**, whatever happens to the agent: each is written down before it is stopped, in a file
//! beside the ledger, and whoever learns of the agent's death first (its parent, the releaser, its successor) resumes
//! them and gives tokens back ([`resume_all`]). To do it twice does no harm. A token is written down after it was taken
//! and before it is given back: who dies in between leaves a build with a job less, never with one too many.
//!
//! It must not signal anybody whom it has not compared with what it saw ([`process::signal`]).

mod jobserver;
pub(crate) mod process;
mod watched;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs, io,
    path::Path,
    sync::mpsc::{self, Receiver, Sender, TryRecvError},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use bellows_core::{Bytes, CgroupId, parallel::ProcessId};
use rustix::process::Signal;

use crate::{
    cgroup::Cgroup,
    ledger::{self, Ledger, Place, Record},
    priority,
    wake::Wake,
};
use watched::Watched;

/// So long is slept while nothing is to be looked at; whoever has something to tell wakes it.
const LONG: Duration = Duration::from_secs(3600);
/// After all looks of one round it rests for so many times as long as they took.
const AT_REST: u32 = 2;
/// At its end the guard tries so often, and waits so long in between, to resume whom it could not.
const LAST_ATTEMPTS: usize = 10;
const LAST_INTERVAL: Duration = Duration::from_millis(50);

/// Takes what is to be told to the controller; must not block.
pub type Sink = Box<dyn Fn(Record) + Send>;

/// What the thread is told.
#[derive(Debug)]
enum Command {
    Watch(Cgroup),
    MayHave {
        cgroup: CgroupId,
        granted: Bytes,
        is_bursting: bool,
    },
    Forget(CgroupId),
}

/// The thread that lends time.
#[derive(Debug)]
pub struct Parallel {
    commands: Option<Sender<Command>>,
    wake: Wake,
    thread: Option<JoinHandle<()>>,
}

impl Parallel {
    /// Starts it; who is paused is written down at `path`.
    ///
    /// # Errors
    ///
    /// When the file or the thread cannot be had.
    pub fn start(path: &Path, told: Sink) -> io::Result<Self> {
        Self::start_with(path, told, process::signal)
    }

    fn start_with(path: &Path, told: Sink, signal: Signaller) -> io::Result<Self> {
        let ledger = Ledger::open(path)?;
        let (commands, inbox) = mpsc::channel();
        let wake = Wake::new()?;
        let lender = Lender {
            inbox,
            wake: wake.clone(),
            state: State {
                ledger,
                told,
                signal,
            },
            watched: BTreeMap::new(),
            rests_until: Instant::now(),
        };
        let thread = thread::Builder::new()
            .name("parallel".to_owned())
            .spawn(move || lender.run())?;
        Ok(Self {
            commands: Some(commands),
            wake,
            thread: Some(thread),
        })
    }

    /// Watches a cgroup from now on.
    pub fn watch(&self, cgroup: Cgroup) {
        self.send(Command::Watch(cgroup));
    }

    /// What it may have, all in all, and whether it needs to be looked at.
    pub fn may_have(&self, cgroup: CgroupId, granted: Bytes, is_bursting: bool) {
        self.send(Command::MayHave {
            cgroup,
            granted,
            is_bursting,
        });
    }

    /// Watches it no more; who is paused in it goes on.
    pub fn forget(&self, cgroup: CgroupId) {
        self.send(Command::Forget(cgroup));
    }

    fn send(&self, command: Command) {
        let sent = self
            .commands
            .as_ref()
            .map(|commands| commands.send(command));
        if let Some(Err(_)) = sent {
            tracing::error!("the thread that pauses jobs has ended");
        }
        self.wake.give();
    }
}

impl Drop for Parallel {
    /// Waits until everybody goes on.
    fn drop(&mut self) {
        drop(self.commands.take());
        self.wake.give();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that pauses jobs has failed");
        }
    }
}

/// Sends a signal to exactly one process: [`process::signal`].
type Signaller = fn(ProcessId, Signal) -> io::Result<bool>;

/// What is written down and told.
struct State {
    ledger: Ledger,
    told: Sink,
    signal: Signaller,
}

impl State {
    fn record(&mut self, record: &Record) -> io::Result<()> {
        self.ledger.append(record)
    }
}

struct Lender {
    inbox: Receiver<Command>,
    wake: Wake,
    state: State,
    watched: BTreeMap<CgroupId, Watched>,
    /// Nobody is looked at before: with its priority it must leave the CPU to others, however many they are.
    rests_until: Instant,
}

impl Lender {
    fn run(mut self) {
        if let Err(error) = priority::try_real_time(priority::JOBS) {
            tracing::debug!(%error, "no real-time priority: jobs may be paused too late on a busy machine");
        }
        loop {
            let due = self.watched.values().filter_map(Watched::due).min();
            let due = due.map(|due| due.max(self.rests_until));
            let rest = due.map_or(LONG, |due| due.saturating_duration_since(Instant::now()));
            let mut sources = self.watched.values().filter_map(Watched::source);
            self.wake.wait([sources.next(), sources.next()], rest);
            drop(sources);
            // Before what was told is read, so that nothing is missed.
            let is_told = self.wake.take();
            // The token of a job that has ended is make's next job, unless it is taken at once.
            for watched in self.watched.values_mut() {
                watched.take_between(&mut self.state);
            }
            if is_told && !self.take_commands() {
                return self.end();
            }
            self.look();
        }
    }

    /// Returns whether to go on.
    fn take_commands(&mut self) -> bool {
        loop {
            match self.inbox.try_recv() {
                Ok(command) => self.take(command),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn end(mut self) {
        for _ in 0..LAST_ATTEMPTS {
            for watched in self.watched.values_mut() {
                watched.forget(&mut self.state);
            }
            self.watched.retain(|_, watched| !watched.is_over());
            if self.watched.is_empty() {
                break;
            }
            thread::sleep(LAST_INTERVAL);
        }
        if !self.watched.is_empty() {
            tracing::error!("processes stay paused: whoever reads the file next resumes them");
        } else if let Err(error) = self.state.ledger.remove() {
            tracing::debug!(%error, "an empty file is left behind");
        }
    }

    fn take(&mut self, command: Command) {
        match command {
            Command::Watch(cgroup) => {
                let watched = self.watched.entry(cgroup.id());
                let watched = watched.or_insert_with(|| Watched::new(cgroup));
                watched.watch_again();
            }
            Command::MayHave {
                cgroup,
                granted,
                is_bursting,
            } => {
                if let Some(watched) = self.watched.get_mut(&cgroup) {
                    watched.may_have(granted, is_bursting);
                }
            }
            Command::Forget(cgroup) => {
                if let Some(watched) = self.watched.get_mut(&cgroup) {
                    watched.forget(&mut self.state);
                }
            }
        }
    }

    fn look(&mut self) {
        let now = Instant::now();
        if now < self.rests_until {
            return;
        }
        for watched in self.watched.values_mut() {
            if watched.due().is_some_and(|due| due <= now) {
                watched.look(&mut self.state);
            }
        }
        self.rests_until = Instant::now() + now.elapsed() * AT_REST;
        self.watched.retain(|_, watched| !watched.is_over());
        if self.state.ledger.is_full().unwrap_or(false) {
            let standing = self.watched.values().flat_map(Watched::standing);
            let standing: Vec<Record> = standing.collect();
            if let Err(error) = self.state.ledger.rotate(&standing) {
                tracing::warn!(%error, "who is paused cannot be written anew: free memory on /run");
            }
        }
    }
}

/// Who is paused and what is withheld, by the records of whoever did that.
#[derive(Debug, Default, PartialEq, Eq)]
struct Left {
    paused: BTreeSet<ProcessId>,
    tokens: BTreeMap<Place, Vec<u8>>,
}

fn left_by(records: &[Record]) -> Left {
    let mut left = Left::default();
    for record in records {
        match record {
            Record::Pause { process, .. } => {
                left.paused.insert(*process);
            }
            Record::Resume { process, .. } => {
                left.paused.remove(process);
            }
            Record::Tokens { place, taken, .. } => {
                left.tokens.insert(*place, taken.clone());
            }
            _ => {}
        }
    }
    left
}

/// Resumes whomever a dead agent has paused, and gives back what it has withheld; returns how many go on.
///
/// Two may do so at once: tokens are given back by who has renamed the file first.
///
/// # Errors
///
/// When the file exists but cannot be read, or not be put aside.
pub fn resume_all(path: &Path) -> io::Result<usize> {
    let put_aside = ledger::previous(path);
    let (file, records) = match ledger::read(path) {
        Ok(contents) => (path, contents.records),
        // Its writer died between putting it aside and beginning the next.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let previous = ledger::read(&put_aside);
            (&*put_aside, previous.unwrap_or_default().records)
        }
        Err(error) => return Err(error),
    };
    let left = left_by(&records);
    // Where one cannot be resumed, whoever comes next tries again.
    let count = resume(&left.paused)?;
    if file == path {
        // It would be taken for the newest one as soon as there is no other.
        ledger::remove_if_there(&put_aside)?;
    }
    let is_first = fs::rename(file, path.with_extension("resumed")).is_ok();
    for (place, tokens) in left.tokens.iter().filter(|_| is_first) {
        if let Err(error) = jobserver::return_to(*place, tokens) {
            tracing::error!(?place, %error, "job tokens cannot be given back");
        }
    }
    if is_first {
        // What it said is done.
        drop(fs::remove_file(path.with_extension("resumed")));
    }
    Ok(count)
}

/// Resumes whomever a stopped agent has paused. Its file is left to it, and so are the tokens: it does not know of this when
/// it goes on.
///
/// # Errors
///
/// When the file exists but cannot be read, or somebody cannot be resumed.
pub fn resume_paused(path: &Path) -> io::Result<usize> {
    match ledger::read(path) {
        Ok(contents) => resume(&left_by(&contents.records).paused),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

fn resume(paused: &BTreeSet<ProcessId>) -> io::Result<usize> {
    let mut count = 0;
    let mut failed = None;
    for process in paused {
        match process::signal(*process, Signal::CONT) {
            Ok(went_on) => count += usize::from(went_on),
            Err(error) => {
                tracing::error!(pid = process.pid, %error, "a paused process cannot be resumed");
                failed = Some(error);
            }
        }
    }
    failed.map_or(Ok(count), Err)
}

#[cfg(test)]
mod tests;
