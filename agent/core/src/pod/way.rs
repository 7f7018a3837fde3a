//! How a limit is changed, by what the cluster can do.
//!
//! | Kubernetes | in-place resize | a container's limits | a pod's own |
//! | --- | --- | --- | --- |
//! | up to 1.31 | alpha, off | patch of the pod, where the gate is on | on the node |
//! | 1.32 | alpha, off | on the node: the API forgets whose a limit is | on the node |
//! | 1.33 | beta, on | on the node: the API takes no lower memory limit | on the node |
//! | 1.34, 1.35 | beta, on; GA | `pods/resize` | on the node |
//! | 1.36 and later | GA | `pods/resize` | `pods/resize` |
//!
//! (KEP-1287 and KEP-5419; 1.33: `ValidatePodResize`, pkg/apis/core/validation/validation.go, "memory limits cannot be
//! decreased unless resizePolicy is RestartContainer"; 1.32: `dropPodUpdates`, pkg/registry/core/pod/strategy.go, keeps the
//! managed fields of the old pod, so what we have raised there looks as if somebody else had set it.) With the gate off nothing is resized through the API.
//!
//! A kubelet may be three minors older than its API server, and have the gate off where that has it on. What tells is
//! whether it says in a pod's status what resources the running containers have: the API server refuses to resize a pod
//! of one that does not ("Pod running on node without support for resize", `isPodResizeRequestSupported`,
//! pkg/apis/core/validation/validation.go). Whether it resizes a pod's own limits is told by the same of the pod as a whole:
//! `status.resources`, which only a kubelet with `InPlacePodLevelResourcesVerticalScaling` fills in
//! (`convertStatusToAPIStatus`, pkg/kubelet/kubelet_pods.go). Asked of another, it would be put off for ever.
//!
//! On the node means: in the cgroups of container and pod, and the API is not told. No kubelet puts back what it did not
//! set itself: before 1.33 it compares the spec with what the runtime says, which knows nothing of it, and since then
//! with what it has set last. It sets what the spec says with the next resize that somebody else asks for, and when the
//! container is started again. A kubelet with the static CPU manager has the runtime set it without knowing: there nothing is
//! moved on the node (the agent's `by_hand`).
//!
//! It must not patch a pod whose kubelet has the gate off: before 1.31 that one would restart the container.

use super::{Level, Pod};

/// What an API server can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Server {
    /// The minor version of Kubernetes 1.
    pub minor: u32,
    /// Whether it has `pods/resize`.
    pub has_resize: bool,
    /// Whether it takes other resources in a patch of a pod; `None` while nobody has asked it.
    pub takes_patch: Option<bool>,
}

/// How a limit is changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// By a patch of the subresource `pods/resize`.
    #[default]
    Resize,
    /// By a patch of the pod.
    Patch,
    /// In the cgroups.
    Node,
}

/// Whose limit it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Whose {
    /// One container's.
    Container,
    /// One container's memory request: only where the kubelet says why it puts a resize off, and by how much.
    Request,
    /// The pod's own, or one of a container in a pod that has its own.
    Pod,
}

impl Whose {
    /// Whose limit one at this level is. A pod with resources of its own is resized as such or not at all, its containers,
    /// too (`ValidatePodResize`, pkg/apis/core/validation/validation.go).
    #[must_use]
    pub const fn of(pod: &Pod, level: Level) -> Self {
        match level {
            Level::Container(_) if !pod.has_resources => Self::Container,
            Level::Pod | Level::Container(_) => Self::Pod,
        }
    }

    /// The first minor version of Kubernetes 1 whose API raises and lowers it.
    #[must_use]
    pub const fn resized_since(self) -> u32 {
        match self {
            Self::Container | Self::Request => LOWERS,
            Self::Pod => POD_LEVEL,
        }
    }
}

/// The first that lets a memory limit be lowered without a restart, and has in-place resize on.
const LOWERS: u32 = 34;
/// The first with `pods/resize`.
const SUBRESOURCE: u32 = 32;
/// The first with in-place resize at all.
const ALPHA: u32 = 27;
/// The first that resizes a pod's own limits unless told not to.
const POD_LEVEL: u32 = 36;

impl Server {
    /// How the limits of a pod are changed. `is_reported` is whether its kubelet says what resources its running
    /// containers have, and for [`Whose::Pod`] what the pod has: one with the gate off does not. `None` while it is not known whether a patch is taken.
    #[must_use]
    pub fn way(self, whose: Whose, is_reported: bool) -> Option<Way> {
        if !is_reported {
            return Some(Way::Node);
        }
        if self.minor >= whose.resized_since() && self.has_resize {
            return Some(Way::Resize);
        }
        if whose != Whose::Container || self.minor >= SUBRESOURCE || self.minor < ALPHA {
            return Some(Way::Node);
        }
        let taken = self.takes_patch?;
        Some(if taken { Way::Patch } else { Way::Node })
    }
}

#[cfg(test)]
mod tests {
    use super::{super::tests::pod, *};

    fn server(minor: u32, has_resize: bool, takes_patch: Option<bool>) -> Server {
        Server {
            minor,
            has_resize,
            takes_patch,
        }
    }

    #[test]
    fn a_pod_with_resources_of_its_own_needs_a_later_one() {
        let mut whole = pod(&[]);
        let since = |pod: &Pod, level| Whose::of(pod, level).resized_since();
        assert_eq!(since(&whole, Level::Container(0)), 34);
        whole.has_resources = true;
        let levels = [Level::Container(0), Level::Pod];
        assert_eq!(levels.map(|level| since(&whole, level)), [36, 36]);
    }

    #[test]
    fn each_minor_has_its_way() {
        let of = |minor, has_resize, takes| {
            let server = server(minor, has_resize, takes);
            [Whose::Container, Whose::Pod].map(|whose| server.way(whose, true))
        };
        let node = Some(Way::Node);
        assert_eq!(of(26, false, Some(true)), [node, node]);
        for minor in 27..=31 {
            assert_eq!(of(minor, false, None), [None, node], "{minor}");
            assert_eq!(of(minor, false, Some(false)), [node, node], "{minor}");
            assert_eq!(
                of(minor, false, Some(true)),
                [Some(Way::Patch), node],
                "{minor}"
            );
        }
        let resize = Some(Way::Resize);
        for has_resize in [true, false] {
            assert_eq!(of(32, has_resize, None), [node, node]);
        }
        assert_eq!(of(33, true, None), [node, node]);
        for minor in 34..=35 {
            assert_eq!(of(minor, true, None), [resize, node], "{minor}");
        }
        for minor in 36..=38 {
            assert_eq!(of(minor, true, None), [resize, resize], "{minor}");
        }
        // The gate can be off.
        assert_eq!(of(34, false, None), [node, node]);
    }

    /// It would restart the container, or do nothing.
    #[test]
    fn a_kubelet_with_the_gate_off_is_not_asked() {
        for minor in 27..=38 {
            let server = server(minor, minor >= 32, Some(true));
            for whose in [Whose::Container, Whose::Pod, Whose::Request] {
                assert_eq!(server.way(whose, false), Some(Way::Node), "{minor}");
            }
        }
    }

    /// 1.32 says that it puts one off, and neither why nor since when.
    #[test]
    fn a_request_is_moved_where_it_is_told_why_it_cannot_be() {
        for minor in 27..=38 {
            let way = server(minor, minor >= 32, Some(true)).way(Whose::Request, true);
            let expected = if minor >= 34 { Way::Resize } else { Way::Node };
            assert_eq!(way, Some(expected), "{minor}");
        }
    }
}
