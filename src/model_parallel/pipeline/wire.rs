//! What goes from stage to stage.
//!
//! Each message has a tag made of its direction, the stage it is for, the micro-batch, and a slot. Slot 0 of a
//! forward message is its header; the tensors follow in slots of their own. Gradients need no header: their
//! shapes are those of what was sent.
//!
//! A header is 128 numbers (i64): how many tensors; then for each its kind, whether it wants a gradient, its number
//! of dimensions, and these; zeros to the end.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::Plan;
use super::lanes::Lanes;
use crate::process_group::Work;
use crate::{Error, ProcessGroup, Result};

const HEADER: usize = 128;

/// The kinds that can travel; a kind's number is its place here.
const KINDS: [Kind; 12] = [
    Kind::Uint8,
    Kind::Int8,
    Kind::Int16,
    Kind::Int,
    Kind::Int64,
    Kind::Half,
    Kind::Float,
    Kind::Double,
    Kind::ComplexFloat,
    Kind::ComplexDouble,
    Kind::Bool,
    Kind::BFloat16,
];

/// What one tensor looks like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Look {
    pub(super) kind: Kind,
    pub(super) wants_grad: bool,
    pub(super) size: Vec<i64>,
}

impl Look {
    fn empty(&self, device: Device) -> Result<Tensor> {
        Ok(Tensor::f_empty(&self.size, (self.kind, device))?)
    }
}

/// Which message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    /// A gradient going back, or a value going forward.
    pub(super) backward: bool,
    /// The stage it is for.
    pub(super) stage: usize,
    pub(super) micro_batch: usize,
}

impl Key {
    /// A tag that no other message of the same step has; far from the small numbers that users take.
    fn tag(self, micro_batches: usize, slot: usize) -> u32 {
        let message = (self.stage * micro_batches + self.micro_batch) as u32;
        (1 << 30) | (u32::from(self.backward) << 29) | (message % (1 << 22)) << 7 | slot as u32
    }
}

/// Messages that are on their way in.
struct Coming {
    tensors: Vec<Tensor>,
    looks: Vec<Look>,
    works: Vec<Work>,
}

/// One rank's end of the pipe.
pub(super) struct Wire {
    group: ProcessGroup,
    /// Made at the first use.
    lanes: Option<Lanes>,
    device: Device,
    micro_batches: usize,
    coming: HashMap<Key, Coming>,
    going: Vec<Work>,
    bytes_sent: usize,
    /// Once agreed on, looks of what a stage receives are not sent again (only if shapes are fixed).
    agreed: Option<HashMap<(usize, bool), Vec<Look>>>,
}

impl Wire {
    pub(super) fn new(group: &ProcessGroup, device: Device, micro_batches: usize, fixed: bool) -> Self {
        Self {
            group: group.clone(),
            lanes: None,
            device,
            micro_batches,
            coming: HashMap::new(),
            going: Vec::new(),
            bytes_sent: 0,
            agreed: fixed.then(HashMap::new),
        }
    }

    /// The same with nothing under way.
    pub(super) fn again(&self, device: Device) -> Self {
        Self::new(&self.group, device, self.micro_batches, self.agreed.is_some())
    }

    /// Makes the ways to the other ranks, if they are not there. Every rank of the group calls it.
    pub(super) fn open(&mut self, plan: &Plan) -> Result<()> {
        if self.lanes.is_none() {
            self.lanes = Some(Lanes::open(&self.group, plan, self.device)?);
        }
        Ok(())
    }

    /// The pipeline failed on this rank: nobody shall wait for it. `words` tell the others of it.
    pub(super) fn give_up(&mut self, words: &str) {
        if let Some(lanes) = self.lanes.take() {
            lanes.give_up(words);
        }
        *self = self.again(self.device);
    }

    fn lanes(&self) -> Result<&Lanes> {
        self.lanes.as_ref().ok_or(Error::Aborted)
    }

    fn isend(&self, tensor: &Tensor, dst: usize, key: Key, slot: usize) -> Result<Work> {
        self.lanes()?.isend(tensor, dst, key.backward, key.tag(self.micro_batches, slot))
    }

    fn irecv(&self, tensor: &Tensor, src: usize, key: Key, slot: usize) -> Result<Work> {
        self.lanes()?.irecv(tensor, src, key.backward, key.tag(self.micro_batches, slot))
    }

    /// Sends a stage's outputs on to the next stage.
    pub(super) fn send(
        &mut self,
        key: Key,
        dst: usize,
        train: bool,
        tensors: &[Tensor],
        looks: &[Look],
    ) -> Result<()> {
        let known = self.agreed.as_ref().and_then(|a| a.get(&(key.stage, train)));
        match known {
            Some(known) if known == looks => {}
            Some(known) => {
                return Err(Error::ShapeMismatch {
                    argument: "outputs",
                    expected: format!("{known:?} as in the first step, because shapes are fixed"),
                    got: format!("{looks:?}"),
                });
            }
            None => {
                let header = header(looks)?.f_to_device(self.device)?;
                self.going.push(self.isend(&header, dst, key, 0)?);
                if let Some(agreed) = &mut self.agreed
                    && key.micro_batch + 1 == self.micro_batches
                {
                    agreed.insert((key.stage, train), looks.to_vec());
                }
            }
        }
        self.send_tensors(key, dst, tensors)
    }

    /// Sends gradients back to the previous stage.
    pub(super) fn send_tensors(&mut self, key: Key, dst: usize, tensors: &[Tensor]) -> Result<()> {
        for (slot, tensor) in tensors.iter().enumerate() {
            let tensor = tensor.f_detach()?.f_contiguous()?;
            self.bytes_sent += tensor.numel() * tensor.kind().elt_size_in_bytes();
            self.going.push(self.isend(&tensor, dst, key, slot + 1)?);
        }
        self.settle(false)
    }

    /// Receives a stage's inputs.
    pub(super) fn receive(&mut self, key: Key, src: usize, train: bool) -> Result<(Vec<Tensor>, Vec<Look>)> {
        let known = self.agreed.as_ref().and_then(|a| a.get(&(key.stage, train))).cloned();
        let looks = match known {
            Some(known) => known,
            None => {
                let numbers = Tensor::f_zeros([HEADER as i64], (Kind::Int64, self.device))?;
                let work = self.irecv(&numbers, src, key, 0)?;
                self.lanes()?.wait(&work, src, key.backward)?;
                let looks = read_header(&Vec::<i64>::try_from(numbers)?)?;
                if let Some(agreed) = &mut self.agreed
                    && key.micro_batch + 1 == self.micro_batches
                {
                    agreed.insert((key.stage, train), looks.clone());
                }
                looks
            }
        };
        Ok((self.receive_tensors(key, src, &looks)?, looks))
    }

    /// Receives tensors that look like this.
    pub(super) fn receive_tensors(&mut self, key: Key, src: usize, looks: &[Look]) -> Result<Vec<Tensor>> {
        self.expect(key, src, looks)?;
        let Some(coming) = self.coming.remove(&key) else { return Ok(Vec::new()) };
        for work in &coming.works {
            work.wait()?;
        }
        Ok(coming.tensors)
    }

    /// Lets a message come in while something else is computed.
    pub(super) fn expect(&mut self, key: Key, src: usize, looks: &[Look]) -> Result<()> {
        if self.coming.get(&key).is_some_and(|c| c.looks == looks) {
            return Ok(());
        }
        let tensors = looks.iter().map(|look| look.empty(self.device)).collect::<Result<Vec<_>>>()?;
        let works = tensors
            .iter()
            .enumerate()
            .map(|(slot, t)| self.irecv(t, src, key, slot + 1))
            .collect::<Result<Vec<_>>>()?;
        self.coming.insert(key, Coming { tensors, looks: looks.to_vec(), works });
        Ok(())
    }

    /// The same for a stage's inputs, if it is known what they look like.
    pub(super) fn expect_known(&mut self, key: Key, src: usize, train: bool) -> Result<()> {
        let known = self.agreed.as_ref().and_then(|a| a.get(&(key.stage, train))).cloned();
        known.map_or(Ok(()), |looks| self.expect(key, src, &looks))
    }

    /// Looks after what was sent: with `all` waits for it, else only lets go of what has gone.
    pub(super) fn settle(&mut self, all: bool) -> Result<()> {
        for work in std::mem::take(&mut self.going) {
            if all || work.is_completed() {
                work.wait()?;
            } else {
                self.going.push(work);
            }
        }
        Ok(())
    }

    /// The bytes sent since this was last asked.
    pub(super) fn take_bytes_sent(&mut self) -> usize {
        std::mem::take(&mut self.bytes_sent)
    }
}

/// What tensors look like; `grads` says whether any of them may want a gradient.
pub(super) fn looks_of(tensors: &[Tensor], wants_grad: impl Fn(&Tensor) -> bool) -> Vec<Look> {
    tensors.iter().map(|t| Look { kind: t.kind(), wants_grad: wants_grad(t), size: t.size() }).collect()
}

fn header(looks: &[Look]) -> Result<Tensor> {
    let mut numbers = vec![looks.len() as i64];
    for look in looks {
        let kind = KINDS.iter().position(|&k| k == look.kind).ok_or_else(|| Error::KindMismatch {
            argument: "outputs",
            expected: "a plain number".to_owned(),
            got: format!("{:?}", look.kind),
        })?;
        numbers.extend([kind as i64, i64::from(look.wants_grad), look.size.len() as i64]);
        numbers.extend(&look.size);
    }
    if numbers.len() > HEADER {
        return Err(Error::invalid(
            "outputs",
            format!("{} tensors have too many dimensions together", looks.len()),
        ));
    }
    numbers.resize(HEADER, 0);
    Ok(Tensor::f_from_slice(&numbers)?)
}

fn read_header(numbers: &[i64]) -> Result<Vec<Look>> {
    let damaged = || Error::Object { reason: "the header of a pipeline message makes no sense".to_owned() };
    let mut rest = numbers.iter().copied();
    let mut next = move || rest.next().ok_or_else(damaged);
    let count = next()?;
    (0..count)
        .map(|_| {
            let kind =
                usize::try_from(next()?).ok().and_then(|k| KINDS.get(k)).copied().ok_or_else(damaged)?;
            let wants_grad = next()? != 0;
            let dims = next()?;
            let size = (0..dims).map(|_| next()).collect::<Result<Vec<_>>>()?;
            match size.iter().all(|&s| s >= 0) {
                true => Ok(Look { kind, wants_grad, size }),
                false => Err(damaged()),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_says_what_the_tensors_look_like() {
        let tensors = [
            Tensor::zeros([2, 3], (Kind::BFloat16, Device::Cpu)),
            Tensor::from(7_i64),
            Tensor::zeros([0, 4, 1], (Kind::Bool, Device::Cpu)),
        ];
        let looks = looks_of(&tensors, |t| t.kind() == Kind::BFloat16);
        let numbers = Vec::<i64>::try_from(header(&looks).unwrap()).unwrap();
        assert_eq!(read_header(&numbers).unwrap(), looks);
    }

    #[test]
    fn a_damaged_header_is_an_error() {
        for numbers in [vec![], vec![1], vec![1, 99, 0, 0], vec![1, 6, 0, 2, 5], vec![1, 6, 0, 1, -5]] {
            assert!(read_header(&numbers).is_err(), "{numbers:?}");
        }
    }

    #[test]
    fn messages_of_one_step_have_tags_of_their_own() {
        let mut seen = std::collections::HashSet::new();
        for backward in [false, true] {
            for (stage, micro_batch, slot) in
                (0..6).flat_map(|s| (0..5).flat_map(move |m| (0..4).map(move |i| (s, m, i))))
            {
                assert!(seen.insert(Key { backward, stage, micro_batch }.tag(5, slot)));
            }
        }
    }
}
