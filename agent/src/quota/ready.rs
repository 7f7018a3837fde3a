//! Whether a service is ready: asked from within its own network, until it is.
//!
//! There is no kubelet here whose probes could be listened to, and what a service prints is its own. So one thread for
//! each container that is boosted until it is ready enters its network namespace and asks as a kubelet would, at an
//! address that every container has. It ends with the boost.
//!
//! It must not take an answer for readiness that is none, and must not outlive whoever wants to know.

use std::{
    fs::File,
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    os::fd::AsFd as _,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use bellows_core::boost::Ready;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{cgroup::Cgroup, wake::Wake};

/// How often it is asked, and how long an answer may take.
const EVERY: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(2);
/// Nothing is kept on it but an answer's beginning.
const STACK: usize = 128 << 10;

/// Asks until it is dropped.
#[derive(Debug)]
pub(super) struct Probe(Arc<AtomicBool>);

impl Probe {
    /// Asks in the network of a container that runs; wakes somebody when the answer is yes.
    pub(super) fn start(cgroup: Cgroup, ready: &Ready, wake: Wake) -> io::Result<Self> {
        let is_ready = Arc::new(AtomicBool::new(false));
        let (told, ready) = (Arc::downgrade(&is_ready), ready.clone());
        thread::Builder::new()
            .name("ready".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                ask(&cgroup, &ready, &told, &wake);
            })?;
        Ok(Self(is_ready))
    }

    pub(super) fn is_ready(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

fn ask(cgroup: &Cgroup, ready: &Ready, told: &Weak<AtomicBool>, wake: &Wake) {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, ready.port));
    let mut failure = None;
    while told.strong_count() > 0 {
        // Anew each time: whoever was in it first may be gone.
        match enter(cgroup) {
            Ok(()) if answers(address, ready.path.as_deref()).unwrap_or(false) => {
                if let Some(told) = told.upgrade() {
                    told.store(true, Ordering::Relaxed);
                    wake.give();
                }
                return;
            }
            Ok(()) => {}
            Err(error) => {
                let kind = Some(error.kind());
                if failure != kind {
                    let path = cgroup.path().display();
                    tracing::warn!(%path, %error, "the network of a container cannot be entered (yet): it is not known to be ready");
                    failure = kind;
                }
            }
        }
        thread::sleep(EVERY);
    }
}

/// Moves this thread into the network of a container.
fn enter(cgroup: &Cgroup) -> io::Result<()> {
    let process = cgroup.a_process().ok_or(io::ErrorKind::NotFound)?;
    let network = File::open(format!("/proc/{process}/ns/net"))?;
    move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
    Ok(())
}

/// Whether somebody takes connections, or answers a request for a path with success (2xx and 3xx, as a kubelet has
/// it).
fn answers(address: SocketAddr, path: Option<&str>) -> io::Result<bool> {
    let mut stream = TcpStream::connect_timeout(&address, LONGEST)?;
    let Some(path) = path else {
        return Ok(true);
    };
    stream.set_read_timeout(Some(LONGEST))?;
    stream.set_write_timeout(Some(LONGEST))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nUser-Agent: bellows\r\nConnection: close\r\n\r\n"
    )?;
    let mut start = [0; 12];
    stream.read_exact(&mut start)?;
    Ok(is_success(&start))
}

/// `HTTP/1.1 200`, and what else means success.
fn is_success(start: &[u8]) -> bool {
    let text = std::str::from_utf8(start).unwrap_or_default();
    let code = text
        .strip_prefix("HTTP/1.")
        .and_then(|rest| rest.split_whitespace().nth(1));
    let code: Option<u16> = code.and_then(|code| code.parse().ok());
    code.is_some_and(|code| (200..400).contains(&code))
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// What is made of an answer.
    fn asked(answer: &'static [u8], path: Option<&str>) -> bool {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = Vec::new();
            let mut byte = [0];
            // All of it, or the answer would be lost with the rest. Whoever only wants to connect asks for nothing.
            while !request.ends_with(b"\r\n\r\n") && stream.read_exact(&mut byte).is_ok() {
                request.extend(byte);
            }
            drop(stream.write_all(answer));
            request
        });
        let is_ready = answers(address, path).unwrap_or(false);
        let request = server.join().unwrap();
        assert_eq!(request.starts_with(b"GET /x HTTP/1.1\r\n"), path.is_some());
        is_ready
    }

    #[test]
    fn only_success_is_readiness() {
        for yes in [
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.0 204 None\r\n",
            "HTTP/1.1 302 Found\r\n",
        ] {
            assert!(asked(yes.as_bytes(), Some("/x")), "{yes}");
        }
        for no in [
            "HTTP/1.1 404 Not Found\r\n",
            "HTTP/1.1 503 Busy\r\n",
            "HTTP/1.1 20",
            "SSH-2.0-OpenSSH_9",
            "",
        ] {
            assert!(!asked(no.as_bytes(), Some("/x")), "{no}");
        }
        assert!(asked(b"", None));
    }

    #[test]
    fn where_nobody_listens_nobody_is_ready() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        assert!(!answers(address, None).unwrap_or(false));
    }
}
