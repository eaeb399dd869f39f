//! Waiting for a condition, bounded: what a test does instead of sleeping and hoping.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// Long enough for anything a healthy process does at once, on a busy machine too.
pub const SOON: Duration = Duration::from_secs(20);

const PAUSE: Duration = Duration::from_millis(5);

/// Asks again and again until there is an answer; an error after `within`, naming `what`.
pub fn until<T>(
    what: &str,
    within: Duration,
    mut ask: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let deadline = Instant::now() + within;
    loop {
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() >= deadline {
            bail!("{what}: not within {within:?}");
        }
        sleep(PAUSE);
    }
}

/// Checks again and again until `holds`; an error after [`SOON`], naming `what`.
pub fn until_true(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, SOON, || Ok(holds()?.then_some(())))
}
