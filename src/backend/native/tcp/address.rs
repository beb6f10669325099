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

/// Where a rank is to listen.
#[derive(Clone, Debug)]
pub(crate) enum Listen {
    /// At a unix socket.
    Local,
    /// Where the ranks of this machine reach it.
    Loopback,
    /// Where other hosts reach it.
    Wide,
    /// At this network interface.
    Interface(String),
}

impl Listen {
    /// Over TCP: at the interface of that name; else at that which the environment names; else where all
    /// ranks reach it, which may all be on one machine.
    pub(crate) fn wide(interface: Option<String>, one_machine: bool) -> Self {
        let named = ["TCH_DISTRIBUTED_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"]
            .iter()
            .find_map(|variable| std::env::var(variable).ok().filter(|s| !s.is_empty()));
        match interface.or(named) {
            Some(name) => Self::Interface(name),
            None if one_machine => Self::Loopback,
            None => Self::Wide,
        }
    }

    pub(super) fn is_local(&self) -> bool {
        matches!(self, Self::Local)
    }
}

/// How many connections may wait to be accepted.
const BACKLOG: i32 = 1024;

/// Listens for peers.
pub(super) fn listen(at: &Listen) -> io::Result<(Socket, Address)> {
    let ip = match at {
        Listen::Local => {
            let address = Address::Local(format!("tch-distributed-{:032x}", random()));
            let (socket, at) = address.to_socket()?;
            socket.bind(&at)?;
            socket.listen(BACKLOG)?;
            return Ok((socket, address));
        }
        Listen::Loopback => Ipv4Addr::LOCALHOST.into(),
        Listen::Wide => reachable()?,
        Listen::Interface(name) => interface(name)?,
    };
    let (socket, at) = Address::Internet(SocketAddr::new(ip, 0)).to_socket()?;
    socket.bind(&at)?;
    socket.listen(BACKLOG)?;
    let bound = socket.local_addr()?.as_socket();
    let bound = bound.ok_or_else(|| io::Error::other("a bound socket has no internet address"))?;
    Ok((socket, Address::Internet(bound)))
}

/// The address of this host that its peers reach: the one from which it reaches `MASTER_ADDR`; else the
/// one of its default route; else the first there is.
fn reachable() -> io::Result<IpAddr> {
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

/// The address of a network interface: of IPv4 where it has one, else of IPv6 that is not link-local.
/// `GLOO_SOCKET_IFNAME` may be a list: then the first that there is.
fn interface(names: &str) -> io::Result<IpAddr> {
    let interfaces = if_addrs::get_if_addrs()?;
    choose(names, &interfaces).ok_or_else(|| {
        let mut known: Vec<&str> = interfaces.iter().map(|i| i.name.as_str()).collect();
        known.sort_unstable();
        known.dedup();
        let known = known.join(", ");
        io::Error::other(format!("no network interface {names} with an address; there are {known}"))
    })
}

fn choose(names: &str, interfaces: &[if_addrs::Interface]) -> Option<IpAddr> {
    let link_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
    names.split(',').map(str::trim).find_map(|name| {
        let of_name = || interfaces.iter().filter(|i| i.name == name).map(if_addrs::Interface::ip);
        of_name().find(IpAddr::is_ipv4).or_else(|| of_name().find(|ip| !link_local(ip)))
    })
}

#[cfg(test)]
mod tests {
    use std::net::Ipv6Addr;

    use super::*;

    fn of(name: &str, ip: IpAddr) -> if_addrs::Interface {
        let addr = match ip {
            IpAddr::V4(ip) => if_addrs::IfAddr::V4(if_addrs::Ifv4Addr {
                ip,
                netmask: Ipv4Addr::new(255, 255, 255, 0),
                prefixlen: 24,
                broadcast: None,
            }),
            IpAddr::V6(ip) => if_addrs::IfAddr::V6(if_addrs::Ifv6Addr {
                ip,
                netmask: Ipv6Addr::UNSPECIFIED,
                prefixlen: 64,
                broadcast: None,
            }),
        };
        if_addrs::Interface {
            name: name.to_owned(),
            addr,
            index: None,
            oper_status: if_addrs::IfOperStatus::Up,
            is_p2p: false,
        }
    }

    #[test]
    fn an_interface_gives_its_ipv4_address_or_one_of_ipv6_that_others_reach() {
        let link_local: IpAddr = "fe80::1".parse().unwrap();
        let (six, four): (IpAddr, IpAddr) = ("2001:db8::7".parse().unwrap(), "10.1.2.3".parse().unwrap());
        let interfaces = [of("eth0", link_local), of("eth0", six), of("eth1", six), of("eth1", four)];
        assert_eq!(choose("eth0", &interfaces), Some(six));
        assert_eq!(choose("eth1", &interfaces), Some(four));
        assert_eq!(choose("eth7,eth1", &interfaces), Some(four));
        assert_eq!(choose("eth7", &interfaces), None);
        assert_eq!(choose("eth0", &interfaces[..1]), None);
    }

    #[test]
    fn an_interface_that_there_is_not_is_named_with_those_that_there_are() {
        let error = listen(&Listen::Interface("junk7".to_owned())).unwrap_err().to_string();
        assert!(error.contains("junk7") && error.contains("lo"), "{error}");
    }

    #[test]
    fn the_loopback_interface_is_listened_at_by_name() {
        let (_socket, address) = listen(&Listen::Interface("lo".to_owned())).unwrap();
        assert!(matches!(address, Address::Internet(at) if at.ip().is_loopback() && at.port() > 0));
    }

    #[test]
    fn ranks_find_one_another_at_addresses_of_ipv6() {
        let Ok(listener) = std::net::TcpListener::bind("[::1]:0") else {
            // This machine has no IPv6: then a call to it fails, in words.
            let to = Address::Internet("[::1]:9".parse().unwrap());
            assert!(to.to_socket().and_then(|(socket, at)| socket.connect(&at)).is_err());
            return;
        };
        let (socket, at) = Address::Internet(listener.local_addr().unwrap()).to_socket().unwrap();
        socket.connect(&at).unwrap();
        assert!(listener.accept().unwrap().1.is_ipv6());
    }
}
