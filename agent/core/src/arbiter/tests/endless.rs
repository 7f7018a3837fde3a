//! What may never end beside what will.

use super::*;

fn suspect(has: u64, wanted: u64) -> Claim {
    Claim {
        nature: Nature::Suspect,
        ..raised(has, wanted, wanted)
    }
}

/// One at rest that is known to need so much when it bursts.
fn known(usual: u64) -> Claim {
    Claim {
        usual: Bytes::mib(usual),
        promised: Bytes::mib(64),
        ..claim(0, 0)
    }
}

const fn kept(least: u64) -> Verdict {
    Verdict::Refused(Why::KeptForBursts(Place::Node, Bytes::mib(least)))
}

#[test]
fn what_a_known_burst_needs_is_not_given_to_a_suspect() {
    let others = |wanted| [suspect(500, wanted), known(464)];
    // 400 MiB are kept of the 1000 that are free.
    assert_eq!(on_node(1000, &others(1100)), [(0, granted(1100))]);
    assert_eq!(on_node(1000, &others(1101)), [(0, kept(1100))]);
    // A burst would have got it.
    let burst = raised(500, 1101, 1101);
    assert_eq!(on_node(1000, &[burst, known(464)]), [(0, granted(1101))]);
    // Nor is anything kept for one that may not end either.
    let another = Claim {
        nature: Nature::Suspect,
        ..known(464)
    };
    assert_eq!(
        on_node(1000, &[suspect(500, 1500), another]),
        [(0, granted(1500))]
    );
    // Where nobody is known to need anything, all of it.
    assert_eq!(on_node(1000, &[suspect(500, 1500)]), [(0, granted(1500))]);
}

#[test]
fn a_quarter_of_the_room_is_kept_for_all_and_more_for_one() {
    // Of a room of 4 GiB.
    let mut many = vec![suspect(500, 1401)];
    many.extend((0..20).map(|_| known(264)));
    assert_eq!(on_node(1924, &many), [(0, kept(1400))]);
    let large = [suspect(500, 1401), known(1564)];
    assert_eq!(on_node(2400, &large), [(0, kept(1400))]);
}

#[test]
fn a_suspect_comes_last_and_is_not_counted_on() {
    // Both ask for all that is left, the suspect has asked for longer.
    let early = Claim {
        since: Nanos(0),
        ..suspect(500, 1000)
    };
    let told = on_node(500, &[early, claim(564, 564)]);
    assert_eq!(told, [(0, kept(500)), (1, granted(564))]);
    // Nobody waits for it to give back.
    let told = on_node(300, &[suspect(1500, 1500), claim(1000, 1000)]);
    let why = Why::NoRoom(Place::Node, Bytes::mib(364));
    assert_eq!(told, [(1, waits(why))]);
    // One of higher priority is served first all the same.
    let high = Claim {
        priority: 1,
        ..suspect(500, 1000)
    };
    let told = on_node(500, &[high, claim(564, 564)]);
    assert_eq!(told[0], (0, granted(1000)));
}

#[test]
fn a_leak_is_granted_nothing() {
    let leak = Claim {
        nature: Nature::Leak,
        ..suspect(500, 501)
    };
    let told = on_node(4000, &[leak, claim(564, 564)]);
    assert_eq!(told, [(0, Verdict::Refused(Why::Leaks)), (1, granted(564))]);
}

#[test]
fn a_suspect_changes_nothing_for_bursts_and_leaves_them_what_is_kept() {
    let mut random = Random(7);
    let (mut asked, mut served) = (0, 0);
    for seed in 0..20_000 {
        let mut case = Case::random(seed);
        if case.is_extreme {
            continue;
        }
        for claim in case.claims.values_mut() {
            claim.priority = 0;
            claim.usual = Bytes(random.below(8) * cases::UNIT);
            if random.chance(30) {
                claim.nature = [Nature::Suspect, Nature::Leak][usize::from(random.chance(50))];
            }
        }
        let verdicts = case.verdicts();
        let mut silent = case.clone();
        for claim in silent.claims.values_mut() {
            if claim.nature != Nature::Burst {
                claim.wanted = Bytes::ZERO;
            }
        }
        let alone = silent.verdicts();
        let is_burst = |id: &CgroupId| case.claims[id].nature == Nature::Burst;
        assert!(
            verdicts.iter().filter(|(id, _)| is_burst(id)).eq(&alone),
            "seed {seed}"
        );
        for (id, verdict) in verdicts.iter().filter(|(id, _)| !is_burst(id)) {
            asked += 1;
            let is_leak = case.claims[id].nature == Nature::Leak;
            let is_refused = matches!(verdict, Verdict::Refused(_));
            assert!(is_refused || !is_leak, "seed {seed}");
            if let Verdict::Granted(_) = verdict {
                served += 1;
                for place in case.claims[id].places() {
                    check_what_is_kept(&case, &verdicts, place, seed);
                }
            }
        }
    }
    assert!(asked > 1000 && served > 200, "{served} of {asked}");
}

/// That what was granted in a place leaves what is kept for the largest of those at rest.
fn check_what_is_kept(
    case: &Case,
    verdicts: &BTreeMap<CgroupId, Verdict>,
    place: Place,
    seed: u64,
) {
    let room = case.room(place.index());
    let inside = || {
        case.claims
            .iter()
            .filter(|(_, claim)| claim.places().contains(&place))
    };
    let owed: i128 = inside()
        .map(|(_, claim)| i128::from(claim.held().minus(claim.used).0))
        .sum();
    let granted = inside().filter(|(id, _)| matches!(verdicts.get(id), Some(Verdict::Granted(_))));
    let granted: i128 = granted
        .map(|(_, claim)| i128::from(claim.wanted.0) - i128::from(claim.held().0))
        .sum();
    let at_rest = inside().filter(|(id, claim)| {
        claim.nature == Nature::Burst && !claim.has_begun(case.now) && !verdicts.contains_key(id)
    });
    let largest = at_rest
        .map(|(_, claim)| i128::from(claim.usual.minus(claim.held()).0))
        .max();
    let left = i128::from(room.free.0) - owed - granted;
    assert!(
        left >= largest.unwrap_or(0),
        "seed {seed}: {left} left of {place:?}"
    );
}
