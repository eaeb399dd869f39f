//! The command `ambassador`: parse, do, say how it ended.

use std::env;
use std::process::ExitCode;

use ambassador::cli::{Cli, Command};
use ambassador::commands::perform;
use ambassador::config::{BAD_CONFIG, ConfigError};
use clap::Parser;

/// Whether errors note where they came from; panics do by RUST_BACKTRACE.
const BACKTRACES_OF_ERRORS: &str = "RUST_LIB_BACKTRACE";

fn main() -> ExitCode {
    let cli = Cli::parse();
    if matches!(cli.command, Command::Run(_)) {
        spare_backtraces();
    }
    perform(cli).unwrap_or_else(|error| {
        eprintln!("ambassador: {error:#}");
        match error.downcast_ref::<ConfigError>() {
            Some(_) => ExitCode::from(BAD_CONFIG),
            None => ExitCode::FAILURE,
        }
    })
}

/// Errors are told in one line, so nobody would see a backtrace; where RUST_BACKTRACE is set, as in many images, each
/// connect that is refused would cost more for its backtrace than for itself. Only for the ambassador: `exec` hands its
/// environment on to the app.
fn spare_backtraces() {
    if env::var_os(BACKTRACES_OF_ERRORS).is_none() {
        // SAFETY: there is no other thread yet.
        unsafe { env::set_var(BACKTRACES_OF_ERRORS, "0") };
    }
}
