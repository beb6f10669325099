//! The data of collectives: one stream to each peer, frames of a header and its payload.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::stream;
use super::wire::{self, HEAD};
use crate::backend::native::link::{Head, Lent, Links};
use crate::backend::native::memory::{self, Piece, Pieces};
use crate::backend::native::transport::Watch;
use crate::{Error, Result};

/// How many bytes of what comes next are read along with what is wanted.
const SPARE: usize = 16 << 10;

/// A message on its way out.
struct Out {
    head: [u8; HEAD],
    pieces: Pieces,
    /// Bytes in all, and bytes written.
    len: usize,
    done: usize,
}

/// One rank's end of the connection to one peer.
struct Line {
    fd: Arc<OwnedFd>,
    out: VecDeque<Out>,
    /// Messages of this run that have been written.
    sent: usize,
    /// Bytes that have been read and not used.
    spare: Box<[u8; SPARE]>,
    spare_start: usize,
    spare_end: usize,
    /// The header of the message that is being received.
    head: Option<Head>,
    /// Its payload is waited for.
    short: bool,
    /// The peer sends no more: why.
    ended: Option<io::ErrorKind>,
}

/// One rank's end of all its data connections.
pub(crate) struct SocketLinks {
    lines: Vec<Option<Line>>,
}

/// Sockets copy: nothing is lent.
pub(crate) enum Nothing {}

impl Lent for Nothing {
    fn hold(&self) -> Option<&[Piece]> {
        match *self {}
    }

    fn release(&self) {
        match *self {}
    }
}

impl SocketLinks {
    pub(super) fn new(sockets: Vec<Option<OwnedFd>>) -> Self {
        let line = |fd| Line {
            fd: Arc::new(fd),
            out: VecDeque::new(),
            sent: 0,
            spare: Box::new([0; SPARE]),
            spare_start: 0,
            spare_end: 0,
            head: None,
            short: false,
            ended: None,
        };
        Self { lines: sockets.into_iter().map(|s| s.map(line)).collect() }
    }

    fn line(&mut self, peer: usize) -> Result<&mut Line> {
        self.lines[peer].as_mut().ok_or(Error::Aborted)
    }

    /// What an idle run waits for.
    pub(super) fn watch(&self, set: &mut Vec<Watch>) {
        for line in self.lines.iter().flatten().filter(|l| l.ended.is_none()) {
            let (read, write) = (line.head.is_none() || line.short, !line.out.is_empty());
            if read || write {
                set.push(Watch { fd: line.fd.clone(), read, write });
            }
        }
    }
}

impl Line {
    fn lost(&mut self, peer: usize, error: io::Error) -> Error {
        self.ended = Some(error.kind());
        Error::PeerLost { rank: peer, op: String::new(), source: Some(error) }
    }

    /// Reads into the spare bytes, whose content has been used up to fewer than a header.
    fn fill(&mut self, peer: usize) -> Result<bool> {
        if let Some(kind) = self.ended {
            return Err(Error::PeerLost { rank: peer, op: String::new(), source: Some(kind.into()) });
        }
        self.spare.copy_within(self.spare_start..self.spare_end, 0);
        self.spare_end -= self.spare_start;
        self.spare_start = 0;
        // SAFETY: no pieces.
        match unsafe { stream::read(&self.fd, &[], 0, &mut self.spare[self.spare_end..]) } {
            Ok(None) => Ok(false),
            Ok(Some(0)) => Err(self.lost(peer, io::ErrorKind::UnexpectedEof.into())),
            Ok(Some(n)) => {
                self.spare_end += n;
                Ok(true)
            }
            Err(error) => Err(self.lost(peer, error)),
        }
    }
}

impl Links for SocketLinks {
    type Lent = Nothing;

    fn begin(&mut self) {
        for line in self.lines.iter_mut().flatten() {
            line.sent = 0;
        }
    }

    fn post(&mut self, to: usize, head: Head, pieces: Pieces) {
        let len = HEAD + memory::total(&pieces);
        if let Some(line) = &mut self.lines[to] {
            line.out.push_back(Out { head: wire::encode_head(&head), pieces, len, done: 0 });
        }
    }

    fn flush(&mut self, to: usize) -> Result<bool> {
        let line = self.line(to)?;
        let mut moved = false;
        while let Some(out) = line.out.front_mut() {
            // SAFETY: the pieces of a posted message stay as they are until `sent` has counted it.
            match unsafe { stream::write(&line.fd, &out.head, &out.pieces, out.done) } {
                Ok(None) => break,
                Ok(Some(n)) => {
                    moved = true;
                    let head = HEAD.saturating_sub(out.done);
                    let full = stream::fell_short(n, &out.pieces, out.done.saturating_sub(HEAD), head);
                    out.done += n;
                    if out.done == out.len {
                        line.out.pop_front();
                        line.sent += 1;
                    } else if full {
                        break;
                    }
                }
                Err(error) => return Err(line.lost(to, error)),
            }
        }
        Ok(moved)
    }

    fn sent(&mut self, to: usize) -> usize {
        self.lines[to].as_ref().map_or(0, |line| line.sent)
    }

    fn peek(&mut self, from: usize) -> Result<Option<Head>> {
        // From whom no line leads nothing comes.
        let Some(line) = &mut self.lines[from] else { return Ok(None) };
        if line.head.is_none() {
            while line.spare_end - line.spare_start < HEAD {
                if !line.fill(from)? {
                    return Ok(None);
                }
            }
            let bytes = &line.spare[line.spare_start..line.spare_start + HEAD];
            let head = wire::decode_head(bytes).ok_or_else(|| Error::PeerLost {
                rank: from,
                op: String::new(),
                source: Some(io::Error::new(io::ErrorKind::InvalidData, "it sent what is not a frame")),
            })?;
            line.spare_start += HEAD;
            line.head = Some(head);
        }
        Ok(line.head)
    }

    fn take(&mut self, _from: usize) -> Option<Nothing> {
        None
    }

    fn read(&mut self, from: usize, into: &[Piece], mut done: usize) -> Result<usize> {
        let line = self.line(from)?;
        let (len, before) = (memory::total(into), done);
        // What was read along with the header comes first.
        let ahead = (line.spare_end - line.spare_start).min(len - done);
        if ahead > 0 {
            let bytes = &line.spare[line.spare_start..line.spare_start + ahead];
            // SAFETY: `into` is the run's own memory, of which `done` bytes are filled; `ahead` fit.
            unsafe { wire::scatter(bytes, into, done) };
            line.spare_start += ahead;
            done += ahead;
        }
        while done < len {
            if let Some(kind) = line.ended {
                return Err(Error::PeerLost { rank: from, op: String::new(), source: Some(kind.into()) });
            }
            line.spare_start = 0;
            line.spare_end = 0;
            // Along with a long message only the next header: what follows it is not to be copied twice.
            let beside = if len - done > SPARE { HEAD } else { SPARE };
            // SAFETY: `into` is the run's own memory.
            match unsafe { stream::read(&line.fd, into, done, &mut line.spare[..beside]) } {
                Ok(None) => break,
                Ok(Some(0)) => return Err(line.lost(from, io::ErrorKind::UnexpectedEof.into())),
                Ok(Some(n)) => {
                    let empty = stream::fell_short(n, into, done, 0);
                    let wanted = n.min(len - done);
                    done += wanted;
                    line.spare_end = n - wanted;
                    if empty {
                        break;
                    }
                }
                Err(error) => return Err(line.lost(from, error)),
            }
        }
        line.short = done < len;
        if !line.short {
            line.head = None;
        }
        Ok(done - before)
    }

    fn withdraw(&mut self) {
        // What has been written of a frame cannot be taken back: no further run uses these lines.
        for line in self.lines.iter_mut().flatten() {
            line.out.clear();
            line.ended = Some(io::ErrorKind::ConnectionAborted);
        }
    }
}
