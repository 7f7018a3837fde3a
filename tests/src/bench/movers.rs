//! Processes that move from cgroup to cgroup, as fast as the kernel lets them: what a node does whenever a container
//! starts or a probe executes something, without end.
//!
//! Each move takes `cgroup_mutex`, as a write to `cgroup.freeze` does, and the first after a quiet moment holds it for a grace
//! period of RCU (`cgroup_attach_lock`, kernel/cgroup/cgroup.c). Without end it is not that which a freeze waits for, but its
//! turn.

use std::{
    env,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
};

use anyhow::{Context as _, Result};
use bellows::cgroup::Cgroup;

/// The threads that move them; they end with this.
pub(super) struct Movers {
    is_over: Arc<AtomicBool>,
    moves: Arc<AtomicU64>,
    threads: Vec<JoinHandle<()>>,
    children: Vec<Child>,
}

impl Movers {
    pub(super) fn start(count: u64) -> Result<Self> {
        let mut movers = Self {
            is_over: Arc::default(),
            moves: Arc::default(),
            threads: Vec::new(),
            children: Vec::new(),
        };
        let root = Cgroup::open(Path::new("/sys/fs/cgroup"))?;
        for index in 0..count {
            let places =
                ["a", "b"].map(|place| root.create_child(&format!("mover-{index}-{place}")));
            let places = places.into_iter().collect::<Result<Vec<_>, _>>()?;
            let words = "load burst --rest 1Mi --peak 1Mi --rest-ms 86400000";
            let moved = Command::new(env::current_exe()?)
                .args(words.split(' '))
                .stdout(Stdio::null())
                .spawn()
                .context("something to move")?;
            let id = moved.id().to_string();
            movers.children.push(moved);
            let (is_over, moves) = (Arc::clone(&movers.is_over), Arc::clone(&movers.moves));
            movers.threads.push(thread::spawn(move || {
                for place in places.iter().cycle() {
                    if is_over.load(Ordering::Relaxed) {
                        return;
                    }
                    match place.write("cgroup.procs", &id) {
                        Ok(()) => moves.fetch_add(1, Ordering::Relaxed),
                        Err(error) => return eprintln!("nothing is moved any more: {error}"),
                    };
                }
            }));
        }
        Ok(movers)
    }

    /// Moves so far.
    pub(super) fn moves(&self) -> u64 {
        self.moves.load(Ordering::Relaxed)
    }
}

impl Drop for Movers {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                eprintln!("a mover panicked");
            }
        }
        for child in &mut self.children {
            if let Err(error) = child.kill().and_then(|()| child.wait()) {
                eprintln!("a mover's process: {error}");
            }
        }
    }
}
