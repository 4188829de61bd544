//! What the ledgers call damaged is made whole again: from another repository of the cluster, else from the server while
//! it still has the WAL; what nobody has is said to be a gap.
//!
//! Owns: what is tried and in which order, what the ledger is told of it. Nothing is remembered: all of it follows from
//! the ledgers.
//! Does not own: finding damage (`verify`), how bytes get there (`archiver::mend`), the backup behind a gap (`backup/keeper.rs`).
//! Rests on `proto-notes/07-repository-format.md`, "Damage and repairs".
//!
//! One object after the other, each only while the stream has memory to spare. Writing beside a damaged segment needs no
//! leave: the name of a repair says what it holds. Deleting a damaged object does: that is done under the lease.

mod objects;
mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::backup::Place;
use super::cluster::{State, Status};
use super::session::{RepositoryState, Watched};
use super::startup;
use super::world::{ClusterOptions, World};
use crate::archiver::copy::{self, Trouble};
use crate::archiver::{ArchiveError, StoreHealth, Writer, mend};
use crate::catalog::contents::segment_span;
use crate::catalog::damage::{Damage, damaged_now};
use crate::catalog::index::IndexEntry;
use crate::catalog::ledger::{Expired, FactKind, LedgerFact};
use crate::error::Failure;
use crate::repository::StoreErrorKind;
use crate::repository::layout::{BackupId, Epoch, Part, WalObject};
use crate::wal::{SegmentName, SegmentSize};
use server::{Asked, Servers};

/// Between two looks at the ledgers.
const LOOK_INTERVAL: Duration = Duration::from_secs(120);
/// What nobody had is asked for again after this: a repository may come back, or be restored by hand.
const ASK_AGAIN: Duration = Duration::from_secs(3600);
/// One object must not hold up the others for ever: a store that is away may be so for days.
const OBJECT_DEADLINE: Duration = Duration::from_secs(3600);
/// How long one object may be held up by a stream that waits for memory.
const YIELD_MAX: Duration = Duration::from_secs(60);
const YIELD_STEP: Duration = Duration::from_millis(250);

/// What others may know of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MendFacts {
    /// Objects that are damaged now, in all repositories.
    pub open: usize,
    /// One of them, and why it is not whole yet.
    pub first: Option<String>,
    /// Backups that nothing here can make whole, by the repository's place in the configuration.
    pub lost: BTreeSet<(usize, BackupId)>,
}

/// What came of one damaged object.
enum Outcome {
    /// How, and by whom.
    Mended(String, String),
    /// Nobody has it any more, and why.
    Lost(String),
    /// Why it is tried again.
    Later(String),
}

/// Sees to it that what is damaged in one cluster's repositories does not stay so.
#[derive(Debug)]
pub struct Mender {
    world: World,
    options: ClusterOptions,
    status: watch::Receiver<Status>,
    stop: CancellationToken,
    /// Somebody has found damage.
    nudged: Arc<Notify>,
    /// Something is known to be lost: a backup may be due.
    lost: Arc<Notify>,
    facts: watch::Sender<MendFacts>,
    /// When an object was found to be nobody's: by repository and object.
    given_up: BTreeMap<(usize, String), Instant>,
    /// What was said of an object last.
    said: BTreeMap<(usize, String), String>,
}

impl Mender {
    /// `nudged` has it look at once; it notifies `lost`.
    pub fn new(
        world: World,
        options: ClusterOptions,
        status: watch::Receiver<Status>,
        (nudged, lost): (Arc<Notify>, Arc<Notify>),
        stop: CancellationToken,
    ) -> (Mender, watch::Receiver<MendFacts>) {
        let (facts, watching) = watch::channel(MendFacts::default());
        let (given_up, said) = (BTreeMap::new(), BTreeMap::new());
        (Mender { world, options, status, stop, nudged, lost, facts, given_up, said }, watching)
    }

    /// Until told to stop. May be dropped at any await: every object is whole or has no name.
    pub async fn run(mut self) {
        let stop = self.stop.clone();
        let nudged = self.nudged.clone();
        let round = async {
            loop {
                let ready = |status: &Status| status.state == State::Streaming && status.watched.is_some();
                let watched = match self.status.wait_for(ready).await {
                    Ok(status) => status.watched.clone(),
                    Err(_) => return,
                };
                if let Some(watched) = watched {
                    self.round(&watched).await;
                }
                tokio::select! {
                    () = tokio::time::sleep(LOOK_INTERVAL) => {}
                    () = nudged.notified() => {}
                }
            }
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = round => {}
        }
    }

    /// One look at every ledger, and what can be done about what it says.
    async fn round(&mut self, watched: &Watched) {
        let is_there = |place: &Place| {
            let repository = watched.repositories.get(place.index);
            repository.is_some_and(|repository| !matches!(repository.state(), RepositoryState::Absent(_)))
        };
        let places: Vec<Place> = watched.opened.iter().map(Place::from).filter(is_there).collect();
        let mut facts = MendFacts::default();
        for place in &places {
            if let Err(failure) = self.look(watched, &places, place, &mut facts).await {
                tracing::debug!(cluster = self.options.name, repository = place.name, %failure, "damage is looked for later");
            }
        }
        let has_lost = facts.lost != self.facts.borrow().lost;
        self.facts.send_if_modified(|known| {
            let is_new = *known != facts;
            *known = facts;
            is_new
        });
        if has_lost {
            self.lost.notify_one();
        }
    }

    async fn look(
        &mut self,
        watched: &Watched,
        places: &[Place],
        place: &Place,
        facts: &mut MendFacts,
    ) -> Result<(), Failure> {
        let ledger = place.archive.ledger().await?;
        let damages = damaged_now(&ledger);
        if damages.is_empty() {
            return Ok(());
        }
        let segment_size = place.archive.lineage_file().await?.segment_size;
        let case =
            Case { watched, places, place, segment_size, is_complete: places.len() == self.world.repositories.len() };
        for damage in damages {
            let known = (place.index, damage.object.clone());
            if self.given_up.get(&known).is_none_or(|since| since.elapsed() >= ASK_AGAIN) {
                give_way(watched).await;
                let outcome = match tokio::time::timeout(OBJECT_DEADLINE, self.mend(&case, &damage)).await {
                    Ok(Ok(outcome)) => outcome,
                    Ok(Err(trouble)) => {
                        given_up(&damage, &trouble).unwrap_or_else(|| Outcome::Later(trouble.to_string()))
                    }
                    Err(_) => Outcome::Later(format!("it was not done within {OBJECT_DEADLINE:?}")),
                };
                if self.conclude(&case, &damage, outcome).await? {
                    continue;
                }
            }
            if let Some(backup) = damage.backup.filter(|_| self.given_up.contains_key(&known)) {
                facts.lost.insert((place.index, backup));
            }
            facts.open += 1;
            let why = self.said.get(&known).map_or(damage.fault.as_str(), String::as_str);
            facts.first.get_or_insert_with(|| format!("{} in repository {}: {why}", damage.object, place.name));
        }
        Ok(())
    }

    async fn mend(&self, case: &Case<'_>, damage: &Damage) -> Result<Outcome, Trouble> {
        let target = self.writer(case.place);
        match damage.part() {
            Part::Wal(WalObject::Segment(name, _)) => self.mend_segment(case, &target, name).await,
            Part::Wal(WalObject::Repair(name, ..)) => {
                // It is of no use, and its name is wanted. Until then the ledger says that the segment is damaged.
                self.delete(case, &target, damage).await?;
                self.mend_segment(case, &target, name).await
            }
            Part::Tail(name, tail) => self.mend_tail(case, &target, name, &tail).await,
            Part::History(timeline) => self.mend_history(case, &target, timeline).await,
            Part::Volume(id, ..) | Part::Backup(id) => self.mend_backup(case, &target, id, damage).await,
            Part::Wal(_) | Part::Other => Ok(Outcome::Lost("nothing else has what it held".to_string())),
        }
    }

    /// No epoch is needed: nothing is written but what the index says is there.
    fn writer(&self, place: &Place) -> Writer {
        Writer::new(place.archive.clone(), Epoch::default(), StoreHealth::default(), self.stop.clone())
    }

    async fn mend_segment(&self, case: &Case<'_>, target: &Writer, name: SegmentName) -> Result<Outcome, Trouble> {
        let archive = &case.place.archive;
        let ledger = target.retry(|| archive.ledger()).await?;
        if Expired::of(&ledger).contains(name) {
            return Ok(Outcome::Mended("it is expired, and promised no more".to_string(), case.place.id.clone()));
        }
        let contents = target.retry(|| archive.directory_around(name, case.segment_size)).await?;
        if contents.disputed.contains_key(&name) {
            return Ok(Outcome::Lost("the index holds two contents for its name".to_string()));
        }
        let Some(entry) = contents.entries.get(&name).cloned() else {
            return Ok(Outcome::Later("no index entry says what it should hold".to_string()));
        };
        if mend::is_whole(target, name, case.segment_size, &entry).await? {
            return Ok(Outcome::Mended("it, or its repair, reads well".to_string(), case.place.id.clone()));
        }
        let (copied, mut unsure) = self.copy_segment(case, target, &entry).await?;
        if let Some(source) = copied {
            return Ok(Outcome::Mended("copied from another repository".to_string(), source));
        }
        if !case.is_complete {
            unsure = unsure.or(Some("not every repository is there to be asked".to_string()));
        }
        let servers = match Servers::new(&self.world, archive.lineage.system_id, &case.watched.address) {
            Ok(servers) => servers,
            Err(failure) => return Ok(Outcome::Later(failure.to_string())),
        };
        Ok(match (servers.segment(target, &entry).await?, unsure) {
            (Asked::Got((), host), _) => Outcome::Mended("received from the server once more".to_string(), host),
            (Asked::Unknown(why), _) | (Asked::Gone(_), Some(why)) => Outcome::Later(why),
            (Asked::Gone(why), None) => Outcome::Lost(why),
        })
    }

    /// From the first other repository that has it good: its id. Else why that is not the last word.
    async fn copy_segment(
        &self,
        case: &Case<'_>,
        target: &Writer,
        entry: &IndexEntry,
    ) -> Result<(Option<String>, Option<String>), Trouble> {
        let mut unsure = None;
        for source in case.others() {
            match self.copy_segment_from(case, target, source, entry).await {
                Ok(true) => return Ok((Some(source.id.clone()), None)),
                Ok(false) => {}
                Err(Trouble::Damaged(what)) => {
                    tracing::warn!(repository = source.name, what, "this repository's copy is damaged too");
                }
                Err(trouble @ Trouble::Target(_)) => return Err(trouble),
                Err(trouble) => unsure = Some(trouble.to_string()),
            }
        }
        Ok((None, unsure))
    }

    async fn copy_segment_from(
        &self,
        case: &Case<'_>,
        target: &Writer,
        source: &Place,
        entry: &IndexEntry,
    ) -> Result<bool, Trouble> {
        let (name, size) = (entry.segment, case.segment_size);
        let contents = copy::ask(source.archive.directory_around(name, size)).await?;
        let Some(theirs) = contents.entries.get(&name) else { return Ok(false) };
        if theirs.raw_crc32 != entry.raw_crc32 {
            let (ours, theirs) = (entry.raw_crc32.0, theirs.raw_crc32.0);
            tracing::error!(
                segment = %name, repository = source.name, "another content is archived there: raw CRC-32 {theirs:08x}, not {ours:08x}"
            );
            return Ok(false);
        }
        for original in copy::originals(&source.archive, name, size, theirs).await? {
            match mend::copy_segment(target, &source.archive, &original, entry).await {
                Err(Trouble::Damaged(what)) => {
                    tracing::warn!(repository = source.name, what, "this repository's copy is damaged too");
                }
                copied => return copied.map(|()| true),
            }
        }
        Ok(false)
    }

    /// Tells the ledger, and people; whether the object is whole now.
    async fn conclude(&mut self, case: &Case<'_>, damage: &Damage, outcome: Outcome) -> Result<bool, Failure> {
        let (cluster, repository, object) = (&self.options.name, &case.place.name, &damage.object);
        let known = (case.place.index, object.clone());
        let archive = &case.place.archive;
        match outcome {
            Outcome::Mended(how, by) => {
                let ledger = archive.ledger().await?;
                let fact = LedgerFact::mended(&ledger, self.world.clock.now(), object, &how, &by);
                archive.append_ledger(&fact, self.world.random_u32()).await?;
                if let Some(name) = damage.segment {
                    self.record_healed(case, name, &ledger, &by).await?;
                }
                tracing::info!(cluster, repository, object, how, by, "what was damaged is whole again");
                self.given_up.remove(&known);
                self.said.remove(&known);
                return Ok(true);
            }
            Outcome::Lost(why) => {
                if self.said.get(&known) != Some(&why) {
                    tracing::error!(
                        cluster,
                        repository,
                        object,
                        fault = damage.fault,
                        "damaged, and nobody has it any more: {why}"
                    );
                }
                if let Some(name) = damage.segment.filter(|_| matches!(damage.part(), Part::Wal(_))) {
                    self.record_gap(case, name, &format!("damaged: {}; {why}", damage.fault)).await?;
                }
                self.given_up.insert(known.clone(), Instant::now());
                self.said.insert(known, why);
            }
            Outcome::Later(why) => {
                if self.said.get(&known) != Some(&why) {
                    tracing::warn!(
                        cluster,
                        repository,
                        object,
                        fault = damage.fault,
                        "damaged, and not whole yet: {why}"
                    );
                }
                self.said.insert(known, why);
            }
        }
        Ok(false)
    }

    /// The WAL is gone from here: that is a gap, and a backup behind it is due.
    async fn record_gap(&self, case: &Case<'_>, name: SegmentName, cause: &str) -> Result<(), Failure> {
        let Some(span) = segment_span(name, case.segment_size) else { return Ok(()) };
        let fact = LedgerFact::new(FactKind::Gap, self.world.clock.now(), cause);
        let fact = fact.about(name.timeline, span.start, span.end);
        startup::record_once(&self.world, &case.place.archive, fact).await?;
        self.lost.notify_one();
        Ok(())
    }

    /// A gap that was recorded when nobody had the segment is none any more.
    async fn record_healed(
        &self,
        case: &Case<'_>,
        name: SegmentName,
        ledger: &[LedgerFact],
        by: &str,
    ) -> Result<(), Failure> {
        let Some(span) = segment_span(name, case.segment_size) else { return Ok(()) };
        let is_its = |fact: &LedgerFact, kind| {
            (fact.kind, fact.timeline, fact.from_lsn, fact.to_lsn)
                == (kind, Some(name.timeline), Some(span.start), Some(span.end))
        };
        if !ledger.iter().any(|fact| is_its(fact, FactKind::Gap)) {
            return Ok(());
        }
        let mut fact = LedgerFact::new(FactKind::GapHealed, self.world.clock.now(), "the segment is whole again");
        fact.healed_by = Some(by.to_string());
        startup::record_once(&self.world, &case.place.archive, fact.about(name.timeline, span.start, span.end)).await
    }
}

/// What one damaged object is seen beside.
#[derive(Debug)]
struct Case<'a> {
    watched: &'a Watched,
    /// The repositories that are there.
    places: &'a [Place],
    /// Where it is damaged.
    place: &'a Place,
    segment_size: SegmentSize,
    /// Every configured repository is there: what none of them holds, none holds.
    is_complete: bool,
}

impl Case<'_> {
    fn others(&self) -> impl Iterator<Item = &Place> {
        self.places.iter().filter(|other| other.index != self.place.index)
    }
}

/// What trying again does not change: nothing of a backup may be deleted there, and so nothing replaced.
fn given_up(damage: &Damage, trouble: &Trouble) -> Option<Outcome> {
    let Trouble::Target(ArchiveError::Store(error)) = trouble else { return None };
    let is_final = damage.backup.is_some() && error.is(StoreErrorKind::PermissionDenied);
    is_final.then(|| Outcome::Lost(format!("it cannot be replaced: {error}")))
}

/// The live stream goes first: memory in use means that it waits for a store.
async fn give_way(watched: &Watched) {
    let mut waited = Duration::ZERO;
    while watched.memory.held_bytes() >= watched.memory.limit_bytes() / 4 && waited < YIELD_MAX {
        tokio::time::sleep(YIELD_STEP).await;
        waited += YIELD_STEP;
    }
}
