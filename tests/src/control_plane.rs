//! A control plane on the node itself, as a cluster of one machine has it.
//!
//! One on the machine that boots the guest takes nothing from the node's CPUs, and so answers a
//! raise sooner than one that has to share them with the burst that waits for it. Here it has to:
//! etcd and API server run in cgroups of their own beside the pods', and etcd syncs to the node's
//! disk. Their arguments come from that machine, which starts its own with the same. What the guest
//! has more memory for them is reserved, so that the pods' node is as large as without them.

use std::{fs, path::Path, process::Command, time::Duration};

use anyhow::{Context as _, Result, anyhow};
use bellows::{attribution::CGROUP_ROOT, cgroup::Cgroup};
use http::Request;
use serde::Deserialize;
use tokio::{runtime::Runtime, time::timeout};

use crate::{
    node::{self, ApiServer, Service, log_tail, wait},
    pods,
};

/// Where the node finds what it was handed (`xtask/src/control_plane.rs`), and keeps what both write.
pub(crate) const DIRECTORY: &str = "/control-plane";
const ETCD: &str = "etcd";
const APISERVER: &str = "kube-apiserver";
/// Generous, as for all that two emulated CPUs start.
const READY: Duration = Duration::from_secs(300);

/// What is to be started.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Started {
    etcd: Vec<String>,
    kube_apiserver: Vec<String>,
    /// What the guest has more for it, as a quantity.
    memory: String,
}

/// A running API server and its etcd; both end when it is dropped.
pub(crate) struct ControlPlane {
    // Dropped in this order.
    apiserver: Service,
    etcd: Service,
    /// What pods cannot have, as a quantity.
    pub(crate) memory: String,
}

impl ControlPlane {
    /// Starts one and waits until it is ready, where the node is to run it itself. The kubeconfig leads to it.
    pub(crate) fn start(server: &ApiServer) -> Result<Option<Self>> {
        if !server.control_plane_inside {
            return Ok(None);
        }
        let directory = Path::new(DIRECTORY);
        let started = fs::read(directory.join("started.json")).context("no control plane")?;
        let started: Started = serde_json::from_slice(&started)?;
        let mut control_plane = Self {
            etcd: service(ETCD, &started.etcd)?,
            apiserver: service(APISERVER, &started.kube_apiserver)?,
            memory: started.memory,
        };
        let tasks = Runtime::new()?;
        wait("the API server is ready", READY, || {
            control_plane.check()?;
            Ok(tasks.block_on(is_ready()))
        })
        .map_err(|error| anyhow!("{error:#}:\n{}", log_tail(APISERVER, 30)))?;
        // Where one beside the guest hands it over.
        fs::copy(
            directory.join("certificates/apiserver.crt"),
            "/deploy/ca.crt",
        )?;
        Ok(Some(control_plane))
    }

    /// Fails if one of them has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.etcd.check(ETCD, ETCD)?;
        self.apiserver.check(APISERVER, APISERVER)
    }
}

fn service(name: &str, arguments: &[String]) -> Result<Service> {
    let cgroup = Cgroup::open(Path::new(CGROUP_ROOT))?.create_child(name)?;
    let mut program = Command::new(name);
    program.args(arguments);
    cgroup.admit(&mut program)?;
    node::service(&mut program, name)
}

/// Whether it says so; whoever does not answer is not.
async fn is_ready() -> bool {
    let asked = async {
        let request = Request::get("/readyz").body(Vec::new())?;
        Ok::<_, anyhow::Error>(pods::client().await?.request_text(request).await?)
    };
    matches!(timeout(Duration::from_secs(5), asked).await, Ok(Ok(_)))
}
