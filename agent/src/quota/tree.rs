//! The processes that a program has begun, and those that these have: a build ends when all of them have.
//!
//! Who is whose child is asked of `/proc`, when a program is executed in the container and once a tick. What loses its
//! parent between two looks is not found any more: a daemon that detaches itself is not part of a build, and must not keep
//! it going for ever.
//!
//! A tree dies with its agent, and a program may end before the next one looks. So what [lasts](Tree::lasting) is to be
//! waited for by its own number, which is written down.

use std::{collections::BTreeMap, fs};

use bellows_core::Nanos;

/// From what age on a process is one that lasts: a build begins hundreds a second that do not.
const LASTING: Nanos = Nanos::millis(1000);

/// What the kernel says of a process (`/proc/PID/stat`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Process {
    id: u32,
    parent: u32,
    /// Ticks from the machine's start to its own: another may have its number.
    started: u64,
}

/// A process and what has come of it.
#[derive(Debug, Default)]
pub(super) struct Tree(BTreeMap<u32, Known>);

#[derive(Clone, Copy, Debug)]
struct Known {
    started: u64,
    /// When it was first seen.
    since: Nanos,
}

impl Tree {
    /// One that has just begun.
    pub(super) fn of(root: u32, at: Nanos) -> Self {
        let root = process(root).map(|process| process.seen(at));
        Self(root.into_iter().collect())
    }

    /// Looks who of it lives, among all processes that might.
    pub(super) fn look(&mut self, processes: &[Process], at: Nanos) {
        let before = std::mem::take(&mut self.0);
        let known = processes.iter().filter_map(|process| {
            let known = before.get(&process.id);
            let known = known.filter(|known| known.started == process.started)?;
            Some((process.id, *known))
        });
        self.0 = known.collect();
        // Children of those that have just ended are told by their parents' number as long as they have it.
        loop {
            let is_new = |process: &&Process| {
                let is_of_it =
                    before.contains_key(&process.parent) || self.0.contains_key(&process.parent);
                is_of_it && !self.0.contains_key(&process.id)
            };
            let new: Vec<Process> = processes.iter().filter(is_new).copied().collect();
            if new.is_empty() {
                return;
            }
            self.0.extend(new.iter().map(|process| process.seen(at)));
        }
    }

    /// Who of it lived at the last look.
    pub(super) fn ids(&self) -> impl Iterator<Item = u32> {
        self.0.keys().copied()
    }

    /// Who of these is known for so long that it is no passing one.
    pub(super) fn lasting(&self, at: Nanos) -> impl Iterator<Item = u32> {
        let lasting = move |known: &Known| at.since(known.since) >= LASTING;
        let known = self.0.iter().filter(move |(_, known)| lasting(known));
        known.map(|(&id, _)| id)
    }
}

impl Process {
    const fn seen(&self, at: Nanos) -> (u32, Known) {
        let started = self.started;
        (self.id, Known { started, since: at })
    }
}

/// The processes of a list of numbers that live.
pub(super) fn living(ids: impl Iterator<Item = u32>) -> Vec<Process> {
    ids.filter_map(process).collect()
}

/// `None` for one that has ended, whether or not its parent has taken notice.
fn process(id: u32) -> Option<Process> {
    parse(id, &fs::read_to_string(format!("/proc/{id}/stat")).ok()?)
}

fn parse(id: u32, stat: &str) -> Option<Process> {
    // A name may have anything in it, but ends with the last bracket.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    // Field 22, of which the state is the third (proc_pid_stat(5)).
    let started = fields.nth(17)?.parse().ok()?;
    (!matches!(state, "Z" | "X")).then_some(Process {
        id,
        parent,
        started,
    })
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio, id};

    use super::*;

    const fn process_of(id: u32, parent: u32, started: u64) -> Process {
        Process {
            id,
            parent,
            started,
        }
    }

    #[test]
    fn it_lives_as_long_as_any_of_it() {
        let seconds = |seconds: u64| Nanos::millis(seconds * 1000);
        let mut tree = Tree([process_of(10, 1, 1).seen(seconds(0))].into());
        let all = [
            process_of(10, 1, 1),
            process_of(12, 11, 3),
            process_of(11, 10, 2),
            process_of(20, 1, 1),
        ];
        tree.look(&all, seconds(3));
        assert_eq!(tree.ids().collect::<Vec<_>>(), [10, 11, 12]);
        assert_eq!(tree.lasting(seconds(3)).collect::<Vec<_>>(), [10]);
        // The first two have ended; the third has got another parent, and the first's number was given away.
        tree.look(&[process_of(10, 1, 9), process_of(12, 1, 3)], seconds(4));
        assert_eq!(tree.ids().collect::<Vec<_>>(), [12]);
        assert_eq!(tree.lasting(seconds(4)).collect::<Vec<_>>(), [12]);
        // Its number was given away, too.
        tree.look(&[process_of(12, 12, 9)], seconds(5));
        assert_eq!(tree.lasting(seconds(5)).count(), 0);
        tree.look(&[process_of(10, 1, 9)], seconds(6));
        assert!(tree.0.is_empty());
    }

    #[test]
    fn what_the_kernel_says_is_read() {
        let stat = "7 (a) (b c) S 3 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 4711 1 2 3";
        assert_eq!(parse(7, stat), Some(process_of(7, 3, 4711)));
        assert_eq!(parse(7, &stat.replace(" S ", " Z ")), None);
        for text in ["", "7 (a", "7 (a) S", "7 (a) S 3 7"] {
            assert_eq!(parse(7, text), None, "{text}");
        }
        assert_eq!(process(id()).unwrap().id, id());
    }

    #[test]
    fn a_real_child_is_found() {
        let mut child = Command::new("sh")
            .args(["-c", "sleep 60 & wait"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let mut tree = Tree::of(child.id(), Nanos(0));
        let all = || {
            let entries = fs::read_dir("/proc").unwrap().flatten();
            living(entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()))
        };
        let two = |tree: &Tree| tree.0.len() == 2;
        while !two(&tree) {
            tree.look(&all(), Nanos(0));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        tree.look(&all(), Nanos(0));
        let left: Vec<u32> = tree.ids().collect();
        assert_eq!(left.len(), 1, "its child lives on");
        let ended = Command::new("kill").arg(left[0].to_string()).status();
        assert!(ended.unwrap().success());
        while !tree.0.is_empty() {
            tree.look(&all(), Nanos(0));
        }
    }
}
