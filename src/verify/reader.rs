//! Owns: reading objects through, in order, a few requests at a time and no faster than allowed; what a store's error is:
//! a fault of the object, or of the store.
//! Does not own: what the bytes are (`content.rs`).
//!
//! ```text
//!  ranges of all objects, in order ──FETCHES at a time──▶ channel ──▶ content (threads)
//! ```

use std::future::Future;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self as streams, StreamExt};
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::pace::Pace;
use crate::catalog::store::{self, place};
use crate::catalog::{Archive, CatalogError};
use crate::error::{Advice, Disposition, ExitCode, Failure};
use crate::repository::{Key, StoreErrorKind};

/// Of one object at a time, in memory [`FETCHES`] + [`WAITING`] + 1 times.
const CHUNK_BYTES: u64 = 4 << 20;
/// Requests under way: a store far away answers after 50 ms, whatever the object's size.
const FETCHES: usize = 4;
const WAITING: usize = 2;
/// No single question may hang longer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);
const RETRY_PAUSE: Duration = Duration::from_millis(200);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(5);

/// Why an object's bytes were not had.
#[derive(Clone, Debug)]
pub enum Lack {
    /// The store says that it is not there.
    Missing,
    /// The store gave something else.
    Damaged(String),
    /// The store does not answer, or refuses: nothing is known of the object.
    Store(Box<Failure>),
}

/// An object to be read through: so many stored bytes.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub key: Key,
    pub bytes: u64,
}

/// Objects being read, in order.
#[derive(Debug)]
pub struct Reader {
    chunks: mpsc::Receiver<(usize, Result<Bytes, Lack>)>,
    task: JoinHandle<()>,
}

impl Reader {
    pub fn start(archive: &Archive, wanted: Vec<Wanted>, pace: &Pace, patience: Duration) -> Reader {
        let (sender, chunks) = mpsc::channel(WAITING);
        let (archive, pace) = (archive.clone(), pace.clone());
        let task = tokio::spawn(async move {
            let pieces = wanted
                .into_iter()
                .enumerate()
                .flat_map(|(index, Wanted { key, bytes })| ranges(bytes).map(move |range| (index, key.clone(), range)));
            let (archive, pace) = (&archive, &pace);
            let fetches = streams::iter(pieces).map(|(index, key, range)| async move {
                pace.take(range.end - range.start).await;
                (index, fetch(archive, &key, range, patience).await)
            });
            let mut fetches = std::pin::pin!(fetches.buffered(FETCHES));
            while let Some(chunk) = fetches.next().await {
                if sender.send(chunk).await.is_err() {
                    return;
                }
            }
        });
        Reader { chunks, task }
    }

    /// The next piece of object `index`; what earlier ones have left is passed over. `None`: nothing more of it.
    pub async fn next(&mut self, index: usize) -> Option<Result<Bytes, Lack>> {
        loop {
            match self.chunks.recv().await? {
                (of, chunk) if of == index => return Some(chunk),
                (of, _) => assert!(of < index, "objects are read in the order in which they were asked for"),
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// How many pieces an object is read in. An empty one is asked for all the same: it has to be there.
pub fn pieces(bytes: u64) -> u64 {
    bytes.div_ceil(CHUNK_BYTES).max(1)
}

fn ranges(bytes: u64) -> impl Iterator<Item = Range<u64>> {
    (0..pieces(bytes)).map(move |index| index * CHUNK_BYTES..((index + 1) * CHUNK_BYTES).min(bytes))
}

/// One piece of an object, which must have all of it.
pub async fn fetch(archive: &Archive, key: &Key, range: Range<u64>, patience: Duration) -> Result<Bytes, Lack> {
    let wanted = range.end - range.start;
    let fetched = patiently(patience, || async {
        if wanted == 0 {
            let there = archive.backend.stat(key).await?;
            return Ok(there.map(|_| Bytes::new()).ok_or(Lack::Missing));
        }
        match archive.backend.fetch(key, range.clone()).await {
            Ok(chunk) => Ok(Ok(chunk)),
            Err(error) if error.is(StoreErrorKind::NotFound) => Ok(Err(Lack::Missing)),
            Err(error) if error.is(StoreErrorKind::Corrupt) => Ok(Err(Lack::Damaged(error.cause))),
            Err(error) => Err(error.into()),
        }
    });
    let chunk = fetched.await.map_err(|failure| Lack::Store(Box::new(failure)))??;
    match chunk.len() as u64 == wanted {
        true => Ok(chunk),
        false => Err(Lack::Damaged(format!("{} of {wanted} bytes could be read from {}", chunk.len(), range.start))),
    }
}

/// Asks a store, and again while it may answer in a moment.
pub async fn patiently<T, F>(patience: Duration, ask: impl Fn() -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<T, CatalogError>>,
{
    let started = Instant::now();
    let mut pause = RETRY_PAUSE;
    loop {
        let failure = match tokio::time::timeout(ANSWER_DEADLINE, ask()).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) if error.disposition() == Disposition::Retry => Failure::from(error),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => Failure::new(
                ExitCode::Unavailable,
                format!("the store did not answer within {} s", ANSWER_DEADLINE.as_secs()),
            ),
        };
        if started.elapsed() + pause > patience {
            return Err(failure);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_PAUSE_MAX);
    }
}

/// A small object in whole: `Ok(Err(_))` tells what is wrong with it, `Ok(Ok(None))` that it is not there.
pub async fn small<T: DeserializeOwned>(
    archive: &Archive,
    key: &Key,
    patience: Duration,
) -> Result<Result<Option<T>, String>, Failure> {
    let read = patiently(patience, || async {
        match store::fetch_json::<T>(archive.backend.as_ref(), key).await {
            Ok(found) => Ok(Ok(found)),
            Err(error) => about_content(error).map(Err),
        }
    });
    read.await.map_err(|failure| failure.context(format_args!("read {}", place(archive.backend.as_ref(), key))))
}

/// What is wrong with the object itself; any other error is the store's.
pub fn about_content(error: CatalogError) -> Result<String, CatalogError> {
    match error {
        CatalogError::Damaged { fault, .. } => Ok(fault),
        CatalogError::TooLarge { bytes, limit, .. } => {
            Ok(format!("it is {bytes} bytes long, more than the {limit} it may have"))
        }
        CatalogError::History { source, .. } => Ok(source.to_string()),
        CatalogError::Missing { .. } => Ok("it is not there".to_string()),
        CatalogError::Store(error) if error.is(StoreErrorKind::NotFound) => Ok("it is not there".to_string()),
        CatalogError::Store(error) if error.is(StoreErrorKind::Corrupt) => Ok(error.cause),
        error => Err(error),
    }
}
