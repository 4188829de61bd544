//! Owns: that a backup of a standby begins with WAL the archive holds. It starts at the standby's last restartpoint, and on
//! an idle primary that may lie before the archive's start for ever: then the primary is made to write a checkpoint.
//! Does not own: taking the backup (`backup`), what is looked up in the end in any case (`wal.rs`).

use std::time::Duration;

use tokio::time::Instant;

use crate::backup::BackupError;
use crate::error::{Disposition, ExitCode, Failure};
use crate::postgres::sql;
use crate::replication::base_backup::{BackupDecoder, BackupEvent, BaseBackupOptions, Checkpoint};
use crate::replication::{BackupWord, Connection, Dial, Login};
use crate::wal::Lsn;

/// For the primary's checkpoint, however much it has to write.
const CHECKPOINT_MAX: Duration = Duration::from_secs(3600);
/// For the standby to replay it. One that is delayed, or paused, is not waited for.
const REPLAY_MAX: Duration = Duration::from_secs(300);
const LOOK_INTERVAL: Duration = Duration::from_millis(500);

/// Where the server's last checkpoint, or restartpoint, lets replay begin.
pub async fn redo(dialer: &dyn Dial, login: &Login) -> Result<Option<Lsn>, Failure> {
    lsn(dialer, login, "SELECT redo_lsn FROM pg_catalog.pg_control_checkpoint()").await
}

/// Has the primary make a checkpoint, and waits until the standby has replayed it: what a backup of the standby begins
/// with lies behind it.
pub async fn follow_checkpoint(dialer: &dyn Dial, primary: &Login, standby: &Login) -> Result<(), Failure> {
    checkpoint(dialer, primary).await.map_err(|failure| failure.context("have the primary make a checkpoint"))?;
    let mut connection = Connection::open(dialer, primary).await?;
    let identity = connection.identify_system().await;
    connection.close().await;
    let target = identity?.flush_lsn;
    let began = Instant::now();
    loop {
        // Not in recovery: it has what it has.
        let replayed = lsn(dialer, standby, "SELECT pg_catalog.pg_last_wal_replay_lsn()").await?;
        if replayed.is_none_or(|replayed| replayed >= target) {
            return Ok(());
        }
        if began.elapsed() >= REPLAY_MAX {
            let at = replayed.unwrap_or_default();
            let message = format!("the standby has replayed {at} and did not come to {target} within {REPLAY_MAX:?}");
            return Err(Failure::new(ExitCode::Unavailable, message)
                .disposition(Disposition::Retry)
                .hint("does it stream from the primary, without recovery_min_apply_delay, and is replay not paused?"));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// A base backup begins with a checkpoint, and needs no right but the one backups need anyway: it is asked for, and left
/// as soon as it has begun.
async fn checkpoint(dialer: &dyn Dial, primary: &Login) -> Result<(), Failure> {
    let mut connection = Connection::open(dialer, primary).await?;
    let major = connection.server_major();
    let asked = BaseBackupOptions {
        label: "seawall: for its checkpoint only".to_string(),
        checkpoint: Checkpoint::Fast,
        max_rate_kib: None,
        manifest_checksums: "NONE",
        compression: None,
    };
    let command = asked.command(major).map_err(BackupError::from)?;
    connection.start_base_backup(&command).await?;
    let mut decoder = BackupDecoder::new(major, None);
    let begun = async {
        loop {
            match connection.next_of_base_backup(&mut decoder)? {
                Some(BackupWord::Event(BackupEvent::Start(_))) => return Ok::<_, Failure>(()),
                Some(_) => {}
                None => connection.fill_base_backup().await?,
            }
        }
    };
    match tokio::time::timeout(CHECKPOINT_MAX, begun).await {
        Ok(begun) => begun,
        Err(_) => {
            let message = format!("the primary made no checkpoint within {CHECKPOINT_MAX:?}");
            Err(Failure::new(ExitCode::Unavailable, message).disposition(Disposition::Retry))
        }
    }
}

async fn lsn(dialer: &dyn Dial, login: &Login, query: &str) -> Result<Option<Lsn>, Failure> {
    Ok(sql::ask(dialer, login, query).await?.text(0, 0).and_then(|lsn| lsn.parse().ok()))
}
