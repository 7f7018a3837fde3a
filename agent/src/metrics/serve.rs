//! Answers `GET /metrics`.
//!
//! A predecessor that was killed keeps its socket for as long as the kernel takes its programs off their functions,
//! which is longer than its lock, and a network may come up later than the agent. Nobody must be left unguarded for
//! that: the address is waited for beside all else.

use std::{convert::Infallible, net::SocketAddr, time::Duration};

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
    sync::Semaphore,
    time::{Instant, sleep, timeout},
};

use super::METRICS;

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

/// Answers for ever. Whatever is wrong with the address is told, and tried again: a node must not be left alone for it.
pub async fn serve(address: SocketAddr) -> Infallible {
    static ROOM: Semaphore = Semaphore::const_new(CONNECTIONS);
    let listener = listener(address).await;
    loop {
        // Nobody closes it.
        let room = ROOM.acquire().await.ok();
        let stream = match listener.accept().await {
            Ok((stream, _from)) => stream,
            Err(error) => {
                // Too many open files, or a connection that has ended already.
                tracing::debug!(%error, "a connection is not taken");
                sleep(AGAIN).await;
                continue;
            }
        };
        tokio::spawn(async move {
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADERS)
                .serve_connection(TokioIo::new(stream), service_fn(answer));
            if let Ok(Err(error)) = timeout(LONGEST, connection).await {
                tracing::debug!(%error, "a connection has failed");
            }
            drop(room);
        });
    }
}

async fn listener(address: SocketAddr) -> TcpListener {
    let begun = Instant::now();
    let mut is_told = false;
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return listener,
            Err(error) if !is_told && begun.elapsed() >= TOLD_AFTER => {
                is_told = true;
                tracing::error!(%address, %error, "no metrics are served: give --metrics another address");
            }
            Err(error) => tracing::debug!(%error, "metrics are not served yet"),
        }
        sleep(AGAIN).await;
    }
}

async fn answer(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let (status, text) = match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/metrics") => (StatusCode::OK, METRICS.text()),
        (&Method::GET | &Method::HEAD, _) => (StatusCode::NOT_FOUND, "see /metrics\n".to_owned()),
        _ => (StatusCode::METHOD_NOT_ALLOWED, "only GET\n".to_owned()),
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    if status == StatusCode::OK {
        let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    }
    Ok(response)
}
