//! What each group carries so that it can be watched: a flight recorder, and the sink of a profile.

use std::panic::Location;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;

use super::clock;
use super::diagnose::GroupRecord;
use super::events::{Event, Span};
use super::flight::{Activity, FlightRecorder, Mark};

/// What the groups of one rank share.
#[derive(Default)]
pub(crate) struct RankInstrument {
    profiling: AtomicBool,
    spans: Mutex<Vec<Span>>,
    groups: Mutex<Vec<Weak<GroupInstrument>>>,
}

/// What one group of one rank has.
pub(crate) struct GroupInstrument {
    shared: Arc<RankInstrument>,
    name: String,
    /// World ranks.
    ranks: Vec<usize>,
    flight: FlightRecorder,
    collectives: AtomicUsize,
}

/// A call being watched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Watch {
    mark: Mark,
    activity: Activity,
    bytes: usize,
    /// When and as which collective it began; `None` where nobody profiles.
    profiled: Option<(u64, u64)>,
}

impl RankInstrument {
    pub(crate) fn is_profiling(&self) -> bool {
        self.profiling.load(Ordering::Relaxed)
    }

    pub(crate) fn set_profiling(&self, on: bool) {
        self.profiling.store(on, Ordering::Relaxed);
    }

    /// Begins a profile; profiled collectives are numbered from 0 again, on every rank alike.
    pub(crate) fn start_profiling(&self) {
        self.groups
            .lock()
            .iter()
            .filter_map(Weak::upgrade)
            .for_each(|g| g.collectives.store(0, Ordering::Relaxed));
        self.set_profiling(true);
    }

    pub(crate) fn push(&self, span: Span) {
        self.spans.lock().push(span);
    }

    pub(crate) fn take_spans(&self) -> Vec<Span> {
        std::mem::take(&mut *self.spans.lock())
    }

    /// What the groups that still live remember.
    pub(crate) fn records(&self) -> Vec<GroupRecord> {
        let mut groups = self.groups.lock();
        groups.retain(|g| g.strong_count() > 0);
        groups.iter().filter_map(Weak::upgrade).map(|g| g.record()).collect()
    }

    /// Runs a wait; a profile counts it as time blocked by communication.
    #[inline]
    pub(crate) fn blocked<T>(&self, wait: impl FnOnce() -> T) -> T {
        if !self.is_profiling() {
            return wait();
        }
        let from_ns = clock::now_ns();
        let result = wait();
        self.push(Span { from_ns, to_ns: clock::now_ns(), event: Event::Blocked });
        result
    }
}

impl GroupInstrument {
    pub(crate) fn new(shared: &Arc<RankInstrument>, name: &str, ranks: &[usize]) -> Arc<Self> {
        let instrument = Arc::new(Self {
            shared: shared.clone(),
            name: name.to_owned(),
            ranks: ranks.to_vec(),
            flight: FlightRecorder::from_env(),
            collectives: AtomicUsize::new(0),
        });
        let mut groups = shared.groups.lock();
        groups.retain(|g| g.strong_count() > 0);
        groups.push(Arc::downgrade(&instrument));
        drop(groups);
        instrument
    }

    /// What the groups of this rank share.
    pub(crate) fn shared(&self) -> &Arc<RankInstrument> {
        &self.shared
    }

    /// A call begins, after it was found valid.
    #[inline]
    pub(crate) fn begin(&self, activity: Activity, bytes: usize, site: &'static Location<'static>) -> Watch {
        let mark = self.flight.begin(activity, bytes, site);
        let profiled = self.shared.is_profiling().then(|| {
            let seq =
                if activity.is_collective() { self.collectives.fetch_add(1, Ordering::Relaxed) } else { 0 };
            (clock::now_ns(), seq as u64)
        });
        Watch { mark, activity, bytes, profiled }
    }

    /// The call has ended.
    #[inline]
    pub(crate) fn end(&self, watch: Watch, ok: bool) {
        self.flight.end(watch.mark, ok);
        let Some((from_ns, seq)) = watch.profiled else { return };
        let event = Event::Communication {
            activity: watch.activity,
            group: format!("{} {:?}", self.name, self.ranks),
            seq,
            bytes: watch.bytes as u64,
        };
        let to_ns = clock::now_ns();
        tracing::trace!(
            target: "tch_distributed::collective",
            activity = watch.activity.name(), group = %self.name, seq, bytes = watch.bytes, ok,
            microseconds = (to_ns - from_ns) as f64 / 1e3,
        );
        self.shared.push(Span { from_ns, to_ns, event });
    }

    /// What the flight recorder remembers.
    pub(crate) fn record(&self) -> GroupRecord {
        GroupRecord { name: self.name.clone(), ranks: self.ranks.clone(), entries: self.flight.entries() }
    }
}
