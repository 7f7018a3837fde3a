use std::path::Path;

use super::*;
use crate::run::pods::requests::{
    loans::tests::lent, room::HOLDS, summary::tests::pod, tests::known,
};

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

/// Whom no policy means any more gets back what there is room for, whoever waits.
#[test]
fn nobody_waits_behind_a_pod_without_having_asked_for_less() {
    let mut known = known(100, 400);
    assert!(known.is_behind(Some(1000)));
    assert!(!known.is_behind(Some(100)) && !known.is_behind(None));
    known.wish.rules = None;
    assert!(!known.is_behind(Some(1000)));
}
