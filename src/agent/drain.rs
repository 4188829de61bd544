//! What an earlier stream left in the spool goes into the repository before the next one begins: in order, proven
//! once more, through the same stages as WAL from a server, and without asking one: it may be gone for good.
//!
//! Owns: opening a cluster's spool, whether its WAL belongs where we would put it, what becomes of it.
//! Does not own: the spool's files (`spool`), what goes there (`archiver/spooling.rs`).
//! Rests on `proto-notes/08-durability.md`, "the spool".

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::session::Member;
use super::startup;
use super::world::{ClusterOptions, World};
use crate::archiver::{self, ArchiveError, Archiver, ArchiverOptions, Reach, StoreHealth, Writer};
use crate::catalog::store::{self, Archive, CatalogError};
use crate::continuity;
use crate::error::{Advice, Disposition, ExitCode, Failure};
use crate::receiver::resume::{self, Frontier, PrefixCheck};
use crate::receiver::{Acknowledge, Cut, Framer, MemoryBudget, Piece, Progress, Sealed};
use crate::repository::layout::{Epoch, Lineage, WalDirectory};
use crate::spool::{Destination, LineageSpool, Marker, RunName, RunReader, Spool, SpoolError};
use crate::wal::{Carry, History, HistoryEntry, Lsn, ScanOptions, Scanner, SegmentName, SegmentSize, TimelineId};

/// Pieces on their way to the encoder, as in a stream.
const PIECES_MAX: usize = 6;

/// Opens the cluster's spool, where one is configured. Without a contract that rests on it, one that cannot be used
/// is said and done without; with it, what is in there may be what the server no longer has.
pub async fn open(options: &ClusterOptions) -> Result<Option<Arc<Spool>>, Failure> {
    let Some(place) = options.spool.clone() else { return Ok(None) };
    let cluster = options.name.clone();
    match blocking(move || Spool::open(&place, &cluster)).await {
        Ok(spool) => {
            if let (Acknowledge::Spool, Some(why)) = (options.acknowledge, spool.volatile()) {
                tracing::warn!(
                    cluster = options.name, path = %spool.path().display(),
                    "acknowledge = \"spool\" rests on a file system that may lose what it synced: {why}"
                );
            }
            Ok(Some(Arc::new(spool)))
        }
        Err(error @ SpoolError::Io { .. }) if options.acknowledge == Acknowledge::Repository => {
            tracing::warn!(cluster = options.name, hint = error.hint(), "going on without a spool: {error}");
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}

/// Says whose WAL the stream that begins puts into the spool, and where it is on its way to. `None` where the spool
/// does not take that: the stream goes on without, and acknowledges what the repositories hold.
pub async fn begin(
    spool: &Arc<Spool>,
    options: &ClusterOptions,
    members: &[Member],
    epoch: Epoch,
    scan: &ScanOptions,
    server_major: u32,
) -> Option<LineageSpool> {
    let destination = |member: &Member| Destination { id: member.opened.id.clone(), epoch };
    let marker = Marker {
        schema: Marker::SCHEMA,
        cluster: options.name.clone(),
        lineage: members[0].opened.archive.lineage.directory_name(),
        system_id: scan.system_id,
        segment_size: scan.segment_size,
        server_major,
        repositories: members.iter().map(destination).collect(),
        acknowledged: options.acknowledge == Acknowledge::Spool,
    };
    let spool = spool.clone();
    let marked = blocking(move || {
        let lineage = spool.lineage(&marker.lineage)?;
        lineage.write_marker(&marker)?;
        Ok(lineage)
    });
    match marked.await {
        Ok(lineage) => Some(lineage),
        Err(error) => {
            tracing::warn!(cluster = options.name, hint = error.hint(), "going on without a spool: {error}");
            None
        }
    }
}

/// Brings everything in the spool into the repository and empties it. Returns the epoch it took for that, if any.
/// May be dropped at any await: what is not in the repository yet is still in the spool.
pub async fn drain(
    world: &World,
    options: &ClusterOptions,
    spool: &Arc<Spool>,
    held: Option<(Lineage, Epoch)>,
) -> Result<Option<(Lineage, Epoch)>, Failure> {
    let mut held = held;
    let opened = spool.clone();
    for lineage in blocking(move || opened.lineages()).await? {
        let place = lineage.clone();
        let (runs, marker) = blocking(move || Ok((place.runs()?, place.marker()?))).await?;
        if runs.is_empty() {
            continue;
        }
        let marker = marker.ok_or_else(|| foreign(&lineage, "nobody knows whom: it has no spool.json"))?;
        let drain = Drain::open(world, options, lineage, marker).await?;
        held = drain.run(runs, held).await?;
    }
    Ok(held)
}

fn foreign(lineage: &LineageSpool, whose: impl Into<String>) -> SpoolError {
    SpoolError::Foreign { path: lineage.path().to_owned(), whose: whose.into() }
}

/// One lineage's WAL and the archive it belongs into.
struct Drain<'a> {
    world: &'a World,
    options: &'a ClusterOptions,
    spool: LineageSpool,
    marker: Marker,
    archive: Archive,
    destination: Destination,
}

/// The repository the WAL goes to: of those it was on its way to that answer, the one that reaches furthest. The
/// others get it from there, as they get everything they have missed.
async fn choose(
    world: &World,
    options: &ClusterOptions,
    spool: &LineageSpool,
    marker: &Marker,
    lineage: &Lineage,
) -> Result<(Archive, Destination), Failure> {
    let mut candidates = Vec::new();
    let (mut unavailable, mut strange) = (None, Vec::new());
    for repository in &world.repositories {
        let archive = Archive::new(repository.backend.clone(), lineage.clone()).with_keys(options.keys.clone());
        let looked = async {
            let Some(file) = store::read_repository(archive.backend.as_ref()).await? else {
                return Ok(Err("holds no repository".to_string()));
            };
            let Some(destination) = marker.destination(&file.id) else {
                return Ok(Err(format!("is repository {}", file.id)));
            };
            if store::read_lineage(archive.backend.as_ref(), lineage).await?.is_none() {
                return Ok(Err(format!("does not hold lineage {}", marker.lineage)));
            }
            let (_, directories) = archive.wal_listing().await?;
            let end = match directories.last() {
                Some(last) => archive.frontier(last.timeline, marker.segment_size).await?.end,
                None => None,
            };
            Ok::<_, CatalogError>(Ok((directories.last().map(|last| last.timeline), end, destination.clone())))
        };
        match looked.await {
            Ok(Ok((timeline, end, destination))) => candidates.push((timeline, end, archive, destination)),
            Ok(Err(what)) => strange.push(format!("{} {what}", repository.backend.describe())),
            Err(error) => unavailable = unavailable.or(Some(Failure::from(error))),
        }
    }
    // The first of equals.
    let furthest = candidates.into_iter().reduce(|best, other| match (other.0, other.1) > (best.0, best.1) {
        true => other,
        false => best,
    });
    match (furthest, unavailable) {
        (Some((_, _, archive, destination)), _) => Ok((archive, destination)),
        (None, Some(failure)) => Err(failure),
        (None, None) => {
            let known: Vec<&str> = marker.repositories.iter().map(|known| known.id.as_str()).collect();
            let whose = format!("repository {}, lineage {}; {}", known.join(", "), marker.lineage, strange.join(", "));
            Err(foreign(spool, whose).into())
        }
    }
}

/// How far one timeline's WAL went.
struct Outcome {
    /// Everything proven below is in the repository.
    end: Lsn,
    /// How far the spool was read.
    read_to: Lsn,
    /// Why what lies beyond cannot be used.
    fault: Option<String>,
}

impl<'a> Drain<'a> {
    /// Finds the archive; refuses WAL of another one.
    async fn open(
        world: &'a World,
        options: &'a ClusterOptions,
        spool: LineageSpool,
        marker: Marker,
    ) -> Result<Drain<'a>, Failure> {
        let lineage = Lineage::parse(&options.name, &marker.lineage)
            .filter(|lineage| lineage.system_id == marker.system_id && marker.lineage == spool.name());
        let Some(lineage) = lineage.filter(|_| marker.cluster == options.name) else {
            let whose = format!("cluster {}, system {}", marker.cluster, marker.system_id);
            return Err(foreign(&spool, whose).into());
        };
        let (archive, destination) = choose(world, options, &spool, &marker, &lineage).await?;
        Ok(Drain { world, options, spool, marker, archive, destination })
    }

    async fn run(
        mut self,
        runs: Vec<RunName>,
        mut held: Option<(Lineage, Epoch)>,
    ) -> Result<Option<(Lineage, Epoch)>, Failure> {
        let mut timelines: BTreeMap<TimelineId, Vec<RunName>> = BTreeMap::new();
        for run in runs {
            timelines.entry(run.segment.timeline).or_default().push(run);
        }
        // Ancestors first: a child begins where its parent's WAL is.
        for (timeline, runs) in timelines {
            let outcome = self.drain_timeline(timeline, &runs, &mut held).await?;
            self.empty(timeline, runs, outcome).await?;
        }
        Ok(held)
    }

    async fn drain_timeline(
        &mut self,
        timeline: TimelineId,
        runs: &[RunName],
        held: &mut Option<(Lineage, Epoch)>,
    ) -> Result<Outcome, Failure> {
        let size = self.marker.segment_size;
        let Some((history, frontier)) = self.frontier(timeline, runs).await? else {
            let fault = format!("the archive does not hold what leads to timeline {timeline}");
            return Ok(Outcome { end: Lsn::ZERO, read_to: Lsn::ZERO, fault: Some(fault) });
        };
        let stored = frontier.stored().bytes_end;
        let mut ahead = Source::new(&self.spool, runs, size, frontier.segment_start);
        while ahead.position <= stored {
            if ahead.next().await?.is_none() {
                let fault = ahead.damage().map(Into::into);
                return Ok(Outcome { end: stored, read_to: ahead.position.max(stored), fault });
            }
        }
        let Some(epoch) = self.epoch(held, &frontier).await? else {
            let fault = "another agent has written to the archive since".to_string();
            return Ok(Outcome { end: stored, read_to: ahead.position, fault: Some(fault) });
        };
        tracing::info!(
            cluster = self.options.name, %timeline, from = %stored, bytes = self.spool.usage().used_bytes(),
            "bringing WAL from the spool into the repository"
        );
        let scan = ScanOptions { system_id: self.marker.system_id, segment_size: size, history };
        let source = Source::new(&self.spool, runs, size, frontier.segment_start);
        let outcome = self.store(source, frontier, scan, epoch).await?;
        tracing::info!(cluster = self.options.name, %timeline, to = %outcome.end, "the spool's WAL is in the repository");
        Ok(outcome)
    }

    /// Where the archive ends on this timeline; `None` where the spool's WAL cannot continue it.
    async fn frontier(&self, timeline: TimelineId, runs: &[RunName]) -> Result<Option<(History, Frontier)>, Failure> {
        let size = self.marker.segment_size;
        let history = match self.archive.history(timeline).await? {
            Some((_, history)) => history,
            None if timeline == TimelineId(1) => History::root(timeline),
            None => return Ok(None),
        };
        let state = self.archive.frontier(timeline, size).await?;
        if let Some(frontier) = startup::frontier_of(&state, size) {
            return Ok(Some((history, frontier)));
        }
        // A parent without WAL of its own ended where it began: the one before it leads here.
        let has_wal = |entry: &&HistoryEntry| history.begin_of(entry.timeline) < Some(entry.end);
        let Some(parent) = history.ancestors().iter().rev().find(has_wal) else {
            let first = runs.iter().map(|run| run.from).min().expect("there is a run");
            return Ok(Some((history, Frontier::empty(timeline, size.floor(self.start().await?.unwrap_or(first))))));
        };
        let boundary = size.floor(parent.end);
        let state = self.archive.frontier(parent.timeline, size).await?;
        let frontier = match startup::frontier_of(&state, size) {
            Some(parents) if parents.stored().bytes_end >= parent.end => {
                let (carry, record_end) = state_before(&self.archive, parent.timeline, boundary, size).await?;
                resume::child_frontier(timeline, parent.end, size, carry, record_end)
            }
            // The archive begins behind it, or in the fork's segment, and nothing of it could be stored.
            None => match self.start().await?.map(|start| size.floor(start)) {
                Some(start) if start >= boundary => Frontier::empty(timeline, start),
                _ => return Ok(None),
            },
            Some(_) => return Ok(None),
        };
        Ok(Some((history, frontier)))
    }

    async fn start(&self) -> Result<Option<Lsn>, Failure> {
        Ok(self.archive.lineage_file().await?.start_lsn)
    }

    /// An epoch to write under; `None` when somebody else took one after this WAL was received: whoever that is
    /// decides what the archive holds.
    async fn epoch(
        &mut self,
        held: &mut Option<(Lineage, Epoch)>,
        frontier: &Frontier,
    ) -> Result<Option<Epoch>, Failure> {
        let seen = frontier.tails.iter().map(|tail| tail.epoch).max().unwrap_or_default();
        let lineage = &self.archive.lineage;
        let ours = held.as_ref().filter(|(of, _)| of == lineage).map(|(_, epoch)| *epoch);
        let highest = self.archive.highest_writer().await?;
        if let Some(writer) = highest {
            if Some(writer.epoch) == ours && writer.epoch >= seen {
                return Ok(ours);
            }
            // Taken by an agent here that died before it could note it in the spool.
            let is_our_own = writer.slot == self.options.slot.as_str() && writer.host == self.options.host;
            if writer.epoch > self.destination.epoch && !is_our_own {
                return Ok(None);
            }
        }
        let (slot, host, now) = (self.options.slot.as_str(), self.options.host.as_deref(), self.world.clock.now());
        let epoch = self
            .archive
            .take_epoch(seen.max(self.destination.epoch), slot, host, env!("CARGO_PKG_VERSION"), now)
            .await?;
        for known in &mut self.marker.repositories {
            if known.id == self.destination.id {
                known.epoch = epoch;
            }
        }
        self.destination.epoch = epoch;
        let (spool, marker) = (self.spool.clone(), self.marker.clone());
        blocking(move || spool.write_marker(&marker)).await?;
        *held = Some((lineage.clone(), epoch));
        Ok(Some(epoch))
    }

    /// As a stream: prove, cut into frames, encode, store.
    async fn store(
        &self,
        source: Source,
        frontier: Frontier,
        scan: ScanOptions,
        epoch: Epoch,
    ) -> Result<Outcome, Failure> {
        let memory = MemoryBudget::new(self.options.memory_bytes);
        let stored = vec![frontier.stored()];
        let progress = Progress::new(frontier.segment_start, stored, 1, Acknowledge::Repository, Lsn::ZERO);
        let progress = Arc::new(watch::Sender::new(progress));
        let stop = CancellationToken::new();
        let writer = Writer::new(self.archive.clone(), epoch, StoreHealth::default(), stop);
        let (timeline, segment_size) = (frontier.timeline, scan.segment_size);
        let options = ArchiverOptions { timeline, segment_size, memory: memory.clone() };
        let run = frontier.stored();
        let reach = Reach::new(0, progress.clone(), frontier.segment_start, run, run);
        let archiver = Archiver::new(options, writer, self.world.workers.clone(), reach, &frontier);
        let (pieces, pieces_input) = mpsc::channel(PIECES_MAX);
        let (encoded, encoded_input) = mpsc::channel(archiver::ENCODED_MAX);
        let archiver = AbortOnDropHandle::new(tokio::spawn(archiver.run(encoded_input)));
        let workers = self.world.workers.clone();
        let encoding = archiver::run_encoding(pieces_input, vec![encoded], workers, memory.clone());
        let encoding = AbortOnDropHandle::new(tokio::spawn(encoding));
        let scanner = Scanner::new(scan, frontier.segment_start, frontier.carry.clone());
        let scanner = scanner.for_server(self.marker.server_major);
        let fed = feed(source, &frontier, scanner, pieces, &memory, &progress).await;
        let archived = archiver.await.expect("the archiver does not panic");
        encoding.await.expect("the encoding stage does not panic");
        archived.map_err(|error: ArchiveError| Failure::from(error).context("store WAL from the spool"))?;
        let outcome = fed?;
        let reached = progress.borrow().stored()[0].bytes_end;
        if reached < outcome.end {
            let message = format!("only WAL up to {reached} of {} in the spool was stored", outcome.end);
            return Err(Failure::new(ExitCode::Unavailable, message).disposition(Disposition::Retry));
        }
        Ok(outcome)
    }

    /// The repository holds what could be used. The rest is removed where the server has it still, and kept where it
    /// was told that it need not.
    async fn empty(&self, timeline: TimelineId, runs: Vec<RunName>, mut outcome: Outcome) -> Result<(), Failure> {
        let size = self.marker.segment_size;
        let end_of = |run: &RunName| run.segment.number(size).map_or(Lsn(u64::MAX), |number| size.end_of(number));
        let holes = if self.marker.acknowledged { self.holes(timeline).await? } else { Vec::new() };
        let is_in_a_hole = |run: &RunName| holes.iter().any(|hole| run.from < hole.end && hole.start < end_of(run));
        if outcome.fault.is_none() && runs.iter().any(is_in_a_hole) {
            outcome.fault = Some("the archive has a gap there and goes on behind it".to_string());
        }
        // Without a fault only what nothing leads to is left out: pieces of a run that was never acknowledged.
        let keeps = |run: &RunName| {
            let is_unstored = end_of(run) > outcome.end && (outcome.fault.is_some() || run.from > outcome.read_to);
            self.marker.acknowledged && (is_unstored || is_in_a_hole(run))
        };
        let (kept, removed): (Vec<RunName>, Vec<RunName>) = runs.into_iter().partition(keeps);
        if let Some(fault) = &outcome.fault {
            let (cluster, from) = (&self.options.name, outcome.end);
            match kept.last() {
                Some(last) => tracing::error!(
                    cluster, %timeline, %from, %last, directory = %self.spool.path().display(),
                    hint = "the server was told that this WAL is durable and may have removed it: then the archive has \
                            a gap and needs a new base backup. The files are kept as *.refused",
                    "WAL in the spool cannot be used: {fault}"
                ),
                None => {
                    tracing::warn!(cluster, %timeline, %from, "WAL in the spool cannot be used and is received again: {fault}");
                }
            }
        }
        let spool = self.spool.clone();
        let emptied = blocking(move || {
            removed.into_iter().try_for_each(|run| spool.remove(run))?;
            kept.into_iter().try_for_each(|run| spool.refuse(run).map(drop))
        });
        Ok(emptied.await?)
    }

    /// What the archive misses of a timeline, below its end.
    async fn holes(&self, timeline: TimelineId) -> Result<Vec<Range<Lsn>>, Failure> {
        // What is damaged there has its name already: mending it is not storing it.
        let catalog = self.archive.load_catalog().await?.as_written();
        let gaps = continuity::gaps(&catalog).into_iter();
        Ok(gaps.filter(|gap| gap.timeline == timeline).map(|gap| gap.from..gap.to).collect())
    }
}

/// The scanner's state at `boundary` on `timeline`, as the index entry of the segment before it has it.
async fn state_before(
    archive: &Archive,
    timeline: TimelineId,
    boundary: Lsn,
    size: SegmentSize,
) -> Result<(Carry, Lsn), Failure> {
    if boundary == Lsn::ZERO {
        return Ok((Carry::default(), Lsn::ZERO));
    }
    let name = SegmentName::new(timeline, size.segment_before(boundary), size);
    let directory = archive.directory(WalDirectory::of(name), size).await?;
    Ok(directory.sealed(name).map_or((Carry::default(), Lsn::ZERO), |entry| {
        (entry.summary.carry.clone(), entry.summary.record_end.unwrap_or_default())
    }))
}

/// Hands the spool's WAL to the encoder as far as it proves.
async fn feed(
    mut source: Source,
    frontier: &Frontier,
    mut scanner: Scanner,
    pieces: mpsc::Sender<Piece>,
    memory: &MemoryBudget,
    progress: &watch::Sender<Progress>,
) -> Result<Outcome, Failure> {
    let mut framer = Framer::new(frontier.segment_start);
    let mut prefix = PrefixCheck::new(&frontier.tails);
    let mut fault = None;
    while let Some(raw) = source.next().await? {
        let start = scanner.position();
        prefix.observe(start, &raw).map_err(|error| Failure::from(error).context("the spool"))?;
        if let Err(error) = scanner.feed(start, &raw) {
            fault = Some(error.to_string());
        }
        progress.send_modify(|progress| progress.handle_received(source.position, scanner.proven()));
        let mut ready = Vec::new();
        framer.push(&raw, |frame| ready.push(Piece::Frame(frame)));
        while let Some((number, summary)) = scanner.poll_segment() {
            ready.push(Piece::Seal(Sealed { number, summary }));
        }
        for piece in ready {
            if pieces.send(piece).await.is_err() {
                // The archiver has failed, and says why itself.
                let failure = Failure::new(ExitCode::Unavailable, "the archiver ended before the spool was read");
                return Err(failure.disposition(Disposition::Retry));
            }
        }
        if fault.is_some() {
            break;
        }
        while memory.is_exhausted() && !pieces.is_closed() {
            tokio::select! {
                () = memory.released() => {}
                () = pieces.closed() => {}
            }
        }
    }
    let end = scanner.proven().max(frontier.stored().bytes_end);
    if prefix.is_done() && scanner.proven() > frontier.stored().bytes_end {
        let last_commit = scanner.last_commit().map(|commit| commit.time);
        let cut = Cut { to: end, partial: framer.partial(end), last_commit, is_final: false };
        let _ = pieces.send(Piece::Cut(cut)).await;
    }
    let fault = fault.or_else(|| source.damage().map(Into::into));
    Ok(Outcome { end, read_to: source.position, fault })
}

/// The spool's WAL from a position on.
struct Source {
    /// `None` while it is away reading.
    reader: Option<RunReader>,
    position: Lsn,
}

impl Source {
    fn new(spool: &LineageSpool, runs: &[RunName], size: SegmentSize, position: Lsn) -> Source {
        Source { reader: Some(spool.reader(runs.to_vec(), size)), position }
    }

    async fn next(&mut self) -> Result<Option<Vec<u8>>, SpoolError> {
        let Some(mut reader) = self.reader.take() else { return Ok(None) };
        let position = self.position;
        let (reader, read) = blocking(move || {
            let read = reader.next(position);
            Ok::<_, SpoolError>((reader, read))
        })
        .await?;
        self.reader = Some(reader);
        let read = read?;
        self.position = self.position + read.as_ref().map_or(0, Vec::len) as u64;
        Ok(read)
    }

    fn damage(&self) -> Option<&str> {
        self.reader.as_ref().and_then(RunReader::damage)
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SpoolError> + Send + 'static,
) -> Result<T, SpoolError> {
    tokio::task::spawn_blocking(work).await.expect("the spool's calls do not panic")
}
