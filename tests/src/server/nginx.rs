//! nginx.

use std::path::Path;

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::{accepting, program};
use crate::address::Address;
use crate::place::Place;
use crate::process::Process;

/// An nginx with a configuration of the test's own.
#[derive(Debug)]
pub struct Nginx {
    /// Its only process.
    pub process: Process,
    directory: TempDir,
}

impl Nginx {
    /// Starts it in `place` with `configuration`, which makes it listen on `address`; in it,
    /// `DIRECTORY` stands for [`Nginx::directory`], where its files are.
    pub fn start(place: &Place, configuration: &str, address: &Address) -> Result<Self> {
        let directory = tempfile::tempdir().context("create nginx's directory")?;
        let path = directory.path().to_str().context("read the path of nginx's directory")?;
        // One process, so that ending it ends all of it.
        let whole = format!(
            "daemon off; master_process off; pid {path}/nginx.pid; error_log stderr;\n{}",
            configuration.replace("DIRECTORY", path)
        );
        let file = directory.path().join("nginx.conf");
        std::fs::write(&file, whole).context("write nginx's configuration")?;
        let mut process = Process::start(
            place.command(program("nginx")?).arg("-p").arg(path).arg("-c").arg(file),
        )?;
        accepting(place, &mut process, address)?;
        Ok(Self { process, directory })
    }

    /// Where its files are.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }
}
