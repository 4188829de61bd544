//! Owns: what is checked and decided between a login and START_REPLICATION: who the server is, which lineage it
//! continues, where to go on.
//! Does not own: the rules of the plan (`receiver/resume.rs`), the slot (`slot.rs`), streaming (`session.rs`).
//! Rests on proto-notes/01-startup.md and 06-timelines.md.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;

use super::world::World;
use crate::catalog::contents::TimelineState;
use crate::catalog::lineage::LineageFile;
use crate::catalog::store::Archive;
use crate::catalog::{Crc32, DirectoryContents, Expired, FactKind, IndexEntry, LedgerFact, Piece};
use crate::continuity::{self, Run};
use crate::error::{Disposition, ExitCode, Failure};
use crate::receiver::resume::{self, Frontier, Plan, ServerPosition};
use crate::replication::{Connection, SystemIdentity};
use crate::repository::layout::{Epoch, TailName};
use crate::wal::{Carry, History, Lsn, SegmentName, SegmentSize, TimelineId};

/// A server as it introduces itself.
#[derive(Clone, Debug)]
pub struct Server {
    pub identity: SystemIdentity,
    pub version: String,
    pub major: u32,
    pub segment_size: SegmentSize,
    pub in_recovery: bool,
    pub history: History,
    /// Every history file it still has, of its timeline and its ancestors.
    pub history_files: Vec<(TimelineId, Bytes)>,
    pub wal_sender_timeout: std::time::Duration,
}

/// Asks the server who it is. Refuses one that cannot be archived.
pub async fn introduce(connection: &mut Connection, in_recovery: bool) -> Result<Server, Failure> {
    let identity = connection.identify_system().await?;
    let wal_level = connection.show("wal_level").await?;
    if !matches!(wal_level.as_str(), "replica" | "logical") {
        let message = format!("the server's wal_level is {wal_level}: its WAL cannot rebuild a server");
        return Err(
            Failure::new(ExitCode::Config, message).hint("set wal_level = replica on the server and restart it")
        );
    }
    let segment_size = connection.wal_segment_size().await?;
    let wal_sender_timeout = parse_timeout(&connection.show("wal_sender_timeout").await?);
    let mut history = History::root(identity.timeline);
    let mut history_files = Vec::new();
    if let Some((_, content)) = connection.timeline_history(identity.timeline).await? {
        history = parse_history(identity.timeline, &content)?;
        history_files.push((identity.timeline, content));
    } else if identity.timeline > TimelineId(1) {
        let message = format!("the server is on timeline {} and has no history file for it", identity.timeline);
        return Err(Failure::new(ExitCode::Data, message)
            .hint(format!("restore pg_wal/{:08X}.history on the server", identity.timeline.0)));
    }
    let mut child_file = history_files.last().map(|(_, content)| content.clone()).unwrap_or_default();
    for ancestor in history.ancestors().iter().rev().map(|entry| entry.timeline) {
        let file = match connection.timeline_history(ancestor).await? {
            Some((_, content)) => Some(content),
            // Removed from the server long ago. Recovery looks for every number: none may be missing.
            None => History::parent_file(&child_file).map(|content| child_file.slice_ref(content)),
        };
        let Some(content) = file else { break };
        let parsed = parse_history(ancestor, &content)?;
        if Some(parsed) != history.up_to(ancestor) {
            let message = format!("the server's histories of timelines {} and {ancestor} disagree", identity.timeline);
            return Err(Failure::new(ExitCode::Data, message).hint("the server's own history files are damaged"));
        }
        history_files.push((ancestor, content.clone()));
        child_file = content;
    }
    // Ancestors first: nobody may find a child whose parents are unknown.
    history_files.sort_by_key(|(timeline, _)| *timeline);
    let version = connection.parameter("server_version").unwrap_or("unknown").to_string();
    let major = connection.server_major();
    Ok(Server { identity, version, major, segment_size, in_recovery, history, history_files, wal_sender_timeout })
}

fn parse_history(timeline: TimelineId, content: &[u8]) -> Result<History, Failure> {
    History::parse(timeline, content).map_err(|error| {
        Failure::new(ExitCode::Data, error.to_string()).hint("the server's own history file is damaged")
    })
}

/// `1min`, `30s`, `500ms`; 0 means the server never gives up, then a minute serves as well.
fn parse_timeout(text: &str) -> std::time::Duration {
    const FALLBACK: std::time::Duration = std::time::Duration::from_secs(60);
    let parsed: Result<jiff::SignedDuration, _> = text.parse();
    let seconds = parsed.ok().and_then(|duration| std::time::Duration::try_from(duration).ok());
    seconds.filter(|duration| !duration.is_zero()).unwrap_or(FALLBACK)
}

/// What is known of the slot before anything is created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotPresence {
    Absent,
    Present,
    /// 13 and 14 without SQL.
    Unknown,
}

/// Archives every history file the server has, ancestors first.
pub async fn archive_histories(archive: &Archive, server: &Server) -> Result<(), Failure> {
    for (timeline, content) in &server.history_files {
        archive.put_history(*timeline, content).await?;
    }
    Ok(())
}

/// What one repository shows of a timeline, as far back as it was read.
#[derive(Clone, Debug)]
pub struct Recent {
    timelines: BTreeMap<TimelineId, Vec<DirectoryContents>>,
    ledger: Vec<LedgerFact>,
    /// Every timeline it has WAL of.
    known: Vec<TimelineId>,
}

/// Reads the newest part of a repository: the server's timelines, back to what the slot still holds and to a sealed
/// segment.
pub async fn read_recent(archive: &Archive, server: &Server, held_from: Lsn) -> Result<Recent, Failure> {
    let size = server.segment_size;
    let ledger = archive.ledger().await?;
    let expired = Expired::of(&ledger);
    let (_, mut directories) = archive.wal_listing().await?;
    let known: BTreeSet<TimelineId> = directories.iter().map(|directory| directory.timeline).collect();
    directories.retain(|directory| server.history.contains(directory.timeline));
    let mut timelines: BTreeMap<TimelineId, Vec<DirectoryContents>> = BTreeMap::new();
    while let Some(directory) = directories.pop() {
        let mut contents = archive.directory(directory, size).await?;
        contents.subtract(&expired);
        let is_sealed = contents.entries.keys().any(|&name| contents.sealed(name).is_some());
        timelines.entry(directory.timeline).or_default().insert(0, contents);
        if is_sealed && Lsn(u64::from(directory.high) << 32) <= held_from {
            break;
        }
    }
    let recent = Recent { timelines, ledger, known: known.into_iter().collect() };
    recent.refuse_disputed(archive)?;
    Ok(recent)
}

impl Recent {
    fn directories(&self) -> impl Iterator<Item = &DirectoryContents> {
        self.timelines.values().flatten()
    }

    /// The highest epoch in which something was stored.
    pub fn highest_epoch(&self) -> Epoch {
        let of_directory = |directory: &DirectoryContents| {
            let tails = directory.tails.values().flatten().map(|tail| tail.name.epoch);
            tails.chain(directory.index_files.iter().map(|(name, _)| name.epoch)).max()
        };
        self.directories().filter_map(of_directory).max().unwrap_or_default()
    }

    /// Two contents for one name are in the archive: nothing can be continued from there.
    fn refuse_disputed(&self, archive: &Archive) -> Result<(), Failure> {
        let Some(name) = self.directories().find_map(|directory| directory.disputed.keys().next()) else {
            return Ok(());
        };
        let message = format!("{} holds index entries of different content for {name}", archive.backend.describe());
        Err(Failure::new(ExitCode::Data, message)
            .disposition(Disposition::Stop)
            .hint("two servers archived to one place; continue with `seawall init --new-lineage`"))
    }

    fn runs(&self) -> Vec<Run> {
        let of = |(&timeline, directories): (&TimelineId, &Vec<DirectoryContents>)| {
            continuity::runs(timeline, directories.iter().flat_map(DirectoryContents::pieces))
        };
        self.timelines.iter().flat_map(of).collect()
    }

    /// The sealed segment that ends at `end`.
    fn sealed_before(&self, timeline: TimelineId, end: Lsn, size: SegmentSize) -> Option<&IndexEntry> {
        let name = SegmentName::new(timeline, size.segment_before(end), size);
        let directories = self.timelines.get(&timeline)?;
        directories.iter().find_map(|directory| directory.sealed(name)).filter(|entry| entry.end_lsn == end)
    }

    /// Tails of the segment at `start`, contiguous from there.
    fn tails(&self, timeline: TimelineId, start: Lsn, size: SegmentSize) -> Vec<TailName> {
        let name = SegmentName::new(timeline, size.segment_of(start), size);
        let mut tails: Vec<TailName> = Vec::new();
        let mut reached = start;
        let Some(directories) = self.timelines.get(&timeline) else { return tails };
        let chains = directories.iter().filter(|directory| directory.tails.contains_key(&name));
        for link in chains.flat_map(|directory| directory.tail_chain(name).links) {
            if link.from != reached {
                break;
            }
            reached = link.to;
            if !tails.contains(&link.tail) {
                tails.push(link.tail);
            }
        }
        tails
    }
}

/// Where a stream goes on.
#[derive(Clone, Debug, PartialEq)]
pub struct Resumption {
    /// What is stored of the first segment, in any repository: all of it has to match.
    pub frontier: Frontier,
    /// Each repository's own part of it, in the order of the repositories given.
    pub own: Vec<Frontier>,
    /// From where each holds everything up to the first segment, as far back as it was read; `None` behind a hole.
    pub contiguous_from: Vec<Option<Lsn>>,
    /// The parent's WAL beyond the fork that a failover lost, and the child that left it.
    pub lost: Option<(TimelineId, TimelineId, Lsn, Lsn)>,
}

impl Resumption {
    /// Behind a gap: nothing of what is stored is repeated.
    pub fn anew(frontier: Frontier, repositories: usize) -> Resumption {
        let (own, contiguous_from) = (vec![frontier.clone(); repositories], vec![None; repositories]);
        Resumption { frontier, own, contiguous_from, lost: None }
    }
}

/// Where this server goes on, from what the repositories hold together. `held_from` is where the slot holds WAL from:
/// what is missing above it can still be had, and is gone back for.
pub fn plan_start(
    file: &LineageFile,
    server: &Server,
    held_from: Lsn,
    repositories: &[Recent],
) -> Result<Resumption, Failure> {
    let size = server.segment_size;
    refuse_difference(repositories)?;
    let union = union_end(server, held_from, repositories);
    let mut frontiers: Vec<Frontier> = Vec::new();
    // Only the numbers of strangers matter: whether the archive already follows a later timeline.
    let known = repositories.iter().flat_map(|recent| &recent.known);
    let strangers = known.filter(|timeline| !server.history.contains(**timeline));
    frontiers.extend(strangers.map(|&timeline| Frontier::empty(timeline, Lsn::ZERO)));
    frontiers.extend(union.map(|(timeline, end)| frontier_at(&server.history, timeline, end, size, repositories)));
    let position = ServerPosition {
        history: server.history.clone(),
        flush_lsn: server.identity.flush_lsn,
        in_recovery: server.in_recovery,
    };
    let mut lost_wal = None;
    let mut forked_at = None;
    let frontier = match resume::plan(&position, &frontiers)? {
        Plan::Continue(frontier) => frontier,
        Plan::Begin => begin(file, server),
        Plan::Branch { child, fork, parent, lost } => {
            lost_wal = lost.map(|(from, to)| (parent, child, from, to));
            forked_at = Some(fork);
            let (carry, record_end) = state_before(&server.history, parent, size.floor(fork), size, repositories);
            resume::child_frontier(child, fork, size, carry, record_end)
        }
    };
    let held_to = forked_at.unwrap_or(frontier.segment_start);
    let frontier = resume::passing_empty(frontier, held_to, &server.history, size);
    let mut own = Vec::with_capacity(repositories.len());
    let mut contiguous_from = Vec::with_capacity(repositories.len());
    let mut frontier = Frontier { tails: Vec::new(), ..frontier };
    for recent in repositories {
        let start = frontier.segment_start;
        let tails = recent.tails(frontier.timeline, start, size);
        let new: Vec<TailName> = tails.iter().filter(|tail| !frontier.tails.contains(tail)).copied().collect();
        frontier.tails.extend(new);
        own.push(Frontier { tails, ..frontier.clone() });
        let stretches = continuity::stretches(&server.history, &recent.runs(), size);
        let reaching = stretches.iter().find(|stretch| stretch.from <= start && start <= stretch.to);
        contiguous_from.push(reaching.map(|stretch| stretch.from));
    }
    Ok(Resumption { frontier, own, contiguous_from, lost: lost_wal })
}

/// The end of what the repositories hold together, on the server's path: of the last stretch, or of an earlier one
/// where the slot still holds what follows it and nobody has called that a gap.
fn union_end(server: &Server, held_from: Lsn, repositories: &[Recent]) -> Option<(TimelineId, Lsn)> {
    let size = server.segment_size;
    let mut pieces: BTreeMap<TimelineId, Vec<Piece>> = BTreeMap::new();
    for directory in repositories.iter().flat_map(Recent::directories) {
        pieces.entry(directory.directory.timeline).or_default().extend(directory.pieces());
    }
    let newest = *pieces.iter().rev().find(|(_, pieces)| !pieces.is_empty())?.0;
    let runs: Vec<Run> = pieces.into_iter().flat_map(|(timeline, pieces)| continuity::runs(timeline, pieces)).collect();
    // Only up to its newest timeline: what that holds beyond its own end tells that it has ended.
    let path = server.history.up_to(newest).expect("only the server's timelines were read");
    let stretches = continuity::stretches(&path, &runs, size);
    let facts: Vec<&LedgerFact> = repositories.iter().flat_map(|recent| &recent.ledger).collect();
    let mut last = stretches.len().checked_sub(1)?;
    while last > 0 && stretches[last].from > held_from {
        let (from, to) = (stretches[last - 1].to, stretches[last].from);
        if is_known_gap(&facts, &server.history, from.max(held_from), to) {
            break;
        }
        last -= 1;
    }
    // Of the newest timeline in it: a child that has just begun repeats what its parent holds further.
    let stretch = &stretches[last];
    let inside = |run: &&Run| run.from <= stretch.to && stretch.from <= run.to && size.floor(stretch.from) <= run.from;
    let newest_run = runs.iter().filter(inside).max_by_key(|run| (run.timeline, run.to))?;
    let path_end = path.end_of(newest_run.timeline).unwrap_or(Lsn::MAX);
    Some((newest_run.timeline, newest_run.to.min(path_end)))
}

fn is_known_gap(facts: &[&LedgerFact], path: &History, from: Lsn, to: Lsn) -> bool {
    let mut ranges: Vec<(Lsn, Lsn)> = facts
        .iter()
        .filter(|fact| matches!(fact.kind, FactKind::Gap | FactKind::CorruptAtSource))
        .filter(|fact| fact.timeline.is_some_and(|timeline| path.contains(timeline)))
        .filter_map(|fact| Some((fact.from_lsn?, fact.to_lsn?)))
        .collect();
    ranges.sort();
    let reached =
        ranges.into_iter().fold(from, |reached, (from, to)| if from <= reached { reached.max(to) } else { reached });
    reached >= to
}

/// Two repositories that hold different contents under one name hold two histories.
fn refuse_difference(repositories: &[Recent]) -> Result<(), Failure> {
    let mut known: BTreeMap<SegmentName, Crc32> = BTreeMap::new();
    for entry in repositories.iter().flat_map(Recent::directories).flat_map(|directory| directory.entries.values()) {
        let first = *known.entry(entry.segment).or_insert(entry.raw_crc32);
        if first != entry.raw_crc32 {
            let message = format!(
                "the repositories hold different contents of {}: raw CRC-32 {:08x} and {:08x}",
                entry.segment, first.0, entry.raw_crc32.0
            );
            return Err(Failure::new(ExitCode::Data, message)
                .disposition(Disposition::Stop)
                .hint("two servers archived to these places; continue with `seawall init --new-lineage`"));
        }
    }
    Ok(())
}

/// The frontier whose last byte lies before `end`: its segment, the state there, every repository's tails of it.
fn frontier_at(path: &History, timeline: TimelineId, end: Lsn, size: SegmentSize, repositories: &[Recent]) -> Frontier {
    let is_sealed = repositories.iter().any(|recent| recent.sealed_before(timeline, end, size).is_some());
    let segment_start = if is_sealed { end } else { size.start_of(size.segment_before(end)) };
    let (carry, record_end) = state_before(path, timeline, segment_start, size, repositories);
    let tails = repositories.iter().flat_map(|recent| recent.tails(timeline, segment_start, size)).collect();
    Frontier { timeline, segment_start, carry, record_end, tails }
}

/// The scanner's state at `boundary`, as an index entry of the segment before it has it: of `timeline`, or of the
/// ancestor that wrote it.
fn state_before(
    path: &History,
    timeline: TimelineId,
    boundary: Lsn,
    size: SegmentSize,
    repositories: &[Recent],
) -> (Carry, Lsn) {
    if boundary == Lsn::ZERO {
        return (Carry::default(), Lsn::ZERO);
    }
    let ancestors = path.ancestors().iter().rev().filter(|entry| entry.timeline < timeline && entry.end >= boundary);
    let lines = std::iter::once(timeline).chain(ancestors.map(|entry| entry.timeline));
    let of_line = |line| repositories.iter().find_map(|recent| recent.sealed_before(line, boundary, size));
    lines.into_iter().find_map(of_line).map_or((Carry::default(), Lsn::ZERO), |entry| {
        (entry.summary.carry.clone(), entry.summary.record_end.unwrap_or_default())
    })
}

/// The archive's start, where this server can still serve it; else its own current segment.
fn begin(file: &LineageFile, server: &Server) -> Frontier {
    let size = server.segment_size;
    let current = Frontier::empty(server.identity.timeline, size.floor(server.identity.flush_lsn));
    let Some(start) = file.start_lsn.map(|lsn| size.floor(lsn)) else { return current };
    if !server.history.contains(file.start_timeline) || start > server.identity.flush_lsn {
        return current;
    }
    // That it may have ended before anything of it was archived is for `passing_empty`.
    Frontier::empty(file.start_timeline, start)
}

/// What a timeline's state means for a writer that goes on with it.
pub fn frontier_of(state: &TimelineState, size: SegmentSize) -> Option<Frontier> {
    let end = state.end?;
    let sealed = state.last_sealed.as_ref();
    let segment_start = match sealed {
        Some(entry) if entry.end_lsn == end => end,
        _ => size.start_of(size.segment_before(end)),
    };
    let mut frontier = Frontier::empty(state.timeline, segment_start);
    if let Some(entry) = sealed.filter(|entry| entry.end_lsn == segment_start) {
        frontier.carry = entry.summary.carry.clone();
        frontier.record_end = entry.summary.record_end.unwrap_or_default();
    }
    let links = state.tails.iter().filter(|link| link.from >= segment_start);
    let mut reached = segment_start;
    for link in links {
        if link.from != reached {
            // Its beginning is missing: the whole segment is received again.
            frontier.tails.clear();
            break;
        }
        reached = link.to;
        if !frontier.tails.contains(&link.tail) {
            frontier.tails.push(link.tail);
        }
    }
    Some(frontier)
}

/// Says in every ledger that a failover lost WAL which the archive holds.
pub async fn record_fork(
    world: &World,
    archives: &[Archive],
    (parent, child, from, to): (TimelineId, TimelineId, Lsn, Lsn),
) -> Result<(), Failure> {
    let cause = format!("timeline {child} left timeline {parent} at {from}; the archive holds {parent} up to {to}");
    tracing::warn!(%parent, %child, %from, %to, "a failover lost WAL that the archive holds: it stays under the old timeline");
    let fact = LedgerFact::new(FactKind::Fork, world.clock.now(), cause).about(parent, from, to);
    record_everywhere(world, archives, fact).await
}

/// Appends a fact to every ledger that can be reached, at least one: the others learn of it when they are repaired.
pub async fn record_everywhere(world: &World, archives: &[Archive], fact: LedgerFact) -> Result<(), Failure> {
    let mut result = Ok(());
    let mut recorded = false;
    for archive in archives {
        match record_once(world, archive, fact.clone()).await {
            Ok(()) => recorded = true,
            Err(failure) => {
                if archives.len() > 1 {
                    tracing::warn!(place = archive.backend.describe(), %failure, "a fact could not be written to this ledger");
                }
                result = Err(failure);
            }
        }
    }
    if recorded { Ok(()) } else { result }
}

/// Appends a fact unless the ledger already has it: restarts must not multiply facts.
pub async fn record_once(world: &World, archive: &Archive, fact: LedgerFact) -> Result<(), Failure> {
    let place = |fact: &LedgerFact| (fact.kind, fact.timeline, fact.from_lsn, fact.to_lsn);
    if archive.ledger().await?.iter().any(|known| place(known) == place(&fact)) {
        return Ok(());
    }
    Ok(archive.append_ledger(&fact, world.random_u32()).await?)
}
