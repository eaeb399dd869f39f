//! How a connection ended, and what is written of it then.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tracing::info;

use super::{About, Connections};
use crate::upstream::Upstream;
use crate::upstream::host::Host;

/// How a connection ended, as metrics and access records name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    ClientReset,
    UpstreamReset,
    /// By one of the two: the kernel does not tell which.
    Reset,
    ConnectFailed,
    Refused,
    IdleTimeout,
    Cut,
    HostLost,
}

/// Written when a connection ends, however it ends.
pub(super) struct Record {
    pub(super) about: Arc<About>,
    pub(super) connections: Arc<Connections>,
    /// [`Outcome::Cut`] until the connection itself has come to an end.
    pub(super) outcome: Outcome,
}

impl Drop for Record {
    fn drop(&mut self) {
        let about = &self.about;
        about.settle();
        if self.outcome == Outcome::Cut && about.lost.load(Ordering::Relaxed) {
            self.outcome = Outcome::HostLost;
        }
        let route = about.route();
        let endpoint = about.endpoint.get().map_or("", |label| label);
        about.metrics().ended(endpoint, self.outcome.name());
        info!(
            target: "access",
            route = %route.name,
            peer = %about.peer,
            endpoint,
            tier = %about.tier(),
            outcome = self.outcome.name(),
            bytes_up = about.traffic.up(),
            bytes_down = about.traffic.down(),
            duration_ms = about.age().as_secs_f64() * 1e3,
            "connection"
        );
        let mut live = self.connections.live();
        live.remove(&about.id);
        if live.is_empty() {
            self.connections.emptied.notify_waiters();
        }
    }
}

impl Outcome {
    /// Tells the upstream what the end of an established connection says of the host that it led to, which
    /// has sent so many bytes.
    pub fn speak_of(self, host: &Arc<Host>, upstream: &Upstream, sent: u64) {
        match self {
            Self::UpstreamReset if sent == 0 => upstream.reset_early(host),
            outcome if outcome == Self::Ok || sent > 0 => upstream.kept(host),
            // The client has left too early to say.
            _ => {}
        }
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ClientReset => "client_reset",
            Self::UpstreamReset => "upstream_reset",
            Self::Reset => "reset",
            Self::ConnectFailed => "connect_failed",
            Self::Refused => "refused",
            Self::IdleTimeout => "idle_timeout",
            Self::Cut => "cut",
            Self::HostLost => "host_lost",
        }
    }
}
