//! The values in a file of policies: sizes, CPUs, times and shares, with the place of whatever is wrong.
//!
//! Each has bounds beyond which it is a wrong word rather than a wish, such as a limit in which no process starts: whoever
//! has written it is told what to write, with its line.
//!
//! It must not know of fields, nor put in what a policy leaves out.

use bellows_core::{Bytes, Cpu, Nanos, quantity};
use serde_saphyr::{Location, Spanned};

use super::Problem;

/// The kernel's smallest quota is a millisecond, of periods of 100 ms (`min_cfs_quota_period`, kernel/sched/core.c).
const LEAST_CPU: Cpu = Cpu::millis(10);
/// A limit below this starts no process.
const LEAST: Bytes = Bytes::mib(1);

pub(super) fn problem(location: Location, what: String) -> Problem {
    Problem {
        line: location.line(),
        column: location.column(),
        what,
    }
}

/// A share such as `5%` or `0.5%`, in thousandths.
pub(super) fn share(text: &Spanned<String>) -> Result<u64, Problem> {
    let wrong = || {
        let what = format!(
            "`{}` is no share of periods: write one of 0% to 50%, such as 5%",
            text.value
        );
        problem(text.referenced, what)
    };
    let percent = text.value.strip_suffix('%').ok_or_else(wrong)?;
    // A hundredth is a thousand thousandths of a hundredth, as a CPU is of thousandths.
    let share = quantity::parse_cpu(percent)
        .ok()
        .filter(|_| !percent.ends_with('m'));
    let share = share.ok_or_else(wrong)?.0;
    if share > 50_000_000 || share % 100_000 != 0 {
        return Err(wrong());
    }
    Ok(share / 100_000)
}

pub(super) fn cpu(text: &Spanned<String>) -> Result<Cpu, Problem> {
    let cpu = quantity::parse_cpu(&text.value);
    let cpu = cpu.map_err(|what| problem(text.referenced, what))?;
    if cpu < LEAST_CPU {
        let what = format!("{cpu} is less than the kernel can share out: use at least 10m");
        return Err(problem(text.referenced, what));
    }
    Ok(cpu)
}

pub(super) fn size(text: &Spanned<String>) -> Result<Bytes, Problem> {
    let size = quantity::parse(&text.value);
    let size = size.map_err(|error| problem(text.referenced, error.to_string()))?;
    if size < LEAST {
        let what = format!("{size} is too small to start a process: use at least 1Mi");
        return Err(problem(text.referenced, what));
    }
    Ok(size)
}

/// A time of a second to a day.
pub(super) fn duration(text: &Spanned<String>) -> Result<Nanos, Problem> {
    let wrong = |why: String| {
        let what = format!(
            "`{}` is no time ({why}): write one such as 5s or 2m",
            text.value
        );
        problem(text.referenced, what)
    };
    let parsed: jiff::SignedDuration = text
        .value
        .parse()
        .map_err(|error: jiff::Error| wrong(error.to_string()))?;
    match u64::try_from(parsed.as_millis()) {
        Ok(milliseconds @ 1000..=86_400_000) => Ok(Nanos::millis(milliseconds)),
        _ => Err(wrong("it must be from 1s to 24h".to_owned())),
    }
}
