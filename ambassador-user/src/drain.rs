//! The end of service: one trigger, many watchers, and always in the same order.

use tokio::sync::watch;

/// How far the end has come.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize,
)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Bound and accepting.
    Serving,
    /// Told to end, still accepting: others may not know yet.
    Grace,
    /// Accepting no more; connections finish.
    Finishing,
}

/// Moves the phase on.
#[derive(Debug)]
pub struct Trigger(watch::Sender<Phase>);

/// Sees the phase.
#[derive(Debug, Clone)]
pub struct Drain(watch::Receiver<Phase>);

/// A service that has just begun.
pub fn channel() -> (Trigger, Drain) {
    let (sender, receiver) = watch::channel(Phase::Serving);
    (Trigger(sender), Drain(receiver))
}

impl Trigger {
    pub fn advance(&self, phase: Phase) {
        self.0.send_if_modified(|now| {
            let further = phase > *now;
            *now = phase.max(*now);
            further
        });
    }
}

impl Drain {
    pub fn phase(&self) -> Phase {
        *self.0.borrow()
    }

    /// Resolves when no new connection may be accepted.
    pub async fn closed(&self) {
        // A dropped trigger is an end too.
        let _ = self.0.clone().wait_for(|phase| *phase == Phase::Finishing).await;
    }
}
