//! The compiler and the linker of the kernel half: where they are, and how cargo is told to use
//! them.
//!
//! The BPF targets need a `core` that rustup's toolchains do not bring: either a precompiled one,
//! as Debian packages it, or its source, compiled along (`-Z build-std`). Both are used through
//! `RUSTC_BOOTSTRAP`, because aya-ebpf needs one unstable feature.

use std::env::consts::ARCH;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use clap::{Args, ValueEnum};

use crate::workspace;

/// The machine whose kernel runs the object; this one unless told otherwise.
#[derive(Args)]
pub(crate) struct Target {
    /// Its byte order
    #[arg(long = "target", value_enum, default_value_t = ByteOrder::HOST)]
    byte_order: ByteOrder,
    /// Its architecture, which decides about the layout of registers
    #[arg(long, default_value = ARCH, value_parser = Self::ARCHITECTURES)]
    arch: String,
}

impl Target {
    /// Those that aya-ebpf has bindings for.
    const ARCHITECTURES: [&str; 9] = [
        "x86_64",
        "aarch64",
        "arm",
        "loongarch64",
        "mips",
        "mips64",
        "powerpc64",
        "riscv64",
        "s390x",
    ];

    /// This machine.
    pub(crate) fn host() -> Self {
        Self { byte_order: ByteOrder::HOST, arch: ARCH.into() }
    }

    /// A machine of the architectures that images are made for, which have one byte order.
    pub(crate) fn of_image(arch: &str) -> Self {
        Self { byte_order: ByteOrder::Bpfel, arch: arch.into() }
    }

    /// Those this machine is not, and that between them differ from it in everything.
    pub(crate) fn others() -> [Self; 2] {
        let target = |byte_order, arch: &str| Self { byte_order, arch: arch.into() };
        [target(ByteOrder::Bpfel, "aarch64"), target(ByteOrder::Bpfeb, "s390x")]
    }

    /// What the object's file is named by.
    pub(crate) fn name(&self) -> String {
        format!("{}-{}", self.byte_order.name(), self.arch)
    }

    pub(crate) fn triple(&self) -> String {
        self.byte_order.triple()
    }
}

/// A byte order, by the compiler's name for it.
#[derive(Clone, Copy, ValueEnum)]
enum ByteOrder {
    Bpfel,
    Bpfeb,
}

impl ByteOrder {
    const HOST: Self = if cfg!(target_endian = "big") { Self::Bpfeb } else { Self::Bpfel };

    fn name(self) -> &'static str {
        match self {
            Self::Bpfel => "bpfel",
            Self::Bpfeb => "bpfeb",
        }
    }

    fn triple(self) -> String {
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
    pub(crate) fn cargo(&self, subcommand: &str, target: &Target) -> Command {
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
            "-Clink-arg=--btf".into(),
            // Else LLVM calls memset for every array of zeros, whose loop over the stack the verifier refuses to
            // whoever lacks CAP_PERFMON.
            "-Clink-arg=--disable-expand-memcpy-in-order".into(),
            format!("--cfg=bpf_target_arch=\"{}\"", target.arch),
            // The line information names files: without where they lie, the bytes are the same
            // whoever builds. The workspace's keep a name by which the linker, started there,
            // finds them, because it quotes the lines for the verifier's messages.
            remapped(&self.compiler.sysroot, "rust"),
            remapped(&home("CARGO_HOME", ".cargo"), "cargo"),
            remapped(workspace::root(), "."),
        ];
        // The encoded form takes precedence over every other, so that flags meant for the host
        // (`-C target-cpu=native`) stay out.
        cargo.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"));
        // As a flag, its path would get into the hash that tells symbols of crates apart.
        let of_target = target.triple().replace('-', "_").to_uppercase();
        cargo.env(format!("CARGO_TARGET_{of_target}_LINKER"), &self.linker.path);
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
        let core = if rustlib.join(ByteOrder::HOST.triple()).join("lib").is_dir() {
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

/// The flag that puts a short name for a directory into what the compiler writes.
pub(crate) fn remapped(directory: &Path, name: &str) -> String {
    format!("--remap-path-prefix={}={name}", directory.display())
}

/// A directory named by a variable, or else one in the user's home.
pub(crate) fn home(variable: &str, default: &str) -> PathBuf {
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
