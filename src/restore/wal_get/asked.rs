//! Owns: asking every repository of a cluster what it holds, and remembering which did not say.
//! Does not own: what follows from the answers (`wal_get.rs`).
//!
//! A repository that says nothing may hold anything: what others have is delivered, but nothing is absent.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::time::{Instant, timeout_at};

use super::error::{Silence, Silences, WalGetError};
use crate::catalog::LineageFile;
use crate::catalog::store::{self, Archive};
use crate::repository::layout::WalDirectory;
use crate::wal::TimelineId;

/// One lineage in one repository, which operators know by its name.
#[derive(Clone, Debug)]
pub struct Holder {
    pub repository: String,
    pub archive: Archive,
    memory: Option<Arc<Mutex<Option<Known>>>>,
}

/// What was seen in a repository. While a listing shows all of it, the repository is the one it was.
#[derive(Debug)]
struct Known {
    file: LineageFile,
    histories: Vec<TimelineId>,
    directories: Vec<WalDirectory>,
}

impl Known {
    fn is_seen_in(&self, histories: &[TimelineId], directories: &[WalDirectory]) -> bool {
        !self.directories.is_empty()
            && self.histories.iter().all(|known| histories.contains(known))
            && self.directories.iter().all(|known| directories.contains(known))
    }
}

impl Holder {
    pub fn new(repository: &str, archive: Archive) -> Holder {
        Holder { repository: repository.to_string(), archive, memory: None }
    }

    /// One that is asked again and again, and reads once what never changes.
    pub fn remembering(self) -> Holder {
        Holder { memory: Some(Arc::default()), ..self }
    }

    async fn look(&self) -> Result<View<'_>, WalGetError> {
        let Some(memory) = &self.memory else { return self.look_anew().await };
        let known = memory.lock().expect("no holder panics").take();
        if let Some(known) = known {
            let (histories, directories) = self.archive.wal_listing().await?;
            if known.is_seen_in(&histories, &directories) {
                let view = View { holder: self, file: known.file, histories, directories };
                self.remember(&view);
                return Ok(view);
            }
        }
        let view = self.look_anew().await?;
        self.remember(&view);
        Ok(view)
    }

    fn remember(&self, view: &View<'_>) {
        let View { file, histories, directories, .. } = view;
        let known = Known { file: file.clone(), histories: histories.clone(), directories: directories.clone() };
        if let Some(memory) = &self.memory {
            *memory.lock().expect("no holder panics") = Some(known);
        }
    }

    async fn look_anew(&self) -> Result<View<'_>, WalGetError> {
        // Read first, whatever is asked: behind a mistyped prefix everything would be absent.
        let backend = self.archive.backend.as_ref();
        if store::read_repository(backend).await?.is_none() {
            return Err(WalGetError::NoRepository { location: backend.describe() });
        }
        let file = self.archive.lineage_file().await?;
        let (histories, directories) = self.archive.wal_listing().await?;
        Ok(View { holder: self, file, histories, directories })
    }
}

/// What one repository says is in it.
#[derive(Debug)]
pub struct View<'a> {
    pub holder: &'a Holder,
    pub file: LineageFile,
    pub histories: Vec<TimelineId>,
    pub directories: Vec<WalDirectory>,
}

/// The answers, in the order of preference.
#[derive(Debug, Default)]
pub struct Asked<'a> {
    pub views: Vec<View<'a>>,
    silent: Vec<Silence>,
    /// Of all that were asked.
    count: usize,
}

impl<'a> Asked<'a> {
    /// Asks all at once. Once one has answered the others have `patience` left.
    pub async fn ask(holders: &'a [Holder], patience: Duration) -> Asked<'a> {
        let look = |(index, holder): (usize, &'a Holder)| async move { (index, holder.look().await) };
        let mut asking: FuturesUnordered<_> = holders.iter().enumerate().map(look).collect();
        let mut answers: Vec<Option<Result<View<'a>, WalGetError>>> = holders.iter().map(|_| None).collect();
        let mut deadline = None;
        loop {
            let next = match deadline {
                None => asking.next().await,
                Some(deadline) => timeout_at(deadline, asking.next()).await.unwrap_or(None),
            };
            let Some((index, answer)) = next else { break };
            if answer.is_ok() {
                deadline.get_or_insert(Instant::now() + patience);
            }
            answers[index] = Some(answer);
        }
        let mut asked = Asked { count: holders.len(), ..Asked::default() };
        for (holder, answer) in holders.iter().zip(answers) {
            match answer.unwrap_or(Err(WalGetError::Slow { within: patience })) {
                Ok(view) => asked.views.push(view),
                Err(error) => asked.silence(holder, error),
            }
        }
        asked
    }

    /// Remembers that a repository did not say what it holds.
    pub fn silence(&mut self, holder: &Holder, error: WalGetError) {
        if self.silent.iter().all(|known| known.repository != holder.repository) {
            tracing::debug!(repository = holder.repository, %error, "a repository does not say what it holds");
            self.silent.push(Silence { repository: holder.repository.clone(), error });
        }
    }

    /// What was found holds only if everybody has spoken. The error is the fault that was met meanwhile, the one
    /// repository's own error, or tells what is known and who is silent.
    pub fn all_spoke(&mut self, what: &str, fault: Option<WalGetError>) -> Result<(), WalGetError> {
        match (self.silent.len(), fault) {
            (0, None) => Ok(()),
            (0, Some(fault)) => Err(fault),
            (1, _) if self.count == 1 => Err(self.silent.remove(0).error),
            (_, fault) => {
                let what = fault.as_ref().map_or_else(|| what.to_string(), ToString::to_string);
                let silent = Silences(std::mem::take(&mut self.silent));
                Err(WalGetError::Unanswered { what, fault: fault.map(Box::new), silent })
            }
        }
    }

    /// The lineage as all describe it; at least one has answered.
    pub fn lineage_file(&self) -> Result<LineageFile, WalGetError> {
        let first = &self.views[0];
        let size = first.file.segment_size;
        if let Some(other) = self.views.iter().find(|view| view.file.segment_size != size) {
            return Err(WalGetError::SegmentSizeDisputed {
                one: first.holder.repository.clone(),
                one_bytes: size.bytes(),
                other: other.holder.repository.clone(),
                other_bytes: other.file.segment_size.bytes(),
            });
        }
        let files = self.views.iter().map(|view| &view.file);
        Ok(files.min_by_key(|file| file.start_timeline).expect("there is a first").clone())
    }
}
