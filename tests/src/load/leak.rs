//! `leak`: rest, then grow slowly and for ever, and give nothing back.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;
use bellows_core::{Bytes, quantity};
use clap::Args;

use super::{MIB, growth::Mapping, size};

#[derive(Args, Clone, Debug)]
pub(crate) struct Leak {
    /// Memory touched before.
    #[arg(long, value_parser = quantity::parse)]
    rest: Bytes,
    /// Milliseconds at rest: a process that leaks was started long before.
    #[arg(long)]
    rest_ms: u64,
    /// MiB that it grows by in a second.
    #[arg(long)]
    mib_a_second: u32,
    /// Where it stops all the same.
    #[arg(long, value_parser = quantity::parse)]
    most: Bytes,
}

pub(super) fn run(leak: &Leak) -> Result<()> {
    let mapping = Mapping::new(size(leak.most)?)?;
    let mut used = size(leak.rest)?;
    mapping.touch(0, used);
    thread::sleep(Duration::from_millis(leak.rest_ms));
    let mut next = Instant::now();
    let pause = Duration::from_secs(1) / leak.mib_a_second.max(1);
    while used + MIB <= mapping.length {
        mapping.touch(used, used + MIB);
        used += MIB;
        // Who was held does not catch up.
        next = (next + pause).max(Instant::now());
        thread::sleep(next.saturating_duration_since(Instant::now()));
    }
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}
