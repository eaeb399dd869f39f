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
pub mod socket;
pub mod splice;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, warn};

use crate::drain::Drain;
use crate::route::Route;
use connection::Connections;
use listener::Listener;
use splice::PipePool;

/// Without descriptors or memory there is nothing to do but wait for connections to end.
const PAUSE_WHEN_EXHAUSTED: Duration = Duration::from_millis(50);

/// What every accept loop shares.
#[derive(Debug, Clone, Default)]
pub struct Shared {
    pub connections: Arc<Connections>,
    pub pipes: Arc<PipePool>,
}

/// Accepts the connections of one listen address until the drain closes it.
pub async fn serve(route: Arc<Route>, listener: Listener, shared: Shared, drain: Drain) {
    loop {
        let accepted = tokio::select! {
            // Whoever is already in the queue when the drain closes it is still served.
            biased;
            accepted = listener.accept() => accepted,
            () = drain.closed() => break,
        };
        match accepted {
            Ok((socket, peer)) => match route.admit() {
                Some(admission) => shared.connections.spawn(admission, socket, peer, &shared.pipes),
                None => socket.reset(),
            },
            Err(error) if is_the_peers(&error) => debug!(route = %route.name, %error, "accept"),
            Err(error) => {
                if route.exhausted.say_now().is_some() {
                    warn!(
                        route = %route.name,
                        "cannot accept on {listener}: {error}; new connections wait (raise the \
                         limit of open files, or lower max_connections)"
                    );
                }
                tokio::time::sleep(PAUSE_WHEN_EXHAUSTED).await;
            }
        }
    }
}

/// The connection died before it was accepted: accept(2) lists these as errors to be retried.
fn is_the_peers(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::EPROTO
                | libc::ENETDOWN
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::ENETUNREACH
                | libc::ENONET
                | libc::EOPNOTSUPP
        )
    )
}
