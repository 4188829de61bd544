//! Owns: the first and the last objects of a backup in one repository: `begin.json`, `backup.json`, and what must be true in
//! between.
//! Does not own: volumes (`store`), the lease and the WAL themselves (`agent`, through [`Surroundings`]).

use std::time::Duration;

use futures_util::future::join_all;
use jiff::{Timestamp, ToSpan};
use tokio::time::timeout;

use super::store::Patience;
use super::{BackupError, Destination, NeededWal, Surroundings};
use crate::catalog::backup::{BackupFile, BeginFile};
use crate::repository::layout::{BackupId, BackupType};

/// For a listing nobody depends on.
const ASKING_MAX: Duration = Duration::from_secs(30);

/// An id that no destination has; one that cannot be asked drops out next, when it cannot be written either.
pub async fn free_id(destinations: &[Destination], now: Timestamp) -> BackupId {
    let asking = destinations.iter().map(|destination| timeout(ASKING_MAX, destination.archive.backup_ids()));
    let taken: Vec<BackupId> = join_all(asking).await.into_iter().flatten().flatten().flatten().collect();
    let mut id = BackupId::new(now, BackupType::Full);
    while taken.contains(&id) {
        let next = id.started().checked_add(1.second()).expect("the year is not 9999");
        id = BackupId::new(next, BackupType::Full);
    }
    id
}

/// Creates `begin.json`.
pub async fn begin(destination: &Destination, file: &BeginFile, patience: &Patience) -> Result<(), BackupError> {
    let archive = &destination.archive;
    let is_ours = patience.retry(async || Ok(archive.begin_backup(file).await?)).await?;
    // Taken: by our own first attempt, if its answer was lost.
    if is_ours || patience.retry(async || Ok(archive.backup_record(file.id).await?)).await?.begin.as_ref() == Some(file)
    {
        return Ok(());
    }
    Err(BackupError::IdTaken { id: file.id })
}

/// Waits until the backup's WAL is there.
pub async fn wait_for_wal(
    destination: &Destination,
    surroundings: &dyn Surroundings,
    needed: NeededWal,
    patience: &Patience,
) -> Result<Option<Timestamp>, BackupError> {
    tokio::select! {
        biased;
        () = patience.stop.cancelled() => Err(BackupError::Stopped),
        stored = surroundings.wal_is_stored(&destination.name, needed) => match stored {
            Ok(stored) => Ok(stored.last_commit),
            Err(failure) => Err(BackupError::Wal(failure)),
        },
    }
}

/// Creates `backup.json`, if nobody has declared the backup dead, or taken the lease.
///
/// The expiring side puts `dead.json` first and looks for `backup.json` then; this side looks the other way round. So at
/// least one of the two sees the other, and volumes are deleted only by one that did not. Where this side was paused so
/// long that even `dead.json` is gone again, `begin.json` is gone too, which went first.
pub async fn commit(
    destination: &Destination,
    surroundings: &dyn Surroundings,
    file: &BackupFile,
    patience: &Patience,
) -> Result<(), BackupError> {
    let archive = &destination.archive;
    let is_dead = || async { Ok(!archive.is_kept(file.id).await?) };
    let dead = BackupError::Dead { id: file.id };
    if patience.retry(is_dead).await? {
        return Err(dead);
    }
    surroundings.lease_holds(&destination.name).await.map_err(BackupError::Lease)?;
    if patience.stop.is_cancelled() {
        return Err(BackupError::Stopped);
    }
    let is_ours = patience.retry(async || Ok(archive.commit_backup(file).await?)).await?;
    if !is_ours {
        let found = patience.retry(async || Ok(archive.backup_record(file.id).await?)).await?;
        if found.backup.as_ref() != Some(file) {
            return Err(BackupError::IdTaken { id: file.id });
        }
    }
    if patience.retry(is_dead).await? { Err(dead) } else { Ok(()) }
}
