//! The endpoints as the balancer sees them: for one connection, at one time.

use std::cell::OnceCell;

use super::Upstream;
use super::balance::Field;
use super::circuit::Circuit;

/// How they stand.
pub(super) struct Standing<'u> {
    upstream: &'u Upstream,
    tried: &'u [usize],
    circuit: Option<&'u Circuit>,
    has_known: OnceCell<bool>,
}

impl<'u> Standing<'u> {
    /// For a connection that has `tried` these in vain.
    pub(super) fn new(
        upstream: &'u Upstream,
        tried: &'u [usize],
        circuit: Option<&'u Circuit>,
    ) -> Self {
        Self { upstream, tried, circuit, has_known: OnceCell::new() }
    }

    /// Whether an endpoint that is left to try is known to be somewhere, and good.
    pub(super) fn has_known(&self) -> bool {
        *self.has_known.get_or_init(|| {
            let mut all = self.upstream.endpoints.iter().enumerate();
            all.any(|(index, it)| !self.tried.contains(&index) && it.has_good_host())
        })
    }
}

impl Field for Standing<'_> {
    fn count(&self) -> usize {
        self.upstream.endpoints.len()
    }

    fn is_fit(&self, index: usize) -> bool {
        !self.tried.contains(&index) && self.is_good(index)
    }

    /// One whose name is lost is worth a try only where there is nothing better.
    fn is_good(&self, index: usize) -> bool {
        let endpoint = &self.upstream.endpoints[index];
        endpoint.is_good() && !(endpoint.is_lost() && self.has_known())
    }

    fn is_full(&self, index: usize) -> bool {
        let Some(circuit) = self.circuit else { return false };
        let hosts = self.upstream.endpoints[index].hosts();
        let mut good = hosts.iter().filter(|host| host.is_good()).peekable();
        good.peek().is_some() && good.all(|host| circuit.is_full(host))
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
