//! What containers had before they were touched: one small file each, in memory-backed `/run/bellows`.
//!
//! Nothing else knows it: the runtime remembers only the latest limit, and the agent's ledger begins anew with each
//! agent. Written before the first change and before each further one, so that after any death a limit can be told
//! to be ours, and the one at rest is known. A limit that is neither is somebody else's, who wins. Cgroups do not
//! survive a reboot, and neither do these files.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use bellows_core::Bytes;
use serde::{Deserialize, Serialize};

/// Where the records are.
pub const DIRECTORY: &str = "/run/bellows/containers";

/// A container as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Original {
    /// The runtime's id.
    pub id: String,
    /// The name, for people.
    pub name: String,
    /// The limit at rest.
    pub limit: Bytes,
    /// Limits that we have asked for, the latest first.
    pub asked: Vec<Bytes>,
    /// Its pod's limit with all containers at rest, where it has one.
    pub pod_limit: Option<Bytes>,
    /// Its cgroup.
    pub path: PathBuf,
}

/// How many of our own limits are remembered: one may be under way, one may have been taken back.
const ASKED: usize = 4;

impl Original {
    /// Whether a limit is one that we have set or may have set, or the one at rest.
    #[must_use]
    pub fn is_ours(&self, limit: Bytes) -> bool {
        limit == self.limit || self.asked.contains(&limit)
    }

    /// Takes note of a limit that is asked for.
    pub fn ask(&mut self, limit: Bytes) {
        self.asked.insert(0, limit);
        self.asked.truncate(ASKED);
    }

    /// By how much the limit that was asked for last is above the one at rest.
    #[must_use]
    pub fn raised_by(&self) -> Bytes {
        let latest = self.asked.first();
        latest.map_or(Bytes::ZERO, |latest| latest.minus(self.limit))
    }
}

fn file(directory: &Path, id: &str) -> io::Result<PathBuf> {
    // What a runtime calls an id becomes a file's name only if it is a plain word.
    let is_plain = !id.is_empty()
        && id
            .chars()
            .all(|letter| letter.is_ascii_alphanumeric() || letter == '-');
    if is_plain {
        Ok(directory.join(format!("{id}.json")))
    } else {
        let why = format!("`{id}` is no id of a container");
        Err(io::Error::new(io::ErrorKind::InvalidInput, why))
    }
}

/// Writes a record, as a whole or not at all.
///
/// # Errors
///
/// When it cannot be written, or the id is none.
pub fn write(directory: &Path, original: &Original) -> io::Result<()> {
    let path = file(directory, &original.id)?;
    fs::create_dir_all(directory)?;
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_vec(original)?)?;
    fs::rename(new, path)
}

/// The record of a container; one that cannot be read is none, and is told.
#[must_use]
pub fn read(directory: &Path, id: &str) -> Option<Original> {
    let path = file(directory, id).ok()?;
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::warn!(path = %path.display(), %error, "the record of a container cannot be read");
            return None;
        }
    };
    let parsed = serde_json::from_slice(&bytes);
    parsed
        .inspect_err(|error| {
            tracing::warn!(path = %path.display(), %error, "the record of a container is damaged");
        })
        .ok()
}

/// All records that can be read.
#[must_use]
pub fn all(directory: &Path) -> Vec<Original> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut ids: Vec<String> = entries
        .filter_map(|entry| {
            Some(
                entry
                    .file_name()
                    .to_str()?
                    .strip_suffix(".json")?
                    .to_owned(),
            )
        })
        .collect();
    ids.sort();
    ids.iter().filter_map(|id| read(directory, id)).collect()
}

/// Removes the record of a container that is at rest again, or gone.
pub fn remove(directory: &Path, id: &str) {
    if let Ok(path) = file(directory, id)
        && let Err(error) = fs::remove_file(&path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(path = %path.display(), %error, "the record of a container is left behind");
    }
}

#[cfg(test)]
mod tests {
    use std::{env, process};

    use super::*;

    #[test]
    fn what_was_written_is_read_and_what_is_damaged_is_none() {
        let directory = env::temp_dir().join(format!("bellows-records-{}", process::id()));
        let original = Original {
            id: "abc-1".to_owned(),
            name: "dev/workspace/ide".to_owned(),
            limit: Bytes::mib(64),
            pod_limit: Some(Bytes::mib(80)),
            asked: vec![Bytes::mib(128)],
            path: PathBuf::from("/sys/fs/cgroup/kubepods/podx/abc-1"),
        };
        write(&directory, &original).unwrap();
        assert_eq!(read(&directory, "abc-1"), Some(original.clone()));
        fs::write(directory.join("torn.json"), "{\"id\":\"to").unwrap();
        assert_eq!(all(&directory), [original]);
        remove(&directory, "abc-1");
        remove(&directory, "abc-1");
        assert_eq!(read(&directory, "abc-1"), None);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn the_latest_limits_are_ours_and_the_one_at_rest() {
        let mut original = Original {
            id: String::new(),
            name: String::new(),
            limit: Bytes::mib(64),
            asked: Vec::new(),
            pod_limit: None,
            path: PathBuf::new(),
        };
        assert_eq!(original.raised_by(), Bytes::ZERO);
        for mib in [128, 256, 512, 1024, 64] {
            original.ask(Bytes::mib(mib));
        }
        let ours = [64, 256, 512, 1024].map(|mib| original.is_ours(Bytes::mib(mib)));
        assert_eq!(ours, [true; 4]);
        assert!(!original.is_ours(Bytes::mib(128)) && !original.is_ours(Bytes::mib(65)));
        assert_eq!(original.raised_by(), Bytes::ZERO);
        original.ask(Bytes::mib(96));
        assert_eq!(original.raised_by(), Bytes::mib(32));
    }

    #[test]
    fn no_id_leads_out_of_the_directory() {
        let directory = Path::new("/nowhere");
        for id in ["", "../x", "a/b", "a.json"] {
            assert!(file(directory, id).is_err(), "{id}");
        }
    }
}
