//! Processes that belong together: they all end well, or all are ended.

use std::net::TcpListener;
use std::process::{Child, Command};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// How long they may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Processes; none survives this value.
#[derive(Default)]
pub(crate) struct Crew(Vec<Child>);

impl Crew {
    pub(crate) fn start(&mut self, command: &mut Command) -> Result<()> {
        let program = command.get_program().to_owned();
        self.0
            .push(command.spawn().with_context(|| format!("{} does not start", program.to_string_lossy()))?);
        Ok(())
    }

    /// Waits until all have ended; tells how long that took.
    pub(crate) fn wait(&mut self) -> Result<Duration> {
        let start = Instant::now();
        let mut left: Vec<usize> = (0..self.0.len()).collect();
        while !left.is_empty() {
            let mut failed = None;
            left.retain(|&number| match self.0[number].try_wait() {
                Ok(None) => true,
                Ok(Some(status)) if status.success() => false,
                Ok(Some(status)) => {
                    failed.get_or_insert(format!("process {number}: {status}"));
                    false
                }
                Err(error) => {
                    failed.get_or_insert(format!("process {number}: {error}"));
                    false
                }
            });
            if let Some(failed) = failed {
                // What the others say of it comes a moment later.
                thread::sleep(Duration::from_secs(3));
                bail!(failed);
            }
            ensure!(start.elapsed() < LIMIT, "processes {left:?} were not done after {LIMIT:?}");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(start.elapsed())
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// A port that nobody uses now.
pub(crate) fn free_port() -> Result<u16> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}
