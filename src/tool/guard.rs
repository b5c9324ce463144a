//! Which addresses the gateway may talk to on somebody's behalf.
//!
//! A URL from the outside must not lead into the network that the gateway stands in. What counts is the address that is
//! connected to, not the name: a name can resolve to a public address when it is looked at and to a private one a
//! moment later. So a name is checked where it is resolved for the connection itself, in the resolver of
//! [`Guard::client`], and nothing is resolved a second time. Hosts that are addresses already never come to a resolver;
//! [`Guard::check`] looks at those, before every request.

use std::{
    error::Error,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use futures::future::BoxFuture;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// Longest that a connection may take to come about, its name's resolution included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// How long an unused connection is kept.
const POOL_IDLE: Duration = Duration::from_secs(90);

/// What is not globally reachable, after the IANA IPv4 Special-Purpose Address Registry, with multicast.
const SPECIAL_V4: [Ipv4Net; 16] = [
    v4(0, 0, 0, 0, 8),          // this network
    v4(10, 0, 0, 0, 8),         // private
    v4(100, 64, 0, 0, 10),      // shared by carriers
    v4(127, 0, 0, 0, 8),        // loopback
    v4(169, 254, 0, 0, 16),     // link-local, where clouds keep their metadata
    v4(172, 16, 0, 0, 12),      // private
    v4(192, 0, 0, 0, 24),       // protocol assignments
    v4(192, 0, 2, 0, 24),       // TEST-NET-1
    v4(192, 88, 99, 0, 24),     // 6to4 relays, deprecated
    v4(192, 168, 0, 0, 16),     // private
    v4(198, 18, 0, 0, 15),      // benchmarking
    v4(198, 51, 100, 0, 24),    // TEST-NET-2
    v4(203, 0, 113, 0, 24),     // TEST-NET-3
    v4(224, 0, 0, 0, 4),        // multicast
    v4(240, 0, 0, 0, 4),        // reserved
    v4(255, 255, 255, 255, 32), // broadcast
];

/// What is not globally reachable, after the IANA IPv6 address space and its Special-Purpose Address Registry. Only
/// `2000::/3` is given out for use over the whole net, so all else is here, too: unspecified, loopback and
/// IPv4-compatible addresses and `64:ff9b:1::/48` and `100::/64` in the first net; `5f00::/16` in the second; unique
/// local (`fc00::/7`), link-local (`fe80::/10`), site-local (`fec0::/10`) and multicast (`ff00::/8`) in the third.
const SPECIAL_V6: [Ipv6Net; 7] = [
    v6(0, 0, 3),
    v6(0x4000, 0, 2),
    v6(0x8000, 0, 1),
    v6(0x2001, 0, 23),     // protocol assignments, with Teredo, benchmarking and ORCHID
    v6(0x2001, 0xdb8, 32), // documentation
    v6(0x2002, 0, 16),     // 6to4, which leads to any IPv4 address
    v6(0x3fff, 0, 20),     // documentation
];

/// IPv4 addresses in the clothes of IPv6.
const MAPPED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0), 96);

/// IPv4 addresses behind a translator, after RFC 6052.
const TRANSLATED: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0x64, 0xff9b, 0, 0, 0, 0, 0, 0), 96);

const fn v4(a: u8, b: u8, c: u8, d: u8, length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length)
}

const fn v6(a: u16, b: u16, length: u8) -> Ipv6Net {
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, 0, 0, 0, 0, 0, 0), length)
}

/// Why a connection was not made: the name has addresses, and none of them is permitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the name leads to no address that may be talked to")]
pub struct Forbidden;

/// Resolves names.
pub trait Lookup: Send + Sync + 'static {
    /// The addresses of a host name, of both families.
    ///
    /// # Errors
    /// The name does not exist or its servers do not answer.
    fn lookup(&self, name: &str) -> BoxFuture<'static, io::Result<Vec<IpAddr>>>;
}

/// Decides which URLs may be named and which addresses may be talked to. Without any setting no client may name a URL,
/// and what the operator names must be globally reachable.
pub struct Guard {
    /// What clients may name.
    urls: Vec<Pattern>,
    /// What may be talked to although it is not globally reachable.
    networks: Vec<IpNet>,
    lookup: Arc<dyn Lookup>,
}

/// A set of URLs: one origin, or one below each name of a domain, and a path with all below it.
struct Pattern {
    scheme: String,
    /// Without the leading `*.`, if it has one.
    host: String,
    /// Whether one label stands before `host`.
    any_label: bool,
    port: Option<u16>,
    path: String,
}

/// The resolver of the system.
struct System;

/// The resolver of the connector: gives permitted addresses only.
struct Guarded(Arc<Guard>);

/// Whether a request failed because its name leads to no permitted address.
pub fn is_forbidden(error: &reqwest::Error) -> bool {
    let mut source = error.source();
    while let Some(error) = source {
        if error.is::<Forbidden>() {
            return true;
        }
        source = error.source();
    }
    false
}

// === impl Guard ===

impl Guard {
    /// A guard that lets clients name URLs by these patterns, and that permits addresses of these networks beside those
    /// that are globally reachable.
    ///
    /// A pattern is `scheme://host[:port]/path`. A host of `*.example.com` is every name with exactly one label before
    /// `example.com`. The path is itself and all below it, by whole segments: `/tools` is `/tools` and `/tools/a`, not
    /// `/toolset`; `/tools/` is what is below it only.
    ///
    /// # Errors
    /// A text for the operator, when a pattern is none.
    pub fn new(allow_urls: &[String], allow_networks: &[IpNet]) -> Result<Self, String> {
        Self::with_lookup(allow_urls, allow_networks, Arc::new(System))
    }

    /// As [`Guard::new`], with another resolver than that of the system.
    ///
    /// # Errors
    /// As [`Guard::new`].
    pub fn with_lookup(
        allow_urls: &[String],
        allow_networks: &[IpNet],
        lookup: Arc<dyn Lookup>,
    ) -> Result<Self, String> {
        let urls = allow_urls.iter().map(|text| Pattern::parse(text)).collect::<Result<_, _>>()?;
        Ok(Self { urls, networks: allow_networks.to_vec(), lookup })
    }

    /// Whether a client may name this URL: one of the patterns has it. A URL with a user name or a password is in none.
    pub fn allows(&self, url: &Url) -> bool {
        !has_user(url) && self.urls.iter().any(|pattern| pattern.has(url))
    }

    /// Whether the gateway may call this URL, as far as it can be told from the URL alone. To be asked before every
    /// request: the client's resolver never sees a host that is an address.
    ///
    /// # Errors
    /// A sentence for a person: another scheme than `http` and `https`, no host, a user name or password, or an address
    /// that is not permitted.
    pub fn check(&self, url: &Url) -> Result<(), String> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err("Only http and https URLs can be called.".to_owned());
        }
        if has_user(url) {
            return Err("The URL must not hold a user name or a password.".to_owned());
        }
        let permitted = match url.host() {
            None => return Err("The URL has no host.".to_owned()),
            Some(Host::Domain(_)) => true,
            Some(Host::Ipv4(address)) => self.permits(address.into()),
            Some(Host::Ipv6(address)) => self.permits(address.into()),
        };
        if permitted {
            Ok(())
        } else {
            Err("This address is not public; tools.allow_networks can permit it.".to_owned())
        }
    }

    /// Whether an address may be talked to: it is globally reachable, or in one of the networks of the settings. An
    /// IPv6 address that holds an IPv4 one is taken for that.
    pub fn permits(&self, address: IpAddr) -> bool {
        let inner = embedded(address);
        if self.networks.iter().any(|network| network.contains(&address) || network.contains(&inner)) {
            return true;
        }
        match inner {
            IpAddr::V4(address) => !SPECIAL_V4.iter().any(|network| network.contains(&address)),
            IpAddr::V6(address) => !SPECIAL_V6.iter().any(|network| network.contains(&address)),
        }
    }

    /// A client that connects to permitted addresses only, follows no redirect and uses no proxy of the environment.
    /// Its connections come about within 5 s and are kept for 90 s.
    ///
    /// # Errors
    /// A text for the operator, when the system's certificates cannot be used.
    pub fn client(self: &Arc<Self>) -> Result<reqwest::Client, String> {
        reqwest::Client::builder()
            .dns_resolver(Arc::new(Guarded(Arc::clone(self))))
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .referer(false)
            .connect_timeout(CONNECT_TIMEOUT)
            .pool_idle_timeout(POOL_IDLE)
            .tcp_nodelay(true)
            .build()
            .map_err(|e| match e.source() {
                Some(cause) => format!("{e}: {cause}"),
                None => e.to_string(),
            })
    }
}

fn has_user(url: &Url) -> bool {
    !url.username().is_empty() || url.password().is_some()
}

/// The IPv4 address in an IPv6 one, or the address itself.
fn embedded(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V6(v6) if MAPPED.contains(&v6) || TRANSLATED.contains(&v6) => {
            let [.., a, b, c, d] = v6.octets();
            Ipv4Addr::new(a, b, c, d).into()
        }
        other => other,
    }
}

// === impl Pattern ===

impl Pattern {
    fn parse(text: &str) -> Result<Self, String> {
        let refuse = |why: &str| Err(format!("{text:?} is no pattern for URLs: {why}"));
        let url = match Url::parse(text) {
            Ok(url) => url,
            Err(e) => return refuse(&e.to_string()),
        };
        if !matches!(url.scheme(), "http" | "https") {
            return refuse("its scheme must be http or https");
        }
        if has_user(&url) {
            return refuse("it must not hold a user name or a password");
        }
        if url.query().is_some() || url.fragment().is_some() {
            return refuse("it ends with the path");
        }
        let host = url.host_str().unwrap_or_default();
        let (any_label, host) = match host.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, host),
        };
        if host.is_empty() || host.contains('*') || url.path().contains('*') {
            return refuse("a * can only be the first label of the host, as in https://*.example.com/");
        }
        Ok(Self {
            scheme: url.scheme().to_owned(),
            host: host.to_owned(),
            any_label,
            port: url.port_or_known_default(),
            path: url.path().to_owned(),
        })
    }

    fn has(&self, url: &Url) -> bool {
        url.scheme() == self.scheme
            && url.port_or_known_default() == self.port
            && url.host_str().is_some_and(|host| self.has_host(host))
            && self.has_path(url.path())
    }

    fn has_host(&self, host: &str) -> bool {
        if !self.any_label {
            return host == self.host;
        }
        host.split_once('.').is_some_and(|(label, rest)| !label.is_empty() && rest == self.host)
    }

    fn has_path(&self, path: &str) -> bool {
        if self.path == "/" {
            return true;
        }
        let Some(rest) = path.strip_prefix(&self.path) else { return false };
        (rest.is_empty() || rest.starts_with('/') || self.path.ends_with('/')) && !climbs(rest)
    }
}

/// Whether a server could read a path as one that leads up. `Url` has resolved `..` already; what is left are spellings
/// that some servers decode after they have split the path, or that carry parameters.
fn climbs(path: &str) -> bool {
    let path = path.to_ascii_lowercase().replace("%2e", ".");
    path.contains("%2f") || path.contains("%5c") || path.split('/').any(|segment| segment.starts_with(".."))
}

// === impl System ===

impl Lookup for System {
    fn lookup(&self, name: &str) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> {
        let name = name.to_owned();
        Box::pin(async move {
            let addresses = tokio::net::lookup_host((name, 0)).await?;
            Ok(addresses.map(|address| address.ip()).collect())
        })
    }
}

// === impl Guarded ===

impl Resolve for Guarded {
    fn resolve(&self, name: Name) -> Resolving {
        let guard = Arc::clone(&self.0);
        Box::pin(async move {
            let mut addresses = guard.lookup.lookup(name.as_str()).await?;
            if addresses.is_empty() {
                return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address").into());
            }
            addresses.retain(|address| guard.permits(*address));
            if addresses.is_empty() {
                return Err(Forbidden.into());
            }
            // The connector puts the URL's port in the place of 0.
            let addresses: Addrs = Box::new(addresses.into_iter().map(|address| SocketAddr::new(address, 0)));
            Ok(addresses)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, sync::Mutex};

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// So that a request that should have failed does not keep a test forever.
    const PATIENCE: Duration = Duration::from_secs(10);

    /// Gives one answer after another, and the last one from then on.
    struct Script(Mutex<VecDeque<Vec<IpAddr>>>);

    impl Lookup for Script {
        fn lookup(&self, _: &str) -> BoxFuture<'static, io::Result<Vec<IpAddr>>> {
            let mut answers = self.0.lock().unwrap();
            let answer = if answers.len() > 1 { answers.pop_front().unwrap() } else { answers[0].clone() };
            Box::pin(async move { Ok(answer) })
        }
    }

    fn script(answers: &[&[&str]]) -> Arc<dyn Lookup> {
        let answers = answers.iter().map(|answer| answer.iter().map(|ip| ip.parse().unwrap()).collect()).collect();
        Arc::new(Script(Mutex::new(answers)))
    }

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn guard(urls: &[&str], networks: &[&str]) -> Guard {
        let urls: Vec<_> = urls.iter().map(|&url| url.to_owned()).collect();
        Guard::new(&urls, &nets(networks)).unwrap()
    }

    fn url(text: &str) -> Url {
        Url::parse(text).unwrap()
    }

    /// A listener and its port. Whoever connected is in its queue, whether accepted or not.
    fn listener(address: &str) -> (std::net::TcpListener, u16) {
        let listener = std::net::TcpListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let port = listener.local_addr().unwrap().port();
        (listener, port)
    }

    /// Listeners at 127.0.0.1 and 127.0.0.2 with the same port.
    fn listeners() -> (std::net::TcpListener, std::net::TcpListener, u16) {
        loop {
            let (outside, port) = listener("127.0.0.2:0");
            // Somebody else may have the port at the other address.
            if let Ok(inside) = std::net::TcpListener::bind(("127.0.0.1", port)) {
                inside.set_nonblocking(true).unwrap();
                return (inside, outside, port);
            }
        }
    }

    fn nobody_came(listener: &std::net::TcpListener) {
        assert_eq!(listener.accept().unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn global_addresses_are_permitted_and_special_ones_are_not() {
        let guard = guard(&[], &[]);
        for address in [
            "1.1.1.1",
            "9.255.255.255",
            "100.63.255.255",
            "100.128.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00:1450::1",
            "2001:200::1",
            "::ffff:8.8.8.8",
            "64:ff9b::8.8.8.8",
        ] {
            assert!(guard.permits(address.parse().unwrap()), "{address}");
        }
        for address in [
            "0.0.0.0",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.255.254",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.1",
            "203.0.113.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::10.0.0.1",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:2::1",
            "2001:10::1",
            "2001:db8::1",
            "2002:7f00:1::",
            "2002:808:808::1",
            "3fff::1",
            "5f00::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "fec0::1",
            "ff02::1",
        ] {
            assert!(!guard.permits(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn networks_of_the_settings_are_permitted() {
        let guard = guard(&[], &["10.1.0.0/16", "fd00::/8"]);
        for address in ["10.1.2.3", "::ffff:10.1.2.3", "fd12::1"] {
            assert!(guard.permits(address.parse().unwrap()), "{address}");
        }
        for address in ["10.2.0.1", "::ffff:10.2.0.1", "fc00::1", "127.0.0.1"] {
            assert!(!guard.permits(address.parse().unwrap()), "{address}");
        }
    }

    #[test]
    fn a_literal_address_is_checked_in_any_spelling() {
        let guard = guard(&[], &[]);
        for text in [
            "http://127.0.0.1/",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f.0.0.1/",
            "http://0177.0.0.1/",
            "http://127.0.0.1./",
            "http://%31%32%37.0.0.1/",
            "http://127。0。0。1/",
            "http://0/",
            "http://[::1]/",
            "http://[::ffff:127.0.0.1]/",
            "http://[::ffff:a9fe:a9fe]/",
            "http://[0:0:0:0:0:0:0:1]:8080/",
            "https://169.254.169.254/latest/meta-data/",
        ] {
            assert!(guard.check(&url(text)).is_err(), "{text}");
        }
        for text in ["http://1.1.1.1/", "https://[2606:4700::1111]:8443/a", "https://bot.example.com/a?b=c"] {
            assert_eq!(guard.check(&url(text)), Ok(()), "{text}");
        }
    }

    #[test]
    fn other_schemes_and_users_are_refused() {
        let guard = guard(&[], &[]);
        for text in [
            "ftp://example.com/",
            "file:///etc/passwd",
            "data:text/plain,a",
            "unix:/run/socket",
            "http://user@example.com/",
            "http://user:word@example.com/",
            "http://:word@example.com/",
        ] {
            assert!(guard.check(&url(text)).is_err(), "{text}");
        }
    }

    #[test]
    fn a_pattern_has_its_origin_and_what_is_below_its_path() {
        let guard = guard(
            &["https://bot.example.com/tools/", "http://Other.example.com:8080/a", "https://*.tenants.example.com/"],
            &[],
        );
        for text in [
            "https://bot.example.com/tools/",
            "https://bot.example.com/tools/book?seat=1#top",
            "https://bot.example.com:443/tools/a/b",
            "https://BOT.example.com/tools/a",
            "https://bot.example.com/x/../tools/a",
            "http://other.example.com:8080/a",
            "http://other.example.com:8080/a/b",
            "http://other.example.com:8080/a?b",
            "https://acme.tenants.example.com/",
            "https://acme.tenants.example.com/any/path",
        ] {
            assert!(guard.allows(&url(text)), "{text}");
        }
        for text in [
            "http://bot.example.com/tools/a",
            "https://bot.example.com:8443/tools/a",
            "https://bot.example.com/tools",
            "https://bot.example.com/toolset/a",
            "https://bot.example.com/",
            "https://bot.example.com/tools/../admin",
            "https://bot.example.com/tools/%2e%2E/admin",
            "https://bot.example.com/tools/..%2fadmin",
            "https://bot.example.com/tools/%2e%2e%2Fadmin",
            "https://bot.example.com/tools/..%5cadmin",
            "https://bot.example.com/tools/..;/admin",
            "https://bot.example.com/tools\\..\\admin",
            "https://bot.example.com.evil.test/tools/a",
            "https://evil.test/https://bot.example.com/tools/a",
            "https://bot.example.com@evil.test/tools/a",
            "https://user@bot.example.com/tools/a",
            "https://user:word@bot.example.com/tools/a",
            "http://other.example.com/a",
            "http://other.example.com:8080/ab",
            "https://tenants.example.com/",
            "https://a.b.tenants.example.com/",
            "https://.tenants.example.com/",
            "https://eviltenants.example.com/",
        ] {
            assert!(!Url::parse(text).is_ok_and(|url| guard.allows(&url)), "{text}");
        }
    }

    #[test]
    fn without_patterns_no_url_may_be_named() {
        assert!(!guard(&[], &[]).allows(&url("https://bot.example.com/")));
    }

    #[test]
    fn a_pattern_that_is_none_is_refused_with_its_text() {
        for text in [
            "bot.example.com",
            "ftp://bot.example.com/",
            "https://*/",
            "https://*.*.example.com/",
            "https://a.*.example.com/",
            "https://bot*.example.com/",
            "https://bot.example.com/*",
            "https://user@bot.example.com/",
            "https://bot.example.com/?a=b",
            "https://bot.example.com/#a",
        ] {
            let error = Guard::new(&[text.to_owned()], &[]).err().unwrap();
            assert!(error.contains(text), "{error}");
        }
    }

    #[tokio::test]
    async fn a_name_that_leads_inside_is_not_connected_to() {
        for addresses in [&["127.0.0.1"][..], &["::1", "127.0.0.1", "10.0.0.1"], &["::ffff:127.0.0.1"]] {
            let (inside, port) = listener("127.0.0.1:0");
            let guard = Arc::new(Guard::with_lookup(&[], &[], script(&[addresses])).unwrap());
            let url = url(&format!("http://bot.test:{port}/"));
            assert_eq!(guard.check(&url), Ok(()));
            let error = guard.client().unwrap().get(url).timeout(PATIENCE).send().await.unwrap_err();
            assert!(is_forbidden(&error), "{error:?}");
            assert!(error.is_connect());
            nobody_came(&inside);
        }
    }

    #[tokio::test]
    async fn localhost_is_a_name_as_any_other() {
        let (inside, port) = listener("127.0.0.1:0");
        let guard = Arc::new(guard(&[], &[]));
        let error = guard
            .client()
            .unwrap()
            .get(format!("http://localhost:{port}/"))
            .timeout(PATIENCE)
            .send()
            .await
            .unwrap_err();
        assert!(is_forbidden(&error), "{error:?}");
        nobody_came(&inside);
    }

    #[tokio::test]
    async fn a_name_that_turns_inside_after_a_success_is_not_connected_to() {
        // 127.0.0.2 stands for an address outside, with the same port.
        let (inside, outside, port) = listeners();
        let outside = tokio::net::TcpListener::from_std(outside).unwrap();
        let lookup = script(&[&["127.0.0.2"], &["127.0.0.1"]]);
        let guard = Arc::new(Guard::with_lookup(&[], &nets(&["127.0.0.2/32"]), lookup).unwrap());
        let client = guard.client().unwrap();
        let url = url(&format!("http://bot.test:{port}/"));

        assert_eq!(guard.check(&url), Ok(()));
        let (answer, ()) = tokio::join!(client.get(url.clone()).send(), async {
            let (mut stream, _) = outside.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await.unwrap();
        });
        assert_eq!(answer.unwrap().status(), 200);

        for _ in 0..3 {
            assert_eq!(guard.check(&url), Ok(()));
            let error = client.get(url.clone()).timeout(PATIENCE).send().await.unwrap_err();
            assert!(is_forbidden(&error), "{error:?}");
        }
        nobody_came(&inside);
    }

    #[tokio::test]
    async fn a_public_answer_of_another_lookup_is_worth_nothing() {
        let (inside, port) = listener("127.0.0.1:0");
        let lookup = script(&[&["1.1.1.1"], &["127.0.0.1"]]);
        let guard = Arc::new(Guard::with_lookup(&[], &[], Arc::clone(&lookup)).unwrap());
        let seen = lookup.lookup("bot.test").await.unwrap();
        assert!(seen.iter().all(|address| guard.permits(*address)));
        let url = url(&format!("http://bot.test:{port}/"));
        let error = guard.client().unwrap().get(url).timeout(PATIENCE).send().await.unwrap_err();
        assert!(is_forbidden(&error), "{error:?}");
        nobody_came(&inside);
    }

    #[tokio::test]
    async fn of_several_addresses_the_permitted_ones_are_used() {
        let (inside, outside, port) = listeners();
        let outside = tokio::net::TcpListener::from_std(outside).unwrap();
        let lookup = script(&[&["127.0.0.1", "::1", "127.0.0.2"]]);
        let guard = Arc::new(Guard::with_lookup(&[], &nets(&["127.0.0.2/32"]), lookup).unwrap());
        let client = guard.client().unwrap();
        let (answer, ()) = tokio::join!(client.get(format!("http://bot.test:{port}/")).send(), async {
            let (mut stream, _) = outside.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await.unwrap();
            stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
        });
        assert_eq!(answer.unwrap().status(), 204);
        nobody_came(&inside);
    }

    #[tokio::test]
    async fn a_name_without_an_address_is_not_a_forbidden_one() {
        let guard = Arc::new(Guard::with_lookup(&[], &[], script(&[&[]])).unwrap());
        let error = guard.client().unwrap().get("http://bot.test/").timeout(PATIENCE).send().await.unwrap_err();
        assert!(error.is_connect() && !is_forbidden(&error), "{error:?}");
    }
}
