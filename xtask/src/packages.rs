//! Debian packages: which are missing, and installing them without starting anything.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::command::{self, stdout_of};

/// Rust with a precompiled `core` for the BPF targets.
pub(crate) const COMPILER: &[&str] =
    &["rustc-web", "cargo-web", "libstd-rust-web-dev-bpf", "rust-web-clippy"];

/// The real peers that the tests put around the ambassador, and their tools.
pub(crate) const FOR_TESTS: &[&str] = &[
    "redis-server",
    "redis-tools",
    "postgresql",
    "mariadb-server",
    "nginx-light",
    "libnginx-mod-stream",
    "haproxy",
    "nftables",
    "curl",
    "socat",
    "iproute2",
    "dnsmasq-base",
    "bpftool",
    "python3",
    "python3-redis",
    "python3-psycopg",
    "python3-psycopg-pool",
    "util-linux",
    "valgrind",
    // Real containers of the manifests.
    "podman",
    "crun",
    "catatonit",
    "busybox-static",
];

/// What the benchmark measures the ambassador beside, and with.
pub(crate) const FOR_BENCH: &[&str] = &[
    "haproxy",
    "nginx-light",
    "libnginx-mod-stream",
    "socat",
    "nutcracker",
    "pgbouncer",
    "redis-server",
    "redis-tools",
    "postgresql",
];

/// What boots other kernels.
pub(crate) const FOR_KERNELS: &[&str] = &["qemu-system-x86", "busybox-static", "cpio"];

/// Those of some packages that are not installed; all of them where there is no dpkg.
pub(crate) fn missing<'a>(packages: &[&'a str]) -> Vec<&'a str> {
    let installed = |package: &str| {
        Command::new("dpkg-query")
            .args(["--show", "--showformat", "${db:Status-Status}", package])
            .stderr(Stdio::null())
            .output()
            .is_ok_and(|output| output.stdout == b"installed")
    };
    packages.iter().copied().filter(|package| !installed(package)).collect()
}

/// Whether packages can be installed from here.
pub(crate) fn installable() -> bool {
    is_root() && Path::new("/usr/bin/apt-get").is_file()
}

/// Installs packages, with apt's own output shown. Services that come with them are not started.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    let _guard = NoAutostart::new().context("keep package services from starting")?;
    // The lists may never have been fetched, as in a fresh container; a stale one is no obstacle.
    if let Err(error) = apt(&["update"]) {
        eprintln!("xtask: {error:#}; going on with the package lists that are there");
    }
    apt(&[&["install", "--yes", "--no-install-recommends"], packages].concat())
}

/// The package with the highest number in its name among those that begin and end like this.
pub(crate) fn newest(begin: &str, end: &str) -> Result<Option<String>> {
    let names = stdout_of(Command::new("apt-cache").args(["pkgnames", begin]))?;
    let numbers = |name: &&str| -> Vec<u64> {
        name.split(|it: char| !it.is_ascii_digit()).filter_map(|it| it.parse().ok()).collect()
    };
    Ok(names.lines().filter(|name| name.ends_with(end)).max_by_key(numbers).map(str::to_owned))
}

/// Downloads a package into a directory, as anybody may, and returns where it is.
pub(crate) fn download(package: &str, directory: &Path) -> Result<PathBuf> {
    let mut apt = Command::new("apt-get");
    command::run(apt.args(["--quiet", "download", package]).current_dir(directory))?;
    let file = fs::read_dir(directory).context("list what was downloaded")?.next();
    Ok(file.with_context(|| format!("find the downloaded {package}"))??.path())
}

/// The command that installs packages, for people.
pub(crate) fn advice(packages: &[&str]) -> String {
    format!("apt-get install --no-install-recommends {}", packages.join(" "))
}

fn apt(arguments: &[&str]) -> Result<()> {
    let mut apt = Command::new("apt-get");
    apt.args(["--quiet", "--option", "DPkg::Lock::Timeout=300"]).args(arguments);
    apt.env("DEBIAN_FRONTEND", "noninteractive").stdin(Stdio::null());
    command::run(&mut apt)
}

fn is_root() -> bool {
    // SAFETY: takes nothing, cannot fail.
    unsafe { libc::geteuid() == 0 }
}

/// While it lives, packages do not start their services. A policy that the machine has already
/// stays in force instead.
struct NoAutostart {
    ours: bool,
}

impl NoAutostart {
    const POLICY: &str = "/usr/sbin/policy-rc.d";
    const MARK: &str = "# Of `cargo xtask setup`.";

    fn new() -> Result<Self> {
        let ours = match fs::read_to_string(Self::POLICY) {
            // Left behind by one that was killed.
            Ok(policy) => policy.contains(Self::MARK),
            Err(_) => true,
        };
        if ours {
            // Bound to the life of this process, in case it is killed before it can clean up.
            let policy = format!(
                "#!/bin/sh\n{}\n[ -d /proc/{} ] && exit 101\nexit 0\n",
                Self::MARK,
                std::process::id()
            );
            fs::write(Self::POLICY, policy).context("write the policy for starting services")?;
            fs::set_permissions(Self::POLICY, fs::Permissions::from_mode(0o755))
                .context("make the policy for starting services executable")?;
        }
        Ok(Self { ours })
    }
}

impl Drop for NoAutostart {
    fn drop(&mut self) {
        if self.ours {
            // Without effect from now on in any case, and replaced by the next one.
            let _ = fs::remove_file(Self::POLICY);
        }
    }
}
