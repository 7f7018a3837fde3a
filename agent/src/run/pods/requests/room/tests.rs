use std::{fs, path::Path};

use bellows_core::{CgroupId, Nanos, pod::RequestWish};

use super::*;
use crate::{ledger, run::pods::requests::tests::known};

fn request(from: u64, to: u64, why: RequestWhy) -> Record {
    Record::Request {
        at: Nanos(1),
        cgroup: CgroupId(7),
        uid: "filler".to_owned(),
        name: "dev/filler/app".to_owned(),
        from: Bytes::mib(from),
        to: Bytes::mib(to),
        why,
    }
}

fn filler() -> Owner {
    ("filler".to_owned(), "dev/filler/app".to_owned())
}

fn lent(uid: &str) -> RequestWhy {
    RequestWhy::Lent {
        to: format!("dev/{uid}"),
        uid: uid.to_owned(),
        before: Bytes::mib(64),
        short: Bytes::mib(100),
        capacity: Some(Bytes::mib(2048)),
    }
}

/// The next agent knows to whom something was lent, until all of it is back.
#[test]
fn what_was_lent_outlives_the_agent() {
    let borrowers = |records: &[Record]| {
        let own = loans(records).remove(&filler()).unwrap_or_default();
        own.into_iter().map(|loan| loan.uid).collect::<Vec<_>>()
    };
    let first = request(400, 300, lent("a"));
    let second = request(300, 250, lent("b"));
    let part = request(250, 350, RequestWhy::GivenBack);
    let all = request(350, 400, RequestWhy::GivenBack);
    let records = [first, second, part, all];
    assert_eq!(borrowers(&records[..1]), ["a"]);
    assert_eq!(borrowers(&records[..2]), ["a", "b"]);
    assert_eq!(borrowers(&records[..3]), ["a", "b"]);
    assert!(borrowers(&[]).is_empty());
    // What is asked for may be put off, or never come: whose request is what it was is not asked.
    assert_eq!(borrowers(&records), ["a", "b"]);
    let mut records = records.to_vec();
    records.push(request(400, 250, RequestWhy::NoRoom));
    assert_eq!(borrowers(&records), ["a", "b"]);
    records.push(request(250, 400, RequestWhy::GivenBack));
    records.push(request(400, 300, lent("c")));
    assert_eq!(borrowers(&records), ["c"]);
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

/// Not everybody is asked back by it, each time to be put off; but it may be wrong by now.
#[test]
fn by_an_old_word_one_at_a_time_is_asked_back() {
    let (done, _) = tokio::sync::mpsc::unbounded_channel();
    let path = Path::new("/nonexistent/ledger");
    let mut requests = Requests::new(path, done, std::sync::Arc::default());
    let key = |name: &str| (name.to_owned(), "app".to_owned());
    let mut lowered = Vec::new();
    for (name, original) in [("a", 400), ("b", 300), ("lender", 200)] {
        let mut known = known(100, original);
        known.wish.allotted = Some("100Mi".to_owned());
        if name == "lender" {
            known.loans.extend(Loan::of(&lent("db"), None));
        }
        requests.known.insert(key(name), known);
        requests.pods.insert(name.to_owned(), pod(100, 100));
        lowered.push(Lowered {
            key: key(name),
            priority: 0,
            request: Bytes::mib(100),
            wanted: Bytes::mib(original),
        });
    }
    requests.pods.insert("db".to_owned(), pod(500, 500));
    let now = Instant::now();
    let asked = |requests: &Requests, now| -> Vec<String> {
        let changes = requests.given_back(&lowered, now);
        changes.into_iter().map(|change| change.key.0).collect()
    };
    assert_eq!(asked(&requests, now), ["a", "b", "lender"]);
    requests.capacity_is(Bytes::mib(928));
    assert!(asked(&requests, Instant::now()).is_empty());
    let later = Instant::now() + HOLDS;
    assert_eq!(requests.capacity(later), None);
    assert_eq!(asked(&requests, later), ["b"]);
    // Until that is had.
    let known = requests.known.get_mut(&key("b")).unwrap();
    known.wish.request = Bytes::mib(300);
    assert!(asked(&requests, later).is_empty());
    // What there is room for by the old word is given all the same.
    requests.known.get_mut(&key("b")).unwrap().wish.request = Bytes::mib(100);
    requests.capacity_is(Bytes::mib(1028));
    assert_eq!(asked(&requests, Instant::now() + HOLDS), ["a"]);
}

/// Two lend 300 MiB each. The word of the moment when one of them was down comes after both are seen to be.
#[test]
fn nobody_lends_again_what_a_late_word_does_not_count() {
    let at = Instant::now();
    let served = Served {
        wait: (Bytes::mib(600), true),
        looked: at,
        told: None,
        at,
        lent: Bytes::mib(600),
    };
    let after = |short, coming, seconds| {
        let now = at + Duration::from_secs(seconds);
        Served::left(Some(&served), Bytes::mib(short), Bytes::mib(coming), now)
    };
    assert_eq!(after(600, 600, 0), Bytes::ZERO);
    assert_eq!(after(300, 0, 1), Bytes::ZERO);
    // It wants more than it did.
    assert_eq!(after(700, 600, 1), Bytes::mib(100));
    // Somebody was faster.
    assert_eq!(after(300, 0, 10), Bytes::mib(300));
    assert_eq!(after(300, 100, 10), Bytes::mib(200));
    assert_eq!(
        Served::left(None, Bytes::mib(300), Bytes::mib(100), at),
        Bytes::mib(200)
    );
}

/// One with a sidecar and overhead does not borrow for ever.
#[test]
fn who_has_given_up_what_it_borrowed_has_it_no_more() {
    let loan = Loan::of(&lent("db"), None).unwrap();
    let borrower = |own| Summary {
        name: "dev/db".to_owned(),
        priority: 1000,
        requested: Bytes::mib(own + 32),
        own: Bytes::mib(own),
        allotted: Bytes::mib(own),
        put_off: None,
        was_in_vain: false,
        is_guessed: false,
        is_ending: false,
        arrived: Instant::now(),
    };
    assert!(loan.is_had_by(&borrower(128)));
    assert!(!loan.is_had_by(&borrower(64)));
    // The kubelet has not the CPUs for it: what was lent for it is nobody's.
    let mut in_vain = borrower(128);
    in_vain.put_off = Some(PutOff {
        message: "Node didn't have enough resource: cpu, requested: 2, used: 2, capacity: 3"
            .to_owned(),
        is_infeasible: false,
        is_current: true,
    });
    assert!(!loan.is_had_by(&in_vain));
    assert_eq!(in_vain.claimed(), Bytes::mib(128 + 32));
    in_vain.allotted = Bytes::mib(64);
    assert_eq!(in_vain.claimed(), Bytes::mib(64 + 32));
    in_vain.put_off = None;
    assert_eq!(in_vain.claimed(), Bytes::mib(128 + 32));
}

fn pod(requested: u64, allotted: u64) -> Summary {
    Summary {
        name: "dev/pod".to_owned(),
        priority: 0,
        // With 32 MiB of overhead.
        requested: Bytes::mib(requested + 32),
        own: Bytes::mib(requested),
        allotted: Bytes::mib(allotted),
        put_off: None,
        was_in_vain: false,
        is_guessed: false,
        is_ending: false,
        arrived: Instant::now(),
    }
}

/// What the kubelet will say is what it says.
#[test]
fn what_is_short_is_known_before_the_kubelet_says_it() {
    let mut pods: BTreeMap<String, Summary> = [
        ("db".to_owned(), pod(600, 100)),
        // Comes down, which the kubelet has not taken.
        ("lender".to_owned(), pod(200, 400)),
        ("other".to_owned(), pod(500, 500)),
    ]
    .into();
    let short = |pods: &_, mib| {
        let expected = expected(pods, "db", Some(Bytes::mib(mib)))?;
        Some(expected.short())
    };
    assert_eq!(short(&pods, 1500), Some(Bytes::mib(96)));
    assert_eq!(short(&pods, 1596), None);
    // As much is not on the whole node.
    assert_eq!(short(&pods, 631), None);
    assert_eq!(expected(&pods, "db", None), None);
    // Whoever has ended has nothing.
    let ended = Summary {
        requested: Bytes::ZERO,
        ..pod(500, 500)
    };
    pods.insert("ended".to_owned(), ended);
    assert_eq!(short(&pods, 1500), Some(Bytes::mib(96)));
    let word = |is_current| PutOff {
        message: String::new(),
        is_infeasible: false,
        is_current,
    };
    pods.get_mut("db").unwrap().put_off = Some(word(false));
    assert_eq!(short(&pods, 1500), Some(Bytes::mib(96)));
    pods.get_mut("db").unwrap().put_off = Some(word(true));
    assert_eq!(short(&pods, 1500), None);
    pods.get_mut("db").unwrap().put_off = None;
    pods.get_mut("db").unwrap().is_ending = true;
    assert_eq!(short(&pods, 1500), None);
    pods.get_mut("db").unwrap().is_ending = false;
    pods.get_mut("other").unwrap().is_guessed = true;
    assert_eq!(short(&pods, 1500), None);
    pods.get_mut("other").unwrap().is_guessed = false;
    assert_eq!(short(&pods, 1500), Some(Bytes::mib(96)));
    // It has what it wants.
    pods.insert("db".to_owned(), pod(600, 600));
    assert_eq!(short(&pods, 1500), None);
}

const FOR_CPU: &str = "Node didn't have enough resource: cpu, requested: 2, used: 2, capacity: 3";
const FOR_MEMORY: &str =
    "Node didn't have enough resource: memory, requested: 5, used: 6, capacity: 7";

fn said(message: &str, is_current: bool) -> Option<PutOff> {
    Some(PutOff {
        message: message.to_owned(),
        is_infeasible: false,
        is_current,
    })
}

/// Any patch of its own makes the kubelet's word an old one: nobody would lend for that, and have it back a second
/// later, each time.
#[test]
fn what_waits_for_cpus_waits_for_them_until_it_asks_for_something_else() {
    let mut before = pod(600, 100);
    before.put_off = said(FOR_CPU, true);
    let after = |own, allotted, put_off, before: &Summary| {
        let mut after = pod(own, allotted);
        after.put_off = put_off;
        after.was_in_vain = after.is_in_vain_as(before);
        after
    };
    let patched = after(600, 100, said(FOR_CPU, false), &before);
    assert!(patched.waits_in_vain() && !patched.is_not_judged());
    let again = after(600, 100, None, &patched);
    assert!(again.waits_in_vain() && !again.is_not_judged());
    let more = after(700, 100, said(FOR_CPU, false), &before);
    assert!(!more.waits_in_vain() && more.is_not_judged());
    let has = after(600, 600, None, &before);
    assert!(!has.waits_in_vain());
    let otherwise = after(600, 100, said(FOR_MEMORY, true), &patched);
    assert!(!otherwise.waits_in_vain() && otherwise.shortage().is_some());
    let since = after(600, 100, said(FOR_MEMORY, false), &otherwise);
    assert!(!since.waits_in_vain() && since.is_not_judged());
}

#[test]
fn nobody_lends_to_one_that_ends() {
    let mut borrower = pod(600, 100);
    borrower.put_off = said(FOR_MEMORY, true);
    assert!(borrower.shortage().is_some());
    borrower.is_ending = true;
    assert_eq!(borrower.shortage(), None);
    assert_eq!(borrower.claimed(), Bytes::mib(100 + 32));
    // What it has got it has until it is gone.
    borrower.allotted = borrower.own;
    assert!(!borrower.waits_in_vain());
}

/// The kubelet's words change with each pod of the node.
#[test]
fn it_is_not_looked_again_in_vain_for_every_pod_that_comes() {
    let at = Instant::now();
    let shortage = |requested: u64, used: u64| Shortage {
        requested: Bytes::mib(requested),
        used: Bytes::mib(used),
        capacity: Bytes::mib(1000),
    };
    let waits = |is_said, shortage| Waiting::of("db", &pod(600, 100), is_said, shortage);
    let mut served = Served {
        wait: waits(true, shortage(600, 500)).wait(),
        looked: at,
        told: None,
        at,
        lent: Bytes::ZERO,
    };
    let soon = at + Duration::from_millis(900);
    assert!(served.is_in_vain(&waits(true, shortage(600, 700)), soon));
    assert!(!served.is_in_vain(&waits(true, shortage(700, 500)), soon));
    assert!(!served.is_in_vain(&waits(false, shortage(600, 500)), soon));
    let later = at + Duration::from_secs(5);
    assert!(!served.is_in_vain(&waits(true, shortage(600, 500)), later));
    served.looked = later;
    let soon = later + Duration::from_millis(900);
    assert!(served.is_in_vain(&waits(true, shortage(600, 500)), soon));
}

#[test]
fn whoever_would_lend_is_looked_at_and_nobody_else() {
    let key = |name: &str| (name.to_owned(), "app".to_owned());
    let lender = |(name, request): (&str, u64)| Lender {
        key: key(name),
        priority: 0,
        request: Bytes::mib(request),
        least: Bytes::mib(100),
    };
    let all = [("a", 700), ("b", 600), ("c", 500), ("d", 200)].map(lender);
    let looked = std::cell::RefCell::new(Vec::new());
    let chosen = |now: &dyn Fn(&str) -> Option<u64>| {
        looked.borrow_mut().clear();
        let changes = choose(Bytes::mib(300), 1, all.to_vec(), |key| {
            looked.borrow_mut().push(key.0.clone());
            now(&key.0).map(Bytes::mib)
        });
        let chosen = changes.into_iter().map(|change| (change.key.0, change.to));
        (chosen.collect::<Vec<_>>(), looked.borrow().clone())
    };
    let (lent, seen) = chosen(&|_| Some(100));
    assert_eq!(lent, [("a".to_owned(), Bytes::mib(400))]);
    assert_eq!(seen, ["a"]);
    // It has grown, and the next has ended.
    let grown = |name: &str| match name {
        "a" => Some(650),
        "b" => None,
        _ => Some(100),
    };
    let (lent, seen) = chosen(&grown);
    assert_eq!(lent, [("c".to_owned(), Bytes::mib(200))]);
    assert_eq!(seen, ["a", "b", "c"]);
}

/// Whom no policy means any more gets back what there is room for, whoever waits.
#[test]
fn nobody_waits_behind_a_pod_without_having_asked_for_less() {
    let mut known = known(100, 400);
    assert!(known.is_behind(Some(1000)));
    assert!(!known.is_behind(Some(100)) && !known.is_behind(None));
    known.wish.rules = None;
    assert!(!known.is_behind(Some(1000)));
}

/// What is not given back goes into each new ledger, however many there are.
#[test]
fn what_was_lent_outlives_the_ledger() {
    let path = std::env::temp_dir().join(format!("bellows-lent-{}", std::process::id()));
    let (done, _) = tokio::sync::mpsc::unbounded_channel();
    let requests = || Requests::new(&path, done.clone(), std::sync::Arc::default());
    assert!(requests().write(&request(400, 300, lent("a"))));
    // The next agent, whose pods are not listed yet.
    let next = requests();
    let long = RequestWhy::Lent {
        to: "x".repeat(1 << 16),
        uid: "other".to_owned(),
        before: Bytes::ZERO,
        short: Bytes::ZERO,
        capacity: None,
    };
    for _ in 0..150 {
        let mut other = request(100, 50, long.clone());
        if let Record::Request { uid, name, .. } = &mut other {
            "gone".clone_into(uid);
            "dev/gone/app".clone_into(name);
        }
        assert!(next.write(&other));
    }
    let mut last = requests();
    let files = [ledger::requests(&path)].map(|path| [ledger::previous(&path), path]);
    files
        .concat()
        .iter()
        .for_each(|file| fs::remove_file(file).unwrap());
    assert_eq!(last.before[&filler()].len(), 1);
    assert_eq!(last.capacity(Instant::now()), Some(Bytes::mib(2048)));
    // Nobody waits for pods that are gone.
    last.keep_only(&["filler".to_owned()]);
    assert_eq!(last.before.keys().collect::<Vec<_>>(), [&filler()]);
    last.forget_pod("filler");
    assert!(last.before.is_empty());
}

/// A StatefulSet makes another pod of the same name.
#[test]
fn who_has_its_predecessors_name_has_lent_nothing() {
    let mut records = vec![request(400, 300, lent("a"))];
    let mut again = request(400, 300, RequestWhy::RightSized { peak: Bytes::ZERO });
    if let Record::Request { uid, .. } = &mut again {
        "filler-again".clone_into(uid);
    }
    records.push(again);
    let loans = loans(&records);
    let lent: Vec<&Owner> = loans
        .iter()
        .filter(|(_, own)| !own.is_empty())
        .map(|(owner, _)| owner)
        .collect();
    assert_eq!(lent, [&filler()]);
}

#[test]
fn what_is_unsettled_says_the_same_as_all() {
    let records = [
        request(400, 100, RequestWhy::RightSized { peak: Bytes::ZERO }),
        request(100, 80, lent("a")),
        request(80, 400, RequestWhy::Unasked),
        request(400, 300, lent("b")),
        request(300, 350, RequestWhy::GivenBack),
        request(350, 310, lent("c")),
    ];
    for end in 0..=records.len() {
        let left = unsettled(&records[..end], |_| true);
        assert_eq!(unsettled(&left, |_| true), left);
        let uids = |records: &[Record]| {
            let own = loans(records).remove(&filler()).unwrap_or_default();
            own.into_iter().map(|loan| loan.uid).collect::<Vec<_>>()
        };
        assert_eq!(uids(&left), uids(&records[..end]));
    }
    assert_eq!(unsettled(&records, |_| true).len(), 2);
    assert!(unsettled(&records, |_| false).is_empty());
}
