//! Signals to a launcher while its ranks run.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use once_cell::sync::OnceCell;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};
use signal_hook::flag::register_conditional_default;
use signal_hook::iterator::{Handle, Signals};

/// What ends a launcher.
const ENDING: [i32; 4] = [SIGINT, SIGTERM, SIGHUP, SIGQUIT];

/// Those of them that this process was not told to ignore: `nohup` and shells' background jobs are.
fn ending() -> Vec<i32> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    ENDING.into_iter().filter(|signal| ignored & (1 << (signal - 1)) == 0).collect()
}

/// Whether no launcher listens: then these signals do what they do by default. And which signals.
static IDLE: OnceCell<(Arc<AtomicBool>, Vec<i32>)> = OnceCell::new();

/// Signals come to a closure while this lives.
pub(super) struct Listening {
    handle: Handle,
}

impl Listening {
    pub(super) fn start(on: impl Fn(i32) + Send + 'static) -> io::Result<Self> {
        // Found out once: with the first handler a signal is not ignored any more.
        let (idle, ending) = IDLE.get_or_try_init(|| {
            let (idle, ending) = (Arc::new(AtomicBool::new(true)), ending());
            for signal in &ending {
                register_conditional_default(*signal, idle.clone())?;
            }
            io::Result::Ok((idle, ending))
        })?;
        let mut signals = Signals::new(ending)?;
        let handle = signals.handle();
        thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for signal in signals.forever() {
                on(signal);
            }
        })?;
        idle.store(false, Ordering::SeqCst);
        Ok(Self { handle })
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        if let Some((idle, _)) = IDLE.get() {
            idle.store(true, Ordering::SeqCst);
        }
        self.handle.close();
    }
}

/// A signal as people know it.
pub(crate) fn name(signal: i32) -> String {
    signal_hook::low_level::signal_name(signal).map_or_else(|| format!("signal {signal}"), str::to_owned)
}

/// Ends this process as the signal would have.
pub(crate) fn die_of(signal: i32) -> ! {
    let _ = signal_hook::low_level::emulate_default_handler(signal);
    std::process::exit(128 + signal)
}
