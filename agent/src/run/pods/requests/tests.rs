use std::path::Path;

use bellows_core::{
    CgroupId, Nanos,
    allowance::{Amount, Amounts, CountedPod, Quota, What},
    pod::{PutOff, RequestWish},
    quantity,
    requests::RequestRules,
};

use super::{change::AGAIN, loans::tests::lent, recent::Recent, *};
use crate::{
    actuate::{allowances::SharedAllowances, requests::NotChanged, resize::Order},
    cgroup::Cgroup,
};

pub(super) fn known(request: u64, original: u64) -> KnownRequest {
    let rules = RequestRules {
        right_size: true,
        make_room: true,
        floor: Bytes::mib(1),
        margin_per_mille: 250,
        observe: Nanos::millis(1000),
    };
    let [request, original] = [request, original].map(Bytes::mib);
    KnownRequest {
        wish: RequestWish {
            index: 0,
            id: Some("c1".to_owned()),
            request_text: quantity::format(request),
            request,
            original,
            original_text: quantity::format(original),
            allotted: None,
            rules: Some(rules),
            priority: 100,
            recorded: true,
            is_ours: true,
            foreign: false,
        },
        is_reported: true,
        cgroup: Cgroup::stand_in(Path::new("/nowhere"), CgroupId(1)),
        name: "dev/filler/app".to_owned(),
        namespace: "dev".to_owned(),
        pod: "filler".to_owned(),
        order: Order::default(),
        since: Instant::now(),
        peak: Bytes::mib(40),
        recent: Recent::default(),
        asked: None,
        not_allotted: None,
        loans: Vec::new(),
        owed: Bytes::ZERO,
        not_before: None,
        failures: 0,
        not_taken_back_before: None,
        not_taken_back: 0,
        backoff: Duration::ZERO,
    }
}

#[test]
fn a_request_that_is_refused_is_room_again() {
    let allowances = SharedAllowances::default();
    let amounts = Amounts {
        memory_request: Some(Bytes::mib(64).0),
        ..Amounts::default()
    };
    let pod = |uid: &str| CountedPod {
        namespace: "dev".to_owned(),
        uid: uid.to_owned(),
        containers: [("app".to_owned(), amounts)].into(),
        ..CountedPod::default()
    };
    let [hard, used] = [256, 128].map(|mib| Bytes::mib(mib).0);
    let quota = Quota {
        amounts: [(What::MemoryRequest, Amount { hard, used })].into(),
        ..Quota::default()
    };
    allowances.with(|all| {
        all.pod(pod("a"));
        all.pod(pod("b"));
        all.quota("dev", "q", Some(quota));
    });
    let most = || allowances.request_up_to(("b", "app"), Bytes::mib(1024));
    allowances.ask_request(("a", "app"), Bytes::mib(164));
    assert_eq!(most(), Bytes::mib(92));
    let done = Done {
        key: ("a".to_owned(), "app".to_owned()),
        to: Bytes::mib(164),
        why: RequestWhy::GivenBack,
        result: Err(NotChanged {
            why: "no".to_owned(),
            is_passing: false,
        }),
    };
    done.settle(&allowances);
    assert_eq!(most(), Bytes::mib(192));
}

/// What it has lent is not lost with its old cgroup, nor is it taken for one that uses nothing.
#[test]
fn a_container_that_is_started_again_is_the_same() {
    let mut known = known(100, 400);
    known.recent.saw(Bytes::mib(40));
    assert_eq!(known.uses(), None);
    known.sample();
    let why = RequestWhy::Lent {
        to: "dev/db".to_owned(),
        uid: "db".to_owned(),
        before: Bytes::ZERO,
        short: Bytes::mib(300),
        capacity: None,
    };
    known.took(Bytes::mib(100), &why);
    known.owed = Bytes::mib(300);
    let again = RequestWish {
        id: Some("c2".to_owned()),
        ..known.wish.clone()
    };
    let cgroup = Cgroup::stand_in(Path::new("/nowhere"), CgroupId(2));
    known.is_started_again(again, cgroup, true);
    assert_eq!((known.loans.len(), known.owed), (1, Bytes::mib(300)));
    let used = (known.peak, known.recent.peak());
    assert_eq!(used, (Bytes::mib(40), Bytes::mib(40)));
    assert_eq!(
        (known.wish.id.as_deref(), known.cgroup.id()),
        (Some("c2"), CgroupId(2))
    );
}

/// Once it is recorded nothing tells whose it was: it is followed before.
#[test]
fn what_somebody_else_has_set_is_not_moved_before_it_is_recorded() {
    let mut known = known(100, 400);
    let theirs = RequestWish {
        request: Bytes::mib(200),
        request_text: "200Mi".to_owned(),
        original: Bytes::mib(200),
        original_text: "200Mi".to_owned(),
        recorded: false,
        is_ours: false,
        foreign: true,
        ..known.wish.clone()
    };
    assert!(known.is_free() && !known.has_seen(&theirs));
    known.follow(theirs.clone(), true);
    assert!(known.has_seen(&theirs) && !known.is_free());
    let recorded = RequestWish {
        recorded: true,
        foreign: false,
        ..theirs
    };
    known.follow(recorded, true);
    assert!(known.is_free());
    assert_eq!(known.wish.original, Bytes::mib(200));
}

#[test]
fn what_fails_again_and_again_is_asked_for_less_and_less_often() {
    let mut known = known(100, 400);
    let mut wait = |is_passing| {
        known.failed(&RequestWhy::GivenBack, is_passing);
        let wait = known.not_before.unwrap() - Instant::now();
        (wait + Duration::from_millis(500)).as_secs()
    };
    let waits: Vec<u64> = (0..9).map(|_| wait(true)).collect();
    assert_eq!(waits, [5, 10, 20, 40, 80, 160, 320, 320, 320]);
    assert_eq!(wait(false), 600);
    known.took(Bytes::mib(400), &RequestWhy::GivenBack);
    known.failed(&RequestWhy::GivenBack, true);
    assert!(known.not_before.unwrap() - Instant::now() <= AGAIN);
}

/// The API takes what it does not answer for, and the kubelet puts it off: with it whatever else its pod needs.
#[test]
fn what_is_put_off_is_taken_back_however_often_it_has_failed() {
    let mut known = known(400, 400);
    known.wish.allotted = Some("300Mi".to_owned());
    let put_off = PutOff {
        is_infeasible: false,
        message: String::new(),
        is_current: true,
    };
    for _ in 0..9 {
        known.failed(&RequestWhy::GivenBack, true);
    }
    known.failed(&RequestWhy::GivenBack, false);
    assert!(known.is_too_soon());
    assert_eq!(known.to_take_back(&put_off), Some(Bytes::mib(300)));
    let mut wait = |is_passing| {
        known.failed(&RequestWhy::NoRoom, is_passing);
        assert_eq!(known.to_take_back(&put_off), None);
        let wait = known.not_taken_back_before.unwrap() - Instant::now();
        (wait + Duration::from_millis(500)).as_secs()
    };
    assert_eq!([true, true, true, false].map(&mut wait), [5, 10, 10, 60]);
    known.took(Bytes::mib(300), &RequestWhy::NoRoom);
    known.asked = None;
    assert_eq!(known.to_take_back(&put_off), Some(Bytes::mib(300)));
}

/// What the API has taken the kubelet may put off.
#[test]
fn what_was_lent_is_back_when_the_kubelet_has_allotted_it() {
    let mut known = known(400, 400);
    known.wish.rules = None;
    known.took(Bytes::mib(300), &lent("a"));
    let wish = |request: u64, allotted: &str| RequestWish {
        request: Bytes::mib(request),
        allotted: Some(allotted.to_owned()),
        ..known.wish.clone()
    };
    let down = wish(300, "300Mi");
    let up = wish(400, "300Mi");
    let back = wish(400, "400Mi");
    known.follow(down.clone(), true);
    known.took(Bytes::mib(400), &RequestWhy::GivenBack);
    known.follow(up, true);
    assert_eq!(known.loans.len(), 1);
    // It was put off.
    known.took(Bytes::mib(300), &RequestWhy::NoRoom);
    known.follow(down, true);
    assert_eq!(known.loans.len(), 1);
    known.took(Bytes::mib(400), &RequestWhy::GivenBack);
    known.follow(back, true);
    assert!(known.loans.is_empty());
    // A kubelet that does not say what it has allotted.
    known.took(Bytes::mib(300), &lent("a"));
    known.wish.allotted = None;
    known.took(Bytes::mib(400), &RequestWhy::GivenBack);
    assert!(known.loans.is_empty());
}
