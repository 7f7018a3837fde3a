//! Swap for the benches that ask for it: a guest has none otherwise.

use std::{
    fs::{self, File},
    io::Write as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::node::shell;

/// Where swapped pages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Swap {
    /// A file on the disk.
    Disk,
    /// Compressed memory.
    Zram,
}

const SIZE_MIB: usize = 2048;
const FILE: &str = "/disk/swap";
const ZRAM: &str = "/dev/zram0";

impl Swap {
    /// Switches it on, with room for every burst.
    pub(crate) fn on(self) -> Result<()> {
        let device = match self {
            Self::Disk => file()?,
            Self::Zram => zram()?,
        };
        shell(&format!("busybox mkswap {}", device.display()))?;
        shell(&format!("busybox swapon {}", device.display()))?;
        let swaps = fs::read_to_string("/proc/swaps")?;
        ensure!(swaps.lines().count() > 1, "no swap is on: {swaps}");
        Ok(())
    }
}

fn file() -> Result<PathBuf> {
    let mut file = File::create(FILE).context("a swap file on the disk")?;
    let zeros = vec![0_u8; 1 << 20];
    for _ in 0..SIZE_MIB {
        file.write_all(&zeros)?;
    }
    file.sync_all()?;
    Ok(PathBuf::from(FILE))
}

fn zram() -> Result<PathBuf> {
    ensure!(
        Path::new(ZRAM).exists(),
        "this kernel has no zram: {ZRAM} is not there"
    );
    fs::write("/sys/block/zram0/disksize", format!("{SIZE_MIB}M")).context("the size of zram0")?;
    Ok(PathBuf::from(ZRAM))
}
