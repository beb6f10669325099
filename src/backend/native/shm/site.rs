//! Where a rank's data can be reached in place, and what it takes to reach it there.

use std::io;
use std::os::fd::OwnedFd;
use std::ptr::NonNull;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, SealFlags};
use rustix::mm::ProtFlags;

/// A slab of some process, as the others find it. A process of 0: nothing is lent.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Site {
    pub(super) process: u64,
    pub(super) descriptor: u64,
    pub(super) bytes: u64,
    pub(super) nonce: u64,
}

/// A mapping of another process's slab.
#[derive(Debug)]
pub(super) struct Foreign {
    base: NonNull<u8>,
    site: Site,
}

// SAFETY: memory that others use too; the protocol says when who may.
unsafe impl Send for Foreign {}
// SAFETY: as above.
unsafe impl Sync for Foreign {}

impl Foreign {
    fn open(site: Site) -> io::Result<Self> {
        let path = format!("/proc/{}/fd/{}", site.process, site.descriptor);
        let failed = |e: &dyn std::fmt::Display| io::Error::other(format!("{path}: {e}"));
        let memory: OwnedFd =
            rustix::fs::open(&path, OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(|e| failed(&e))?;
        let stat = rustix::fs::fstat(&memory)?;
        let seals = rustix::fs::fcntl_get_seals(&memory)?;
        if stat.st_uid != rustix::process::geteuid().as_raw()
            || stat.st_size < 8
            || stat.st_size as u64 != site.bytes
            || !seals.contains(SealFlags::SHRINK)
        {
            return Err(failed(&"what was found there is no memory for tensors"));
        }
        let bytes = site.bytes as usize;
        let base = super::pages::map(&memory, bytes, ProtFlags::READ | ProtFlags::WRITE)?;
        let foreign = Self { base, site };
        // SAFETY: the first word, written before its owner told of it, and never again.
        if unsafe { base.cast::<u64>().read() } != site.nonce {
            return Err(failed(&"it is somebody else's memory"));
        }
        Ok(foreign)
    }

    /// The address of a range of it; none where there is no such range.
    pub(super) fn at(&self, offset: usize, bytes: usize) -> Option<*mut u8> {
        let end = offset.checked_add(bytes)?;
        // SAFETY: within the mapping.
        (end <= self.site.bytes as usize).then(|| unsafe { self.base.as_ptr().add(offset) })
    }
}

impl Drop for Foreign {
    fn drop(&mut self) {
        // SAFETY: mapped by `open`; nobody keeps an address longer than the mapping.
        let _ = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.site.bytes as usize) };
    }
}

/// The slabs of others that a group has seen last.
#[derive(Debug, Default)]
pub(super) struct Atlas {
    /// In order of use, the last one last.
    maps: Vec<Arc<Foreign>>,
}

/// How many slabs of each other rank stay mapped.
const KEPT: usize = 16;

impl Atlas {
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.maps.len()
    }

    /// The mapping of a slab, in a group of so many ranks.
    pub(super) fn map(&mut self, site: Site, ranks: usize) -> io::Result<Arc<Foreign>> {
        let map = match self.maps.iter().rposition(|m| m.site == site) {
            Some(n) if n + ranks > self.maps.len() => return Ok(self.maps[n].clone()),
            Some(n) => self.maps.remove(n),
            None => Arc::new(Foreign::open(site)?),
        };
        if self.maps.len() >= KEPT * ranks {
            self.maps.remove(0);
        }
        self.maps.push(map.clone());
        Ok(map)
    }
}
