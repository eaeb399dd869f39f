//! Which of a route's addresses a connection gets, decided in the connect hook from its table.

use ambassador_ebpf::direct::{
    FAILOVER, LEAST_CONNECTIONS, NO_LIMIT, RANDOM_TWO, ROUND_ROBIN, SLOTS, Slot, Table, Target,
};
use aya_ebpf::helpers::bpf_get_prandom_u32;

use crate::maps::{CARRIED_TO, TARGETS};

/// Slots that are looked at for one connection, so that connect(2) takes no longer with more of them (and
/// the verifier, which follows every way through every turn of a loop, comes to its end soon). Of more,
/// the least busy of some is nearly as good as the least busy of all.
const LOOKS: usize = 8;

/// What a socket can be connected to, and when.
pub(crate) struct Wish {
    /// The families of addresses that will do.
    pub(crate) families: u32,
    pub(crate) now: u64,
    /// Counts the route's connections.
    pub(crate) turn: u64,
}

/// The slot for a connection; none if no address suits, or all are suspected of not answering: user
/// space can try one after the other then, which a hook cannot.
#[inline(always)]
pub(crate) fn choose<'t>(table: &'t Table, wish: &Wish) -> Option<&'t Slot> {
    if table.policy >= LEAST_CONNECTIONS {
        const _: () = assert!(RANDOM_TWO > LEAST_CONNECTIONS && ROUND_ROBIN < LEAST_CONNECTIONS);
        return least_busy(table, wish);
    }
    let (preferred, slot) = of_turn(table, wish.turn as u32)?;
    if is_fit(table, slot, wish) {
        return Some(slot);
    }
    // Read for this comparison alone: from it the verifier would know the policy that the index below is made of
    // on one way, and not on the other.
    // SAFETY: the reference is valid.
    let policy = unsafe { core::ptr::read_volatile(&raw const table.policy) };
    if policy == FAILOVER && state(slot).is_some_and(|it| is_in_doubt(it, wish)) {
        // Where the order matters, the next one is only for when this one is known to fail.
        return None;
    }
    // The first one, or that of the turn. Without CAP_PERFMON the verifier wants an index to be known on all
    // ways or on none: "R3 tried to add from different maps, paths or scalars".
    const _: () = assert!(FAILOVER == 0 && ROUND_ROBIN == 1);
    first_fit(table, wish, preferred * table.policy as usize)
}

/// The slot for a connection that has nothing better, whatever speaks against that.
#[inline(always)]
pub(crate) fn whatever_it_is<'t>(table: &'t Table, wish: &Wish) -> Option<&'t Slot> {
    let (_, slot) = of_turn(table, wish.turn as u32)?;
    (slot.family & wish.families != 0).then_some(slot)
}

/// The slot of a turn, and its index.
#[inline(always)]
fn of_turn(table: &Table, turn: u32) -> Option<(usize, &Slot)> {
    let index = usize::from(*table.turns.get((turn % table.round.max(1)) as usize)?);
    Some((index, table.slots.get(index)?))
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: takes nothing.
    unsafe { bpf_get_prandom_u32() }
}

#[inline(always)]
fn first_fit<'t>(table: &'t Table, wish: &Wish, first: usize) -> Option<&'t Slot> {
    let mut step = 0;
    while step < LOOKS {
        let slot = &table.slots[(first + step) % SLOTS];
        if is_fit(table, slot, wish) {
            return Some(slot);
        }
        step = next(step);
    }
    None
}

/// The one with the fewest connections for its weight: of all, or of two that are drawn from the turns (and
/// of some more, when those are not fit).
#[inline(always)]
fn least_busy<'t>(table: &'t Table, wish: &Wish) -> Option<&'t Slot> {
    let mut winner = None;
    let mut least = u64::MAX;
    let mut step = 0;
    while step < LOOKS {
        let slot = if table.policy == RANDOM_TWO {
            if step >= 2 && winner.is_some() {
                break;
            }
            of_turn(table, random())?.1
        } else {
            // Ties go round, or the first would take all connections that come one by one.
            &table.slots[(wish.turn as usize + step) % SLOTS]
        };
        if is_fit(table, slot, wish) {
            let load = load(slot);
            if load < least {
                least = load;
                winner = Some(slot);
            }
        }
        step = next(step);
    }
    winner
}

/// Connections per weight, as they would be with one more.
#[inline(always)]
fn load(slot: &Slot) -> u64 {
    let active = state(slot).map_or(0, |target| target.active);
    ((active + 1) << 32) / u64::from(slot.weight.max(1))
}

/// Whether the socket can be connected to it, and nothing speaks against it.
#[inline(always)]
fn is_fit(table: &Table, slot: &Slot, wish: &Wish) -> bool {
    slot.family & wish.families != 0
        && !(table.spills == 1 && is_full(table, slot))
        && (table.last_resort == 1
            || state(slot)
                .is_none_or(|it| it.suspect_until <= wish.now && it.doubt_until <= wish.now))
}

/// Whether there are as many connections to it as may be.
#[inline(always)]
pub(crate) fn is_full(table: &Table, slot: &Slot) -> bool {
    if table.limit_each == NO_LIMIT {
        return false;
    }
    let key = &slot.key;
    // SAFETY: an element that is deleted counts for nothing.
    let carried = unsafe { CARRIED_TO.get(key) }.copied().unwrap_or_default();
    let (active, pending) = state(slot).map_or((0, 0), |it| (it.active, it.pending));
    active + u64::from(carried.active) >= u64::from(table.limit_each)
        || pending + u64::from(carried.pending) >= u64::from(table.pending_limit_each)
}

/// Whether it may be gone, but is not known to.
#[inline(always)]
fn is_in_doubt(target: &Target, wish: &Wish) -> bool {
    target.doubt_until > wish.now && target.suspect_until <= wish.now
}

/// The next step. Without CAP_PERFMON the verifier also follows what a processor may do by speculation,
/// where it takes a step for any number, so that a loop ends by `<` alone; the compiler, were it to know
/// what comes here, would make that `!=`: "The sequence of 8193 jumps is too complex".
#[inline(always)]
fn next(step: usize) -> usize {
    core::hint::black_box(step + 1)
}

#[inline(always)]
fn state(slot: &Slot) -> Option<&Target> {
    // By reference: a copy of it would go over the stack.
    let key = &slot.key;
    // SAFETY: user space deletes an element only when no table names it, so it is not made into
    // another while it is read; were it, a number would be off once.
    unsafe { TARGETS.get(key) }
}
