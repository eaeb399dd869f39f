//! The compiler and the linker of the kernel half: where they are, and how cargo is told to use
//! them.
//!
//! The BPF targets need a `core` that rustup's toolchains do not bring: either a precompiled one,
//! as Debian packages it, or its source, compiled along (`-Z build-std`). Both are used through
//! `RUSTC_BOOTSTRAP`, because aya-ebpf needs one unstable feature.

use std::fmt;
use std::path::PathBuf;
use std::process::Command;

use clap::ValueEnum;

use crate::workspace;

/// The byte order of the machine whose kernel runs the object.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Target {
    Bpfel,
    Bpfeb,
}

impl Target {
    /// The target of this machine's kernel.
    pub(crate) const HOST: Self =
        if cfg!(target_endian = "big") { Self::Bpfeb } else { Self::Bpfel };

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bpfel => "bpfel",
            Self::Bpfeb => "bpfeb",
        }
    }

    pub(crate) fn triple(self) -> String {
        format!("{}-unknown-none", self.name())
    }
}

/// All that is needed to build the kernel half.
pub(crate) struct Toolchain {
    pub(crate) compiler: Compiler,
    pub(crate) linker: Linker,
}

impl Toolchain {
    /// What is there already, if it is complete.
    pub(crate) fn find() -> Option<Self> {
        Some(Self { compiler: Compiler::find()?, linker: Linker::find()? })
    }

    /// A cargo that does something (`build`, `clippy`) with the kernel half.
    pub(crate) fn cargo(&self, subcommand: &str, target: Target) -> Command {
        let bin = self.compiler.bin();
        let mut cargo = Command::new(bin.join("cargo"));
        cargo.current_dir(workspace::root());
        cargo.args([subcommand, "--package", "ambassador-ebpf", "--bin", "ambassador-ebpf"]);
        cargo.args(["--profile", "bpf", "--target", &target.triple()]);
        // Beside, not in, the directory of the host's builds: those are locked while this runs
        // below another cargo, and made by another compiler.
        cargo.arg("--target-dir").arg(workspace::root().join("target/ebpf"));
        if self.compiler.core == Core::Source {
            cargo.args(["-Z", "build-std=core"]);
        }

        let flags = [
            format!("-Clinker={}", self.linker.path.display()),
            "-Clink-arg=--btf".into(),
            "-Cdebuginfo=2".into(),
            format!("--cfg=bpf_target_arch=\"{}\"", std::env::consts::ARCH),
        ];
        // The encoded form takes precedence over every other, so that flags meant for the host
        // (`-C target-cpu=native`) stay out.
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        cargo.env("RUSTC_BOOTSTRAP", "1");
        cargo.env("RUSTC", bin.join("rustc"));
        cargo.env("PATH", self.compiler.path_with_bin_first());
        // Set by the cargo that started this xtask, and made for that cargo's own compiler.
        for variable in ["LD_LIBRARY_PATH", "RUSTUP_TOOLCHAIN", "RUSTC_WRAPPER", "RUSTDOC"] {
            cargo.env_remove(variable);
        }
        cargo
    }
}

impl fmt::Display for Toolchain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}; {}", self.compiler, self.linker)
    }
}

/// How a compiler comes by the `core` of a BPF target.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Core {
    Precompiled,
    Source,
}

/// A Rust compiler that can compile for BPF.
pub(crate) struct Compiler {
    sysroot: PathBuf,
    core: Core,
    release: String,
    llvm: u32,
}

impl Compiler {
    /// The oldest release that compiles the workspace, as its `rust-version` says.
    const OLDEST: (u32, u32) = (1, 95);

    /// The best compiler that is there: a precompiled `core` first, because it matches the LLVM
    /// of the same distribution, then a nightly, then any other toolchain with sources.
    pub(crate) fn find() -> Option<Self> {
        let mut found: Vec<_> = sysroots().into_iter().filter_map(Self::in_sysroot).collect();
        found.sort_by_key(|compiler| {
            (compiler.core == Core::Source, !compiler.release.contains("nightly"))
        });
        found.into_iter().next()
    }

    /// The compiler installed below a directory, if it can compile for BPF.
    fn in_sysroot(sysroot: PathBuf) -> Option<Self> {
        let rustlib = sysroot.join("lib/rustlib");
        let core = if rustlib.join(Target::HOST.triple()).join("lib").is_dir() {
            Core::Precompiled
        } else if rustlib.join("src/rust/library/core").is_dir() {
            Core::Source
        } else {
            return None;
        };
        if !sysroot.join("bin/cargo").is_file() {
            return None;
        }
        let version = output(Command::new(sysroot.join("bin/rustc")).arg("-vV"))?;
        let release = field(&version, "release: ")?.to_owned();
        let (llvm, _) = major_minor(field(&version, "LLVM version: ")?)?;
        let recent = major_minor(&release)? >= Self::OLDEST;
        recent.then_some(Self { sysroot, core, release, llvm })
    }

    /// The major version of the LLVM whose bitcode it writes, which the linker must understand.
    pub(crate) fn llvm(&self) -> u32 {
        self.llvm
    }

    /// Whether its clippy is installed too.
    pub(crate) fn has_clippy(&self) -> bool {
        self.bin().join("cargo-clippy").is_file() && self.bin().join("clippy-driver").is_file()
    }

    fn bin(&self) -> PathBuf {
        self.sysroot.join("bin")
    }

    /// Cargo finds its subcommands by the search path, where rustup's proxies may come first.
    fn path_with_bin_first(&self) -> std::ffi::OsString {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let directories = std::iter::once(self.bin()).chain(std::env::split_paths(&path));
        std::env::join_paths(directories).unwrap_or(path)
    }
}

impl fmt::Display for Compiler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = match self.core {
            Core::Precompiled => "precompiled core",
            Core::Source => "core built from source",
        };
        let Self { sysroot, release, llvm, .. } = self;
        write!(f, "rustc {release} in {} ({core}, LLVM {llvm})", sysroot.display())
    }
}

/// The directories in which a compiler may be installed: the system's, and rustup's.
fn sysroots() -> Vec<PathBuf> {
    let toolchains = std::fs::read_dir(home("RUSTUP_HOME", ".rustup").join("toolchains"));
    let mut sysroots: Vec<_> =
        toolchains.into_iter().flatten().flatten().map(|entry| entry.path()).collect();
    sysroots.sort();
    sysroots.insert(0, "/usr".into());
    sysroots
}

/// The linker that turns bitcode into one BPF object.
pub(crate) struct Linker {
    path: PathBuf,
    version: String,
}

impl Linker {
    /// The linker on the search path or where `cargo install` puts it, if it starts.
    pub(crate) fn find() -> Option<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path)
            .chain([home("CARGO_HOME", ".cargo").join("bin")])
            .map(|directory| directory.join("bpf-linker"))
            .filter(|candidate| candidate.is_file())
            .find_map(|path| {
                let version = output(Command::new(&path).arg("--version"))?.trim().to_owned();
                Some(Self { path, version })
            })
    }
}

impl fmt::Display for Linker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.version, self.path.display())
    }
}

/// A directory named by a variable, or else one in the user's home.
fn home(variable: &str, default: &str) -> PathBuf {
    match std::env::var_os(variable) {
        Some(directory) => directory.into(),
        None => std::env::home_dir().unwrap_or_default().join(default),
    }
}

/// What a program prints, or nothing if it cannot be run: it is not there then, as far as we care.
fn output(command: &mut Command) -> Option<String> {
    let output = command.env_remove("LD_LIBRARY_PATH").output().ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name))
}

fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}
