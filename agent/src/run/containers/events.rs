//! The runtime's own events, where a second reader takes them from nobody.
//!
//! They are read at once by a task of their own, and not when somebody has time to look: containerd sends them to all of
//! its readers through one queue of a hundred, and starts no container while that is full.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use tokio::{sync::Notify, task::JoinHandle};
use tonic::Streaming;

use crate::cri::{ContainerEventResponse, Runtime};

/// What is known of a runtime's events.
pub(super) enum Events {
    /// Nothing yet.
    Untried,
    /// They belong to somebody else.
    Others,
    /// They are read.
    Read(Reader),
}

/// A task that reads them; it ends with its owner.
pub(super) struct Reader {
    state: Arc<State>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct State {
    woken: Notify,
    has_ended: AtomicBool,
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Reader {
    fn of(mut stream: Streaming<ContainerEventResponse>) -> Self {
        let state = Arc::<State>::default();
        let own = Arc::clone(&state);
        let task = tokio::spawn(async move {
            while stream.message().await.is_ok_and(|event| event.is_some()) {
                own.woken.notify_one();
            }
            own.has_ended.store(true, Ordering::Release);
            own.woken.notify_one();
        });
        Self { state, task }
    }

    /// Waits until there was one since the last time; returns whether more may come.
    pub(super) async fn wait(&self) -> bool {
        self.state.woken.notified().await;
        !self.state.has_ended.load(Ordering::Acquire)
    }
}

impl Events {
    /// Those of a runtime.
    pub(super) async fn of(runtime: &Runtime) -> Self {
        let Ok((name, version)) = runtime.version().await else {
            return Self::Untried;
        };
        let version = version.trim_start_matches('v');
        let major = version
            .split('.')
            .next()
            .and_then(|major| major.parse().ok());
        if name != "containerd" || major.is_none_or(|major: u32| major < 2) {
            return Self::Others;
        }
        match runtime.events().await {
            Ok(stream) => Self::Read(Reader::of(stream)),
            Err(error) => {
                tracing::debug!(%error, "no events");
                Self::Untried
            }
        }
    }
}
