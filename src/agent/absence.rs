//! Repositories that are out: how long one is left alone, and noticing that it is back.
//!
//! Owns: that a repository which fails and fails again costs the others less each time.
//! Does not own: leaving a stream (`archiver/outlet.rs`), what is copied to one that is back (`archiver/repair.rs`).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::opening;
use super::world::{ClusterOptions, Repository, World};
use crate::catalog::store::Archive;
use crate::error::{Disposition, ExitCode, Failure};
use crate::repository::layout::{self, Epoch, Lineage};

/// A repository is left alone this long at first, then twice as long each time, until it is whole again. Shorter: more
/// streams that begin anew for nothing. Longer: a larger hole.
const DELAY_MIN: Duration = Duration::from_secs(2);
const DELAY_MAX: Duration = Duration::from_secs(120);
/// For storing and deleting a small object.
const PROBE_DEADLINE: Duration = Duration::from_secs(20);

/// Who is out, over all streams of one cluster. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Absences(Arc<Mutex<BTreeMap<usize, Absence>>>);

#[derive(Debug)]
struct Absence {
    why: Failure,
    is_out: bool,
    times: u32,
    /// Not asked before.
    due: Instant,
}

impl Absences {
    /// A repository left, could not be opened, or is still not back. The same reason is said once.
    pub fn handle_out(&self, index: usize, name: &str, why: &Failure) {
        let mut all = self.0.lock().expect("no holder panics");
        let known = all.get(&index);
        if known.is_none_or(|known| !known.is_out || known.why.message != why.message) {
            let hint = why.hint.as_deref();
            tracing::warn!(repository = name, hint, "the repository does not take part: {why}");
        }
        let times = known.map_or(0, |known| known.times + 1);
        let delay = DELAY_MIN.saturating_mul(1 << times.min(10)).min(DELAY_MAX);
        all.insert(index, Absence { why: why.clone(), is_out: true, times, due: Instant::now() + delay });
    }

    /// It takes part. That it once did not is forgotten when it is whole.
    pub fn handle_back(&self, index: usize, name: &str) {
        let mut all = self.0.lock().expect("no holder panics");
        if let Some(absence) = all.get_mut(&index).filter(|absence| absence.is_out) {
            absence.is_out = false;
            tracing::info!(repository = name, "the repository takes part again");
        }
    }

    pub fn handle_whole(&self, index: usize) {
        self.0.lock().expect("no holder panics").remove(&index);
    }

    /// Why this one need not be asked now; nobody is skipped where nobody would be left.
    pub fn skipped(&self, index: usize, count: usize) -> Option<Failure> {
        let all = self.0.lock().expect("no holder panics");
        let now = Instant::now();
        let is_early = |absence: &Absence| absence.is_out && now < absence.due;
        match (0..count).all(|index| all.get(&index).is_some_and(is_early)) {
            true => None,
            false => all.get(&index).filter(|absence| is_early(absence)).map(|absence| absence.why.clone()),
        }
    }

    /// It has answered: the next start asks it.
    fn handle_answer(&self, index: usize) {
        if let Some(absence) = self.0.lock().expect("no holder panics").get_mut(&index) {
            absence.due = Instant::now();
        }
    }

    fn due(&self, index: usize) -> Instant {
        self.0.lock().expect("no holder panics").get(&index).map_or_else(Instant::now, |absence| absence.due)
    }

    fn is_out(&self, index: usize) -> bool {
        self.0.lock().expect("no holder panics").get(&index).is_some_and(|absence| absence.is_out)
    }
}

/// Watches for the return of the repositories that are out of one stream.
#[derive(Debug)]
pub struct Return {
    pub world: World,
    pub options: ClusterOptions,
    pub lineage: Lineage,
    pub epoch: Epoch,
    pub absences: Absences,
    /// Who leaves while the stream lasts.
    pub gone: watch::Receiver<Vec<(usize, Failure)>>,
    /// Cancelled when one is back: a new stream takes it in.
    pub back: CancellationToken,
}

impl Return {
    /// Ends when a repository is back. May be dropped at any await.
    pub async fn run(mut self) {
        let mut noted = 0;
        loop {
            let gone: Vec<(usize, Failure)> = self.gone.borrow_and_update().clone();
            for (index, why) in gone.iter().skip(noted) {
                self.absences.handle_out(*index, &self.world.repositories[*index].name, why);
            }
            noted = gone.len();
            let out = (0..self.world.repositories.len()).filter(|index| self.absences.is_out(*index));
            let next = out.map(|index| (self.absences.due(index), index)).min();
            let changed = async {
                if self.gone.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            let Some((due, index)) = next else {
                changed.await;
                continue;
            };
            tokio::select! {
                biased;
                () = tokio::time::sleep_until(due) => {}
                () = changed => continue,
            }
            let repository = &self.world.repositories[index];
            match self.probe(repository).await {
                Ok(()) => {
                    self.absences.handle_answer(index);
                    tracing::info!(
                        repository = repository.name,
                        "the repository answers again: a new stream takes it in"
                    );
                    return self.back.cancel();
                }
                Err(why) => self.absences.handle_out(index, &repository.name, &why),
            }
        }
    }

    /// Whether it can take part: it answers, is ours, stores and deletes.
    async fn probe(&self, repository: &Repository) -> Result<(), Failure> {
        let look = opening::look(repository, &self.options.name).await?;
        if look.file.is_none() {
            return Err(opening::emptied(repository, &self.options, &look));
        }
        let probed = async {
            let archive =
                Archive::new(repository.backend.clone(), self.lineage.clone()).with_keys(self.options.keys.clone());
            if let Some(writer) = archive.highest_writer().await?
                && writer.epoch >= self.epoch
                && writer.slot != self.options.slot.as_str()
            {
                let message = format!(
                    "{} was written by another agent meanwhile: slot {}, host {}, epoch {}",
                    repository.backend.describe(),
                    writer.slot,
                    writer.host.as_deref().unwrap_or("unknown"),
                    writer.epoch
                );
                return Err(Failure::new(ExitCode::TryAgain, message)
                    .disposition(Disposition::Retry)
                    .hint("it stays out while this agent writes the others; stop one of the two agents"));
            }
            let key = layout::probe(self.world.random_u32());
            let body = Bytes::from_static(b"seawall: may be deleted\n");
            repository.backend.put_new(&key, std::slice::from_ref(&body)).await?;
            Ok(repository.backend.delete(&key).await?)
        };
        match tokio::time::timeout(PROBE_DEADLINE, probed).await {
            Ok(probed) => probed,
            Err(_) => {
                let message = format!("{} gave no answer within {PROBE_DEADLINE:?}", repository.backend.describe());
                Err(Failure::new(ExitCode::Unavailable, message).disposition(Disposition::Retry))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why() -> Failure {
        Failure::new(ExitCode::Unavailable, "gone")
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_fails_again_and_again_is_asked_ever_less_often() {
        let absences = Absences::default();
        let mut delays = Vec::new();
        for _ in 0..9 {
            absences.handle_out(1, "b", &why());
            delays.push((absences.due(1) - Instant::now()).as_secs());
        }
        assert_eq!(delays, [2, 4, 8, 16, 32, 64, 120, 120, 120]);
        absences.handle_back(1, "b");
        absences.handle_whole(1);
        absences.handle_out(1, "b", &why());
        assert_eq!((absences.due(1) - Instant::now()).as_secs(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_is_skipped_where_nobody_would_be_left() {
        let absences = Absences::default();
        absences.handle_out(1, "b", &why());
        assert!(absences.skipped(1, 2).is_some() && absences.skipped(0, 2).is_none());
        absences.handle_out(0, "a", &why());
        assert!(absences.skipped(1, 2).is_none() && absences.skipped(0, 2).is_none());
        absences.handle_back(0, "a");
        tokio::time::advance(DELAY_MIN).await;
        assert!(absences.skipped(1, 2).is_none(), "it is due");
    }
}
