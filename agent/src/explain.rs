//! `bellows explain NAMESPACE/POD`: what happened to a pod, with its numbers, from the ledger.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    io,
    path::{Path, PathBuf},
};

use bellows_core::{Action, Bytes, CgroupId, Nanos, Reason, requests::RequestWhy};
use thiserror::Error;

use crate::{
    guard::{told_balance, told_bound, told_kill, told_raise, told_why},
    ledger::{self, Record},
};

/// The ledger of `bellows run`.
pub const LEDGER: &str = "/run/bellows/run.ledger";

/// Why nothing can be explained.
#[derive(Debug, Error)]
pub enum ExplainError {
    /// No ledger.
    #[error("cannot read {0} ({1}): run this on the node, as root, where `bellows run` runs")]
    NoLedger(PathBuf, io::Error),
    /// Not in the ledger.
    #[error(
        "`{0}` was not guarded on this node, as far as memory goes: CPU limits are not told of here. Guarded or watched were: {1}. A pod opts in by a policy of its namespace, or by the annotations bellows.dev/mode: Act and bellows.dev/max-memory; the Events on it say why it is left alone"
    )]
    Unknown(String, String),
}

/// Explains a pod from the current and the previous ledger.
///
/// # Errors
///
/// [`ExplainError`] when there is no ledger, or it does not know the pod.
pub fn explain(path: &Path, pod: &str) -> Result<String, ExplainError> {
    let mut records = ledger::read(&ledger::previous(path))
        .unwrap_or_default()
        .records;
    match ledger::read(path) {
        Ok(contents) => records.extend(contents.records),
        Err(_) if !records.is_empty() => {}
        Err(error) => return Err(ExplainError::NoLedger(path.to_owned(), error)),
    }
    let requests = ledger::requests(path);
    let requests = [ledger::previous(&requests), requests];
    let requests = requests.iter().filter_map(|path| ledger::read(path).ok());
    records.extend(requests.flat_map(|contents| contents.records));
    records.sort_by_key(Record::at);
    // A new ledger begins with some of the one before.
    records.dedup();
    tell(&records, pod)
}

/// Tells what records say of a pod.
///
/// # Errors
///
/// [`ExplainError::Unknown`] when they do not know it.
pub fn tell(records: &[Record], pod: &str) -> Result<String, ExplainError> {
    let mut names: BTreeMap<CgroupId, String> = BTreeMap::new();
    for record in records {
        if let Record::Adopt { cgroup, name, .. }
        | Record::Observe { cgroup, name, .. }
        | Record::Request { cgroup, name, .. }
        | Record::Owed { cgroup, name, .. } = record
        {
            names.insert(*cgroup, name.clone());
        }
    }
    let meant: Vec<CgroupId> = names
        .iter()
        .filter(|(_, name)| *name == pod || name.starts_with(&format!("{pod}/")))
        .map(|(&cgroup, _)| cgroup)
        .collect();
    if meant.is_empty() {
        let known: Vec<&str> = names.values().map(String::as_str).collect();
        let known = if known.is_empty() {
            "none".to_owned()
        } else {
            known.join(", ")
        };
        return Err(ExplainError::Unknown(pod.to_owned(), known));
    }
    Ok(meant
        .iter()
        .map(|cgroup| story(records, *cgroup, &names[cgroup]))
        .collect())
}

/// One container's story, each line with the seconds since its adoption.
fn story(records: &[Record], cgroup: CgroupId, name: &str) -> String {
    let mut text = format!("{name}\n");
    let mut start = None;
    let mut requested: Option<Nanos> = None;
    let mut held: Option<Nanos> = None;
    let mut is_watched = false;
    for record in records.iter().filter(|record| record.cgroup() == cgroup) {
        let start = *start.get_or_insert(record.at());
        let line = match record {
            Record::Adopt {
                original, limit, ..
            } => {
                format!("guarded: limit {limit}, original {original}")
            }
            Record::Intend {
                at,
                action,
                reason,
                demand,
                ..
            } => {
                match action {
                    Action::Raise { .. } | Action::Shrink { .. } => requested = Some(*at),
                    // What it was asked for with stays what it is waited for with.
                    Action::RaiseByHand { .. } => {}
                    Action::Hold => held = Some(*at),
                    Action::Release | Action::Brake { .. } => {}
                }
                let since = held
                    .filter(|_| *action == Action::Release)
                    .map(|held| at.since(held));
                intention(*action, *reason, *demand, since)
            }
            Record::Verify {
                at, limit, error, ..
            } => {
                let after = requested
                    .take()
                    .map(|asked| format!(" after {} ms", at.since(asked).as_millis()));
                let after = after.unwrap_or_default();
                match error {
                    None => format!("limit {limit} in force{after}"),
                    Some(error) => format!("failed{after}, the limit is {limit}: {error}"),
                }
            }
            Record::Waits {
                wanted,
                why,
                behind,
                ..
            } => told_why(*wanted, *why, behind.as_deref()),
            Record::Bounded { wanted, why, .. } => told_bound(*wanted, why),
            Record::Lends { balance, .. } => told_balance(balance),
            // Whose they are is in a file of its own.
            Record::Pause { .. } | Record::Resume { .. } | Record::Tokens { .. } => continue,
            Record::Observe { limit, ceiling, .. } => {
                is_watched = true;
                format!("only watched: limit {limit}, at most {ceiling}")
            }
            Record::WouldRaise { would, .. } => told_raise(would),
            Record::ObservedKill { kill, .. } => told_kill(kill),
            Record::Request { from, to, why, .. } => {
                format!("request from {from} to {to}: {}", told_request(why))
            }
            Record::RequestFailed { to, why, .. } => format!("no request of {to}: {why}"),
            Record::Owed { owed, users, .. } => told_owed(*owed, users),
            Record::Brake { foreign: false, .. } => continue,
            Record::Brake { foreign: true, .. } => {
                "memory.high is somebody else's: left alone".to_owned()
            }
            Record::Unwatch { .. } => {
                is_watched = false;
                "not watched any more".to_owned()
            }
            // Of the time before: the one is written by the controller, the other by the reflex.
            Record::Forget { .. } if is_watched => continue,
            Record::Forget { .. } => "not guarded any more".to_owned(),
        };
        let millis = record.at().since(start).as_millis();
        // Writing to a string cannot fail.
        let _infallible = writeln!(
            text,
            "  {:>6}.{:03} s  {line}",
            millis / 1000,
            millis % 1000
        );
    }
    text
}

/// Why a memory request changes.
#[must_use]
pub fn told_request(why: &RequestWhy) -> String {
    match why {
        RequestWhy::RightSized { peak } => format!("it has used {peak} at most"),
        RequestWhy::UsesMore { peak } => format!("it uses {peak}"),
        RequestWhy::Lent { to, short, .. } => {
            format!("lent to {to}, which is short of {short}")
        }
        RequestWhy::GivenBack => "there is room for it again".to_owned(),
        RequestWhy::NoRoom => "there is no room for what it was".to_owned(),
        RequestWhy::Infeasible { message } => {
            format!("the kubelet does not carry out its change: {message}")
        }
        RequestWhy::Unasked => "no policy asks for less".to_owned(),
    }
}

/// What a container does not get back.
#[must_use]
pub fn told_owed(owed: Bytes, users: &[String]) -> String {
    if owed == Bytes::ZERO {
        return "nothing is owed to it any more".to_owned();
    }
    let users = if users.is_empty() {
        "nobody knows whom".to_owned()
    } else {
        users.join(", ")
    };
    format!(
        "owed {owed}: what it has lent was given back, and since used by {users}; it comes back when there is room: lower requests on the node, or move a pod away"
    )
}

fn intention(action: Action, reason: Reason, demand: Bytes, held: Option<Nanos>) -> String {
    let why = match reason {
        Reason::WatermarkReached => "reached the watermark",
        Reason::RaiseUnderWay => "reached the limit before its raise",
        Reason::CacheThrashes => "its page cache is read back again and again",
        Reason::GrowsWhileHeld => {
            "grows although it is held: inside a system call, or before the freezer has come"
        }
        Reason::AnswerLate => "no answer in time",
        Reason::RequestFailed => "the raise could not be asked for",
        Reason::RaisedFirst => "its policy raises first and asks at once",
        Reason::RaiseArrived => "the raise has arrived",
        Reason::HoldExpired => "no raise came in time",
        Reason::NoRoom => "there is no room for the raise",
        Reason::AskedToEnd => "it was sent a signal to end",
        Reason::BurstOver => "the burst is over",
        Reason::GrewWhileShrinking => "grew again while the limit was being lowered",
        Reason::Throttled => "was throttled",
        Reason::Unused => "does not use its quota",
        Reason::BelowRest => "has less than at rest",
        Reason::Refused => "the raise was refused",
        Reason::Boosted => "is lent more than at rest",
        Reason::Ended => "the guard ends",
    };
    match action {
        Action::Raise { from, to } if reason == Reason::BelowRest => {
            format!("{why}, {from}: raise to {to}")
        }
        Action::Raise { from, to } => format!("{why} with {demand} of {from}: raise to {to}"),
        Action::RaiseByHand { from, to } => {
            format!("{why}, {demand} in use: raise from {from} to {to} by hand")
        }
        Action::Shrink { from, to } => format!("{why}, {demand} in use: lower from {from} to {to}"),
        Action::Hold => format!("{why} with {demand}: held"),
        Action::Brake { high } => format!("{why}, {demand} in use: braked at {high}"),
        Action::Release => {
            let time = held
                .map(|held| format!(" after {} ms", held.as_millis()))
                .unwrap_or_default();
            format!("{why}: released{time}")
        }
    }
}

#[cfg(test)]
mod tests {
    use bellows_core::parallel::Balance;

    use super::*;

    #[test]
    fn tells_how_many_jobs_wait() {
        let balance = Balance {
            jobs: 8,
            need: Bytes::mib(5325),
            granted: Bytes::mib(3072),
            running: 4,
        };
        let expected = "8 jobs would need 5.2 GiB, 3 GiB granted: running 4";
        assert_eq!(told_balance(&balance), expected);
        let records = [Record::Lends {
            at: Nanos(0),
            cgroup: CgroupId(7),
            balance,
        }];
        let told = story(&records, CgroupId(7), "dev/pod/app");
        assert!(told.ends_with(&format!("{expected}\n")), "{told}");
    }

    #[test]
    fn tells_what_was_lent_and_what_is_owed() {
        let cgroup = CgroupId(9);
        let name = "dev/filler/app".to_owned();
        let (from, to) = (Bytes::mib(400), Bytes::mib(300));
        let why = RequestWhy::Lent {
            to: "dev/db".to_owned(),
            uid: "u".to_owned(),
            before: Bytes::mib(64),
            short: Bytes::mib(100),
            capacity: None,
        };
        let at = Nanos::millis(1000);
        let records = [
            Record::Request {
                at,
                cgroup,
                uid: String::new(),
                name: name.clone(),
                from,
                to,
                why,
            },
            Record::Owed {
                at: Nanos::millis(3500),
                cgroup,
                name,
                owed: Bytes::mib(100),
                users: vec!["dev/new".to_owned()],
            },
        ];
        let expected = "dev/filler/app\n\
            \x20      0.000 s  request from 400 MiB to 300 MiB: lent to dev/db, which is short of 100 MiB\n\
            \x20      2.500 s  owed 100 MiB: what it has lent was given back, and since used by dev/new; it comes back when there is room: lower requests on the node, or move a pod away\n";
        assert_eq!(tell(&records, "dev/filler").unwrap(), expected);
        // From ledgers of its own, of which the second begins with what the first says.
        let path =
            std::env::temp_dir().join(format!("bellows-explain-{}.ledger", std::process::id()));
        let requests = ledger::requests(&path);
        let files = [path.clone(), ledger::previous(&requests), requests];
        for (file, count) in files.iter().zip([0, 1, 2]) {
            let mut ledger = ledger::Ledger::open(file).unwrap();
            for record in &records[..count] {
                ledger.append(record).unwrap();
            }
        }
        assert_eq!(explain(&path, "dev/filler").unwrap(), expected);
        for file in files {
            std::fs::remove_file(file).unwrap();
        }
    }

    #[test]
    fn tells_a_burst_with_its_numbers() {
        let cgroup = CgroupId(7);
        let at = |millis: u64| Nanos::millis(1000 + millis);
        let intend = |millis, action, reason| Record::Intend {
            at: at(millis),
            cgroup,
            action,
            reason,
            demand: Bytes::mib(63),
        };
        let (from, to) = (Bytes::mib(64), Bytes::mib(640));
        let records = [
            Record::Adopt {
                at: at(0),
                cgroup,
                path: PathBuf::new(),
                name: "dev/pod/app".to_owned(),
                original: from,
                limit: from,
            },
            Record::Brake {
                at: at(1),
                cgroup,
                foreign: false,
            },
            intend(500, Action::Raise { from, to }, Reason::WatermarkReached),
            intend(501, Action::Hold, Reason::RaiseUnderWay),
            intend(901, Action::Release, Reason::RaiseArrived),
            Record::Verify {
                at: at(902),
                cgroup,
                limit: to,
                error: None,
            },
        ];
        let expected = "dev/pod/app\n\
            \x20      0.000 s  guarded: limit 64 MiB, original 64 MiB\n\
            \x20      0.500 s  reached the watermark with 63 MiB of 64 MiB: raise to 640 MiB\n\
            \x20      0.501 s  reached the limit before its raise with 63 MiB: held\n\
            \x20      0.901 s  the raise has arrived: released after 400 ms\n\
            \x20      0.902 s  limit 640 MiB in force after 402 ms\n";
        assert_eq!(story(&records, cgroup, "dev/pod/app"), expected);
    }
}
