//! Bells that a progress engine can hear: it sleeps on descriptors of many groups, not on one futex.

use std::io;
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// A datagram socket of this rank, and the addresses of all.
#[derive(Debug)]
pub(super) struct Doors {
    own: UnixDatagram,
    /// The same socket, to be watched.
    descriptor: Arc<OwnedFd>,
    addresses: Vec<SocketAddr>,
    /// Whether something may have come.
    watched: AtomicBool,
}

/// A door that the others do not know yet.
#[derive(Debug)]
pub(super) struct Door(UnixDatagram);

impl Door {
    /// A socket of that name in the abstract namespace, which goes away with it.
    pub(super) fn new(name: &str) -> io::Result<Self> {
        let socket = UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name)?)?;
        socket.set_nonblocking(true)?;
        Ok(Self(socket))
    }

    /// With the names of all ranks' doors.
    pub(super) fn among(self, names: &[String]) -> io::Result<Doors> {
        let addresses: io::Result<_> = names.iter().map(SocketAddr::from_abstract_name).collect();
        let descriptor = Arc::new(OwnedFd::from(self.0.try_clone()?));
        Ok(Doors { own: self.0, descriptor, addresses: addresses?, watched: AtomicBool::new(false) })
    }
}

impl Doors {
    /// The descriptor that is ready to read when somebody has knocked.
    pub(super) fn watch(&self) -> Arc<OwnedFd> {
        self.watched.store(true, Ordering::Relaxed);
        self.descriptor.clone()
    }

    /// Takes away what came.
    pub(super) fn clear(&self) {
        if self.watched.load(Ordering::Relaxed) {
            self.watched.store(false, Ordering::Relaxed);
            while self.own.recv(&mut [0; 8]).is_ok() {}
        }
    }

    /// Knocks at the door of a rank. That one is full, and so heard, or gone, and so of no interest, when
    /// this fails.
    pub(super) fn knock(&self, rank: usize) {
        if let Some(address) = self.addresses.get(rank) {
            let _ = self.own.send_to_addr(&[1], address);
        }
    }
}
