//! What a run was measured on: machine, kernel and versions, because figures mean nothing without.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// A machine and the programs on it.
#[derive(Serialize, Deserialize)]
pub(crate) struct Machine {
    cpu: String,
    cpus: usize,
    memory_mib: u64,
    kernel: String,
    congestion_control: String,
    programs: Vec<String>,
}

impl Machine {
    /// This machine, with these programs; each is asked for its version with the flag beside it.
    pub(crate) fn look(programs: &[(PathBuf, &str)]) -> Result<Self> {
        let read = |path| fs::read_to_string(path).with_context(|| format!("read {path}"));
        let cpus = read("/proc/cpuinfo")?;
        let memory = read("/proc/meminfo")?;
        Ok(Self {
            cpu: field(&cpus, "model name").unwrap_or("unknown").to_owned(),
            cpus: cpus.lines().filter(|line| line.starts_with("processor")).count(),
            memory_mib: field(&memory, "MemTotal")
                .and_then(|size| size.strip_suffix(" kB")?.parse::<u64>().ok())
                .map_or(0, |kibibytes| kibibytes / 1024),
            kernel: read("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            congestion_control: read("/proc/sys/net/ipv4/tcp_congestion_control")?
                .trim()
                .to_owned(),
            programs: programs
                .iter()
                .map(|(program, flag)| version(program, flag))
                .collect::<Result<_>>()?,
        })
    }

    /// For a reader.
    pub(crate) fn lines(&self) -> Vec<String> {
        let Self { cpu, cpus, memory_mib, kernel, congestion_control, .. } = self;
        let machine = format!(
            "{cpus} × {cpu}, {memory_mib} MiB, Linux {kernel}, TCP congestion control {congestion_control}"
        );
        std::iter::once(machine).chain(self.programs.iter().cloned()).collect()
    }
}

/// The value after `name` and a colon, in the first line that has it.
fn field<'t>(text: &'t str, name: &str) -> Option<&'t str> {
    let line = text.lines().find(|line| line.starts_with(name))?;
    Some(line.split_once(':')?.1.trim())
}

/// The first line of what a program says about itself that has a number in it, on whichever output.
fn version(program: &Path, flag: &str) -> Result<String> {
    let output = Command::new(program)
        .arg(flag)
        .output()
        .with_context(|| format!("ask {} for its version", program.display()))?;
    let said = [output.stdout, output.stderr].concat();
    let said = String::from_utf8_lossy(&said);
    let line = said.lines().find(|line| line.contains(|it: char| it.is_ascii_digit()));
    Ok(line.unwrap_or("unknown").trim().to_owned())
}
