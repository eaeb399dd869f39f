//! Does what the command line asks for.

use std::fmt::Display;
use std::io::{Write, stdout};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::CommandFactory;
use serde::Serialize;
use serde_json::Value;

use crate::admin::control::Request;
use crate::cli::{Cli, Command, ConfigArgs, LogArgs, Source};
use crate::config::{Environment, InstanceText, Tier};
use crate::datapath::kernel::{self, Lifetime};
use crate::datapath::pins::{Owner, Pins};
use crate::doctor::Report;
use crate::reload::{Outcome, Refusal};
use crate::remote::ask;
use crate::status::{ConnectionStatus, Status};
use crate::tier::REQUIRED_TIER_MISSING;
use crate::wait::{Until, wait};
use crate::{bench, check, daemon, exec, manifest, probe, telemetry, version};

/// Between two prints of `status --watch`.
const WATCH: Duration = Duration::from_secs(1);

/// Performs one command; an error is one line for people.
pub fn perform(Cli { command, log }: Cli) -> Result<ExitCode> {
    match command {
        Command::Run(config) => return run(config, &log),
        Command::Doctor { json, require, cgroup } => {
            let report = Report::make(&cgroup);
            print(json, &report)?;
            return Ok(report.verdict(require));
        }
        Command::Bench(args) => {
            let report = bench::bench(&args)?;
            print(args.json, &report)?;
            return Ok(report.verdict());
        }
        Command::Exec { probes, control, timeout, command } => {
            return exec::exec(&command, probes.admin_http, &control.control, timeout);
        }
        Command::Load { owner, once, config } => {
            let lifetime = if once { Lifetime::TheirEnd } else { Lifetime::Unload };
            return load(&config, &log, owner, lifetime);
        }
        Command::Unload { stale, instance } => unload(stale, instance)?,
        Command::Explain { route, control } => explain(route.as_deref(), &control.control)?,
        Command::Tier { route, tier, control } => {
            order(&control.control, &Request::Tier { route, tier: tier.to_string() })?;
        }
        Command::Check { file, config } => check::check(file, config)?,
        Command::Manifest { mode, deployment, config } => {
            manifest::print(mode, deployment.as_deref(), &config)?;
        }
        Command::Schema => check::schema()?,
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "ambassador", &mut script);
            stdout().write_all(&script).context("print")?;
        }
        Command::Version => say(&version::text())?,
        Command::Status { json, watch, control } => loop {
            print(json, &ask::<Status>(&control.control, &Request::Status {})?)?;
            if !watch {
                break;
            }
            std::thread::sleep(WATCH);
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
        Command::Reload(control) => return reload(&control.control),
        Command::LogLevel { level, control } => {
            order(&control.control, &Request::LogLevel { level })?;
        }
        Command::Probe(probe) => {
            let (target, ask, timeout) = probe.meaning();
            probe::probe(target, &ask, timeout)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn run(config: ConfigArgs, log: &LogArgs) -> Result<ExitCode> {
    let source = Source::new(config);
    let resolved = source.read()?;
    let telemetry = telemetry::start(log.log_format, log.log_level.as_ref())?;
    resolved.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    Ok(daemon::run(source, resolved, &telemetry).unwrap_or_else(|error| {
        tracing::error!("cannot start: {error:#}");
        ExitCode::FAILURE
    }))
}

/// Loads and pins, for another process to take over.
fn load(config: &ConfigArgs, log: &LogArgs, owner: Owner, lifetime: Lifetime) -> Result<ExitCode> {
    let (config, warnings) = config.load(&Environment::of_process())?;
    telemetry::start(log.log_format, log.log_level.as_ref())?;
    warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
    match kernel::load_for(&config, owner, lifetime) {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(obstacle) => {
            tracing::error!("cannot load the kernel half: {obstacle}");
            let required = config.acceleration.require.is_some_and(|tier| tier > Tier::Splice);
            // An init container that fails keeps the Pod from starting, which only `require` asks for.
            let code = if required { REQUIRED_TIER_MISSING } else { 0 };
            Ok(ExitCode::from(code))
        }
    }
}

fn unload(stale: bool, instance: Option<String>) -> Result<()> {
    if stale {
        let removed = Pins::remove_stale()?;
        return removed.iter().try_for_each(|it| say(&format!("removed {}", it.display())));
    }
    // As everywhere, a variable that says nothing is none.
    let instance = match instance.as_deref().unwrap_or_default() {
        "" => kernel::default_instance()?,
        name => name.parse::<InstanceText>().context("--instance")?.0.to_string(),
    };
    let pinned = Pins::all(&instance)?;
    if pinned.is_empty() {
        return say(&format!("nothing is pinned for {instance}"));
    }
    pinned.into_iter().try_for_each(Pins::remove)
}

fn explain(route: Option<&str>, control: &Path) -> Result<()> {
    let status: Status = ask(control, &Request::Status {})?;
    let wanted = |name: &str| route.is_none_or(|route| route == name);
    let mut explained = status.routes.iter().filter(|route| wanted(&route.name)).peekable();
    ensure!(explained.peek().is_some(), "there is no route {}", route.unwrap_or_default());
    explained.try_for_each(|route| say(&route.explanation()))?;
    status.known_bugs.iter().try_for_each(|bug| say(&format!("sockmap: {bug}")))?;
    status.explanation_of_misses().map_or(Ok(()), |misses| say(&misses))
}

fn reload(control: &Path) -> Result<ExitCode> {
    match ask(control, &Request::Reload {})? {
        Outcome::Done(changes) => say(&changes.to_string()).map(|()| ExitCode::SUCCESS),
        Outcome::Refused(Refusal { why, code }) => {
            eprintln!("ambassador: not reloaded, and what ran before runs on: {why}");
            Ok(ExitCode::from(code))
        }
    }
}

fn order(control: &Path, request: &Request) -> Result<()> {
    ask::<Value>(control, request).map(drop)
}

/// For people, or one line of JSON.
fn print<T: Display + Serialize>(json: bool, facts: &T) -> Result<()> {
    if json {
        say(&serde_json::to_string(facts).context("write JSON")?)
    } else {
        say(&facts.to_string())
    }
}

/// Unlike `println!`, does not panic when nobody reads any more.
fn say(text: &str) -> Result<()> {
    writeln!(stdout(), "{}", text.trim_end()).context("print")
}
