//! Stands between the agent and the API server: late, or refusing.
//!
//! It speaks plain HTTP to the agent, so that what is said can be seen, and asks the real API server with the bench's own
//! credentials. What it does to a request is decided when that comes.

use std::{
    convert::Infallible,
    fs,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::BodyExt as _;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use kube::{Client, client::Body};
use serde_json::json;
use tokio::{net::TcpListener, runtime::Runtime};

/// What happens to what the agent asks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Way {
    #[default]
    Through,
    /// Every request arrives so late.
    Late(Duration),
    /// Every resize is answered with this code, and goes no further.
    Refused(u16),
}

/// The proxy.
#[derive(Clone, Debug, Default)]
pub(crate) struct ApiProxy(Arc<Mutex<Way>>);

impl ApiProxy {
    /// Starts it, for as long as this process lives, and writes a kubeconfig that leads to it.
    pub(crate) fn start(
        client: impl Future<Output = Result<Client>> + Send + 'static,
        kubeconfig: &Path,
    ) -> Result<Self> {
        let proxy = Self::default();
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let port = listener.local_addr()?.port();
        let serving = proxy.clone();
        let runtime = Runtime::new()?;
        thread::spawn(move || {
            let ended = runtime.block_on(async move {
                let client = client.await?;
                serving
                    .serve(client, TcpListener::from_std(listener)?)
                    .await
            });
            eprintln!("the API proxy has ended: {ended:?}");
        });
        let kubeconfig_text = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "c", "cluster": { "server": format!("http://127.0.0.1:{port}") } }],
            "users": [{ "name": "u", "user": {} }],
            "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
            "current-context": "x",
        });
        fs::write(kubeconfig, kubeconfig_text.to_string()).context("write a kubeconfig")?;
        Ok(proxy)
    }

    /// From now on.
    pub(crate) fn set(&self, way: Way) -> Result<()> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = way;
        Ok(())
    }

    fn way(&self) -> Way {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn serve(self, client: Client, listener: TcpListener) -> Result<()> {
        loop {
            let (stream, _) = listener.accept().await?;
            let (this, client) = (self.clone(), client.clone());
            drop(tokio::spawn(async move {
                let answer = service_fn(move |request| {
                    let (this, client) = (this.clone(), client.clone());
                    async move { Ok::<_, Infallible>(this.answer(client, request).await) }
                });
                // Whoever closes a connection has its reason.
                drop(
                    http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), answer)
                        .await,
                );
            }));
        }
    }

    async fn answer(&self, client: Client, request: Request<Incoming>) -> Response<Body> {
        match self.way() {
            Way::Through => {}
            Way::Late(by) => tokio::time::sleep(by).await,
            Way::Refused(code) => {
                if request.method() == Method::PATCH && request.uri().path().ends_with("/resize") {
                    return refusal(code);
                }
            }
        }
        let (mut parts, body) = request.into_parts();
        parts.headers.remove(header::HOST);
        let Ok(body) = body.collect().await else {
            return refusal(400);
        };
        let request = Request::from_parts(parts, Body::from(body.to_bytes()));
        match client.send(request).await {
            Ok(answer) => answer,
            Err(error) => {
                eprintln!("proxy: {error}");
                refusal(502)
            }
        }
    }
}

/// As the API says it.
fn refusal(code: u16) -> Response<Body> {
    let status = json!({
        "kind": "Status",
        "apiVersion": "v1",
        "metadata": {},
        "status": "Failure",
        "message": "refused by the bench",
        "reason": match code {
            409 => "Conflict",
            429 => "TooManyRequests",
            _ => "InternalError",
        },
        "code": code,
    });
    let mut answer = Response::new(Body::from(status.to_string().into_bytes()));
    *answer.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::BAD_GATEWAY);
    answer.headers_mut().insert(
        header::CONTENT_TYPE,
        http::HeaderValue::from_static("application/json"),
    );
    answer
}
