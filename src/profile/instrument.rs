//! What each group carries so that it can be watched: a flight recorder, and the sink of a profile.

use std::panic::Location;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use tracing::field;
use tracing::level_filters::LevelFilter;

use super::clock;
use super::diagnose::GroupRecord;
use super::events::{Event, Other, Span};
use super::flight::{Activity, Envelope, FlightRecorder, Mark};

/// The target of the spans that a `tracing` collector gets.
const TARGET: &str = "tch_distributed";

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
#[derive(Debug)]
pub(crate) struct Watch {
    mark: Mark,
    /// None where nobody profiles and no collector listens.
    seen: Option<Box<Seen>>,
}

/// What a profile and a collector get to know of a call.
#[derive(Debug)]
struct Seen {
    activity: Activity,
    bytes: usize,
    envelope: Option<Envelope>,
    from_ns: u64,
    seq: u64,
    span: tracing::Span,
}

/// Whether a `tracing` collector of the user's takes spans of single calls.
#[inline]
fn somebody_collects() -> bool {
    LevelFilter::current() >= LevelFilter::TRACE
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
        if !(self.is_profiling() | somebody_collects()) {
            return wait();
        }
        let _span = tracing::trace_span!(target: TARGET, "wait").entered();
        let from_ns = clock::now_ns();
        let result = wait();
        if self.is_profiling() {
            self.push(Span { from_ns, to_ns: clock::now_ns(), event: Event::Blocked });
        }
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

    /// A collective begins, after it was found valid.
    #[inline]
    pub(crate) fn begin(&self, activity: Activity, bytes: usize, site: &'static Location<'static>) -> Watch {
        self.watch(activity, bytes, None, site)
    }

    /// A message begins.
    pub(crate) fn begin_message(
        &self,
        activity: Activity,
        bytes: usize,
        envelope: Envelope,
        site: &'static Location<'static>,
    ) -> Watch {
        self.watch(activity, bytes, Some(envelope), site)
    }

    #[inline(always)]
    fn watch(
        &self,
        activity: Activity,
        bytes: usize,
        envelope: Option<Envelope>,
        site: &'static Location<'static>,
    ) -> Watch {
        let mark = self.flight.begin(activity, bytes, envelope, site);
        let watched = self.shared.is_profiling() | somebody_collects();
        Watch { mark, seen: if watched { Some(self.see(activity, bytes, envelope)) } else { None } }
    }

    #[cold]
    fn see(&self, activity: Activity, bytes: usize, envelope: Option<Envelope>) -> Box<Seen> {
        let seq = match activity.is_collective() {
            true => self.collectives.fetch_add(1, Ordering::Relaxed) as u64,
            false => 0,
        };
        let span = tracing::trace_span!(
            target: TARGET, "collective",
            activity = activity.name(), group = %self.name, seq, bytes, ok = field::Empty,
        );
        Box::new(Seen { activity, bytes, envelope, from_ns: clock::now_ns(), seq, span })
    }

    /// The call has ended.
    #[inline]
    pub(crate) fn end(&self, watch: Watch, ok: bool) {
        self.flight.end(watch.mark, ok);
        if let Some(seen) = watch.seen {
            self.seen(&seen, ok);
        }
    }

    #[cold]
    fn seen(&self, seen: &Seen, ok: bool) {
        let &Seen { activity, bytes, envelope, from_ns, seq, ref span } = seen;
        span.record("ok", ok);
        // Nothing moves within a group of one.
        if self.shared.is_profiling() && self.ranks.len() > 1 {
            let group = format!("{} {:?}", self.name, self.ranks);
            let rank = |peer: usize| self.ranks.get(peer).copied();
            let other = envelope.map(|e| Other { rank: e.peer.and_then(rank), tag: e.tag });
            let event = Event::Communication { activity, group, seq, bytes: bytes as u64, other };
            self.shared.push(Span { from_ns, to_ns: clock::now_ns(), event });
        }
    }

    /// What the flight recorder remembers.
    pub(crate) fn record(&self) -> GroupRecord {
        GroupRecord { name: self.name.clone(), ranks: self.ranks.clone(), entries: self.flight.entries() }
    }
}

/// What watching one event costs on this machine now, in nanoseconds: a call on an instrument of its own.
pub(crate) fn nanoseconds_per_event() -> f64 {
    const CALLS: usize = 256;
    let rank = Arc::<RankInstrument>::default();
    let group = GroupInstrument::new(&rank, "0", &[0, 1]);
    rank.set_profiling(true);
    // The first round warms up.
    let [_, time] = [(), ()].map(|()| {
        rank.take_spans();
        let start = std::time::Instant::now();
        for _ in 0..CALLS {
            let watch = group.begin(Activity::AllReduce, 0, Location::caller());
            rank.blocked(|| ());
            group.end(watch, true);
        }
        start.elapsed().as_nanos()
    });
    time as f64 / rank.take_spans().len().max(1) as f64
}
