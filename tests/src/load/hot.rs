//! `hot`: a file that is read again and again, as a program's working set of page cache.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    time::Instant,
};

use anyhow::{Context as _, Result};
use bellows::cgroup::Cgroup;
use bellows_core::{Bytes, quantity};
use clap::Args;
use serde::{Deserialize, Serialize};

use super::{MIB, own_cgroup, say, size};

#[derive(Args, Clone, Debug)]
pub(crate) struct Hot {
    /// The file.
    #[arg(long)]
    file: PathBuf,
    /// Its size.
    #[arg(long, value_parser = quantity::parse)]
    size: Bytes,
    /// Times that it is read.
    #[arg(long)]
    passes: u64,
}

/// One pass over the file.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Pass {
    /// How long it took.
    pub(crate) us: u64,
    /// Pages read again after they had been reclaimed, so far.
    pub(crate) refaulted: u64,
    /// Those of them that the kernel takes for working set, so far.
    pub(crate) activated: u64,
    /// Microseconds that tasks have waited for memory, so far.
    pub(crate) stalled_us: u64,
}

/// What the load says at its end.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct HotResult {
    /// Microseconds that all passes took.
    pub(crate) read_us: u64,
    pub(crate) passes: Vec<Pass>,
}

pub(super) fn run(hot: &Hot) -> Result<()> {
    let cgroup = own_cgroup()?;
    let chunk = vec![7_u8; MIB];
    let mut file = File::create(&hot.file).with_context(|| hot.file.display().to_string())?;
    for _ in 0..size(hot.size)? / MIB {
        file.write_all(&chunk)?;
    }
    file.sync_all()?;
    let mut buffer = chunk;
    let mut result = HotResult::default();
    let start = Instant::now();
    for _ in 0..hot.passes {
        let begun = Instant::now();
        let mut file = File::open(&hot.file)?;
        while file.read(&mut buffer)? > 0 {}
        let us = u64::try_from(begun.elapsed().as_micros())?;
        result.passes.push(pass(&cgroup, us)?);
    }
    result.read_us = u64::try_from(start.elapsed().as_micros())?;
    say(&result)?;
    fs::remove_file(Path::new(&hot.file))?;
    Ok(())
}

fn pass(cgroup: &Cgroup, us: u64) -> Result<Pass> {
    let stat = cgroup.read("memory.stat")?;
    let field = |name: &str| {
        let line = stat
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.parse().ok()).unwrap_or(0)
    };
    Ok(Pass {
        us,
        refaulted: field("workingset_refault_file"),
        activated: field("workingset_activate_file"),
        stalled_us: cgroup.stalled()?.unwrap_or_default().0 / 1000,
    })
}
