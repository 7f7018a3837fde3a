//! Growth seen without kernel programs, from cgroup files.
//!
//! `memory.events` can be polled: the kernel wakes whoever waits when usage crosses `memory.high`, at most
//! once in 10 ms. So the brake is the signal: it must stand where a reaction that is late by as much still
//! finds room. Where there is no brake (a limit full of page cache, which must not be reclaimed for it)
//! nothing wakes anybody, so every watched cgroup is also looked at four times a second.
//!
//! This costs wake-ups and file reads that the programs do not, and must only be used without them.

use std::{
    collections::{BTreeMap, VecDeque},
    fs::File,
    io,
    os::{
        fd::{AsFd as _, BorrowedFd, OwnedFd},
        unix::fs::FileExt as _,
    },
    time::Duration,
};

use bellows_core::{Bytes, CgroupId, Nanos};
use bellows_ebpf_common::{ENTRY_UNKNOWN, KIND_OOM, KIND_WATERMARK, MemoryEvent};
use rustix::{
    event::epoll::{self, EventData, EventFlags},
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    },
};

use crate::{
    cgroup::{Cgroup, CgroupError, Limit, parse_events},
    clock::now,
};

/// How often every watched cgroup is looked at, whether or not the kernel has told of it.
const LOOK: Duration = Duration::from_millis(250);
/// The timer's mark among the cgroups; no cgroup has it as its id.
const TIMER: u64 = 0;

/// Watches cgroups through their files.
#[derive(Debug)]
pub struct Files {
    epoll: OwnedFd,
    timer: OwnedFd,
    watched: BTreeMap<CgroupId, Watched>,
    ready: VecDeque<MemoryEvent>,
}

#[derive(Debug)]
struct Watched {
    cgroup: Cgroup,
    events: File,
    watermark: Option<Bytes>,
    ooms: u64,
    /// When it was last seen above its watermark, and with how much.
    last: Option<(Nanos, Bytes)>,
}

impl Files {
    /// Watches nothing yet.
    ///
    /// # Errors
    ///
    /// When an epoll or timer descriptor cannot be had.
    pub fn new() -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let interval = Timespec {
            tv_sec: 0,
            tv_nsec: LOOK.subsec_nanos().into(),
        };
        let every = Itimerspec {
            it_interval: interval,
            it_value: interval,
        };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &every)?;
        epoll::add(&epoll, &timer, EventData::new_u64(TIMER), EventFlags::IN)?;
        Ok(Self {
            epoll,
            timer,
            watched: BTreeMap::new(),
            ready: VecDeque::new(),
        })
    }

    pub(super) fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }

    pub(super) fn adopt(&mut self, cgroup: &Cgroup) -> Result<(), CgroupError> {
        let path = cgroup.path().join("memory.events");
        let failed = |source| CgroupError::Io {
            action: "watch",
            path: path.clone(),
            source,
        };
        let events = File::open(&path).map_err(failed)?;
        let id = cgroup.id();
        let data = EventData::new_u64(id.0);
        epoll::add(&self.epoll, &events, data, EventFlags::PRI)
            .map_err(|errno| failed(errno.into()))?;
        let ooms = read_ooms(&events).map_err(failed)?;
        let watched = Watched {
            cgroup: cgroup.clone(),
            events,
            watermark: None,
            ooms,
            last: None,
        };
        self.watched.insert(id, watched);
        Ok(())
    }

    pub(super) fn watch(&mut self, cgroup: CgroupId, watermark: Option<Bytes>) {
        if let Some(watched) = self.watched.get_mut(&cgroup) {
            watched.watermark = watermark;
        }
    }

    pub(super) fn forget(&mut self, cgroup: CgroupId) {
        // Closing the file takes it out of the epoll set.
        self.watched.remove(&cgroup);
    }

    pub(super) fn take(&mut self) -> Option<MemoryEvent> {
        if self.ready.is_empty() {
            self.look();
        }
        self.ready.pop_front()
    }

    fn look(&mut self) {
        let mut events = Vec::with_capacity(64);
        let at_once = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if let Err(errno) = epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut events),
            Some(&at_once),
        ) {
            tracing::debug!(%errno, "epoll");
        }
        let mut all = false;
        for event in events {
            match event.data.u64() {
                TIMER => {
                    let mut count = [0; 8];
                    all = rustix::io::read(&self.timer, &mut count).is_ok();
                }
                id => {
                    if let Some(watched) = self.watched.get_mut(&CgroupId(id)) {
                        watched.look(&mut self.ready);
                    }
                }
            }
        }
        if all {
            for watched in self.watched.values_mut() {
                watched.look(&mut self.ready);
            }
        }
    }
}

fn read_ooms(events: &File) -> io::Result<u64> {
    // Five counters of at most twenty digits, with their names.
    let mut buffer = [0_u8; 512];
    let length = events.read_at(&mut buffer, 0)?;
    let text = String::from_utf8_lossy(&buffer[..length]);
    Ok(parse_events(&text).oom)
}

impl Watched {
    /// A cgroup that is gone or cannot be read has nothing to tell; its guard finds that out.
    fn look(&mut self, ready: &mut VecDeque<MemoryEvent>) {
        // Reading it is also what makes the kernel wake us again.
        let ooms = read_ooms(&self.events).unwrap_or(self.ooms);
        let killed = ooms > self.ooms;
        self.ooms = ooms;
        let Some(watermark) = self.watermark else {
            return;
        };
        let Ok(usage) = self.cgroup.usage() else {
            return;
        };
        if usage < watermark && !killed {
            self.last = None;
            return;
        }
        let Ok(stat) = self.cgroup.stat() else {
            return;
        };
        let at = now();
        let (window, grown) = self.last.map_or((Nanos(0), Bytes::ZERO), |(then, before)| {
            (at.since(then), stat.usage.minus(before))
        });
        self.last = Some((at, stat.usage));
        let event = MemoryEvent {
            kind: KIND_WATERMARK,
            charge_pages: 0,
            cgroup_id: self.cgroup.id().0,
            at_ns: at.0,
            usage_pages: stat.usage.pages(),
            file_pages: stat.file.pages(),
            limit_pages: self
                .cgroup
                .limit("memory.max")
                .unwrap_or(Limit::Max)
                .bytes()
                .pages(),
            window_pages: grown.pages(),
            window_ns: window.0,
            entry: ENTRY_UNKNOWN,
            thread: 0,
        };
        if killed {
            ready.push_back(MemoryEvent {
                kind: KIND_OOM,
                ..event
            });
        }
        if stat.demand() >= watermark {
            ready.push_back(event);
        }
    }
}
