//! The command `ambassador`: parse, do, say how it ended.

use std::process::ExitCode;

use ambassador::cli::Cli;
use ambassador::commands::perform;
use ambassador::config::ConfigError;
use clap::Parser;

/// Bad configuration (EX_CONFIG of sysexits.h).
const BAD_CONFIG: u8 = 78;

fn main() -> ExitCode {
    perform(Cli::parse()).unwrap_or_else(|error| {
        eprintln!("ambassador: {error:#}");
        match error.downcast_ref::<ConfigError>() {
            Some(_) => ExitCode::from(BAD_CONFIG),
            None => ExitCode::FAILURE,
        }
    })
}
