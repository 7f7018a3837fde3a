//! One container: its quota as it was last seen, and the boosts that it has.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read as _,
    os::fd::OwnedFd,
};

use bellows_core::{
    CgroupId, Cpu, Nanos, Reason,
    boost::{BoostRules, Boosts, Load, Ready, Trigger},
    cpu::{CpuHistory, CpuSnapshot, SHORTEST_LOOK, decide},
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    process::{Pid, PidfdFlags, pidfd_open},
};

use super::{
    Rules, Setter, Watched,
    ready::Probe,
    tree::{Tree, living},
};
use crate::{
    cgroup::{Cgroup, CgroupError, quota::Quota},
    wake::Wake,
};

/// What a container without a CPU limit may use and still be idle.
const IDLE: Cpu = Cpu::millis(100);
/// The share of the time in which one of its threads waits for a CPU, from which on a container is short of them.
const WAITING_PER_MILLE: u64 = 200;
/// How often is looked what has come of a program: a build executes hundreds a second.
const TREES: Nanos = Nanos::millis(50);
/// Arguments of a program that are looked at.
const ARGUMENTS: u64 = 64 << 10;
/// A program that was executed.
pub(super) struct Executed {
    pub(super) process: u32,
    pub(super) file: String,
    pub(super) at: Nanos,
}

pub(super) struct Row {
    pub(super) cgroup: Cgroup,
    pub(super) rules: Rules,
    pub(super) pod: Option<CgroupId>,
    /// Its runtime's second cgroup, which has the same quota and is throttled in its place; known once it is told of.
    pub(super) inner: Option<CgroupId>,
    pub(super) history: CpuHistory,
    /// As last read; `None` where there is no limit (yet).
    pub(super) quota: Option<Cpu>,
    /// The same when it turned out to be somebody else's to move: nothing is done before somebody is told to look.
    pub(super) foreign: Option<Cpu>,
    /// Periods that were throttled, as last read.
    throttled: u64,
    pub(super) boosts: Boosts,
    /// Its boosts as they are written down.
    noted: Boosts,
    /// Whether its start is still to come.
    is_expected: bool,
    pub(super) is_throttle_told: bool,
    /// Until then nothing is done about its being throttled.
    pub(super) idle_until: Nanos,
    pub(super) are_programs_told: bool,
    /// Time for which its threads had waited for a CPU, and when that was looked at.
    waited: Option<(Nanos, Nanos)>,
    is_waiting: bool,
    /// The processes that boosts are for.
    processes: BTreeMap<u32, OwnedFd>,
    /// Whether the kernel's numbers of processes mean anything here.
    sees_processes: bool,
    /// When was looked what has come of them.
    trees_looked: Nanos,
    /// What has come of them.
    trees: BTreeMap<u32, Tree>,
    /// Who asks whether the service is ready, and where.
    probe: Option<(Ready, Probe)>,
    /// What failed last: told once.
    failure: Option<String>,
}

impl Row {
    pub(super) fn new(watched: Watched, at: Nanos, sees_processes: bool) -> Self {
        let Watched {
            cgroup,
            rules,
            pod,
            boosts,
            is_expected,
        } = watched;
        let mut row = Self {
            cgroup,
            rules,
            pod,
            inner: None,
            history: CpuHistory::default(),
            quota: None,
            foreign: None,
            throttled: 0,
            noted: boosts.clone(),
            boosts,
            is_expected,
            is_throttle_told: false,
            idle_until: Nanos(0),
            are_programs_told: false,
            waited: None,
            is_waiting: false,
            processes: BTreeMap::new(),
            sees_processes,
            trees_looked: Nanos(0),
            trees: BTreeMap::new(),
            probe: None,
            failure: None,
        };
        row.boosts.adopt(at);
        let left: Vec<u32> = row.boosts.processes().collect();
        row.follow(&left, at);
        row
    }

    /// Its quota, if that is the one at rest and nothing is lent to it.
    pub(super) fn rests(&self) -> Option<Cpu> {
        let at_rest = self.rules.cpu.map(|cpu| cpu.at_rest);
        let is_lent = self.boosts.cpu().is_some();
        self.quota
            .filter(|_| self.quota == at_rest && !is_lent && !self.is_expected)
    }

    /// Whether its quota is above the one at rest.
    pub(super) fn is_raised(&self) -> bool {
        let at_rest = self.rules.cpu.map(|cpu| cpu.at_rest);
        self.quota > at_rest
    }

    /// Whether its quota is somebody else's to move.
    pub(super) fn is_foreign(&self) -> bool {
        self.foreign.is_some() && self.foreign == self.quota
    }

    /// Whether it must be looked at from time to time.
    pub(super) fn is_active(&self) -> bool {
        // Without a quota there is nothing to move.
        let both = self.rules.cpu.zip(self.quota);
        let is_moved = both.is_some_and(|(cpu, quota)| quota != cpu.at_rest) && !self.is_foreign();
        let is_lent = !self.boosts.is_empty() || !self.noted.is_empty();
        self.is_expected || is_lent || is_moved
    }

    /// Whether it matters that it is throttled: it may be raised, or others may have written over what it is lent. Who is
    /// throttled all the time by what it was promised would wake for nothing.
    pub(super) fn needs_throttles(&self) -> bool {
        let may_rise = self.rules.cpu.map(|cpu| cpu.max > cpu.at_rest);
        let is_lent = self.is_expected || !self.boosts.is_empty();
        may_rise.is_some_and(|may_rise| may_rise || is_lent || self.is_raised())
    }

    /// Cgroups of whose throttling the kernel tells and need not any more.
    pub(super) fn take_told(&mut self) -> Vec<CgroupId> {
        if !std::mem::replace(&mut self.is_throttle_told, false) {
            return Vec::new();
        }
        let inner = self.inner.take();
        [Some(self.cgroup.id()), inner]
            .into_iter()
            .flatten()
            .collect()
    }

    /// Cgroups of whose throttling the kernel must be told, each once. The inner one is made while it starts.
    pub(super) fn untold(&mut self) -> Vec<CgroupId> {
        let mut untold = Vec::new();
        if !std::mem::replace(&mut self.is_throttle_told, true) {
            untold.push(self.cgroup.id());
            untold.extend(self.pod);
        }
        if self.inner.is_none() {
            self.inner = self.cgroup.inner().map(|inner| inner.id());
            untold.extend(self.inner);
        }
        untold
    }

    /// Whether programs that are executed in it matter.
    pub(super) fn needs_programs(&self) -> bool {
        let mut rules = self.rules.boosts.iter();
        let is_exec = |rules: &BoostRules| matches!(rules.on, Trigger::Exec(_));
        self.is_expected || !self.boosts.is_empty() || rules.any(is_exec)
    }

    /// Reads counters and quota; returns whether a throttled period was counted.
    pub(super) fn look(&mut self, at: Nanos) -> Result<bool, CgroupError> {
        let counters = self.cgroup.cpu_counters()?;
        self.history.look(at, counters);
        self.quota = self.cgroup.quota()?.map(|quota| self.meant(quota));
        if !self.boosts.is_empty() {
            self.look_at_waiting(at);
            self.look_at_trees(at);
        }
        let before = std::mem::replace(&mut self.throttled, counters.throttled);
        Ok(counters.throttled > before)
    }

    /// A quota as it was meant: whole microseconds of its period are not always what was asked for, and what is the same
    /// would be set again with each look.
    fn meant(&self, quota: Quota) -> Cpu {
        let cpu = self.rules.cpu;
        let own = [
            cpu.map(|cpu| cpu.at_rest),
            cpu.map(|cpu| cpu.max),
            self.boosts.cpu(),
        ];
        let is_it = |own: &Cpu| own.quota(quota.period) == quota.cpu.quota(quota.period);
        own.into_iter().flatten().find(is_it).unwrap_or(quota.cpu)
    }

    fn look_at_trees(&mut self, at: Nanos) {
        if self.trees.is_empty() || at.since(self.trees_looked) < TREES {
            return;
        }
        self.trees_looked = at;
        // What cannot be read is not taken for ended.
        if let Ok(processes) = self.cgroup.processes() {
            let living = living(processes.into_iter());
            let trees = self.trees.values_mut();
            trees.for_each(|tree| tree.look(&living, at));
            self.await_lasting(at);
        }
    }

    /// Waits for what lasts of a tree by its own number, too: a successor knows no trees.
    fn await_lasting(&mut self, at: Nanos) {
        let mut new = BTreeSet::new();
        for (&root, tree) in &self.trees {
            let lasting = tree.lasting(at);
            new.extend(lasting.filter(|&process| self.boosts.join(root, process)));
        }
        // What comes of it is in the tree that it is of, and its own once that has lost its root.
        self.await_ends(new);
    }

    /// Without PSI nobody is known to wait.
    fn look_at_waiting(&mut self, at: Nanos) {
        let Ok(Some(waited)) = self.cgroup.waited_for_cpu() else {
            return;
        };
        let Some((then, before)) = self.waited else {
            self.waited = Some((at, waited));
            return;
        };
        let window = at.since(then);
        if window >= SHORTEST_LOOK {
            let share = waited.since(before).0.saturating_mul(1000) / window.0.max(1);
            self.is_waiting = share >= WAITING_PER_MILLE;
            self.waited = Some((at, waited));
        }
    }

    /// What is to be done at its quota.
    pub(super) fn decide(&self, at: Nanos, is_throttled: bool, idle: Cpu) -> Option<(Cpu, Reason)> {
        // Without a quota there is nothing to raise or to lower.
        let (policy, quota) = (self.rules.cpu?, self.quota?);
        decide(&CpuSnapshot {
            now: at,
            policy,
            history: self.history,
            quota,
            boost: self.boosts.cpu(),
            is_throttled,
            idle,
        })
    }

    /// Begins what its start begins, once it has its limits: what is written before is written over. Its runtime has
    /// more to do in it before its own program, at its quota's pace. Where that cannot be seen, once it is started.
    pub(super) fn start(&mut self, at: Nanos) {
        let has_limits = self.rules.cpu.is_some() && self.quota.is_some();
        if self.is_expected && (has_limits || !self.rules.is_starting) {
            self.is_expected = false;
            self.boosts.start(&self.rules.boosts, at);
        }
    }

    /// Whether it matters what is executed in it: it is about to count its CPUs, or begins something.
    pub(super) fn is_concerned(&self, executed: &Executed) -> bool {
        let mut rules = self.rules.boosts.iter();
        self.is_expected
            || !self.boosts.is_empty()
            || rules.any(|rules| rules.names(&executed.file))
    }

    /// A program was executed.
    pub(super) fn execute(&mut self, executed: &Executed) {
        let Executed { process, file, at } = executed;
        let rules = &self.rules.boosts;
        let asks = |rules: &BoostRules| rules.asks_for_arguments(file);
        let words = if self.sees_processes && rules.iter().any(asks) {
            arguments(*process)
        } else {
            Vec::new()
        };
        self.boosts.execute(rules, *at, *process, file, &words);
        if self.boosts.processes().any(|awaited| awaited == *process) {
            self.follow(&[*process], *at);
        }
    }

    /// Follows processes until their end. One that cannot be followed is waited for as long as its boost may last.
    fn follow(&mut self, processes: &[u32], at: Nanos) {
        for process in self.await_ends(processes.iter().copied()) {
            let tree = self.trees.entry(process);
            tree.or_insert_with(|| Tree::of(process, at));
        }
    }

    /// Waits for the ends of processes; returns those whose end is still to come.
    fn await_ends(&mut self, processes: impl IntoIterator<Item = u32>) -> Vec<u32> {
        if !self.sees_processes {
            // Their ends are not seen: what waits for them ends otherwise.
            return Vec::new();
        }
        let mut opened = BTreeMap::new();
        for process in processes {
            let pid = i32::try_from(process).ok().and_then(Pid::from_raw);
            let pid = pid.ok_or(Errno::SRCH);
            match pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty())) {
                Ok(descriptor) => drop(opened.insert(process, descriptor)),
                Err(Errno::SRCH) => self.boosts.exit(process),
                Err(errno) => tracing::warn!(process, %errno, "the end of a program is not seen"),
            }
        }
        if opened.is_empty() {
            return Vec::new();
        }
        // A number may have been given to another meanwhile. The cgroup says who is in it: `/proc` names cgroups from our own
        // one on (cgroup_namespaces(7)), and a container's is above that.
        let own = self.cgroup.processes().unwrap_or_default();
        let own: BTreeSet<u32> = own.into_iter().collect();
        let mut awaited = Vec::new();
        for (process, descriptor) in opened {
            if own.contains(&process) {
                self.processes.insert(process, descriptor);
                awaited.push(process);
            } else {
                self.boosts.exit(process);
            }
        }
        awaited
    }

    /// Asks whether the service is ready, if a boost waits for that, and nobody else.
    pub(super) fn ask(&mut self, wake: &Wake) {
        let is_asked = !self.rules.is_starting && self.rules.is_ready.is_none();
        let wanted = self.boosts.asks().filter(|_| is_asked);
        let asked = self.probe.as_ref().map(|(asked, _)| asked);
        if wanted == asked {
            return;
        }
        self.probe = None;
        let Some(ready) = wanted else {
            return;
        };
        match Probe::start(self.cgroup.clone(), ready, wake.clone()) {
            Ok(probe) => self.probe = Some((ready.clone(), probe)),
            Err(error) => tracing::warn!(%error, "it is not asked whether a service is ready"),
        }
    }

    /// Ends the boosts that are over.
    pub(super) fn end_boosts(&mut self, at: Nanos) {
        if self.boosts.is_empty() {
            return;
        }
        let gone = self.processes.iter().filter(|(_, fd)| has_ended(fd));
        let gone: Vec<u32> = gone.map(|(&process, _)| process).collect();
        for process in gone {
            self.processes.remove(&process);
            let tree = self.trees.remove(&process).unwrap_or_default();
            let heirs: Vec<u32> = tree.ids().filter(|&heir| heir != process).collect();
            self.boosts.hand_on(process, &heirs);
            // Those that have ended, too, are taken out again.
            self.follow(&heirs, at);
        }
        if let Some(is_ready) = self.rules.is_ready {
            self.boosts.container_is(is_ready);
        }
        if let Some((ready, probe)) = &self.probe
            && probe.is_ready()
        {
            self.boosts.ready(ready);
        }
        let load = Load {
            used: self.history.used,
            at_rest: self.rules.cpu.map_or(IDLE, |cpu| cpu.at_rest),
            // What its runtime does in it before it starts it says nothing of itself.
            is_waiting: self.is_waiting || self.rules.is_starting,
        };
        let ended = self.boosts.look(&self.rules.boosts, at, load);
        for (rules, end) in &ended {
            let path = self.cgroup.path().display();
            tracing::info!(%path, on = ?rules.on, ?end, "a boost has ended");
        }
        if self.boosts.is_empty() {
            self.processes.clear();
            self.trees.clear();
            self.waited = None;
            self.is_waiting = false;
        }
    }

    /// What cannot be written down is not lent, because a successor would take it for what is at rest; and what is
    /// written down is not forgotten before that is.
    pub(super) fn note(&mut self, setter: &impl Setter) {
        if self.boosts.is_like(&self.noted) {
            return;
        }
        let noted = setter.boosted(&self.cgroup, &self.boosts);
        if noted.is_ok() {
            let lent = |boosts: &Boosts| (boosts.cpu(), boosts.memory());
            if lent(&self.boosts) != lent(&self.noted) {
                let (cpu, memory) = lent(&self.boosts);
                tracing::info!(path = %self.cgroup.path().display(), ?cpu, ?memory, "lent");
            }
            self.noted = self.boosts.clone();
        } else if self.noted.is_empty() {
            self.boosts = Boosts::none();
        }
        self.went(noted);
    }

    pub(super) fn went(&mut self, result: Result<(), String>) {
        match result {
            Ok(()) => self.failure = None,
            Err(why) if self.failure.as_ref() == Some(&why) => {}
            Err(why) => {
                tracing::warn!(path = %self.cgroup.path().display(), why, "a CPU quota is not moved");
                self.failure = Some(why);
            }
        }
    }
}

/// The arguments of a process, without its name. Reading them waits for whoever changes its address space, so they are
/// read only where a policy names some of its file.
fn arguments(process: u32) -> Vec<String> {
    let mut words = Vec::new();
    let file = File::open(format!("/proc/{process}/cmdline"));
    if let Err(error) = file.and_then(|file| file.take(ARGUMENTS).read_to_end(&mut words)) {
        tracing::debug!(process, %error, "a program has ended before its arguments were read");
    }
    let words = words.split(|&byte| byte == 0).skip(1);
    words
        .map(|word| String::from_utf8_lossy(word).into_owned())
        .collect()
}

fn has_ended(process: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(process, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}
