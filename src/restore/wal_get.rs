//! The `restore_command`: one WAL segment or history file, exactly, or its absence with proof, or an error.
//!
//! Owns: what is delivered, absent, a hole (proto-notes/06-timelines.md, 07-repository-format.md), and every check
//! before a byte is handed over.
//! Does not own: prefetching, the plan of a restore, the process's exit (`cli`): [`ERROR_EXIT_CODE`] and 0 and 1
//! are the only codes it may use, because PostgreSQL takes 1 to 125 for "end of WAL" and promotes.
//!
//! "Absent" is said only after listings that show nothing on the path at or after the name, or nothing before its
//! end. Whatever else is not there is a hole.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::time::Instant;

use crate::catalog::contents::segment_span;
use crate::catalog::store::{self, Archive, CatalogError};
use crate::catalog::{DirectoryContents, Expired, IndexEntry, LineageFile, SegmentObject, TailChain};
use crate::codec::decode::{DecodeError, FrameDecoder};
use crate::error::{Advice, Disposition, ExitCode};
use crate::repository::durable::{Directory, TempFile};
use crate::repository::layout::{self, WalDirectory};
use crate::repository::{Key, StoreError, StoreErrorKind};
use crate::wal::{History, Lsn, SegmentName, SegmentSize, SystemId, TimelineId};

/// What the process exits with for every error: PostgreSQL stops recovery instead of ending it early.
pub const ERROR_EXIT_CODE: u8 = 255;
/// How often everything is listed again when objects vanish, or seem to be missing, while it is looked at.
const LOOKS_MAX: u32 = 5;
const LOOK_PAUSE: Duration = Duration::from_millis(50);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(2);
/// Stored bytes fetched at a time.
const FETCH_BYTES: u64 = 4 << 20;
const LONG_HEADER_BYTES: usize = 40;
const LONG_HEADER_FLAG: u16 = 0x0002;

/// Which line of history the answers belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PathChoice {
    /// The newest timeline the archive knows, by history file or by data, as PostgreSQL's `latest`.
    Latest,
    /// This timeline whole, and its ancestors up to their forks.
    Timeline(TimelineId),
}

#[derive(Clone, Debug)]
pub struct WalGet {
    pub archive: Archive,
    pub path: PathChoice,
    /// How long an unavailable store is asked again.
    pub patience: Duration,
    /// The end of the restore's plan: names that start at or after it are absent.
    pub plan_end: Option<Lsn>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Delivered,
    /// Exit code 1.
    Absent(Absence),
}

/// Why a name is not in the archive, as the store has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Absence {
    #[error("the archive's WAL ends before it")]
    AboveLast,
    #[error("the archive's WAL begins after it")]
    BelowFirst,
    #[error("the restore's path leaves this timeline before it")]
    BeyondFork,
    #[error("its timeline begins after it")]
    BeforeTimeline,
    #[error("its timeline is not on the restore's path")]
    NotOnPath,
    #[error("it lies after the end of the restore's plan")]
    AfterPlan,
    #[error("there is no such history file")]
    NoHistory,
    #[error("seawall archives no files of this kind")]
    NotArchived,
}

#[derive(Debug, thiserror::Error)]
pub enum WalGetError {
    #[error("{name:?} is not a name PostgreSQL asks for: expected a WAL segment, a history or a backup file")]
    Usage { name: String },
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("segment {name} is a hole in the archive: {fault}")]
    Hole { name: SegmentName, fault: String },
    #[error("segment {name} cannot be told: index entries disagree on its content")]
    Disputed { name: SegmentName },
    #[error("object {object} is damaged: {fault}")]
    Damaged { object: String, fault: String },
    #[error("object {object} vanished while it was read")]
    Vanished { object: String },
    #[error("the history of timeline {timeline} is not in the archive: which WAL leads to it is unknown")]
    HistoryMissing { timeline: TimelineId },
    #[error("could not write {path}: {source}")]
    Destination { path: PathBuf, source: io::Error },
}

impl WalGetError {
    /// The store may answer in a moment.
    fn is_transient(&self) -> bool {
        match self {
            WalGetError::Store(error) | WalGetError::Catalog(CatalogError::Store(error)) => {
                error.is(StoreErrorKind::Unavailable)
            }
            WalGetError::Catalog(CatalogError::Unsteady { .. }) => true,
            _ => false,
        }
    }

    /// A writer at work can look like this: look again before concluding anything.
    fn may_be_in_motion(&self) -> bool {
        match self {
            WalGetError::Vanished { .. } | WalGetError::Hole { .. } => true,
            WalGetError::Catalog(CatalogError::Store(error)) => error.is(StoreErrorKind::NotFound),
            _ => false,
        }
    }
}

impl Advice for WalGetError {
    fn hint(&self) -> Option<String> {
        let text = match self {
            WalGetError::Catalog(error) => return error.hint(),
            WalGetError::Store(error) => return error.hint(),
            WalGetError::Usage { .. } => "restore_command = 'seawall wal-get %f %p'",
            WalGetError::Hole { .. } => "`seawall gaps` names every hole; restore to a target before this one",
            WalGetError::Disputed { .. } => "two writers stored different WAL under one name: see `seawall gaps`",
            WalGetError::Damaged { .. } => "keep the object for inspection and run `seawall verify`",
            WalGetError::Vanished { .. } => "does `seawall expire` run at the same time? recovery can be started again",
            WalGetError::HistoryMissing { .. } => "copy the .history file from the server's pg_wal into the archive",
            WalGetError::Destination { .. } => "is there room, and may this user write there?",
        };
        Some(text.to_string())
    }

    fn disposition(&self) -> Disposition {
        if self.is_transient() { Disposition::Retry } else { Disposition::Operator }
    }

    /// For logs only: the process exits with [`ERROR_EXIT_CODE`].
    fn exit_code(&self) -> ExitCode {
        match self {
            WalGetError::Catalog(error) => error.exit_code(),
            WalGetError::Store(error) => error.exit_code(),
            WalGetError::Usage { .. } => ExitCode::Usage,
            WalGetError::Destination { .. } => ExitCode::Permission,
            _ => ExitCode::Data,
        }
    }
}

/// What PostgreSQL asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Segment(SegmentName),
    History(TimelineId),
    /// `.backup` and `.partial` files: real names, never archived.
    Other,
}

impl Request {
    fn parse(name: &str) -> Result<Request, WalGetError> {
        if let Ok(segment) = name.parse() {
            return Ok(Request::Segment(segment));
        }
        if let Some(timeline) = layout::parse_history(name) {
            return Ok(Request::History(timeline));
        }
        let offset =
            |text: &str| text.len() == 8 && text.bytes().all(|b| b.is_ascii_digit() || (b'A'..=b'F').contains(&b));
        match name.split_once('.') {
            Some((segment, rest)) if segment.parse::<SegmentName>().is_ok() => match rest.split_once('.') {
                None if rest == "partial" => Ok(Request::Other),
                Some((text, "backup")) if offset(text) => Ok(Request::Other),
                _ => Err(usage(name)),
            },
            _ => Err(usage(name)),
        }
    }
}

fn usage(name: &str) -> WalGetError {
    WalGetError::Usage { name: name.chars().take(80).collect() }
}

impl WalGet {
    pub const PATIENCE: Duration = Duration::from_secs(30);

    pub fn new(archive: Archive, path: PathChoice) -> WalGet {
        WalGet { archive, path, patience: Self::PATIENCE, plan_end: None }
    }

    /// Delivers `name` as `dest`, complete and checked, or says why not. `dest` is untouched unless delivered.
    pub async fn get(&self, name: &str, dest: &Path) -> Result<Outcome, WalGetError> {
        let request = Request::parse(name)?;
        let started = Instant::now();
        let mut pause = LOOK_PAUSE;
        let mut looks = 0;
        loop {
            let error = match self.answer(request, dest).await {
                Err(error) => error,
                answered => return answered,
            };
            looks += u32::from(error.may_be_in_motion());
            let again = if error.is_transient() {
                started.elapsed() + pause <= self.patience
            } else {
                error.may_be_in_motion() && looks < LOOKS_MAX
            };
            if !again {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(RETRY_PAUSE_MAX);
        }
    }

    async fn answer(&self, request: Request, dest: &Path) -> Result<Outcome, WalGetError> {
        // Read first, whatever is asked: behind a mistyped prefix everything would be absent.
        let file = self.archive.lineage_file().await?;
        match request {
            Request::Segment(name) => self.segment(&file, name, dest).await,
            Request::History(timeline) => self.history(timeline, dest).await,
            Request::Other => Ok(Outcome::Absent(Absence::NotArchived)),
        }
    }

    async fn history(&self, timeline: TimelineId, dest: &Path) -> Result<Outcome, WalGetError> {
        let Some((content, _)) = self.archive.history(timeline).await? else {
            return Ok(Outcome::Absent(Absence::NoHistory));
        };
        let mut temp = temp_beside(dest)?;
        temp.file().write_all(&content).map_err(|source| destination(dest, source))?;
        put_into_place(temp, dest)?;
        Ok(Outcome::Delivered)
    }

    async fn segment(&self, file: &LineageFile, name: SegmentName, dest: &Path) -> Result<Outcome, WalGetError> {
        let size = file.segment_size;
        let span = segment_span(name, size).ok_or_else(|| usage(&name.to_string()))?;
        if self.plan_end.is_some_and(|end| span.start >= end) {
            return Ok(Outcome::Absent(Absence::AfterPlan));
        }
        let (histories, directories) = self.archive.wal_listing().await?;
        let path = self.path(file, &histories, &directories).await?;
        let limit = match on_path(&path, name.timeline, &span) {
            Ok(limit) => limit,
            Err(absence) => return Ok(Outcome::Absent(absence)),
        };
        let wanted = Wanted { name, size, start: span.start, end: span.end, limit, system_id: file.system_id };
        let mut first_hole = None;
        for source in wanted.sources(&path) {
            let contents = self.archive.directory_around(source, size).await?;
            if contents.disputed.contains_key(&source) {
                return Err(WalGetError::Disputed { name: source });
            }
            if self.sealed(&wanted, source, &contents, dest).await? {
                return Ok(Outcome::Delivered);
            }
            let shown = Shown { path: &path, directories: &directories };
            match self.unfinished(&wanted, source, &contents, &shown, dest).await {
                Ok(true) => return Ok(Outcome::Delivered),
                Ok(false) => {}
                // A child's segment may still begin with all of it.
                Err(hole @ WalGetError::Hole { .. }) => first_hole = first_hole.or(Some(hole)),
                Err(error) => return Err(error),
            }
        }
        if let Some(hole) = first_hole {
            return Err(hole);
        }
        self.conclude(&wanted, &Shown { path: &path, directories: &directories }).await.map(Outcome::Absent)
    }

    /// The line of history answers belong to.
    async fn path(
        &self,
        file: &LineageFile,
        histories: &[TimelineId],
        directories: &[WalDirectory],
    ) -> Result<History, WalGetError> {
        let timeline = match self.path {
            PathChoice::Timeline(timeline) => timeline,
            PathChoice::Latest => {
                let with_data = directories.iter().map(|directory| directory.timeline);
                histories.iter().copied().chain(with_data).fold(file.start_timeline, TimelineId::max)
            }
        };
        let missing = || WalGetError::HistoryMissing { timeline };
        if histories.contains(&timeline) {
            return Ok(self.archive.history(timeline).await?.ok_or_else(missing)?.1);
        }
        // Timeline 1 never has a history file; an adopted archive may start above it without one.
        let rootless = timeline == TimelineId(1) || timeline == file.start_timeline;
        rootless.then(|| History::root(timeline)).ok_or_else(missing)
    }

    /// Delivers the sealed segment `source`; false when there is none.
    async fn sealed(
        &self,
        wanted: &Wanted,
        source: SegmentName,
        contents: &DirectoryContents,
        dest: &Path,
    ) -> Result<bool, WalGetError> {
        let entry = contents.entries.get(&source);
        let mut first_fault = None;
        for copy in self.copies(source, entry, contents) {
            match self.whole_copy(wanted, &copy, dest).await {
                Ok(()) => return Ok(true),
                Err(error @ WalGetError::Damaged { .. }) => first_fault = first_fault.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        match (first_fault, entry) {
            (Some(fault), _) => Err(fault),
            (None, Some(_)) if !self.archive.expired().await?.contains(source) => {
                Err(WalGetError::Hole { name: source, fault: "it is indexed, but its object is not there".into() })
            }
            _ => Ok(false),
        }
    }

    /// The objects that may hold the whole segment, the preferred one first. An object that no entry describes
    /// proves itself: only a complete segment decodes to the full size, every frame carries a checksum of its
    /// content, and a name is only given to what was proven. So it is served; a stranger fails the header check.
    fn copies(&self, source: SegmentName, entry: Option<&IndexEntry>, contents: &DirectoryContents) -> Vec<SealedCopy> {
        let lineage = &self.archive.lineage;
        let repairs = contents.repairs.get(&source).into_iter().flatten();
        let mut copies: Vec<SealedCopy> = repairs
            .filter(|(raw_crc32, _)| entry.is_none_or(|entry| entry.raw_crc32.0 == *raw_crc32))
            .map(|&(raw_crc32, SegmentObject { form, stored_bytes })| {
                let key = lineage.repair(source, raw_crc32, form);
                SealedCopy { key, stored_bytes, raw_crc32: Some(raw_crc32), indexed_bytes: None }
            })
            .collect();
        let objects = contents.segments.get(&source).into_iter().flatten();
        copies.extend(objects.map(|&SegmentObject { form, stored_bytes }| SealedCopy {
            key: lineage.segment(source, form),
            stored_bytes,
            raw_crc32: entry.map(|entry| entry.raw_crc32.0),
            indexed_bytes: entry.map(|entry| entry.stored_bytes),
        }));
        copies
    }

    async fn whole_copy(&self, wanted: &Wanted, copy: &SealedCopy, dest: &Path) -> Result<(), WalGetError> {
        if let Some(indexed) = copy.indexed_bytes
            && indexed != copy.stored_bytes
        {
            let fault = format!("it is {} bytes long, its index entry says {indexed}", copy.stored_bytes);
            return Err(self.damaged(&copy.key, fault));
        }
        let mut target = Target::new(dest, wanted.limit - wanted.start)?;
        let crc = self.decode(&copy.key, copy.stored_bytes, wanted.size.bytes(), 0, &mut target).await?;
        if let Some(expected) = copy.raw_crc32
            && expected != crc
        {
            let fault = format!("its content has CRC-32 {crc:08x}, expected {expected:08x}");
            return Err(self.damaged(&copy.key, fault));
        }
        wanted.check_header(&target.head).map_err(|fault| self.damaged(&copy.key, fault))?;
        target.finish(wanted.size)
    }

    /// Delivers an unfinished segment from its tails, where that is the truth; false when there are none.
    async fn unfinished(
        &self,
        wanted: &Wanted,
        source: SegmentName,
        contents: &DirectoryContents,
        shown: &Shown<'_>,
        dest: &Path,
    ) -> Result<bool, WalGetError> {
        let Some(tails) = contents.tails.get(&source).filter(|tails| !tails.is_empty()) else { return Ok(false) };
        if let Some(empty) = tails.iter().find(|tail| tail.stored_bytes == 0) {
            let key = self.archive.lineage.tail(source, &empty.name);
            return Err(self.damaged(&key, "it is empty".to_string()));
        }
        if self.archive.expired().await?.contains(source) {
            return Ok(false);
        }
        let chain = contents.tail_chain(source);
        let end = chain.end_from(wanted.start);
        if let Some(fault) = self.tail_fault(wanted, &chain, end, shown).await? {
            return Err(WalGetError::Hole { name: source, fault });
        }
        self.assemble(wanted, source, contents, &chain, end, dest).await?;
        Ok(true)
    }

    /// Why tails up to `end` are not the end of the path's WAL.
    async fn tail_fault(
        &self,
        wanted: &Wanted,
        chain: &TailChain,
        end: Lsn,
        shown: &Shown<'_>,
    ) -> Result<Option<String>, WalGetError> {
        if end.saturating_distance(wanted.start) < LONG_HEADER_BYTES as u64 {
            return Ok(Some("its tails do not hold its beginning".to_string()));
        }
        if end >= wanted.limit {
            return Ok(None);
        }
        if let Some(beyond) = chain.links.iter().find(|link| link.from > end) {
            return Ok(Some(format!("its tails end at {end} and go on at {}", beyond.from)));
        }
        let later = self.data(shown, Side::After, wanted).await?;
        Ok(later.map(|name| format!("its tails end at {end}, but {name} is in the archive")))
    }

    /// Writes the tails one after the other. Bytes that two of them hold are compared.
    async fn assemble(
        &self,
        wanted: &Wanted,
        source: SegmentName,
        contents: &DirectoryContents,
        chain: &TailChain,
        end: Lsn,
        dest: &Path,
    ) -> Result<(), WalGetError> {
        let mut target = Target::new(dest, end.min(wanted.limit) - wanted.start)?;
        for link in chain.links.iter().filter(|link| link.from < end) {
            let tail = link.tail;
            let key = self.archive.lineage.tail(source, &tail);
            let listed = contents.tails.get(&source).into_iter().flatten().find(|listed| listed.name == tail);
            let stored_bytes = listed.map_or(0, |listed| listed.stored_bytes);
            let offset = tail.from - wanted.start;
            let crc = self.decode(&key, stored_bytes, tail.to - tail.from, offset, &mut target).await?;
            if crc != tail.raw_crc32 {
                let fault = format!("its content has CRC-32 {crc:08x}, its name says {:08x}", tail.raw_crc32);
                return Err(self.damaged(&key, fault));
            }
            wanted.check_header(&target.head).map_err(|fault| self.damaged(&key, fault))?;
        }
        target.finish(wanted.size)
    }

    /// Decodes one object to the target, from `offset` on; tells the CRC-32 of its raw bytes.
    async fn decode(
        &self,
        key: &Key,
        stored_bytes: u64,
        raw_bytes: u64,
        offset: u64,
        target: &mut Target,
    ) -> Result<u32, WalGetError> {
        let failed = |error: DecodeError, target: &Target| match error {
            DecodeError::Sink(source) if !target.contradicted => destination(&target.dest, source),
            error => self.damaged(key, error.to_string()),
        };
        let mut decoder = FrameDecoder::new(raw_bytes).map_err(|error| failed(error, target))?;
        let mut fetched = 0;
        let mut position = offset;
        while fetched < stored_bytes {
            let range = fetched..stored_bytes.min(fetched + FETCH_BYTES);
            let length = range.end - range.start;
            let part = self.archive.backend.fetch(key, range).await.map_err(|error| self.fetch_error(key, error))?;
            if part.len() as u64 != length {
                return Err(self.damaged(key, format!("it ends before its {stored_bytes} bytes")));
            }
            fetched += length;
            let mut sink = |raw: &[u8]| {
                target.write_at(position, raw)?;
                position += raw.len() as u64;
                Ok(())
            };
            if let Err(error) = decoder.feed(&part, &mut sink) {
                return Err(failed(error, target));
            }
        }
        decoder.finish().map_err(|error| failed(error, target))
    }

    fn fetch_error(&self, key: &Key, error: StoreError) -> WalGetError {
        match error.kind {
            StoreErrorKind::NotFound => {
                WalGetError::Vanished { object: store::place(self.archive.backend.as_ref(), key) }
            }
            StoreErrorKind::Corrupt => self.damaged(key, error.cause),
            _ => WalGetError::Store(error),
        }
    }

    fn damaged(&self, key: &Key, fault: String) -> WalGetError {
        WalGetError::Damaged { object: store::place(self.archive.backend.as_ref(), key), fault }
    }

    /// Nothing of the segment is there: absent or a hole?
    async fn conclude(&self, wanted: &Wanted, shown: &Shown<'_>) -> Result<Absence, WalGetError> {
        let Some(after) = self.data(shown, Side::After, wanted).await? else {
            return Ok(Absence::AboveLast);
        };
        let Some(before) = self.data(shown, Side::Before, wanted).await? else {
            return Ok(Absence::BelowFirst);
        };
        let fault = format!("it is not there, but {before} and {after} are");
        Err(WalGetError::Hole { name: wanted.name, fault })
    }

    /// Any segment of the path, sealed or not, that lies on one side of the wanted one and is not expired.
    async fn data(&self, shown: &Shown<'_>, side: Side, wanted: &Wanted) -> Result<Option<SegmentName>, WalGetError> {
        // The ledger first, then listings of its own: what is announced there is not data any more.
        let expired = self.archive.expired().await?;
        for directory in side.order(shown.directories) {
            if !shown.path.contains(directory.timeline) || !side.concerns(directory, wanted.name) {
                continue;
            }
            for name in self.archive.segment_names(directory, wanted.size).await? {
                if side.holds(name, wanted.name) && counts(shown.path, name, wanted.size, &expired) {
                    return Ok(Some(name));
                }
            }
        }
        Ok(None)
    }
}

/// Whether a segment is part of the path and not expired.
fn counts(path: &History, name: SegmentName, size: SegmentSize, expired: &Expired) -> bool {
    let Some(span) = segment_span(name, size) else { return false };
    on_path(path, name.timeline, &span).is_ok() && !expired.contains(name)
}

/// How far the path goes along the timeline inside the segment, or why it holds none of it.
fn on_path(path: &History, timeline: TimelineId, span: &std::ops::Range<Lsn>) -> Result<Lsn, Absence> {
    let begin = path.begin_of(timeline).ok_or(Absence::NotOnPath)?;
    let limit = path.end_of(timeline).map_or(span.end, |fork| fork.min(span.end));
    // A timeline that forks at a segment's very end begins with the next segment.
    if span.end <= begin {
        Err(Absence::BeforeTimeline)
    } else if limit <= span.start {
        Err(Absence::BeyondFork)
    } else {
        Ok(limit)
    }
}

#[derive(Clone, Copy, Debug)]
enum Side {
    After,
    Before,
}

impl Side {
    fn concerns(self, directory: WalDirectory, wanted: SegmentName) -> bool {
        match self {
            Side::After => directory.high >= wanted.high,
            Side::Before => directory.high <= wanted.high,
        }
    }

    /// Along a path a child's segment comes after its parent's of the same number.
    fn holds(self, name: SegmentName, wanted: SegmentName) -> bool {
        let place = |name: SegmentName| (name.high, name.low, name.timeline);
        match self {
            Side::After => place(name) > place(wanted),
            Side::Before => place(name) < place(wanted),
        }
    }

    /// The likeliest directories first.
    fn order(self, directories: &[WalDirectory]) -> Vec<WalDirectory> {
        let mut directories = directories.to_vec();
        if matches!(self, Side::After) {
            directories.reverse();
        }
        directories
    }
}

#[derive(Clone, Copy, Debug)]
struct Shown<'a> {
    path: &'a History,
    directories: &'a [WalDirectory],
}

#[derive(Debug)]
struct SealedCopy {
    key: Key,
    stored_bytes: u64,
    /// What the index entry, or the name of a repair, promises.
    raw_crc32: Option<u32>,
    indexed_bytes: Option<u64>,
}

/// The segment asked for: [start, end), of which the path holds [start, limit).
#[derive(Clone, Copy, Debug)]
struct Wanted {
    name: SegmentName,
    size: SegmentSize,
    start: Lsn,
    end: Lsn,
    limit: Lsn,
    system_id: SystemId,
}

impl Wanted {
    /// Names under which the bytes may be: where the path leaves the timeline inside the segment, the children's
    /// segments begin with the same bytes.
    fn sources(&self, path: &History) -> Vec<SegmentName> {
        let mut names = vec![self.name];
        let mut timeline = self.name.timeline;
        while self.limit < self.end
            && let Some(child) = path.child_of(timeline)
            && path.begin_of(child).is_some_and(|begin| begin < self.end)
        {
            names.push(SegmentName { timeline: child, ..self.name });
            timeline = child;
        }
        names
    }

    /// What the long header of the first page must say (proto-notes/05-wal-format.md, "page header").
    fn check_header(&self, head: &[u8]) -> Result<(), String> {
        if head.len() < LONG_HEADER_BYTES {
            return Err("it does not hold a whole page header".to_string());
        }
        let u16_at = |at: usize| u16::from_le_bytes(head[at..at + 2].try_into().expect("two bytes"));
        let u32_at = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().expect("four bytes"));
        let u64_at = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
        let differs = |what: &str, found: &dyn std::fmt::Display, expected: &dyn std::fmt::Display| {
            Err(format!("its page header has {what} {found}, expected {expected}"))
        };
        let (flags, timeline, address) = (u16_at(2), TimelineId(u32_at(4)), Lsn(u64_at(8)));
        let (system_id, size) = (SystemId(u64_at(24)), u64::from(u32_at(32)));
        if flags & LONG_HEADER_FLAG == 0 {
            return Err("it does not begin with a long page header".to_string());
        }
        if address != self.start {
            return differs("address", &address, &self.start);
        }
        if system_id != self.system_id {
            return differs("system identifier", &system_id, &self.system_id);
        }
        if size != self.size.bytes() {
            return differs("segment size", &size, &self.size.bytes());
        }
        if timeline == TimelineId(0) || timeline > self.name.timeline {
            return differs("timeline", &timeline, &format_args!("at most {}", self.name.timeline));
        }
        Ok(())
    }
}

/// A segment being put together in a temporary file beside its destination.
#[derive(Debug)]
struct Target {
    dest: PathBuf,
    temp: TempFile,
    /// Bytes from here on are zeros, whatever is decoded.
    limit: u64,
    written: u64,
    /// The first bytes as decoded, for the header check.
    head: Vec<u8>,
    /// Two objects hold different bytes for one position.
    contradicted: bool,
}

impl Target {
    fn new(dest: &Path, limit: u64) -> Result<Target, WalGetError> {
        let temp = temp_beside(dest)?;
        Ok(Target { dest: dest.to_path_buf(), temp, limit, written: 0, head: Vec::new(), contradicted: false })
    }

    /// Takes bytes that begin at or before the end of what is written; the ones already there are compared.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if offset == self.head.len() as u64 && self.head.len() < LONG_HEADER_BYTES {
            let count = bytes.len().min(LONG_HEADER_BYTES - self.head.len());
            self.head.extend_from_slice(&bytes[..count]);
        }
        let bytes = &bytes[..bytes.len().min(self.limit.saturating_sub(offset) as usize)];
        if bytes.is_empty() {
            return Ok(());
        }
        let known = bytes.len().min(self.written.saturating_sub(offset) as usize);
        self.compare(offset, &bytes[..known])?;
        if offset + (known as u64) < self.written {
            return Ok(());
        }
        self.temp.file().write_all_at(&bytes[known..], offset + known as u64)?;
        self.written = offset + bytes.len() as u64;
        Ok(())
    }

    fn compare(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut known = vec![0; bytes.len()];
        self.temp.file().read_exact_at(&mut known, offset)?;
        if known != bytes {
            self.contradicted = true;
            return Err(io::Error::other("its bytes differ from another tail's"));
        }
        Ok(())
    }

    /// Pads with zeros and gives the file its name.
    fn finish(mut self, size: SegmentSize) -> Result<(), WalGetError> {
        if self.written != self.limit {
            let source = io::Error::other(format!("{} of {} bytes were written", self.written, self.limit));
            return Err(destination(&self.dest, source));
        }
        self.temp.file().set_len(size.bytes()).map_err(|source| destination(&self.dest, source))?;
        put_into_place(self.temp, &self.dest)
    }
}

fn temp_beside(dest: &Path) -> Result<TempFile, WalGetError> {
    let parent = dest.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let temp = Directory::open(parent).and_then(TempFile::create);
    temp.map_err(|source| destination(dest, source))
}

/// PostgreSQL sees a complete file or none. Nothing is synced, because recovery asks again after a crash.
fn put_into_place(temp: TempFile, dest: &Path) -> Result<(), WalGetError> {
    let name = dest.file_name().ok_or_else(|| destination(dest, io::ErrorKind::InvalidInput.into()))?;
    temp.rename_over(name).map(drop).map_err(|source| destination(dest, source))
}

fn destination(path: &Path, source: io::Error) -> WalGetError {
    WalGetError::Destination { path: path.to_path_buf(), source }
}

/// The system identifier of a data directory: the first field of `global/pg_control`.
pub fn read_system_id(pgdata: &Path) -> io::Result<SystemId> {
    let mut bytes = [0; 8];
    File::open(pgdata.join("global/pg_control"))?.read_exact_at(&mut bytes, 0)?;
    match u64::from_le_bytes(bytes) {
        0 => Err(io::Error::new(io::ErrorKind::InvalidData, "pg_control holds no system identifier")),
        id => Ok(SystemId(id)),
    }
}

#[cfg(test)]
mod tests;
