//! Owns: reading a lineage's objects, bounded and named in every error, and creating the small JSON ones.
//! Does not own: segments' and tails' content (`restore`, `archiver`), retries of an unavailable store (the caller).
//!
//! A truncated, empty or foreign object is an error that names it, never "no data". Unknown names are left alone.

mod backups;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::try_join;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use jiff::Timestamp;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::contents::{Catalog, DirectoryContents, SegmentObject, TailObject, TimelineState, segment_span};
use super::damage::Damages;
use super::index::{IndexEntry, IndexFile};
use super::ledger::{Expired, FactKind, LedgerFact};
use super::lineage::{LineageFile, RepositoryFile, WriterFile};
use crate::codec::Form;
use crate::codec::decode::{DecodeError, ObjectDecoder};
use crate::codec::encrypt::Keys;
use crate::error::{Advice, Disposition, ExitCode};
use crate::repository::layout::{self, Epoch, IndexName, Lineage, TailName, WalDirectory, WalObject};
use crate::repository::{Backend, Entry, Key, StoreError, StoreErrorKind};
use crate::wal::{History, HistoryError, SegmentName, SegmentSize, TimelineId};

/// A larger JSON object is refused unread.
pub const JSON_BYTES_MAX: u64 = 64 << 20;
const SCHEMA: u32 = 1;
/// Small objects fetched at the same time.
const FETCHES: usize = 16;
/// How often a listing is taken again when objects vanish between it and their reading (compaction, merging).
const LISTINGS_MAX: usize = 8;
const EPOCH_ATTEMPTS: u32 = 16;
/// Fetched at a time while a segment is inspected: memory, against requests.
const INSPECT_BYTES: u64 = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("object {object} is damaged: {fault}")]
    Damaged { object: String, fault: String },
    #[error("object {object} is {bytes} bytes long, more than the {limit} it may have")]
    TooLarge { object: String, bytes: u64, limit: u64 },
    #[error("repository {object} has format {found}, this seawall knows formats up to {supported}")]
    NewerFormat { object: String, found: u32, supported: u32 },
    #[error("object {object} has schema {found}, this seawall knows schemas up to {supported}")]
    NewerSchema { object: String, found: u32, supported: u32 },
    #[error("object {object} is not there")]
    Missing { object: String },
    #[error("object {object}: {source}")]
    History { object: String, source: HistoryError },
    #[error(
        "history of timeline {timeline} differs from the stored {object}: stored {stored_bytes} bytes with CRC-32 {stored_crc32:08x}, offered {offered_bytes} bytes with CRC-32 {offered_crc32:08x}"
    )]
    HistoryConflict {
        timeline: TimelineId,
        object: String,
        stored_bytes: usize,
        stored_crc32: u32,
        offered_bytes: usize,
        offered_crc32: u32,
    },
    #[error("could not take an epoch in {location}: {attempts} others were faster")]
    EpochContended { location: String, attempts: u32 },
    #[error("could not get a steady listing of {directory}: objects vanished {attempts} times while they were read")]
    Unsteady { directory: String, attempts: usize },
}

impl Advice for CatalogError {
    fn hint(&self) -> Option<String> {
        let text = match self {
            CatalogError::Store(error) => return error.hint(),
            CatalogError::Damaged { .. } | CatalogError::TooLarge { .. } | CatalogError::History { .. } => {
                "keep the object for inspection; was it changed by something other than seawall?"
            }
            CatalogError::NewerFormat { .. } | CatalogError::NewerSchema { .. } => {
                "a newer seawall wrote it: upgrade this one"
            }
            CatalogError::Missing { .. } => "is `url` (and its prefix) the right one, and is the volume mounted?",
            CatalogError::HistoryConflict { .. } => {
                "two servers were promoted to the same timeline: `seawall init --new-lineage` archives this one apart"
            }
            CatalogError::EpochContended { .. } => "do several agents start at the same time on this cluster?",
            CatalogError::Unsteady { .. } => "does `seawall expire` run at the same time? try again",
        };
        Some(text.to_string())
    }

    fn disposition(&self) -> Disposition {
        match self {
            CatalogError::Store(error) => error.disposition(),
            CatalogError::EpochContended { .. } | CatalogError::Unsteady { .. } => Disposition::Retry,
            CatalogError::NewerFormat { .. } | CatalogError::NewerSchema { .. } => Disposition::Operator,
            CatalogError::Missing { .. } => Disposition::Operator,
            _ => Disposition::Stop,
        }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            CatalogError::Store(error) => error.exit_code(),
            CatalogError::NewerFormat { .. } | CatalogError::NewerSchema { .. } => ExitCode::Config,
            CatalogError::Missing { .. } => ExitCode::Config,
            CatalogError::EpochContended { .. } | CatalogError::Unsteady { .. } => ExitCode::TryAgain,
            _ => ExitCode::Data,
        }
    }
}

/// Reads `repository.json`; `None` when the store answers that there is none. A newer format is refused.
pub async fn read_repository(backend: &dyn Backend) -> Result<Option<RepositoryFile>, CatalogError> {
    let key = layout::repository();
    let Some(body) = fetch_whole(backend, &key, JSON_BYTES_MAX).await? else { return Ok(None) };
    // The version first, alone: the rest of a newer file may have any shape.
    #[derive(serde::Deserialize)]
    struct FormatOnly {
        format: u32,
    }
    let FormatOnly { format } = serde_json::from_slice(&body)
        .map_err(|error| CatalogError::Damaged { object: place(backend, &key), fault: error.to_string() })?;
    if format > layout::FORMAT_VERSION {
        return Err(CatalogError::NewerFormat {
            object: place(backend, &key),
            found: format,
            supported: layout::FORMAT_VERSION,
        });
    }
    parse_json(backend, &key, &body).map(Some)
}

/// Creates `repository.json`. `id` is random and hexadecimal. `AlreadyExists` when there is one.
pub async fn create_repository(
    backend: &dyn Backend,
    now: Timestamp,
    id: &str,
) -> Result<RepositoryFile, CatalogError> {
    let file = RepositoryFile { schema: SCHEMA, format: layout::FORMAT_VERSION, created: now, id: id.to_string() };
    put_json_new(backend, &layout::repository(), &file).await?;
    Ok(file)
}

/// The lineages of a cluster, oldest first (by creation, then system id and ordinal). A directory that looks like a
/// lineage but has no `lineage.json` is an unfinished `init` and left out.
pub async fn lineages(backend: &dyn Backend, cluster: &str) -> Result<Vec<(Lineage, LineageFile)>, CatalogError> {
    let mut found = Vec::new();
    for entry in backend.list(Some(&layout::cluster(cluster))).await? {
        let Entry::Directory(name) = entry else { continue };
        let Some(lineage) = Lineage::parse(cluster, &name) else { continue };
        if let Some(file) = read_lineage(backend, &lineage).await? {
            found.push((lineage, file));
        }
    }
    found.sort_by_key(|(lineage, file)| (file.created, lineage.system_id, lineage.ordinal));
    Ok(found)
}

/// Reads `lineage.json`; `None` when the store answers that there is none.
pub async fn read_lineage(backend: &dyn Backend, lineage: &Lineage) -> Result<Option<LineageFile>, CatalogError> {
    let key = lineage.lineage_json();
    let Some(file) = fetch_json::<LineageFile>(backend, &key).await? else { return Ok(None) };
    if file.system_id != lineage.system_id {
        let fault = format!("it belongs to system {}, not {}", file.system_id, lineage.system_id);
        return Err(CatalogError::Damaged { object: place(backend, &key), fault });
    }
    Ok(Some(file))
}

/// Stores `value` under a name that must be free.
pub async fn put_json_new<T: Serialize>(backend: &dyn Backend, key: &Key, value: &T) -> Result<(), CatalogError> {
    let mut body = serde_json::to_vec_pretty(value).expect("our formats have string keys and no failing serializers");
    body.push(b'\n');
    Ok(backend.put_new(key, &[Bytes::from(body)]).await?)
}

/// Reads a JSON object; `None` when the store answers that there is none.
pub async fn fetch_json<T: DeserializeOwned>(backend: &dyn Backend, key: &Key) -> Result<Option<T>, CatalogError> {
    match fetch_whole(backend, key, JSON_BYTES_MAX).await? {
        Some(body) => parse_json(backend, key, &body).map(Some),
        None => Ok(None),
    }
}

/// A segment object as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredObject {
    pub stored_bytes: u64,
    pub stored_crc32: u32,
    /// `None` where no identity at hand can read it.
    pub raw_crc32: Option<u32>,
}

/// One lineage in one repository.
#[derive(Clone, Debug)]
pub struct Archive {
    pub backend: Arc<dyn Backend>,
    pub lineage: Lineage,
    /// What new objects are encrypted to, and what reads encrypted ones.
    pub keys: Keys,
}

impl Archive {
    pub fn new(backend: Arc<dyn Backend>, lineage: Lineage) -> Archive {
        Archive { backend, lineage, keys: Keys::default() }
    }

    pub fn with_keys(self, keys: Keys) -> Archive {
        Archive { keys, ..self }
    }

    /// The form new objects get.
    pub fn form(&self) -> Form {
        if self.keys.recipients.is_some() { Form::Encrypted } else { Form::Plain }
    }

    fn backend(&self) -> &dyn Backend {
        self.backend.as_ref()
    }

    /// `lineage.json`, which must be there.
    pub async fn lineage_file(&self) -> Result<LineageFile, CatalogError> {
        let file = read_lineage(self.backend(), &self.lineage).await?;
        file.ok_or_else(|| CatalogError::Missing { object: place(self.backend(), &self.lineage.lineage_json()) })
    }

    /// Creates `lineage.json`.
    pub async fn create_lineage(&self, file: &LineageFile) -> Result<(), CatalogError> {
        put_json_new(self.backend(), &self.lineage.lineage_json(), file).await
    }

    /// Every epoch taken so far, in order.
    pub async fn epochs(&self) -> Result<Vec<Epoch>, CatalogError> {
        let listed = self.backend.list(Some(&self.lineage.writers())).await?;
        let mut epochs: Vec<Epoch> = objects(&listed).filter_map(|(name, _)| layout::parse_writer(name)).collect();
        epochs.sort();
        Ok(epochs)
    }

    /// The highest epoch taken so far.
    pub async fn highest_epoch(&self) -> Result<Option<Epoch>, CatalogError> {
        Ok(self.epochs().await?.last().copied())
    }

    /// The highest epoch and who took it: whoever holds a lower one is fenced.
    pub async fn highest_writer(&self) -> Result<Option<WriterFile>, CatalogError> {
        match self.epochs().await?.last() {
            Some(&epoch) => self.writer(epoch).await,
            None => Ok(None),
        }
    }

    pub async fn writer(&self, epoch: Epoch) -> Result<Option<WriterFile>, CatalogError> {
        fetch_json(self.backend(), &self.lineage.writer(epoch)).await
    }

    /// Takes this epoch, here; false when somebody has it.
    pub async fn claim_epoch(
        &self,
        epoch: Epoch,
        slot: &str,
        host: Option<&str>,
        version: &str,
        now: Timestamp,
    ) -> Result<bool, CatalogError> {
        let file = WriterFile {
            schema: SCHEMA,
            epoch,
            slot: slot.to_string(),
            created: now,
            host: host.map(str::to_string),
            version: version.to_string(),
        };
        match put_json_new(self.backend(), &self.lineage.writer(epoch), &file).await {
            Ok(()) => Ok(true),
            Err(CatalogError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Takes the next epoch, above `above`. Whoever is faster gets the number, and this one the number after it.
    pub async fn take_epoch(
        &self,
        above: Epoch,
        slot: &str,
        host: Option<&str>,
        version: &str,
        now: Timestamp,
    ) -> Result<Epoch, CatalogError> {
        for _ in 0..EPOCH_ATTEMPTS {
            let highest = self.epochs().await?.last().copied().unwrap_or_default().max(above);
            let Some(next) = highest.0.checked_add(1).map(Epoch) else { break };
            if self.claim_epoch(next, slot, host, version, now).await? {
                return Ok(next);
            }
        }
        Err(self.epoch_contended(EPOCH_ATTEMPTS))
    }

    pub fn epoch_contended(&self, attempts: u32) -> CatalogError {
        CatalogError::EpochContended { location: place(self.backend(), &self.lineage.writers()), attempts }
    }

    /// Stores a history file. The same bytes again are success, different ones a conflict.
    pub async fn put_history(&self, timeline: TimelineId, content: &Bytes) -> Result<(), CatalogError> {
        let key = self.lineage.history(timeline);
        match self.backend.put_new(&key, std::slice::from_ref(content)).await {
            Err(error) if error.is(StoreErrorKind::AlreadyExists) => {}
            other => return Ok(other?),
        }
        let stored = fetch_whole(self.backend(), &key, History::BYTES_MAX as u64).await?;
        let stored = stored.ok_or_else(|| CatalogError::Missing { object: place(self.backend(), &key) })?;
        if stored == *content {
            return Ok(());
        }
        Err(CatalogError::HistoryConflict {
            timeline,
            object: place(self.backend(), &key),
            stored_bytes: stored.len(),
            stored_crc32: crc32fast::hash(&stored),
            offered_bytes: content.len(),
            offered_crc32: crc32fast::hash(content),
        })
    }

    /// A history file as stored, checked; `None` when the store answers that there is none.
    pub async fn history(&self, timeline: TimelineId) -> Result<Option<(Bytes, History)>, CatalogError> {
        let key = self.lineage.history(timeline);
        let Some(content) = fetch_whole(self.backend(), &key, History::BYTES_MAX as u64).await? else {
            return Ok(None);
        };
        let object = || place(self.backend(), &key);
        let history =
            History::parse(timeline, &content).map_err(|source| CatalogError::History { object: object(), source })?;
        // It has no checksum: a lost end must at least not cut the fork's position short.
        if history.ancestors().is_empty() || !content.ends_with(b"\n") {
            let fault = "a history file names at least one ancestor, and its last line is complete".to_string();
            return Err(CatalogError::Damaged { object: object(), fault });
        }
        Ok(Some((content, history)))
    }

    /// What lies directly in `wal/`: timelines with a history file, and directories of segments, both in order.
    pub async fn wal_listing(&self) -> Result<(Vec<TimelineId>, Vec<WalDirectory>), CatalogError> {
        let listed = self.backend.list(Some(&self.lineage.wal())).await?;
        let mut histories: Vec<TimelineId> =
            objects(&listed).filter_map(|(name, _)| layout::parse_history(name)).collect();
        let directory = |entry: &Entry| match entry {
            Entry::Directory(name) => WalDirectory::parse(name),
            Entry::Object { .. } => None,
        };
        let mut directories: Vec<WalDirectory> = listed.iter().filter_map(directory).collect();
        histories.sort();
        directories.sort();
        Ok((histories, directories))
    }

    /// Every stored history.
    pub async fn histories(&self) -> Result<BTreeMap<TimelineId, History>, CatalogError> {
        let (timelines, _) = self.wal_listing().await?;
        self.read_histories(timelines).await
    }

    async fn read_histories(&self, timelines: Vec<TimelineId>) -> Result<BTreeMap<TimelineId, History>, CatalogError> {
        let read = stream::iter(timelines).map(|timeline| async move {
            let missing = || CatalogError::Missing { object: place(self.backend(), &self.lineage.history(timeline)) };
            let (_, history) = self.history(timeline).await?.ok_or_else(missing)?;
            Ok::<_, CatalogError>((timeline, history))
        });
        read.buffered(FETCHES).try_collect().await
    }

    /// The newest directory of a timeline.
    pub async fn newest_directory(&self, timeline: TimelineId) -> Result<Option<WalDirectory>, CatalogError> {
        let (_, directories) = self.wal_listing().await?;
        Ok(directories.into_iter().rfind(|directory| directory.timeline == timeline))
    }

    /// Everything in one directory. Taken again while objects vanish between listing and reading.
    pub async fn directory(
        &self,
        directory: WalDirectory,
        size: SegmentSize,
    ) -> Result<DirectoryContents, CatalogError> {
        self.directory_part(directory, size, |_| true).await
    }

    /// As [`Archive::directory`], but reads only the index files and tails of one segment.
    pub async fn directory_around(
        &self,
        name: SegmentName,
        size: SegmentSize,
    ) -> Result<DirectoryContents, CatalogError> {
        let concerns = move |object: &WalObject| match object {
            WalObject::Tails(segment) => *segment == name,
            WalObject::Index(index) => index.first <= name && name <= index.last,
            _ => true,
        };
        self.directory_part(WalDirectory::of(name), size, concerns).await
    }

    async fn directory_part(
        &self,
        directory: WalDirectory,
        size: SegmentSize,
        wanted: impl Fn(&WalObject) -> bool,
    ) -> Result<DirectoryContents, CatalogError> {
        for _ in 0..LISTINGS_MAX {
            match self.directory_once(directory, size, &wanted).await {
                Err(CatalogError::Store(error)) if error.is(StoreErrorKind::NotFound) => continue,
                Ok(None) => continue,
                Ok(Some(contents)) => return Ok(contents),
                Err(error) => return Err(error),
            }
        }
        let directory = place(self.backend(), &self.lineage.wal_directory(directory));
        Err(CatalogError::Unsteady { directory, attempts: LISTINGS_MAX })
    }

    /// `None` when the tails of a segment vanished after the listing: it may have been sealed meanwhile.
    async fn directory_once(
        &self,
        directory: WalDirectory,
        size: SegmentSize,
        wanted: &impl Fn(&WalObject) -> bool,
    ) -> Result<Option<DirectoryContents>, CatalogError> {
        let listed = self.backend.list(Some(&self.lineage.wal_directory(directory))).await?;
        let mut contents = DirectoryContents::new(directory, size);
        let mut open = Vec::new();
        for entry in &listed {
            match entry {
                Entry::Object { name, bytes } => add_object(&mut contents, name, *bytes),
                Entry::Directory(name) => open.extend(tails_of(&contents, name).filter(|object| wanted(object))),
            }
        }
        for object in open {
            let WalObject::Tails(name) = object else { continue };
            let tails = self.tails(name, size).await?;
            // A store may show a directory for a moment longer than its last object.
            if tails.is_empty() && !contents.segments.contains_key(&name) {
                if !self.segment_objects(name).await?.is_empty() {
                    return Ok(None);
                }
                continue;
            }
            contents.tails.insert(name, tails);
        }
        let files = contents.index_files.iter().filter(|(name, _)| wanted(&WalObject::Index(*name)));
        let files: Vec<(IndexName, u64)> = files.copied().collect();
        for entry in self.index_entries(files, directory, size).await? {
            contents.add_entry(entry);
        }
        Ok(Some(contents))
    }

    /// Names in a directory that hold any object, sealed or tail, readable or not, in order, of those that are wanted.
    /// Listings only.
    pub async fn segment_names(
        &self,
        directory: WalDirectory,
        size: SegmentSize,
        wanted: impl Fn(SegmentName) -> bool,
    ) -> Result<Vec<SegmentName>, CatalogError> {
        let listed = self.backend.list(Some(&self.lineage.wal_directory(directory))).await?;
        let mut contents = DirectoryContents::new(directory, size);
        let mut names = Vec::new();
        for entry in &listed {
            match entry {
                Entry::Object { name, bytes } => add_object(&mut contents, name, *bytes),
                Entry::Directory(name) => {
                    for object in tails_of(&contents, name) {
                        let WalObject::Tails(name) = object else { continue };
                        if wanted(name) && !self.tails(name, size).await?.is_empty() {
                            names.push(name);
                        }
                    }
                }
            }
        }
        names.extend(contents.segments.keys().chain(contents.repairs.keys()).filter(|name| wanted(**name)));
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// The tails of one segment as listed; those whose range lies outside the segment are left out.
    pub async fn tails(&self, name: SegmentName, size: SegmentSize) -> Result<Vec<TailObject>, CatalogError> {
        let Some(span) = segment_span(name, size) else { return Ok(Vec::new()) };
        let listed = self.backend.list(Some(&self.lineage.tail_directory(name))).await?;
        let parse =
            |(text, bytes): (&str, u64)| TailName::parse(text).map(|name| TailObject { name, stored_bytes: bytes });
        let inside = |tail: &TailObject| span.start <= tail.name.from && tail.name.to <= span.end;
        Ok(objects(&listed).filter_map(parse).filter(inside).collect())
    }

    async fn index_entries(
        &self,
        files: Vec<(IndexName, u64)>,
        directory: WalDirectory,
        size: SegmentSize,
    ) -> Result<Vec<IndexEntry>, CatalogError> {
        let read =
            stream::iter(files).map(|(name, bytes)| async move { self.index_file(name, bytes, directory, size).await });
        let files: Vec<IndexFile> = read.buffered(FETCHES).try_collect().await?;
        Ok(files.into_iter().flat_map(|file| file.entries).collect())
    }

    async fn index_file(
        &self,
        name: IndexName,
        bytes: u64,
        directory: WalDirectory,
        size: SegmentSize,
    ) -> Result<IndexFile, CatalogError> {
        let key = self.lineage.index(name);
        let body = fetch_sized(self.backend(), &key, bytes, JSON_BYTES_MAX).await?;
        let file: IndexFile = parse_json(self.backend(), &key, &body)?;
        match index_fault(&file, name, directory, size) {
            Some(fault) => Err(CatalogError::Damaged { object: place(self.backend(), &key), fault }),
            None => Ok(file),
        }
    }

    /// One index file, by its name.
    pub async fn read_index(&self, name: IndexName, size: SegmentSize) -> Result<IndexFile, CatalogError> {
        let key = self.lineage.index(name);
        let bytes = self
            .backend
            .stat(&key)
            .await?
            .ok_or_else(|| CatalogError::Missing { object: place(self.backend(), &key) })?;
        self.index_file(name, bytes, WalDirectory::of(name.first), size).await
    }

    /// The objects of a segment under its two names: one at most, unless somebody else has been there.
    pub async fn segment_objects(&self, name: SegmentName) -> Result<Vec<SegmentObject>, CatalogError> {
        let (plain, encrypted) = (self.lineage.segment(name, Form::Plain), self.lineage.segment(name, Form::Encrypted));
        let (plain, encrypted) = try_join(self.backend.stat(&plain), self.backend.stat(&encrypted)).await?;
        let plain = plain.map(|stored_bytes| SegmentObject { form: Form::Plain, stored_bytes });
        let encrypted = encrypted.map(|stored_bytes| SegmentObject { form: Form::Encrypted, stored_bytes });
        Ok(plain.into_iter().chain(encrypted).collect())
    }

    /// Reads a segment's object through: what is really there. Damage is `StoreErrorKind::Corrupt`.
    pub async fn inspect_segment(
        &self,
        name: SegmentName,
        object: SegmentObject,
        size: SegmentSize,
    ) -> Result<StoredObject, CatalogError> {
        let key = self.lineage.segment(name, object.form);
        let location = place(self.backend(), &key);
        let corrupt = |error: DecodeError| {
            let (kind, cause) = (StoreErrorKind::Corrupt, error.to_string());
            CatalogError::Store(StoreError::new(kind, "read", location.clone(), cause))
        };
        let identities = self.keys.identities.as_ref();
        let mut decoder = match ObjectDecoder::new(object.form, identities, size.bytes()) {
            Ok(decoder) => Some(decoder),
            Err(error) if error.is_about_keys() => None,
            Err(error) => return Err(corrupt(error)),
        };
        let mut stored_crc32 = crc32fast::Hasher::new();
        let mut at = 0;
        while at < object.stored_bytes {
            let chunk = self.backend.fetch(&key, at..(at + INSPECT_BYTES).min(object.stored_bytes)).await?;
            stored_crc32.update(&chunk);
            at += chunk.len() as u64;
            match decoder.as_mut().map(|decoder| decoder.feed(&chunk, &mut |_| Ok(()))) {
                Some(Err(error)) if error.is_about_keys() => decoder = None,
                Some(Err(error)) => return Err(corrupt(error)),
                Some(Ok(())) | None => {}
            }
        }
        let raw_crc32 = decoder.map(|decoder| decoder.finish(&mut |_| Ok(()))).transpose().map_err(corrupt)?;
        Ok(StoredObject { stored_bytes: object.stored_bytes, stored_crc32: stored_crc32.finalize(), raw_crc32 })
    }

    /// Every fact of the ledger, oldest first.
    pub async fn ledger(&self) -> Result<Vec<LedgerFact>, CatalogError> {
        self.facts(|_| true).await
    }

    /// What `expire` has announced it deletes.
    pub async fn expired(&self) -> Result<Expired, CatalogError> {
        let facts = self.facts(|kind| kind == FactKind::Expired.word()).await?;
        Ok(Expired::of(&facts))
    }

    /// What was found damaged and is not mended.
    pub async fn damages(&self) -> Result<Damages, CatalogError> {
        let kinds = [FactKind::Damaged.word(), FactKind::Mended.word()];
        Ok(Damages::of(&self.facts(|kind| kinds.contains(&kind)).await?))
    }

    async fn facts(&self, wanted: impl Fn(&str) -> bool) -> Result<Vec<LedgerFact>, CatalogError> {
        let listed = self.backend.list(Some(&self.lineage.ledger())).await?;
        let wanted = |name: &str| layout::ledger_kind(name).is_some_and(&wanted);
        let keys: Vec<(Key, u64)> = objects(&listed)
            .filter(|(name, _)| wanted(name))
            .filter_map(|(name, bytes)| Some((self.lineage.ledger_object(name)?, bytes)))
            .collect();
        let read = stream::iter(keys).map(|(key, bytes)| async move {
            let body = fetch_sized(self.backend(), &key, bytes, JSON_BYTES_MAX).await?;
            parse_json(self.backend(), &key, &body)
        });
        let mut facts: Vec<LedgerFact> = read.buffered(FETCHES).try_collect().await?;
        facts.sort_by_key(|fact| fact.at);
        Ok(facts)
    }

    /// Appends a fact under its own time; `random` keeps two facts of one microsecond apart.
    pub async fn append_ledger(&self, fact: &LedgerFact, random: u32) -> Result<(), CatalogError> {
        let key = self.lineage.ledger_entry(fact.at, fact.kind.word(), random);
        put_json_new(self.backend(), &key, fact).await
    }

    /// The whole lineage, without what is expired or damaged.
    pub async fn load_catalog(&self) -> Result<Catalog, CatalogError> {
        let file = self.lineage_file().await?;
        // The ledger first: an expiry is announced before anything vanishes.
        let ledger = self.ledger().await?;
        let (expired, damages) = (Expired::of(&ledger), Damages::of(&ledger));
        let (histories, directories) = self.wal_listing().await?;
        let mut timelines: BTreeMap<TimelineId, Vec<DirectoryContents>> = BTreeMap::new();
        for directory in directories {
            let mut contents = self.directory(directory, file.segment_size).await?;
            contents.subtract(&expired);
            contents.mark(&damages);
            timelines.entry(directory.timeline).or_default().push(contents);
        }
        let histories = self.read_histories(histories).await?;
        Ok(Catalog { lineage: self.lineage.clone(), file, histories, timelines, ledger })
    }

    /// All directories of one timeline, in order, without what is expired.
    pub async fn timeline(
        &self,
        timeline: TimelineId,
        size: SegmentSize,
    ) -> Result<Vec<DirectoryContents>, CatalogError> {
        let expired = self.expired().await?;
        let (_, directories) = self.wal_listing().await?;
        let mut found = Vec::new();
        for directory in directories.into_iter().filter(|directory| directory.timeline == timeline) {
            let mut contents = self.directory(directory, size).await?;
            contents.subtract(&expired);
            found.push(contents);
        }
        Ok(found)
    }

    /// Where a writer of `timeline` resumes. Reads from the newest directory back only until a sealed segment shows.
    pub async fn frontier(&self, timeline: TimelineId, size: SegmentSize) -> Result<TimelineState, CatalogError> {
        let expired = self.expired().await?;
        let (_, mut directories) = self.wal_listing().await?;
        directories.retain(|directory| directory.timeline == timeline);
        let mut read = Vec::new();
        while let Some(directory) = directories.pop() {
            let mut contents = self.directory(directory, size).await?;
            contents.subtract(&expired);
            let sealed = contents.entries.keys().any(|&name| contents.sealed(name).is_some());
            read.insert(0, contents);
            if sealed {
                break;
            }
        }
        Ok(TimelineState::of(timeline, &read))
    }
}

fn tails_of(contents: &DirectoryContents, name: &str) -> impl Iterator<Item = WalObject> + use<> {
    let belongs = |object: &WalObject| matches!(object, WalObject::Tails(segment) if WalDirectory::of(*segment) == contents.directory);
    WalObject::parse(name).filter(belongs).into_iter()
}

fn add_object(contents: &mut DirectoryContents, name: &str, bytes: u64) {
    let Some(object) = WalObject::parse(name) else { return };
    let (WalObject::Segment(segment, _)
    | WalObject::Conflict(segment, ..)
    | WalObject::Repair(segment, ..)
    | WalObject::RawMarker(segment, _)
    | WalObject::Tails(segment)
    | WalObject::Index(IndexName { first: segment, .. })) = object;
    let fits = segment_span(segment, contents.segment_size).is_some();
    if !fits || WalDirectory::of(segment) != contents.directory {
        return;
    }
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
fn index_fault(file: &IndexFile, name: IndexName, directory: WalDirectory, size: SegmentSize) -> Option<String> {
    if file.schema != SCHEMA {
        return Some(format!("it has schema {}, expected {SCHEMA}", file.schema));
    }
    if file.segment_size != size {
        let (found, expected) = (file.segment_size.bytes(), size.bytes());
        return Some(format!("it describes segments of {found} bytes, the lineage has {expected}"));
    }
    let fits = |entry: &IndexEntry| {
        let span = segment_span(entry.segment, size);
        WalDirectory::of(entry.segment) == directory
            && (name.first..=name.last).contains(&entry.segment)
            && span == Some(entry.start_lsn..entry.end_lsn)
            && entry.raw_bytes == size.bytes()
            // A writer goes on from there: beyond the segment it would be called durable without being proven.
            && [entry.summary.record_end, entry.summary.carry.record_end].iter().flatten().all(|end| *end <= entry.end_lsn)
    };
    if file.entries.is_empty() {
        return Some("it has no entries".to_string());
    }
    let stranger = file.entries.iter().find(|entry| !fits(entry))?;
    Some(format!("its entry for {} does not fit the segment's name or the file's", stranger.segment))
}

fn objects(listed: &[Entry]) -> impl Iterator<Item = (&str, u64)> {
    listed.iter().filter_map(|entry| match entry {
        Entry::Object { name, bytes } => Some((name.as_str(), *bytes)),
        Entry::Directory(_) => None,
    })
}

fn parse_json<T: DeserializeOwned>(backend: &dyn Backend, key: &Key, body: &[u8]) -> Result<T, CatalogError> {
    let damaged = |fault: String| CatalogError::Damaged { object: place(backend, key), fault };
    #[derive(serde::Deserialize)]
    struct SchemaOnly {
        schema: u32,
    }
    // A newer schema may have any shape: it is told apart from damage before the rest is read.
    if let Ok(SchemaOnly { schema }) = serde_json::from_slice(body)
        && schema > SCHEMA
    {
        return Err(CatalogError::NewerSchema { object: place(backend, key), found: schema, supported: SCHEMA });
    }
    serde_json::from_slice(body).map_err(|error| damaged(error.to_string()))
}

/// A whole object of at most `limit` bytes; `None` when the store answers that there is none.
async fn fetch_whole(backend: &dyn Backend, key: &Key, limit: u64) -> Result<Option<Bytes>, CatalogError> {
    let Some(bytes) = backend.stat(key).await? else { return Ok(None) };
    let is_about_content = |error: &CatalogError| match error {
        CatalogError::Damaged { .. } => true,
        CatalogError::Store(error) => matches!(error.kind, StoreErrorKind::Corrupt | StoreErrorKind::NotFound),
        _ => false,
    };
    match fetch_sized(backend, key, bytes, limit).await {
        // A repository that was emptied and made anew between the two calls is not a damaged one.
        Err(error) if is_about_content(&error) => match backend.stat(key).await? {
            Some(now) if now == bytes => Err(error),
            Some(now) => fetch_sized(backend, key, now, limit).await.map(Some),
            None => Ok(None),
        },
        fetched => fetched.map(Some),
    }
}

async fn fetch_sized(backend: &dyn Backend, key: &Key, bytes: u64, limit: u64) -> Result<Bytes, CatalogError> {
    if bytes == 0 {
        return Err(CatalogError::Damaged { object: place(backend, key), fault: "it is empty".to_string() });
    }
    if bytes > limit {
        return Err(CatalogError::TooLarge { object: place(backend, key), bytes, limit });
    }
    let body = backend.fetch(key, 0..bytes).await?;
    if body.len() as u64 != bytes {
        let fault = format!("{} of {bytes} bytes could be read", body.len());
        return Err(CatalogError::Damaged { object: place(backend, key), fault });
    }
    Ok(body)
}

/// The full place of an object, as operators know it.
pub fn place(backend: &dyn Backend, key: &Key) -> String {
    format!("{}/{key}", backend.describe().trim_end_matches('/'))
}

#[cfg(test)]
mod tests;
