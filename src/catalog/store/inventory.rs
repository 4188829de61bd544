//! Owns: listing what is there with nothing taken away: WAL directories, objects of backups, pins, leases, facts, each with
//! its size; what may be deleted by its name alone.
//! Does not own: what is to become of it (`retention`).
//!
//! Names of no known form are in none of these lists.

use std::collections::{BTreeMap, BTreeSet};

use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::{Archive, CatalogError, FETCHES, LISTINGS_MAX, fetch_sized, objects, parse_json, place};
use crate::catalog::contents::DirectoryContents;
use crate::catalog::index::IndexEntry;
use crate::catalog::ledger::LedgerFact;
use crate::repository::layout::{
    self, BackupId, IndexName, LeaseNumber, PinName, WalDirectory, WalObject, parse_tar_stream, parse_volume,
};
use crate::repository::{Entry, Key, StoreErrorKind};
use crate::wal::SegmentSize;

/// How deep directories below a backup's `config/` may lie.
const CONFIG_DEPTH_MAX: usize = 8;

/// An object below a lineage, by its size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HeldObject {
    pub key: Key,
    pub bytes: u64,
}

impl Archive {
    /// What one directory holds by its names alone, expired or not; no index object is read.
    pub async fn listed_directory(
        &self,
        directory: WalDirectory,
        size: SegmentSize,
    ) -> Result<DirectoryContents, CatalogError> {
        self.directory_part(directory, size, |object| !matches!(object, WalObject::Index(_))).await
    }

    /// Which of these index objects of one directory hold nothing that another of them does not.
    pub async fn superseded_indexes(
        &self,
        names: &[IndexName],
        size: SegmentSize,
    ) -> Result<BTreeSet<IndexName>, CatalogError> {
        let mut files: Vec<(IndexName, Vec<IndexEntry>)> = Vec::new();
        for &name in names {
            match self.read_index(name, size).await {
                Ok(file) => files.push((name, file.entries)),
                // Merged since.
                Err(CatalogError::Missing { .. }) => {}
                Err(CatalogError::Store(error)) if error.is(StoreErrorKind::NotFound) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(superseded(&files))
    }

    /// The objects of a backup in the order they are deleted in. `begin.json` goes first, since a backup without it counts
    /// for nobody, and `dead.json` last, which says of all the others that they go.
    pub async fn backup_objects(&self, id: BackupId) -> Result<Vec<HeldObject>, CatalogError> {
        let (mut first, mut middle, mut last) = (Vec::new(), Vec::new(), Vec::new());
        let special = [self.lineage.backup_begin(id), self.lineage.backup_json(id), self.lineage.backup_dead(id)];
        let manifest = self.lineage.backup_manifest(id);
        for entry in self.backend.list(Some(&self.lineage.backup(id))).await? {
            match entry {
                Entry::Object { name, bytes } => {
                    let key = special.iter().chain([&manifest]).find(|key| key.file_name() == name).cloned();
                    let Some(key) = key else { continue };
                    let list = match special.iter().position(|known| *known == key) {
                        Some(0) => &mut first,
                        Some(_) => &mut last,
                        None => &mut middle,
                    };
                    list.push(HeldObject { key, bytes });
                }
                Entry::Directory(name) if name == "config" => {
                    middle.extend(self.config_objects(id).await?);
                }
                Entry::Directory(name) => {
                    let Some(stream) = parse_tar_stream(&name) else { continue };
                    let listed = self.backend.list(Some(&self.lineage.backup_stream(id, stream))).await?;
                    middle.extend(objects(&listed).filter_map(|(name, bytes)| {
                        let (volume, form) = parse_volume(stream, name)?;
                        Some(HeldObject { key: self.lineage.volume(id, volume, form), bytes })
                    }));
                }
            }
        }
        last.sort_by_key(|object| object.key == special[2]);
        Ok(first.into_iter().chain(middle).chain(last).collect())
    }

    /// Everything below `config/`: files of any name.
    async fn config_objects(&self, id: BackupId) -> Result<Vec<HeldObject>, CatalogError> {
        let mut found = Vec::new();
        let mut waiting: Vec<(usize, String)> = vec![(0, String::new())];
        while let Some((depth, below)) = waiting.pop() {
            let directory = match below.as_str() {
                "" => Some(self.lineage.backup_config_directory(id)),
                below => self.lineage.backup_config(id, below, crate::codec::Form::Plain),
            };
            let Some(directory) = directory else { continue };
            for entry in self.backend.list(Some(&directory)).await? {
                let path = |name: &str| match below.as_str() {
                    "" => name.to_string(),
                    below => format!("{below}/{name}"),
                };
                match entry {
                    Entry::Object { name, bytes } => {
                        let key = self.lineage.backup_config(id, &path(&name), crate::codec::Form::Plain);
                        found.extend(key.map(|key| HeldObject { key, bytes }));
                    }
                    Entry::Directory(name) if depth < CONFIG_DEPTH_MAX => waiting.push((depth + 1, path(&name))),
                    Entry::Directory(_) => {}
                }
            }
        }
        Ok(found)
    }

    /// Every fact of the ledger with its object, in order of their names, which begin with their times.
    pub async fn ledger_objects(&self) -> Result<Vec<(HeldObject, LedgerFact)>, CatalogError> {
        for _ in 0..LISTINGS_MAX {
            match self.ledger_objects_once().await {
                Err(CatalogError::Store(error)) if error.is(StoreErrorKind::NotFound) => {}
                read => return read,
            }
        }
        let directory = place(self.backend(), &self.lineage.ledger());
        Err(CatalogError::Unsteady { directory, attempts: LISTINGS_MAX })
    }

    async fn ledger_objects_once(&self) -> Result<Vec<(HeldObject, LedgerFact)>, CatalogError> {
        let listed = self.backend.list(Some(&self.lineage.ledger())).await?;
        let held: Vec<HeldObject> = objects(&listed)
            .filter(|(name, _)| layout::ledger_kind(name).is_some())
            .filter_map(|(name, bytes)| Some(HeldObject { key: self.lineage.ledger_object(name)?, bytes }))
            .collect();
        let read = stream::iter(held).map(|object| async move {
            let body = fetch_sized(self.backend(), &object.key, object.bytes, super::JSON_BYTES_MAX).await?;
            let fact = parse_json(self.backend(), &object.key, &body)?;
            Ok((object, fact))
        });
        read.buffered(FETCHES).try_collect().await
    }

    /// Every word on every pin, by its id, in order of their numbers.
    pub async fn pin_objects(&self) -> Result<BTreeMap<u64, Vec<(PinName, u64)>>, CatalogError> {
        let listed = self.backend.list(Some(&self.lineage.pins())).await?;
        let mut pins: BTreeMap<u64, Vec<(PinName, u64)>> = BTreeMap::new();
        for (name, bytes) in objects(&listed).filter_map(|(name, bytes)| Some((PinName::parse(name)?, bytes))) {
            pins.entry(name.id).or_default().push((name, bytes));
        }
        pins.values_mut().for_each(|words| words.sort());
        Ok(pins)
    }

    /// Leases below the highest.
    pub async fn old_leases(&self) -> Result<Vec<HeldObject>, CatalogError> {
        let listed = self.backend.list(Some(&self.lineage.leases())).await?;
        let mut leases: Vec<(LeaseNumber, u64)> =
            objects(&listed).filter_map(|(name, bytes)| Some((LeaseNumber::parse(name)?, bytes))).collect();
        leases.sort();
        leases.pop();
        let object = |(number, bytes)| HeldObject { key: self.lineage.lease(number), bytes };
        Ok(leases.into_iter().map(object).collect())
    }
}

/// Files whose entries are all in one other file, which stays. Of two with the same entries the earlier name goes.
fn superseded(files: &[(IndexName, Vec<IndexEntry>)]) -> BTreeSet<IndexName> {
    let mut gone = BTreeSet::new();
    let mut order: Vec<&(IndexName, Vec<IndexEntry>)> = files.iter().collect();
    order.sort_by_key(|(name, entries)| (entries.len(), *name));
    for (at, (name, entries)) in order.iter().enumerate() {
        let holds_all = |other: &&&(IndexName, Vec<IndexEntry>)| {
            let named = |entry: &IndexEntry| (other.0.first..=other.0.last).contains(&entry.segment);
            entries.iter().all(|entry| named(entry) && other.1.contains(entry))
        };
        if order[at + 1..].iter().any(|other| holds_all(&other)) {
            gone.insert(*name);
        }
    }
    gone
}
