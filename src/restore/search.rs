//! Owns: reading the archived WAL of a line for single records, or for what a segment holds, where the index does not
//! tell enough.
//! Does not own: which part is looked into (`choose.rs`, `commits.rs`, `cli`), delivering segments (`wal_get.rs`), what a record says (`wal`).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::path::Path;

use async_trait::async_trait;

use super::wal_get::{Absence, Holder, Outcome, PathChoice, WalGet, WalGetError};
use crate::error::{Advice, Disposition, ExitCode};
use crate::wal::{
    Carry, Found, History, Lsn, Proof, ScanError, ScanOptions, Scanner, SegmentName, SegmentNumber, SegmentSize,
    SegmentSummary, Sought, SystemId, TimelineId,
};

const READ_BYTES: usize = 128 << 10;

/// Whoever can read a line's WAL.
#[async_trait]
pub trait Search: Sync {
    /// The records that start in `range` and are whole before `readable`, in order; the first few of them (see `Found`).
    /// `range` and `readable` lie in one stretch.
    async fn find(
        &self,
        path: &History,
        range: Range<Lsn>,
        readable: Lsn,
        sought: Sought,
    ) -> Result<Vec<Found>, SearchError>;
}

#[derive(Debug, thiserror::Error)]
pub enum SearchError {
    #[error("could not look into the WAL: {0}")]
    WalGet(#[from] WalGetError),
    #[error("could not look into the WAL: segment {name} is not in the archive ({absence})")]
    Absent { name: SegmentName, absence: Absence },
    #[error("could not look into the WAL: segment {name} is damaged: {source}")]
    Damaged { name: SegmentName, source: ScanError },
    #[error("could not look into the WAL: segment {name} is in a format that is not known")]
    Unproven { name: SegmentName },
    #[error("could not look into the WAL: {0}")]
    Scratch(#[from] io::Error),
}

impl Advice for SearchError {
    fn hint(&self) -> Option<String> {
        match self {
            SearchError::WalGet(error) => error.hint(),
            SearchError::Absent { .. } => Some("does `seawall expire` run at the same time? try again".to_string()),
            SearchError::Damaged { .. } => Some("keep the object for inspection and run `seawall verify`".to_string()),
            SearchError::Unproven { .. } => Some(
                "a newer seawall may know it; targets latest, immediate and lsn:X/X need no look inside".to_string(),
            ),
            SearchError::Scratch(_) => {
                Some("is there room, and may this user write there? TMPDIR names another place".to_string())
            }
        }
    }

    fn disposition(&self) -> Disposition {
        match self {
            SearchError::WalGet(error) => error.disposition(),
            _ => Disposition::Operator,
        }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            SearchError::WalGet(error) => error.exit_code(),
            SearchError::Absent { .. } => ExitCode::TryAgain,
            SearchError::Damaged { .. } | SearchError::Unproven { .. } => ExitCode::Data,
            SearchError::Scratch(_) => ExitCode::Unavailable,
        }
    }
}

/// Reads segments as `wal-get` would deliver them.
#[derive(Clone, Debug)]
pub struct ArchiveSearch {
    /// The same lineage in every repository; at least one.
    pub holders: Vec<Holder>,
    pub system_id: SystemId,
    pub segment_size: SegmentSize,
}

#[async_trait]
impl Search for ArchiveSearch {
    async fn find(
        &self,
        path: &History,
        range: Range<Lsn>,
        readable: Lsn,
        sought: Sought,
    ) -> Result<Vec<Found>, SearchError> {
        let scratch = tempfile::tempdir()?;
        let file = scratch.path().join("segment");
        let size = self.segment_size;
        let start = size.floor(range.start);
        let wants_first = matches!(sought, Sought::RecordFrom(_) | Sought::EndPast { .. });
        let options = ScanOptions { system_id: self.system_id, segment_size: size, history: path.clone() };
        let mut scanner = Scanner::new(options, start, Carry::default()).seeking(sought);
        let inside = |found: &&Found| range.contains(&found.lsn);
        // Beyond the range: what starts in it has to end.
        while scanner.position() < readable && (scanner.position() < range.end || scanner.proven() < range.end) {
            let number = size.segment_of(scanner.position());
            let (name, end) = self.segment(path, number, readable, &file).await?;
            if end <= scanner.position() {
                break; // a fork that nobody has gone on from
            }
            read(&file, &mut scanner, name, end)?;
            let _ = std::fs::remove_file(&file);
            if scanner.found_all_wanted() || wants_first && scanner.found().any(|found| inside(&found)) {
                break;
            }
        }
        Ok(scanner.found().filter(inside).copied().collect())
    }
}

impl ArchiveSearch {
    /// What an unfinished segment says up to `end`. `carry` is what the segment before it left behind, where that is known.
    pub async fn summary(
        &self,
        path: &History,
        name: SegmentName,
        carry: Carry,
        end: Lsn,
    ) -> Result<SegmentSummary, SearchError> {
        let scratch = tempfile::tempdir()?;
        let file = scratch.path().join("segment");
        let size = self.segment_size;
        let number = size.segment_before(end);
        let (found, end) = self.segment(path, number, end, &file).await?;
        if found != name {
            return Err(SearchError::Absent { name, absence: Absence::NotArchived });
        }
        let options = ScanOptions { system_id: self.system_id, segment_size: size, history: path.clone() };
        let mut scanner = Scanner::new(options, size.start_of(number), carry);
        read(&file, &mut scanner, name, end)?;
        Ok(scanner.summary_of_open_segment().clone())
    }

    /// Fetches a segment by the newest timeline that has it; tells up to where it counts.
    async fn segment(
        &self,
        path: &History,
        number: SegmentNumber,
        readable: Lsn,
        file: &Path,
    ) -> Result<(SegmentName, Lsn), SearchError> {
        let size = self.segment_size;
        let (start, end) = (size.start_of(number), size.end_of(number).min(readable));
        let timelines = path.ancestors().iter().map(|entry| entry.timeline).chain([path.timeline]);
        let is_on = |timeline: &TimelineId| {
            let begin = path.begin_of(*timeline).map_or(Lsn::MAX, |begin| size.floor(begin));
            begin <= start && path.end_of(*timeline).is_none_or(|left| start < left)
        };
        let mut first_absence = None;
        for timeline in timelines.filter(is_on).collect::<Vec<_>>().into_iter().rev() {
            let name = SegmentName::new(timeline, number, size);
            let wal_get = WalGet {
                plan_end: Some(readable),
                ..WalGet::new(self.holders.clone(), PathChoice::Timeline(path.timeline))
            };
            match wal_get.get(&name.to_string(), file).await? {
                Outcome::Delivered => return Ok((name, end.min(path.end_of(timeline).unwrap_or(Lsn::MAX)))),
                Outcome::Absent(absence) => {
                    first_absence = first_absence.or(Some(SearchError::Absent { name, absence }))
                }
            }
        }
        Err(first_absence.expect("some timeline of the path goes through every position"))
    }
}

/// Feeds a segment's file up to `end`: behind it are the zeros it was padded with.
fn read(path: &Path, scanner: &mut Scanner, name: SegmentName, end: Lsn) -> Result<(), SearchError> {
    let mut file = File::open(path)?;
    file.seek(SeekFrom::Start(scanner.segment_size().offset_of(scanner.position())))?;
    let mut buffer = vec![0; READ_BYTES];
    while scanner.position() < end {
        let wanted = (end - scanner.position()).min(READ_BYTES as u64) as usize;
        file.read_exact(&mut buffer[..wanted])?;
        let fed = scanner.feed(scanner.position(), &buffer[..wanted]);
        fed.map_err(|source| SearchError::Damaged { name, source })?;
    }
    match scanner.proof() {
        Proof::Proven => Ok(()),
        Proof::Unproven => Err(SearchError::Unproven { name }),
    }
}
