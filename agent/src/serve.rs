//! Answers `GET /metrics`, and at an address of its own `GET /healthz` and `GET /readyz`.
//!
//! Who may see the metrics and who asks for the agent's health are not the same. Healthy is an agent whose controller
//! and reflex have gone round since they were asked: a question goes through both of them, and nobody is woken for it
//! while nobody asks. Ready is one that is healthy and has come to know its pods: one that cannot reach the API (a network
//! policy, a right that is missing) has nobody to guard, and starting it again would not help.
//!
//! A predecessor that was killed keeps its socket for as long as the kernel takes its programs off their functions,
//! which is longer than its lock, and a network may come up later than the agent. Nobody must be left unguarded for
//! that: the address is waited for beside all else.
//!
//! Whoever reaches the port may open connections and say nothing. The kubelet must not wait for them, since it kills an
//! agent that it gets no answer from: the oldest that has not asked yet makes room for who comes.

use std::{
    collections::VecDeque,
    convert::Infallible,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::SyncSender,
    },
    time::Duration,
};

use http_body_util::Full;
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    header::{CONTENT_TYPE, HeaderValue},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::io::Errno;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::{AbortHandle, JoinSet},
    time::{Instant, sleep, timeout},
};

use crate::{guard::Input, metrics::METRICS};

/// Connections at once.
const CONNECTIONS: usize = 16;
/// How long one may last. Whoever scrapes asks once.
const LONGEST: Duration = Duration::from_secs(30);
/// How long its request may take to arrive.
const HEADERS: Duration = Duration::from_secs(5);
/// An address that cannot be had for so long is an error.
const TOLD_AFTER: Duration = Duration::from_secs(5);
/// What fails is tried again after this.
const AGAIN: Duration = Duration::from_millis(500);

/// For how long an answer of the agent's threads is waited for. The controller may be at work, or without a CPU.
const PATIENCE: Duration = Duration::from_secs(5);

const HEALTH: &str = "/healthz";
const READY: &str = "/readyz";

/// What is answered at an address.
#[derive(Clone, Debug)]
pub enum Served {
    /// `/metrics`.
    Metrics,
    /// `/healthz` and `/readyz`; the controller that is asked, and whether it is known whom it is to guard.
    Health(SyncSender<Input>, Arc<AtomicBool>),
}

impl Served {
    const fn path(&self) -> &'static str {
        match self {
            Self::Metrics => "/metrics",
            Self::Health(..) => HEALTH,
        }
    }

    fn has(&self, path: &str) -> bool {
        path == self.path() || (path == READY && matches!(self, Self::Health(..)))
    }

    fn is_ready(&self) -> bool {
        !matches!(self, Self::Health(_, knows) if !knows.load(Ordering::Relaxed))
    }
}

/// Answers for ever. Whatever is wrong with the address is told, and tried again: a node must not be left alone for it.
pub async fn serve(address: SocketAddr, served: Served) -> Infallible {
    let listener = listener(address, served.path()).await;
    answers(&listener, &served).await
}

async fn answers(listener: &TcpListener, served: &Served) -> Infallible {
    let mut connections = Connections::default();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _from)) => stream,
            Err(error) => {
                // Too many open files, or a connection that has ended already.
                tracing::debug!(%error, "a connection is not taken");
                sleep(AGAIN).await;
                continue;
            }
        };
        connections.make_room().await;
        connections.take(stream, served.clone());
    }
}

/// Those that are open.
#[derive(Default)]
struct Connections {
    tasks: JoinSet<()>,
    /// The oldest first, and whether each has asked.
    all: VecDeque<(AbortHandle, Arc<AtomicBool>)>,
}

impl Connections {
    /// Until there is room for one more. Those that have asked are answered first: there are never more questions under way
    /// than connections, however many come.
    async fn make_room(&mut self) {
        loop {
            while self.tasks.try_join_next().is_some() {}
            self.all.retain(|(task, _)| !task.is_finished());
            if self.tasks.len() < CONNECTIONS {
                return;
            }
            let is_silent =
                |(_, has_asked): &(_, Arc<AtomicBool>)| !has_asked.load(Ordering::Relaxed);
            let silent = self.all.iter().position(is_silent);
            if let Some((task, _)) = silent.and_then(|oldest| self.all.remove(oldest)) {
                task.abort();
            }
            self.tasks.join_next().await;
        }
    }

    /// One question is answered, and the connection closed.
    fn take(&mut self, stream: TcpStream, served: Served) {
        let has_asked = Arc::<AtomicBool>::default();
        let asks = Arc::clone(&has_asked);
        let task = self.tasks.spawn(async move {
            let answer = service_fn(|request| {
                asks.store(true, Ordering::Relaxed);
                answer(&served, request)
            });
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .keep_alive(false)
                .header_read_timeout(HEADERS)
                .serve_connection(TokioIo::new(stream), answer);
            if let Ok(Err(error)) = timeout(LONGEST, connection).await {
                tracing::debug!(%error, "a connection has failed");
            }
        });
        self.all.push_back((task, has_asked));
    }
}

/// Every address of IPv4, where `address` is every one of IPv6 and the kernel has no IPv6 (`ipv6.disable=1`). Where it has, a
/// socket of IPv6 is one of IPv4, too (`net.ipv6.bindv6only`, 0 in every new network namespace).
fn without_ipv6(address: SocketAddr, error: &std::io::Error) -> Option<SocketAddr> {
    let is_without = [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL].map(Some);
    let is_without = is_without.contains(&Errno::from_io_error(error));
    let is_every = address.is_ipv6() && address.ip().is_unspecified();
    (is_without && is_every).then(|| (Ipv4Addr::UNSPECIFIED, address.port()).into())
}

async fn bound(address: SocketAddr) -> std::io::Result<TcpListener> {
    match TcpListener::bind(address).await {
        Err(error) => match without_ipv6(address, &error) {
            Some(address) => TcpListener::bind(address).await,
            None => Err(error),
        },
        bound => bound,
    }
}

async fn listener(address: SocketAddr, path: &str) -> TcpListener {
    let begun = Instant::now();
    let mut is_told = false;
    loop {
        match bound(address).await {
            Ok(listener) => return listener,
            Err(error) if !is_told && begun.elapsed() >= TOLD_AFTER => {
                is_told = true;
                tracing::error!(%address, %error, "{path} is not served: give it another address");
            }
            Err(error) => tracing::debug!(%error, "{path} is not served yet"),
        }
        sleep(AGAIN).await;
    }
}

async fn answer(
    served: &Served,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, READY) if !served.is_ready() => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the API has not said yet which pods there are: its log says why\n".to_owned(),
        ),
        (&Method::GET | &Method::HEAD, path) if served.has(path) => said(served).await,
        (&Method::GET | &Method::HEAD, _) => {
            (StatusCode::NOT_FOUND, format!("see {}\n", served.path()))
        }
        _ => (StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned()),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    if status == StatusCode::OK && matches!(served, Served::Metrics) {
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    Ok(response)
}

async fn said(served: &Served) -> (StatusCode, String) {
    match served {
        Served::Metrics => (StatusCode::OK, METRICS.text()),
        Served::Health(inputs, _) if goes_round(inputs, PATIENCE).await => {
            (StatusCode::OK, "ok\n".to_owned())
        }
        Served::Health(..) => {
            let why = "its controller or its reflex does not go round";
            tracing::error!("{why}");
            (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n"))
        }
    }
}

/// Whether the controller and the reflex behind it answer in time.
async fn goes_round(inputs: &SyncSender<Input>, patience: Duration) -> bool {
    let (answer, answered) = oneshot::channel();
    // A full channel is one that nobody empties, or not fast enough.
    inputs.try_send(Input::Alive(answer)).is_ok()
        && matches!(timeout(patience, answered).await, Ok(Ok(())))
}

#[cfg(test)]
mod tests {
    use std::{fs, sync::mpsc, thread};

    use bellows_core::{Bytes, CgroupId, Nanos};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        runtime,
    };

    use super::*;
    use crate::{
        actuate::reflex::Reflex,
        cgroup::Cgroup,
        guard::{self, Controller, Requester},
        ledger::{Ledger, Record},
        signal::{files::Files, source::Source},
    };

    struct Nobody;

    impl Requester for Nobody {
        fn raise(&mut self, _cgroup: &Cgroup, _to: Bytes, _patience: Nanos) {}
        fn lower(&mut self, _cgroup: &Cgroup, _to: Bytes) {}
        fn take_back(&mut self, _cgroup: &Cgroup, _to: Bytes, _limit: Bytes) {}
        fn record(&mut self, _cgroup: &Cgroup, _record: &Record) {}
        fn not_guarded(&mut self, _cgroup: CgroupId) {}
    }

    fn asked(inputs: &SyncSender<Input>, patience: Duration) -> bool {
        let runtime = runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .unwrap();
        runtime.block_on(goes_round(inputs, patience))
    }

    #[test]
    fn an_agent_is_healthy_for_as_long_as_both_of_its_threads_go_round() {
        let directory = std::env::temp_dir().join(format!("bellows-serve-{}", std::process::id()));
        let ledger = Ledger::open(&directory.join("ledger")).unwrap();
        let (inputs, receiver) = mpsc::sync_channel(8);
        let source = Source::Files(Files::new().unwrap());
        let sink = guard::sink(inputs.clone());
        let reflex = Reflex::start(source, ledger.another().unwrap(), sink).unwrap();
        let ways = (inputs.clone(), receiver);
        let controller = Controller::new(None, reflex, ledger, ways, Nobody);
        // Nobody has begun to go round.
        assert!(!asked(&inputs, Duration::from_millis(50)));
        let running = thread::spawn(move || controller.run());
        assert!(asked(&inputs, PATIENCE));
        inputs.send(Input::Stop).unwrap();
        drop(running.join().unwrap());
        assert!(!asked(&inputs, PATIENCE));
        fs::remove_dir_all(directory).unwrap();
    }

    async fn answered(port: u16) -> String {
        answered_at(port, "/metrics").await
    }

    async fn answered_at(port: u16, path: &str) -> String {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .await
            .unwrap();
        let question = format!("GET {path} HTTP/1.1\r\nHost: agent\r\n\r\n");
        stream.write_all(question.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    /// The kubelet waits for 10 s.
    #[tokio::test]
    async fn whoever_says_nothing_keeps_nobody_from_an_answer() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = tokio::spawn(async move { answers(&listener, &Served::Metrics).await });
        let mut silent = Vec::new();
        for _ in 0..4 * CONNECTIONS {
            silent.push(
                TcpStream::connect((Ipv4Addr::LOCALHOST, port))
                    .await
                    .unwrap(),
            );
        }
        let answer = timeout(Duration::from_secs(3), answered(port)).await;
        let answer = answer.expect("it waits for those that say nothing");
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
        // The oldest has made room, the latest is still waited for.
        let mut byte = [0];
        let mut read = async |stream: &mut TcpStream| {
            let read = stream.read(&mut byte);
            timeout(Duration::from_millis(200), read).await.is_ok()
        };
        assert!(read(&mut silent[0]).await);
        let latest = silent.last_mut().unwrap();
        assert!(!read(latest).await);
        serving.abort();
    }

    #[tokio::test]
    async fn who_does_not_know_its_pods_is_healthy_and_not_ready() {
        let (inputs, asked) = mpsc::sync_channel(8);
        let controller = thread::spawn(move || {
            for input in asked {
                if let Input::Alive(answer) = input {
                    answer.send(()).unwrap();
                }
            }
        });
        let knows = Arc::<AtomicBool>::default();
        let served = Served::Health(inputs, Arc::clone(&knows));
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = tokio::spawn(async move { answers(&listener, &served).await });
        let said = async |path| answered_at(port, path).await.contains("200 OK");
        assert_eq!(
            (said("/healthz").await, said("/readyz").await),
            (true, false)
        );
        knows.store(true, Ordering::Relaxed);
        assert_eq!(
            (said("/healthz").await, said("/readyz").await),
            (true, true)
        );
        assert!(!said("/metrics").await);
        serving.abort();
        drop(serving.await);
        controller.join().unwrap();
    }

    #[tokio::test]
    async fn every_address_is_one_of_ipv4_too() {
        let every: SocketAddr = "[::]:0".parse().unwrap();
        let listener = bound(every).await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let serving = tokio::spawn(async move { answers(&listener, &Served::Metrics).await });
        assert!(answered(port).await.starts_with("HTTP/1.1 200 OK"));
        serving.abort();
    }

    #[test]
    fn a_kernel_without_ipv6_has_every_address_of_ipv4() {
        let wanted = |address: &str, error: Errno| {
            without_ipv6(address.parse().unwrap(), &error.into()).map(|other| other.to_string())
        };
        for error in [Errno::AFNOSUPPORT, Errno::ADDRNOTAVAIL] {
            assert_eq!(wanted("[::]:9465", error), Some("0.0.0.0:9465".to_owned()));
            // What names one is a mistake, or not there yet.
            assert_eq!(wanted("[::1]:9465", error), None);
            assert_eq!(wanted("10.0.0.7:9465", error), None);
        }
        assert_eq!(wanted("[::]:9465", Errno::ADDRINUSE), None);
    }

    #[test]
    fn an_agent_that_is_behind_with_everything_is_not_healthy() {
        let (inputs, receiver) = mpsc::sync_channel(1);
        inputs.send(Input::Stop).unwrap();
        assert!(!asked(&inputs, PATIENCE));
        drop(receiver);
    }
}
