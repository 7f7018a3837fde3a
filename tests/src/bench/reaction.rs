//! `reaction`: how long from a crossing of the watermark, by the kernel's clock, until the limit is
//! written, and how much of that is ours.
//!
//! What nobody can go below is the floor: the same event from the same program, a thread of the same
//! priority that waits for nothing else, and one write. It has programs and a cgroup of its own and takes
//! turns with the reflex within one run, idle and with a spinning thread for every CPU, so that the
//! machine's own delays are in both.

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, Receiver, Sender},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bellows::{
    actuate::reflex::{Arm, Command, Controls, Reflex, Verdict},
    cgroup::{Cgroup, Control, Limit},
    clock::now,
    ledger::Ledger,
    machine, priority,
    signal::{
        programs::{Kernel, Purpose, Reflexes, memory_event},
        source::Source,
    },
};
use bellows_core::{
    Actuation, Bytes, Nanos, Patience, Policy, Signals, Thresholds, WHOLE, Watermark,
};
use clap::Args;
use rustix::event::{PollFd, PollFlags, poll};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{
    inside::{self, Touched},
    record::{Records, parsed, percentile, rounded},
    runner::set_thp,
};

#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Crossings of each kind.
    #[arg(long, default_value_t = 300)]
    n: u64,
    /// Seed of the order.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Who answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Variant {
    Reflex,
    Floor,
}

/// One crossing.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Record {
    index: u64,
    seed: u64,
    variant: Variant,
    /// Whether every CPU had a thread spinning on it.
    busy: bool,
    /// Kernel time of the crossing, `CLOCK_MONOTONIC` nanoseconds.
    crossed_ns: u64,
    /// When the limit was written.
    written_ns: u64,
}

impl Record {
    fn micros(&self) -> f64 {
        (self.written_ns - self.crossed_ns) as f64 / 1000.0
    }
}

/// The limit that is crossed.
const LIMIT: Bytes = Bytes::mib(64);
/// What is in use all the time; the rest of the way to the watermark is gone again and again.
const RESTING: Bytes = Bytes::mib(52);
/// The limit that the first raise from 64 MiB goes to, for the floor to write.
const RAISED: Bytes = Bytes::mib(137);
const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) fn run(options: &Options, records: &mut Records) -> Result<()> {
    set_thp(false)?;
    let mut reflex = WithReflex::start()?;
    let mut floor = Floor::start()?;
    let mut random = fastrand::Rng::with_seed(options.seed);
    for busy in [false, true] {
        let _spinners = busy.then(Spinners::start);
        for index in 0..options.n {
            let mut order = [Variant::Reflex, Variant::Floor];
            random.shuffle(&mut order);
            for variant in order {
                let (crossed, written) = match variant {
                    Variant::Reflex => reflex.cross(),
                    Variant::Floor => floor.cross(),
                }
                .with_context(|| format!("crossing {index} of the {variant:?}"))?;
                records.write(&Record {
                    index,
                    seed: options.seed,
                    variant,
                    busy,
                    crossed_ns: crossed.0,
                    written_ns: written.0,
                })?;
            }
        }
        eprintln!("case busy {busy}: {} crossings of each", options.n);
    }
    floor.stop();
    reflex.reflex.stop();
    Ok(())
}

fn policy() -> Result<Policy> {
    let cpus = thread::available_parallelism()?.get();
    let policy = Policy {
        original: LIMIT,
        ceiling: LIMIT.scaled(8, 1),
        actuation: Actuation::Direct,
        signals: Signals::Programs,
        patience: Patience::UNPROBED,
        cpus: u64::try_from(cpus)?,
        shrink_after: Nanos::millis(2000),
        usable_per_mille: WHOLE,
        by_hand_after: None,
        priority: 0,
        parallelism: bellows_core::elastic::Parallelism::Unchanged,
        learnt: None,
    };
    Ok(policy.validate(machine::pages(1))?)
}

/// A cgroup that is filled nearly to its watermark.
struct Filled {
    cgroup: Cgroup,
    watermark: Bytes,
    _resting: Touched,
}

impl Filled {
    fn new(name: &str) -> Result<Self> {
        let cgroup = inside::create(name)?;
        cgroup.set_limit("memory.max", Limit::At(LIMIT))?;
        let resting = Touched::start(&cgroup, RESTING)?;
        Ok(Self {
            cgroup,
            watermark: Thresholds::of(LIMIT, policy()?.cpus, Signals::Programs).watermark,
            _resting: resting,
        })
    }

    /// Crosses the watermark by what two processes use beside what they touch; gives it back when the
    /// result is dropped.
    fn cross(&self) -> Result<Touched> {
        Touched::start(&self.cgroup, self.watermark.minus(RESTING))
    }
}

/// The reflex thread as it is, armed for direct raises.
struct WithReflex {
    filled: Filled,
    reflex: Reflex,
    verdicts: Receiver<Verdict>,
    /// The programs stay attached for as long as this lives.
    _kernel: Kernel,
}

impl WithReflex {
    fn start() -> Result<Self> {
        let filled = Filled::new("reaction-reflex")?;
        let (mut kernel, reflexes) = Kernel::load(Purpose::Guard)?;
        kernel.track(filled.cgroup.id())?;
        let ledger = Ledger::open(Path::new("/run/bellows/reaction.ledger"))?;
        let (sender, verdicts) = mpsc::channel();
        let sink = Box::new(move |verdict| sender.send(verdict).is_ok());
        let reflex = Reflex::start(Source::Programs(Box::new(reflexes)), ledger, sink)?;
        reflex.send(Command::Arm(Box::new(Arm {
            cgroup: filled.cgroup.id(),
            policy: policy()?,
            lowering: None,
            controls: Some(Controls::open(&filled.cgroup)?),
        })));
        Ok(Self {
            filled,
            reflex,
            verdicts,
            _kernel: kernel,
        })
    }

    fn cross(&mut self) -> Result<(Nanos, Nanos)> {
        let over = self.filled.cross()?;
        let answered = self.verdict(|verdict| match verdict {
            Verdict::Raised { event_at, at, .. } => Some((event_at, at)),
            _ => None,
        });
        drop(over);
        let answered = answered?;
        let start = Instant::now();
        loop {
            ensure!(start.elapsed() < PATIENCE, "the limit cannot be lowered");
            let lower = Command::Lower(self.filled.cgroup.id(), LIMIT);
            self.reflex.send(lower);
            let lowered = self.verdict(|verdict| match verdict {
                Verdict::Lowered { .. } => Some(true),
                Verdict::LowerRefused { .. } => Some(false),
                _ => None,
            })?;
            if lowered {
                return Ok(answered);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// The next verdict that is looked for.
    fn verdict<T>(&self, pick: impl Fn(Verdict) -> Option<T>) -> Result<T> {
        let start = Instant::now();
        while start.elapsed() < PATIENCE {
            match self.verdicts.recv_timeout(PATIENCE)? {
                Verdict::Failed { error, .. } => bail!("the reflex failed: {error}"),
                verdict => {
                    if let Some(picked) = pick(verdict) {
                        return Ok(picked);
                    }
                }
            }
        }
        bail!("no verdict within {} s", PATIENCE.as_secs())
    }
}

/// A thread that waits for an event, writes once and looks at the clock.
struct Floor {
    filled: Filled,
    /// Set for the crossing that is to be answered; the events that follow it are not.
    is_armed: Arc<AtomicBool>,
    is_over: Arc<AtomicBool>,
    answers: Receiver<(Nanos, Nanos)>,
    thread: thread::JoinHandle<Result<()>>,
    _kernel: Kernel,
}

impl Floor {
    fn start() -> Result<Self> {
        let filled = Filled::new("reaction-floor")?;
        let (mut kernel, mut reflexes) = Kernel::load(Purpose::Guard)?;
        let id = filled.cgroup.id();
        kernel.track(id)?;
        reflexes
            .guards
            .set(id, Some(Watermark::alike(filled.watermark)))?;
        let max = Control::open(&filled.cgroup, "memory.max")?;
        let (is_armed, is_over) = (Arc::default(), Arc::default());
        let (sender, answers) = mpsc::channel();
        let (armed, over) = (Arc::clone(&is_armed), Arc::clone(&is_over));
        let thread = thread::spawn(move || wait_and_write(reflexes, &max, &armed, &over, &sender));
        Ok(Self {
            filled,
            is_armed,
            is_over,
            answers,
            thread,
            _kernel: kernel,
        })
    }

    fn cross(&mut self) -> Result<(Nanos, Nanos)> {
        self.is_armed.store(true, Ordering::SeqCst);
        let over = self.filled.cross()?;
        let answered = self.answers.recv_timeout(PATIENCE);
        drop(over);
        self.filled
            .cgroup
            .set_limit("memory.max", Limit::At(LIMIT))?;
        Ok(answered?)
    }

    fn stop(self) {
        self.is_over.store(true, Ordering::SeqCst);
        if let Ok(Err(error)) = self.thread.join() {
            eprintln!("the floor's thread failed: {error:#}");
        }
    }
}

fn wait_and_write(
    mut reflexes: Reflexes,
    max: &Control,
    is_armed: &AtomicBool,
    is_over: &AtomicBool,
    answers: &Sender<(Nanos, Nanos)>,
) -> Result<()> {
    priority::try_real_time(priority::REFLEX)?;
    let timeout = rustix::time::Timespec {
        tv_sec: 1,
        tv_nsec: 0,
    };
    while !is_over.load(Ordering::SeqCst) {
        poll(
            &mut [PollFd::new(&reflexes.ring, PollFlags::IN)],
            Some(&timeout),
        )?;
        while let Some(event) = reflexes.ring.next().map(|item| memory_event(&item)) {
            if is_armed.swap(false, Ordering::SeqCst) {
                max.set(Limit::At(RAISED))?;
                let at = now();
                let event = event.context("an event of unknown size")?;
                answers.send((Nanos(event.at_ns), at))?;
            }
        }
    }
    Ok(())
}

/// A thread for every CPU that never rests, until dropped.
struct Spinners {
    is_over: Arc<AtomicBool>,
    threads: Vec<thread::JoinHandle<()>>,
}

impl Spinners {
    fn start() -> Self {
        let is_over = Arc::new(AtomicBool::new(false));
        let count = thread::available_parallelism().map_or(1, usize::from);
        let threads = (0..count)
            .map(|_| {
                let is_over = Arc::clone(&is_over);
                thread::spawn(move || {
                    while !is_over.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                })
            })
            .collect();
        Self { is_over, threads }
    }
}

impl Drop for Spinners {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // One that panicked has ended.
            drop(thread.join());
        }
    }
}

pub(crate) fn summarize(records: &[Value]) -> Result<Value> {
    let records: Vec<Record> = parsed(records)?;
    let micros = |variant, busy, percent| {
        let of: Vec<f64> = records
            .iter()
            .filter(|record| record.variant == variant && record.busy == busy)
            .map(Record::micros)
            .collect();
        percentile(&of, percent)
    };
    let mut summary = json!({ "crossings": records.len() });
    for (busy, suffix) in [(false, ""), (true, "_busy")] {
        for (percent, name) in [(50.0, "p50"), (99.0, "p99")] {
            let reflex = micros(Variant::Reflex, busy, percent);
            let floor = micros(Variant::Floor, busy, percent);
            summary[format!("{name}_ratio{suffix}")] = json!(rounded(reflex / floor));
            summary[format!("{name}_us{suffix}")] = json!(rounded(reflex));
            summary[format!("{name}_us_floor{suffix}")] = json!(rounded(floor));
        }
    }
    Ok(summary)
}
