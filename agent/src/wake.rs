//! Waking a thread that polls: whoever has something for it writes, and it waits for that beside its own sources.

use std::{
    io,
    os::fd::{AsFd as _, BorrowedFd, OwnedFd},
    sync::Arc,
    thread,
    time::Duration,
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

/// A kernel program writes its record in some microseconds.
const UNFINISHED: Duration = Duration::from_micros(50);

/// A wake-up; clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Wake(Arc<OwnedFd>);

impl Wake {
    /// One that nobody has given yet.
    ///
    /// # Errors
    ///
    /// When an eventfd cannot be had.
    pub(crate) fn new() -> io::Result<Self> {
        let descriptor = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Self(Arc::new(descriptor)))
    }

    /// Wakes whoever waits, or will.
    pub(crate) fn give(&self) {
        // A full eventfd counter is a pending wake-up already.
        if let Err(errno) = rustix::io::write(&self.0, &1_u64.to_ne_bytes()) {
            tracing::debug!(%errno, "the thread is being woken already");
        }
    }

    /// Takes it; returns whether it was given.
    #[must_use]
    pub(crate) fn take(&self) -> bool {
        let mut counter = [0; 8];
        let taken = rustix::io::read(&self.0, &mut counter);
        taken
            .inspect_err(|errno| tracing::trace!(%errno, "no command"))
            .is_ok()
    }

    /// Lets others run for a moment, because a source was readable and had nothing.
    ///
    /// A record that a kernel program has begun makes its ring readable, and can be taken only when it is finished. Whoever
    /// is charged may have been interrupted in between by this very thread, which has real-time priority: to look
    /// again and again would keep the one that is waited for from its CPU until the kernel's limit for
    /// real-time tasks, nearly a second.
    pub(crate) fn let_others_finish() {
        thread::sleep(UNFINISHED);
    }

    /// Waits until it is given, a source is readable, or the time is over; returns whether a source is. Allocates
    /// nothing.
    pub(crate) fn wait(&self, sources: [Option<BorrowedFd<'_>>; 2], timeout: Duration) -> bool {
        let timeout = rustix::time::Timespec {
            tv_sec: i64::try_from(timeout.as_secs()).unwrap_or(1),
            tv_nsec: timeout.subsec_nanos().into(),
        };
        let own = self.0.as_fd();
        let [first, second] = sources.map(|source| source.unwrap_or(own));
        let mut polled = [own, first, second].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
        // Interrupted or not: whoever waits looks at everything anyway.
        if let Err(errno) = poll(&mut polled, Some(&timeout)) {
            tracing::trace!(%errno, "poll");
        }
        let [_, first, second] = polled;
        let told = [first, second].into_iter().zip(sources);
        told.filter(|(_, source)| source.is_some())
            .any(|(polled, _)| polled.revents().contains(PollFlags::IN))
    }
}
