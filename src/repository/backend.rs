//! Owns: the small interface a store must offer, and what each call guarantees.
//! Does not own: retries (the caller decides by [`StoreError`]), names (`layout.rs`).

use std::fmt;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;

use crate::error::{Advice, Disposition, ExitCode};

/// A slash-separated path below the repository's root, built only by `layout.rs`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(String);

impl Key {
    /// `path` must be relative, without empty, `.` or `..` components; only `layout.rs` and tests call this.
    pub fn new(path: impl Into<String>) -> Key {
        let path = path.into();
        let plain = |part: &str| !part.is_empty() && part != "." && part != ".." && !part.contains('\0');
        assert!(path.split('/').all(plain), "object keys are built from checked names: {path:?}");
        Key(path)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part after the last slash.
    pub fn file_name(&self) -> &str {
        self.0.rsplit('/').next().expect("split yields at least one part")
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// One name found by [`Backend::list`]: the last path component only.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Entry {
    /// Something lies, or is being written, below this name.
    Directory(String),
    Object {
        name: String,
        bytes: u64,
    },
}

/// What the writer of an object knows of its content, for the store to check and to keep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// CRC-32 (IEEE) of the bytes as stored, where the writer has computed it already: a store that can verifies it.
    pub stored_crc32: Option<u32>,
    /// CRC-32 (IEEE) of the raw content, for objects whose stored bytes are encrypted: equal content is told by it.
    pub raw_crc32: Option<u32>,
}

/// A store of write-once objects. Every call has a deadline of its own and may be dropped at any await:
/// a dropped `put_new` may or may not take effect, never partly.
#[async_trait]
pub trait Backend: fmt::Debug + Send + Sync {
    /// The URL an operator would recognise; without secrets.
    fn describe(&self) -> String;

    /// Stores `body` (its parts concatenated) under a name that must be free. When this returns the object
    /// survives a crash of machine and process. No reader ever sees a part of it. `AlreadyExists` when the
    /// name is taken, whoever took it: the caller compares contents.
    async fn put_new_with(&self, key: &Key, body: &[Bytes], facts: &Facts) -> Result<(), StoreError>;

    /// [`Backend::put_new_with`] for small objects nobody has computed anything about.
    async fn put_new(&self, key: &Key, body: &[Bytes]) -> Result<(), StoreError> {
        self.put_new_with(key, body, &Facts::default()).await
    }

    /// Whether [`Backend::raw_crc32`] answers for objects stored whole; where it does not, a marker object has to.
    fn keeps_facts(&self) -> bool {
        false
    }

    /// The raw CRC-32 stored with an object, where the store keeps such facts and the object has one.
    async fn raw_crc32(&self, _key: &Key) -> Result<Option<u32>, StoreError> {
        Ok(None)
    }

    /// Whether bytes appended to an unfinished upload can be read back (not from a multipart upload).
    fn reads_back(&self) -> bool {
        true
    }

    /// Begins an object that is written piece by piece; it does not exist until [`Upload::complete`], which alone finds
    /// that the name is taken: whoever has written all of it can compare.
    async fn begin_upload(&self, key: &Key) -> Result<Box<dyn Upload>, StoreError>;

    /// The object's size in bytes, or `None` when the store answers that it is not there.
    async fn stat(&self, key: &Key) -> Result<Option<u64>, StoreError>;

    /// The bytes of `range`, which must lie inside the object; `NotFound` when there is none.
    async fn fetch(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError>;

    /// Names directly below `directory` (`None`: the root), sorted; an absent directory is empty.
    async fn list(&self, directory: Option<&Key>) -> Result<Vec<Entry>, StoreError>;

    /// Whether [`Backend::list_deep`] answers: where the names below many directories come in fewer requests than there
    /// are directories.
    fn lists_deep(&self) -> bool {
        false
    }

    /// Every object, at any depth, below the directories from `first` to `last` (both included, in the order of their
    /// names) that lie directly in `directory`: paths below `directory`, sorted, with sizes. It comes in pages: what is
    /// stored or deleted meanwhile may show or not. `None` where it cannot be told so after all.
    async fn list_deep(
        &self,
        _directory: &Key,
        _first: &str,
        _last: &str,
    ) -> Result<Option<Vec<(String, u64)>>, StoreError> {
        Ok(None)
    }

    /// Takes the place for what it is now, where it may be another than before: a directory made anew in the place of one
    /// that was lost. Before a repository is opened, never while it is written to.
    async fn look_anew(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Creates the place itself, where that is a directory and its parent is there; one that exists is kept.
    /// Only for a repository that begins: a missing root is an unmounted volume far more often.
    async fn create_missing_root(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Creates the place with its parents, where that is a directory; one that exists is kept. Only `init` does this.
    async fn create_root(&self) -> Result<(), StoreError> {
        Ok(())
    }

    /// Removes an object; one that is not there is success.
    async fn delete(&self, key: &Key) -> Result<(), StoreError>;

    /// Removes objects of which none needs another to stay or to go first; stops at the first that cannot be removed.
    async fn delete_all(&self, keys: &[Key]) -> Result<(), StoreError> {
        for key in keys {
            self.delete(key).await?;
        }
        Ok(())
    }

    /// Removes objects of which none needs another to stay or to go first, all that the store lets go. Those it does not
    /// (a lock, a legal hold, a policy) come back with why; anything else that goes wrong ends it.
    async fn delete_each(&self, keys: &[Key]) -> Result<Vec<(Key, StoreError)>, StoreError> {
        let mut kept = Vec::new();
        for key in keys {
            match self.delete(key).await {
                Err(error) if error.is(StoreErrorKind::PermissionDenied) => kept.push((key.clone(), error)),
                deleted => deleted?,
            }
        }
        Ok(kept)
    }
}

/// An object being written. Dropping it leaves nothing under its name; debris is cleaned by the backend later.
///
/// A call that fails with anything but `NotFound` leaves the upload as it was and may be repeated. One that is
/// dropped, or answers `NotFound`, leaves it unusable: what was written must be written again.
#[async_trait]
pub trait Upload: fmt::Debug + Send {
    async fn append(&mut self, part: Bytes) -> Result<(), StoreError>;

    /// Reads back bytes already appended. `Unsupported` where the store cannot (multipart uploads).
    async fn read_back(&mut self, range: Range<u64>) -> Result<Bytes, StoreError>;

    /// Gives the object its name, with the guarantees of [`Backend::put_new`]. Afterwards the upload is spent.
    async fn complete(&mut self) -> Result<(), StoreError>;

    /// Removes what was written so far.
    async fn abort(self: Box<Self>) -> Result<(), StoreError>;
}

/// Why a store refused, in terms of what the caller does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreErrorKind {
    AlreadyExists,
    NotFound,
    PermissionDenied,
    NoSpace,
    /// The repository's root is not there: an unmounted volume, a deleted bucket.
    RootMissing,
    ReadOnly,
    Unavailable,
    /// The store gave other bytes than it should have.
    Corrupt,
    Unsupported,
    /// The store does not accept who we are, or not any longer: keys wrong, expired, rotated.
    Credentials,
    /// What was configured cannot work there: another region, not an S3 store, no conditional writes.
    Misconfigured,
    /// What was to be stored is no longer what it was: not the store's fault. It is received again.
    SourceLost,
}

#[derive(Clone, Debug, thiserror::Error)]
#[error("could not {operation} {location}: {cause}")]
pub struct StoreError {
    pub kind: StoreErrorKind,
    /// Verb: "store", "read", "list", "delete".
    pub operation: &'static str,
    /// The full place: URL or path with the key.
    pub location: String,
    pub cause: String,
    /// What to do about it, where the backend knows better than the kind alone tells.
    pub hint: Option<&'static str>,
}

impl StoreError {
    pub fn new(
        kind: StoreErrorKind,
        operation: &'static str,
        location: impl Into<String>,
        cause: impl Into<String>,
    ) -> StoreError {
        StoreError { kind, operation, location: location.into(), cause: cause.into(), hint: None }
    }

    pub fn hinted(mut self, hint: &'static str) -> StoreError {
        self.hint = Some(hint);
        self
    }

    pub fn is(&self, kind: StoreErrorKind) -> bool {
        self.kind == kind
    }
}

impl Advice for StoreError {
    fn hint(&self) -> Option<String> {
        if let Some(hint) = self.hint {
            return Some(hint.to_string());
        }
        let text = match self.kind {
            StoreErrorKind::AlreadyExists => "does another agent, or another cluster, write to the same repository?",
            StoreErrorKind::NotFound => "was the object deleted by something other than `seawall expire`?",
            StoreErrorKind::PermissionDenied => {
                "give the user seawall runs as read and write permission there (files 0600, directories 0700)"
            }
            StoreErrorKind::NoSpace => {
                "free space on the repository's volume; the agent goes on by itself as soon as there is room"
            }
            StoreErrorKind::RootMissing => {
                "is the volume mounted, and `url` right? For a new archive, create the directory with `seawall init --apply`"
            }
            StoreErrorKind::ReadOnly => {
                "the repository's volume is read-only: remount it, or point `url` at a writable one"
            }
            StoreErrorKind::Unavailable => {
                "the agent retries by itself; WAL stays on the server until the store is back"
            }
            StoreErrorKind::Corrupt => {
                "the stored bytes are damaged: keep the object for inspection and run `seawall gaps`"
            }
            StoreErrorKind::Credentials => {
                "renew the credentials where seawall finds them; it looks again by itself and goes on"
            }
            StoreErrorKind::Misconfigured => "compare the repository's settings with what the store expects",
            StoreErrorKind::SourceLost => {
                "is the spool's disk in order? The WAL is received again as far as the server still has it"
            }
            StoreErrorKind::Unsupported => return None,
        };
        Some(text.to_string())
    }

    fn disposition(&self) -> Disposition {
        match self.kind {
            StoreErrorKind::AlreadyExists | StoreErrorKind::Corrupt => Disposition::Stop,
            StoreErrorKind::Unavailable | StoreErrorKind::NotFound => Disposition::Retry,
            StoreErrorKind::SourceLost => Disposition::Reconnect,
            _ => Disposition::Operator,
        }
    }

    fn exit_code(&self) -> ExitCode {
        match self.kind {
            StoreErrorKind::AlreadyExists | StoreErrorKind::Corrupt => ExitCode::Data,
            StoreErrorKind::PermissionDenied | StoreErrorKind::ReadOnly | StoreErrorKind::Credentials => {
                ExitCode::Permission
            }
            StoreErrorKind::RootMissing | StoreErrorKind::Misconfigured => ExitCode::Config,
            _ => ExitCode::Unavailable,
        }
    }
}
