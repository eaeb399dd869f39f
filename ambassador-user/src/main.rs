//! The command `ambassador`: parse, do, say how it ended.

use std::process::ExitCode;

use ambassador::cli::Cli;
use ambassador::commands::perform;
use ambassador::config::{BAD_CONFIG, ConfigError};
use clap::Parser;

fn main() -> ExitCode {
    perform(Cli::parse()).unwrap_or_else(|error| {
        eprintln!("ambassador: {error:#}");
        match error.downcast_ref::<ConfigError>() {
            Some(_) => ExitCode::from(BAD_CONFIG),
            None => ExitCode::FAILURE,
        }
    })
}
