//! The `tracing` spans that a collector of the user's own gets, profile or not.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::{Arc, Mutex};

use tch::{Device, Kind, Reduction, Tensor, nn};
use tch_distributed::model_parallel::pipeline::{Pipeline, Schedule, Stage};
use tch_distributed::profile::{ProfileOptions, Profiler};
use tch_distributed::{ReduceOp, testing};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// One span as the collector saw it.
#[derive(Clone, Debug, Default)]
struct Seen {
    name: &'static str,
    fields: BTreeMap<&'static str, String>,
    /// The span it was made in.
    parent: Option<usize>,
    closed: bool,
}

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name(), value.to_owned());
    }
}

/// Keeps every span, and which of them is entered.
#[derive(Clone, Default)]
struct Collector(Arc<Mutex<(Vec<Seen>, Vec<usize>)>>);

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "tch_distributed"
    }
    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let (spans, entered) = &mut *self.0.lock().unwrap();
        let mut seen =
            Seen { name: span.metadata().name(), parent: entered.last().copied(), ..Seen::default() };
        span.record(&mut seen);
        spans.push(seen);
        Id::from_u64(spans.len() as u64)
    }
    fn record(&self, span: &Id, values: &Record<'_>) {
        values.record(&mut self.0.lock().unwrap().0[span.into_u64() as usize - 1]);
    }
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}
    fn enter(&self, span: &Id) {
        self.0.lock().unwrap().1.push(span.into_u64() as usize - 1);
    }
    fn exit(&self, span: &Id) {
        self.0.lock().unwrap().1.retain(|s| *s != span.into_u64() as usize - 1);
    }
    fn try_close(&self, span: Id) -> bool {
        self.0.lock().unwrap().0[span.into_u64() as usize - 1].closed = true;
        true
    }
}

impl Collector {
    fn of<T>(body: impl FnOnce() -> T) -> Vec<Seen> {
        let collector = Self::default();
        tracing::subscriber::with_default(collector.clone(), body);
        let (spans, entered) = &*collector.0.lock().unwrap();
        assert!(entered.is_empty(), "a span is still entered");
        spans.clone()
    }
}

#[test]
fn a_collector_gets_a_span_for_every_call_inside_that_of_its_step_without_a_profile() {
    testing::run_threads(2, |group| {
        let spans = Collector::of(|| {
            let profiler = Profiler::new(&group, ProfileOptions::new().enabled(false)).unwrap();
            profiler.step(|| {
                let mut t = Tensor::ones([256], (Kind::Float, Device::Cpu));
                group.all_reduce(&mut t, ReduceOp::Sum).unwrap();
                group.all_reduce_async(&t, ReduceOp::Sum).unwrap().wait().unwrap();
                group.barrier().unwrap();
            });
        });
        let step = spans.iter().position(|s| s.name == "step").unwrap();
        let calls: Vec<_> = spans.iter().filter(|s| s.name == "collective").collect();
        let activities: Vec<_> = calls.iter().map(|s| s.fields["activity"].as_str()).collect();
        assert_eq!(activities, ["all_reduce", "all_reduce", "barrier"]);
        for (number, call) in calls.iter().enumerate() {
            assert_eq!(call.parent, Some(step), "{call:?}");
            assert_eq!((&*call.fields["seq"], &*call.fields["ok"]), (&*number.to_string(), "true"));
            assert_eq!(call.fields["group"], group.name());
        }
        assert_eq!(calls[0].fields["bytes"], "1024");
        assert!(spans.iter().all(|s| s.closed), "{spans:?}");
        assert!(spans.iter().any(|s| s.name == "wait"), "a blocking call waits");
    });
}

#[test]
fn a_collector_gets_a_span_for_every_pass_of_a_pipeline_with_its_calls_inside() {
    testing::run_threads(2, |group| {
        let vs = nn::VarStore::new(Device::Cpu);
        let stage = Stage::new(nn::linear(vs.root(), 4, 4, Default::default()));
        let pipeline = Pipeline::new(vec![stage], 2, Schedule::OneFOneB, &group).unwrap();
        let xs = Tensor::ones([4, 4], (Kind::Float, Device::Cpu));
        let mse = |ys: &Tensor, ts: &Tensor| ys.mse_loss(ts, Reduction::Mean);
        let spans = Collector::of(|| pipeline.step(Some(&xs), Some(&xs), mse).unwrap());
        let passes: Vec<_> = spans.iter().filter(|s| s.name == "pass").collect();
        let said: Vec<_> =
            passes.iter().map(|s| format!("{} {}", s.fields["pass"], s.fields["micro_batch"])).collect();
        match group.rank() {
            0 => assert_eq!(said, ["forward 0", "forward 1", "backward 0", "backward 1"]),
            _ => assert_eq!(said, ["forward 0", "backward 0", "forward 1", "backward 1"]),
        }
        assert!(passes.iter().all(|s| s.fields["stage"] == group.rank().to_string()));
        let messages = spans.iter().filter(|s| s.name == "collective");
        assert!(messages.clone().count() > 0);
        for message in messages {
            assert_eq!(message.parent.map(|p| spans[p].name), Some("pass"), "{message:?}");
        }
    });
}
