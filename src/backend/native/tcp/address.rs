//! Where a rank listens: a unix socket where all are on one host, else an address that others reach.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs, UdpSocket};

use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, Socket, Type};

use crate::backend::native::meet::random;

/// Where to call a rank.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Address {
    /// An abstract unix socket, by name: no file is left behind.
    Local(String),
    /// An internet address.
    Internet(SocketAddr),
}

impl Address {
    pub(super) fn to_socket(&self) -> io::Result<(Socket, SockAddr)> {
        match self {
            Self::Local(name) => {
                Ok((Socket::new(Domain::UNIX, Type::STREAM, None)?, SockAddr::unix(format!("\0{name}"))?))
            }
            Self::Internet(address) => {
                Ok((Socket::new(Domain::for_address(*address), Type::STREAM, None)?, (*address).into()))
            }
        }
    }
}

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Listens for peers; `local` on this host alone, by a unix socket.
pub(super) fn listen(local: bool, one_host: bool) -> io::Result<(Socket, Address)> {
    if local {
        let address = Address::Local(format!("tch-distributed-{:032x}", random()));
        let (socket, at) = address.to_socket()?;
        socket.bind(&at)?;
        socket.listen(BACKLOG)?;
        return Ok((socket, address));
    }
    let ip = reachable(one_host)?;
    let (socket, at) = Address::Internet(SocketAddr::new(ip, 0)).to_socket()?;
    socket.bind(&at)?;
    socket.listen(BACKLOG)?;
    let bound = socket.local_addr()?.as_socket();
    let bound = bound.ok_or_else(|| io::Error::other("a bound socket has no internet address"))?;
    Ok((socket, Address::Internet(bound)))
}

/// The address of this host that its peers reach: of the interface named by
/// `TCH_DISTRIBUTED_SOCKET_IFNAME` or `GLOO_SOCKET_IFNAME`; else the one from which it reaches
/// `MASTER_ADDR`; else the one of its default route; else of its name.
fn reachable(one_host: bool) -> io::Result<IpAddr> {
    for variable in ["TCH_DISTRIBUTED_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"] {
        if let Some(name) = std::env::var(variable).ok().filter(|s| !s.is_empty()) {
            return interface(variable, &name);
        }
    }
    if one_host {
        return Ok(Ipv4Addr::LOCALHOST.into());
    }
    let master = std::env::var("MASTER_ADDR").ok();
    let towards = |to: &str| -> Option<IpAddr> {
        // A datagram socket that is connected has an address; nothing is sent.
        let to = (to, 9).to_socket_addrs().ok()?.next()?;
        let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
        let socket = UdpSocket::bind(any).ok()?;
        socket.connect(to).ok()?;
        let ip = socket.local_addr().ok()?.ip();
        (!ip.is_loopback() && !ip.is_unspecified()).then_some(ip)
    };
    master
        .as_deref()
        .and_then(towards)
        .or_else(|| towards("192.0.2.1"))
        .or_else(|| towards("2001:db8::1"))
        .or_else(|| {
            let interfaces = if_addrs::get_if_addrs().ok()?;
            interfaces.iter().map(if_addrs::Interface::ip).find(|ip| !ip.is_loopback())
        })
        .ok_or_else(|| {
            io::Error::other(
                "found no address that other hosts reach: name an interface with TCH_DISTRIBUTED_SOCKET_IFNAME",
            )
        })
}

fn interface(variable: &str, name: &str) -> io::Result<IpAddr> {
    let interfaces = if_addrs::get_if_addrs()?;
    let of_name = || interfaces.iter().filter(|i| i.name == name).map(if_addrs::Interface::ip);
    let link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    of_name().find(IpAddr::is_ipv4).or_else(|| of_name().find(|ip| !link_local(ip))).ok_or_else(|| {
        let mut known: Vec<&str> = interfaces.iter().map(|i| i.name.as_str()).collect();
        known.sort_unstable();
        known.dedup();
        let known = known.join(", ");
        io::Error::other(format!("{variable}={name}: no such interface with an address; there are {known}"))
    })
}
