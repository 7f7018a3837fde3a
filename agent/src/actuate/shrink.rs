//! Making room for a lower limit without killing or braking what lives under it.
//!
//! Writing `memory.max` below usage reclaims in the writer and then kills. So page cache and the kernel's caches of
//! names and inodes are given back first, by `memory.reclaim` (Linux 5.19), which throttles nobody; then `memory.high` keeps a
//! reader from filling it again at once, close to usage by then, so that nobody sleeps for it. Before
//! 5.19 `memory.high` does both, and in a cgroup whose brake is not ours only for as long as it takes. This may block for as long as reclaim takes and must not run on the
//! reflex thread; it changes no limit.
//!
//! Nobody can tell cheaply how many of those names and inodes are in use (by open files, or watched by inotify). Asking for
//! what is in use gives all page cache back for nothing, and where reclaim may swap, what is idle goes with it. So it is
//! asked for only where nothing can be swapped out for it ([`spares_memory`]), and where it was in vain not again at once.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use bellows_core::{Bytes, Nanos, Policy, Thresholds, decide::SLAB_IN_USE_FOR};

use super::squeeze::squeeze;
use crate::{
    cgroup::{Cgroup, CgroupError, Limit, MemoryStat},
    clock::now,
    doctor::swap_devices,
    explain::LEDGER,
    originals::Records,
};

const RECLAIM: &str = "memory.reclaim";
/// So often it is reclaimed what a reader has charged meanwhile.
const RECLAIMS: usize = 3;

/// A limit that is fuller than this is not set: more may be charged while it is.
const FULL_PER_MILLE: u64 = 970;

/// What was asked for in vain is asked for again at once where demand has fallen to this share.
const FALLEN_PER_MILLE: u64 = 900;

/// What was left in use where the kernel's own caches were asked for in vain, by cgroup, and when.
static IN_VAIN: Mutex<BTreeMap<PathBuf, (Bytes, Nanos)>> = Mutex::new(BTreeMap::new());

/// Brings usage under the watermark of `to`; returns whether that succeeded. The caller arms the
/// reflex afterwards, which puts the brake back where it belongs; a brake that is somebody else's is not
/// moved.
///
/// # Errors
///
/// [`CgroupError`] when a file cannot be read or written.
pub fn make_room(
    cgroup: &Cgroup,
    to: Bytes,
    policy: &Policy,
    foreign_brake: bool,
) -> Result<bool, CgroupError> {
    let target = Thresholds::under(policy, to);
    let stat = cgroup.stat()?;
    let fits = stat.demand() <= target.watermark;
    if !fits && (stat.least() > target.watermark || !spares_memory(cgroup)) {
        return Ok(false);
    }
    if stat.usage > target.watermark {
        if cgroup.has(RECLAIM) {
            let slack = to.minus(target.watermark);
            let ask = |excess| reclaim(cgroup, excess);
            reclaim_to(target.watermark, slack, || cgroup.usage(), ask)?;
            // Dirty pages may not be given back so soon, and the next burst may have begun meanwhile: far above the brake
            // everybody would sleep for two seconds with each charge, and whoever sets it below usage swaps out. A reader
            // has charged little since, of page cache.
            let stat = cgroup.stat()?;
            if stat.usage > to || stat.demand() > target.watermark {
                return Ok(false);
            }
        }
        if !foreign_brake {
            cgroup.set_limit("memory.high", Limit::At(target.high))?;
        }
    }
    Ok(cgroup.usage()? <= target.watermark)
}

/// The same for a cgroup that nobody guards and whose brake is not ours: brings usage below a share of `to` that
/// leaves room for what is charged meanwhile.
///
/// # Errors
///
/// [`CgroupError`] when a file cannot be read.
pub fn make_room_in(cgroup: &Cgroup, to: Bytes) -> Result<bool, CgroupError> {
    let target = to.per_mille(FULL_PER_MILLE);
    let stat = cgroup.stat()?;
    let is_beyond = stat.demand() > target;
    if is_beyond && !may_ask_beyond(cgroup, stat, target) {
        return Ok(false);
    }
    let excess = stat.usage.minus(target);
    if excess > Bytes::ZERO {
        if cgroup.has(RECLAIM) {
            reclaim(cgroup, excess);
        } else {
            squeeze(cgroup, target, &Records::squeezed(Path::new(LEDGER)))?;
        }
    }
    let is_made = cgroup.usage()? <= target;
    if is_beyond && !is_made {
        let at = now();
        let left = (cgroup.stat()?.demand(), at);
        let mut in_vain = in_vain();
        in_vain.retain(|_, &mut (_, asked)| at.since(asked) < SLAB_IN_USE_FOR);
        in_vain.insert(cgroup.path().to_owned(), left);
    }
    Ok(is_made)
}

/// Whether the kernel's own caches may be asked for. Whoever waits for a limit to come down comes again every few seconds.
fn may_ask_beyond(cgroup: &Cgroup, stat: MemoryStat, target: Bytes) -> bool {
    let asked = in_vain().get(cgroup.path()).copied();
    stat.least() <= target && !is_in_vain(asked, stat.demand(), now()) && spares_memory(cgroup)
}

fn is_in_vain(asked: Option<(Bytes, Nanos)>, demand: Bytes, at: Nanos) -> bool {
    asked.is_some_and(|(left, asked)| {
        demand > left.per_mille(FALLEN_PER_MILLE) && at.since(asked) < SLAB_IN_USE_FOR
    })
}

fn in_vain() -> MutexGuard<'static, BTreeMap<PathBuf, (Bytes, Nanos)>> {
    IN_VAIN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether reclaim takes no memory that is in use: the kernel knows the word for it (`swappiness=` in `memory_reclaim`,
/// mm/memcontrol.c, Linux 6.9; read: with nothing to reclaim it is taken apart and nothing is done, and older kernels refuse
/// it with EINVAL), or there is nowhere to swap to.
#[must_use]
pub fn spares_memory(cgroup: &Cgroup) -> bool {
    cgroup.has(RECLAIM)
        && (cgroup.write(RECLAIM, &asked_for(Bytes::ZERO)).is_ok()
            || !may_swap(cgroup, &swap_devices()))
}

fn may_swap(cgroup: &Cgroup, devices: &[String]) -> bool {
    let none = Limit::At(Bytes::ZERO);
    !devices.is_empty()
        && !cgroup
            .limit("memory.swap.max")
            .is_ok_and(|swap| swap == none)
}

/// Whether usage leaves room for what is charged while a limit is set: nobody looks before it is lowered, and the
/// kernel kills.
///
/// # Errors
///
/// [`CgroupError`] when usage cannot be read.
pub fn fits(cgroup: &Cgroup, limit: Bytes) -> Result<bool, CgroupError> {
    Ok(cgroup.usage()? <= limit.per_mille(FULL_PER_MILLE))
}

/// Asks for what is above `target` until that is gone, or until nobody gives anything back. A reader has charged meanwhile, and
/// charges as much again while that is given back: it is asked for with what it comes to, up to `slack`.
fn reclaim_to(
    target: Bytes,
    slack: Bytes,
    mut usage: impl FnMut() -> Result<Bytes, CgroupError>,
    mut ask: impl FnMut(Bytes),
) -> Result<(), CgroupError> {
    let mut used = usage()?;
    let mut more = Bytes::ZERO;
    for _ in 0..RECLAIMS {
        let excess = used.minus(target);
        if excess == Bytes::ZERO {
            break;
        }
        ask(excess.plus(excess.min(more)));
        let before = std::mem::replace(&mut used, usage()?);
        if used >= before {
            break;
        }
        more = slack;
    }
    Ok(())
}

/// Gives page cache back, and no memory that is in use: what is swapped out is not missed at once, and the limit would follow
/// it down to where its owner can only swap. Older kernels do not know the word, and reclaim as they do.
fn reclaim(cgroup: &Cgroup, excess: Bytes) {
    let asked = match cgroup.write(RECLAIM, &asked_for(excess)) {
        Err(error) if error.is_invalid() => cgroup.write(RECLAIM, &excess.0.to_string()),
        asked => asked,
    };
    // EAGAIN says that less was reclaimed than asked for, which the look at usage shows.
    if let Err(error) = asked {
        tracing::debug!(%error, "reclaimed less than asked for");
    }
}

fn asked_for(excess: Bytes) -> String {
    format!("{} swappiness=0", excess.0)
}

#[cfg(test)]
mod tests {
    use std::{env, fs, os::unix::fs::symlink, process};

    use bellows_core::{Actuation, Patience, Signals, WHOLE, elastic::Parallelism};

    use super::*;

    /// A cgroup of files, in which nothing is ever given back.
    struct Bed(PathBuf);

    impl Bed {
        fn new(name: &str) -> Self {
            let name = format!("bellows-shrink-{name}-{}", process::id());
            let bed = Self(env::temp_dir().join(name));
            fs::create_dir_all(&bed.0).unwrap();
            bed.write("memory.high", "max");
            bed.write("memory.swap.max", "max");
            bed
        }

        fn write(&self, file: &str, content: &str) {
            fs::write(self.0.join(file), content).unwrap();
        }

        fn read(&self, file: &str) -> String {
            fs::read_to_string(self.0.join(file)).unwrap()
        }

        fn uses(&self, mib: u64, file: u64, slab: u64) {
            self.write("memory.current", &(mib << 20).to_string());
            let stat = format!(
                "active_file 0\ninactive_file {}\nslab_reclaimable {}\n",
                file << 20,
                slab << 20
            );
            self.write("memory.stat", &stat);
        }

        fn cgroup(&self) -> Cgroup {
            Cgroup::open(&self.0).unwrap()
        }

        /// What is asked for when room is made for so much.
        fn asked(&self, to: u64) -> String {
            self.write(RECLAIM, "");
            assert!(!make_room_in(&self.cgroup(), Bytes::mib(to)).unwrap());
            self.read(RECLAIM)
        }

        /// What stands at the brake after room was made for so much.
        fn braked(&self, to: u64) -> String {
            self.write("memory.high", "max");
            let to = Bytes::mib(to);
            let policy = Policy {
                original: to,
                ceiling: to,
                actuation: Actuation::Direct,
                signals: Signals::Programs,
                patience: Patience::UNPROBED,
                cpus: 1,
                shrink_after: Nanos(0),
                usable_per_mille: WHOLE,
                by_hand_after: None,
                priority: 0,
                parallelism: Parallelism::Unchanged,
                learnt: None,
            };
            assert!(!make_room(&self.cgroup(), to, &policy, false).unwrap());
            self.read("memory.high")
        }
    }

    impl Drop for Bed {
        fn drop(&mut self) {
            fs::remove_dir_all(&self.0).unwrap();
        }
    }

    #[test]
    fn names_and_inodes_in_use_are_asked_for_once() {
        let bed = Bed::new("once");
        bed.uses(450, 50, 250);
        assert!(bed.asked(256).ends_with(" swappiness=0"));
        assert_eq!(bed.asked(256), "");
        bed.uses(400, 50, 200);
        assert!(bed.asked(256).ends_with(" swappiness=0"), "it has fallen");
        bed.uses(399, 50, 200);
        assert_eq!(bed.asked(256), "");
        // Page cache is given back whenever that suffices.
        bed.uses(399, 199, 100);
        assert_ne!(bed.asked(256), "");
        let (left, at) = (Bytes::mib(400), Nanos::millis(1000));
        let later = Nanos(at.0 + SLAB_IN_USE_FOR.0);
        assert!(is_in_vain(Some((left, at)), left, at));
        assert!(!is_in_vain(Some((left, at)), left, later));
    }

    #[test]
    fn no_memory_is_swapped_out_for_names_and_inodes() {
        let bed = Bed::new("older");
        assert!(!spares_memory(&bed.cgroup()), "a kernel before 5.19");
        // Takes no words, as a kernel before 6.9.
        let link = bed.0.join(RECLAIM);
        symlink("/proc/self/oom_score_adj", &link).unwrap();
        let word = bed.cgroup().write(RECLAIM, &asked_for(Bytes::ZERO));
        assert!(word.unwrap_err().is_invalid());
        let disk = ["/dev/vdb".to_owned()];
        assert!(may_swap(&bed.cgroup(), &disk) && !may_swap(&bed.cgroup(), &[]));
        assert_eq!(
            spares_memory(&bed.cgroup()),
            !may_swap(&bed.cgroup(), &swap_devices())
        );
        bed.write("memory.swap.max", "0");
        assert!(!may_swap(&bed.cgroup(), &disk) && spares_memory(&bed.cgroup()));
        fs::remove_file(&link).unwrap();
        assert!(!spares_memory(&bed.cgroup()));
        bed.write("memory.swap.max", "max");
        bed.write(RECLAIM, "");
        assert!(spares_memory(&bed.cgroup()));
    }

    #[test]
    fn nobody_is_braked_below_what_is_in_use() {
        let bed = Bed::new("braked");
        // Without memory.reclaim page cache alone is given back.
        bed.uses(400, 0, 300);
        assert_eq!(bed.braked(125), "max");
        bed.uses(400, 300, 0);
        assert_ne!(bed.braked(125), "max");
        bed.write(RECLAIM, "");
        bed.uses(123, 0, 50);
        assert_eq!(bed.braked(125), "max");
        // A reader.
        bed.uses(123, 20, 50);
        assert_ne!(bed.braked(125), "max");
    }

    /// What is asked for where so much is used, by and by.
    fn asked(used: [u64; 4]) -> Vec<u64> {
        let mut used = used.into_iter();
        let mut asked = Vec::new();
        let usage = || Ok(Bytes::mib(used.next().unwrap()));
        let ask = |bytes: Bytes| asked.push(bytes.0 >> 20);
        reclaim_to(Bytes::mib(100), Bytes::mib(3), usage, ask).unwrap();
        asked
    }

    #[test]
    fn what_nobody_gives_back_is_asked_for_once_and_what_a_reader_charges_meanwhile_too() {
        assert_eq!(asked([100, 0, 0, 0]), [0; 0]);
        assert_eq!(asked([300, 300, 0, 0]), [200]);
        assert_eq!(asked([300, 102, 98, 0]), [200, 4]);
        assert_eq!(asked([300, 200, 150, 120]), [200, 103, 53]);
    }
}
