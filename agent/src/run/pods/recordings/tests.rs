use std::{
    path::{Path, PathBuf},
    sync::{atomic::AtomicU64, mpsc::sync_channel},
};

use bellows_core::{
    Actuation, Bytes, CgroupId, Nanos, Signals,
    pod::{MAX_MEMORY, MODE, ORIGINAL, Wish, way::Way},
};
use kube::Client;
use serde_json::json;
use tokio::{
    net::TcpListener,
    runtime::Handle,
    sync::mpsc::{UnboundedReceiver, channel, unbounded_channel},
};

use super::*;
use crate::{
    actuate::{
        pod_cpu::CpuResizer,
        requests::RequestResizer,
        resize::{Order, Resizer, Target},
    },
    cgroup::Cgroup,
    quota::Quotas,
    run::{
        events::Events,
        hands::{Hands, Lent},
        pods::{
            Context, Known, allowances::Allowed, autoscalers::Autoscalers, conditions::Conditions,
            policies::Policies, requests::Requests, starts::Early,
        },
    },
};

fn key(name: &str) -> Key {
    ("0f8c".to_owned(), name.to_owned())
}

#[tokio::test]
async fn one_of_a_pod_is_under_way_and_a_refused_one_waits_for_a_change() {
    let (ended, _) = unbounded_channel();
    let mut recordings = Recordings::new(ended);
    let version = |text: &str| Some(text.to_owned());
    let (first, second) = (version("1"), version("2"));
    assert!(recordings.begins(&key("app"), first.as_ref()));
    assert!(!recordings.begins(&key("side"), first.as_ref()));
    let ends = |recordings: &mut Recordings, name, version: &Option<String>, is_refused| {
        recordings.running.clear();
        recordings.ends(&key(name), version.clone(), is_refused);
    };
    ends(&mut recordings, "app", &first, true);
    assert!(recordings.is_refused(&key("app")));
    // Not again for the same pod; another container's may.
    assert!(!recordings.begins(&key("app"), first.as_ref()));
    assert!(recordings.begins(&key("side"), first.as_ref()));
    ends(&mut recordings, "side", &first, false);
    assert!(!recordings.is_refused(&key("side")));
    assert!(recordings.begins(&key("app"), second.as_ref()));
    ends(&mut recordings, "app", &second, true);
    recordings.try_again();
    assert!(recordings.is_refused(&key("app")));
    assert!(recordings.begins(&key("app"), second.as_ref()));
    recordings.forget("0f8c");
    assert!(recordings.running.is_empty());
    assert!(!recordings.is_refused(&key("app")));
}

const CGROUP: CgroupId = CgroupId(1);

/// A watch of pods whose API server takes every question and answers none.
struct Bed {
    watch: Watch,
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
    async fn new() -> Self {
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
            autoscalers: Autoscalers::default(),
            seen_horizontal: BTreeMap::new(),
            pods: BTreeMap::new(),
            known: BTreeMap::new(),
            pending: BTreeSet::new(),
            retried: String::new(),
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
    fn sees(&mut self, limit: &str) {
        let limits = json!({ "memory": limit });
        let annotations = json!({ MODE: "Act", MAX_MEMORY: "1Gi", ORIGINAL: "app=64Mi" });
        let own = json!({ "f:resources": { "f:limits": { "f:memory": {} } } });
        let fields = json!({ "f:spec": { "f:containers": { r#"k:{"name":"app"}"#: own } } });
        let pod = json!({
            "metadata": {
                "name": "workspace", "namespace": "dev", "uid": "0f8c", "annotations": annotations,
                "managedFields": [{ "manager": "kubectl", "fieldsV1": fields }],
            },
            "spec": { "containers": [{ "name": "app", "resources": { "limits": limits } }] },
        });
        let pod: Pod = serde_json::from_value(pod).unwrap();
        self.watch.pods.insert("0f8c".to_owned(), pod);
    }

    fn wish(&self) -> (Pod, pod::Pod, Wish) {
        let pod = self.watch.pods["0f8c"].clone();
        let seen = self.watch.seen(&pod);
        let wish = pod::all_wishes(&seen, &[]).remove("app").unwrap().unwrap();
        (pod, seen, wish)
    }

    fn is_guarded(&mut self) {
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
    fn follows(&mut self) -> Option<String> {
        let (pod, seen, wish) = self.wish();
        self.watch.guard(&key("app"), &pod, &seen, &wish).unwrap();
        let targets = self.watch.context.resizer.targets();
        let limit = targets.of(CGROUP, |target| {
            target.is_recorded.then(|| target.limit.clone())
        });
        limit.unwrap()
    }

    /// Sets what it was raised to by hand; returns what that was before.
    fn raised_by_hand(&self, to: Option<Bytes>) -> Option<Bytes> {
        let targets = self.watch.context.resizer.targets();
        let before = targets.of(CGROUP, |target| std::mem::replace(&mut target.by_hand, to));
        before.unwrap()
    }

    /// The recording that is under way ends so.
    async fn ends(&mut self, original: &str, result: Result<String, NotRecorded>) {
        let recorded = Recorded {
            key: key("app"),
            annotation: ORIGINAL,
            version: None,
            original: original.to_owned(),
            result,
        };
        self.watch.recorded(recorded).await;
    }

    fn is_recording(&self) -> bool {
        !self.watch.recordings.running.is_empty()
    }
}

#[tokio::test]
async fn what_somebody_else_has_set_is_recorded_beside_the_watch() {
    let mut bed = Bed::new().await;
    bed.sees("64Mi");
    bed.is_guarded();
    assert_eq!(bed.follows().as_deref(), Some("64Mi"));
    assert!(!bed.is_recording());
    // Nobody waits for the API, and nothing is changed meanwhile.
    bed.raised_by_hand(Some(Bytes::mib(256)));
    bed.sees("96Mi");
    assert_eq!(bed.follows(), None);
    assert!(bed.is_recording());
    // What was raised by hand is theirs once, not what is raised since.
    assert_eq!(bed.raised_by_hand(Some(Bytes::mib(256))), None);
    assert_eq!(bed.follows(), None);
    assert_eq!(bed.raised_by_hand(None), Some(Bytes::mib(256)));
    assert_eq!(
        bed.watch.known[&key("app")].policy.unwrap().original,
        Bytes::mib(96)
    );
    // Another one comes, and the first fails: the second is recorded.
    bed.sees("128Mi");
    assert_eq!(bed.follows(), None);
    let overtaken = NotRecorded {
        why: "it was changed meanwhile".to_owned(),
        is_refused: false,
    };
    bed.ends("96Mi", Err(overtaken)).await;
    assert!(!bed.is_recording() && bed.watch.pending.contains("0f8c"));
    assert_eq!(bed.follows(), None);
    assert!(bed.is_recording());
    bed.ends("128Mi", Ok("app=128Mi".to_owned())).await;
    assert_eq!(bed.follows().as_deref(), Some("128Mi"));
    assert!(!bed.is_recording());
}

#[tokio::test]
async fn a_recording_may_end_after_its_pod_or_another_change() {
    let mut bed = Bed::new().await;
    bed.sees("64Mi");
    bed.is_guarded();
    bed.sees("96Mi");
    assert_eq!(bed.follows(), None);
    // It was stored before the next change.
    bed.sees("128Mi");
    bed.ends("96Mi", Ok("app=96Mi".to_owned())).await;
    assert_eq!(bed.follows(), None, "the one before is recorded");
    assert!(bed.is_recording());
    bed.watch.forget("0f8c");
    bed.ends("128Mi", Ok("app=128Mi".to_owned())).await;
    assert!(bed.watch.originals.is_empty() && bed.watch.recordings.stored.is_empty());
}

/// What is seen of the pod is older than what was stored last.
#[tokio::test]
async fn a_recording_goes_on_from_what_was_stored_last() {
    let mut bed = Bed::new().await;
    bed.sees("64Mi");
    bed.ends("96Mi", Ok("app=96Mi".to_owned())).await;
    let (pod, ..) = bed.wish();
    let annotations = bed.watch.recordings.annotations(&pod);
    assert_eq!(annotations[ORIGINAL], "app=96Mi");
    assert_eq!(annotations[MODE], "Act");
}
