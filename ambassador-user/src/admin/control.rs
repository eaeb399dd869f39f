//! The control socket: one request a connection, a line of JSON each way. Whoever may open the socket
//! (mode 0600) may do everything.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::{debug, info};

use crate::proxy::listener::Listener;
use crate::proxy::socket::Socket;
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
        let answer = match timeout(REQUEST_TIME, read(&mut socket)).await {
            Ok(Ok(request)) => self.act(request).await,
            Ok(Err(error)) => Err(error),
            Err(_elapsed) => bail!("no request within {} s", REQUEST_TIME.as_secs()),
        };
        let answer = match answer {
            Ok(done) => Answer::Done(done),
            Err(error) => Answer::Refused(format!("{error:#}")),
        };
        let mut line = serde_json::to_vec(&answer).context("write the answer as JSON")?;
        line.push(b'\n');
        socket.write_all(&line).await.context("send the answer")
    }

    async fn act(&self, request: Request) -> Result<Value> {
        match request {
            Request::Status {} => Ok(serde_json::to_value(Status::of(&self.service).await)?),
            Request::Connections {} => {
                Ok(serde_json::to_value(status::connections(&self.service).await)?)
            }
            Request::Drain {} => self.order(Order::Drain),
            Request::Shutdown {} => self.order(Order::Shutdown),
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

    fn order(&self, order: Order) -> Result<Value> {
        self.orders.try_send(order).context("it is ending already")?;
        Ok(Value::Null)
    }
}

async fn read(socket: &mut Socket) -> Result<Request> {
    let mut line = Vec::new();
    BufReader::new(socket.take(MOST_REQUEST)).read_until(b'\n', &mut line).await?;
    serde_json::from_slice(&line).context("understand the request")
}
