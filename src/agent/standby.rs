//! Owns: whose turn it is to write, when several agents could: the one slot's lock decides between agents on
//! one slot, a frontier that stands still between agents on two.
//! Does not own: fencing during writing (`archiver/writer.rs`).

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::startup::{self, Server};
use super::world::{ClusterOptions, World};
use crate::catalog::lineage::WriterFile;
use crate::catalog::store::Archive;
use crate::error::Failure;
use crate::receiver::Stored;
use crate::receiver::resume::Frontier;
use crate::replication::{Connection, Start, StatusUpdate};
use crate::repository::layout::Epoch;

/// Whose turn it is.
#[derive(Debug)]
pub enum Turn {
    Ours(Epoch),
    /// The writer of another slot.
    Theirs(WriterFile),
}

/// How often a waiting agent looks, and advances its own slot.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// A frontier that has stood still this long, while the server is ahead, has no writer any more.
const STILL: Duration = Duration::from_secs(60);

/// Keeps `held`, the epoch this process took before, while it is the highest; else takes the next one, where the
/// highest is not another slot's. START_REPLICATION was granted on our slot: no other agent streams from it.
pub async fn take_or_wait(
    world: &World,
    options: &ClusterOptions,
    archive: &Archive,
    held: Option<Epoch>,
) -> Result<Turn, Failure> {
    match archive.highest_writer().await? {
        Some(writer) if Some(writer.epoch) == held => Ok(Turn::Ours(writer.epoch)),
        Some(writer) if writer.slot != options.slot.as_str() => Ok(Turn::Theirs(writer)),
        _ => Ok(Turn::Ours(take(world, options, archive).await?)),
    }
}

async fn take(world: &World, options: &ClusterOptions, archive: &Archive) -> Result<Epoch, Failure> {
    let version = env!("CARGO_PKG_VERSION");
    let now = world.clock.now();
    Ok(archive.take_epoch(options.slot.as_str(), options.host.as_deref(), version, now).await?)
}

/// Waits while another slot's writer moves the frontier; advances our slot to what is proven in the repository,
/// so that it holds nothing back. Returns after taking over (the caller connects anew), or when stopped.
pub async fn wait(
    world: &World,
    options: &ClusterOptions,
    archive: &Archive,
    mut connection: Connection,
    server: &Server,
    writer: WriterFile,
    stop: &CancellationToken,
) -> Result<(), Failure> {
    tracing::info!(
        cluster = options.name, epoch = %writer.epoch, slot = writer.slot, host = writer.host,
        "another agent writes this archive; waiting to take over"
    );
    connection.finish_stream().await?;
    let mut seen: Option<Stored> = None;
    let mut seen_at = Instant::now();
    loop {
        let identity = connection.identify_system().await?;
        let state = archive.frontier(identity.timeline, server.segment_size).await?;
        let frontier = startup::frontier_of(&state, server.segment_size);
        let stored = frontier.as_ref().map(Frontier::stored);
        if stored != seen {
            (seen, seen_at) = (stored, Instant::now());
        }
        let behind = stored.is_none_or(|stored| stored.record_end < identity.flush_lsn);
        if behind && seen_at.elapsed() >= STILL {
            let epoch = take(world, options, archive).await?;
            tracing::warn!(%epoch, "the other agent has stood still for {STILL:?} while the server is ahead: taking over");
            return Ok(());
        }
        if let Some(frontier) = frontier.filter(|frontier| frontier.stored().record_end <= identity.flush_lsn) {
            advance_slot(world, options, &mut connection, &frontier).await?;
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return Ok(()),
            () = tokio::time::sleep(LOOK_INTERVAL) => {}
        }
    }
}

/// Reports the repository's frontier on our own slot, without receiving anything.
async fn advance_slot(
    world: &World,
    options: &ClusterOptions,
    connection: &mut Connection,
    frontier: &Frontier,
) -> Result<(), Failure> {
    let flush = frontier.stored().record_end;
    if let Start::Streaming =
        connection.start_replication(&options.slot, frontier.segment_start, frontier.timeline).await?
    {
        let now = world.clock.postgres_micros();
        connection.queue_status(StatusUpdate { write: flush, flush, apply: flush, reply_requested: false, now });
        connection.flush_output().await?;
        connection.finish_stream().await?;
    }
    Ok(())
}
