//! Probes: does a service answer, and as it should? For images that have no shell, and for health checks.

mod dialogue;
mod http;
mod mysql;
mod postgres;
mod redis;

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{Instant, timeout_at};

use crate::config::{self, Ask, Balance, Target};
use crate::proxy::connect::{As, connect};
use crate::upstream::Upstream;
use crate::upstream::balance::Source;
use crate::upstream::dns::Names;
use dialogue::Dialogue;

/// The longest password.
const PASSWORD: u64 = 1024;

/// Whether `target` answers as it should, by the way that an app's connection would take.
pub fn probe(target: Target, ask: &Ask, timeout: Duration) -> Result<()> {
    let mut names = Names::default();
    let upstream = config::Upstream {
        name: Arc::from("probe"),
        endpoints: vec![config::Endpoint { target, weight: std::num::NonZeroU16::MIN }],
        balance: Balance::default(),
        connect: config::Connect { timeout, ..Default::default() },
        dns: config::Dns::default(),
        health: None,
        eject: None,
        on_unhealthy: config::OnUnhealthy::default(),
    };
    let upstream = Upstream::new(&Arc::new(upstream), None, &mut names);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let deadline = Instant::now() + timeout;
        names.ask_for(std::iter::once(&*upstream));
        let connected = connect(&upstream, &As::App, &Source::Pod, None).await?;
        let label = connected.lease.endpoint().label();
        let answered = timeout_at(deadline, answers(ask, label, connected.socket)).await;
        answered
            .unwrap_or_else(|_elapsed| {
                Err(anyhow!("no answer within {}", humantime::format_duration(timeout)))
            })
            .with_context(|| label.to_string())
    })
}

/// Whether the service that `stream` leads to answers as it should; `label` is where that is, as the user
/// wrote it. The error is one line that says what the service said.
///
/// What is read is bounded here, the time is for the caller to bound.
pub async fn answers<S>(ask: &Ask, label: &str, stream: S) -> Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let server = Dialogue::new(stream);
    match ask {
        Ask::Tcp => Ok(()),
        Ask::Redis(ask) => redis::ask(ask, server).await.context("redis"),
        Ask::Postgres(None) => postgres::greet(server).await.context("postgres"),
        Ask::Postgres(Some(login)) => postgres::log_in(login, server).await.context("postgres"),
        Ask::Mysql => mysql::ask(server).await.context("mysql"),
        Ask::Http(ask) => http::ask(ask, label, server).await.context("http"),
    }
}

/// The password in `file`, without the newline that editors leave. It is read for each login, so that one that
/// was changed is used.
fn password(file: &Path) -> Result<Vec<u8>> {
    let read = || {
        let mut password = Vec::new();
        // A FIFO without a writer is not waited for.
        let open = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(file)?;
        open.take(PASSWORD + 1).read_to_end(&mut password)?;
        std::io::Result::Ok(password)
    };
    let mut password = read().with_context(|| format!("read {}", file.display()))?;
    if password.last() == Some(&b'\n') {
        password.pop();
        password.pop_if(|last| *last == b'\r');
    }
    ensure!(!password.is_empty(), "there is no password in {}", file.display());
    ensure!(
        password.len() as u64 <= PASSWORD,
        "the password in {} is longer than {PASSWORD} bytes",
        file.display()
    );
    Ok(password)
}

#[cfg(test)]
mod tests;
