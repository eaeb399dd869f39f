//! How the next endpoint is chosen. Pure: it sees weights and counts, and knows no sockets.
#![forbid(unsafe_code)]

use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use crate::config::Balance;

/// A policy with the state it needs.
#[derive(Debug)]
pub enum Balancer {
    Failover,
    /// The one in use, until it is not good.
    FailoverSticky(AtomicUsize),
    /// Smooth weighted round robin: each turn every endpoint gains its weight, the richest is
    /// chosen and pays the sum of all. Weights 5,1,1 give a a b a c a a, never a a a a a b c.
    RoundRobin(Mutex<Vec<i64>>),
    /// Ties go round, or the first endpoint would take all connections that come one by one.
    LeastConnections(AtomicUsize),
    /// Two are drawn by weight, and the less busy one is taken: nearly as even as the least busy of all,
    /// and many who choose at the same time do not choose the same.
    RandomTwo,
    SourceHash,
}

/// The endpoints, by their indices.
pub trait Field {
    fn count(&self) -> usize;
    /// Whether a connection may go there now.
    fn is_fit(&self, index: usize) -> bool;
    /// Whether it has as many connections as it may.
    fn is_full(&self, index: usize) -> bool;
    /// Whether it is healthy, be it that this connection has tried it.
    fn is_good(&self, index: usize) -> bool;
    fn weight(&self, index: usize) -> u64;
    fn active(&self, index: usize) -> u64;
    fn label(&self, index: usize) -> &str;
}

/// Where a connection comes from, as far as that decides where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// An app in this Pod: all of them are one, whatever port or socket they come by.
    Pod,
    Elsewhere(IpAddr),
}

impl Balancer {
    /// For so many endpoints, of which this one is in use.
    pub fn new(policy: Balance, count: usize, in_use: usize) -> Self {
        match policy {
            Balance::Failover => Self::Failover,
            Balance::FailoverSticky => Self::FailoverSticky(AtomicUsize::new(in_use)),
            Balance::RoundRobin => Self::RoundRobin(Mutex::new(vec![0; count])),
            Balance::LeastConnections => Self::LeastConnections(AtomicUsize::new(0)),
            Balance::RandomTwo => Self::RandomTwo,
            Balance::SourceHash => Self::SourceHash,
        }
    }

    /// The endpoint that stays in use, if that is how it is chosen.
    pub fn in_use(&self) -> Option<usize> {
        match self {
            Self::FailoverSticky(current) => Some(current.load(Ordering::Relaxed)),
            _ => None,
        }
    }

    /// The index of an endpoint that is fit. Where the order or the source decides, one that is full has no
    /// substitute.
    pub fn choose(&self, field: &impl Field, source: &Source) -> Option<usize> {
        let spills =
            matches!(self, Self::RoundRobin(_) | Self::LeastConnections(_) | Self::RandomTwo);
        let is_open = |index: &usize| field.is_fit(*index) && !(spills && field.is_full(*index));
        let chosen = self.best(field, source, is_open)?;
        (spills || !field.is_full(chosen)).then_some(chosen)
    }

    fn best(
        &self,
        field: &impl Field,
        source: &Source,
        is_open: impl Fn(&usize) -> bool,
    ) -> Option<usize> {
        let mut fit = (0..field.count()).filter(&is_open);
        match self {
            Self::Failover => fit.next(),
            Self::FailoverSticky(current) => {
                let current = settle(current, field);
                if field.is_fit(current) { Some(current) } else { fit.next() }
            }
            Self::RoundRobin(credit) => {
                let mut credit = credit.lock().unwrap_or_else(PoisonError::into_inner);
                let mut sum = 0;
                let mut richest: Option<usize> = None;
                for index in fit {
                    let weight = i64::try_from(field.weight(index)).unwrap_or(i64::MAX);
                    credit[index] += weight;
                    sum += weight;
                    if richest.is_none_or(|best| credit[index] > credit[best]) {
                        richest = Some(index);
                    }
                }
                credit[richest?] -= sum;
                richest
            }
            Self::LeastConnections(turn) => {
                let start = turn.fetch_add(1, Ordering::Relaxed) % field.count();
                (0..field.count())
                    .map(|step| (start + step) % field.count())
                    .filter(&is_open)
                    .min_by(|&left, &right| busier(field, left, right))
            }
            Self::RandomTwo => {
                let fit: Vec<_> = fit.collect();
                let one = draw(field, &fit, None)?;
                let other = draw(field, &fit, Some(one)).unwrap_or(one);
                Some(if busier(field, one, other).is_gt() { other } else { one })
            }
            Self::SourceHash => {
                let source = source.hash();
                let score = |index: &usize| score(field, *index, source);
                fit.max_by(|left, right| score(left).total_cmp(&score(right)))
            }
        }
    }

    /// The endpoints that are good, in the order in which they are taken for all connections of this Pod;
    /// `None` if each connection is to be asked for.
    pub fn order(&self, field: &impl Field) -> Option<Vec<usize>> {
        let mut good: Vec<_> = (0..field.count()).filter(|index| field.is_good(*index)).collect();
        match self {
            Self::Failover => {}
            Self::FailoverSticky(current) => {
                let current = settle(current, field);
                good.sort_by_key(|index| *index != current);
            }
            Self::SourceHash => {
                let source = Source::Pod.hash();
                let score = |index: &usize| score(field, *index, source);
                good.sort_by(|left, right| score(right).total_cmp(&score(left)));
            }
            Self::RoundRobin(_) | Self::LeastConnections(_) | Self::RandomTwo => return None,
        }
        Some(good)
    }
}

/// The one in use; another one if that is not good any more.
fn settle(current: &AtomicUsize, field: &impl Field) -> usize {
    let now = current.load(Ordering::Relaxed);
    if field.is_good(now) {
        return now;
    }
    let next = (0..field.count()).find(|index| field.is_good(*index)).unwrap_or(now);
    current.store(next, Ordering::Relaxed);
    next
}

/// One of these, at random by weight, and not `but`.
fn draw(field: &impl Field, of: &[usize], but: Option<usize>) -> Option<usize> {
    let left = || of.iter().copied().filter(move |index| Some(*index) != but);
    let sum: u64 = left().map(|index| field.weight(index)).sum();
    let mut ticket = fastrand::u64(0..sum.max(1));
    let drawn = left().find(|index| {
        let weight = field.weight(*index);
        let drawn = ticket < weight;
        ticket = ticket.saturating_sub(weight);
        drawn
    });
    // Shares may have changed meanwhile.
    drawn.or_else(|| left().next())
}

/// Compares connections per weight, as they would be with one more, without dividing.
fn busier(field: &impl Field, left: usize, right: usize) -> std::cmp::Ordering {
    let share = |of, other| (field.active(of) + 1) * field.weight(other);
    share(left, right).cmp(&share(right, left))
}

/// How an endpoint ranks for a source.
fn score(field: &impl Field, index: usize, source: u64) -> f64 {
    rank(source, field.label(index), field.weight(index) as f64)
}

/// Weighted rendezvous hashing: the highest score is taken, and when that one goes only its connections
/// go elsewhere (Schindelhauer and Schomaker, "Weighted distributed hash tables").
pub fn rank(source: u64, label: &str, weight: f64) -> f64 {
    let hash = hash(label.as_bytes(), source);
    let fraction = (hash as f64 + 0.5) / 2f64.powi(64);
    -weight / fraction.ln()
}

impl Source {
    /// The same for the same source, in every ambassador.
    pub fn hash(&self) -> u64 {
        match self {
            // What the upstream sees is the Pod: Pods spread, and each stays.
            Self::Pod => {
                static POD: OnceLock<u64> = OnceLock::new();
                *POD.get_or_init(|| {
                    let name = rustix::system::uname();
                    hash(name.nodename().to_bytes(), 0)
                })
            }
            Self::Elsewhere(IpAddr::V4(ip)) => hash(&ip.octets(), 0),
            Self::Elsewhere(IpAddr::V6(ip)) => hash(&ip.octets(), 0),
        }
    }
}

/// FNV-1a, and the finish of splitmix64, without which similar labels get similar hashes.
fn hash(bytes: &[u8], seed: u64) -> u64 {
    let start = 0xcbf2_9ce4_8422_2325 ^ seed;
    let sum = bytes
        .iter()
        .fold(start, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3));
    let mixed = (sum ^ (sum >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    mixed ^ (mixed >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Endpoints by weight, connections and health.
    struct Endpoints(Vec<(u64, u64, bool)>);

    const FULL: u64 = 1 << 32;
    const LABELS: [&str; 4] = ["db-0:5432", "db-1:5432", "db-2:5432", "db-3:5432"];

    impl Field for Endpoints {
        fn count(&self) -> usize {
            self.0.len()
        }
        fn is_fit(&self, index: usize) -> bool {
            self.is_good(index)
        }
        fn is_good(&self, index: usize) -> bool {
            self.0[index].2
        }
        fn is_full(&self, index: usize) -> bool {
            self.0[index].1 >= FULL
        }
        fn weight(&self, index: usize) -> u64 {
            self.0[index].0
        }
        fn active(&self, index: usize) -> u64 {
            self.0[index].1
        }
        fn label(&self, index: usize) -> &str {
            LABELS[index]
        }
    }

    fn source(number: u32) -> Source {
        Source::Elsewhere(IpAddr::V4(number.into()))
    }

    #[test]
    fn a_sticky_choice_stays_until_it_is_not_good() {
        let balancer = Balancer::new(Balance::FailoverSticky, 3, 0);
        let mut field = Endpoints(vec![(1, 0, true); 3]);
        let choose = |field: &Endpoints| balancer.choose(field, &Source::Pod);
        assert_eq!(choose(&field), Some(0));
        field.0[0].2 = false;
        assert_eq!(choose(&field), Some(1));
        field.0[0].2 = true;
        assert_eq!(choose(&field), Some(1));
        assert_eq!(balancer.order(&field), Some(vec![1, 0, 2]));
        field.0[1].2 = false;
        assert_eq!(balancer.order(&field), Some(vec![0, 2]));
        assert_eq!(choose(&Endpoints(vec![(1, 0, false); 3])), None);
    }

    #[test]
    fn of_two_drawn_by_weight_the_less_busy_one_is_taken() {
        let balancer = Balancer::new(Balance::RandomTwo, 3, 0);
        let mut field = Endpoints(vec![(1, 0, true), (1, 0, true), (2, 0, true)]);
        // As connections stay open, loads come to be as weights are.
        for _ in 0..4_000 {
            let chosen = balancer.choose(&field, &Source::Pod).unwrap();
            field.0[chosen].1 += 1;
        }
        let loads = field.0.iter().map(|(_, active, _)| *active).collect::<Vec<_>>();
        for (load, expected) in loads.iter().zip([1_000, 1_000, 2_000]) {
            assert!(load.abs_diff(expected) < 50, "{loads:?}");
        }
        field.0[2].2 = false;
        assert!((0..100).all(|_| balancer.choose(&field, &Source::Pod) != Some(2)));
    }

    #[test]
    fn sources_spread_by_weight_and_only_those_of_a_lost_endpoint_move() {
        let balancer = Balancer::new(Balance::SourceHash, 3, 0);
        let mut field = Endpoints(vec![(1, 0, true), (1, 0, true), (2, 0, true)]);
        let choose = |field: &Endpoints, number| balancer.choose(field, &source(number)).unwrap();
        let before: Vec<_> = (0..8_000).map(|number| choose(&field, number)).collect();
        for (index, expected) in [2_000_usize, 2_000, 4_000].into_iter().enumerate() {
            let share = before.iter().filter(|chosen| **chosen == index).count();
            assert!(share.abs_diff(expected) < 200, "{index} got {share}");
        }
        field.0[1].2 = false;
        for (number, before) in (0..8_000).zip(before) {
            let after = choose(&field, number);
            assert!(after == before || before == 1, "{number} moved from {before} to {after}");
        }
    }

    #[test]
    fn what_is_full_is_replaced_only_where_any_will_do() {
        let field = Endpoints(vec![(1, FULL, true), (1, 0, true)]);
        let choose = |policy| Balancer::new(policy, 2, 0).choose(&field, &Source::Pod);
        for policy in [Balance::Failover, Balance::FailoverSticky] {
            assert_eq!(choose(policy), None);
        }
        for policy in [Balance::RoundRobin, Balance::LeastConnections, Balance::RandomTwo] {
            assert_eq!(choose(policy), Some(1));
        }
        let all = Endpoints(vec![(1, FULL, true); 2]);
        assert_eq!(Balancer::new(Balance::SourceHash, 2, 0).choose(&all, &Source::Pod), None);
    }

    #[test]
    fn what_is_told_the_kernel_is_what_a_connection_gets() {
        let balancer = Balancer::new(Balance::SourceHash, 4, 0);
        let mut field = Endpoints(vec![(1, 0, true); 4]);
        let order = balancer.order(&field).unwrap();
        for expected in order {
            assert_eq!(balancer.choose(&field, &Source::Pod), Some(expected));
            field.0[expected].2 = false;
        }
    }
}
