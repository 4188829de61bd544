//! Owns: from what is there of a lineage in one repository to an [`Inventory`], directory by directory.
//! Does not own: the listings (`catalog/store/inventory.rs`), what follows (`plan.rs`).

use std::collections::{BTreeMap, BTreeSet};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use jiff::Timestamp;

use super::inventory::{Announcement, Debris, DebrisKind, HeldBackup, HeldIndex, HeldPin, HeldSegment, Inventory};
use crate::catalog::backup::{BackupFile, BackupRecord, PinFile};
use crate::catalog::contents::{DirectoryContents, segment_span};
use crate::catalog::damage::Damages;
use crate::catalog::digest::{Digest, Indexed};
use crate::catalog::ledger::{self, ANNOUNCEMENT, Expired, FactKind, LedgerFact};
use crate::catalog::shelf::{self, Outcome};
use crate::catalog::store::inventory::HeldObject;
use crate::catalog::{Archive, CatalogError};
use crate::repository::Key;
use crate::repository::layout::{BackupId, IndexName, Lineage, PinName};
use crate::wal::SegmentName;

const BACKUPS: usize = 8;
/// Superfluous objects taken note of in one run: names are long, and the next run finds the rest.
const DEBRIS_MAX: usize = 100_000;

/// Everything that is there. `now` is for what is shown of backups under way; whoever holds the lease knows of none.
pub async fn read(archive: &Archive, now: Timestamp) -> Result<Inventory, CatalogError> {
    let file = archive.lineage_file().await?;
    let size = file.segment_size;
    let mut inventory = Inventory::new(archive.lineage.clone(), size, file.start_timeline, file.created);
    let ledger = archive.ledger_objects().await?;
    let facts: Vec<LedgerFact> = ledger.iter().map(|(_, fact)| fact.clone()).collect();
    let (expired, damages) = (Expired::of(&facts), Damages::of(&facts));
    let confirmed = Expired::confirmed(&facts);
    read_ledger(&mut inventory, &ledger, &facts);
    let (_, directories) = archive.wal_listing().await?;
    inventory.histories = archive.histories().await?;
    let mut nested: Vec<Vec<IndexName>> = Vec::new();
    let lineage = archive.lineage.clone();
    let take = |mut contents: DirectoryContents<Digest>| {
        contents.mark(&damages);
        let names: Vec<IndexName> = contents.index_files.iter().map(|(name, _)| *name).collect();
        let of_nested = nested_of(&names);
        if !of_nested.is_empty() {
            nested.push(of_nested);
        }
        add_directory(&mut inventory, &lineage, &contents, [&expired, &confirmed]);
    };
    archive.each_directory(directories, size, take).await?;
    for names in nested {
        let gone = archive.superseded_indexes(&names, size).await?;
        let (superseded, stay): (Vec<HeldIndex>, Vec<HeldIndex>) =
            inventory.indexes.into_iter().partition(|held| gone.contains(&held.name));
        inventory.indexes = stay;
        let debris =
            superseded.into_iter().map(|held| (DebrisKind::Index, archive.lineage.index(held.name), held.bytes));
        add_debris(&mut inventory, debris);
    }
    inventory.backups = read_backups(archive, &damages, now).await?;
    for held in &mut inventory.backups {
        held.is_confirmed = confirmed.backups().contains(&held.id);
    }
    inventory.pins = read_pins(archive).await?;
    let leases = archive.old_leases().await?;
    add_debris(&mut inventory, leases.into_iter().map(|HeldObject { key, bytes }| (DebrisKind::Lease, key, bytes)));
    Ok(inventory)
}

/// Pins and backups again, over an inventory that was read before: what was announced since is theirs to object to.
pub async fn read_needs_again(archive: &Archive, before: &Inventory) -> Result<Inventory, CatalogError> {
    let mut inventory = before.clone();
    inventory.pins = read_pins(archive).await?;
    for id in archive.backup_ids().await? {
        let known = inventory.backups.iter().position(|held| held.id == id);
        // Nothing under a complete one changes but `dead.json`, and that one we have put ourselves.
        if known.is_some_and(|at| inventory.backups[at].completed.is_some()) {
            continue;
        }
        let record = archive.backup_record(id).await?;
        match known.map(|at| &mut inventory.backups[at]) {
            Some(held) => {
                if let Some(file) = &record.backup {
                    held.completed = Some(super::inventory::Completed::of(file));
                    // It was finished by one that was taken for gone, and may have seen no `dead.json`.
                    (held.is_dead, held.is_failed) = (false, false);
                }
            }
            None => {
                let mut held = HeldBackup::of(&record);
                held.is_leased_alive = true;
                inventory.backups.push(held);
            }
        }
    }
    inventory.backups.sort_by_key(|held| held.id);
    Ok(inventory)
}

fn read_ledger(inventory: &mut Inventory, ledger: &[(HeldObject, LedgerFact)], facts: &[LedgerFact]) {
    inventory.ledger_times = facts.iter().map(|fact| fact.at).collect();
    let in_force: Vec<&LedgerFact> = ledger::announcements(facts).collect();
    let announced: BTreeSet<u64> =
        facts.iter().filter(|fact| fact.kind == FactKind::Expired).filter_map(LedgerFact::announcement).collect();
    let confirmed = ledger::confirmed(facts);
    let mut withdrawn = Vec::new();
    for (HeldObject { key, bytes }, fact) in ledger {
        let (key, bytes) = (key.clone(), *bytes);
        match fact.kind {
            FactKind::Expired if in_force.contains(&fact) => {
                let id = fact.details.get(ANNOUNCEMENT).and_then(|id| id.as_str()).map(str::to_string);
                let (at, segments, backups) = (fact.at, fact.segments.clone(), fact.expired_backups().collect());
                let is_confirmed = fact.announcement().is_some_and(|id| confirmed.contains(&id));
                inventory.announcements.push(Announcement { key, bytes, id, at, segments, backups, is_confirmed });
            }
            FactKind::Expired => withdrawn.push((DebrisKind::Announcement, key, bytes)),
            // A decision goes after what it decides about: while that is there it has to be known.
            FactKind::ExpiredWithdrawn | FactKind::ExpiredConfirmed
                if fact.announcement().is_none_or(|id| !announced.contains(&id)) =>
            {
                withdrawn.push((DebrisKind::Announcement, key, bytes));
            }
            _ => {}
        }
    }
    add_debris(inventory, withdrawn);
}

fn add_debris(inventory: &mut Inventory, debris: impl IntoIterator<Item = (DebrisKind, Key, u64)>) {
    let room = DEBRIS_MAX.saturating_sub(inventory.debris.len());
    let debris = debris.into_iter().take(room).map(|(kind, key, bytes)| Debris { kind, key, bytes });
    inventory.debris.extend(debris);
}

/// Index objects within the bounds of another one, and those: what they hold has to be read.
fn nested_of(names: &[IndexName]) -> Vec<IndexName> {
    let is_within =
        |one: &IndexName, other: &IndexName| one != other && other.first <= one.first && one.last <= other.last;
    let is_nested = |name: &&IndexName| names.iter().any(|other| is_within(name, other) || is_within(other, name));
    names.iter().filter(is_nested).copied().collect()
}

fn add_directory(
    inventory: &mut Inventory,
    lineage: &Lineage,
    contents: &DirectoryContents<Digest>,
    [expired, confirmed]: [&Expired; 2],
) {
    let size = contents.segment_size;
    let mut segments: BTreeMap<SegmentName, HeldSegment> = BTreeMap::new();
    for (name, bytes) in objects_of(contents) {
        let Some(number) = name.number(size) else { continue };
        segments.entry(name).or_insert_with(|| HeldSegment::new(number)).add(bytes);
    }
    let mut debris = Vec::new();
    for (name, held) in &mut segments {
        held.is_expired = expired.contains(*name);
        held.is_confirmed = confirmed.contains(*name);
        cover(held, *name, contents);
        if contents.sealed(*name).is_some() && !held.is_expired {
            let tails = contents.tails.get(name).into_iter().flatten();
            debris.extend(tails.map(|tail| (DebrisKind::Tail, lineage.tail(*name, &tail.name), tail.stored_bytes)));
            let markers = contents.raw_markers.get(name).into_iter().flatten();
            debris.extend(markers.map(|crc32| (DebrisKind::RawMarker, lineage.raw_marker(*name, *crc32), 0)));
        }
    }
    if !segments.is_empty() {
        inventory.wal.entry(contents.directory.timeline).or_default().extend(segments.into_values());
    }
    inventory.indexes.extend(contents.index_files.iter().map(|&(name, bytes)| HeldIndex { name, bytes }));
    add_debris(inventory, debris);
}

/// Every object that belongs to a segment's name, with its size.
fn objects_of(contents: &DirectoryContents<Digest>) -> impl Iterator<Item = (SegmentName, u64)> {
    let segments = contents.segments.iter().flat_map(|(name, all)| all.iter().map(|it| (*name, it.stored_bytes)));
    let tails = contents.tails.iter().flat_map(|(name, all)| all.iter().map(|it| (*name, it.stored_bytes)));
    let others = contents.conflicts.iter().chain(&contents.repairs);
    let others = others.flat_map(|(name, all)| all.iter().map(|(_, it)| (*name, it.stored_bytes)));
    let markers = contents.raw_markers.iter().flat_map(|(name, all)| all.iter().map(|_| (*name, 0)));
    segments.chain(tails).chain(others).chain(markers)
}

fn cover(held: &mut HeldSegment, name: SegmentName, contents: &DirectoryContents<Digest>) {
    let size = contents.segment_size;
    if let Some(entry) = contents.sealed(name) {
        held.cover_all(size);
        entry.last_commit().into_iter().chain(entry.max_commit_time()).for_each(|time| held.saw_commit(time));
        return;
    }
    if contents.disputed.contains_key(&name) {
        return;
    }
    let Some(span) = segment_span(name, size) else { return };
    let chain = contents.tail_chain(name);
    held.cover_to(chain.end_from(span.start), size);
    chain.links.iter().filter_map(|link| link.tail.last_commit).for_each(|time| held.saw_commit(time));
}

async fn read_backups(archive: &Archive, damages: &Damages, now: Timestamp) -> Result<Vec<HeldBackup>, CatalogError> {
    let shelf = archive.shelf().await?;
    let outcomes: BTreeMap<BackupId, Outcome> =
        shelf::union(&[("", &shelf)], now).into_iter().map(|shelved| (shelved.id, shelved.outcome)).collect();
    let ids: Vec<BackupId> = shelf.records.iter().map(|record| record.id).collect();
    let read = stream::iter(ids).map(|id| async move { archive.backup_objects(id).await });
    let objects: Vec<Vec<HeldObject>> = read.buffered(BACKUPS).try_collect().await?;
    let held = shelf.records.iter().zip(objects).map(|(record, objects)| {
        let mut held = HeldBackup::of(record);
        held.is_leased_alive = outcomes.get(&record.id) == Some(&Outcome::Running);
        held.is_failed = shelf.failed.contains_key(&record.id);
        held.is_damaged = damages.of_backup(record.id).is_some()
            || record.backup.as_ref().is_some_and(|file| lacks_objects(archive, record, file, &objects));
        held.bytes = objects.iter().map(|object| object.bytes).sum();
        held.objects = u32::try_from(objects.len()).unwrap_or(u32::MAX);
        held
    });
    Ok(held.collect())
}

/// Whether anything that `backup.json` names is not there in its size.
fn lacks_objects(archive: &Archive, record: &BackupRecord, file: &BackupFile, objects: &[HeldObject]) -> bool {
    let lineage = &archive.lineage;
    let sizes: BTreeMap<&Key, u64> = objects.iter().map(|object| (&object.key, object.bytes)).collect();
    let is_there = |key: Option<Key>, bytes: u64| key.is_some_and(|key| sizes.get(&key) == Some(&bytes));
    let volume = |it: &crate::catalog::backup::VolumeEntry| {
        is_there(Some(lineage.volume(file.id, it.name(), it.form)), it.stored_bytes)
    };
    let config = |it: &crate::catalog::backup::ConfigEntry| {
        is_there(lineage.backup_config(file.id, &it.name, it.form), it.stored_bytes)
    };
    record.begin.is_none()
        || !is_there(Some(lineage.backup_manifest(file.id)), file.manifest.bytes)
        || !file.volumes.iter().all(volume)
        || !file.config.iter().all(config)
}

async fn read_pins(archive: &Archive) -> Result<Vec<HeldPin>, CatalogError> {
    // The words after the listing: one that was said between the two is known to both, or not tidied up yet.
    let objects = archive.pin_objects().await?;
    let words: BTreeMap<PinName, PinFile> = archive.pins().await?;
    let held = words.into_iter().map(|(name, file)| {
        let earlier = objects.get(&name.id).into_iter().flatten().filter(|(word, _)| word.number <= name.number);
        let mut numbers: Vec<u32> = earlier.clone().map(|(word, _)| word.number).collect();
        if numbers.last() != Some(&name.number) {
            numbers.push(name.number);
        }
        HeldPin { name, file, numbers, bytes: earlier.map(|(_, bytes)| bytes).sum() }
    });
    Ok(held.collect())
}
