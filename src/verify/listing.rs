//! Owns: reading what a lineage says it holds, one WAL directory at a time, so that one unreadable object hides no other.
//! Does not own: what is wrong with it (`quick.rs`), segments' and tails' content.

use std::collections::BTreeMap;
use std::time::Duration;

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::reader::{about_content, patiently, small};
use super::report::{Fault, FaultKind, Notes, Span};
use crate::catalog::contents::segment_span;
use crate::catalog::damage::damaged_now;
use crate::catalog::ledger::LedgerFact;
use crate::catalog::{Archive, Damage, DirectoryContents, Expired, LineageFile, SegmentObject, TailObject};
use crate::error::Failure;
use crate::repository::layout::{
    self, Epoch, IndexName, LeaseNumber, PinName, TailName, WalDirectory, WalObject, parse_history,
};
use crate::repository::{Entry, Key};
use crate::wal::{History, SegmentName, SegmentSize, TimelineId};

/// Small objects read at the same time.
const FETCHES: usize = 16;

/// Asks one lineage, patiently.
#[derive(Clone, Debug)]
pub struct Asker {
    pub archive: Archive,
    pub patience: Duration,
}

/// One WAL directory as it is now.
#[derive(Debug)]
pub struct Seen {
    /// Without what is expired.
    pub contents: DirectoryContents,
    /// Objects that say what others are, and cannot be read.
    pub faults: Vec<Fault>,
    /// Objects listed.
    pub objects: u64,
}

/// What is said about the WAL, and what is directly in `wal/`.
#[derive(Debug)]
pub struct Ground {
    pub file: LineageFile,
    pub ledger: Vec<LedgerFact>,
    pub expired: Expired,
    pub damages: Vec<Damage>,
    pub histories: BTreeMap<TimelineId, History>,
    pub directories: Vec<WalDirectory>,
    pub faults: Vec<Fault>,
    pub objects: u64,
}

impl Asker {
    pub fn below(&self, key: &Key) -> String {
        self.archive.lineage.below(key).unwrap_or(key.as_str()).to_string()
    }

    pub async fn list(&self, directory: &Key) -> Result<Vec<Entry>, Failure> {
        patiently(self.patience, || async { Ok(self.archive.backend.list(Some(directory)).await?) }).await
    }

    pub async fn stat(&self, key: &Key) -> Result<Option<u64>, Failure> {
        patiently(self.patience, || async { Ok(self.archive.backend.stat(key).await?) }).await
    }

    /// Everything but directories of WAL and backups. The ledger comes first: an expiry is announced before anything
    /// vanishes.
    pub async fn ground(&self, notes: &mut Notes) -> Result<Ground, Failure> {
        let file = patiently(self.patience, || self.archive.lineage_file()).await?;
        let (ledger, mut faults) = self.ledger(notes).await?;
        let mut objects = ledger.len() as u64 + 1;
        self.top(notes).await?;
        let listed = self.list(&self.archive.lineage.wal()).await?;
        let mut histories = BTreeMap::new();
        let mut directories = Vec::new();
        for entry in &listed {
            match entry {
                Entry::Directory(name) => match WalDirectory::parse(name) {
                    Some(directory) => directories.push(directory),
                    None => notes.add_unknown(format!("wal/{name}/")),
                },
                Entry::Object { name, .. } => match parse_history(name) {
                    None => notes.add_unknown(format!("wal/{name}")),
                    Some(timeline) => {
                        objects += 1;
                        match self.history(timeline).await? {
                            Ok(Some(history)) => drop(histories.insert(timeline, history)),
                            // Gone since it was listed: those without one are told below.
                            Ok(None) => {}
                            Err(fault) => {
                                let object = self.below(&self.archive.lineage.history(timeline));
                                faults.push(Fault::new(object, FaultKind::Record, fault));
                            }
                        }
                    }
                },
            }
        }
        directories.sort();
        objects += self.small_ones(&mut faults, notes).await?;
        let (expired, damages) = (Expired::of(&ledger), damaged_now(&ledger));
        Ok(Ground { file, ledger, expired, damages, histories, directories, faults, objects })
    }

    async fn history(&self, timeline: TimelineId) -> Result<Result<Option<History>, String>, Failure> {
        patiently(self.patience, || async {
            match self.archive.history(timeline).await {
                Ok(found) => Ok(Ok(found.map(|(_, history)| history))),
                Err(error) => about_content(error).map(Err),
            }
        })
        .await
    }

    async fn ledger(&self, notes: &mut Notes) -> Result<(Vec<LedgerFact>, Vec<Fault>), Failure> {
        let listed = self.list(&self.archive.lineage.ledger()).await?;
        let mut keys = Vec::new();
        for entry in &listed {
            match entry {
                Entry::Object { name, .. } if layout::ledger_kind(name).is_some() => {
                    keys.extend(self.archive.lineage.ledger_object(name));
                }
                Entry::Object { name, .. } => notes.add_unknown(format!("ledger/{name}")),
                Entry::Directory(name) => notes.add_unknown(format!("ledger/{name}/")),
            }
        }
        let read = stream::iter(keys).map(|key| async move {
            let fact = small::<LedgerFact>(&self.archive, &key, self.patience).await?;
            Ok::<_, Failure>((key, fact))
        });
        let read: Vec<_> = read.buffered(FETCHES).try_collect().await?;
        let (mut facts, mut faults) = (Vec::new(), Vec::new());
        for (key, fact) in read {
            match fact {
                Ok(fact) => facts.extend(fact),
                Err(fault) => faults.push(Fault::new(self.below(&key), FaultKind::Record, fault)),
            }
        }
        facts.sort_by_key(|fact| fact.at);
        Ok((facts, faults))
    }

    /// What lies beside what a lineage consists of.
    async fn top(&self, notes: &mut Notes) -> Result<(), Failure> {
        const DIRECTORIES: [&str; 6] = ["writers", "wal", "backups", "pins", "ledger", "lease"];
        for entry in self.list(&self.archive.lineage.directory()).await? {
            match entry {
                Entry::Directory(name) if !DIRECTORIES.contains(&name.as_str()) => {
                    notes.add_unknown(format!("{name}/"));
                }
                Entry::Object { name, .. } if name != "lineage.json" => notes.add_unknown(name),
                _ => {}
            }
        }
        Ok(())
    }

    /// Writers, the latest word on every pin, the lease that counts: readable. How many.
    async fn small_ones(&self, faults: &mut Vec<Fault>, notes: &mut Notes) -> Result<u64, Failure> {
        let lineage = &self.archive.lineage;
        let mut keys = Vec::new();
        let mut unknown = |directory: &str, entry: &Entry| match entry {
            Entry::Directory(name) => notes.add_unknown(format!("{directory}/{name}/")),
            Entry::Object { name, .. } => notes.add_unknown(format!("{directory}/{name}")),
        };
        for entry in self.list(&lineage.writers()).await? {
            match name_of(&entry).and_then(layout::parse_writer) {
                Some(epoch @ Epoch(_)) => keys.push(lineage.writer(epoch)),
                None => unknown("writers", &entry),
            }
        }
        let mut pins: BTreeMap<u64, PinName> = BTreeMap::new();
        for entry in self.list(&lineage.pins()).await? {
            match name_of(&entry).and_then(PinName::parse) {
                Some(name) => {
                    let latest = pins.entry(name.id).or_insert(name);
                    *latest = name.max(*latest);
                }
                None => unknown("pins", &entry),
            }
        }
        let mut lease = None;
        for entry in self.list(&lineage.leases()).await? {
            match name_of(&entry).and_then(LeaseNumber::parse) {
                Some(number) => lease = lease.max(Some(number)),
                None => unknown("lease", &entry),
            }
        }
        let (writers, pins): (Vec<Key>, Vec<Key>) = (keys, pins.into_values().map(|name| lineage.pin(name)).collect());
        let lease: Vec<Key> = lease.map(|number| lineage.lease(number)).into_iter().collect();
        let count = writers.len() + pins.len() + lease.len();
        self.readable::<crate::catalog::WriterFile>(writers, faults).await?;
        self.readable::<crate::catalog::PinFile>(pins, faults).await?;
        self.readable::<crate::catalog::LeaseFile>(lease, faults).await?;
        Ok(count as u64)
    }

    /// One that vanished meanwhile was replaced by the next.
    async fn readable<T: serde::de::DeserializeOwned + Send>(
        &self,
        keys: Vec<Key>,
        faults: &mut Vec<Fault>,
    ) -> Result<(), Failure> {
        let read = stream::iter(keys).map(|key| async move {
            let found = small::<T>(&self.archive, &key, self.patience).await?;
            Ok::<_, Failure>(found.err().map(|fault| Fault::new(self.below(&key), FaultKind::Record, fault)))
        });
        let found: Vec<Option<Fault>> = read.buffered(FETCHES).try_collect().await?;
        faults.extend(found.into_iter().flatten());
        Ok(())
    }

    /// Everything in one directory, whatever of it can be read.
    pub async fn directory(
        &self,
        directory: WalDirectory,
        size: SegmentSize,
        expired: &Expired,
        notes: &mut Notes,
    ) -> Result<Seen, Failure> {
        let listed = self.list(&self.archive.lineage.wal_directory(directory)).await?;
        let mut seen = Seen { contents: DirectoryContents::new(directory, size), faults: Vec::new(), objects: 0 };
        let mut tails = Vec::new();
        for entry in &listed {
            match entry {
                Entry::Object { name, bytes } => match known(name, directory, size) {
                    Some(object) => {
                        seen.objects += 1;
                        add(&mut seen.contents, object, *bytes);
                    }
                    None => notes.add_unknown(format!("wal/{directory}/{name}")),
                },
                Entry::Directory(name) => match known(name, directory, size) {
                    Some(WalObject::Tails(name)) => tails.push(name),
                    _ => notes.add_unknown(format!("wal/{directory}/{name}/")),
                },
            }
        }
        for name in tails {
            let found = self.tails(name, size, notes).await?;
            seen.objects += found.len() as u64;
            if !found.is_empty() {
                seen.contents.tails.insert(name, found);
            }
        }
        self.indexes(&mut seen, size).await?;
        seen.contents.subtract(expired);
        Ok(seen)
    }

    async fn tails(&self, name: SegmentName, size: SegmentSize, notes: &mut Notes) -> Result<Vec<TailObject>, Failure> {
        let directory = self.archive.lineage.tail_directory(name);
        let span = segment_span(name, size);
        let mut found = Vec::new();
        for entry in self.list(&directory).await? {
            let tail = name_of(&entry).and_then(TailName::parse);
            let inside =
                |tail: &TailName| span.as_ref().is_some_and(|span| span.start <= tail.from && tail.to <= span.end);
            match (&entry, tail.filter(inside)) {
                (Entry::Object { bytes, .. }, Some(name)) => found.push(TailObject { name, stored_bytes: *bytes }),
                (Entry::Object { name, .. }, None) => notes.add_unknown(format!("{}/{name}", self.below(&directory))),
                (Entry::Directory(name), _) => notes.add_unknown(format!("{}/{name}/", self.below(&directory))),
            }
        }
        Ok(found)
    }

    async fn indexes(&self, seen: &mut Seen, size: SegmentSize) -> Result<(), Failure> {
        let names: Vec<IndexName> = seen.contents.index_files.iter().map(|(name, _)| *name).collect();
        let read = stream::iter(names).map(|name| async move {
            let file = patiently(self.patience, || async {
                match self.archive.read_index(name, size).await {
                    Ok(file) => Ok(Ok(file)),
                    Err(error) => about_content(error).map(Err),
                }
            });
            Ok::<_, Failure>((name, file.await?))
        });
        let read: Vec<_> = read.buffered(FETCHES).try_collect().await?;
        for (name, file) in read {
            let fault = |what: String| {
                let object = self.below(&self.archive.lineage.index(name));
                let fault = Fault::new(object, FaultKind::Record, what);
                match (segment_span(name.first, size), segment_span(name.last, size)) {
                    (Some(first), Some(last)) => fault.of_wal(Span::new(name.first.timeline, first.start, last.end)),
                    _ => fault,
                }
            };
            match file {
                Err(what) => seen.faults.push(fault(what)),
                Ok(file) => {
                    let told = file.entries.iter().map(|entry| entry.segment);
                    if !told.eq(names_between(name, size)) {
                        seen.faults
                            .push(fault("it does not describe every segment from its first to its last, once".into()));
                    }
                    file.entries.into_iter().for_each(|entry| seen.contents.add_entry(entry));
                }
            }
        }
        Ok(())
    }
}

fn names_between(name: IndexName, size: SegmentSize) -> impl Iterator<Item = SegmentName> {
    let number = |name: SegmentName| name.number(size).map_or(0, |number| number.0);
    let timeline = name.first.timeline;
    (number(name.first)..=number(name.last))
        .map(move |number| SegmentName::new(timeline, crate::wal::SegmentNumber(number), size))
}

fn name_of(entry: &Entry) -> Option<&str> {
    match entry {
        Entry::Object { name, .. } => Some(name),
        Entry::Directory(_) => None,
    }
}

/// What a name in a directory is, where it belongs there.
fn known(name: &str, directory: WalDirectory, size: SegmentSize) -> Option<WalObject> {
    let object = WalObject::parse(name)?;
    let (WalObject::Segment(segment, _)
    | WalObject::Conflict(segment, ..)
    | WalObject::Repair(segment, ..)
    | WalObject::RawMarker(segment, _)
    | WalObject::Tails(segment)
    | WalObject::Index(IndexName { first: segment, .. })) = object;
    (WalDirectory::of(segment) == directory && segment_span(segment, size).is_some()).then_some(object)
}

fn add(contents: &mut DirectoryContents, object: WalObject, bytes: u64) {
    let stored = |form| SegmentObject { form, stored_bytes: bytes };
    match object {
        WalObject::Segment(name, form) => contents.segments.entry(name).or_default().push(stored(form)),
        WalObject::Index(index) => contents.index_files.push((index, bytes)),
        WalObject::Conflict(name, crc, form) => contents.conflicts.entry(name).or_default().push((crc, stored(form))),
        WalObject::Repair(name, crc, form) => contents.repairs.entry(name).or_default().push((crc, stored(form))),
        WalObject::RawMarker(name, crc) => contents.raw_markers.entry(name).or_default().push(crc),
        WalObject::Tails(_) => {} // an object by a directory's name
    }
}
