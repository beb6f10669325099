//! What ranks print: every line with its rank, and the last lines kept.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

/// The longest piece that is printed as one line.
const LONGEST: u64 = 64 * 1024;

/// Where lines go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// The last lines that a rank printed.
#[derive(Clone, Debug)]
pub(crate) struct Tail {
    lines: Arc<Mutex<VecDeque<String>>>,
    length: usize,
}

impl Tail {
    pub(crate) fn new(length: usize) -> Self {
        Self { lines: Arc::default(), length }
    }

    fn push(&self, line: String) {
        let mut lines = self.lines.lock();
        if lines.len() == self.length {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    pub(crate) fn lines(&self) -> Vec<String> {
        self.lines.lock().iter().cloned().collect()
    }
}

/// Reads a rank's output to its end. Each line is printed, where that is wanted, in one piece with
/// its rank before it, so that lines of different ranks do not mix.
/// `writing` counts it while it hands a line on, which lasts as long as whoever reads that is slow.
pub(crate) fn pump(
    from: impl Read,
    rank: usize,
    tails: &[&Tail],
    print: Option<Stream>,
    writing: &AtomicUsize,
) {
    let mut from = BufReader::new(from);
    let mut line = Vec::new();
    loop {
        line.clear();
        match (&mut from).take(LONGEST).read_until(b'\n', &mut line) {
            Ok(0) => return,
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        }
        let text = line.strip_suffix(b"\n").unwrap_or(&line);
        for tail in tails {
            tail.push(String::from_utf8_lossy(text).into_owned());
        }
        if let Some(stream) = print {
            let mut whole = format!("[rank {rank}] ").into_bytes();
            whole.extend_from_slice(text);
            whole.push(b'\n');
            writing.fetch_add(1, Ordering::Relaxed);
            // Whoever closed our output does not want the rest.
            let _ = match stream {
                Stream::Stdout => io::stdout().lock().write_all(&whole),
                Stream::Stderr => io::stderr().lock().write_all(&whole),
            };
            writing.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
