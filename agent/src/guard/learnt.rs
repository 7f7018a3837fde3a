//! What bursts have needed, kept over the agent's restarts: by the name of the container, which a dev pod and a pod of a
//! StatefulSet keep. What is new has to be learnt anew.
//!
//! It must not grow for ever: of the many containers of a node's life the latest are kept.

use std::{fs, path::PathBuf, time::SystemTime};

use bellows_core::Bytes;
use serde::{Deserialize, Serialize};

use crate::originals::{Recorded, Records};

/// Containers that are remembered, at most. A node runs 110 pods (`maxPods`, the kubelet's default).
const MOST: usize = 1000;

/// What the last burst of a container needed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Learnt {
    key: String,
    limit: Bytes,
}

impl Recorded for Learnt {
    fn key(&self) -> &str {
        &self.key
    }
}

/// What is remembered of all.
#[derive(Clone, Debug)]
pub(super) struct Memory {
    records: Records<Learnt>,
    directory: PathBuf,
}

impl Memory {
    pub(super) fn at(directory: PathBuf) -> Self {
        Self {
            records: Records::at(directory.clone()),
            directory,
        }
    }

    /// What the last burst of this container needed.
    pub(super) fn of(&self, name: &str) -> Option<Bytes> {
        Some(self.records.read(&key(name))?.limit)
    }

    /// Remembers it. What cannot be written down is learnt again.
    pub(super) fn learn(&self, name: &str, limit: Bytes) {
        self.forget_the_oldest();
        let learnt = Learnt {
            key: key(name),
            limit,
        };
        if let Err(error) = self.records.write(&learnt) {
            tracing::warn!(name, %error, "what a burst needed is not remembered");
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

/// A file's name of `NAMESPACE/POD/CONTAINER`; a name of Kubernetes has no underscore.
fn key(name: &str) -> String {
    name.replace('/', "_")
}

#[cfg(test)]
mod tests {
    use std::{env, process};

    use super::*;

    #[test]
    fn what_was_learnt_is_kept_and_the_oldest_forgotten() {
        let directory = env::temp_dir().join(format!("bellows-learnt-{}", process::id()));
        let memory = Memory::at(directory.clone());
        assert_eq!(memory.of("dev/web/app"), None);
        for number in 0..MOST + 5 {
            memory.learn(&format!("dev/web-{number}/app"), Bytes::mib(7));
        }
        memory.learn("dev/web/app", Bytes::mib(300));
        memory.learn("dev/web/app", Bytes::mib(200));
        assert_eq!(memory.of("dev/web/app"), Some(Bytes::mib(200)));
        let files = fs::read_dir(&directory).unwrap().count();
        assert!((MOST - 5..=MOST).contains(&files), "{files}");
        // A name that is no plain word is not remembered, and does no harm.
        memory.learn("../../etc", Bytes::mib(1));
        assert_eq!(memory.of("../../etc"), None);
        fs::remove_dir_all(&directory).unwrap();
    }
}
