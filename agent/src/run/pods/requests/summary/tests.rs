use super::*;
use crate::run::pods::requests::loans::{Loan, tests::lent};

pub(in crate::run::pods::requests) fn pod(requested: u64, allotted: u64) -> Summary {
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
