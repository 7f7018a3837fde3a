//! Whether systemd answers, where it owns a cgroup.
//!
//! It answers nobody during a `daemon-reload`, and at the end of one it sets all limits that it knows (`manager_reload`,
//! `manager_dispatch_cgroup_realize_queue`, src/core, 257). One that was only written is lost then, and whoever has grown
//! beyond the older one is killed. So whoever is held is held on while systemd is at that, and nothing is written
//! before it answers again: by then its own limits are set. A systemd that hangs must not cost anybody more than their
//! patience.

use std::{path::Path, time::Duration};

use tokio::{
    process::Command,
    time::{Instant, sleep, timeout_at},
};

/// How long a limit may take to be set: a `daemon-reload` of a large machine takes a few seconds.
pub(super) const LONGEST: Duration = Duration::from_secs(10);
/// An answer that takes longer was waited for. On a busy emulated node one takes up to 0.3 s.
const SOON: Duration = Duration::from_millis(500);
/// How long those may take who have waited for it, too.
const THEN: Duration = Duration::from_millis(500);
/// What is left of a patience to write a limit in.
const TO_WRITE: Duration = Duration::from_millis(200);

/// Whether systemd owns a cgroup: only it names directories after units.
pub(super) fn owns(path: &Path) -> bool {
    let is_unit = path
        .extension()
        .is_some_and(|unit| unit == "slice" || unit == "scope");
    is_unit && Path::new("/run/systemd/system").is_dir()
}

/// Waits until whoever was asked is late `after` some time, and where that may be systemd's doing for it, too. Returns
/// whether it was.
pub(super) async fn late(after: Duration, cgroup: &Path, deadline: Option<Instant>) -> bool {
    sleep(after).await;
    is_waited_for(cgroup, deadline).await
}

/// Waits while systemd answers nobody, if a cgroup is its own, and then for those who have waited for it, too: until shortly
/// before `deadline` at the latest, and not at all where nobody is held. Returns whether it had to be waited for.
async fn is_waited_for(cgroup: &Path, deadline: Option<Instant>) -> bool {
    let began = Instant::now();
    let until = deadline.and_then(|deadline| deadline.checked_sub(TO_WRITE));
    let Some(until) = until.filter(|&until| until > began && owns(cgroup)) else {
        return false;
    };
    let answers = async {
        let mut question = Command::new("systemctl");
        question
            .args(["show", "--property=Version"])
            .kill_on_drop(true);
        if let Err(error) = question.output().await {
            tracing::warn!(%error, "cannot run systemctl: whether systemd answers is not known");
        }
        if began.elapsed() > SOON {
            sleep(THEN).await;
        }
    };
    // Answered or not: what counts is how long that took.
    drop(timeout_at(until, answers).await);
    began.elapsed() > SOON
}
