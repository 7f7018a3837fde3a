//! What was before Bellows moved it, as it stands in an annotation of the pod: `CONTAINER=VALUE`, with commas between them.

use super::{MANAGER, Pod, WHOLE_POD};

/// The entries of an annotation with originals.
pub(super) fn entries<'a>(
    pod: &'a Pod,
    annotation: &str,
) -> impl Iterator<Item = &'a str> + use<'a> {
    let value = pod.annotations.get(annotation);
    value.into_iter().flat_map(|value| value.split(','))
}

/// An annotation with originals, with another one in it. What is left of containers that do not exist is not kept.
#[must_use]
pub fn with_original(pod: &Pod, annotation: &str, container: &str, original: &str) -> String {
    let exists = |name: &str| {
        name == WHOLE_POD
            || pod
                .containers
                .iter()
                .any(|container| container.name == name)
    };
    let mut entries: Vec<String> = entries(pod, annotation)
        .filter(|entry| {
            let name = entry.split_once('=').map(|(name, _)| name);
            name.is_some_and(|name| name != container && exists(name))
        })
        .map(str::to_owned)
        .collect();
    entries.push(format!("{container}={original}"));
    entries.join(",")
}

/// The original that stands on the pod for this container, as written.
pub(super) fn recorded<'a>(pod: &'a Pod, annotation: &str, name: &str) -> Option<&'a str> {
    entries(pod, annotation).find_map(|entry| {
        let (own, original) = entry.split_once('=')?;
        (own == name).then_some(original)
    })
}

/// What a value in the spec was.
pub(super) struct Original<'a, T> {
    /// What it was.
    pub(super) value: T,
    /// The same as it was written.
    pub(super) text: &'a str,
    /// Whether it stands on the pod already.
    pub(super) is_recorded: bool,
    /// Whether somebody else has changed the value since that was recorded: it is the new original then.
    pub(super) is_foreign: bool,
}

impl<'a, T: Copy + PartialEq> Original<'a, T> {
    /// By what the spec says now, who has set that, and what is recorded.
    pub(super) fn of(
        now: (T, &'a str),
        manager: Option<&str>,
        recorded: Option<(T, &'a str)>,
    ) -> Self {
        let is_theirs = manager.is_some_and(|manager| manager != MANAGER);
        let is_foreign = is_theirs && recorded.is_some_and(|(original, _)| original != now.0);
        let known = recorded.filter(|_| !is_foreign);
        let (value, text) = known.unwrap_or(now);
        Self {
            value,
            text,
            is_recorded: known.is_some(),
            is_foreign,
        }
    }
}
