//! Owns: fenced, retried access to one lineage in one repository.
//! Does not own: what is written and in which order (`push.rs`, `mod.rs`).

use std::future::Future;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use bytes::Bytes;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::catalog::store::{Archive, CatalogError};
use crate::error::{Advice, Disposition, ExitCode};
use crate::repository::layout::Epoch;
use crate::repository::{StoreError, StoreErrorKind, Upload};
use crate::telemetry::meters;
use crate::wal::SegmentName;

/// Why an archiver ended before its input did.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ArchiveError {
    #[error("stopped before everything was stored")]
    Stopped,
    #[error("writer {ours} is fenced: writer {highest} has taken over this archive")]
    Fenced { ours: Epoch, highest: Epoch },
    #[error("{location} no longer holds writer {ours}, which this agent is: it was emptied, or restored from a copy")]
    Replaced { ours: Epoch, location: String },
    #[error("{name} is already in the archive with other content: raw CRC-32 {stored:08x} stored, {ours:08x} received")]
    Conflict { name: SegmentName, stored: u32, ours: u32 },
    #[error(
        "{object} cannot be compared with the segment received (raw CRC-32 {ours:08x}): it is encrypted, and nothing beside it says what it holds"
    )]
    Incomparable { object: String, ours: u32 },
    #[error(transparent)]
    Store(StoreError),
    #[error(transparent)]
    Catalog(Arc<CatalogError>),
}

impl From<StoreError> for ArchiveError {
    fn from(error: StoreError) -> ArchiveError {
        ArchiveError::Store(error)
    }
}

impl From<CatalogError> for ArchiveError {
    fn from(error: CatalogError) -> ArchiveError {
        match error {
            CatalogError::Store(error) => ArchiveError::Store(error),
            other => ArchiveError::Catalog(Arc::new(other)),
        }
    }
}

impl Advice for ArchiveError {
    fn hint(&self) -> Option<String> {
        match self {
            ArchiveError::Stopped => None,
            ArchiveError::Fenced { .. } => Some("another agent writes to this archive; this one waits and takes over when it ends".into()),
            ArchiveError::Replaced { .. } => Some("the agent looks at it anew; an emptied repository is taken into use again with `seawall init --create`".into()),
            ArchiveError::Conflict { .. } => Some("do two servers archive to one place, or was one of them cloned? Both contents are kept; to go on with this server, use `seawall init --new-lineage`".into()),
            ArchiveError::Incomparable { .. } => Some("set `identity_file` for this cluster until the segment is indexed: with it the object is read and compared".into()),
            ArchiveError::Store(error) => error.hint(),
            ArchiveError::Catalog(error) => error.hint(),
        }
    }

    fn disposition(&self) -> Disposition {
        match self {
            ArchiveError::Stopped | ArchiveError::Fenced { .. } | ArchiveError::Replaced { .. } => {
                Disposition::Reconnect
            }
            ArchiveError::Conflict { .. } => Disposition::Stop,
            ArchiveError::Incomparable { .. } => Disposition::Operator,
            ArchiveError::Store(error) => error.disposition(),
            ArchiveError::Catalog(error) => error.disposition(),
        }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            ArchiveError::Stopped | ArchiveError::Replaced { .. } => ExitCode::Unavailable,
            ArchiveError::Fenced { .. } => ExitCode::TryAgain,
            ArchiveError::Conflict { .. } | ArchiveError::Incomparable { .. } => ExitCode::Data,
            ArchiveError::Store(error) => error.exit_code(),
            ArchiveError::Catalog(error) => error.exit_code(),
        }
    }
}

/// How the store is doing, for `status` and the log: the last failure while it lasts.
///
/// A store can answer and yet take nothing: a full disk is listed and read, and makes empty files. So a failure ends
/// when something was stored, or when the very call that failed is answered.
#[derive(Clone, Debug, Default)]
pub struct StoreHealth(Arc<Mutex<Option<Failing>>>);

#[derive(Clone, Debug)]
struct Failing {
    error: StoreError,
    /// Something could not be stored.
    of_store: bool,
}

/// What a call's success says about the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Says {
    /// It takes WAL: an object is there now.
    Takes,
    /// It answers this call.
    Answers,
}

impl StoreHealth {
    /// What the store refused last, while it does.
    pub fn failure(&self) -> Option<StoreError> {
        self.0.lock().expect("no holder panics").as_ref().map(|failing| failing.error.clone())
    }

    /// Says it once when it begins, or when its kind changes.
    fn handle_failure(&self, error: &StoreError, says: Says) {
        let mut failing = self.0.lock().expect("no holder panics");
        if failing.as_ref().map(|before| before.error.kind) != Some(error.kind) {
            tracing::warn!(%error, hint = error.hint(), "the repository does not take WAL; trying again");
        }
        let of_store = says == Says::Takes || failing.as_ref().is_some_and(|before| before.of_store);
        *failing = Some(Failing { error: error.clone(), of_store });
    }

    /// A call that `says` so much was answered, after it `had_failed` itself.
    fn handle_answer(&self, says: Says, succeeded: bool, had_failed: bool) {
        let mut failing = self.0.lock().expect("no holder panics");
        let Some(before) = failing.as_ref() else { return };
        let ends = match says {
            Says::Takes => succeeded || had_failed,
            Says::Answers => had_failed && !before.of_store,
        };
        if ends {
            *failing = None;
            tracing::info!("the repository takes WAL again");
        }
    }
}

/// The writer of one epoch. Clones share the fence and the health.
#[derive(Clone, Debug)]
pub struct Writer {
    pub archive: Archive,
    pub epoch: Epoch,
    health: StoreHealth,
    stop: CancellationToken,
    checked: Arc<tokio::sync::Mutex<Option<Instant>>>,
}

impl Writer {
    /// A writer looks for a higher epoch at least this often while it writes.
    const FENCE_CHECK_INTERVAL: Duration = Duration::from_secs(30);
    /// No single call to a store may hang longer, whatever the store promises.
    const CALL_DEADLINE: Duration = Duration::from_secs(120);

    pub fn new(archive: Archive, epoch: Epoch, health: StoreHealth, stop: CancellationToken) -> Writer {
        Writer { archive, epoch, health, stop, checked: Arc::default() }
    }

    /// Fails when a higher epoch was taken, or ours is gone. Looks at the store when asked to or when the last look is old.
    pub async fn confirm_epoch(&self, now: bool) -> Result<(), ArchiveError> {
        let mut checked = self.checked.lock().await;
        let recent = checked.is_some_and(|at| at.elapsed() < Self::FENCE_CHECK_INTERVAL);
        if recent && !now {
            return Ok(());
        }
        let highest = self.retry(|| self.archive.highest_epoch()).await?;
        match highest {
            Some(highest) if highest > self.epoch => {
                return Err(ArchiveError::Fenced { ours: self.epoch, highest });
            }
            Some(highest) if highest == self.epoch => {}
            // What this agent had stored before went with it.
            _ => {
                let location = self.archive.backend.describe();
                return Err(ArchiveError::Replaced { ours: self.epoch, location });
            }
        }
        *checked = Some(Instant::now());
        Ok(())
    }

    /// A call that stores something once it succeeds, to be repeated by the caller.
    pub fn storing(&self) -> Attempts<'_> {
        Attempts { writer: self, says: Says::Takes, delays: Delays::new(), has_failed: false }
    }

    fn asking(&self) -> Attempts<'_> {
        Attempts { says: Says::Answers, ..self.storing() }
    }

    /// One call that is not repeated, with a deadline.
    pub async fn call_once<T, E: Into<ArchiveError>>(
        &self,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, ArchiveError> {
        self.asking().call(call).await
    }

    /// As [`Writer::call_once`], for bytes that are here: it says nothing about the store.
    pub async fn load<T, E: Into<ArchiveError>>(
        &self,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, ArchiveError> {
        let called = tokio::select! {
            biased;
            () = self.stop.cancelled() => return Err(ArchiveError::Stopped),
            called = tokio::time::timeout(Self::CALL_DEADLINE, call) => called,
        };
        match called {
            Ok(answered) => answered.map_err(Into::into),
            Err(_) => {
                let cause = format!("no answer within {:?}", Self::CALL_DEADLINE);
                let location = self.archive.backend.describe();
                Err(ArchiveError::Store(StoreError::new(StoreErrorKind::Unavailable, "use", location, cause)))
            }
        }
    }

    /// Repeats `call` until it succeeds, fails for good, or the writer is stopped.
    ///
    /// `AlreadyExists`, `NotFound`, `Corrupt` and `Unsupported` are answers, not outages: they come back at once.
    pub async fn retry<T, E, F>(&self, call: impl Fn() -> F) -> Result<T, ArchiveError>
    where
        E: Into<ArchiveError>,
        F: Future<Output = Result<T, E>>,
    {
        self.asking().repeat(call).await
    }

    /// As [`Writer::retry`], for a call that stores an object.
    pub async fn store<T, E, F>(&self, call: impl Fn() -> F) -> Result<T, ArchiveError>
    where
        E: Into<ArchiveError>,
        F: Future<Output = Result<T, E>>,
    {
        self.storing().repeat(call).await
    }

    /// Appends a part to an upload, as often as it takes; an empty part is nothing. A small one may only have been
    /// gathered: that it was taken says nothing yet.
    pub async fn append(&self, upload: &mut dyn Upload, part: &Bytes) -> Result<(), ArchiveError> {
        let mut attempts = self.asking();
        while !part.is_empty() {
            match attempts.call(upload.append(part.clone())).await {
                Err(ArchiveError::Store(error)) if !is_answer(&error) => attempts.wait().await?,
                appended => return appended,
            }
        }
        Ok(())
    }

    /// Gives an upload its name, as often as it takes.
    pub async fn complete(&self, upload: &mut dyn Upload) -> Result<(), ArchiveError> {
        let mut attempts = self.storing();
        loop {
            match attempts.call(upload.complete()).await {
                Err(ArchiveError::Store(error)) if !is_answer(&error) => attempts.wait().await?,
                completed => return completed,
            }
        }
    }

    /// Waits before the next attempt, unless the writer is stopped.
    pub async fn wait(&self, delays: &mut Delays) -> Result<(), ArchiveError> {
        meters::store_retried(&self.archive.lineage.cluster);
        let delay = delays.0.next().expect("the delays never end");
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(ArchiveError::Stopped),
            () = tokio::time::sleep(delay) => Ok(()),
        }
    }
}

/// One call to the store, however often it is made.
#[derive(Debug)]
pub struct Attempts<'a> {
    writer: &'a Writer,
    says: Says,
    delays: Delays,
    has_failed: bool,
}

impl Attempts<'_> {
    /// Makes it once, with a deadline; given up when the writer is stopped. What comes of it is said of the store.
    pub async fn call<T, E: Into<ArchiveError>>(
        &mut self,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, ArchiveError> {
        let result = self.writer.load(call).await;
        let health = &self.writer.health;
        match &result {
            Err(ArchiveError::Store(error)) if !is_answer(error) => {
                self.has_failed = true;
                health.handle_failure(error, self.says);
            }
            Err(ArchiveError::Stopped) => {}
            answered => health.handle_answer(self.says, answered.is_ok(), std::mem::take(&mut self.has_failed)),
        }
        result
    }

    /// Waits before the next attempt, unless the writer is stopped.
    pub async fn wait(&mut self) -> Result<(), ArchiveError> {
        self.writer.wait(&mut self.delays).await
    }

    async fn repeat<T, E, F>(mut self, call: impl Fn() -> F) -> Result<T, ArchiveError>
    where
        E: Into<ArchiveError>,
        F: Future<Output = Result<T, E>>,
    {
        loop {
            match self.call(call()).await {
                Err(ArchiveError::Store(error)) if !is_answer(&error) => self.wait().await?,
                answer => return answer,
            }
        }
    }
}

/// 0.25 to 15 s, doubling.
#[derive(Debug)]
pub struct Delays(ExponentialBackoff);

impl Delays {
    pub fn new() -> Delays {
        let delays = ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(250))
            .with_max_delay(Duration::from_secs(15))
            .without_max_times();
        Delays(delays.build())
    }
}

/// Answers that come back at once: repeating the call would not change them.
pub fn is_answer(error: &StoreError) -> bool {
    use StoreErrorKind::*;
    matches!(error.kind, AlreadyExists | NotFound | Corrupt | Unsupported | SourceLost)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::layout::Lineage;
    use crate::testkit::store::MemoryStore;
    use crate::wal::SystemId;

    fn writer() -> Writer {
        let archive = Archive::new(Arc::new(MemoryStore::default()), Lineage::new("main", SystemId(7), 1));
        Writer::new(archive, Epoch(1), StoreHealth::default(), CancellationToken::new())
    }

    fn refusal(kind: StoreErrorKind) -> Result<(), StoreError> {
        Err(StoreError::new(kind, "store", "an object", "the test says so"))
    }

    async fn make(attempts: &mut Attempts<'_>, answer: Result<(), StoreError>) {
        let _ = attempts.call(async { answer }).await;
    }

    #[tokio::test]
    async fn a_store_that_answers_questions_does_not_take_wal_again() {
        let writer = writer();
        let mut put = writer.storing();
        make(&mut put, refusal(StoreErrorKind::NoSpace)).await;
        // Other calls succeed, among them one that had failed itself.
        let mut list = writer.asking();
        make(&mut list, refusal(StoreErrorKind::Unavailable)).await;
        make(&mut list, Ok(())).await;
        writer.retry(|| async { Ok::<_, StoreError>(()) }).await.unwrap();
        writer.call_once(async { Ok::<_, StoreError>(()) }).await.unwrap();
        assert!(writer.health.failure().is_some());
        make(&mut put, Ok(())).await;
        assert!(writer.health.failure().is_none());
    }

    #[tokio::test]
    async fn another_object_stored_ends_it() {
        let writer = writer();
        make(&mut writer.storing(), refusal(StoreErrorKind::Unavailable)).await;
        writer.store(|| async { Ok::<_, StoreError>(()) }).await.unwrap();
        assert!(writer.health.failure().is_none());
    }

    #[tokio::test]
    async fn the_call_that_failed_ends_it_by_any_answer() {
        let writer = writer();
        for (mut attempts, answer) in [
            (writer.asking(), Ok(())),
            (writer.asking(), refusal(StoreErrorKind::NotFound)),
            // Stored by the call whose answer was lost; on a quiet server nothing else follows.
            (writer.storing(), refusal(StoreErrorKind::AlreadyExists)),
        ] {
            make(&mut attempts, refusal(StoreErrorKind::Unavailable)).await;
            assert!(writer.health.failure().is_some());
            make(&mut attempts, answer).await;
            assert!(writer.health.failure().is_none());
        }
        // A name that is taken says nothing of another call's failure.
        make(&mut writer.storing(), refusal(StoreErrorKind::NoSpace)).await;
        make(&mut writer.storing(), refusal(StoreErrorKind::AlreadyExists)).await;
        assert!(writer.health.failure().is_some());
    }
}
