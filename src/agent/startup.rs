//! Owns: what is checked and decided between a login and START_REPLICATION: who the server is, which lineage it
//! continues, where to go on.
//! Does not own: the rules of the plan (`receiver/resume.rs`), the slot (`slot.rs`), streaming (`session.rs`).
//! Rests on proto-notes/01-startup.md and 06-timelines.md.

use bytes::Bytes;

use super::world::{ClusterOptions, World};
use crate::catalog::contents::TimelineState;
use crate::catalog::ledger::{FactKind, LedgerFact};
use crate::catalog::lineage::LineageFile;
use crate::catalog::store::{self, Archive, CatalogError};
use crate::error::{Disposition, ExitCode, Failure};
use crate::receiver::resume::{self, Frontier, Plan, ServerPosition};
use crate::replication::{Connection, SystemIdentity};
use crate::repository::StoreErrorKind;
use crate::repository::layout::{self, Lineage};
use crate::wal::{History, Lsn, SegmentName, SegmentSize, TimelineId};

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

/// Finds the lineage this server continues, or creates one where that is safe: only for a slot that does not
/// exist and a timeline without history, or for a server of a higher major version (pg_upgrade).
pub async fn open_lineage(
    world: &World,
    options: &ClusterOptions,
    server: &Server,
    slot: SlotPresence,
) -> Result<(Archive, LineageFile), Failure> {
    let backend = world.backend.as_ref();
    let repository = match store::read_repository(backend).await {
        Err(CatalogError::Store(error)) if error.is(StoreErrorKind::RootMissing) => {
            // Created only where an archive may begin: otherwise the volume is not mounted, and may yet be.
            if refuse_unexpected_emptiness(world, options, server, slot).is_err() {
                return Err(error.into());
            }
            backend.create_missing_root().await?;
            None
        }
        read => read?,
    };
    let lineages = match &repository {
        Some(_) => store::lineages(backend, &options.name).await?,
        None => Vec::new(),
    };
    let ours = lineages.iter().filter(|(lineage, _)| lineage.system_id == server.identity.system_id);
    if let Some((lineage, file)) = ours.max_by_key(|(lineage, _)| lineage.ordinal) {
        check_same_build(file, server)?;
        let archive = Archive::new(world.backend.clone(), lineage.clone()).with_keys(options.keys.clone());
        return Ok((archive, file.clone()));
    }
    match lineages.iter().max_by_key(|(_, file)| file.created) {
        Some((newest, file)) if major_of(&file.server_version) >= Some(server.major) => {
            let message = format!(
                "the server's system identifier is {}, this repository holds cluster {} with {}",
                server.identity.system_id, options.name, newest.system_id
            );
            return Err(Failure::new(ExitCode::Config, message).hint(
                "is this the right server, and the right repository? If it replaces the old one, run `seawall init --new-lineage`",
            ));
        }
        Some(_) => tracing::info!(version = server.version, "a server of a higher major version: a new lineage begins"),
        None => refuse_unexpected_emptiness(world, options, server, slot)?,
    }
    let lineage = Lineage::new(&options.name, server.identity.system_id, 1);
    create_lineage(world, options, server, lineage, repository.is_some()).await
}

fn major_of(version: &str) -> Option<u32> {
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

fn check_same_build(file: &LineageFile, server: &Server) -> Result<(), Failure> {
    if file.segment_size == server.segment_size {
        return Ok(());
    }
    let message = format!(
        "the server's WAL segments are {} bytes, the archive's {}",
        server.segment_size.bytes(),
        file.segment_size.bytes()
    );
    Err(Failure::new(ExitCode::Config, message)
        .hint("was pg_resetwal --wal-segsize used? Continue with `seawall init --new-lineage`"))
}

/// An existing slot, or a promoted server, with an empty repository: an unmounted volume or a mistyped path,
/// far more often than a beginning.
fn refuse_unexpected_emptiness(
    world: &World,
    options: &ClusterOptions,
    server: &Server,
    slot: SlotPresence,
) -> Result<(), Failure> {
    let location = world.backend.describe();
    let promoted = !server.history.ancestors().is_empty();
    let reason = match slot {
        SlotPresence::Absent if !promoted => return Ok(()),
        SlotPresence::Absent => format!("the server is on timeline {}", server.identity.timeline),
        SlotPresence::Present => format!("slot {} already exists on the server", options.slot),
        SlotPresence::Unknown => format!("it is not known whether slot {} exists", options.slot),
    };
    let message = format!("{reason}, but {location} holds nothing for cluster {}", options.name);
    Err(Failure::new(ExitCode::Config, message).hint(
        "is the repository's volume mounted, and is its `url` right? If the archive shall really start here, run `seawall init --create`",
    ))
}

/// repository.json, then lineage.json; the slot comes after both.
pub async fn create_lineage(
    world: &World,
    options: &ClusterOptions,
    server: &Server,
    lineage: Lineage,
    repository_exists: bool,
) -> Result<(Archive, LineageFile), Failure> {
    let now = world.clock.now();
    if !repository_exists {
        let id = format!("{:08x}{:08x}", world.random_u32(), world.random_u32());
        accept_existing(store::create_repository(world.backend.as_ref(), now, &id).await.map(drop))?;
    }
    let file = LineageFile {
        schema: 1,
        system_id: server.identity.system_id,
        server_version: server.version.clone(),
        segment_size: server.segment_size,
        created: now,
        start_timeline: server.identity.timeline,
        start_lsn: Some(server.segment_size.floor(server.identity.flush_lsn)),
        slot: Some(options.slot.to_string()),
    };
    let archive = Archive::new(world.backend.clone(), lineage).with_keys(options.keys.clone());
    accept_existing(archive.create_lineage(&file).await)?;
    let file = archive.lineage_file().await?;
    tracing::info!(lineage = %archive.lineage.directory_name(), start = ?file.start_lsn, "an archive begins");
    Ok((archive, file))
}

/// Somebody was faster, or our own success was not answered: what is there counts.
fn accept_existing(created: Result<(), CatalogError>) -> Result<(), Failure> {
    match created {
        Err(CatalogError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => Ok(()),
        other => Ok(other?),
    }
}

/// Archives every history file the server has, ancestors first.
pub async fn archive_histories(archive: &Archive, server: &Server) -> Result<(), Failure> {
    for (timeline, content) in &server.history_files {
        archive.put_history(*timeline, content).await?;
    }
    Ok(())
}

/// Where this server goes on, from what the archive holds.
pub async fn plan_start(
    world: &World,
    archive: &Archive,
    file: &LineageFile,
    server: &Server,
) -> Result<Frontier, Failure> {
    let size = server.segment_size;
    let (_, directories) = archive.wal_listing().await?;
    let mut timelines: Vec<TimelineId> = directories.iter().map(|directory| directory.timeline).collect();
    timelines.sort_unstable_by(|a, b| b.cmp(a));
    timelines.dedup();
    let mut frontiers: Vec<Frontier> = Vec::new();
    for timeline in timelines {
        if !server.history.contains(timeline) {
            // Only its number matters: whether the archive already follows a later one.
            frontiers.push(Frontier::empty(timeline, Lsn::ZERO));
            continue;
        }
        let state = archive.frontier(timeline, size).await?;
        refuse_disputed(archive, &state)?;
        // The newest with proven bytes; one that has only just begun may have none yet.
        if let Some(frontier) = frontier_of(&state, size) {
            frontiers.push(frontier);
            break;
        }
    }
    let position = ServerPosition {
        history: server.history.clone(),
        flush_lsn: server.identity.flush_lsn,
        in_recovery: server.in_recovery,
    };
    match resume::plan(&position, &frontiers)? {
        Plan::Continue(frontier) => Ok(frontier),
        Plan::Begin => Ok(begin(file, server)),
        Plan::Branch { child, fork, parent, lost } => {
            if let Some((from, to)) = lost {
                record_fork(world, archive, parent, child, from, to).await?;
            }
            let (carry, record_end) = state_before(archive, parent, size.floor(fork), size).await?;
            Ok(resume::child_frontier(child, fork, size, carry, record_end))
        }
    }
}

/// Two contents for one name are in the archive: nothing can be continued from there.
fn refuse_disputed(archive: &Archive, state: &TimelineState) -> Result<(), Failure> {
    let Some(name) = state.disputed.first() else { return Ok(()) };
    let message = format!("{} holds index entries of different content for {name}", archive.backend.describe());
    Err(Failure::new(ExitCode::Data, message)
        .disposition(Disposition::Stop)
        .hint("two servers archived to one place; continue with `seawall init --new-lineage`"))
}

/// The archive's start, where this server can still serve it; else its own current segment.
fn begin(file: &LineageFile, server: &Server) -> Frontier {
    let size = server.segment_size;
    let current = Frontier::empty(server.identity.timeline, size.floor(server.identity.flush_lsn));
    let Some(start) = file.start_lsn.map(|lsn| size.floor(lsn)) else { return current };
    if !server.history.contains(file.start_timeline) || start > server.identity.flush_lsn {
        return current;
    }
    let mut timeline = file.start_timeline;
    // It may have ended before anything of it was archived.
    while server.history.end_of(timeline).is_some_and(|end| end <= start) {
        timeline = server.history.child_of(timeline).expect("a timeline that ended has a child");
    }
    Frontier::empty(timeline, start)
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

/// The scanner's state at `boundary` on `timeline`, as the index entry of the segment before it has it.
pub async fn state_before(
    archive: &Archive,
    timeline: TimelineId,
    boundary: Lsn,
    size: SegmentSize,
) -> Result<(crate::wal::Carry, Lsn), Failure> {
    let unknown = (crate::wal::Carry::default(), Lsn::ZERO);
    if boundary == Lsn::ZERO {
        return Ok(unknown);
    }
    let name = SegmentName::new(timeline, size.segment_before(boundary), size);
    let directory = archive.directory(layout::WalDirectory::of(name), size).await?;
    Ok(directory
        .sealed(name)
        .map_or(unknown, |entry| (entry.summary.carry.clone(), entry.summary.record_end.unwrap_or_default())))
}

async fn record_fork(
    world: &World,
    archive: &Archive,
    parent: TimelineId,
    child: TimelineId,
    from: Lsn,
    to: Lsn,
) -> Result<(), Failure> {
    let cause = format!("timeline {child} left timeline {parent} at {from}; the archive holds {parent} up to {to}");
    tracing::warn!(%parent, %child, %from, %to, "a failover lost WAL that the archive holds: it stays under the old timeline");
    let fact = LedgerFact::new(FactKind::Fork, world.clock.now(), cause).about(parent, from, to);
    record_once(world, archive, fact).await
}

/// Appends a fact unless the ledger already has it: restarts must not multiply facts.
pub async fn record_once(world: &World, archive: &Archive, fact: LedgerFact) -> Result<(), Failure> {
    let place = |fact: &LedgerFact| (fact.kind, fact.timeline, fact.from_lsn, fact.to_lsn);
    if archive.ledger().await?.iter().any(|known| place(known) == place(&fact)) {
        return Ok(());
    }
    Ok(archive.append_ledger(&fact, world.random_u32()).await?)
}
