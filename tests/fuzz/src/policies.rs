//! Files of policies: whatever is accepted keeps the promises of a policy, and what is refused is told with its line.

use bellows::policies;

/// Any text as a file.
pub(crate) fn text(bytes: &[u8]) {
    let Ok(text) = std::str::from_utf8(bytes) else {
        return;
    };
    match policies::parse(text) {
        Ok(read) => {
            for policy in &read {
                assert!(!policy.name.trim().is_empty() && !policy.containers.is_empty());
                for memory in policy.containers.iter().filter_map(|rules| rules.memory) {
                    assert!(memory.floor.is_none_or(|floor| floor <= memory.max));
                }
                for cpu in policy.containers.iter().filter_map(|rules| rules.cpu) {
                    assert!(cpu.throttled_per_mille <= 500);
                }
            }
            assert!(!policies::told(&read).is_empty());
        }
        Err(problem) => {
            assert!(!problem.what.is_empty());
            let lines = u64::try_from(text.split(['\n', '\r']).count()).unwrap_or(u64::MAX);
            assert!(problem.line <= lines + 1, "{problem}");
        }
    }
}
