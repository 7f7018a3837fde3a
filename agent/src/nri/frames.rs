//! How messages of NRI are framed: one socket carries two connections (`pkg/net/multiplex`, github.com/containerd/nri),
//! each of which carries calls and answers of ttrpc (PROTOCOL.md, github.com/containerd/ttrpc).
//!
//! What does not fit is an error that ends the socket: after it nobody knows where the next frame begins.

use thiserror::Error;

/// The connection on which the runtime calls the plugin.
pub(super) const PLUGIN: u32 = 1;
/// The one on which the plugin calls the runtime.
pub(super) const RUNTIME: u32 = 2;
/// Kinds of messages.
pub(super) const CALL: u8 = 1;
pub(super) const ANSWER: u8 = 2;

/// Connection and length.
const OUTER: usize = 8;
/// Length, stream, kind and flags.
const INNER: usize = 10;
/// ttrpc's largest message.
const LARGEST: usize = 4 << 20;
/// What is written at once: the other side reads into a buffer of this size, and gives up on a piece that does not fit
/// (`conn.Read`, pkg/net/multiplex/mux.go).
const PIECE: usize = 4096;

/// Why a socket cannot be read any further.
#[derive(Debug, Error, PartialEq, Eq)]
pub(super) enum FrameError {
    /// A length.
    #[error("a message of {0} bytes, where at most {LARGEST} are allowed: is this an NRI socket?")]
    TooLarge(usize),
    /// A connection.
    #[error("connection {0}, where there are {PLUGIN} and {RUNTIME}: is this an NRI socket?")]
    Connection(u32),
}

/// A call or an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) connection: u32,
    pub(super) stream: u32,
    pub(super) kind: u8,
    pub(super) data: Vec<u8>,
}

impl Message {
    /// As it is sent.
    pub(super) fn encoded(&self) -> Vec<u8> {
        let mut message = length(self.data.len()).to_vec();
        message.extend(self.stream.to_be_bytes());
        message.extend([self.kind, 0]);
        message.extend(&self.data);
        let mut bytes = Vec::with_capacity(message.len() + OUTER);
        for piece in message.chunks(PIECE) {
            bytes.extend(self.connection.to_be_bytes());
            bytes.extend(length(piece.len()));
            bytes.extend(piece);
        }
        bytes
    }
}

fn length(length: usize) -> [u8; 4] {
    u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes()
}

fn number(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at + 4)?;
    bytes.try_into().ok().map(u32::from_be_bytes)
}

fn size(bytes: &[u8], at: usize) -> Option<usize> {
    number(bytes, at).and_then(|number| usize::try_from(number).ok())
}

/// Puts messages together from what arrives.
#[derive(Debug, Default)]
pub(super) struct Decoder {
    read: Vec<u8>,
    /// What has arrived of each connection.
    connections: [Vec<u8>; 2],
}

impl Decoder {
    /// Takes what has arrived.
    pub(super) fn feed(&mut self, bytes: &[u8]) {
        self.read.extend(bytes);
    }

    /// The next message, once all of it is there.
    pub(super) fn next(&mut self) -> Result<Option<Message>, FrameError> {
        loop {
            for connection in [PLUGIN, RUNTIME] {
                if let Some(message) = self.of(connection)? {
                    return Ok(Some(message));
                }
            }
            let (Some(connection), Some(length)) = (number(&self.read, 0), size(&self.read, 4))
            else {
                return Ok(None);
            };
            if length > LARGEST + INNER {
                return Err(FrameError::TooLarge(length));
            }
            if self.read.len() < OUTER + length {
                return Ok(None);
            }
            let index = match connection {
                PLUGIN => 0,
                RUNTIME => 1,
                other => return Err(FrameError::Connection(other)),
            };
            let piece = self.read.drain(..OUTER + length).skip(OUTER);
            self.connections[index].extend(piece);
        }
    }

    fn of(&mut self, connection: u32) -> Result<Option<Message>, FrameError> {
        let index = usize::from(connection == RUNTIME);
        let bytes = &mut self.connections[index];
        let (Some(length), Some(stream)) = (size(bytes, 0), number(bytes, 4)) else {
            return Ok(None);
        };
        if length > LARGEST {
            return Err(FrameError::TooLarge(length));
        }
        if bytes.len() < INNER + length {
            return Ok(None);
        }
        let kind = bytes[8];
        let data = bytes.drain(..INNER + length).skip(INNER).collect();
        Ok(Some(Message {
            connection,
            stream,
            kind,
            data,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(connection: u32, stream: u32, size: usize) -> Message {
        let data = (0..size).map(|at| u8::try_from(at % 251).unwrap());
        Message {
            connection,
            stream,
            kind: CALL,
            data: data.collect(),
        }
    }

    #[test]
    fn what_is_sent_is_what_arrives_however_it_is_cut() {
        let sent = [
            message(PLUGIN, 1, 0),
            message(RUNTIME, 3, 9000),
            message(PLUGIN, 5, 4096),
        ];
        let bytes: Vec<u8> = sent.iter().flat_map(Message::encoded).collect();
        for cut in [1, 7, 4096, bytes.len()] {
            let mut decoder = Decoder::default();
            let mut arrived = Vec::new();
            for piece in bytes.chunks(cut) {
                decoder.feed(piece);
                while let Some(message) = decoder.next().unwrap() {
                    arrived.push(message);
                }
            }
            assert_eq!(arrived, sent, "{cut}");
        }
    }

    #[test]
    fn pieces_of_both_connections_may_alternate() {
        let (first, second) = (message(PLUGIN, 1, 5000), message(RUNTIME, 1, 6000));
        let pieces = |message: &Message| {
            let bytes = message.encoded();
            let (first, second) = bytes.split_at(OUTER + PIECE);
            [first.to_vec(), second.to_vec()]
        };
        let ([a, b], [c, d]) = (pieces(&first), pieces(&second));
        let mut decoder = Decoder::default();
        decoder.feed(&[a, c, b, d].concat());
        assert_eq!(decoder.next().unwrap(), Some(first));
        assert_eq!(decoder.next().unwrap(), Some(second));
        assert_eq!(decoder.next().unwrap(), None);
    }

    #[test]
    fn nonsense_is_an_error_and_takes_no_memory() {
        for (bytes, error) in [
            (
                b"HTTP/1.1 400 Bad Request".as_slice(),
                FrameError::TooLarge(0x2f31_2e31),
            ),
            (&[0, 0, 0, 9, 0, 0, 0, 0], FrameError::Connection(9)),
            (
                &[0, 0, 0, 1, 0, 0, 0, 10, 1, 0, 0, 0, 0, 0, 0, 1, 1, 0],
                FrameError::TooLarge(1 << 24),
            ),
        ] {
            let mut decoder = Decoder::default();
            decoder.feed(bytes);
            assert_eq!(decoder.next(), Err(error));
        }
    }
}
