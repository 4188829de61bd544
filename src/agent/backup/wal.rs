//! Owns: knowing that the WAL a backup needs is in a repository, whole: looked up there, again and again, until it is or
//! until it cannot be any more.
//! Does not own: storing WAL (`archiver`), which backups are worth anything without it (none).

use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;

use super::Place;
use crate::agent::cluster::Status;
use crate::catalog::{CatalogError, Damages, Expired, FactKind, Piece};
use crate::continuity;
use crate::error::{Disposition, ExitCode, Failure};
use crate::wal::{Lsn, SegmentSize, TimelineId};

/// Between two looks, at first and later: the end of a backup ends a segment, which the agent stores at once.
const LOOK_INTERVAL_MIN: Duration = Duration::from_millis(100);
const LOOK_INTERVAL_MAX: Duration = Duration::from_secs(2);
/// An archive whose end has not moved for this long, although the server has written more, does not move.
const STALL: Duration = Duration::from_secs(300);

/// WAL of a timeline, to have without a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needed {
    pub timeline: TimelineId,
    pub start: Lsn,
    pub stop: Lsn,
    pub segment_size: SegmentSize,
}

/// What is there of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Held {
    /// With the time of the last commit known in it.
    All(Option<Timestamp>),
    /// From its beginning up to here, zero for nothing; more may come.
    UpTo(Lsn),
    /// It begins behind this, or is interrupted there, and goes on after it.
    Hole(Lsn),
}

/// Waits until `place` holds all of it; then: the time of the last commit known in it. What the agent publishes (`status`)
/// makes that quicker and is not relied upon.
pub async fn wait(
    place: &Place,
    needed: Needed,
    mut status: Option<watch::Receiver<Status>>,
) -> Result<Option<Timestamp>, Failure> {
    let mut reached = (Lsn::ZERO, Instant::now());
    let (mut is_first, mut is_interrupted, mut pause) = (true, false, LOOK_INTERVAL_MIN);
    loop {
        match held(place, needed).await {
            Ok(Held::All(last_commit)) => return Ok(last_commit),
            // A repository that was away for a while has one until it is repaired.
            Ok(held @ (Held::Hole(end) | Held::UpTo(end))) => {
                is_interrupted = matches!(held, Held::Hole(_));
                if end > reached.0 {
                    reached = (end, Instant::now());
                }
            }
            Err(error) if is_first => tracing::info!(repository = place.name, %error, "cannot look for the WAL yet"),
            Err(error) => tracing::debug!(repository = place.name, %error, "cannot look for the WAL"),
        }
        is_first = false;
        if reached.1.elapsed() >= STALL {
            return Err(match is_interrupted {
                true => hole(place, needed, reached.0),
                false => stalled(place, needed, reached.0),
            });
        }
        let is_there = async {
            match &mut status {
                Some(status) => told(status, place.index, needed.stop).await,
                None => std::future::pending().await,
            }
        };
        let interval = pause;
        pause = (pause * 2).min(LOOK_INTERVAL_MAX);
        if tokio::time::timeout(interval, is_there).await.is_ok() {
            // It says so of its own stream; what is there is looked up.
            status = None;
        }
    }
}

/// Whether `place` holds all of it now.
pub async fn holds(place: &Place, needed: Needed) -> Result<bool, Failure> {
    Ok(matches!(held(place, needed).await?, Held::All(_)))
}

/// Until the agent says that the repository's end has passed `stop`.
async fn told(status: &mut watch::Receiver<Status>, repository: usize, stop: Lsn) {
    loop {
        let watched = status.borrow_and_update().watched.clone();
        let frontier = |watched: &crate::agent::session::Watched| watched.repositories.get(repository)?.frontier();
        let Some(watched) = watched else {
            if status.changed().await.is_err() {
                return std::future::pending().await;
            }
            continue;
        };
        let mut progress = watched.progress.subscribe();
        loop {
            progress.borrow_and_update();
            if frontier(&watched).is_some_and(|stored| stored.record_end >= stop) {
                return;
            }
            tokio::select! {
                changed = progress.changed() => if changed.is_err() { break },
                changed = status.changed() => match changed {
                    Ok(()) => break,
                    Err(_) => return std::future::pending().await,
                },
            }
        }
    }
}

/// Reads only the directories it can be in.
async fn held(place: &Place, needed: Needed) -> Result<Held, CatalogError> {
    let (archive, size) = (&place.archive, needed.segment_size);
    let facts = archive.ledger().await?;
    let expired = Expired::of(facts.iter().filter(|fact| fact.kind == FactKind::Expired));
    let damages = Damages::of(&facts);
    let (_, directories) = archive.wal_listing().await?;
    let high = |lsn: Lsn| u32::try_from(lsn.0 >> 32).unwrap_or(u32::MAX);
    let range = high(needed.start)..=high(needed.stop);
    let mut pieces: Vec<Piece> = Vec::new();
    for directory in directories {
        if directory.timeline == needed.timeline && range.contains(&directory.high) {
            let mut contents = archive.directory(directory, size).await?;
            contents.subtract(&expired);
            contents.mark(&damages);
            pieces.extend(contents.pieces());
        }
    }
    Ok(judge(needed, pieces))
}

/// Replay begins with the first page of a segment, wherever in it the backup starts.
fn judge(needed: Needed, pieces: Vec<Piece>) -> Held {
    let begin = needed.segment_size.floor(needed.start);
    // Of a piece that reaches beyond, the last commit may lie beyond too.
    let inside = pieces.iter().filter(|piece| begin <= piece.from && piece.to <= needed.stop);
    let last_commit = inside.filter_map(|piece| piece.last_commit).max();
    let runs = continuity::runs(needed.timeline, pieces);
    let first = runs.iter().find(|run| run.from <= begin && begin < run.to);
    let beyond = runs.iter().any(|run| run.from > first.map_or(begin, |run| run.to) && run.to >= needed.stop);
    match first {
        Some(run) if run.to >= needed.stop => Held::All(last_commit),
        _ if beyond => Held::Hole(first.map_or(begin, |run| run.to)),
        Some(run) => Held::UpTo(run.to),
        None => Held::UpTo(Lsn::ZERO),
    }
}

fn hole(place: &Place, needed: Needed, at: Lsn) -> Failure {
    let Needed { timeline, start, stop, .. } = needed;
    let message = format!(
        "the backup needs WAL {start} to {stop} of timeline {timeline}, and {place} lacks some of it at {at}, although it goes on behind that"
    );
    Failure::new(ExitCode::Unavailable, message)
        .disposition(Disposition::Retry)
        .hint("the archive has a gap there (`seawall gaps`), or the copied server was behind the archive's start: the next backup begins after it")
}

fn stalled(place: &Place, needed: Needed, end: Lsn) -> Failure {
    let stop = needed.stop;
    let message = match end {
        Lsn::ZERO => format!("no WAL from {} on has come to {place} for {STALL:?}", needed.start),
        end => format!("WAL has come to {place} up to {end} only, {stop} is needed, and nothing more for {STALL:?}"),
    };
    Failure::new(ExitCode::Unavailable, message)
        .disposition(Disposition::Retry)
        .hint("is `seawall run` streaming from this server, and does the repository take WAL? See `seawall status`")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::Source;
    use crate::wal::Proof;

    const MIB: u64 = 1 << 20;

    fn piece(from: u64, to: u64) -> Piece {
        let source = Source::Sealed("000000010000000000000001".parse().expect("a name"));
        Piece { from: Lsn(from * MIB), to: Lsn(to * MIB), proof: Proof::Proven, last_commit: None, source }
    }

    #[test]
    fn all_of_it_from_the_first_page_on_without_a_hole() {
        let segment_size = SegmentSize::new(16 * MIB).expect("a size");
        let needed = Needed { timeline: TimelineId(1), start: Lsn(20 * MIB), stop: Lsn(40 * MIB), segment_size };
        let judge = |pieces: &[(u64, u64)]| judge(needed, pieces.iter().map(|(from, to)| piece(*from, *to)).collect());
        assert_eq!(judge(&[(16, 32), (32, 40)]), Held::All(None));
        assert_eq!(judge(&[(0, 64)]), Held::All(None));
        assert_eq!(judge(&[(16, 32), (32, 39)]), Held::UpTo(Lsn(39 * MIB)));
        assert_eq!(judge(&[]), Held::UpTo(Lsn::ZERO));
        assert_eq!(judge(&[(0, 16)]), Held::UpTo(Lsn::ZERO));
        assert_eq!(judge(&[(16, 32), (33, 48)]), Held::Hole(Lsn(32 * MIB)));
        assert_eq!(judge(&[(32, 48)]), Held::Hole(Lsn(16 * MIB)));
    }
}
