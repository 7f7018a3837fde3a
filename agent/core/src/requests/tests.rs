use super::*;

const RULES: RequestRules = RequestRules {
    right_size: true,
    make_room: true,
    floor: Bytes::mib(64),
    margin_per_mille: 250,
    observe: Nanos::millis(60_000),
};

/// A generator of cases (splitmix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }

    fn lenders(&mut self) -> Vec<Lender<u64>> {
        let count = self.below(8);
        let lenders = (0..count).map(|key| Lender {
            key,
            priority: i32::try_from(self.below(4)).unwrap(),
            request: Bytes::mib(self.below(9)),
            // Now and then more than the request: it uses more than it reserves.
            least: Bytes::mib(self.below(10)),
        });
        lenders.collect()
    }
}

fn spare(lenders: &[Lender<u64>], set: u32) -> Bytes {
    let own = lenders.iter().filter(|lender| set >> lender.key & 1 == 1);
    own.fold(Bytes::ZERO, |sum, lender| sum.plus(lender.spare()))
}

/// The priorities of a set, the highest first.
fn priorities(lenders: &[Lender<u64>], set: u32) -> Vec<i32> {
    let own = lenders.iter().filter(|lender| set >> lender.key & 1 == 1);
    let mut priorities: Vec<i32> = own.map(|lender| lender.priority).collect();
    priorities.sort_unstable_by(|a, b| b.cmp(a));
    priorities
}

#[test]
fn room_is_made_wholly_or_not_at_all_by_the_fewest_of_the_lowest_priorities() {
    let mut random = Random(1);
    let (mut served, mut several, mut mixed) = (0, 0, 0);
    for case in 0..20_000 {
        let mut lenders = random.lenders();
        let short = Bytes(random.below(14 << 20) + 1);
        let priority = i32::try_from(random.below(5)).unwrap();
        let changes = make_room(short, priority, &lenders);
        let sets = 0_u32..1 << lenders.len();
        let may = |set: &u32| {
            let mut own = lenders.iter().filter(|lender| set >> lender.key & 1 == 1);
            own.all(|lender| lender.priority < priority && lender.spare() > Bytes::ZERO)
        };
        let sufficient: Vec<u32> = sets
            .filter(|set| may(set) && spare(&lenders, *set) >= short)
            .collect();
        let seen = format!("case {case}: {short} for {priority} of {lenders:?}: {changes:?}");
        assert_eq!(changes.is_empty(), sufficient.is_empty(), "{seen}");
        if changes.is_empty() {
            continue;
        }
        served += 1;
        let mut set = 0;
        let mut given = Bytes::ZERO;
        for change in &changes {
            let lender = &lenders[usize::try_from(change.key).unwrap()];
            assert!(lender.priority < priority, "{seen}");
            assert!(
                change.from == lender.request && change.to < change.from,
                "{seen}"
            );
            assert!(change.to >= lender.least, "{seen}");
            assert_eq!(set >> change.key & 1, 0, "{seen}");
            set |= 1 << change.key;
            given = given.plus(change.from.minus(change.to));
        }
        assert_eq!(given, short, "{seen}");
        let highest = |set: u32| priorities(&lenders, set)[0];
        let least_highest = sufficient.iter().map(|set| highest(*set)).min().unwrap();
        assert_eq!(highest(set), least_highest, "{seen}");
        let alike = sufficient
            .iter()
            .filter(|set| highest(**set) == least_highest);
        let fewest = alike.clone().map(|set| set.count_ones()).min().unwrap();
        assert_eq!(set.count_ones(), fewest, "{seen}");
        several += u32::from(fewest > 1);
        mixed += u32::from(priorities(&lenders, set).first() != priorities(&lenders, set).last());
        lenders.reverse();
        assert_eq!(make_room(short, priority, &lenders), changes, "{seen}");
    }
    assert!(
        served > 2500 && several > 800 && mixed > 500,
        "{served} {several} {mixed}"
    );
}

/// Nobody of a set can be replaced by one of a lower priority.
#[test]
fn no_one_is_lowered_whose_place_another_of_lower_priority_could_take() {
    let mut random = Random(2);
    let mut replaced = 0;
    for _ in 0..20_000 {
        let lenders = random.lenders();
        let short = Bytes::mib(random.below(20) + 1);
        let changes = make_room(short, 9, &lenders);
        let set = changes
            .iter()
            .fold(0, |set, change| set | 1_u32 << change.key);
        for member in &changes {
            for other in &lenders {
                if set >> other.key & 1 == 1 || other.spare() == Bytes::ZERO {
                    continue;
                }
                let member = &lenders[usize::try_from(member.key).unwrap()];
                let swapped = set & !(1 << member.key) | 1 << other.key;
                let is_lower = other.priority < member.priority;
                replaced += u32::from(!is_lower);
                assert!(
                    !is_lower || spare(&lenders, swapped) < short,
                    "{short}: {other:?} in place of {member:?} of {lenders:?}"
                );
            }
        }
    }
    assert!(replaced > 1000);
}

#[test]
fn what_is_given_back_is_never_more_than_there_is_nor_than_is_owed() {
    let mut random = Random(3);
    for _ in 0..20_000 {
        let lenders = random.lenders();
        let mut lowered: Vec<Lowered<u64>> = lenders
            .into_iter()
            .map(
                |Lender {
                     key,
                     priority,
                     request,
                     least,
                 }| Lowered {
                    key,
                    priority,
                    request,
                    wanted: least,
                },
            )
            .collect();
        let free = Bytes(random.below(20 << 20));
        let changes = give_back(free, &lowered);
        let given = changes.iter().map(|change| change.to.minus(change.from));
        let given = given.fold(Bytes::ZERO, Bytes::plus);
        assert!(given <= free);
        for change in &changes {
            let own = &lowered[usize::try_from(change.key).unwrap()];
            assert!(change.from == own.request && change.to > change.from);
            assert!(change.to <= own.wanted);
        }
        // Who gets less than it is owed leaves less than a MiB, and nobody of a higher priority had to wait for others.
        let to = |key| {
            changes
                .iter()
                .find(|change| change.key == key)
                .map(|change| change.to)
        };
        for own in &lowered {
            if to(own.key).unwrap_or(own.request) < own.wanted {
                assert!(free.minus(given) < Bytes::mib(1).max(Bytes(1)));
                let lower = lowered.iter().filter(|other| other.priority < own.priority);
                assert!(lower.clone().all(|other| to(other.key).is_none()
                    || other.wanted.minus(other.request) < Bytes::mib(1)));
            }
        }
        lowered.reverse();
        assert_eq!(give_back(free, &lowered), changes);
    }
}

#[test]
fn a_request_comes_down_to_what_was_used_after_its_time_and_up_at_once() {
    let seen = |seconds: u64, mib| Observed {
        time: Nanos::millis(seconds * 1000),
        peak: Bytes::mib(mib),
    };
    let size =
        |request, observed| right_size(&RULES, Bytes::mib(1000), Bytes::mib(request), observed);
    assert_eq!(size(1000, seen(59, 100)), None);
    assert_eq!(size(1000, seen(60, 100)), Some(Bytes::mib(125)));
    // Never below the floor, never above what it was.
    assert_eq!(size(1000, seen(60, 1)), Some(RULES.floor));
    assert_eq!(size(1000, seen(60, 900)), None);
    assert_eq!(size(125, seen(1, 900)), Some(Bytes::mib(1000)));
    // Not worth it.
    assert_eq!(size(130, seen(60, 100)), None);
    assert_eq!(
        size(125, seen(1, 110)),
        Some(Bytes(137 << 20 | 1 << 19).round_up_mib())
    );
}

#[test]
fn nothing_is_requested_below_what_is_used() {
    for (floor, used) in [(0, 0), (0, 1), (64, 10), (64, 63), (64, 500)] {
        let rules = RequestRules {
            floor: Bytes::mib(floor),
            ..RULES
        };
        let used = Bytes(used << 20 | 77);
        let least = rules.least(used);
        assert!(least > Bytes::ZERO && least >= rules.floor && least >= used.per_mille(1250));
    }
}

#[test]
fn the_kubelet_says_what_is_short() {
    // pkg/kubelet/allocation/allocation_manager_test.go, 1.37.
    let said = "Node didn't have enough resource: memory, requested: 4718592000, used: 2147483648, capacity: 4294967296";
    let short = shortage(said).unwrap().short();
    assert_eq!(short, Bytes(4_718_592_000 + 2_147_483_648 - 4_294_967_296));
    for other in [
        "",
        "Node didn't have enough resource: cpu, requested: 5000, used: 2000, capacity: 4000",
        "Node didn't have enough resource: memory",
        "Node didn't have enough resource: memory, requested: -1, used: 2, capacity: 4",
        "Node didn't have enough resource: memory, used: 1, requested: 2, capacity: 4",
        "in-place resize is not possible",
    ] {
        assert_eq!(shortage(other), None, "{other}");
    }
}
