use std::{fs, os::unix::net::UnixListener as StdListener};

use bellows_core::{
    Nanos,
    elastic::{ContainerRules, Order, Parallelism, Selector},
    heap::Heap,
};
use tokio::net::UnixListener;

use super::{
    v1alpha1::{LinuxContainer, LinuxMemory, LinuxResources, OptionalInt64},
    *,
};

fn policy(mode: Mode, heap: Option<Heap>) -> ElasticPolicy {
    ElasticPolicy {
        name: "heaps".to_owned(),
        mode,
        selector: Selector {
            namespaces: vec!["dev".to_owned()],
            labels: BTreeMap::new(),
        },
        containers: vec![ContainerRules {
            name: Some("app".to_owned()),
            memory: Some(MemoryRules {
                max: Bytes::mib(4096),
                floor: None,
                shrink_after: Nanos::millis(5000),
                hold_at_most: None,
                order: Order::PatchFirst,
                parallelism: Parallelism::Unchanged,
                heap,
                requests: None,
            }),
            cpu: None,
            boosts: Vec::new(),
        }],
    }
}

fn pod(namespace: &str) -> PodSandbox {
    PodSandbox {
        id: "sandbox".to_owned(),
        uid: "uid".to_owned(),
        name: "shop".to_owned(),
        namespace: namespace.to_owned(),
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
    }
}

fn container(name: &str, limit: i64, env: &[&str]) -> Container {
    let limit = Some(OptionalInt64 { value: limit });
    let memory = Some(LinuxMemory { limit });
    Container {
        id: "container".to_owned(),
        pod_sandbox_id: "sandbox".to_owned(),
        name: name.to_owned(),
        state: ContainerState::ContainerRunning.into(),
        env: env.iter().map(|&one| one.to_owned()).collect(),
        linux: Some(LinuxContainer {
            resources: Some(LinuxResources { memory }),
        }),
    }
}

fn call(stream: u32, method: &str, payload: &impl prost::Message) -> Message {
    let call = Call {
        service: "nri.pkg.api.v1alpha1.Plugin".to_owned(),
        method: method.to_owned(),
        payload: payload.encode_to_vec(),
        ..Call::default()
    };
    Message {
        connection: PLUGIN,
        stream,
        kind: CALL,
        data: call.encode_to_vec(),
    }
}

/// What a plugin answers with, or the code of its error.
fn answered<T: prost::Message + Default>(message: Option<Message>, stream: u32) -> Result<T, i32> {
    let message = message.unwrap();
    let meant = (message.connection, message.stream, message.kind);
    assert_eq!(meant, (PLUGIN, stream, ANSWER));
    let answer = Answer::decode(&*message.data).unwrap();
    match answer.status {
        Some(status) => Err(status.code),
        None => Ok(T::decode(&*answer.payload).unwrap()),
    }
}

/// What is set in a container that is made.
async fn made(plugin: &mut Plugin, pod: PodSandbox, container: Container) -> Vec<String> {
    let request = CreateContainerRequest {
        pod: Some(pod),
        container: Some(container),
    };
    let called = plugin.take(call(7, "CreateContainer", &request));
    let response: CreateContainerResponse = answered(called.await.unwrap(), 7).unwrap();
    let adjust = response.adjust.unwrap_or_default();
    let env = adjust.env.into_iter();
    env.map(|variable| format!("{}={}", variable.key, variable.value))
        .collect()
}

/// The same where policies are all there is.
async fn set(heap: Heap, mode: Mode, pod: PodSandbox, container: Container) -> Vec<String> {
    let (_sender, policies) = watch::channel(vec![policy(mode, Some(heap))]);
    let mut plugin = Plugin::new(policies, Known::Policies);
    made(&mut plugin, pod, container).await
}

/// The limit that a JVM in a container is told, in MiB, whose limit is as many.
async fn told(plugin: &mut Plugin, name: &str, limit: i64) -> u64 {
    let made = made(plugin, pod("dev"), container(name, limit << 20, &[])).await;
    let (_, bytes) = made[0].rsplit_once("-XX:MaxRAM=").unwrap();
    bytes.parse::<u64>().unwrap() >> 20
}

/// A plugin by a policy for every container, and what it is told.
fn of_pods(heap: Heap) -> (Plugin, Told) {
    let mut policy = policy(Mode::Act, Some(heap));
    policy.containers[0].name = None;
    let (policies, policies_now) = watch::channel(vec![policy]);
    let (pods, pods_now) = watch::channel(PodRooms::new());
    let plugin = Plugin::new(policies_now, Known::Pods(pods_now));
    (plugin, Told { policies, pods })
}

fn rooms(ceiling: Option<u64>, original: Option<u64>) -> Rooms {
    let room = Room {
        ceiling: ceiling.map(Bytes::mib),
        original: original.map(Bytes::mib),
    };
    [("app".to_owned(), room)].into()
}

#[tokio::test]
async fn no_heap_is_sized_beyond_what_its_limit_becomes() {
    let (mut plugin, all) = of_pods(Heap::Maximum);
    all.pod("uid", rooms(Some(1024), Some(256)));
    assert_eq!(told(&mut plugin, "app", 256).await, 1024);
    // An init container is not among those that are raised.
    assert_eq!(told(&mut plugin, "migrate", 256).await, 256);
    all.pod("uid", rooms(None, None));
    assert_eq!(told(&mut plugin, "app", 256).await, 256);
}

#[tokio::test]
async fn who_is_made_again_in_a_burst_has_the_heap_of_before() {
    let (mut plugin, all) = of_pods(Heap::Original);
    all.pod("uid", rooms(Some(4096), Some(512)));
    assert_eq!(told(&mut plugin, "app", 1536).await, 512);
}

#[tokio::test(start_paused = true)]
async fn a_pod_is_waited_for_and_then_the_limit_is_the_most() {
    let (mut plugin, all) = of_pods(Heap::Maximum);
    let late = async {
        sleep(WAIT / 2).await;
        all.pod("uid", rooms(Some(1024), Some(256)));
    };
    let (told_late, ()) = tokio::join!(told(&mut plugin, "app", 256), late);
    assert_eq!(told_late, 1024);
    all.forget("uid");
    let begun = tokio::time::Instant::now();
    assert_eq!(told(&mut plugin, "app", 256).await, 256);
    assert!(begun.elapsed() >= WAIT, "it may be told of yet");
    // The API is away, and nobody waits for that again.
    let begun = tokio::time::Instant::now();
    assert_eq!(told(&mut plugin, "app", 256).await, 256);
    assert!(begun.elapsed() < WAIT, "{:?}", begun.elapsed());
    all.pod("other", Rooms::new());
    let begun = tokio::time::Instant::now();
    assert_eq!(told(&mut plugin, "app", 256).await, 256);
    assert!(begun.elapsed() >= WAIT, "it tells of pods again");
    all.pod("uid", rooms(Some(512), None));
    assert_eq!(told(&mut plugin, "app", 256).await, 512);
}

#[test]
fn what_is_generated_was_not_changed_and_nor_was_its_protocol() {
    let generated = include_str!("v1alpha1.rs");
    let (head, text) = generated.split_once("\n// ").unwrap();
    let (sums, text) = text.split_once('\n').unwrap();
    assert!(head.contains("cargo xtask codegen"));
    let sum = |text: &str| format!("{:08x}", crc32fast::hash(text.as_bytes()));
    let protocol = include_str!("../../proto/nri.proto");
    let expected = format!("{} {}", sum(protocol), sum(text));
    assert_eq!(sums, expected, "run `cargo xtask codegen`");
}

#[tokio::test]
async fn a_container_is_told_the_limit_that_its_policy_names() {
    let java = |bytes: u64| format!("JAVA_TOOL_OPTIONS=-XX:MaxRAM={bytes}");
    let act = |heap| {
        set(
            heap,
            Mode::Act,
            pod("dev"),
            container("app", 256 << 20, &[]),
        )
    };
    let original = act(Heap::Original);
    let node = "NODE_OPTIONS=--max-old-space-size=128".to_owned();
    assert_eq!(original.await, [java(256 << 20), node]);
    assert_eq!(act(Heap::Maximum).await[0], java(4 << 30));
    assert_eq!(act(Heap::At(Bytes::mib(512))).await[0], java(512 << 20));
}

#[tokio::test]
async fn who_is_not_meant_is_left_alone() {
    let nothing = Vec::<String>::new();
    let app = || container("app", 256 << 20, &[]);
    let original = |mode, pod, container| set(Heap::Original, mode, pod, container);
    assert_eq!(original(Mode::Act, pod("live"), app()).await, nothing);
    let other = container("other", 256 << 20, &[]);
    assert_eq!(original(Mode::Act, pod("dev"), other).await, nothing);
    for mode in [Mode::Off, Mode::Observe, Mode::Recommend] {
        assert_eq!(original(mode, pod("dev"), app()).await, nothing);
    }
    for (own, mode, is_told) in [
        ("Off", Mode::Act, false),
        ("act", Mode::Act, false),
        ("Act", Mode::Observe, true),
    ] {
        let mut pod = pod("dev");
        pod.annotations.insert(pod::MODE.to_owned(), own.to_owned());
        assert_eq!(
            original(mode, pod, app()).await.is_empty(),
            !is_told,
            "{own}"
        );
    }
    for no_limit in [0, -1, i64::MIN] {
        let container = container("app", no_limit, &[]);
        assert_eq!(original(Mode::Act, pod("dev"), container).await, nothing);
    }
}

/// The API cannot resize it, and the node may depend on it.
#[tokio::test]
async fn a_static_pod_is_left_alone_whatever_it_says_of_itself() {
    for (annotations, is_told) in [
        (&[][..], true),
        (&[(SOURCE, "api")], true),
        (&[(SOURCE, "file")], false),
        (&[(SOURCE, "http"), (pod::MODE, "Act")], false),
        (&[(SOURCE, "api"), (MIRROR, "5f9c")], false),
    ] {
        let mut pod = pod("dev");
        let annotations = annotations.iter();
        pod.annotations = annotations
            .map(|&(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        let said = format!("{:?}", pod.annotations);
        let app = container("app", 256 << 20, &[]);
        let set = set(Heap::Original, Mode::Act, pod, app).await;
        assert_eq!(!set.is_empty(), is_told, "{said}");
    }
}

#[tokio::test]
async fn what_others_have_set_is_kept_and_one_that_was_there_is_replaced_as_a_whole() {
    let env = [
        "JAVA_TOOL_OPTIONS=-Da=b",
        "NODE_OPTIONS=--max-old-space-size=9",
    ];
    let app = container("app", 256 << 20, &env);
    let set = set(Heap::Original, Mode::Act, pod("dev"), app).await;
    let whole = "JAVA_TOOL_OPTIONS=-Da=b -XX:MaxRAM=268435456";
    assert_eq!(set, ["-JAVA_TOOL_OPTIONS=", whole]);
}

#[tokio::test]
async fn one_event_is_asked_for_and_split_lists_are_taken() {
    let (_sender, policies) = watch::channel(vec![policy(Mode::Act, Some(Heap::Original))]);
    let mut plugin = Plugin::new(policies, Known::Policies);
    let answer = plugin
        .take(call(1, "Configure", &ConfigureRequest::default()))
        .await;
    let configured: ConfigureResponse = answered(answer.unwrap(), 1).unwrap();
    assert_eq!(configured.events, 8);
    let before = METRICS.heaps_missed.get();
    for (stream, more) in [(3, true), (5, false)] {
        let sized = ["JAVA_TOOL_OPTIONS=-XX:MaxRAM=1"];
        let request = SynchronizeRequest {
            pods: if more { vec![pod("dev")] } else { Vec::new() },
            containers: vec![
                container("app", 1, if more { &[] } else { &sized }),
                container("other", 1, &[]),
            ],
            more,
        };
        let answer = plugin
            .take(call(stream, "Synchronize", &request))
            .await
            .unwrap();
        let answer: SynchronizeResponse = answered(answer, stream).unwrap();
        assert_eq!((answer.more, plugin.is_ready), (more, !more));
    }
    assert_eq!(METRICS.heaps_missed.get() - before, 1);
}

#[tokio::test]
async fn what_is_not_understood_changes_nothing_and_nonsense_ends_the_connection() {
    let (_sender, policies) = watch::channel(Vec::new());
    let mut plugin = Plugin::new(policies, Known::Policies);
    let empty = ConfigureResponse::default();
    let answer = plugin.take(call(9, "StopContainer", &empty)).await.unwrap();
    assert_eq!(answered::<Status>(answer, 9), Err(UNIMPLEMENTED));
    let nonsense = Message {
        connection: PLUGIN,
        stream: 1,
        kind: CALL,
        data: vec![0xff; 9],
    };
    assert!(plugin.take(nonsense.clone()).await.is_err());
    let refused = Answer {
        status: Some(Status {
            code: 7,
            message: "no".to_owned(),
        }),
        payload: Vec::new(),
    };
    let refused = Message {
        connection: RUNTIME,
        kind: ANSWER,
        data: refused.encode_to_vec(),
        ..nonsense
    };
    let error = plugin.take(refused).await.unwrap_err();
    assert!(matches!(error, PluginError::Refused(why) if why == "no"));
}

/// The next message at a runtime's side.
async fn arrived(stream: &mut UnixStream, decoder: &mut Decoder) -> Option<Message> {
    let mut buffer = vec![0; 4096];
    loop {
        if let Some(message) = decoder.next().unwrap() {
            return Some(message);
        }
        match stream.read(&mut buffer).await.unwrap() {
            0 => return None,
            length => decoder.feed(&buffer[..length]),
        }
    }
}

#[tokio::test]
async fn it_is_there_while_a_policy_needs_it_and_comes_back_when_the_runtime_does() {
    let directory = std::env::temp_dir().join(format!("bellows-nri-{}", std::process::id()));
    fs::create_dir_all(&directory).unwrap();
    let socket = directory.join("nri.sock");
    let listener = StdListener::bind(&socket).unwrap();
    listener.set_nonblocking(true).unwrap();
    let listener = UnixListener::from_std(listener).unwrap();
    let (sender, policies) = watch::channel(vec![policy(Mode::Act, None)]);
    let served = tokio::spawn(serve(policies, Known::Policies, socket));
    let early = timeout(Duration::from_millis(200), listener.accept()).await;
    assert!(early.is_err(), "nobody needs it");
    sender.send_replace(vec![policy(Mode::Act, Some(Heap::Maximum))]);
    // The first runtime ends at once.
    for _ in 0..2 {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut decoder = Decoder::default();
        let message = arrived(&mut stream, &mut decoder).await.unwrap();
        let call = Call::decode(&*message.data).unwrap();
        assert_eq!(
            (message.connection, &*call.method),
            (RUNTIME, "RegisterPlugin")
        );
        let request = RegisterPluginRequest::decode(&*call.payload).unwrap();
        assert_eq!((&*request.plugin_name, &*request.plugin_idx), (NAME, INDEX));
    }
    let (mut stream, _) = listener.accept().await.unwrap();
    let mut decoder = Decoder::default();
    arrived(&mut stream, &mut decoder).await.unwrap();
    let request = CreateContainerRequest {
        pod: Some(pod("dev")),
        container: Some(container("app", 1 << 30, &[])),
    };
    let asked = call(1, "CreateContainer", &request);
    stream.write_all(&asked.encoded()).await.unwrap();
    let answer = arrived(&mut stream, &mut decoder).await;
    let response: CreateContainerResponse = answered(answer, 1).unwrap();
    assert_eq!(response.adjust.unwrap().env.len(), 2);
    sender.send_replace(Vec::new());
    assert_eq!(arrived(&mut stream, &mut decoder).await, None, "it stays");
    served.abort();
    fs::remove_dir_all(directory).unwrap();
}
