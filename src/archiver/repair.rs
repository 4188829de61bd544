//! What one repository misses is copied there from others that hold it: stored bytes as they are, in order, each
//! checked before it gets its name; then its index entry.
//!
//! Owns: what is missing (found by comparing catalogs, nothing is remembered), the order of copying, when a repository
//! is whole again.
//! Does not own: the newest run (`Archiver`), one object's way (`copy.rs`), who takes part (`outlet.rs`).
//!
//! One directory at a time is in memory, and at most [`copy::WHOLE_BYTES_MAX`] of an object. May be dropped at any
//! await: the next one finds what is left to do.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::sync::watch;

use super::copy::{self, Copied, Trouble};
use super::index;
use super::outlet::Outlets;
use super::reach::Reach;
use super::writer::{ArchiveError, Delays, Writer};
use crate::catalog::contents::{DirectoryContents, segment_span};
use crate::catalog::index::IndexEntry;
use crate::catalog::ledger::{Expired, FactKind, LedgerFact};
use crate::catalog::store::Archive;
use crate::catalog::{Piece, Source as Place};
use crate::error::{Advice, Disposition};
use crate::receiver::{Clock, MemoryBudget, Stored};
use crate::repository::layout::{IndexName, WalDirectory};
use crate::wal::{History, Lsn, SegmentName, SegmentSize, TimelineId};

/// Entries per index object: also what an interrupted repair reads again.
const INDEX_BATCH_MAX: usize = 32;
/// How long one copied object may be followed by waiting for the live stream.
const YIELD_MAX: Duration = Duration::from_secs(10);
const YIELD_STEP: Duration = Duration::from_millis(250);
/// Before it is looked again whether somebody holds by now what nobody held.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// A repository to copy from.
#[derive(Clone, Debug)]
pub struct Source {
    /// Its place in the configuration.
    pub repository: usize,
    /// Of `repository.json`, for the ledger.
    pub id: String,
    pub archive: Archive,
}

/// What a repair needs to know.
#[derive(Debug)]
pub struct Repair {
    /// As configured.
    pub name: String,
    pub writer: Writer,
    pub reach: Reach,
    pub sources: Vec<Source>,
    pub outlets: Outlets,
    pub segment_size: SegmentSize,
    /// The server's: along it the repository has to be contiguous.
    pub path: History,
    /// Where the run of this stream begins, and on which timeline: what follows is the archiver's.
    pub boundary: (TimelineId, Lsn),
    /// Every configured repository takes part: what none of them holds, nobody holds.
    pub is_complete: bool,
    pub memory: MemoryBudget,
    pub clock: Clock,
    /// Where it is, and where it has to get to.
    pub position: watch::Sender<Option<(Lsn, Lsn)>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Round {
    Whole,
    /// A part is held by nobody who is there.
    Lacking,
}

impl Repair {
    /// Ends when nothing is missing any more of what others hold, and says who they are (by their places in the
    /// configuration); fails only with what ends the session.
    pub async fn run(self) -> Result<Vec<usize>, ArchiveError> {
        let mut delays = Delays::new();
        let mut has_said_lacking = false;
        loop {
            let sources: Vec<&Source> =
                self.sources.iter().filter(|source| !self.outlets.is_gone(source.repository)).collect();
            match self.round(&sources).await {
                Ok(Round::Whole) => return Ok(sources.iter().map(|source| source.repository).collect()),
                Ok(Round::Lacking) => {
                    if !has_said_lacking {
                        has_said_lacking = true;
                        tracing::warn!(
                            repository = self.name, contiguous = %self.reach.contiguous().bytes_end,
                            "the repository has a hole, and none of those that are there holds it; waiting for the others"
                        );
                    }
                    tokio::time::sleep(LOOK_AGAIN).await;
                }
                Err(Trouble::Target(
                    error @ (ArchiveError::Conflict { .. }
                    | ArchiveError::Fenced { .. }
                    | ArchiveError::Replaced { .. }
                    | ArchiveError::Stopped),
                )) => return Err(error),
                Err(Trouble::Target(error @ ArchiveError::Catalog(_))) if error.disposition() == Disposition::Stop => {
                    return Err(error);
                }
                Err(trouble) => {
                    tracing::debug!(repository = self.name, %trouble, "the repair is interrupted; trying again");
                    self.writer.wait(&mut delays).await?;
                }
            }
        }
    }

    async fn round(&self, sources: &[&Source]) -> Result<Round, Trouble> {
        // Nobody else looks while the server writes nothing: one that was emptied would be tried for ever.
        self.writer.confirm_epoch(false).await.map_err(Trouble::Target)?;
        let mut walk = Walk::begin(self, sources).await?;
        for directory in walk.directories(sources).await? {
            walk.pass(directory, sources).await?;
        }
        walk.finish(sources).await
    }

    /// What lies above is the archiver's.
    fn is_ours(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        timeline < self.boundary.0 || (timeline == self.boundary.0 && lsn < self.boundary.1)
    }

    /// The live stream goes first: memory in use means that it waits for a store.
    async fn give_way(&self) {
        let mut waited = Duration::ZERO;
        while self.memory.held_bytes() >= self.memory.limit_bytes() / 4 && waited < YIELD_MAX {
            tokio::time::sleep(YIELD_STEP).await;
            waited += YIELD_STEP;
        }
    }
}

/// One pass over everything, from the beginning.
struct Walk<'a> {
    repair: &'a Repair,
    target: &'a Archive,
    ledger: Vec<LedgerFact>,
    expired: Expired,
    source_expired: Vec<Expired>,
    /// How far the target is whole along the path; `None` before its first byte.
    reached: Option<Stored>,
    /// A hole was met that cannot be filled now: what follows is copied, but does not count.
    is_stopped: bool,
    copied: Vec<(TimelineId, Lsn, Lsn)>,
    copied_bytes: u64,
    copied_from: BTreeSet<String>,
}

impl<'a> Walk<'a> {
    async fn begin(repair: &'a Repair, sources: &[&Source]) -> Result<Walk<'a>, Trouble> {
        let target = &repair.writer.archive;
        let mut ledger = repair.writer.retry(|| target.ledger()).await?;
        let mut source_expired = Vec::new();
        for source in sources {
            let theirs = copy::ask(source.archive.ledger()).await?;
            source_expired.push(Expired::of(&theirs));
            copy_facts(repair, &mut ledger, theirs).await?;
        }
        let expired = Expired::of(&ledger);
        let reached = match repair.reach.contiguous() {
            contiguous if contiguous != Stored::default() => Some(contiguous),
            _ => {
                let file = repair.writer.retry(|| target.lineage_file()).await?;
                let start = file.start_lsn.filter(|_| repair.path.contains(file.start_timeline));
                start.map(|start| Stored { record_end: Lsn::ZERO, bytes_end: start })
            }
        };
        Ok(Walk {
            repair,
            target,
            ledger,
            expired,
            source_expired,
            reached,
            is_stopped: false,
            copied: Vec::new(),
            copied_bytes: 0,
            copied_from: BTreeSet::new(),
        })
    }

    /// Copies missing histories; the directories to pass, in order of history.
    async fn directories(&self, sources: &[&Source]) -> Result<BTreeSet<WalDirectory>, Trouble> {
        let writer = &self.repair.writer;
        let (known, mut directories): (Vec<_>, BTreeSet<_>) = {
            let (known, directories) = writer.retry(|| self.target.wal_listing()).await?;
            (known, directories.into_iter().collect())
        };
        for source in sources {
            let (histories, theirs) = copy::ask(source.archive.wal_listing()).await?;
            for timeline in histories.into_iter().filter(|timeline| !known.contains(timeline)) {
                if let Some((content, _)) = copy::ask(source.archive.history(timeline)).await? {
                    writer.store(|| self.target.put_history(timeline, &content)).await?;
                }
            }
            directories.extend(theirs);
        }
        directories.retain(|directory| directory.timeline <= self.repair.boundary.0 && !self.is_done(*directory));
        Ok(directories)
    }

    /// Whether a directory on the path lies below what is known to be whole.
    fn is_done(&self, directory: WalDirectory) -> bool {
        let end = (u64::from(directory.high) + 1).checked_shl(32).map(Lsn);
        // What a timeline holds beyond its end on the path is not on the path.
        let path_end = self.repair.path.end_of(directory.timeline).unwrap_or(Lsn::MAX);
        let is_whole = |reached: Stored| end.is_some_and(|end| end <= reached.bytes_end && end <= path_end);
        self.repair.path.contains(directory.timeline) && self.reached.is_some_and(is_whole)
    }

    async fn pass(&mut self, directory: WalDirectory, sources: &[&Source]) -> Result<(), Trouble> {
        let size = self.repair.segment_size;
        let mut mine = self.read_target(directory).await?;
        let mut theirs = Vec::with_capacity(sources.len());
        for (source, expired) in sources.iter().zip(&self.source_expired) {
            let mut contents = copy::ask(source.archive.directory(directory, size)).await?;
            contents.subtract(expired);
            theirs.push(contents);
        }
        if self.fill(&mine, &theirs, sources).await? {
            mine = self.read_target(directory).await?;
        }
        self.extend(&mine).await?;
        if let (Some(reached), false) = (self.reached, self.is_stopped) {
            self.repair.reach.handle_repaired(reached);
            let to = self.repair.boundary.1;
            self.repair.position.send_replace(Some((reached.bytes_end.min(to), to)));
        }
        Ok(())
    }

    async fn read_target(&self, directory: WalDirectory) -> Result<DirectoryContents, Trouble> {
        let size = self.repair.segment_size;
        let mut mine = self.repair.writer.retry(|| self.target.directory(directory, size)).await?;
        mine.subtract(&self.expired);
        Ok(mine)
    }

    /// Copies what the target misses of one directory, in order. True when anything was.
    async fn fill(
        &mut self,
        mine: &DirectoryContents,
        theirs: &[DirectoryContents],
        sources: &[&Source],
    ) -> Result<bool, Trouble> {
        let names = theirs.iter().flat_map(|theirs| theirs.entries.keys().chain(theirs.tails.keys()));
        let size = self.repair.segment_size;
        let is_ours = |name: &SegmentName| {
            segment_span(*name, size).is_some_and(|span| self.repair.is_ours(name.timeline, span.start))
        };
        let wanted = |name: &SegmentName| is_ours(name) && !self.expired.contains(*name);
        let names: BTreeSet<SegmentName> = names.copied().filter(wanted).collect();
        let mut batch: Vec<IndexEntry> = Vec::new();
        let mut has_copied = false;
        for name in names {
            if let Some(entry) = mine.sealed(name) {
                refuse_difference(entry, theirs)?;
                continue;
            }
            let sealed: Vec<(&Source, &IndexEntry)> = sources
                .iter()
                .zip(theirs)
                .filter_map(|(source, theirs)| theirs.sealed(name).map(|entry| (*source, entry)))
                .collect();
            let entry = match sealed.is_empty() {
                true => {
                    has_copied |= self.fill_tails(name, mine, theirs, sources).await?;
                    None
                }
                false => self.fill_segment(name, &sealed).await?,
            };
            if let Some(entry) = entry {
                if batch.last().is_some_and(|last| last.end_lsn != entry.start_lsn) || batch.len() == INDEX_BATCH_MAX {
                    self.put_index(&mut batch).await?;
                }
                batch.push(entry);
                has_copied = true;
            }
            self.repair.give_way().await;
        }
        self.put_index(&mut batch).await?;
        Ok(has_copied)
    }

    /// One segment from the first source whose object is what its index says. `None` when none is.
    async fn fill_segment(
        &mut self,
        name: SegmentName,
        sealed: &[(&Source, &IndexEntry)],
    ) -> Result<Option<IndexEntry>, Trouble> {
        let size = self.repair.segment_size;
        if let [(_, first), rest @ ..] = sealed
            && let Some((_, other)) = rest.iter().find(|(_, other)| other.raw_crc32 != first.raw_crc32)
        {
            return Err(conflict(first, other));
        }
        for (source, entry) in sealed {
            match copy::copy_segment(&self.repair.writer, &source.archive, name, size, entry).await {
                Ok(Copied { entry, bytes }) => {
                    self.note(entry.segment.timeline, entry.start_lsn, entry.end_lsn, bytes, &source.id);
                    return Ok(Some(entry));
                }
                Err(Trouble::Damaged(what)) => {
                    tracing::error!(
                        repository = self.repair.name,
                        what,
                        "an object to copy is damaged; another is looked for"
                    );
                }
                Err(trouble) => return Err(trouble),
            }
        }
        Ok(None)
    }

    /// The tails of a segment nobody has sealed: the end of a timeline, or of a run before a gap.
    async fn fill_tails(
        &mut self,
        name: SegmentName,
        mine: &DirectoryContents,
        theirs: &[DirectoryContents],
        sources: &[&Source],
    ) -> Result<bool, Trouble> {
        let Some(span) = segment_span(name, self.repair.segment_size) else { return Ok(false) };
        let held = mine.tail_chain(name).end_from(span.start);
        let chains = theirs.iter().map(|theirs| theirs.tail_chain(name));
        let longest = sources.iter().zip(theirs).zip(chains).max_by_key(|(_, chain)| chain.end_from(span.start));
        let Some(((source, theirs), chain)) = longest else { return Ok(false) };
        if chain.end_from(span.start) <= held {
            return Ok(false);
        }
        let present: Vec<_> = mine.tails.get(&name).into_iter().flatten().map(|tail| tail.name).collect();
        for link in &chain.links {
            if present.contains(&link.tail) {
                continue;
            }
            let objects = theirs.tails.get(&name).into_iter().flatten();
            let Some(object) = objects.into_iter().find(|object| object.name == link.tail) else { continue };
            let bytes = copy::copy_tail(&self.repair.writer, &source.archive, name, object).await?;
            self.note(name.timeline, link.from, link.to, bytes, &source.id);
        }
        Ok(true)
    }

    fn note(&mut self, timeline: TimelineId, from: Lsn, to: Lsn, bytes: u64, source: &str) {
        if self.copied.is_empty() {
            tracing::info!(
                repository = self.repair.name, %from, to = %self.repair.boundary.1,
                "the repository misses WAL that others hold: it is copied there"
            );
        }
        match self.copied.last_mut() {
            Some((line, _, end)) if *line == timeline && *end == from => *end = to,
            _ => self.copied.push((timeline, from, to)),
        }
        self.copied_bytes += bytes;
        if !self.copied_from.contains(source) {
            self.copied_from.insert(source.to_string());
        }
    }

    async fn put_index(&self, batch: &mut Vec<IndexEntry>) -> Result<(), Trouble> {
        let (Some(first), Some(last)) = (batch.first(), batch.last()) else { return Ok(()) };
        let writer = &self.repair.writer;
        let name = IndexName { first: first.segment, last: last.segment, epoch: writer.epoch };
        index::put_index(writer, name, self.repair.segment_size, batch).await?;
        batch.clear();
        Ok(())
    }

    /// Moves on over what the target holds now, along the path.
    async fn extend(&mut self, mine: &DirectoryContents) -> Result<(), Trouble> {
        let timeline = mine.directory.timeline;
        if !self.repair.path.contains(timeline) {
            return Ok(());
        }
        let path_end = self.repair.path.end_of(timeline).unwrap_or(Lsn::MAX);
        for piece in mine.pieces() {
            let is_ours = self.repair.is_ours(timeline, piece.from);
            if self.is_stopped || !is_ours || piece.from >= path_end {
                return Ok(());
            }
            let reached = *self.reached.get_or_insert(Stored { record_end: Lsn::ZERO, bytes_end: piece.from });
            if piece.from > reached.bytes_end && !self.may_skip(reached.bytes_end, piece.from).await? {
                self.is_stopped = true;
                return Ok(());
            }
            self.reached = Some(extended(reached, &piece, mine, path_end));
        }
        Ok(())
    }

    /// Whether a hole is a gap that is known; one that nobody can hold becomes one.
    async fn may_skip(&mut self, from: Lsn, to: Lsn) -> Result<bool, Trouble> {
        let path = &self.repair.path;
        let mut known: Vec<(Lsn, Lsn)> = self.ledger.iter().filter_map(|fact| gap_of(fact, path)).collect();
        let timelines = path.ancestors().iter().map(|entry| entry.timeline).chain([path.timeline]);
        known.extend(timelines.flat_map(|line| self.expired.lsns(line, self.repair.segment_size)));
        if covers(known, from, to) {
            return Ok(true);
        }
        if !self.repair.is_complete || !self.repair.outlets.gone().borrow().is_empty() {
            return Ok(false);
        }
        self.record_gap(from, to).await?;
        Ok(true)
    }

    async fn record_gap(&mut self, from: Lsn, to: Lsn) -> Result<(), Trouble> {
        let path = &self.repair.path;
        let timelines = path.ancestors().iter().map(|entry| entry.timeline).chain([path.timeline]);
        for line in timelines.collect::<Vec<_>>() {
            let from = from.max(path.begin_of(line).unwrap_or_default());
            let to = to.min(path.end_of(line).unwrap_or(Lsn::MAX));
            if from >= to {
                continue;
            }
            tracing::error!(timeline = %line, %from, %to, "the archive has a gap: no repository holds this WAL");
            let now = self.repair.clock.now();
            let fact = LedgerFact::new(FactKind::Gap, now, "no repository holds it").about(line, from, to);
            append(&self.repair.writer, &fact).await?;
            self.ledger.push(fact);
        }
        Ok(())
    }

    async fn finish(mut self, sources: &[&Source]) -> Result<Round, Trouble> {
        // Up to where the run of this stream begins.
        let boundary = self.repair.boundary.1;
        match self.reached {
            Some(reached) if !self.is_stopped && reached.bytes_end < boundary => {
                self.is_stopped = !self.may_skip(reached.bytes_end, boundary).await?;
            }
            Some(_) => {}
            None => self.is_stopped = !self.repair.is_complete,
        }
        if self.is_stopped {
            return Ok(Round::Lacking);
        }
        self.record_healed().await?;
        self.repair.reach.handle_whole();
        self.repair.position.send_replace(None);
        if !self.copied.is_empty() {
            let ids: Vec<&str> = sources.iter().map(|source| source.id.as_str()).collect();
            tracing::info!(
                repository = self.repair.name,
                stored_bytes = self.copied_bytes,
                from = ids.join(", "),
                "the repository is whole again"
            );
        }
        Ok(Round::Whole)
    }

    /// A gap of this repository that was copied from another is healed.
    async fn record_healed(&self) -> Result<(), Trouble> {
        for gap in self.ledger.iter().filter(|fact| fact.kind == FactKind::Gap) {
            let (Some(line), Some(from), Some(to)) = (gap.timeline, gap.from_lsn, gap.to_lsn) else { continue };
            let inside = |(timeline, begin, end): &(TimelineId, Lsn, Lsn)| {
                (*timeline, true) == (line, *begin <= from && to <= *end)
            };
            let is_told = self.ledger.iter().any(|fact| {
                fact.kind == FactKind::GapHealed
                    && fact.timeline == Some(line)
                    && fact.from_lsn <= Some(from)
                    && Some(to) <= fact.to_lsn
            });
            if is_told || !self.copied.iter().any(inside) {
                continue;
            }
            let now = self.repair.clock.now();
            let mut fact = LedgerFact::new(FactKind::GapHealed, now, "copied from another repository");
            fact.healed_by = Some(self.copied_from.iter().cloned().collect::<Vec<_>>().join(", "));
            append(&self.repair.writer, &fact.about(line, from, to)).await?;
        }
        Ok(())
    }
}

/// What was told about the lineage while the target was away is told there too. What was expired is each
/// repository's own.
async fn copy_facts(repair: &Repair, ledger: &mut Vec<LedgerFact>, theirs: Vec<LedgerFact>) -> Result<(), Trouble> {
    let place = |fact: &LedgerFact| (fact.kind, fact.timeline, fact.from_lsn, fact.to_lsn);
    for fact in theirs {
        let shared = matches!(
            fact.kind,
            FactKind::Gap | FactKind::GapHealed | FactKind::Fork | FactKind::Conflict | FactKind::CorruptAtSource
        );
        if shared && !ledger.iter().any(|known| place(known) == place(&fact)) {
            append(&repair.writer, &fact).await?;
            ledger.push(fact);
        }
    }
    Ok(())
}

/// Under a name made of the fact itself: repeated, it is the same object.
async fn append(writer: &Writer, fact: &LedgerFact) -> Result<(), Trouble> {
    use crate::repository::StoreErrorKind;
    let distinct = crc32fast::hash(&serde_json::to_vec(fact).expect("a fact is plain data"));
    match writer.store(|| writer.archive.append_ledger(fact, distinct)).await {
        Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => Ok(()),
        other => Ok(other?),
    }
}

fn refuse_difference(entry: &IndexEntry, theirs: &[DirectoryContents]) -> Result<(), Trouble> {
    let others = theirs.iter().filter_map(|theirs| theirs.sealed(entry.segment));
    match others.into_iter().find(|other| other.raw_crc32 != entry.raw_crc32) {
        Some(other) => Err(conflict(entry, other)),
        None => Ok(()),
    }
}

fn conflict(entry: &IndexEntry, other: &IndexEntry) -> Trouble {
    let (stored, ours) = (entry.raw_crc32.0, other.raw_crc32.0);
    Trouble::Target(ArchiveError::Conflict { name: entry.segment, stored, ours })
}

/// `reached`, and the piece that follows it. A record end beyond the path's end is another history's.
fn extended(reached: Stored, piece: &Piece, mine: &DirectoryContents, path_end: Lsn) -> Stored {
    let record_end = match &piece.source {
        Place::Sealed(name) => mine.sealed(*name).and_then(|entry| entry.summary.record_end).unwrap_or_default(),
        Place::Tail(_) => piece.to,
    };
    let bytes_end = piece.to.min(path_end).max(reached.bytes_end);
    let record_end = if record_end <= bytes_end { record_end } else { Lsn::ZERO };
    Stored { record_end: record_end.max(reached.record_end), bytes_end }
}

fn gap_of(fact: &LedgerFact, path: &History) -> Option<(Lsn, Lsn)> {
    let is_gap = matches!(fact.kind, FactKind::Gap | FactKind::CorruptAtSource);
    let on_path = fact.timeline.is_some_and(|timeline| path.contains(timeline));
    (is_gap && on_path).then_some((fact.from_lsn?, fact.to_lsn?))
}

/// Whether the ranges together cover [from, to).
fn covers(mut ranges: Vec<(Lsn, Lsn)>, from: Lsn, to: Lsn) -> bool {
    ranges.sort();
    let mut reached = from;
    for (begin, end) in ranges {
        if begin <= reached && end > reached {
            reached = end;
        }
    }
    reached >= to
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hole_is_known_when_facts_cover_all_of_it() {
        let lsn = |ranges: &[(u64, u64)]| ranges.iter().map(|&(from, to)| (Lsn(from), Lsn(to))).collect::<Vec<_>>();
        assert!(covers(lsn(&[(20, 30), (5, 20)]), Lsn(10), Lsn(30)));
        assert!(!covers(lsn(&[(5, 20), (21, 40)]), Lsn(10), Lsn(30)));
        assert!(!covers(lsn(&[]), Lsn(10), Lsn(30)));
    }
}
