use std::ops::Range;

use super::*;

mod cases;
mod endless;
mod progress;
mod properties;

use cases::{Case, Random};

const NOW: Nanos = Nanos::millis(100_000);

/// At rest with 64 MiB, all of them used.
fn claim(wanted: u64, most: u64) -> Claim {
    Claim {
        ancestors: BTreeSet::new(),
        priority: 0,
        weight: DEFAULT_WEIGHT,
        since: NOW,
        moved_at: NOW,
        may_wait: RESERVED_FOR,
        at_rest: Bytes::mib(64),
        used: Bytes::mib(64),
        promised: Bytes::ZERO,
        wanted: Bytes::mib(wanted),
        most: Bytes::mib(most),
        nature: Nature::Burst,
        usual: Bytes::ZERO,
    }
}

/// Raised, and all of it used.
fn raised(has: u64, wanted: u64, most: u64) -> Claim {
    Claim {
        used: Bytes::mib(has),
        promised: Bytes::mib(has),
        ..claim(wanted, most)
    }
}

fn room(free: u64) -> Room {
    Room {
        free: Bytes::mib(free),
        size: Bytes::mib(4096),
    }
}

/// The verdicts on claims with ids from 0, of those that ask.
fn told(rooms: &Rooms, claims: &[Claim]) -> Vec<(u64, Verdict)> {
    let claims = (0..).map(CgroupId).zip(claims.iter().cloned()).collect();
    let verdicts = arbitrate(NOW, rooms, &claims);
    verdicts
        .into_iter()
        .map(|(id, verdict)| (id.0, verdict))
        .collect()
}

fn on_node(free: u64, claims: &[Claim]) -> Vec<(u64, Verdict)> {
    let rooms = Rooms {
        node: room(free),
        ancestors: Vec::new(),
    };
    told(&rooms, claims)
}

fn granted(mib: u64) -> Verdict {
    Verdict::Granted(Bytes::mib(mib))
}

fn waits(why: Why) -> Verdict {
    Verdict::Waits(Nanos(NOW.0 + RESERVED_FOR.0), why)
}

const fn behind(id: u64) -> Why {
    Why::Behind(CgroupId(id))
}

const fn would_strand(id: u64) -> Why {
    Why::WouldStrand(CgroupId(id))
}

#[test]
fn who_asks_for_nothing_is_told_nothing_but_what_it_may_use_is_not_given_to_others() {
    let quiet = Claim {
        promised: Bytes::mib(500),
        used: Bytes::mib(100),
        ..claim(0, 0)
    };
    let told = on_node(1000, &[quiet.clone(), claim(664, 664)]);
    assert_eq!(told, [(1, granted(664))]);
    // One page more than what is left.
    let more = Claim {
        wanted: Bytes(Bytes::mib(664).0 + 4096),
        ..claim(664, 664)
    };
    assert_eq!(on_node(1000, &[quiet, more]), [(1, waits(behind(0)))]);
}

#[test]
fn a_request_that_is_not_used_is_promised_by_the_scheduler() {
    let idle = Claim {
        at_rest: Bytes::mib(512),
        promised: Bytes::mib(300),
        used: Bytes::mib(100),
        ..claim(0, 0)
    };
    let verdict = |free| on_node(free, &[idle.clone(), claim(128, 128)])[0].1;
    assert_eq!(verdict(264), granted(128));
    let left = Bytes::mib(64 + 63);
    assert_eq!(verdict(263), waits(Why::NoRoom(Place::Node, left)));
}

#[test]
fn one_of_two_builds_runs_after_the_other_instead_of_both_being_half_served() {
    let builds = [claim(1088, 2112), claim(1088, 2112)];
    let first = on_node(2500, &builds);
    assert_eq!(first, [(0, granted(1088)), (1, waits(would_strand(0)))]);
    let second = on_node(1476, &[raised(1088, 2112, 2112), claim(1088, 2112)]);
    assert_eq!(second, [(0, granted(2112)), (1, waits(behind(0)))]);
}

#[test]
fn one_that_can_end_is_not_enough() {
    // The first needs 200 MiB and gives back 1.2 GiB, with which neither of the others could end.
    let half_served = raised(1088, 0, 3200);
    let mut claims = vec![
        raised(1024, 0, 1224),
        half_served.clone(),
        claim(1088, 3200),
    ];
    let told = on_node(1224, &claims);
    assert_eq!(told, [(2, waits(would_strand(1)))]);
    claims[1] = claim(0, 0);
    assert_eq!(on_node(1224, &claims), [(2, granted(1088))]);
}

#[test]
fn one_that_may_grow_beyond_every_measure_runs_alone() {
    let endless = Claim {
        most: Bytes(u64::MAX),
        ..claim(256, 0)
    };
    let two = [endless.clone(), endless];
    let told = on_node(3000, &two);
    assert_eq!(told, [(0, granted(256)), (1, waits(would_strand(0)))]);
}

#[test]
fn priority_comes_before_arrival_and_having_begun_before_both() {
    let early = Claim {
        since: Nanos(0),
        ..claim(256, 256)
    };
    let high = Claim {
        priority: 1,
        ..claim(256, 256)
    };
    let told = on_node(200, &[early.clone(), high.clone()]);
    assert_eq!(told, [(0, waits(behind(1))), (1, granted(256))]);
    let begun = raised(128, 256, 256);
    let told = on_node(200, &[begun.clone(), early]);
    assert_eq!(told, [(0, granted(256)), (1, waits(behind(0)))]);
    let told = on_node(200, &[begun.clone(), high.clone()]);
    assert_eq!(told, [(0, waits(behind(1))), (1, granted(256))]);
    // It would fit, but one that has begun needs what is left.
    let high = Claim {
        most: Bytes::mib(512),
        ..high
    };
    let told = on_node(200, &[begun, high]);
    assert_eq!(told, [(0, granted(256)), (1, waits(would_strand(0)))]);
}

#[test]
fn of_those_that_came_at_once_the_smallest_share_for_its_weight_is_served_first() {
    let weighing = |weight, wanted| Claim {
        weight,
        ..claim(wanted, wanted)
    };
    let first = |a: Claim, b: Claim| {
        let told = on_node(520, &[a, b]);
        told.into_iter()
            .find(|(_, verdict)| matches!(verdict, Verdict::Granted(_)))
    };
    let of = |id, mib| Some((id, granted(mib)));
    assert_eq!(first(weighing(100, 576), weighing(100, 512)), of(1, 512));
    assert_eq!(first(weighing(200, 576), weighing(100, 512)), of(0, 576));
    assert_eq!(first(weighing(100, 512), weighing(100, 512)), of(0, 512));
    // No weight is the last, however early and little.
    let none = Claim {
        since: Nanos(0),
        ..weighing(0, 128)
    };
    assert_eq!(first(none.clone(), weighing(1, 576)), of(1, 576));
    assert_eq!(first(none.clone(), weighing(0, 128)), of(0, 128));
    assert_eq!(on_node(520, &[none]), [(0, granted(128))]);
}

#[test]
fn small_claims_overtake_a_large_one_for_a_second_a_gib_only() {
    let large = Claim {
        since: Nanos(NOW.0 - 999_999_999),
        ..claim(1088, 1088)
    };
    let small = || Claim {
        since: Nanos(NOW.0),
        ..claim(64 + 8, 64 + 8)
    };
    let of = |large: Claim| on_node(1024, &[large, small()])[0].1;
    // It is 1 s later for its GiB, and the small one 8 ms for its 8 MiB.
    assert_eq!(of(large.clone()), granted(1088));
    let since = Nanos(NOW.0 - 992_000_000);
    assert_eq!(of(Claim { since, ..large }), waits(behind(1)));
}

#[test]
fn whoever_waits_has_it_kept_while_it_can_be_held_and_no_longer() {
    let waiting = |may_wait, moved_at| Claim {
        priority: 1,
        may_wait,
        moved_at,
        ..claim(1088, 1088)
    };
    let of = |waiting: Claim| on_node(500, &[raised(664, 0, 664), waiting, claim(128, 128)]);
    let first = of(waiting(Nanos(1), NOW));
    let until = Nanos(NOW.0 + 1);
    assert_eq!(
        first,
        [(1, Verdict::Waits(until, behind(0))), (2, waits(behind(1)))]
    );
    let let_go = [(1, Verdict::Refused(behind(0))), (2, granted(128))];
    assert_eq!(of(waiting(Nanos(0), NOW)), let_go);
    assert_eq!(
        of(waiting(Nanos::millis(5), Nanos(NOW.0 - 5_000_000))),
        let_go
    );
    let old = Nanos(NOW.0 - RESERVED_FOR.0);
    assert_eq!(of(waiting(RESERVED_FOR, old)), let_go);
    // Who may be held for longer waits on, and nobody with it.
    let patient = waiting(Nanos::millis(60_000), old);
    let until = Nanos(old.0 + 60_000_000_000);
    let waits_on = (1, Verdict::Waits(until, behind(0)));
    assert_eq!(of(patient), [waits_on, (2, granted(128))]);
}

#[test]
fn who_is_held_for_what_it_asks_is_counted_on_for_as_long_as_that_lasts() {
    // It cannot move: whoever takes what it needs to end would have it wait for nothing.
    let mut held = raised(1024, 2048, 2048);
    held.moved_at = Nanos(NOW.0 - RESERVED_FOR.0);
    held.may_wait = Nanos::millis(60_000);
    let of = |held: &Claim| on_node(512, &[held.clone(), claim(512, 2048)])[1];
    assert_eq!(of(&held), (1, waits(would_strand(0))));
    held.may_wait = RESERVED_FOR;
    assert_eq!(of(&held), (1, granted(512)));
}

#[test]
fn who_waits_for_long_is_not_waited_for() {
    let stands = || Claim {
        moved_at: Nanos(NOW.0 - RESERVED_FOR.0),
        may_wait: Nanos::millis(60_000),
        ..raised(2220, 4096, 4096)
    };
    let until = Nanos(stands().moved_at.0 + 60_000_000_000);
    let left = |has: u64| Why::NoRoom(Place::Node, Bytes::mib(has + 1170));
    // Each could end with what the other has: neither gives that back before.
    let both = on_node(1170, &[stands(), stands()]);
    let waits_on = |why| Verdict::Waits(until, why);
    assert_eq!(both, [(0, waits_on(left(2220))), (1, waits_on(left(2220)))]);
    // Nor does whoever comes: it may do with what there is.
    let late = on_node(1170, &[stands(), claim(2000, 2000)]);
    assert_eq!(late[1], (1, waits(left(64))));
    let mut moves = stands();
    moves.moved_at = NOW;
    assert_eq!(
        on_node(1170, &[moves, stands()])[1],
        (1, waits_on(behind(0)))
    );
}

#[test]
fn nothing_is_kept_for_a_burst_that_has_not_moved_for_long_nor_is_it_waited_for() {
    let mut begun = raised(1024, 0, 2048);
    let told_beside =
        |begun: &Claim, wanted| on_node(1024, &[begun.clone(), claim(wanted, wanted)]);
    assert_eq!(told_beside(&begun, 512), [(1, granted(512))], "it ends");
    let larger = on_node(1024, &[begun.clone(), claim(512, 2048)]);
    assert_eq!(larger, [(1, waits(would_strand(0)))]);
    assert_eq!(told_beside(&begun, 1536), [(1, waits(behind(0)))]);
    begun.moved_at = Nanos(NOW.0 - RESERVED_FOR.0);
    let larger = on_node(1024, &[begun.clone(), claim(512, 2048)]);
    assert_eq!(larger, [(1, granted(512))]);
    let left = Bytes::mib(1024 + 64);
    assert_eq!(
        told_beside(&begun, 1536),
        [(1, waits(Why::NoRoom(Place::Node, left)))]
    );
}

#[test]
fn every_ancestor_counts_and_the_one_that_lacks_room_is_named() {
    let within = |ancestors: &[usize], wanted| Claim {
        ancestors: ancestors.iter().copied().collect(),
        ..claim(wanted, wanted)
    };
    let mut rooms = Rooms {
        node: room(2000),
        ancestors: vec![room(1000), room(100)],
    };
    let alone = |claim: Claim| told(&rooms, &[claim])[0].1;
    assert_eq!(alone(within(&[0], 1064)), granted(1064));
    let no_room = |index, mib| waits(Why::NoRoom(Place::Ancestor(index), Bytes::mib(mib)));
    assert_eq!(alone(within(&[0], 1065)), no_room(0, 1064));
    assert_eq!(alone(within(&[0, 1], 1065)), no_room(1, 164));
    assert_eq!(alone(within(&[0, 1], 165)), no_room(1, 164));
    let exceeds = |place| Verdict::Refused(Why::ExceedsRoom(place));
    assert_eq!(alone(within(&[], 4097)), exceeds(Place::Node));
    assert_eq!(alone(within(&[0], 4096)), no_room(0, 1064));
    // An ancestor that nobody knows has no room.
    assert_eq!(alone(within(&[2], 65)), exceeds(Place::Ancestor(2)));
    rooms.ancestors[1].size = Bytes::mib(164);
    let told = told(&rooms, &[within(&[1], 165), within(&[1], 164)]);
    assert_eq!(told, [(0, exceeds(Place::Ancestor(1))), (1, granted(164))]);
}

#[test]
fn what_waits_in_one_ancestor_leaves_the_rest_of_the_node_to_others() {
    let rooms = Rooms {
        node: room(1000),
        ancestors: vec![room(100)],
    };
    let within = |claim: Claim| Claim {
        ancestors: [0].into(),
        ..claim
    };
    let claims = |other| [within(raised(864, 0, 864)), within(claim(564, 564)), other];
    let of = |other| told(&rooms, &claims(other))[1].1;
    let late = |wanted| Claim {
        since: Nanos(NOW.0 + 1_000_000_000),
        ..claim(wanted, wanted)
    };
    assert_eq!(of(late(564)), granted(564));
    assert_eq!(of(late(565)), waits(behind(1)));
}

#[test]
fn a_room_that_shrinks_under_what_was_granted_takes_nothing_back_and_ends_one_after_the_other() {
    let begun = |wanted| raised(1088, wanted, 2112);
    let both = [begun(1600), begun(1600)];
    // Enough for one of them, and with what it gives back for the other.
    assert_eq!(
        on_node(1024, &both),
        [(0, granted(1600)), (1, waits(would_strand(0)))]
    );
    // Neither can end: the first goes on, the second waits though its step would fit.
    let little = [raised(1088, 1100, 3000), raised(1088, 1100, 3000)];
    assert_eq!(
        on_node(500, &little),
        [(0, granted(1100)), (1, waits(would_strand(0)))]
    );
    // One that can is not held up by them.
    let small = raised(128, 192, 192);
    let three = [little[0].clone(), little[1].clone(), small];
    assert_eq!(on_node(500, &three)[2], (2, granted(192)));
    // More is promised than there is.
    let promised = Claim {
        used: Bytes::mib(88),
        ..begun(0)
    };
    let told = on_node(500, &[promised, claim(128, 128)]);
    assert_eq!(told, [(1, waits(behind(0)))]);
}

#[test]
fn a_burst_that_needs_more_than_was_expected_has_said_so_itself() {
    let liar = claim(2112, 100);
    assert_eq!(
        on_node(2048, std::slice::from_ref(&liar)),
        [(0, granted(2112))]
    );
    let told = on_node(2047, &[liar]);
    assert_eq!(
        told,
        [(0, waits(Why::NoRoom(Place::Node, Bytes::mib(2111))))]
    );
}

#[test]
fn a_storm_is_served_eight_at_a_time_until_all_are() {
    let mut left: Vec<Claim> = (0..20).map(|_| claim(320, 320)).collect();
    let mut rounds = 0;
    while !left.is_empty() {
        let told = on_node(8 * 256, &left);
        let granted = told
            .iter()
            .filter(|(_, verdict)| *verdict == granted(320))
            .count();
        let kept = told
            .iter()
            .filter(|(_, verdict)| matches!(verdict, Verdict::Waits(..)));
        assert_eq!(
            (granted, kept.count()),
            (left.len().min(8), left.len().saturating_sub(8))
        );
        left.drain(..granted);
        rounds += 1;
    }
    assert_eq!(rounds, 3);
}

#[test]
fn a_node_is_the_least_of_what_is_available_and_what_is_left_until_eviction() {
    let memory = NodeMemory {
        total: Bytes::mib(4096),
        available: Bytes::mib(1000),
        reserve: Bytes::mib(200),
        kubelet: None,
    };
    let of = |kubelet: Option<(u64, u64)>| {
        let kubelet = kubelet.map(|(a, b)| (Bytes::mib(a), Bytes::mib(b)));
        let Room { free, size } = node_room(&NodeMemory { kubelet, ..memory });
        (free.0 >> 20, size.0 >> 20)
    };
    assert_eq!(of(None), (800, 3896));
    assert_eq!(of(Some((1000, 100))), (800, 3896));
    assert_eq!(of(Some((850, 100))), (750, 3896));
    assert_eq!(of(Some((50, 300))), (0, 3796));
    let cgroup = cgroup_room(Bytes::mib(500), Bytes::mib(300), Bytes::mib(100));
    assert_eq!(
        cgroup,
        Room {
            free: Bytes::mib(300),
            size: Bytes::mib(500)
        }
    );
}

/// What is wrong in cases with these seeds.
fn wrong(seeds: Range<u64>) -> impl Iterator<Item = String> {
    seeds.filter_map(|seed| {
        let case = Case::random(seed);
        let checked = properties::check(&case, &mut Random(!seed));
        let checked = checked.map_err(|what| format!("{what}: {case:?}"));
        // A life asks many times.
        let lives = seed % 100 == 0;
        let checked = checked.and_then(|()| if lives { progress::check(seed) } else { Ok(()) });
        checked.err().map(|what| format!("seed {seed}: {what}"))
    })
}

#[test]
fn what_follows_holds_in_random_cases() {
    let first = std::thread::scope(|scope| {
        let halves = [0..10_000, 10_000..20_000].map(|seeds| scope.spawn(|| wrong(seeds).next()));
        halves.into_iter().find_map(|half| half.join().unwrap())
    });
    assert_eq!(first, None);
}

/// What `cargo xtask bench arbiter` runs: batches of cases, told one a line.
#[test]
#[ignore = "a bench: cargo xtask bench arbiter"]
fn batches() {
    let number = |name: &str| -> u64 { std::env::var(name).unwrap().parse().unwrap() };
    let (seed, cases) = (number("BELLOWS_SEED"), number("BELLOWS_CASES"));
    let mut first = seed;
    // What libtest has written of this test has no end of line.
    println!();
    while first < seed + cases {
        let count = (seed + cases - first).min(10_000);
        let wrong: Vec<String> = wrong(first..first + count).collect();
        println!("batch {first} {count} {}", wrong.len());
        for what in wrong.iter().take(3) {
            println!("violation {what}");
        }
        first += count;
    }
}
