//! Which hosts a request of a user may send us to: public ones over https, and those that the operator allows.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use reqwest::Url;

/// A host, and a port of it or all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    name: String,
    port: Option<u16>,
}

impl Host {
    /// `HOST`, `HOST:PORT`, `[V6]` or `[V6]:PORT`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is neither HOST nor HOST:PORT");
        let url = Url::parse(&format!("http://{text}/")).map_err(|_| wrong())?;
        let name = url.host_str().ok_or_else(wrong)?;
        let plain = url.username().is_empty() && url.password().is_none() && url.path() == "/" && url.query().is_none();
        if !plain || url.fragment().is_some() || text.contains('/') {
            return Err(wrong());
        }
        // The parser forgets the port that http has anyway.
        let port = if text.ends_with(":80") { Some(80) } else { url.port() };
        Ok(Self { name: name.to_owned(), port })
    }

    fn is_of(&self, url: &Url) -> bool {
        url.host_str() == Some(self.name.as_str())
            && self.port.is_none_or(|port| url.port_or_known_default() == Some(port))
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.port {
            Some(port) => write!(f, "{}:{port}", self.name),
            None => f.write_str(&self.name),
        }
    }
}

/// A secret that a host is shown.
#[derive(Clone)]
pub struct HostKey {
    host: Host,
    key: String,
}

impl HostKey {
    /// `HOST=KEY` or `HOST:PORT=KEY`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let (host, key) = text.split_once('=').ok_or("a key is given as HOST=KEY")?;
        let is_plain = !key.is_empty() && key.chars().all(|c| c.is_ascii_graphic());
        if !is_plain {
            return Err(format!("the key of {host} is empty or has characters that are not printable"));
        }
        Ok(Self { host: Host::parse(host)?, key: key.to_owned() })
    }
}

/// Keys are shown to their hosts and to nobody else.
impl fmt::Debug for HostKey {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "HostKey({})", self.host)
    }
}

/// What the operator says of other hosts.
#[derive(Clone, Debug, Default)]
pub struct Reach {
    /// Hosts that may be at private addresses, and may be spoken to without TLS.
    pub allowed: Vec<Host>,
    pub keys: Vec<HostKey>,
}

impl Reach {
    pub(super) fn allows(&self, url: &Url) -> bool {
        self.allowed.iter().any(|host| host.is_of(url))
    }

    pub(super) fn key(&self, url: &Url) -> Option<&str> {
        self.keys.iter().find(|key| key.host.is_of(url)).map(|key| key.key.as_str())
    }

    /// The address, or why no request is sent there whatever its host's name means.
    pub fn check(&self, address: &str) -> Result<Url, String> {
        let url = Url::parse(address).map_err(|error| format!("{address:?} is no address: {error}"))?;
        let Some(host) = url.host_str() else { return Err(format!("{address:?} names no host")) };
        if !["http", "https"].contains(&url.scheme()) {
            return Err(format!("{}: addresses begin with https", url.scheme()));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err("names and passwords do not belong into an address".to_owned());
        }
        if self.allows(&url) {
            return Ok(url);
        }
        if url.scheme() != "https" {
            return Err(format!("{host} is not among the hosts that this server's operator allows without https"));
        }
        // Names are looked at when they are resolved.
        match host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>() {
            Ok(ip) if !is_public(ip) => Err(private(host)),
            _ => Ok(url),
        }
    }
}

/// Why a host is refused by its address. Which address a name has inside a network is nobody's business.
pub(super) fn private(host: &str) -> String {
    format!("{host} is not at a public address, and this server's operator does not allow it")
}

/// Whether an address is one of the internet's, and not of this machine, its network, or a special use
/// (IANA's special-purpose registries). When in doubt it is not.
pub(super) fn is_public(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => is_public_v4(ip),
        IpAddr::V6(ip) => match ip.to_ipv4_mapped() {
            Some(ip) => is_public_v4(ip),
            None => is_public_v6(ip),
        },
    }
}

fn is_public_v4(ip: Ipv4Addr) -> bool {
    let [a, b, c, _] = ip.octets();
    let special = matches!(
        (a, b, c),
        (0 | 10 | 127 | 224..=255, _, _)
            | (100, 64..=127, _)
            | (169, 254, _)
            | (172, 16..=31, _)
            | (192, 168, _)
            | (192, 0, 0 | 2)
            | (192, 88, 99)
            | (198, 18..=19, _)
            | (198, 51, 100)
            | (203, 0, 113)
    );
    !special
}

/// Global unicast, less documentation, Teredo, 6to4 and the rest of the protocols' block.
fn is_public_v6(ip: Ipv6Addr) -> bool {
    let [a, b, ..] = ip.segments();
    let global = (0x2000..=0x3fff).contains(&a);
    let special = matches!((a, b), (0x2001, 0..=0x1ff) | (0x2001, 0xdb8) | (0x2002, _) | (0x3fff, 0..=0xfff));
    global && !special
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_internets_addresses_are_public() {
        for ip in ["8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "::ffff:8.8.8.8"] {
            assert!(is_public(ip.parse().unwrap()), "{ip}");
        }
        for ip in [
            "127.0.0.1",
            "127.9.9.9",
            "0.0.0.0",
            "10.0.0.1",
            "172.16.0.1",
            "172.31.255.255",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "100.127.1.1",
            "192.0.0.8",
            "192.0.2.1",
            "198.18.0.1",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:10.1.2.3",
            "fe80::1",
            "fc00::1",
            "fd12::1",
            "ff02::1",
            "64:ff9b::7f00:1",
            "2001:db8::1",
            "2001::1",
            "2002:7f00:1::",
            "::7f00:1",
        ] {
            assert!(!is_public(ip.parse().unwrap()), "{ip}");
        }
    }

    #[test]
    fn addresses_are_refused_before_anything_is_sent() {
        let reach = Reach {
            allowed: vec![Host::parse("judge.local:8000").unwrap(), Host::parse("[::1]").unwrap()],
            keys: vec![HostKey::parse("judge.local:8000=secret").unwrap()],
        };
        for good in ["https://example.com/v1", "http://judge.local:8000/x", "http://[::1]:99/", "https://8.8.8.8"] {
            assert!(reach.check(good).is_ok(), "{good}");
        }
        for bad in [
            "http://example.com",
            "http://judge.local:8001/",
            "https://127.0.0.1/",
            "https://2130706433/",
            "https://0x7f.1/",
            "https://[::ffff:a00:1]/",
            "https://[fe80::1]/",
            "file:///etc/passwd",
            "gopher://x/",
            "https://u:p@example.com/",
            "https://",
            "nothing",
        ] {
            assert!(reach.check(bad).is_err(), "{bad}");
        }
        let key = |address: &str| reach.key(&reach.check(address).unwrap()).map(str::to_owned);
        assert_eq!(key("http://judge.local:8000/x").as_deref(), Some("secret"));
        assert_eq!(key("https://judge.local/x"), None);
        assert!(!format!("{reach:?}").contains("secret"));
    }

    #[test]
    fn settings_are_read_or_refused() {
        assert_eq!(Host::parse("a.b:80").unwrap().to_string(), "a.b:80");
        assert_eq!(Host::parse("a.b").unwrap().to_string(), "a.b");
        for wrong in ["", "a b", "http://a", "a/b", "u@a", "a:x", "a?b", "a#b"] {
            assert!(Host::parse(wrong).is_err(), "{wrong}");
        }
        for wrong in ["a", "a=", "a=b c", "=x", "a/b=x"] {
            assert!(HostKey::parse(wrong).is_err(), "{wrong}");
        }
    }
}
