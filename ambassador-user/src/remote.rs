//! Asks the running ambassador, over its control socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;

use crate::admin::control::{Answer, Request};

/// It answers at once, or not at all.
const PATIENCE: Duration = Duration::from_secs(5);

/// Sends `request` and waits for what it is answered.
pub fn ask<T: DeserializeOwned>(control: &Path, request: &Request) -> Result<T> {
    let shown = control.display();
    let mut socket = UnixStream::connect(control).with_context(|| {
        format!(
            "reach the ambassador at unix:{shown} (is it running, as the same user, with this \
             --control?)"
        )
    })?;
    let answer = converse(&mut socket, request)
        .with_context(|| format!("ask the ambassador at unix:{shown}"))?;
    match answer {
        Answer::Done(value) => serde_json::from_value(value).context("understand the answer"),
        Answer::Refused(why) => bail!("refused: {why}"),
    }
}

fn converse(socket: &mut UnixStream, request: &Request) -> Result<Answer> {
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    socket.write_all(&line)?;
    let mut answer = Vec::new();
    socket.read_to_end(&mut answer)?;
    Ok(serde_json::from_slice(&answer)?)
}
