use std::{
    fs,
    io::{PipeReader, PipeWriter, Write as _, pipe},
    os::{fd::AsRawFd as _, unix::fs::MetadataExt as _},
    path::PathBuf,
    process::{Child, Command},
};

use super::*;
use crate::{
    ledger::{Ledger, Place},
    parallel::process::{self, read},
};

/// A jobserver of this process, whose job is a child of it.
struct Bed {
    directory: PathBuf,
    child: Child,
    state: State,
    watched: Watched,
    reader: PipeReader,
    writer: Option<PipeWriter>,
}

impl Bed {
    fn new(name: &str, wanted: usize, tokens: usize) -> Self {
        let directory =
            std::env::temp_dir().join(format!("bellows-watched-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        let child = Command::new("sleep").arg("60").spawn().unwrap();
        let (reader, mut writer) = pipe().unwrap();
        writer.write_all(&vec![b'+'; tokens]).unwrap();
        let descriptor = reader.as_raw_fd();
        let metadata = fs::metadata(format!("/proc/self/fd/{descriptor}")).unwrap();
        let place = Place {
            owner: id(std::process::id()),
            descriptor,
            device: metadata.dev(),
            inode: metadata.ino(),
        };
        let jobserver = Jobserver::at(place).unwrap();
        let cgroup = Cgroup::stand_in(&directory, CgroupId(7));
        Self {
            watched: Watched::waiting_for(wanted, jobserver, cgroup),
            state: State {
                ledger: Ledger::open(&directory.join("paused.ledger")).unwrap(),
                told: Box::new(|_| {}),
                signal: process::signal,
            },
            directory,
            child,
            reader,
            writer: Some(writer),
        }
    }

    /// A look at which there is no room, and these jobs with whether they run.
    fn withhold(&mut self, jobs: &[(ProcessId, bool)]) {
        let orders = Orders {
            jobs: jobs.iter().copied().collect(),
            more: Some(0),
            ..Orders::default()
        };
        let tree = Tree::below(i32::try_from(std::process::id()).unwrap());
        self.watched.withhold(&orders, &tree, &[], &mut self.state);
    }

    fn taken(&self) -> usize {
        self.watched.jobserver.as_ref().unwrap().taken.len()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        fs::remove_dir_all(&self.directory).unwrap();
    }
}

fn id(pid: u32) -> ProcessId {
    read(i32::try_from(pid).unwrap()).unwrap().unwrap().id
}

#[test]
fn who_has_what_its_brake_allows_is_braked() {
    let bed = Bed::new("braked", 0, 0);
    let write = |file: &str, content: &str| {
        fs::write(bed.directory.join(file), format!("{content}\n")).unwrap();
    };
    write("memory.current", "8388608");
    for (high, is_braked) in [
        ("max", false),
        ("16777216", false),
        ("8388608", true),
        ("4096", true),
    ] {
        write("memory.high", high);
        assert_eq!(bed.watched.is_braked().unwrap(), is_braked, "{high}");
    }
}

/// Whose jobs have ended waits for its tokens, whatever others of the same cgroup wait for.
#[test]
fn a_build_without_jobs_gets_its_tokens_back() {
    let mut bed = Bed::new("others", 0, 7);
    let own = id(bed.child.id());
    let others = ProcessId { began: 1, pid: 1 };
    bed.withhold(&[(others, true), (own, false)]);
    assert_eq!(bed.taken(), 1);
    bed.withhold(&[(others, false), (own, false)]);
    assert_eq!(bed.taken(), 2);
    bed.withhold(&[(others, false)]);
    assert_eq!(bed.taken(), 0);
    assert!(bed.watched.source().is_none(), "it waits for more");
    // Nobody but this process can write, so that make sees the end.
    drop(bed.writer.take());
    let mut left = Vec::new();
    std::io::Read::read_to_end(&mut bed.reader, &mut left).unwrap();
    assert_eq!(left.len(), 7);
}

/// Those that have the same pipe count them.
#[test]
fn tokens_are_given_back_though_the_make_has_ended_by_which_they_were_taken() {
    let mut bed = Bed::new("ended", 2, 7);
    bed.watched.take_between(&mut bed.state);
    assert_eq!(bed.taken(), 2);
    bed.watched.jobserver.as_mut().unwrap().place.owner.began += 1;
    bed.withhold(&[]);
    assert!(bed.watched.jobserver.is_none());
    drop(bed.writer.take());
    let mut left = Vec::new();
    std::io::Read::read_to_end(&mut bed.reader, &mut left).unwrap();
    assert_eq!(left.len(), 7);
}

#[test]
fn more_tokens_than_are_ever_taken_are_not_waited_for() {
    let mut bed = Bed::new("most", MOST, MOST + 44);
    assert!(bed.watched.source().is_some());
    bed.watched.take_between(&mut bed.state);
    assert_eq!(bed.taken(), MOST);
    let own = id(bed.child.id());
    bed.withhold(&[(own, false)]);
    assert_eq!(bed.taken(), MOST);
    assert!(bed.watched.source().is_none(), "it is readable for ever");
}

/// A pipe to which nobody writes is always readable: it must not be looked at as often as that is seen.
#[test]
fn what_was_waited_for_in_vain_is_not_waited_for_after_the_next_look() {
    let mut bed = Bed::new("vain", 1, 0);
    drop(bed.writer.take());
    let own = id(bed.child.id());
    for _ in 0..3 {
        assert!(bed.watched.source().is_some());
        bed.watched.take_between(&mut bed.state);
        assert!(bed.watched.source().is_none());
        bed.withhold(&[(own, false)]);
        assert!(bed.watched.source().is_none(), "it is looked at again");
        bed.withhold(&[(own, false)]);
    }
}

#[test]
fn nothing_is_taken_that_nobody_will_give_back() {
    let mut bed = Bed::new("over", 2, 0);
    bed.watched.may_have(Bytes::mib(64), false);
    assert_eq!(bed.watched.due(), None);
    bed.writer.as_mut().unwrap().write_all(b"+").unwrap();
    assert!(bed.watched.source().is_none());
    bed.watched.take_between(&mut bed.state);
    assert_eq!(bed.taken(), 0);
    // Nor is one that was taken forgotten.
    bed.watched.is_waiting = true;
    bed.watched.take_between(&mut bed.state);
    assert_eq!(bed.taken(), 1);
    assert!(bed.watched.due().is_some());
}
