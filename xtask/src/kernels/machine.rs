//! A virtual machine with a kernel of its own: its one file system is in memory, and its time limited.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ambassador_tests::process;
use anyhow::{Context, Result, anyhow};

/// How long a machine may run: some times what it takes, for it is emulated, and this one busy.
const LIMIT: Duration = Duration::from_secs(180);
/// How many lines of what the kernel said are shown when a machine fails.
const TAIL: usize = 25;

/// Runs a machine to its end. Returns what it wrote to its second serial port until then, and an
/// error if that was not the end it should have come to.
pub(super) fn run(kernel: &Path, initramfs: &Path) -> Result<(String, Result<()>)> {
    let directory = tempfile::tempdir().context("create a directory for a machine's output")?;
    let [console, results] = ["console", "results"].map(|name| directory.path().join(name));
    let mut qemu = Command::new("qemu-system-x86_64");
    // `accel=kvm` may be offered, and fail once it is needed; emulation is the same everywhere.
    qemu.args(["-nodefaults", "-machine", "accel=tcg", "-cpu", "max", "-smp", "2", "-m", "1024"]);
    qemu.args(["-display", "none", "-no-reboot"]);
    for port in [&console, &results] {
        qemu.arg("-serial").arg(format!("file:{}", port.display()));
    }
    qemu.args(["-append", "console=ttyS0 loglevel=5 panic=-1"]);
    qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
    let ended = process::run(&mut qemu, LIMIT);

    let said = |port| {
        let bytes = fs::read(port).unwrap_or_default();
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let ended = ended.map(drop).map_err(|error| {
        let console = said(&console);
        let lines: Vec<_> = console.lines().collect();
        let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n");
        anyhow!("{}; its console said at last:\n{tail}", error.root_cause())
    });
    Ok((said(&results), ended))
}
