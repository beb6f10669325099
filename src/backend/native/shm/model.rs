//! The protocol, model-checked: loom runs every interleaving that its bound allows, and every value
//! that each read may return. A race on a payload, a stale read and a lost wake-up all fail.

use std::iter::once;

use loom::cell::UnsafeCell;
use loom::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

use super::protocol::{
    ASLEEP, AWAKE, Bell, Notice, WATCHED, Word, arm, doze, mark, retract, retracted, steps_of, tell, watch,
};

/// Slots that are filled again when they have been read.
const DEPTH: usize = 2;

impl Word for AtomicU64 {
    fn read(&self) -> u64 {
        self.load(Ordering::Acquire)
    }

    fn publish(&self, value: u64) {
        self.store(value, Ordering::Release);
        fence(Ordering::SeqCst);
    }
}

/// A bell whose futex is a lock and a condition: to sleep is to look at the word and to block in one.
struct Futex {
    word: AtomicU32,
    lock: Mutex<()>,
    /// A descriptor that stays ready until it is read.
    knocked: Mutex<bool>,
    rung: Condvar,
}

impl Futex {
    fn new() -> Self {
        Self {
            word: AtomicU32::new(AWAKE),
            lock: Mutex::new(()),
            knocked: Mutex::new(false),
            rung: Condvar::new(),
        }
    }
}

impl Bell for &Futex {
    fn peek(&self) -> u32 {
        self.word.load(Ordering::Relaxed)
    }

    fn arm(&self, value: u32) {
        self.word.store(value, Ordering::Relaxed);
        fence(Ordering::SeqCst);
    }

    fn reset(&self) -> u32 {
        self.word.swap(AWAKE, Ordering::AcqRel)
    }

    fn change(&self, from: u32, to: u32) -> bool {
        self.word.compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    fn sleep(&self, _nanos: u64) {
        let mut guard = self.lock.lock().unwrap();
        while self.word.load(Ordering::Acquire) == ASLEEP {
            guard = self.rung.wait(guard).unwrap();
        }
    }

    fn wake(&self) {
        let _guard = self.lock.lock().unwrap();
        self.rung.notify_one();
    }

    fn knock(&self) {
        *self.knocked.lock().unwrap() = true;
        self.rung.notify_one();
    }
}

impl Notice for AtomicU64 {
    fn look(&self) -> u64 {
        self.load(Ordering::Relaxed)
    }

    fn raise(&self, round: u64) {
        self.store(round, Ordering::Relaxed);
    }

    fn fence(ordering: Ordering) {
        fence(ordering);
    }
}

fn check(model: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(3);
    builder.max_branches = 20_000;
    builder.check(model);
}

fn wait_for(condition: impl Fn() -> bool) {
    while !condition() {
        thread::yield_now();
    }
}

/// What a rank writes and the others read.
struct Area {
    flags: [AtomicU64; 2],
    payloads: [UnsafeCell<u64>; 2],
    /// Steps filled and steps gathered.
    progress: [AtomicU64; 2],
    slots: [UnsafeCell<u64>; DEPTH],
    bell: Futex,
}

impl Area {
    fn new() -> Self {
        Self {
            flags: [AtomicU64::new(0), AtomicU64::new(0)],
            payloads: [UnsafeCell::new(0), UnsafeCell::new(0)],
            progress: [AtomicU64::new(0), AtomicU64::new(0)],
            slots: [UnsafeCell::new(0), UnsafeCell::new(0)],
            bell: Futex::new(),
        }
    }
}

// SAFETY: loom checks every access to the cells.
unsafe impl Sync for Area {}
// SAFETY: as above.
unsafe impl Send for Area {}

fn two_ranks(run: impl Fn(&Area, &Area) + Sync + Send + Copy + 'static) {
    check(move || {
        let ranks = Arc::new([Area::new(), Area::new()]);
        let other = ranks.clone();
        let thread = thread::spawn(move || run(&other[1], &other[0]));
        run(&ranks[0], &ranks[1]);
        thread.join().unwrap();
    });
}

#[test]
fn headers_of_even_and_odd_rounds_are_never_written_while_they_are_read() {
    two_ranks(|mine, theirs| {
        for round in 1..=3_u64 {
            let parity = (round & 1) as usize;
            // SAFETY: loom checks it.
            mine.payloads[parity].with_mut(|p| unsafe { *p = round * 10 });
            tell(&mine.flags[parity], round, once(&theirs.bell));
            wait_for(|| theirs.flags[parity].read() == round);
            // SAFETY: loom checks it.
            let got = theirs.payloads[parity].with(|p| unsafe { *p });
            assert_eq!(got, round * 10);
        }
    });
}

#[test]
fn slots_are_filled_again_only_when_they_have_been_read() {
    const STEPS: u64 = 3;
    check(|| {
        let ranks = Arc::new([Area::new(), Area::new()]);
        let shared = ranks.clone();
        let reader = thread::spawn(move || {
            let [source, mine] = &*shared;
            for round in 1..=2 {
                for step in 0..STEPS {
                    wait_for(|| steps_of(source.progress[0].read(), round) > step);
                    // SAFETY: loom checks it.
                    let got = source.slots[step as usize % DEPTH].with(|p| unsafe { *p });
                    assert_eq!(got, round * 100 + step);
                    tell(&mine.progress[1], mark(round, step + 1), once(&source.bell));
                }
            }
        });
        let [mine, reader_area] = &*ranks;
        for round in 1..=2 {
            for step in 0..STEPS {
                // A round begins when all have finished the one before.
                let (before, needed) = match step.checked_sub(DEPTH as u64 - 1) {
                    None | Some(0) => (round - 1, if round == 1 { 0 } else { STEPS }),
                    Some(needed) => (round, needed),
                };
                wait_for(|| {
                    let word = reader_area.progress[1].read();
                    word >= mark(before, needed)
                });
                // SAFETY: loom checks it.
                mine.slots[step as usize % DEPTH].with_mut(|p| unsafe { *p = round * 100 + step });
                tell(&mine.progress[0], mark(round, step + 1), once(&reader_area.bell));
            }
        }
        reader.join().unwrap();
    });
}

#[test]
fn what_is_written_to_a_lent_tensor_after_its_owner_gave_up_is_never_taken_for_what_was_lent() {
    check(|| {
        // A word of the tensor, in which the lent value is 1, and the notice.
        let lent = Arc::new((AtomicU64::new(1), AtomicU64::new(0)));
        let owner = lent.clone();
        let thread = thread::spawn(move || {
            retract(&owner.1, 5);
            owner.0.store(2, Ordering::Relaxed);
        });
        let got = lent.0.load(Ordering::Relaxed);
        if !retracted(&lent.1, 5) {
            assert_eq!(got, 1);
        }
        thread.join().unwrap();
    });
}

#[test]
fn what_others_wrote_to_a_lent_tensor_is_there_when_its_owner_goes_on_and_nobody_writes_any_more() {
    // Each lends a tensor of two words, its slots here, and reduces one word of both.
    let run = |ranks: &[Area; 2], me: usize| {
        let (mine, theirs) = (&ranks[me], &ranks[1 - me]);
        // SAFETY: for all accesses, loom checks them.
        mine.slots.iter().for_each(|word| word.with_mut(|p| unsafe { *p = 1 + me as u64 }));
        tell(&mine.flags[1], 1, once(&theirs.bell));
        wait_for(|| theirs.flags[1].read() == 1);
        // SAFETY: as above.
        let word = |area: &Area| area.slots[me].with(|p| unsafe { *p });
        let sum = word(mine) + word(theirs);
        for area in [mine, theirs] {
            // SAFETY: as above.
            area.slots[me].with_mut(|p| unsafe { *p = sum });
        }
        tell(&mine.progress[1], mark(1, 1), once(&theirs.bell));
        wait_for(|| steps_of(theirs.progress[1].read(), 1) == 1);
        // The caller has it again.
        for word in &mine.slots {
            // SAFETY: as above.
            assert_eq!(word.with_mut(|p| unsafe { p.replace(0) }), 3);
        }
    };
    check(move || {
        let ranks = Arc::new([Area::new(), Area::new()]);
        let other = ranks.clone();
        let thread = thread::spawn(move || run(&other, 1));
        run(&ranks, 0);
        thread.join().unwrap();
    });
}

#[test]
fn a_rank_that_sleeps_is_always_woken() {
    two_ranks(|mine, theirs| {
        for round in 1..=2_u64 {
            tell(&mine.flags[0], round, once(&theirs.bell));
            while theirs.flags[0].read() < round {
                arm(&&mine.bell);
                // Once more, after arming: this is what makes it safe to sleep.
                if theirs.flags[0].read() >= round {
                    break;
                }
                doze(&&mine.bell, 0);
            }
        }
    });
}

#[test]
fn a_rank_whose_peer_never_comes_is_woken_by_a_failure() {
    check(|| {
        let failed = Arc::new((AtomicU64::new(0), Area::new()));
        let shared = failed.clone();
        let other = thread::spawn(move || tell(&shared.0, 1, once(&shared.1.bell)));
        let (failed, mine) = &*failed;
        loop {
            arm(&&mine.bell);
            // Its flag is looked at here, in vain; then the failure, after arming as well.
            if mine.flags[0].read() != 0 || failed.read() != 0 {
                break;
            }
            doze(&&mine.bell, 0);
        }
        other.join().unwrap();
    });
}

#[test]
fn a_progress_engine_that_sleeps_on_descriptors_is_always_woken() {
    two_ranks(|mine, theirs| {
        for round in 1..=2_u64 {
            tell(&mine.flags[0], round, once(&theirs.bell));
            while theirs.flags[0].read() < round {
                arm(&&mine.bell);
                if theirs.flags[0].read() >= round {
                    break;
                }
                if watch(&&mine.bell) {
                    // Poll until the descriptor is ready, then read it.
                    let mut ready = mine.bell.knocked.lock().unwrap();
                    while !*ready {
                        ready = mine.bell.rung.wait(ready).unwrap();
                    }
                    *ready = false;
                    assert_ne!((&mine.bell).peek(), WATCHED);
                }
            }
        }
    });
}
