//! One cgroup whose jobs may be paused: look, decide, write down, act.

use std::{
    collections::BTreeSet,
    os::fd::BorrowedFd,
    time::{Duration, Instant},
};

use bellows_core::{
    Bytes, CgroupId,
    parallel::{Jobs, Look, Orders, Pace, ProcessId, Resumed, Seen},
};
use rustix::process::Signal;

use super::{
    State,
    jobserver::{Jobserver, MOST},
    process::{Tree, is_server, since_boot},
};
use crate::{
    cgroup::{Cgroup, CgroupError, Limit},
    clock::now,
    ledger::Record,
    metrics::METRICS,
};

/// How often a burst is looked at of whose jobs nobody knows what they need.
const NEAR: Duration = Duration::from_millis(10);
/// The same while it is known what each of them needs, or they have little yet.
const BETWEEN: Duration = Duration::from_millis(50);
/// How often any other is.
const FAR: Duration = Duration::from_millis(100);
/// A job that begins has become its program within this time.
const BEGUN: Duration = Duration::from_millis(10);
/// Below this share of what it may have nobody is looked at.
const QUARTER_PER_MILLE: u64 = 250;
/// How often it is read how much of its usage is page cache.
const CACHE_INTERVAL: Duration = Duration::from_millis(250);

pub(super) struct Watched {
    cgroup: Cgroup,
    granted: Bytes,
    is_bursting: bool,
    due: Option<Instant>,
    jobs: Jobs,
    /// Who was stopped, until it has been resumed or has ended: whatever a look at them shows.
    stopped: BTreeSet<ProcessId>,
    jobserver: Option<Jobserver>,
    /// How many tokens are to be withheld.
    wanted: usize,
    /// Whether the next token is to be taken as soon as there is one.
    is_waiting: bool,
    /// Whether it was waited for in vain: what is readable then may be so for ever, as a pipe is that nobody writes to.
    is_in_vain: bool,
    /// Parents of jobs that were asked for a jobserver.
    asked: BTreeSet<ProcessId>,
    /// What it uses beside its processes' own memory, and when that was read.
    beside: Option<(Bytes, Instant)>,
    /// Nobody is to be stopped any more.
    is_forgotten: bool,
    is_told_unseen: bool,
}

impl Watched {
    pub(super) fn new(cgroup: Cgroup) -> Self {
        Self {
            cgroup,
            granted: Bytes(u64::MAX),
            is_bursting: false,
            due: None,
            jobs: Jobs::default(),
            stopped: BTreeSet::new(),
            jobserver: None,
            wanted: 0,
            is_waiting: false,
            is_in_vain: false,
            asked: BTreeSet::new(),
            beside: None,
            is_forgotten: false,
            is_told_unseen: false,
        }
    }

    pub(super) const fn due(&self) -> Option<Instant> {
        self.due
    }

    pub(super) fn may_have(&mut self, granted: Bytes, is_bursting: bool) {
        (self.granted, self.is_bursting) = (granted, is_bursting);
        if is_bursting {
            self.due = Some(Instant::now());
        } else if !self.is_lending() {
            // What nobody looks at any more nobody would give back.
            (self.due, self.is_waiting) = (None, false);
        }
    }

    pub(super) const fn watch_again(&mut self) {
        self.is_forgotten = false;
    }

    pub(super) fn forget(&mut self, state: &mut State) {
        self.is_forgotten = true;
        self.let_go(state);
        self.due = Some(Instant::now() + FAR);
    }

    /// Whether nobody waits for it any more.
    pub(super) fn is_over(&self) -> bool {
        self.is_forgotten && self.stopped.is_empty()
    }

    fn is_lending(&self) -> bool {
        !self.stopped.is_empty()
            || self
                .jobserver
                .as_ref()
                .is_some_and(|jobserver| !jobserver.taken.is_empty())
    }

    /// What a new file must say of it.
    pub(super) fn standing(&self) -> Vec<Record> {
        let (at, cgroup) = (now(), self.cgroup.id());
        let paused = self.stopped.iter().map(|&process| Record::Pause {
            at,
            cgroup,
            process,
            program: String::new(),
        });
        let tokens = self
            .jobserver
            .as_ref()
            .map(|jobserver| tokens(cgroup, jobserver, &jobserver.taken));
        paused.chain(tokens).collect()
    }

    pub(super) fn look(&mut self, state: &mut State) {
        if self.is_forgotten {
            return self.forget(state);
        }
        let pause = match self.look_at_jobs(state) {
            Ok(pause) => pause,
            Err(error) if error.is_gone() => return self.forget(state),
            Err(error) => {
                tracing::warn!(path = %self.cgroup.path().display(), %error, "a burst cannot be looked at: its jobs go on");
                self.let_go(state);
                FAR
            }
        };
        self.due = Some(Instant::now() + pause);
        if !self.is_bursting && !self.is_lending() {
            (self.due, self.is_waiting) = (None, false);
        }
    }

    /// Looks, acts, and returns when to look again.
    fn look_at_jobs(&mut self, state: &mut State) -> Result<Duration, CgroupError> {
        let quarter = self.granted.per_mille(QUARTER_PER_MILLE);
        if !self.is_lending() {
            if self.cgroup.usage()? < quarter {
                return Ok(BETWEEN);
            }
            // A cache that fills it is no burst.
            if self.cgroup.stat()?.demand() < quarter {
                return Ok(FAR);
            }
        }
        let tree = Tree::of(&self.cgroup)?;
        if tree.is_unseen && !self.is_told_unseen {
            self.is_told_unseen = true;
            tracing::warn!(path = %self.cgroup.path().display(), "its processes are not seen from here, so its jobs do not wait for memory: set elasticParallelism, or hostPID");
        }
        let processes = tree.seen(since_boot());
        let used = self.used(&processes)?;
        let is_frozen = self.is_lending() && self.cgroup.read("cgroup.freeze")?.trim() == "1";
        let is_held = is_frozen || (self.is_lending() && self.is_braked()?);
        let look = Look {
            now: now(),
            granted: self.granted,
            used,
            is_held,
            is_frozen,
            processes,
        };
        let orders = self.jobs.look(&look);
        self.obey(&orders, &tree, state);
        self.withhold(&orders, &tree, &look.processes, state);
        Ok(match orders.pace {
            Pace::Unknown => NEAR,
            Pace::Steady => BETWEEN,
            Pace::Calm if self.is_lending() => BETWEEN,
            Pace::Calm => FAR,
        })
    }

    /// Whether it has what its brake allows: whoever is charged for more then sleeps for as long as two seconds each time, and
    /// neither stops nor uses the CPU (`__mem_cgroup_handle_over_high`, mm/memcontrol.c).
    fn is_braked(&self) -> Result<bool, CgroupError> {
        let high = self.cgroup.limit("memory.high")?;
        Ok(high != Limit::Max && self.cgroup.usage()? >= high.bytes())
    }

    fn used(&mut self, processes: &[Seen]) -> Result<Bytes, CgroupError> {
        let own = processes
            .iter()
            .fold(Bytes::ZERO, |sum, seen| sum.plus(seen.memory));
        let beside = match self.beside {
            Some((beside, at)) if at.elapsed() < CACHE_INTERVAL => beside,
            _ => {
                let beside = self.cgroup.stat()?.demand().minus(own);
                self.beside = Some((beside, Instant::now()));
                beside
            }
        };
        Ok(own.plus(beside))
    }

    fn obey(&mut self, orders: &Orders, tree: &Tree, state: &mut State) {
        for &(process, why) in &orders.resume {
            self.resume(process, why, state);
        }
        // One that was not seen this time, or could not be resumed before, would stay as it is.
        let paused: BTreeSet<ProcessId> = self.jobs.paused().collect();
        let lost: Vec<ProcessId> = self.stopped.difference(&paused).copied().collect();
        for process in lost {
            self.resume(process, Resumed::Lost, state);
        }
        for &process in &orders.pause {
            if let Err(why) = self.pause(process, tree, state) {
                tracing::debug!(pid = process.pid, why, "a process is not paused");
                self.jobs.not_paused(process);
            }
        }
        if let Some(balance) = orders.told {
            (state.told)(Record::Lends {
                at: now(),
                cgroup: self.cgroup.id(),
                balance,
            });
        }
    }

    fn pause(&mut self, process: ProcessId, tree: &Tree, state: &mut State) -> Result<(), String> {
        if is_server(process.pid) {
            return Err("it is a server".to_owned());
        }
        let record = Record::Pause {
            at: now(),
            cgroup: self.cgroup.id(),
            process,
            program: tree
                .get(process)
                .map(|known| known.program.clone())
                .unwrap_or_default(),
        };
        state.record(&record).map_err(|error| error.to_string())?;
        match (state.signal)(process, Signal::STOP) {
            Ok(true) => {
                self.stopped.insert(process);
                METRICS.pauses.inc();
                (state.told)(record);
                Ok(())
            }
            Ok(false) => Err("it has ended".to_owned()),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Lets it go on first: to write that down may fail. Who cannot be told to is told again at the next look.
    fn resume(&mut self, process: ProcessId, why: Resumed, state: &mut State) {
        let is_there = match (state.signal)(process, Signal::CONT) {
            Ok(is_there) => is_there,
            Err(error) => {
                tracing::error!(pid = process.pid, %error, "a paused process cannot be resumed");
                return;
            }
        };
        self.stopped.remove(&process);
        if !is_there {
            return;
        }
        let record = Record::Resume {
            at: now(),
            cgroup: self.cgroup.id(),
            process,
            why,
        };
        if let Err(error) = state.record(&record) {
            tracing::warn!(%error, "that a process goes on is not written down");
        }
        (state.told)(record);
    }

    /// Takes or gives back job tokens, so that no more jobs begin than there is memory for.
    fn withhold(&mut self, orders: &Orders, tree: &Tree, processes: &[Seen], state: &mut State) {
        let cgroup = self.cgroup.id();
        let has_ended = |jobserver: &mut Jobserver| !jobserver.is_there();
        if let Some(mut jobserver) = self.jobserver.take_if(has_ended) {
            // Whoever else has the same pipe counts them.
            give_back(&mut jobserver, 0, cgroup, state);
        }
        if orders.more == Some(0) && self.jobserver.is_none() {
            self.find_jobserver(tree, processes);
        }
        let Some(jobserver) = &mut self.jobserver else {
            return;
        };
        let taken = u64::try_from(jobserver.taken.len()).unwrap_or(u64::MAX);
        let owner = jobserver.place.owner;
        let is_own = |job| tree.ancestors(job).iter().any(|above| above.id == owner);
        let wanted = orders.withheld(taken, is_own);
        // No more are ever taken: to wait for those would be in vain.
        self.wanted = usize::try_from(wanted).map_or(MOST, |wanted| wanted.min(MOST));
        self.is_waiting = false;
        if jobserver.taken.len() > self.wanted {
            return give_back(jobserver, self.wanted, cgroup, state);
        }
        self.take_tokens(state);
        self.is_waiting = !std::mem::take(&mut self.is_in_vain);
    }

    /// What is readable when there is a token to be taken.
    pub(super) fn source(&self) -> Option<BorrowedFd<'_>> {
        let jobserver = self.jobserver.as_ref()?;
        let is_waiting = self.is_waiting && jobserver.taken.len() < self.wanted;
        is_waiting.then(|| jobserver.source())
    }

    /// Takes tokens between two looks, where there may be one. If make was faster its next job begins: that is paused
    /// before it has grown.
    pub(super) fn take_between(&mut self, state: &mut State) {
        if self.source().is_none() {
            return;
        }
        if self.take_tokens(state) {
            // Whoever has one is looked at.
            self.due.get_or_insert_with(|| Instant::now() + FAR);
            return;
        }
        (self.is_waiting, self.is_in_vain) = (false, true);
        let soon = Instant::now() + BEGUN;
        self.due = Some(self.due.map_or(soon, |due| due.min(soon)));
    }

    /// Takes all tokens that are wanted and to be had; returns whether there was one.
    fn take_tokens(&mut self, state: &mut State) -> bool {
        let cgroup = self.cgroup.id();
        let Some(jobserver) = &mut self.jobserver else {
            return false;
        };
        let mut has_taken = false;
        loop {
            match jobserver.take(self.wanted) {
                Ok(false) => return has_taken,
                Ok(true) => {
                    has_taken = true;
                    METRICS.tokens_withheld.inc();
                    if let Err(error) = state.record(&tokens(cgroup, jobserver, &jobserver.taken)) {
                        tracing::warn!(%error, "job tokens that cannot be written down are given back");
                        give_back(jobserver, 0, cgroup, state);
                        return false;
                    }
                }
                Err(error) => {
                    if jobserver.is_there() {
                        tracing::warn!(place = ?jobserver.place, %error, "a jobserver is left alone");
                    }
                    give_back(jobserver, 0, cgroup, state);
                    self.jobserver = None;
                    return false;
                }
            }
        }
    }

    /// Asks each parent of jobs once.
    fn find_jobserver(&mut self, tree: &Tree, processes: &[Seen]) {
        for seen in processes.iter().filter(|seen| seen.may_pause) {
            let Some(parent) = tree.ancestors(seen.id).first().map(|parent| parent.id) else {
                continue;
            };
            if !self.asked.insert(parent) {
                continue;
            }
            self.jobserver = Jobserver::of(seen.id, tree);
            if self.jobserver.is_some() {
                break;
            }
        }
        self.asked.retain(|parent| tree.get(*parent).is_some());
    }

    /// Everybody goes on, and all tokens are given back.
    pub(super) fn let_go(&mut self, state: &mut State) {
        for process in self.stopped.clone() {
            self.resume(process, Resumed::Ended, state);
        }
        self.jobs = Jobs::default();
        if let Some(mut jobserver) = self.jobserver.take() {
            give_back(&mut jobserver, 0, self.cgroup.id(), state);
        }
    }
}

#[cfg(test)]
impl Watched {
    /// One that waits for so many tokens, and is not looked at soon.
    pub(super) fn waiting_for(wanted: usize, jobserver: Jobserver, cgroup: Cgroup) -> Self {
        Self {
            due: Some(Instant::now() + Duration::from_secs(3600)),
            jobserver: Some(jobserver),
            wanted,
            is_waiting: true,
            ..Self::new(cgroup)
        }
    }
}

/// Gives back what is more than `wanted`; that is written down first.
fn give_back(jobserver: &mut Jobserver, wanted: usize, cgroup: CgroupId, state: &mut State) {
    let left = jobserver.taken.get(..wanted);
    let Some(left) = left.filter(|left| left.len() < jobserver.taken.len()) else {
        return;
    };
    let written = state.record(&tokens(cgroup, jobserver, left));
    let given = jobserver.give_back(wanted);
    if let Err(error) = written.and(given) {
        tracing::warn!(place = ?jobserver.place, %error, "job tokens cannot be given back");
    }
}

fn tokens(cgroup: CgroupId, jobserver: &Jobserver, taken: &[u8]) -> Record {
    Record::Tokens {
        at: now(),
        cgroup,
        place: jobserver.place,
        taken: taken.to_vec(),
    }
}

#[cfg(test)]
mod tests;
