//! For Jobs: waits for the ambassador beside us, runs the real command, and drains the ambassador when
//! the command ends, so that the Pod ends too.

use std::ffi::OsString;
use std::net::SocketAddr;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{ExitCode, ExitStatus};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::control::Request;
use crate::remote;
use crate::wait::{Until, wait};

/// Waits, runs `command`, drains; gives the command's own exit code (128 + N after signal N).
pub fn exec(
    command: &[OsString],
    admin: SocketAddr,
    control: &Path,
    timeout: Duration,
) -> Result<ExitCode> {
    wait(admin, Until::Ready, timeout)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ended = runtime.block_on(run(command));
    // Also when the command could not even be started: nobody needs the ambassador any more.
    if let Err(error) = remote::ask::<Value>(control, &Request::Drain {}) {
        eprintln!("ambassador: cannot drain: {error:#}");
    }
    let status = ended?;
    let code = status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

async fn run(command: &[OsString]) -> Result<ExitStatus> {
    let (program, arguments) = command.split_first().context("no command is given")?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut child = Command::new(program)
        .args(arguments)
        .spawn()
        .with_context(|| format!("start {}", program.display()))?;
    loop {
        tokio::select! {
            status = child.wait() => return status.context("wait for the command"),
            _ = terminate.recv() => pass_on(&child, libc::SIGTERM),
            _ = interrupt.recv() => pass_on(&child, libc::SIGINT),
        }
    }
}

fn pass_on(child: &Child, signal: libc::c_int) {
    if let Some(pid) = child.id().and_then(|pid| libc::pid_t::try_from(pid).ok()) {
        // SAFETY: kill(2) takes numbers; the child is not reaped yet, so the pid is still its own.
        unsafe { libc::kill(pid, signal) };
    }
}
