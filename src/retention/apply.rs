//! Carrying a plan out, so that a crash, a pause or another process between any two steps takes nothing from anybody.
//!
//! Owns: the order of the steps, and what is written before anything is deleted.
//! Does not own: the plan (`plan.rs`), deleting object by object (`delete.rs`), the lease (`agent`, through [`Tenure`]).
//!
//! ```text
//!  read, plan ─▶ may we delete? ─▶ announce: expired fact, dead.json ─▶ read pins and backups again, plan again
//!      ▲                                                                        │ somebody needs some of it
//!      └──────────────────────────────── withdrawn, dead.json taken back ◀──────┤
//!                                                                               │ nobody does
//!                        delete ◀─ take back what an earlier run announced ◀─ confirmed
//! ```
//!
//! * Whoever begins to need something says so (a pin, `begin.json`) and then looks at what is announced; here it is the other
//!   way round. So one of the two sees the other, however slow either is.
//! * An announcement is confirmed or withdrawn by creating one and the same name: of two processes that take an announcement
//!   for theirs, only one decides. Nothing is deleted without that, so one that slept through being withdrawn deletes nothing.
//! * What is confirmed is deleted by whoever comes next, if the one who confirmed it does not.
//! * What is confirmed is never taken back, whoever needs it: its deletes may come at any moment, also from one that was
//!   paused and has lost its lease. Who began to need it came after the announcement, and has seen it.
//! * The lease, confirmed before each batch, keeps two from working at one time. It is not what makes it safe.

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::delete::Deleting;
use super::inventory::Inventory;
use super::plan::{BackupVerdict, Fate, Plan, Standing, plan};
use super::policy::Policy;
use super::read;
use crate::catalog::backup::DeadFile;
use crate::catalog::ledger::{BACKUPS, FactKind, LedgerFact};
use crate::catalog::store::{fetch_json, place, put_json_new};
use crate::catalog::{Archive, CatalogError};
use crate::error::{Disposition, ExitCode, Failure};
use crate::repository::layout::{self, BackupId};
use crate::repository::{Key, StoreErrorKind};

/// How often a plan is made anew because somebody began to need some of it.
const ATTEMPTS: u32 = 3;
const SCHEMA: u32 = 1;
/// Between two looks whether the right still holds, while a store is at work.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// The right to expire in one repository.
#[async_trait]
pub trait Tenure: Send + Sync {
    /// Makes sure that nobody else has it now.
    async fn confirm(&self) -> Result<(), Failure>;

    /// Whether nobody else can have it by now, as far as this process knows by itself.
    fn is_held(&self) -> bool;
}

/// What an expiry goes by.
#[expect(missing_debug_implementations, reason = "it holds functions")]
pub struct Job<'a> {
    pub archive: &'a Archive,
    pub policy: &'a Policy,
    /// The newest lineage of the cluster in the same repository, where this is an earlier one.
    pub newest: Option<Archive>,
    pub tenure: &'a dyn Tenure,
    pub now: Arc<dyn Fn() -> Timestamp + Send + Sync>,
    pub random: &'a (dyn Fn() -> u64 + Send + Sync),
    pub stop: CancellationToken,
    pub progress: watch::Sender<ExpireProgress>,
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExpireProgress {
    pub objects_total: u64,
    pub objects_done: u64,
    pub bytes_total: u64,
    pub bytes_done: u64,
}

/// What was deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    pub bytes: u64,
    pub objects: u64,
    /// Whole ones.
    pub backups: u64,
    /// Names of WAL segments.
    pub segments: u64,
}

/// An expiry that came to its end.
#[derive(Debug)]
pub struct Expiry {
    /// As it was carried out.
    pub plan: Plan,
    pub freed: Freed,
    /// What the store would not let go, and why; it is tried again next time.
    pub locked: Vec<Locked>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Locked {
    pub key: Key,
    pub bytes: u64,
    pub cause: String,
}

/// What is there, and what is to become of it.
pub async fn make_plan(
    archive: &Archive,
    newest: Option<&Archive>,
    policy: &Policy,
    now: Timestamp,
) -> Result<(Inventory, Plan), CatalogError> {
    let inventory = read::read(archive, now).await?;
    let standing = standing(newest, now).await?;
    let plan = plan(&inventory, policy, now, &standing);
    Ok((inventory, plan))
}

async fn standing(newest: Option<&Archive>, now: Timestamp) -> Result<Standing, CatalogError> {
    Ok(match newest {
        None => Standing::Newest,
        Some(newest) => Standing::old(&read::read(newest, now).await?, now),
    })
}

/// Plans, and carries the plan out.
pub async fn expire(job: &Job<'_>) -> Result<Expiry, Failure> {
    let mut may_delete = false;
    for _ in 0..ATTEMPTS {
        let now = (job.now)();
        let (inventory, plan) = make_plan(job.archive, job.newest.as_ref(), job.policy, now).await?;
        if plan.is_idle() {
            return Ok(Expiry { plan, freed: Freed::default(), locked: Vec::new() });
        }
        if !may_delete {
            job.probe().await?;
            may_delete = true;
        }
        let word = match job.announce(&inventory, &plan).await? {
            Word::Stands => job.confirm_earlier(&inventory, &plan).await?,
            withdrawn => withdrawn,
        };
        let word = match word {
            Word::Stands => job.take_back(&inventory, &plan).await?,
            withdrawn => withdrawn,
        };
        if let Word::Withdrawn(why) = word {
            tracing::info!(cluster = job.archive.lineage.cluster, "nothing is deleted yet: {}", why.join("; "));
            continue;
        }
        let (freed, locked) = Deleting::new(job, &plan).run().await?;
        return Ok(Expiry { plan, freed, locked });
    }
    let message =
        format!("others began to need what was to be deleted, {ATTEMPTS} times in a row; nothing was deleted");
    Err(Failure::new(ExitCode::TryAgain, message).disposition(Disposition::Retry).hint("try again in a moment"))
}

pub(super) fn lost() -> Failure {
    Failure::new(ExitCode::TryAgain, "the lease ended while the store was at work, and it may be another's by now")
        .disposition(Disposition::Retry)
        .hint("what is left is deleted the next time anything expires")
}

fn dead_files(plan: &Plan, at: Timestamp) -> Vec<DeadFile> {
    let dead = |verdict: &BackupVerdict| {
        let reason = verdict.reasons.join("; ");
        DeadFile { schema: SCHEMA, id: verdict.id, at, reason }
    };
    plan.removed_backups().map(dead).collect()
}

/// What became of an announcement.
enum Word {
    Stands,
    /// With who needs what.
    Withdrawn(Vec<String>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    Confirmed,
    Withdrawn,
}

impl Job<'_> {
    fn keep_going(&self) -> Result<(), Failure> {
        match self.stop.is_cancelled() {
            false => Ok(()),
            true => Err(Failure::new(ExitCode::TryAgain, "stopped before everything was deleted")
                .disposition(Disposition::Retry)
                .hint("what is left is deleted the next time anything expires")),
        }
    }

    pub(super) async fn confirm(&self) -> Result<(), Failure> {
        self.keep_going()?;
        self.tenure.confirm().await
    }

    /// `work`, unless the right ends before it does. A request that was not answered is repeated: by a process that was
    /// stopped meanwhile, what somebody else has taken back would be deleted after all.
    pub(super) async fn while_held<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let ended = async {
            while self.tenure.is_held() {
                tokio::time::sleep(LOOK_INTERVAL).await;
            }
        };
        tokio::select! {
            // First: once a stopped process goes on, both are due.
            biased;
            () = ended => None,
            done = work => Some(done),
        }
    }

    /// Whether deleting is permitted: found out before anything is announced that would then stay.
    pub(super) async fn probe(&self) -> Result<(), Failure> {
        let backend = &self.archive.backend;
        // Always the same name: what a crash leaves of it, the next run removes.
        let key = layout::probe(0);
        let probed = async {
            // What is not there can be deleted by whoever may delete, and leaves nothing where nobody may.
            backend.delete(&key).await?;
            match backend.put_new(&key, &[bytes::Bytes::from_static(b"seawall expire: may be deleted\n")]).await {
                Err(error) if error.is(StoreErrorKind::AlreadyExists) => {}
                stored => stored?,
            }
            backend.delete(&key).await
        };
        probed.await.map_err(|error| match error.kind {
            StoreErrorKind::PermissionDenied | StoreErrorKind::ReadOnly => {
                let failure = Failure::from(error).context("nothing is deleted, and nothing announced");
                Failure { exit_code: ExitCode::Permission, ..failure }
                    .hint("`seawall expire --apply` needs the right to delete; it may run with credentials of its own, elsewhere")
            }
            _ => error.into(),
        })
    }

    /// Says what goes, and looks whether anybody needs it.
    async fn announce(&self, inventory: &Inventory, plan: &Plan) -> Result<Word, Failure> {
        let going: Vec<BackupId> = plan.removed_backups().map(|verdict| verdict.id).collect();
        let is_open = |verdict: &BackupVerdict| !verdict.is_dead || !verdict.is_announced;
        let is_new = !plan.announce.is_empty() || plan.removed_backups().any(is_open);
        if !is_new {
            return Ok(Word::Stands);
        }
        self.confirm().await?;
        let announcement = (self.random)();
        // Names tell microseconds: what is read back is to name the same object.
        let at = (self.now)().round(jiff::Unit::Microsecond).unwrap_or_else(|_| (self.now)());
        let mut fact = LedgerFact::new(FactKind::Expired, at, format!("retention: {}", self.policy));
        fact.segments.clone_from(&plan.announce);
        fact.details.insert(BACKUPS.into(), going.iter().map(BackupId::to_string).collect::<Vec<_>>().into());
        let fact = fact.with_announcement(announcement);
        let key = self.ledger_key(&fact);
        self.create(&key, &fact).await?;
        let mut ours = Vec::new();
        let files: Vec<DeadFile> = dead_files(plan, at);
        for file in files {
            if self.archive.put_dead(&file).await? {
                ours.push(file.id);
            }
        }
        let later = read::read_needs_again(self.archive, inventory).await?;
        let standing = standing(self.newest.as_ref(), at).await?;
        let objections = plan.objections(&super::plan::plan(&later, self.policy, at, &standing));
        if !objections.is_empty() {
            if self.decide(&fact, Decision::Withdrawn, "somebody needs some of it").await? == Decision::Withdrawn {
                self.revive(&ours).await?;
            }
            return Ok(Word::Withdrawn(objections));
        }
        self.confirm().await?;
        match self.decide(&fact, Decision::Confirmed, "nobody needs any of it").await? {
            // A decision nobody knows the announcement of any more would say nothing.
            Decision::Confirmed if self.archive.backend.stat(&key).await.map_err(CatalogError::from)?.is_some() => {
                Ok(Word::Stands)
            }
            // Whoever has withdrawn it sees to the rest.
            _ => Ok(Word::Withdrawn(vec!["another process has withdrawn the announcement".to_string()])),
        }
    }

    /// An earlier run has announced some of what goes, and may have ended before it was decided.
    async fn confirm_earlier(&self, inventory: &Inventory, plan: &Plan) -> Result<Word, Failure> {
        let goes = plan.removed_wal().next().is_some() || plan.removed_backups().next().is_some();
        if !goes {
            return Ok(Word::Stands);
        }
        self.confirm().await?;
        for fact in self.announcements_of(inventory).await? {
            let is_kept = fact.announcement().is_some_and(|id| plan.withdraw.contains(&format!("{id:016x}")));
            if is_kept || fact.announcement().is_none() {
                continue;
            }
            if self.decide(&fact, Decision::Confirmed, "carried out by a later run").await? == Decision::Withdrawn {
                return Ok(Word::Withdrawn(vec!["an earlier announcement was withdrawn meanwhile".to_string()]));
            }
        }
        Ok(Word::Stands)
    }

    async fn announcements_of(&self, inventory: &Inventory) -> Result<Vec<LedgerFact>, Failure> {
        let mut facts = Vec::new();
        for announcement in &inventory.announcements {
            facts.extend(fetch_json::<LedgerFact>(self.archive.backend.as_ref(), &announcement.key).await?);
        }
        Ok(facts)
    }

    /// Takes back what earlier runs have announced and the plan keeps. None of it was confirmed when the plan was made; where
    /// that is so by now, its deletes may be under way and nothing of it is taken back.
    async fn take_back(&self, inventory: &Inventory, plan: &Plan) -> Result<Word, Failure> {
        let revived: Vec<BackupId> =
            plan.backups.iter().filter(|it| it.fate == Fate::TakeBack).map(|it| it.id).collect();
        if revived.is_empty() && plan.withdraw.is_empty() {
            return Ok(Word::Stands);
        }
        self.confirm().await?;
        for fact in self.announcements_of(inventory).await? {
            if !fact.announcement().is_some_and(|id| plan.withdraw.contains(&format!("{id:016x}"))) {
                continue;
            }
            let why = "what it names has to stay";
            if self.decide(&fact, Decision::Withdrawn, why).await? == Decision::Confirmed {
                return Ok(Word::Withdrawn(vec!["an earlier announcement was confirmed meanwhile".to_string()]));
            }
        }
        self.revive(&revived).await?;
        Ok(Word::Stands)
    }

    async fn revive(&self, backups: &[BackupId]) -> Result<(), Failure> {
        for &id in backups {
            tracing::info!(backup = %id, "it is kept after all: dead.json is taken back");
            // Without a look at the lease: what is ours to take back is taken back by nobody else before the next run.
            self.archive.backend.delete(&self.archive.lineage.backup_dead(id)).await?;
        }
        Ok(())
    }

    fn ledger_key(&self, fact: &LedgerFact) -> Key {
        let random = fact.announcement().unwrap_or_default() as u32;
        self.archive.lineage.ledger_entry(fact.at, fact.kind.word(), random)
    }

    /// Decides about an announcement, unless it is decided; what is decided.
    async fn decide(&self, fact: &LedgerFact, decision: Decision, why: &str) -> Result<Decision, Failure> {
        let kind = match decision {
            Decision::Confirmed => FactKind::ExpiredConfirmed,
            Decision::Withdrawn => FactKind::ExpiredWithdrawn,
        };
        let announcement = fact.announcement().unwrap_or_default();
        let word = LedgerFact::new(kind, fact.at, why).with_announcement(announcement);
        let key = self.ledger_key(&word);
        match put_json_new(self.archive.backend.as_ref(), &key, &word).await {
            Ok(()) => return Ok(decision),
            Err(CatalogError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => {}
            Err(error) => return Err(error.into()),
        }
        let found: Option<LedgerFact> = fetch_json(self.archive.backend.as_ref(), &key).await?;
        match found.map(|found| found.kind) {
            Some(FactKind::ExpiredConfirmed) => Ok(Decision::Confirmed),
            Some(FactKind::ExpiredWithdrawn) | None => Ok(Decision::Withdrawn),
            Some(kind) => {
                let object = place(self.archive.backend.as_ref(), &key);
                let message = format!("object {object} should hold a decision of expire's, and holds {kind:?}");
                Err(Failure::new(ExitCode::Data, message).hint("was it changed by something other than seawall?"))
            }
        }
    }

    /// Creates the announcement; a name that is taken is another's, of the same microsecond and number.
    async fn create(&self, key: &Key, fact: &LedgerFact) -> Result<(), Failure> {
        match put_json_new(self.archive.backend.as_ref(), key, fact).await {
            Err(CatalogError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => {
                // Our own first try, if its answer was lost.
                let found: Option<LedgerFact> = fetch_json(self.archive.backend.as_ref(), key).await?;
                match found.as_ref() == Some(fact) {
                    true => Ok(()),
                    false => Err(error.into()),
                }
            }
            created => Ok(created?),
        }
    }
}

#[cfg(test)]
mod tests;
