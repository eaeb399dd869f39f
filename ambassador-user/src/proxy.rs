//! The data side: accept, connect to the upstream, relay, in user space.
//!
//! [`serve`] is the one accept loop. Everything it needs to know about a listen address it is told by
//! its [`Route`]; it never looks at configuration, and it never touches the kernel tiers.

pub mod connect;
pub mod connection;
pub mod copy;
pub mod listener;
pub mod port_owner;
pub mod relay;
pub mod shortcut;
pub mod socket;
pub mod splice;

use std::sync::Arc;

use crate::drain::Drain;
use crate::route::Route;
use connection::Connections;
use listener::Listener;
use shortcut::Shortcuts;
use splice::PipePool;

/// What every accept loop shares.
#[derive(Debug, Clone, Default)]
pub struct Shared {
    pub connections: Arc<Connections>,
    pub pipes: Arc<PipePool>,
    /// For routes of the `sockmap` tier, if there is one here.
    pub shortcuts: Option<Arc<dyn Shortcuts>>,
}

/// Accepts the connections of one listen address until the drain closes it.
pub async fn serve(route: Arc<Route>, listener: Listener, shared: Shared, drain: Drain) {
    loop {
        let (socket, peer) = tokio::select! {
            // Whoever is already in the queue when the drain closes it is still served.
            biased;
            accepted = listener.accept() => accepted,
            () = drain.closed() => break,
        };
        match route.admit() {
            Some(admission) => shared.connections.spawn(admission, socket, peer, &shared),
            None => socket.reset(),
        }
    }
}
