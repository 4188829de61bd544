//! Owns: one stream of one timeline: the receiver, the encoding stage, and for each repository an outlet with its
//! archiver, wired together; the order in which they end.
//! Does not own: what any of them does, where the stream starts (`startup.rs`), what happens next (`cluster.rs`).

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::absence::{Absences, Return};
use super::opening::{Absent, Opened};
use super::sentinel::Sentinel;
use super::synchronous;
use super::world::{ClusterOptions, World};
use crate::archiver::repair::{Repair, Source};
use crate::archiver::{
    self, ArchiveError, Archiver, ArchiverOptions, Encoded, Finished, Outlet, Outlets, Reach, SpoolHealth, Spooling,
    SpoolingOptions, StoreHealth, Writer,
};
use crate::catalog::DirectoryContents;
use crate::catalog::store::{Archive, CatalogError};
use crate::error::{ExitCode, Failure};
use crate::receiver::resume::Frontier;
use crate::receiver::{
    Activity, MemoryBudget, Progress, ReceiveError, Receiver, ReceiverOptions, Stored, StreamEnd, Wiring,
};
use crate::replication::{Address, Connection};
use crate::repository::StoreError;
use crate::repository::layout::{Epoch, WalDirectory};
use crate::spool::LineageSpool;
use crate::wal::{History, Lsn, ScanOptions, Scanner, SegmentName, SegmentSize};

/// Pieces between receiver and encoder: each may hold a raw frame of 1 MiB. Fewer, and reading stops and starts
/// with the encoder's every frame; more would only be memory.
const PIECES_MAX: usize = 6;
/// What a stream is about.
#[derive(Debug)]
pub struct Assignment {
    /// Where it begins, and all that is stored of its first segment, in any repository.
    pub frontier: Frontier,
    /// Those that take part, in the order of the configuration.
    pub members: Vec<Member>,
    pub absent: Vec<Absent>,
    pub absences: Absences,
    pub scan: ScanOptions,
    /// The server's history: along it every repository has to be contiguous.
    pub path: History,
    pub slot_restart: Lsn,
    pub epoch: Epoch,
    pub wal_sender_timeout: Duration,
    pub server_major: u32,
    /// Where the stream comes from.
    pub address: Address,
    /// Where memory's overflow, or everything, goes on local disk.
    pub spool: Option<LineageSpool>,
}

/// A repository that takes part.
#[derive(Debug)]
pub struct Member {
    pub opened: Opened,
    /// Its own part of the frontier.
    pub frontier: Frontier,
    /// What it is known to hold without a hole; zero when that has to be found out.
    pub contiguous: Stored,
    /// Whether it is looked for what it misses, on the server's path and off it.
    pub is_compared: bool,
}

/// What others may watch while a stream is under way.
#[derive(Clone, Debug)]
pub struct Watched {
    pub progress: Arc<watch::Sender<Progress>>,
    pub activity: Arc<watch::Sender<Activity>>,
    /// In the order of the configuration.
    pub repositories: Vec<WatchedRepository>,
    pub memory: MemoryBudget,
    /// Whether the server's commits wait for this archive.
    pub synchronous: watch::Receiver<bool>,
    /// The server the stream comes from.
    pub address: Address,
    pub server_major: u32,
    /// What the repositories that take part hold of the lineage.
    pub archives: Vec<Archive>,
    /// The same, with who they are.
    pub opened: Vec<Opened>,
    pub spool: Arc<watch::Sender<SpoolHealth>>,
}

impl Watched {
    /// Why a repository that takes part does not take WAL.
    pub fn failure(&self) -> Option<StoreError> {
        self.repositories.iter().filter(|repository| !repository.is_out()).find_map(|it| it.health.failure())
    }
}

/// One repository's part in a stream.
#[derive(Clone, Debug)]
pub struct WatchedRepository {
    pub name: String,
    pub health: StoreHealth,
    /// `None`: it does not take part.
    part: Option<Part>,
    absent: Option<Failure>,
}

#[derive(Clone, Debug)]
struct Part {
    reach: Reach,
    outlets: Outlets,
    repairing: watch::Receiver<Option<(Lsn, Lsn)>>,
}

/// What a repository is doing.
#[derive(Clone, Debug)]
pub enum RepositoryState {
    /// It takes the stream, and holds everything before it.
    Writing,
    /// It takes the stream behind a hole nobody who is there can fill, or one that is still looked for.
    Behind,
    /// It takes the stream; what it misses is copied: up to the first, of the second.
    Repairing { from: Lsn, to: Lsn },
    /// Out, and why.
    Absent(Failure),
}

impl WatchedRepository {
    pub fn state(&self) -> RepositoryState {
        let Some(part) = &self.part else {
            let unknown = || Failure::new(ExitCode::Unavailable, "it does not take part");
            return RepositoryState::Absent(self.absent.clone().unwrap_or_else(unknown));
        };
        if let Some((_, why)) = part.outlets.gone().borrow().iter().find(|(gone, _)| *gone == part.reach.repository) {
            return RepositoryState::Absent(why.clone());
        }
        match *part.repairing.borrow() {
            _ if part.reach.is_whole() => RepositoryState::Writing,
            Some((from, to)) => RepositoryState::Repairing { from, to },
            None => RepositoryState::Behind,
        }
    }

    /// Whether it was found to hold everything the others hold, also what no path leads to any more.
    pub fn is_complete(&self) -> bool {
        self.part.as_ref().is_some_and(|part| part.reach.is_whole() && part.repairing.borrow().is_none())
    }

    /// What it holds without a hole, in this stream; `None` while it is out.
    pub fn frontier(&self) -> Option<Stored> {
        self.part.as_ref().map(|part| part.reach.contiguous())
    }

    fn is_out(&self) -> bool {
        self.part.as_ref().is_none_or(|part| part.outlets.is_gone(part.reach.repository))
    }
}

/// A repository, and those it was compared with.
type Repaired = (usize, Vec<usize>);

/// How a stream ended: the receiver's word, and the archivers', which decides when both have failed.
#[derive(Debug)]
pub struct Ended {
    pub received: Result<StreamEnd, ReceiveError>,
    pub archived: Result<(), ArchiveError>,
    /// What each repository that took part holds without a hole.
    pub contiguous: Vec<(usize, Stored)>,
    /// Those that were found to miss nothing, or got it, each with those it was compared with.
    pub repaired: Vec<Repaired>,
    /// Whether any of them holds more than before.
    pub has_stored: bool,
}

/// Streams until the timeline or the connection ends, `stop` asks to drain, or a repository is back. When this returns
/// nothing of the session is left: the next one starts from what the repositories hold.
pub async fn run(
    world: &World,
    options: &ClusterOptions,
    mut connection: Connection,
    assignment: Assignment,
    stop: CancellationToken,
    watching: impl FnOnce(Watched),
) -> Ended {
    let frontier = &assignment.frontier;
    let memory = MemoryBudget::new(options.memory_bytes);
    let abort = CancellationToken::new();
    let (is_synchronous, synchronous) = watch::channel(options.synchronous == Some(true));
    let Members { watched, outlets, running, repairs, mut encoded } =
        begin_members(world, options, &assignment, &memory, &synchronous, &abort).await;
    watching(watched.clone());
    let (pieces, pieces_input) = mpsc::channel(PIECES_MAX);
    let (spooling, spooled) = start_spooling(world, options, &assignment, &memory, &watched).unzip();
    encoded.extend(spooled);
    let encoding = archiver::run_encoding(pieces_input, encoded, world.workers.clone(), memory.clone());
    let encoding = AbortOnDropHandle::new(tokio::spawn(encoding));
    let repaired: Arc<Mutex<Vec<Repaired>>> = Arc::default();
    let repairing = run_repairs(repairs, assignment.absences.clone(), repaired.clone(), abort.clone());
    let repairs = AbortOnDropHandle::new(tokio::spawn(repairing));

    let server_stopping = CancellationToken::new();
    let patience = 2 * options.tail_interval.max(options.shutdown_grace);
    let address = assignment.address.clone();
    let sentinel = Sentinel::new(world.clone(), address, watched.clone(), patience, server_stopping.clone());
    let sentinel = AbortOnDropHandle::new(tokio::spawn(sentinel.run()));
    // Ours to cancel, and cancelled with `stop`.
    let drain = stop.child_token();
    let returning = Return {
        world: world.clone(),
        options: options.clone(),
        lineage: assignment.members[0].opened.archive.lineage.clone(),
        epoch: assignment.epoch,
        absences: assignment.absences.clone(),
        gone: outlets.gone(),
        back: drain.clone(),
    };
    let returning = (world.repositories.len() > 1).then(|| AbortOnDropHandle::new(tokio::spawn(returning.run())));

    let scanner = Scanner::new(assignment.scan.clone(), frontier.segment_start, frontier.carry.clone())
        .for_server(assignment.server_major);
    let looking = synchronous::watch(world.clone(), options.clone(), assignment.address.clone(), is_synchronous);
    let looking = AbortOnDropHandle::new(tokio::spawn(looking));
    let wiring = Wiring {
        pieces,
        progress: watched.progress.clone(),
        memory,
        stop: drain,
        server_stopping,
        activity: watched.activity.clone(),
        synchronous,
        clock: world.clock.clone(),
    };
    let receiver_options = receiver_options(options, assignment.wal_sender_timeout);
    // Cuts are made for the one that holds least of the first segment.
    let least = assignment.members.iter().map(|member| member.frontier.stored().bytes_end).min();
    let received = Receiver::new(&mut connection, frontier, scanner, receiver_options, wiring)
        .cutting_from(least.expect("at least one repository takes part"))
        .run()
        .await;
    // A stopping server waits for every walsender's connection, whatever the archivers still have to do.
    drop((sentinel, looking, returning));
    match &received {
        Ok(_) => connection.close().await,
        Err(_) => drop(connection),
    }

    let archived = finish(running, &received, options.shutdown_grace, &stop, &abort).await;
    encoding.await.expect("the encoding stage does not panic");
    if let Some(spooling) = spooling {
        end_spooling(spooling, options.shutdown_grace).await;
    }
    // A repair that found what stops the cluster has said so by now; any other goes on in the next stream.
    let repair_failed = match repairs.is_finished() {
        true => repairs.await.expect("a repair does not panic"),
        false => Ok(()),
    };
    let repaired = repaired.lock().expect("no holder panics").clone();
    let parts: Vec<&Part> = watched.repositories.iter().filter_map(|repository| repository.part.as_ref()).collect();
    let contiguous = parts.iter().map(|part| (part.reach.repository, part.reach.contiguous())).collect();
    let before = |member: &Member| member.frontier.stored().bytes_end;
    let has_stored =
        assignment.members.iter().zip(&parts).any(|(member, part)| part.reach.run().bytes_end > before(member));
    Ended { received, archived: repair_failed.and(archived), contiguous, repaired, has_stored }
}

type RunningOutlets = FuturesUnordered<AbortOnDropHandle<Result<Finished, ArchiveError>>>;

/// What was started for the repositories.
struct Members {
    watched: Watched,
    outlets: Outlets,
    running: RunningOutlets,
    /// By place in the configuration.
    repairs: Vec<(usize, Repair)>,
    encoded: Vec<mpsc::Sender<Encoded>>,
}

/// One outlet and archiver for each repository, and what has to be repaired.
async fn begin_members(
    world: &World,
    options: &ClusterOptions,
    assignment: &Assignment,
    memory: &MemoryBudget,
    synchronous: &watch::Receiver<bool>,
    abort: &CancellationToken,
) -> Members {
    let Assignment { frontier, members, .. } = assignment;
    let (size, start) = (assignment.scan.segment_size, frontier.segment_start);
    let mut stored = vec![Stored::default(); world.repositories.len()];
    for member in members {
        stored[member.opened.index] = Reach::initial(start, member.frontier.stored(), member.contiguous);
    }
    let mut progress =
        Progress::new(start, stored.clone(), options.required, options.acknowledge, assignment.slot_restart);
    for (index, stored) in stored.iter().enumerate() {
        progress.handle_awaited(index, stored.bytes_end >= start);
    }
    let progress = Arc::new(watch::Sender::new(progress));
    let reaches: Vec<Reach> = members
        .iter()
        .map(|member| {
            let (run, index) = (member.frontier.stored(), member.opened.index);
            Reach::new(index, progress.clone(), start, run, member.contiguous)
        })
        .collect();
    let outlets = Outlets::new(reaches.clone(), options.required, progress.clone());
    let mut repositories: Vec<WatchedRepository> = world
        .repositories
        .iter()
        .enumerate()
        .map(|(index, repository)| {
            let absent = assignment.absent.iter().find(|absent| absent.index == index).map(|absent| absent.why.clone());
            WatchedRepository { name: repository.name.clone(), health: StoreHealth::default(), part: None, absent }
        })
        .collect();
    let (running, mut repairs, mut encoded) = (FuturesUnordered::new(), Vec::new(), Vec::new());
    for (member, reach) in members.iter().zip(reaches) {
        let Opened { index, name, archive, .. } = &member.opened;
        let health = repositories[*index].health.clone();
        let writer = Writer::new(archive.clone(), assignment.epoch, health.clone(), abort.clone());
        let archiver_options =
            ArchiverOptions { timeline: frontier.timeline, segment_size: size, memory: memory.clone() };
        let mut archiver =
            Archiver::new(archiver_options, writer.clone(), world.workers.clone(), reach.clone(), &member.frontier);
        match left_behind(archive, &member.frontier, size).await {
            Ok(contents) => archiver.adopt(&contents),
            Err(error) => tracing::debug!(%error, "nothing is tidied up this time"),
        }
        let has_repair = member.is_compared || !reach.is_whole();
        let (position, repairing) =
            watch::channel(has_repair.then(|| (reach.contiguous().bytes_end.min(start), start)));
        let others = members.iter().filter(|other| other.opened.index != *index);
        let sources = others.map(|other| Source {
            repository: other.opened.index,
            id: other.opened.id.clone(),
            archive: other.opened.archive.clone(),
        });
        let repair = Repair {
            name: name.clone(),
            writer,
            reach: reach.clone(),
            sources: sources.collect(),
            outlets: outlets.clone(),
            segment_size: size,
            path: assignment.path.clone(),
            boundary: (frontier.timeline, start),
            is_complete: members.len() == world.repositories.len(),
            memory: memory.clone(),
            clock: world.clock.clone(),
            position,
        };
        match has_repair {
            true => repairs.push((*index, repair)),
            false => assignment.absences.handle_whole(*index),
        }
        let (sender, input) = mpsc::channel(archiver::ENCODED_MAX);
        encoded.push(sender);
        let outlet = Outlet::new(name.clone(), archiver, input, outlets.clone(), health);
        running.push(AbortOnDropHandle::new(tokio::spawn(outlet.run())));
        repositories[*index].part = Some(Part { reach, outlets: outlets.clone(), repairing });
    }
    let activity = Arc::new(watch::Sender::new(Activity::Streaming));
    Members {
        watched: Watched {
            progress,
            activity,
            repositories,
            memory: memory.clone(),
            synchronous: synchronous.clone(),
            address: assignment.address.clone(),
            server_major: assignment.server_major,
            archives: members.iter().map(|member| member.opened.archive.clone()).collect(),
            opened: members.iter().map(|member| member.opened.clone()).collect(),
            spool: Arc::default(),
        },
        outlets,
        running,
        repairs,
        encoded,
    }
}

/// Repairs what has to be, all at once. Ends early, and the session with it, with what stops the cluster.
async fn run_repairs(
    repairs: Vec<(usize, Repair)>,
    absences: Absences,
    done: Arc<Mutex<Vec<Repaired>>>,
    abort: CancellationToken,
) -> Result<(), ArchiveError> {
    let mut running: FuturesUnordered<_> = repairs
        .into_iter()
        .map(|(index, repair)| {
            let mut gone = repair.outlets.gone();
            let (absences, done) = (absences.clone(), done.clone());
            async move {
                let left = async move {
                    let _ = gone.wait_for(|gone| gone.iter().any(|(gone, _)| *gone == index)).await;
                };
                tokio::select! {
                    biased;
                    () = left => Ok(()),
                    repaired = repair.run() => repaired.map(|others| {
                        absences.handle_whole(index);
                        done.lock().expect("no holder panics").push((index, others));
                    }),
                }
            }
        })
        .collect();
    while let Some(repaired) = running.next().await {
        match repaired {
            Ok(()) | Err(ArchiveError::Stopped) => {}
            Err(error) => {
                abort.cancel();
                return Err(error);
            }
        }
    }
    Ok(())
}

/// The receiver is gone and its channel closed: the archivers store what they were given and end. At the end of a
/// timeline that may take as long as a store needs; otherwise as long as a stop may take. Once one of them has
/// everything, the others get no longer than that either: what they miss is copied.
async fn finish(
    mut running: RunningOutlets,
    received: &Result<StreamEnd, ReceiveError>,
    grace: Duration,
    stop: &CancellationToken,
    abort: &CancellationToken,
) -> Result<(), ArchiveError> {
    let has_stored = CancellationToken::new();
    let patience = async {
        match received {
            Ok(StreamEnd::Timeline(_)) => tokio::select! {
                () = stop.cancelled() => {}
                () = has_stored.cancelled() => {}
            },
            Ok(StreamEnd::Stopped { .. }) => return,
            _ => {}
        }
        tokio::time::sleep(grace).await;
    };
    tokio::pin!(patience);
    let mut result = Ok(());
    loop {
        let ended = tokio::select! {
            biased;
            ended = running.next() => ended,
            () = &mut patience, if !abort.is_cancelled() => {
                abort.cancel();
                continue;
            }
        };
        match ended.map(|ended| ended.expect("an outlet does not panic")) {
            None => return result,
            Some(Ok(Finished::Stored)) => has_stored.cancel(),
            Some(Ok(Finished::Left)) => {}
            Some(Err(error)) => {
                // Nothing further is stored anywhere.
                abort.cancel();
                result = Err(graver(result, error));
            }
        }
    }
}

/// Of two reasons to end, the one that asks for more.
fn graver(before: Result<(), ArchiveError>, error: ArchiveError) -> ArchiveError {
    let weight = |error: &ArchiveError| match error {
        ArchiveError::Stopped => 0,
        ArchiveError::Store(_)
        | ArchiveError::Catalog(_)
        | ArchiveError::Replaced { .. }
        | ArchiveError::Incomparable { .. } => 1,
        ArchiveError::Fenced { .. } => 2,
        ArchiveError::Conflict { .. } => 3,
    };
    match before {
        Err(before) if weight(&before) >= weight(&error) => before,
        _ => error,
    }
}

/// The spool's part of a stream, where there is one, and the way to it.
fn start_spooling(
    world: &World,
    options: &ClusterOptions,
    assignment: &Assignment,
    memory: &MemoryBudget,
    watched: &Watched,
) -> Option<(AbortOnDropHandle<()>, mpsc::Sender<Encoded>)> {
    let spool = assignment.spool.clone()?;
    let spooling = SpoolingOptions {
        timeline: assignment.frontier.timeline,
        segment_size: assignment.scan.segment_size,
        memory: memory.clone(),
        acknowledge: options.acknowledge,
    };
    let (progress, health) = (watched.progress.clone(), watched.spool.clone());
    let spooling = Spooling::new(spooling, spool, world.workers.clone(), progress, health);
    let (encoded, input) = mpsc::channel(archiver::ENCODED_MAX);
    Some((AbortOnDropHandle::new(tokio::spawn(spooling.run(input))), encoded))
}

/// Its input has closed. A disk that hangs is not waited for: what it has taken by then is found by the next drain.
async fn end_spooling(spooling: AbortOnDropHandle<()>, patience: Duration) {
    match tokio::time::timeout(patience, spooling).await {
        Ok(ended) => ended.expect("the spooling stage does not panic"),
        Err(_) => tracing::warn!("the spool's disk has not answered for {patience:?}"),
    }
}

/// The directory the last sealed segment lies in.
async fn left_behind(
    archive: &Archive,
    frontier: &Frontier,
    size: SegmentSize,
) -> Result<DirectoryContents, CatalogError> {
    let last = SegmentName::new(frontier.timeline, size.segment_before(frontier.segment_start), size);
    archive.directory(WalDirectory::of(last), size).await
}

fn receiver_options(options: &ClusterOptions, wal_sender_timeout: Duration) -> ReceiverOptions {
    const STATUS_INTERVAL_MAX: Duration = Duration::from_secs(10);
    const SILENCE_MAX: Duration = Duration::from_secs(30);
    ReceiverOptions {
        tail_interval: options.tail_interval,
        status_interval: (wal_sender_timeout / 4).min(STATUS_INTERVAL_MAX),
        silence: (wal_sender_timeout / 2).min(SILENCE_MAX),
        shutdown_grace: options.shutdown_grace,
    }
}
