//! `job` and `jobs`: what a build is made of, where no real compiler is wanted.
//!
//! A job grows with the CPU time that it uses, as a compiler does, until three quarters of its work are done. `jobs` has
//! jobs done as make does, by the protocol of job tokens: as one that has a jobserver for others (cargo), or as one that
//! takes its tokens from make's (ninja, since 1.13).

use std::{
    collections::VecDeque,
    env,
    fs::File,
    hint::black_box,
    io::{self, Read as _, Write as _},
    os::{
        fd::{AsRawFd as _, OwnedFd},
        unix::fs::OpenOptionsExt as _,
    },
    process::{Child, Command},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bellows_core::{Bytes, quantity};
use clap::Args;
use rustix::{
    io::{FdFlags, fcntl_setfd},
    time::{ClockId, clock_gettime},
};

use super::{growth::Mapping, size};

/// Pieces in which it grows.
const PIECES: usize = 32;

#[derive(Args, Clone, Debug)]
pub(crate) struct Job {
    /// What it grows to.
    #[arg(value_parser = quantity::parse)]
    size: Bytes,
    /// Milliseconds of CPU time that it takes.
    work_ms: u64,
    /// When it has grown it waits for the end of its input, and works after that.
    #[arg(long)]
    waits: bool,
}

#[derive(Args, Clone, Debug)]
pub(crate) struct Jobs {
    /// How many at once.
    #[arg(long)]
    at_once: usize,
    /// Takes its tokens from a fifo that `MAKEFLAGS` names, in place of having a pipe of them for others.
    #[arg(long)]
    client: bool,
    /// The program that does the jobs, another name of this one.
    #[arg(long)]
    program: String,
    /// Each as `SIZE:MS`.
    jobs: Vec<String>,
}

fn cpu_ms() -> u64 {
    let used = clock_gettime(ClockId::ProcessCPUTime);
    u64::try_from(used.tv_sec * 1000 + used.tv_nsec / 1_000_000).unwrap_or(0)
}

/// Uses the CPU until so much of it is used.
fn work(until_ms: u64) {
    let mut value = 1_u64;
    while cpu_ms() < until_ms {
        for _ in 0..10_000 {
            value = black_box(
                value
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1),
            );
        }
    }
}

pub(super) fn run(job: &Job) -> Result<()> {
    let memory = Mapping::new(size(job.size)?)?;
    let piece = memory.length / PIECES;
    for n in 0..PIECES {
        memory.touch(n * piece, (n + 1) * piece);
        let share = u64::try_from(n + 1)? * 3;
        work(job.work_ms * share / (4 * u64::try_from(PIECES)?));
    }
    if job.waits {
        // Whatever ends the input, an error included, is the end.
        drop(io::stdin().read_to_end(&mut Vec::new()));
    }
    work(job.work_ms);
    drop(memory);
    Ok(())
}

/// Where tokens come from and go to.
struct Tokens {
    from: File,
    to: File,
    held: Vec<u8>,
}

impl Tokens {
    fn of_make() -> Result<Self> {
        let flags = env::var("MAKEFLAGS").context("no MAKEFLAGS")?;
        let mut words = flags.split(' ').rev();
        let fifo = words.find_map(|word| word.strip_prefix("--jobserver-auth=fifo:"));
        let fifo = fifo.with_context(|| format!("no fifo in {flags}"))?;
        let mut options = File::options();
        options
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK);
        let from = options.open(fifo)?;
        Ok(Self {
            to: from.try_clone()?,
            from,
            held: Vec::new(),
        })
    }

    /// A pipe that children inherit, and what to tell them of it.
    fn for_others(at_once: usize) -> Result<(Self, String)> {
        let (from, to) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::NONBLOCK)?;
        let inherited = |end: &OwnedFd| fcntl_setfd(end, FdFlags::empty());
        inherited(&from)?;
        inherited(&to)?;
        let flags = format!(
            "-j{at_once} --jobserver-auth={},{}",
            from.as_raw_fd(),
            to.as_raw_fd()
        );
        let mut tokens = Self {
            from: from.into(),
            to: to.into(),
            held: Vec::new(),
        };
        tokens
            .to
            .write_all(&vec![b'|'; at_once.saturating_sub(1)])?;
        Ok((tokens, flags))
    }

    fn take(&mut self) -> Result<bool> {
        let mut token = [0];
        match self.from.read(&mut token) {
            Ok(1) => {
                self.held.push(token[0]);
                Ok(true)
            }
            Ok(_) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// One job needs none.
    fn give_back(&mut self, running: usize) -> Result<()> {
        while self.held.len() > running.saturating_sub(1) {
            let token = self.held.pop();
            self.to.write_all(&token.into_iter().collect::<Vec<u8>>())?;
        }
        Ok(())
    }
}

pub(super) fn run_all(options: &Jobs) -> Result<()> {
    let (mut tokens, flags) = if options.client {
        (Tokens::of_make()?, None)
    } else {
        let (tokens, flags) = Tokens::for_others(options.at_once)?;
        (tokens, Some(flags))
    };
    let mut waiting: VecDeque<&String> = options.jobs.iter().collect();
    let mut running: Vec<Child> = Vec::new();
    while !(waiting.is_empty() && running.is_empty()) {
        let mut left = Vec::new();
        for mut child in running {
            match child.try_wait()? {
                None => left.push(child),
                Some(status) => ensure!(status.success(), "a job has failed: {status}"),
            }
        }
        running = left;
        tokens.give_back(running.len())?;
        while running.len() < options.at_once
            && (running.is_empty() || tokens.held.len() >= running.len() || tokens.take()?)
            && let Some(job) = waiting.pop_front()
        {
            let (size, work) = job.split_once(':').with_context(|| job.clone())?;
            let mut command = Command::new(&options.program);
            command.args(["load", "job", size, work]);
            if let Some(flags) = &flags {
                command.env("MAKEFLAGS", flags);
            }
            running.push(command.spawn()?);
        }
        thread::sleep(Duration::from_millis(5));
    }
    if !options.client {
        // As make does it: whoever has tokens yet has an end open to give them back by.
        let Tokens { mut from, to, .. } = tokens;
        drop(to);
        let mut left = 1;
        loop {
            match from.read(&mut [0]) {
                Ok(0) => break,
                Ok(_) => left += 1,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    thread::sleep(Duration::from_millis(5));
                }
                Err(error) => return Err(error.into()),
            }
        }
        // As make says it.
        if left != options.at_once {
            eprintln!(
                "INTERNAL: Exiting with {left} jobserver tokens available; should be {}!",
                options.at_once
            );
        }
    }
    Ok(())
}
