//! Data that is reached where it lies: tensors that the engine allocated.

use std::sync::Arc;

use smallvec::{SmallVec, smallvec};

use super::lists::{List, segment_bytes};
use super::segment::Segment;
use super::site::{Foreign, Site};
use super::{Inner, pool};
use crate::{Error, Result, backend};

/// Whose data of a call is lent to the others, and where it is.
pub(super) struct Direct {
    /// Whether this rank's is.
    pub(super) own: bool,
    /// Of each other rank, where the segment begins that is for this rank.
    bases: SmallVec<[Option<*mut u8>; 8]>,
    /// Mapped for as long as the addresses are used.
    maps: SmallVec<[Arc<Foreign>; 1]>,
}

/// Says in this rank's header whether its data, in one segment or one for each rank, is lent to the others: each
/// segment has to be one run, in a slab that all have in common; and, where it is `written` too, in pages of its own.
pub(super) fn announce(
    segment: &Segment,
    rank: usize,
    round: u64,
    sources: &[backend::Segment<'_>],
    written: bool,
) -> bool {
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
            let Some(found) = pool::find(data, segment_bytes(source)) else { return false };
            if *common.get_or_insert(found.site) != found.site || (written && !found.own_pages) {
                return false;
            }
            found.offset
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

    /// Where a rank's data begins, if it is lent.
    pub(super) fn of(&self, rank: usize) -> Option<*mut u8> {
        self.bases[rank]
    }

    /// The ranks whose data is lent, and where it begins.
    pub(super) fn sources(&self) -> impl Iterator<Item = (usize, *mut u8)> {
        self.bases.iter().enumerate().filter_map(|(rank, base)| Some((rank, (*base)?)))
    }

    /// Reads what a rank's header, of a large message, says of its data: of the segment of that
    /// number, which has so many bytes.
    ///
    /// # Errors
    /// `BackendUnavailable` when the memory cannot be mapped; `Aborted` when that is because its owner has given up.
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
        let failed = |reason: String| match inner.segment.withdrawn(rank, round) {
            true => Error::Aborted,
            false => Error::BackendUnavailable {
                backend: "native".to_owned(),
                reason: format!(
                    "cannot reach a tensor that rank {} allocated for the group: {reason}",
                    inner.number(rank)
                ),
            },
        };
        let map = inner.atlas.lock().map(place, inner.ranks()).map_err(|e| failed(e.to_string()))?;
        let base = map.at(offset as usize, bytes).ok_or_else(|| failed("it is not all there".to_owned()))?;
        self.bases[rank] = Some(base);
        self.maps.push(map);
        Ok(())
    }
}
