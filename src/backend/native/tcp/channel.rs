//! One control connection: notes in and out, with the data of messages between them.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::messages::{Deed, Messages};
use super::stream;
use super::wire::{self, LONGEST, Note};
use crate::backend::native::memory::Piece;
use crate::backend::native::p2p::Pattern;

#[cfg(test)]
mod tests;

/// How often a line is read before the others have their turn.
const READS: usize = 32;
/// How many bytes of a message go between two notes.
const CHUNK: usize = 256 << 10;

/// One end of a control connection.
pub(super) struct Line {
    peer: usize,
    pub(super) fd: Arc<OwnedFd>,
    notes: VecDeque<Vec<u8>>,
    /// Granted messages to this peer.
    streams: VecDeque<u64>,
    current: Option<Out>,
    /// Bytes that have been read and not used: a note and its length fit.
    buffer: Box<[u8]>,
    start: usize,
    end: usize,
    payload: Payload,
    /// The peer sends no more.
    pub(super) ended: bool,
}

/// What is being written: a note, and a part of a message.
struct Out {
    head: Vec<u8>,
    body: Option<Piece>,
    /// The message's number.
    id: u64,
    done: usize,
}

impl Out {
    fn body_len(&self) -> usize {
        self.body.map_or(0, |p| p.len)
    }
}

/// The raw bytes that come after a note.
enum Payload {
    None,
    /// A part of a granted message.
    Data {
        id: u64,
        left: usize,
    },
    /// A small message.
    Eager {
        pattern: Pattern,
        bytes: Vec<u8>,
        done: usize,
    },
    /// Of a message that has been given up.
    Discard {
        left: usize,
    },
}

/// What came.
pub(super) enum Event {
    /// A note for the control channel itself.
    Note(Note),
    /// The peer sends no more: why.
    Ended(String),
}

impl Line {
    pub(super) fn new(peer: usize, fd: OwnedFd) -> Self {
        Self {
            peer,
            fd: Arc::new(fd),
            notes: VecDeque::new(),
            streams: VecDeque::new(),
            current: None,
            buffer: vec![0; LONGEST + 4].into_boxed_slice(),
            start: 0,
            end: 0,
            payload: Payload::None,
            ended: false,
        }
    }

    pub(super) fn send(&mut self, note: &Note, raw: &[u8]) {
        if !self.ended {
            let mut bytes = wire::encode_note(note);
            bytes.extend_from_slice(raw);
            self.notes.push_back(bytes);
        }
    }

    pub(super) fn stream(&mut self, id: u64) {
        self.streams.push_back(id);
    }

    /// Whether something waits to be written.
    pub(super) fn busy(&self) -> bool {
        !self.ended && (self.current.is_some() || !self.notes.is_empty() || !self.streams.is_empty())
    }

    /// Writes what can be written: notes first, then messages, a chunk at a time.
    pub(super) fn flush(&mut self, messages: &mut Messages, deeds: &mut Vec<Deed>) {
        while !self.ended {
            if self.current.is_none() {
                self.current = self.next(messages);
            }
            let Some(out) = &mut self.current else { return };
            let body = out.body.as_slice();
            // SAFETY: a message's buffer lives until it has ended or `give_up` was called.
            match unsafe { stream::write(&self.fd, &out.head, body, out.done) } {
                Ok(None) => return,
                Ok(Some(n)) => {
                    out.done += n;
                    if out.done < out.head.len() + out.body_len() {
                        continue;
                    }
                    let (id, n, data) = (out.id, out.body_len(), out.body.is_some());
                    self.current = None;
                    if data && messages.went(id, n, deeds) {
                        self.streams.push_back(id);
                    }
                }
                // Reading tells why, after what the peer said last.
                Err(_) => {
                    self.notes.clear();
                    self.streams.clear();
                    self.current = None;
                    return;
                }
            }
        }
    }

    fn next(&mut self, messages: &Messages) -> Option<Out> {
        if let Some(head) = self.notes.pop_front() {
            return Some(Out { head, body: None, id: 0, done: 0 });
        }
        loop {
            let id = self.streams.pop_front()?;
            let Some((posted, done)) = messages.outgoing.get(&id) else { continue };
            let len = (posted.buffer.bytes() - done).min(CHUNK);
            let piece = Piece { ptr: posted.buffer.data_ptr().wrapping_add(*done), len };
            let head = wire::encode_note(&Note::Data { id, len: len as u32 });
            return Some(Out { head, body: Some(piece), id, done: 0 });
        }
    }

    /// Messages are given up: from here on their buffers are not touched. What has been begun is
    /// finished from a copy, so that the notes after it can be read.
    pub(super) fn give_up(&mut self) {
        self.streams.clear();
        if let Some(out) = &mut self.current
            && let Some(piece) = out.body.take().filter(|piece| piece.len > 0)
        {
            // SAFETY: the buffer still lives; it is let go of after this.
            out.head.extend_from_slice(unsafe { std::slice::from_raw_parts(piece.ptr, piece.len) });
        }
        if let Payload::Data { left, .. } = self.payload {
            self.payload = Payload::Discard { left };
        }
    }

    /// Reads what has come, or much of it: the rest finds the descriptor still ready.
    pub(super) fn read(&mut self, messages: &mut Messages, deeds: &mut Vec<Deed>, events: &mut Vec<Event>) {
        for _ in 0..READS {
            if self.ended {
                return;
            }
            // What has been read is used up at once: a descriptor does not become ready for it again.
            let more = match self.fill(messages, deeds) {
                Ok(true) => self.digest(messages, deeds, events).map(|()| true),
                other => other,
            };
            match more {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    self.ended = true;
                    let words = match error.kind() {
                        io::ErrorKind::UnexpectedEof => "its connection was closed".to_owned(),
                        _ => error.to_string(),
                    };
                    events.push(Event::Ended(words));
                }
            }
        }
    }

    /// Uses up the bytes that have been read, as far as they make something whole.
    fn digest(
        &mut self,
        messages: &mut Messages,
        deeds: &mut Vec<Deed>,
        events: &mut Vec<Event>,
    ) -> io::Result<()> {
        loop {
            self.take_payload(messages, deeds);
            if !matches!(self.payload, Payload::None) {
                return Ok(());
            }
            let here = &self.buffer[self.start..self.end];
            let Some((len, rest)) = here.split_first_chunk::<4>() else { return Ok(()) };
            let len = u32::from_le_bytes(*len) as usize;
            if len > LONGEST {
                return Err(garbage());
            }
            let Some(body) = rest.get(..len) else { return Ok(()) };
            let note: Note = postcard::from_bytes(body).map_err(|_| garbage())?;
            self.start += 4 + len;
            self.handle(note, messages, deeds, events)?;
        }
    }

    fn handle(
        &mut self,
        note: Note,
        messages: &mut Messages,
        deeds: &mut Vec<Deed>,
        events: &mut Vec<Event>,
    ) -> io::Result<()> {
        match note {
            Note::Offer { id, tag, kind, numel } => {
                messages.offered(self.peer, id, Pattern { tag, kind, numel }, deeds);
            }
            Note::Grant { id } => {
                // One that was given up may be granted late.
                messages.granted(self.peer, id, deeds);
            }
            Note::Data { id, len } => {
                let left = len as usize;
                let room = messages.incoming.get(&(self.peer, id)).map(|(p, done)| p.buffer.bytes() - done);
                self.payload = match room {
                    Some(room) if left <= room => Payload::Data { id, left },
                    Some(_) => return Err(garbage()),
                    None => Payload::Discard { left },
                };
                if left == 0 {
                    messages.came(self.peer, id, 0, deeds);
                    self.payload = Payload::None;
                }
            }
            Note::Eager { tag, kind, numel, len } => {
                let pattern = Pattern { tag, kind, numel };
                if !messages.expects(self.peer, &pattern, len as usize) {
                    return Err(garbage());
                }
                self.payload = Payload::Eager { pattern, bytes: vec![0; len as usize], done: 0 };
            }
            Note::Credit { bytes } => messages.credited(self.peer, bytes as usize),
            other => events.push(Event::Note(other)),
        }
        Ok(())
    }

    /// Moves bytes that have been read to where the payload goes.
    fn take_payload(&mut self, messages: &mut Messages, deeds: &mut Vec<Deed>) {
        let here = self.end - self.start;
        match &mut self.payload {
            Payload::None => {}
            Payload::Data { id, left } => {
                let n = here.min(*left);
                if let Some((posted, done)) = messages.incoming.get(&(self.peer, *id)) {
                    let into = Piece { ptr: posted.buffer.data_ptr(), len: posted.buffer.bytes() };
                    let bytes = &self.buffer[self.start..self.start + n];
                    // SAFETY: `handle` has compared the length with what is left of the buffer.
                    unsafe { wire::scatter(bytes, &[into], *done) };
                }
                self.start += n;
                self.arrived(n, messages, deeds);
            }
            Payload::Eager { bytes, done, .. } => {
                let n = here.min(bytes.len() - *done);
                bytes[*done..*done + n].copy_from_slice(&self.buffer[self.start..self.start + n]);
                self.start += n;
                self.arrived(n, messages, deeds);
            }
            Payload::Discard { left } => {
                let n = here.min(*left);
                self.start += n;
                self.arrived(n, messages, deeds);
            }
        }
    }

    /// Notes that `n` bytes of the payload are where they go.
    fn arrived(&mut self, n: usize, messages: &mut Messages, deeds: &mut Vec<Deed>) {
        match &mut self.payload {
            Payload::None => {}
            Payload::Data { id, left } => {
                *left -= n;
                let (id, left) = (*id, *left);
                if left == 0 {
                    self.payload = Payload::None;
                }
                messages.came(self.peer, id, n, deeds);
            }
            Payload::Eager { pattern, bytes, done } => {
                *done += n;
                if *done == bytes.len() {
                    let (pattern, bytes) = (*pattern, std::mem::take(bytes));
                    self.payload = Payload::None;
                    messages.keep(self.peer, pattern, bytes, deeds);
                }
            }
            Payload::Discard { left } => {
                *left -= n;
                if *left == 0 {
                    self.payload = Payload::None;
                }
            }
        }
    }

    /// Reads more: false when nothing has come.
    fn fill(&mut self, messages: &mut Messages, deeds: &mut Vec<Deed>) -> io::Result<bool> {
        self.buffer.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        // A message's data goes straight to its buffer; all that was read before has been used.
        let mut into = Piece { ptr: std::ptr::null_mut(), len: 0 };
        if let Payload::Data { id, left } = self.payload
            && let Some((posted, done)) = messages.incoming.get(&(self.peer, id))
        {
            into = Piece { ptr: posted.buffer.data_ptr().wrapping_add(*done), len: left };
        }
        let direct = into.len;
        let pieces = if direct > 0 { std::slice::from_ref(&into) } else { &[] };
        // SAFETY: `left` bytes of the buffer are free from `done` on.
        let read = unsafe { stream::read(&self.fd, pieces, 0, &mut self.buffer[self.end..]) }?;
        match read {
            None => Ok(false),
            Some(0) => Err(io::ErrorKind::UnexpectedEof.into()),
            Some(n) => {
                let straight = n.min(direct);
                self.end += n - straight;
                if straight > 0 {
                    self.arrived(straight, messages, deeds);
                }
                Ok(true)
            }
        }
    }
}

fn garbage() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it sent what is not a note")
}
