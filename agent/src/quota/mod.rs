//! CPU quotas: one thread that is woken by whoever is throttled, and raises; and by whatever begins that a policy
//! boosts, before it has counted its CPUs.
//!
//! It is not the reflex: a container that is throttled waits for some milliseconds more at worst, where one that is
//! out of memory is killed, and nothing here may keep the reflex from that. What is decided is core's
//! ([`bellows_core::cpu`]); what is written, and who is told of it, is the [`Setter`]'s.
//!
//! While all quotas are at rest nothing is looked at. Without the kernel's word counters are read every
//! [`WITHOUT_WORD`].
//!
//! It must not wait for a runtime or an API.

mod idle;
mod ready;
mod row;
#[cfg(test)]
mod tests;
mod tree;

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::Duration,
};

use bellows_core::{
    CgroupId, Cpu, Nanos, Reason,
    boost::{BoostRules, Boosts},
    cpu::CpuPolicy,
};

use thiserror::Error;

use crate::{
    attribution,
    cgroup::Cgroup,
    clock::now,
    metrics::METRICS,
    signal::{starts::Begun, throttles::Throttled, told::Told},
    wake::Wake,
};
use idle::Idle;
use row::{Executed, Row};

/// How often a raised quota is looked at.
const TICK: Duration = Duration::from_millis(100);
/// How often quotas at rest are looked at where the kernel does not tell.
const WITHOUT_WORD: Duration = Duration::from_millis(250);
/// How long who is throttled and not raised for it is left alone: it is throttled in each of its periods, on each CPU.
const IDLE_FOR: Nanos = Nanos::millis(50);
/// Programs and cgroups that are taken before others have their turn.
const STARTS_AT_ONCE: usize = 256;
const NEVER: Duration = Duration::from_secs(3600);

/// Why a quota was not set, for people. It is as it was.
#[derive(Debug, Error)]
pub enum NotSet {
    /// It is not ours: whoever watches the container says what becomes of it.
    #[error("somebody else has set it")]
    Foreign,
    /// What it would be raised to is what the pod says, and the kubelet carries that out or not.
    #[error("the kubelet has put a resize of its pod off")]
    PutOff,
    /// Something failed.
    #[error("{0}")]
    Failed(String),
}

impl From<String> for NotSet {
    fn from(why: String) -> Self {
        Self::Failed(why)
    }
}

/// Sets quotas that somebody else owns.
pub trait Setter: Send + 'static {
    /// The most that a quota may become now, beside what its policy says.
    fn most(&self, _cgroup: CgroupId) -> Option<Most> {
        None
    }

    /// Sets the quota of a cgroup at once, and sees to it that it stays. Must not block.
    ///
    /// # Errors
    ///
    /// [`NotSet`].
    fn set(&self, cgroup: &Cgroup, to: Cpu, reason: Reason) -> Result<(), NotSet>;

    /// A cgroup was seen with this quota, which is the one at rest, and nothing is lent to it: whatever was asked for is
    /// over. Must not block.
    fn rests(&self, cgroup: &Cgroup, at_rest: Cpu);

    /// Sees to it that the pod of a cgroup holds what that has. Must not block.
    ///
    /// # Errors
    ///
    /// Why it does not, for people.
    fn settle(&self, cgroup: &Cgroup) -> Result<(), String>;

    /// Takes note of the boosts of a cgroup, which have changed. Must not block.
    ///
    /// # Errors
    ///
    /// Why it could not, for people: nothing is to be lent then.
    fn boosted(&self, cgroup: &Cgroup, boosts: &Boosts) -> Result<(), String>;

    /// A cgroup was made, at this path below the root of the hierarchy. Must not block.
    fn created(&self, path: String);
}

/// The most that a quota may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Most {
    /// So much.
    pub cpu: Cpu,
    /// Whether more than that was refused: what has more comes down to it. Else it keeps what it has.
    pub is_refused: bool,
}

/// What the thread is told.
#[derive(Debug)]
enum Command {
    Watch(Box<Watched>),
    Rules(CgroupId, Rules),
    Look(CgroupId),
    Forget(CgroupId),
    Stop,
}

/// The rules for one container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// For its quota; `None` where it has none.
    pub cpu: Option<CpuPolicy>,
    /// What it may be lent.
    pub boosts: Arc<[BoostRules]>,
    /// Whether it is made, and its runtime has not started it yet.
    pub is_starting: bool,
    /// Whether it is ready, where somebody else finds that out; `None` where it is asked itself.
    pub is_ready: Option<bool>,
}

/// A cgroup whose quota is moved.
#[derive(Debug)]
pub struct Watched {
    /// The cgroup.
    pub cgroup: Cgroup,
    /// Its rules.
    pub rules: Rules,
    /// Boosts that a predecessor has begun.
    pub boosts: Boosts,
    /// Whether its start is still to be boosted: what is to come of it, or what was missed of late.
    pub is_expected: bool,
    /// The one above that has a quota of its own: who is throttled by it is throttled too.
    pub pod: Option<CgroupId>,
}

/// A handle on the running thread.
#[derive(Clone, Debug)]
pub struct Quotas {
    commands: mpsc::Sender<Command>,
    wake: Wake,
    thread: Arc<Mutex<Option<thread::JoinHandle<()>>>>,
}

impl Quotas {
    /// Starts the thread, which runs until it is stopped.
    ///
    /// # Errors
    ///
    /// When a thread or an eventfd cannot be had.
    pub fn start(
        (throttles, starts): (Option<Told<Throttled>>, Option<Told<Begun>>),
        setter: impl Setter,
        cpus: u64,
        root: PathBuf,
    ) -> io::Result<Self> {
        let (commands, receiver) = mpsc::channel();
        let wake = Wake::new()?;
        let worker = Worker {
            throttles,
            starts,
            setter,
            commands: receiver,
            wake: wake.clone(),
            table: BTreeMap::new(),
            idle: Idle::new(root, cpus),
            sees_processes: attribution::sees_processes(),
            ticked: Nanos(0),
        };
        let thread = thread::Builder::new()
            .name("quotas".to_owned())
            .spawn(move || worker.run())?;
        Ok(Self {
            commands,
            wake,
            thread: Arc::new(Mutex::new(Some(thread))),
        })
    }

    fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            tracing::error!("the quotas thread has ended");
            return;
        }
        self.wake.give();
    }

    /// Ends the thread: no quota is moved any more. All stay as they are.
    pub fn stop(&self) {
        self.send(Command::Stop);
        let thread = self
            .thread
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the quotas thread has panicked");
        }
    }

    /// Moves a cgroup's quota from now on.
    pub fn watch(&self, watched: Watched) {
        self.send(Command::Watch(Box::new(watched)));
    }

    /// Gives it other rules.
    pub fn rules(&self, cgroup: CgroupId, rules: Rules) {
        self.send(Command::Rules(cgroup, rules));
    }

    /// Looks at it: somebody else may have set its quota, or is about to.
    pub fn look(&self, cgroup: CgroupId) {
        self.send(Command::Look(cgroup));
    }

    /// Leaves it alone; its quota stays.
    pub fn forget(&self, cgroup: CgroupId) {
        self.send(Command::Forget(cgroup));
    }
}

struct Worker<S> {
    throttles: Option<Told<Throttled>>,
    starts: Option<Told<Begun>>,
    setter: S,
    commands: mpsc::Receiver<Command>,
    wake: Wake,
    table: BTreeMap<CgroupId, Row>,
    idle: Idle,
    sees_processes: bool,
    ticked: Nanos,
}

impl<S: Setter> Worker<S> {
    fn run(mut self) {
        loop {
            let tick = self.tick();
            self.wait(tick);
            if !self.take_commands() {
                return;
            }
            self.take_starts();
            self.take_throttles();
            if now().since(self.ticked) >= Nanos(nanos(tick)) {
                self.ticked = now();
                self.look_at_all();
            }
        }
    }

    fn tick(&self) -> Duration {
        if self.table.values().any(Row::is_active) {
            TICK
        } else if self.throttles.is_none() && !self.table.is_empty() {
            WITHOUT_WORD
        } else {
            NEVER
        }
    }

    fn wait(&self, tick: Duration) {
        let passed = Duration::from_nanos(now().since(self.ticked).0);
        let rest = tick.saturating_sub(passed);
        let throttles = self.throttles.as_ref().map(Told::as_fd);
        let starts = self.starts.as_ref().map(Told::as_fd);
        self.wake.wait([throttles, starts], rest);
    }

    /// Returns whether to go on.
    fn take_commands(&mut self) -> bool {
        if !self.wake.take() {
            return true;
        }
        loop {
            match self.commands.try_recv() {
                Ok(Command::Watch(watched)) => self.watch(*watched),
                Ok(Command::Rules(cgroup, rules)) => {
                    if let Some(row) = self.table.get_mut(&cgroup) {
                        row.rules = rules;
                        row.foreign = None;
                        self.look_at(cgroup, false);
                    }
                }
                Ok(Command::Look(cgroup)) => {
                    if let Some(row) = self.table.get_mut(&cgroup) {
                        row.foreign = None;
                    }
                    self.look_at(cgroup, false);
                }
                Ok(Command::Forget(cgroup)) => self.forget(cgroup),
                Ok(Command::Stop) => return false,
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn watch(&mut self, watched: Watched) {
        let row = Row::new(watched, now(), self.sees_processes);
        let id = row.cgroup.id();
        self.table.insert(id, row);
        self.look_at(id, false);
    }

    fn forget(&mut self, id: CgroupId) {
        self.tell_no_more_of(id);
        let row = self.table.remove(&id);
        let are_told = row.is_some_and(|row| row.are_programs_told);
        if let (Some(starts), true) = (&mut self.starts, are_told) {
            starts.forget(id);
        }
    }

    /// Has the kernel tell no more of a cgroup's throttling.
    fn tell_no_more_of(&mut self, id: CgroupId) {
        let Some(row) = self.table.get_mut(&id) else {
            return;
        };
        let mut told = row.take_told();
        let pod = row.pod.filter(|_| !told.is_empty());
        let mut others = self.table.values();
        let is_shared = others.any(|other| other.pod == pod && other.is_throttle_told);
        told.extend(pod.filter(|_| !is_shared));
        if let Some(throttles) = &mut self.throttles {
            told.into_iter().for_each(|id| throttles.forget(id));
        }
    }

    /// Has the kernel tell of what is needed of a cgroup, and of no more: each program that is executed would wake.
    fn tell_of(
        row: &mut Row,
        throttles: Option<&mut Told<Throttled>>,
        starts: Option<&mut Told<Begun>>,
    ) {
        let id = row.cgroup.id();
        let untold = if row.needs_throttles() {
            row.untold()
        } else {
            Vec::new()
        };
        let path = row.cgroup.path().display();
        if let Some(throttles) = throttles {
            for id in untold {
                if let Err(error) = throttles.watch(id) {
                    tracing::warn!(%path, %error, "a container's throttling is not told");
                }
            }
        }
        let Some(starts) = starts else {
            return;
        };
        match (row.needs_programs(), row.are_programs_told) {
            (true, false) => match starts.watch(id) {
                Ok(()) => row.are_programs_told = true,
                Err(error) => {
                    tracing::warn!(%path, %error, "a container's programs are not told");
                }
            },
            (false, true) => {
                starts.forget(id);
                row.are_programs_told = false;
            }
            (true, true) | (false, false) => {}
        }
    }

    /// Takes what has begun, some of it at a time: where much is executed, others are waited for, too.
    fn take_starts(&mut self) {
        let mut programs = BTreeMap::<CgroupId, Vec<Executed>>::new();
        for _ in 0..STARTS_AT_ONCE {
            match self.starts.as_mut().and_then(Told::take) {
                None => break,
                Some(Begun::Cgroup(path)) => self.setter.created(path),
                Some(Begun::Program {
                    cgroup,
                    process,
                    file,
                    at,
                }) => programs
                    .entry(cgroup)
                    .or_default()
                    .push(Executed { process, file, at }),
            }
        }
        for (id, executed) in programs {
            self.executed(id, &executed);
        }
    }

    /// Programs were executed. They are about to count their CPUs, so what is there already is set again, too: a
    /// runtime may have written a quota over it.
    fn executed(&mut self, id: CgroupId, executed: &[Executed]) {
        let Some(row) = self.table.get_mut(&id) else {
            return;
        };
        if !executed.iter().any(|executed| row.is_concerned(executed)) {
            return;
        }
        let at = now();
        if let Err(error) = row.look(at) {
            tracing::debug!(path = %row.cgroup.path().display(), %error, "a program has begun and ended");
            return;
        }
        for executed in executed {
            row.execute(executed);
        }
        self.act(id, at, false);
    }

    fn take_throttles(&mut self) {
        let mut throttled = BTreeMap::new();
        while let Some(Throttled { cgroup, at }) = self.throttles.as_mut().and_then(Told::take) {
            throttled.insert(cgroup, at);
        }
        self.are_throttled(&throttled);
    }

    /// These cgroups are throttled.
    fn are_throttled(&mut self, throttled: &BTreeMap<CgroupId, Nanos>) {
        let meant = self.table.iter().filter_map(|(&id, row)| {
            let inner = row.inner.and_then(|inner| throttled.get(&inner));
            let own = throttled.get(&id).or(inner);
            let by_pod = row.pod.and_then(|pod| throttled.get(&pod));
            Some((id, *own.or(by_pod)?, by_pod.is_some()))
        });
        let meant: Vec<(CgroupId, Nanos, bool)> = meant.collect();
        for (id, at, by_pod) in meant {
            if let Some(row) = self.table.get_mut(&id) {
                row.history.throttled(at);
                if at < row.idle_until {
                    continue;
                }
                // systemd may have set its own again.
                if by_pod {
                    row.went(self.setter.settle(&row.cgroup));
                }
            }
            self.look_at(id, true);
        }
    }

    fn look_at_all(&mut self) {
        let has_word = self.throttles.is_some();
        let all = self.table.iter();
        let active = all.filter(|(_, row)| row.is_active() || !has_word);
        let active: BTreeSet<CgroupId> = active.map(|(&id, _)| id).collect();
        for id in active {
            self.look_at(id, false);
        }
    }

    /// Looks at a cgroup, decides, and has it carried out.
    fn look_at(&mut self, id: CgroupId, is_told: bool) {
        let has_word = self.throttles.is_some();
        let Some(row) = self.table.get_mut(&id) else {
            return;
        };
        let at = now();
        let has_counted = match row.look(at) {
            Ok(has_counted) => has_counted,
            Err(error) if error.is_gone() => return self.forget(id),
            Err(error) => return row.went(Err(error.to_string())),
        };
        // Where the kernel tells, its counters say later what was answered already.
        let is_throttled = is_told || (has_counted && !has_word);
        self.act(id, at, is_throttled);
    }

    /// Begins and ends boosts of a cgroup that was looked at, decides, and has it carried out.
    fn act(&mut self, id: CgroupId, at: Nanos, is_throttled: bool) {
        let Some(row) = self.table.get_mut(&id) else {
            return;
        };
        row.start(at);
        row.end_boosts(at);
        row.ask(&self.wake);
        row.note(&self.setter);
        Self::tell_of(row, self.throttles.as_mut(), self.starts.as_mut());
        if !row.needs_throttles() {
            self.tell_no_more_of(id);
        }
        let Some(row) = self.table.get_mut(&id) else {
            return;
        };
        if is_throttled {
            row.idle_until = Nanos(at.0.saturating_add(IDLE_FOR.0));
        }
        if let Some(at_rest) = row.rests() {
            self.setter.rests(&row.cgroup, at_rest);
        }
        if row.is_foreign() {
            return;
        }
        let decided = row.decide(at, is_throttled, self.idle.look(at));
        let (Some(policy), true) = (row.rules.cpu, decided.is_some() || row.is_raised()) else {
            return;
        };
        let most = self.setter.most(id);
        let Some((to, reason)) = allowed(decided, policy.at_rest, row.quota, most) else {
            return;
        };
        let set = self.setter.set(&row.cgroup, to, reason);
        match set {
            Ok(()) => {
                let is_raise = row.quota.is_none_or(|before| to > before);
                METRICS.moved("cpu", is_raise);
                self.idle.give(row.quota.unwrap_or(to), to);
                row.quota = Some(to);
                row.idle_until = Nanos(0);
            }
            Err(NotSet::Foreign | NotSet::PutOff) => row.foreign = row.quota,
            Err(NotSet::Failed(_)) => {}
        }
        row.went(set.map_err(|why| why.to_string()));
    }
}

/// As much of a raise as is allowed, in whole hundredths; `None` where that is none of it. Who is lowered is not kept from
/// it, and who has what was refused is lowered.
fn allowed(
    decided: Option<(Cpu, Reason)>,
    at_rest: Cpu,
    before: Option<Cpu>,
    most: Option<Most>,
) -> Option<(Cpu, Reason)> {
    let Some(Most { cpu, is_refused }) = most else {
        return decided;
    };
    let wanted = decided.map(|(to, _)| to).or(before)?;
    let refused = cpu.max(at_rest);
    if is_refused && refused < wanted && before.is_some_and(|before| refused < before) {
        return Some((refused, Reason::Refused));
    }
    let (to, reason) = decided?;
    let is_raise = before.is_none_or(|before| to > before);
    if !is_raise || to <= cpu {
        return decided;
    }
    let to = cpu.round_down_percent();
    before
        .is_none_or(|before| to > before)
        .then_some((to, reason))
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
