//! Heaps of runtimes that size them by the memory limit that they find when they start.
//!
//! A JVM takes a quarter of it, node half, once and for all. One that starts while its container's limit is raised for
//! somebody else's burst takes its share of that, and is killed when the limit has come down and the heap has filled.
//! So a policy names the limit that they are to see, and they are told by their environment, which is decided when the
//! container is made and read by every program in it.
//!
//! What is there already wins: somebody who has sized a heap knows better. This sets no limit and looks at none that is
//! in force.

use serde::{Deserialize, Serialize};

use crate::units::Bytes;

/// The memory limit by which heaps are sized.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Heap {
    /// The one that the container is made with, or what that was before it was raised.
    Original,
    /// The most that its policy allows.
    Maximum,
    /// This.
    At(Bytes),
}

/// How far heaps in a container may go.
///
/// A heap that is larger than its container's limit ever becomes is a kill, sooner or later: so where it is not known that
/// a limit is raised, the limit is all there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    /// What its limit is raised to at most; `None` where nobody raises it, or where that is not known.
    pub ceiling: Option<Bytes>,
    /// What its limit was before it was raised, where that is known: a container that is made again in the middle of a burst
    /// is made with the raised one.
    pub original: Option<Bytes>,
}

/// A variable that is to be set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: &'static str,
    /// All of its value.
    pub value: String,
    /// Whether there was one of this name, which is the beginning of the value.
    pub was_there: bool,
}

/// What a JVM reads before its command line, whose words hold against these.
const JAVA: &str = "JAVA_TOOL_OPTIONS";
/// The same of node.
const NODE: &str = "NODE_OPTIONS";
/// What sizes a heap by itself.
const JAVA_SIZED: [&str; 3] = ["-Xmx", "-XX:MaxHeapSize=", "-XX:MaxRAM="];
const NODE_SIZED: [&str; 3] = [
    "--max-old-space-size",
    "--max_old_space_size",
    "--max-heap-size",
];

impl Heap {
    /// The limit that heaps are sized by, in a container that is made with `limit`; `None` where there is none. `max` is what
    /// its policy allows.
    #[must_use]
    pub fn bytes(self, limit: Option<Bytes>, max: Bytes, room: Room) -> Option<Bytes> {
        let limit = limit.into_iter().chain(room.original).min();
        let named = match self {
            Self::Original => limit?,
            Self::Maximum => max,
            Self::At(bytes) => bytes,
        };
        let most = room.ceiling.or(limit);
        Some(most.map_or(named, |most| named.min(most)))
    }
}

/// What must be set in an environment (`NAME=value` each) so that heaps are sized as at a limit of so much.
#[must_use]
pub fn variables(environment: &[String], memory: Bytes) -> Vec<Variable> {
    let java = format!("-XX:MaxRAM={}", memory.0);
    let node = format!("--max-old-space-size={}", node_mib(memory));
    [
        (JAVA, java, JAVA_SIZED.as_slice()),
        (NODE, node, NODE_SIZED.as_slice()),
    ]
    .into_iter()
    .filter_map(|(name, option, sized)| with_option(environment, name, &option, sized))
    .collect()
}

/// Whether a container with this environment was made with a heap that is sized, by us or by somebody else.
#[must_use]
pub fn is_sized(environment: &[String]) -> bool {
    value(environment, JAVA).is_some_and(|value| has_any(value, &JAVA_SIZED))
}

fn value<'a>(environment: &'a [String], name: &str) -> Option<&'a str> {
    // Where there are several, programs find the first or the last; runtimes keep one.
    let mut named = environment.iter().rev();
    named.find_map(|variable| variable.strip_prefix(name)?.strip_prefix('='))
}

fn has_any(value: &str, sized: &[&str]) -> bool {
    let is_one = |word: &str| {
        let word = word.trim_start_matches(['"', '\'']);
        sized.iter().any(|sized| word.starts_with(sized))
    };
    value.split_whitespace().any(is_one)
}

fn with_option(
    environment: &[String],
    name: &'static str,
    option: &str,
    sized: &[&str],
) -> Option<Variable> {
    let before = value(environment, name);
    if before.is_some_and(|before| has_any(before, sized)) {
        return None;
    }
    let words = before.unwrap_or_default().trim();
    Some(Variable {
        name,
        value: [words, option].join(" ").trim_start().to_owned(),
        was_there: before.is_some(),
    })
}

/// The old generation that V8 has on a machine with so much memory: half of it, 2 GiB at most, or 4 GiB from 15 GiB on
/// (`Heap::HeapSizeFromPhysicalMemory` and `Heap::MaxOldGenerationSize`, src/heap/heap.cc; with pointers of 64 bits).
const fn node_mib(memory: Bytes) -> u64 {
    const GIB: u64 = 1 << 30;
    const LEAST: u64 = 1;
    let most = if memory.0 >= 15 * GIB { 4096 } else { 2048 };
    let half = memory.0 >> 21;
    if half > most {
        most
    } else if half < LEAST {
        LEAST
    } else {
        half
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(environment: &[&str], memory: Bytes) -> Vec<(String, bool)> {
        let environment: Vec<String> = environment.iter().map(|&one| one.to_owned()).collect();
        let all = variables(&environment, memory).into_iter();
        all.map(|one| (format!("{}={}", one.name, one.value), one.was_there))
            .collect()
    }

    #[test]
    fn heaps_are_sized_by_what_the_policy_names() {
        let (limit, max) = (Some(Bytes::mib(256)), Bytes::mib(4096));
        let room = Room {
            ceiling: Some(max),
            original: None,
        };
        assert_eq!(Heap::Original.bytes(limit, max, room), limit);
        assert_eq!(Heap::Original.bytes(None, max, room), None);
        assert_eq!(Heap::Maximum.bytes(limit, max, room), Some(max));
        let other = Bytes::mib(512);
        assert_eq!(Heap::At(other).bytes(limit, max, room), Some(other));
    }

    #[test]
    fn no_heap_is_larger_than_its_limit_ever_becomes() {
        let (limit, max) = (Some(Bytes::mib(256)), Bytes::mib(4096));
        let all = [
            Heap::Original,
            Heap::Maximum,
            Heap::At(Bytes::mib(2048)),
            Heap::At(Bytes::mib(128)),
        ];
        let of = |limit, room| {
            let mib = |heap: Heap| heap.bytes(limit, max, room).map(|bytes| bytes.0 >> 20);
            all.map(mib)
        };
        let [small, none] = [Some(256), None];
        let nobody_raises = of(limit, Room::default());
        assert_eq!(nobody_raises, [small, small, small, Some(128)]);
        let lower = Room {
            ceiling: Some(Bytes::mib(1024)),
            original: None,
        };
        let at_most = of(limit, lower);
        assert_eq!(at_most, [small, Some(1024), Some(1024), Some(128)]);
        // Made again in the middle of a burst.
        let burst = Some(Bytes::mib(1536));
        let original = Some(Bytes::mib(256));
        let guarded = Room { original, ..lower };
        let again = of(burst, guarded);
        assert_eq!(again, [small, Some(1024), Some(1024), Some(128)]);
        let left = Room {
            ceiling: None,
            original,
        };
        assert_eq!(of(burst, left), [small, small, small, Some(128)]);
        // Without any limit there is none to exceed.
        let unlimited = of(None, Room::default());
        assert_eq!(unlimited, [none, Some(4096), Some(2048), Some(128)]);
    }

    #[test]
    fn an_environment_without_options_gets_them() {
        let set = of(&["PATH=/bin", "JAVA_TOOL_OPTIONS_=x"], Bytes::mib(256));
        let java = ("JAVA_TOOL_OPTIONS=-XX:MaxRAM=268435456".to_owned(), false);
        let node = ("NODE_OPTIONS=--max-old-space-size=128".to_owned(), false);
        assert_eq!(set, [java, node]);
    }

    #[test]
    fn what_is_there_stays_and_what_sizes_a_heap_wins() {
        let set = of(
            &[
                "JAVA_TOOL_OPTIONS=-Dx=1 -XX:MaxRAMPercentage=70",
                "NODE_OPTIONS=",
            ],
            Bytes::mib(256),
        );
        let java = "JAVA_TOOL_OPTIONS=-Dx=1 -XX:MaxRAMPercentage=70 -XX:MaxRAM=268435456";
        let node = "NODE_OPTIONS=--max-old-space-size=128";
        assert_eq!(set, [(java.to_owned(), true), (node.to_owned(), true)]);
        for sized in [
            "-Xmx100m",
            "-Xms1m -XX:MaxRAM=1g",
            "-XX:MaxHeapSize=9",
            "-Da=b\t\"-Xmx1g\"",
        ] {
            let java = format!("JAVA_TOOL_OPTIONS={sized}");
            let node = "NODE_OPTIONS=--max_old_space_size=10";
            assert_eq!(of(&[&java, node], Bytes::mib(256)), [], "{sized}");
            assert!(is_sized(&[java]));
        }
        assert!(!is_sized(&[
            "JAVA_TOOL_OPTIONS=-XX:MaxRAMPercentage=70".to_owned()
        ]));
    }

    #[test]
    fn what_was_set_once_is_not_set_again() {
        let first = of(&[], Bytes::mib(256));
        let words: Vec<&str> = first.iter().map(|(one, _)| one.as_str()).collect();
        assert_eq!(of(&words, Bytes::mib(512)), []);
    }

    #[test]
    fn node_has_the_old_space_of_a_machine_of_that_size() {
        let mib = |mib| node_mib(Bytes::mib(mib));
        assert_eq!([mib(1), mib(512), mib(1024)], [1, 256, 512]);
        // Where node says 4,144 MiB of heap (with its young generation) at 24 GB.
        assert_eq!([mib(8192), mib(15 << 10), mib(24105)], [2048, 4096, 4096]);
    }
}
