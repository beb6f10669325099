//! One collective in stages.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use smallvec::SmallVec;
use tch::{Device, Kind, Tensor};

use super::Inner;
use crate::backend::native::executor::is_wide;
use crate::backend::native::kernels::Reducer;
use crate::backend::native::plan::hosts::{Parts, Stage, Way, schedule};
use crate::backend::native::plan::{Place, Range, Shape};
use crate::backend::native::transport::{Progress, Run, Stamp, Transport};
use crate::backend::{Buffer, Call, Segment, Segments, segment_numel};
use crate::{Error, Result};

/// How much scratch is kept from one call to the next.
const KEPT: usize = 2;

/// A call in stages.
pub(super) struct HostsRun {
    hosts: Arc<Inner>,
    stamp: Stamp,
    /// The kind in which it is computed.
    kind: Kind,
    timeout: Duration,
    inputs: Segments<'static>,
    outputs: Segments<'static>,
    scratch: Vec<Tensor>,
    stages: VecDeque<Stage>,
    now: Option<Box<dyn Run>>,
    /// Where the result is to go in the kind of the call, where that is another.
    narrow: Option<Segments<'static>>,
}

// SAFETY: owned tensors, as `tch::Tensor` is `Send`; used by one thread at a time.
unsafe impl Send for HostsRun {}

/// f32 copies of segments.
fn widened(segments: &Segments<'static>) -> Result<Segments<'static>> {
    let wide = |segment: &Segment<'static>| -> Result<Segment<'static>> {
        let total = segment_numel(segment) as i64;
        let tensor = Tensor::empty([total], (Kind::Float, Device::Cpu));
        let mut at = 0;
        for buffer in segment {
            let len = buffer.numel() as i64;
            tensor.narrow(0, at, len).copy_(&buffer.tensor());
            at += len;
        }
        Ok(SmallVec::from_iter([Buffer::new(tensor)?]))
    };
    segments.iter().map(wide).collect()
}

impl HostsRun {
    pub(super) fn new(hosts: Arc<Inner>, call: Call<'static>, stamp: Stamp) -> Result<Self> {
        let Call { op, kind, mut inputs, mut outputs, timeout } = call;
        if let Some(reduce) = op.reduce_op() {
            Reducer::new(reduce, kind, hosts.layout.world())
                .map_err(|what| Error::Unsupported { backend: "native".to_owned(), what })?;
        }
        let (mut narrow, mut kind) = (None, kind);
        if is_wide(op, kind) {
            kind = Kind::Float;
            inputs = widened(&inputs)?;
            let wide = widened(&outputs)?;
            narrow = Some(std::mem::replace(&mut outputs, wide));
        }
        let numel = |segments: &Segments<'_>| segments.iter().map(|s| segment_numel(s)).collect();
        let shape = Shape {
            op,
            rank: hosts.rank,
            world: hosts.layout.world(),
            size: kind.elt_size_in_bytes(),
            wide: false,
            inputs: numel(&inputs),
            outputs: numel(&outputs),
        };
        let schedule = schedule(&shape, &hosts.layout, hosts.away.tuning());
        let scratch = schedule.slots.iter().map(|&len| hosts.scratch(kind, len)).collect();
        Ok(Self {
            hosts,
            stamp,
            kind,
            timeout,
            inputs,
            outputs,
            scratch,
            stages: schedule.stages.into(),
            now: None,
            narrow,
        })
    }

    /// The buffers of parts of the call's memory.
    fn segment(&self, parts: &Parts) -> Result<Segment<'static>> {
        let mut segment = Segment::new();
        for part in parts {
            match part.place {
                Place::Input(n) => self.cut(&self.inputs[n], part, &mut segment),
                Place::Output(n) => self.cut(&self.outputs[n], part, &mut segment),
                Place::Slot(n) => {
                    let whole = Buffer::new(self.scratch[n].shallow_clone())?;
                    segment.push(whole.slice(self.kind.elt_size_in_bytes(), part.start, part.len));
                }
            }
        }
        Ok(segment)
    }

    /// The buffers of a part of a segment.
    fn cut(&self, of: &[Buffer<'static>], part: &Range, into: &mut Segment<'static>) {
        let (mut start, mut left) = (part.start, part.len);
        for buffer in of {
            if start >= buffer.numel() {
                start -= buffer.numel();
                continue;
            }
            let len = left.min(buffer.numel() - start);
            if len == 0 {
                return;
            }
            into.push(buffer.part_of(self.kind.elt_size_in_bytes(), start, len));
            left -= len;
            start = 0;
        }
    }

    fn segments(&self, of: &[Parts]) -> Result<Segments<'static>> {
        of.iter().map(|parts| self.segment(parts)).collect()
    }

    /// Begins a stage.
    fn begin(&mut self, stage: Stage) -> Result<()> {
        let call = Call {
            op: stage.op,
            kind: self.kind,
            inputs: self.segments(&stage.inputs)?,
            outputs: self.segments(&stage.outputs)?,
            timeout: self.timeout,
        };
        self.hosts.at_home.store(matches!(stage.way, Way::Host), Ordering::Release);
        self.now = Some(match (stage.way, &self.hosts.local) {
            (Way::Between(plan), _) => self.hosts.away.start_plan(call, self.stamp, plan)?,
            (Way::Host, Some(local)) => local.start(call, self.stamp)?,
            (Way::Host, None) => return Err(Error::Aborted),
        });
        Ok(())
    }

    /// Rounds the result to the kind of the call.
    fn finish(&mut self) {
        if let Some(narrow) = self.narrow.take() {
            for (narrow, wide) in narrow.iter().zip(&self.outputs) {
                let Some(wide) = wide.first() else { continue };
                let wide = wide.tensor();
                let mut at = 0;
                for buffer in narrow {
                    let len = buffer.numel() as i64;
                    buffer.tensor().copy_(&wide.narrow(0, at, len));
                    at += len;
                }
            }
        }
    }
}

impl Run for HostsRun {
    fn advance(&mut self) -> Result<Progress> {
        let mut moved = false;
        loop {
            let Some(run) = &mut self.now else {
                let Some(stage) = self.stages.pop_front() else {
                    self.finish();
                    return Ok(Progress::Done);
                };
                self.begin(stage)?;
                continue;
            };
            match run.advance()? {
                Progress::Done => {
                    self.now = None;
                    moved = true;
                }
                Progress::Idle if moved => return Ok(Progress::Moved),
                progress => return Ok(progress),
            }
        }
    }
}

impl Drop for HostsRun {
    fn drop(&mut self) {
        self.now = None;
        let mut spare = self.hosts.spare.lock();
        spare.append(&mut self.scratch);
        let more = spare.len().saturating_sub(KEPT);
        spare.drain(..more);
    }
}

impl Inner {
    /// Memory for `len` elements; what it holds is unspecified.
    fn scratch(&self, kind: Kind, len: usize) -> Tensor {
        let mut spare = self.spare.lock();
        let fits = |t: &Tensor| t.kind() == kind && t.numel() >= len && t.numel() / 4 <= len;
        match spare.iter().position(fits) {
            Some(n) => spare.swap_remove(n),
            None => Tensor::empty([len as i64], (kind, Device::Cpu)),
        }
    }
}
