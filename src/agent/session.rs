//! Owns: one stream of one timeline: the receiver, the encoding stage and the archiver, wired together; the
//! order in which they end.
//! Does not own: what any of them does, where the stream starts (`startup.rs`), what happens next (`cluster.rs`).

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::sentinel::Sentinel;
use super::synchronous;
use super::world::{ClusterOptions, World};
use crate::archiver::{
    self, ArchiveError, Archiver, ArchiverOptions, Encoded, SpoolHealth, Spooling, SpoolingOptions, StoreHealth, Writer,
};
use crate::catalog::DirectoryContents;
use crate::catalog::store::{Archive, CatalogError};
use crate::receiver::resume::Frontier;
use crate::receiver::{Activity, MemoryBudget, Progress, ReceiveError, Receiver, ReceiverOptions, StreamEnd, Wiring};
use crate::replication::{Address, Connection};
use crate::repository::layout::{Epoch, WalDirectory};
use crate::spool::LineageSpool;
use crate::wal::{Lsn, ScanOptions, Scanner, SegmentName, SegmentSize};

/// Pieces between receiver and encoder: each may hold a raw frame of 1 MiB. Fewer, and reading stops and starts
/// with the encoder's every frame; more would only be memory.
const PIECES_MAX: usize = 6;
/// Encoded pieces on their way to an archiver, which takes them at once: they count against the budget.
const ENCODED_MAX: usize = 8;

/// What a stream is about.
#[derive(Debug)]
pub struct Assignment {
    pub frontier: Frontier,
    pub scan: ScanOptions,
    pub slot_restart: Lsn,
    pub epoch: Epoch,
    pub wal_sender_timeout: Duration,
    pub server_major: u32,
    /// Where the stream comes from.
    pub address: Address,
    /// Where memory's overflow, or everything, goes on local disk.
    pub spool: Option<LineageSpool>,
}

/// What others may watch while a stream is under way.
#[derive(Clone, Debug)]
pub struct Watched {
    pub progress: Arc<watch::Sender<Progress>>,
    pub activity: Arc<watch::Sender<Activity>>,
    pub health: StoreHealth,
    pub memory: MemoryBudget,
    /// Whether the server's commits wait for this archive.
    pub synchronous: watch::Receiver<bool>,
    /// The server the stream comes from.
    pub address: Address,
    pub server_major: u32,
    pub archive: Archive,
    pub spool: Arc<watch::Sender<SpoolHealth>>,
}

/// How a stream ended: the receiver's word, and the archiver's, which decides when both have failed.
#[derive(Debug)]
pub struct Ended {
    pub received: Result<StreamEnd, ReceiveError>,
    pub archived: Result<(), ArchiveError>,
}

/// Streams until the timeline or the connection ends, or `stop` asks to drain. When this returns nothing of the
/// session is left: the next one starts from what the repository holds.
pub async fn run(
    world: &World,
    options: &ClusterOptions,
    archive: &Archive,
    mut connection: Connection,
    assignment: Assignment,
    stop: CancellationToken,
    watching: impl FnOnce(Watched),
) -> Ended {
    let frontier = &assignment.frontier;
    let stored = vec![frontier.stored()];
    let progress = Progress::new(frontier.segment_start, stored, 1, options.acknowledge, assignment.slot_restart);
    let memory = MemoryBudget::new(options.memory_bytes);
    let (is_synchronous, synchronous) = watch::channel(options.synchronous == Some(true));
    let watched = Watched {
        progress: Arc::new(watch::Sender::new(progress)),
        activity: Arc::new(watch::Sender::new(Activity::Streaming)),
        health: StoreHealth::default(),
        memory: memory.clone(),
        synchronous: synchronous.clone(),
        address: assignment.address.clone(),
        server_major: assignment.server_major,
        archive: archive.clone(),
        spool: Arc::default(),
    };
    watching(watched.clone());
    let abort = CancellationToken::new();
    let writer = Writer::new(archive.clone(), assignment.epoch, watched.health.clone(), abort.clone());
    let archiver_options = ArchiverOptions {
        timeline: frontier.timeline,
        segment_size: assignment.scan.segment_size,
        repository: 0,
        memory: memory.clone(),
    };
    let (pieces, pieces_input) = mpsc::channel(PIECES_MAX);
    let (encoded, encoded_input) = mpsc::channel(ENCODED_MAX);
    let mut archiver =
        Archiver::new(archiver_options, writer, world.workers.clone(), watched.progress.clone(), frontier);
    match left_behind(archive, frontier, assignment.scan.segment_size).await {
        Ok(contents) => archiver.adopt(&contents),
        Err(error) => tracing::debug!(%error, "nothing is tidied up this time"),
    }
    let mut archiver = AbortOnDropHandle::new(tokio::spawn(archiver.run(encoded_input)));
    let (spooling, spooled) = start_spooling(world, options, &assignment, &memory, &watched).unzip();
    let archivers = [Some(encoded), spooled].into_iter().flatten().collect();
    let encoding = archiver::run_encoding(pieces_input, archivers, world.workers.clone(), memory.clone());
    let encoding = AbortOnDropHandle::new(tokio::spawn(encoding));

    let server_stopping = CancellationToken::new();
    let patience = 2 * options.tail_interval.max(options.shutdown_grace);
    let address = assignment.address.clone();
    let sentinel = Sentinel::new(world.clone(), address, watched.clone(), patience, server_stopping.clone());
    let sentinel = AbortOnDropHandle::new(tokio::spawn(sentinel.run()));

    let scanner = Scanner::new(assignment.scan.clone(), frontier.segment_start, frontier.carry.clone())
        .for_server(assignment.server_major);
    let looking = synchronous::watch(world.clone(), options.clone(), assignment.address.clone(), is_synchronous);
    let looking = AbortOnDropHandle::new(tokio::spawn(looking));
    let wiring = Wiring {
        pieces,
        progress: watched.progress.clone(),
        memory,
        stop: stop.clone(),
        server_stopping,
        activity: watched.activity.clone(),
        synchronous,
        clock: world.clock.clone(),
    };
    let receiver_options = receiver_options(options, assignment.wal_sender_timeout);
    let received = Receiver::new(&mut connection, frontier, scanner, receiver_options, wiring).run().await;
    // A stopping server waits for every walsender's connection, whatever the archiver still has to do.
    drop((sentinel, looking));
    match &received {
        Ok(_) => connection.close().await,
        Err(_) => drop(connection),
    }

    // The receiver is gone and its channel closed: the archiver stores what it was given and ends. At the end of
    // a timeline that may take as long as the store needs; otherwise as long as a stop may take.
    let patience = async {
        match &received {
            Ok(StreamEnd::Timeline(_)) => stop.cancelled().await,
            Ok(StreamEnd::Stopped { .. }) => return,
            _ => {}
        }
        tokio::time::sleep(options.shutdown_grace).await;
    };
    let archived = tokio::select! {
        biased;
        archived = &mut archiver => archived,
        () = patience => {
            abort.cancel();
            archiver.await
        }
    };
    let archived = archived.expect("the archiver does not panic");
    encoding.await.expect("the encoding stage does not panic");
    if let Some(spooling) = spooling {
        end_spooling(spooling, options.shutdown_grace).await;
    }
    Ended { received, archived }
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
    let (encoded, input) = mpsc::channel(ENCODED_MAX);
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
