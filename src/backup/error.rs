//! Owns: why there is no backup, what that means, what to do about it.
//! Does not own: what is recorded and tried again (`agent`).

use std::sync::Arc;
use std::time::Duration;

use crate::catalog::CatalogError;
use crate::catalog::manifest::ManifestError;
use crate::codec::tar::TarError;
use crate::error::{Advice, Disposition, ExitCode, Failure};
use crate::replication::ReplicationError;
use crate::replication::base_backup::OptionsError;
use crate::repository::StoreError;
use crate::repository::layout::BackupId;
use crate::wal::{Lsn, SystemId, TimelineId};

/// Why a repository has no backup.
#[derive(Clone, Debug, thiserror::Error)]
pub enum BackupError {
    #[error("the backup was stopped before it was complete")]
    Stopped,
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The connection broke, or the server refused.
    #[error("could not take a base backup: {0}")]
    Source(ReplicationError),
    /// `XX001`: said last, after everything else looked well.
    #[error("the server found damaged pages while it sent the backup: {}", .pages)]
    DamagedPages { pages: String },
    #[error("the standby was promoted while the backup was taken from it")]
    Promoted,
    #[error("the server sent nothing for {0:?} in the middle of the backup")]
    Silent(Duration),
    #[error("the server is system {found}; the archive in repository {repository} belongs to {expected}")]
    OtherSystem { repository: String, found: SystemId, expected: SystemId },
    #[error("the backup began on timeline {start} and ended on timeline {stop}")]
    TimelineChanged { start: TimelineId, stop: TimelineId },
    #[error("the backup starts at {start}, before {held}, from where on the slot holds WAL")]
    BeforeSlot { start: Lsn, held: Lsn },
    /// What the server sent is not what its own manifest, or its own words, say.
    #[error("what the server sent does not fit together: {0}")]
    Mismatch(String),
    #[error("the tar of {stream}: {error}")]
    Tar { stream: String, error: TarError },
    #[error("what the server compressed cannot be decompressed: {0}")]
    Decompress(String),
    #[error("the backup manifest: {0}")]
    Manifest(#[from] ManifestError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{error}; no call succeeded for {after:?}")]
    StoreGivenUp { error: StoreError, after: Duration },
    #[error(transparent)]
    Catalog(Arc<CatalogError>),
    #[error("backup {id} is there already")]
    IdTaken { id: BackupId },
    #[error("backup {id} was declared dead by somebody who expires: its objects are being deleted")]
    Dead { id: BackupId },
    /// The WAL it needs did not arrive.
    #[error("{}", .0.message)]
    Wal(Failure),
    #[error("{}", .0.message)]
    Lease(Failure),
    #[error("the name of configuration file {name:?} cannot be stored")]
    ConfigName { name: String },
}

impl From<CatalogError> for BackupError {
    fn from(error: CatalogError) -> BackupError {
        match error {
            CatalogError::Store(error) => BackupError::Store(error),
            other => BackupError::Catalog(Arc::new(other)),
        }
    }
}

impl BackupError {
    /// What the server's word on a failed backup means, told by SQLSTATE.
    pub(super) fn of_source(error: ReplicationError, pages: &[String]) -> BackupError {
        match error.sqlstate() {
            Some("XX001") if pages.is_empty() => BackupError::DamagedPages { pages: error.to_string() },
            Some("XX001") => BackupError::DamagedPages { pages: pages.join("; ") },
            _ => BackupError::Source(error),
        }
    }
}

impl Advice for BackupError {
    fn hint(&self) -> Option<String> {
        let text = match self {
            BackupError::Stopped => return None,
            BackupError::Options(_) => "change the backup's settings",
            BackupError::Source(error) => return source_hint(error),
            BackupError::DamagedPages { .. } => {
                "the server's disk has damaged those pages: look at the tables named, with pg_amcheck, and at the last good backup; \
                 this copy was not kept"
            }
            BackupError::Promoted => "the next one is taken from a standby that is one, or from the primary",
            BackupError::Silent(_) => "is the server's disk stuck, or something on the network dropping packets?",
            BackupError::OtherSystem { .. } => "does `postgres` (or `backup.from`) name a server of another cluster?",
            BackupError::TimelineChanged { .. } => "a server was promoted meanwhile; take the backup again",
            BackupError::BeforeSlot { .. } => "take the backup again; was the slot just recreated?",
            BackupError::Mismatch(_)
            | BackupError::Tar { .. }
            | BackupError::Manifest(_)
            | BackupError::Decompress(_) => {
                "take the backup again; if it happens again, is there something between this machine and the server, \
                 or is it a version seawall does not know?"
            }
            BackupError::Store(error) | BackupError::StoreGivenUp { error, .. } => return error.hint(),
            BackupError::Catalog(error) => return error.hint(),
            BackupError::IdTaken { .. } => "does another seawall take backups here? Try again",
            BackupError::Dead { .. } => "was this backup abandoned for so long that it was expired? Take another one",
            BackupError::Wal(failure) | BackupError::Lease(failure) => return failure.hint.clone(),
            BackupError::ConfigName { .. } => "names below config/ are relative paths without `.` and `..`",
        };
        Some(text.to_string())
    }

    fn disposition(&self) -> Disposition {
        match self {
            BackupError::Source(error) => error.disposition(),
            BackupError::Store(error) | BackupError::StoreGivenUp { error, .. } => error.disposition(),
            BackupError::Catalog(error) => error.disposition(),
            BackupError::Wal(failure) | BackupError::Lease(failure) => failure.disposition,
            BackupError::Options(_)
            | BackupError::DamagedPages { .. }
            | BackupError::OtherSystem { .. }
            | BackupError::ConfigName { .. } => Disposition::Operator,
            _ => Disposition::Retry,
        }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            BackupError::Stopped | BackupError::Silent(_) => ExitCode::Unavailable,
            BackupError::Options(_) | BackupError::ConfigName { .. } | BackupError::OtherSystem { .. } => {
                ExitCode::Config
            }
            BackupError::Source(error) => source_exit_code(error),
            BackupError::DamagedPages { .. }
            | BackupError::Mismatch(_)
            | BackupError::Tar { .. }
            | BackupError::Decompress(_)
            | BackupError::Manifest(_) => ExitCode::Data,
            BackupError::Promoted
            | BackupError::TimelineChanged { .. }
            | BackupError::BeforeSlot { .. }
            | BackupError::IdTaken { .. }
            | BackupError::Dead { .. } => ExitCode::TryAgain,
            BackupError::Store(error) | BackupError::StoreGivenUp { error, .. } => error.exit_code(),
            BackupError::Catalog(error) => error.exit_code(),
            BackupError::Wal(failure) | BackupError::Lease(failure) => failure.exit_code,
        }
    }
}

/// During a backup some states mean something else than to a stream.
fn source_hint(error: &ReplicationError) -> Option<String> {
    let text = match error.sqlstate() {
        // Its own words say which; so does its own hint, if it has one.
        Some("55000") => {
            return server_hint(error).or_else(|| {
                let text = "the server has to be a primary, or a standby in recovery, with wal_level replica or higher";
                Some(text.to_string())
            });
        }
        Some("42601" | "22023") => "can this build of the server compress what it sends? Leave `compression` out",
        Some(state) if state.starts_with("58") || state.starts_with("XX") => {
            return server_hint(error).or_else(|| Some("see the server's log: it could not read its own files".into()));
        }
        _ => return error.hint(),
    };
    Some(text.to_string())
}

fn server_hint(error: &ReplicationError) -> Option<String> {
    match error {
        ReplicationError::Server(error) => error.hint.clone(),
        _ => None,
    }
}

fn source_exit_code(error: &ReplicationError) -> ExitCode {
    match error.sqlstate() {
        // A file the server could not open is no gap in the archive.
        Some(state) if state.starts_with("58") => ExitCode::Unavailable,
        _ => error.exit_code(),
    }
}
