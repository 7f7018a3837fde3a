//! A control plane for a pod guest: on this machine, or what the guest needs to run one itself.
//!
//! API server and etcd run here, where they do not slow the emulated node down; the guest reaches
//! them through QEMU's user network at 10.0.2.2. Whatever waits for the API there waits less than on
//! a node that carries it, too, so a guest can be given both programs and their arguments instead.
//! The arguments are made here for both: between control planes with different flags, a difference
//! could be the flags'.

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
/// What a guest has more for a control plane of its own: 600 MiB for the API server, 100 MiB for etcd, and room.
pub(crate) const MEMORY_MIB: u32 = 2048;
const KEY: &str = "service-account.key";
const TOKENS: &str = "tokens.csv";
/// What a guest is told to start.
const STARTED: &str = "started.json";

/// Where a control plane keeps its files, and its ports on the loopback of whoever runs it.
struct Place {
    directory: PathBuf,
    client: u16,
    peer: u16,
    port: u16,
}

impl Place {
    /// In a guest, where nobody else has these ports.
    fn in_guest() -> Self {
        Self {
            directory: PathBuf::from("/control-plane"),
            client: 2379,
            peer: 2380,
            port: 6443,
        }
    }

    fn file(&self, name: &str) -> String {
        self.directory.join(name).display().to_string()
    }

    fn client_url(&self) -> String {
        format!("http://127.0.0.1:{}", self.client)
    }

    /// What etcd is told.
    fn etcd(&self) -> Vec<String> {
        let (client, peer) = (self.client_url(), format!("http://127.0.0.1:{}", self.peer));
        vec![
            format!("--data-dir={}", self.file("etcd")),
            format!("--listen-client-urls={client}"),
            format!("--advertise-client-urls={client}"),
            format!("--listen-peer-urls={peer}"),
            format!("--initial-advertise-peer-urls={peer}"),
            format!("--initial-cluster=default={peer}"),
        ]
    }

    /// What the API server is told.
    fn apiserver(&self, gate: Option<&str>) -> Vec<String> {
        let key = self.file(KEY);
        let mut arguments = vec![
            format!("--etcd-servers={}", self.client_url()),
            format!("--secure-port={}", self.port),
            "--bind-address=127.0.0.1".to_owned(),
            "--authorization-mode=RBAC".to_owned(),
            "--service-cluster-ip-range=10.96.0.0/24".to_owned(),
            "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
            "--disable-admission-plugins=ServiceAccount,TaintNodesByCondition".to_owned(),
            format!("--token-auth-file={}", self.file(TOKENS)),
            format!("--service-account-key-file={key}"),
            format!("--service-account-signing-key-file={key}"),
            format!("--cert-dir={}", self.file("certificates")),
        ];
        if let Some(gate) = gate {
            arguments.push(format!("--feature-gates={gate}"));
        }
        arguments
    }
}

/// Writes what an API server signs with, and whom it knows, into a directory.
fn write_credentials(directory: &Path) -> Result<()> {
    let mut openssl = Command::new("openssl");
    openssl.args(["genrsa", "-out"]).arg(directory.join(KEY));
    quiet(openssl.arg("2048"))?;
    let tokens = format!("{TOKEN},bellows,1,system:masters\n");
    Ok(fs::write(directory.join(TOKENS), tokens)?)
}

/// What a guest needs to run a control plane itself.
pub(crate) struct Inside {
    /// Its address there.
    pub(crate) api: String,
    /// Path in the guest, content on this machine.
    pub(crate) files: Vec<(String, PathBuf)>,
}

impl Inside {
    /// Writes it down in a fresh directory.
    pub(crate) fn prepare(binaries: &Binaries, gate: Option<&str>) -> Result<Self> {
        let directory = fresh_directory()?;
        write_credentials(&directory)?;
        let place = Place::in_guest();
        let started = json!({
            "etcd": place.etcd(),
            "kube-apiserver": place.apiserver(gate),
            "memory": format!("{MEMORY_MIB}Mi"),
        });
        fs::write(directory.join(STARTED), started.to_string())?;
        let mut files = vec![
            ("/bin/etcd".to_owned(), binaries.etcd.clone()),
            ("/bin/kube-apiserver".to_owned(), binaries.apiserver.clone()),
        ];
        for name in [KEY, TOKENS, STARTED] {
            files.push((place.file(name), directory.join(name)));
        }
        Ok(Self {
            api: format!("https://127.0.0.1:{}", place.port),
            files,
        })
    }
}

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

/// The same, with nothing of another run in it.
fn fresh_directory() -> Result<PathBuf> {
    let directory = directory()?;
    drop(fs::remove_dir_all(&directory));
    fs::create_dir_all(&directory)?;
    Ok(directory)
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
        let directory = fresh_directory()?;
        let [client, peer, port] = free_ports()?;
        let place = Place {
            directory,
            client,
            peer,
            port,
        };
        let directory = &place.directory;
        write_credentials(directory)?;
        let log = |name: &str| File::create(directory.join(name));
        let mut command = Command::new(&binaries.etcd);
        // What it waits for this machine's disk says nothing of a node.
        command.args(place.etcd()).arg("--unsafe-no-fsync");
        let running_etcd =
            Service::spawn(&mut command, log("etcd.log")?).context("cannot run etcd")?;
        let mut command = Command::new(&binaries.apiserver);
        command.args(place.apiserver(gate));
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
            authority: directory.join("certificates/apiserver.crt"),
            services,
        };
        listen(listener, Arc::downgrade(&control.services));
        control.wait_ready(directory)?;
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
