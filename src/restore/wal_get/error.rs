//! Owns: how `wal-get` fails, why a name is absent, and what an operator does about either.
//! Does not own: which of them an answer is (`wal_get.rs`).

use std::fmt;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::catalog::CatalogError;
use crate::codec::decode::DecodeError;
use crate::error::{Advice, Disposition, ExitCode};
use crate::repository::{StoreError, StoreErrorKind};
use crate::wal::{SegmentName, TimelineId};

/// Why a name is not in the archive, as the store has shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Absence {
    #[error("the archive's WAL ends before it")]
    AboveLast,
    #[error("the archive's WAL begins after it")]
    BelowFirst,
    #[error("the restore's path leaves this timeline before it")]
    BeyondFork,
    #[error("its timeline begins after it")]
    BeforeTimeline,
    #[error("its timeline is not on the restore's path")]
    NotOnPath,
    #[error("it lies after the end of the restore's plan")]
    AfterPlan,
    #[error("there is no such history file")]
    NoHistory,
    #[error("seawall archives no files of this kind")]
    NotArchived,
}

#[derive(Debug, thiserror::Error)]
pub enum WalGetError {
    #[error("{name:?} is not a name PostgreSQL asks for: expected a WAL segment, a history or a backup file")]
    Usage { name: String },
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("{location} holds no repository of seawall's")]
    NoRepository { location: String },
    #[error("it did not answer within {within:?}")]
    Slow { within: Duration },
    #[error("{what}, and not every repository answered: {silent}")]
    Unanswered { what: String, fault: Option<Box<WalGetError>>, silent: Silences },
    #[error("segment {name} is a hole in the archive: {fault}")]
    Hole { name: SegmentName, fault: String },
    #[error("segment {name} cannot be told: index entries disagree on its content")]
    Disputed { name: SegmentName },
    #[error("segment {name} cannot be told: repositories {one} and {other} hold different bytes of it")]
    Contradicted { name: SegmentName, one: String, other: String },
    #[error("object {object} contradicts others: its bytes differ from another tail's")]
    Contradicts { object: String },
    #[error("object {object} is damaged: {fault}")]
    Damaged { object: String, fault: String },
    #[error("object {object} cannot be read: {source}")]
    Key { object: String, source: DecodeError },
    #[error("object {object} vanished while it was read")]
    Vanished { object: String },
    #[error("the history of timeline {timeline} is not in the archive: which WAL leads to it is unknown")]
    HistoryMissing { timeline: TimelineId },
    #[error("the history of timeline {timeline} is not the same in repositories {one} and {other}")]
    HistoryDisputed { timeline: TimelineId, one: String, other: String },
    #[error("WAL segments are {one_bytes} bytes in repository {one} and {other_bytes} in {other}")]
    SegmentSizeDisputed { one: String, one_bytes: u64, other: String, other_bytes: u64 },
    #[error("could not write {path}: {source}")]
    Destination { path: PathBuf, source: io::Error },
}

/// A repository that did not say what it holds, and why.
#[derive(Debug)]
pub struct Silence {
    pub repository: String,
    pub error: WalGetError,
}

/// At least one.
#[derive(Debug)]
pub struct Silences(pub Vec<Silence>);

impl fmt::Display for Silences {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, Silence { repository, error }) in self.0.iter().enumerate() {
            let comma = if index > 0 { "; " } else { "" };
            write!(f, "{comma}{repository}: {error}")?;
        }
        Ok(())
    }
}

impl WalGetError {
    /// The store may answer in a moment.
    pub(super) fn is_transient(&self) -> bool {
        match self {
            WalGetError::Store(error) | WalGetError::Catalog(CatalogError::Store(error)) => {
                error.is(StoreErrorKind::Unavailable)
            }
            WalGetError::Catalog(CatalogError::Unsteady { .. }) | WalGetError::Slow { .. } => true,
            WalGetError::Unanswered { silent, .. } => silent.0.iter().any(|silence| silence.error.is_transient()),
            _ => false,
        }
    }

    /// A writer at work can look like this: look again before concluding anything.
    pub(super) fn may_be_in_motion(&self) -> bool {
        match self {
            WalGetError::Vanished { .. } | WalGetError::Hole { .. } => true,
            WalGetError::Catalog(CatalogError::Store(error)) => error.is(StoreErrorKind::NotFound),
            WalGetError::Unanswered { fault, silent, .. } => {
                fault.as_ref().is_some_and(|fault| fault.may_be_in_motion())
                    || silent.0.iter().any(|silence| silence.error.may_be_in_motion())
            }
            _ => false,
        }
    }

    /// Whether it says nothing about what the repository holds: another one may know.
    pub(super) fn is_silence(&self) -> bool {
        match self {
            WalGetError::Store(_) | WalGetError::Slow { .. } | WalGetError::NoRepository { .. } => true,
            WalGetError::Catalog(error) => !matches!(
                error,
                CatalogError::Damaged { .. } | CatalogError::TooLarge { .. } | CatalogError::History { .. }
            ),
            _ => false,
        }
    }

    /// Which of two faults is said when nobody has the bytes: one that may be gone at the next look, one that a key
    /// cures, damage, and last that something is not there.
    pub(super) fn or_graver(known: Option<WalGetError>, met: WalGetError) -> Option<WalGetError> {
        let gravity = |error: &WalGetError| match error {
            WalGetError::Vanished { .. } => 3,
            WalGetError::Key { .. } => 2,
            WalGetError::Damaged { .. } => 1,
            _ => 0,
        };
        match known {
            Some(known) if gravity(&known) >= gravity(&met) => Some(known),
            _ => Some(met),
        }
    }

    /// Whether the same bytes may be had elsewhere: from another object, another repository.
    pub(super) fn is_of_one_copy(&self) -> bool {
        match self {
            WalGetError::Damaged { .. } | WalGetError::Key { .. } | WalGetError::Vanished { .. } => true,
            WalGetError::Hole { .. } => true,
            WalGetError::Catalog(_) => true,
            other => other.is_silence(),
        }
    }
}

impl Advice for WalGetError {
    fn hint(&self) -> Option<String> {
        let text = match self {
            WalGetError::Catalog(error) => return error.hint(),
            WalGetError::Store(error) => return error.hint(),
            WalGetError::Usage { .. } => "restore_command = 'seawall wal-get %f %p'",
            WalGetError::NoRepository { .. } => "is `url` (or --repository) the right one, and is the volume mounted?",
            WalGetError::Slow { .. } | WalGetError::Unanswered { .. } => {
                "bring the repository back; if it is lost for good, leave it out of the cluster's `repositories`"
            }
            WalGetError::Hole { .. } => "`seawall gaps` names every hole; restore to a target before this one",
            WalGetError::Disputed { .. } => "two writers stored different WAL under one name: see `seawall gaps`",
            WalGetError::Contradicted { .. } | WalGetError::Contradicts { .. } => {
                "two servers archived to one place: choose a repository by leaving the others out of `repositories`"
            }
            WalGetError::HistoryDisputed { .. } | WalGetError::SegmentSizeDisputed { .. } => {
                "they are no copies of one archive: choose one by leaving the others out of `repositories`"
            }
            WalGetError::Damaged { .. } => "keep the object for inspection and run `seawall verify`",
            WalGetError::Key { .. } => {
                "set `identity_file` of the cluster to a file that holds the AGE-SECRET-KEY-1… of one of the recipients it was encrypted to"
            }
            WalGetError::Vanished { .. } => "does `seawall expire` run at the same time? recovery can be started again",
            WalGetError::HistoryMissing { .. } => "copy the .history file from the server's pg_wal into the archive",
            WalGetError::Destination { .. } => "is there room, and may this user write there?",
        };
        Some(text.to_string())
    }

    fn disposition(&self) -> Disposition {
        if self.is_transient() { Disposition::Retry } else { Disposition::Operator }
    }

    /// For logs only: the process exits with [`super::ERROR_EXIT_CODE`].
    fn exit_code(&self) -> ExitCode {
        match self {
            WalGetError::Catalog(error) => error.exit_code(),
            WalGetError::Store(error) => error.exit_code(),
            WalGetError::Usage { .. } => ExitCode::Usage,
            WalGetError::Destination { .. } => ExitCode::Permission,
            WalGetError::Slow { .. } | WalGetError::Unanswered { .. } => ExitCode::Unavailable,
            WalGetError::NoRepository { .. } | WalGetError::Key { .. } => ExitCode::Config,
            _ => ExitCode::Data,
        }
    }
}
