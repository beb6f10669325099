//! The same random numbers a second time, for a forward that is computed again.

use std::cell::RefCell;
use std::vec::IntoIter;

use tch::Tensor;

use crate::libtorch::RawGenerator;
use crate::{Error, Result};

/// What generators began with, draw by draw.
#[derive(Default)]
pub(crate) struct Draws(Vec<Tensor>);

/// What this thread does with the states of the generators it draws from.
enum Mode {
    Plain,
    Record(Vec<Tensor>),
    Repeat(IntoIter<Tensor>),
}

thread_local! {
    static MODE: RefCell<Mode> = const { RefCell::new(Mode::Plain) };
}

impl Draws {
    /// Runs `body`, and notes what it draws from generators of its own.
    pub(crate) fn record<T>(body: impl FnOnce() -> T) -> (T, Self) {
        let guard = Guard::enter(Mode::Record(Vec::new()));
        let result = body();
        match guard.leave() {
            Mode::Record(states) => (result, Self(states)),
            _ => (result, Self::default()),
        }
    }

    /// Runs `body`, which draws the noted numbers again; its generators then go on where they were.
    pub(crate) fn repeat<T>(self, body: impl FnOnce() -> T) -> T {
        let _guard = Guard::enter(Mode::Repeat(self.0.into_iter()));
        body()
    }
}

/// Goes back to the mode before, also when the body panics.
struct Guard(Mode);

impl Guard {
    fn enter(mode: Mode) -> Self {
        Self(MODE.replace(mode))
    }

    fn leave(self) -> Mode {
        MODE.replace(Mode::Plain)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        MODE.set(std::mem::replace(&mut self.0, Mode::Plain));
    }
}

/// Draws as this thread's mode says.
pub(super) fn draw(generator: &RawGenerator, fill: impl FnOnce(&RawGenerator) -> Result<()>) -> Result<()> {
    let before = MODE.with_borrow_mut(|mode| match mode {
        Mode::Plain => Ok(None),
        Mode::Record(states) => {
            states.push(generator.state()?);
            Ok(None)
        }
        Mode::Repeat(states) => states.next().map(Some).ok_or_else(|| Error::Callback {
            reason: "a forward that is computed again draws more random numbers than the first time"
                .to_owned(),
        }),
    })?;
    let Some(before) = before else { return fill(generator) };
    let now = generator.state()?;
    generator.set_state(&before)?;
    let filled = fill(generator);
    generator.set_state(&now)?;
    filled
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::random::Generator;

    #[test]
    fn repeated_draws_are_the_same_and_the_generators_go_on_where_they_were() {
        let (a, b) = (Generator::new(1).unwrap(), Generator::new(2).unwrap());
        let body = || [&a, &b, &a].map(|g| g.rand(&[4], Kind::Float).unwrap());
        let (first, draws) = Draws::record(body);
        let between = a.rand(&[4], Kind::Float).unwrap();
        assert_eq!(draws.repeat(body), first);
        let next = a.rand(&[4], Kind::Float).unwrap();
        // A generator that nobody repeated anything with.
        let alone = Generator::new(1).unwrap();
        let all: Vec<_> = (0..4).map(|_| alone.rand(&[4], Kind::Float).unwrap()).collect();
        assert_eq!([&first[0], &first[2], &between, &next], [&all[0], &all[1], &all[2], &all[3]]);
    }

    #[test]
    fn a_draw_too_many_is_an_error_and_a_panic_leaves_nothing_behind() {
        let generator = Generator::new(1).unwrap();
        let ((), draws) = Draws::record(|| ());
        assert!(draws.repeat(|| generator.rand(&[1], Kind::Float)).is_err());
        let _ = std::panic::catch_unwind(|| Draws::default().repeat(|| panic!("out of luck")));
        assert!(generator.rand(&[1], Kind::Float).is_ok());
    }
}
