use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

use super::{Event, Line, READS};
use crate::backend::native::cause::Cause;
use crate::backend::native::tcp::messages::Messages;
use crate::backend::native::tcp::wire::{Note, encode_note};

/// Two ends between which every write is one read.
fn packets() -> (std::os::fd::OwnedFd, std::os::fd::OwnedFd) {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::NONBLOCK, None).unwrap()
}

#[test]
fn a_note_whose_end_comes_with_the_last_read_of_a_turn_is_heard_in_that_turn() {
    let note = Note::Failed(Cause::Lost { rank: 3, words: "it is gone, and so on".repeat(READS), after: 0 });
    let bytes = encode_note(&note);
    for reads in [1, READS - 1, READS] {
        let (near, far) = packets();
        let mut line = Line::new(1, near);
        for packet in bytes.chunks(bytes.len().div_ceil(reads)) {
            rustix::io::write(&far, packet).unwrap();
        }
        let mut events = Vec::new();
        line.read(&mut Messages::new(0, 2), &mut Vec::new(), &mut events);
        assert!(matches!(events[..], [Event::Note(Note::Failed(_))]), "in {reads} reads");
    }
}
