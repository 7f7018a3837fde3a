//! The reflex thread: matches urgent events against the armed table and writes.
//!
//! From the watermark of a small limit to the OOM killer it is a millisecond or two, so this thread
//! does nothing else: it has real-time priority where that is permitted, keeps the files open, and is
//! the only writer of watermarks, brakes and raises. Whatever it does was laid down by core
//! beforehand; what it did comes back as a [`Verdict`].
//!
//! It must never lower a limit or a brake below usage (the kernel then reclaims in the writer): a
//! lower limit is written only after a look at usage, and here, because nobody else can do it without
//! racing a raise. It must never wait for the controller: a full verdict channel loses a verdict,
//! which is counted, not time.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bellows_core::{
    Action, Bytes, CgroupId, Nanos, Policy, Reaction, Reason, Thresholds, decide::HOLD_LIMIT,
    reflex,
};
use bellows_ebpf_common::{KIND_OOM, KIND_WATERMARK, MemoryEvent};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::{
    cgroup::{Cgroup, CgroupError, Control, Limit},
    ledger::{Ledger, Record},
    signal::programs::{Guards, LoadError, Reflexes, memory_event},
};

/// How often the limit of a held cgroup is looked at: the answer lifts the hold at once.
const HELD_POLL: Duration = Duration::from_millis(1);
/// How long the thread waits when nothing is held; it is woken by events and commands.
const IDLE_POLL: Duration = Duration::from_secs(3600);
/// How long a container whose hold expired is left alone.
const LET_GO_FOR: Nanos = Nanos::millis(10_000);
/// Real-time priority of the thread: above every ordinary task, below the kernel's own threads.
const PRIORITY: i32 = 10;

/// What the controller tells the reflex.
#[derive(Debug)]
pub enum Command {
    /// Watch a cgroup from now on, or with other numbers than before.
    Arm(Box<Arm>),
    /// Lower a limit that nobody else manages, if usage is below the watermark of the new one.
    Lower(CgroupId, Bytes),
    /// Lift a hold.
    Release(CgroupId, Reason),
    /// Remove brake and hold and stop watching.
    Disarm(CgroupId),
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

/// The files that the reflex writes.
#[derive(Debug)]
pub struct Controls {
    max: Control,
    high: Control,
    freeze: Control,
    current: Control,
}

impl Controls {
    /// Opens them.
    ///
    /// # Errors
    ///
    /// [`CgroupError`] when one does not exist or cannot be written.
    pub fn open(cgroup: &Cgroup) -> Result<Self, CgroupError> {
        Ok(Self {
            max: Control::open(cgroup, "memory.max")?,
            high: Control::open(cgroup, "memory.high")?,
            freeze: Control::open(cgroup, "cgroup.freeze")?,
            current: Control::open_read(cgroup, "memory.current")?,
        })
    }
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
    /// A hold was lifted.
    Released {
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
    commands: mpsc::Sender<Command>,
    wake: Arc<OwnedFd>,
    lost: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Reflex {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// When a thread or an eventfd cannot be had.
    pub fn start(kernel: Reflexes, ledger: Ledger, verdicts: Sink) -> io::Result<Self> {
        let (sender, commands) = mpsc::channel();
        let wake = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let lost = Arc::new(AtomicU64::new(0));
        let worker = Worker {
            kernel,
            ledger,
            commands,
            verdicts,
            wake: Arc::clone(&wake),
            lost: Arc::clone(&lost),
            table: BTreeMap::new(),
        };
        let thread = thread::Builder::new()
            .name("reflex".to_owned())
            .spawn(move || worker.run())?;
        Ok(Self {
            commands: sender,
            wake,
            lost,
            thread: Some(thread),
        })
    }

    /// Sends a command. A reflex that has ended ignores it.
    pub fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            tracing::error!("the reflex thread has ended; nothing is guarded any more");
            return;
        }
        // A full eventfd counter is a pending wake-up already.
        if let Err(errno) = rustix::io::write(&self.wake, &1_u64.to_ne_bytes()) {
            tracing::debug!(%errno, "the reflex is being woken already");
        }
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

struct Row {
    policy: Policy,
    limit: Bytes,
    release_at: Bytes,
    reaction: Reaction,
    controls: Controls,
    /// Since when it is held.
    held: Option<Nanos>,
    /// Since when it is let go after a hold expired: not braked or held again before the limit has
    /// risen or [`LET_GO_FOR`] has passed.
    let_go: Option<Nanos>,
}

struct Worker {
    kernel: Reflexes,
    ledger: Ledger,
    commands: mpsc::Receiver<Command>,
    verdicts: Sink,
    wake: Arc<OwnedFd>,
    lost: Arc<AtomicU64>,
    table: BTreeMap<CgroupId, Row>,
}

/// `CLOCK_MONOTONIC`, the clock of the kernel's events.
#[must_use]
pub fn now() -> Nanos {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Nanos(
        seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0)),
    )
}

/// The kernel's `struct sched_param` (include/uapi/linux/sched/types.h).
#[repr(C)]
struct SchedParam {
    priority: libc::c_int,
}

fn be_real_time() {
    let parameters = SchedParam { priority: PRIORITY };
    // SAFETY: the system call reads one live structure of the kernel's layout; thread 0 is the
    // calling one. The C library's wrapper is not used: musl's always fails.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_setscheduler,
            0,
            libc::SCHED_FIFO,
            &raw const parameters,
        )
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        tracing::warn!(%error, "no real-time priority: a busy machine makes reactions late");
    }
}

impl Worker {
    fn run(mut self) {
        be_real_time();
        loop {
            self.wait();
            if !self.take_commands() {
                break;
            }
            self.take_events();
            self.look_after_held();
        }
        let armed: Vec<CgroupId> = self.table.keys().copied().collect();
        for cgroup in armed {
            self.disarm(cgroup);
        }
    }

    fn wait(&self) {
        let held = self.table.values().any(|row| row.held.is_some());
        let timeout = if held { HELD_POLL } else { IDLE_POLL };
        let timeout = rustix::time::Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(1),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let ring = self.kernel.ring.as_fd();
        let mut sources = [
            PollFd::new(&ring, PollFlags::IN),
            PollFd::new(&self.wake, PollFlags::IN),
        ];
        // Interrupted or not: the loop looks at everything anyway.
        if let Err(errno) = poll(&mut sources, Some(&timeout)) {
            tracing::trace!(%errno, "poll");
        }
    }

    /// Returns whether to go on.
    fn take_commands(&mut self) -> bool {
        let mut counter = [0; 8];
        if let Err(errno) = rustix::io::read(&self.wake, &mut counter) {
            tracing::trace!(%errno, "no command");
            return true;
        }
        loop {
            match self.commands.try_recv() {
                Ok(Command::Arm(arm)) => self.arm(*arm),
                Ok(Command::Lower(cgroup, to)) => self.lower(cgroup, to),
                Ok(Command::Release(cgroup, reason)) => self.release(cgroup, reason),
                Ok(Command::Disarm(cgroup)) => self.disarm(cgroup),
                Err(mpsc::TryRecvError::Empty) => return true,
                Ok(Command::Stop) | Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn take_events(&mut self) {
        while let Some(event) = self.kernel.ring.next().map(|item| memory_event(&item)) {
            match event {
                Some(event) => self.react(&event),
                None => {
                    self.lost.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    fn tell(&self, verdict: Verdict) {
        if !(self.verdicts)(verdict) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn react(&mut self, event: &MemoryEvent) {
        let cgroup = CgroupId(event.cgroup_id);
        let demand = Bytes::from_pages(event.usage_pages.saturating_sub(event.file_pages));
        if event.kind == KIND_WATERMARK
            && let Some(row) = self.table.get_mut(&cgroup)
        {
            let verdict = match &row.reaction {
                Reaction::Raise { rungs } => reflex::rung_for(rungs, demand)
                    .filter(|rung| rung.limit > row.limit)
                    .copied()
                    .map(|rung| {
                        climb(
                            row,
                            &mut self.ledger,
                            &mut self.kernel.guards,
                            event,
                            demand,
                            rung,
                        )
                    }),
                Reaction::Hold { at } if demand >= *at && row.held.is_none() && !is_let_go(row) => {
                    Some(hold(row, &mut self.ledger, cgroup, demand))
                }
                Reaction::Hold { .. } | Reaction::Nothing => None,
            };
            if let Some(verdict) = verdict {
                self.tell(verdict.unwrap_or_else(|error| Verdict::Failed { cgroup, error }));
            }
        } else if event.kind != KIND_OOM && event.kind != KIND_WATERMARK {
            return;
        }
        self.tell(Verdict::Event(*event));
    }

    fn arm(&mut self, arm: Arm) {
        let Arm {
            cgroup,
            policy,
            lowering,
            controls,
        } = arm;
        let (known, controls) = match (self.table.remove(&cgroup), controls) {
            (
                Some(Row {
                    limit,
                    held,
                    let_go,
                    controls,
                    ..
                }),
                _,
            ) => (Some((limit, held, let_go)), controls),
            (None, Some(controls)) => (None, controls),
            (None, None) => {
                let error = "armed without its files".to_owned();
                return self.tell(Verdict::Failed { cgroup, error });
            }
        };
        // What the controller knows may be older than the last raise.
        let actual = match controls.max.get() {
            Ok(limit) => limit.bytes(),
            Err(error) => {
                // Whatever it was, it is not watched any more, so nothing may be left on it.
                self.kernel.guards.remove(cgroup);
                let lifted = controls
                    .high
                    .set(Limit::Max)
                    .and_then(|()| controls.freeze.set_flag(false));
                let error = lifted.err().unwrap_or(error).to_string();
                return self.tell(Verdict::Failed { cgroup, error });
            }
        };
        let limit = lowering.map_or(actual, |lower| lower.min(actual));
        let (held, let_go) = known.map_or((None, None), |(before, held, let_go)| {
            (held, let_go.filter(|_| limit <= before))
        });
        let row = Row {
            policy,
            limit,
            // Only a limit above today's proves that a lower one was overtaken.
            release_at: actual.plus(Bytes(1)),
            reaction: reflex::reaction(&policy, limit),
            controls,
            held,
            let_go,
        };
        let result = watch(
            &row,
            &mut self.kernel.guards,
            cgroup,
            reflex::thresholds(&policy, limit),
        );
        self.table.insert(cgroup, row);
        if let Err(error) = result {
            self.tell(Verdict::Failed { cgroup, error });
        }
    }

    fn lower(&mut self, cgroup: CgroupId, to: Bytes) {
        let Some(row) = self.table.get_mut(&cgroup) else {
            return;
        };
        let at = Thresholds::of(to, row.policy.cpus);
        let verdict = match row.controls.current.get() {
            Ok(usage) if usage.bytes() <= at.watermark => match row.controls.max.set(Limit::At(to))
            {
                Ok(()) => {
                    row.limit = to;
                    row.release_at = to.plus(Bytes(1));
                    row.reaction = reflex::reaction(&row.policy, to);
                    let thresholds = reflex::thresholds(&row.policy, to);
                    watch(row, &mut self.kernel.guards, cgroup, thresholds)
                        .map(|()| Verdict::Lowered { cgroup, limit: to })
                }
                Err(_) => Ok(Verdict::LowerRefused { cgroup }),
            },
            Ok(_) => Ok(Verdict::LowerRefused { cgroup }),
            Err(error) => Err(error.to_string()),
        };
        self.tell(verdict.unwrap_or_else(|error| Verdict::Failed { cgroup, error }));
    }

    fn release(&mut self, cgroup: CgroupId, reason: Reason) {
        let Some(row) = self.table.get_mut(&cgroup).filter(|row| row.held.is_some()) else {
            return;
        };
        let verdict = thaw(row, &mut self.ledger, cgroup, reason);
        self.tell(verdict);
    }

    fn disarm(&mut self, cgroup: CgroupId) {
        self.kernel.guards.remove(cgroup);
        let Some(mut row) = self.table.remove(&cgroup) else {
            return;
        };
        let high = row.controls.high.set(Limit::Max);
        if row.held.is_some() {
            let verdict = thaw(&mut row, &mut self.ledger, cgroup, Reason::Ended);
            self.tell(verdict);
        }
        // Only now: a successor releases whatever was not forgotten.
        let forgotten = self.ledger.append(&Record::Forget { at: now(), cgroup });
        match high {
            Err(error) if !error.is_gone() => self.tell(Verdict::Failed {
                cgroup,
                error: error.to_string(),
            }),
            _ => {}
        }
        if let Err(error) = forgotten {
            self.tell(Verdict::Failed {
                cgroup,
                error: error.to_string(),
            });
        }
    }

    /// Lifts the hold of every cgroup whose limit somebody has raised, and of one that was held for
    /// longer than anybody may be, whatever the controller knows.
    fn look_after_held(&mut self) {
        let at = now();
        let mut verdicts = Vec::new();
        for (&cgroup, row) in &mut self.table {
            let Some(since) = row.held else {
                continue;
            };
            let limit = match row.controls.max.get() {
                Ok(limit) => limit.bytes(),
                Err(error) => {
                    verdicts.push(thaw(row, &mut self.ledger, cgroup, Reason::Ended));
                    verdicts.push(Verdict::Failed {
                        cgroup,
                        error: error.to_string(),
                    });
                    continue;
                }
            };
            if limit == row.limit {
                // The lower limit has come into force: any rise from here is the answer.
                row.release_at = limit.plus(Bytes(1));
            }
            if limit >= row.release_at {
                row.limit = limit;
                row.release_at = limit.plus(Bytes(1));
                row.reaction = reflex::reaction(&row.policy, limit);
                row.let_go = None;
                let thresholds = reflex::thresholds(&row.policy, limit);
                if let Err(error) = watch(row, &mut self.kernel.guards, cgroup, thresholds) {
                    verdicts.push(Verdict::Failed { cgroup, error });
                }
                verdicts.push(thaw(row, &mut self.ledger, cgroup, Reason::RaiseArrived));
                verdicts.push(Verdict::LimitRose { cgroup, limit });
            } else if at.since(since) >= HOLD_LIMIT {
                verdicts.push(thaw(row, &mut self.ledger, cgroup, Reason::HoldExpired));
            }
        }
        for verdict in verdicts {
            self.tell(verdict);
        }
    }
}

fn is_let_go(row: &Row) -> bool {
    row.let_go
        .is_some_and(|since| now().since(since) < LET_GO_FOR)
}

/// Moves watermark and brake to `thresholds`, or removes them.
///
/// A brake below usage (a limit full of page cache, for one) would reclaim here, on this thread: it is
/// left out then, and the watermark, which counts no cache, guards alone.
fn watch(
    row: &Row,
    guards: &mut Guards,
    cgroup: CgroupId,
    thresholds: Option<Thresholds>,
) -> Result<(), String> {
    let watermark = thresholds.map(|thresholds| thresholds.watermark);
    guards
        .set(cgroup, watermark)
        .map_err(|error: LoadError| error.to_string())?;
    let usage = row
        .controls
        .current
        .get()
        .map_err(|error| error.to_string())?
        .bytes();
    let braked = thresholds.filter(|thresholds| !is_let_go(row) && usage <= thresholds.high);
    let high = braked.map_or(Limit::Max, |thresholds| Limit::At(thresholds.high));
    row.controls
        .high
        .set(high)
        .map_err(|error| error.to_string())
}

fn climb(
    row: &mut Row,
    ledger: &mut Ledger,
    guards: &mut Guards,
    event: &MemoryEvent,
    demand: Bytes,
    rung: reflex::Rung,
) -> Result<Verdict, String> {
    let cgroup = CgroupId(event.cgroup_id);
    let action = Action::Raise {
        from: row.limit,
        to: rung.limit,
    };
    intend(ledger, cgroup, action, Reason::WatermarkReached, demand)?;
    row.controls
        .max
        .set(Limit::At(rung.limit))
        .map_err(|error| error.to_string())?;
    let at = now();
    row.limit = rung.limit;
    watch(row, guards, cgroup, rung.thresholds)?;
    Ok(Verdict::Raised {
        cgroup,
        event_at: Nanos(event.at_ns),
        at,
        limit: rung.limit,
    })
}

fn hold(
    row: &mut Row,
    ledger: &mut Ledger,
    cgroup: CgroupId,
    demand: Bytes,
) -> Result<Verdict, String> {
    intend(ledger, cgroup, Action::Hold, Reason::RaiseUnderWay, demand)?;
    row.controls
        .freeze
        .set_flag(true)
        .map_err(|error| error.to_string())?;
    let at = now();
    row.held = Some(at);
    Ok(Verdict::Held { cgroup, at })
}

/// Lifts a hold; one that expired with its brake, which would go on where the hold ended: the kernel
/// then decides as it would have. The writes come first: a ledger that cannot be written must not
/// keep a container frozen.
fn thaw(row: &mut Row, ledger: &mut Ledger, cgroup: CgroupId, reason: Reason) -> Verdict {
    let unbraked = if reason == Reason::HoldExpired {
        row.let_go = Some(now());
        row.controls.high.set(Limit::Max)
    } else {
        Ok(())
    };
    let thawed = row.controls.freeze.set_flag(false);
    row.held = None;
    let recorded = intend(ledger, cgroup, Action::Release, reason, Bytes::ZERO);
    match unbraked
        .and(thawed)
        .map_err(|error| error.to_string())
        .and(recorded)
    {
        Ok(()) => Verdict::Released { cgroup },
        Err(error) => Verdict::Failed { cgroup, error },
    }
}

fn intend(
    ledger: &mut Ledger,
    cgroup: CgroupId,
    action: Action,
    reason: Reason,
    demand: Bytes,
) -> Result<(), String> {
    let record = Record::Intend {
        at: now(),
        cgroup,
        action,
        reason,
        demand,
    };
    ledger
        .append(&record)
        .map_err(|error| format!("the ledger cannot be written, so nothing is done: {error}"))
}
