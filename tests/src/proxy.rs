//! Stands between the agent and its runtime, and is late.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::Shutdown,
    os::unix::net::{UnixListener, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::Result;

/// How often is looked whether it is still late.
const LOOK: Duration = Duration::from_millis(20);

/// By how many milliseconds requests arrive late, and answers; for all connections.
#[derive(Clone, Debug, Default)]
pub(crate) struct Delays {
    pub(crate) requests: Arc<AtomicU64>,
    pub(crate) answers: Arc<AtomicU64>,
}

/// Forwards what is said at one socket to another, for as long as this process lives.
pub(crate) fn start(socket: &Path, target: &Path) -> Result<Delays> {
    if let Some(directory) = socket.parent() {
        fs::create_dir_all(directory)?;
    }
    let listener = UnixListener::bind(socket)?;
    let delays = Delays::default();
    let (delayed, target) = (delays.clone(), target.to_owned());
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            // Whoever cannot be reached is not there for the client either.
            if let Err(error) = connect(client, &target, &delayed) {
                eprintln!("proxy: {error:#}");
            }
        }
    });
    Ok(delays)
}

fn connect(client: UnixStream, target: &PathBuf, delays: &Delays) -> Result<()> {
    let server = UnixStream::connect(target)?;
    let requests = (client.try_clone()?, server.try_clone()?);
    forward(requests.0, requests.1, Arc::clone(&delays.requests));
    forward(server, client, Arc::clone(&delays.answers));
    Ok(())
}

/// Passes on what arrives, each part so late; the end at once.
fn forward(mut from: UnixStream, mut to: UnixStream, delay: Arc<AtomicU64>) {
    let (parts, received) = mpsc::channel::<(Instant, Vec<u8>)>();
    let other = (from.try_clone(), to.try_clone());
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            if parts
                .send((Instant::now(), buffer[..length].to_vec()))
                .is_err()
            {
                break;
            }
        }
        if let (Ok(from), Ok(to)) = other {
            // One that is closed already is what is wanted.
            drop(from.shutdown(Shutdown::Both));
            drop(to.shutdown(Shutdown::Both));
        }
    });
    thread::spawn(move || {
        for (at, part) in received {
            while at.elapsed() < Duration::from_millis(delay.load(Ordering::Relaxed)) {
                thread::sleep(LOOK);
            }
            if to.write_all(&part).is_err() {
                return;
            }
        }
    });
}
