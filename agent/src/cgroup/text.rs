//! What the kernel writes into its files, read.
//!
//! A word that is not what the kernel documents is `None`, never a guess; a counter of `memory.events` that an older kernel
//! does not have has counted nothing. These are apart from whoever opens the files, so that they can be tried with any text
//! (`tests/fuzz`).
//!
//! It must not open a file.

use bellows_core::{Bytes, Nanos};

/// A limit file's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// `max`: no limit.
    Max,
    /// A number of bytes.
    At(Bytes),
}

impl Limit {
    /// The limit in bytes; `max` as the largest number.
    #[must_use]
    pub const fn bytes(self) -> Bytes {
        match self {
            Self::Max => Bytes(u64::MAX),
            Self::At(bytes) => bytes,
        }
    }

    pub(super) fn text(self) -> String {
        match self {
            Self::Max => "max".to_owned(),
            Self::At(Bytes(bytes)) => bytes.to_string(),
        }
    }
}

/// Counters of `memory.events`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct MemoryEvents {
    /// Times that usage was above `memory.high`.
    pub high: u64,
    /// Times that usage was about to exceed `memory.max`.
    pub max: u64,
    /// Times that the OOM killer was entered.
    pub oom: u64,
    /// Processes killed by any OOM killer.
    pub oom_kill: u64,
}

/// Reads `memory.events`; a counter that the kernel does not have is zero.
#[must_use]
pub fn parse_events(content: &str) -> MemoryEvents {
    let field = |name| field(content, name).unwrap_or(0);
    MemoryEvents {
        high: field("high"),
        max: field("max"),
        oom: field("oom"),
        oom_kill: field("oom_kill"),
    }
}

/// What a limit file contains; `None` if it is neither `max` nor a number.
#[must_use]
pub fn parse_limit(content: &str) -> Option<Limit> {
    match content.trim() {
        "max" => Some(Limit::Max),
        number => number.parse().ok().map(|bytes| Limit::At(Bytes(bytes))),
    }
}

/// Reads the `some` line's total of a pressure file, which the kernel gives in microseconds.
#[must_use]
pub fn parse_stalled(content: &str) -> Option<Nanos> {
    let some = content.lines().find(|line| line.starts_with("some "))?;
    let total = some
        .split_whitespace()
        .find_map(|word| word.strip_prefix("total="))?;
    let micros: u64 = total.parse().ok()?;
    Some(Nanos(micros.saturating_mul(1000)))
}

/// The value of the `name value` line of a file such as `memory.stat`.
#[must_use]
pub fn field(content: &str, name: &str) -> Option<u64> {
    content.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

/// The cgroup of a process below the root, from its `/proc/PID/cgroup`; `None` outside of cgroup v2,
/// and outside of the cgroup namespace, where the kernel writes `/..`: joined to the root, that path
/// would be somewhere else.
#[must_use]
pub fn own(content: &str) -> Option<&str> {
    let path = content.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let is_below = !path.starts_with('/') && path.split('/').all(|part| part != "..");
    is_below.then_some(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_limits() {
        assert_eq!(parse_limit("max\n"), Some(Limit::Max));
        assert_eq!(parse_limit("4096\n"), Some(Limit::At(Bytes(4096))));
        for bad in ["", "-1", "4096 1", "maximum", "99999999999999999999"] {
            assert_eq!(parse_limit(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_number_follows_its_name() {
        let stat = "usage_usec 8250\nuser_usec 17";
        assert_eq!(field(stat, "usage_usec"), Some(8250));
        let pressure = "some avg10=0.00 avg60=0.00 avg300=0.00 total=42\nfull";
        assert_eq!(parse_stalled(pressure), Some(Nanos(42_000)));
        for content in ["", "usage_usec", "usage_usec max"] {
            assert_eq!(field(content, "usage_usec"), None);
        }
    }

    #[test]
    fn reads_pressure() {
        let text = "some avg10=0.12 avg60=0.00 avg300=0.00 total=1234\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=99\n";
        assert_eq!(parse_stalled(text), Some(Nanos(1_234_000)));
        for bad in ["", "full total=3", "some avg10=0.00", "some total=-1"] {
            assert_eq!(parse_stalled(bad), None, "{bad}");
        }
    }

    #[test]
    fn finds_whole_field_names_only() {
        let stat = "inactive_file 7\nactive_file 5\nfile 12\noom_kill 3\noom 1\n";
        assert_eq!(field(stat, "active_file"), Some(5));
        assert_eq!(field(stat, "file"), Some(12));
        assert_eq!(field(stat, "oom"), Some(1));
        assert_eq!(field(stat, "fil"), None);
    }

    #[test]
    fn the_own_cgroup_is_below_the_root() {
        assert_eq!(own("1:cpu:/a\n0::/b/c..d\n"), Some("b/c..d"));
        assert_eq!(own("0::/\n"), Some(""));
        for outside in ["", "1:cpu:/a\n", "0::/../a\n", "0::/..\n", "0:://a\n"] {
            assert_eq!(own(outside), None, "{outside}");
        }
    }
}
