//! The edge for people and probes: read-only HTTP, and the control socket that changes state.
//!
//! Both are served beside the data side and may be attacked, so what a caller can take is bounded:
//! the number of callers, the size of a request, the time it may take.

pub mod control;
pub mod http;

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::timeout;
use tracing::debug;

use crate::proxy::listener::Listener;
use crate::proxy::socket::Socket;

/// Callers at a time. One more ends the oldest: a probe is answered in less than a millisecond, so
/// callers that only hold on cannot keep probes out.
const MOST_CALLERS: usize = 64;
/// The longest a caller may stay.
const STAY: Duration = Duration::from_secs(30);

/// Answers callers until the process ends.
pub async fn serve<F>(listener: Listener, answer: impl Fn(Socket) -> F)
where
    F: Future<Output = ()> + Send + 'static,
{
    let mut callers = VecDeque::with_capacity(MOST_CALLERS);
    loop {
        let (socket, peer) = listener.accept().await;
        debug!(%peer, "admin caller");
        if callers.len() == MOST_CALLERS {
            callers.pop_front().inspect(tokio::task::AbortHandle::abort);
        }
        let answered = timeout(STAY, answer(socket));
        callers.push_back(tokio::spawn(answered).abort_handle());
    }
}
