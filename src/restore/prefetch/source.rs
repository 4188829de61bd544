//! Owns: what the archive has sealed of a directory, and having one segment of it held ready.
//! Does not own: which segments, how many at a time (`helper.rs`), reading objects (`wal_get/sealed.rs`).

use std::sync::Arc;

use futures_util::future::join_all;

use super::place::Place;
use crate::catalog::DirectoryContents;
use crate::catalog::contents::segment_span;
use crate::repository::layout::WalDirectory;
use crate::restore::wal_get::request::Wanted;
use crate::restore::wal_get::{WalGet, WalGetError, sealed};
use crate::wal::{SegmentName, SegmentSize, SystemId};

/// Where segments come from and where they go.
#[derive(Debug)]
pub struct Source {
    pub wal_get: WalGet,
    pub place: Place,
    pub size: SegmentSize,
    pub system_id: SystemId,
}

/// A directory as each repository lists it; `None` where one did not answer.
#[derive(Clone, Debug)]
pub struct Listing(Arc<Vec<Option<DirectoryContents>>>);

impl Listing {
    /// The stored size of a sealed segment. Without an entry, or with two that disagree, it is looked at only when
    /// PostgreSQL asks for it.
    pub fn sealed(&self, name: SegmentName) -> Option<u64> {
        let known = || self.0.iter().flatten();
        if known().any(|contents| contents.disputed.contains_key(&name)) {
            return None;
        }
        let mut entries = known().filter_map(|contents| contents.sealed(name));
        let first = entries.next()?;
        entries.all(|entry| entry.raw_crc32 == first.raw_crc32).then_some(first.stored_bytes)
    }
}

impl Source {
    pub async fn list(&self, directory: WalDirectory) -> Result<Listing, WalGetError> {
        let listed = self.wal_get.holders.iter().map(async |holder| {
            // The ledger first: an expiry is announced before anything vanishes.
            let expired = holder.archive.expired().await?;
            let mut contents = holder.archive.directory(directory, self.size).await?;
            contents.subtract(&expired);
            Ok::<_, WalGetError>(contents)
        });
        let mut contents = Vec::new();
        let mut first_error = None;
        for listed in join_all(listed).await {
            match listed {
                Ok(listed) => contents.push(Some(listed)),
                Err(error) => {
                    contents.push(None);
                    first_error.get_or_insert(error);
                }
            }
        }
        match first_error {
            Some(error) if contents.iter().all(Option::is_none) => Err(error),
            _ => Ok(Listing(Arc::new(contents))),
        }
    }

    /// Has a segment held ready, from the first repository that has it intact; false when none has.
    pub async fn hold_ready(&self, name: SegmentName, listing: Listing) -> Result<bool, WalGetError> {
        let Some(span) = segment_span(name, self.size) else { return Ok(false) };
        let (start, end) = (span.start, span.end);
        let wanted = Wanted { name, size: self.size, start, end, limit: end, system_id: self.system_id };
        let mut first_error = None;
        for (holder, contents) in self.wal_get.holders.iter().zip(listing.0.iter()) {
            let Some(contents) = contents else { continue };
            match sealed::hold_ready(holder, &wanted, contents, |raw_crc32| self.place.ready(name, raw_crc32)).await {
                Ok(true) => return Ok(true),
                Ok(false) => {}
                Err(error @ WalGetError::Destination { .. }) => return Err(error),
                Err(error) => drop(first_error.get_or_insert(error)),
            }
        }
        first_error.map_or(Ok(false), Err)
    }
}
