//! The executor over links that do what a test wants of them.

use std::sync::Arc;

use tch::{Device, Kind, Tensor};

use super::{none, segments};
use crate::Result;
use crate::backend::native::executor::{Executor, Wiring};
use crate::backend::native::link::{Head, Lent, Links};
use crate::backend::native::memory::{Piece, Pieces, total};
use crate::backend::native::plan::Tuning;
use crate::backend::native::transport::{Progress, Run, Stamp};
use crate::backend::{Call, Op};

/// A message that comes when nobody has found it for so many looks.
struct Late {
    looks: usize,
    head: Head,
    taken: bool,
}

enum Never {}

impl Lent for Never {
    fn hold(&self) -> Option<&[Piece]> {
        match *self {}
    }

    fn release(&self) {
        match *self {}
    }
}

impl Links for Late {
    type Lent = Never;

    fn begin(&mut self) {}

    fn post(&mut self, _to: usize, _head: Head, _pieces: Pieces) {}

    fn flush(&mut self, _to: usize) -> Result<bool> {
        Ok(false)
    }

    fn sent(&mut self, _to: usize) -> usize {
        0
    }

    fn peek(&mut self, _from: usize) -> Result<Option<Head>> {
        let there = self.looks == 0 && !self.taken;
        self.looks = self.looks.saturating_sub(1);
        Ok(there.then_some(self.head))
    }

    fn take(&mut self, _from: usize) -> Option<Never> {
        None
    }

    fn read(&mut self, _from: usize, into: &[Piece], done: usize) -> Result<usize> {
        self.taken = true;
        Ok(total(into) - done)
    }

    fn withdraw(&mut self) {}
}

/// Rank 1 of two is to receive a broadcast that comes after so many looks: what its run does, step by step.
fn receives_after(looks: usize) -> Vec<Progress> {
    let stamp = Stamp { seq: 7, fingerprint: 9 };
    let head = Head { seq: 7, fingerprint: 9, index: 0, len: 4, factor: 1.0 };
    let wiring = Arc::new(Wiring::new(1, 2, Tuning::SOCKETS, Late { looks, head, taken: false }));
    let call = Call {
        op: Op::Broadcast { src: 0 },
        kind: Kind::Float,
        inputs: none(),
        outputs: segments(&[Tensor::zeros([1], (Kind::Float, Device::Cpu))]),
        timeout: super::LONG,
    };
    let mut run = Executor::new(wiring, call, stamp).unwrap();
    let mut steps = Vec::new();
    while steps.last() != Some(&Progress::Done) {
        assert!(steps.len() < 10, "{steps:?}");
        steps.push(run.advance().unwrap());
    }
    steps
}

#[test]
fn a_run_is_not_idle_when_the_message_that_it_waits_for_came_while_it_looked_for_others() {
    // Each step looks for it once, and, where nothing moved, once more for what ought not to come. Whoever is
    // told `Idle` sleeps until more comes, and no more comes.
    assert_eq!(receives_after(0), [Progress::Done]);
    assert_eq!(receives_after(1), [Progress::Moved, Progress::Done]);
    assert_eq!(receives_after(2), [Progress::Idle, Progress::Done]);
    assert_eq!(receives_after(3), [Progress::Idle, Progress::Moved, Progress::Done]);
}
