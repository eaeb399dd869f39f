//! What is taken to every kernel: a directory with all that the checks need, which is the whole file
//! system of a virtual machine, too.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use ambassador_tests::process;
use anyhow::{Context, Result, ensure};
use object::Object;
use tempfile::TempDir;

use crate::command;

/// How long the checks may take on this machine.
const LIMIT: Duration = Duration::from_secs(180);
const PASSWD: &str = "root:x:0:0::/root:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n";

/// The directory, and the archive of it.
pub(super) struct Luggage {
    root: TempDir,
    archive: TempDir,
}

impl Luggage {
    /// Packs executables by these names, which must be static: no machine has libraries.
    pub(super) fn pack(mut programs: Vec<(&str, PathBuf)>) -> Result<Self> {
        let root = tempfile::tempdir().context("create the directory to pack")?;
        let path = root.path();
        // The unprivileged look into it, too.
        fs::set_permissions(path, Permissions::from_mode(0o755)).context("open the directory")?;
        for directory in ["bin", "proc", "sys", "dev", "tmp", "etc"] {
            fs::create_dir(path.join(directory)).context("make the directories of a machine")?;
        }
        programs.push(("busybox", "/bin/busybox".into()));
        for (name, program) in programs {
            let what = || format!("pack {}", program.display());
            let bytes = fs::read(&program).with_context(what)?;
            let object = object::File::parse(&*bytes).with_context(what)?;
            let dynamic = object.section_by_name(".interp").is_some();
            ensure!(!dynamic, "{} is not linked statically", program.display());
            fs::copy(&program, path.join("bin").join(name)).with_context(what)?;
        }
        fs::write(path.join("etc/passwd"), PASSWD).context("pack the users")?;
        fs::write(path.join("checks"), include_str!("checks.sh")).context("pack the checks")?;
        let init = path.join("init");
        fs::write(&init, include_str!("init.sh")).context("pack the init")?;
        fs::set_permissions(&init, Permissions::from_mode(0o755)).context("let the init be run")?;

        let luggage =
            Self { root, archive: tempfile::tempdir().context("create the archive's directory")? };
        let mut cpio = Command::new("sh");
        cpio.args(["-c", "find . | cpio --quiet --create --format=newc --owner=0:0 > \"$0\""]);
        cpio.arg(luggage.initramfs()).current_dir(luggage.root.path());
        command::run(&mut cpio).context("pack the initramfs")?;
        Ok(luggage)
    }

    /// The archive that a machine unpacks into its memory.
    pub(super) fn initramfs(&self) -> PathBuf {
        self.archive.path().join("initramfs.cpio")
    }

    /// Runs the checks on this machine and returns what they say.
    pub(super) fn check_here(&self) -> Result<String> {
        let root = self.root.path();
        let mut checks = Command::new(root.join("bin/busybox"));
        checks.arg("sh").arg(root.join("checks")).arg(root.join("bin"));
        process::run(&mut checks, LIMIT)
    }
}
