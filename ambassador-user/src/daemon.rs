//! The ambassador in service: bind everything, drop privileges, serve, reload, drain.

mod end;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::SystemTime;

use anyhow::{Context, Result};
use tokio::sync::mpsc;
use tracing::{error, info};

use crate::admin::{control, http};
use crate::cli::Source;
use crate::config::{Admin, Config, Control, Listen, Resolved, Tier};
use crate::datapath::kernel::{self, Kernel};
use crate::datapath::obstacle::Obstacle;
use crate::datapath::selftest::Found;
use crate::direct::Direct;
use crate::drain;
use crate::listeners::{self, Bindings, Listeners};
use crate::metrics::Metrics;
use crate::privileges;
use crate::proxy::Shared;
use crate::proxy::listener::{self, Bound};
use crate::proxy::shortcut::Shortcuts;
use crate::reload::triggers::Triggers;
use crate::reload::{Loaded, Reloader, allow_open_files};
use crate::room::Ladders;
use crate::service::Service;
use crate::sockets::destroy::Destroyer;
use crate::telemetry::{LogLevel, Telemetry};
use crate::tending::Tending;
use crate::tier::{Ladder, REQUIRED_TIER_MISSING, SOCKMAP_IS_NOTICED};
use crate::upstream::dns::Names;
use end::{Stops, end};

/// Only the owner may change state.
const CONTROL_MODE: u32 = 0o600;

/// What is fixed before anything runs: clients can connect, and wait.
struct Ground {
    source: Source,
    resolved: Resolved,
    ladders: Ladders,
    metrics: Metrics,
    kernel: Option<Kernel>,
    destroyer: Option<Destroyer>,
    routes: Bindings,
    http: Option<Bound>,
    control: Option<Bound>,
}

/// Runs until told to end. An error is one of the start; afterwards there is only the exit code.
pub fn run(source: Source, resolved: Resolved, telemetry: &Telemetry) -> Result<ExitCode> {
    let config = &resolved.config;
    config.profile.iter().for_each(|profile| info!("{profile}"));
    let metrics = Metrics::default();
    let kernel = open_kernel(config, &metrics);
    let destroyer = start_destroyer(config, kernel.is_ok());
    let no_end = destroyer.as_ref().err().cloned();
    let ladder = Ladder::probe(Ladder { no_end, ..kernel_tiers(&kernel) });
    let kernel = kernel.ok();
    let room = kernel.as_ref().map_or(0, |kernel| kernel.tables.room());
    let ladders = Ladders::new(ladder, room);
    if let Err(shortfall) = ladders.satisfy(config, &ladders.of(&config.routes, &[])) {
        error!("{shortfall:#}");
        return Ok(ExitCode::from(REQUIRED_TIER_MISSING));
    }
    allow_open_files(config);
    let http = bind_http(&config.admin)?;
    let control = bind_control(&config.admin)?;
    let routes = listeners::bind(&config.routes)?;
    privileges::drop_all(kernel.is_some())?;
    // Threads start here, and take over what their starter may do.
    telemetry.write_from_a_thread();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut runtime = match threads {
        // One thread needs no work stealing and no locks that anybody contends for.
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime.enable_all().build().context("start the runtime")?;
    let destroyer = destroyer.ok();
    let ground =
        Ground { source, resolved, ladders, metrics, kernel, destroyer, routes, http, control };
    let code = runtime.block_on(serve(ground, telemetry.level()));
    // A lookup may be under way; nobody waits for it.
    runtime.shutdown_background();
    code
}

/// The kernel half, if a route can use it, or if an ambassador before this one left it: that would go on
/// by the routes of then. Or why there is none.
fn open_kernel(config: &Config, metrics: &Metrics) -> Result<Kernel, Obstacle> {
    let all_work = Ladder::default();
    let used = config.routes.iter().any(|it| all_work.choose(it, it.tier).tier >= Tier::Sockmap);
    if !used && !kernel::is_pinned(&config.acceleration) {
        return Err(Obstacle::NotUsed);
    }
    let routes = u32::try_from(config.routes.len()).unwrap_or(u32::MAX);
    let tried = |found: &Found| metrics.self_test(found);
    // Nobody should have to ask whether this is the fast way, and why not.
    let kernel = Kernel::open(&config.acceleration, routes, tried)
        .inspect_err(|obstacle| info!("the kernel tiers are not used: {obstacle}"))?;
    kernel.no_direct.iter().for_each(|why| info!("direct is not used: {why}"));
    kernel.sockmap.as_ref().err().into_iter().for_each(|why| info!("sockmap is not used: {why}"));
    Ok(kernel)
}

/// Whoever ends connections that the kernel has made, if a route wants that; or why there is nobody.
fn start_destroyer(config: &Config, kernel: bool) -> Result<Destroyer, String> {
    let wants = |route: &crate::config::Route| route.upstream.closes_unhealthy();
    if !kernel || !config.routes.iter().any(wants) {
        return Err(
            "no route that the ambassador began with had it, and it has given up CAP_NET_ADMIN, \
                    which ends connections: restart it"
                .to_owned(),
        );
    }
    Destroyer::start().map_err(|error| format!("{error:#}"))
}

/// What of the kernel tiers works with that.
fn kernel_tiers(kernel: &Result<Kernel, Obstacle>) -> Ladder {
    match kernel {
        Ok(kernel) => Ladder {
            no_direct: kernel.no_direct.clone(),
            no_sockmap: kernel.sockmap.as_ref().err().cloned(),
            no_sockmap_unasked: kernel.sockmap_is_noticed.then(|| SOCKMAP_IS_NOTICED.to_owned()),
            ..Ladder::default()
        },
        Err(obstacle) => Ladder {
            no_direct: Some(obstacle.to_string()),
            no_sockmap: Some(obstacle.of_sockmap()),
            ..Ladder::default()
        },
    }
}

fn bind_http(admin: &Admin) -> Result<Option<Bound>> {
    let Some(address) = admin.http else { return Ok(None) };
    listener::bind(&Listen::Tcp { address, if_available: false }, 0, false).context("admin.http")
}

fn bind_control(admin: &Admin) -> Result<Option<Bound>> {
    let bind = |path: &std::path::Path| {
        listener::bind(&Listen::Unix(path.to_owned()), CONTROL_MODE, false)
    };
    match &admin.control {
        Control::Off => Ok(None),
        Control::At(path) => bind(path).context("admin.control"),
        Control::IfPossible(path) => Ok(bind(path).unwrap_or_else(|error| {
            info!("no control socket: {error:#} (say where with --control unix:PATH)");
            None
        })),
    }
}

async fn serve(ground: Ground, log_level: LogLevel) -> Result<ExitCode> {
    let Ground { source, resolved, ladders, metrics, kernel, destroyer, routes, http, control } =
        ground;
    let (orders, given_orders) = mpsc::channel(4);
    let mut stops = Stops::new(given_orders)?;
    let (mut triggers, reload) = Triggers::new(source.file())?;
    let (trigger, drain) = drain::channel();
    let names = Names::default();
    let config = resolved.config;
    let (direct, sockmap, mut hold) = match kernel {
        None => (None, None, None),
        Some(Kernel { tables, ends, sockmap, messages, hold, .. }) => {
            messages.map(|messages| tokio::spawn(messages.pass_on()));
            let stale_after = config.acceleration.stale_after;
            let direct = Direct::start(tables, ends, destroyer, stale_after, &metrics)
                .context("take over the kernel's tables")?;
            (Some(direct), sockmap.ok().map(Arc::new), Some(hold))
        }
    };
    let loaded = Loaded {
        file: source.file(),
        sha256: resolved.sha256,
        profile: config.profile.clone(),
        at: SystemTime::now(),
        needs_restart: Vec::new(),
        refusal: None,
    };
    let ready_when = config.admin.ready_when;
    let service = Service::new(direct, sockmap.clone(), metrics, drain.clone(), ready_when, loaded);
    let service = Arc::new(service);
    tokio::spawn(Arc::clone(&service).follow_hosts(names.changes()));
    let shared = Shared {
        connections: Arc::clone(&service.connections),
        shortcuts: sockmap.map(|sockmap| sockmap as Arc<dyn Shortcuts>),
        ..Shared::default()
    };
    let listeners = Listeners::new(shared, drain);
    let mut reloader = Reloader {
        source,
        config,
        ladders,
        names,
        tending: Tending::default(),
        listeners,
        service: Arc::clone(&service),
    };
    reloader.begin(listeners::register(routes)?).context("put the routes in force")?;
    if let Some(direct) = &service.direct {
        direct.open_tables()?;
    }
    // Before anybody is told that it is ready, and relies on what a killed ambassador leaves.
    if let Some(hold) = &mut hold {
        hold.outlive().context("pin the kernel half")?;
    }
    // These two end with the process: they answer during the drain too.
    if let Some(bound) = http {
        info!("probes and metrics on http://{bound}");
        let listener = bound.listen().context("register admin.http with the runtime")?;
        tokio::spawn(http::serve(listener, Arc::clone(&service)));
    }
    if let Some(bound) = control {
        info!("control socket at {bound}");
        let listener = bound.listen().context("register admin.control with the runtime")?;
        let service = Arc::clone(&service);
        tokio::spawn(control::serve(
            listener,
            control::Handler { service, orders, reload, log_level },
        ));
    }
    info!(routes = service.routes().len(), "ready");
    let stop = loop {
        let asking = tokio::select! {
            stop = stops.next() => break stop,
            asking = triggers.next() => asking,
        };
        let reload = move || {
            let outcome = reloader.reload();
            (reloader, outcome)
        };
        let outcome;
        (reloader, outcome) = tokio::task::spawn_blocking(reload).await.context("reload")?;
        for ask in asking {
            // Whoever asked may be gone.
            let _ = ask.send(outcome.clone());
        }
    };
    tokio::spawn(triggers.refuse());
    let code = end(stop, reloader, trigger, stops, &hold).await;
    if let Some(hold) = hold {
        hold.release().context("take the kernel half back")?;
    }
    Ok(code)
}
