//! Answers `GET /metrics`, and at an address of its own `GET /healthz`.
//!
//! Who may see the metrics and who asks for the agent's health are not the same. Healthy is an agent whose controller
//! and reflex have gone round since they were asked: a question goes through both of them, and nobody is woken for it
//! while nobody asks.
//!
//! A predecessor that was killed keeps its socket for as long as the kernel takes its programs off their functions,
//! which is longer than its lock, and a network may come up later than the agent. Nobody must be left unguarded for
//! that: the address is waited for beside all else.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::{Arc, mpsc::SyncSender},
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
use tokio::{
    net::TcpListener,
    sync::{Semaphore, oneshot},
    time::{Instant, sleep, timeout},
};

use crate::{guard::Input, metrics::METRICS};

/// Connections at once: whoever opens more waits.
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

/// What is answered at an address.
#[derive(Clone, Debug)]
pub enum Served {
    /// `/metrics`.
    Metrics,
    /// `/healthz`; the controller that is asked.
    Health(SyncSender<Input>),
}

impl Served {
    const fn path(&self) -> &'static str {
        match self {
            Self::Metrics => "/metrics",
            Self::Health(_) => "/healthz",
        }
    }
}

/// Answers for ever. Whatever is wrong with the address is told, and tried again: a node must not be left alone for it.
pub async fn serve(address: SocketAddr, served: Served) -> Infallible {
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    let listener = listener(address, served.path()).await;
    loop {
        // Nobody closes it.
        let room = Arc::clone(&room).acquire_owned().await.ok();
        let stream = match listener.accept().await {
            Ok((stream, _from)) => stream,
            Err(error) => {
                // Too many open files, or a connection that has ended already.
                tracing::debug!(%error, "a connection is not taken");
                sleep(AGAIN).await;
                continue;
            }
        };
        let served = served.clone();
        tokio::spawn(async move {
            let answer = service_fn(|request| answer(&served, request));
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS)
                .serve_connection(TokioIo::new(stream), answer);
            if let Ok(Err(error)) = timeout(LONGEST, connection).await {
                tracing::debug!(%error, "a connection has failed");
            }
            drop(room);
        });
    }
}

async fn listener(address: SocketAddr, path: &str) -> TcpListener {
    let begun = Instant::now();
    let mut is_told = false;
    loop {
        match TcpListener::bind(address).await {
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
        (&Method::GET | &Method::HEAD, path) if path == served.path() => said(served).await,
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
        Served::Health(inputs) if goes_round(inputs, PATIENCE).await => {
            (StatusCode::OK, "ok\n".to_owned())
        }
        Served::Health(_) => {
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

    use bellows_core::{Bytes, CgroupId};
    use tokio::runtime;

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
        fn raise(&mut self, _cgroup: &Cgroup, _from: Bytes, _to: Bytes) {}
        fn lower(&mut self, _cgroup: &Cgroup, _from: Bytes, _to: Bytes) {}
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

    #[test]
    fn an_agent_that_is_behind_with_everything_is_not_healthy() {
        let (inputs, receiver) = mpsc::sync_channel(1);
        inputs.send(Input::Stop).unwrap();
        assert!(!asked(&inputs, PATIENCE));
        drop(receiver);
    }
}
