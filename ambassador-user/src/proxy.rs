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

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::yield_now;
use tokio::time::sleep;

use crate::drain::Drain;
use crate::route::Route;
use connection::Connections;
use listener::Listener;
use shortcut::Shortcuts;
use socket::Socket;
use splice::PipePool;

/// How long a listener that is about to close waits for handshakes that have begun. On loopback they are a
/// matter of the client's system call.
const LAST_HANDSHAKES: Duration = Duration::from_millis(20);
/// So many that wait are accepted before those that are here get their turn. Else a crowd, as when a server fails, would
/// not hear the first answer before the last of them has connected.
const AT_ONCE: u32 = 8;

/// What every accept loop shares.
#[derive(Debug, Clone, Default)]
pub struct Shared {
    pub connections: Arc<Connections>,
    pub pipes: Arc<PipePool>,
    /// For routes of the `sockmap` tier, if there is one here.
    pub shortcuts: Option<Arc<dyn Shortcuts>>,
}

/// Accepts the connections of one listen address, for the route that has it at the time, until the drain
/// closes it or no route has it any more. Whoever is in the queue by then is still served.
pub async fn serve(
    listener: Arc<Listener>,
    route: watch::Receiver<Arc<Route>>,
    shared: Shared,
    drain: Drain,
) {
    let carry = |(socket, peer)| {
        let route = Arc::clone(&route.borrow());
        match route.admit() {
            Some(admission) => shared.connections.spawn(admission, socket, peer, &shared),
            None => Socket::reset(socket),
        }
    };
    let mut given_up = route.clone();
    let given_up = async { while given_up.changed().await.is_ok() {} };
    let mut closed = pin!(async {
        tokio::select! {
            () = drain.closed() => {}
            () = given_up => {}
        }
    });
    let mut in_a_row = 0;
    loop {
        tokio::select! {
            biased;
            () = &mut closed => break,
            accepted = listener.accept() => carry(accepted),
            () = poll_fn(|_| {
                in_a_row = 0;
                Poll::Pending
            }) => {}
        }
        in_a_row += 1;
        if in_a_row == AT_ONCE {
            in_a_row = 0;
            yield_now().await;
        }
    }
    listener.let_nobody_in();
    let mut over = pin!(sleep(LAST_HANDSHAKES));
    loop {
        tokio::select! {
            biased;
            accepted = listener.accept() => carry(accepted),
            () = &mut over => break,
        }
    }
}
