//! A pod and the host its upstreams run on: two network namespaces joined by a cable.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};

use crate::place::Place;

/// The addresses of a pod, and of the host at the other end of its cable.
pub(crate) const INSIDE: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(10, 77, 0, 1), Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 1));
pub(crate) const UPSTREAM: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(10, 77, 0, 2), Ipv6Addr::new(0xfd77, 0, 0, 0, 0, 0, 0, 2));

/// Two places: the pod's own, and the one where the services are that it wants.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Where the application and its ambassador run.
    pub inside: Place,
    /// Where the real services run.
    pub upstream: Place,
}

impl Pod {
    /// Two network namespaces joined by a veth pair with IPv4 and IPv6 addresses. Needs root.
    pub fn new() -> Result<Self> {
        let inside = Place::isolated(INSIDE.0, INSIDE.1).context("make the pod's namespace")?;
        let upstream = upstream_of(&inside)?;
        Ok(Self { inside, upstream })
    }

    /// Both places on this machine's loopback. Needs no privilege.
    pub fn on_loopback() -> Self {
        Self { inside: Place::here(), upstream: Place::here() }
    }
}

/// A new place at the other end of a cable.
pub(crate) fn upstream_of(inside: &Place) -> Result<Place> {
    let upstream =
        Place::isolated(UPSTREAM.0, UPSTREAM.1).context("make the upstream's namespace")?;
    let other = upstream.path().context("find the upstream's namespace")?;
    inside.ip(&format!("link add eth0 type veth peer name eth0 netns {other}"))?;
    for place in [inside, &upstream] {
        place.ip(&format!("addr add {}/24 dev eth0", place.ipv4))?;
        // Duplicate address detection would keep the address unusable for a second.
        place.ip(&format!("addr add {}/64 dev eth0 nodad", place.ipv6))?;
        place.ip("link set eth0 up")?;
    }
    Ok(upstream)
}

/// Whether we are root, which [`Pod::new`] needs.
pub fn is_root() -> bool {
    // SAFETY: geteuid takes nothing and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// A [`Pod`] of the test's own, or a skipped test: where there can be none, or where one of these
/// programs is not installed.
#[macro_export]
macro_rules! pod {
    ($($program:literal),* $(,)?) => {{
        if !$crate::pod::is_root() {
            $crate::skip!("network namespaces need root");
        }
        $crate::installed!("ip", "nsenter", $($program),*);
        $crate::pod::Pod::new()?
    }};
}
