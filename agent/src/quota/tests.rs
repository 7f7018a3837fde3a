use std::{
    fs,
    path::Path,
    process,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use bellows_core::{
    Bytes,
    boost::{Program, Trigger, Until},
};

use super::*;

/// Hands that write into a directory, and remember.
#[derive(Clone, Default)]
struct Hands(Arc<Did>);

#[derive(Default)]
struct Did {
    /// Whether nothing can be written down.
    is_full: AtomicBool,
    /// Whether whatever there is was set by somebody else.
    is_foreign: AtomicBool,
    /// How often something was to be set.
    asked: AtomicUsize,
    noted: Mutex<Vec<Boosts>>,
    set: Mutex<Vec<Cpu>>,
    rested: Mutex<Vec<Cpu>>,
    most: Mutex<Option<Most>>,
}

fn locked<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Setter for Hands {
    fn set(&self, cgroup: &Cgroup, to: Cpu, _reason: Reason) -> Result<(), NotSet> {
        self.0.asked.fetch_add(1, Ordering::Relaxed);
        if self.0.is_foreign.load(Ordering::Relaxed) {
            return Err(NotSet::Foreign);
        }
        let quota = cgroup.quota().unwrap().unwrap();
        cgroup.set_quota(quota.with(to)).unwrap();
        locked(&self.0.set).push(to);
        Ok(())
    }

    fn most(&self, _cgroup: CgroupId) -> Option<Most> {
        *locked(&self.0.most)
    }

    fn rests(&self, _cgroup: &Cgroup, at_rest: Cpu) {
        locked(&self.0.rested).push(at_rest);
    }

    fn settle(&self, _cgroup: &Cgroup) -> Result<(), String> {
        Ok(())
    }

    fn boosted(&self, _cgroup: &Cgroup, boosts: &Boosts) -> Result<(), String> {
        if self.0.is_full.load(Ordering::Relaxed) {
            return Err("no space".to_owned());
        }
        locked(&self.0.noted).push(boosts.clone());
        Ok(())
    }

    fn created(&self, _path: String) {}
}

/// A worker with one container, in a directory that looks like a cgroup.
struct Bed {
    worker: Worker<Hands>,
    hands: Hands,
    cgroup: Cgroup,
    commands: mpsc::Sender<Command>,
}

const REST: Cpu = Cpu::millis(250);
const LENT: Cpu = Cpu::millis(2000);

fn rules(boosts: &[BoostRules], is_starting: bool, has_quota: bool) -> Rules {
    Rules {
        cpu: has_quota.then_some(CpuPolicy {
            at_rest: REST,
            max: REST,
            throttled_per_mille: 0,
        }),
        boosts: Arc::from(boosts),
        is_starting,
        is_ready: None,
    }
}

fn boost(on: Trigger) -> BoostRules {
    BoostRules {
        on,
        cpu: Some(LENT),
        memory: Some(Bytes::mib(256)),
        until: Until {
            ready: None,
            exit: false,
            idle: None,
            at_most: Nanos::millis(600_000),
        },
    }
}

impl Bed {
    fn new(name: &str) -> Self {
        let name = format!("bellows-quota-{name}-{}", process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(&path).unwrap();
        let write = |file, text| fs::write(Path::new(&path).join(file), text).unwrap();
        write("cpu.max", "25000 100000\n");
        write("cpu.stat", "usage_usec 0\nnr_periods 0\nnr_throttled 0\n");
        let (sender, commands) = mpsc::channel();
        let hands = Hands::default();
        Self {
            worker: Worker {
                throttles: None,
                starts: None,
                setter: hands.clone(),
                commands,
                wake: Wake::new().unwrap(),
                table: BTreeMap::new(),
                idle: Idle::new(path.clone(), 4),
                sees_processes: true,
                ticked: Nanos(0),
            },
            hands,
            cgroup: Cgroup::stand_in(&path, CgroupId(7)),
            commands: sender,
        }
    }

    fn watch(&mut self, rules: Rules, is_expected: bool) {
        self.worker.watch(Watched {
            cgroup: self.cgroup.clone(),
            rules,
            boosts: Boosts::none(),
            is_expected,
            pod: None,
        });
    }

    fn full(&self, is_full: bool) {
        self.hands.0.is_full.store(is_full, Ordering::Relaxed);
    }

    fn look(&mut self) {
        self.worker.look_at(self.cgroup.id(), false);
    }

    fn row(&mut self) -> &mut Row {
        self.worker.table.get_mut(&self.cgroup.id()).unwrap()
    }

    /// What was noted last is lent.
    fn noted(&self) -> Option<Option<Cpu>> {
        locked(&self.hands.0.noted).last().map(Boosts::cpu)
    }

    fn write(&self, quota: &str) {
        fs::write(self.cgroup.path().join("cpu.max"), quota).unwrap();
    }

    fn most(&self, most: Option<Most>) {
        *locked(&self.hands.0.most) = most;
    }

    fn asked(&self) -> usize {
        self.hands.0.asked.load(Ordering::Relaxed)
    }

    /// The thread is told something.
    fn is_told(&mut self, command: Command) {
        self.commands.send(command).unwrap();
        self.worker.wake.give();
        assert!(self.worker.take_commands());
    }

    fn rested(&self) -> usize {
        locked(&self.hands.0.rested).len()
    }

    fn quota(&self) -> Cpu {
        self.cgroup.quota().unwrap().unwrap().cpu
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(self.cgroup.path()));
    }
}

#[test]
fn what_cannot_be_written_down_is_not_lent() {
    let mut bed = Bed::new("unwritten");
    bed.full(true);
    bed.watch(rules(&[boost(Trigger::Start)], false, true), true);
    assert_eq!((bed.quota(), bed.noted()), (REST, None));
    // Nor later.
    bed.full(false);
    bed.look();
    assert_eq!((bed.quota(), bed.noted()), (REST, None));
    assert!(bed.row().boosts.is_empty() && !bed.row().is_active());
    assert!(locked(&bed.hands.0.set).is_empty());
}

#[test]
fn an_end_that_cannot_be_written_down_is_written_down_later() {
    let mut bed = Bed::new("end");
    bed.watch(rules(&[boost(Trigger::Start)], false, true), true);
    assert_eq!((bed.quota(), bed.noted()), (LENT, Some(Some(LENT))));
    bed.full(true);
    bed.row().rules = rules(&[], false, true);
    bed.look();
    assert_eq!((bed.quota(), bed.noted()), (REST, Some(Some(LENT))));
    assert!(bed.row().is_active());
    bed.full(false);
    bed.look();
    assert_eq!(bed.noted(), Some(None));
}

#[test]
fn a_start_begins_with_its_limits_and_not_before() {
    let mut bed = Bed::new("start");
    bed.write("max 100000\n");
    bed.watch(rules(&[boost(Trigger::Start)], true, true), true);
    bed.look();
    assert_eq!(bed.noted(), None);
    assert!(bed.row().is_active() && bed.row().needs_programs());
    bed.write("25000 100000\n");
    bed.look();
    assert_eq!((bed.quota(), bed.noted()), (LENT, Some(Some(LENT))));
    // Its runtime sets them once more.
    bed.write("25000 100000\n");
    bed.look();
    assert_eq!(bed.quota(), LENT);
}

#[test]
fn a_start_whose_programs_were_not_told_begins_when_the_runtime_says_so() {
    let mut bed = Bed::new("missed");
    bed.watch(rules(&[boost(Trigger::Start)], true, false), true);
    bed.look();
    assert_eq!(bed.noted(), None);
    bed.row().rules.is_starting = false;
    bed.look();
    assert_eq!(bed.noted(), Some(Some(LENT)));
    // Not a second time.
    bed.row().rules.boosts = Arc::from([]);
    bed.look();
    bed.row().rules.boosts = Arc::from([boost(Trigger::Start)]);
    bed.look();
    assert_eq!(bed.noted(), Some(None));
    assert!(!bed.row().is_active() && !bed.row().needs_programs());
}

#[test]
fn a_program_that_has_ended_before_it_is_followed_is_lent_nothing_for_long() {
    let mut bed = Bed::new("program");
    let mut rule = boost(Trigger::Exec(Program {
        file: "make".to_owned(),
        arguments: Vec::new(),
    }));
    rule.until.exit = true;
    bed.watch(rules(&[rule], false, true), false);
    assert!(bed.row().needs_programs() && !bed.row().is_active());
    // No process has this number (PID_MAX_LIMIT is 4 Mi).
    let executed = |file: &str| Executed {
        process: 5 << 20,
        file: file.to_owned(),
        at: now(),
    };
    let id = bed.cgroup.id();
    bed.worker
        .executed(id, &[executed("cc"), executed("/usr/bin/make")]);
    assert!(bed.row().boosts.is_empty());
    assert_eq!((bed.quota(), bed.noted()), (REST, None));
}

/// As where the agent is in a namespace of cgroups of its own: what `/proc` says of the program names no directory there.
#[test]
fn a_program_is_lent_to_until_its_end_wherever_in_the_container_it_is() {
    let mut rule = boost(Trigger::Exec(Program {
        file: "sleep".to_owned(),
        arguments: Vec::new(),
    }));
    rule.until.exit = true;
    for (name, below, is_in) in [
        ("own", "", true),
        ("below", "init.scope", true),
        ("elsewhere", "", false),
    ] {
        let mut bed = Bed::new(name);
        bed.watch(rules(std::slice::from_ref(&rule), false, true), false);
        let mut child = process::Command::new("sleep").arg("60").spawn().unwrap();
        let executed = Executed {
            process: child.id(),
            file: "/bin/sleep".to_owned(),
            at: now(),
        };
        let directory = bed.cgroup.path().join(below);
        fs::create_dir_all(&directory).unwrap();
        let processes = if is_in { child.id() } else { process::id() };
        fs::write(bed.cgroup.path().join("cgroup.procs"), "").unwrap();
        fs::write(directory.join("cgroup.procs"), format!("{processes}\n")).unwrap();
        let id = bed.cgroup.id();
        bed.worker.executed(id, &[executed]);
        assert_eq!(bed.quota(), if is_in { LENT } else { REST }, "{name}");
        child.kill().unwrap();
        child.wait().unwrap();
        bed.look();
        assert_eq!((bed.quota(), bed.row().boosts.is_empty()), (REST, true));
    }
}

#[test]
fn where_somebody_else_says_that_it_is_ready_nobody_is_asked() {
    let mut bed = Bed::new("told-ready");
    let mut lent = boost(Trigger::Start);
    lent.until.ready = Some(bellows_core::boost::Ready {
        port: 1,
        path: None,
    });
    let told = |is_ready| Rules {
        is_ready: Some(is_ready),
        ..rules(&[lent.clone()], false, true)
    };
    bed.watch(told(false), true);
    bed.look();
    assert_eq!(bed.row().boosts.cpu(), Some(LENT));
    bed.row().rules = told(true);
    bed.look();
    assert!(bed.row().boosts.is_empty());
}

#[test]
fn a_raise_goes_as_far_as_is_allowed_and_a_lowering_always() {
    let cpu = |millis| Some(Cpu::millis(millis));
    let of = |to, before, most: Option<Cpu>| {
        let decided = Some((Cpu::millis(to), Reason::Throttled));
        let is_refused = false;
        let most = most.map(|cpu| Most { cpu, is_refused });
        allowed(decided, REST, before, most).map(|(to, _)| to)
    };
    assert_eq!(of(2000, cpu(250), None), cpu(2000));
    assert_eq!(of(2000, cpu(250), cpu(3000)), cpu(2000));
    assert_eq!(of(2000, cpu(250), cpu(500)), cpu(500));
    assert_eq!(of(2000, None, cpu(500)), cpu(500));
    // What is read back must be what was asked for, whoever rounds.
    assert_eq!(of(2000, cpu(250), Some(Cpu(333_333))), cpu(330));
    assert_eq!(of(2000, cpu(250), Some(Cpu(259_999))), None);
    for most in [250, 100] {
        assert_eq!(of(2000, cpu(250), cpu(most)), None);
    }
    assert_eq!(of(250, cpu(2000), cpu(100)), cpu(250));
}

#[test]
fn what_was_refused_comes_down_and_is_not_raised_again() {
    let mut bed = Bed::new("refused");
    bed.watch(rules(&[boost(Trigger::Start)], false, true), true);
    assert_eq!(bed.quota(), LENT);
    let refused = |cpu| Most {
        cpu,
        is_refused: true,
    };
    bed.most(Some(refused(REST)));
    bed.look();
    assert_eq!(bed.quota(), REST);
    bed.look();
    assert_eq!(locked(&bed.hands.0.set).len(), 2);
    // It is still lent, and may be had again.
    bed.most(None);
    bed.look();
    assert_eq!(bed.quota(), LENT);
    // Never below what it has at rest.
    bed.most(Some(refused(Cpu::millis(100))));
    bed.look();
    assert_eq!(bed.quota(), REST);
    bed.look();
    assert_eq!(locked(&bed.hands.0.set).len(), 4);
}

#[test]
fn what_is_seen_at_rest_is_told_unless_something_is_lent_to_it() {
    let mut bed = Bed::new("rests");
    bed.watch(rules(&[], false, true), false);
    assert_eq!(bed.rested(), 1);
    // Raised, and somebody else undoes it; the one who is told looks anew.
    bed.write("400000 100000\n");
    bed.look();
    bed.write("25000 100000\n");
    let before = bed.rested();
    bed.is_told(Command::Look(CgroupId(7)));
    assert_eq!(bed.rested(), before + 1);
    let mut bed = Bed::new("lent-at-rest");
    bed.watch(rules(&[boost(Trigger::Start)], false, true), true);
    bed.write("25000 100000\n");
    bed.look();
    assert_eq!((bed.quota(), bed.rested()), (LENT, 0));
}

#[test]
fn who_has_no_quota_or_somebody_elses_is_not_looked_at_for_ever() {
    let mut bed = Bed::new("without");
    bed.write("max 100000\n");
    bed.watch(rules(&[], false, true), false);
    assert!(!bed.row().is_active());
    let mut bed = Bed::new("foreign");
    bed.hands.0.is_foreign.store(true, Ordering::Relaxed);
    bed.write("400000 100000\n");
    bed.watch(rules(&[], false, true), false);
    assert!(!bed.row().is_active());
    bed.look();
    assert_eq!(bed.asked(), 1);
    // Another one may be ours.
    bed.write("300000 100000\n");
    bed.look();
    assert_eq!(bed.asked(), 2);
    // Whoever watches it says what becomes of it.
    bed.is_told(Command::Look(CgroupId(7)));
    assert_eq!(bed.asked(), 3);
    bed.hands.0.is_foreign.store(false, Ordering::Relaxed);
    bed.look();
    assert_eq!((bed.asked(), bed.row().is_active()), (3, false));
    bed.is_told(Command::Rules(CgroupId(7), rules(&[], false, true)));
    assert_eq!((bed.asked(), bed.quota()), (4, REST));
}

#[test]
fn a_quota_that_its_period_does_not_divide_is_set_once() {
    let mut bed = Bed::new("period");
    bed.write("8334 33333\n");
    let mut odd = boost(Trigger::Start);
    odd.cpu = Some(Cpu::millis(2001));
    bed.watch(rules(&[odd], false, true), true);
    bed.look();
    bed.look();
    assert_eq!(*locked(&bed.hands.0.set), [Cpu::millis(2001)]);
}

#[test]
fn who_may_not_be_raised_is_not_looked_at_for_being_throttled() {
    let mut bed = Bed::new("throttled");
    bed.watch(rules(&[], false, true), false);
    assert!(!bed.row().needs_throttles());
    // One that may be, for now by nobody.
    let mut raised = rules(&[], false, true);
    raised.cpu.as_mut().unwrap().max = LENT;
    bed.row().rules = raised;
    assert!(bed.row().needs_throttles());
    bed.most(Some(Most {
        cpu: REST,
        is_refused: false,
    }));
    let throttled = |bed: &mut Bed, at| {
        let id = bed.cgroup.id();
        bed.worker.are_throttled(&[(id, at)].into());
        bed.rested()
    };
    let (first, at) = (bed.rested(), now());
    assert_eq!(throttled(&mut bed, at), first + 1);
    assert_eq!(
        throttled(&mut bed, at),
        first + 1,
        "it was looked at just now"
    );
    let later = Nanos(now().0 + IDLE_FOR.0);
    assert_eq!(throttled(&mut bed, later), first + 2);
    // A raise is followed by the next at once.
    bed.most(None);
    let at = Nanos(later.0 + IDLE_FOR.0);
    throttled(&mut bed, at);
    let raised = bed.quota();
    assert!(raised > REST);
    throttled(&mut bed, at);
    assert!(bed.quota() > raised);
    // What is lent is put right when somebody writes over it.
    let mut lent = Bed::new("lent-throttled");
    lent.watch(rules(&[boost(Trigger::Start)], false, true), true);
    assert!(lent.row().needs_throttles());
}
