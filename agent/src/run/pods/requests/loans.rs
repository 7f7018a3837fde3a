//! Who has lent what, by a ledger of its own.
//!
//! Every change of a request is written before it is asked for, with whom it was lent to, so the next agent knows whom to wait
//! for before it gives back. What is asked for may not come, so a loan is given back by a later change only that finds the
//! request where it was. A container is known by its pod's uid and its own name, because its cgroup is another when it is
//! started again.
//!
//! A ledger that is full begins anew with what is not given back, of containers that are there; one that cannot be written
//! stops the change.
//!
//! It must not take what was only put off for given back.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use bellows_core::{Bytes, requests::RequestWhy};
use tokio::time::Instant;

use super::{Requests, summary::Summary};
use crate::ledger::{self, Ledger, Record};

/// What was lent by one container.
#[derive(Clone, Debug)]
pub(super) struct Loan {
    /// The borrowing pod's uid.
    pub(super) uid: String,
    /// What that had before.
    pub(super) before: Bytes,
    /// When; `None` if by a predecessor.
    pub(super) at: Option<Instant>,
}

impl Loan {
    pub(super) fn of(why: &RequestWhy, at: impl Into<Option<Instant>>) -> Option<Self> {
        let RequestWhy::Lent { uid, before, .. } = why else {
            return None;
        };
        Some(Self {
            uid: uid.clone(),
            before: *before,
            at: at.into(),
        })
    }

    /// What it had before was its containers' alone, without overhead and sidecars.
    pub(super) fn is_had_by(&self, borrower: &Summary) -> bool {
        !borrower.waits_in_vain() && borrower.own > self.before
    }
}

/// A container of a pod, by that one's uid and its own name: it may have been started again since.
pub(super) type Owner = (String, String);

/// What was lent by each container and is not known to be given back: whose request stands where it was has lent nothing.
pub(super) fn loans(records: &[Record]) -> BTreeMap<Owner, Vec<Loan>> {
    let mut loans: BTreeMap<Owner, Vec<Loan>> = BTreeMap::new();
    for record in unsettled(records, |_| true) {
        if let Record::Request { uid, name, why, .. } = record {
            let own = loans.entry((uid, name)).or_default();
            own.extend(Loan::of(&why, None));
        }
    }
    loans
}

/// The records by which it is known what is not given back, of these containers: what each had, and what it has lent since
/// it was last seen to have that. What is asked for may not come.
pub(super) fn unsettled(records: &[Record], is_meant: impl Fn(&Owner) -> bool) -> Vec<Record> {
    let mut left: BTreeMap<Owner, (Bytes, Vec<&Record>)> = BTreeMap::new();
    for record in records {
        let Record::Request {
            uid,
            name,
            from,
            why,
            ..
        } = record
        else {
            continue;
        };
        let (whole, own) = left.entry((uid.clone(), name.clone())).or_default();
        // It has had all back, unless what was asked for was only put off.
        if from >= whole && !why.takes_back() {
            own.clear();
        }
        if own.is_empty() || from > whole || matches!(why, RequestWhy::Lent { .. }) {
            own.push(record);
        }
        *whole = (*whole).max(*from);
    }
    let left = left.into_iter().filter(|(owner, _)| is_meant(owner));
    left.flat_map(|(_, (_, own))| own.into_iter().cloned())
        .collect()
}

/// What the node has for pods, as far as a predecessor has come to know it.
pub(super) fn capacity(records: &[Record]) -> Option<Bytes> {
    let mut records = records.iter().rev();
    records.find_map(|record| match record {
        Record::Request {
            why: RequestWhy::Lent { capacity, .. },
            ..
        } => *capacity,
        _ => None,
    })
}

/// What is written in a ledger. A new one has begun with all that counts of the one before; that is only read where an agent
/// has died between them.
pub(super) fn read(path: &Path) -> Vec<Record> {
    let read = ledger::read(path).or_else(|_| ledger::read(&ledger::previous(path)));
    read.unwrap_or_default().records
}

impl Requests {
    /// Writes into the ledger; returns whether it is written.
    pub(super) fn write(&self, record: &Record) -> bool {
        let written = Ledger::open(&self.path).and_then(|mut ledger| {
            if ledger.is_full()? {
                ledger.rotate(&self.unsettled())?;
            }
            ledger.append(record)
        });
        if let Err(error) = &written {
            tracing::error!(%error, "what cannot be written down is not done");
        }
        written.is_ok()
    }

    /// What a new ledger begins with: what is not given back, of containers that are there.
    fn unsettled(&self) -> Vec<Record> {
        let known = self.known.iter();
        let known = known.map(|((uid, _), known)| (uid.clone(), known.name.clone()));
        let owners: BTreeSet<Owner> = known.chain(self.before.keys().cloned()).collect();
        unsettled(&read(&self.path), |owner| owners.contains(owner))
    }
}

#[cfg(test)]
pub(super) mod tests;
