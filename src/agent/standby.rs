//! Owns: whose turn it is to write, when several agents could: the one slot's lock decides between agents on
//! one slot, a frontier that stands still between agents on two.
//! Does not own: fencing during writing (`archiver/writer.rs`).

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::opening::Opening;
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
    Ours {
        epoch: Epoch,
        /// The repositories in which it was taken only now.
        newcomers: Vec<usize>,
    },
    /// The writer of another slot, in the repository that tells of it.
    Theirs { writer: WriterFile, archive: Archive },
}

/// How often a waiting agent looks, and advances its own slot.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// A frontier that has stood still this long, while the server is ahead, has no writer any more.
const STILL: Duration = Duration::from_secs(60);

/// How often another may be faster.
const TAKE_ATTEMPTS: u32 = 16;

/// Keeps `held`, the epoch this process took before, while it is the highest; else takes the next one, where the
/// highest is not another slot's. START_REPLICATION was granted on our slot: no other agent streams from it.
///
/// One number in all repositories: the highest of any of them decides. Not below `seen`, the highest that objects carry
/// in their names: one that was emptied has lost its writers, and may have been written to afterwards by one who did not
/// know. Tails of a lower epoch would not count beside those.
pub async fn take_or_wait(
    world: &World,
    options: &ClusterOptions,
    opening: &mut Opening,
    held: Option<Epoch>,
    seen: Epoch,
) -> Result<Turn, Failure> {
    let writers = opening.in_each(|opened| async move { Ok(opened.archive.highest_writer().await?) }).await?;
    // The same number may be another's, taken where we were not.
    let is_ours = |writer: &WriterFile| {
        Some(writer.epoch) == held && writer.slot == options.slot.as_str() && writer.host == options.host
    };
    let numbered = || writers.iter().enumerate().filter_map(|(at, writer)| Some((at, writer.as_ref()?)));
    let highest = numbered().max_by_key(|(_, writer)| (writer.epoch, !is_ours(writer)));
    match highest {
        Some((_, writer)) if is_ours(writer) && writer.epoch >= seen => {
            let epoch = writer.epoch;
            let lacks =
                opening.present.iter().zip(&writers).filter(|(_, writer)| !writer.as_ref().is_some_and(is_ours));
            let newcomers: Vec<usize> = lacks.map(|(opened, _)| opened.index).collect();
            match newcomers.is_empty() || claim(world, options, opening, epoch, &newcomers).await? {
                true => Ok(Turn::Ours { epoch, newcomers }),
                // Somebody came between: the next look tells who.
                false => Err(opening.present[0].archive.epoch_contended(1).into()),
            }
        }
        Some((at, writer)) if writer.slot != options.slot.as_str() => {
            Ok(Turn::Theirs { writer: writer.clone(), archive: opening.present[at].archive.clone() })
        }
        _ => {
            let epoch = take(world, options, opening, held.unwrap_or_default().max(seen)).await?;
            Ok(Turn::Ours { epoch, newcomers: opening.present.iter().map(|opened| opened.index).collect() })
        }
    }
}

/// Takes the number after the highest, and after `above`, in every repository.
async fn take(world: &World, options: &ClusterOptions, opening: &mut Opening, above: Epoch) -> Result<Epoch, Failure> {
    for _ in 0..TAKE_ATTEMPTS {
        let highest = opening.in_each(|opened| async move { Ok(opened.archive.highest_epoch().await?) }).await?;
        let highest = highest.into_iter().flatten().fold(above, Epoch::max);
        let Some(next) = highest.0.checked_add(1).map(Epoch) else { break };
        let all: Vec<usize> = opening.present.iter().map(|opened| opened.index).collect();
        if claim(world, options, opening, next, &all).await? {
            return Ok(next);
        }
    }
    Err(opening.present[0].archive.epoch_contended(TAKE_ATTEMPTS).into())
}

/// Takes `epoch` in the named repositories, in the order of their ids, so that of two who try the first decides. False
/// when another has it in one of them.
async fn claim(
    world: &World,
    options: &ClusterOptions,
    opening: &mut Opening,
    epoch: Epoch,
    wanted: &[usize],
) -> Result<bool, Failure> {
    let (version, now) = (env!("CARGO_PKG_VERSION"), world.clock.now());
    let mut order = opening.present.clone();
    order.sort_by(|a, b| (&a.id, a.index).cmp(&(&b.id, b.index)));
    for opened in order.iter().filter(|opened| wanted.contains(&opened.index)) {
        let (slot, host) = (options.slot.as_str(), options.host.as_deref());
        match opened.archive.claim_epoch(epoch, slot, host, version, now).await {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(error) => opening.leave_out(opened.index, error.into())?,
        }
    }
    Ok(true)
}

/// Waits while another slot's writer moves the frontier; advances our slot to what is proven in the repository,
/// so that it holds nothing back. Returns after taking over (the caller connects anew), or when stopped.
pub async fn wait(
    world: &World,
    options: &ClusterOptions,
    opening: &mut Opening,
    archive: &Archive,
    (mut connection, server): (Connection, &Server),
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
            let epoch = take(world, options, opening, Epoch::default()).await?;
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
