//! Which of a route's addresses a connection gets, decided in the connect hook from its table.
//!
//! The functions that take and give numbers are global: the verifier follows such a one once, whatever it may be
//! given, and not again with each way that leads to it (kernel/bpf/verifier.c: `do_check_subprogs`, since 5.6).
//! It had 50,000 instructions to follow where now it has 7,000, and that was half of the time to start.

use ambassador_ebpf::direct::{
    FAILOVER, NO_LIMIT, RANDOM_TWO, ROUND_ROBIN, SLOTS, Slot, Table, Target,
};
use aya_ebpf::helpers::bpf_get_prandom_u32;

use crate::maps::{CARRIED_TO, TABLES, TARGETS};

/// Slots that are looked at for one connection, so that connect(2) takes no longer with more of them. Of more,
/// the least busy of some is nearly as good as the least busy of all.
const LOOKS: usize = 8;

/// What stands for no slot.
const NOWHERE: u32 = u32::MAX;

/// What a socket can be connected to, and when.
pub(crate) struct Wish {
    /// The index of the route's table.
    pub(crate) table: u32,
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
    match choose_slot(wish.table, wish.families, wish.now, wish.turn) {
        NOWHERE => None,
        index => Some(&table.slots[index as usize % SLOTS]),
    }
}

/// The slot for a connection that has nothing better, whatever speaks against that.
#[inline(always)]
pub(crate) fn whatever_it_is<'t>(table: &'t Table, wish: &Wish) -> Option<&'t Slot> {
    let slot = &table.slots[of_turn(table, wish.turn as u32)?];
    (slot.family & wish.families != 0).then_some(slot)
}

/// [`choose`], in numbers.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn choose_slot(table: u32, families: u32, now: u64, turn: u64) -> u32 {
    let wish = Wish { table, families, now, turn };
    let chosen = TABLES.get(table).and_then(|table| match table.policy {
        FAILOVER | ROUND_ROBIN => in_order(table, &wish),
        _ => least_busy(table, &wish),
    });
    chosen.map_or(NOWHERE, |index| index as u32)
}

#[inline(always)]
fn in_order(table: &Table, wish: &Wish) -> Option<usize> {
    let preferred = of_turn(table, wish.turn as u32)?;
    if is_fit(wish, preferred) {
        return Some(preferred);
    }
    if table.policy == ROUND_ROBIN {
        return first_fit(wish, preferred);
    }
    if state(&table.slots[preferred]).is_some_and(|it| is_in_doubt(it, wish)) {
        // Where the order matters, the next one is only for when this one is known to fail.
        return None;
    }
    first_fit(wish, 0)
}

/// The index of a turn's slot.
#[inline(always)]
fn of_turn(table: &Table, turn: u32) -> Option<usize> {
    let index = *table.turns.get((turn % table.round.max(1)) as usize)?;
    // Bounded at once: 6.1 does not learn of a number on the stack what is found out in a register later.
    Some(usize::from(index) % SLOTS)
}

#[inline(always)]
fn random() -> u32 {
    // SAFETY: takes nothing.
    unsafe { bpf_get_prandom_u32() }
}

#[inline(always)]
fn first_fit(wish: &Wish, first: usize) -> Option<usize> {
    let mut step = 0;
    while step < LOOKS {
        let index = (first + step) % SLOTS;
        if is_fit(wish, index) {
            return Some(index);
        }
        step = next(step);
    }
    None
}

/// The one with the fewest connections for its weight: of all, or of two that are drawn from the turns (and
/// of some more, when those are not fit).
#[inline(always)]
fn least_busy(table: &Table, wish: &Wish) -> Option<usize> {
    let mut winner = None;
    let mut least = u64::MAX;
    let mut step = 0;
    while step < LOOKS {
        let index = if table.policy == RANDOM_TWO {
            if step >= 2 && winner.is_some() {
                break;
            }
            of_turn(table, random())?
        } else {
            // Ties go round, or the first would take all connections that come one by one.
            (wish.turn as usize + step) % SLOTS
        };
        if is_fit(wish, index) {
            let load = load(&table.slots[index]);
            if load < least {
                least = load;
                winner = Some(index);
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

/// Whether the socket can be connected to a slot, and nothing speaks against it.
#[inline(always)]
fn is_fit(wish: &Wish, index: usize) -> bool {
    is_slot_fit(wish.table, index as u32, wish.families, wish.now) != 0
}

/// [`is_fit`], in numbers.
#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn is_slot_fit(table: u32, index: u32, families: u32, now: u64) -> u32 {
    let Some(table) = TABLES.get(table) else { return 0 };
    let slot = &table.slots[index as usize % SLOTS];
    let is_well = |it: &Target| it.suspect_until <= now && it.doubt_until <= now;
    let is_fit = slot.family & families != 0
        && !(table.spills == 1 && is_full(table, slot))
        && (table.last_resort == 1 || state(slot).is_none_or(is_well));
    is_fit.into()
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
