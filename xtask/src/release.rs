//! Executables that run anywhere, because they are linked statically: the product as it is shipped,
//! and what goes where there are no libraries.

use std::env::consts::ARCH;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::command::{cargo, shown, stdout_of, step};
use crate::toolchain::{home, remapped};
use crate::workspace::{self, host_triple, rustc};

/// What cargo is told to build the product.
const PRODUCT: [&str; 6] =
    ["build", "--release", "--package", "ambassador-user", "--bin", "ambassador"];

/// Builds the static release binary and returns its path; cargo shows its progress on stderr.
pub(crate) fn build() -> Result<PathBuf> {
    step("build the static release binary");
    linked_statically(&PRODUCT)
}

/// The same for a machine of this architecture.
pub(crate) fn build_for(arch: &str) -> Result<PathBuf> {
    if arch == ARCH {
        return build();
    }
    let triple = format!("{arch}-unknown-linux-gnu");
    step(&format!("build the static release binary for {triple}"));
    let library = stdout_of(rustc().args(["--print", "target-libdir", "--target", &triple]))?;
    ensure!(
        Path::new(library.trim()).is_dir(),
        "this compiler has no library for {triple}: `rustup target add {triple}` adds it, and \
         `apt-get install gcc-{}-linux-gnu` a linker",
        arch.replace('_', "-")
    );
    let mut build = cargo();
    build.env(of_target(&triple, "LINKER"), format!("{arch}-linux-gnu-gcc"));
    executable_of(build, &PRODUCT, &triple)
}

/// Lets cargo build one static executable, whose name comes last, and returns its path.
pub(crate) fn linked_statically(arguments: &[&str]) -> Result<PathBuf> {
    executable_of(cargo(), arguments, &host_triple()?)
}

fn executable_of(mut build: Command, arguments: &[&str], triple: &str) -> Result<PathBuf> {
    // An explicit target keeps the flags away from build scripts and procedural macros, which
    // cannot be linked statically.
    build.args(arguments).args(["--target", triple]);
    build.args(["--message-format", "json-render-diagnostics"]);
    let (variable, flags) = flags(triple);
    build.env(variable, flags);

    let output = build
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("start `{}`", shown(&build)))?;
    ensure!(output.status.success(), "`{}` ended with {}", shown(&build), output.status);
    let name = arguments.last().copied().unwrap_or_default();
    executable(&output.stdout, name).context("find the built executable in cargo's messages")
}

/// The variable to set, and its value, so that the user's own flags keep their effect: cargo
/// ignores the flags of a target when `RUSTFLAGS` is set.
fn flags(triple: &str) -> (String, String) {
    let variable = match std::env::var_os("RUSTFLAGS") {
        Some(_) => "RUSTFLAGS".into(),
        None => of_target(triple, "RUSTFLAGS"),
    };
    let own = std::env::var(&variable).unwrap_or_default();
    // Messages of panics name files: without where they lie, the bytes are the same whoever builds.
    // A name with blanks in it cannot be told to cargo this way.
    let [workspace, cargo] = [(workspace::root(), "."), (&home("CARGO_HOME", ".cargo"), "cargo")]
        .map(|(directory, name)| remapped(directory, name))
        .map(|flag| if flag.contains(char::is_whitespace) { String::new() } else { flag });
    let flags = [&own, "-C target-feature=+crt-static", &workspace, &cargo];
    let flags = flags.into_iter().filter(|flag| !flag.is_empty()).collect::<Vec<_>>();
    (variable, flags.join(" "))
}

/// The variable that sets something for a target.
fn of_target(triple: &str, what: &str) -> String {
    format!("CARGO_TARGET_{}_{what}", triple.replace(['-', '.'], "_").to_uppercase())
}

/// The executable of a name in cargo's JSON messages, one a line. There are others: those that a test starts.
fn executable(messages: &[u8], name: &str) -> Option<PathBuf> {
    messages
        .split(|&byte| byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["name"] == name)
        .find_map(|message| message.get("executable")?.as_str().map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executable_is_read_from_cargos_messages() {
        let messages = br#"{"reason":"compiler-artifact","target":{"name":"app"},"executable":null}
{"reason":"compiler-artifact","target":{"name":"app"},"executable":"/t/release/deps/app-1"}
{"reason":"compiler-artifact","target":{"name":"conversing"},"executable":"/t/release/conversing"}
{"reason":"build-finished","success":true}
"#;
        assert_eq!(executable(messages, "app"), Some(PathBuf::from("/t/release/deps/app-1")));
        assert_eq!(executable(messages, "torture"), None);
    }
}
