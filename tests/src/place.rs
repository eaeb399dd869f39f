//! Where processes run and sockets live: a network namespace of the test's own, or simply here.
//!
//! A namespace has no name, so nothing is left behind however a test ends: the kernel removes it with
//! the last file and process that hold it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use libc::c_int;
use tempfile::NamedTempFile;

use crate::process;
use crate::wait::SOON;

/// Where a bpffs is mounted by custom, and where the ambassador looks for it.
pub const BPFFS: &str = "/sys/fs/bpf";

/// What drops the first packet of each connection, where a firewall drops what matches: the next one comes after a
/// second, and the handshake takes that long.
pub const FIRST_SYN: &str =
    "tcp flags & (syn|ack) == syn tcp sport != @seen add @seen { tcp sport }";

/// Below the range from which the kernel takes the ports of outgoing connections.
const PORTS: std::ops::Range<u16> = 10_000..32_000;

/// A place for processes and sockets; clones are the same place.
#[derive(Debug, Clone)]
pub struct Place {
    namespace: Option<Arc<File>>,
    mounts: Option<Arc<File>>,
    resolver: Option<Arc<NamedTempFile>>,
    /// Where servers of this place are reached.
    pub ipv4: Ipv4Addr,
    /// Where servers of this place are reached by IPv6.
    pub ipv6: Ipv6Addr,
}

impl Place {
    /// The machine as it is, reached on loopback. Needs no privilege.
    pub fn here() -> Self {
        Self {
            namespace: None,
            mounts: None,
            resolver: None,
            ipv4: Ipv4Addr::LOCALHOST,
            ipv6: Ipv6Addr::LOCALHOST,
        }
    }

    /// A new network namespace with its loopback up. Needs root.
    pub(crate) fn isolated(ipv4: Ipv4Addr, ipv6: Ipv6Addr) -> Result<Self> {
        let namespace = unshared(libc::CLONE_NEWNET, "net", || Ok(()))?;
        let namespace = Some(Arc::new(namespace));
        let place = Self { namespace, mounts: None, resolver: None, ipv4, ipv6 };
        place.ip("link set lo up")?;
        Ok(place)
    }

    /// The network namespace that a process is in, with its loopback up.
    pub(crate) fn of_process(pid: u32, (ipv4, ipv6): (Ipv4Addr, Ipv6Addr)) -> Result<Self> {
        let path = format!("/proc/{pid}/ns/net");
        let namespace = File::open(&path).with_context(|| format!("open {path}"))?;
        let namespace = Some(Arc::new(namespace));
        let place = Self { namespace, mounts: None, resolver: None, ipv4, ipv6 };
        place.ip("link set lo up")?;
        Ok(place)
    }

    /// The same place, where processes find a bpffs of its own, mounted at [`BPFFS`]: what they pin is seen
    /// by nobody else, and goes with the place. Needs root.
    pub fn with_bpffs(&self) -> Result<Self> {
        let mounts = unshared(libc::CLONE_FS | libc::CLONE_NEWNS, "mnt", || {
            mount(&["--make-rprivate", "/"])?;
            mount(&["-t", "bpf", "bpf", BPFFS])
        })
        .context("mount a bpffs")?;
        Ok(Self { mounts: Some(Arc::new(mounts)), ..self.clone() })
    }

    /// The same place, where names are resolved as `resolv_conf` says. Needs root.
    pub fn with_resolver(&self, resolv_conf: &str) -> Result<Self> {
        let mut file = NamedTempFile::new().context("create a resolv.conf")?;
        file.write_all(resolv_conf.as_bytes()).context("write a resolv.conf")?;
        Ok(Self { resolver: Some(Arc::new(file)), ..self.clone() })
    }

    /// A command that will run here. Its process id is that of `program` itself.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut wrapper: Vec<&OsStr> = Vec::new();
        let net = self.path().map(|path| format!("--net={path}"));
        let mounts = self.mounts.as_ref().map(|mounts| format!("--mount={}", path(mounts)));
        let entered: Vec<_> = net.iter().chain(&mounts).map(OsStr::new).collect();
        if !entered.is_empty() {
            wrapper.push("nsenter".as_ref());
            wrapper.extend(entered);
            wrapper.push("--".as_ref());
        }
        if let Some(resolver) = &self.resolver {
            let bind = r#"mount --bind "$0" /etc/resolv.conf && exec "$@""#;
            wrapper.extend(["unshare", "--mount", "--", "sh", "-c", bind].map(OsStr::new));
            wrapper.push(resolver.path().as_os_str());
        }
        wrapper.push(program.as_ref());
        let mut command = Command::new(wrapper[0]);
        command.args(&wrapper[1..]);
        command
    }

    /// Gives a command to the packet filter here.
    pub fn filter(&self, command: &str) -> Result<()> {
        process::run(self.command("nft").arg(command), SOON).map(drop)
    }

    /// Drops what arrives here and matches.
    pub fn blackhole(&self, matching: &str) -> Result<()> {
        self.drop_arriving("test", matching)
    }

    /// The same, by a table of this name, with which it ends.
    pub fn drop_arriving(&self, table: &str, matching: &str) -> Result<()> {
        self.filter(&format!(
            "table inet {table} {{
                set seen {{ type inet_service; flags dynamic; size 1024; timeout 1m; }};
                chain in {{ type filter hook input priority 0; {matching} drop; }};
            }}"
        ))
    }

    /// Does something here: sockets it opens belong to this place, wherever they are used.
    pub fn enter<T: Send>(&self, act: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let Some(namespace) = &self.namespace else { return act() };
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                // SAFETY: the descriptor is open for as long as `namespace` is borrowed; the call
                // changes this thread only, which ends with the scope.
                let entered = unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) };
                ensure!(
                    entered == 0,
                    "enter a network namespace: {}",
                    std::io::Error::last_os_error()
                );
                act()
            });
            inside.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A port that is free here, on every address, and that no other test will be given.
    ///
    /// For servers that must be told their port; a server that can should bind port 0 instead.
    pub fn port(&self) -> Result<u16> {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let room = PORTS.end - PORTS.start;
        // Processes start apart, so that they seldom ask for each other's ports.
        let apart = (std::process::id() % u32::from(room)) as u16;
        self.enter(|| {
            for _ in PORTS {
                let step = NEXT.fetch_add(1, Ordering::Relaxed);
                let port = PORTS.start + (apart.wrapping_mul(97).wrapping_add(step)) % room;
                // An abstract name belongs to this namespace, and to this process while it lives.
                let name = UnixAddr::from_abstract_name(format!("ambassador-tests/port/{port}"))
                    .context("name a port's reservation")?;
                let Ok(reservation) = UnixListener::bind_addr(&name) else { continue };
                let free = [IpAddr::from(Ipv4Addr::UNSPECIFIED), Ipv6Addr::UNSPECIFIED.into()]
                    .iter()
                    .all(|ip| TcpListener::bind(SocketAddr::new(*ip, port)).is_ok());
                if free {
                    std::mem::forget(reservation);
                    return Ok(port);
                }
            }
            anyhow::bail!("find a free port in {PORTS:?}")
        })
    }

    /// Runs `ip` with these words here.
    pub(crate) fn ip(&self, words: &str) -> Result<()> {
        process::run(self.command("ip").args(words.split(' ')), Duration::from_secs(10)).map(drop)
    }

    /// Where the namespace can be opened while this process lives.
    pub(crate) fn path(&self) -> Option<String> {
        self.namespace.as_ref().map(|namespace| path(namespace))
    }
}

fn path(namespace: &File) -> String {
    format!("/proc/{}/fd/{}", std::process::id(), namespace.as_raw_fd())
}

/// New namespaces, set up by a thread that is in them: the one of this name, which keeps it.
fn unshared(flags: c_int, name: &str, set_up: fn() -> Result<()>) -> Result<File> {
    let path = format!("/proc/thread-self/ns/{name}");
    std::thread::spawn(move || {
        // SAFETY: unshare takes no memory; it changes this thread only, which ends right here.
        let unshared = unsafe { libc::unshare(flags) };
        ensure!(unshared == 0, "make a namespace: {}", std::io::Error::last_os_error());
        set_up()?;
        File::open(&path).with_context(|| format!("open {path}"))
    })
    .join()
    .map_err(|_| anyhow::anyhow!("make a namespace: the thread panicked"))?
}

fn mount(words: &[&str]) -> Result<()> {
    process::run(Command::new("mount").args(words), SOON).map(drop)
}
