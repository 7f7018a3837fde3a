//! Fuzz targets: every parser that reads what Bellows does not control.
//!
//! A target is a function of bytes that must return: no panic, no loop without an end, no
//! allocation out of proportion, and the properties that it asserts. `cargo xtask fuzz` looks for
//! bytes that break one, led by coverage. What it found worth keeping lies in `corpus/TARGET`, and
//! the test below runs the targets over it without libFuzzer, so a crash that was put there stays
//! a regression test.
//!
//! The parsers are called as the agent calls them, not behind a `cfg` of their own: what is fuzzed
//! is what runs. A target must not write or wait, and must depend on nothing but its bytes; the one
//! exception, `btf-kernel`, reads this machine's BTF.

mod attribution;
mod btf;
mod cgroup;
mod input;
mod ledger;
mod pod;
mod policies;
mod quantity;
mod records;

/// What is run over bytes.
pub type Target = fn(&[u8]);

/// The targets by name; each has a directory in `corpus`.
pub const TARGETS: [(&str, Target); 10] = [
    ("attribution", attribution::names),
    ("btf", btf::bytes),
    ("btf-kernel", btf::damaged_kernel),
    ("cgroup", cgroup::files),
    ("ledger", ledger::bytes),
    ("ledger-damage", ledger::damage),
    ("pod", pod::annotations),
    ("policies", policies::text),
    ("quantity", quantity::text),
    ("records", records::events),
];

/// The target of a name.
#[must_use]
pub fn target(name: &str) -> Option<Target> {
    TARGETS
        .iter()
        .find_map(|&(known, target)| (known == name).then_some(target))
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;

    #[test]
    fn the_corpus_is_survived() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
        for (name, target) in TARGETS {
            let mut inputs = 0;
            for entry in fs::read_dir(corpus.join(name)).expect(name) {
                let path = entry.unwrap().path();
                // Shown only when the target panics.
                println!("{}", path.display());
                target(&fs::read(&path).unwrap());
                inputs += 1;
            }
            assert!(inputs > 0, "{name} has no corpus");
        }
        // `cargo xtask fuzz` takes the names from the directories.
        assert_eq!(fs::read_dir(&corpus).unwrap().count(), TARGETS.len());
    }
}
