//! What runs have needed ([`bellows_core::learnt`]), kept over the agent's restarts: one record for each workload, in memory-backed
//! files as everything that the hot path may wait for. A reboot forgets it, and the first run after that climbs by steps.
//!
//! It must not grow for ever: of the many workloads of a node's life the latest are kept.

use std::{fs, path::PathBuf, time::SystemTime};

use bellows_core::Learnt;
use serde::{Deserialize, Serialize};

use crate::originals::{Recorded, Records};

/// Workloads that are remembered, at most. A node runs 110 pods (`maxPods`, the kubelet's default).
const MOST: usize = 1000;
/// So much of a name is kept as it is, with its sum: no file's name has more than 255 bytes (`NAME_MAX`), and those of
/// Kubernetes may have more together.
const LONGEST: usize = 200;
/// Where it is kept.
const DIRECTORY: &str = "/run/bellows/learnt";

/// What is known of one workload.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    key: String,
    learnt: Learnt,
}

impl Recorded for Known {
    fn key(&self) -> &str {
        &self.key
    }
}

/// What is remembered of all.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    records: Records<Known>,
    directory: PathBuf,
}

impl Memory {
    pub(super) fn new() -> Self {
        Self::at(PathBuf::from(DIRECTORY))
    }

    fn at(directory: PathBuf) -> Self {
        Self {
            records: Records::at(directory.clone()),
            directory,
        }
    }

    /// What is known of a workload.
    pub(super) fn of(&self, workload: &str) -> Learnt {
        let known = self.records.read(&key(workload));
        known.map(|known| known.learnt).unwrap_or_default()
    }

    /// Remembers it. What cannot be written down is learnt again.
    pub(super) fn keep(&self, workload: &str, learnt: Learnt) {
        self.forget_the_oldest();
        let key = key(workload);
        if let Err(error) = self.records.write(&Known { key, learnt }) {
            tracing::warn!(workload, %error, "what a burst needed is not remembered");
        }
    }

    fn forget_the_oldest(&self) {
        let entries = fs::read_dir(&self.directory)
            .into_iter()
            .flatten()
            .flatten();
        let mut files: Vec<(SystemTime, PathBuf)> = entries
            .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
            .collect();
        files.sort();
        let surplus = (files.len() + 1).saturating_sub(MOST);
        for (_, path) in files.into_iter().take(surplus) {
            if let Err(error) = fs::remove_file(&path) {
                tracing::debug!(path = %path.display(), %error, "what was learnt is kept");
            }
        }
    }
}

/// A file's name of `NAMESPACE/WORKLOAD/CONTAINER`; a name of Kubernetes has no underscore.
fn key(workload: &str) -> String {
    let key = workload.replace('/', "_");
    if key.len() <= LONGEST {
        return key;
    }
    let sum = crc32fast::hash(workload.as_bytes());
    format!("{}_{sum:08x}", &key[..key.floor_char_boundary(LONGEST)])
}

#[cfg(test)]
mod tests {
    use std::{env, process};

    use bellows_core::{Bytes, learnt::Part};

    use super::*;

    fn part(mib: u64) -> Part {
        Part {
            peak: Bytes::mib(mib),
            ..Part::default()
        }
    }

    #[test]
    fn what_was_learnt_is_kept_and_the_oldest_forgotten() {
        let directory = env::temp_dir().join(format!("bellows-learnt-{}", process::id()));
        let memory = Memory::at(directory.clone());
        assert_eq!(memory.of("dev/web/app"), Learnt::default());
        let mut learnt = Learnt::default();
        learnt.ended("make", part(7));
        for number in 0..MOST + 5 {
            memory.keep(&format!("dev/web-{number}/app"), learnt.clone());
        }
        learnt.ended("make", part(200));
        memory.keep("dev/web/app", learnt.clone());
        assert_eq!(Memory::at(directory.clone()).of("dev/web/app"), learnt);
        let files = fs::read_dir(&directory).unwrap().count();
        assert!((MOST - 5..=MOST).contains(&files), "{files}");
        // Names of Kubernetes' greatest lengths, which differ at their ends only.
        let longest = |end: &str| format!("{0}/{0}{0}{0}{0}/{0}{end}", "n".repeat(62));
        for (end, mib) in [("a", 300), ("b", 400)] {
            learnt.ended("make", part(mib));
            memory.keep(&longest(end), learnt.clone());
            assert_eq!(memory.of(&longest(end)), learnt);
        }
        assert_ne!(memory.of(&longest("a")), memory.of(&longest("b")));
        assert_eq!(memory.of(&longest("c")), Learnt::default());
        // A name that is no plain word is not remembered, and does no harm.
        memory.keep("../../etc", learnt);
        assert_eq!(memory.of("../../etc"), Learnt::default());
        // What is there of another version is as if nothing was.
        fs::write(
            directory.join("dev_web_app.json"),
            r#"{"key":"dev_web_app","limit":7}"#,
        )
        .unwrap();
        assert_eq!(memory.of("dev/web/app"), Learnt::default());
        fs::remove_dir_all(&directory).unwrap();
    }
}
