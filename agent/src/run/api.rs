//! The way to the API, and how long it is waited for.
//!
//! A machine that dies with an API server on it sends nothing any more, not even that it is gone, and whoever waits for it
//! waits for ever: neither kube nor the kernel asks whether the other end of a quiet connection is there. So every
//! watch ends after a time, by the server if it is alive, and what nothing is read from for longer than that is over.
//!
//! The first must come before the second: a watch without changes may be quiet until its end. An API server sends a bookmark
//! about once a minute, but none for a kind of which it has not seen an event yet (`dispatchEvents` and `nextBookmarkTime`,
//! staging/src/k8s.io/apiserver/pkg/storage/cacher; read, not tried).
//!
//! So each watch costs the API server a request in two minutes, in place of one in five. It begins where the last bookmark was,
//! two seconds before the end, and lists nothing.

use std::time::Duration;

use kube::{Config, runtime::watcher};

use super::RunError;

/// For how many seconds the API server is asked to keep a watch. kube waits 5 s longer for its next item.
const WATCHED: u32 = 120;
/// How long nothing may come on a connection. Anything but a watch is answered within a minute (`--request-timeout` of the
/// API server), or not at all.
const QUIET: Duration = Duration::from_secs(150);

const _: () = assert!(QUIET.as_secs() > WATCHED as u64 + 5);

/// Where the API is, and with what rights.
///
/// # Errors
///
/// When nobody says it.
pub(super) async fn config() -> Result<Config, RunError> {
    let config = Config::infer().await.map_err(RunError::Config)?;
    Ok(waiting(config, QUIET))
}

/// A connection that was kept for the next request was quiet for as long: that does not count.
fn waiting(mut config: Config, quiet: Duration) -> Config {
    config.read_timeout = Some(quiet);
    config.reset_reader_on_write = true;
    config
}

/// How everything is watched.
pub(super) fn watched() -> watcher::Config {
    watcher::Config::default().timeout(WATCHED)
}

#[cfg(test)]
mod tests {
    use futures::StreamExt as _;
    use k8s_openapi::api::core::v1::Pod;
    use kube::{Api, Client, api::ListParams};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
        time::{sleep, timeout},
    };

    use super::*;

    const LIST: &str =
        r#"{"apiVersion":"v1","kind":"PodList","metadata":{"resourceVersion":"7"},"items":[]}"#;

    /// The path that is asked for next on a connection.
    async fn asked(stream: &mut TcpStream) -> String {
        let mut question = Vec::new();
        while !question.ends_with(b"\r\n\r\n") {
            question.push(stream.read_u8().await.unwrap());
        }
        let question = String::from_utf8(question).unwrap();
        question.split(' ').nth(1).unwrap().to_owned()
    }

    fn client(listener: &TcpListener, quiet: Duration) -> Client {
        let address = format!("http://{}", listener.local_addr().unwrap());
        let config = waiting(Config::new(address.parse().unwrap()), quiet);
        Client::try_from(config).unwrap()
    }

    #[tokio::test]
    async fn who_takes_a_question_and_dies_is_not_waited_for() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pods: Api<Pod> = Api::all(client(&listener, Duration::from_millis(100)));
        let dead = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            asked(&mut stream).await;
            sleep(Duration::from_secs(60)).await;
        });
        let all = ListParams::default();
        let listed = timeout(Duration::from_secs(10), pods.list(&all)).await;
        assert!(listed.expect("it is waited for").is_err());
        dead.abort();
    }

    /// As long as the last answer, and the silence before the next question.
    #[tokio::test]
    async fn a_connection_that_was_kept_is_as_good_as_another() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pods: Api<Pod> = Api::all(client(&listener, Duration::from_millis(6000)));
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            for _ in 0..2 {
                asked(&mut stream).await;
                sleep(Duration::from_millis(3500)).await;
                let length = LIST.len();
                let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{LIST}");
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        pods.list(&ListParams::default()).await.unwrap();
        sleep(Duration::from_millis(3500)).await;
        pods.list(&ListParams::default()).await.unwrap();
        server.await.unwrap();
    }

    #[tokio::test]
    async fn a_watch_is_asked_for_until_an_end() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let pods: Api<Pod> = Api::all(client(&listener, QUIET));
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            asked(&mut stream).await;
            let length = LIST.len();
            let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{LIST}");
            stream.write_all(answer.as_bytes()).await.unwrap();
            asked(&mut stream).await
        });
        let watching = tokio::spawn(async move {
            let mut events = std::pin::pin!(watcher(pods, watched()));
            while events.next().await.is_some() {}
        });
        let asked = timeout(Duration::from_secs(10), server).await;
        let asked = asked.unwrap().unwrap();
        assert!(asked.contains("timeoutSeconds=120"), "{asked}");
        watching.abort();
    }
}
