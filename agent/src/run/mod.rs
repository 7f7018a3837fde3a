//! `bellows run`: the agent of one node.
//!
//! Composition: a parent that releases ([`supervisor`]) starts the agent. There, what a predecessor
//! left is released; the kernel programs, the reflex and the
//! controller start; then the pods of this node are watched in the API, or its containers in their runtime, and
//! those that are to be guarded are handed to the controller. The controller lives on a thread of its own and never
//! waits for the API or the runtime.

mod api;
mod containers;
mod events;
mod hands;
mod lock;
mod pods;
mod restore;
pub mod supervisor;

use std::{
    collections::BTreeMap,
    env,
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{
        Arc, LazyLock,
        atomic::AtomicBool,
        mpsc::{self, Receiver, SyncSender},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use bellows_core::{Actuation, CgroupId, Nanos, Signals, elastic::ElasticPolicy};
use kube::Client;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use thiserror::Error;
use tokio::{
    runtime::{self, Handle},
    signal::unix::{SignalKind, signal},
};

pub use lock::release_after_agents;
pub use pods::uninstall;
pub use restore::restore;

use crate::{
    actuate::{
        pod::PodRecords, pod_cpu::CpuResizer, reflex::Reflex, requests::RequestResizer,
        resize::Resizer, update::Updater,
    },
    attribution::CGROUP_ROOT,
    cri::{self, Runtime, RuntimeError},
    doctor::{self, hooks},
    explain::LEDGER,
    guard::{self, Controller, Input, Report, Requester},
    ledger::Ledger,
    machine::online_cpus,
    metrics::METRICS,
    nri,
    originals::Records,
    policies::{self, PolicyFileError},
    quota::{Quotas, Setter},
    recover::recover,
    serve::{Served, serve},
    signal::{
        files::Files,
        programs::{Kernel, LoadError, Purpose, Reflexes},
        source::Source,
    },
    state,
};
use containers::cpu::is_young;
use hands::{Hands, MADE};
use lock::AgentLock;
use pods::{Leaving, Movers};

/// What `bellows run` is asked to do.
#[derive(Clone, Debug)]
pub struct Options {
    /// Whose containers are guarded.
    pub of: Of,
    /// Where metrics are served, if anywhere.
    pub metrics: Option<SocketAddr>,
    /// Where it is told whether the agent is alive, if anywhere.
    pub health: Option<SocketAddr>,
    /// Works from cgroup files, without even trying to load kernel programs.
    pub without_bpf: bool,
}

/// Whose containers are guarded, and who is asked for their limits.
#[derive(Clone, Debug)]
pub enum Of {
    /// A node's pods, which opt in by policies and annotations; the Kubernetes API is asked.
    Node {
        /// Its name.
        name: String,
        /// Quiet time after which a raised limit is lowered again.
        shrink_after: Nanos,
        /// Whether nothing is changed, whatever policies and annotations say.
        only_observes: bool,
        /// Whether memory requests may be changed where a policy asks for it.
        moves_requests: bool,
        /// Whether heaps may be sized where a policy asks for it.
        sizes_heaps: bool,
        /// The DaemonSet with whose end limits are given back.
        daemon_set: Option<String>,
    },
    /// What policies select; the container runtime is asked.
    Machine {
        /// The file with the policies.
        policies: PathBuf,
        /// The runtime's socket; looked for if it is not named.
        endpoint: Option<PathBuf>,
    },
}

/// Why the agent cannot run.
#[derive(Debug, Error)]
pub enum RunError {
    /// The policies.
    #[error(transparent)]
    Policies(#[from] PolicyFileError),
    /// The container runtime.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// Not root.
    #[error(
        "bellows run needs root, for cgroups and BPF: run it as root (sudo); in a cluster, install the chart"
    )]
    NotRoot,
    /// Another agent guards this node.
    #[error("another `bellows run` guards this node already: stop it first, or leave it alone")]
    AnotherAgent,
    /// The API is not configured.
    #[error(
        "no Kubernetes API to talk to ({0}): run in a pod with a service account, or set KUBECONFIG"
    )]
    Config(#[source] kube::config::InferConfigError),
    /// The API client cannot be made.
    #[error(
        "cannot talk to the Kubernetes API: {0}; look at KUBECONFIG, or at the pod's service account"
    )]
    Client(#[from] kube::Error),
    /// A map of the kernel programs.
    #[error(transparent)]
    Kernel(#[from] LoadError),
    /// Something of the operating system.
    #[error("{0}: {1}; `bellows doctor` tells what works on this machine")]
    System(&'static str, std::io::Error),
    /// A part of the agent ended by itself.
    #[error("{0} has ended; the agent stops, so that it is started again")]
    Ended(&'static str),
}

/// What may be changed of a node's pods, whatever policies and annotations say.
#[derive(Clone, Copy)]
struct Changes {
    only_observes: bool,
    moves_requests: bool,
    sizes_heaps: bool,
}

/// What the time of a resize is taken for before one was measured (90th percentile of 60 resizes
/// of an emulated 1.37 node; native ones are faster).
const ASSUMED_P95: Nanos = Nanos::millis(1500);
/// The same of an update by the runtime, its pod's limit included (0.35 to 0.8 s on an emulated machine).
const ASSUMED_UPDATE_P95: Nanos = Nanos::millis(1000);

/// The agent itself: runs until SIGTERM or SIGINT; brakes and holds are lifted then, limits stay, unless nobody comes
/// after it.
///
/// # Errors
///
/// [`RunError`]; its text says what to do.
pub fn run(options: &Options) -> Result<(), RunError> {
    let ledger_path = PathBuf::from(LEDGER);
    if !rustix::process::geteuid().is_root() {
        return Err(RunError::NotRoot);
    }
    let _lock = AgentLock::take()
        .map_err(|error| RunError::System("cannot lock /run/bellows", error))?
        .ok_or(RunError::AnotherAgent)?;
    // First of all: somebody may stand still.
    let recovered =
        recover(&ledger_path).map_err(|error| RunError::System("cannot read the ledger", error))?;
    tracing::info!(?recovered, "released what a predecessor held");
    allow_files();
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| RunError::System("cannot start the runtime", error))?;
    // Made now: the reflex must not wait for that.
    LazyLock::force(&METRICS);
    state::keep_reserve();
    if let Some(address) = options.metrics {
        runtime.spawn(serve(address, Served::Metrics));
    }
    let mut leaving = None;
    let mut knows = Arc::new(AtomicBool::new(true));
    let (inputs, controller, watch) = match &options.of {
        Of::Node {
            name,
            shrink_after,
            only_observes,
            moves_requests,
            sizes_heaps,
            daemon_set,
        } => {
            let client = runtime.block_on(async {
                let config = api::config().await?;
                Ok::<_, RunError>(Client::try_from(config)?)
            })?;
            let node = Fast::start(options, &ledger_path)?.of_node(
                client.clone(),
                runtime.handle(),
                name,
                *shrink_after,
                Changes {
                    only_observes: *only_observes,
                    moves_requests: *moves_requests,
                    sizes_heaps: *sizes_heaps,
                },
            )?;
            leaving = daemon_set.clone().map(|daemon_set| Leaving {
                client,
                node: name.clone(),
                daemon_set,
                movers: node.movers,
            });
            knows = node.knows;
            node.running
        }
        Of::Machine { policies, endpoint } => {
            let read = policies::read(policies)?;
            let socket = endpoint.clone().map_or_else(cri::find_socket, Ok)?;
            let _context = runtime.enter();
            let containers = Runtime::at(&socket)?;
            let fast = Fast::start(options, &ledger_path)?;
            fast.of_machine(containers, runtime.handle(), policies, read)?
        }
    };
    if let Some(address) = options.health {
        runtime.spawn(serve(address, Served::Health(inputs.clone(), knows)));
    }
    let result = runtime.block_on(until_stopped(watch));
    if inputs.send(Input::Stop).is_err() || controller.join().is_err() {
        return result.and(Err(RunError::Ended("the controller")));
    }
    if let (Ok(()), Some(leaving)) = (&result, leaving) {
        runtime.block_on(leaving.leave());
    }
    result
}

type Watch = Pin<Box<dyn Future<Output = ()>>>;
/// The agent of a node's pods.
struct Node {
    running: (SyncSender<Input>, Running, Watch),
    movers: Movers,
    /// Whether it is known which pods there are.
    knows: Arc<AtomicBool>,
}

type Running = JoinHandle<BTreeMap<CgroupId, Report>>;

/// What reacts at once, before anybody is asked: programs, reflex and ledger.
struct Fast {
    kernel: Option<Kernel>,
    reflex: Reflex,
    ledger: Ledger,
    inputs: SyncSender<Input>,
    receiver: Receiver<Input>,
    signals: Signals,
    cpus: u64,
}

impl Fast {
    fn start(options: &Options, ledger: &Path) -> Result<Self, RunError> {
        let (kernel, source) = signals(options)?;
        let signals = source.signals();
        let ledger = open_ledger(ledger)?;
        let (inputs, receiver) = mpsc::sync_channel(guard::INPUTS);
        let another = ledger
            .another()
            .map_err(|error| RunError::System("cannot open the ledger", error))?;
        let reflex = Reflex::start(source, another, guard::sink(inputs.clone()))
            .map_err(|error| RunError::System("cannot start the reflex thread", error))?;
        Ok(Self {
            kernel,
            reflex,
            ledger,
            inputs,
            receiver,
            signals,
            cpus: online_cpus(),
        })
    }

    /// Starts the controller, which asks for limits through `requester`.
    fn control<R: Requester + Send + 'static>(self, requester: R) -> Result<Running, RunError> {
        let inputs = (self.inputs, self.receiver);
        let controller = Controller::new(self.kernel, self.reflex, self.ledger, inputs, requester);
        thread::Builder::new()
            .name("controller".to_owned())
            .spawn(move || controller.run())
            .map_err(|error| RunError::System("cannot start the controller thread", error))
    }

    fn start_quotas(&mut self, setter: impl Setter) -> Result<Quotas, RunError> {
        // Without the programs counters are looked at.
        let told = match &mut self.kernel {
            Some(kernel) => (kernel.take_throttles()?, kernel.take_starts()?),
            None => (None, None),
        };
        Quotas::start(told, setter, self.cpus, PathBuf::from(CGROUP_ROOT))
            .map_err(|error| RunError::System("cannot start the quotas thread", error))
    }

    fn of_node(
        self,
        client: Client,
        tasks: &Handle,
        node: &str,
        shrink_after: Nanos,
        changes: Changes,
    ) -> Result<Node, RunError> {
        let inputs = self.inputs.clone();
        let (told, observed) = tokio::sync::mpsc::unbounded_channel();
        let resizer = Resizer::new(client.clone(), tasks.clone(), inputs.clone(), told);
        let mut fast = self;
        let (made, receiver) = tokio::sync::mpsc::channel(MADE);
        let cpus = CpuResizer::new(client.clone(), tasks.clone(), resizer.clone());
        let hands = Hands {
            owner: cpus.clone(),
            made,
            // Nothing of memory is lent to pods.
            lent: Arc::default(),
        };
        let quotas = fast.start_quotas(hands)?;
        cpus.tells(quotas.clone());
        let movers = Movers {
            quotas: quotas.clone(),
            cpus: cpus.clone(),
            resizer: resizer.clone(),
        };
        let told = changes.sizes_heaps.then(|| {
            let (policies, policies_now) = tokio::sync::watch::channel(Vec::new());
            let (pods, pods_now) = tokio::sync::watch::channel(nri::PodRooms::new());
            let known = nri::Known::Pods(pods_now);
            tasks.spawn(nri::serve(policies_now, known, PathBuf::from(nri::SOCKET)));
            nri::Told { policies, pods }
        });
        let knows = Arc::<AtomicBool>::default();
        let context = pods::Context {
            told,
            knows: Arc::clone(&knows),
            requests: RequestResizer::new(resizer.clone()),
            client,
            node: node.to_owned(),
            inputs: inputs.clone(),
            resizer: resizer.clone(),
            cpus,
            quotas,
            made: receiver,
            actuation: Actuation::Requested { p95: ASSUMED_P95 },
            signals: fast.signals,
            shrink_after,
            only_observes: changes.only_observes,
            moves_requests: changes.moves_requests,
            observed,
        };
        let watch: Watch = Box::pin(pods::watch(context));
        Ok(Node {
            running: (inputs, fast.control(resizer)?, watch),
            movers,
            knows,
        })
    }

    fn of_machine(
        self,
        containers: Runtime,
        tasks: &Handle,
        policies: &Path,
        read: Vec<ElasticPolicy>,
    ) -> Result<(SyncSender<Input>, Running, Watch), RunError> {
        let inputs = self.inputs.clone();
        let updater = Updater::new(
            containers,
            tasks.clone(),
            inputs.clone(),
            Records::containers(),
        );
        let mut fast = self;
        let (made, receiver) = tokio::sync::mpsc::channel(MADE);
        let lent = Arc::default();
        let hands = Hands {
            owner: updater.clone(),
            made,
            lent: Arc::clone(&lent),
        };
        let quotas = fast.start_quotas(hands)?;
        let (told, policies_now) = tokio::sync::watch::channel(read.clone());
        let context = containers::Context {
            told,
            updater: updater.clone(),
            quotas,
            policies: policies.to_owned(),
            inputs: inputs.clone(),
            actuation: Actuation::Requested {
                p95: ASSUMED_UPDATE_P95,
            },
            signals: fast.signals,
            pods: PodRecords {
                limits: Records::pods(),
                quotas: Records::pod_quotas(),
            },
            made: receiver,
            lent,
        };
        let watch = containers::watch(context, read);
        let known = nri::Known::Policies;
        tasks.spawn(nri::serve(policies_now, known, PathBuf::from(nri::SOCKET)));
        Ok((inputs, fast.control(updater)?, Box::pin(watch)))
    }
}

/// Lets this process have enough open files for as many containers as the programs can watch: each takes
/// ten, and one more for every container that inherits its limit. The usual 1,024 last for 100.
fn allow_files() {
    const WANTED: u64 = 65_536;
    let before = getrlimit(Resource::Nofile);
    let allow = |maximum| {
        let current = maximum;
        setrlimit(Resource::Nofile, Rlimit { current, maximum })
    };
    // `None` is no limit at all. More than the maximum needs CAP_SYS_RESOURCE.
    let more = before.maximum.map(|maximum| maximum.max(WANTED));
    if let Err(error) = allow(more).or_else(|_refused| allow(before.maximum)) {
        tracing::warn!(%error, ?before, "the number of open files limits how many containers are guarded");
    }
}

/// How often the kernel programs are tried. What is decided here holds for the agent's life, and a predecessor's
/// programs may be on their way off the same functions.
const TRIES: u32 = 3;
const TRY_AGAIN: Duration = Duration::from_millis(500);

/// The kernel programs, or cgroup files on a node that does not take them: a node agent that is late is
/// better than none.
fn signals(options: &Options) -> Result<(Option<Kernel>, Source), RunError> {
    if !options.without_bpf {
        for attempt in 1..=TRIES {
            if attempt > 1 {
                thread::sleep(TRY_AGAIN);
            }
            match programs() {
                Ok((kernel, reflexes)) => {
                    return Ok((Some(kernel), Source::Programs(Box::new(reflexes))));
                }
                Err(why) => tracing::warn!(attempt, why, "the kernel programs do not work"),
            }
        }
        tracing::warn!(
            "working from cgroup files: containers are braked at 90 % of their limit; `bellows doctor` tells what is missing"
        );
    }
    let files = Files::new().map_err(|error| RunError::System("cannot watch files", error))?;
    Ok((None, Source::Files(files)))
}

/// The kernel programs, if they see anything.
fn programs() -> Result<(Kernel, Reflexes), String> {
    let (mut kernel, mut reflexes) =
        Kernel::load(Purpose::Guard).map_err(|error| error.to_string())?;
    let tried = hooks::self_test(&mut kernel, &mut reflexes.guards);
    match tried.verdict {
        doctor::Verdict::Missing => {
            return Err(format!("the growth hook sees nothing: {}", tried.found));
        }
        doctor::Verdict::Limited => {
            tracing::warn!(found = tried.found, lost = tried.lost, "growth hook");
        }
        doctor::Verdict::Works => {}
    }
    Ok((kernel, reflexes))
}

fn open_ledger(path: &Path) -> Result<Ledger, RunError> {
    Ledger::open(path)
        .map_err(|error| RunError::System("cannot open the ledger in /run/bellows", error))
}

async fn until_stopped(watch: Watch) -> Result<(), RunError> {
    let install =
        |kind| signal(kind).map_err(|error| RunError::System("cannot take signals", error));
    let (mut term, mut int) = (
        install(SignalKind::terminate())?,
        install(SignalKind::interrupt())?,
    );
    tokio::select! {
        () = watch => Err(RunError::Ended("the watch of pods or containers")),
        _ = term.recv() => Ok(()),
        _ = int.recv() => Ok(()),
    }
}

/// The node's name where the command line has none.
#[must_use]
pub fn node_from_environment() -> Option<String> {
    env::var("NODE_NAME").ok().filter(|name| !name.is_empty())
}

#[expect(clippy::needless_pass_by_value, reason = "what `map_err` calls")]
fn text(error: impl ToString) -> String {
    error.to_string()
}
