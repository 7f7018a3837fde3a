//! Records of the kernel programs: bytes of any size, and what is decided on the numbers in them. A
//! program of another build may still be attached, so a number means nothing until it is checked.

use bellows::{
    guard::observe,
    signal::{
        programs::{life_event, memory_event},
        starts::begun,
    },
};
use bellows_core::{
    Action, Actuation, Bytes, History, Nanos, Patience, Policy, Reaction, Signals, Snapshot,
    Thrash, WHOLE,
    decide::{ByHand, decide},
    reflex::rung_for,
};
use bellows_ebpf_common::{LifeEvent, MemoryEvent, StartEvent};

use crate::input::Input;

/// A clock that has run for longer than any machine.
const LAST: u64 = 1 << 62;

/// The bytes as one record, then as a policy and a sequence of memory events for it.
pub(crate) fn events(bytes: &[u8]) {
    assert_eq!(
        memory_event(bytes).is_some(),
        bytes.len() == size_of::<MemoryEvent>()
    );
    // A reference, which must lie at a multiple of eight.
    assert!(life_event(bytes).is_none() || bytes.len() == size_of::<LifeEvent>());

    assert!(begun(bytes).is_none() || bytes.len() == size_of::<StartEvent>());

    let mut input = Input::new(bytes);
    let policy = Policy {
        original: Bytes(input.long()),
        ceiling: Bytes(input.long()),
        actuation: if input.flag() {
            Actuation::Direct
        } else {
            let p95 = Nanos(input.long());
            Actuation::Requested { p95 }
        },
        signals: if input.flag() {
            Signals::Programs
        } else {
            Signals::Files
        },
        patience: Patience::UNPROBED,
        cpus: input.word().into(),
        shrink_after: Nanos(input.word().into()),
        usable_per_mille: u64::from(input.word()) % WHOLE + 1,
        by_hand_after: input.flag().then(|| Nanos(input.word().into())),
        priority: 0,
        parallelism: bellows_core::elastic::Parallelism::Unchanged,
        learnt: input.flag().then(|| Bytes(input.long())),
    };
    let Ok(policy) = policy.validate(Bytes(4096)) else {
        return;
    };
    let mut history = History::default();
    let mut limit = Bytes(input.long());
    let mut now = Nanos(0);
    while !input.is_empty() {
        now = Nanos(now.0.saturating_add(input.word().into()).min(LAST));
        let held_since = input.flag().then(|| Nanos(input.long()));
        let requested = input
            .flag()
            .then(|| (Bytes(input.long()), Nanos(input.long())));
        let Some(event) = memory_event(input.take(size_of::<MemoryEvent>())) else {
            break;
        };
        observe(&mut history, &event, now);
        let snapshot = Snapshot {
            now,
            policy,
            history,
            thrash: Thrash::default(),
            limit,
            requested,
            lowering: requested.map(|(to, _)| to).filter(|to| *to < limit),
            held_since,
            is_let_go: input.flag(),
            refused_shrink: None,
            raise_not_before: Nanos(0),
            request_failed: input.flag(),
            by_hand: [ByHand::No, ByHand::NotYet, ByHand::Yes]
                [usize::from(input.flag()) + usize::from(input.flag())],
            quiet: Nanos(0),
            others_wait: input.flag(),
            slab: Bytes::ZERO,
            slab_kept: None,
        };
        limit = judged(&snapshot);
    }
    // Whatever the records said: when nothing is used for the quiet period, the limit comes down.
    if limit > policy.original {
        now = Nanos(now.0 + policy.shrink_after.0);
        history.observe(now, Bytes::ZERO);
        let snapshot = Snapshot {
            now,
            policy,
            history,
            thrash: Thrash::default(),
            limit,
            requested: None,
            lowering: None,
            held_since: None,
            is_let_go: false,
            refused_shrink: None,
            raise_not_before: Nanos(0),
            request_failed: false,
            by_hand: ByHand::No,
            quiet: Nanos(0),
            others_wait: false,
            slab: Bytes::ZERO,
            slab_kept: None,
        };
        let shrinks = decide(&snapshot)
            .actions
            .iter()
            .any(|(action, _)| matches!(action, Action::Shrink { .. }));
        assert!(shrinks, "{snapshot:?}");
    }
}

/// Checks what is decided; returns the limit afterwards.
fn judged(snapshot: &Snapshot) -> Bytes {
    let Snapshot {
        policy,
        history,
        mut limit,
        ..
    } = *snapshot;
    let plan = decide(snapshot);
    for &(action, _) in &plan.actions {
        match action {
            Action::Raise { from, to } => {
                assert!(from < to && to <= policy.ceiling, "{snapshot:?} {action:?}");
                limit = limit.max(to);
            }
            Action::RaiseByHand { from, to } => {
                let asked = snapshot.requested.map(|(to, _)| to);
                assert!(from < to && asked == Some(to), "{snapshot:?} {action:?}");
                assert!(snapshot.by_hand != ByHand::No, "{snapshot:?}");
            }
            Action::Shrink { from, to } => {
                assert!(
                    to < from && to >= policy.original && to >= history.demand,
                    "{snapshot:?} {action:?}"
                );
                limit = to;
            }
            Action::Hold | Action::Brake { .. } => panic!("only the reflex holds: {snapshot:?}"),
            Action::Release => assert!(snapshot.held_since.is_some()),
        }
    }
    if let Reaction::Raise { rungs } = &plan.reaction {
        assert!(rungs.len() < 64, "{snapshot:?}");
        assert!(rungs.iter().all(|rung| rung.limit <= policy.ceiling));
        if let Some(rung) = rung_for(rungs, history.demand) {
            limit = limit.max(rung.limit);
        }
    }
    limit
}
