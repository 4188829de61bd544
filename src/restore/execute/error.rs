//! Owns: how carrying a restore out fails, and what an operator does about it.
//! Does not own: why a target cannot be reached (`restore/plan.rs`).

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use crate::catalog::CatalogError;
use crate::codec::decode::DecodeError;
use crate::error::{Advice, Disposition, ExitCode};
use crate::repository::layout::BackupId;
use crate::restore::marker::MarkerError;
use crate::wal::SystemId;

#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("{option} {value:?}: {fault}")]
    Usage { option: &'static str, value: String, fault: String },
    #[error("{path} is not empty: it holds {what}")]
    NotEmpty { path: PathBuf, what: String },
    #[error("{path} is the data directory of system {found}, and the backup is one of system {expected}")]
    Foreign { path: PathBuf, found: SystemId, expected: SystemId },
    #[error("a server is running in {path}: postmaster.pid names process {pid}")]
    Running { path: PathBuf, pid: i32 },
    #[error("another restore is at work in {path}")]
    Busy { path: PathBuf },
    #[error("tablespace {oid} belongs at {location}, which {fault}")]
    Tablespace { oid: u32, location: PathBuf, fault: String },
    #[error("files would belong to root, as whom PostgreSQL refuses to run: {parent} belongs to root")]
    RootOwner { parent: PathBuf },
    #[error("the restore needs {needed_bytes} bytes at {path}, and {free_bytes} are free there")]
    TooSmall { path: PathBuf, needed_bytes: u64, free_bytes: u64 },
    #[error("no space is left for {path}")]
    DiskFull { path: PathBuf },
    #[error("could not {operation} {path}: {source}")]
    Local { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("backup {backup} is incremental, and this seawall restores full ones only")]
    Incremental { backup: BackupId },
    #[error("no repository that can be read holds backup {backup}: {faults}")]
    NoCopy { backup: BackupId, faults: Faults },
    #[error("{what} of backup {backup} cannot be had from any repository: {faults}")]
    Unobtainable { backup: BackupId, what: String, faults: Faults },
    #[error("object {object} cannot be read: {source}")]
    Key { object: String, source: DecodeError },
    #[error("{what} is being deleted by `seawall expire`, which began before this restore")]
    Overtaken { what: String },
    #[error("the backup is not what it says: {fault}")]
    Inconsistent { fault: String },
    #[error(transparent)]
    Marker(#[from] MarkerError),
}

/// What each repository that was asked answered.
#[derive(Debug, Default)]
pub struct Faults(pub Vec<(String, CopyFault)>);

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("there is none to ask");
        }
        for (index, (repository, fault)) in self.0.iter().enumerate() {
            let comma = if index > 0 { "; " } else { "" };
            write!(f, "{comma}{repository}: {fault}")?;
        }
        Ok(())
    }
}

impl Faults {
    /// Somebody has it, and cannot be asked now.
    fn may_pass(&self) -> bool {
        self.0.iter().any(|(_, fault)| fault.may_pass())
    }
}

/// What is wrong with one repository's copy of an object: another repository may have a good one.
#[derive(Debug, thiserror::Error)]
pub enum CopyFault {
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error("object {object} is not there")]
    Missing { object: String },
    #[error("object {object} is damaged: {fault}")]
    Damaged { object: String, fault: String },
    #[error("object {object} cannot be read: {source}")]
    Key { object: String, source: DecodeError },
    #[error("it gave no answer within {seconds} s")]
    Silent { seconds: u64 },
    #[error("its copy of the backup is another one: {fault}")]
    Different { fault: String },
}

impl CopyFault {
    pub fn may_pass(&self) -> bool {
        match self {
            CopyFault::Catalog(CatalogError::Store(error)) => error.disposition() == Disposition::Retry,
            CopyFault::Silent { .. } => true,
            _ => false,
        }
    }
}

impl RestoreError {
    /// A failing call on a file of the restore.
    pub fn local(operation: &'static str, path: impl AsRef<Path>, source: io::Error) -> RestoreError {
        let path = path.as_ref().to_path_buf();
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => RestoreError::DiskFull { path },
            _ => RestoreError::Local { operation, path, source },
        }
    }
}

impl Advice for RestoreError {
    fn hint(&self) -> Option<String> {
        let text = match self {
            RestoreError::Marker(error) => return error.hint(),
            RestoreError::Usage { .. } => return None,
            RestoreError::NotEmpty { .. } => {
                "name an empty or new directory; or, if it may become the restored copy, add --delta: files that match are kept, all others replaced or removed"
            }
            RestoreError::Foreign { .. } => "is --pgdata right? A directory of another cluster is never restored into",
            RestoreError::Running { .. } => {
                "stop it first (`pg_ctl stop`), or restore into another directory; if that process is no server, remove postmaster.pid"
            }
            RestoreError::Busy { .. } => "wait for it, or end it; then run this again with --delta",
            RestoreError::Tablespace { oid, location, .. } => {
                return Some(format!(
                    "put it elsewhere: --tablespace {}=/an/empty/directory (tablespace {oid})",
                    location.display()
                ));
            }
            RestoreError::RootOwner { .. } => "say whose they are: --owner postgres",
            RestoreError::TooSmall { .. } => "free space there, or restore to a larger volume",
            RestoreError::DiskFull { .. } => {
                "free space there; then the same command with --delta goes on with what is there. Until it ends well, no server can be started on it"
            }
            RestoreError::Local { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => {
                "run it as root, or as the user who is to own the data directory"
            }
            RestoreError::Local { .. } => "is the disk in order? Then the same command with --delta goes on",
            RestoreError::Incremental { .. } => "restore a full one: `seawall list`",
            RestoreError::NoCopy { .. } => "`seawall list` shows the backups of each repository",
            RestoreError::Unobtainable { faults, .. } if faults.may_pass() => {
                "bring the repository back; then the same command with --delta goes on. Until it ends well, no server can be started on it"
            }
            RestoreError::Unobtainable { .. } => {
                "restore an earlier backup: `seawall list`; keep the damaged objects for inspection. No server can be started on what is there"
            }
            RestoreError::Key { .. } => {
                "set `identity_file` of the cluster to a file that holds the AGE-SECRET-KEY-1… of one of the recipients it was encrypted to"
            }
            RestoreError::Overtaken { .. } => {
                "try again: what can be restored is found out anew; `seawall window` shows it"
            }
            RestoreError::Inconsistent { .. } => {
                "restore another backup: `seawall list`; was this one changed by something other than seawall?"
            }
        };
        Some(text.to_string())
    }

    fn disposition(&self) -> Disposition {
        match self {
            RestoreError::Unobtainable { faults, .. } | RestoreError::NoCopy { faults, .. } if faults.may_pass() => {
                Disposition::Retry
            }
            RestoreError::Overtaken { .. } => Disposition::Retry,
            _ => Disposition::Operator,
        }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            RestoreError::Marker(error) => error.exit_code(),
            RestoreError::Usage { .. }
            | RestoreError::NotEmpty { .. }
            | RestoreError::Tablespace { .. }
            | RestoreError::RootOwner { .. } => ExitCode::Usage,
            RestoreError::Running { .. } | RestoreError::Busy { .. } | RestoreError::Overtaken { .. } => {
                ExitCode::TryAgain
            }
            RestoreError::TooSmall { .. } | RestoreError::DiskFull { .. } => ExitCode::Unavailable,
            RestoreError::Local { source, .. } => match source.kind() {
                io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => ExitCode::Permission,
                _ => ExitCode::Unavailable,
            },
            RestoreError::Unobtainable { faults, .. } | RestoreError::NoCopy { faults, .. } if faults.may_pass() => {
                ExitCode::Unavailable
            }
            RestoreError::Key { .. } | RestoreError::Incremental { .. } => ExitCode::Config,
            RestoreError::Foreign { .. }
            | RestoreError::NoCopy { .. }
            | RestoreError::Unobtainable { .. }
            | RestoreError::Inconsistent { .. } => ExitCode::Data,
        }
    }
}
