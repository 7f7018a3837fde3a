//! A pod's own limit, which follows what its containers have.
//!
//! The steps are core's ([`pod_step`]); here they are taken, one at a time for each pod. A step that fails is taken
//! again by whoever comes next: nothing depends on who began it.

use bellows_core::{
    Bytes,
    moved::{MovedLimit, PodStep, pod_step},
};
use thiserror::Error;
use tokio::{sync::Mutex, task::spawn_blocking};

use super::{
    pod_cgroup::{self, PodCgroupError},
    shrink,
};
use crate::{
    cgroup::{Cgroup, CgroupError, Limit},
    originals::{PodOriginal, Records},
};

/// Why a pod's limit is not what it should be.
#[derive(Debug, Error)]
pub enum PodError {
    /// A cgroup file.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// It could not be set.
    #[error(transparent)]
    Set(#[from] PodCgroupError),
    /// It could not be written down.
    #[error("{0}")]
    Record(#[from] std::io::Error),
    /// A thread.
    #[error("no thread can be had to make room for a lower limit: {0}")]
    Thread(#[from] tokio::task::JoinError),
}

/// How far a pod's limit may be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum May {
    /// Up only: a container is about to be raised.
    Rise,
    /// Up and down.
    Fall,
}

/// Whose raises are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// Containers that are guarded.
    Guarded,
    /// Those that were, too: what is written down of them is read, which takes longer.
    All,
}

/// By how much each container of a pod is raised.
pub type Raised<'a> = &'a (dyn Fn(Who) -> Vec<Bytes> + Send + Sync);

/// The cgroup of a pod.
#[derive(Debug)]
pub struct Pod {
    cgroup: Cgroup,
    /// `None` while it has no limit.
    limit: Mutex<Option<MovedLimit<Bytes>>>,
    records: Records<PodOriginal>,
}

impl Pod {
    /// A pod, with what is written down of it.
    #[must_use]
    pub fn new(cgroup: Cgroup, records: Records<PodOriginal>) -> Self {
        let recorded = records.read(crate::originals::key_of(cgroup.path()));
        Self {
            cgroup,
            limit: Mutex::new(recorded.map(|recorded| recorded.limit)),
            records,
        }
    }

    /// Its cgroup.
    #[must_use]
    pub const fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Writes down what the limit is before any of its containers is moved.
    ///
    /// # Errors
    ///
    /// [`PodError`].
    pub async fn adopt(&self) -> Result<(), PodError> {
        let mut known = self.limit.lock().await;
        if let (None, Limit::At(limit)) = (&*known, self.cgroup.limit("memory.max")?) {
            self.write(known.insert(MovedLimit::new(limit)))?;
        }
        Ok(())
    }

    /// Brings the limit to where it must be for what its containers are raised by. Usage that is too high
    /// for a lower limit is no error: it stays for now.
    ///
    /// # Errors
    ///
    /// [`PodError`].
    pub async fn settle(&self, raised: Raised<'_>, may: May) -> Result<(), PodError> {
        let mut known = self.limit.lock().await;
        let Limit::At(in_force) = self.cgroup.limit("memory.max")? else {
            // Whatever it was: it holds everything now.
            *known = None;
            return Ok(());
        };
        let limit = known.get_or_insert_with(|| MovedLimit::new(in_force));
        let mut step = pod_step(limit, in_force, raised(Who::Guarded));
        if let PodStep::Foreign(theirs) = step {
            tracing::info!(path = %self.cgroup.path().display(), %theirs, "the limit of a pod was changed by somebody else, which is the new original");
            *limit = MovedLimit::new(theirs);
            self.write(limit)?;
            step = pod_step(limit, in_force, raised(Who::Guarded));
        }
        if may == May::Fall && matches!(step, PodStep::Lower(_)) {
            step = pod_step(limit, in_force, raised(Who::All));
        }
        match step {
            PodStep::Raise(to) => self.set(limit, to).await,
            PodStep::Lower(to) if may == May::Fall && self.make_room(to).await? => {
                self.set(limit, to).await
            }
            PodStep::Lower(_) | PodStep::Keep | PodStep::Foreign(_) => Ok(()),
        }
    }

    async fn set(&self, limit: &mut MovedLimit<Bytes>, to: Bytes) -> Result<(), PodError> {
        limit.ask(to);
        self.write(limit)?;
        Ok(pod_cgroup::set_limit(&self.cgroup, to).await?)
    }

    async fn make_room(&self, to: Bytes) -> Result<bool, PodError> {
        let cgroup = self.cgroup.clone();
        Ok(spawn_blocking(move || shrink::make_room_in(&cgroup, to)).await??)
    }

    fn write(&self, limit: &MovedLimit<Bytes>) -> std::io::Result<()> {
        self.records.write(&PodOriginal {
            limit: limit.clone(),
            path: self.cgroup.path().to_owned(),
        })
    }

    /// Forgets a pod none of whose containers is guarded, once it is at rest or gone; returns whether it is.
    pub async fn is_left(&self) -> bool {
        let known = self.limit.lock().await;
        let at_rest = match (self.cgroup.limit("memory.max"), &*known) {
            (Ok(Limit::At(in_force)), Some(limit)) => in_force == limit.at_rest,
            (Ok(_), _) => true,
            (Err(error), _) => error.is_gone(),
        };
        if at_rest {
            self.records
                .remove(crate::originals::key_of(self.cgroup.path()));
        }
        at_rest
    }
}
