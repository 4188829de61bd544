//! Owns: the objects of one backup in one repository: created in order, tried again while that may help, given up in the
//! end; nothing half-written left behind where that can be helped.
//! Does not own: what is in them (`frames`), when the backup is committed (`mod.rs`).

use std::time::Duration;

use backon::{BackoffBuilder, ExponentialBackoff, ExponentialBuilder};
use bytes::Bytes;
use futures_util::future::join_all;
use tokio::sync::mpsc;
use tokio::task::{JoinError, JoinSet};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::BackupError;
use super::frames::{ObjectName, StoreItem};
use crate::catalog::Archive;
use crate::codec::Form;
use crate::repository::layout::BackupId;
use crate::repository::{Key, StoreError, StoreErrorKind, Upload};

/// No single call to a store may hang longer, whatever the store promises.
const CALL_DEADLINE: Duration = Duration::from_secs(120);
/// For taking back what was begun, when nothing depends on it.
const ABORT_DEADLINE: Duration = Duration::from_secs(10);
/// Objects that are made durable at the same time, while another one flows.
const COMPLETING_MAX: usize = 2;

/// How a repository is treated.
#[derive(Clone, Debug)]
pub struct Patience {
    pub limit: Duration,
    pub stop: CancellationToken,
}

/// Failures of one call so far.
#[derive(Debug)]
pub struct Attempts<'a> {
    patience: &'a Patience,
    since: Instant,
    delays: ExponentialBackoff,
}

impl Patience {
    pub fn attempts(&self) -> Attempts<'_> {
        let delays = ExponentialBuilder::new()
            .with_min_delay(Duration::from_millis(250))
            .with_max_delay(Duration::from_secs(15))
            .without_max_times();
        Attempts { patience: self, since: Instant::now(), delays: delays.build() }
    }

    /// One call, dropped when it takes too long (`None`) or the backup is stopped.
    async fn call<T>(&self, call: impl Future<Output = T>) -> Result<Option<T>, BackupError> {
        tokio::select! {
            biased;
            () = self.stop.cancelled() => Err(BackupError::Stopped),
            answer = timeout(CALL_DEADLINE, call) => Ok(answer.ok()),
        }
    }

    /// Repeats `call` until it succeeds, or that is hopeless.
    pub async fn retry<T, F>(&self, mut call: impl FnMut() -> F) -> Result<T, BackupError>
    where
        F: Future<Output = Result<T, BackupError>>,
    {
        let mut attempts = self.attempts();
        loop {
            match timeout(CALL_DEADLINE, call()).await {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(BackupError::Store(error))) => attempts.handle_failure(error).await?,
                Ok(Err(other)) => return Err(other),
                Err(_) => attempts.handle_failure(no_answer("a repository")).await?,
            }
        }
    }
}

impl Attempts<'_> {
    /// Waits before the next attempt, or says why there is none.
    pub async fn handle_failure(&mut self, error: StoreError) -> Result<(), BackupError> {
        if !may_pass(&error) {
            return Err(BackupError::Store(error));
        }
        let after = self.since.elapsed();
        if after >= self.patience.limit {
            return Err(BackupError::StoreGivenUp { error, after });
        }
        let delay = self.delays.next().expect("the delays never end");
        tokio::select! {
            biased;
            () = self.patience.stop.cancelled() => Err(BackupError::Stopped),
            () = tokio::time::sleep(delay) => Ok(()),
        }
    }
}

/// A full disk, a missing permission may be cured too, but hardly while a backup waits; another one is taken then.
fn may_pass(error: &StoreError) -> bool {
    matches!(error.kind, StoreErrorKind::Unavailable | StoreErrorKind::Credentials)
}

fn no_answer(location: &str) -> StoreError {
    let cause = format!("no answer within {CALL_DEADLINE:?}");
    StoreError::new(StoreErrorKind::Unavailable, "use", location, cause)
}

/// Stores what comes until it is told that everything came, and all of it is durable.
pub async fn run_storing(
    archive: Archive,
    id: BackupId,
    mut items: mpsc::Receiver<StoreItem>,
    patience: Patience,
) -> Result<(), BackupError> {
    let mut storing = Storing { archive, id, patience, upload: None, completing: JoinSet::new(), nameless: Vec::new() };
    let stored = storing.run(&mut items).await;
    // Before the abort, which may take its time: nobody waits to hand over more.
    drop(items);
    let _ = timeout(ABORT_DEADLINE, storing.abort()).await; // debris is the backend's to clean
    stored
}

#[derive(Debug)]
struct Storing {
    archive: Archive,
    id: BackupId,
    patience: Patience,
    upload: Option<Box<dyn Upload>>,
    /// Objects of which every byte was taken, on their way to a name.
    completing: JoinSet<Result<(), Nameless>>,
    nameless: Vec<Box<dyn Upload>>,
}

/// An object that got no name, and why.
type Nameless = (BackupError, Box<dyn Upload>);

impl Storing {
    async fn run(&mut self, items: &mut mpsc::Receiver<StoreItem>) -> Result<(), BackupError> {
        loop {
            let stop = self.patience.stop.clone();
            let item = tokio::select! {
                biased;
                () = stop.cancelled() => return Err(BackupError::Stopped),
                Some(completed) = self.completing.join_next() => {
                    self.handle_completed(completed)?;
                    continue;
                }
                item = items.recv(), if self.completing.len() < COMPLETING_MAX => item,
            };
            match item {
                Some(StoreItem::Begin(name, form)) => self.begin(&name, form).await?,
                Some(StoreItem::Part(part)) => self.append(&part).await?,
                Some(StoreItem::End) => self.begin_completing(),
                Some(StoreItem::Finish) => return self.complete_all().await,
                // The source failed, and says why.
                None => return Err(BackupError::Stopped),
            }
        }
    }

    fn key(&self, name: &ObjectName, form: Form) -> Result<Key, BackupError> {
        let lineage = &self.archive.lineage;
        match name {
            ObjectName::Volume(volume) => Ok(lineage.volume(self.id, *volume, form)),
            ObjectName::Manifest => Ok(lineage.backup_manifest(self.id)),
            ObjectName::Config(name) => {
                lineage.backup_config(self.id, name, form).ok_or_else(|| BackupError::ConfigName { name: name.clone() })
            }
        }
    }

    async fn begin(&mut self, name: &ObjectName, form: Form) -> Result<(), BackupError> {
        let key = self.key(name, form)?;
        let backend = &self.archive.backend;
        let begun = self.patience.retry(async || Ok(backend.begin_upload(&key).await?)).await?;
        self.upload = Some(begun);
        Ok(())
    }

    async fn append(&mut self, part: &Bytes) -> Result<(), BackupError> {
        let upload = self.upload.as_mut().expect("a part belongs to an object that was begun");
        let mut attempts = self.patience.attempts();
        loop {
            match self.patience.call(upload.append(part.clone())).await? {
                Some(Ok(())) => return Ok(()),
                Some(Err(error)) => attempts.handle_failure(error).await?,
                // The call was dropped: the upload is of no more use.
                None => return Err(no_answer(&self.archive.backend.describe()).into()),
            }
        }
    }

    /// A disk that syncs a gigabyte takes its time, and need not make the source wait: the next object begins meanwhile.
    fn begin_completing(&mut self) {
        let upload = self.upload.take().expect("an object ends that was begun");
        self.completing.spawn(complete(upload, self.patience.clone(), self.archive.backend.describe()));
    }

    fn handle_completed(&mut self, completed: Result<Result<(), Nameless>, JoinError>) -> Result<(), BackupError> {
        match completed.unwrap_or_else(|error| std::panic::resume_unwind(error.into_panic())) {
            Ok(()) => Ok(()),
            Err((error, upload)) => {
                self.nameless.push(upload);
                Err(error)
            }
        }
    }

    async fn complete_all(&mut self) -> Result<(), BackupError> {
        while let Some(completed) = self.completing.join_next().await {
            self.handle_completed(completed)?;
        }
        Ok(())
    }

    /// Takes back what has no name, once nothing is on its way to one.
    async fn abort(&mut self) {
        self.nameless.extend(self.upload.take());
        while let Some(completed) = self.completing.join_next().await {
            if let Ok(Err((_, upload))) = completed {
                self.nameless.push(upload);
            }
        }
        join_all(self.nameless.drain(..).map(|upload| upload.abort())).await;
    }
}

/// Gives an object its name. A call under way is not broken off when the backup is stopped: nothing is half done then.
async fn complete(mut upload: Box<dyn Upload>, patience: Patience, location: String) -> Result<(), Nameless> {
    let mut attempts = patience.attempts();
    let error = loop {
        let failed = match timeout(CALL_DEADLINE, upload.complete()).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) => attempts.handle_failure(error).await,
            Err(_) => Err(no_answer(&location).into()),
        };
        if let Err(error) = failed {
            break error;
        }
    };
    Err((error, upload))
}
