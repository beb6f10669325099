//! Point-to-point over sockets: the matching, without the sockets.
//!
//! A small message goes at once, as long as the receiver has not too many bytes of such messages
//! waiting (credit). Any other is offered first, and sent when its receive has been posted: so its data
//! goes straight into the receiver's buffer, and nothing is allocated for it.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::Result;
use crate::backend::native::cause::Cause;
use crate::backend::native::control::{Overdue, Stranded};
use crate::backend::native::p2p::{self, Pattern};
use crate::backend::{Buffer, Completion, Direction, Receipt, Transfer};

use super::wire::Note;

/// The longest message that goes at once.
const EAGER: usize = 4 << 10;
/// How many bytes of small messages a receiver keeps for a sender.
const CREDIT: usize = 64 << 10;

/// What a small message counts as: an empty one costs memory too.
fn cost(len: usize) -> usize {
    len.max(64)
}

/// One side of a message that this rank has posted.
pub(super) struct Posted {
    /// Whom it is from or to; `None` for a receive from any rank.
    peer: Option<usize>,
    pattern: Pattern,
    pub(super) buffer: Buffer<'static>,
    since: Instant,
    timeout: Duration,
    done: Completion,
}

impl Posted {
    fn deadline(&self) -> Option<Instant> {
        self.since.checked_add(self.timeout)
    }
}

/// A message that came before its receive was posted.
struct Arrival {
    from: usize,
    pattern: Pattern,
    content: Content,
}

enum Content {
    /// The sender has it.
    Offered(u64),
    /// It is here.
    Held(Vec<u8>),
    /// This rank sends it to itself.
    Own(Posted),
}

/// What the sockets have to do.
pub(super) enum Deed {
    /// Send a note, with these raw bytes behind it.
    Note(usize, Note, Vec<u8>),
    /// Stream a message that was granted.
    Stream(usize, u64),
    /// A message has ended.
    Ended(Completion, Result<Receipt>),
    /// The two sides of a message differ: the group has failed.
    Differ(Cause),
}

/// All messages of one rank in one group.
pub(super) struct Messages {
    rank: usize,
    next: u64,
    /// Receives without a message, in the order posted.
    recvs: VecDeque<Posted>,
    /// Messages without a receive, in the order in which they came.
    arrivals: VecDeque<Arrival>,
    /// Granted messages that come in, by sender and number, and how many bytes have come.
    pub(super) incoming: HashMap<(usize, u64), (Posted, usize)>,
    /// Offered messages of this rank, by number, and how many bytes have gone out.
    pub(super) outgoing: HashMap<u64, (Posted, usize)>,
    /// How many bytes may be sent at once to each peer.
    credit: Vec<usize>,
    /// How many bytes of small messages are kept from each peer.
    kept: Vec<usize>,
}

impl Messages {
    pub(super) fn new(rank: usize, world: usize) -> Self {
        Self {
            rank,
            next: 0,
            recvs: VecDeque::new(),
            arrivals: VecDeque::new(),
            incoming: HashMap::new(),
            outgoing: HashMap::new(),
            credit: vec![CREDIT; world],
            kept: vec![0; world],
        }
    }

    /// Posts one side of a message.
    pub(super) fn post(&mut self, transfer: Transfer, deeds: &mut Vec<Deed>) {
        let pattern = Pattern::of(&transfer);
        let peer = match transfer.direction {
            Direction::Send { dst } => Some(dst),
            Direction::Recv { src } => src,
        };
        let posted = Posted {
            peer,
            pattern,
            buffer: transfer.buffer,
            since: Instant::now(),
            timeout: transfer.timeout,
            done: transfer.done,
        };
        match transfer.direction {
            Direction::Send { dst } => self.post_send(dst, posted, deeds),
            Direction::Recv { .. } => self.post_recv(posted, deeds),
        }
    }

    fn post_send(&mut self, dst: usize, posted: Posted, deeds: &mut Vec<Deed>) {
        let Pattern { tag, kind, numel } = posted.pattern;
        if dst == self.rank {
            let arrival = Arrival { from: dst, pattern: posted.pattern, content: Content::Own(posted) };
            return self.arrive(arrival, deeds);
        }
        let len = posted.buffer.bytes();
        if len <= EAGER && cost(len) <= self.credit[dst] {
            self.credit[dst] -= cost(len);
            let mut bytes = vec![0; len];
            if len > 0 {
                // SAFETY: the buffer is a dense run of `len` bytes.
                unsafe { std::ptr::copy_nonoverlapping(posted.buffer.data_ptr(), bytes.as_mut_ptr(), len) };
            }
            deeds.push(Deed::Note(dst, Note::Eager { tag, kind, numel, len: len as u32 }, bytes));
            deeds.push(Deed::Ended(posted.done, Ok(Receipt::default())));
            return;
        }
        let id = self.next;
        self.next += 1;
        self.outgoing.insert(id, (posted, 0));
        deeds.push(Deed::Note(dst, Note::Offer { id, tag, kind, numel }, Vec::new()));
    }

    fn post_recv(&mut self, posted: Posted, deeds: &mut Vec<Deed>) {
        let fits = |a: &Arrival| {
            a.pattern.tag == posted.pattern.tag && posted.peer.is_none_or(|peer| peer == a.from)
        };
        match self.arrivals.iter().position(fits).and_then(|n| self.arrivals.remove(n)) {
            Some(arrival) => self.join(arrival, posted, deeds),
            None => self.recvs.push_back(posted),
        }
    }

    fn arrive(&mut self, arrival: Arrival, deeds: &mut Vec<Deed>) {
        let fits = |r: &Posted| {
            r.pattern.tag == arrival.pattern.tag && r.peer.is_none_or(|peer| peer == arrival.from)
        };
        match self.recvs.iter().position(fits).and_then(|n| self.recvs.remove(n)) {
            Some(recv) => self.join(arrival, recv, deeds),
            None => self.arrivals.push_back(arrival),
        }
    }

    /// A message and its receive have met.
    fn join(&mut self, arrival: Arrival, recv: Posted, deeds: &mut Vec<Deed>) {
        let from = arrival.from;
        let receipt = Receipt { source: Some(from) };
        if (arrival.pattern.kind, arrival.pattern.numel) != (recv.pattern.kind, recv.pattern.numel) {
            let cause = Cause::Disagree {
                op: "recv".to_owned(),
                seq: 0,
                by: (self.rank, recv.pattern.words(false, Some(from))),
                with: (from, arrival.pattern.words(true, Some(self.rank))),
            };
            deeds.push(Deed::Ended(recv.done, Err(cause.error(self.rank, None))));
            if let Content::Own(sent) = arrival.content {
                deeds.push(Deed::Ended(sent.done, Err(cause.error(self.rank, None))));
            }
            return deeds.push(Deed::Differ(cause));
        }
        match arrival.content {
            Content::Offered(id) => {
                deeds.push(Deed::Note(from, Note::Grant { id }, Vec::new()));
                self.incoming.insert((from, id), (recv, 0));
            }
            Content::Held(bytes) => {
                self.kept[from] -= cost(bytes.len());
                deeds.push(Deed::Note(from, Note::Credit { bytes: cost(bytes.len()) as u32 }, Vec::new()));
                if !bytes.is_empty() {
                    debug_assert_eq!(bytes.len(), recv.buffer.bytes());
                    // SAFETY: kind and number of elements agree, and `keep` has compared the bytes.
                    unsafe {
                        std::ptr::copy_nonoverlapping(bytes.as_ptr(), recv.buffer.data_ptr(), bytes.len());
                    }
                }
                deeds.push(Deed::Ended(recv.done, Ok(receipt)));
            }
            Content::Own(sent) => {
                p2p::copy(&sent.buffer, &recv.buffer);
                deeds.push(Deed::Ended(sent.done, Ok(Receipt::default())));
                deeds.push(Deed::Ended(recv.done, Ok(receipt)));
            }
        }
    }

    /// A peer offers a message.
    pub(super) fn offered(&mut self, from: usize, id: u64, pattern: Pattern, deeds: &mut Vec<Deed>) {
        self.arrive(Arrival { from, pattern, content: Content::Offered(id) }, deeds);
    }

    /// Whether a peer may send a small message of this length, of this pattern.
    pub(super) fn expects(&mut self, from: usize, pattern: &Pattern, len: usize) -> bool {
        let fits = p2p::bytes(pattern) == Some(len) && len <= EAGER;
        let room = self.kept[from] + cost(len) <= CREDIT;
        if fits && room {
            self.kept[from] += cost(len);
        }
        fits && room
    }

    /// A small message has come, which [`expects`](Self::expects) has let in.
    pub(super) fn keep(&mut self, from: usize, pattern: Pattern, bytes: Vec<u8>, deeds: &mut Vec<Deed>) {
        self.arrive(Arrival { from, pattern, content: Content::Held(bytes) }, deeds);
    }

    /// A peer may be sent more small messages.
    pub(super) fn credited(&mut self, from: usize, bytes: usize) {
        self.credit[from] = (self.credit[from] + bytes).min(CREDIT);
    }

    /// A peer wants the message that it was offered.
    pub(super) fn granted(&mut self, from: usize, id: u64, deeds: &mut Vec<Deed>) -> bool {
        let known = self.outgoing.get(&id).is_some_and(|(posted, _)| posted.peer == Some(from));
        if known {
            deeds.push(Deed::Stream(from, id));
        }
        known
    }

    /// Notes that `n` more bytes of a message have come.
    pub(super) fn came(&mut self, from: usize, id: u64, n: usize, deeds: &mut Vec<Deed>) {
        if let Some((posted, done)) = self.incoming.get_mut(&(from, id)) {
            *done += n;
            if *done >= posted.buffer.bytes()
                && let Some((posted, _)) = self.incoming.remove(&(from, id))
            {
                deeds.push(Deed::Ended(posted.done, Ok(Receipt { source: Some(from) })));
            }
        }
    }

    /// Notes that `n` more bytes of a message have gone out; whether there is more of it.
    pub(super) fn went(&mut self, id: u64, n: usize, deeds: &mut Vec<Deed>) -> bool {
        let Some((posted, done)) = self.outgoing.get_mut(&id) else { return false };
        *done += n;
        let more = *done < posted.buffer.bytes();
        if !more && let Some((posted, _)) = self.outgoing.remove(&id) {
            deeds.push(Deed::Ended(posted.done, Ok(Receipt::default())));
        }
        more
    }

    /// All that this rank has posted: whether it sends, and the peer, where it is known.
    fn posted(&self) -> impl Iterator<Item = (&Posted, bool, Option<usize>)> {
        let own = self.arrivals.iter().filter_map(|a| match &a.content {
            Content::Own(posted) => Some((posted, true, posted.peer)),
            _ => None,
        });
        let recvs = self.recvs.iter().map(|p| (p, false, p.peer));
        let incoming = self.incoming.iter().map(|((from, _), (p, _))| (p, false, Some(*from)));
        let outgoing = self.outgoing.values().map(|(p, _)| (p, true, p.peer));
        own.chain(recvs).chain(incoming).chain(outgoing)
    }

    pub(super) fn pending(&self) -> usize {
        let own = self.arrivals.iter().filter(|a| matches!(a.content, Content::Own(_))).count();
        self.recvs.len() + self.incoming.len() + self.outgoing.len() + own
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.posted().filter_map(|(p, ..)| p.deadline()).min()
    }

    pub(super) fn overdue(&self, now: Instant) -> Option<Overdue> {
        let late = |p: &Posted| p.deadline().is_some_and(|d| d <= now);
        self.posted().find(|(p, ..)| late(p)).map(|(p, send, peer)| Overdue {
            what: p.pattern.words(send, peer),
            elapsed: now.duration_since(p.since),
            peer,
        })
    }

    /// A message that waits for a peer that is gone; `nobody`: whom to name where any would do.
    pub(super) fn stranded(&self, gone: impl Fn(usize) -> bool, nobody: Option<usize>) -> Option<Stranded> {
        self.posted().find_map(|(p, send, peer)| {
            let absent = peer.map_or(nobody, |peer| gone(peer).then_some(peer))?;
            Some(Stranded { what: p.pattern.words(send, peer), peer: absent })
        })
    }

    /// Takes everything that this rank has posted.
    pub(super) fn drain(&mut self) -> Vec<Completion> {
        let arrivals = std::mem::take(&mut self.arrivals).into_iter().filter_map(|a| match a.content {
            Content::Own(posted) => Some(posted),
            _ => None,
        });
        let recvs = std::mem::take(&mut self.recvs);
        let incoming = std::mem::take(&mut self.incoming).into_values().map(|(p, _)| p);
        let outgoing = std::mem::take(&mut self.outgoing).into_values().map(|(p, _)| p);
        arrivals.chain(recvs).chain(incoming).chain(outgoing).map(|p| p.done).collect()
    }
}
