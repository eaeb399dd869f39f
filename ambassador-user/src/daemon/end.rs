//! The end: what tells the process to stop, and how it does.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{sleep_until, timeout};
use tracing::{info, warn};

use crate::datapath::kernel::Hold;
use crate::drain::{Phase, Trigger};
use crate::proxy::connection::Connections;
use crate::reload::Reloader;
use crate::service::Order;

/// How long cut connections may take to be gone; they wait for nobody.
const CUT: Duration = Duration::from_secs(1);

/// Ends in order, for the first reason to stop.
pub(super) async fn end(
    stop: Stop,
    reloader: Reloader,
    trigger: Trigger,
    mut stops: Stops,
    hold: &Option<Hold>,
) -> ExitCode {
    let Reloader { config, mut listeners, service, .. } = reloader;
    let (policy, connections) = (config.drain, &service.connections);
    // New connections end with the accepting of new connections, in the kernel as here; unless what does
    // it stays for the next ambassador.
    let stop_redirecting = || {
        if let (Some(direct), Some(hold)) = (&service.direct, hold)
            && !hold.stays()
            && let Err(error) = direct.close()
        {
            warn!("cannot close the kernel's tables: {error:#}");
        }
    };
    if stop == Stop::Order(Order::Shutdown) {
        listeners.abort();
        stop_redirecting();
        return cut(connections, "told to shut down").await;
    }
    let begun = tokio::time::Instant::now();
    info!(
        grace = %humantime::format_duration(policy.grace),
        deadline = %humantime::format_duration(policy.deadline),
        connections = connections.count(),
        "draining"
    );
    trigger.advance(Phase::Grace);
    let in_order = async {
        sleep_until(begun + policy.grace).await;
        stop_redirecting();
        trigger.advance(Phase::Finishing);
        listeners.closed().await;
        connections.ended().await;
    };
    tokio::select! {
        () = in_order => {
            info!("drained");
            ExitCode::SUCCESS
        }
        () = sleep_until(begun + policy.deadline) => cut(connections, "the drain's deadline").await,
        () = stops.impatient() => cut(connections, "told again to end").await,
    }
}

/// Ends what is left. A cut connection is a failure, and none to cut is not.
async fn cut(connections: &Connections, why: &str) -> ExitCode {
    let cut = connections.cut();
    // Bounded, though tasks that are aborted wait for nothing.
    let _ = timeout(CUT, connections.ended()).await;
    if cut == 0 {
        info!("ended: {why}");
        return ExitCode::SUCCESS;
    }
    warn!(connections = cut, "cut: {why}");
    ExitCode::FAILURE
}

/// Everything that can tell the process to end.
pub(super) struct Stops {
    terminate: Signal,
    interrupt: Signal,
    orders: mpsc::Receiver<Order>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    Signal,
    Order(Order),
}

impl Stops {
    pub(super) fn new(orders: mpsc::Receiver<Order>) -> Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("watch for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("watch for SIGINT")?,
            orders,
        })
    }

    pub(super) async fn next(&mut self) -> Stop {
        tokio::select! {
            _ = self.terminate.recv() => Stop::Signal,
            _ = self.interrupt.recv() => Stop::Signal,
            Some(order) = self.orders.recv() => Stop::Order(order),
        }
    }

    /// Resolves when a drain under way is to be cut short. To ask for a drain again is not that.
    async fn impatient(&mut self) {
        while self.next().await == Stop::Order(Order::Drain) {}
    }
}
