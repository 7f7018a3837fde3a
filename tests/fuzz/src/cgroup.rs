//! Files of the kernel: cgroup limits, quotas, counters and fields, the own cgroup, the list of nodes.

use bellows::{
    cgroup::{
        self, Limit,
        quota::{parse_counters, parse_quota},
    },
    signal::programs::possible_nodes,
};
use bellows_core::Bytes;

/// Any text as the content of each file.
pub(crate) fn files(bytes: &[u8]) {
    let content = String::from_utf8_lossy(bytes);
    match cgroup::parse_limit(&content) {
        Some(Limit::At(Bytes(limit))) => {
            assert_eq!(
                content.trim().trim_start_matches('+').parse(),
                Ok(limit),
                "a limit is the whole content"
            );
        }
        Some(Limit::Max) => assert_eq!(content.trim(), "max"),
        None => {}
    }
    if let Some(Some(quota)) = parse_quota(&content) {
        let words: Vec<&str> = content.split_whitespace().collect();
        let [quota_text, period] = words[..] else {
            panic!("a quota is two words: {content}");
        };
        assert_eq!(period.trim_start_matches('+').parse(), Ok(quota.period));
        // The kernel allows no longer period than a second, and no quota that this does not hold.
        if quota.period <= 1_000_000 && quota_text.len() <= 12 {
            let again = quota.cpu.quota(quota.period);
            assert_eq!(quota_text.trim_start_matches('+').parse(), Ok(again));
        }
    }
    if let Some(counters) = parse_counters(&content) {
        let throttled = cgroup::field(&content, "nr_throttled").unwrap_or(0);
        assert_eq!(counters.throttled, throttled);
    }
    for name in [
        "high",
        "max",
        "oom",
        "oom_kill",
        "active_file",
        "inactive_file",
        "populated",
    ] {
        if let Some(value) = cgroup::field(&content, name) {
            let own_line = content.lines().any(|line| {
                let mut words = line.split_whitespace();
                words.next() == Some(name)
                    && words.next().and_then(|word| word.parse().ok()) == Some(value)
            });
            assert!(own_line, "{name} has a line of its own");
        }
    }
    let events = cgroup::parse_events(&content);
    assert_eq!(Some(events.oom), cgroup::field(&content, "oom").or(Some(0)));
    if cgroup::parse_stalled(&content).is_some() {
        assert!(content.contains("total="));
    }
    if let Some(path) = cgroup::own(&content) {
        let outside = path.starts_with('/') || path.split('/').any(|part| part == "..");
        assert!(!outside, "`{path}` is below the root");
    }
    assert!(possible_nodes(&content) > 0);
}
