//! What the reflex must not do between a kernel event and its write: allocate. An allocation may wait for
//! memory, for another thread's lock, or for a page of its own, in the milliseconds that decide.
//!
//! The cgroup is a directory with files of the same names; the kernel's side is seen in the guests.

use std::{env, fs, path::PathBuf, process, thread};

use bellows_core::{Actuation, Bytes, CgroupId, Nanos, Patience, Policy, Reason, Signals, WHOLE};
use bellows_ebpf_common::{ENTRY_CALL, ENTRY_FAULT, ENTRY_UNKNOWN, KIND_WATERMARK, MemoryEvent};

use super::{Arm, Brakes, Controls, Freezer, Means, Verdict, row::Row};
use crate::{
    cgroup::Cgroup,
    clock::now,
    ledger::Ledger,
    signal::{files::Files, source::Source},
};

const ID: CgroupId = CgroupId(7);
const LIMIT: Bytes = Bytes::mib(64);
const REQUESTED: Actuation = Actuation::Requested {
    p95: Nanos::millis(600),
};

/// A row and all that it acts with, on a directory that goes with it.
struct Stage {
    directory: PathBuf,
    row: Row,
    source: Source,
    ledger: Ledger,
    brakes: Brakes,
    freezer: Freezer,
}

impl Stage {
    fn new(name: &str, actuation: Actuation) -> Self {
        Self::with_brake(name, actuation, "max")
    }

    fn with_brake(name: &str, actuation: Actuation, high: &str) -> Self {
        let directory = env::temp_dir().join(format!("bellows-{}-{name}", process::id()));
        fs::create_dir_all(&directory).unwrap();
        for (file, content) in [
            ("memory.max", LIMIT.0.to_string()),
            ("memory.high", high.to_owned()),
            ("memory.current", "4096".to_owned()),
            ("cgroup.freeze", "0".to_owned()),
            ("cgroup.events", "populated 1\nfrozen 1\n".to_owned()),
            ("pids.current", "3".to_owned()),
            ("cpu.stat", "usage_usec 0\n".to_owned()),
            ("cpu.pressure", "some total=0\n".to_owned()),
            ("memory.pressure", "some total=0\n".to_owned()),
        ] {
            fs::write(directory.join(file), content).unwrap();
        }
        let controls = Controls::open(&Cgroup::stand_in(&directory, ID)).unwrap();
        let policy = Policy {
            original: LIMIT,
            ceiling: Bytes::mib(1024),
            actuation,
            signals: Signals::Programs,
            patience: Patience::UNPROBED,
            cpus: 2,
            shrink_after: Nanos::millis(2000),
            usable_per_mille: WHOLE,
            by_hand_after: None,
            priority: 0,
            parallelism: bellows_core::elastic::Parallelism::Unchanged,
            learnt: None,
        };
        let arm = Arm {
            cgroup: ID,
            policy,
            lowering: None,
            controls: Some(controls),
        };
        Self {
            row: Row::armed(arm, None).unwrap(),
            source: Source::Files(Files::new().unwrap()),
            ledger: Ledger::open(&directory.join("ledger")).unwrap(),
            brakes: Brakes::start(|_late| ()).unwrap(),
            freezer: Freezer::start(|_told| ()).unwrap(),
            directory,
        }
    }

    /// The same with a limit that somebody else raises, held.
    fn held(name: &str) -> Self {
        let mut stage = Self::new(name, REQUESTED);
        let (held, _) = stage.react(&event(Nanos(0)));
        assert!(matches!(held, Verdict::Held { .. }), "{held:?}");
        stage
    }

    /// Lets the row react; returns the verdict and how often that allocated.
    fn react(&mut self, event: &MemoryEvent) -> (Verdict, u64) {
        let mut verdict = None;
        let allocated = allocation_counter::measure(|| verdict = self.look(event));
        (verdict.unwrap().unwrap(), allocated.count_total)
    }

    /// Looks after a hold, `later` than it began.
    fn look_after(&mut self, later: Nanos) -> Vec<Verdict> {
        let verdicts = self.row_looks_after(later);
        self.settle();
        verdicts
    }

    /// The same with a freezer that comes when it comes.
    fn row_looks_after(&mut self, later: Nanos) -> Vec<Verdict> {
        let mut verdicts = Vec::new();
        let mut means = Means {
            source: &mut self.source,
            ledger: &mut self.ledger,
            brakes: &self.brakes,
            freezer: &self.freezer,
        };
        let since = self.row.held.map_or_else(now, |held| held.since);
        let at = Nanos(since.0 + later.0);
        self.row.look_after(at, &mut means, &mut verdicts);
        verdicts
    }

    /// What is written when it is to be frozen again.
    fn freezes_again(&mut self) -> String {
        let mut means = Means {
            source: &mut self.source,
            ledger: &mut self.ledger,
            brakes: &self.brakes,
            freezer: &self.freezer,
        };
        assert_eq!(self.row.freeze_again(&mut means), None);
        self.settle();
        self.content("cgroup.freeze")
    }

    /// Writes what the freezer's thread is asked to write, if that has not done so yet.
    fn settle(&self) {
        self.row.controls.freeze.settle().unwrap();
    }

    /// Runc would wait for a container that is to be frozen and is not.
    fn wait_until_thawed(&mut self, later: Nanos) {
        let start = now();
        while self.content("cgroup.freeze") == "1" {
            assert!(
                now().since(start) < Nanos::millis(3000),
                "it stays frozen, memory.high {}, wanted {:?}",
                self.content("memory.high"),
                self.row.held.map(|held| held.braked)
            );
            let verdicts = self.look_after(later);
            assert!(
                verdicts.is_empty(),
                "{verdicts:?}, memory.high {}, wanted {:?}",
                self.content("memory.high"),
                self.row.held.map(|held| held.braked)
            );
            thread::yield_now();
        }
        let high = self.content("memory.high");
        assert!(high.parse::<u64>().is_ok(), "thawed before it was braked");
    }

    /// The same where nothing may have to be done.
    fn look(&mut self, event: &MemoryEvent) -> Option<Result<Verdict, String>> {
        let verdict = self.look_at(event);
        self.settle();
        verdict
    }

    /// The same with a freezer that comes when it comes.
    fn look_at(&mut self, event: &MemoryEvent) -> Option<Result<Verdict, String>> {
        // However slow the test is, and whenever the freeze was written.
        let held = self.row.held.map_or_else(now, |held| held.since);
        let frozen = self.row.controls.freeze.frozen_at();
        let began = frozen.map_or(held, |frozen| frozen.max(held));
        let event = &MemoryEvent {
            at_ns: began.0 + event.at_ns,
            ..*event
        };
        let mut means = Means {
            source: &mut self.source,
            ledger: &mut self.ledger,
            brakes: &self.brakes,
            freezer: &self.freezer,
        };
        let demand = Bytes::from_pages(event.usage_pages);
        self.row.react(event, demand, &mut means)
    }

    fn is_braked(&self) -> bool {
        self.row.held.is_some_and(|held| held.braked.is_some())
    }

    fn content(&self, file: &str) -> String {
        fs::read_to_string(self.directory.join(file)).unwrap()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        drop(fs::remove_dir_all(&self.directory));
    }
}

/// A charge a few pages below the limit, `later` than the hold began.
fn event(later: Nanos) -> MemoryEvent {
    event_with_room(8, later)
}

/// The same with so many pages left.
fn event_with_room(pages: u64, later: Nanos) -> MemoryEvent {
    MemoryEvent {
        kind: KIND_WATERMARK,
        charge_pages: 64,
        at_ns: later.0,
        usage_pages: LIMIT.pages() - pages,
        limit_pages: LIMIT.pages(),
        window_pages: 2000,
        window_ns: 5_000_000,
        ..MemoryEvent::default()
    }
}

#[test]
fn a_raise_allocates_nothing() {
    let mut stage = Stage::new("raise", Actuation::Direct);
    let (verdict, allocated) = stage.react(&event(Nanos(0)));
    let Verdict::Raised { limit, .. } = verdict else {
        panic!("{verdict:?}")
    };
    assert!(limit > LIMIT);
    assert_eq!(stage.content("memory.max"), limit.0.to_string());
    assert_eq!(allocated, 0);
}

#[test]
fn holding_and_braking_allocate_nothing() {
    let mut stage = Stage::new("hold", REQUESTED);
    // Three threads need 384 pages to fall asleep.
    let (verdict, allocated) = stage.react(&event_with_room(400, Nanos(0)));
    assert!(matches!(verdict, Verdict::Held { .. }), "{verdict:?}");
    assert_eq!(stage.content("cgroup.freeze"), "1");
    assert!(!stage.is_braked());
    assert_eq!(allocated, 0);
    // Where it is not known what a charge comes from, one after the freeze has settled is a system call's.
    let (verdict, allocated) = stage.react(&event(Nanos::millis(5)));
    assert!(matches!(verdict, Verdict::Braked { .. }), "{verdict:?}");
    assert_eq!(allocated, 0);
}

#[test]
fn a_page_fault_under_way_is_no_reason_to_brake() {
    let mut stage = Stage::new("fault", REQUESTED);
    let fault = |pages, later| MemoryEvent {
        entry: ENTRY_FAULT,
        thread: 1,
        ..event_with_room(pages, Nanos::millis(later))
    };
    stage.react(&fault(400, 0));
    for (pages, later) in [(380, 1), (100, 30), (8, 60)] {
        assert!(stage.look(&fault(pages, later)).is_none());
    }
    assert_eq!(stage.content("cgroup.freeze"), "1");
    assert!(!stage.is_braked());
}

#[test]
fn a_long_system_call_is_braked_instead_of_frozen() {
    let mut stage = Stage::new("call", REQUESTED);
    let call = |pages, thread, later| MemoryEvent {
        entry: ENTRY_CALL,
        thread,
        ..event_with_room(pages, Nanos::millis(later))
    };
    stage.react(&call(450, 1, 0));
    // Another one may be as short.
    assert!(stage.look(&call(440, 2, 1)).is_none());
    assert!(!stage.is_braked());
    let (verdict, allocated) = stage.react(&call(430, 2, 2));
    assert!(matches!(verdict, Verdict::Braked { .. }), "{verdict:?}");
    assert_eq!(allocated, 0);
    stage.wait_until_thawed(Nanos::millis(5));
    assert!(stage.content("memory.high").parse::<u64>().unwrap() < LIMIT.0 - 430 * 4096);
}

#[test]
fn where_the_brake_is_somebody_elses_a_long_call_is_only_let_out_of_the_freeze() {
    let foreign = (LIMIT.0 / 2).to_string();
    let mut stage = Stage::with_brake("foreign", REQUESTED, &foreign);
    assert!(stage.row.foreign_brake);
    let call = |later| MemoryEvent {
        entry: ENTRY_CALL,
        thread: 1,
        ..event_with_room(450, Nanos::millis(later))
    };
    stage.react(&call(0));
    assert_eq!(stage.content("cgroup.freeze"), "1");
    assert!(stage.look(&call(20)).is_none());
    assert!(stage.look_after(Nanos::millis(21)).is_empty());
    assert_eq!(stage.content("cgroup.freeze"), "0");
    assert_eq!(stage.content("memory.high"), foreign);
    assert!(stage.row.is_held(), "its hold still ends with the answer");
}

#[test]
fn charges_from_before_the_freeze_are_no_long_call() {
    let mut stage = Stage::new("before", REQUESTED);
    let before = MemoryEvent {
        entry: ENTRY_CALL,
        thread: 1,
        ..event_with_room(450, Nanos(0))
    };
    stage.react(&before);
    assert!(stage.look(&before).is_none());
    assert!(stage.look(&before).is_none());
    assert!(!stage.is_braked());
}

#[test]
fn a_freeze_that_is_not_complete_in_time_is_replaced() {
    let mut stage = incomplete("incomplete", ENTRY_UNKNOWN);
    assert!(stage.look_after(Nanos::millis(50)).is_empty());
    assert_eq!(stage.content("cgroup.freeze"), "1");
    let verdicts = stage.look_after(Nanos::millis(120));
    assert!(
        matches!(verdicts[..], [Verdict::Braked { .. }]),
        "{verdicts:?}"
    );
    stage.wait_until_thawed(Nanos::millis(120));
}

/// A brake lasts for seconds, and room may be there in minutes.
#[test]
fn who_waits_for_room_is_frozen_again() {
    let mut stage = incomplete("again", ENTRY_UNKNOWN);
    assert_eq!(stage.freezes_again(), "1", "it is to be frozen already");
    stage.look_after(Nanos::millis(120));
    stage.wait_until_thawed(Nanos::millis(120));
    assert_eq!(stage.freezes_again(), "1");
    let later = Nanos::millis(1200);
    assert!(stage.look_after(later).is_empty(), "nothing else is done");
    assert_eq!(stage.content("cgroup.freeze"), "1");
    // Where it goes on all the same the brake is all that there is.
    let mut stage = incomplete("never-frozen", ENTRY_UNKNOWN);
    stage.look_after(Nanos::millis(120));
    stage.wait_until_thawed(Nanos::millis(120));
    stage.row.policy.patience.frozen = Nanos(0);
    assert_eq!(stage.freezes_again(), "0", "its probes forbid it");
}

/// A stage whose freeze is not complete, held for a charge with this entry.
fn incomplete(name: &str, entry: u32) -> Stage {
    let mut stage = Stage::new(name, REQUESTED);
    let usage = (LIMIT.0 - 450 * 4096).to_string();
    for (file, content) in [("cgroup.events", "frozen 0\n"), ("memory.current", &usage)] {
        fs::write(stage.directory.join(file), content).unwrap();
    }
    stage.react(&entered(entry, Nanos(0)));
    stage
}

fn entered(entry: u32, later: Nanos) -> MemoryEvent {
    MemoryEvent {
        entry,
        thread: 1,
        ..event_with_room(450, later)
    }
}

/// Looks at a hold whose freeze is not complete, after its threads have run for `ran`.
fn look_after_run(stage: &mut Stage, later: u64, ran: u64) -> Vec<Verdict> {
    let stat = format!("usage_usec {}\n", ran * 1000);
    fs::write(stage.directory.join("cpu.stat"), stat).unwrap();
    stage.look_after(Nanos::millis(later))
}

#[test]
fn page_faults_may_end_for_as_long_as_they_go_on() {
    let mut stage = incomplete("slow", ENTRY_FAULT);
    for later in (50..=190).step_by(10) {
        assert!(look_after_run(&mut stage, later, later).is_empty());
    }
    assert!(look_after_run(&mut stage, 201, 200).is_empty());
    // Runc may have asked: whatever they do now, only a complete freeze lets it go on.
    for later in (240..9900).step_by(30) {
        assert!(look_after_run(&mut stage, later, 200).is_empty());
    }
    assert_eq!(stage.content("cgroup.freeze"), "1");
    assert!(!stage.is_braked());
}

#[test]
fn page_faults_that_wait_for_something_else_are_let_out() {
    let mut stage = incomplete("stuck", ENTRY_FAULT);
    assert!(look_after_run(&mut stage, 50, 50).is_empty());
    // What completes an input or output now and then runs, too.
    assert!(look_after_run(&mut stage, 80, 52).is_empty());
    let verdicts = look_after_run(&mut stage, 101, 54);
    assert!(
        matches!(verdicts[..], [Verdict::Braked { .. }]),
        "{verdicts:?}"
    );
    stage.wait_until_thawed(Nanos::millis(140));
}

#[test]
fn threads_that_wait_for_cpu_or_memory_go_on() {
    for file in ["cpu.pressure", "memory.pressure"] {
        let mut stage = incomplete(file, ENTRY_FAULT);
        for later in [80, 110, 140, 170] {
            let total = later * 1000;
            let pressure = format!("some avg10=0.00 avg60=0.00 avg300=0.00 total={total}\n");
            fs::write(stage.directory.join(file), pressure).unwrap();
            assert!(stage.look_after(Nanos::millis(later)).is_empty(), "{file}");
        }
        assert_eq!(stage.content("cgroup.freeze"), "1", "{file}");
    }
}

#[test]
fn what_may_be_a_system_call_is_not_waited_for() {
    for (name, entries) in [
        ("unknown", [ENTRY_UNKNOWN, ENTRY_FAULT]),
        ("first", [ENTRY_CALL, ENTRY_FAULT]),
        ("second", [ENTRY_FAULT, ENTRY_CALL]),
    ] {
        let mut stage = incomplete(name, entries[0]);
        let _nothing = stage.look(&entered(entries[1], Nanos::millis(1)));
        let verdicts = stage.look_after(Nanos::millis(110));
        assert!(
            matches!(verdicts[..], [Verdict::Braked { .. }]),
            "{name}: {verdicts:?}"
        );
    }
}

#[test]
fn whoever_grows_while_the_freeze_is_late_is_braked() {
    let mut stage = Stage::new("late", REQUESTED);
    let usage = LIMIT.0 - 450 * 4096;
    fs::write(stage.directory.join("memory.current"), usage.to_string()).unwrap();
    let (stuck, _queue) = Freezer::stuck();
    stage.freezer = stuck;
    let fault = |later| entered(ENTRY_FAULT, Nanos::millis(later));
    let held = stage.look_at(&fault(0)).unwrap().unwrap();
    assert!(
        matches!(held, Verdict::Held { braked: false, .. }),
        "{held:?}"
    );
    assert!(stage.look_at(&fault(4)).is_none());
    let braked = stage.look_at(&fault(6)).unwrap().unwrap();
    assert!(matches!(braked, Verdict::Braked { .. }), "{braked:?}");
    let start = now();
    while stage.content("memory.high") == "max" {
        assert!(now().since(start) < Nanos::millis(3000), "it is not braked");
        thread::yield_now();
    }
    // Everybody wakes up before runc asks for a freeze that comes yet: 200 of 600 ms.
    let sleep = |stage: &Stage, charges: u64| {
        let high = stage.row.held.unwrap().braked.unwrap().high;
        let usage = usage + charges * 64 * 4096;
        64_000.0 * (usage as f64 / high.0 as f64 - 1.0).powi(2)
    };
    // Three threads have seven charges of a quarter of a MiB: three sevenths of 144 ms.
    assert!(
        (50.0..62.0).contains(&sleep(&stage, 3)),
        "{}",
        sleep(&stage, 3)
    );
    assert!(stage.row_looks_after(Nanos::millis(50)).is_empty());
    assert_eq!(stage.content("cgroup.freeze"), "0");
    // One that does not come is replaced.
    let replaced = stage.row_looks_after(Nanos::millis(110));
    assert!(
        matches!(replaced[..], [Verdict::Braked { .. }]),
        "{replaced:?}"
    );
    assert!(sleep(&stage, 0) > 250.0, "{}", sleep(&stage, 0));
    stage.settle();
    stage.wait_until_thawed(Nanos::millis(111));
    assert_eq!(stage.row.controls.freeze.frozen_at(), None);
    // Three threads need 384 pages to fall asleep.
    let mut stage = Stage::new("late-scarce", REQUESTED);
    let (stuck, _queue) = Freezer::stuck();
    stage.freezer = stuck;
    stage.look_at(&fault(0));
    let scarce = MemoryEvent {
        entry: ENTRY_FAULT,
        ..event_with_room(380, Nanos::millis(1))
    };
    let braked = stage.look_at(&scarce).unwrap().unwrap();
    assert!(matches!(braked, Verdict::Braked { .. }), "{braked:?}");
}

#[test]
fn where_the_brake_is_somebody_elses_a_late_freeze_is_waited_for() {
    let mut stage = Stage::with_brake("foreign-late", REQUESTED, "4096");
    let (stuck, _queue) = Freezer::stuck();
    stage.freezer = stuck;
    stage.look_at(&entered(ENTRY_FAULT, Nanos(0)));
    assert!(
        stage
            .look_at(&entered(ENTRY_FAULT, Nanos::millis(30)))
            .is_none()
    );
    for later in [50, 150] {
        let verdicts = stage.row_looks_after(Nanos::millis(later));
        assert!(verdicts.is_empty(), "{verdicts:?}");
    }
    stage.settle();
    assert_eq!(stage.content("cgroup.freeze"), "1");
}

#[test]
fn a_complete_freeze_stays() {
    let mut stage = Stage::new("complete", REQUESTED);
    stage.react(&event_with_room(450, Nanos(0)));
    for later in [50, 120, 300] {
        assert!(stage.look_after(Nanos::millis(later)).is_empty());
    }
    assert_eq!(stage.content("cgroup.freeze"), "1");
    assert!(!stage.is_braked());
}

#[test]
fn scarce_room_is_braked_with_the_freeze() {
    let mut stage = Stage::new("scarce", REQUESTED);
    let (verdict, allocated) = stage.react(&event_with_room(380, Nanos(0)));
    assert!(matches!(verdict, Verdict::Held { .. }), "{verdict:?}");
    assert_eq!(stage.content("cgroup.freeze"), "1");
    assert!(stage.is_braked());
    assert_eq!(allocated, 0);
}

#[test]
fn a_hold_keeps_its_brake_when_it_is_armed_again() {
    let mut stage = Stage::new("armed", REQUESTED);
    stage.react(&event_with_room(380, Nanos(0)));
    let high = stage.row.held.unwrap().braked.unwrap().high;
    let start = now();
    while stage.content("memory.high") != high.0.to_string() {
        assert!(now().since(start) < Nanos::millis(3000), "it is not braked");
        thread::yield_now();
    }
    stage.row.watch(&mut stage.source).unwrap();
    assert_eq!(stage.content("memory.high"), high.0.to_string());
}

#[test]
fn letting_go_allocates_nothing() {
    let mut stage = Stage::held("release");
    let mut verdict = None;
    let allocated = allocation_counter::measure(|| {
        let (row, ledger) = (&mut stage.row, &mut stage.ledger);
        verdict = Some(row.thaw(ledger, &stage.freezer, Reason::RaiseArrived));
    });
    stage.settle();
    assert!(
        matches!(verdict, Some(Verdict::Released { .. })),
        "{verdict:?}"
    );
    assert_eq!(stage.content("cgroup.freeze"), "0");
    assert_eq!(allocated.count_total, 0);
}

#[test]
fn a_hold_ends_with_the_containers_patience() {
    let mut stage = Stage::held("patience");
    // Nobody raises the limit.
    assert!(stage.look_after(Nanos::millis(9900)).is_empty());
    assert_eq!(stage.content("cgroup.freeze"), "1");
    let verdicts = stage.look_after(Nanos::millis(10_100));
    assert!(
        matches!(verdicts[..], [Verdict::Released { .. }]),
        "{verdicts:?}"
    );
    assert_eq!(stage.content("cgroup.freeze"), "0");
    // What must come comes at once: it is not held again.
    assert!(!stage.row.is_held());
    let again = stage.look(&event(Nanos(0)));
    assert!(again.is_none(), "{again:?}");
}
