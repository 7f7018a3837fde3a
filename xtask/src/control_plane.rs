//! A control plane on this machine, for a pod guest.
//!
//! API server and etcd run here, where they do not slow the emulated node down; the guest reaches
//! them through QEMU's user network at 10.0.2.2.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;

use crate::{
    kubernetes::{Binaries, Controllers},
    root,
    shell::{quiet, step, tail},
};

/// What the guest's agent, kubelet and bench authenticate with; the API server lives for one run.
pub(crate) const TOKEN: &str = "bellows-test";

/// A process that ends with its owner.
struct Service(Child);

impl Service {
    /// Starts one that prints into a log.
    fn spawn(command: &mut Command, log: File) -> std::io::Result<Self> {
        command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        command.spawn().map(Self)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        // One that has ended already needs neither.
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Where they print to, and keep what they have.
fn directory() -> Result<PathBuf> {
    Ok(root()?.join("target/guests/control-plane"))
}

/// A running API server and its etcd; both end when it is dropped.
pub(crate) struct ControlPlane {
    /// The port on this machine's loopback.
    pub(crate) port: u16,
    /// The port where a guest may have both stopped and started.
    pub(crate) control: u16,
    /// Who vouches for the API server.
    pub(crate) authority: PathBuf,
    services: Arc<Mutex<Services>>,
}

struct Services {
    start_apiserver: Command,
    // Dropped in this order.
    controllers: Vec<Service>,
    apiserver: Service,
    etcd: Service,
}

impl Services {
    /// Does what a guest asks for.
    fn act(&mut self, what: &str) -> Result<()> {
        match what {
            "stop apiserver" => {
                self.apiserver.0.kill()?;
                self.apiserver.0.wait()?;
                Ok(())
            }
            "start apiserver" => {
                self.apiserver = Service(self.start_apiserver.spawn()?);
                Ok(())
            }
            "pause etcd" => signal(&self.etcd.0, "STOP"),
            "resume etcd" => signal(&self.etcd.0, "CONT"),
            other => bail!("`{other}` is nothing that can be done"),
        }
    }
}

fn signal(process: &Child, name: &str) -> Result<()> {
    let process = process.id().to_string();
    quiet(Command::new("kill").args(["-s", name, &process]))
}

/// Does what guests ask for, one line a connection, until this process ends.
fn listen(listener: TcpListener, services: Weak<Mutex<Services>>) {
    let answer = move |stream: TcpStream| -> Result<bool> {
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        let Some(services) = services.upgrade() else {
            return Ok(false);
        };
        let done = services
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .act(line.trim());
        let done = done.map_or_else(|error| format!("{error:#}"), |()| "done".to_owned());
        (&stream).write_all(done.as_bytes())?;
        Ok(true)
    };
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            match answer(stream) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => eprintln!("control plane: {error:#}"),
            }
        }
    });
}

impl ControlPlane {
    /// Starts both in a fresh directory and waits until the API server is ready.
    pub(crate) fn start(binaries: &Binaries, gate: Option<&str>) -> Result<Self> {
        step("start etcd and kube-apiserver", || {
            Self::started(binaries, gate)
        })
    }

    fn started(binaries: &Binaries, gate: Option<&str>) -> Result<Self> {
        let directory = directory()?;
        drop(fs::remove_dir_all(&directory));
        fs::create_dir_all(&directory)?;
        let [client, peer, port] = free_ports()?;
        let etcd = format!("http://127.0.0.1:{client}");
        let peer = format!("http://127.0.0.1:{peer}");
        let log = |name: &str| File::create(directory.join(name));
        let mut command = Command::new(&binaries.etcd);
        command
            .arg("--data-dir")
            .arg(directory.join("etcd"))
            .args([
                "--unsafe-no-fsync",
                "--listen-client-urls",
                &etcd,
                "--advertise-client-urls",
                &etcd,
            ])
            .args([
                "--listen-peer-urls",
                &peer,
                "--initial-advertise-peer-urls",
                &peer,
            ])
            .args(["--initial-cluster", &format!("default={peer}")]);
        let running_etcd =
            Service::spawn(&mut command, log("etcd.log")?).context("cannot run etcd")?;
        let key = directory.join("service-account.key");
        quiet(
            Command::new("openssl")
                .args(["genrsa", "-out"])
                .arg(&key)
                .arg("2048"),
        )?;
        let certificates = directory.join("certificates");
        let tokens = directory.join("tokens.csv");
        fs::write(&tokens, format!("{TOKEN},bellows,1,system:masters\n"))?;
        let mut command = Command::new(&binaries.apiserver);
        command
            .args([
                &format!("--etcd-servers={etcd}"),
                &format!("--secure-port={port}"),
                "--bind-address=127.0.0.1",
            ])
            .args([
                "--authorization-mode=RBAC",
                "--service-cluster-ip-range=10.96.0.0/24",
            ])
            .args(["--service-account-issuer=https://kubernetes.default.svc"])
            .args(["--disable-admission-plugins=ServiceAccount,TaintNodesByCondition"])
            .arg(format!("--token-auth-file={}", tokens.display()))
            .arg(format!("--service-account-key-file={}", key.display()))
            .arg(format!(
                "--service-account-signing-key-file={}",
                key.display()
            ))
            .arg(format!("--cert-dir={}", certificates.display()));
        if let Some(gate) = gate {
            command.arg(format!("--feature-gates={gate}"));
        }
        let apiserver = Service::spawn(&mut command, log("kube-apiserver.log")?)
            .context("cannot run kube-apiserver")?;
        let services = Arc::new(Mutex::new(Services {
            start_apiserver: command,
            controllers: Vec::new(),
            apiserver,
            etcd: running_etcd,
        }));
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let control = Self {
            port,
            control: listener.local_addr()?.port(),
            authority: certificates.join("apiserver.crt"),
            services,
        };
        listen(listener, Arc::downgrade(&control.services));
        control.wait_ready(&directory)?;
        Ok(control)
    }

    /// Starts a scheduler and a controller manager beside it; they end with it.
    pub(crate) fn control(&self, binaries: &Controllers) -> Result<()> {
        step("start kube-scheduler and kube-controller-manager", || {
            let directory = directory()?;
            let kubeconfig = directory.join("kubeconfig");
            let server = format!("https://127.0.0.1:{}", self.port);
            let text = json!({
                "apiVersion": "v1",
                "kind": "Config",
                "clusters": [{ "name": "c", "cluster": { "server": server, "insecure-skip-tls-verify": true } }],
                "users": [{ "name": "u", "user": { "token": TOKEN } }],
                "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
                "current-context": "x",
            });
            fs::write(&kubeconfig, text.to_string())?;
            for (component, name) in [
                (&binaries.scheduler, "kube-scheduler"),
                (&binaries.manager, "kube-controller-manager"),
            ] {
                let mut command = Command::new(component);
                // There is one of each, which nobody asks anything.
                command
                    .arg(format!("--kubeconfig={}", kubeconfig.display()))
                    .args(["--leader-elect=false", "--secure-port=0"]);
                let log = File::create(directory.join(format!("{name}.log")))?;
                let service = Service::spawn(&mut command, log)
                    .with_context(|| format!("cannot run {name}"))?;
                let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
                services.controllers.push(service);
            }
            Ok(())
        })
    }

    fn wait_ready(&self, directory: &Path) -> Result<()> {
        let url = format!("https://127.0.0.1:{}/readyz", self.port);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(90) {
            let mut probe = Command::new("curl");
            probe.args([
                "--silent",
                "--insecure",
                "--fail",
                "--max-time",
                "5",
                "--header",
            ]);
            probe
                .arg(format!("Authorization: Bearer {TOKEN}"))
                .arg(&url);
            if quiet(&mut probe).is_ok() {
                return Ok(());
            }
            let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
            ensure!(
                services.apiserver.0.try_wait()?.is_none(),
                "kube-apiserver has ended:\n{}",
                log_tail(directory)
            );
            drop(services);
            thread::sleep(Duration::from_millis(200));
        }
        bail!(
            "kube-apiserver is not ready after 90 s:\n{}",
            log_tail(directory)
        )
    }
}

fn log_tail(directory: &Path) -> String {
    let read = |name: &str| fs::read_to_string(directory.join(name)).unwrap_or_default();
    format!(
        "{}\n{}",
        tail(&read("kube-apiserver.log"), 30),
        tail(&read("etcd.log"), 10)
    )
}

/// Ports of the loopback interface that are free now.
fn free_ports() -> Result<[u16; 3]> {
    let listeners = [(); 3].map(|()| TcpListener::bind("127.0.0.1:0"));
    let mut ports = [0; 3];
    for (port, listener) in ports.iter_mut().zip(&listeners) {
        *port = listener
            .as_ref()
            .map_err(|error| anyhow::anyhow!("no free port: {error}"))?
            .local_addr()?
            .port();
    }
    Ok(ports)
}
