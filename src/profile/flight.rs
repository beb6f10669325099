//! The flight recorder: the last calls of each group, in a ring that costs a few stores a call.

use std::panic::Location;
use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::clock;

/// How many calls a group remembers unless `TCH_DISTRIBUTED_FLIGHT_RECORDER` says otherwise (0: none).
pub(crate) const DEFAULT_CAPACITY: usize = 256;

/// What was called: every entry point of a group that communicates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
#[non_exhaustive]
pub enum Activity {
    /// `all_reduce`, coalesced too.
    AllReduce,
    /// `reduce`.
    Reduce,
    /// `broadcast`.
    Broadcast,
    /// `all_gather` in each of its forms.
    AllGather,
    /// `gather`.
    Gather,
    /// `scatter`.
    Scatter,
    /// `reduce_scatter` in each of its forms.
    ReduceScatter,
    /// `all_to_all` in each of its forms.
    AllToAll,
    /// `barrier`.
    Barrier,
    /// `send`, `isend`.
    Send,
    /// `recv`, `irecv`.
    Recv,
}

impl Activity {
    const ALL: [Self; 11] = [
        Self::AllReduce,
        Self::Reduce,
        Self::Broadcast,
        Self::AllGather,
        Self::Gather,
        Self::Scatter,
        Self::ReduceScatter,
        Self::AllToAll,
        Self::Barrier,
        Self::Send,
        Self::Recv,
    ];

    /// Its name in the API.
    pub fn name(self) -> &'static str {
        match self {
            Self::AllReduce => "all_reduce",
            Self::Reduce => "reduce",
            Self::Broadcast => "broadcast",
            Self::AllGather => "all_gather",
            Self::Gather => "gather",
            Self::Scatter => "scatter",
            Self::ReduceScatter => "reduce_scatter",
            Self::AllToAll => "all_to_all",
            Self::Barrier => "barrier",
            Self::Send => "send",
            Self::Recv => "recv",
        }
    }

    /// Whether every rank of the group takes part, in one order.
    pub fn is_collective(self) -> bool {
        !matches!(self, Self::Send | Self::Recv)
    }
}

/// How far a call came.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Called, not ended.
    Started,
    /// Ended well.
    Completed,
    /// Ended with an error.
    Failed,
}

/// One remembered call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlightEntry {
    /// Its number among the collectives (or the messages) of its group on this rank, from 0.
    pub seq: u64,
    /// What was called.
    pub activity: Activity,
    /// Bytes of this rank's side.
    pub bytes: u64,
    /// How far it came.
    pub state: State,
    /// When it was called, in nanoseconds of this host's monotonic clock, to a few milliseconds.
    pub started_ns: u64,
    /// When it ended, on the same clock and as exactly; 0 where it has not.
    pub ended_ns: u64,
    /// `file:line` of the call.
    pub site: String,
    /// Of a message: the other side's rank in the group; `None` for a receive from any rank, and for collectives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<usize>,
    /// Of a message: its tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tag: Option<u32>,
}

/// Whom a message is exchanged with, and its tag.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Envelope {
    pub(crate) peer: Option<usize>,
    pub(crate) tag: u32,
}

impl Envelope {
    /// The tag above the peer's number plus one.
    fn pack(self) -> u64 {
        let peer = self.peer.and_then(|peer| u32::try_from(peer + 1).ok()).unwrap_or(0);
        u64::from(self.tag) << 32 | u64::from(peer)
    }

    fn unpack(packed: u64) -> Self {
        let peer = (packed & u64::from(u32::MAX)) as usize;
        Self { peer: peer.checked_sub(1), tag: (packed >> 32) as u32 }
    }
}

/// One slot of the ring: plain numbers that one writer stores and a reader may see half written, which it
/// finds out by reading `ticket` before and after.
#[derive(Default)]
struct Slot {
    /// The call's number plus one; 0 while it is being written.
    ticket: AtomicU64,
    seq: AtomicU64,
    /// Activity in the low byte, bytes above it.
    what: AtomicU64,
    started: AtomicU64,
    /// End time with the failure flag in the lowest bit; 0 while running.
    ended: AtomicU64,
    /// Address of the `&'static Location`.
    site: AtomicU64,
    /// The envelope of a message; collectives leave it as it is.
    envelope: AtomicU64,
}

/// The last calls of one group on one rank.
pub(crate) struct FlightRecorder {
    slots: Box<[Slot]>,
    next: AtomicU64,
    collectives: AtomicU64,
    messages: AtomicU64,
}

/// A call being recorded.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Mark(u64);

impl FlightRecorder {
    pub(crate) fn new(capacity: usize) -> Self {
        Self {
            slots: (0..capacity).map(|_| Slot::default()).collect(),
            next: AtomicU64::new(0),
            collectives: AtomicU64::new(0),
            messages: AtomicU64::new(0),
        }
    }

    /// As many slots as the environment asks for.
    pub(crate) fn from_env() -> Self {
        let wanted = std::env::var("TCH_DISTRIBUTED_FLIGHT_RECORDER").ok().and_then(|v| v.parse().ok());
        Self::new(wanted.unwrap_or(DEFAULT_CAPACITY))
    }

    /// Notes that a call begins; a message has an envelope.
    #[inline]
    pub(crate) fn begin(
        &self,
        activity: Activity,
        bytes: usize,
        envelope: Option<Envelope>,
        site: &'static Location<'static>,
    ) -> Mark {
        if self.slots.is_empty() {
            return Mark(u64::MAX);
        }
        let counter = if activity.is_collective() { &self.collectives } else { &self.messages };
        let seq = counter.fetch_add(1, Ordering::Relaxed);
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let slot = &self.slots[(number % self.slots.len() as u64) as usize];
        slot.ticket.store(0, Ordering::Release);
        slot.seq.store(seq, Ordering::Relaxed);
        slot.what.store((bytes as u64) << 8 | activity as u64, Ordering::Relaxed);
        slot.started.store(clock::coarse_ns(), Ordering::Relaxed);
        slot.ended.store(0, Ordering::Relaxed);
        if let Some(envelope) = envelope {
            slot.envelope.store(envelope.pack(), Ordering::Relaxed);
        }
        slot.site.store(std::ptr::from_ref(site).expose_provenance() as u64, Ordering::Release);
        slot.ticket.store(number + 1, Ordering::Release);
        Mark(number)
    }

    /// Notes that a call has ended. An entry that the ring has dropped meanwhile stays dropped.
    pub(crate) fn end(&self, mark: Mark, ok: bool) {
        if mark.0 == u64::MAX {
            return;
        }
        let slot = &self.slots[(mark.0 % self.slots.len() as u64) as usize];
        if slot.ticket.load(Ordering::Acquire) == mark.0 + 1 {
            slot.ended.store(clock::coarse_ns() & !1 | u64::from(!ok), Ordering::Release);
        }
    }

    /// What is remembered, oldest first.
    pub(crate) fn entries(&self) -> Vec<FlightEntry> {
        let mut found: Vec<(u64, FlightEntry)> = self.slots.iter().filter_map(Slot::read).collect();
        found.sort_by_key(|(ticket, _)| *ticket);
        found.into_iter().map(|(_, entry)| entry).collect()
    }
}

impl Slot {
    fn read(&self) -> Option<(u64, FlightEntry)> {
        let ticket = self.ticket.load(Ordering::Acquire);
        let (seq, what) = (self.seq.load(Ordering::Relaxed), self.what.load(Ordering::Relaxed));
        let (started, ended) = (self.started.load(Ordering::Relaxed), self.ended.load(Ordering::Acquire));
        let envelope = self.envelope.load(Ordering::Relaxed);
        let site = self.site.load(Ordering::Acquire);
        if ticket == 0 || self.ticket.load(Ordering::Acquire) != ticket {
            return None;
        }
        // SAFETY: the ticket is unchanged, so `site` is what `begin` stored: the address of a `&'static Location`.
        let site = unsafe { &*std::ptr::with_exposed_provenance::<Location<'static>>(site as usize) };
        let activity = *Activity::ALL.get((what & 0xff) as usize)?;
        let envelope = (!activity.is_collective()).then(|| Envelope::unpack(envelope));
        let entry = FlightEntry {
            seq,
            activity,
            bytes: what >> 8,
            state: match ended {
                0 => State::Started,
                t if t & 1 == 0 => State::Completed,
                _ => State::Failed,
            },
            started_ns: started,
            ended_ns: ended & !1,
            site: format!("{}:{}", site.file(), site.line()),
            peer: envelope.and_then(|e| e.peer),
            tag: envelope.map(|e| e.tag),
        };
        Some((ticket, entry))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ring_keeps_the_last_calls_in_order_with_their_state() {
        let ring = FlightRecorder::new(3);
        for i in 0..5 {
            let mark = ring.begin(Activity::AllReduce, i * 10, None, Location::caller());
            if i != 3 {
                ring.end(mark, i != 4);
            }
        }
        let entries = ring.entries();
        assert_eq!(entries.iter().map(|e| (e.seq, e.bytes)).collect::<Vec<_>>(), [(2, 20), (3, 30), (4, 40)]);
        let states: Vec<_> = entries.iter().map(|e| e.state).collect();
        assert_eq!(states, [State::Completed, State::Started, State::Failed]);
        assert!(entries[0].site.contains("flight.rs:"), "{}", entries[0].site);
    }

    #[test]
    fn messages_do_not_count_as_collectives() {
        let ring = FlightRecorder::new(8);
        for activity in [Activity::Send, Activity::Barrier, Activity::Recv, Activity::AllGather] {
            let message = Envelope { peer: Some(0), tag: u32::MAX };
            let envelope = (!activity.is_collective()).then_some(message);
            ring.begin(activity, 0, envelope, Location::caller());
        }
        let entries = ring.entries();
        assert_eq!(entries.iter().map(|e| e.seq).collect::<Vec<_>>(), [0, 0, 1, 1]);
        let envelopes: Vec<_> = entries.iter().map(|e| (e.peer, e.tag)).collect();
        let message = (Some(0), Some(u32::MAX));
        assert_eq!(envelopes, [message, (None, None), message, (None, None)]);
    }

    #[test]
    fn a_ring_of_nothing_remembers_nothing() {
        let ring = FlightRecorder::new(0);
        let mark = ring.begin(Activity::Barrier, 0, None, Location::caller());
        ring.end(mark, true);
        assert!(ring.entries().is_empty());
    }

    #[test]
    fn a_reader_beside_writers_sees_whole_entries_only() {
        let ring = FlightRecorder::new(4);
        let message = Envelope { peer: None, tag: 3 };
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..if cfg!(miri) { 50 } else { 5_000 } {
                        let mark = ring.begin(Activity::Send, 7, Some(message), Location::caller());
                        ring.end(mark, true);
                    }
                });
            }
            for _ in 0..200 {
                assert!(ring.entries().iter().all(|e| e.activity == Activity::Send && e.bytes == 7));
                assert!(ring.entries().iter().all(|e| (e.peer, e.tag) == (None, Some(3))));
            }
        });
        assert_eq!(ring.entries().len(), 4);
    }
}
