//! A node inside the guest: containerd, kubelet, and the agent under test.
//!
//! The kubelet keeps its own defaults for eviction and enforceNodeAllocatable, because kills are
//! counted here; what is changed is only what a machine without systemd, swap and iptables rules
//! needs, or one that runs its control plane, too. Everything a node prints goes to /var/log, and its
//! end to the console when it fails.

use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    net::TcpStream,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::Pid;
use serde_json::{Value, json};

use crate::control_plane::ControlPlane;

/// The node's name in the API.
pub(crate) const NAME: &str = "node";
/// The image of the loads, which is also the sandbox's.
pub(crate) const IMAGE: &str = "bellows.dev/guest:1";
/// The program of the loads and benches, on the machine.
pub(crate) const GUEST: &str = "/usr/local/bin/bellows-guest";
const KUBECONFIG: &str = "/etc/kubernetes/kubeconfig";
pub(crate) const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";

/// How to reach the API server.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct ApiServer {
    /// Its address.
    #[arg(long, default_value = "")]
    pub(crate) api: String,
    /// The token to authenticate with.
    #[arg(long, default_value = "")]
    pub(crate) token: String,
    /// Where the machine listens that the API server runs on: what is said there stops it, and starts it again.
    #[arg(long, default_value = "")]
    pub(crate) control: String,
    /// The node runs it itself, and its etcd.
    #[arg(long)]
    pub(crate) control_plane_inside: bool,
    /// A feature that is switched on in the kubelet.
    #[arg(long)]
    pub(crate) gate: Option<String>,
}

impl ApiServer {
    /// Has something done to the API server or its etcd.
    pub(crate) fn control(&self, what: &str) -> Result<()> {
        let mut stream =
            TcpStream::connect(&self.control).context("no way to the control plane")?;
        writeln!(stream, "{what}")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.trim() == "done", "{what}: {answer}");
        Ok(())
    }
}

/// A process that ends with its owner.
pub(crate) struct Service(pub(crate) Child);

impl Service {
    /// Fails if it has ended, with the end of its log.
    pub(crate) fn check(&mut self, what: &str, log: &str) -> Result<()> {
        if let Some(status) = self.0.try_wait()? {
            bail!("{what} has ended ({status}):\n{}", log_tail(log, 40));
        }
        Ok(())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // One that has ended already needs neither.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// A running containerd that has the image of the loads.
pub(crate) struct Containerd(Service);

impl Containerd {
    pub(crate) fn start() -> Result<Self> {
        configure_containerd()?;
        let containerd = Self::start_again()?;
        import_image(
            IMAGE,
            Path::new(GUEST),
            &["/bellows-guest", "load", "pause"],
        )?;
        Ok(containerd)
    }

    /// Its process.
    pub(crate) fn process(&self) -> Result<Pid> {
        Pid::from_raw(self.0.0.id().try_into()?).context("no process")
    }

    /// Starts one that has been configured.
    pub(crate) fn start_again() -> Result<Self> {
        drop(fs::remove_file(CONTAINERD_SOCKET));
        let containerd = service(
            Command::new("containerd").args(["--config", "/etc/containerd/bellows.toml"]),
            "containerd",
        )?;
        wait("containerd's socket", Duration::from_secs(90), || {
            Ok(Path::new(CONTAINERD_SOCKET).exists())
        })?;
        Ok(Self(containerd))
    }
}

/// A running node.
pub(crate) struct Node {
    // Dropped in this order.
    kubelet: Service,
    containerd: Containerd,
    control_plane: Option<ControlPlane>,
}

impl Node {
    pub(crate) fn start(server: &ApiServer) -> Result<Self> {
        Self::start_configured(server, &json!({}))
    }

    /// The same, with other settings of the kubelet.
    pub(crate) fn start_configured(server: &ApiServer, kubelet: &Value) -> Result<Self> {
        write_kubeconfig(server)?;
        let control_plane = ControlPlane::start(server)?;
        write_configuration(server, control_plane.as_ref(), kubelet)?;
        let containerd = Containerd::start()?;
        let kubelet = service(
            Command::new("kubelet").args([
                "--config=/etc/kubernetes/kubelet.yaml",
                &format!("--kubeconfig={KUBECONFIG}"),
                &format!("--hostname-override={NAME}"),
                "--node-ip=10.0.2.15",
                "--v=2",
            ]),
            "kubelet",
        )?;
        Ok(Self {
            kubelet,
            containerd,
            control_plane,
        })
    }

    /// Fails if one of its processes has ended.
    pub(crate) fn check(&mut self) -> Result<()> {
        self.kubelet.check("kubelet", "kubelet")?;
        self.containerd.0.check("containerd", "containerd")?;
        self.control_plane
            .as_mut()
            .map_or(Ok(()), ControlPlane::check)
    }
}

/// A service's log.
pub(crate) fn log_text(name: &str) -> String {
    fs::read_to_string(format!("/var/log/{name}.log")).unwrap_or_default()
}

/// The end of a service's log.
pub(crate) fn log_tail(name: &str, lines: usize) -> String {
    let text = log_text(name);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// What the log of a container has that is JSON, one value a line. (The CRI log format: time, stream, tag, text.)
pub(crate) fn said_in(log: &str) -> Vec<Value> {
    let lines = log.lines().filter_map(|line| line.splitn(4, ' ').nth(3));
    lines
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

/// The log of a service.
pub(crate) fn log(name: &str) -> Result<File> {
    Ok(File::options()
        .create(true)
        .append(true)
        .open(format!("/var/log/{name}.log"))?)
}

/// Starts a program that prints into the log of its name.
pub(crate) fn service(program: &mut Command, name: &str) -> Result<Service> {
    let log = log(name)?;
    program
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .map(Service)
        .with_context(|| format!("run {name}"))
}

/// A look and the pause after it count as no more than this: a machine that is itself a virtual one may stand
/// still for half a minute, and whoever is waited for has then had no time.
const LONGEST_LOOK: Duration = Duration::from_secs(2);

/// Waits for a condition.
pub(crate) fn wait(
    what: &str,
    limit: Duration,
    mut is_met: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let mut waited = Duration::ZERO;
    loop {
        let start = Instant::now();
        if is_met()? {
            return Ok(());
        }
        ensure!(waited < limit, "{what}: not within {} s", limit.as_secs());
        thread::sleep(Duration::from_millis(100));
        waited += start.elapsed().min(LONGEST_LOOK);
    }
}

/// The configuration with which a client reaches the API server.
pub(crate) fn kubeconfig() -> &'static Path {
    Path::new(KUBECONFIG)
}

/// Whether systemd is PID 1: it then owns the cgroups, and is the driver of kubelet and runtime.
pub(crate) fn has_systemd() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

/// Writes the configuration of clients.
pub(crate) fn write_kubeconfig(server: &ApiServer) -> Result<()> {
    fs::create_dir_all("/etc/kubernetes")?;
    let kubeconfig = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{ "name": "c", "cluster": { "server": server.api, "insecure-skip-tls-verify": true } }],
        "users": [{ "name": "u", "user": { "token": server.token } }],
        "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
        "current-context": "x",
    });
    Ok(fs::write(KUBECONFIG, kubeconfig.to_string())?)
}

fn write_configuration(
    server: &ApiServer,
    control_plane: Option<&ControlPlane>,
    more: &Value,
) -> Result<()> {
    let systemd = has_systemd();
    fs::create_dir_all("/var/lib/kubelet")?;
    let mut kubelet = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "authentication": { "anonymous": { "enabled": true }, "webhook": { "enabled": false } },
        "authorization": { "mode": "AlwaysAllow" },
        "cgroupDriver": if systemd { "systemd" } else { "cgroupfs" },
        "containerRuntimeEndpoint": format!("unix://{CONTAINERD_SOCKET}"),
        "failSwapOn": false,
        "makeIPTablesUtilChains": false,
        "resolvConf": "",
    });
    if let Some(gate) = &server.gate {
        let (gate, is_on) = gate
            .split_once('=')
            .context("a gate is NAME=true or false")?;
        kubelet["featureGates"] = json!({ gate: is_on == "true" });
    }
    if let Some(control_plane) = control_plane {
        kubelet["systemReserved"] = json!({ "memory": control_plane.memory });
    }
    for (key, value) in more.as_object().into_iter().flatten() {
        kubelet[key] = value.clone();
    }
    Ok(fs::write(
        "/etc/kubernetes/kubelet.yaml",
        kubelet.to_string(),
    )?)
}

fn configure_containerd() -> Result<()> {
    let systemd = has_systemd();
    for directory in ["/etc/containerd", "/etc/cni/net.d", "/var/log"] {
        fs::create_dir_all(directory)?;
    }
    // `containerd github.com/containerd/containerd 1.6.20~ds1 …`
    let version = shell("containerd --version")?;
    let is_old = version
        .split_whitespace()
        .any(|word| word.starts_with("1."));
    let runtime = if is_old {
        "io.containerd.grpc.v1.cri"
    } else {
        "io.containerd.cri.v1.runtime"
    };
    let sandbox = if is_old {
        format!("version = 2\n[plugins.'{runtime}']\n  sandbox_image = '{IMAGE}'\n")
    } else {
        format!(
            "version = 3\n[plugins.'io.containerd.cri.v1.images'.pinned_images]\n  sandbox = '{IMAGE}'\n"
        )
    };
    let containerd = format!(
        "{sandbox}\
         [plugins.'{runtime}'.containerd.runtimes.runc]\n  runtime_type = 'io.containerd.runc.v2'\n\
         [plugins.'{runtime}'.containerd.runtimes.runc.options]\n  SystemdCgroup = {systemd}\n"
    );
    fs::write("/etc/containerd/bellows.toml", containerd)?;
    // Pods use the host's network; the kubelet only wants to see that there is some network.
    let network =
        json!({ "cniVersion": "1.0.0", "name": "lo", "plugins": [{ "type": "loopback" }] });
    fs::write("/etc/cni/net.d/10-lo.conflist", network.to_string())?;
    Ok(())
}

/// Makes an image of one program by hand (a docker archive of one layer) and imports it.
pub(crate) fn import_image(image: &str, program: &Path, entrypoint: &[&str]) -> Result<()> {
    let directory = Path::new("/tmp/image");
    fs::create_dir_all(directory.join("root"))?;
    let name = program.file_name().context("a program has a name")?;
    fs::copy(program, directory.join("root").join(name))?;
    shell("tar -C /tmp/image/root -cf /tmp/image/layer.tar .")?;
    let sum = shell("sha256sum /tmp/image/layer.tar")?;
    let sum = sum
        .split_whitespace()
        .next()
        .context("sha256sum said nothing")?;
    let config = json!({
        "architecture": "amd64",
        "os": "linux",
        "config": { "Entrypoint": entrypoint },
        "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{sum}")] },
    });
    fs::write(directory.join("config.json"), config.to_string())?;
    let manifest =
        json!([{ "Config": "config.json", "RepoTags": [image], "Layers": ["layer.tar"] }]);
    fs::write(directory.join("manifest.json"), manifest.to_string())?;
    shell("tar -C /tmp/image -cf /tmp/image.tar manifest.json config.json layer.tar")?;
    shell("ctr -n k8s.io images import /tmp/image.tar")?;
    fs::remove_dir_all(directory)?;
    Ok(())
}

/// Runs a command line of plain words.
pub(crate) fn shell(line: &str) -> Result<String> {
    let mut words = line.split_whitespace();
    let output = Command::new(words.next().context("an empty command")?)
        .args(words)
        .output()
        .with_context(|| line.to_owned())?;
    ensure!(
        output.status.success(),
        "{line}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
