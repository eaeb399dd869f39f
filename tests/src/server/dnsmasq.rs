//! dnsmasq: a name server whose answers a test decides.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};
use tempfile::TempDir;

use super::{accepting, program};
use crate::place::Place;
use crate::process::Process;

/// A name server on port 53 of its place. Dropping it is the death of DNS.
#[derive(Debug)]
pub struct Dnsmasq {
    /// The name server itself.
    pub process: Process,
    directory: TempDir,
}

impl Dnsmasq {
    /// Starts it in `place` with these names; every answer may be kept for one second.
    pub fn start(place: &Place, names: &[(&str, IpAddr)]) -> Result<Self> {
        let directory = tempfile::tempdir().context("create dnsmasq's directory")?;
        write(&directory, names)?;
        let mut process = Process::start(
            place
                .command(program("dnsmasq")?)
                .args(["--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv"])
                .args(["--no-hosts", "--local-ttl=1", "--user=root", "--log-facility=-"])
                .arg(format!("--addn-hosts={}", directory.path().join("hosts").display()))
                // A shared file of that kind makes two servers that start at once fight over it.
                .args(["--local=/#/", "--pid-file="]),
        )?;
        // It serves TCP too, from the moment it serves.
        accepting(place, &mut process, &SocketAddr::from((place.ipv4, 53)).into())?;
        Ok(Self { process, directory })
    }

    /// Answers with these names from now on.
    pub fn answer(&self, names: &[(&str, IpAddr)]) -> Result<()> {
        write(&self.directory, names)?;
        self.process.signal(libc::SIGHUP)
    }

    /// The resolv.conf of those who ask it.
    pub fn resolv_conf(server: Ipv4Addr) -> String {
        format!("nameserver {server}\noptions timeout:1 attempts:2\n")
    }
}

fn write(directory: &TempDir, names: &[(&str, IpAddr)]) -> Result<()> {
    let hosts: String = names.iter().map(|(name, ip)| format!("{ip} {name}\n")).collect();
    std::fs::write(directory.path().join("hosts"), hosts).context("write dnsmasq's names")
}
