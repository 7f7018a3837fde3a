//! Records and the small statistics that summaries are made of.

use std::{fs::File, io::Write as _};

use anyhow::{Result, ensure};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;

/// Where a bench writes its records.
pub(crate) struct Records {
    file: File,
}

impl Records {
    pub(crate) const fn new(file: File) -> Self {
        Self { file }
    }

    /// Writes one case.
    pub(crate) fn write(&mut self, record: &impl Serialize) -> Result<()> {
        let mut line = serde_json::to_vec(record)?;
        line.push(b'\n');
        self.file.write_all(&line)?;
        self.file.flush()?;
        Ok(())
    }
}

/// The records of a bench. None are no evidence, of nothing.
pub(crate) fn parsed<T: DeserializeOwned>(records: &[Value]) -> Result<Vec<T>> {
    ensure!(!records.is_empty(), "the bench has left no record");
    let parsed = records
        .iter()
        .map(|record| serde_json::from_value(record.clone()))
        .collect::<Result<_, _>>()?;
    Ok(parsed)
}

/// How a burst ended, for people: `killed` in the word given.
pub(super) const fn fate(is_killed: bool, killed: &'static str) -> &'static str {
    if is_killed { killed } else { "alive" }
}

/// The value at a percentile (nearest rank) of `NaN`-free input; `NaN` of none, which no check takes for a good value.
pub(crate) fn percentile(values: &[f64], percent: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a rank within the slice"
    )]
    let rank = (percent / 100.0 * sorted.len() as f64).ceil().max(1.0) as usize;
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

/// Rounded to three decimals, for people.
pub(crate) fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
