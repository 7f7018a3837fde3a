//! Structure offsets of the running kernel, written by the agent before the programs are loaded.
//!
//! Rust cannot emit CO-RE relocations, and offsets differ between two builds of the same kernel
//! version, so the agent resolves them from the node's own BTF and overrides these globals. They
//! are frozen at load: the verifier sees constants. The defaults would read nonsense; the loader
//! overrides every one of them or refuses.

use aya_ebpf::Global;

/// The value of an offset whose field this kernel does not have.
pub(crate) const ABSENT: u64 = u64::MAX;

macro_rules! globals {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        $($(#[$doc])* #[unsafe(no_mangle)] pub(crate) static $name: Global<u64> = Global::new(ABSENT);)+
    };
}

/// Whether the bench `hook-cost` counts what a call costs (see [`crate::cost`]); 0 anywhere else.
#[unsafe(no_mangle)]
pub(crate) static COUNT_COST: Global<u64> = Global::new(0);

globals! {
    /// `mem_cgroup.memory`: the page counter behind `memory.current`.
    OFF_MEMCG_MEMORY,
    /// `mem_cgroup.css` plus `cgroup_subsys_state.cgroup`.
    OFF_MEMCG_CGROUP,
    /// `mem_cgroup.nodeinfo`: per-node pointers at the end of the structure.
    OFF_MEMCG_NODEINFO,
    /// `page_counter.usage`.
    OFF_COUNTER_USAGE,
    /// `page_counter.max`.
    OFF_COUNTER_MAX,
    /// `page_counter.parent`.
    OFF_COUNTER_PARENT,
    /// `cgroup.kn`.
    OFF_CGROUP_KN,
    /// `kernfs_node.id`.
    OFF_KERNFS_ID,
    /// `kernfs_node.parent` (`__parent` from 6.16 on), or [`ABSENT`].
    OFF_KERNFS_PARENT,
    /// `kernfs_open_file.kn`, or [`ABSENT`].
    OFF_OPEN_FILE_NODE,
    /// `mem_cgroup_per_node.lruvec.lrugen.nr_pages`, or [`ABSENT`] without multi-gen LRU.
    OFF_LRUGEN_PAGES,
    /// `mem_cgroup_per_node.lru_zone_size`.
    OFF_LRU_ZONE_SIZE,
    /// `linux_binprm.filename`.
    OFF_BPRM_FILENAME,
    /// `task_struct.nvcsw`, or [`ABSENT`].
    OFF_TASK_VOLUNTARY,
    /// `pt_regs.orig_ax` (x86) or `pt_regs.syscallno` (arm64), or [`ABSENT`].
    OFF_REGS_SYSCALL,
    /// `cfs_rq.tg`, or [`ABSENT`].
    OFF_CFS_RQ_GROUP,
    /// `task_group.css` plus `cgroup_subsys_state.cgroup`, or [`ABSENT`].
    OFF_GROUP_CGROUP,
    /// Zones of a node (`MAX_NR_ZONES`): not an offset, but as much a matter of the build.
    ZONES,
    /// NUMA nodes to sum over.
    NODES,
}
