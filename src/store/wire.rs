//! The first words of PyTorch's `TCPStore` protocol, spoken from Rust.
//!
//! libtorch's client waits for a server that answers until its timeout is over, whatever is wrong:
//! a name that does not resolve, a port where something else listens. So we knock first, and give
//! libtorch only addresses where a store answered.
//!
//! A request is a byte of opcode, then its fields, little-endian; a string is its length in eight
//! bytes, then its bytes. Used here: `VALIDATE` (0, magic in four bytes, no answer), `PING` (13, four
//! bytes that come back), `ADD` (4, key, eight bytes; eight bytes come back), `CHECK` (5, number of
//! keys, keys; one byte comes back, 0 for all there). Keys of users begin with `/`; `init/` is the
//! store's own counter of the workers that joined.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::thread;
use std::time::{Duration, Instant};

const VALIDATE: u8 = 0;
const ADD: u8 = 4;
const CHECK: u8 = 5;
const PING: u8 = 13;
const MAGIC: u32 = 0x3C85_F7CE;
const WORKERS: &str = "init/";

/// How long something that accepted a connection may take to answer.
const ANSWER: Duration = Duration::from_secs(10);
/// How long a name may fail to resolve for a reason that may pass.
const NAME: Duration = Duration::from_secs(3);

/// A connection to a store that answered.
pub(crate) struct Wire(TcpStream);

/// Why there is no connection.
#[derive(Debug)]
pub(crate) enum NoWire {
    /// It will not help to wait.
    Wrong(String),
    /// Nobody was there until the deadline.
    Late(io::Error),
}

impl std::fmt::Display for NoWire {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Wrong(reason) => f.write_str(reason),
            Self::Late(error) => write!(f, "nothing answered in time ({error})"),
        }
    }
}

/// The addresses of a host: an error at once if it has none.
pub(crate) fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, String> {
    let started = Instant::now();
    let host = bare(host);
    if host.is_empty() {
        return Err("the host name is empty".to_owned());
    }
    loop {
        match (host, port).to_socket_addrs().map(Iterator::collect::<Vec<_>>) {
            Ok(found) if !found.is_empty() => return Ok(found),
            Ok(_) => return Err(format!("host {host:?} has no address")),
            Err(error) => {
                let text = error.to_string();
                // The name server is not reachable (yet): that is worth a second try.
                if !text.contains("Temporary failure") || started.elapsed() > NAME {
                    return Err(format!("host {host:?} does not resolve: {text}"));
                }
            }
        }
        thread::sleep(Duration::from_millis(200));
    }
}

/// `[::1]` without its brackets.
pub(crate) fn bare(host: &str) -> &str {
    host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host)
}

/// Whether a host is this machine, as far as its addresses tell.
pub(crate) fn is_here(addresses: &[SocketAddr]) -> bool {
    // Only an address of this machine can be bound.
    addresses.iter().any(|a| std::net::UdpSocket::bind((a.ip(), 0)).is_ok())
}

fn is_unreachable(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NetworkUnreachable | io::ErrorKind::HostUnreachable)
}

impl Wire {
    /// Waits until a store answers, with growing pauses; `waiting` is called after each attempt in vain.
    pub(crate) fn knock(
        host: &str,
        port: u16,
        timeout: Duration,
        mut waiting: impl FnMut(&io::Error),
    ) -> Result<Self, NoWire> {
        Self::knock_at(&resolve(host, port).map_err(NoWire::Wrong)?, timeout, &mut waiting)
    }

    /// The same at addresses, of which there is at least one.
    fn knock_at(
        addresses: &[SocketAddr],
        timeout: Duration,
        waiting: &mut impl FnMut(&io::Error),
    ) -> Result<Self, NoWire> {
        let started = Instant::now();
        let mut pause = Duration::from_millis(5);
        let (mut hung_up, mut unreachable) = (0, 0);
        loop {
            let mut last: Option<io::Error> = None;
            for address in addresses {
                let left = timeout.saturating_sub(started.elapsed()).max(Duration::from_millis(50));
                match Self::attempt(address, left) {
                    Ok(wire) => return Ok(wire),
                    // A name may have addresses of a kind that this machine has no way to. That says nothing where it
                    // has a way to another.
                    Err(error) if is_unreachable(&error) && last.is_some() => {}
                    Err(error) => last = Some(error),
                }
            }
            let Some(error) = last else {
                return Err(NoWire::Wrong("the host has no address".to_owned()));
            };
            match error.kind() {
                io::ErrorKind::InvalidData => return Err(NoWire::Wrong(error.to_string())),
                // A server that is closing hangs up too, but not again and again.
                io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => {
                    hung_up += 1;
                    if hung_up >= 5 {
                        return Err(NoWire::Wrong(format!(
                            "something that is not a store listens there: it hangs up ({error})"
                        )));
                    }
                }
                _ if is_unreachable(&error) => {
                    unreachable += 1;
                    if unreachable >= 5 {
                        return Err(NoWire::Wrong(format!("it cannot be reached from here ({error})")));
                    }
                }
                _ => {}
            }
            if started.elapsed() + pause >= timeout {
                return Err(NoWire::Late(error));
            }
            waiting(&error);
            thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(500));
        }
    }

    fn attempt(address: &SocketAddr, left: Duration) -> io::Result<Self> {
        let stream = TcpStream::connect_timeout(address, left.min(Duration::from_secs(5)))?;
        stream.set_nodelay(true)?;
        let patience = ANSWER.min(left);
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        // A connection to oneself: the kernel picked the very port that nobody listens on.
        if stream.local_addr()? == *address {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let mut wire = Self(stream);
        let nonce = std::process::id().to_le_bytes();
        let mut hello = vec![VALIDATE];
        hello.extend(MAGIC.to_le_bytes());
        hello.push(PING);
        hello.extend(nonce);
        // In one piece: a server reads these in one go.
        wire.0.write_all(&hello)?;
        let answer: [u8; 4] = wire.read().map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut if patience == ANSWER => io::Error::new(
                io::ErrorKind::InvalidData,
                "something that is not a store listens there: it is silent",
            ),
            _ => error,
        })?;
        if answer != nonce {
            let text = "something that is not a store listens there: it gave a wrong answer";
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        wire.0.set_read_timeout(Some(ANSWER))?;
        wire.0.set_write_timeout(Some(ANSWER))?;
        Ok(wire)
    }

    fn read<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut answer = [0; N];
        self.0.read_exact(&mut answer)?;
        Ok(answer)
    }

    /// Joins as a rank of PyTorch's process groups joins; how many have joined.
    pub(crate) fn join(&mut self) -> io::Result<i64> {
        self.add_workers(1)
    }

    /// How many have joined as ranks of PyTorch's process groups do.
    pub(crate) fn workers(&mut self) -> io::Result<i64> {
        // Asking by ADD would make the key.
        if self.has_workers()? { self.add_workers(0) } else { Ok(0) }
    }

    fn add_workers(&mut self, amount: i64) -> io::Result<i64> {
        let mut request = vec![ADD];
        string(&mut request, WORKERS);
        request.extend(amount.to_le_bytes());
        self.0.write_all(&request)?;
        self.read().map(i64::from_le_bytes)
    }

    /// Whether the counter of workers is among the store's keys.
    pub(crate) fn has_workers(&mut self) -> io::Result<bool> {
        let mut request = vec![CHECK];
        request.extend(1u64.to_le_bytes());
        string(&mut request, WORKERS);
        self.0.write_all(&request)?;
        Ok(self.read::<1>()? == [0])
    }
}

fn string(request: &mut Vec<u8>, text: &str) {
    request.extend((text.len() as u64).to_le_bytes());
    request.extend(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::TcpStore;

    /// No stream can be opened to it: the kernel says at once that it is unreachable.
    const EVERYBODY: [u8; 4] = [255, 255, 255, 255];
    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn a_server_that_comes_late_is_found_though_its_name_has_an_address_out_of_reach_too() {
        for out_of_reach_first in [false, true] {
            let port = crate::launch::free_port().unwrap();
            let mut addresses = [SocketAddr::from(([127, 0, 0, 1], port)), (EVERYBODY, port).into()];
            if out_of_reach_first {
                addresses.reverse();
            }
            let (mut knocks, mut server) = (0, None);
            let found = Wire::knock_at(&addresses, LIMIT, &mut |error| {
                assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
                knocks += 1;
                if knocks == 7 {
                    server = Some(TcpStore::serve("127.0.0.1", port).unwrap());
                }
            });
            assert!(found.is_ok(), "{:?}", found.err());
        }
    }

    #[test]
    fn a_host_none_of_whose_addresses_can_be_reached_is_not_waited_for() {
        let address = SocketAddr::from((EVERYBODY, 29_500));
        let error = Wire::knock_at(&[address, address], LIMIT, &mut |_| ()).err().unwrap();
        assert!(matches!(&error, NoWire::Wrong(reason) if reason.contains("cannot be reached")), "{error}");
    }
}
