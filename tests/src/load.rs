//! The loads: processes that use memory in a stated way and say how it went for them.

use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    ptr,
    sync::{Arc, Barrier},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bellows::{actuate::reflex::now, cgroup::Cgroup};
use bellows_core::{Bytes, quantity};
use clap::{Args, Subcommand};
use serde::{Deserialize, Serialize};

#[derive(Subcommand)]
pub(crate) enum Load {
    /// Rest at a size, then grow at full speed to another.
    Burst(Burst),
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
    /// Wait for ever: the sandbox of a pod.
    Pause,
    /// Read and write a file, and use anonymous memory beside it.
    Cache(Cache),
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Burst {
    /// Memory touched before the burst.
    #[arg(long, value_parser = quantity::parse)]
    pub(crate) rest: Bytes,
    /// Memory touched at its end.
    #[arg(long, value_parser = quantity::parse)]
    pub(crate) peak: Bytes,
    /// Threads that share it.
    #[arg(long, default_value_t = 1)]
    pub(crate) threads: u64,
    /// Milliseconds at rest before the burst.
    #[arg(long, default_value_t = 300)]
    pub(crate) rest_ms: u64,
    /// Milliseconds at the peak.
    #[arg(long, default_value_t = 200)]
    pub(crate) hold_ms: u64,
    /// Milliseconds at rest, the burst's memory given back, before it bursts a second time.
    #[arg(long)]
    pub(crate) again_after_ms: Option<u64>,
    /// Milliseconds to go on at rest, the burst's memory given back.
    #[arg(long, default_value_t = 0)]
    pub(crate) after_ms: u64,
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
}

/// What a burst says of itself on standard output.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct BurstResult {
    /// Microseconds from the start of growth until the last thread was done.
    pub(crate) growth_us: u64,
    /// Longest time in any thread between two touched MiB.
    pub(crate) longest_gap_us: u64,
    /// When its memory was given back, `CLOCK_MONOTONIC` nanoseconds.
    pub(crate) end_ns: u64,
}

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

pub(crate) fn run(load: &Load) -> Result<()> {
    match load {
        Load::Burst(burst) => run_burst(burst),
        Load::Plateau(plateau) => run_plateau(plateau),
        Load::Chroot { root, words } => {
            rustix::process::chroot(root)?;
            std::env::set_current_dir("/")?;
            let (program, arguments) = words.split_first().context("no command")?;
            Err(Command::new(program).args(arguments).exec().into())
        }
        Load::Pause => loop {
            thread::sleep(Duration::from_secs(3600));
        },
        Load::Cache(cache) => run_cache(cache),
    }
}

/// An anonymous mapping that gives its memory back when dropped.
struct Mapping {
    start: *mut u8,
    length: usize,
}

// SAFETY: the mapping is owned by this value alone and has no thread affinity.
unsafe impl Send for Mapping {}

impl Mapping {
    fn new(length: usize) -> Result<Self> {
        let length = length.max(PAGE);
        // SAFETY: a new private anonymous mapping at an address of the kernel's choice.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        ensure!(
            start != libc::MAP_FAILED,
            "mmap of {length} bytes: {}",
            io::Error::last_os_error()
        );
        Ok(Self {
            start: start.cast(),
            length,
        })
    }

    /// Touches the pages of a range; returns the longest time between two touched MiB.
    fn touch(&self, from: usize, to: usize) -> Duration {
        let mut longest = Duration::ZERO;
        let mut last = Instant::now();
        for (page, offset) in (from..to.min(self.length)).step_by(PAGE).enumerate() {
            let page_start = self.start.wrapping_add(offset);
            // SAFETY: the offset is inside the mapping, which is writable and ours alone.
            unsafe { ptr::write_volatile(page_start, 1) };
            if page % (MIB / PAGE) == 0 {
                let now = Instant::now();
                longest = longest.max(now - last);
                last = now;
            }
        }
        longest.max(last.elapsed())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps what `new` has mapped; no reference into it exists.
        unsafe { libc::munmap(self.start.cast(), self.length) };
    }
}

fn size(bytes: Bytes) -> Result<usize> {
    Ok(usize::try_from(bytes.0)?)
}

fn run_burst(burst: &Burst) -> Result<()> {
    burst_once(burst, burst.rest_ms)?;
    if let Some(pause) = burst.again_after_ms {
        burst_once(burst, pause)?;
    }
    if burst.after_ms > 0 {
        let mapping = Mapping::new(size(burst.rest)?)?;
        mapping.touch(0, mapping.length);
        thread::sleep(Duration::from_millis(burst.after_ms));
    }
    Ok(())
}

/// Rests for `rest_ms`, grows, gives the memory back and says how it went.
fn burst_once(burst: &Burst, rest_ms: u64) -> Result<()> {
    let threads = usize::try_from(burst.threads)?.max(1);
    let (rest, peak) = (size(burst.rest)? / threads, size(burst.peak)? / threads);
    let barrier = Arc::new(Barrier::new(threads + 1));
    let mut workers = Vec::new();
    for _ in 0..threads {
        let barrier = Arc::clone(&barrier);
        workers.push(thread::spawn(move || -> Result<Duration> {
            let mapping = Mapping::new(peak);
            if let Ok(mapping) = &mapping {
                mapping.touch(0, rest);
            }
            barrier.wait();
            barrier.wait();
            let longest = mapping.as_ref().map(|mapping| mapping.touch(rest, peak));
            barrier.wait();
            barrier.wait();
            let longest = longest.map_err(|error| anyhow::anyhow!("{error}"))?;
            drop(mapping);
            Ok(longest)
        }));
    }
    barrier.wait();
    thread::sleep(Duration::from_millis(rest_ms));
    // A burst that is killed has said when it began.
    say(&serde_json::json!({ "start_ns": now().0 }))?;
    let start = Instant::now();
    barrier.wait();
    barrier.wait();
    let growth = start.elapsed();
    thread::sleep(Duration::from_millis(burst.hold_ms));
    barrier.wait();
    let mut longest = Duration::ZERO;
    for worker in workers {
        let gap = worker
            .join()
            .map_err(|_panic| anyhow::anyhow!("a thread panicked"))??;
        longest = longest.max(gap);
    }
    say(&BurstResult {
        growth_us: micros(growth),
        longest_gap_us: micros(longest),
        end_ns: now().0,
    })
}

fn say(what: &impl Serialize) -> Result<()> {
    println!("{}", serde_json::to_string(what)?);
    Ok(io::stdout().flush()?)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
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

/// What the cgroup of this process uses, without the stock that its CPUs hold in advance.
fn own_usage() -> Result<Bytes> {
    let own = fs::read_to_string("/proc/self/cgroup")?;
    let path = own
        .lines()
        .find_map(|line| line.strip_prefix("0::/"))
        .context("not in cgroup v2")?;
    let stat = Cgroup::open(&Path::new("/sys/fs/cgroup").join(path))?.read("memory.stat")?;
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
    let chunk = vec![7_u8; MIB];
    let chunks = size(cache.size)? / MIB;
    let anonymous = Mapping::new(size(cache.anonymous)?)?;
    let share = size(cache.anonymous)? / chunks.max(1);
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
    say(&serde_json::json!({ "chunks": chunks, "end_ns": now().0 }))?;
    drop(anonymous);
    Ok(())
}
