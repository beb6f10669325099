//! Where the threads of one group meet: lanes, ledgers and letters, shared by all its ranks.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use once_cell::sync::Lazy;
use parking_lot::{Condvar, Mutex};

use super::event::Event;
use super::link::Lane;
use super::mail::Mailbox;
use crate::Error;
use crate::backend::native::cause::Cause;
use crate::backend::native::control::{Control, Listener, Overdue, Presence, Stranded, nobody_sends};
use crate::backend::native::ledger::{Ledger, Report};
use crate::backend::{Direction, Transfer};

/// The rooms of this process, by the token that the ranks agreed on.
static ROOMS: Lazy<Mutex<HashMap<u128, Weak<Room>>>> = Lazy::new(Mutex::default);

/// What the ranks of a group share.
pub(crate) struct Room {
    pub(super) places: Vec<RankPlace>,
    /// Lane from rank `f` to rank `t` at `t * size + f`.
    lanes: Vec<Lane>,
    pub(super) mail: Vec<Mutex<Mailbox>>,
    joined: Mutex<usize>,
    all_joined: Condvar,
}

/// What belongs to one rank, for all to see.
pub(super) struct RankPlace {
    ledger: Arc<Ledger>,
    event: Arc<Event>,
    presence: Mutex<Presence>,
    ear: Mutex<Ear>,
}

/// Who hears what other ranks say.
#[derive(Default)]
struct Ear {
    listener: Option<Weak<dyn Listener>>,
    /// The first failure told before there was a listener: ranks come into the room one after another.
    missed: Option<Cause>,
}

impl RankPlace {
    pub(super) fn listener(&self) -> Option<Arc<dyn Listener>> {
        self.ear.lock().listener.as_ref().and_then(Weak::upgrade)
    }

    fn tell(&self, cause: &Cause) {
        let mut ear = self.ear.lock();
        let listener = match &ear.listener {
            Some(listener) => listener.upgrade(),
            None => {
                ear.missed.get_or_insert_with(|| cause.clone());
                None
            }
        };
        drop(ear);
        if let Some(listener) = listener {
            listener.failed(cause);
        }
    }
}

impl Room {
    /// The room of a token, made by the first who comes.
    pub(crate) fn of(token: u128, size: usize) -> Arc<Self> {
        let mut rooms = ROOMS.lock();
        if let Some(room) = rooms.get(&token).and_then(Weak::upgrade) {
            return room;
        }
        rooms.retain(|_, room| room.strong_count() > 0);
        let room = Arc::new(Self::new(size));
        rooms.insert(token, Arc::downgrade(&room));
        room
    }

    fn new(size: usize) -> Self {
        let place = |_| RankPlace {
            ledger: Arc::new(Ledger::new()),
            event: Arc::default(),
            presence: Mutex::new(Presence::Here),
            ear: Mutex::default(),
        };
        Self {
            places: (0..size).map(place).collect(),
            lanes: (0..size * size).map(|_| Lane::default()).collect(),
            mail: (0..size).map(|_| Mutex::default()).collect(),
            joined: Mutex::new(0),
            all_joined: Condvar::new(),
        }
    }

    /// Waits for all ranks to be in the room; false when they were not in time.
    pub(crate) fn join(&self, until: Instant) -> bool {
        let mut joined = self.joined.lock();
        *joined += 1;
        if *joined == self.places.len() {
            self.all_joined.notify_all();
        }
        while *joined < self.places.len() {
            if self.all_joined.wait_until(&mut joined, until).timed_out() {
                return *joined >= self.places.len();
            }
        }
        true
    }
}

/// One rank's place in a room.
pub(crate) struct Seat {
    pub(super) room: Arc<Room>,
    pub(super) rank: usize,
    answers: Mutex<Vec<Option<Report>>>,
}

impl Seat {
    pub(crate) fn new(room: Arc<Room>, rank: usize) -> Self {
        let answers = Mutex::new(vec![None; room.places.len()]);
        Self { room, rank, answers }
    }

    pub(crate) fn rank(&self) -> usize {
        self.rank
    }

    pub(crate) fn size(&self) -> usize {
        self.room.places.len()
    }

    /// This rank's ledger.
    pub(crate) fn ledger(&self) -> Arc<Ledger> {
        self.room.places[self.rank].ledger.clone()
    }

    pub(super) fn event(&self) -> &Arc<Event> {
        &self.room.places[self.rank].event
    }

    pub(super) fn event_of(&self, rank: usize) -> &Event {
        &self.room.places[rank].event
    }

    pub(super) fn lane_to(&self, to: usize) -> &Lane {
        &self.room.lanes[to * self.size() + self.rank]
    }

    pub(super) fn lane_from(&self, from: usize) -> &Lane {
        &self.room.lanes[self.rank * self.size() + from]
    }

    fn others(&self) -> impl Iterator<Item = (usize, &RankPlace)> {
        self.room.places.iter().enumerate().filter(move |&(rank, _)| rank != self.rank)
    }

    fn announce(&self, presence: Presence) {
        *self.room.places[self.rank].presence.lock() = presence;
        for (_, place) in self.others() {
            if let Some(listener) = place.listener() {
                listener.changed();
            }
            place.event.notify();
        }
    }
}

impl Control for Seat {
    fn attach(&self, listener: Weak<dyn Listener>) {
        let missed = {
            let mut ear = self.room.places[self.rank].ear.lock();
            ear.listener = Some(listener.clone());
            ear.missed.take()
        };
        if let (Some(cause), Some(listener)) = (missed, listener.upgrade()) {
            listener.failed(&cause);
        }
    }

    fn ask(&self, seq: u64) {
        let mut answers = self.answers.lock();
        for (rank, place) in self.others() {
            answers[rank] = Some(place.ledger.report(seq));
        }
    }

    fn answers(&self) -> Vec<Option<Report>> {
        self.answers.lock().clone()
    }

    fn presence(&self) -> Vec<Presence> {
        let mut presence: Vec<_> = self.room.places.iter().map(|p| p.presence.lock().clone()).collect();
        presence[self.rank] = Presence::Here;
        presence
    }

    fn listen(&self) -> bool {
        // Who says something calls the listener itself.
        false
    }

    fn tell(&self, cause: &Cause) {
        for (_, place) in self.others() {
            place.tell(cause);
        }
    }

    fn leave(&self, calls: u64) {
        self.announce(Presence::Left(calls));
    }

    fn transfer(&self, transfers: Vec<Transfer>) {
        for transfer in transfers {
            let to = match transfer.direction {
                Direction::Send { dst } => dst,
                Direction::Recv { .. } => self.rank,
            };
            self.post(to, transfer);
        }
    }

    fn deadline(&self) -> Option<Instant> {
        self.room.mail.iter().filter_map(|m| m.lock().deadline(self.rank)).min()
    }

    fn overdue(&self, now: Instant) -> Option<Overdue> {
        self.room.mail.iter().find_map(|m| m.lock().overdue(self.rank, now))
    }

    fn stranded(&self) -> Option<Stranded> {
        let presence = self.presence();
        let nobody = nobody_sends(&presence, self.rank);
        let gone = |peer: usize| presence[peer] != Presence::Here;
        self.room.mail.iter().find_map(|m| m.lock().stranded(self.rank, gone, nobody))
    }

    fn pending(&self) -> usize {
        self.room.mail.iter().map(|m| m.lock().pending(self.rank)).sum()
    }

    fn fail_transfers(&self, error: &Arc<Error>) {
        for mailbox in &self.room.mail {
            let letters = mailbox.lock().remove(self.rank);
            for letter in letters {
                letter.done.complete(Err(error.duplicate()));
            }
        }
    }

    fn close(&self, completed: u64) {
        let place = &self.room.places[self.rank];
        let left = matches!(*place.presence.lock(), Presence::Left(_));
        if !left {
            self.announce(Presence::Closed(completed));
        }
        place.ear.lock().listener = None;
    }
}

/// How long a rank waits for the others to come into its room, once all of them are known to be
/// on their way.
pub(crate) const JOIN_GRACE: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::native::control::Heard;

    #[test]
    fn who_comes_into_a_room_after_a_failure_was_told_hears_of_it() {
        let room = Room::of(crate::backend::native::meet::random(), 2);
        Seat::new(room.clone(), 0).tell(&Cause::Aborted);
        let late = Seat::new(room, 1);
        let heard = Heard::new();
        late.attach(heard.listener());
        assert_eq!(heard.causes(), [Cause::Aborted]);
    }
}
