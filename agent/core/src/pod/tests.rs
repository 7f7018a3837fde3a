use super::*;

pub(super) fn pod(annotations: &[(&str, &str)]) -> Pod {
    Pod {
        namespace: "dev".to_owned(),
        name: "workspace".to_owned(),
        uid: "u".to_owned(),
        qos: QosClass::Burstable,
        labels: BTreeMap::new(),
        annotations: annotations
            .iter()
            .map(|&(key, value)| (key.to_owned(), value.to_owned()))
            .collect(),
        is_only_of_memory: false,
        misread: None,
        containers: vec![Container {
            name: "app".to_owned(),
            id: Some("c1".to_owned()),
            memory_limit: Some("64Mi".to_owned()),
            memory_request: Some("16Mi".to_owned()),
            request_manager: Some("kubectl".to_owned()),
            allotted: None,
            is_ready: None,
            started_at: None,
            cpu_limit: None,
            cpu_limit_manager: None,
            cpu_request: None,
            reports_resources: true,
            restarts_on_cpu_resize: false,
            limit_manager: Some("kubectl".to_owned()),
            restarts_on_resize: false,
            probes: Vec::new(),
        }],
        heirs: Vec::new(),
        init_containers: Vec::new(),
        memory_limit: None,
        limit_manager: None,
        has_memory_request: false,
        has_cpu_limit: false,
        has_resources: false,
        reports_resources: true,
        put_off: None,
        requested: Bytes::mib(16),
        is_resize_pending: false,
        is_resize_in_progress: false,
        priority: 0,
        is_static: false,
        ending: false,
    }
}

/// The only wish of a pod that no policy means.
fn wish(pod: &Pod) -> Result<Option<Wish>, Refusal> {
    wishes(pod, &[]).into_values().next().transpose()
}

const ACT: (&str, &str) = (MODE, "Act");
const MAX: (&str, &str) = (MAX_MEMORY, "1Gi");

#[test]
fn a_pod_that_does_not_ask_is_left_alone() {
    for annotations in [&[][..], &[MAX], &[(MODE, "Off"), MAX]] {
        assert_eq!(wish(&pod(annotations)), Ok(None));
    }
}

/// Whatever an annotation or a policy says: coredns, a network plugin, ourselves.
#[test]
fn nothing_is_moved_of_what_the_system_depends_on() {
    let mut critical = pod(&[ACT, MAX]);
    critical.priority = 1_999_999_999;
    assert!(wish(&critical).unwrap().is_some());
    for priority in [2_000_000_000, 2_000_001_000] {
        critical.priority = priority;
        assert_eq!(wish(&critical), Err(Refusal::Critical));
        critical.annotations.clear();
        let policy = policy("dev/all", Mode::Act, None, 512);
        let by_policy = wishes(&critical, &[policy]).remove("app");
        assert_eq!(by_policy, Some(Err(Refusal::Critical)));
        critical = pod(&[ACT, MAX]);
    }
}

#[test]
fn a_pod_that_is_only_watched_is_told_from_one_that_is_guarded() {
    for (text, mode) in [
        ("Act", Mode::Act),
        ("Observe", Mode::Observe),
        (" Recommend ", Mode::Recommend),
    ] {
        let wish = wish(&pod(&[(MODE, text), MAX])).unwrap();
        assert_eq!(wish.map(|wish| wish.mode), Some(mode));
    }
}

#[test]
fn nobody_is_guarded_where_nothing_may_be_changed() {
    for (text, mode) in [
        ("Act", Mode::Observe),
        ("Observe", Mode::Observe),
        ("Recommend", Mode::Recommend),
    ] {
        let mut wishes = wishes(&pod(&[(MODE, text), MAX]), &[]);
        only_observe(&mut wishes);
        let modes = wishes.values().flatten().map(|wish| wish.mode);
        assert_eq!(modes.collect::<Vec<_>>(), [mode]);
    }
}

#[test]
fn an_annotation_that_was_misread_is_refused_unless_the_pod_opts_out() {
    let mut misread = pod(&[]);
    misread.misread = Some("EOF".to_owned());
    let refusal = wish(&misread).unwrap_err();
    assert_eq!(refusal.reason(), "InvalidAnnotation");
    misread
        .annotations
        .insert(MODE.to_owned(), "Off".to_owned());
    assert_eq!(wish(&misread), Ok(None));
}

#[test]
fn jobs_wait_where_that_is_asked_for() {
    let parallelism = |text| wish(&pod(&[ACT, MAX, (PARALLELISM, text)]));
    assert_eq!(
        parallelism("Elastic").unwrap().unwrap().parallelism,
        Parallelism::Elastic
    );
    assert_eq!(
        wish(&pod(&[ACT, MAX])).unwrap().unwrap().parallelism,
        Parallelism::Unchanged
    );
    assert_eq!(
        parallelism("elastic"),
        Err(Refusal::UnknownParallelism("elastic".to_owned()))
    );
}

#[test]
fn the_order_is_one_of_two() {
    let order = |text| wish(&pod(&[ACT, MAX, (ORDER, text)]));
    assert_eq!(
        order("RaiseFirst").unwrap().unwrap().order,
        Order::RaiseFirst
    );
    assert_eq!(
        wish(&pod(&[ACT, MAX])).unwrap().unwrap().order,
        Order::PatchFirst
    );
    assert_eq!(
        order("first"),
        Err(Refusal::UnknownOrder("first".to_owned()))
    );
}

#[test]
fn what_is_left_raised_is_known_from_the_pod_alone() {
    let mut pod = pod(&[(MODE, "Off"), (ORIGINAL, "app=64Mi")]);
    assert_eq!(left_raised(&pod), []);
    pod.containers[0].memory_limit = Some("600Mi".to_owned());
    // Somebody else's wish.
    assert_eq!(left_raised(&pod), []);
    pod.containers[0].limit_manager = Some(MANAGER.to_owned());
    let raised = Raised {
        container: "app".to_owned(),
        level: Level::Container(0),
        limit: "600Mi".to_owned(),
        rest: "64Mi".to_owned(),
        id: Some("c1".to_owned()),
    };
    assert_eq!(left_raised(&pod), [raised]);
    pod.annotations
        .insert(ORIGINAL.to_owned(), "other=64Mi".to_owned());
    assert_eq!(left_raised(&pod), []);
}

#[test]
fn the_only_container_is_meant() {
    let wish = wish(&pod(&[ACT, MAX])).unwrap().unwrap();
    assert_eq!(
        (wish.container.as_str(), wish.original, wish.recorded),
        ("app", Bytes::mib(64), false)
    );
}

#[test]
fn the_recorded_original_holds_after_a_raise() {
    let mut raised = pod(&[ACT, MAX, (ORIGINAL, "app=64Mi")]);
    raised.containers[0].memory_limit = Some("640Mi".to_owned());
    for manager in [Some(MANAGER.to_owned()), None] {
        raised.containers[0].limit_manager = manager;
        let wish = wish(&raised).unwrap().unwrap();
        assert_eq!(
            (wish.limit, wish.original, wish.recorded, wish.foreign),
            (Bytes::mib(640), Bytes::mib(64), true, false)
        );
    }
}

#[test]
fn a_limit_that_somebody_else_has_set_is_the_new_original() {
    let mut changed = pod(&[ACT, MAX, (ORIGINAL, "app=64Mi")]);
    changed.containers[0].memory_limit = Some("96Mi".to_owned());
    let wish = wish(&changed).unwrap().unwrap();
    assert_eq!(
        (wish.original, wish.recorded, wish.foreign),
        (Bytes::mib(96), false, true)
    );
}

#[test]
fn a_limit_of_the_pod_is_guarded_as_a_whole() {
    let mut whole = pod(&[ACT, MAX, (ORIGINAL, "*=128Mi")]);
    whole.memory_limit = Some("256Mi".to_owned());
    whole.limit_manager = Some(MANAGER.to_owned());
    whole.containers[0].memory_limit = None;
    whole.containers.push(Container {
        name: "sidecar".to_owned(),
        ..whole.containers[0].clone()
    });
    let wish = wish(&whole).unwrap().unwrap();
    assert_eq!(
        (wish.level, wish.id, wish.limit, wish.original),
        (Level::Pod, None, Bytes::mib(256), Bytes::mib(128))
    );
}

#[test]
fn a_container_never_gets_more_than_its_pod() {
    let mut both = pod(&[ACT, MAX]);
    both.memory_limit = Some("512Mi".to_owned());
    let wish = wish(&both).unwrap().unwrap();
    assert_eq!(
        (wish.level, wish.ceiling),
        (Level::Container(0), Bytes::mib(512))
    );
}

#[test]
fn bad_annotations_are_named() {
    let cases = [
        (vec![(MODE, "act"), MAX], "`act`"),
        (vec![ACT], MAX_MEMORY),
        (vec![ACT, (MAX_MEMORY, "4GB")], "`4GB`"),
        (vec![ACT, (MAX_MEMORY, "32Mi")], "below the limit"),
        (vec![ACT, MAX, (CONTAINER, "db")], "`db`"),
        (vec![ACT, MAX, (ORIGINAL, "nonsense")], "`nonsense`"),
    ];
    for (annotations, part) in cases {
        let refusal = wish(&pod(&annotations)).unwrap_err();
        assert!(refusal.to_string().contains(part), "{refusal}");
        assert_eq!(refusal.reason(), "InvalidAnnotation");
    }
}

#[test]
fn what_a_resize_would_break_is_refused() {
    let mut guaranteed = pod(&[ACT, MAX]);
    guaranteed.qos = QosClass::Guaranteed;
    assert_eq!(wish(&guaranteed), Err(Refusal::Guaranteed));
    let mut restarting = pod(&[ACT, MAX]);
    restarting.containers[0].restarts_on_resize = true;
    assert!(matches!(
        wish(&restarting),
        Err(Refusal::RestartsOnResize(_))
    ));
    let mut unlimited = pod(&[ACT, MAX]);
    unlimited.containers[0].memory_limit = None;
    assert!(matches!(wish(&unlimited), Err(Refusal::NoLimit(_))));
}

fn policy(name: &str, mode: Mode, container: Option<&str>, max: u64) -> ElasticPolicy {
    ElasticPolicy {
        name: name.to_owned(),
        selector: elastic::Selector::default(),
        mode,
        containers: vec![ContainerRules {
            name: container.map(str::to_owned),
            memory: Some(MemoryRules {
                max: Bytes::mib(max),
                floor: None,
                shrink_after: Nanos::millis(7000),
                hold_at_most: None,
                order: Order::RaiseFirst,
                parallelism: Parallelism::Elastic,
                heap: None,
                requests: None,
            }),
            cpu: None,
            boosts: Vec::new(),
        }],
    }
}

#[test]
fn a_policy_means_every_container_that_has_a_limit() {
    let mut three = pod(&[(ORIGINAL, "side=64Mi")]);
    for name in ["side", "free"] {
        let mut container = three.containers[0].clone();
        name.clone_into(&mut container.name);
        three.containers.push(container);
    }
    three.containers[2].memory_limit = None;
    let wishes = wishes(&three, &[policy("dev/all", Mode::Act, None, 512)]);
    assert_eq!(wishes.keys().collect::<Vec<_>>(), ["app", "side"]);
    let [app, side] = ["app", "side"].map(|name| wishes[name].as_ref().unwrap());
    assert_eq!(
        (app.ceiling, app.recorded, app.policy.as_deref()),
        (Bytes::mib(512), false, Some("dev/all"))
    );
    assert_eq!(app.shrink_after, Some(Nanos::millis(7000)));
    assert!(side.recorded);
    assert_eq!(
        with_original(&three, ORIGINAL, "app", "64Mi"),
        "side=64Mi,app=64Mi"
    );
    assert_eq!(with_original(&three, ORIGINAL, "side", "1Gi"), "side=1Gi");
}

/// A policy for every container does not mean them; one that names one would do nothing without a word.
#[test]
fn a_policy_that_names_an_init_container_is_refused() {
    let mut mesh = pod(&[]);
    let init = |name: &str, is_sidecar| InitContainer {
        name: name.to_owned(),
        is_sidecar,
        id: None,
        memory_limit: Some("32Mi".to_owned()),
        cpu_limit: None,
        is_done: false,
    };
    mesh.init_containers = vec![init("migrate", false), init("proxy", true)];
    let all = policy("dev/all", Mode::Act, None, 512);
    let of = |pod: &Pod, rules: &[ContainerRules], mode| {
        let policy = ElasticPolicy {
            mode,
            containers: rules.to_vec(),
            ..all.clone()
        };
        let wishes = wishes(pod, &[policy]).into_iter();
        let told = wishes.map(|(name, wish)| (name, wish.err().map(|why| why.reason())));
        told.collect::<Vec<_>>()
    };
    let app = || ("app".to_owned(), None);
    let every = all.containers.clone();
    assert_eq!(of(&mesh, &every, Mode::Act), [app()]);
    let mut named = every;
    for name in ["proxy", "migrate"] {
        named.extend(policy("", Mode::Act, Some(name), 512).containers);
    }
    let proxy = ("proxy".to_owned(), Some("SidecarNotSupported"));
    let migrate = ("migrate".to_owned(), Some("InitContainerNotSupported"));
    assert_eq!(of(&mesh, &named, Mode::Act), [app(), migrate, proxy]);
    assert_eq!(of(&mesh, &named, Mode::Off), []);
    // Annotations with a size are all that holds.
    mesh.annotations = pod(&[ACT, MAX]).annotations;
    assert_eq!(of(&mesh, &named, Mode::Act), [app()]);
}

#[test]
fn a_policy_holds_for_a_pod_that_does_not_run_yet_and_says_its_mode_itself() {
    let mut early = pod(&[ACT]);
    early.containers[0].id = None;
    let policies = [policy("dev/all", Mode::Observe, None, 512)];
    assert_eq!(wishes(&early, &policies), Wishes::new());
    let wishes = all_wishes(&early, &policies);
    let wish = wishes["app"].as_ref().unwrap();
    assert_eq!((wish.mode, wish.running.len()), (Mode::Act, 0));
}

#[test]
fn annotations_come_before_policies_and_opting_out_before_all() {
    let policies = [policy("dev/all", Mode::Act, None, 512)];
    let of = |annotations: &[(&str, &str)]| {
        let wishes = wishes(&pod(annotations), &policies);
        let wish = wishes.into_values().next().transpose().unwrap();
        wish.map(|wish| (wish.mode, wish.ceiling.0 >> 20))
    };
    assert_eq!(of(&[]), Some((Mode::Act, 512)));
    assert_eq!(of(&[(MODE, "Off")]), None);
    assert_eq!(of(&[(MODE, "Observe")]), Some((Mode::Observe, 512)));
    assert_eq!(of(&[ACT, MAX]), Some((Mode::Act, 1024)));
    assert_eq!(of(&[MAX]), Some((Mode::Act, 1024)));
    let how = |annotations: &[(&str, &str)]| {
        let mut policies = policies.clone();
        let memory = policies[0].containers[0].memory.as_mut().unwrap();
        memory.order = Order::RaiseFirst;
        let wishes = wishes(&pod(annotations), &policies);
        let wish = wishes.into_values().next().unwrap();
        wish.map(|wish| (wish.order, wish.parallelism))
    };
    assert_eq!(how(&[]), Ok((Order::RaiseFirst, Parallelism::Elastic)));
    assert_eq!(
        how(&[(ORDER, "PatchFirst"), (PARALLELISM, "Unchanged")]),
        Ok((Order::PatchFirst, Parallelism::Unchanged))
    );
    for wrong in [ORDER, PARALLELISM] {
        let refusal = how(&[(wrong, "fast")]).unwrap_err();
        assert_eq!(refusal.reason(), "InvalidAnnotation");
    }
    let needs = |annotations: &[(&str, &str)]| needs_policies(&pod(annotations));
    assert_eq!(
        [&[][..], &[MAX], &[ACT], &[ACT, MAX], &[(MODE, "Off")]].map(needs),
        [true, true, true, false, false]
    );
}

#[test]
fn without_a_mode_of_its_own_the_container_that_is_named_has_that_of_its_own_policy() {
    let mut two = pod(&[(CONTAINER, "side"), MAX]);
    two.containers.push(Container {
        name: "side".to_owned(),
        ..two.containers[0].clone()
    });
    let [app, side] = [("app", Mode::Act), ("side", Mode::Observe)]
        .map(|(name, mode)| policy(name, mode, Some(name), 512));
    let modes = |policies: &[ElasticPolicy]| {
        let wishes = wishes(&two, policies).into_iter();
        let modes = wishes.map(|(name, wish)| (name, wish.unwrap().mode));
        modes.collect::<Vec<_>>()
    };
    let both = [app.clone(), side];
    assert_eq!(modes(&both), [("side".to_owned(), Mode::Observe)]);
    assert_eq!(modes(&[app]), []);
}

#[test]
fn a_floor_is_the_limit_at_rest_and_a_maximum_below_it_is_refused_by_name() {
    let mut floored = policy("dev/all", Mode::Act, None, 512);
    floored.containers[0].memory.as_mut().unwrap().floor = Some(Bytes::mib(32));
    let wishes_of = |policy: &ElasticPolicy| wishes(&pod(&[]), std::slice::from_ref(policy));
    let wish = wishes_of(&floored).remove("app").unwrap().unwrap();
    assert_eq!(
        (wish.rest, wish.rest_text.as_str(), wish.original),
        (Bytes::mib(32), "32Mi", Bytes::mib(64))
    );
    // No limit may be below a request.
    floored.containers[0].memory.as_mut().unwrap().floor = Some(Bytes::mib(8));
    let wish = wishes_of(&floored).remove("app").unwrap().unwrap();
    assert_eq!(
        (wish.rest, wish.rest_text.as_str()),
        (Bytes::mib(17), "17Mi")
    );
    let refusal = wishes_of(&policy("dev/small", Mode::Act, None, 16)).remove("app");
    let refusal = refusal.unwrap().unwrap_err();
    assert_eq!(refusal.reason(), "InvalidLimit");
    let told = refusal.to_string();
    assert!(told.contains("dev/small"), "{told}");
    let small = wishes(&pod(&[ACT, (MAX_MEMORY, "16Mi")]), &[]);
    let refusal = small.into_values().next().unwrap().unwrap_err();
    assert_eq!(refusal.reason(), "InvalidAnnotation");
}

#[test]
fn what_is_left_of_two_containers_is_told_of_both() {
    let mut two = pod(&[(ORIGINAL, "app=64Mi,side=32Mi")]);
    two.containers.push(Container {
        name: "side".to_owned(),
        ..two.containers[0].clone()
    });
    for container in &mut two.containers {
        container.memory_limit = Some("600Mi".to_owned());
        container.limit_manager = Some(MANAGER.to_owned());
    }
    let rest: Vec<String> = left_raised(&two)
        .into_iter()
        .map(|raised| raised.rest)
        .collect();
    assert_eq!(rest, ["64Mi", "32Mi"]);
}

/// A VerticalPodAutoscaler that goes by requests alone, in the middle of a burst.
#[test]
fn no_limit_comes_down_to_a_request_that_was_raised_meanwhile() {
    let raised = |limit: &str, request: &str| {
        let mut raised = pod(&[ACT, MAX, (ORIGINAL, "app=256Mi")]);
        let app = &mut raised.containers[0];
        app.memory_limit = Some(limit.to_owned());
        app.limit_manager = Some(MANAGER.to_owned());
        app.memory_request = Some(request.to_owned());
        raised
    };
    let rest = |pod: &Pod| {
        let wish = wish(pod).unwrap().unwrap();
        assert_eq!(quantity::parse(&wish.rest_text), Ok(wish.rest));
        let left = left_raised(pod).pop().map(|left| left.rest);
        assert!(left.is_none_or(|left| left == wish.rest_text));
        (wish.rest_text, wish.original_text)
    };
    let is = |rest: &str| (rest.to_owned(), "256Mi".to_owned());
    assert_eq!(rest(&raised("1Gi", "400Mi")), is("401Mi"));
    assert_eq!(rest(&raised("400Mi", "400Mi")), is("400Mi"));
    assert_eq!(left_raised(&raised("401Mi", "400Mi")), []);
    assert_eq!(rest(&raised("1Gi", "100Mi")), is("256Mi"));
    // One that always was the request is what it was, unless the pod would be Guaranteed with it.
    let mut same = raised("1Gi", "256Mi");
    assert_eq!(rest(&same), is("256Mi"));
    same.containers[0].cpu_limit = Some("1".to_owned());
    same.containers[0].cpu_request = Some("1000m".to_owned());
    assert_eq!(rest(&same), is("257Mi"));
    same.containers[0].memory_limit = Some("256Mi".to_owned());
    assert_eq!(rest(&same), is("256Mi"));
    // A maximum that was lowered meanwhile is below what it comes down to.
    let policy = policy("dev/all", Mode::Act, None, 512);
    let mut above = raised("1Gi", "900Mi");
    above.annotations.remove(MAX_MEMORY);
    let refused = wishes(&above, &[policy])
        .remove("app")
        .unwrap()
        .unwrap_err();
    assert_eq!(refused.reason(), "InvalidLimit");
    assert_eq!(left_raised(&above)[0].rest, "901Mi");
}
