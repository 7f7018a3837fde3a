//! CPU quotas: one thread that is woken by whoever is throttled, and raises.
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

use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    path::PathBuf,
    sync::mpsc,
    thread,
    time::Duration,
};

use bellows_core::{
    CgroupId, Cpu, Nanos, Reason,
    cpu::{CpuHistory, CpuPolicy, CpuSnapshot, decide},
};

use crate::{
    cgroup::{Cgroup, CgroupError},
    clock::now,
    signal::throttles::Throttles,
    wake::Wake,
};
use idle::Idle;

/// How often a raised quota is looked at.
const TICK: Duration = Duration::from_millis(100);
/// How often quotas at rest are looked at where the kernel does not tell.
const WITHOUT_WORD: Duration = Duration::from_millis(250);
const NEVER: Duration = Duration::from_secs(3600);

/// Sets quotas that somebody else owns.
pub trait Setter: Send + 'static {
    /// Sets the quota of a cgroup at once, and sees to it that it stays. Must not block.
    ///
    /// # Errors
    ///
    /// Why not, for people. The quota is as it was.
    fn set(&self, cgroup: &Cgroup, to: Cpu, reason: Reason) -> Result<(), String>;

    /// Sees to it that the pod of a cgroup holds what that has. Must not block.
    ///
    /// # Errors
    ///
    /// Why it does not, for people.
    fn settle(&self, cgroup: &Cgroup) -> Result<(), String>;
}

/// What the thread is told.
#[derive(Debug)]
enum Command {
    Watch(Box<Watched>),
    Policy(CgroupId, CpuPolicy),
    Forget(CgroupId),
}

/// A cgroup whose quota is moved.
#[derive(Debug)]
pub struct Watched {
    /// The cgroup.
    pub cgroup: Cgroup,
    /// Its rules.
    pub policy: CpuPolicy,
    /// The one above that has a quota of its own: who is throttled by it is throttled too.
    pub pod: Option<CgroupId>,
}

/// A handle on the running thread.
#[derive(Clone, Debug)]
pub struct Quotas {
    commands: mpsc::Sender<Command>,
    wake: Wake,
}

impl Quotas {
    /// Starts the thread, which runs until the process ends.
    ///
    /// # Errors
    ///
    /// When a thread or an eventfd cannot be had.
    pub fn start(
        throttles: Option<Throttles>,
        setter: impl Setter,
        cpus: u64,
        root: PathBuf,
    ) -> io::Result<Self> {
        let (commands, receiver) = mpsc::channel();
        let wake = Wake::new()?;
        let worker = Worker {
            throttles,
            setter,
            commands: receiver,
            wake: wake.clone(),
            table: BTreeMap::new(),
            idle: Idle::new(root, cpus),
            ticked: Nanos(0),
        };
        thread::Builder::new()
            .name("quotas".to_owned())
            .spawn(move || worker.run())?;
        Ok(Self { commands, wake })
    }

    fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            tracing::error!("the quotas thread has ended");
            return;
        }
        self.wake.give();
    }

    /// Moves a cgroup's quota from now on.
    pub fn watch(&self, watched: Watched) {
        self.send(Command::Watch(Box::new(watched)));
    }

    /// Gives it other rules.
    pub fn policy(&self, cgroup: CgroupId, policy: CpuPolicy) {
        self.send(Command::Policy(cgroup, policy));
    }

    /// Leaves it alone; its quota stays.
    pub fn forget(&self, cgroup: CgroupId) {
        self.send(Command::Forget(cgroup));
    }
}

/// One cgroup.
struct Row {
    cgroup: Cgroup,
    policy: CpuPolicy,
    pod: Option<CgroupId>,
    history: CpuHistory,
    /// As last read.
    quota: Cpu,
    /// Periods that were throttled, as last read.
    throttled: u64,
    /// What failed last: told once.
    failure: Option<String>,
}

struct Worker<S> {
    throttles: Option<Throttles>,
    setter: S,
    commands: mpsc::Receiver<Command>,
    wake: Wake,
    table: BTreeMap<CgroupId, Row>,
    idle: Idle,
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
        let ring = self.throttles.as_ref().map(Throttles::as_fd);
        self.wake.wait(ring, rest);
    }

    /// Returns whether to go on.
    fn take_commands(&mut self) -> bool {
        if !self.wake.take() {
            return true;
        }
        loop {
            match self.commands.try_recv() {
                Ok(Command::Watch(watched)) => self.watch(*watched),
                Ok(Command::Policy(cgroup, policy)) => {
                    if let Some(row) = self.table.get_mut(&cgroup) {
                        row.policy = policy;
                        self.look_at(cgroup, false);
                    }
                }
                Ok(Command::Forget(cgroup)) => self.forget(cgroup),
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn watch(&mut self, watched: Watched) {
        let Watched {
            cgroup,
            policy,
            pod,
        } = watched;
        let id = cgroup.id();
        if let Some(throttles) = &mut self.throttles {
            for id in [Some(id), pod].into_iter().flatten() {
                if let Err(error) = throttles.watch(id) {
                    tracing::warn!(path = %cgroup.path().display(), %error, "a container's throttling is not told");
                }
            }
        }
        let row = Row {
            cgroup,
            policy,
            pod,
            history: CpuHistory::default(),
            quota: policy.at_rest,
            throttled: 0,
            failure: None,
        };
        self.table.insert(id, row);
        self.look_at(id, false);
    }

    fn forget(&mut self, id: CgroupId) {
        let Some(row) = self.table.remove(&id) else {
            return;
        };
        let Some(throttles) = &mut self.throttles else {
            return;
        };
        throttles.forget(id);
        let is_shared = self.table.values().any(|other| other.pod == row.pod);
        if let Some(pod) = row.pod.filter(|_| !is_shared) {
            throttles.forget(pod);
        }
    }

    fn take_throttles(&mut self) {
        let mut throttled = BTreeMap::new();
        while let Some((cgroup, at)) = self.throttles.as_mut().and_then(Throttles::take) {
            throttled.insert(cgroup, at);
        }
        let meant = self.table.iter().filter_map(|(&id, row)| {
            let own = throttled.get(&id);
            let by_pod = row.pod.and_then(|pod| throttled.get(&pod));
            Some((id, *own.or(by_pod)?, by_pod.is_some()))
        });
        let meant: Vec<(CgroupId, Nanos, bool)> = meant.collect();
        for (id, at, by_pod) in meant {
            if let Some(row) = self.table.get_mut(&id) {
                row.history.throttled(at);
                // systemd may have set its own again.
                if by_pod && let Err(why) = self.setter.settle(&row.cgroup) {
                    row.failed(why);
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
            Err(error) => return row.failed(error.to_string()),
        };
        let decided = decide(&CpuSnapshot {
            now: at,
            policy: row.policy,
            history: row.history,
            quota: row.quota,
            // Where the kernel tells, its counters say later what was answered already.
            is_throttled: is_told || (has_counted && !has_word),
            idle: self.idle.look(at),
        });
        let Some((to, reason)) = decided else {
            return;
        };
        match self.setter.set(&row.cgroup, to, reason) {
            Ok(()) => {
                self.idle.give(row.quota, to);
                row.quota = to;
                row.failure = None;
            }
            Err(why) => row.failed(why),
        }
    }
}

impl Row {
    fn is_active(&self) -> bool {
        self.quota != self.policy.at_rest
    }

    /// Reads counters and quota; returns whether a throttled period was counted.
    fn look(&mut self, at: Nanos) -> Result<bool, CgroupError> {
        let counters = self.cgroup.cpu_counters()?;
        self.history.look(at, counters);
        // Without a quota there is nothing to raise or to lower.
        let quota = self.cgroup.quota()?;
        self.quota = quota.map_or(self.policy.at_rest, |quota| quota.cpu);
        let before = std::mem::replace(&mut self.throttled, counters.throttled);
        Ok(counters.throttled > before)
    }

    fn failed(&mut self, why: String) {
        if self.failure.as_ref() != Some(&why) {
            tracing::warn!(path = %self.cgroup.path().display(), why, "a CPU quota is not moved");
            self.failure = Some(why);
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
