//! A progress bar on the terminal of whoever started the ranks.
//!
//! A rank's own output is a pipe, on which a launcher puts the rank before every line. So rank 0 draws on the
//! terminal itself, where the launcher had one.

use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::sync::Mutex;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

pub(crate) struct Progress(ProgressBar);

impl Progress {
    pub(crate) fn new(steps: usize, visible: bool) -> Self {
        let target = match visible.then(terminal).flatten() {
            Some(file) => ProgressDrawTarget::term_like_with_hz(Box::new(Terminal(Mutex::new(file))), 10),
            None => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(steps as u64), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} steps, {eta} left") {
            bar.set_style(style);
        }
        Self(bar)
    }

    pub(crate) fn step(&self) {
        self.0.inc(1);
    }

    /// A line above the bar, or just a line where there is none.
    pub(crate) fn say(&self, line: &str) {
        match self.0.is_hidden() {
            true => println!("{line}"),
            false => self.0.println(line),
        }
    }

    pub(crate) fn end(&self) {
        self.0.finish_and_clear();
    }
}

/// Where errors go, here or in the process that started this one, if that is a terminal.
fn terminal() -> Option<File> {
    let launcher = std::os::unix::process::parent_id();
    let places = ["/proc/self/fd/2".to_owned(), format!("/proc/{launcher}/fd/2")];
    places.iter().filter_map(|place| File::options().write(true).open(place).ok()).find(File::is_terminal)
}

/// A terminal by its file: the few movements that a bar of one line needs.
#[derive(Debug)]
struct Terminal(Mutex<File>);

impl Terminal {
    fn write(&self, text: &str) -> io::Result<()> {
        let mut file = self.0.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        file.write_all(text.as_bytes())
    }
}

impl TermLike for Terminal {
    fn width(&self) -> u16 {
        80
    }

    fn move_cursor_up(&self, lines: usize) -> io::Result<()> {
        if lines > 0 { self.write(&format!("\x1b[{lines}A")) } else { Ok(()) }
    }

    fn move_cursor_down(&self, lines: usize) -> io::Result<()> {
        if lines > 0 { self.write(&format!("\x1b[{lines}B")) } else { Ok(()) }
    }

    fn move_cursor_right(&self, columns: usize) -> io::Result<()> {
        if columns > 0 { self.write(&format!("\x1b[{columns}C")) } else { Ok(()) }
    }

    fn move_cursor_left(&self, columns: usize) -> io::Result<()> {
        if columns > 0 { self.write(&format!("\x1b[{columns}D")) } else { Ok(()) }
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        self.write(&format!("{text}\r\n"))
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        self.write(text)
    }

    fn clear_line(&self) -> io::Result<()> {
        self.write("\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}
