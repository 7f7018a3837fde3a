use std::path::Path;

use bellows_core::pod::RequestWish;

use super::*;
use crate::run::pods::{
    bed::{Bed, key},
    requests::{loans::tests::lent, room::HOLDS, summary::tests::pod, tests::known},
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

/// A right-sized one of 400 MiB, whose change the API takes, and the kubelet may not.
struct RightSized(Bed);

impl RightSized {
    async fn new() -> Self {
        let mut bed = Bed::new().await;
        bed.sees("512Mi");
        let mut own = known(400, 400);
        own.wish.allotted = Some("400Mi".to_owned());
        bed.watch.requests.known.insert(key("app"), own);
        Self(bed)
    }

    fn known(&mut self) -> &mut KnownRequest {
        self.0.watch.requests.known.get_mut(&key("app")).unwrap()
    }

    /// The API has taken it, and the watch has seen that.
    fn took(&mut self, mib: u64, why: &RequestWhy) {
        let known = self.known();
        known.took(Bytes::mib(mib), why);
        let wish = RequestWish {
            request: Bytes::mib(mib),
            ..known.wish.clone()
        };
        known.follow(wish, true);
        self.0.watch.settle_debt(&key("app"), why);
    }

    /// It was taken back; returns how long it is not asked for, in seconds.
    fn waits(&mut self, why: &RequestWhy) -> u64 {
        let peak = Bytes::mib(40);
        self.took(50, &RequestWhy::RightSized { peak });
        self.took(400, why);
        let wait = self.known().not_before.unwrap() - Instant::now();
        (wait + Duration::from_millis(500)).as_secs()
    }
}

#[tokio::test]
async fn what_is_put_off_again_and_again_is_asked_for_ever_more_seldom() {
    let mut own = RightSized::new().await;
    let waits = [(); 5].map(|()| own.waits(&RequestWhy::NoRoom));
    assert_eq!(waits, [30, 60, 120, 240, 300]);
    // Until the kubelet has allotted it.
    let peak = Bytes::mib(40);
    own.took(50, &RequestWhy::RightSized { peak });
    assert!(own.known().backoff > Duration::ZERO);
    let allotted = RequestWish {
        allotted: Some("50Mi".to_owned()),
        ..own.known().wish.clone()
    };
    own.known().follow(allotted, true);
    assert_eq!(own.known().backoff, Duration::ZERO);
}

/// A node with swap: what others give up is no reason to try again.
#[tokio::test]
async fn what_the_kubelet_never_carries_out_is_told_and_not_asked_for_again_soon() {
    let mut own = RightSized::new().await;
    let why = RequestWhy::Infeasible {
        message: "swap".to_owned(),
    };
    assert_eq!(own.waits(&why), 600);
    let requests = &mut own.0.watch.requests;
    requests.try_again();
    assert!(requests.refused[&key("app")].contains("swap"));
    assert!(own.known().is_too_soon());
}
