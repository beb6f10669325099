//! How connections are made: who calls whom, and how strangers are turned away.
//!
//! Every rank listens, publishes its address in the group's store, calls all ranks below it, and is
//! called by all ranks above. The caller says a hello of fixed size that holds the group's token; who
//! does not know it is closed on, and costs a fixed buffer for a limited time. The called rank answers
//! with a welcome of fixed size, so that a caller knows that it reached the right group.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::sockopt;
use socket2::Socket;

use super::address::{self, Address, Listen};
use super::wait;
use crate::backend::native::limit;
use crate::backend::native::meet::{Meeting, VERSION};
use crate::backend::native::transport::Watch;
use crate::{Error, Result};

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Channel {
    /// The data of collectives.
    Data = 0,
    /// Control and point-to-point messages.
    Control = 1,
}

/// Magic (8), version (4), token (16), rank (4), rank called (4), channel (4).
const HELLO: usize = 40;
const MAGIC: &[u8; 8] = b"tchdist\x01";
/// Magic (8), token with every bit turned (16).
const WELCOME: usize = 24;

/// How often a peer that hung up is called again, and how long that may take.
const REDIALS: u32 = 3;
const REDIAL: Duration = Duration::from_secs(10);

/// How long a caller may take to say hello.
const PATIENCE: Duration = Duration::from_secs(5);
/// How many callers that have been heard and have not said all of a hello are kept, besides as many as
/// may call with reason; beyond, the oldest is closed on.
const STRANGERS: usize = 64;

fn hello(token: u128, rank: usize, called: usize, channel: Channel) -> [u8; HELLO] {
    let mut bytes = [0; HELLO];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[12..28].copy_from_slice(&token.to_le_bytes());
    bytes[28..32].copy_from_slice(&(rank as u32).to_le_bytes());
    bytes[32..36].copy_from_slice(&(called as u32).to_le_bytes());
    bytes[36..].copy_from_slice(&(channel as u32).to_le_bytes());
    bytes
}

fn welcome(token: u128) -> [u8; WELCOME] {
    let mut bytes = [0; WELCOME];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..].copy_from_slice(&(!token).to_le_bytes());
    bytes
}

/// A caller that has not said all of its hello.
struct Caller {
    socket: Arc<OwnedFd>,
    said: [u8; HELLO],
    len: usize,
    since: Instant,
}

/// Connects all ranks of a group, with one connection for each channel: `[channel][rank]`; for data only
/// those for whom `data` is true. Over TCP a control connection counts as `cut` after so long without an answer.
pub(crate) fn connect(
    meeting: &Meeting,
    token: u128,
    channels: &[Channel],
    at: &Listen,
    cut: Option<Duration>,
    data: impl Fn(usize) -> bool,
) -> Result<Vec<Vec<Option<OwnedFd>>>> {
    let (rank, world) = (meeting.rank(), meeting.size());
    let local = at.is_local();
    let wanted = |channel: Channel, peer: usize| channel == Channel::Control || data(peer);
    let (listener, address) = limit::explain(address::listen(at))
        .map_err(|e| meeting.failed(&format!("rank {rank} cannot listen for its peers: {e}")))?;
    listener.set_nonblocking(true)?;
    let addresses: Vec<Address> = meeting.exchange(if local { "local" } else { "address" }, &address)?;
    let mut called: Vec<Vec<Option<OwnedFd>>> =
        channels.iter().map(|_| (0..world).map(|_| None).collect()).collect();
    for (peer, address) in addresses.iter().enumerate().take(rank) {
        for (n, &channel) in channels.iter().enumerate().filter(|&(_, &c)| wanted(c, peer)) {
            let mut socket = call(meeting, peer, address)?;
            socket.write_all(&hello(token, rank, peer, channel)).map_err(|e| hung_up(meeting, peer, &e))?;
            called[n][peer] = Some(socket.into());
        }
    }
    let mut desk = Desk { token, rank, channels, callers: Vec::new(), sockets: called };
    let listener = Arc::new(OwnedFd::from(listener));
    let expected: Vec<(usize, usize)> = (rank + 1..world)
        .flat_map(|p| (0..channels.len()).map(move |n| (n, p)))
        .filter(|&(n, p)| wanted(channels[n], p))
        .collect();
    desk.serve(meeting, &listener, &expected)?;
    // The ranks below have said welcome by now, or will.
    for peer in 0..rank {
        for (n, sockets) in desk.sockets.iter_mut().enumerate() {
            if let Some(fd) = sockets[peer].take() {
                let again = || dial(&addresses[peer], &hello(token, rank, peer, channels[n]));
                sockets[peer] = Some(welcomed(meeting, peer, fd, token, again)?);
            }
        }
    }
    for (sockets, &channel) in desk.sockets.iter().zip(channels) {
        for socket in sockets.iter().flatten() {
            tune(socket, channel, local, cut.unwrap_or(CUT))?;
        }
    }
    Ok(desk.sockets)
}

/// Calls a peer until it answers or time is up. It listens already; what fails is the way to it.
fn call(meeting: &Meeting, peer: usize, address: &Address) -> Result<Socket> {
    let mut pause = Duration::from_millis(5);
    loop {
        let left = meeting.deadline().saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(meeting.timeout(vec![peer]));
        }
        if let Some(error) = meeting.glance() {
            return Err(error);
        }
        let (socket, at) = limit::explain(address.to_socket())?;
        let result = match address {
            Address::Local(_) => socket.connect(&at),
            Address::Internet(_) => socket.connect_timeout(&at, left.min(Duration::from_secs(10))),
        };
        match result {
            Ok(()) => return Ok(socket),
            Err(error) => {
                tracing::debug!(peer, %error, ?address, "calling again");
                std::thread::sleep(pause.min(left));
                pause = (pause * 2).min(Duration::from_secs(1));
            }
        }
    }
}

/// Calls once more and says hello: whoever hung up is there, or is not.
fn dial(address: &Address, hello: &[u8]) -> io::Result<OwnedFd> {
    let (mut socket, at) = limit::explain(address.to_socket())?;
    match address {
        Address::Local(_) => socket.connect(&at)?,
        Address::Internet(_) => socket.connect_timeout(&at, REDIAL)?,
    }
    socket.write_all(hello)?;
    Ok(socket.into())
}

/// Waits for a peer's welcome. A peer that hangs up may have taken this rank for a stranger among many:
/// it is called `again`, some times.
fn welcomed(
    meeting: &Meeting,
    peer: usize,
    fd: OwnedFd,
    token: u128,
    again: impl Fn() -> io::Result<OwnedFd>,
) -> Result<OwnedFd> {
    let mut socket = Socket::from(fd);
    let mut tries = 0;
    loop {
        let left = meeting.deadline().saturating_duration_since(Instant::now());
        socket.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
        let mut said = [0; WELCOME];
        let error = match socket.read_exact(&mut said) {
            Ok(()) if said == welcome(token) => return Ok(socket.into()),
            Ok(()) => {
                let who = format!("what answers at the address of rank {peer} is not of this job");
                return Err(meeting.failed(&who));
            }
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => {
                return Err(meeting.timeout(vec![peer]));
            }
            Err(error) => error,
        };
        if tries == REDIALS {
            return Err(hung_up(meeting, peer, &error));
        }
        std::thread::sleep(Duration::from_millis(50 << tries));
        tries += 1;
        socket = again().map_err(|_| hung_up(meeting, peer, &error))?.into();
    }
}

/// That a peer hung up; why, where a rank has said so.
fn hung_up(meeting: &Meeting, peer: usize, error: &io::Error) -> Error {
    meeting.hopeless().unwrap_or_else(|| meeting.failed(&format!("rank {peer} hung up: {error}")))
}

/// Takes calls.
struct Desk<'a> {
    token: u128,
    rank: usize,
    channels: &'a [Channel],
    callers: Vec<Caller>,
    sockets: Vec<Vec<Option<OwnedFd>>>,
}

impl Desk<'_> {
    /// Takes calls until all have come, of a rank on a channel.
    fn serve(
        &mut self,
        meeting: &Meeting,
        listener: &Arc<OwnedFd>,
        expected: &[(usize, usize)],
    ) -> Result<()> {
        loop {
            let mut missing: Vec<usize> =
                expected.iter().filter(|&&(n, p)| self.sockets[n][p].is_none()).map(|&(_, p)| p).collect();
            missing.dedup();
            if missing.is_empty() {
                return Ok(());
            }
            let now = Instant::now();
            if now >= meeting.deadline() {
                return Err(meeting.timeout(missing));
            }
            if let Some(error) = meeting.glance() {
                return Err(error);
            }
            let mut set = vec![Watch { fd: listener.clone(), read: true, write: false }];
            set.extend(self.callers.iter().map(|c| Watch { fd: c.socket.clone(), read: true, write: false }));
            wait(&set, None, meeting.deadline().min(now + Duration::from_millis(500)));
            drop(set);
            let callers = std::mem::take(&mut self.callers);
            for caller in callers {
                self.hear(caller);
            }
            self.accept(listener)?;
        }
    }

    fn accept(&mut self, listener: &OwnedFd) -> Result<()> {
        let flags = rustix::net::SocketFlags::NONBLOCK | rustix::net::SocketFlags::CLOEXEC;
        loop {
            let socket = match limit::explain(rustix::net::accept_with(listener, flags).map_err(Into::into)) {
                Ok(socket) => socket,
                Err(error) if error.raw_os_error().is_none() => return Err(error.into()),
                // Nobody calls any more, or the caller has hung up.
                Err(_) => return Ok(()),
            };
            // Heard before anyone is closed on: many ranks may have called at once.
            self.hear(Caller { socket: Arc::new(socket), said: [0; HELLO], len: 0, since: Instant::now() });
            let expected: usize = self.sockets.iter().map(Vec::len).sum();
            if self.callers.len() > STRANGERS + expected {
                self.callers.remove(0);
            }
        }
    }

    /// Listens to a caller: it stays on the line, is let in, or is closed on.
    fn hear(&mut self, mut caller: Caller) {
        match rustix::io::read(&caller.socket, &mut caller.said[caller.len..]) {
            Ok(0) => return,
            Ok(n) => caller.len += n,
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => {}
            Err(_) => return,
        }
        // A wrong start is enough to know a stranger.
        let start = caller.len.min(28);
        if caller.said[..start] != hello(self.token, 0, 0, Channel::Data)[..start] {
            tracing::warn!("turned away a connection that is not of this job");
            return;
        }
        if caller.len < HELLO {
            if caller.since.elapsed() < PATIENCE {
                self.callers.push(caller);
            }
            return;
        }
        let number = |at: usize| {
            let bytes = [caller.said[at], caller.said[at + 1], caller.said[at + 2], caller.said[at + 3]];
            u32::from_le_bytes(bytes) as usize
        };
        let (from, to, channel) = (number(28), number(32), number(36));
        let Some(n) = self.channels.iter().position(|&c| c as usize == channel) else { return };
        let Some(place) = self.sockets[n].get_mut(from) else { return };
        if to != self.rank || from <= self.rank || place.is_some() {
            return;
        }
        // It fits the send buffer of a new socket.
        if rustix::io::write(&caller.socket, &welcome(self.token)) == Ok(WELCOME) {
            *place = Arc::into_inner(caller.socket);
        }
    }
}

/// After how long without an answer a connection counts as cut.
const CUT: Duration = Duration::from_secs(60);

/// Only on a control connection, which is always read. On one for data a rank that is late to a call reads nothing; a
/// peer that has filled its buffer then waits for room, which the kernel counts as without an answer too.
fn tune(socket: &OwnedFd, channel: Channel, local: bool, cut: Duration) -> Result<()> {
    let set = || -> rustix::io::Result<()> {
        rustix::io::ioctl_fionbio(socket, true)?;
        if !local {
            sockopt::set_tcp_nodelay(socket, true)?;
            sockopt::set_socket_keepalive(socket, true)?;
            sockopt::set_tcp_keepidle(socket, Duration::from_secs(10))?;
            sockopt::set_tcp_keepintvl(socket, Duration::from_secs(5))?;
            sockopt::set_tcp_keepcnt(socket, 6)?;
            if channel == Channel::Control {
                sockopt::set_tcp_user_timeout(socket, cut.as_millis() as u32)?;
            }
        }
        Ok(())
    };
    set().map_err(|e| Error::Io(e.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: u128 = 77;
    const CHANNELS: [Channel; 2] = [Channel::Data, Channel::Control];

    fn desk(world: usize) -> Desk<'static> {
        let sockets = CHANNELS.iter().map(|_| (0..world).map(|_| None).collect()).collect();
        Desk { token: TOKEN, rank: 0, channels: &CHANNELS, callers: Vec::new(), sockets }
    }

    fn listen() -> (OwnedFd, Address) {
        let (listener, address) = address::listen(&Listen::Local).unwrap();
        listener.set_nonblocking(true).unwrap();
        (listener.into(), address)
    }

    #[test]
    fn as_many_ranks_as_there_are_may_call_before_anyone_is_heard() {
        const WORLD: usize = 51;
        let (listener, address) = listen();
        let calls: Vec<_> = (1..WORLD)
            .flat_map(|rank| CHANNELS.map(|channel| hello(TOKEN, rank, 0, channel)))
            .map(|hello| dial(&address, &hello).unwrap())
            .collect();
        let mut desk = desk(WORLD);
        desk.accept(&listener).unwrap();
        assert!(desk.sockets.iter().flat_map(|s| &s[1..]).all(Option::is_some), "everyone is let in");
        assert_eq!((calls.len(), desk.callers.len()), (100, 0));
    }

    #[test]
    fn strangers_that_say_nothing_do_not_drive_out_a_rank_that_says_hello_slowly() {
        let (listener, address) = listen();
        let mut desk = desk(2);
        let words = hello(TOKEN, 1, 0, Channel::Data);
        let silent: Vec<_> = (0..STRANGERS).map(|_| dial(&address, &[]).unwrap()).collect();
        let mut slow = Socket::from(dial(&address, &words[..10]).unwrap());
        desk.accept(&listener).unwrap();
        assert_eq!(desk.callers.len(), silent.len() + 1);
        slow.write_all(&words[10..]).unwrap();
        for caller in std::mem::take(&mut desk.callers) {
            desk.hear(caller);
        }
        assert!(desk.sockets[0][1].is_some());
        // And no more than the limit are kept, of those that stay silent.
        let more: Vec<_> = (0..20).map(|_| dial(&address, &[]).unwrap()).collect();
        desk.accept(&listener).unwrap();
        assert_eq!((more.len(), desk.callers.len()), (20, STRANGERS + 4));
    }
}
