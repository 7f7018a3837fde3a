//! The condition `Accepted` of policies: whether the agents can read them.
//!
//! There is an agent on every node, and all of one build say the same of a policy. So it is one condition with one field
//! manager, it is written by whoever comes first, and the others see that it is said: each waits for a time of its own before
//! it writes. Agents of two builds that disagree, while one replaces the other, must not take turns: each writes of one
//! generation of a policy once.
//!
//! Whoever has written that a policy cannot be read publishes the Event of that, too, and the others do not: a thousand nodes
//! would make a thousand Events of one typing error, and again with each new agent. Whose patch nobody has answered knows its
//! words again by the second in which they were written. Where conditions must not be written (rights of before), nobody
//! knows of another, and each tells.
//!
//! What differs between nodes (how many containers a policy guards) is none of it: that is told per node.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bellows_core::pod::MANAGER;
use k8s_openapi::{
    api::core::v1::ObjectReference,
    apimachinery::pkg::apis::meta::v1::{Condition, Time},
    jiff::Timestamp,
};
use kube::{
    Api, Client, Resource as _, ResourceExt as _,
    api::{DynamicObject, Patch, PatchParams},
};
use serde_json::{Value, json};
use tokio::time::{sleep, timeout};

use super::policies::resource;
use crate::{
    actuate::resize::{TIMEOUT, code_of, is_uncertain},
    run::events::{Events, fitting},
};

const ACCEPTED: &str = "Accepted";
/// All agents have written within this time, or seen that another has.
const SPREAD: u64 = 10_000;
/// How often it is tried, and how soon again.
const TRIES: u32 = 5;
const AGAIN: Duration = Duration::from_secs(10);
/// How soon again after that, or where it is refused.
const LATER: Duration = Duration::from_secs(300);

/// Writes conditions; clones share what they have seen.
#[derive(Clone)]
pub(super) struct Conditions {
    client: Client,
    node: String,
    events: Arc<Events>,
    seen: Arc<Mutex<BTreeMap<Key, Seen>>>,
}

/// Namespace and name.
type Key = (String, String);

/// Of which generation it is said whether it is accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Said {
    generation: i64,
    is_accepted: bool,
}

/// What tells one agent's words from another's that say the same.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Words {
    message: String,
    time: String,
}

impl Words {
    fn of(condition: &Value) -> Option<Self> {
        let text = |name: &str| condition[name].as_str().map(str::to_owned);
        Some(Self {
            message: text("message")?,
            time: text("lastTransitionTime")?,
        })
    }
}

/// A policy, as far as its condition is concerned.
#[derive(Clone, Debug)]
struct Seen {
    /// Its uid: one that was made anew begins with its first generation, too.
    uid: Option<String>,
    /// What is to be said.
    wanted: Said,
    message: String,
    /// What is said.
    said: Option<Said>,
    /// In which words.
    words: Option<Words>,
    /// The generation of which this agent has written, or is about to.
    written: Option<i64>,
}

impl Seen {
    /// Whether something else is said, and this agent has not written of it yet.
    fn is_due(&self) -> bool {
        self.said != Some(self.wanted) && self.written != Some(self.wanted.generation)
    }

    /// Whether what is to be said of it is said in one of these words.
    fn is_said_in(&self, words: &[Words]) -> bool {
        let own = self.words.as_ref();
        self.said == Some(self.wanted) && own.is_some_and(|own| words.contains(own))
    }
}

/// What an object's status says of it.
fn accepted(object: &DynamicObject) -> Option<&Value> {
    let conditions = object.data["status"]["conditions"].as_array()?;
    let mut conditions = conditions.iter();
    conditions.find(|condition| condition["type"] == ACCEPTED)
}

fn said(accepted: &Value) -> Option<Said> {
    Some(Said {
        generation: accepted["observedGeneration"].as_i64()?,
        is_accepted: accepted["status"] == "True",
    })
}

/// How long to wait after a try that has failed, the so-and-so-many-th.
fn wait(tries: u32, is_refused: bool) -> Duration {
    if is_refused || tries >= TRIES {
        LATER
    } else {
        AGAIN
    }
}

/// When this node writes of that policy.
fn turn(node: &str, key: &Key) -> Duration {
    let mut hasher = DefaultHasher::new();
    (node, key).hash(&mut hasher);
    Duration::from_millis(hasher.finish() % SPREAD)
}

impl Conditions {
    pub(super) fn new(client: Client, node: String) -> Self {
        Self {
            events: Arc::new(Events::new(client.clone(), &node)),
            client,
            node,
            seen: Arc::default(),
        }
    }

    fn with<R>(&self, change: impl FnOnce(&mut BTreeMap<Key, Seen>) -> R) -> R {
        change(&mut self.seen.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// A policy was read, or could not be.
    pub(super) fn judged(&self, object: &DynamicObject, verdict: Result<String, &str>) {
        let key = (object.namespace().unwrap_or_default(), object.name_any());
        let is_accepted = verdict.is_ok();
        let wanted = Said {
            generation: object.metadata.generation.unwrap_or_default(),
            is_accepted,
        };
        let message = verdict.unwrap_or_else(str::to_owned);
        let is_due = self.with(|all| {
            let before = all.get(&key).filter(|before| before.uid == object.uid());
            let written = before.and_then(|before| before.written);
            let mut seen = Seen {
                uid: object.uid(),
                wanted,
                message: fitting(message),
                said: accepted(object).and_then(said),
                words: accepted(object).and_then(Words::of),
                written,
            };
            let is_due = seen.is_due();
            if is_due {
                seen.written = Some(wanted.generation);
            }
            all.insert(key.clone(), seen);
            is_due
        });
        if is_due {
            let policy = object.object_ref(&resource());
            drop(tokio::spawn(self.clone().write(key, wanted, policy)));
        }
    }

    /// A policy is gone.
    pub(super) fn forget(&self, object: &DynamicObject) {
        let key = (object.namespace().unwrap_or_default(), object.name_any());
        self.with(|all| drop(all.remove(&key)));
    }

    /// All others have gone while nobody looked.
    pub(super) fn keep(&self, is_there: impl Fn(&str, &str) -> bool) {
        self.with(|all| all.retain(|(namespace, name), _| is_there(namespace, name)));
    }

    /// Writes it, sooner or later: until it is said, or something else is to be.
    async fn write(self, key: Key, wanted: Said, policy: ObjectReference) {
        let uid = self.with(|all| all.get(&key)?.uid.clone());
        sleep(turn(&self.node, &key)).await;
        let mut is_told = false;
        // What nobody has answered to may be written all the same.
        let mut unanswered = Vec::new();
        for tries in 1.. {
            // It may have changed, or somebody else has said it.
            let message = self.with(|all| {
                let seen = all.get(&key)?;
                let is_own = seen.uid == uid && seen.wanted == wanted;
                let is_open = is_own && seen.said != Some(wanted);
                is_open.then(|| seen.message.clone())
            });
            let Some(message) = message else {
                let is_own = |seen: &Seen| {
                    seen.uid == uid && seen.wanted == wanted && seen.is_said_in(&unanswered)
                };
                let own = self.with(|all| all.get(&key).filter(|seen| is_own(seen)).cloned());
                if let Some(own) = own.filter(|_| !wanted.is_accepted && !is_told) {
                    self.events.rejected(policy, own.message);
                }
                return;
            };
            let condition = json!(condition(wanted, message.clone()));
            let written = timeout(TIMEOUT, self.patch(&key, &condition)).await;
            if is_uncertain(&written) {
                unanswered.extend(Words::of(&condition));
            }
            let is_refused = match written {
                Ok(Ok(_)) => {
                    if !wanted.is_accepted && !is_told {
                        self.events.rejected(policy, message);
                    }
                    return;
                }
                // Gone, not allowed (a chart of before), or a definition without a status.
                Ok(Err(kube::Error::Api(status)))
                    if [403, 404, 422].contains(&code_of(&status)) =>
                {
                    tracing::debug!(policy = key.1, %status, "a policy's condition is not written");
                    if !wanted.is_accepted && !is_told {
                        is_told = true;
                        self.events.rejected(policy.clone(), message);
                    }
                    true
                }
                failed => {
                    tracing::debug!(
                        policy = key.1,
                        ?failed,
                        "a policy's condition is not written yet"
                    );
                    false
                }
            };
            sleep(wait(tries, is_refused)).await;
        }
    }

    async fn patch(
        &self,
        (namespace, name): &Key,
        condition: &Value,
    ) -> kube::Result<DynamicObject> {
        let api: Api<DynamicObject> =
            Api::namespaced_with(self.client.clone(), namespace, &resource());
        let status = json!({
            "apiVersion": "bellows.dev/v1alpha1",
            "kind": "ElasticPolicy",
            "metadata": { "name": name },
            "status": { "conditions": [condition] },
        });
        let parameters = PatchParams::apply(MANAGER).force();
        api.patch_status(name, &parameters, &Patch::Apply(&status))
            .await
    }
}

fn condition(wanted: Said, message: String) -> Condition {
    let Said {
        generation,
        is_accepted,
    } = wanted;
    Condition {
        type_: ACCEPTED.to_owned(),
        status: if is_accepted { "True" } else { "False" }.to_owned(),
        reason: if is_accepted { "Valid" } else { "Invalid" }.to_owned(),
        message,
        observed_generation: Some(generation),
        last_transition_time: Time(Timestamp::now()),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    fn object(generation: i64, said: Option<(i64, &str)>) -> DynamicObject {
        let conditions = said.map(|(generation, status)| {
            json!([
                { "type": "Other", "status": "True", "observedGeneration": 9 },
                { "type": "Accepted", "status": status, "observedGeneration": generation },
            ])
        });
        serde_json::from_value(json!({
            "metadata": { "name": "p", "namespace": "dev", "generation": generation },
            "status": { "conditions": conditions },
        }))
        .unwrap()
    }

    /// What is about to be written, after each of what is seen.
    #[tokio::test]
    async fn each_agent_writes_of_a_generation_once_and_not_what_is_said() {
        let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        let conditions = Conditions::new(Client::try_from(config).unwrap(), "node".to_owned());
        let key = ("dev".to_owned(), "p".to_owned());
        let written = || conditions.with(|all| all[&key].written);
        // Another was first.
        conditions.judged(&object(1, Some((1, "True"))), Ok(String::new()));
        assert_eq!(written(), None);
        // One of another build takes it for wrong: it is contradicted once.
        conditions.judged(&object(1, Some((1, "False"))), Ok(String::new()));
        assert_eq!(written(), Some(1));
        assert!(!conditions.with(|all| all[&key].is_due()));
        conditions.judged(&object(2, Some((1, "True"))), Err("wrong"));
        assert_eq!(written(), Some(2));
        let seen = conditions.with(|all| all[&key].clone());
        assert!(!seen.wanted.is_accepted && seen.message == "wrong");
        conditions.forget(&object(2, None));
        assert!(conditions.with(|all| all.is_empty()));
    }

    /// Its first generation is another's.
    #[tokio::test]
    async fn a_policy_that_was_made_anew_is_another() {
        let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
        let conditions = Conditions::new(Client::try_from(config).unwrap(), "node".to_owned());
        let key = ("dev".to_owned(), "p".to_owned());
        let policy = |uid: &str, said| {
            let mut policy = object(1, said);
            policy.metadata.uid = Some(uid.to_owned());
            policy
        };
        let is_due = || {
            let seen = conditions.with(|all| all[&key].clone());
            (seen.is_due(), seen.written)
        };
        conditions.judged(&policy("u1", None), Ok(String::new()));
        conditions.judged(&policy("u1", Some((1, "True"))), Ok(String::new()));
        assert_eq!(is_due(), (false, Some(1)));
        // Nobody has written of it, and of the one before this agent has.
        conditions.judged(&policy("u2", Some((1, "True"))), Ok(String::new()));
        assert_eq!(is_due(), (false, None));
        conditions.judged(&policy("u2", None), Ok(String::new()));
        assert_eq!(is_due(), (false, Some(1)));
        conditions.keep(|namespace, name| (namespace, name) == ("dev", "p"));
        assert!(!conditions.with(|all| all.is_empty()));
        conditions.keep(|_, _| false);
        assert!(conditions.with(|all| all.is_empty()));
    }

    #[test]
    fn whose_words_they_are_is_known_by_their_time() {
        let wanted = Said {
            generation: 1,
            is_accepted: false,
        };
        let own = json!(condition(wanted, "wrong".to_owned()));
        let words = [Words::of(&own).unwrap()];
        let is_own = |condition: &Value| {
            let mut seen = object(1, None);
            seen.data["status"]["conditions"] = json!([condition]);
            let accepted = accepted(&seen);
            let seen = Seen {
                uid: None,
                wanted,
                message: String::new(),
                said: accepted.and_then(said),
                words: accepted.and_then(Words::of),
                written: None,
            };
            assert_eq!(seen.said, Some(wanted));
            seen.is_said_in(&words)
        };
        assert!(is_own(&own));
        for (name, value) in [
            ("lastTransitionTime", "2026-01-01T00:00:00Z"),
            ("message", "not read"),
        ] {
            let mut other = own.clone();
            other[name] = json!(value);
            assert!(!is_own(&other), "{name}");
        }
    }

    /// Takes one question, tells its method, and answers with what it was sent.
    async fn answer(stream: &mut TcpStream, patched: u16) -> Option<String> {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.ok()?);
        }
        let head = String::from_utf8(head).ok()?.to_lowercase();
        let (_, length) = head.split_once("content-length: ")?;
        let length = length.split("\r\n").next()?.parse().ok()?;
        let mut body = vec![0; length];
        stream.read_exact(&mut body).await.ok()?;
        let method = head.split(' ').next()?.to_owned();
        let code = if method == "patch" { patched } else { 201 };
        if code == 403 {
            body = json!({ "kind": "Status", "status": "Failure", "code": code })
                .to_string()
                .into();
        }
        let length = body.len();
        let answer = format!("HTTP/1.1 {code} Said\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(answer.as_bytes()).await.ok()?;
        stream.write_all(&body).await.ok()?;
        Some(method)
    }

    /// What two agents ask an API server that answers patches so, one after the other, of a policy that cannot be read.
    async fn asked(patched: u16) -> Vec<String> {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let (told, mut asked) = tokio::sync::mpsc::unbounded_channel();
        let server = tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let told = told.clone();
                tokio::spawn(async move {
                    while let Some(method) = answer(&mut stream, patched).await {
                        drop(told.send(method));
                    }
                });
            }
        });
        let key = ("dev".to_owned(), "p".to_owned());
        let nodes = (0..).map(|node| format!("n{node}"));
        let soon = nodes.filter(|node| turn(node, &key) < Duration::from_millis(10));
        let mut all = Vec::new();
        for (node, said) in soon.zip([None, Some((1, "False"))]) {
            let config = kube::Config::new(address.parse().unwrap());
            let conditions = Conditions::new(Client::try_from(config).unwrap(), node);
            // Whatever else changes of it has it read again.
            conditions.judged(&object(1, said), Err("wrong"));
            conditions.judged(&object(1, said), Err("wrong"));
            let quiet = Duration::from_millis(500);
            while let Ok(Some(method)) = timeout(quiet, asked.recv()).await {
                all.push(method);
            }
        }
        server.abort();
        all
    }

    #[tokio::test]
    async fn whoever_writes_that_a_policy_cannot_be_read_tells_it_and_nobody_else() {
        assert_eq!(asked(200).await, ["patch", "post"]);
        // It is not tried again for minutes, and told all the same.
        assert_eq!(asked(403).await, ["patch", "post"]);
    }

    #[test]
    fn what_is_not_written_is_tried_again_for_ever() {
        assert_eq!((wait(1, false), wait(TRIES - 1, false)), (AGAIN, AGAIN));
        assert_eq!((wait(TRIES, false), wait(u32::MAX, false)), (LATER, LATER));
        assert_eq!(wait(1, true), LATER);
    }

    #[test]
    fn agents_do_not_write_at_the_same_time() {
        let key = ("dev".to_owned(), "p".to_owned());
        let turns: Vec<Duration> = (0..100)
            .map(|node| turn(&format!("n{node}"), &key))
            .collect();
        assert!(
            turns
                .iter()
                .all(|turn| *turn < Duration::from_millis(SPREAD))
        );
        let first = turns.iter().min().copied().unwrap_or_default();
        let near = turns
            .iter()
            .filter(|turn| **turn < first + Duration::from_millis(500));
        assert!(near.count() < 20);
        assert_eq!(turn("n7", &key), turns[7]);
    }
}
