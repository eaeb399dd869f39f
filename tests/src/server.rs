//! Real servers, each started in a place, with its files in a directory that goes with it.

pub mod dnsmasq;
pub mod mariadb;
pub mod nginx;
pub mod postgres;
pub mod redis;
pub mod scripted_dns;

use std::fs::{Permissions, set_permissions};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::address::Address;
use crate::place::Place;
use crate::pod::is_root;
use crate::process::{Process, run};
use crate::wait::until;

/// A server that has to make its files first may take this long.
const START: Duration = Duration::from_secs(60);

/// Which of these programs is not installed here, if one is not.
pub fn missing<'a>(programs: &[&'a str]) -> Option<&'a str> {
    programs.iter().copied().find(|program| find(program).is_none())
}

/// Where a program is: on the path, or where Debian keeps what only services use.
pub fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/lib/postgresql/15/bin"].map(PathBuf::from))
        .map(|directory| directory.join(program))
        .find(|path| path.is_file())
}

fn program(name: &str) -> Result<PathBuf> {
    find(name).with_context(|| format!("find {name}: it is not installed"))
}

/// Waits until a server accepts connections, or has died.
fn accepting(place: &Place, process: &mut Process, address: &Address) -> Result<()> {
    until(&format!("a server on {address}"), START, || {
        process.still_runs()?;
        Ok(place.enter(|| address.connect()).ok().map(drop))
    })
    .with_context(|| format!("its errors were: {}", process.stderr()))
}

/// A directory and an identity for a server that refuses to run as root.
struct Home {
    directory: TempDir,
    user: Option<&'static str>,
}

impl Home {
    /// With a user of this name where we are root, as ourselves otherwise.
    fn of(user: &'static str) -> Result<Self> {
        let directory = tempfile::tempdir().context("create a server's directory")?;
        // An ambassador without capabilities must get through to the sockets inside.
        set_permissions(directory.path(), Permissions::from_mode(0o755))
            .context("open a server's directory to all")?;
        let user = is_root().then_some(user);
        if let Some(user) = user {
            let id = |flag| -> Result<u32> {
                run(std::process::Command::new("id").args([flag, user]), START)?
                    .trim()
                    .parse()
                    .with_context(|| format!("parse the id of {user}"))
            };
            chown(directory.path(), Some(id("-u")?), Some(id("-g")?))
                .with_context(|| format!("give a server's directory to {user}"))?;
        }
        Ok(Self { directory, user })
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    /// A command of this server, as its user.
    fn command(&self, place: &Place, name: &str) -> Result<std::process::Command> {
        let program = program(name)?;
        let mut command = match self.user {
            None => place.command(program),
            Some(user) => {
                let mut command = place.command("setpriv");
                command.args(["--reuid", user, "--regid", user, "--clear-groups", "--"]);
                command.arg(program);
                command
            }
        };
        // MariaDB clears a directory for temporary files that it finds, of the tables of others too.
        command.current_dir(self.path()).env("TMPDIR", self.path());
        Ok(command)
    }
}
