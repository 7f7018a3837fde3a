//! The loads: processes that use memory in a stated way and say how it went for them.

mod burst;
mod growth;
mod hot;
mod job;
mod leak;
mod pulse;
mod tick;

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use bellows::{cgroup::Cgroup, clock::now};
use bellows_core::{Bytes, quantity};
use clap::{Args, Subcommand};
use serde::Serialize;

pub(crate) use burst::BurstResult;
pub(crate) use growth::Kind;
use growth::Mapping;
pub(crate) use hot::HotResult;
pub(crate) use pulse::{Pieces, PulseEnd, PulseStart};
pub(crate) use tick::Ticks;

#[derive(Subcommand)]
pub(crate) enum Load {
    /// Rest at a size, then grow at full speed to another.
    Burst(burst::Burst),
    /// Touch memory, say so, and keep it until the end of standard input (a child of `burst`).
    Touch {
        /// How much.
        #[arg(value_parser = quantity::parse)]
        size: Bytes,
    },
    /// Fill to a size, then allocate and free a part of it for some time.
    Plateau(Plateau),
    /// Run a command with another root.
    Chroot {
        /// The root.
        root: PathBuf,
        /// The command.
        #[arg(trailing_var_arg = true, required = true)]
        words: Vec<String>,
    },
    /// Wake at fixed times, do a little work, and say how late it was.
    Tick(tick::Tick),
    /// Work a little at fixed times, and now and then without a pause.
    Pulse(pulse::Pulse),
    /// Grow with the CPU time that is used, as a compiler does.
    Job(job::Job),
    /// Grow slowly and for ever.
    Leak(leak::Leak),
    /// Have jobs done, by the protocol of job tokens.
    Jobs(job::Jobs),
    /// Wait for ever: the sandbox of a pod.
    Pause,
    /// Read a file again and again.
    Hot(hot::Hot),
    /// Read and write a file, and use anonymous memory beside it.
    Cache(Cache),
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Plateau {
    /// Memory held by the whole cgroup, this process's own overhead included.
    #[arg(long, value_parser = quantity::parse)]
    pub(crate) size: Bytes,
    /// Memory allocated and freed again and again.
    #[arg(long, value_parser = quantity::parse)]
    pub(crate) breath: Bytes,
    /// For how many seconds.
    #[arg(long)]
    pub(crate) seconds: u64,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Cache {
    /// The file.
    #[arg(long)]
    pub(crate) file: PathBuf,
    /// How much of it is written and read.
    #[arg(long, value_parser = quantity::parse)]
    pub(crate) size: Bytes,
    /// Anonymous memory touched in step with it.
    #[arg(long, value_parser = quantity::parse, default_value = "0")]
    pub(crate) anonymous: Bytes,
    /// Times that the file is read.
    #[arg(long, default_value_t = 2)]
    pub(crate) passes: u64,
    /// Milliseconds to wait at the end.
    #[arg(long, default_value_t = 0)]
    pub(crate) hold_ms: u64,
    /// Goes into a cgroup below its own first.
    #[arg(long)]
    nested: bool,
}

const MIB: usize = 1 << 20;

pub(crate) fn run(load: &Load) -> Result<()> {
    match load {
        Load::Burst(burst) => burst::run(burst),
        Load::Touch { size } => growth::touch_and_wait(*size),
        Load::Plateau(plateau) => run_plateau(plateau),
        Load::Chroot { root, words } => {
            rustix::process::chroot(root)?;
            std::env::set_current_dir("/")?;
            let (program, arguments) = words.split_first().context("no command")?;
            Err(Command::new(program).args(arguments).exec().into())
        }
        Load::Tick(tick) => tick::run(tick),
        Load::Pulse(pulse) => pulse::run(pulse),
        Load::Pause => loop {
            thread::sleep(Duration::from_secs(3600));
        },
        Load::Job(job) => job::run(job),
        Load::Jobs(jobs) => job::run_all(jobs),
        Load::Leak(leak) => leak::run(leak),
        Load::Hot(hot) => hot::run(hot),
        Load::Cache(cache) => run_cache(cache),
    }
}

fn size(bytes: Bytes) -> Result<usize> {
    Ok(usize::try_from(bytes.0)?)
}

fn say(what: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(what)?);
    Ok(io::stdout().flush()?)
}

fn run_plateau(plateau: &Plateau) -> Result<()> {
    let overhead = own_usage()?;
    // Page tables of what is about to be touched: one page of 512 entries for 2 MiB.
    let tables = plateau.size.scaled(1, 512);
    let held = Mapping::new(size(plateau.size.minus(overhead).minus(tables))?)?;
    held.touch(0, held.length);
    let end = Instant::now() + Duration::from_secs(plateau.seconds);
    let mut rounds = 0_u64;
    while Instant::now() < end {
        let breath = Mapping::new(size(plateau.breath)?)?;
        breath.touch(0, breath.length);
        drop(breath);
        rounds += 1;
        thread::sleep(Duration::from_millis(5));
    }
    say(&serde_json::json!({ "rounds": rounds }))
}

/// The cgroup of this process.
fn own_cgroup() -> Result<Cgroup> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let path = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .context("not in cgroup v2")?;
    Ok(Cgroup::open(&Path::new("/sys/fs/cgroup").join(path))?)
}

/// What the cgroup of this process uses, without the stock that its CPUs hold in advance.
fn own_usage() -> Result<Bytes> {
    let stat = own_cgroup()?.read("memory.stat")?;
    let field = |name: &str| {
        let line = stat
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse::<u64>().ok())
            .unwrap_or(0)
    };
    Ok(Bytes(field("anon") + field("file") + field("kernel")))
}

fn run_cache(cache: &Cache) -> Result<()> {
    if cache.nested {
        growth::enter_nested_cgroup()?;
    }
    let chunk = vec![7_u8; MIB];
    let chunks = size(cache.size)? / MIB;
    let anonymous = Mapping::new(size(cache.anonymous)?)?;
    let share = size(cache.anonymous)? / chunks.max(1);
    let start = now();
    let mut file = File::create(&cache.file).with_context(|| cache.file.display().to_string())?;
    for index in 0..chunks {
        file.write_all(&chunk)?;
        anonymous.touch(index * share, (index + 1) * share);
    }
    file.sync_all()?;
    let mut buffer = vec![0_u8; MIB];
    for _ in 0..cache.passes {
        let mut file = File::open(&cache.file)?;
        while file.read(&mut buffer)? > 0 {}
    }
    thread::sleep(Duration::from_millis(cache.hold_ms));
    say(&serde_json::json!({ "chunks": chunks, "start_ns": start.0, "end_ns": now().0 }))?;
    drop(anonymous);
    Ok(())
}
