//! What a bench in pods has beside its guest: a release of Kubernetes, and a way to an API server.
//!
//! A control plane inside the guest cannot do all that one beside it can. What it cannot is refused
//! before anything is built, rather than found out by a bench that waits for it.

use std::path::PathBuf;

use anyhow::{Result, ensure};

use super::{Name, Options};
use crate::{
    control_plane::{ControlPlane, Inside, TOKEN},
    kubernetes, root,
};

/// The cluster of one run.
pub(super) struct Cluster {
    pub(super) release: String,
    /// Path in the guest, content on this machine.
    pub(super) files: Vec<(String, PathBuf)>,
    /// How the bench reaches the API server.
    pub(super) words: Vec<String>,
    /// Ends with the run; `None` where the guest has its own.
    _control: Option<ControlPlane>,
}

impl Cluster {
    /// Starts what a bench needs of it here; `None` where it needs none.
    pub(super) fn of(options: &Options) -> Result<Option<Self>> {
        let release = kubernetes::release(&options.kubernetes);
        let gate = kubernetes::gate(release, !options.without_resize)?;
        if !options.name.needs_node() {
            return Ok(None);
        }
        let binaries = kubernetes::binaries(release)?;
        let mut files = vec![("/bin/kubelet".to_owned(), binaries.kubelet.clone())];
        for name in ["bellows.yaml", "elasticnodes.yaml", "elasticpolicies.yaml"] {
            files.push((format!("/deploy/{name}"), root()?.join("deploy").join(name)));
        }
        let mut words = flag("--token", TOKEN).to_vec();
        if let Some(gate) = &gate {
            words.extend(flag("--gate", gate));
        }
        let control = if options.control_plane_inside {
            let inside = Inside::prepare(&binaries, gate.as_deref())?;
            files.extend(inside.files);
            words.extend(flag("--api", &inside.api));
            None
        } else {
            let control = ControlPlane::start(&binaries, gate.as_deref())?;
            if options.name.needs_controllers() {
                control.control(&kubernetes::controllers(release)?)?;
            }
            files.push(("/deploy/ca.crt".to_owned(), control.authority.clone()));
            // The host's loopback, as QEMU's user network shows it to the guest.
            let of = |port: u16| format!("10.0.2.2:{port}");
            words.extend(flag("--api", &format!("https://{}", of(control.port))));
            words.extend(flag("--control", &of(control.control)));
            Some(control)
        };
        Ok(Some(Self {
            release: release.to_owned(),
            files,
            words,
            _control: control,
        }))
    }
}

fn flag(name: &str, value: &str) -> [String; 2] {
    [name.to_owned(), value.to_owned()]
}

/// Refuses a control plane inside the guest where the bench cannot have it there.
pub(super) fn check(options: &Options) -> Result<()> {
    let name = options.name;
    let why = if !name.needs_node() {
        "has none: choose one in pods, such as pod-path, or leave --control-plane-inside out"
    } else if name == Name::PodFaults {
        "stops the API server and pauses etcd from outside: leave --control-plane-inside out"
    } else if name.needs_controllers() {
        "needs a scheduler and a controller manager, which run beside it only: leave --control-plane-inside out"
    } else {
        return Ok(());
    };
    ensure!(
        !options.control_plane_inside,
        "no control plane inside the guest for {}, which {why}",
        name.text()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A run with it is no run without it: refused, or filed as one, and by the same words in its evidence.
    #[test]
    fn a_control_plane_inside_is_refused_or_told() {
        let inside = |name| Options {
            control_plane_inside: true,
            ..Options::of(name)
        };
        for name in [
            Name::PodFaults,
            Name::MakeRoom,
            Name::RightSize,
            Name::Java,
            Name::Arbiter,
        ] {
            let error = check(&inside(name)).unwrap_err().to_string();
            assert!(
                error.ends_with("leave --control-plane-inside out"),
                "{error}"
            );
            check(&Options::of(name)).unwrap();
        }
        for name in [Name::PodPath, Name::PodBursts, Name::Idle, Name::Daemonset] {
            let options = inside(name);
            check(&options).unwrap();
            assert_ne!(options.file_name(), Options::of(name).file_name());
            let command = options.guest_command();
            assert!(command.contains(&"--control-plane-inside".to_owned()));
        }
    }
}
