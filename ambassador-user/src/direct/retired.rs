//! An address that no plan names any more, while connections to it may be open.

use std::net::SocketAddr;

use crate::upstream::Upstream;
use crate::upstream::host::Used;

/// As long as it is here, its host is looked after.
pub(super) struct Retired {
    pub(super) route: u64,
    pub(super) address: SocketAddr,
    /// Unless nobody knows it any more.
    _host: Option<Used>,
}

impl Retired {
    /// An address of a route, as its upstream has it.
    pub(super) fn of((route, address): (u64, SocketAddr), upstream: Option<&Upstream>) -> Self {
        let known = upstream.and_then(|upstream| upstream.host_at(address));
        Self { route, address, _host: known.map(|(_, host)| Used::new(&host)) }
    }
}
