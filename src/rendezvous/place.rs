//! Where ranks meet: the init method, read and checked.

use std::path::PathBuf;

use super::environment::{self, Lookup};
use crate::{Error, Result};

/// A meeting place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    Tcp {
        host: String,
        port: u16,
        agent: bool,
    },
    File(PathBuf),
    /// `env://`: the master is looked up when it is needed.
    Environment,
}

/// An init method and what its query says.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Method {
    pub(super) place: Place,
    pub(super) rank: Option<usize>,
    pub(super) world_size: Option<usize>,
}

fn wrong(url: &str, what: &str) -> Error {
    let known = "expected env://, tcp://host:port or file:///path";
    Error::invalid("init_method", format!("{url:?}: {what}; {known}"))
}

impl Method {
    pub(super) fn read(url: &str) -> Result<Self> {
        let (scheme, rest) = url.split_once("://").ok_or_else(|| wrong(url, "no scheme"))?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (mut rank, mut world_size) = (None, None);
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let slot = match name {
                "rank" => &mut rank,
                "world_size" => &mut world_size,
                "use_libuv" => continue, // PyTorch's choice of a server
                _ => return Err(wrong(url, &format!("unknown parameter {name:?}"))),
            };
            let number =
                value.parse().map_err(|_| wrong(url, &format!("{name} is {value:?}, no whole number")))?;
            *slot = Some(number);
        }
        let place = match scheme {
            "env" => Place::Environment,
            "tcp" => {
                let rest = rest.strip_suffix('/').unwrap_or(rest);
                let (host, port) = rest.rsplit_once(':').ok_or_else(|| wrong(url, "port number missing"))?;
                if host.is_empty() {
                    return Err(wrong(url, "host missing"));
                }
                let port = environment::port("init_method", &format!("the port of {url:?}"), port)?;
                Place::Tcp { host: host.to_owned(), port, agent: false }
            }
            "file" if rest.starts_with('/') && rest.len() > 1 => Place::File(rest.into()),
            "file" => return Err(wrong(url, "path missing")),
            _ => return Err(wrong(url, &format!("unknown scheme {scheme:?}"))),
        };
        Ok(Self { place, rank, world_size })
    }
}

impl Place {
    /// The place itself, where that is in the environment; and whether its store is the launcher's.
    pub(super) fn find(self, env: Lookup<'_>) -> Result<Self> {
        // torchrun's agent serves the store at the master's address, and nowhere else.
        let launchers = env("TORCHELASTIC_USE_AGENT_STORE").as_deref() == Some("True");
        match self {
            Self::Environment => {
                let (host, port) = environment::master(env)?;
                Ok(Self::Tcp { host, port, agent: launchers })
            }
            Self::Tcp { host, port, .. } => {
                let agent = launchers && environment::master(env).is_ok_and(|at| at == (host.clone(), port));
                Ok(Self::Tcp { host, port, agent })
            }
            file => Ok(file),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn init_methods_are_read_as_pytorch_reads_them() {
        let method = Method::read("tcp://10.0.0.1:29500?rank=1&world_size=4").unwrap();
        assert_eq!((method.rank, method.world_size), (Some(1), Some(4)));
        assert_eq!(method.place, Place::Tcp { host: "10.0.0.1".into(), port: 29500, agent: false });
        let six = Method::read("tcp://[::1]:7").unwrap().place;
        assert_eq!(six, Place::Tcp { host: "[::1]".into(), port: 7, agent: false });
        assert_eq!(Method::read("file:///a/b").unwrap().place, Place::File("/a/b".into()));
        assert_eq!(Method::read("env://").unwrap().place, Place::Environment);
    }

    #[test]
    fn what_is_wrong_with_an_init_method_is_said() {
        for (url, words) in [
            ("tcp://host", "port number missing"),
            ("tcp://host:99999", "1 to 65535"),
            ("tcp://host:0", "1 to 65535"),
            ("tcp://:1", "host missing"),
            ("tcp://host:1?rank=x", "rank is \"x\""),
            ("tcp://host:1?bank=1", "unknown parameter \"bank\""),
            ("file://", "path missing"),
            ("foo://a", "unknown scheme \"foo\""),
            ("nonsense", "no scheme"),
        ] {
            let error = Method::read(url).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument { argument: "init_method", .. }));
            assert!(error.to_string().contains(words), "{url}: {error}");
        }
    }

    #[test]
    fn the_launchers_store_is_at_the_masters_address_only() {
        let env = |name: &str| {
            let value = match name {
                "TORCHELASTIC_USE_AGENT_STORE" => "True",
                "MASTER_ADDR" => "m",
                "MASTER_PORT" => "5",
                _ => return None,
            };
            Some(value.to_owned())
        };
        let agent = |url: &str| match Method::read(url).unwrap().place.find(&env).unwrap() {
            Place::Tcp { agent, .. } => agent,
            other => panic!("{other:?}"),
        };
        assert!(agent("env://") && agent("tcp://m:5"));
        assert!(!agent("tcp://m:6") && !agent("tcp://n:5"));
    }
}
