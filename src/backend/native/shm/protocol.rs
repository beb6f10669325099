//! The flags through which ranks tell each other how far they are, over abstract atomics: over shared
//! memory in earnest, over loom's in the model test. README.md says why this is enough.

use std::sync::atomic::Ordering;

/// A 64-bit word that one rank writes and the others read. It only grows.
pub(super) trait Word {
    /// Reads; what was written before the value that is read was published is seen.
    fn read(&self) -> u64;
    /// Writes, then a full fence: what was written before is seen by those who read the value, and a
    /// bell read after this was not armed before the value could be seen.
    fn publish(&self, value: u64);
}

/// A 32-bit word on which one rank sleeps and which the others reset.
pub(super) trait Bell {
    /// Reads, in no order with anything else.
    fn peek(&self) -> u32;
    /// Sets, then a full fence.
    fn arm(&self, value: u32);
    /// Takes what is there and leaves [`AWAKE`], in one step.
    fn reset(&self) -> u32;
    /// Replaces `from` by `to` if it is there.
    fn change(&self, from: u32, to: u32) -> bool;
    /// Sleeps while the word is [`ASLEEP`], or for a while.
    fn sleep(&self, nanos: u64);
    /// Ends such a sleep.
    fn wake(&self);
    /// Makes the descriptor ready that the rank watches while its bell is [`WATCHED`].
    fn knock(&self);
}

/// Nobody has to be told.
pub(super) const AWAKE: u32 = 0;
/// The rank has looked, found nothing, and may fall asleep.
pub(super) const ARMED: u32 = 1;
/// The rank sleeps on the word.
pub(super) const ASLEEP: u32 = 2;
/// The rank sleeps on descriptors.
pub(super) const WATCHED: u32 = 3;

/// How many bits of a progress word count steps; the rest is the number of the round.
pub(super) const STEP_BITS: u32 = 22;

/// The value of a progress word: rounds go up for ever, steps start again in each.
pub(super) fn mark(round: u64, steps: u64) -> u64 {
    debug_assert!(steps < 1 << STEP_BITS);
    round << STEP_BITS | steps
}

/// How many steps of `round` a progress word stands for.
pub(super) fn steps_of(word: u64, round: u64) -> u64 {
    word.saturating_sub(mark(round, 0))
}

/// Publishes and wakes those whose bells ask for it.
pub(super) fn tell<W: Word, B: Bell>(word: &W, value: u64, bells: impl Iterator<Item = B>) {
    word.publish(value);
    bells.for_each(|bell| ring(&bell));
}

/// Wakes a rank that is asleep or about to be.
pub(super) fn ring<B: Bell>(bell: &B) {
    if bell.peek() != AWAKE {
        match bell.reset() {
            ASLEEP => bell.wake(),
            WATCHED => bell.knock(),
            _ => {}
        }
    }
}

/// Says that this rank is about to sleep. What it waits for must be looked at again after this.
pub(super) fn arm<B: Bell>(bell: &B) {
    if bell.peek() == AWAKE {
        bell.arm(ARMED);
    }
}

/// Asks for a knock; false where the bell was rung since it was armed.
pub(super) fn watch<B: Bell>(bell: &B) -> bool {
    bell.change(ARMED, WATCHED) || bell.peek() == WATCHED
}

/// Sleeps, unless the bell was rung since it was armed. Leaves the bell awake.
pub(super) fn doze<B: Bell>(bell: &B, nanos: u64) {
    if bell.change(ARMED, ASLEEP) {
        bell.sleep(nanos);
    }
    if bell.peek() != AWAKE {
        bell.reset();
    }
}

/// A word that says in which round its rank has given up; 0 where it has not.
pub(super) trait Notice {
    /// Reads, in no order with anything else.
    fn look(&self) -> u64;
    /// Writes, in no order with anything else.
    fn raise(&self, round: u64);
    /// A fence.
    fn fence(ordering: Ordering);
}

/// Gives up in a round: who reads what is written to this rank's tensors after this finds the notice. The first
/// round counts.
pub(super) fn retract<N: Notice>(notice: &N, round: u64) {
    let before = notice.look();
    if before == 0 || round < before {
        notice.raise(round);
    }
    N::fence(Ordering::Release);
}

/// Whether a rank had given up, in this round or before it, when the last thing that was read of its tensors was
/// read.
pub(super) fn retracted<N: Notice>(notice: &N, round: u64) -> bool {
    N::fence(Ordering::Acquire);
    (1..=round).contains(&notice.look())
}
