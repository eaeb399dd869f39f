//! The endpoints as the balancer sees them: for one connection, at one time.

use std::cell::OnceCell;

use super::balance::Field;
use super::circuit::Circuit;
use super::host::Host;
use super::{Endpoint, Upstream};

/// How they stand.
pub(super) struct Standing<'u> {
    upstream: &'u Upstream,
    tried: &'u [usize],
    circuit: Option<&'u Circuit>,
    has_known: OnceCell<bool>,
    has_sure: OnceCell<bool>,
}

impl<'u> Standing<'u> {
    /// For a connection that has `tried` these in vain.
    pub(super) fn new(
        upstream: &'u Upstream,
        tried: &'u [usize],
        circuit: Option<&'u Circuit>,
    ) -> Self {
        Self { upstream, tried, circuit, has_known: OnceCell::new(), has_sure: OnceCell::new() }
    }

    /// Whether an endpoint that is left to try is known to be somewhere, and good.
    pub(super) fn has_known(&self) -> bool {
        *self.has_known.get_or_init(|| self.left().any(|(_, it)| it.has_good_host()))
    }

    /// Whether there is one with room that is not to be passed over.
    fn has_sure(&self) -> bool {
        let is_sure = |index, it: &Endpoint| {
            it.has_good_host() && !self.passes_over(it) && !self.is_full(index)
        };
        *self.has_sure.get_or_init(|| self.left().any(|(index, it)| is_sure(index, it)))
    }

    /// Whether other endpoints are to be tried first, because this one could not be reached a moment ago.
    fn passes_over(&self, endpoint: &Endpoint) -> bool {
        self.upstream.meant.eject.is_some() && is_so_of_all_good(endpoint, Host::is_passed_over)
    }

    /// Those that are left to try.
    fn left(&self) -> impl Iterator<Item = (usize, &Endpoint)> {
        let all = self.upstream.endpoints.iter().map(|it| &**it).enumerate();
        all.filter(|(index, _)| !self.tried.contains(index))
    }
}

impl Field for Standing<'_> {
    fn count(&self) -> usize {
        self.upstream.endpoints.len()
    }

    fn is_fit(&self, index: usize) -> bool {
        let endpoint = &self.upstream.endpoints[index];
        !self.tried.contains(&index)
            && self.is_good(index)
            && !(self.passes_over(endpoint) && self.has_sure())
    }

    /// One whose name is lost is worth a try only where there is nothing better.
    fn is_good(&self, index: usize) -> bool {
        let endpoint = &self.upstream.endpoints[index];
        endpoint.is_good() && !(endpoint.is_lost() && self.has_known())
    }

    fn is_full(&self, index: usize) -> bool {
        let Some(circuit) = self.circuit else { return false };
        is_so_of_all_good(&self.upstream.endpoints[index], |host| circuit.is_full(host))
    }

    fn weight(&self, index: usize) -> u64 {
        let endpoint = &self.upstream.endpoints[index];
        let share = endpoint.share(self.upstream.slow_start());
        u64::from(endpoint.weight()) * u64::from(share)
    }

    fn active(&self, index: usize) -> u64 {
        self.upstream.endpoints[index].active().into()
    }

    fn label(&self, index: usize) -> &str {
        self.upstream.endpoints[index].label()
    }
}

/// Of the good hosts of an endpoint, of which there must be one.
fn is_so_of_all_good(endpoint: &Endpoint, is_so: impl Fn(&Host) -> bool) -> bool {
    let hosts = endpoint.hosts();
    let mut good = hosts.iter().filter(|host| host.is_good()).peekable();
    good.peek().is_some() && good.all(|host| is_so(host))
}
