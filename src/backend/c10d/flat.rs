//! Segments as flat tensors, which is what these engines take.

use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::backend::{Buffer, Segment, segment_numel};
use crate::libtorch::storage_offset;

/// A flat tensor to read from: the buffer itself, or a copy of several.
pub(super) fn read(segment: &[Buffer<'_>], kind: Kind, device: Device) -> Result<Tensor> {
    match segment {
        [] => Ok(Tensor::f_empty([0], (kind, device))?),
        [one] => Ok(one.tensor()),
        many => Ok(Tensor::f_cat(&many.iter().map(Buffer::tensor).collect::<Vec<_>>(), 0)?),
    }
}

/// Segments that lie one behind the other in one memory, as one flat tensor; `None` where they do not.
pub(super) fn whole(segments: &[Segment<'_>]) -> Option<Tensor> {
    let mut buffers = segments.iter().flatten().filter(|buffer| buffer.numel() > 0);
    let first = buffers.next()?;
    let (mut end, mut numel) = (first.data_ptr().wrapping_add(first.bytes()), first.numel());
    for buffer in buffers {
        if buffer.data_ptr() != end {
            return None;
        }
        end = end.wrapping_add(buffer.bytes());
        numel += buffer.numel();
    }
    let flat = first.tensor();
    // Where neighbours belong to different tensors, the first one's memory ends before.
    flat.f_as_strided([numel as i64], [1], storage_offset(&flat)).ok()
}

/// A flat tensor to write to: the buffer itself, or a place for several whose content is copied back.
pub(super) struct Written {
    pub(super) flat: Tensor,
    parts: Vec<Tensor>,
}

impl Written {
    /// The segment as a place to write to. The content of several buffers is taken along when `content`.
    pub(super) fn new(segment: &[Buffer<'_>], content: bool, kind: Kind, device: Device) -> Result<Self> {
        Ok(match segment {
            [one] => Self { flat: one.tensor(), parts: Vec::new() },
            many if content => {
                Self { flat: read(many, kind, device)?, parts: many.iter().map(Buffer::tensor).collect() }
            }
            many => Self {
                flat: Tensor::f_empty([segment_numel(many) as i64], (kind, device))?,
                parts: many.iter().map(Buffer::tensor).collect(),
            },
        })
    }

    /// Copies the content to where it belongs.
    pub(super) fn deliver(mut self) -> Result<()> {
        let mut start = 0;
        for part in &mut self.parts {
            let numel = part.numel() as i64;
            part.f_copy_(&self.flat.f_narrow(0, start, numel)?)?;
            start += numel;
        }
        Ok(())
    }
}

/// The same memory as bytes. What is only moved is moved so: these engines do not know every kind, and
/// on the wire it is the same.
pub(super) fn bytes(tensor: &Tensor) -> Result<Tensor> {
    if tensor.numel() == 0 {
        return Ok(Tensor::f_empty([0], (Kind::Uint8, tensor.device()))?);
    }
    Ok(tensor.f_view_dtype(Kind::Uint8)?)
}

/// A copy that is `numel` long; what is too much holds anything.
pub(super) fn padded(tensor: &Tensor, numel: usize) -> Result<Tensor> {
    let out = Tensor::f_empty([numel as i64], (tensor.f_kind()?, tensor.device()))?;
    out.f_narrow(0, 0, tensor.numel() as i64)?.f_copy_(tensor)?;
    Ok(out)
}

/// Copies the beginning of a padded tensor.
pub(super) fn unpad(from: &Tensor, to: &mut Tensor) -> Result<()> {
    let numel = to.numel() as i64;
    Ok(to.f_copy_(&from.f_narrow(0, 0, numel)?)?)
}
