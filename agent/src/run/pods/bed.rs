//! A watch of pods whose API server takes every question and answers none: what waits for it must hold up nobody.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicU64, mpsc::sync_channel},
};

use bellows_core::{
    Actuation, Bytes, CgroupId, Nanos, Signals,
    pod::{self, MAX_MEMORY, MODE, ORIGINAL, Wish, way::Way},
};
use kube::Client;
use serde_json::json;
use tokio::{
    net::TcpListener,
    runtime::Handle,
    sync::mpsc::{UnboundedReceiver, channel, unbounded_channel},
};

use super::{
    Context, Key, Known, Watch,
    allowances::Allowed,
    autoscalers::Autoscalers,
    conditions::Conditions,
    give_back::GivingBack,
    policies::Policies,
    recordings::{Recorded, Recordings},
    requests::Requests,
    starts::Early,
};
use crate::{
    actuate::{
        pod_cpu::CpuResizer,
        requests::RequestResizer,
        resize::{Order, Resizer, Target},
    },
    attribution::api::Pod,
    cgroup::Cgroup,
    quota::Quotas,
    run::{
        events::Events,
        hands::{Hands, Lent},
    },
};

/// Of a container of the pod.
pub(super) fn key(name: &str) -> Key {
    ("0f8c".to_owned(), name.to_owned())
}

const CGROUP: CgroupId = CgroupId(1);

pub(super) struct Bed {
    pub(super) watch: Watch,
    _silent: TcpListener,
    _ended: UnboundedReceiver<Recorded>,
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.watch.context.quotas.stop();
    }
}

fn context(client: &Client) -> Context {
    let (inputs, _controller) = sync_channel(1);
    let (observed, watched) = unbounded_channel();
    let tasks = Handle::current();
    let resizer = Resizer::new(client.clone(), tasks.clone(), inputs.clone(), observed);
    let cpus = CpuResizer::new(client.clone(), tasks, resizer.clone());
    let (made, receiver) = channel(1);
    let hands = Hands {
        owner: cpus.clone(),
        made,
        lent: Arc::<Lent>::default(),
    };
    Context {
        client: client.clone(),
        node: "node".to_owned(),
        inputs,
        requests: RequestResizer::new(resizer.clone()),
        resizer,
        cpus,
        quotas: Quotas::start((None, None), hands, 1, PathBuf::from("/nowhere")).unwrap(),
        made: receiver,
        actuation: Actuation::Requested {
            p95: Nanos::millis(500),
        },
        signals: Signals::Programs,
        shrink_after: Nanos::millis(1000),
        only_observes: false,
        moves_requests: false,
        knows: Arc::default(),
        told: None,
        observed: watched,
    }
}

impl Bed {
    pub(super) async fn new() -> Self {
        let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", silent.local_addr().unwrap());
        let client = Client::try_from(kube::Config::new(address.parse().unwrap())).unwrap();
        let context = context(&client);
        let conditions = Conditions::new(client.clone(), "node".to_owned());
        let (ended, _ended) = unbounded_channel();
        let (requests, _) = unbounded_channel();
        let watch = Watch {
            events: Events::new(client, "node"),
            allowed: Allowed::new(context.resizer.allowances().clone()),
            context,
            policies: Policies::with(conditions),
            autoscalers: Autoscalers::none(),
            seen_horizontal: BTreeMap::new(),
            pods: BTreeMap::new(),
            known: BTreeMap::new(),
            pending: BTreeSet::new(),
            retried: String::new(),
            giving_back: GivingBack::default(),
            watched: BTreeMap::new(),
            originals: BTreeMap::new(),
            orders: BTreeMap::new(),
            is_any_left: Arc::default(),
            lowering: None,
            asking: None,
            way_found: unbounded_channel().0,
            is_listed: false,
            begun: unbounded_channel().0,
            starting: BTreeMap::new(),
            early: Early::default(),
            recordings: Recordings::new(ended),
            cpus: BTreeMap::new(),
            cpu_refused: BTreeMap::new(),
            requests: Requests::new(Path::new("/nowhere"), requests, Arc::<AtomicU64>::default()),
        };
        Self {
            watch,
            _silent: silent,
            _ended,
        }
    }

    /// The limit of the pod's container was set to this by somebody else.
    pub(super) fn sees(&mut self, limit: &str) {
        self.sees_of("Act", limit, "kubectl");
    }

    /// The limit of the pod's container, in a mode, was set to this by somebody.
    pub(super) fn sees_of(&mut self, mode: &str, limit: &str, manager: &str) {
        let limits = json!({ "memory": limit });
        let annotations = json!({ MODE: mode, MAX_MEMORY: "1Gi", ORIGINAL: "app=64Mi" });
        let own = json!({ "f:resources": { "f:limits": { "f:memory": {} } } });
        let fields = json!({ "f:spec": { "f:containers": { r#"k:{"name":"app"}"#: own } } });
        let pod = json!({
            "metadata": {
                "name": "workspace", "namespace": "dev", "uid": "0f8c", "annotations": annotations,
                "managedFields": [{ "manager": manager, "fieldsV1": fields }],
            },
            "spec": { "containers": [{ "name": "app", "resources": { "limits": limits } }] },
            "status": { "phase": "Running", "containerStatuses": [{
                "name": "app", "containerID": "containerd://1f", "state": { "running": {} }, "resources": {},
            }] },
        });
        let pod: Pod = serde_json::from_value(pod).unwrap();
        self.watch.pods.insert("0f8c".to_owned(), pod);
    }

    pub(super) fn wish(&self) -> (Pod, pod::Pod, Wish) {
        let pod = self.watch.pods["0f8c"].clone();
        let seen = self.watch.seen(&pod);
        let wish = pod::all_wishes(&seen, &[]).remove("app").unwrap().unwrap();
        (pod, seen, wish)
    }

    pub(super) fn is_guarded(&mut self) {
        let (_, seen, wish) = self.wish();
        let own = Known {
            mode: wish.mode,
            cgroup: Some(CGROUP),
            containers: wish.running.clone(),
            policy: Some(self.watch.policy(&wish).unwrap()),
            ..Known::default()
        };
        self.watch.known.insert(key("app"), own);
        let cgroup = Cgroup::stand_in(Path::new("/nowhere"), CGROUP);
        let at_rest = (wish.rest, Way::Resize);
        let target = Target::new(&seen, &wish, cgroup, at_rest, Order::default());
        let targets = self.watch.context.resizer.targets();
        targets.with(|targets| targets.insert(CGROUP, target));
    }

    /// Follows what it sees; returns the limit that may be changed.
    pub(super) fn follows(&mut self) -> Option<String> {
        let (pod, seen, wish) = self.wish();
        self.watch.guard(&key("app"), &pod, &seen, &wish).unwrap();
        self.limit()
    }

    /// The limit that may be changed.
    pub(super) fn limit(&self) -> Option<String> {
        let targets = self.watch.context.resizer.targets();
        let limit = targets.of(CGROUP, |target| {
            target.is_recorded.then(|| target.limit.clone())
        });
        limit.unwrap()
    }

    /// Sets what it was raised to by hand; returns what that was before.
    pub(super) fn raised_by_hand(&self, to: Option<Bytes>) -> Option<Bytes> {
        let targets = self.watch.context.resizer.targets();
        let before = targets.of(CGROUP, |target| std::mem::replace(&mut target.by_hand, to));
        before.unwrap()
    }
}
