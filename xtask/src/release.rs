//! Executables that run anywhere, because they are linked statically: the product as it is shipped,
//! and what goes where there are no libraries.

use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};

use crate::command::{cargo, shown, step};
use crate::workspace::host_triple;

/// Builds the static release binary and returns its path; cargo shows its progress on stderr.
pub(crate) fn build() -> Result<PathBuf> {
    step("build the static release binary");
    linked_statically(&[
        "build",
        "--release",
        "--package",
        "ambassador-user",
        "--bin",
        "ambassador",
    ])
}

/// Lets cargo build one static executable and returns its path.
pub(crate) fn linked_statically(arguments: &[&str]) -> Result<PathBuf> {
    let triple = host_triple()?;
    let mut build = cargo();
    // An explicit target keeps the flags away from build scripts and procedural macros, which
    // cannot be linked statically.
    build.args(arguments).args(["--target", &triple]);
    build.args(["--message-format", "json-render-diagnostics"]);
    let (variable, flags) = static_flags(&triple);
    build.env(variable, flags);

    let output = build
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("start `{}`", shown(&build)))?;
    ensure!(output.status.success(), "`{}` ended with {}", shown(&build), output.status);
    executable(&output.stdout).context("find the built executable in cargo's messages")
}

/// The variable to set, and its value, so that the user's own flags keep their effect: cargo
/// ignores the flags of a target when `RUSTFLAGS` is set.
fn static_flags(triple: &str) -> (String, String) {
    const STATIC: &str = "-C target-feature=+crt-static";
    let of_target =
        format!("CARGO_TARGET_{}_RUSTFLAGS", triple.replace(['-', '.'], "_").to_uppercase());
    let variable =
        if std::env::var_os("RUSTFLAGS").is_some() { "RUSTFLAGS".into() } else { of_target };
    let own = std::env::var(&variable).unwrap_or_default();
    (variable, format!("{own} {STATIC}").trim_start().to_owned())
}

/// The executable named in cargo's JSON messages, one a line.
fn executable(messages: &[u8]) -> Option<PathBuf> {
    messages
        .split(|&byte| byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<serde_json::Value>(line).ok())
        .find_map(|message| message.get("executable")?.as_str().map(PathBuf::from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_executable_is_read_from_cargos_messages() {
        let messages = br#"{"reason":"compiler-artifact","executable":null}
{"reason":"compiler-artifact","executable":"/t/release/ambassador"}
{"reason":"build-finished","success":true}
"#;
        assert_eq!(executable(messages), Some(PathBuf::from("/t/release/ambassador")));
        assert_eq!(executable(b"{\"reason\":\"build-finished\"}"), None);
    }
}
