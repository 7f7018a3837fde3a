//! The kernel programs: load them with the offsets of this kernel, and talk to their maps.
//!
//! Without the growth hook there is no guard; without any other one feature is missing, and
//! [`Kernel::missing`] names it.

use std::{
    fs, io,
    os::fd::{AsFd as _, AsRawFd as _},
};

use aya::{
    Btf as AyaBtf, Ebpf, EbpfError, EbpfLoader,
    maps::{HashMap, Map, MapData, MapError, PerCpuArray, RingBuf},
    programs::{Program, ProgramError},
};
use aya_log::EbpfLogger;
use bellows_core::CgroupId;
use bellows_ebpf_common::{COST_KINDS, COST_SLOTS, Growth, Holds, LifeEvent, MemoryEvent, loss};
use thiserror::Error;
use zerocopy::FromBytes as _;

use super::{
    attach::{
        GROWTH_FUNCTION, GUARD_PROGRAMS, HOLD_PROGRAMS, Missing, START_PROGRAMS, THROTTLED_PROGRAM,
        attach_all, rings_sleep, without_offsets,
    },
    btf::{Btf, BtfError},
    guards::Guards,
    offsets::Offsets,
    starts::{self, Begun},
    throttles::Throttled,
    told::Told,
};
use crate::machine::COUNTED_PAGE;

/// The object that `cargo xtask build-ebpf` makes; empty in a build without it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/bellows.o"));

const VMLINUX: &str = "/sys/kernel/btf/vmlinux";
const POSSIBLE_NODES: &str = "/sys/devices/system/node/possible";

/// Why the kernel programs do not run.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The binary has no kernel part.
    #[error(
        "this bellows was built without its kernel programs: run `cargo xtask build-ebpf`, then build again"
    )]
    NotBuilt,
    /// The kernel counts in other pages.
    #[error(
        "this kernel's pages have {0} bytes, and Bellows's kernel programs count in pages of {COUNTED_PAGE}: they would never tell of anything; boot a kernel with pages of 4 KiB (on arm64 CONFIG_ARM64_4K_PAGES)"
    )]
    Pages(usize),
    /// The kernel does not tell its types.
    #[error(
        "cannot read {VMLINUX} ({0}): Bellows needs a kernel with CONFIG_DEBUG_INFO_BTF=y, as Debian, Ubuntu and Fedora ship it, and sysfs mounted"
    )]
    NoBtf(io::Error),
    /// The kernel's types are not what is needed.
    #[error(
        "{0}: this kernel's memory controller is not known to Bellows; please report it with the output of `uname -a`"
    )]
    Btf(#[from] BtfError),
    /// The kernel refuses BPF.
    #[error(
        "the kernel does not let this process load BPF programs ({0}): run as root with CAP_BPF and CAP_PERFMON, outside of a container that filters bpf()"
    )]
    Permission(io::Error),
    /// The object cannot be loaded.
    #[error("cannot load the kernel programs: {0}")]
    Object(#[from] EbpfError),
    /// The program without which nothing works.
    #[error("cannot attach to {function}: {source}")]
    Growth {
        /// The kernel function.
        function: &'static str,
        /// Why.
        source: ProgramError,
    },
    /// A map is not there or not what was expected.
    #[error("map {name}: {source}")]
    Map {
        /// The map.
        name: &'static str,
        /// Why.
        source: MapError,
    },
}

/// Bytes of a small ring.
const SMALL_RING: u32 = 4096;

/// Which programs to attach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// What a guard needs.
    Guard,
    /// The same, and the measuring of holds, for a summary.
    GuardAndMeasure,
    /// Only the measuring of holds, for a bench that observes without guarding.
    MeasureHolds,
    /// What a guard needs, counting what each call of the growth program costs, for the bench of that.
    GuardAndCountCost,
    /// What a guard needs, with a ring of one page, for the bench that fills it.
    GuardWithSmallRing,
}

/// The loaded programs and the maps that the controller uses.
pub struct Kernel {
    /// They stay attached for as long as this lives.
    programs: Ebpf,
    growth: HashMap<MapData, u64, Growth>,
    holds: HashMap<MapData, u64, Holds>,
    losses: PerCpuArray<MapData, u64>,
    costs: PerCpuArray<MapData, u64>,
    life: RingBuf<MapData>,
    logger: Option<EbpfLogger<&'static dyn log::Log>>,
    missing: Vec<Missing>,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Kernel")
            .field("missing", &self.missing)
            .finish_non_exhaustive()
    }
}

/// What the reflex owns: the urgent ring and the watermarks.
pub struct Reflexes {
    /// Urgent events.
    pub ring: RingBuf<MapData>,
    /// What to watch.
    pub guards: Guards,
}

impl std::fmt::Debug for Reflexes {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.debug_struct("Reflexes").finish_non_exhaustive()
    }
}

impl Kernel {
    /// Loads and attaches the programs.
    ///
    /// # Errors
    ///
    /// [`LoadError`]; its text says what to do.
    pub fn load(purpose: Purpose) -> Result<(Self, Reflexes), LoadError> {
        if OBJECT.is_empty() {
            return Err(LoadError::NotBuilt);
        }
        count_alike(rustix::param::page_size())?;
        let vmlinux = fs::read(VMLINUX).map_err(LoadError::NoBtf)?;
        let types = Btf::parse(&vmlinux)?;
        let offsets = Offsets::resolve(&types, nodes())?;
        let rings_sleep = rings_sleep(&types);
        let btf = AyaBtf::parse(&vmlinux, aya::Endianness::default())
            .map_err(|error| LoadError::Object(EbpfError::BtfError(error)))?;
        drop(vmlinux);
        let mut loader = EbpfLoader::new();
        loader.btf(Some(&btf));
        for (name, value) in offsets.globals() {
            loader.override_global(name, value, true);
        }
        match purpose {
            Purpose::GuardAndCountCost => {
                loader.override_global("COUNT_COST", &1_u64, true);
                loader.map_max_entries("COSTS", COST_KINDS * COST_SLOTS);
            }
            Purpose::GuardWithSmallRing => {
                loader.map_max_entries("MEMORY_EVENTS", SMALL_RING);
            }
            Purpose::Guard | Purpose::GuardAndMeasure | Purpose::MeasureHolds => {}
        }
        let mut programs = loader.load(OBJECT).map_err(permission)?;
        let logger = EbpfLogger::init(&mut programs)
            .inspect_err(
                |error| tracing::warn!(%error, "kernel-side diagnostics are not available"),
            )
            .ok();
        let mut missing = Vec::new();
        let specs = match purpose {
            Purpose::Guard | Purpose::GuardAndCountCost | Purpose::GuardWithSmallRing => {
                &[GUARD_PROGRAMS][..]
            }
            Purpose::GuardAndMeasure => &[GUARD_PROGRAMS, HOLD_PROGRAMS],
            Purpose::MeasureHolds => &[HOLD_PROGRAMS],
        };
        for specs in specs {
            let failed = |source: ProgramError| match denied(&source) {
                Some(io) => LoadError::Permission(io),
                None => LoadError::Growth {
                    function: GROWTH_FUNCTION,
                    source,
                },
            };
            missing.extend(attach_all(&mut programs, specs, &btf, rings_sleep).map_err(failed)?);
        }
        missing.extend(without_offsets(&offsets));
        Self::with_maps(programs, logger, missing)
    }

    fn with_maps(
        mut programs: Ebpf,
        logger: Option<EbpfLogger<&'static dyn log::Log>>,
        missing: Vec<Missing>,
    ) -> Result<(Self, Reflexes), LoadError> {
        let (ring, guards) = (
            map(&mut programs, "MEMORY_EVENTS")?,
            Guards::of(&mut programs)?,
        );
        let (growth, holds) = (map(&mut programs, "GROWTH")?, map(&mut programs, "HOLDS")?);
        let (losses, costs) = (map(&mut programs, "LOSSES")?, map(&mut programs, "COSTS")?);
        let life = map(&mut programs, "LIFE_EVENTS")?;
        let kernel = Self {
            programs,
            growth,
            holds,
            losses,
            costs,
            life,
            logger,
            missing,
        };
        Ok((kernel, Reflexes { ring, guards }))
    }

    /// The ring of throttled cgroups, once; `None` where this kernel does not tell of them.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`] the second time.
    pub fn take_throttles(&mut self) -> Result<Option<Told<Throttled>>, LoadError> {
        let is_missing = |missing: &Missing| missing.program == THROTTLED_PROGRAM;
        if self.missing.iter().any(is_missing) {
            return Ok(None);
        }
        Told::of(&mut self.programs).map(Some)
    }

    /// The ring of what begins, once; `None` where this kernel does not tell of it.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`] the second time.
    pub fn take_starts(&mut self) -> Result<Option<Told<Begun>>, LoadError> {
        let is_missing = |missing: &Missing| START_PROGRAMS.contains(&missing.program);
        if self.missing.iter().any(is_missing) {
            return Ok(None);
        }
        starts::tell_of_cgroups(&mut self.programs)?;
        Told::of(&mut self.programs).map(Some)
    }

    /// Programs that could not be attached.
    #[must_use]
    pub fn missing(&self) -> &[Missing] {
        &self.missing
    }

    /// Starts to count a cgroup's growth and holds.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`] when the maps are full (4096 cgroups).
    pub fn track(&mut self, cgroup: CgroupId) -> Result<(), LoadError> {
        let growth = Growth::default();
        self.growth
            .insert(cgroup.0, growth, 0)
            .map_err(|source| LoadError::Map {
                name: "GROWTH",
                source,
            })?;
        self.track_holds(cgroup)
    }

    /// Starts to count a cgroup's holds only.
    ///
    /// # Errors
    ///
    /// [`LoadError::Map`] when the map is full (4096 cgroups).
    pub fn track_holds(&mut self, cgroup: CgroupId) -> Result<(), LoadError> {
        let holds = Holds::default();
        self.holds
            .insert(cgroup.0, holds, 0)
            .map_err(|source| LoadError::Map {
                name: "HOLDS",
                source,
            })
    }

    /// Forgets a cgroup; returns what was counted of it.
    pub fn forget(&mut self, cgroup: CgroupId) -> (Growth, Holds) {
        let counted = (self.growth(cgroup), self.holds(cgroup));
        for result in [self.growth.remove(&cgroup.0), self.holds.remove(&cgroup.0)] {
            if let Err(error) = result {
                tracing::debug!(cgroup.id = cgroup.0, %error, "the cgroup was not tracked");
            }
        }
        (counted.0.unwrap_or_default(), counted.1.unwrap_or_default())
    }

    /// What was counted of a cgroup's growth; `None` if it is not tracked.
    #[must_use]
    pub fn growth(&self, cgroup: CgroupId) -> Option<Growth> {
        self.growth.get(&cgroup.0, 0).ok()
    }

    /// What was counted of a cgroup's holds; `None` if it is not tracked.
    #[must_use]
    pub fn holds(&self, cgroup: CgroupId) -> Option<Holds> {
        self.holds.get(&cgroup.0, 0).ok()
    }

    /// Records that the programs could not send or read, by slot of [`loss`].
    #[must_use]
    pub fn losses(&self) -> [u64; loss::SLOTS as usize] {
        std::array::from_fn(|slot| {
            let slot = u32::try_from(slot).unwrap_or(loss::SLOTS);
            self.losses
                .get(&slot, 0)
                .map_or(0, |values| values.iter().sum())
        })
    }

    /// How often a call of the growth program cost how much: in no tracked cgroup, in tracked ones, and in
    /// those without the helpers that it called. Empty unless loaded with [`Purpose::GuardAndCountCost`].
    #[must_use]
    pub fn costs(&self) -> [Vec<(u32, u64)>; COST_KINDS as usize] {
        [0, 1, 2].map(|kind| {
            let first = kind * COST_SLOTS;
            (0..COST_SLOTS)
                .filter_map(|cost| {
                    let calls: u64 = self.costs.get(&(first + cost), 0).ok()?.iter().sum();
                    (calls > 0).then_some((cost, calls))
                })
                .collect()
        })
    }

    /// Times that the kernel has skipped one of the programs, because a task was preempted inside it
    /// on the same CPU (`recursion_misses` of the program, Linux 5.13).
    #[must_use]
    pub fn recursion_misses(&self) -> u64 {
        let misses = |program: &Program| {
            let descriptor = program.fd().ok()?.as_fd().as_raw_fd();
            let text = fs::read_to_string(format!("/proc/self/fdinfo/{descriptor}")).ok()?;
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix("recursion_misses:"))?;
            line.trim().parse::<u64>().ok()
        };
        self.programs
            .programs()
            .filter_map(|(_, program)| misses(program))
            .sum()
    }

    /// Takes the life events that have come since the last call, and passes kernel-side
    /// diagnostics on.
    pub fn drain_life(&mut self, mut take: impl FnMut(&LifeEvent)) {
        if let Some(logger) = &mut self.logger {
            logger.flush();
        }
        while let Some(item) = self.life.next() {
            match life_event(&item) {
                Some(event) => take(event),
                None => tracing::warn!(
                    bytes = item.len(),
                    "a life event of unknown size was skipped"
                ),
            }
        }
    }
}

/// Decodes an urgent event; `None` (counted by the caller) for a record of another size.
#[must_use]
pub fn memory_event(bytes: &[u8]) -> Option<MemoryEvent> {
    MemoryEvent::read_from_bytes(bytes).ok()
}

/// Decodes a life event; `None` for a record of another size.
#[must_use]
pub fn life_event(bytes: &[u8]) -> Option<&LifeEvent> {
    LifeEvent::ref_from_bytes(bytes).ok()
}

/// Takes a map out of the loaded object.
pub(super) fn map<T: TryFrom<Map, Error = MapError>>(
    programs: &mut Ebpf,
    name: &'static str,
) -> Result<T, LoadError> {
    let missing = || MapError::InvalidName {
        name: name.to_owned(),
    };
    programs
        .take_map(name)
        .ok_or_else(missing)
        .and_then(T::try_from)
        .map_err(|source| LoadError::Map { name, source })
}

fn permission(error: EbpfError) -> LoadError {
    match denied(&error) {
        Some(io) => LoadError::Permission(io),
        None => LoadError::Object(error),
    }
}

/// The refusal among an error's causes, if it is one. `EACCES` is none: the verifier says that of a
/// program that it does not understand.
fn denied(error: &(dyn std::error::Error + 'static)) -> Option<io::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<io::Error>()
            && io.raw_os_error() == Some(libc::EPERM)
        {
            return Some(io::Error::from(io.kind()));
        }
        cause = error.source();
    }
    None
}

/// Whether the programs count in pages of this size. Watermarks would be sixteen times too high for a kernel with pages of
/// 64 KiB, and the self-test of the growth hook, which has none, would still pass.
fn count_alike(page: usize) -> Result<(), LoadError> {
    if page == COUNTED_PAGE {
        Ok(())
    } else {
        Err(LoadError::Pages(page))
    }
}

/// NUMA nodes that the kernel may have.
fn nodes() -> u64 {
    possible_nodes(&fs::read_to_string(POSSIBLE_NODES).unwrap_or_default())
}

/// One more than the last node of a list such as `0-3`; one if it is no list.
#[must_use]
pub fn possible_nodes(list: &str) -> u64 {
    let last = list
        .trim()
        .rsplit([',', '-'])
        .next()
        .and_then(|last| last.parse::<u64>().ok());
    last.map_or(1, |last| last.saturating_add(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_programs_are_not_loaded_where_the_kernel_counts_in_other_pages() {
        assert!(count_alike(4096).is_ok());
        for page in [16_384, 65_536] {
            let refused = count_alike(page).unwrap_err().to_string();
            assert!(refused.contains(&page.to_string()), "{refused}");
            assert!(refused.contains("4 KiB"), "{refused}");
        }
    }
}
