//! Owns: reading directories of WAL: their listings and index objects, one of them whole, or all of an archive a few at a
//! time.
//! Does not own: what their contents mean (`contents.rs`, `digest.rs`).
//!
//! An archive has thousands of directories. Those of a store that lists many at a time are listed so; index objects are
//! read a bounded number at a time and taken apart on the threads for blocking work, and of each directory a digest is
//! kept.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::{Archive, CatalogError, FETCHES, JSON_BYTES_MAX, LISTINGS_MAX, SCHEMA, fetch_sized, parse_json, place};
use crate::catalog::contents::{Catalog, DirectoryContents, SegmentObject, TailObject, segment_span};
use crate::catalog::damage::Damages;
use crate::catalog::digest::{Claim, Digest, DirectoryDigest, Indexed};
use crate::catalog::index::{IndexEntry, IndexFile};
use crate::catalog::ledger::{Expired, LedgerFact};
use crate::codec::Form;
use crate::repository::layout::{IndexName, TailName, WalDirectory, WalObject};
use crate::repository::{Entry, Key, StoreErrorKind};
use crate::wal::{SegmentName, SegmentSize, TimelineId};

/// Directories being read at the same time: at 50 ms a request, four thousand take 6 s.
const DIRECTORIES: usize = 32;
/// Listings of several directories under way at the same time, and names in one of them: memory, against requests that
/// are half empty.
const LISTINGS: usize = 8;
const NAMES_PER_LISTING: u64 = 8192;

/// What a listing shows of one directory.
#[derive(Debug, Default)]
pub(super) struct Listed {
    /// Directly in it.
    entries: Vec<Entry>,
    /// Of the segments with tails; `None` where that has to be asked for.
    tails: Option<BTreeMap<SegmentName, Vec<TailObject>>>,
}

/// What was read of a directory, to be taken apart.
#[derive(Debug)]
struct RawDirectory {
    directory: WalDirectory,
    size: SegmentSize,
    entries: Vec<Entry>,
    tails: BTreeMap<SegmentName, Vec<TailObject>>,
    bodies: Vec<IndexBody>,
}

/// An index object as it was read.
#[derive(Debug)]
pub(super) struct IndexBody {
    archive: Archive,
    key: Key,
    name: IndexName,
    body: Bytes,
}

impl Archive {
    /// The whole lineage, without what is expired or damaged.
    pub async fn load_catalog(&self) -> Result<Catalog, CatalogError> {
        self.catalog_without(Damages::of).await
    }

    /// As writers see it: what was stored, whatever was found damaged since.
    pub async fn load_written(&self) -> Result<Catalog, CatalogError> {
        self.catalog_without(|_| Damages::default()).await
    }

    async fn catalog_without(&self, damages: impl Fn(&[LedgerFact]) -> Damages) -> Result<Catalog, CatalogError> {
        let file = self.lineage_file().await?;
        // The ledger first: an expiry is announced before anything vanishes.
        let ledger = self.ledger().await?;
        let (expired, damages) = (Expired::of(&ledger), damages(&ledger));
        let (histories, directories) = self.wal_listing().await?;
        let mut timelines: BTreeMap<TimelineId, Vec<Arc<DirectoryDigest>>> = BTreeMap::new();
        let add = |mut contents: DirectoryContents<Digest>| {
            contents.subtract(&expired);
            contents.mark(&damages);
            let timeline = contents.directory.timeline;
            timelines.entry(timeline).or_default().push(Arc::new(DirectoryDigest::of(contents)));
        };
        self.each_directory(directories, file.segment_size, add).await?;
        let histories = self.read_histories(histories).await?;
        Ok(Catalog { lineage: self.lineage.clone(), file, histories, timelines, ledger })
    }

    /// Gives everything in each of these directories to `take`, in this order, whatever is expired. Several are read at
    /// the same time, and no more of them are held than that.
    pub async fn each_directory(
        &self,
        directories: Vec<WalDirectory>,
        size: SegmentSize,
        mut take: impl FnMut(DirectoryContents<Digest>),
    ) -> Result<(), CatalogError> {
        let groups = if self.backend.lists_deep() { groups(directories, size) } else { vec![directories] };
        let listed = stream::iter(groups).map(|group| self.listed(group, size)).buffered(LISTINGS);
        let listed = listed.map_ok(|group| stream::iter(group.into_iter().map(Ok::<_, CatalogError>))).try_flatten();
        let read = listed.map_ok(|(directory, listed)| self.directory_digest(directory, size, listed));
        let mut read = std::pin::pin!(read.try_buffered(DIRECTORIES));
        while let Some(contents) = read.try_next().await? {
            take(contents);
        }
        Ok(())
    }

    /// Whole entries of the segments of a directory that count, of those that are wanted.
    pub async fn entries(
        &self,
        digest: &DirectoryDigest,
        wanted: impl Fn(&Digest) -> bool,
    ) -> Result<Vec<IndexEntry>, CatalogError> {
        let wanted: Vec<&Digest> = digest.sealed.iter().filter(|digest| wanted(digest)).collect();
        let holds = |index: &IndexName| wanted.iter().any(|of| index.first <= of.segment && of.segment <= index.last);
        if wanted.is_empty() {
            return Ok(Vec::new());
        }
        let of_index = |object: &WalObject| matches!(object, WalObject::Index(index) if holds(index));
        let contents = self.directory_part(digest.directory, digest.segment_size, of_index).await?;
        Ok(wanted.iter().filter_map(|digest| contents.entries.get(&digest.segment)).cloned().collect())
    }

    /// What stores that list deep show of directories that follow one another.
    async fn listed(
        &self,
        group: Vec<WalDirectory>,
        size: SegmentSize,
    ) -> Result<Vec<(WalDirectory, Option<Listed>)>, CatalogError> {
        let (Some(first), Some(last)) = (group.first(), group.last()) else { return Ok(Vec::new()) };
        let names = match self.backend.lists_deep() {
            true => self.backend.list_deep(&self.lineage.wal(), &first.to_string(), &last.to_string()).await?,
            false => None,
        };
        let Some(names) = names else { return Ok(group.into_iter().map(|directory| (directory, None)).collect()) };
        let mut all: BTreeMap<WalDirectory, Listed> = BTreeMap::new();
        for (path, bytes) in names {
            let Some((directory, path)) = path.split_once('/') else { continue };
            let Some(directory) = WalDirectory::parse(directory) else { continue };
            all.entry(directory).or_default().add(directory, path, bytes, size);
        }
        // One that has vanished since is empty.
        let of = |directory: WalDirectory| {
            let listed = all.remove(&directory).unwrap_or_default();
            (directory, Some(Listed { tails: Some(listed.tails.unwrap_or_default()), ..listed }))
        };
        Ok(group.into_iter().map(of).collect())
    }

    async fn directory_digest(
        &self,
        directory: WalDirectory,
        size: SegmentSize,
        listed: Option<Listed>,
    ) -> Result<DirectoryContents<Digest>, CatalogError> {
        let is_deep = listed.is_some();
        let contents = on_thread(self.read_directory(directory, size, |_| true, listed).await?).await?;
        // A deep listing comes in pages: between two of them a segment may have been sealed, indexed, and its tails
        // removed, so that it shows without its entry.
        match is_deep && contents.unindexed().next().is_some() {
            true => on_thread(self.read_directory(directory, size, |_| true, None).await?).await,
            false => Ok(contents),
        }
    }

    /// Everything in a directory that is wanted.
    pub(super) async fn directory_part(
        &self,
        directory: WalDirectory,
        size: SegmentSize,
        wanted: impl Fn(&WalObject) -> bool,
    ) -> Result<DirectoryContents, CatalogError> {
        self.read_directory(directory, size, wanted, None).await?.assemble()
    }

    /// Listed again, after `listed` where that is given, while objects vanish between listing and reading.
    async fn read_directory(
        &self,
        directory: WalDirectory,
        size: SegmentSize,
        wanted: impl Fn(&WalObject) -> bool,
        mut listed: Option<Listed>,
    ) -> Result<RawDirectory, CatalogError> {
        for _ in 0..LISTINGS_MAX {
            let listed = match listed.take() {
                Some(listed) => listed,
                None => {
                    let entries = self.backend.list(Some(&self.lineage.wal_directory(directory))).await?;
                    Listed { entries, tails: None }
                }
            };
            match self.read_once(directory, size, &wanted, listed).await {
                Err(CatalogError::Store(error)) if error.is(StoreErrorKind::NotFound) => continue,
                Ok(None) => continue,
                Ok(Some(read)) => return Ok(read),
                Err(error) => return Err(error),
            }
        }
        let directory = place(self.backend(), &self.lineage.wal_directory(directory));
        Err(CatalogError::Unsteady { directory, attempts: LISTINGS_MAX })
    }

    /// `None` when the tails of a segment vanished after the listing: it may have been sealed meanwhile.
    async fn read_once(
        &self,
        directory: WalDirectory,
        size: SegmentSize,
        wanted: &impl Fn(&WalObject) -> bool,
        listed: Listed,
    ) -> Result<Option<RawDirectory>, CatalogError> {
        let Listed { entries, tails } = listed;
        let tails = match tails {
            Some(tails) => tails,
            None => match self.tails_listed(&entries, directory, size, wanted).await? {
                Some(tails) => tails,
                None => return Ok(None),
            },
        };
        let index = |entry: &Entry| match entry {
            // The name's end first: most names are segments'.
            Entry::Object { name, bytes } if name.ends_with(".json") => match placed(name, directory, size)? {
                WalObject::Index(index) => wanted(&WalObject::Index(index)).then_some((index, *bytes)),
                _ => None,
            },
            _ => None,
        };
        let files: Vec<(IndexName, u64)> = entries.iter().filter_map(index).collect();
        let read = stream::iter(files).map(|(name, bytes)| self.index_body(name, bytes));
        let bodies: Vec<IndexBody> = read.buffered(FETCHES).try_collect().await?;
        Ok(Some(RawDirectory { directory, size, entries, tails, bodies }))
    }

    /// The tails below a directory as listed; `None` when those of a segment vanished after the listing.
    async fn tails_listed(
        &self,
        entries: &[Entry],
        directory: WalDirectory,
        size: SegmentSize,
        wanted: &impl Fn(&WalObject) -> bool,
    ) -> Result<Option<BTreeMap<SegmentName, Vec<TailObject>>>, CatalogError> {
        let mut found = BTreeMap::new();
        let segment = |entry: &Entry| match entry {
            Entry::Object { name, .. } => match placed(name, directory, size)? {
                WalObject::Segment(name, _) => Some(name),
                _ => None,
            },
            Entry::Directory(_) => None,
        };
        let open = entries.iter().filter_map(|entry| match entry {
            Entry::Directory(name) => tails_of(directory, name).filter(wanted),
            Entry::Object { .. } => None,
        });
        for object in open {
            let WalObject::Tails(name) = object else { continue };
            let tails = self.tails(name, size).await?;
            // A store may show a directory for a moment longer than its last object.
            if tails.is_empty() && !entries.iter().any(|entry| segment(entry) == Some(name)) {
                if !self.segment_objects(name).await?.is_empty() {
                    return Ok(None);
                }
                continue;
            }
            found.insert(name, tails);
        }
        Ok(Some(found))
    }

    pub(super) async fn index_body(&self, name: IndexName, bytes: u64) -> Result<IndexBody, CatalogError> {
        let key = self.lineage.index(name);
        let body = fetch_sized(self.backend(), &key, bytes, JSON_BYTES_MAX).await?;
        Ok(IndexBody { archive: self.clone(), key, name, body })
    }
}

/// On a thread for blocking work: an index object is a hundred kilobytes of JSON.
async fn on_thread<E: Indexed>(read: RawDirectory) -> Result<DirectoryContents<E>, CatalogError> {
    match tokio::task::spawn_blocking(move || read.assemble()).await {
        Ok(contents) => contents,
        Err(join) => std::panic::resume_unwind(join.into_panic()),
    }
}

impl RawDirectory {
    fn assemble<E: Indexed>(self) -> Result<DirectoryContents<E>, CatalogError> {
        let RawDirectory { directory, size, entries, tails, bodies } = self;
        let mut contents = DirectoryContents::new(directory, size);
        for entry in &entries {
            if let Entry::Object { name, bytes } = entry {
                add_object(&mut contents, name, *bytes);
            }
        }
        contents.tails = tails;
        for body in bodies {
            body.parse::<E>(directory, size)?.entries.into_iter().for_each(|entry| contents.add_entry(entry));
        }
        Ok(contents)
    }
}

impl Listed {
    fn add(&mut self, directory: WalDirectory, path: &str, bytes: u64, size: SegmentSize) {
        let Some((below, name)) = path.split_once('/') else {
            self.entries.push(Entry::Object { name: path.to_string(), bytes });
            return;
        };
        let Some(WalObject::Tails(segment)) = tails_of(directory, below) else { return };
        if let Some(tail) = tail_of(segment, name, bytes, size) {
            self.tails.get_or_insert_default().entry(segment).or_default().push(tail);
        }
    }
}

impl IndexBody {
    pub(super) fn parse<E: Indexed>(
        &self,
        directory: WalDirectory,
        size: SegmentSize,
    ) -> Result<IndexFile<E>, CatalogError> {
        let file: IndexFile<E::Stored> = match serde_json::from_slice(&self.body) {
            Ok(file) => file,
            // Says whether it is damaged, or newer.
            Err(_) => parse_json(self.archive.backend(), &self.key, &self.body)?,
        };
        if file.schema > SCHEMA {
            let (object, found) = (place(self.archive.backend(), &self.key), file.schema);
            return Err(CatalogError::NewerSchema { object, found, supported: SCHEMA });
        }
        if let Some(fault) = index_fault::<E>(&file, self.name, directory, size) {
            return Err(CatalogError::Damaged { object: place(self.archive.backend(), &self.key), fault });
        }
        let IndexFile { schema, segment_size, entries } = file;
        Ok(IndexFile { schema, segment_size, entries: entries.into_iter().map(E::of).collect() })
    }
}

/// Directories that are listed together: of one timeline, and no more names than [`NAMES_PER_LISTING`].
fn groups(directories: Vec<WalDirectory>, size: SegmentSize) -> Vec<Vec<WalDirectory>> {
    let most = usize::try_from(NAMES_PER_LISTING / size.segments_per_high_word()).unwrap_or(1).max(1);
    let mut groups: Vec<Vec<WalDirectory>> = Vec::new();
    for directory in directories {
        match groups.last_mut() {
            Some(group) if group.len() < most && group[0].timeline == directory.timeline => group.push(directory),
            _ => groups.push(vec![directory]),
        }
    }
    groups
}

/// A directory of tails inside `directory`.
pub(super) fn tails_of(directory: WalDirectory, name: &str) -> Option<WalObject> {
    let belongs =
        |object: &WalObject| matches!(object, WalObject::Tails(segment) if WalDirectory::of(*segment) == directory);
    WalObject::parse(name).filter(belongs)
}

/// A tail inside the directory of its segment's, unless its range lies outside the segment.
pub(super) fn tail_of(segment: SegmentName, name: &str, bytes: u64, size: SegmentSize) -> Option<TailObject> {
    let span = segment_span(segment, size)?;
    let tail = TailObject { name: TailName::parse(name)?, stored_bytes: bytes };
    (span.start <= tail.name.from && tail.name.to <= span.end).then_some(tail)
}

/// What a name is that belongs into this directory.
fn placed(name: &str, directory: WalDirectory, size: SegmentSize) -> Option<WalObject> {
    let object = WalObject::parse(name)?;
    let (WalObject::Segment(segment, _)
    | WalObject::Conflict(segment, ..)
    | WalObject::Repair(segment, ..)
    | WalObject::RawMarker(segment, _)
    | WalObject::Tails(segment)
    | WalObject::Index(IndexName { first: segment, .. })) = object;
    let fits = segment_span(segment, size).is_some();
    (fits && WalDirectory::of(segment) == directory).then_some(object)
}

pub(super) fn add_object<E>(contents: &mut DirectoryContents<E>, name: &str, bytes: u64) {
    let Some(object) = placed(name, contents.directory, contents.segment_size) else { return };
    let stored = |form: Form| SegmentObject { form, stored_bytes: bytes };
    match object {
        WalObject::Segment(segment, form) => contents.segments.entry(segment).or_default().push(stored(form)),
        WalObject::Index(index) => contents.index_files.push((index, bytes)),
        WalObject::Conflict(segment, crc, form) => {
            contents.conflicts.entry(segment).or_default().push((crc, stored(form)));
        }
        WalObject::Repair(segment, crc, form) => {
            contents.repairs.entry(segment).or_default().push((crc, stored(form)));
        }
        WalObject::RawMarker(segment, crc) => contents.raw_markers.entry(segment).or_default().push(crc),
        WalObject::Tails(_) => {} // an object by a directory's name
    }
}

/// Why an index file does not describe the segments its name and place promise.
fn index_fault<E: Indexed>(
    file: &IndexFile<E::Stored>,
    name: IndexName,
    directory: WalDirectory,
    size: SegmentSize,
) -> Option<String> {
    if file.schema != SCHEMA {
        return Some(format!("it has schema {}, expected {SCHEMA}", file.schema));
    }
    if file.segment_size != size {
        let (found, expected) = (file.segment_size.bytes(), size.bytes());
        return Some(format!("it describes segments of {found} bytes, the lineage has {expected}"));
    }
    let fits = |claim: &Claim| {
        WalDirectory::of(claim.segment) == directory
            && (name.first..=name.last).contains(&claim.segment)
            && segment_span(claim.segment, size) == Some(claim.start_lsn..claim.end_lsn)
            && claim.raw_bytes == size.bytes()
            // A writer goes on from there: beyond the segment it would be called durable without being proven.
            && claim.record_ends.iter().flatten().all(|end| *end <= claim.end_lsn)
    };
    if file.entries.is_empty() {
        return Some("it has no entries".to_string());
    }
    let stranger = file.entries.iter().map(E::claim).find(|claim| !fits(claim))?;
    Some(format!("its entry for {} does not fit the segment's name or the file's", stranger.segment))
}
