//! How the next endpoint is chosen. Pure: it sees weights and counts, and knows no sockets.
#![forbid(unsafe_code)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::Endpoint;
use crate::config::Balance;

/// A policy with the state it needs.
#[derive(Debug)]
pub enum Balancer {
    Failover,
    /// Smooth weighted round robin: each turn every endpoint gains its weight, the richest is
    /// chosen and pays the sum of all. Weights 5,1,1 give a a b a c a a, never a a a a a b c.
    RoundRobin(Mutex<Vec<i64>>),
    /// Ties go round, or the first endpoint would take all connections that come one by one.
    LeastConnections(AtomicUsize),
}

impl Balancer {
    pub fn new(policy: Balance, endpoints: &[Arc<Endpoint>]) -> Self {
        match policy {
            Balance::Failover => Self::Failover,
            Balance::RoundRobin => Self::RoundRobin(Mutex::new(vec![0; endpoints.len()])),
            Balance::LeastConnections => Self::LeastConnections(AtomicUsize::new(0)),
        }
    }

    /// The index of an endpoint that is not among `tried`.
    pub fn choose(&self, endpoints: &[Arc<Endpoint>], tried: &[usize]) -> Option<usize> {
        let mut left = (0..endpoints.len()).filter(|index| !tried.contains(index));
        match self {
            Self::Failover => left.next(),
            Self::RoundRobin(credit) => {
                let mut credit = credit.lock().unwrap_or_else(PoisonError::into_inner);
                let mut sum = 0;
                let mut richest: Option<usize> = None;
                for index in left {
                    let weight = i64::from(endpoints[index].weight());
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
                let start = turn.fetch_add(1, Ordering::Relaxed) % endpoints.len();
                (0..endpoints.len())
                    .map(|step| (start + step) % endpoints.len())
                    .filter(|index| !tried.contains(index))
                    .min_by(|&left, &right| load_order(&endpoints[left], &endpoints[right]))
            }
        }
    }
}

/// Compares connections per weight, as they would be with one more, without dividing.
fn load_order(left: &Endpoint, right: &Endpoint) -> std::cmp::Ordering {
    let share =
        |of: &Endpoint, other: &Endpoint| (u64::from(of.active()) + 1) * u64::from(other.weight());
    share(left, right).cmp(&share(right, left))
}
