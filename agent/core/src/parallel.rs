//! Elastic parallelism: which of a burst's processes may run while memory for all of them cannot be granted.
//!
//! A build with eight jobs that needs twice what it may have is killed, although it would fit with four. What is
//! lent here instead of memory is time: the youngest leaves of the process tree are paused, and resumed as others end.
//!
//! **What a process will need** is what the largest of the same program has needed that ended lately, or has that runs; before
//! one has ended, three times what it has. The first to end is the smallest, so that alone says little of the others. Those that run must be able to end, so each of them, the oldest first, is
//! given what it is projected to need yet (who has not grown for long is taken to be done with that). Whoever does not fit is paused: what it has it keeps, so it must be paused
//! long before all memory is in use, and best of all when it has just begun.
//!
//! **No deadlock, by construction.** The oldest leaf that still grows always runs, whether it fits or not. A paused process can be what
//! everybody else waits for (the other end of a pipe, a lock): if nobody has used the CPU for [`STALLED`] while none was held, or nobody has
//! ended for [`NOBODY_ENDS`] whatever they use, the oldest paused one is resumed and *never paused again*. There are
//! finitely many, so after finitely many such times all run, as without Bellows.
//!
//! **Who is never paused:** whoever the shell around this crate exempts (parents, shells, servers, roots of the tree), and
//! what has never been large: pausing it would gain nothing, and everything may wait for it.
//!
//! It must not pause for memory that is there: who fits runs.

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, Nanos};

/// So long without anybody using the CPU is a standstill.
pub const STALLED: Nanos = Nanos::millis(2000);
/// So long without anybody ending is one too, whatever they use: they may be waiting busily.
pub const NOBODY_ENDS: Nanos = Nanos::millis(120_000);
/// CPU time that is progress.
const PROGRESS: Nanos = Nanos::millis(20);
/// Who is told to stop does so within this time, unless it cannot: in the brake it may sleep for two seconds before.
const STOPS_WITHIN: Nanos = Nanos::millis(2500);
/// So often is one paused again that somebody else has continued: `fg` continues all that ^Z has stopped.
const CONTINUED: u32 = 3;
/// While somebody is paused there is a look at least so often, unless the guard itself stands still.
const LOOKED_AT: Nanos = Nanos::millis(1000);
/// Before one of a program has ended, each is taken to need so much more than it has.
const UNLEARNT_PER_MILLE: u64 = 3000;
/// The next is taken to need more than the most of `n` that have ended by a share of `1 / (UNLIKE * n)`.
const UNLIKE: u64 = 3;
/// So many looks may pass before an order is carried out.
const LATE: u64 = 2;
/// Where one has more than all that have ended, each needs so much more than that has.
const BEYOND_PER_MILLE: u64 = 1250;
/// The share of memory that is left to what no process shows: page tables, stocks of CPUs, the kernel's own.
const MARGIN_PER_MILLE: u64 = 60;
/// A process with less than this share has never been large.
const LARGE_PER_MILLE: u64 = 15;
/// Who has not grown for so long is taken to be as large as it will be: a server, or something that waits.
const FLAT_AFTER: Nanos = Nanos::millis(10_000);
/// What it may need more all the same, and what counts as growth.
const FLAT_PER_MILLE: u64 = 1050;
/// How many ends are remembered of each program.
const ENDS: usize = 16;
/// How many programs are remembered.
const PROGRAMS: usize = 64;
/// Looks at which a process must have been the same program: one that was just forked is about to become another. Not if
/// it is known what the program needs: a job of a fifth of a second has grown by a third meanwhile, and so have those
/// that began with it.
const SETTLED: u32 = 2;
/// The same is told again no sooner than this.
const TOLD_AGAIN: Nanos = Nanos::millis(60_000);

/// A process. A number that was used again is another: it began later. The order is that of age.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ProcessId {
    /// When it began, in the kernel's clock ticks since boot.
    pub began: u64,
    /// Its number.
    pub pid: i32,
}

/// A process as it was just seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Which.
    pub id: ProcessId,
    /// The program's name.
    pub program: String,
    /// Its anonymous memory; nothing for one that is never paused.
    pub memory: Bytes,
    /// CPU time that it has used.
    pub cpu: Nanos,
    /// Whether it is stopped, by whomever.
    pub is_stopped: bool,
    /// Whether it may be paused at all: it is a leaf, and nothing that others need to go on.
    pub may_pause: bool,
}

/// A burst as it was just seen.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Look {
    /// When.
    pub now: Nanos,
    /// What it may have, all in all.
    pub granted: Bytes,
    /// What it has, page cache aside.
    pub used: Bytes,
    /// Whether it is held, frozen or braked: then that nobody goes on, or stops, means nothing.
    pub is_held: bool,
    /// Whether it is frozen: then nobody grows or ends either.
    pub is_frozen: bool,
    /// Its processes, in any order.
    pub processes: Vec<Seen>,
}

/// Why a process goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Resumed {
    /// What it is projected to need is there.
    Fits,
    /// It is the oldest: one always runs.
    Oldest,
    /// Nobody went on without it.
    Standstill,
    /// Nobody has ended for a long time.
    NobodyEnds,
    /// It did not stop, or somebody else has continued it again and again: it is left alone.
    NotStopped,
    /// Somebody else has continued it.
    Continued,
    /// It is not a leaf any more, or has become something that others need.
    Exempt,
    /// It is not seen any more, or could not be resumed before.
    Lost,
    /// The guard ends.
    Ended,
}

/// How many jobs would need how much, and how many run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Balance {
    /// The jobs.
    pub jobs: u64,
    /// What all of them are projected to need, with everything else that is there.
    pub need: Bytes,
    /// What may be had.
    pub granted: Bytes,
    /// How many run.
    pub running: u64,
}

/// What is to be done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    /// To be paused.
    pub pause: Vec<ProcessId>,
    /// To be resumed.
    pub resume: Vec<(ProcessId, Resumed)>,
    /// To be told, if there is something new to tell.
    pub told: Option<Balance>,
    /// The jobs that there are, and whether each may run.
    pub jobs: BTreeMap<ProcessId, bool>,
    /// How many more may begin; `None` while nobody knows what one needs.
    pub more: Option<u64>,
    /// How much may change until the next look.
    pub pace: Pace,
}

impl Orders {
    /// How many job tokens to withhold of a jobserver of which `taken` are withheld, so that no more of its own jobs begin
    /// than there is memory for. Without any its owner may be at its end, where it waits for each token, however long
    /// the jobs of others last.
    pub fn withheld(&self, taken: u64, is_own: impl Fn(ProcessId) -> bool) -> u64 {
        let own = self.jobs.iter().filter(|&(&id, _)| is_own(id));
        let mut running = own.map(|(_, &runs)| runs).peekable();
        let (Some(more), Some(_)) = (self.more, running.peek()) else {
            return 0;
        };
        let waiting = u64::try_from(running.filter(|runs| !runs).count()).unwrap_or(u64::MAX);
        waiting.saturating_add(taken).saturating_sub(more)
    }
}

/// How much may change from one look to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Pace {
    /// Nobody grows.
    #[default]
    Calm,
    /// Who grows is known to need no more than what it was given.
    Steady,
    /// Nobody knows what they need who grow.
    Unknown,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Runs,
    Paused {
        since: Nanos,
        /// Whether it has been seen stopped since, or nobody looked while it had time for that.
        has_stopped: bool,
    },
    /// Never paused again.
    Pinned,
}

#[derive(Clone, Debug)]
struct Known {
    program: String,
    peak: Bytes,
    cpu: Nanos,
    state: State,
    looks: u32,
    /// Whether it has been large, or is of a program that has been.
    is_job: bool,
    memory: Bytes,
    /// By how much it has grown from one look to the next, the last time.
    step: Bytes,
    /// When it had grown last, by more than a little.
    grown: (Nanos, Bytes),
    /// How often somebody else has continued it.
    continued: u32,
}

/// What is known of a burst's processes from one look to the next.
#[derive(Clone, Debug, Default)]
pub struct Jobs {
    known: BTreeMap<ProcessId, Known>,
    /// What those needed that ended, by program.
    ended: BTreeMap<String, Ends>,
    looked: Nanos,
    went_on: Nanos,
    somebody_ended: Nanos,
    /// CPU time used since it went on.
    used_since: Nanos,
    told: Option<(Nanos, u64)>,
}

/// What those of one program needed that ended.
#[derive(Clone, Debug, Default)]
struct Ends {
    /// The latest last.
    peaks: VecDeque<Bytes>,
    /// When the last one did.
    at: Nanos,
}

/// The most that one of a program has had that is there.
#[derive(Clone, Copy, Debug, Default)]
struct Largest {
    of_all: Bytes,
    /// Of those that grow: a server of the same name says nothing of jobs of which some have ended.
    growing: Bytes,
}

/// A job on its way through one look.
struct Job {
    id: ProcessId,
    memory: Bytes,
    projected: Bytes,
    is_flat: bool,
    /// What it may have grown by before it can be paused.
    meanwhile: Bytes,
    state: State,
}

impl Jobs {
    /// Those that are paused.
    pub fn paused(&self) -> impl Iterator<Item = ProcessId> + '_ {
        let is_paused = |known: &Known| matches!(known.state, State::Paused { .. });
        let paused = self.known.iter().filter(move |(_, known)| is_paused(known));
        paused.map(|(&id, _)| id)
    }

    /// A process that was to be paused could not be.
    pub fn not_paused(&mut self, id: ProcessId) {
        if let Some(known) = self.known.get_mut(&id) {
            known.state = State::Pinned;
        }
    }

    /// Takes a look, and decides.
    pub fn look(&mut self, look: &Look) -> Orders {
        let mut orders = Orders::default();
        self.pass_over(look.now);
        self.follow(look);
        self.check_stops(look, &mut orders);
        let jobs = self.jobs(look);
        let balance = self.share(look, &jobs, &mut orders);
        self.wake(look, &mut orders);
        // Who is paused again at once does not go on in between.
        orders.resume.retain(|(id, _)| !orders.pause.contains(id));
        orders.told = self.tell(look.now, balance);
        orders.pace = self.pace(look);
        orders
    }

    /// Time in which the guard stood still, as under ^Z, tells nothing of those who did so with it.
    fn pass_over(&mut self, now: Nanos) {
        let missed = now.since(self.looked).since(LOOKED_AT);
        self.looked = now;
        if missed == Nanos(0) || self.paused().next().is_none() {
            return;
        }
        let later = |time: &mut Nanos| time.0 = time.0.saturating_add(missed.0);
        later(&mut self.went_on);
        later(&mut self.somebody_ended);
        for known in self.known.values_mut() {
            later(&mut known.grown.0);
            if let State::Paused { has_stopped, .. } = &mut known.state {
                *has_stopped = true;
            }
        }
    }

    /// Takes note of who came, changed and ended.
    fn follow(&mut self, look: &Look) {
        let large = look.granted.per_mille(LARGE_PER_MILLE);
        let seen: BTreeSet<ProcessId> = look.processes.iter().map(|seen| seen.id).collect();
        let gone: Vec<ProcessId> = self.known.keys().copied().collect();
        for id in gone.into_iter().filter(|id| !seen.contains(id)) {
            let Some(known) = self.known.remove(&id) else {
                continue;
            };
            // Who was killed while it was paused has not shown what it needs.
            if known.is_job && !matches!(known.state, State::Paused { .. }) {
                self.learn(known.program, known.peak, look.now);
                (self.somebody_ended, self.went_on) = (look.now, look.now);
                self.used_since = Nanos(0);
            }
        }
        for seen in &look.processes {
            let known = self
                .known
                .entry(seen.id)
                .or_insert_with(|| Known::new(look.now, seen));
            if known.program != seen.program {
                // One that was paused on its way to another program is paused still, and goes on with the others.
                let before = std::mem::replace(known, Known::new(look.now, seen));
                (known.state, known.continued) = (before.state, before.continued);
                known.is_job = before.is_job && matches!(before.state, State::Paused { .. });
            }
            known.looks = known.looks.saturating_add(1);
            known.peak = known.peak.max(seen.memory);
            known.step = seen.memory.minus(known.memory);
            known.memory = seen.memory;
            let is_paused = matches!(known.state, State::Paused { .. });
            if is_paused || look.is_frozen || seen.memory > known.grown.1.per_mille(FLAT_PER_MILLE)
            {
                known.grown = (look.now, known.grown.1.max(seen.memory));
            }
            if seen.may_pause {
                self.used_since.0 =
                    (self.used_since.0).saturating_add(seen.cpu.0.saturating_sub(known.cpu.0));
            }
            known.cpu = known.cpu.max(seen.cpu);
            known.is_job |= seen.may_pause
                && (known.looks >= SETTLED && seen.memory >= large
                    || self.ended.contains_key(&seen.program));
        }
        // One large compiler makes jobs of all.
        let programs: BTreeSet<String> = (self.known.values())
            .filter(|known| known.is_job)
            .map(|known| known.program.clone())
            .collect();
        for seen in look.processes.iter().filter(|seen| seen.may_pause) {
            if let Some(known) = self.known.get_mut(&seen.id) {
                known.is_job |= known.looks >= SETTLED && programs.contains(&known.program);
            }
        }
    }

    /// One more program takes the place of the one of which nobody has ended for longest: the names of test programs are
    /// others each time.
    fn learn(&mut self, program: String, peak: Bytes, now: Nanos) {
        if self.ended.len() >= PROGRAMS && !self.ended.contains_key(&program) {
            let oldest = self.ended.iter().min_by_key(|(_, ends)| ends.at);
            let oldest = oldest.map(|(program, _)| program.clone());
            oldest.map(|program| self.ended.remove(&program));
        }
        let ends = self.ended.entry(program).or_default();
        ends.at = now;
        ends.peaks.push_back(peak);
        if ends.peaks.len() > ENDS {
            ends.peaks.pop_front();
        }
    }

    /// Who does not stop, or is not to be paused any more, is left alone. Who did stop and goes on all the same was continued
    /// by somebody else, and runs like any other.
    fn check_stops(&mut self, look: &Look, orders: &mut Orders) {
        for seen in &look.processes {
            let Some(known) = self.known.get_mut(&seen.id) else {
                continue;
            };
            let State::Paused { since, has_stopped } = &mut known.state else {
                continue;
            };
            if look.is_held {
                // Whoever is held takes no signal: its time begins when it is let go.
                *since = look.now;
            }
            *has_stopped |= seen.is_stopped;
            let is_continued = *has_stopped && !seen.is_stopped;
            let is_late = !seen.is_stopped && look.now.since(*since) >= STOPS_WITHIN;
            if !seen.may_pause {
                orders.resume.push((seen.id, Resumed::Exempt));
                known.state = State::Pinned;
            } else if is_continued && known.continued < CONTINUED {
                known.continued += 1;
                orders.resume.push((seen.id, Resumed::Continued));
                known.state = State::Runs;
            } else if is_continued || is_late {
                orders.resume.push((seen.id, Resumed::NotStopped));
                known.state = State::Pinned;
            }
        }
    }

    /// The jobs of this look, the oldest first, those that are never paused before all others.
    fn jobs(&self, look: &Look) -> Vec<Job> {
        let mut largest: BTreeMap<&str, Largest> = BTreeMap::new();
        for known in self.known.values().filter(|known| known.is_job) {
            let most = largest.entry(&known.program).or_default();
            most.of_all = most.of_all.max(known.peak);
            if !known.is_flat(look.now) && known.state != State::Pinned {
                most.growing = most.growing.max(known.peak);
            }
        }
        let mut jobs = Vec::new();
        for seen in look.processes.iter().filter(|seen| seen.may_pause) {
            let Some(known) = self.known.get(&seen.id).filter(|known| known.is_job) else {
                continue;
            };
            // Stopped by somebody else: it is theirs to resume.
            if seen.is_stopped && !matches!(known.state, State::Paused { .. }) {
                continue;
            }
            let largest = largest.get(&*known.program).copied().unwrap_or_default();
            let is_flat = known.is_flat(look.now);
            let projected = if is_flat {
                seen.memory.per_mille(FLAT_PER_MILLE)
            } else {
                self.projected(known, seen.memory, largest)
            };
            jobs.push(Job {
                id: seen.id,
                memory: seen.memory,
                projected,
                is_flat,
                meanwhile: if self.ended.contains_key(&known.program) {
                    Bytes::ZERO
                } else {
                    known.step.scaled(LATE, 1)
                },
                state: known.state,
            });
        }
        jobs.sort_unstable_by_key(|job| (job.state != State::Pinned, job.id));
        jobs
    }

    fn projected(&self, known: &Known, memory: Bytes, largest: Largest) -> Bytes {
        let peak = known.peak.max(memory);
        let ended = self.ended.get(&known.program);
        let projected = match ended.and_then(|ends| ends.peaks.iter().max().copied()) {
            Some(learnt) if learnt >= largest.growing => {
                // The fewer have ended, the more the next may differ.
                let ends = ended.map_or(0, |ends| {
                    u64::try_from(ends.peaks.len()).unwrap_or(u64::MAX)
                });
                learnt.plus(learnt.scaled(1, UNLIKE.saturating_mul(ends)))
            }
            Some(_) => largest.growing.per_mille(BEYOND_PER_MILLE),
            None => peak.per_mille(UNLEARNT_PER_MILLE).max(largest.of_all),
        };
        projected.max(memory)
    }

    /// Gives each what it needs yet, the oldest first, and pauses whom it does not reach to.
    fn share(&mut self, look: &Look, jobs: &[Job], orders: &mut Orders) -> Balance {
        let budget = look.granted.minus(look.granted.per_mille(MARGIN_PER_MILLE));
        let mut room = budget.minus(look.used);
        let mut need = look.used.plus(look.granted.minus(budget));
        let mut has_oldest = false;
        let mut running = 0_u64;
        let mut typical = Bytes::ZERO;
        for job in jobs {
            let more = job.projected.minus(job.memory).plus(job.meanwhile);
            need = need.plus(more);
            typical = typical.max(job.projected);
            let is_pinned = job.state == State::Pinned;
            let is_oldest = !is_pinned && !job.is_flat && !has_oldest;
            has_oldest |= is_oldest;
            let fits = more <= room;
            // To pause who does not grow would gain nothing.
            let runs = is_pinned || job.is_flat || is_oldest || fits;
            if runs {
                room = room.minus(more);
                running += 1;
            }
            orders.jobs.insert(job.id, runs);
            let state = match (runs, job.state) {
                (true, State::Paused { .. }) => {
                    let why = if fits { Resumed::Fits } else { Resumed::Oldest };
                    orders.resume.push((job.id, why));
                    State::Runs
                }
                (false, State::Runs) => {
                    orders.pause.push(job.id);
                    State::Paused {
                        since: look.now,
                        has_stopped: false,
                    }
                }
                (_, same) => same,
            };
            if let Some(known) = self.known.get_mut(&job.id) {
                known.state = state;
            }
        }
        let jobs = u64::try_from(jobs.len()).unwrap_or(u64::MAX);
        let is_full = running < jobs;
        let more = room.0.checked_div(typical.0);
        orders.more = more.map(|more| if is_full { 0 } else { more });
        Balance {
            jobs,
            need,
            granted: look.granted,
            running,
        }
    }

    /// Resumes the oldest paused one if the others do not go on without it.
    fn wake(&mut self, look: &Look, orders: &mut Orders) {
        let oldest = self.paused().next();
        if oldest.is_none() || self.used_since >= PROGRESS || look.is_held {
            (self.went_on, self.used_since) = (look.now, Nanos(0));
        }
        if look.is_frozen {
            self.somebody_ended = look.now;
        }
        let Some(oldest) = oldest else {
            self.somebody_ended = look.now;
            return;
        };
        let why = if look.now.since(self.went_on) >= STALLED {
            Resumed::Standstill
        } else if look.now.since(self.somebody_ended) >= NOBODY_ENDS {
            Resumed::NobodyEnds
        } else {
            return;
        };
        (self.went_on, self.somebody_ended) = (look.now, look.now);
        self.used_since = Nanos(0);
        if let Some(known) = self.known.get_mut(&oldest) {
            known.state = State::Pinned;
        }
        // One that was to be paused just now is not even stopped.
        match orders.pause.iter().position(|id| *id == oldest) {
            Some(index) => drop(orders.pause.remove(index)),
            None => orders.resume.push((oldest, why)),
        }
    }

    fn pace(&self, look: &Look) -> Pace {
        let candidates = look.processes.iter().filter(|seen| seen.may_pause);
        let known = candidates.filter_map(|seen| self.known.get(&seen.id));
        let paces = known.map(|known| {
            let is_flat = known.is_flat(look.now);
            let is_known = self.ended.contains_key(&known.program);
            match (known.looks < SETTLED || known.is_job && !is_flat, is_known) {
                (false, _) => Pace::Calm,
                (true, true) => Pace::Steady,
                (true, false) => Pace::Unknown,
            }
        });
        paces.max().unwrap_or_default()
    }

    fn tell(&mut self, now: Nanos, balance: Balance) -> Option<Balance> {
        if balance.running >= balance.jobs {
            return None;
        }
        let is_new = self
            .told
            .is_none_or(|(at, running)| now.since(at) >= TOLD_AGAIN && running != balance.running);
        if is_new {
            self.told = Some((now, balance.running));
        }
        is_new.then_some(balance)
    }
}

impl Known {
    fn is_flat(&self, now: Nanos) -> bool {
        now.since(self.grown.0) >= FLAT_AFTER
    }

    fn new(now: Nanos, seen: &Seen) -> Self {
        Self {
            program: seen.program.clone(),
            peak: seen.memory,
            cpu: seen.cpu,
            state: State::Runs,
            looks: 0,
            is_job: false,
            memory: seen.memory,
            step: Bytes::ZERO,
            grown: (now, seen.memory),
            continued: 0,
        }
    }
}
