use std::{env, fs, process};

use bellows_core::Reason;

use super::{
    super::bed::{Bed, key},
    *,
};
use crate::quota::NotSet;

fn wish(original: u64, limit: u64) -> CpuWish {
    CpuWish {
        index: 0,
        id: None,
        limit_text: format!("{limit}m"),
        limit: Cpu::millis(limit),
        original: Cpu::millis(original),
        original_text: format!("{original}m"),
        rules: None,
        boosts: Vec::new(),
        recorded: true,
        foreign: false,
        refusal: None,
    }
}

/// What a kubelet makes of a limit in this period, rounded down.
fn set(millis: u64, period: u64) -> Quota {
    let quota = (millis * period / 1000).max(1000);
    let cpu = Cpu::of_quota(quota, period).unwrap();
    Quota { cpu, period }
}

#[test]
fn what_others_round_differently_is_at_rest_all_the_same() {
    for (millis, period) in [
        (250, 100_000),
        (255, 33_333),
        (255, 12_500),
        (5, 100_000),
        (1, 100_000),
    ] {
        let quota = set(millis, period);
        let moved = quota_of(&wish(millis, millis), quota, None);
        assert!(moved.is_settled(quota), "{millis}m in {period}: {moved:?}");
    }
}

#[test]
fn what_another_container_was_given_by_mistake_is_brought_down() {
    let mut moved = quota_of(&wish(250, 250), set(250, 100_000), None);
    moved.cpu.ask(Cpu::millis(2000), moved.cpu.at_rest);
    let of = |millis| is_left_raised(Some(&moved), Some(set(millis, 100_000)));
    assert!(of(2000) && !of(250) && !of(1000));
    assert!(!is_left_raised(Some(&moved), None), "it is gone");
}

#[test]
fn what_systemd_has_rounded_up_is_no_raise() {
    let moved = quota_of(&wish(125, 125), set(130, 100_000), None);
    assert_eq!(
        (moved.cpu.at_rest, moved.latest().cpu),
        (Cpu::millis(125), moved.told)
    );
    assert!(moved.is_ours(set(130, 100_000)));
}

#[test]
fn what_is_left_raised_is_ours() {
    let quota = set(2000, 100_000);
    let moved = quota_of(&wish(250, 2000), quota, None);
    assert!(moved.is_ours(quota) && !moved.is_settled(quota));
    assert_eq!(moved.cpu.at_rest, Cpu::millis(250));
    assert_eq!(moved.told, Cpu::millis(2000));
    // Raised on the node, of which the API was not told; its request is more than it was, since.
    let mut known = quota_of(&wish(250, 250), set(250, 100_000), None);
    known.cpu.ask(quota.cpu, known.cpu.at_rest);
    assert!(quota_of(&wish(500, 500), quota, Some(&known)).is_ours(quota));
}

#[test]
fn what_nobody_has_written_down_and_the_pod_does_not_say_is_somebody_elses() {
    let known = quota_of(&wish(250, 250), set(250, 100_000), None);
    // By hand, or one that the kubelet has not carried out.
    for theirs in [100, 1000] {
        let theirs = set(theirs, 100_000);
        for known in [None, Some(&known)] {
            let moved = quota_of(&wish(500, 500), theirs, known);
            assert!(!moved.is_ours(theirs) && moved.is_ours(set(500, 100_000)));
        }
    }
}

#[test]
fn what_somebody_has_just_set_is_not_overwritten_by_what_stands_raised() {
    let raised = set(2000, 100_000);
    let mut known = quota_of(&wish(250, 250), set(250, 100_000), None);
    known.cpu.ask(raised.cpu, known.cpu.at_rest);
    let moved = taken_over(&wish(500, 500), raised, &known);
    assert!(moved.is_ours(raised) && moved.is_ours(set(500, 100_000)));
    assert_eq!(
        (moved.latest().cpu, moved.told),
        (Cpu::millis(500), Cpu::millis(500))
    );
    // But what was told of it already must be taken back.
    let moved = taken_over(&wish(500, 2000), raised, &known);
    assert_eq!(
        (moved.latest().cpu, moved.told),
        (Cpu::millis(2000), Cpu::millis(2000))
    );
}

impl Bed {
    /// The pod's container is raised to two CPUs, of which the API knows.
    fn is_raised(&mut self, cgroup: &Cgroup) {
        let wish = wish(250, 2000);
        let quota = Some(quota_of(&wish, set(2000, 100_000), None));
        let original = Original {
            id: "one".to_owned(),
            name: "one".to_owned(),
            limit: None,
            quota,
            boosts: Boosts::none(),
            has_begun: true,
            path: cgroup.path().to_owned(),
        };
        let target = CpuTarget {
            namespace: "dev".to_owned(),
            name: "workspace".to_owned(),
            uid: "0f8c".to_owned(),
            cgroup: cgroup.clone(),
            container: "app".to_owned(),
            index: 0,
            is_reported: Some(true),
            limit: wish.limit_text,
            original_text: wish.original_text,
            is_recorded: true,
            is_put_off: false,
            original,
            pod: None,
            order: self.watch.order("0f8c"),
            times: QuotaTimes::default(),
            is_telling: false,
            refused: None,
            of_pod: None,
        };
        let targets = self.watch.containers().targets();
        targets.with(|targets| drop(targets.insert(cgroup.id(), target)));
        let known = KnownCpu {
            cgroup: cgroup.clone(),
            rules: None,
        };
        self.watch.cpus.insert(key("app"), known);
    }
}

#[tokio::test]
async fn what_the_kubelet_has_put_off_is_not_written_in_its_place() {
    let path = env::temp_dir().join(format!("bellows-put-off-{}", process::id()));
    fs::create_dir_all(&path).unwrap();
    let cpu_max = || fs::read_to_string(path.join("cpu.max")).unwrap();
    fs::write(path.join("cpu.max"), "20000 100000\n").unwrap();
    let cgroup = Cgroup::open(&path).unwrap();
    let mut bed = Bed::new().await;
    bed.is_raised(&cgroup);
    let cpus = bed.watch.context.cpus.clone();
    cpus.containers().targets().of(cgroup.id(), |target| {
        target.is_put_off = true;
    });
    let set = cpus.set_quota(&cgroup, Cpu::millis(250), Reason::BelowRest);
    assert!(matches!(set, Err(NotSet::PutOff)));
    assert_eq!(cpu_max(), "20000 100000\n");
    fs::remove_dir_all(&path).unwrap();
}

#[tokio::test]
async fn what_is_raised_in_a_pod_that_is_ending_comes_to_rest() {
    let path = env::temp_dir().join(format!("bellows-ending-{}", process::id()));
    fs::create_dir_all(&path).unwrap();
    let sets = |text| fs::write(path.join("cpu.max"), text).unwrap();
    sets("200000 100000\n");
    let mut bed = Bed::new().await;
    bed.sees("64Mi");
    let (pod, mut seen, _) = bed.wish();
    bed.is_raised(&Cgroup::open(&path).unwrap());
    seen.ending = true;
    bed.watch.follow_cpu(&pod, &seen);
    let rules = bed.watch.cpus[&key("app")].rules.as_ref();
    let rules = rules.and_then(|rules| rules.cpu).unwrap();
    assert_eq!(
        (rules.at_rest, rules.max),
        (Cpu::millis(250), rules.at_rest)
    );
    assert!(bed.watch.pending.contains("0f8c"));
    // Nobody waits for the API.
    sets("25000 100000\n");
    bed.watch.follow_cpu(&pod, &seen);
    assert!(bed.watch.cpus.is_empty());
    // Nor for a container that has ended.
    bed.is_raised(&Cgroup::open(&path).unwrap());
    fs::remove_dir_all(&path).unwrap();
    bed.watch.follow_cpu(&pod, &seen);
    assert!(bed.watch.cpus.is_empty());
}
