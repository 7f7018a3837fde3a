//! The reflex thread: matches urgent events against the armed table and writes.
//!
//! From the watermark of a small limit to the OOM killer it is a millisecond or two, so this thread
//! does nothing else: it has real-time priority where that is permitted, keeps the files open, and is
//! the only writer of watermarks and raises, and of brakes but those below usage; it alone says who is frozen. Whatever it does was laid down by core
//! beforehand; what it did comes back as a [`Verdict`].
//!
//! It must never lower a limit or a brake below usage (the kernel then reclaims in the writer): a
//! lower limit is written only after a look at usage, and here, because nobody else can do it without
//! racing a raise. It must never wait for the controller: a full verdict channel loses a verdict,
//! which is counted, not time.

mod brakes;
mod controls;
mod freezer;
mod hold;
mod row;
#[cfg(test)]
mod tests;

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bellows_core::{Bytes, CgroupId, Nanos, Policy, Reason, Signals, Watermark};
use bellows_ebpf_common::{KIND_OOM, KIND_WATERMARK, MemoryEvent};
use tokio::sync::oneshot;

use crate::{
    clock::now,
    ledger::{Ledger, Record},
    priority,
    signal::source::{Source, Taken},
    wake::Wake,
};
use brakes::Brakes;
pub use controls::Controls;
use freezer::{Freezer, Told};
pub(crate) use row::LET_GO_FOR;
use row::Row;

/// How soon the limit of a cgroup that is held is looked at: the answer lifts the hold at once.
const SHORTEST_POLL: Nanos = Nanos::millis(1);
/// How late that may be, of the time that the container was held already: many that are held for long, each looked
/// at a thousand times a second, would take the CPU time that the answer needs.
const POLL_PER_MILLE: u64 = 10;
/// How long the thread waits when nothing is held; it is woken by events and commands.
const IDLE_POLL: Duration = Duration::from_secs(3600);
/// Verdicts of one look after those that are held.
const TOLD_AT_ONCE: usize = 64;

/// What the controller tells the reflex.
#[derive(Debug)]
pub enum Command {
    /// Watch a cgroup from now on, or with other numbers than before.
    Arm(Box<Arm>),
    /// Raise a limit that nobody else manages, if it is lower.
    Raise(CgroupId, Bytes),
    /// Lower a limit that nobody else manages, if usage is below the watermark of the new one.
    Lower(CgroupId, Bytes),
    /// Lift a hold; because it has expired or nothing comes of a raise, and then leave it alone for a while.
    Release(CgroupId, Reason),
    /// Freeze one again that is held by the brake alone: it waits for room, and nobody is asked for its raise yet.
    FreezeAgain(CgroupId),
    /// Put the brake back where the limit wants it.
    PutBack(CgroupId),
    /// Tell that a cgroup could not be frozen or thawed.
    NotFrozen(CgroupId, String),
    /// Forget a cgroup that was disarmed: its hold is lifted now.
    Thawed(CgroupId),
    /// Only tell when demand is above this, of a cgroup that is not armed.
    Watch(CgroupId, Option<Watermark>),
    /// Tell no more of a cgroup that is not armed.
    Unwatch(CgroupId),
    /// Remove brake and hold and stop watching.
    Disarm(CgroupId),
    /// Write into this ledger from now on.
    Ledger(Ledger),
    /// Answer: somebody asks whether the thread goes round.
    Alive(oneshot::Sender<()>),
    /// End the thread, after disarming everything.
    Stop,
}

/// One row of the reflex table.
#[derive(Debug)]
pub struct Arm {
    /// The cgroup.
    pub cgroup: CgroupId,
    /// Its rules.
    pub policy: Policy,
    /// A lower limit that is on its way and may be in force at any moment; `None` for the limit
    /// that the kernel has.
    pub lowering: Option<Bytes>,
    /// Its files, the first time that it is armed.
    pub controls: Option<Controls>,
}

/// What the reflex saw or did.
#[derive(Clone, Debug)]
pub enum Verdict {
    /// The kernel sent an event.
    Event(MemoryEvent),
    /// A limit was raised.
    Raised {
        /// In this cgroup.
        cgroup: CgroupId,
        /// Kernel time of the event that it answered.
        event_at: Nanos,
        /// When the limit was written.
        at: Nanos,
        /// The limit now.
        limit: Bytes,
    },
    /// A cgroup is held since `at`.
    Held {
        /// The cgroup.
        cgroup: CgroupId,
        /// Since when.
        at: Nanos,
        /// Until when at most.
        until: Nanos,
        /// Whether its brake was set below its usage at once.
        braked: bool,
    },
    /// The brake of a cgroup that was armed for the first time is somebody else's.
    ForeignBrake {
        /// The cgroup.
        cgroup: CgroupId,
    },
    /// A held cgroup goes on growing; its brake was set below its usage.
    Braked {
        /// The cgroup.
        cgroup: CgroupId,
    },
    /// A limit was lowered.
    Lowered {
        /// In this cgroup.
        cgroup: CgroupId,
        /// The limit now.
        limit: Bytes,
    },
    /// A limit was not lowered: usage is too near to it.
    LowerRefused {
        /// In this cgroup.
        cgroup: CgroupId,
    },
    /// The limit of a held cgroup was raised by somebody; it is held no more.
    LimitRose {
        /// The cgroup.
        cgroup: CgroupId,
        /// The limit now.
        limit: Bytes,
    },
    /// A cgroup is held no more.
    Released {
        /// The cgroup.
        cgroup: CgroupId,
        /// Why.
        reason: Reason,
        /// What could not be written on the way.
        error: Option<String>,
    },
    /// A cgroup that was disarmed is released, and the ledger says so.
    Forgotten {
        /// The cgroup.
        cgroup: CgroupId,
    },
    /// Something could not be done.
    Failed {
        /// In this cgroup.
        cgroup: CgroupId,
        /// What and why.
        error: String,
    },
}

/// Takes a verdict without waiting; `false` when there is no room for it.
pub type Sink = Box<dyn Fn(Verdict) -> bool + Send>;

/// A handle on the running thread.
#[derive(Debug)]
pub struct Reflex {
    commands: Commands,
    lost: Arc<AtomicU64>,
    signals: Signals,
    thread: Option<JoinHandle<()>>,
}

/// The way in: a channel, and a descriptor that wakes its reader.
#[derive(Clone, Debug)]
struct Commands {
    channel: mpsc::Sender<Command>,
    wake: Wake,
}

impl Commands {
    /// Sends a command. A reflex that has ended ignores it.
    fn send(&self, command: Command) {
        if self.channel.send(command).is_err() {
            tracing::error!("the reflex thread has ended; nothing is guarded any more");
            return;
        }
        self.wake.give();
    }
}

impl Reflex {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// When a thread or an eventfd cannot be had.
    pub fn start(source: Source, ledger: Ledger, verdicts: Sink) -> io::Result<Self> {
        let (channel, receiver) = mpsc::channel();
        let wake = Wake::new()?;
        let commands = Commands { channel, wake };
        let lost = Arc::new(AtomicU64::new(0));
        let signals = source.signals();
        let (too_late, freezer_told) = (commands.clone(), commands.clone());
        let worker = Worker {
            source,
            ledger,
            commands: receiver,
            verdicts,
            brakes: Brakes::start(move |cgroup| too_late.send(Command::PutBack(cgroup)))?,
            freezer: Freezer::start(move |told| {
                freezer_told.send(match told {
                    Told::Failed(cgroup, error) => Command::NotFrozen(cgroup, error.to_string()),
                    Told::Left(cgroup) => Command::Thawed(cgroup),
                });
            })?,
            wake: commands.wake.clone(),
            lost: Arc::clone(&lost),
            table: BTreeMap::new(),
            told: Vec::with_capacity(TOLD_AT_ONCE),
        };
        let thread = thread::Builder::new()
            .name("reflex".to_owned())
            .spawn(move || worker.run())?;
        Ok(Self {
            commands,
            lost,
            signals,
            thread: Some(thread),
        })
    }

    /// Sends a command. A reflex that has ended ignores it.
    pub fn send(&self, command: Command) {
        self.commands.send(command);
    }

    /// Where its events come from.
    #[must_use]
    pub const fn signals(&self) -> Signals {
        self.signals
    }

    /// Verdicts that found the channel full.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost.load(Ordering::Relaxed)
    }

    /// Ends the thread; every brake and hold is lifted when this returns.
    pub fn stop(mut self) {
        self.send(Command::Stop);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the reflex thread panicked");
        }
    }
}

struct Worker {
    source: Source,
    ledger: Ledger,
    commands: mpsc::Receiver<Command>,
    verdicts: Sink,
    brakes: Brakes,
    freezer: Freezer,
    wake: Wake,
    lost: Arc<AtomicU64>,
    table: BTreeMap<CgroupId, Row>,
    /// What is told at the end of a look; kept because allocating can wait for memory.
    told: Vec<Verdict>,
}

/// What a row acts with.
struct Means<'a> {
    source: &'a mut Source,
    ledger: &'a mut Ledger,
    brakes: &'a Brakes,
    freezer: &'a Freezer,
}

/// Keeps the process's pages in memory once they are there: the reflex must not wait for a page of
/// its own when memory is short.
fn try_lock_memory() -> io::Result<()> {
    /// `MCL_ONFAULT` of the kernel (include/uapi/asm-generic/mman.h).
    const MCL_ONFAULT: libc::c_int = 4;
    // SAFETY: takes flags only.
    let result = unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | MCL_ONFAULT) };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

impl Worker {
    fn run(mut self) {
        if let Err(error) = priority::try_real_time(priority::REFLEX) {
            tracing::warn!(%error, "no real-time priority: a busy machine makes reactions late");
        }
        if let Err(error) = try_lock_memory() {
            tracing::warn!(%error, "memory is not locked: reactions may wait for a page");
        }
        loop {
            let is_readable = self.wait();
            if !self.take_commands() {
                break;
            }
            if !self.take_events() && is_readable {
                Wake::let_others_finish();
            }
            self.look_after_held();
        }
        let armed: Vec<CgroupId> = self.table.keys().copied().collect();
        for cgroup in armed {
            self.disarm(cgroup);
        }
        // Whoever waits for the end waits for the last thaw.
        self.freezer.end();
        while let Ok(command) = self.commands.try_recv() {
            if let Command::Thawed(cgroup) = command {
                self.forget(cgroup);
            }
        }
    }

    /// Returns whether there seems to be an event.
    fn wait(&self) -> bool {
        let at = now();
        let held = self.table.values().filter_map(Row::held_since);
        let timeout = held.max().map_or(IDLE_POLL, |latest| {
            let poll = at.since(latest).per_mille(POLL_PER_MILLE);
            Duration::from_nanos(poll.max(SHORTEST_POLL).0)
        });
        self.wake.wait([Some(self.source.as_fd()), None], timeout)
    }

    /// Returns whether to go on.
    fn take_commands(&mut self) -> bool {
        if !self.wake.take() {
            return true;
        }
        loop {
            match self.commands.try_recv() {
                Ok(Command::Arm(arm)) => self.arm(*arm),
                Ok(Command::Raise(cgroup, to)) => self.raise(cgroup, to),
                Ok(Command::Lower(cgroup, to)) => self.lower(cgroup, to),
                Ok(Command::Release(cgroup, reason)) => self.release(cgroup, reason),
                Ok(Command::FreezeAgain(cgroup)) => self.freeze_again(cgroup),
                Ok(Command::PutBack(cgroup)) => self.put_back(cgroup),
                Ok(Command::NotFrozen(cgroup, error)) => {
                    self.tell(Verdict::Failed { cgroup, error });
                }
                Ok(Command::Watch(cgroup, watermark)) => self.watch(cgroup, watermark),
                Ok(Command::Unwatch(cgroup)) if !self.table.contains_key(&cgroup) => {
                    self.source.forget(cgroup);
                }
                Ok(Command::Unwatch(_)) => {}
                Ok(Command::Disarm(cgroup)) => self.disarm(cgroup),
                Ok(Command::Thawed(cgroup)) => self.forget(cgroup),
                Ok(Command::Ledger(ledger)) => self.ledger = ledger,
                // Whoever asked may have gone.
                Ok(Command::Alive(answer)) => drop(answer.send(())),
                Err(mpsc::TryRecvError::Empty) => return true,
                Ok(Command::Stop) | Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Returns whether there was one.
    fn take_events(&mut self) -> bool {
        let mut any = false;
        while let Some(taken) = self.source.take() {
            any = true;
            match taken {
                Taken::Event(event) => self.react(&event),
                Taken::Unknown => {
                    self.lost.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
        any
    }

    fn tell(&self, verdict: Verdict) {
        if !(self.verdicts)(verdict) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn tell_of(&self, cgroup: CgroupId, verdict: Result<Verdict, String>) {
        self.tell(verdict.unwrap_or_else(|error| Verdict::Failed { cgroup, error }));
    }

    fn react(&mut self, event: &MemoryEvent) {
        let cgroup = CgroupId(event.cgroup_id);
        let demand = Bytes::from_pages(event.usage_pages.saturating_sub(event.file_pages));
        if event.kind == KIND_WATERMARK
            && let Some(row) = self.table.get_mut(&cgroup)
        {
            let mut means = Means {
                source: &mut self.source,
                ledger: &mut self.ledger,
                brakes: &self.brakes,
                freezer: &self.freezer,
            };
            if let Some(verdict) = row.react(event, demand, &mut means) {
                self.tell_of(cgroup, verdict);
            }
        } else if event.kind != KIND_OOM && event.kind != KIND_WATERMARK {
            return;
        }
        self.tell(Verdict::Event(*event));
    }

    fn arm(&mut self, arm: Arm) {
        let cgroup = arm.cgroup;
        let adopted = match &arm.controls {
            Some(controls) => self.source.adopt(controls.cgroup()),
            None => Ok(()),
        };
        let before = self.table.remove(&cgroup);
        let is_new = before.is_none();
        let armed = match Row::armed(arm, before) {
            Ok(mut row) => {
                let noted = if is_new {
                    self.note_brake(&mut row)
                } else {
                    Ok(())
                };
                let result = row.watch(&mut self.source);
                self.table.insert(cgroup, row);
                noted.and(result)
            }
            Err(error) => {
                // Whatever it was, it is not watched any more.
                self.source.forget(cgroup);
                Err(error)
            }
        };
        let adopted = adopted.map_err(|error| error.to_string());
        for error in [adopted, armed].into_iter().filter_map(Result::err) {
            self.tell(Verdict::Failed { cgroup, error });
        }
    }

    /// Whoever releases after our death must leave alone what is somebody else's, and lift what is ours, at
    /// whatever instant that is. Where it cannot be told of, the brake is left alone.
    fn note_brake(&mut self, row: &mut Row) -> Result<(), String> {
        let cgroup = row.cgroup;
        if row.foreign_brake {
            self.tell(Verdict::ForeignBrake { cgroup });
        }
        let record = Record::Brake {
            at: now(),
            cgroup,
            foreign: row.foreign_brake,
        };
        let noted = self.ledger.append(&record);
        row.foreign_brake |= noted.is_err();
        noted.map_err(|error| error.to_string())
    }

    fn watch(&mut self, cgroup: CgroupId, watermark: Option<Watermark>) {
        if self.table.contains_key(&cgroup) {
            // What is armed has a watermark already, which must stay.
            return;
        }
        if let Err(error) = self.source.watch(cgroup, watermark) {
            let error = error.to_string();
            self.tell(Verdict::Failed { cgroup, error });
        }
    }

    fn put_back(&mut self, cgroup: CgroupId) {
        if let Some(row) = self.table.get(&cgroup)
            && let Err(error) = row.put_back()
        {
            self.tell(Verdict::Failed { cgroup, error });
        }
    }

    fn raise(&mut self, cgroup: CgroupId, to: Bytes) {
        let Self { source, table, .. } = self;
        if let Some(row) = table.get_mut(&cgroup)
            && let Some(verdict) = row.raise(source, to)
        {
            self.tell_of(cgroup, verdict);
        }
    }

    fn lower(&mut self, cgroup: CgroupId, to: Bytes) {
        let Self { source, table, .. } = self;
        if let Some(row) = table.get_mut(&cgroup) {
            let verdict = row.lower(source, to);
            self.tell_of(cgroup, verdict);
        }
    }

    fn release(&mut self, cgroup: CgroupId, reason: Reason) {
        let Some(row) = self.table.get_mut(&cgroup) else {
            return;
        };
        let verdict = if row.is_held() {
            row.thaw(&mut self.ledger, &self.freezer, reason)
        } else {
            // Whoever asks does not know: an answer was lost.
            let left_alone = if reason.lets_go() {
                row.let_go()
            } else {
                Ok(())
            };
            Verdict::Released {
                cgroup,
                reason,
                error: left_alone.err(),
            }
        };
        self.tell(verdict);
    }

    fn freeze_again(&mut self, cgroup: CgroupId) {
        let Some(row) = self.table.get_mut(&cgroup) else {
            return;
        };
        let mut means = Means {
            source: &mut self.source,
            ledger: &mut self.ledger,
            brakes: &self.brakes,
            freezer: &self.freezer,
        };
        if let Some(error) = row.freeze_again(&mut means) {
            self.tell(Verdict::Failed { cgroup, error });
        }
    }

    /// Lifts brake and hold, and forgets it; if its hold is not lifted at once, when it is.
    fn disarm(&mut self, cgroup: CgroupId) {
        self.source.forget(cgroup);
        let Some(mut row) = self.table.remove(&cgroup) else {
            return;
        };
        let unbraked = row.unbrake();
        if row.is_held() {
            let verdict = row.thaw(&mut self.ledger, &self.freezer, Reason::Ended);
            self.tell(verdict);
        }
        let thawed = row.leave(&self.freezer);
        if thawed == Ok(true) {
            self.forget(cgroup);
        }
        for error in [unbraked, thawed.map(drop)]
            .into_iter()
            .filter_map(Result::err)
        {
            self.tell(Verdict::Failed { cgroup, error });
        }
    }

    /// Only what is neither braked nor held any more, however long that took: a successor releases whatever was not
    /// forgotten, and nothing else. One that was armed again meanwhile is not forgotten.
    fn forget(&mut self, cgroup: CgroupId) {
        if self.table.contains_key(&cgroup) {
            return;
        }
        match self.ledger.append(&Record::Forget { at: now(), cgroup }) {
            Ok(()) => self.tell(Verdict::Forgotten { cgroup }),
            Err(error) => {
                let error = error.to_string();
                self.tell(Verdict::Failed { cgroup, error });
            }
        }
    }

    /// Lifts the hold of every cgroup whose limit somebody has raised, and of one that was held for
    /// longer than anybody may be, whatever the controller knows.
    fn look_after_held(&mut self) {
        let at = now();
        let mut told = std::mem::take(&mut self.told);
        let mut means = Means {
            source: &mut self.source,
            ledger: &mut self.ledger,
            brakes: &self.brakes,
            freezer: &self.freezer,
        };
        for row in self.table.values_mut().filter(|row| row.is_held()) {
            row.look_after(at, &mut means, &mut told);
        }
        for verdict in told.drain(..) {
            self.tell(verdict);
        }
        self.told = told;
    }
}
