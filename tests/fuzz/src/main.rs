//! One target under libFuzzer, named by the environment: its command line is libFuzzer's own.
#![no_main]

use std::sync::OnceLock;

use bellows_fuzz::{Target, target};
use rustix::process::{Resource, Rlimit, setrlimit};

/// Set by `cargo xtask fuzz`.
const VARIABLE: &str = "BELLOWS_FUZZ_TARGET";
/// Address space: whoever asks for more for an input of some KiB has believed a number in it.
const ADDRESS_SPACE: u64 = 1 << 30;

static CHOSEN: OnceLock<Target> = OnceLock::new();

fn chosen() -> Target {
    let name = std::env::var(VARIABLE).unwrap_or_default();
    target(&name).unwrap_or_else(|| panic!("{VARIABLE} is `{name}`, which is no target"))
}

fn limit_memory() {
    let limit = Some(ADDRESS_SPACE);
    let limit = Rlimit {
        current: limit,
        maximum: limit,
    };
    setrlimit(Resource::As, limit).expect("a limit can be lowered");
}

libfuzzer_sys::fuzz_target!(
    init: {
        limit_memory();
        CHOSEN.get_or_init(chosen)
    },
    |bytes: &[u8]| CHOSEN.get_or_init(chosen)(bytes)
);
