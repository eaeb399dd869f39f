//! Everything one process listens on: refuses two listeners on one address, and routes that lead
//! to themselves.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::layer::Draft;
use super::name::Name;
use super::problem::{ConfigError, Place, Problem};
use super::{Admin, Control, Listen, Target};

/// The listeners of a process. Those that can collide share a key.
pub(crate) struct Listeners<'d>(HashMap<Key, Vec<Listener<'d>>>);

#[derive(PartialEq, Eq, Hash)]
enum Key {
    Port(u16),
    Path(std::path::PathBuf),
}

struct Listener<'d> {
    listen: Listen,
    owner: Owner<'d>,
}

#[derive(Clone, Copy)]
enum Owner<'d> {
    Route {
        index: usize,
        place: &'d Place,
    },
    /// The ambassador itself, by this setting.
    Setting(&'static str),
}

impl<'d> Listeners<'d> {
    /// All listeners of these routes and settings, no two of which collide.
    pub(crate) fn of(drafts: &'d [(Name, Draft)], admin: &Admin) -> Result<Self, ConfigError> {
        let mut all = Self(HashMap::new());
        if let Some(address) = admin.http {
            let listen = Listen::Tcp { address, if_available: false };
            all.add(Listener { listen, owner: Owner::Setting("admin.http") })?;
        }
        if let Control::At(path) | Control::IfPossible(path) = &admin.control {
            let listen = Listen::Unix(path.clone());
            all.add(Listener { listen, owner: Owner::Setting("admin.control") })?;
        }
        for (index, (_, draft)) in drafts.iter().enumerate() {
            for said in &draft.listen {
                let owner = Owner::Route { index, place: &said.place };
                all.add(Listener { listen: said.value.clone(), owner })?;
            }
        }
        Ok(all)
    }

    fn add(&mut self, new: Listener<'d>) -> Result<(), ConfigError> {
        let neighbours = self.0.entry(key(&new.listen)).or_default();
        let Some(first) = neighbours.iter().find(|old| collide(&old.listen, &new.listen)) else {
            neighbours.push(new);
            return Ok(());
        };
        let (place, fix) = match (new.owner, first.owner) {
            (Owner::Route { place, .. }, Owner::Route { place: first, .. })
                if place.source() != first.source() =>
            {
                (place.clone(), "choose another address, or replace this route by its name".into())
            }
            (Owner::Route { place, .. }, Owner::Route { .. }) => {
                (place.clone(), "choose another address".to_owned())
            }
            (Owner::Route { place, .. }, Owner::Setting(setting)) => {
                (place.clone(), format!("choose another address, or change {setting}"))
            }
            (Owner::Setting(setting), _) => {
                (Place::named(setting), "choose another address".to_owned())
            }
        };
        let taken = match first.owner {
            Owner::Route { place, .. } => format!("{} at {place}", first.listen),
            Owner::Setting(setting) => format!("{setting} {}", first.listen),
        };
        let what = format!("{} is taken by {taken}", new.listen);
        Err(Problem::new(what, fix).at(&place))
    }

    /// Refuses routes whose connections would come back to them.
    pub(crate) fn refuse_cycles(&self, drafts: &[(Name, Draft)]) -> Result<(), ConfigError> {
        let next: Vec<Vec<usize>> = drafts.iter().map(|(_, draft)| self.next(draft)).collect();
        let Some(cycle) = cycle(&next) else { return Ok(()) };
        let (_, first) = &drafts[cycle[0]];
        let what = if cycle.len() == 1 {
            "the route leads to itself".to_owned()
        } else {
            let names = cycle.iter().chain(cycle.first()).map(|index| drafts[*index].0.as_str());
            format!("the route leads to itself: {}", names.collect::<Vec<_>>().join(" -> "))
        };
        let fix = "write the address of the real service as its endpoint";
        Err(Problem::new(what, fix).at(&first.place))
    }

    /// The routes that a route's endpoints lead to.
    fn next(&self, draft: &Draft) -> Vec<usize> {
        let mut next: Vec<usize> = draft
            .service
            .endpoints()
            .iter()
            .flat_map(|endpoint| {
                let key = match &endpoint.target {
                    Target::Name { port, .. } => Some(Key::Port(*port)),
                    Target::Address(address) => Some(Key::Port(address.port())),
                    Target::Unix(path) => Some(Key::Path(path.clone())),
                    // Only DNS knows.
                    Target::Service(_) => None,
                };
                let near = key.and_then(|key| self.0.get(&key)).map_or(&[][..], Vec::as_slice);
                near.iter().filter(|listener| arrives(&endpoint.target, &listener.listen))
            })
            .filter_map(|listener| match listener.owner {
                Owner::Route { index, .. } => Some(index),
                Owner::Setting(_) => None,
            })
            .collect();
        next.sort_unstable();
        next.dedup();
        next
    }
}

fn key(listen: &Listen) -> Key {
    match listen {
        Listen::Tcp { address, .. } => Key::Port(address.port()),
        Listen::Unix(path) => Key::Path(path.clone()),
    }
}

/// Whether two listen addresses cannot be bound side by side.
fn collide(one: &Listen, other: &Listen) -> bool {
    match (one, other) {
        (Listen::Unix(one), Listen::Unix(other)) => one == other,
        (Listen::Tcp { address: one, .. }, Listen::Tcp { address: other, .. }) => {
            // IPv6 sockets are bound for IPv6 only, so [::] leaves 0.0.0.0 free.
            one.port() == other.port()
                && one.is_ipv4() == other.is_ipv4()
                && (one.ip() == other.ip()
                    || one.ip().is_unspecified()
                    || other.ip().is_unspecified())
        }
        _ => false,
    }
}

/// Whether a connection to `target` arrives at `listen`, as far as its name tells.
fn arrives(target: &Target, listen: &Listen) -> bool {
    match (target, listen) {
        (Target::Unix(target), Listen::Unix(bound)) => target == bound,
        (Target::Address(target), Listen::Tcp { address: bound, .. }) => {
            target.port() == bound.port() && accepts(bound.ip(), target.ip())
        }
        (Target::Name { host, port }, Listen::Tcp { address: bound, .. }) => {
            let name = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
            let is_local = name == "localhost" || name.ends_with(".localhost");
            let is_here = bound.ip().is_unspecified()
                || bound.ip() == Ipv4Addr::LOCALHOST
                || bound.ip() == Ipv6Addr::LOCALHOST;
            *port == bound.port() && is_local && is_here
        }
        _ => false,
    }
}

/// Whether a socket that is bound to `bound` accepts connections to `target`.
fn accepts(bound: IpAddr, target: IpAddr) -> bool {
    // A connection to "any address" goes to the loopback of its family.
    let target = match target.to_canonical() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    };
    let is_any = bound.is_unspecified() && bound.is_ipv4() == target.is_ipv4();
    target == bound || (is_any && target.is_loopback())
}

/// The first cycle of a graph that is given by the successors of each node.
fn cycle(next: &[Vec<usize>]) -> Option<Vec<usize>> {
    let mut seen = vec![false; next.len()];
    for start in 0..next.len() {
        // The path from `start`, each node with the successors that are still to be visited.
        let mut path: Vec<(usize, &[usize])> = Vec::new();
        let mut ahead = Some(start).filter(|start| !seen[*start]);
        loop {
            if let Some(node) = ahead.take() {
                seen[node] = true;
                path.push((node, &next[node]));
            }
            let Some((_, successors)) = path.last_mut() else { break };
            let Some((node, rest)) = successors.split_first() else {
                path.pop();
                continue;
            };
            *successors = rest;
            if let Some(at) = path.iter().position(|(on_path, _)| on_path == node) {
                return Some(path[at..].iter().map(|(node, _)| *node).collect());
            }
            ahead = Some(*node).filter(|node| !seen[*node]);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Environment, resolve};

    /// What is wrong with these routes, if anything is.
    fn refusal(routes: &[&str]) -> Option<String> {
        let numbered = routes.iter().enumerate();
        let numbered = numbered.map(|(n, route)| (format!("AMBASSADOR_ROUTE_{n}"), *route));
        let layer = numbered.collect::<Environment>().layer().unwrap();
        resolve(vec![layer]).err().map(|error| error.to_string())
    }

    #[test]
    fn two_listeners_on_one_address_are_refused() {
        for pair in [
            ["80=a:1", "80=b:1"],
            ["80=a:1", "127.0.0.1:80=b:1"],
            ["80=a:1", "[::1]:80=b:1"],
            ["0.0.0.0:80=a:1", "127.0.0.1:80=b:1"],
            ["10.0.0.1:80=a:1", "0.0.0.0:80=b:1"],
            ["[::]:80=a:1", "[::1]:80=b:1"],
            ["unix:/run/a=a:1", "unix:/run//./a=b:1"],
            ["1=a:1", "9090=b:1"],
            ["1=a:1", "unix:/run/ambassador/control.sock=b:1"],
        ] {
            let refusal = refusal(&pair).expect(pair[1]);
            assert!(refusal.starts_with("AMBASSADOR_ROUTE_1: ") && refusal.contains("is taken by"));
        }
    }

    #[test]
    fn listeners_side_by_side_are_not_refused() {
        for pair in [
            ["80=a:1", "81=b:1"],
            ["127.0.0.1:80=a:1", "127.0.0.2:80=b:1"],
            ["127.0.0.1:80=a:1", "[::1]:80=b:1"],
            ["0.0.0.0:80=a:1", "[::]:80=b:1"],
            ["unix:/run/a=a:1", "unix:/run/b=b:1"],
        ] {
            assert_eq!(refusal(&pair), None, "{pair:?}");
        }
    }

    #[test]
    fn a_route_to_itself_is_refused_however_it_is_written() {
        for route in [
            "80=127.0.0.1:80",
            "80=[::1]:80",
            "80=localhost:80",
            "80=LOCALHOST.:80",
            "80=db.localhost:80",
            "80=0.0.0.0:80",
            "80=[::]:80",
            "80=[::ffff:127.0.0.1]:80",
            "80=db:80,localhost:80",
            "0.0.0.0:80=127.0.0.7:80",
            "10.0.0.1:80=10.0.0.1:80",
            "unix:/run/a=unix:/run//a",
        ] {
            let refusal = refusal(&[route]).expect(route);
            assert!(refusal.contains("the route leads to itself; "), "{refusal}");
        }
    }

    #[test]
    fn a_chain_of_routes_is_fine_until_it_closes() {
        let chain = ["a:80=localhost:81", "b:81=unix:/run/c", "c:unix:/run/c=db:82"];
        assert_eq!(refusal(&chain), None);
        let closed = [chain[0], chain[1], "c:unix:/run/c=db:82,127.0.0.1:80"];
        assert!(refusal(&closed).unwrap().contains("leads to itself: a -> b -> c -> a; "));
    }

    #[test]
    fn a_service_beside_us_is_not_taken_for_us() {
        for route in ["80=localhost:81", "80=db:80", "127.0.0.1:80=127.0.0.2:80", "80=10.0.0.1:80"]
        {
            assert_eq!(refusal(&[route]), None, "{route}");
        }
    }

    #[test]
    fn a_long_chain_is_searched_without_recursion() {
        let mut next: Vec<Vec<usize>> = (1..=10_000).map(|node| vec![node]).collect();
        next.push(Vec::new());
        assert_eq!(cycle(&next), None);
        next[10_000].push(9_999);
        assert_eq!(cycle(&next), Some(vec![9_999, 10_000]));
    }
}
