//! What containers and their pods had before they were touched: one small file each, in memory-backed `/run/bellows`.
//!
//! Nothing else knows it: the runtime remembers only the latest limit, and the agent's ledger begins anew with each
//! agent. Written before the first change and before each further one, so that after any death a limit can be told
//! to be ours, and the one at rest is known. Cgroups do not survive a reboot, and neither do these files.

use std::{
    fs, io,
    marker::PhantomData,
    path::{Path, PathBuf},
};

use bellows_core::{Bytes, Cpu, boost::Boosts, moved::MovedLimit};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::{
    actuate::{by_hand::ByHand, squeeze::Squeezed},
    cgroup::quota::Quota,
    state::with_reserve,
};

/// A container as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Original {
    /// The runtime's id.
    pub id: String,
    /// The name, for people.
    pub name: String,
    /// Its memory limit, where that is moved.
    pub limit: Option<MovedLimit<Bytes>>,
    /// Its CPU quota, where that is moved.
    pub quota: Option<MovedQuota>,
    /// What it is lent.
    #[serde(default)]
    pub boosts: Boosts,
    /// Whether anything was lent to it yet: its start is not boosted a second time.
    #[serde(default)]
    pub has_begun: bool,
    /// Its cgroup.
    pub path: PathBuf,
}

/// A CPU quota that is moved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedQuota {
    /// The quota.
    pub cpu: MovedLimit<Cpu>,
    /// Its period in microseconds, which is never changed.
    pub period: u64,
    /// What the runtime knows: it sets that again with whatever else it is asked for.
    pub told: Cpu,
    /// What it was asked for last without an answer that is certain.
    pub telling: Option<Cpu>,
}

impl MovedQuota {
    /// One that was never moved.
    #[must_use]
    pub const fn new(quota: Quota) -> Self {
        Self {
            cpu: MovedLimit::new(quota.cpu),
            period: quota.period,
            told: quota.cpu,
            telling: None,
        }
    }

    /// Whether a quota is one that we have set or may have set, or that the runtime has set again.
    #[must_use]
    pub fn is_ours(&self, quota: Quota) -> bool {
        self.meant_by(quota).is_some()
    }

    /// Which of those a quota is, however the kernel or systemd has rounded it.
    #[must_use]
    pub fn meant_by(&self, quota: Quota) -> Option<Cpu> {
        let told = [self.cpu.at_rest, self.told].into_iter();
        let mut own = told
            .chain(self.telling)
            .chain(self.cpu.asked.iter().copied())
            .filter(|_| quota.period == self.period);
        own.find(|own| own.is_set_as(quota.cpu, quota.period))
    }

    /// Whether the runtime knows that it is at rest, and nothing is under way.
    #[must_use]
    pub fn is_settled(&self, quota: Quota) -> bool {
        [quota.cpu, self.told] == [self.cpu.at_rest; 2]
            && self.telling.is_none()
            && self.latest().cpu == self.cpu.at_rest
    }

    /// Whether its owner knows what it is meant to be now. One who counts in thousandths knows it so.
    #[must_use]
    pub fn is_told(&self) -> bool {
        let latest = self.latest().cpu;
        let is_known = latest == self.told || self.as_text(latest) == self.told;
        is_known && self.telling.is_none()
    }

    /// A quota as it is read from a text in thousandths; the one at rest has its own.
    #[must_use]
    pub fn as_text(&self, cpu: Cpu) -> Cpu {
        if cpu == self.cpu.at_rest {
            cpu
        } else {
            cpu.round_millis()
        }
    }

    /// What it is meant to be now.
    #[must_use]
    pub fn latest(&self) -> Quota {
        Quota {
            cpu: *self.cpu.asked.first().unwrap_or(&self.cpu.at_rest),
            period: self.period,
        }
    }
}

/// A pod's cgroup as it was with all of its containers at rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodOriginal {
    /// Its memory limit.
    pub limit: MovedLimit<Bytes>,
    /// The cgroup.
    pub path: PathBuf,
}

/// The CPU quota of a pod's cgroup with all of its containers at rest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodQuota {
    /// Its quota.
    pub quota: MovedQuota,
    /// The cgroup.
    pub path: PathBuf,
}

/// What is kept in a file of its own.
pub trait Recorded: Serialize + DeserializeOwned {
    /// What names the file.
    fn key(&self) -> &str;
}

impl Recorded for Original {
    fn key(&self) -> &str {
        &self.id
    }
}

impl Recorded for PodOriginal {
    fn key(&self) -> &str {
        key_of(&self.path)
    }
}

impl Recorded for PodQuota {
    fn key(&self) -> &str {
        key_of(&self.path)
    }
}

/// The key of the record of a pod: the name of its cgroup, which has its uid in it.
#[must_use]
pub fn key_of(pod: &Path) -> &str {
    let name = pod.file_name().and_then(|name| name.to_str());
    name.unwrap_or_default()
}

/// A directory with records of one kind.
#[derive(Debug)]
pub struct Records<T> {
    directory: PathBuf,
    kind: PhantomData<fn() -> T>,
}

impl<T> Clone for Records<T> {
    fn clone(&self) -> Self {
        Self::at(self.directory.clone())
    }
}

impl Records<Original> {
    /// Those of containers.
    #[must_use]
    pub fn containers() -> Self {
        Self::at(PathBuf::from("/run/bellows/containers"))
    }
}

impl Records<Original> {
    /// Those of containers in pods that the API owns: what is moved of their CPU.
    #[must_use]
    pub fn in_pods() -> Self {
        Self::at(PathBuf::from("/run/bellows/in-pods"))
    }
}

impl Records<PodOriginal> {
    /// Those of pods.
    #[must_use]
    pub fn pods() -> Self {
        Self::at(PathBuf::from("/run/bellows/pods"))
    }
}

impl Records<PodQuota> {
    /// Those of the CPU quotas of pods.
    #[must_use]
    pub fn pod_quotas() -> Self {
        Self::at(PathBuf::from("/run/bellows/pod-quotas"))
    }
}

impl Records<ByHand> {
    /// Those of limits that were written by hand, of pods that the API owns.
    #[must_use]
    pub fn by_hand() -> Self {
        Self::at(PathBuf::from("/run/bellows/by-hand"))
    }
}

impl Records<Squeezed> {
    /// Those of brakes that stand for a moment, beside a ledger.
    #[must_use]
    pub fn squeezed(ledger: &Path) -> Self {
        Self::at(ledger.with_file_name("squeezed"))
    }
}

impl<T> Records<T> {
    /// Those in a directory, which is made when one is written.
    #[must_use]
    pub const fn at(directory: PathBuf) -> Self {
        Self {
            directory,
            kind: PhantomData,
        }
    }

    fn file(&self, key: &str) -> io::Result<PathBuf> {
        // What a runtime calls an id becomes a file's name only if it is a plain word.
        let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-_.".contains(letter);
        if key.chars().all(is_plain) && key.starts_with(|first: char| first.is_ascii_alphanumeric())
        {
            Ok(self.directory.join(format!("{key}.json")))
        } else {
            let why = format!("`{key}` is no id of a container or pod");
            Err(io::Error::new(io::ErrorKind::InvalidInput, why))
        }
    }

    /// Removes the record of what is at rest again, or gone.
    pub fn remove(&self, key: &str) {
        if let Ok(path) = self.file(key)
            && let Err(error) = fs::remove_file(&path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %path.display(), %error, "a record is left behind");
        }
    }
}

impl<T: Recorded> Records<T> {
    /// Writes a record, as a whole or not at all.
    ///
    /// # Errors
    ///
    /// When it cannot be written, or its key is none; the text says what to do.
    pub fn write(&self, record: &T) -> io::Result<()> {
        let written = self.file(record.key()).and_then(|path| {
            let new = path.with_extension("new");
            let bytes = serde_json::to_vec(record)?;
            with_reserve(|| {
                fs::create_dir_all(&self.directory)?;
                fs::write(&new, &bytes)?;
                fs::rename(&new, &path)
            })
        });
        written.map_err(|error| {
            let directory = self.directory.display();
            let why = format!(
                "its limit cannot be written down in {directory}: {error}; free memory on /run"
            );
            io::Error::new(error.kind(), why)
        })
    }

    /// A record; one that cannot be read is none, and is told.
    #[must_use]
    pub fn read(&self, key: &str) -> Option<T> {
        let path = self.file(key).ok()?;
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "a record cannot be read");
                return None;
            }
        };
        let parsed = serde_json::from_slice(&bytes);
        parsed
            .inspect_err(|error| {
                tracing::warn!(path = %path.display(), %error, "a record is damaged");
            })
            .ok()
    }

    /// All records that can be read.
    #[must_use]
    pub fn all(&self) -> Vec<T> {
        let entries = fs::read_dir(&self.directory).into_iter().flatten();
        let names = entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok());
        let mut keys: Vec<String> = names
            .filter_map(|name| Some(name.strip_suffix(".json")?.to_owned()))
            .collect();
        keys.sort();
        keys.iter().filter_map(|key| self.read(key)).collect()
    }
}

#[cfg(test)]
mod tests {
    use std::{env, process};

    use super::*;

    #[test]
    fn what_was_written_is_read_and_what_is_damaged_is_none() {
        let directory = env::temp_dir().join(format!("bellows-records-{}", process::id()));
        let records = Records::at(directory.clone());
        let mut limit = MovedLimit::new(Bytes::mib(64));
        limit.ask(Bytes::mib(128), Bytes::mib(64));
        let original = Original {
            id: "abc-1".to_owned(),
            name: "dev/workspace/ide".to_owned(),
            limit: Some(limit),
            quota: Some(MovedQuota::new(Quota {
                cpu: Cpu::millis(250),
                period: 100_000,
            })),
            boosts: Boosts::none(),
            has_begun: false,
            path: PathBuf::from("/sys/fs/cgroup/kubepods/podx/abc-1"),
        };
        records.write(&original).unwrap();
        assert_eq!(records.read("abc-1"), Some(original.clone()));
        fs::write(directory.join("torn.json"), "{\"id\":\"to").unwrap();
        assert_eq!(records.all(), [original]);
        records.remove("abc-1");
        records.remove("abc-1");
        assert_eq!(records.read("abc-1"), None);
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_quota_that_the_runtime_sets_again_is_ours() {
        let quota = |millis| Quota {
            cpu: Cpu::millis(millis),
            period: 100_000,
        };
        let mut moved = MovedQuota::new(quota(250));
        assert_eq!(moved.latest(), quota(250));
        for millis in [1000, 900, 800, 700, 600] {
            moved.cpu.ask(Cpu::millis(millis), Cpu::millis(250));
        }
        assert!(!moved.is_ours(quota(1000)) && !moved.is_ours(quota(500)));
        moved.told = Cpu::millis(1000);
        moved.telling = Some(Cpu::millis(500));
        let ours = [250, 500, 600, 900, 1000].map(|millis| moved.is_ours(quota(millis)));
        assert_eq!(ours, [true; 5]);
        assert!(!moved.is_ours(quota(400)));
        let other_period = Quota {
            period: 50_000,
            ..quota(250)
        };
        assert!(!moved.is_ours(other_period));
        assert_eq!(moved.latest(), quota(600));
        // As systemd has it after a daemon-reload.
        let odd = MovedQuota::new(quota(125));
        let ours = [120, 125, 130].map(|millis| odd.is_ours(quota(millis)));
        assert_eq!(ours, [false, true, true]);
    }

    #[test]
    fn who_counts_in_thousandths_is_told_once() {
        let mut moved = MovedQuota::new(Quota {
            cpu: Cpu::millis(250),
            period: 33_333,
        });
        let raised = Quota {
            period: 33_333,
            ..moved.latest()
        };
        let raised = raised.with(Cpu::millis(2001));
        assert_ne!(raised.cpu, Cpu::millis(2001));
        moved.cpu.ask(raised.cpu, moved.cpu.at_rest);
        assert!(!moved.is_told());
        moved.told = moved.as_text(raised.cpu);
        assert!(moved.is_told());
        // What comes of it is ours, rounded the other way.
        let set = Cpu::of_quota(2001 * 33_333 / 1000, 33_333).unwrap();
        assert!(moved.is_ours(Quota { cpu: set, ..raised }));
        moved.telling = Some(moved.told);
        assert!(!moved.is_told());
    }

    #[test]
    fn a_pods_slice_names_its_record() {
        let slice = "kubepods-burstable-pod4d0e_7f.slice";
        let records = Records::<PodOriginal>::at(PathBuf::from("/nowhere"));
        let path = Path::new("/sys/fs/cgroup/kubepods.slice").join(slice);
        let file = records.file(key_of(&path)).unwrap();
        assert_eq!(file, Path::new("/nowhere").join(format!("{slice}.json")));
    }

    #[test]
    fn no_key_leads_out_of_the_directory() {
        let records = Records::<Original>::at(PathBuf::from("/nowhere"));
        for key in ["", "../x", "a/b", "..", ".hidden"] {
            assert!(records.file(key).is_err(), "{key}");
        }
    }
}
