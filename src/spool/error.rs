//! Owns: why a spool cannot be used, and what to do about it.
//! Does not own: what the agent does then.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::error::{Advice, Disposition, ExitCode};
use crate::wal::Lsn;

#[derive(Debug, thiserror::Error)]
pub enum SpoolError {
    #[error("could not {operation} {path}: {source}")]
    Io { operation: &'static str, path: PathBuf, source: io::Error },
    #[error("the spool {path} is in use by another process")]
    Locked { path: PathBuf },
    #[error("the spool is full: {used_bytes} of {limit_bytes} bytes are used")]
    Full { used_bytes: u64, limit_bytes: u64 },
    /// WAL that is not ours to use or to remove.
    #[error("the spool {path} holds WAL of {whose}")]
    Foreign { path: PathBuf, whose: String },
    #[error("{path} cannot be read: {cause}")]
    Marker { path: PathBuf, cause: String },
    #[error("the frame at {start} in {path} is not what was written there")]
    Damaged { path: PathBuf, start: Lsn },
}

impl SpoolError {
    pub fn io<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> SpoolError + use<'a> {
        move |source| SpoolError::Io { operation, path: path.to_owned(), source }
    }
}

impl Advice for SpoolError {
    fn hint(&self) -> Option<String> {
        let text = match self {
            SpoolError::Io { source, .. } => match source.kind() {
                ErrorKind::PermissionDenied => {
                    "give the user seawall runs as write permission to the spool's directory (mode 0700)"
                }
                ErrorKind::ReadOnlyFilesystem => "the spool's volume is read-only: remount it, or move `spool.path`",
                ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                    "free space on the spool's volume, or lower `spool.limit` to what it can hold"
                }
                ErrorKind::NotFound => "is the spool's volume mounted, and `spool.path` right?",
                _ => "is the spool's disk in order? See the kernel's log",
            },
            SpoolError::Locked { .. } => {
                "two agents cannot share a spool: is another `seawall run` still there? Give each its own `spool.path`"
            }
            SpoolError::Full { .. } => {
                "WAL stays on the server until the repository takes it again; `spool.limit` is shared by all clusters in equal parts"
            }
            SpoolError::Foreign { .. } => {
                "was the configuration changed, or a directory copied here? Bring the WAL where it belongs by running the agent with the configuration it was written under, or move the directory away"
            }
            SpoolError::Marker { .. } => {
                "it was damaged, or written by a newer version: move the directory away if its WAL is not needed"
            }
            SpoolError::Damaged { .. } => {
                "is the spool's disk in order? The WAL is received again as far as the server still has it"
            }
        };
        Some(text.to_string())
    }

    fn disposition(&self) -> Disposition {
        match self {
            SpoolError::Damaged { .. } => Disposition::Reconnect,
            _ => Disposition::Operator,
        }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            SpoolError::Io { source, .. }
                if matches!(source.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) =>
            {
                ExitCode::Permission
            }
            SpoolError::Foreign { .. } | SpoolError::Marker { .. } => ExitCode::Config,
            SpoolError::Locked { .. } => ExitCode::TryAgain,
            SpoolError::Damaged { .. } => ExitCode::Data,
            SpoolError::Io { .. } | SpoolError::Full { .. } => ExitCode::Unavailable,
        }
    }
}
