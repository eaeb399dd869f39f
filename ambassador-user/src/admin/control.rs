//! The control socket: one request a connection, a line of JSON each way. Whoever may open the socket
//! (mode 0600) may do everything.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::{debug, info};

use crate::proxy::listener::Listener;
use crate::proxy::socket::Socket;
use crate::reload::triggers::Ask;
use crate::service::{Order, Service};
use crate::status::{self, Status};
use crate::telemetry::{LogFilter, LogLevel};

/// A longer or slower request is refused.
const MOST_REQUEST: u64 = 4096;
const REQUEST_TIME: Duration = Duration::from_secs(2);

/// What can be asked.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    // With braces: of a variant without, serde would not refuse unknown fields.
    Status {},
    Connections {},
    Drain {},
    Shutdown {},
    /// Reads the configuration again; answered when that is in force, or refused.
    Reload {},
    LogLevel {
        level: LogFilter,
    },
    /// Keeps a route, or `all`, to a tier at most.
    Tier {
        route: String,
        tier: String,
    },
}

/// What is answered.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Done(Value),
    Refused(String),
}

/// What the control socket acts on.
#[derive(Clone)]
pub struct Handler {
    pub service: Arc<Service>,
    pub orders: mpsc::Sender<Order>,
    pub reload: Ask,
    pub log_level: LogLevel,
}

/// Answers requests until the process ends.
pub async fn serve(listener: Listener, handler: Handler) {
    super::serve(listener, |socket| {
        let handler = handler.clone();
        async move {
            if let Err(error) = handler.converse(socket).await {
                debug!("control caller: {error:#}");
            }
        }
    })
    .await;
}

impl Handler {
    async fn converse(&self, mut socket: Socket) -> Result<()> {
        let Ok(request) = timeout(REQUEST_TIME, read(&mut socket)).await else {
            bail!("no request within {} s", REQUEST_TIME.as_secs())
        };
        let order = request.as_ref().ok().and_then(Request::order);
        let done = match request {
            Ok(request) => self.act(request).await,
            Err(error) => Err(error),
        };
        let answer = match done {
            Ok(done) => Answer::Done(done),
            Err(error) => Answer::Refused(format!("{error:#}")),
        };
        let mut line = serde_json::to_vec(&answer).context("write the answer as JSON")?;
        line.push(b'\n');
        let answered = socket.write_all(&line).await.context("send the answer");
        // Whether or not anybody hears the answer, and not before it: the process may end at once.
        if let Some(order) = order {
            self.orders.try_send(order).context("it is ending already")?;
        }
        answered
    }

    async fn act(&self, request: Request) -> Result<Value> {
        match request {
            Request::Status {} => Ok(serde_json::to_value(Status::of(&self.service).await)?),
            Request::Connections {} => {
                Ok(serde_json::to_value(status::connections(&self.service).await)?)
            }
            // Obeyed once that is answered.
            Request::Drain {} | Request::Shutdown {} => Ok(Value::Null),
            Request::Reload {} => {
                let (answer, outcome) = oneshot::channel();
                self.reload.try_send(answer).context("too many wait for a reload")?;
                Ok(serde_json::to_value(outcome.await.context("it is ending")?)?)
            }
            Request::LogLevel { level } => {
                info!(%level, "log level changes");
                self.log_level.set(&level)?;
                Ok(Value::Null)
            }
            Request::Tier { route, tier } => {
                self.service.limit(&route, tier.parse()?)?;
                Ok(Value::Null)
            }
        }
    }
}

impl Request {
    /// What it asks the process to do with itself.
    fn order(&self) -> Option<Order> {
        match self {
            Self::Drain {} => Some(Order::Drain),
            Self::Shutdown {} => Some(Order::Shutdown),
            _ => None,
        }
    }
}

async fn read(socket: &mut Socket) -> Result<Request> {
    let mut line = Vec::new();
    BufReader::new(socket.take(MOST_REQUEST)).read_until(b'\n', &mut line).await?;
    serde_json::from_slice(&line).context("understand the request")
}
