//! Runs the processes of several ranks to their common end.
//!
//! The first rank to fail ends the others. Each rank leads a process group of its own, so that what a
//! rank has started ends with it; none is reaped before all have ended, so that no number of a
//! process is another's by the time it is used.

use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};

use super::output::{Stream, Tail, pump};
use super::signals::{Listening, name};

/// How long other ranks may go on after one failed, to fail on their own account and say so.
const SETTLE: Duration = Duration::from_millis(300);
/// How long ranks have to end when asked to.
const GRACE: Duration = Duration::from_secs(5);
/// How long a dead rank's output may still come, and how often it is seen whether somebody reads it slowly.
const DRAIN: Duration = Duration::from_secs(1);
const GLANCE: Duration = Duration::from_millis(20);

/// One rank to run.
pub(crate) struct RankCommand {
    pub(crate) rank: usize,
    pub(crate) command: Command,
    /// Where the rank leaves its error.
    pub(crate) error_file: Option<PathBuf>,
}

/// How to run them.
pub(crate) struct Terms<'a> {
    /// The exit code of a rank that did what it should.
    pub(crate) success: i32,
    /// How long they may take together.
    pub(crate) limit: Option<Duration>,
    /// Print what they print (else only keep it).
    pub(crate) print: bool,
    /// How many lines of each rank to keep.
    pub(crate) keep: usize,
    /// End them on the signals that end this process.
    pub(crate) signals: bool,
    /// Asked every so often: a reason to end them.
    pub(crate) interrupted: &'a dyn Fn() -> Option<String>,
}

/// How one rank failed.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) rank: usize,
    pub(crate) status: ExitStatus,
    /// What the rank left, if it is one of ours.
    pub(crate) error: Option<String>,
    pub(crate) stderr: Vec<String>,
    /// Whether its words were kept: not where its stderr is the terminal.
    heard: bool,
}

/// How it all ended.
#[derive(Debug)]
pub(crate) enum End {
    Success,
    /// The rank that failed first, as far as can be told.
    Failed(Failure),
    /// This process got a signal.
    Signal(i32),
    /// The limit was over; these ranks had not ended.
    Limit(Vec<usize>),
    Interrupted(String),
}

/// The end, and what every rank printed last.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) end: End,
    pub(crate) printed: Vec<(usize, Vec<String>)>,
}

enum Event {
    Exited(usize),
    Closed,
    Signal(i32),
}

struct Running {
    rank: usize,
    child: Child,
    pid: Pid,
    exited: bool,
    error_file: Option<PathBuf>,
    all: Tail,
    stderr: Tail,
    /// Whether its stderr comes here.
    heard: bool,
}

impl Running {
    fn signal(&self, signal: Signal) {
        // Nobody left in the group is as good.
        let _ = kill_process_group(self.pid, signal);
    }
}

/// Kills whatever runs when it goes, by whatever way.
struct Crew(Vec<Running>);

impl Drop for Crew {
    fn drop(&mut self) {
        for rank in &mut self.0 {
            rank.signal(Signal::KILL);
            let _ = rank.child.wait();
        }
    }
}

/// Runs the ranks until all have ended.
pub(crate) fn supervise(ranks: Vec<RankCommand>, terms: &Terms<'_>) -> io::Result<Report> {
    let (send, events) = mpsc::channel();
    let _listening = if terms.signals {
        let send = send.clone();
        Some(Listening::start(move |signal| drop(send.send(Event::Signal(signal))))?)
    } else {
        None
    };
    let mut crew = Crew(Vec::new());
    let (mut open, writing) = (0, Arc::new(AtomicUsize::new(0)));
    for rank in ranks {
        let (running, pipes) = start(rank, terms, &send, &writing)?;
        crew.0.push(running);
        open += pipes;
    }
    let mut end = watch(&mut crew, terms, &events, &mut open);
    let success = matches!(end, Ending::Success);
    if !success {
        // What ranks have started and left behind.
        crew.0.iter().for_each(|rank| rank.signal(Signal::KILL));
    }
    let mut left = DRAIN;
    while open > 0 && !left.is_zero() {
        let from = Instant::now();
        match events.recv_timeout(left.min(GLANCE)) {
            Ok(Event::Closed) => open -= 1,
            Ok(Event::Signal(signal)) if success => {
                end = Ending::Signal(signal);
                break;
            }
            Ok(_) => {}
            // Whoever reads our output of ranks that did well may take the time for it. Else something that a rank has
            // left behind holds its output open.
            Err(_) if success && writing.load(Ordering::Relaxed) > 0 => {}
            Err(_) => left = left.saturating_sub(from.elapsed()),
        }
    }
    let end = match end {
        Ending::Success => End::Success,
        Ending::Signal(signal) => End::Signal(signal),
        Ending::Limit(ranks) => End::Limit(ranks),
        Ending::Interrupted(reason) => End::Interrupted(reason),
        Ending::Failed(order) => match first_cause(&mut crew, &order, terms.success) {
            Some(failure) => End::Failed(failure),
            None => End::Interrupted("a rank ended in a way that cannot be read".to_owned()),
        },
    };
    let printed = crew.0.iter().map(|rank| (rank.rank, rank.all.lines())).collect();
    Ok(Report { end, printed })
}

fn start(
    rank: RankCommand,
    terms: &Terms<'_>,
    send: &Sender<Event>,
    writing: &Arc<AtomicUsize>,
) -> io::Result<(Running, usize)> {
    let RankCommand { rank, mut command, error_file } = rank;
    // A progress bar of rank 0 wants the terminal itself.
    let terminal = terms.print && rank == 0 && rustix::termios::isatty(io::stderr());
    // From the background a rank cannot read a terminal.
    let stdin = rank == 0 && !rustix::termios::isatty(io::stdin());
    command
        .process_group(0)
        .stdin(if stdin { Stdio::inherit() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(if terminal { Stdio::inherit() } else { Stdio::piped() });
    let mut child = command.spawn().map_err(|e| {
        io::Error::new(e.kind(), format!("cannot start {}: {e}", command.get_program().to_string_lossy()))
    })?;
    let pid = Pid::from_child(&child);
    let (all, stderr) = (Tail::new(terms.keep), Tail::new(20));
    let mut pipes = 0;
    if let Some(pipe) = child.stdout.take() {
        pipes += 1;
        let print = terms.print.then_some(Stream::Stdout);
        let (send, all, writing) = (send.clone(), all.clone(), writing.clone());
        thread::spawn(move || {
            pump(pipe, rank, &[&all], print, &writing);
            let _ = send.send(Event::Closed);
        });
    }
    if let Some(pipe) = child.stderr.take() {
        pipes += 1;
        let print = terms.print.then_some(Stream::Stderr);
        let (send, all, stderr, writing) = (send.clone(), all.clone(), stderr.clone(), writing.clone());
        thread::spawn(move || {
            pump(pipe, rank, &[&all, &stderr], print, &writing);
            let _ = send.send(Event::Closed);
        });
    }
    let send = send.clone();
    thread::spawn(move || {
        // Leaves the process to be reaped later.
        while let Err(rustix::io::Errno::INTR) =
            waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT)
        {}
        let _ = send.send(Event::Exited(rank));
    });
    Ok((Running { rank, child, pid, exited: false, error_file, all, stderr, heard: !terminal }, pipes))
}

/// How it ends, before it is known why a rank failed.
enum Ending {
    Success,
    /// The ranks that had failed before others were ended, in order.
    Failed(Vec<usize>),
    Signal(i32),
    Limit(Vec<usize>),
    Interrupted(String),
}

fn watch(crew: &mut Crew, terms: &Terms<'_>, events: &Receiver<Event>, open: &mut usize) -> Ending {
    let started = Instant::now();
    let mut ending: Option<Ending> = None;
    // When to ask the ranks to end, and when to kill them.
    let (mut ask, mut kill): (Option<Instant>, Option<Instant>) = (None, None);
    let mut asked = Signal::TERM;
    loop {
        if crew.0.iter().all(|rank| rank.exited) {
            return ending.unwrap_or(Ending::Success);
        }
        match events.recv_timeout(Duration::from_millis(50)) {
            Ok(Event::Closed) => *open -= 1,
            Ok(Event::Exited(rank)) => {
                let failed = crew.0.iter_mut().find(|r| r.rank == rank).is_some_and(|running| {
                    running.exited = true;
                    !succeeded(running.pid, terms.success)
                });
                match &mut ending {
                    None if failed => {
                        ending = Some(Ending::Failed(vec![rank]));
                        ask = Some(Instant::now() + SETTLE);
                    }
                    Some(Ending::Failed(order)) if failed && ask.is_some() => order.push(rank),
                    _ => {}
                }
            }
            Ok(Event::Signal(signal)) => {
                if matches!(ending, Some(Ending::Signal(_))) {
                    kill = Some(Instant::now()); // the user insists
                } else {
                    asked = Signal::from_named_raw(signal).unwrap_or(Signal::TERM);
                    ending = Some(Ending::Signal(signal));
                    ask = Some(Instant::now());
                }
            }
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
        }
        let now = Instant::now();
        if ending.is_none() && terms.limit.is_some_and(|limit| now - started > limit) {
            ending = Some(Ending::Limit(crew.0.iter().filter(|r| !r.exited).map(|r| r.rank).collect()));
            kill = Some(now);
        }
        if ending.is_none()
            && let Some(reason) = (terms.interrupted)()
        {
            ending = Some(Ending::Interrupted(reason));
            ask = Some(now);
        }
        if ask.is_some_and(|at| now >= at) {
            ask = None;
            kill = Some(now + GRACE);
            crew.0.iter().filter(|rank| !rank.exited).for_each(|rank| rank.signal(asked));
        }
        if kill.is_some_and(|at| now >= at) {
            kill = Some(now + GRACE);
            crew.0.iter().for_each(|rank| rank.signal(Signal::KILL));
        }
    }
}

/// Whether a process that has ended did so well. It stays to be reaped.
fn succeeded(pid: Pid, code: i32) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
    matches!(waitid(WaitId::Pid(pid), options), Ok(Some(status)) if status.exit_status() == Some(code))
}

/// Of the ranks that failed about together, the one that did not fail because of another.
fn first_cause(crew: &mut Crew, order: &[usize], success: i32) -> Option<Failure> {
    let mut failures = Vec::new();
    for &rank in order {
        let running = crew.0.iter_mut().find(|running| running.rank == rank)?;
        let status = running.child.wait().ok()?;
        if status.code() == Some(success) {
            continue;
        }
        let error = running.error_file.as_ref().and_then(|file| std::fs::read_to_string(file).ok());
        // It is empty where a rank came to its body and left no error.
        let error = error.filter(|text| !text.is_empty());
        let heard = running.heard || error.is_some();
        failures.push(Failure { rank, status, error, stderr: running.stderr.lines(), heard });
    }
    let first = likeliest(&failures)?;
    Some(failures.swap_remove(first))
}

/// The first that did not fail because of another; before that one whose words nobody kept comes any who has a cause of
/// its own.
fn likeliest(failures: &[Failure]) -> Option<usize> {
    (0..failures.len()).min_by_key(|&index| {
        let failure = &failures[index];
        match (blames_another(failure), failure.heard || failure.status.signal().is_some()) {
            (false, true) => 0,
            (false, false) => 1,
            (true, _) => 2,
        }
    })
}

/// Whether a rank failed because another one was lost or left, as far as its words tell.
fn blames_another(failure: &Failure) -> bool {
    const WORDS: [&str; 5] = [
        "PeerLost",
        "Poisoned",
        "was lost during",
        "failed before and cannot be used",
        "nothing (it left the group after",
    ];
    if failure.status.signal().is_some() {
        return false;
    }
    let blames = |text: &str| WORDS.iter().any(|word| text.contains(word));
    match &failure.error {
        Some(error) => blames(error),
        None => failure.stderr.iter().any(|line| blames(line)),
    }
}

/// An exit status as people read it.
pub(crate) fn describe(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(9)) => "SIGKILL (often the kernel, which was out of memory)".to_owned(),
        (None, Some(signal)) => name(signal),
        (None, None) => "an unknown status".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(rank: usize, wait_status: i32, words: &str, heard: bool) -> Failure {
        let status = ExitStatus::from_raw(wait_status);
        Failure { rank, status, error: None, stderr: vec![words.to_owned()], heard }
    }

    #[test]
    fn a_rank_whose_words_went_to_the_terminal_is_the_cause_only_where_nobody_else_has_one_of_its_own() {
        let exit = 1 << 8;
        let unheard = || failure(0, exit, "", false);
        let blames = || failure(1, exit, "Error: PeerLost { rank: 2 }", true);
        let own = || failure(2, exit, "no such file", true);
        let cause = |failures: &[Failure]| likeliest(failures).map(|index| failures[index].rank);
        assert_eq!(cause(&[unheard(), blames(), own()]), Some(2));
        assert_eq!(cause(&[blames(), unheard()]), Some(0));
        assert_eq!(cause(&[failure(0, 9, "", false), own()]), Some(0), "a signal needs no words");
        assert_eq!(cause(&[blames()]), Some(1));
        assert_eq!(cause(&[]), None);
    }
}
