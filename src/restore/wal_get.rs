//! The `restore_command`: one WAL segment or history file, exactly, or its absence with proof, or an error.
//!
//! Owns: what is delivered, absent, a hole (proto-notes/06-timelines.md, 07-repository-format.md), and every check
//! before a byte is handed over.
//! Does not own: what is fetched ahead (`prefetch`), the process's exit (`cli`): [`ERROR_EXIT_CODE`] and 0 and 1
//! are the only codes it may use, because PostgreSQL takes 1 to 125 for "end of WAL" and promotes.
//!
//! "Absent" is said only after listings that show nothing on the path at or after the name, or nothing before its
//! end. Whatever else is not there is a hole.
//!
//! A cluster's repositories answer together. A segment is delivered from the first that has it intact; that something
//! is absent, or ends inside a segment, is said only when every repository has answered.

mod asked;
mod error;
mod object;
pub(super) mod request;
pub(super) mod sealed;
mod target;
mod unfinished;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::time::Instant;

use asked::Asked;
pub use asked::Holder;
pub use error::{Absence, Silence, Silences, WalGetError};
use request::{LONG_HEADER_BYTES, Request, Side, Wanted, counts, on_path, usage};
use target::{destination, put_into_place, temp_beside};
use unfinished::{Tails, Unfinished};

use crate::catalog::contents::segment_span;
use crate::catalog::{DirectoryContents, LineageFile};
use crate::wal::{History, Lsn, SegmentName, SystemId, TimelineId};

/// What the process exits with for every error: PostgreSQL stops recovery instead of ending it early.
pub const ERROR_EXIT_CODE: u8 = 255;
/// How often everything is listed again when objects vanish, or seem to be missing, while it is looked at.
const LOOKS_MAX: u32 = 5;
const LOOK_PAUSE: Duration = Duration::from_millis(50);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(2);
/// How much longer than the first repository another one may take before it is done without; twice as long at each
/// further look. Longer, and one that hangs slows recovery down that much for every segment.
const SILENCE: Duration = Duration::from_secs(2);
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// Which line of history the answers belong to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PathChoice {
    /// The newest timeline the archive knows, by history file or by data, as PostgreSQL's `latest`.
    Latest,
    /// This timeline whole, and its ancestors up to their forks.
    Timeline(TimelineId),
    /// This line, as a restore has planned with it.
    Fixed(History),
    /// This line, and on along the newest promotion that continues it.
    Following(History),
}

#[derive(Clone, Debug)]
pub struct WalGet {
    /// The same lineage in every repository of the cluster, the preferred one first; at least one.
    pub holders: Vec<Holder>,
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

impl WalGet {
    pub const PATIENCE: Duration = Duration::from_secs(30);

    pub fn new(holders: Vec<Holder>, path: PathChoice) -> WalGet {
        assert!(!holders.is_empty(), "a cluster has a repository");
        WalGet { holders, path, patience: Self::PATIENCE, plan_end: None }
    }

    /// What is known of the lineage, and the line of history that answers belong to now.
    pub async fn survey(&self) -> Result<(LineageFile, History), WalGetError> {
        let mut asked = Asked::ask(&self.holders, SILENCE).await;
        if asked.views.is_empty() {
            asked.all_spoke("nothing is known of the archive", None)?;
        }
        let file = asked.lineage_file()?;
        let path = self.path(&mut asked, &file).await?;
        Ok((file, path))
    }

    /// Delivers `name` as `dest`, complete and checked, or says why not. `dest` is untouched unless delivered.
    pub async fn get(&self, name: &str, dest: &Path) -> Result<Outcome, WalGetError> {
        let request = Request::parse(name)?;
        let started = Instant::now();
        let mut silence = SILENCE;
        let mut pause = LOOK_PAUSE;
        let mut looks = 0;
        loop {
            let mut asked = Asked::ask(&self.holders, silence).await;
            let error = match self.answer(&mut asked, request, dest).await {
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
            silence = (silence * 2).min(SILENCE_MAX);
        }
    }

    async fn answer(&self, asked: &mut Asked<'_>, request: Request, dest: &Path) -> Result<Outcome, WalGetError> {
        if asked.views.is_empty() {
            asked.all_spoke("nothing is known of the archive", None)?;
        }
        let absence = match request {
            Request::Segment(name) => self.segment(asked, name, dest).await?,
            Request::History(timeline) => history(asked, timeline, dest).await?,
            Request::Other => Some(Absence::NotArchived),
        };
        let Some(absence) = absence else { return Ok(Outcome::Delivered) };
        asked.all_spoke("the repositories that answered do not have it", None)?;
        Ok(Outcome::Absent(absence))
    }

    /// Delivers a segment, or tells why the repositories that answered do not have it.
    async fn segment(
        &self,
        asked: &mut Asked<'_>,
        name: SegmentName,
        dest: &Path,
    ) -> Result<Option<Absence>, WalGetError> {
        let file = asked.lineage_file()?;
        let size = file.segment_size;
        let span = segment_span(name, size).ok_or_else(|| usage(&name.to_string()))?;
        if self.plan_end.is_some_and(|end| span.start >= end) {
            return Ok(Some(Absence::AfterPlan));
        }
        let path = self.path(asked, &file).await?;
        let limit = match on_path(&path, name.timeline, &span) {
            // A plan may end where its contiguous WAL does, inside a segment of which more came after a hole.
            Ok(limit) => self.plan_end.map_or(limit, |end| limit.min(end)),
            Err(absence) => return Ok(Some(absence)),
        };
        let wanted = Wanted { name, size, start: span.start, end: span.end, limit, system_id: file.system_id };
        let mut first_hole = None;
        for source in wanted.sources(&path) {
            let Some(listed) = deliver_sealed(asked, &wanted, source, dest).await? else { return Ok(None) };
            match deliver_unfinished(asked, &wanted, &path, source, &listed, dest).await {
                Ok(true) => return Ok(None),
                Ok(false) => {}
                // A child's segment may still begin with all of it.
                Err(hole @ WalGetError::Hole { .. }) => first_hole = first_hole.or(Some(hole)),
                Err(error) => return Err(error),
            }
        }
        asked.all_spoke("the repositories that answered do not have it", first_hole)?;
        conclude(asked, &wanted, &path).await.map(Some)
    }

    /// The line of history answers belong to.
    async fn path(&self, asked: &mut Asked<'_>, file: &LineageFile) -> Result<History, WalGetError> {
        let timeline = match &self.path {
            PathChoice::Fixed(line) => return Ok(line.clone()),
            PathChoice::Following(line) => return continuation(asked, line).await,
            PathChoice::Timeline(timeline) => *timeline,
            PathChoice::Latest => {
                let with_data = |view: &asked::View<'_>| {
                    let directories = view.directories.iter().map(|directory| directory.timeline);
                    view.histories.iter().copied().chain(directories).max()
                };
                asked.views.iter().filter_map(with_data).fold(file.start_timeline, TimelineId::max)
            }
        };
        let is_listed = asked.views.iter().any(|view| view.histories.contains(&timeline));
        if is_listed && let Some((_, history)) = read_history(asked, timeline).await? {
            return Ok(history);
        }
        // Timeline 1 never has a history file; an adopted archive may start above it without one.
        let rootless = !is_listed && (timeline == TimelineId(1) || timeline == file.start_timeline);
        if rootless {
            return Ok(History::root(timeline));
        }
        asked.all_spoke("the history is not there", Some(WalGetError::HistoryMissing { timeline }))?;
        Err(WalGetError::HistoryMissing { timeline })
    }
}

/// The history of the newest timeline that goes on where `line` is, else `line`.
async fn continuation(asked: &mut Asked<'_>, line: &History) -> Result<History, WalGetError> {
    let known: BTreeSet<TimelineId> = asked.views.iter().flat_map(|view| view.histories.iter().copied()).collect();
    for timeline in known.into_iter().rev().take_while(|timeline| *timeline > line.timeline) {
        match read_history(asked, timeline).await? {
            Some((_, history)) if history.up_to(line.timeline).as_ref() == Some(line) => return Ok(history),
            _ => {}
        }
    }
    Ok(line.clone())
}

/// Delivers a history file, or tells that the repositories that answered have none.
async fn history(asked: &mut Asked<'_>, timeline: TimelineId, dest: &Path) -> Result<Option<Absence>, WalGetError> {
    let Some((content, _)) = read_history(asked, timeline).await? else { return Ok(Some(Absence::NoHistory)) };
    let mut temp = temp_beside(dest)?;
    temp.file().write_all(&content).map_err(|source| destination(dest, source))?;
    put_into_place(temp, dest)?;
    Ok(None)
}

/// A history file as every repository that has it intact has it; two different ones are an error.
async fn read_history(asked: &mut Asked<'_>, timeline: TimelineId) -> Result<Option<(Bytes, History)>, WalGetError> {
    let read = join_all(asked.views.iter().map(|view| view.holder.archive.history(timeline))).await;
    let holders: Vec<&Holder> = asked.views.iter().map(|view| view.holder).collect();
    let mut found: Option<(&Holder, (Bytes, History))> = None;
    let mut first_fault = None;
    for (holder, read) in holders.into_iter().zip(read) {
        match (read.map_err(WalGetError::from), &found) {
            (Ok(Some(file)), Some((one, known))) if file.0 != known.0 => {
                let (one, other) = (one.repository.clone(), holder.repository.clone());
                return Err(WalGetError::HistoryDisputed { timeline, one, other });
            }
            (Ok(Some(file)), None) => found = Some((holder, file)),
            (Ok(_), _) => {}
            (Err(error), _) if error.is_silence() => asked.silence(holder, error),
            (Err(fault), _) => first_fault = first_fault.or(Some(fault)),
        }
    }
    match (found, first_fault) {
        (Some((_, file)), fault) => {
            fault.iter().for_each(|fault| tracing::warn!("another repository has the history: {fault}"));
            Ok(Some(file))
        }
        (None, Some(fault)) => asked.all_spoke("the history cannot be read", Some(fault)).map(|()| None),
        (None, None) => Ok(None),
    }
}

/// Delivers the sealed segment from the first repository that has it intact: then `None`. Else what each lists.
async fn deliver_sealed<'a>(
    asked: &mut Asked<'a>,
    wanted: &Wanted,
    source: SegmentName,
    dest: &Path,
) -> Result<Option<Vec<(&'a Holder, DirectoryContents)>>, WalGetError> {
    let holders: Vec<&'a Holder> = asked.views.iter().map(|view| view.holder).collect();
    let mut listed = Vec::new();
    let mut fault: Option<WalGetError> = None;
    for holder in holders {
        let contents = match holder.archive.directory_around(source, wanted.size).await {
            Ok(contents) => contents,
            Err(error) => {
                let error = WalGetError::from(error);
                match error.is_silence() {
                    true => asked.silence(holder, error),
                    false => fault = WalGetError::or_graver(fault, error),
                }
                continue;
            }
        };
        if contents.disputed.contains_key(&source) {
            return Err(WalGetError::Disputed { name: source });
        }
        match sealed::deliver(holder, wanted, source, &contents, dest).await {
            Ok(true) => {
                fault.iter().for_each(|fault| {
                    tracing::warn!(repository = holder.repository, "delivered from here, because elsewhere {fault}");
                });
                return Ok(None);
            }
            Ok(false) => listed.push((holder, contents)),
            Err(error) if error.is_silence() => asked.silence(holder, error),
            Err(error) if error.is_of_one_copy() => fault = WalGetError::or_graver(fault, error),
            Err(error) => return Err(error),
        }
    }
    match fault {
        // Sealed, and nobody has it intact: no tails of it are the end of WAL.
        Some(fault) => asked.all_spoke("nobody has it intact", Some(fault)).map(|()| Some(listed)),
        None => Ok(Some(listed)),
    }
}

/// Delivers an unfinished segment from its tails, where that is the truth; false when there are none.
async fn deliver_unfinished(
    asked: &mut Asked<'_>,
    wanted: &Wanted,
    path: &History,
    source: SegmentName,
    listed: &[(&Holder, DirectoryContents)],
    dest: &Path,
) -> Result<bool, WalGetError> {
    let mut tails = Vec::new();
    for &(holder, ref contents) in listed {
        let Some(found) = Tails::of(holder, source, contents) else { continue };
        match holder.archive.expired().await {
            Ok(expired) if expired.contains(source) => {}
            Ok(_) => tails.push(found),
            Err(error) => asked.silence(holder, error.into()),
        }
    }
    if tails.is_empty() {
        return Ok(false);
    }
    let unfinished = Unfinished::resolve(wanted, source, tails)?;
    if unfinished.end() < wanted.limit {
        asked.all_spoke(&format!("segment {source} is unfinished in those that did"), None)?;
        if let Some(fault) = not_the_end(asked, wanted, path, &unfinished).await? {
            return Err(WalGetError::Hole { name: source, fault });
        }
    }
    unfinished.deliver(wanted, dest).await?;
    Ok(true)
}

/// Why tails are not the end of the path's WAL.
async fn not_the_end(
    asked: &mut Asked<'_>,
    wanted: &Wanted,
    path: &History,
    unfinished: &Unfinished<'_>,
) -> Result<Option<String>, WalGetError> {
    let end = unfinished.end();
    if end.saturating_distance(wanted.start) < LONG_HEADER_BYTES as u64 {
        return Ok(Some("its tails do not hold its beginning".to_string()));
    }
    if let Some(beyond) = unfinished.beyond() {
        return Ok(Some(format!("its tails end at {end} and go on at {beyond}")));
    }
    let later = data(asked, Side::After, wanted, path).await?;
    Ok(later.map(|name| format!("its tails end at {end}, but {name} is in the archive")))
}

/// Nothing of the segment is there, and everybody has spoken: absent or a hole?
async fn conclude(asked: &mut Asked<'_>, wanted: &Wanted, path: &History) -> Result<Absence, WalGetError> {
    let Some(after) = data(asked, Side::After, wanted, path).await? else {
        return Ok(Absence::AboveLast);
    };
    let Some(before) = data(asked, Side::Before, wanted, path).await? else {
        return Ok(Absence::BelowFirst);
    };
    let fault = format!("it is not there, but {before} and {after} are");
    Err(WalGetError::Hole { name: wanted.name, fault })
}

/// Any segment of the path, sealed or not, that lies on one side of the wanted one and is not expired, in any
/// repository. All must answer.
async fn data(
    asked: &Asked<'_>,
    side: Side,
    wanted: &Wanted,
    path: &History,
) -> Result<Option<SegmentName>, WalGetError> {
    for view in &asked.views {
        let archive = &view.holder.archive;
        // The ledger first, then listings of its own: what is announced there is not data any more.
        let expired = archive.expired().await?;
        for directory in side.order(&view.directories) {
            if !path.contains(directory.timeline) || !side.concerns(directory, wanted.name) {
                continue;
            }
            let concerns = |name| side.holds(name, wanted.name) && counts(path, name, wanted.size, &expired);
            let names = archive.segment_names(directory, wanted.size, concerns).await?;
            if let Some(name) = names.first() {
                return Ok(Some(*name));
            }
        }
    }
    Ok(None)
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
