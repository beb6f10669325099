//! Bytes on the wire; the README has the pictures. All numbers are little-endian.

use serde::{Deserialize, Serialize};

use crate::backend::native::cause::Cause;
use crate::backend::native::ledger::Report;
use crate::backend::native::link::Head;
use crate::backend::native::memory::Piece;

/// The length of the header of a data frame.
pub(super) const HEAD: usize = 48;
const DATA: u32 = u32::from_le_bytes(*b"td01");

/// Magic (4), index (4), number (8), fingerprint (16), length (8), factor (8).
pub(super) fn encode_head(head: &Head) -> [u8; HEAD] {
    let mut bytes = [0; HEAD];
    bytes[..4].copy_from_slice(&DATA.to_le_bytes());
    bytes[4..8].copy_from_slice(&head.index.to_le_bytes());
    bytes[8..16].copy_from_slice(&head.seq.to_le_bytes());
    bytes[16..32].copy_from_slice(&head.fingerprint.to_le_bytes());
    bytes[32..40].copy_from_slice(&head.len.to_le_bytes());
    bytes[40..].copy_from_slice(&head.factor.to_le_bytes());
    bytes
}

/// The header, if these bytes are one.
pub(super) fn decode_head(bytes: &[u8]) -> Option<Head> {
    let word = |at: usize| -> Option<[u8; 8]> { bytes.get(at..at + 8)?.try_into().ok() };
    let half = |at: usize| -> Option<[u8; 4]> { bytes.get(at..at + 4)?.try_into().ok() };
    if u32::from_le_bytes(half(0)?) != DATA {
        return None;
    }
    Some(Head {
        index: u32::from_le_bytes(half(4)?),
        seq: u64::from_le_bytes(word(8)?),
        fingerprint: u128::from_le_bytes(bytes.get(16..32)?.try_into().ok()?),
        len: u64::from_le_bytes(word(32)?),
        factor: f64::from_le_bytes(word(40)?),
    })
}

/// Copies `bytes` into `pieces`, from byte `at` on.
///
/// # Safety
/// The pieces can be written from byte `at` on, for as many bytes, and nobody else touches them.
pub(super) unsafe fn scatter(mut bytes: &[u8], pieces: &[Piece], mut at: usize) {
    for piece in pieces {
        if at >= piece.len {
            at -= piece.len;
            continue;
        }
        let n = (piece.len - at).min(bytes.len());
        // SAFETY: the caller's promise; `n` bytes are left in the piece from `at` on.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), piece.ptr.wrapping_add(at), n) };
        bytes = &bytes[n..];
        at = 0;
        if bytes.is_empty() {
            return;
        }
    }
}

/// What goes over a control connection: a length (4) and this, in postcard's format; after `Data` and
/// `Eager` come as many raw bytes as they say.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) enum Note {
    /// How far are you, and what did you call at this number?
    Ask { seq: u64 },
    /// As far as this.
    Answer { seq: u64, report: Report },
    /// The group has failed.
    Failed(Cause),
    /// I make no more calls; I made this many.
    Left { calls: u64 },
    /// I close the group without a shutdown, having completed this many calls.
    Closed { completed: u64 },
    /// I have a message for you.
    Offer { id: u64, tag: u32, kind: u8, numel: u64 },
    /// Send the message that you offered.
    Grant { id: u64 },
    /// A part of a granted message.
    Data { id: u64, len: u32 },
    /// A small message, at once.
    Eager { tag: u32, kind: u8, numel: u64, len: u32 },
    /// This many bytes of small messages have been taken.
    Credit { bytes: u32 },
    /// A granted message comes as this stream, not through the socket.
    Stream { id: u64, stream: u64 },
}

/// The longest note that is believed.
pub(super) const LONGEST: usize = 64 << 10;

/// A note as it goes over the wire. One that is too long (a cause with a very long text) is cut.
pub(super) fn encode_note(note: &Note) -> Vec<u8> {
    let encode = |note: &Note| postcard::to_stdvec(note).unwrap_or_default();
    let body = match (encode(note), note) {
        (body, Note::Failed(cause)) if body.len() > LONGEST => encode(&Note::Failed(cause.shortened())),
        (body, _) => body,
    };
    let mut bytes = (body.len() as u32).to_le_bytes().to_vec();
    bytes.extend(body);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_that_is_too_long_to_tell_keeps_its_rank() {
        let long = "é".repeat(LONGEST);
        let call = |rank| Some(1 << 120 | if rank == 3 { 6 } else { 8 });
        let causes = [
            Cause::Lost { rank: 3, words: long.clone(), after: 0 },
            Cause::Disagree { op: "recv".into(), seq: 2, by: (1, long.clone()), with: (3, long) },
            Cause::Desync { seq: 2, calls: (0..5000).map(call).collect(), gone: vec![] },
        ];
        for cause in causes {
            assert!(postcard::to_stdvec(&cause).unwrap().len() > LONGEST, "it is too long");
            let bytes = encode_note(&Note::Failed(cause));
            assert!(bytes.len() <= LONGEST + 4);
            let Ok(Note::Failed(told)) = postcard::from_bytes(&bytes[4..]) else { panic!("it is no note") };
            match told.error(7, None) {
                crate::Error::PeerLost { rank: 3, source: Some(words), .. } => {
                    assert!(words.to_string().starts_with("éé"));
                }
                crate::Error::Desync { rank: 3, theirs, .. } => assert!(!theirs.is_empty()),
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn a_header_reads_as_it_was_written_and_garbage_does_not() {
        let head = Head { seq: 7, fingerprint: 1 << 100 | 5, index: 3, len: 1 << 40, factor: 0.25 };
        let bytes = encode_head(&head);
        assert_eq!(decode_head(&bytes), Some(head));
        assert_eq!(decode_head(&[0; HEAD]), None);
        assert_eq!(decode_head(&bytes[..HEAD - 1]), None);
    }

    #[test]
    fn a_note_reads_as_it_was_written_and_no_garbage_does_harm() {
        let calls = vec![Some(1 << 90), None];
        let note = Note::Failed(Cause::Desync { seq: 3, calls, gone: vec![(1, 2)] });
        let bytes = encode_note(&note);
        assert_eq!(bytes[..4], (bytes.len() as u32 - 4).to_le_bytes());
        assert!(matches!(postcard::from_bytes(&bytes[4..]), Ok(Note::Failed(Cause::Desync { seq: 3, .. }))));
        // Cut short, and with any one byte changed, it is another note or none.
        for at in 4..bytes.len() {
            assert!(postcard::from_bytes::<Note>(&bytes[4..at]).is_err());
            for byte in [0, 1, 0x7f, 0xff] {
                let mut damaged = bytes[4..].to_vec();
                damaged[at - 4] = byte;
                let _ = postcard::from_bytes::<Note>(&damaged);
            }
        }
    }

    #[test]
    fn bytes_are_scattered_over_pieces_from_any_place_on() {
        let bytes: Vec<u8> = (1..=6).collect();
        for at in 0..=3 {
            let (mut a, mut b, mut c) = ([0u8; 2], [0u8; 3], [0u8; 4]);
            let pieces = [&mut a[..], &mut b[..], &mut c[..]]
                .map(|memory| Piece { ptr: memory.as_mut_ptr(), len: memory.len() });
            // SAFETY: 9 bytes, of which 6 are written from byte `at` on.
            unsafe { scatter(&bytes, &pieces, at) };
            let mut expected = [0; 9];
            expected[at..at + 6].copy_from_slice(&bytes);
            assert_eq!([&a[..], &b[..], &c[..]].concat(), expected);
        }
    }
}
