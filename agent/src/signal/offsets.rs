//! The dozen offsets that the kernel programs need, resolved on the running kernel.

use super::btf::{Btf, BtfError};

/// The value of an offset whose field this kernel does not have.
pub(super) const ABSENT: u64 = u64::MAX;
/// Generations (`MAX_NR_GENS`) times types (anonymous, file) of `lru_gen_folio.nr_pages`.
const GENERATION_ROWS: u64 = 8;
/// Lists of a zone (`NR_LRU_LISTS`) in `mem_cgroup_per_node.lru_zone_size`.
const LISTS: u64 = 5;

/// Named globals of the kernel programs and their values on this kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Offsets {
    values: Vec<(&'static str, u64)>,
}

impl Offsets {
    /// Resolves them.
    ///
    /// # Errors
    ///
    /// [`BtfError`] names the first field that this kernel does not have and that cannot be done
    /// without.
    pub fn resolve(btf: &Btf<'_>, nodes: u64) -> Result<Self, BtfError> {
        let offset = |structure, field| btf.field(structure, field).map(|field| field.offset);
        let zone_size = btf.field("mem_cgroup_per_node", "lru_zone_size")?;
        let zones = btf.elements(zone_size).unwrap_or(0) / LISTS;
        // Kernels without CONFIG_LRU_GEN have only the classic lists.
        let generations = btf
            .field("mem_cgroup_per_node", "lruvec.lrugen.nr_pages")
            .ok();
        let lrugen = generations
            .filter(|&field| {
                let elements = btf.elements(field);
                elements.is_some() && elements == zones.checked_mul(GENERATION_ROWS)
            })
            .map_or(ABSENT, |field| field.offset);
        let values = vec![
            ("OFF_MEMCG_MEMORY", offset("mem_cgroup", "memory")?),
            ("OFF_MEMCG_CGROUP", offset("mem_cgroup", "css.cgroup")?),
            ("OFF_MEMCG_NODEINFO", offset("mem_cgroup", "nodeinfo")?),
            ("OFF_COUNTER_USAGE", offset("page_counter", "usage")?),
            ("OFF_COUNTER_MAX", offset("page_counter", "max")?),
            ("OFF_COUNTER_PARENT", offset("page_counter", "parent")?),
            ("OFF_CGROUP_KN", offset("cgroup", "kn")?),
            ("OFF_KERNFS_ID", offset("kernfs_node", "id")?),
            (
                "OFF_KERNFS_PARENT",
                offset("kernfs_node", "parent")
                    .or_else(|_| offset("kernfs_node", "__parent"))
                    .unwrap_or(ABSENT),
            ),
            (
                "OFF_OPEN_FILE_NODE",
                offset("kernfs_open_file", "kn").unwrap_or(ABSENT),
            ),
            ("OFF_LRUGEN_PAGES", lrugen),
            ("OFF_LRU_ZONE_SIZE", zone_size.offset),
            ("OFF_BPRM_FILENAME", offset("linux_binprm", "filename")?),
            (
                "OFF_TASK_VOLUNTARY",
                offset("task_struct", "nvcsw").unwrap_or(ABSENT),
            ),
            // The helper that finds the registers is younger than the fields (Linux 5.15).
            (
                "OFF_REGS_SYSCALL",
                offset("pt_regs", "orig_ax")
                    .or_else(|_| offset("pt_regs", "syscallno"))
                    .ok()
                    .filter(|_| btf.has_function("bpf_task_pt_regs"))
                    .unwrap_or(ABSENT),
            ),
            ("OFF_CFS_RQ_GROUP", offset("cfs_rq", "tg").unwrap_or(ABSENT)),
            (
                "OFF_GROUP_CGROUP",
                offset("task_group", "css.cgroup").unwrap_or(ABSENT),
            ),
            ("ZONES", zones),
            ("NODES", nodes.max(1)),
        ];
        Ok(Self { values })
    }

    /// The globals by name.
    #[must_use]
    pub fn globals(&self) -> &[(&'static str, u64)] {
        &self.values
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The structures that are needed, of a kernel with five zones; one of the seeds of the fuzzer.
    const STRUCTURES: &[u8] = include_bytes!("../../../tests/fuzz/corpus/btf/structures");

    fn value(offsets: &Offsets, name: &str) -> u64 {
        let found = offsets.globals().iter().find(|(known, _)| *known == name);
        found.expect(name).1
    }

    #[test]
    fn resolves_what_the_programs_need() {
        let offsets = Offsets::resolve(&Btf::parse(STRUCTURES).unwrap(), 2).unwrap();
        assert_eq!(
            ["OFF_COUNTER_MAX", "OFF_KERNFS_ID", "ZONES", "NODES"]
                .map(|name| value(&offsets, name)),
            [8, 16, 5, 2]
        );
        assert_eq!(value(&offsets, "OFF_LRUGEN_PAGES"), 0);
    }

    #[test]
    fn arrays_beyond_all_measure_are_no_generations() {
        /// An array, as its header has it: what follows are two types and the number of elements.
        const ARRAY: [u8; 4] = [0, 0, 0, 3];
        let mut bytes = STRUCTURES.to_vec();
        for at in (0..bytes.len() - 20).step_by(4) {
            if bytes[at..at + 4] == ARRAY {
                bytes[at + 16..at + 20].fill(0xff);
            }
        }
        let offsets = Offsets::resolve(&Btf::parse(&bytes).unwrap(), 1).unwrap();
        assert_eq!(value(&offsets, "OFF_LRUGEN_PAGES"), ABSENT);
    }
}
