//! Data that is read where it lies: tensors that the engine allocated.

use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::lists::List;
use super::segment::Segment;
use super::site::{Foreign, Site};
use super::{Inner, pool};
use crate::{Error, Result, backend};

/// Whose data of a call is read in place, and where it is.
pub(super) struct Direct {
    /// Whether this rank's is.
    pub(super) own: bool,
    /// Of each other rank, where the segment begins that this rank reads.
    bases: SmallVec<[Option<*const u8>; 8]>,
    /// Mapped for as long as the addresses are used.
    maps: SmallVec<[Arc<Foreign>; 1]>,
}

/// Says in this rank's header whether its data, in one segment or one for each rank, can be read in place:
/// each segment has to be one run, in a slab that all have in common.
pub(super) fn announce(segment: &Segment, rank: usize, round: u64, sources: &[backend::Segment<'_>]) -> bool {
    let site = segment.site(rank, round);
    // SAFETY: the payload of this rank and this parity, which nobody reads now; nothing else is in it.
    unsafe { site.write(Site::default()) };
    if sources.is_empty() || sources.len() > Segment::OFFSETS {
        return false;
    }
    let mut common = None;
    for (n, source) in sources.iter().enumerate() {
        let Some(data) = List::new(source).one_run() else { return false };
        let offset = if data.is_null() {
            0
        } else {
            let Some((own, offset)) = pool::find(data) else { return false };
            if *common.get_or_insert(own) != own {
                return false;
            }
            offset
        };
        // SAFETY: as above; there is room for as many.
        unsafe { site.add(1).cast::<u64>().add(n).write(offset as u64) };
    }
    let Some(common) = common else { return false };
    // SAFETY: as above.
    unsafe { site.write(common) };
    true
}

impl Direct {
    pub(super) fn new(ranks: usize, own: bool) -> Self {
        Self { own, bases: smallvec![None; ranks], maps: SmallVec::new() }
    }

    /// Where a rank's data begins, if it is read in place.
    pub(super) fn of(&self, rank: usize) -> Option<*const u8> {
        self.bases[rank]
    }

    /// The ranks whose data is read in place.
    pub(super) fn sources(&self) -> impl Iterator<Item = usize> {
        self.bases.iter().enumerate().filter(|(_, base)| base.is_some()).map(|(rank, _)| rank)
    }

    /// Reads what a rank's header, of a large message, says of its data: of the segment of that
    /// number, which has so many bytes.
    ///
    /// # Errors
    /// `BackendUnavailable` when the memory cannot be mapped.
    pub(super) fn look_up(
        &mut self,
        inner: &Inner,
        rank: usize,
        round: u64,
        segment: usize,
        bytes: usize,
    ) -> Result<()> {
        let site = inner.segment.site(rank, round);
        // SAFETY: written before the header's flag, which this rank has read, and not again before it goes on.
        let (place, offset) = unsafe { (site.read(), site.add(1).cast::<u64>().add(segment).read()) };
        if place.process == 0 {
            return Ok(());
        }
        let failed = |reason: String| Error::BackendUnavailable {
            backend: "native".to_owned(),
            reason: format!("cannot read a tensor that rank {rank} allocated for the group: {reason}"),
        };
        let map = inner.atlas.lock().map(place, inner.ranks()).map_err(|e| failed(e.to_string()))?;
        let base = map.at(offset as usize, bytes).ok_or_else(|| failed("it is not all there".to_owned()))?;
        self.bases[rank] = Some(base);
        self.maps.push(map);
        Ok(())
    }
}
