//! Whether a repository holds what it says, and says what it holds.
//!
//! Owns: one run over one lineage in one repository: the order of work, the second look at every fault, what the ledger
//! is told, going on where an unfinished run stopped.
//! Does not own: which repositories (`cli/verify.rs`), when (`agent/verify.rs`), mending (`agent`).
//!
//! ```text
//!  quick:  ledger, histories ─▶ directory by directory: objects against index ─▶ holes ─▶ backups: objects against backup.json
//!  sample: a share of segments and volumes ─▶ stored and raw checksums
//!  full:   every segment and tail, in order: checksums, one chain of records, the index's word on it
//!          every backup: manifest, volumes taken apart, each file's checksum
//! ```
//!
//! A directory of WAL, or a manifest, is what is in memory at a time. A fault is looked at twice before it is believed: a
//! living archive changes while it is looked at. Nothing but facts in the ledger is ever written.

mod backups;
mod chain;
mod content;
mod files;
mod listing;
mod pace;
mod quick;
mod reader;
pub mod record;
pub mod report;
mod wal;

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::catalog::ledger::LedgerFact;
use crate::catalog::{Archive, BackupFile};
use crate::error::{ExitCode, Failure};
use crate::repository::layout::{BackupId, Part, WalObject};
use content::Object;
use listing::{Asker, Ground};
pub use pace::Pace;
use quick::Survey;
use record::{Mode, Position, VerifyRecord};
use report::{Counts, Fault, FaultKind, Notes, Report, Span, explain};

/// Facts about damage one run may write: beyond that it is no single damage any more, and the ledger would drown in it.
const DAMAGED_FACTS_MAX: usize = 1000;
/// How far a run came is written down after so long, then after twice as long each time, up to a limit: neither a short
/// run nor a long one writes many, and neither loses much.
const NOTE_INTERVAL: Duration = Duration::from_secs(10);
const NOTE_INTERVAL_MAX: Duration = Duration::from_secs(600);
/// An older run that was not finished says little of what is there now.
const RESUME_WITHIN: SignedDuration = SignedDuration::from_hours(7 * 24);

/// What time it is.
#[derive(Clone)]
pub struct Now(pub Arc<dyn Fn() -> Timestamp + Send + Sync>);

impl Default for Now {
    fn default() -> Now {
        Now(Arc::new(Timestamp::now))
    }
}

impl std::fmt::Debug for Now {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Now")
    }
}

#[derive(Clone, Debug)]
pub struct VerifyOptions {
    pub mode: Mode,
    /// In `sample` mode: the share of objects that is read, 0 to 1.
    pub share: f64,
    /// Which ones: another number, others.
    pub seed: u64,
    pub pace: Pace,
    /// How long a store that does not answer is asked again.
    pub patience: Duration,
    /// Before a fault is looked at again.
    pub second_look: Duration,
    /// A full run begins anew, whatever an unfinished one has read.
    pub restart: bool,
    /// No other repository of the cluster may hold what this one lacks.
    pub is_alone: bool,
    pub now: Now,
    pub note_interval: Duration,
}

impl Default for VerifyOptions {
    fn default() -> VerifyOptions {
        VerifyOptions {
            mode: Mode::Quick,
            share: 0.05,
            seed: 0,
            pace: Pace::default(),
            patience: Duration::from_secs(30),
            second_look: Duration::from_secs(2),
            restart: false,
            is_alone: true,
            now: Now::default(),
            note_interval: NOTE_INTERVAL,
        }
    }
}

/// How far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    pub is_reading: bool,
    /// Stored bytes.
    pub done: u64,
    pub total: u64,
    pub faults: u64,
}

/// What came of a run. With a failure it is not complete: the store gave out.
#[derive(Debug)]
pub struct Outcome {
    pub report: Report,
    pub failure: Option<Failure>,
}

/// Looks at one lineage in one repository.
pub async fn verify(archive: &Archive, options: &VerifyOptions, progress: &watch::Sender<Progress>) -> Outcome {
    let mut run = Run::new(archive, options, progress);
    let failure = run.all().await.err();
    if failure.is_some() {
        // What was found counts, and whoever comes next goes on from here.
        run.note_unfinished().await;
    }
    run.into_outcome(failure)
}

/// One run under way.
#[derive(Debug)]
struct Run<'a> {
    asker: Asker,
    options: &'a VerifyOptions,
    progress: &'a watch::Sender<Progress>,
    record: VerifyRecord,
    /// What an earlier run has read.
    behind: Option<Position>,
    resumed: Option<Timestamp>,
    counts: Counts,
    /// Of earlier parts of this run.
    before: (u64, u64),
    notes: Notes,
    faults: Vec<Fault>,
    complete: Vec<BackupFile>,
    ledger: Vec<LedgerFact>,
    /// Damage the ledger knew of, by path.
    known: BTreeSet<String>,
    /// Of these, what was read and is sound.
    healed: BTreeSet<String>,
    facts_written: usize,
    unrecorded: Option<String>,
    noted: Instant,
    note_interval: Duration,
}

/// What a quick look came to.
struct Quick {
    ground: Ground,
    faults: Vec<Fault>,
    shelf: backups::Shelf,
    notes: Notes,
    counts: Counts,
    /// Stored bytes of what there is to read.
    total: u64,
    /// Objects the ledger calls damaged, and which still count for something.
    standing: BTreeSet<String>,
}

impl<'a> Run<'a> {
    fn new(archive: &Archive, options: &'a VerifyOptions, progress: &'a watch::Sender<Progress>) -> Run<'a> {
        let record = VerifyRecord {
            run: format!("{:016x}", fastrand::u64(..)),
            mode: options.mode,
            started: (options.now.0)(),
            finished: None,
            complete: false,
            objects: 0,
            bytes: 0,
            faults: 0,
            through: None,
        };
        Run {
            asker: Asker { archive: archive.clone(), patience: options.patience },
            options,
            progress,
            record,
            behind: None,
            resumed: None,
            counts: Counts::default(),
            before: (0, 0),
            notes: Notes::default(),
            faults: Vec::new(),
            complete: Vec::new(),
            ledger: Vec::new(),
            known: BTreeSet::new(),
            healed: BTreeSet::new(),
            facts_written: 0,
            unrecorded: None,
            noted: Instant::now(),
            note_interval: options.note_interval,
        }
    }

    fn now(&self) -> Timestamp {
        (self.options.now.0)()
    }

    async fn all(&mut self) -> Result<(), Failure> {
        let mut quick = self.quick().await?;
        let first: BTreeSet<String> = quick.faults.iter().map(|fault| fault.object.clone()).collect();
        if !first.is_empty() {
            self.pause().await;
            quick = self.quick().await?;
            quick.faults.retain(|fault| first.contains(&fault.object));
        }
        let Quick { ground, faults, shelf, notes, counts, total, standing } = quick;
        self.counts = Counts { bytes: self.counts.bytes, ..counts };
        self.notes = notes;
        self.ledger = ground.ledger.clone();
        self.known = ground.damages.iter().map(|damage| damage.object.clone()).collect();
        self.complete = shelf.complete;
        for fault in faults {
            self.found(fault).await?;
        }
        if self.options.mode != Mode::Quick {
            self.resume();
            self.progress.send_modify(|progress| (progress.is_reading, progress.total) = (true, total));
            self.read_wal(&ground).await?;
            for file in self.complete.clone() {
                self.read_backup(&file).await?;
            }
        }
        self.settle_known(&ground, &standing).await?;
        self.record.complete = true;
        self.record.finished = Some(self.now());
        self.write_record().await
    }

    /// Everything that can be told without reading large objects.
    async fn quick(&mut self) -> Result<Quick, Failure> {
        let mut notes = Notes::default();
        let ground = self.asker.ground(&mut notes).await?;
        let size = ground.file.segment_size;
        let mut survey = Survey::new(&self.asker.archive.lineage, self.asker.archive.form());
        let mut faults = ground.faults.clone();
        let mut counts = Counts { objects: ground.objects, ..Counts::default() };
        let (mut total, mut standing) = (0, BTreeSet::new());
        for &directory in &ground.directories {
            let seen = self.asker.directory(directory, size, &ground.expired, &mut notes).await?;
            counts.objects += seen.objects;
            total += seen.contents.entries.values().map(|entry| entry.stored_bytes).sum::<u64>();
            standing.extend(wal::standing(&seen.contents, &ground.damages));
            faults.extend(survey.add(&seen, &mut notes));
        }
        counts.segments = survey.segments;
        let (more, coverage) = survey.finish(&ground, self.options.is_alone, &mut notes);
        faults.extend(more);
        let shelf = self.asker.backups(&coverage, &mut notes).await?;
        faults.extend(shelf.faults.iter().cloned());
        counts.objects += shelf.objects;
        counts.backups = shelf.complete.len() as u64;
        counts.volumes = shelf.complete.iter().map(|file| file.volumes.len() as u64).sum();
        let stored = shelf.complete.iter().flat_map(|file| backups::objects(&self.asker, file));
        total += stored.map(|object| object.stored_bytes).sum::<u64>();
        let told: BTreeSet<&String> = faults.iter().map(|fault| &fault.object).collect();
        let readable = |file: &&BackupFile| {
            let manifest = self.asker.below(&self.asker.archive.lineage.backup_manifest(file.id));
            !told.contains(&manifest)
        };
        let readable: Vec<BackupFile> = shelf.complete.iter().filter(readable).cloned().collect();
        // A full run reads them anyway.
        if self.options.mode != Mode::Full {
            faults.extend(self.manifests(&readable).await?);
        }
        for damage in ground.damages.iter().filter(|damage| damage.backup.is_some_and(|id| shelf.ids.contains(&id))) {
            standing.insert(damage.object.clone());
        }
        Ok(Quick { ground, faults, shelf, notes, counts, total, standing })
    }

    /// Goes on behind what an unfinished full run has read.
    fn resume(&mut self) {
        if self.options.mode != Mode::Full || self.options.restart {
            return;
        }
        let since = self.now().checked_sub(RESUME_WITHIN).unwrap_or(Timestamp::MIN);
        let Some(earlier) = record::unfinished(&self.ledger, since) else { return };
        self.behind = earlier.position();
        self.resumed = Some(earlier.started);
        self.before = (earlier.objects, earlier.bytes);
        let through = earlier.through.as_deref().unwrap_or_default();
        self.notes.add(format!("goes on behind {through}, which the run of {} had come to", earlier.started));
        self.record = VerifyRecord { faults: 0, ..earlier };
    }

    /// A fault that is believed. The ledger is told of damage, once.
    async fn found(&mut self, fault: Fault) -> Result<(), Failure> {
        tracing::debug!(object = fault.object, "fault: {}", fault.what);
        if self.is_told(&fault.object) {
            return Ok(());
        }
        let is_news = fault.is_damage() && !self.known.contains(&fault.object);
        if is_news {
            if self.facts_written == DAMAGED_FACTS_MAX {
                self.notes.add(format!("the ledger is told of the first {DAMAGED_FACTS_MAX} damaged objects only"));
            }
            self.facts_written += 1;
            if self.facts_written <= DAMAGED_FACTS_MAX {
                let fact = LedgerFact::damaged(&self.ledger, self.now(), &fault.object, &fault.what);
                self.append(fact).await?;
            }
        }
        self.faults.push(fault);
        self.progress.send_modify(|progress| progress.faults += 1);
        Ok(())
    }

    fn is_told(&self, object: &str) -> bool {
        self.faults.iter().any(|fault| fault.object == object)
    }

    fn is_told_of(&self, id: BackupId) -> bool {
        self.faults.iter().any(|fault| fault.backup == Some(id))
    }

    /// What the ledger calls damaged and this run did not find so: it is whole again, or was not looked at.
    async fn settle_known(&mut self, ground: &Ground, standing: &BTreeSet<String>) -> Result<(), Failure> {
        for damage in &ground.damages {
            if let Some(fault) = self.faults.iter_mut().find(|fault| fault.object == damage.object) {
                fault.known_since = Some(damage.at);
                continue;
            }
            // Small ones are read by every run.
            let is_small = matches!(damage.part(), Part::History(_) | Part::Wal(WalObject::Index(_)) | Part::Other);
            if self.healed.contains(&damage.object) || is_small {
                let how = format!("verify --{} found nothing wrong with it", self.options.mode);
                let fact = LedgerFact::mended(&self.ledger, self.now(), &damage.object, &how, "verify");
                self.append(fact).await?;
            } else if standing.contains(&damage.object) {
                let what = format!("{}; nothing has read it since", damage.fault);
                let mut fault = Fault::new(&damage.object, FaultKind::Content, what);
                fault.known_since = Some(damage.at);
                fault.backup = damage.backup;
                let size = ground.file.segment_size;
                let span = damage.segment.and_then(|name| {
                    let span = crate::catalog::contents::segment_span(name, size)?;
                    Some(Span::new(name.timeline, span.start, span.end))
                });
                fault.wal = span;
                self.faults.push(fault);
            }
        }
        Ok(())
    }

    /// An object was read.
    fn read(&mut self, object: &Object, is_sound: bool) {
        self.counts.bytes += object.stored_bytes;
        self.advance(object.stored_bytes);
        if is_sound && self.known.contains(&object.below) {
            self.healed.insert(object.below.clone());
        }
    }

    fn advance(&self, bytes: u64) {
        self.progress.send_modify(|progress| progress.done += bytes);
    }

    /// Whether an object is among those that are read.
    fn is_chosen(&self, below: &str) -> bool {
        match self.options.mode {
            Mode::Quick => false,
            Mode::Full => true,
            Mode::Sample => {
                let mut hasher = DefaultHasher::new();
                (self.options.seed, below).hash(&mut hasher);
                // The upper 53 bits, as a fraction.
                ((hasher.finish() >> 11) as f64 / (1_u64 << 53) as f64) < self.options.share
            }
        }
    }

    async fn pause(&self) {
        tokio::time::sleep(self.options.second_look).await;
    }

    /// Everything up to this object was read. Written down now and then.
    async fn note_progress(&mut self, below: &str) -> Result<(), Failure> {
        self.record.through = Some(below.to_string());
        if self.options.mode != Mode::Full || self.noted.elapsed() < self.note_interval {
            return Ok(());
        }
        self.note_interval = (self.note_interval * 2).min(NOTE_INTERVAL_MAX);
        self.noted = Instant::now();
        self.write_record().await
    }

    async fn note_unfinished(&mut self) {
        if self.options.mode == Mode::Full && self.record.through.is_some() && !self.record.complete {
            let _ = self.write_record().await;
        }
    }

    async fn write_record(&mut self) -> Result<(), Failure> {
        let (objects, bytes) = self.before;
        self.record.objects = objects.max(self.counts.objects);
        self.record.bytes = bytes + self.counts.bytes;
        self.record.faults = self.faults.len() as u64;
        self.append(self.record.to_fact(self.now())).await
    }

    /// Where nothing may be written, nothing is: what was found is found all the same.
    async fn append(&mut self, fact: LedgerFact) -> Result<(), Failure> {
        if self.unrecorded.is_some() {
            return Ok(());
        }
        let appended = reader::patiently(self.options.patience, || async {
            self.asker.archive.append_ledger(&fact, fastrand::u32(..)).await
        });
        match appended.await {
            Ok(()) => {
                self.ledger.push(fact);
                Ok(())
            }
            Err(failure) if failure.exit_code == ExitCode::Permission => {
                self.unrecorded = Some(failure.message);
                Ok(())
            }
            Err(failure) => Err(failure),
        }
    }

    fn into_outcome(self, failure: Option<Failure>) -> Outcome {
        let mut faults = self.faults;
        faults.sort_by(|one, other| (&one.object, one.kind).cmp(&(&other.object, other.kind)));
        let report = Report {
            run: self.record.run,
            mode: self.options.mode,
            started: self.record.started,
            finished: self.record.finished,
            complete: self.record.complete,
            counts: self.counts,
            findings: faults.into_iter().map(|fault| explain(fault, &self.complete)).collect(),
            notes: self.notes,
            resumed: self.resumed,
            unrecorded: self.unrecorded,
        };
        Outcome { report, failure }
    }
}

#[cfg(test)]
mod tests;
