//! What `status`, `/metrics` and the kernel's tables say is the same once it has settled, and never absurd while
//! connections come and go, endpoints fail and return, and the configuration changes.

use std::collections::{BTreeMap, BTreeSet};
use std::mem::offset_of;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{scope, sleep};
use std::time::{Duration, Instant};

use ambassador_ebpf::direct::{NO_TABLE, OPEN, ROUTES, SLOTS, Slot, TABLES, Table, TargetKey};
use ambassador_tests::address::Address;
use ambassador_tests::ambassador::Ambassador;
use ambassador_tests::echo::{Echo, greeted};
use ambassador_tests::noise::Noise;
use ambassador_tests::peer::Peer;
use ambassador_tests::pins::Map;
use ambassador_tests::place::Place;
use ambassador_tests::wait::until_true;
use ambassador_tests::way::Way;
use ambassador_tests::{installed, needs};
use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;

/// So many connections a route may have; its clients want more.
const LIMIT: u64 = 8;
const WANTED: usize = 5;
const CLIENTS: usize = 2;
const CHURN: Duration = Duration::from_secs(4);
/// Between two faults of the endpoints.
const FAULT: Duration = Duration::from_millis(150);

#[test]
fn all_tell_the_same_of_splice() -> Result<()> {
    tells_the_same(Way::Splice)
}

#[test]
fn all_tell_the_same_of_sockmap() -> Result<()> {
    needs!(Sockmap);
    tells_the_same(Way::Sockmap)
}

#[test]
fn all_tell_the_same_of_direct() -> Result<()> {
    needs!(Direct);
    installed!("bpftool");
    tells_the_same(Way::Direct)
}

fn tells_the_same(way: Way) -> Result<()> {
    let mut scene = Scene::new(way)?;
    let over = AtomicBool::new(false);
    let churned = scope(|scope| {
        let clients: Vec<_> = scene
            .routes
            .iter()
            .flat_map(|route| (0..CLIENTS as u64).map(move |seed| (route.address.clone(), seed)))
            .map(|(address, seed)| {
                scope.spawn({
                    let over = &over;
                    move || come_and_go(&address, Noise::new(seed), over)
                })
            })
            .collect();
        let churned = scene.churn();
        over.store(true, Ordering::Relaxed);
        let held =
            clients.into_iter().map(|it| it.join().map_err(|_| anyhow!("a client panicked")));
        let held = held.collect::<Result<Vec<_>>>();
        churned.and(held)
    });
    let held: Vec<_> = churned.with_context(|| format!("{way}"))?.into_iter().flatten().collect();
    ensure!(!held.is_empty(), "nobody has a connection in the end");
    let mut last = String::new();
    until_true("all to tell the same", || {
        let differs = scene.differs(&held)?;
        last = differs.clone().unwrap_or_default();
        Ok(differs.is_none())
    })
    .with_context(|| format!("{way}: {last}"))
}

/// Two routes, each with two servers, of which the first fails and returns.
struct Scene {
    way: Way,
    place: Place,
    ambassador: Ambassador,
    routes: Vec<Route>,
}

struct Route {
    name: &'static str,
    address: Address,
    /// By their greetings.
    endpoints: [(&'static str, Address); 2],
    first: Option<Echo>,
    _second: Echo,
}

impl Scene {
    fn new(way: Way) -> Result<Self> {
        let here = Place::here();
        let routes = [("one", ["a", "b"]), ("two", ["c", "d"])].map(|(name, greetings)| {
            // Not of the ports that clients get: one could be connected to itself while a server is away.
            let echo = |greeting| -> Result<Echo> {
                let at = Address::from(SocketAddr::from((Ipv4Addr::LOCALHOST, here.port()?)));
                Ok(Echo::on(at.listen()?, greeting))
            };
            let (first, second) = (echo(greetings[0])?, echo(greetings[1])?);
            Ok(Route {
                name,
                address: SocketAddr::from((Ipv4Addr::LOCALHOST, here.port()?)).into(),
                endpoints: [
                    (greetings[0], first.address().clone()),
                    (greetings[1], second.address().clone()),
                ],
                first: Some(first),
                _second: second,
            })
        });
        let routes = routes.into_iter().collect::<Result<Vec<_>>>()?;
        let place = if way == Way::Splice { here } else { here.with_bpffs()? };
        let ambassador = way.launch_in(&place)?.config(&config(&routes, 0))?.start()?;
        Ok(Self { way, place, ambassador, routes })
    }

    /// Lets endpoints fail and return, and the configuration change, while it looks at all that is told. In the
    /// end all servers are there.
    fn churn(&mut self) -> Result<()> {
        let until = Instant::now() + CHURN;
        let mut before = BTreeMap::new();
        for round in 0.. {
            for route in &mut self.routes {
                route.first = match route.first.take() {
                    Some(first) => {
                        drop(first);
                        None
                    }
                    None => Some(Echo::on(route.endpoints[0].1.listen()?, route.endpoints[0].0)),
                };
            }
            let changed = config(&self.routes, round);
            self.ambassador.reconfigure(&changed)?.success()?;
            sleep(FAULT);
            self.is_not_absurd(&mut before)?;
            if Instant::now() > until && self.routes[0].first.is_some() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// No number is larger than it can be, nothing that only grows has shrunk, and nothing that is not healthy is
    /// in the kernel's tables.
    fn is_not_absurd(&self, before: &mut BTreeMap<String, f64>) -> Result<()> {
        let (status, led_to, later) =
            (self.ambassador.status()?, self.led_to()?, self.ambassador.status()?);
        let metrics = self.ambassador.metrics()?;
        for (index, route) in self.routes.iter().enumerate() {
            let told = &status["routes"][index];
            let open = told["connections"].as_u64();
            ensure!(open.is_some_and(|open| open <= LIMIT), "{}: {told}", route.name);
            let labels = [("route", route.name)];
            // Each is true at a time of its own.
            for tier in ["direct", "sockmap", "splice"] {
                let labels = [labels[0], ("tier", tier)];
                let active = metrics.sum("ambassador_connections_active", &labels).unwrap_or(0.0);
                ensure!((0.0..=LIMIT as f64).contains(&active), "{active} of {tier}");
            }
            for (number, (greeting, address)) in route.endpoints.iter().enumerate() {
                let told =
                    [&told["endpoints"][number], &later["routes"][index]["endpoints"][number]];
                let open = told[0]["connections"].as_u64();
                ensure!(open.is_some_and(|open| open <= LIMIT), "{greeting}: {}", told[0]);
                let out = told.iter().all(|it| it["healthy"] == false)
                    && told[0]["ejections"] == told[1]["ejections"];
                let port = address.port()?;
                ensure!(!(out && led_to.contains(&port)), "{greeting} is led to: {}", told[0]);
            }
            for name in ["connections_total", "bytes_total"] {
                let now = metrics.sum(&format!("ambassador_{name}"), &labels).unwrap_or(0.0);
                let before = before.entry(format!("{name} of {}", route.name)).or_default();
                ensure!(now >= *before, "{name} of {}: {before}, then {now}", route.name);
                *before = now;
            }
        }
        Ok(())
    }

    /// What is not the same everywhere, with these connections open and all endpoints at work.
    fn differs(&self, held: &[(String, Peer)]) -> Result<Option<String>> {
        let (status, metrics) = (self.ambassador.status()?, self.ambassador.metrics()?);
        let (led_to, open) = (self.led_to()?, self.open()?);
        let mut differences = Vec::new();
        let mut expect = |what: String, expected: u64, told: Option<f64>| {
            if told != Some(expected as f64) {
                differences.push(format!("{what} is {told:?}, not {expected}"));
            }
        };
        for (index, route) in self.routes.iter().enumerate() {
            let told = &status["routes"][index];
            let labels = [("route", route.name)];
            let metric = |name: &str| metrics.sum(&format!("ambassador_{name}"), &labels);
            let of = |greeting: &str| held.iter().filter(|(it, _)| it == greeting).count() as u64;
            let all = route.endpoints.iter().map(|(greeting, _)| of(greeting)).sum::<u64>();
            expect(format!("{}: connections", route.name), all, told["connections"].as_f64());
            expect(format!("{}: the metric", route.name), all, metric("connections_active"));
            let bytes = [&told["bytes_up"], &told["bytes_down"]].map(Value::as_u64);
            let bytes = bytes.into_iter().flatten().sum::<u64>();
            expect(format!("{}: the metric of bytes", route.name), bytes, metric("bytes_total"));
            for (number, (greeting, address)) in route.endpoints.iter().enumerate() {
                let told = &told["endpoints"][number];
                let labels = [("upstream", route.name), ("endpoint", &address.to_string())];
                let metric =
                    |name: &str| metrics.sum(&format!("ambassador_endpoint_{name}"), &labels);
                let connections = told["connections"].as_f64();
                expect(format!("{greeting}: connections"), of(greeting), connections);
                let healthy = f64::from(u8::from(told["healthy"] == true));
                expect(format!("{greeting}: healthy"), 1, Some(healthy));
                expect(format!("{greeting}: the metric"), 1, metric("healthy"));
                let ejections = told["ejections"].as_u64().context("find the ejections")?;
                expect(format!("{greeting}: ejections"), ejections, metric("ejections_total"));
                if self.way == Way::Direct {
                    let led_to = f64::from(u8::from(led_to.contains(&address.port()?)));
                    expect(format!("{greeting}: in the kernel's table"), 1, Some(led_to));
                }
            }
        }
        if let Some(open) = open {
            let told = self.ambassador.command(&["connections", "--json"])?.success()?;
            let direct = told.lines().filter(|it| it.contains("\"tier\":\"direct\"")).count();
            expect("connections in the kernel's list".into(), direct as u64, Some(open as f64));
        }
        Ok((!differences.is_empty()).then(|| differences.join("; ")))
    }

    /// The ports of what is in the tables in force, if there are any.
    fn led_to(&self) -> Result<BTreeSet<u16>> {
        let mut ports = BTreeSet::new();
        if self.way != Way::Direct {
            return Ok(ports);
        }
        let tables = Map::named(&self.place, TABLES)?;
        for index in Map::named(&self.place, ROUTES)?.values()? {
            let index = u32::from_ne_bytes(index[..4].try_into()?);
            if index == NO_TABLE {
                continue;
            }
            let table = tables.element(index)?;
            for slot in 0..SLOTS {
                let at = offset_of!(Table, slots) + slot * size_of::<Slot>();
                let port = at
                    + offset_of!(Slot, key)
                    + offset_of!(TargetKey, address)
                    + offset_of!(ambassador_ebpf::Address, port);
                ports.insert(u16::from_be_bytes(table[port..port + 2].try_into()?));
            }
        }
        Ok(ports)
    }

    /// How many connections the kernel has in its list, if it has one.
    fn open(&self) -> Result<Option<usize>> {
        let list = || Ok(Map::named(&self.place, OPEN)?.values()?.len());
        (self.way == Way::Direct).then(list).transpose()
    }
}

fn config(routes: &[Route], round: u64) -> String {
    let balance = ["round_robin", "failover", "least_connections"][(round % 3) as usize];
    let mut text = "version: 1\nroutes:\n".to_owned();
    for Route { name, address, .. } in routes {
        text += &format!(
            "  - {{ name: {name}, listen: '{address}', upstream: {name}, max_connections: {LIMIT} }}\n"
        );
    }
    text += "upstreams:\n";
    for Route { name, endpoints: [(_, first), (_, second)], .. } in routes {
        text += &format!(
            "  {name}:
    endpoints: ['{first}', '{second}']
    balance: {balance}
    eject: {{ consecutive_failures: 1, for: 300ms }}
"
        );
    }
    text
}

/// Opens and closes connections, and has what is open in the end, with what greeted each.
fn come_and_go(route: &Address, mut noise: Noise, over: &AtomicBool) -> Vec<(String, Peer)> {
    let mut held = Vec::new();
    while !over.load(Ordering::Relaxed) {
        // Whoever goes on without a pause leaves thousands of sockets behind that wait for their time to pass.
        sleep(Duration::from_micros(noise.below(4000)));
        if held.len() < WANTED && noise.below(2) == 0 {
            // It may be refused, for the limit or because a server has just gone.
            held.extend(greeted(route, 1));
        } else if !held.is_empty() {
            held.swap_remove(noise.below(held.len() as u64) as usize);
        }
    }
    held
}
