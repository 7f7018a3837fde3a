use std::fs;

use bellows_core::{CgroupId, Nanos};

use super::*;

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

pub(in crate::run::pods::requests) fn lent(uid: &str) -> RequestWhy {
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
