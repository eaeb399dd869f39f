//! How soon the doctor says what works: people wait for it.

use std::process::Command;
use std::time::{Duration, Instant};

use ambassador_tests::ambassador;
use ambassador_tests::cgroup;
use ambassador_tests::needs;
use ambassador_tests::pod::is_root;
use ambassador_tests::process::run;
use ambassador_tests::wait::SOON;
use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::USER;

const PATIENCE: Duration = Duration::from_secs(2);
/// Others use the machine too.
const TRIES: u32 = 3;

#[test]
fn the_doctor_with_privileges_is_soon_done() -> Result<()> {
    needs!(Direct);
    is_soon_done(&[])
}

#[test]
fn the_doctor_without_privileges_is_soon_done() -> Result<()> {
    if !is_root() {
        return is_soon_done(&[]);
    }
    let id = USER.to_string();
    is_soon_done(&["setpriv", "--reuid", &id, "--regid", &id, "--clear-groups"])
}

/// Expects it of the doctor, started by another program that replaces itself by what follows it, if any.
fn is_soon_done(wrapper: &[&str]) -> Result<()> {
    let binary = ambassador::binary()?.to_str().context("read the binary's path")?;
    let cgroup = cgroup::of_this_process().ok().map(|path| format!("--cgroup={}", path.display()));
    let mut words = [wrapper, &[binary, "doctor", "--json"][..]].concat();
    words.extend(cgroup.as_deref());
    let mut taken = Vec::new();
    for _ in 0..TRIES {
        let began = Instant::now();
        let told = run(Command::new(words[0]).args(&words[1..]), SOON)?;
        taken.push(began.elapsed());
        let told: Value = serde_json::from_str(&told).context("parse what doctor says")?;
        ensure!(told["tiers"].as_array().is_some_and(|tiers| tiers.len() == 4), "{told}");
        if taken.last().is_some_and(|last| *last < PATIENCE) {
            return Ok(());
        }
    }
    bail!("it took {taken:?}")
}
