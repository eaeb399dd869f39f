//! From a plan of where a route leads to the table that the connect hooks go by.

use std::net::SocketAddr;

use ambassador_ebpf::direct::{
    FAILOVER, IPV4, IPV6, LEAST_CONNECTIONS, NO_LIMIT, RANDOM_TWO, ROUND_ROBIN, SLOTS, Slot, TURNS,
    Table, TargetKey,
};

use super::to_kernel;

/// How a route's connections are spread.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    Failover,
    RoundRobin,
    LeastConnections,
    RandomTwo,
}

/// Where a route leads, from which its table is made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// [`route_id`] of its name.
    pub route: u64,
    pub policy: Policy,
    pub limit: u32,
    /// Of those being opened.
    pub pending_limit: u32,
    /// For each address, and of those being opened.
    pub limit_each: u32,
    pub pending_limit_each: u32,
    /// Addresses with their weights, in the order of preference; at least one.
    pub targets: Vec<(SocketAddr, u32)>,
    /// Whether there is nothing else to try than the address, if it is the only one.
    pub last_resort: bool,
    /// For [`Policy::Failover`]: how many of them are equally good, and so take turns.
    pub preferred: usize,
}

impl Plan {
    pub(super) fn table(&self) -> Table {
        let slot = |(address, weight): &(SocketAddr, u32)| Slot {
            key: TargetKey { route: self.route, address: to_kernel(*address), reserved: 0 },
            weight: *weight,
            family: if address.ip().to_canonical().is_ipv4() { IPV4 } else { IPV6 },
        };
        let targets: Vec<_> = self.targets.iter().take(SLOTS).map(slot).collect();
        let count = targets.len();
        let slots = std::array::from_fn(|at| targets[at % count]);
        let taking_turns = match self.policy {
            Policy::Failover => self.preferred.min(count),
            Policy::RoundRobin | Policy::LeastConnections | Policy::RandomTwo => count,
        };
        let (turns, round) = round(&targets[..taking_turns]);
        Table {
            route: self.route,
            policy: match self.policy {
                Policy::Failover => FAILOVER,
                Policy::RoundRobin => ROUND_ROBIN,
                Policy::LeastConnections => LEAST_CONNECTIONS,
                Policy::RandomTwo => RANDOM_TWO,
            },
            last_resort: u32::from(self.last_resort),
            limit: self.limit,
            round,
            pending_limit: self.pending_limit,
            limit_each: match self.pending_limit_each {
                NO_LIMIT => self.limit_each,
                // Else nobody would look.
                _ => self.limit_each.min(NO_LIMIT - 1),
            },
            pending_limit_each: self.pending_limit_each,
            spills: u32::from(self.policy != Policy::Failover),
            slots,
            turns,
        }
    }
}

/// A smooth weighted round, and its length: each turn every slot gains its weight, the richest is
/// chosen and pays the sum of all. Where weights add up to more than there is room for, the round is
/// cut, and shares are as near as that allows.
fn round(slots: &[Slot]) -> ([u8; TURNS], u32) {
    let mut turns = [0; TURNS];
    let sum: i64 = slots.iter().map(|slot| i64::from(slot.weight)).sum();
    let length = usize::try_from(sum).unwrap_or(TURNS).clamp(1, TURNS);
    let mut credit = vec![0; slots.len()];
    for turn in &mut turns[..length] {
        for (credit, slot) in credit.iter_mut().zip(slots) {
            *credit += i64::from(slot.weight);
        }
        let richest = (0..slots.len()).rev().max_by_key(|&index| credit[index]);
        let Some(richest) = richest else { break };
        credit[richest] -= sum;
        *turn = richest as u8;
    }
    (turns, length as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slots(weights: &[u32]) -> Vec<Slot> {
        let key = TargetKey::of_route(0);
        weights.iter().map(|&weight| Slot { key, weight, family: IPV4 }).collect()
    }

    #[test]
    fn a_round_is_smooth_and_keeps_the_weights() {
        let (turns, length) = round(&slots(&[5, 1, 1]));
        assert_eq!((&turns[..7], length), (&[0, 0, 1, 0, 2, 0, 0][..], 7));
        let (turns, length) = round(&slots(&[3000, 1000]));
        let first = turns[..length as usize].iter().filter(|&&turn| turn == 0).count();
        assert_eq!((first, length), (96, 128));
    }
}
