use super::*;
use crate::run::pods::requests::summary::tests::pod;

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
