//! Logs: one stream on stderr, as text or JSON, whose level can be changed while running.
//!
//! Lines are written by a thread of their own behind a bounded queue: a container runtime that does not
//! read its end of the pipe loses lines (counted at the end) and never holds up a connection.

use std::str::FromStr;

use anyhow::{Context, Result};
use tracing::level_filters::LevelFilter;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::reload;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt};

use crate::cli::LogFormat;

/// Lines that may wait for the writer.
const QUEUE: usize = 8192;

/// The log of this process; dropping it writes what is queued.
pub struct Telemetry {
    filter: reload::Handle<Targets, Registry>,
    lost: ErrorCounter,
    _writer: WorkerGuard,
}

/// Changes what is logged.
#[derive(Clone)]
pub struct LogLevel(reload::Handle<Targets, Registry>);

/// Starts logging: at `level` if given, else as RUST_LOG says, else at `info`.
pub fn start(format: LogFormat, level: Option<&str>) -> Result<Telemetry> {
    let from_environment = std::env::var("RUST_LOG").ok();
    let (source, level) = match (level, from_environment.as_deref()) {
        (Some(level), _) => ("--log-level", level),
        (None, Some(level)) if !level.is_empty() => ("RUST_LOG", level),
        (None, _) => ("--log-level", "info"),
    };
    let (filter, handle) = reload::Layer::new(targets(level).context(source)?);
    let (writer, guard) = NonBlockingBuilder::default()
        .buffered_lines_limit(QUEUE)
        .thread_name("log")
        .finish(std::io::stderr());
    let lost = writer.error_counter();
    let lines = fmt::layer().with_writer(writer);
    let lines = match format {
        LogFormat::Text => lines.with_ansi(false).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).boxed(),
    };
    tracing_subscriber::registry().with(filter.and_then(lines)).init();
    Ok(Telemetry { filter: handle, lost, _writer: guard })
}

impl Telemetry {
    pub fn level(&self) -> LogLevel {
        LogLevel(self.filter.clone())
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        let lost = self.lost.dropped_lines();
        if lost > 0 {
            tracing::warn!(lost, "log lines were lost because nobody read them");
        }
    }
}

impl LogLevel {
    pub fn set(&self, level: &str) -> Result<()> {
        let filter = targets(level)?;
        self.0.reload(filter).context("change the log level")
    }
}

/// `LEVEL` or `TARGET=LEVEL,...`, as RUST_LOG.
fn targets(level: &str) -> Result<Targets> {
    let parsed = Targets::from_str(level).with_context(|| {
        format!("{level:?} is no log level; write error, warn, info, debug, trace or off, or TARGET=LEVEL,...")
    })?;
    // What the resolver thinks of an answer is in our own messages already.
    let resolver = parsed.default_level().unwrap_or(LevelFilter::OFF).min(LevelFilter::ERROR);
    let quiet =
        if level.contains("hickory") { parsed } else { parsed.with_target("hickory", resolver) };
    Ok(quiet)
}
