//! Logs: one stream on stderr, as text or JSON, whose level can be changed while running.
//!
//! In service, lines are written by a thread of their own behind a bounded queue: a container runtime
//! that does not read its end of the pipe loses lines (counted at the end) and never holds up a
//! connection.

use std::fmt;
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::ptr;
use std::str::FromStr;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use tracing::level_filters::LevelFilter;
use tracing::warn;
use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::writer::EitherWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

/// Lines that may wait for the writer.
const QUEUE: usize = 8192;

/// The form of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people.
    Text,
    /// One JSON object a line.
    Json,
}

/// What is logged: `LEVEL`, or `TARGET=LEVEL,...` as in RUST_LOG.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LogFilter {
    text: String,
    targets: Targets,
}

/// The log of this process; dropping it writes what is queued.
#[derive(Debug)]
pub struct Telemetry {
    filter: reload::Handle<Targets, Registry>,
    queue: Arc<OnceLock<NonBlocking>>,
    /// Dropped last: it waits until the thread has written all.
    thread: OnceLock<WorkerGuard>,
}

/// Changes what is logged.
#[derive(Clone)]
pub struct LogLevel(reload::Handle<Targets, Registry>);

/// Starts logging `filter` if given, else what RUST_LOG says, else `info`.
pub fn start(format: LogFormat, filter: Option<&LogFilter>) -> Result<Telemetry> {
    let from_environment = std::env::var("RUST_LOG").ok().filter(|text| !text.is_empty());
    let fallback = from_environment.as_deref().unwrap_or("info").parse();
    let (filter, misread) = match (filter, fallback) {
        (Some(filter), _) => (filter.clone(), None),
        (None, Ok(filter)) => (filter, None),
        (None, Err(error)) => ("info".parse()?, Some(error)),
    };
    let (filter, handle) = reload::Layer::new(filter.targets);
    let queue = Arc::new(OnceLock::new());
    let lines = tracing_subscriber::fmt::layer().with_writer(Stderr(Arc::clone(&queue)));
    let lines = match format {
        LogFormat::Text => lines.with_ansi(false).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).with_current_span(false).boxed(),
    };
    tracing_subscriber::registry().with(filter.and_then(lines)).init();
    if let Some(error) = misread {
        warn!("RUST_LOG is not used: {error:#}");
    }
    Ok(Telemetry { filter: handle, queue, thread: OnceLock::new() })
}

impl Telemetry {
    pub fn level(&self) -> LogLevel {
        LogLevel(self.filter.clone())
    }

    /// From here on no log line holds anybody up. Starts a thread, so privileges are dropped before.
    pub fn write_from_a_thread(&self) {
        self.thread.get_or_init(|| {
            let builder = NonBlockingBuilder::default().buffered_lines_limit(QUEUE);
            let (mut queue, thread) = builder.thread_name("log").finish(Apart::default());
            // Nothing to write, but the thread sees it and goes apart.
            let _ = queue.write(&[]);
            self.queue.get_or_init(|| queue);
            thread
        });
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        let lost = self.queue.get().map_or(0, |queue| queue.error_counter().dropped_lines());
        if lost > 0 {
            warn!(lost, "log lines were lost because nobody read them");
        }
    }
}

impl LogLevel {
    pub fn set(&self, filter: &LogFilter) -> Result<()> {
        self.0.reload(filter.targets.clone()).context("change the log level")
    }
}

impl FromStr for LogFilter {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        // To its parser a lone word that is no level is a target: a typo would silence the rest.
        let misspelt = text
            .split(',')
            .find(|part| !part.contains('=') && LevelFilter::from_str(part.trim()).is_err());
        ensure!(
            misspelt.is_none() && !text.is_empty(),
            "{text:?} is no log level; write error, warn, info, debug, trace or off, or \
             TARGET=LEVEL,..."
        );
        let targets = Targets::from_str(text).with_context(|| format!("read {text:?}"))?;
        // What the resolver has to say is in our own messages already.
        let most = targets.default_level().unwrap_or(LevelFilter::OFF).min(LevelFilter::ERROR);
        let quiet = !text.contains("hickory");
        let targets = if quiet { targets.with_target("hickory", most) } else { targets };
        Ok(Self { text: text.to_owned(), targets })
    }
}

impl fmt::Display for LogFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl TryFrom<String> for LogFilter {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<LogFilter> for String {
    fn from(filter: LogFilter) -> Self {
        filter.text
    }
}

/// Writes to stderr: at once until the thread runs, through it from then on.
struct Stderr(Arc<OnceLock<NonBlocking>>);

impl MakeWriter<'_> for Stderr {
    type Writer = EitherWriter<NonBlocking, io::Stderr>;

    fn make_writer(&self) -> Self::Writer {
        match self.0.get() {
            Some(queue) => EitherWriter::A(queue.clone()),
            None => EitherWriter::B(io::stderr()),
        }
    }
}

/// Stderr for a thread with a descriptor table of its own.
///
/// While a table has one user, system calls need no reference on the descriptors they are given
/// (fs/file.c, `__fget_light`); so a log thread that shared it would tax every read and write of a
/// runtime that has but one thread. And one that waits for the CPU rather than to take it from others: what is to be
/// told of a failure must not hold up those who have to do with it.
#[derive(Default)]
struct Apart {
    done: bool,
}

impl Apart {
    fn go(&mut self) {
        if !std::mem::replace(&mut self.done, true) {
            // Whoever takes a signal wakes the runtime by a descriptor, which this thread will not have.
            let mut all = MaybeUninit::uninit();
            // SAFETY: it writes the set it is given.
            unsafe { libc::sigfillset(all.as_mut_ptr()) };
            // SAFETY: it is about this thread, and only reads the set, which is filled.
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, all.as_ptr(), ptr::null_mut()) };
            // Kernels before 5.9 do not know it; then the table stays shared.
            // SAFETY: this thread uses stderr alone, and closes the rest in its own copy only.
            unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_UNSHARE) };
            let no_priority = libc::sched_param { sched_priority: 0 };
            // Where it is refused, the log has the same right to the CPU as all.
            // SAFETY: it is about this thread, and only reads what the pointer leads to.
            unsafe { libc::sched_setscheduler(0, libc::SCHED_BATCH, &raw const no_priority) };
        }
    }
}

impl Write for Apart {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.go();
        io::stderr().write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.go();
        io::stderr().flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_level_is_refused_and_not_taken_for_a_target() {
        for text in ["wran", "info,wran", ""] {
            assert!(text.parse::<LogFilter>().is_err(), "{text}");
        }
        for text in ["info", "OFF", "warn,ambassador=debug", "ambassador::proxy=trace"] {
            assert!(text.parse::<LogFilter>().is_ok(), "{text}");
        }
    }
}
