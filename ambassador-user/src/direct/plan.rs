//! What the kernel is told of a route: where apps are met, and where they are led.
#![forbid(unsafe_code)]

use std::cell::OnceCell;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::num::NonZeroU32;

use crate::config::{Balance, Listen};
use crate::datapath::tables::{NO_LIMIT, Plan, Policy, SLOTS};
use crate::route::Route;
use crate::upstream::Upstream;
use crate::upstream::balance::Source;
use crate::upstream::endpoint::order_for;
use crate::upstream::health::STEPS;

/// An endpoint's addresses share its weight, in parts: these can be shared evenly by any number of
/// addresses that is likely.
const PARTS: u32 = 5040;

/// Where the route's connections lead now, as far as that is known: to what is good.
pub(super) fn of(id: u64, route: &Route) -> Plan {
    let upstream = &route.upstream;
    let order = upstream.order();
    let order = order.unwrap_or_else(|| (0..upstream.endpoints().len()).collect());
    let balance = route.meant().upstream.balance;
    let policy = match balance {
        Balance::Failover | Balance::FailoverSticky | Balance::SourceHash => Policy::Failover,
        Balance::RoundRobin => Policy::RoundRobin,
        Balance::LeastConnections => Policy::LeastConnections,
        Balance::RandomTwo => Policy::RandomTwo,
    };
    let is_crowded = upstream.hosts().len() > SLOTS;
    let routing = Routing::default();
    let endpoints = order.into_iter().map(|index| {
        let endpoint = &upstream.endpoints()[index];
        let mut hosts = endpoint.hosts().to_vec();
        hosts.retain(|host| host.is_good());
        // Of more than there is room for each Pod takes others, so that all are used.
        if balance == Balance::SourceHash || is_crowded {
            order_for(&Source::Pod, &mut hosts);
        }
        let shares = hosts.iter().filter_map(|host| {
            Some((host.address().filter(|it| routing.leads_to(it))?, upstream.share(host)))
        });
        (endpoint.weight(), shares.collect::<Vec<_>>())
    });
    let mut endpoints: Vec<_> = endpoints.collect();
    if policy != Policy::Failover {
        make_room(&mut endpoints);
    }
    endpoints.retain(|(_, addresses)| !addresses.is_empty());
    if is_waited_for(upstream) {
        endpoints.clear();
    }
    let targets = shares(&endpoints);
    let meant = route.meant();
    let limit = |limit: Option<NonZeroU32>| limit.map_or(NO_LIMIT, NonZeroU32::get);
    Plan {
        route: id,
        policy,
        limit: route.max_connections,
        pending_limit: limit(meant.max_pending),
        limit_each: limit(meant.per_endpoint.connections),
        pending_limit_each: limit(meant.per_endpoint.pending),
        preferred: match balance {
            Balance::SourceHash => 1,
            _ => endpoints.first().map_or(0, |(_, addresses)| addresses.len()),
        },
        // A listener can do no better, unless it waits.
        last_resort: targets.len() == 1 && !upstream.holds(),
        targets,
    }
}

/// Where packets can be sent to. Of a connect that fails before it has sent any, no program is told, so that nobody
/// would ever be blamed; a Pod without IPv6 is the usual case.
#[derive(Default)]
struct Routing(OnceCell<Option<UdpSocket>>);

impl Routing {
    fn leads_to(&self, address: &SocketAddr) -> bool {
        let SocketAddr::V6(v6) = address else { return true };
        // Of no use without the interface, which a hook cannot say.
        if v6.ip().is_unicast_link_local() {
            return false;
        }
        // Connected, it sends nothing, but has asked for the way.
        let socket = self.0.get_or_init(|| UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).ok());
        socket.as_ref().is_some_and(|socket| socket.connect(address).is_ok())
    }
}

/// Whether a listener is to have connections wait, because the last connects have failed wherever they may go.
fn is_waited_for(upstream: &Upstream) -> bool {
    let hosts = upstream.hosts();
    let mut good = hosts.iter().filter(|host| host.is_good());
    upstream.holds() && good.all(|host| host.health().is_unreached())
}

/// Leaves of each endpoint as many addresses as all of them have room for; what one does not need is for others.
fn make_room(endpoints: &mut [(u32, Vec<(SocketAddr, u32)>)]) {
    let mut all: Vec<_> = endpoints.iter_mut().map(|(_, addresses)| addresses).collect();
    all.sort_by_key(|addresses| addresses.len());
    let (mut room, mut left) = (SLOTS, all.len());
    for addresses in all {
        addresses.truncate(room.div_ceil(left));
        room -= addresses.len();
        left -= 1;
    }
}

/// All addresses, each with its share of its endpoint's weight: as much as others, or less, in steps.
fn shares(endpoints: &[(u32, Vec<(SocketAddr, u32)>)]) -> Vec<(SocketAddr, u32)> {
    let shares = endpoints.iter().flat_map(|(weight, addresses)| {
        let whole = weight * (PARTS / STEPS) / u32::try_from(addresses.len()).unwrap_or(u32::MAX);
        addresses.iter().map(move |(address, steps)| (*address, (whole * steps).max(1)))
    });
    let shares: Vec<_> = shares.take(SLOTS).collect();
    let common = shares.iter().fold(0, |common, (_, share)| gcd(common, *share)).max(1);
    shares.into_iter().map(|(address, share)| (address, share / common)).collect()
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// The loopback addresses among those that this listens on, at which apps are met in the kernel.
pub(crate) fn loopback(listen: &Listen) -> Vec<SocketAddr> {
    let Listen::Tcp { address, .. } = listen else { return Vec::new() };
    let at = |ip: IpAddr| SocketAddr::new(ip, address.port());
    match address.ip() {
        IpAddr::V4(Ipv4Addr::UNSPECIFIED) => vec![at(Ipv4Addr::LOCALHOST.into())],
        IpAddr::V6(Ipv6Addr::UNSPECIFIED) => vec![at(Ipv6Addr::LOCALHOST.into())],
        ip if ip.is_loopback() => vec![*address],
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(host: u8) -> SocketAddr {
        (Ipv4Addr::new(10, 0, 0, host), 1).into()
    }

    #[test]
    fn an_endpoint_s_addresses_share_its_weight() {
        let one = (3, vec![(address(1), STEPS)]);
        let two = (1, vec![(address(2), STEPS), (address(3), STEPS / 2)]);
        let shares = shares(&[one, two]);
        assert_eq!(shares, [(address(1), 12), (address(2), 2), (address(3), 1)]);
    }

    #[test]
    fn an_endpoint_of_many_addresses_leaves_room_for_the_others() {
        for (many, left) in [
            (&[50, 50][..], &[32, 32][..]),
            (&[100, 10], &[54, 10]),
            (&[30, 30], &[30, 30]),
            (&[1, 100, 20], &[1, 43, 20]),
            (&[100; 3], &[22, 21, 21]),
            (&[0, 100], &[0, 64]),
        ] {
            let mut endpoints: Vec<_> = many
                .iter()
                .map(|many| (1, (0..*many).map(|host| (address(host), STEPS)).collect::<Vec<_>>()))
                .collect();
            make_room(&mut endpoints);
            let found: Vec<_> = endpoints.iter().map(|(_, addresses)| addresses.len()).collect();
            assert_eq!(found, left, "{many:?}");
        }
    }

    #[test]
    fn apps_are_met_on_loopback_only() {
        let at = |text: &str| {
            loopback(&Listen::Tcp { address: text.parse().unwrap(), if_available: false })
        };
        assert_eq!(at("127.0.0.1:1"), ["127.0.0.1:1".parse().unwrap()]);
        assert_eq!(at("0.0.0.0:1"), ["127.0.0.1:1".parse().unwrap()]);
        assert_eq!(at("[::]:1"), ["[::1]:1".parse().unwrap()]);
        assert_eq!(at("10.0.0.1:1"), []);
    }
}
