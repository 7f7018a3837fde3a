//! Growth: `page_counter_try_charge` against the agent's watermark.
//!
//! The hook is the page counter and not `try_charge_memcg`, because the latter runs for every page
//! while the former runs only when the per-CPU stock of 64 pages is empty: 4 calls per MiB against
//! 256 (measured on 6.12 and 7.3). It runs *before* the charge, so the charge's own pages are added.
//!
//! Whose a charge is takes a walk up the hierarchy with four reads and a map look-up a level, more
//! than all the rest. So the answer is kept per CPU and page counter (see [`known`]), and most calls find
//! it with a comparison.
//!
//! The comparison is level-triggered: while demand stays above the watermark, an event is sent at
//! most every [`EVENT_INTERVAL_NS`], so one that was lost (full ring, a program skipped because
//! another task was preempted inside it) is only late. Page cache does not count: it is summed only
//! above the watermark, where a false alarm would cost more than the reads.
//!
//! The watermark of huge pages is not for `khugepaged`, which gives the small pages back at once. Large folios of
//! page cache, which a `write` of 2 MiB and more may bring in, cannot be told from huge pages here.

use aya_ebpf::{
    macros::{fentry, fexit},
    programs::{FEntryContext, FExitContext},
};
use aya_log_ebpf::warn;
use bellows_ebpf_common::{
    BATCH_PAGES, ENTRY_UNKNOWN, Growth, KIND_OOM, KIND_WATERMARK, MemoryEvent, WATERMARK_OFF, loss,
};

use crate::{
    cost,
    emit::{self, now},
    known::{self, Tracked},
    maps::{GROWTH, GUARDS},
    memcg::{self, Address},
    task,
};

/// Shortest time between two events of one cgroup.
const EVENT_INTERVAL_NS: u64 = 500_000;
/// Length of a growth window.
const WINDOW_NS: u64 = 5_000_000;

#[fentry(function = "page_counter_try_charge")]
pub(crate) fn growth(ctx: FEntryContext) -> i32 {
    let began = cost::begin();
    let tracked = charge(&ctx);
    cost::end(&began, tracked);
    0
}

/// Looks at each tracked cgroup that a charge is for; returns the nearest.
#[inline(always)]
fn charge(ctx: &FEntryContext) -> Option<&'static Tracked> {
    let pages: u64 = ctx.arg(1);
    let counter: Address = ctx.arg(0);
    let known = known::of(counter)?;
    for tracked in &known.tracked {
        if tracked.id == 0 {
            break;
        }
        if charged(tracked, counter, pages).is_err() {
            emit::lost(loss::READ_FAILED);
        }
    }
    known.tracked.first().filter(|nearest| nearest.id != 0)
}

#[inline(always)]
fn charged(tracked: &Tracked, charged: Address, pages: u64) -> Result<(), i32> {
    let Tracked {
        id,
        counter,
        watermark_pages,
        huge_watermark_pages,
    } = *tracked;
    let told_from = if pages > BATCH_PAGES {
        huge_watermark_pages
    } else {
        watermark_pages
    };
    let Some(growth) = GROWTH.get_ptr_mut(id) else {
        return Ok(());
    };
    // SAFETY: a map value stays valid while the program runs; concurrent updates may interleave,
    // which `Growth` documents as acceptable.
    let growth = unsafe { &mut *growth };
    let usage = memcg::usage(counter)?.wrapping_add(pages);
    let at_ns = now();
    observe(growth, usage, at_ns);

    if told_from == WATERMARK_OFF || usage < told_from {
        return Ok(());
    }
    let file_pages = memcg::file_pages_between(counter, charged)?;
    let demand = usage.saturating_sub(file_pages);
    if demand > growth.peak_demand_pages {
        growth.peak_demand_pages = demand;
    }
    if demand < told_from || at_ns.wrapping_sub(growth.last_event_ns) < EVENT_INTERVAL_NS {
        return Ok(());
    }
    if demand < watermark_pages && task::is_in_root_cgroup() {
        return Ok(());
    }
    growth.last_event_ns = at_ns;
    emit::memory(&MemoryEvent {
        kind: KIND_WATERMARK,
        charge_pages: u32::try_from(pages).unwrap_or(u32::MAX),
        cgroup_id: id,
        at_ns,
        usage_pages: usage,
        file_pages,
        limit_pages: memcg::limit(counter)?,
        window_pages: growth.window_pages,
        window_ns: growth.window_ns,
        entry: task::entry(),
        thread: task::thread(),
    });
    Ok(())
}

#[inline(always)]
fn observe(growth: &mut Growth, usage: u64, at_ns: u64) {
    growth.charges += 1;
    if usage > growth.peak_pages {
        growth.peak_pages = usage;
        growth.last_peak_ns = at_ns;
    }
    let elapsed = at_ns.wrapping_sub(growth.window_start_ns);
    if elapsed >= WINDOW_NS {
        growth.window_pages = usage.saturating_sub(growth.window_start_pages);
        growth.window_ns = if growth.window_start_ns == 0 {
            0
        } else {
            elapsed
        };
        growth.window_start_ns = at_ns;
        growth.window_start_pages = usage;
    }
}

/// The OOM killer is about to choose. Reported with what the cgroup had; it cannot be stopped here.
#[fexit(function = "mem_cgroup_out_of_memory")]
pub(crate) fn oom(ctx: FExitContext) -> i32 {
    let memcg: Address = ctx.arg(0);
    let Ok(id) = memcg::id(memcg) else {
        warn!(&ctx, "OOM in a memory cgroup whose id cannot be read");
        return 0;
    };
    if GUARDS.get_ptr(id).is_none() {
        return 0;
    }
    let counter = memcg::counter(memcg);
    let (Ok(usage_pages), Ok(file_pages), Ok(limit_pages)) = (
        memcg::usage(counter),
        memcg::file_pages(memcg),
        memcg::limit(counter),
    ) else {
        emit::lost(loss::READ_FAILED);
        return 0;
    };
    emit::memory(&MemoryEvent {
        kind: KIND_OOM,
        charge_pages: 0,
        cgroup_id: id,
        at_ns: now(),
        usage_pages,
        file_pages,
        limit_pages,
        window_pages: 0,
        window_ns: 0,
        entry: ENTRY_UNKNOWN,
        thread: 0,
    });
    0
}
