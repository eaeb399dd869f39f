//! The command `ambassador`: parse, do, say how it ended.

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use ambassador::admin::control::Request;
use ambassador::cli::{Cli, Command, ConfigArgs, LogArgs, Probe};
use ambassador::config::{ConfigError, Environment};
use ambassador::doctor::Report;
use ambassador::remote::ask;
use ambassador::status::{ConnectionStatus, Status};
use ambassador::wait::{Until, wait};
use ambassador::{check, daemon, exec, probe, telemetry, version};
use anyhow::{Context, Result};
use clap::{CommandFactory, Parser};
use serde_json::Value;

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

fn perform(Cli { command, log }: Cli) -> Result<ExitCode> {
    match command {
        Command::Run(config) => return run(&config, &log),
        Command::Doctor { json, require } => {
            let report = Report::make();
            print(json, &report)?;
            return Ok(report.verdict(require));
        }
        Command::Exec { probes, control, timeout, command } => {
            return exec::exec(&command, probes.admin_http, &control.control, timeout);
        }
        Command::Check { file, config } => check::check(file, config)?,
        Command::Schema => check::schema()?,
        Command::Completions { shell } => {
            clap_complete::generate(
                shell,
                &mut Cli::command(),
                "ambassador",
                &mut std::io::stdout(),
            );
        }
        Command::Version => print!("{}", version::text()),
        Command::Status { json, watch, control } => loop {
            print(json, &ask::<Status>(&control.control, &Request::Status {})?)?;
            if !watch {
                break;
            }
            std::thread::sleep(Duration::from_secs(1));
        },
        Command::Connections { json, control } => {
            let all: Vec<ConnectionStatus> = ask(&control.control, &Request::Connections {})?;
            all.iter().try_for_each(|connection| print(json, connection))?;
        }
        Command::Wait { ready, timeout, probes } => {
            let until = if ready { Until::Ready } else { Until::Started };
            wait(probes.admin_http, until, timeout)?;
        }
        Command::Drain(control) => order(&control.control, &Request::Drain {})?,
        Command::Shutdown(control) => order(&control.control, &Request::Shutdown {})?,
        Command::LogLevel { level, control } => {
            order(&control.control, &Request::LogLevel { level })?;
        }
        Command::Probe(Probe::Tcp { target, timeout }) => probe::tcp(target, timeout)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn run(config: &ConfigArgs, log: &LogArgs) -> Result<ExitCode> {
    let (config, warnings) = config.load(&Environment::of_process())?;
    let telemetry = telemetry::start(log.log_format, log.log_level.as_ref())?;
    warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    Ok(daemon::run(&config, &telemetry).unwrap_or_else(|error| {
        tracing::error!("cannot start: {error:#}");
        ExitCode::FAILURE
    }))
}

fn order(control: &Path, request: &Request) -> Result<()> {
    ask::<Value>(control, request).map(drop)
}

/// For people, or one line of JSON.
fn print<T: std::fmt::Display + serde::Serialize>(json: bool, facts: &T) -> Result<()> {
    let text = if json {
        serde_json::to_string(facts).context("write JSON")?
    } else {
        facts.to_string().trim_end().to_owned()
    };
    writeln!(std::io::stdout(), "{text}").context("print")
}
