//! A virtual machine with a kernel of its own: its one file system is in memory, and its time limited.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use ambassador_tests::process::{Finished, Process};
use ambassador_tests::wait::until;
use anyhow::{Context, Error, Result, anyhow, ensure};
use tempfile::TempDir;

/// How long a machine may take until its first program speaks: twenty times what it takes.
const BOOT: Duration = Duration::from_secs(60);
/// How often one is started that does not get so far. Now and then an emulated kernel stops while it
/// brings up its devices, before anything of ours is run (seen with 6.1).
const ATTEMPTS: u32 = 3;
/// How long it may run from then on: some times what it takes, for this one may be busy.
const LIMIT: Duration = Duration::from_secs(480);
/// Its serial ports, in their order: for the kernel, and for our programs.
const CONSOLE: &str = "console";
const RESULTS: &str = "results";
/// How many lines of what the kernel said are shown when a machine fails.
const TAIL: usize = 25;

/// Runs a machine to its end. Returns what it wrote to its second serial port until then, and an
/// error if that was not the end it should have come to.
pub(super) fn run(kernel: &Path, initramfs: &Path) -> Result<(String, Result<()>)> {
    for _ in 1..ATTEMPTS {
        let mut machine = Machine::start(kernel, initramfs)?;
        match machine.boot() {
            Ok(()) => return Ok(machine.finish()),
            Err(why) => eprintln!("xtask: the machine did not boot, and is started again: {why:#}"),
        }
    }
    Ok(Machine::start(kernel, initramfs)?.finish())
}

struct Machine {
    emulator: Process,
    /// Where its serial ports are written to.
    ports: TempDir,
}

impl Machine {
    fn start(kernel: &Path, initramfs: &Path) -> Result<Self> {
        let ports = tempfile::tempdir().context("create a directory for a machine's output")?;
        let mut qemu = Command::new("qemu-system-x86_64");
        // KVM may be offered, and fail once it is needed; emulation is the same everywhere. The CPUs take turns on
        // one thread: before its 8.1 the emulator may translate code that another CPU changes just then, as the
        // kernel does at each attach, and go on with what was there ("Oops: int3", in tcp_connect). See its commit
        // "accel/tcg: Always lock pages before translation".
        qemu.args(["-nodefaults", "-accel", "tcg,thread=single"]);
        qemu.args(["-cpu", "max", "-smp", "2", "-m", "1024"]);
        qemu.args(["-display", "none", "-no-reboot"]);
        for port in [CONSOLE, RESULTS] {
            qemu.arg("-serial").arg(format!("file:{}", ports.path().join(port).display()));
        }
        qemu.args(["-append", "console=ttyS0 loglevel=5 panic=-1"]);
        qemu.arg("-kernel").arg(kernel).arg("-initrd").arg(initramfs);
        Ok(Self { emulator: Process::start(&mut qemu)?, ports })
    }

    /// Waits for the first word of its first program.
    fn boot(&mut self) -> Result<()> {
        let Self { emulator, ports } = self;
        until("the first word of its first program", BOOT, || {
            if !said(ports, RESULTS).is_empty() {
                return Ok(Some(()));
            }
            let ended = emulator.ended()?;
            ensure!(ended.is_none(), "the emulator ended ({ended:?}): {}", emulator.stderr());
            Ok(None)
        })
        .map_err(|why| with_last_words(&why, ports))
    }

    fn finish(self) -> (String, Result<()>) {
        let Self { emulator, ports } = self;
        let ended = emulator.finish(LIMIT).and_then(Finished::success).and_then(|_| {
            // To the emulator that is an end like any other.
            ensure!(!said(&ports, CONSOLE).contains("Kernel panic"), "its kernel panicked");
            Ok(())
        });
        let ended = ended.map_err(|why| with_last_words(&why, &ports));
        (said(&ports, RESULTS), ended)
    }
}

fn said(ports: &TempDir, port: &str) -> String {
    let bytes = fs::read(ports.path().join(port)).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// What a machine died of, and what its kernel said before.
fn with_last_words(why: &Error, ports: &TempDir) -> Error {
    let console = said(ports, CONSOLE);
    let lines: Vec<_> = console.lines().collect();
    let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n");
    anyhow!("{}; its console said at last:\n{tail}", why.root_cause())
}
