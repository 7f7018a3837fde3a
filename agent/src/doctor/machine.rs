//! What the machine is and allows: kernel, cgroups, swap, huge pages, pressure, priorities.

use std::{fs, io, os::unix::fs::FileTypeExt as _, path::Path, thread};

use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::{
    attribution::{self, CGROUP_ROOT},
    cgroup::{Cgroup, CgroupError},
    cri,
    exec::place::Place,
    nri, priority,
};

pub(super) fn findings() -> Vec<Finding> {
    let mut findings = vec![kernel(), user(), cgroups()];
    findings.extend(memory_controller());
    findings.extend(plugins(Path::new(nri::SOCKET), cri::find_socket().is_ok()));
    findings.extend(pinned(Path::new(CGROUP_ROOT)));
    findings.extend([
        lru(),
        huge_pages(),
        swap(),
        pressure(),
        priority(),
        locking(),
    ]);
    findings
}

fn read(path: &str) -> Option<String> {
    fs::read_to_string(path)
        .ok()
        .map(|text| text.trim().to_owned())
}

fn kernel() -> Finding {
    let name = rustix::system::uname();
    let text = |part: &std::ffi::CStr| part.to_string_lossy().into_owned();
    let found = format!("{} {}", text(name.release()), text(name.machine()));
    Finding::works("kernel", found)
}

fn user() -> Finding {
    let user = rustix::process::geteuid();
    if user.is_root() {
        Finding::works("privileges", "root")
    } else {
        Finding::missing(
            "privileges",
            format!("user id {}", user.as_raw()),
            "cgroups cannot be written and BPF programs not loaded",
            "run it as root (sudo); in a cluster, install the chart",
        )
    }
}

fn cgroups() -> Finding {
    match Cgroup::open(Path::new(CGROUP_ROOT)) {
        Ok(_) => Finding::works("cgroup v2", CGROUP_ROOT),
        Err(error) => Finding::missing(
            "cgroup v2",
            error.to_string(),
            "there is no memory.high, no cgroup.freeze and no id to watch",
            "boot with systemd.unified_cgroup_hierarchy=1, or mount cgroup2 there",
        ),
    }
}

/// Whether a runtime takes plugins; nothing where there is no runtime. Its own socket is not to be seen in an agent's pod,
/// which has the directory of that for plugins, or (`nri.enabled` of the chart is off) nothing to do with them.
fn plugins(socket: &Path, has_runtime: bool) -> Option<Finding> {
    const NAME: &str = "runtime's plugins";
    if fs::metadata(socket).is_ok_and(|there| there.file_type().is_socket()) {
        return Some(Finding::works(NAME, socket.display().to_string()));
    }
    let is_looked_for = has_runtime || socket.parent().is_some_and(Path::is_dir);
    is_looked_for.then(|| {
        Finding::limited(
            NAME,
            format!("no {}", socket.display()),
            "memory.heap of policies: a JVM that starts while its limit is raised sizes its heap by that",
            nri::REMEDY,
        )
    })
}

/// Whether a kubelet here says on which CPUs containers run; nothing where none does.
fn pinned(root: &Path) -> Option<Finding> {
    let containers = attribution::in_pods(root).into_iter();
    let pinned = containers.filter(|path| Cgroup::open(path).is_ok_and(|it| it.is_pinned()));
    let count = pinned.count();
    (count > 0).then(|| {
        Finding::limited(
            "static CPU manager",
            format!("{count} containers are told on which CPUs to run"),
            "nothing is raised on the node in them, past the API: their runtime would undo it",
            "use Kubernetes 1.34 or later (1.36 for pods with limits of their own), whose API resizes; or cpuManagerPolicy: none",
        )
    })
}

/// The files of the memory controller, in a cgroup made for it.
fn memory_controller() -> Vec<Finding> {
    const LOST: &str = "no limit can be moved";
    let made = Place::find().and_then(|place| Ok((place.create_named("bellows-doctor")?, place)));
    let (cgroup, place) = match made {
        Ok(made) => made,
        Err(error) => {
            let remedy = "boot without cgroup_disable=memory; in a container, give it a writable cgroup2 mount";
            let found = error.to_string();
            return vec![Finding::missing("memory controller", found, LOST, remedy)];
        }
    };
    let findings = controller_files(&cgroup);
    let removed: Result<(), CgroupError> = cgroup.remove().and_then(|()| place.leave());
    if let Err(error) = removed {
        tracing::warn!(%error, "a cgroup of the doctor is left behind");
    }
    findings
}

fn controller_files(cgroup: &Cgroup) -> Vec<Finding> {
    let check = |file: &'static str, otherwise: Finding| {
        if cgroup.has(file) {
            Finding::works(file, "there")
        } else {
            otherwise
        }
    };
    let newer = "use a newer kernel, if it matters";
    vec![
        check(
            "memory.max",
            Finding::missing(
                "memory.max",
                "not there",
                "no limit can be moved",
                "enable the memory controller",
            ),
        ),
        check(
            "memory.high",
            Finding::missing(
                "memory.high",
                "not there",
                "there is no brake",
                "enable the memory controller",
            ),
        ),
        check(
            "cgroup.freeze",
            Finding::limited(
                "cgroup.freeze",
                "not there (Linux 5.2)",
                "a burst cannot be held while the API answers: only the brake is left",
                newer,
            ),
        ),
        check(
            "memory.reclaim",
            Finding::limited(
                "memory.reclaim",
                "not there (Linux 5.19)",
                "a limit full of page cache is lowered by way of memory.high, which throttles readers",
                newer,
            ),
        ),
        check(
            "memory.peak",
            Finding::limited(
                "memory.peak",
                "not there (Linux 5.19)",
                "peaks are those that the hook has seen",
                newer,
            ),
        ),
    ]
}

fn lru() -> Finding {
    match read("/sys/kernel/mm/lru_gen/enabled").as_deref() {
        None => Finding::works(
            "page cache lists",
            "classic (no multi-gen LRU in this kernel)",
        ),
        Some("0x0000") => Finding::works("page cache lists", "classic (multi-gen LRU is off)"),
        Some(mask) => Finding::works("page cache lists", format!("multi-gen LRU ({mask})")),
    }
}

fn huge_pages() -> Finding {
    let mode = read("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    let chosen = mode
        .split(['[', ']'])
        .nth(1)
        .unwrap_or("not in this kernel")
        .to_owned();
    Finding::works("huge pages", chosen)
}

/// Where this machine swaps to.
pub(crate) fn swap_devices() -> Vec<String> {
    let swaps = read("/proc/swaps").unwrap_or_default();
    swaps
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next())
        .map(str::to_owned)
        .collect()
}

fn swap() -> Finding {
    let devices = swap_devices();
    if devices.is_empty() {
        return Finding::works("swap", "none");
    }
    Finding::limited(
        "swap",
        devices.join(", "),
        "a container with a swap limit swaps at its brake instead of sleeping, so it is slower before it is raised",
        "nothing, or memory.swap.max=0 for the containers that are guarded (the kubelet's NoSwap)",
    )
}

fn pressure() -> Finding {
    if Path::new("/proc/pressure/memory").exists() {
        Finding::works("pressure (PSI)", "there")
    } else {
        Finding::limited(
            "pressure (PSI)",
            "not there",
            "who only reads a large file once is taken for one whose cache does not fit: up to four times its limit for a minute, and then less and less often",
            "boot with psi=1",
        )
    }
}

fn priority() -> Finding {
    // On a thread of its own, which takes the priority with it when it ends.
    let tried = thread::spawn(|| priority::try_real_time(priority::REFLEX)).join();
    match tried.unwrap_or_else(|_panic| Err(io::ErrorKind::Other.into())) {
        Ok(()) => Finding::works("real-time priority", "permitted"),
        Err(error) => Finding::limited(
            "real-time priority",
            error.to_string(),
            "a busy machine makes reactions late",
            "give it CAP_SYS_NICE; with CONFIG_RT_GROUP_SCHED, cpu.rt_runtime_us",
        ),
    }
}

fn locking() -> Finding {
    let limit = getrlimit(Resource::Memlock).current;
    match limit {
        None => Finding::works("locked memory", "unlimited"),
        Some(_) if rustix::process::geteuid().is_root() => {
            Finding::works("locked memory", "unlimited for root")
        }
        Some(bytes) => Finding::limited(
            "locked memory",
            format!("at most {bytes} B"),
            "the reflex may wait for its own pages when memory is short",
            "give it CAP_IPC_LOCK, or LimitMEMLOCK=infinity",
        ),
    }
}

#[cfg(test)]
mod tests {
    use std::{env, os::unix::net::UnixListener, process};

    use super::{super::Verdict, *};

    #[test]
    fn plugins_are_looked_for_where_an_agents_pod_has_them() {
        let directory = env::temp_dir().join(format!("bellows-doctor-nri-{}", process::id()));
        let socket = directory.join("nri.sock");
        let verdict = |has_runtime| {
            let found = plugins(&socket, has_runtime);
            found.map(|found| found.verdict)
        };
        assert_eq!(verdict(false), None);
        assert_eq!(verdict(true), Some(Verdict::Limited));
        fs::create_dir_all(&directory).unwrap();
        assert_eq!(verdict(false), Some(Verdict::Limited));
        let _listening = UnixListener::bind(&socket).unwrap();
        assert_eq!(verdict(false), Some(Verdict::Works));
        fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn a_node_whose_containers_are_told_their_cpus_is_told_of() {
        let root = env::temp_dir().join(format!("bellows-doctor-{}", process::id()));
        let app = root.join("kubepods/burstable/pod0f8c-11aa/abc");
        fs::create_dir_all(&app).unwrap();
        let found = |cpus: &str| {
            fs::write(app.join("cpuset.cpus"), cpus).unwrap();
            pinned(&root).map(|finding| finding.found)
        };
        assert_eq!(found("\n"), None);
        let told = "1 containers are told on which CPUs to run".to_owned();
        assert_eq!(found("0-2\n"), Some(told));
        fs::remove_dir_all(&root).unwrap();
    }
}
