//! Owns: reading and creating the JSON objects of backups, pins and leases.
//! Does not own: volumes (`backup`, `restore`), when any of them is created (`backup`, `agent`), who may delete (`retention`).

use std::collections::{BTreeMap, BTreeSet};

use futures_util::stream::{self, StreamExt, TryStreamExt};
use serde::de::DeserializeOwned;

use super::{Archive, CatalogError, FETCHES, LISTINGS_MAX, fetch_json, objects, place, put_json_new};
use crate::catalog::backup::{BackupFile, BackupRecord, BeginFile, DeadFile, LeaseFile, PinFile};
use crate::catalog::damage::Damages;
use crate::catalog::ledger::{BACKUP_ID, FactKind, LedgerFact};
use crate::catalog::shelf::Shelf;
use crate::repository::layout::{BackupId, LeaseNumber, PinName};
use crate::repository::{Entry, Key, StoreErrorKind};

impl Archive {
    /// The ids below `backups/`, in order; names of no known form are left alone.
    pub async fn backup_ids(&self) -> Result<Vec<BackupId>, CatalogError> {
        let listed = self.backend.list(Some(&self.lineage.backups())).await?;
        let id = |entry: &Entry| match entry {
            Entry::Directory(name) => name.parse().ok(),
            Entry::Object { .. } => None,
        };
        let mut ids: Vec<BackupId> = listed.iter().filter_map(id).collect();
        ids.sort();
        Ok(ids)
    }

    /// What is there of one backup. `dead.json` is looked for last: put before this began, it is seen.
    pub async fn backup_record(&self, id: BackupId) -> Result<BackupRecord, CatalogError> {
        self.record_beside(id, &self.damages().await?).await
    }

    async fn record_beside(&self, id: BackupId, damages: &Damages) -> Result<BackupRecord, CatalogError> {
        let mut damaged = damages.of_backup(id).map(str::to_string);
        let begin = self.own::<BeginFile>(id, &self.lineage.backup_begin(id), |file| file.id).await;
        let begin = readable(begin, &mut damaged)?;
        let backup = self.own::<BackupFile>(id, &self.lineage.backup_json(id), |file| file.id).await;
        let backup = readable(backup, &mut damaged)?;
        let is_dead = self.is_dead(id).await?;
        Ok(BackupRecord { id, begin, backup, is_dead, damaged })
    }

    /// Every backup there is anything of, in order.
    pub async fn backup_records(&self) -> Result<Vec<BackupRecord>, CatalogError> {
        let (ids, damages) = (self.backup_ids().await?, self.damages().await?);
        stream::iter(ids).map(|id| self.record_beside(id, &damages)).buffered(FETCHES).try_collect().await
    }

    pub async fn is_dead(&self, id: BackupId) -> Result<bool, CatalogError> {
        Ok(self.backend.stat(&self.lineage.backup_dead(id)).await?.is_some())
    }

    /// Begins a backup; false when its id is taken.
    pub async fn begin_backup(&self, file: &BeginFile) -> Result<bool, CatalogError> {
        self.created(&self.lineage.backup_begin(file.id), file).await
    }

    /// Commits a backup; false when it is there already.
    pub async fn commit_backup(&self, file: &BackupFile) -> Result<bool, CatalogError> {
        self.created(&self.lineage.backup_json(file.id), file).await
    }

    pub async fn put_dead(&self, file: &DeadFile) -> Result<bool, CatalogError> {
        self.created(&self.lineage.backup_dead(file.id), file).await
    }

    /// The latest word on every pin, released and lapsed ones too.
    pub async fn pins(&self) -> Result<BTreeMap<PinName, PinFile>, CatalogError> {
        let listed = self.backend.list(Some(&self.lineage.pins())).await?;
        let mut latest: BTreeMap<u64, PinName> = BTreeMap::new();
        for name in objects(&listed).filter_map(|(name, _)| PinName::parse(name)) {
            let known = latest.entry(name.id).or_insert(name);
            *known = name.max(*known);
        }
        let read = stream::iter(latest.into_values())
            .map(|name| async move { Ok::<_, CatalogError>((name, self.required(&self.lineage.pin(name)).await?)) });
        read.buffered(FETCHES).try_collect().await
    }

    /// Says the next word on a pin; false when somebody else has said it.
    pub async fn put_pin(&self, name: PinName, file: &PinFile) -> Result<bool, CatalogError> {
        self.created(&self.lineage.pin(name), file).await
    }

    /// The lease that counts; `None` while nobody ever took one.
    pub async fn lease(&self) -> Result<Option<LeaseFile>, CatalogError> {
        for _ in 0..LISTINGS_MAX {
            let Some(number) = self.lease_numbers().await?.into_iter().max() else { return Ok(None) };
            if let Some(file) = self.lease_numbered(number).await? {
                return Ok(Some(file));
            }
            // Tidied away since the listing: there is a higher one.
        }
        let directory = place(self.backend(), &self.lineage.leases());
        Err(CatalogError::Unsteady { directory, attempts: LISTINGS_MAX })
    }

    /// Takes or renews a lease; false when somebody else has that number.
    pub async fn put_lease(&self, file: &LeaseFile) -> Result<bool, CatalogError> {
        self.created(&self.lineage.lease(file.number), file).await
    }

    /// Which leases are there, by number.
    async fn lease_numbers(&self) -> Result<Vec<LeaseNumber>, CatalogError> {
        let listed = self.backend.list(Some(&self.lineage.leases())).await?;
        Ok(objects(&listed).filter_map(|(name, _)| LeaseNumber::parse(name)).collect())
    }

    /// Removes the leases nobody looks at any more: the highest one says all there is to say.
    pub async fn delete_leases_below(&self, number: LeaseNumber) -> Result<(), CatalogError> {
        let below = self.lease_numbers().await?.into_iter().filter(|other| *other < number);
        let keys: Vec<Key> = below.map(|number| self.lineage.lease(number)).collect();
        Ok(self.backend.delete_all(&keys).await?)
    }

    /// The lease with this number, where it is still there.
    pub async fn lease_numbered(&self, number: LeaseNumber) -> Result<Option<LeaseFile>, CatalogError> {
        fetch_json(self.backend(), &self.lineage.lease(number)).await
    }

    /// The backups that were taken note of as failed: id to fact, the last word on each.
    pub async fn failed_backups(&self) -> Result<BTreeMap<BackupId, LedgerFact>, CatalogError> {
        let facts = self.facts(|kind| kind == FactKind::BackupFailed.word()).await?;
        let id = |fact: &LedgerFact| fact.details.get(BACKUP_ID)?.as_str()?.parse().ok();
        Ok(facts.into_iter().filter_map(|fact| Some((id(&fact)?, fact))).collect())
    }

    /// All that is there of backups, and is said about them.
    pub async fn shelf(&self) -> Result<Shelf, CatalogError> {
        // Whoever takes a backup says how it ended before it gives the lease back: read the other way round, one that ends
        // meanwhile is found under way or ended, and never neither.
        let mut records = self.backup_records().await?;
        let lease = self.lease().await?;
        let failed = self.failed_backups().await?;
        for record in &mut records {
            if record.backup.is_none() && !record.is_dead && !failed.contains_key(&record.id) {
                *record = self.backup_record(record.id).await?;
            }
        }
        let mut shelf = Shelf { records, failed, pins: self.pins().await?, lease, ..Shelf::default() };
        let begun = |record: &BackupRecord| record.begin.as_ref().and_then(|begin| begin.lease);
        let numbers: BTreeSet<LeaseNumber> = shelf.unfinished().filter_map(begun).collect();
        for number in numbers {
            if let Some(file) = self.lease_numbered(number).await? {
                shelf.begun_under.insert(number, file);
            }
        }
        Ok(shelf)
    }

    /// Creates an object; false when its name is taken.
    async fn created<T: serde::Serialize>(&self, key: &Key, file: &T) -> Result<bool, CatalogError> {
        match put_json_new(self.backend(), key, file).await {
            Ok(()) => Ok(true),
            Err(CatalogError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => Ok(false),
            Err(error) => Err(error),
        }
    }

    async fn required<T: DeserializeOwned>(&self, key: &Key) -> Result<T, CatalogError> {
        let file = fetch_json(self.backend(), key).await?;
        file.ok_or_else(|| CatalogError::Missing { object: place(self.backend(), key) })
    }

    /// An object of backup `id`, which must say so itself.
    async fn own<T: DeserializeOwned>(
        &self,
        id: BackupId,
        key: &Key,
        says: impl Fn(&T) -> BackupId,
    ) -> Result<Option<T>, CatalogError> {
        let Some(file) = fetch_json::<T>(self.backend(), key).await? else { return Ok(None) };
        let said = says(&file);
        if said == id {
            return Ok(Some(file));
        }
        let fault = format!("it says it belongs to backup {said}");
        Err(CatalogError::Damaged { object: place(self.backend(), key), fault })
    }
}

/// One damaged object makes one backup unusable, not all of them unreadable.
fn readable<T>(read: Result<Option<T>, CatalogError>, damaged: &mut Option<String>) -> Result<Option<T>, CatalogError> {
    match read {
        Err(error @ (CatalogError::Damaged { .. } | CatalogError::TooLarge { .. })) => {
            damaged.get_or_insert_with(|| error.to_string());
            Ok(None)
        }
        read => read,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use jiff::Timestamp;

    use super::*;
    use crate::catalog::backup::PinKind;
    use crate::repository::layout::{BackupType, Lineage};
    use crate::testkit::store::MemoryStore;
    use crate::wal::{Lsn, SystemId, TimelineId};

    fn begin(id: BackupId) -> BeginFile {
        BeginFile {
            schema: 1,
            id,
            backup_type: BackupType::Full,
            parent: None,
            label: Some("before the upgrade".into()),
            started: id.started(),
            slot_restart_lsn: Lsn(0x100_0000),
            timeline: TimelineId(1),
            lease: Some(LeaseNumber(1)),
            host: None,
            version: "0.1.0".into(),
        }
    }

    #[tokio::test]
    async fn a_backup_is_what_is_there_of_it() {
        let archive = Archive::new(Arc::new(MemoryStore::default()), Lineage::new("main", SystemId(7), 1));
        let id: BackupId = "20261122T110000Z-full".parse().unwrap();
        assert_eq!(archive.backup_records().await.unwrap(), []);
        assert!(archive.begin_backup(&begin(id)).await.unwrap());
        assert!(!archive.begin_backup(&begin(id)).await.unwrap());
        let record = archive.backup_record(id).await.unwrap();
        assert_eq!((record.begin, record.backup, record.is_dead), (Some(begin(id)), None, false));
        let dead = DeadFile { schema: 1, id, at: id.started(), reason: "abandoned".into() };
        assert!(archive.put_dead(&dead).await.unwrap());
        assert!(archive.backup_records().await.unwrap()[0].is_dead);
    }

    #[tokio::test]
    async fn one_damaged_object_makes_one_backup_unusable() {
        let store = MemoryStore::default();
        let archive = Archive::new(Arc::new(store.clone()), Lineage::new("main", SystemId(7), 1));
        let (one, other): (BackupId, BackupId) =
            ("20261122T110000Z-full".parse().unwrap(), "20261122T120000Z-full".parse().unwrap());
        archive.begin_backup(&begin(one)).await.unwrap();
        archive.begin_backup(&begin(other)).await.unwrap();
        let cut_off = bytes::Bytes::from_static(b"{\"schema\": 1, \"id\"");
        store.tamper(|objects| drop(objects.insert(archive.lineage.backup_json(one), cut_off)));
        let volume = format!("backups/{other}/base/0001.tar.zst");
        let damaged = LedgerFact::damaged(&[], one.started(), &volume, "its CRC-32 is wrong");
        archive.append_ledger(&damaged, 1).await.unwrap();
        let records = archive.backup_records().await.unwrap();
        let damaged = |index: usize| records[index].damaged.clone().unwrap();
        assert!(damaged(0).contains("backup.json is damaged"), "{}", damaged(0));
        assert_eq!(damaged(1), format!("{volume}: its CRC-32 is wrong"));
        let ledger = archive.ledger().await.unwrap();
        let mended = LedgerFact::mended(&ledger, one.started(), &volume, "copied", "abc");
        archive.append_ledger(&mended, 2).await.unwrap();
        assert_eq!(archive.backup_record(other).await.unwrap().damaged, None);
    }

    #[tokio::test]
    async fn the_highest_number_of_a_pin_counts() {
        let archive = Archive::new(Arc::new(MemoryStore::default()), Lineage::new("main", SystemId(7), 1));
        let created: Timestamp = "2026-11-22T11:00:00Z".parse().unwrap();
        let pin = PinFile {
            schema: 1,
            kind: PinKind::Operator,
            backup: BackupId::new(created, BackupType::Full),
            from_lsn: None,
            to_lsn: None,
            timeline: TimelineId(1),
            created,
            expires: None,
            released: false,
            host: None,
        };
        let name = PinName { id: 7, number: 9 };
        let next = PinName { id: 7, number: 10 };
        assert!(archive.put_pin(name, &pin).await.unwrap());
        assert!(!archive.put_pin(name, &pin).await.unwrap());
        assert!(archive.put_pin(next, &PinFile { released: true, ..pin.clone() }).await.unwrap());
        let pins = archive.pins().await.unwrap();
        assert_eq!(pins.len(), 1);
        assert!(!pins[&next].is_in_force(created) && pin.is_in_force(created));
    }
}
