//! Owns: backups against what they say of themselves: quickly, by what is listed; in whole, by what their volumes hold.
//! Does not own: one object's checksums (`content.rs`), one volume's files (`files.rs`), which WAL is there (`quick.rs`).

use std::collections::{BTreeMap, BTreeSet};

use super::Run;
use super::content::{Coding, Nothing, Object, Sink, Verdict, examine};
use super::files::{Accounts, VolumeFiles};
use super::listing::Asker;
use super::quick::Coverage;
use super::reader::{Reader, small};
use super::record::{Mode, Position};
use super::report::{Fault, FaultKind, Notes, Span};
use crate::catalog::backup::{ConfigEntry, VolumeEntry};
use crate::catalog::manifest::{Manifest, ManifestCollector};
use crate::catalog::{BackupFile, BeginFile};
use crate::codec::Form;
use crate::error::Failure;
use crate::repository::Entry;
use crate::repository::layout::{BackupId, parse_tar_stream, parse_volume};

/// A larger one is no configuration file.
const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// A million files take about 150 MB.
const MANIFEST_BYTES_MAX: u64 = 4 << 30;

/// Backups as they are listed.
#[derive(Debug, Default)]
pub struct Shelf {
    /// Complete ones that can be read, oldest first.
    pub complete: Vec<BackupFile>,
    /// All there is anything of, but for those that are being deleted.
    pub ids: BTreeSet<BackupId>,
    pub faults: Vec<Fault>,
    pub objects: u64,
}

impl Asker {
    /// Every backup, by what is listed of it and what its small objects say.
    pub async fn backups(&self, coverage: &Coverage, notes: &mut Notes) -> Result<Shelf, Failure> {
        let mut shelf = Shelf::default();
        let mut ids = Vec::new();
        for entry in self.list(&self.archive.lineage.backups()).await? {
            match entry {
                Entry::Directory(name) => match name.parse::<BackupId>() {
                    Ok(id) => ids.push(id),
                    Err(_) => notes.add_unknown(format!("backups/{name}/")),
                },
                Entry::Object { name, .. } => notes.add_unknown(format!("backups/{name}")),
            }
        }
        ids.sort();
        for id in ids {
            self.backup(id, coverage, &mut shelf, notes).await?;
        }
        let there: BTreeSet<BackupId> = shelf.complete.iter().map(|file| file.id).collect();
        for file in &shelf.complete {
            if let Some(parent) = file.parent.filter(|parent| !there.contains(parent)) {
                let object = self.below(&self.archive.lineage.backup_json(file.id));
                let what = format!("it builds on backup {parent}, which is not here whole");
                shelf.faults.push(Fault::new(object, FaultKind::Missing, what).of_backup(file.id).indirect());
            }
        }
        Ok(shelf)
    }

    async fn backup(
        &self,
        id: BackupId,
        coverage: &Coverage,
        shelf: &mut Shelf,
        notes: &mut Notes,
    ) -> Result<(), Failure> {
        let lineage = &self.archive.lineage;
        let listed = self.list(&lineage.backup(id)).await?;
        let has =
            |wanted: &str| listed.iter().any(|entry| matches!(entry, Entry::Object { name, .. } if name == wanted));
        if has("dead.json") {
            notes.add(format!("backup {id} is being deleted"));
            return Ok(());
        }
        shelf.ids.insert(id);
        let (json, begin) = (lineage.backup_json(id), lineage.backup_begin(id));
        if has("begin.json") {
            shelf.objects += 1;
            if let Err(fault) = small::<BeginFile>(&self.archive, &begin, self.patience).await? {
                shelf.faults.push(Fault::new(self.below(&begin), FaultKind::Record, fault));
            }
        }
        // Asked for, and not looked up in the listing: it may have come since.
        let file = match small::<BackupFile>(&self.archive, &json, self.patience).await? {
            Ok(None) => {
                notes.add(format!("backup {id} was begun and is not complete: it is being taken, or was given up"));
                return Ok(());
            }
            Ok(Some(file)) if file.id == id => file,
            Ok(Some(file)) => {
                let fault = format!("it says it belongs to backup {}", file.id);
                shelf.faults.push(Fault::new(self.below(&json), FaultKind::Record, fault).of_backup(id));
                return Ok(());
            }
            Err(fault) => {
                shelf.faults.push(Fault::new(self.below(&json), FaultKind::Record, fault).of_backup(id));
                return Ok(());
            }
        };
        shelf.objects += 1;
        let there = self.objects_of(id, &listed, &file, notes).await?;
        for object in objects(self, &file) {
            shelf.objects += 1;
            let fault = match there.get(&object.below) {
                None => Fault::new(&object.below, FaultKind::Missing, "backup.json names it, and it is not there"),
                Some(&bytes) if bytes != object.stored_bytes => {
                    let what = format!("it has {bytes} bytes, backup.json says {}", object.stored_bytes);
                    Fault::new(&object.below, FaultKind::Size, what)
                }
                Some(_) => continue,
            };
            shelf.faults.push(fault.of_backup(id));
        }
        let needed = Span::new(file.timeline, file.start_lsn, file.stop_lsn);
        if coverage.lacks_silently(&needed) {
            let (start, stop, timeline) = (file.start_lsn, file.stop_lsn, file.timeline);
            let what =
                format!("WAL {start} to {stop} of timeline {timeline}, which makes it consistent, is not here whole");
            let fault = Fault::new(self.below(&json), FaultKind::Missing, what).of_backup(id).indirect();
            shelf.faults.push(fault.of_wal(needed));
        }
        shelf.complete.push(file);
        Ok(())
    }

    /// The objects of a backup as listed, by path below the lineage.
    async fn objects_of(
        &self,
        id: BackupId,
        listed: &[Entry],
        file: &BackupFile,
        notes: &mut Notes,
    ) -> Result<BTreeMap<String, u64>, Failure> {
        const KNOWN: [&str; 4] = ["begin.json", "backup.json", "dead.json", "backup_manifest"];
        let lineage = &self.archive.lineage;
        let place = self.below(&lineage.backup(id));
        let mut there = BTreeMap::new();
        for entry in listed {
            match entry {
                Entry::Object { name, bytes } => {
                    if !KNOWN.contains(&name.as_str()) {
                        notes.add_unknown(format!("{place}/{name}"));
                    }
                    there.insert(format!("{place}/{name}"), *bytes);
                }
                Entry::Directory(name) if name == "config" => {}
                Entry::Directory(name) => {
                    let stream = parse_tar_stream(name);
                    let Some(directory) = stream.and_then(|_| lineage.object(&format!("{place}/{name}"))) else {
                        notes.add_unknown(format!("{place}/{name}/"));
                        continue;
                    };
                    for entry in self.list(&directory).await? {
                        match entry {
                            Entry::Object { name: object, bytes } => {
                                if stream.and_then(|stream| parse_volume(stream, &object)).is_none() {
                                    notes.add_unknown(format!("{place}/{name}/{object}"));
                                }
                                there.insert(format!("{place}/{name}/{object}"), bytes);
                            }
                            Entry::Directory(other) => notes.add_unknown(format!("{place}/{name}/{other}/")),
                        }
                    }
                }
            }
        }
        for entry in &file.config {
            let Some(key) = lineage.backup_config(id, &entry.name, entry.form) else { continue };
            if let Some(bytes) = self.stat(&key).await? {
                there.insert(self.below(&key), bytes);
            }
        }
        Ok(there)
    }
}

/// Every object `backup.json` names, the manifest first.
pub fn objects(asker: &Asker, file: &BackupFile) -> Vec<Object> {
    let manifest = std::iter::once(manifest_object(asker, file));
    let volumes = file.volumes.iter().map(|volume| volume_object(asker, file, volume));
    let config = file.config.iter().filter_map(|entry| config_object(asker, file, entry));
    manifest.chain(volumes).chain(config).collect()
}

fn manifest_object(asker: &Asker, file: &BackupFile) -> Object {
    let key = asker.archive.lineage.backup_manifest(file.id);
    Object {
        below: asker.below(&key),
        key,
        form: Form::Plain,
        coding: Coding::AsIs,
        stored_bytes: file.manifest.bytes,
        stored_crc32: Some(file.manifest.crc32.0),
        raw_bytes: file.manifest.bytes,
        raw_crc32: None,
        by: "backup.json",
    }
}

fn volume_object(asker: &Asker, file: &BackupFile, volume: &VolumeEntry) -> Object {
    let key = asker.archive.lineage.volume(file.id, volume.name(), volume.form);
    Object {
        below: asker.below(&key),
        key,
        form: volume.form,
        coding: Coding::Frames,
        stored_bytes: volume.stored_bytes,
        stored_crc32: Some(volume.stored_crc32.0),
        raw_bytes: volume.raw_bytes,
        raw_crc32: Some(volume.raw_crc32.0),
        by: "backup.json",
    }
}

fn config_object(asker: &Asker, file: &BackupFile, entry: &ConfigEntry) -> Option<Object> {
    let key = asker.archive.lineage.backup_config(file.id, &entry.name, entry.form)?;
    Some(Object {
        below: asker.below(&key),
        key,
        form: entry.form,
        coding: Coding::AsIs,
        stored_bytes: entry.stored_bytes,
        stored_crc32: Some(entry.stored_crc32.0),
        raw_bytes: entry.raw_bytes,
        raw_crc32: Some(entry.raw_crc32.0),
        by: "backup.json",
    })
}

/// A manifest, collected.
#[derive(Debug, Default)]
struct Collected {
    collector: ManifestCollector,
    fault: Option<String>,
}

impl Sink for Collected {
    fn take(&mut self, raw: &[u8]) {
        if self.fault.is_none() {
            self.fault = self.collector.push(raw).err().map(|error| error.to_string());
        }
    }
}

/// What an object is examined as.
enum Examined {
    Checksums,
    Files(Accounts, Option<u32>),
}

impl Run<'_> {
    /// The manifests' checksums, which a quick look compares too: whatever else is right, without them no restore is.
    pub(super) async fn manifests(&mut self, complete: &[BackupFile]) -> Result<Vec<Fault>, Failure> {
        let mut faults = Vec::new();
        for file in complete {
            let object = manifest_object(&self.asker, file);
            let (verdict, _) = self.once(&object, Nothing).await?;
            self.counts.bytes += object.stored_bytes;
            if let Verdict::Faulty(kind, what) = verdict {
                faults.push(Fault::new(object.below, kind, what).of_backup(file.id));
            }
        }
        Ok(faults)
    }

    /// Reads what was chosen of a backup.
    pub(super) async fn read_backup(&mut self, file: &BackupFile) -> Result<(), Failure> {
        let position = Position::Backup(file.id);
        if self.behind.is_some_and(|behind| position <= behind) {
            self.advance(objects(&self.asker, file).iter().map(|object| object.stored_bytes).sum());
            return Ok(());
        }
        let is_full = self.options.mode == Mode::Full;
        let accounts = match is_full {
            true => self.read_manifest(file).await?,
            false => None,
        };
        let mut chosen = Vec::new();
        for volume in &file.volumes {
            let object = volume_object(&self.asker, file, volume);
            let how = accounts.as_ref().map(|accounts| Examined::Files(accounts.clone(), volume.tablespace));
            chosen.push((object, how.unwrap_or(Examined::Checksums)));
        }
        if is_full {
            let config = file.config.iter().filter(|entry| entry.stored_bytes <= CONFIG_BYTES_MAX);
            chosen.extend(
                config.filter_map(|entry| Some((config_object(&self.asker, file, entry)?, Examined::Checksums))),
            );
        }
        chosen.retain(|(object, _)| self.is_chosen(&object.below) && !self.is_told(&object.below));
        let wanted = chosen.iter().map(|(object, _)| object.wanted()).collect();
        let mut reader = Reader::start(&self.asker.archive, wanted, &self.options.pace, self.options.patience);
        let (mut is_whole, mut is_examined) = (!self.is_told_of(file.id), true);
        for (index, (object, how)) in chosen.iter().enumerate() {
            let mut verdict = self.volume(&mut reader, index, object, how).await?;
            if let Verdict::Faulty(..) = verdict {
                let mut again = Reader::start(
                    &self.asker.archive,
                    vec![object.wanted()],
                    &self.options.pace,
                    self.options.patience,
                );
                self.pause().await;
                verdict = self.volume(&mut again, 0, object, how).await?;
            }
            self.read(object, matches!(verdict, Verdict::Sound { .. }));
            match verdict {
                Verdict::Sound { is_content_examined: true } => {}
                Verdict::Sound { is_content_examined: false } => {
                    is_examined = false;
                    self.counts.unexamined += 1;
                }
                Verdict::Faulty(kind, what) => {
                    is_whole = false;
                    if self.is_still_there(file.id).await? {
                        self.found(Fault::new(&object.below, kind, what).of_backup(file.id)).await?;
                    } else {
                        return Ok(());
                    }
                }
            }
        }
        let volumes = chosen.iter().filter(|(object, _)| object.coding == Coding::Frames);
        self.counts.volumes_read += volumes.count() as u64;
        // A volume that cannot be read holds what nobody has met: that is told already.
        if let Some(missing) = accounts.filter(|_| is_whole && is_examined).and_then(|accounts| accounts.missing())
            && self.is_still_there(file.id).await?
        {
            let object = self.asker.below(&self.asker.archive.lineage.backup_manifest(file.id));
            self.found(Fault::new(object, FaultKind::Content, missing).of_backup(file.id)).await?;
        }
        let json = self.asker.below(&self.asker.archive.lineage.backup_json(file.id));
        self.note_progress(&json).await
    }

    async fn volume(
        &self,
        reader: &mut Reader,
        index: usize,
        object: &Object,
        how: &Examined,
    ) -> Result<Verdict, Failure> {
        let identities = self.asker.archive.keys.identities.as_ref();
        match how {
            Examined::Checksums => Ok(examine(reader, index, object, identities, Nothing).await?.0),
            Examined::Files(accounts, tablespace) => {
                let files = VolumeFiles::new(accounts.clone(), *tablespace, object.raw_bytes);
                let (verdict, files) = examine(reader, index, object, identities, files).await?;
                Ok(match verdict {
                    Verdict::Sound { is_content_examined: true } => match files.finish() {
                        Some(fault) => Verdict::Faulty(FaultKind::Content, fault),
                        None => verdict,
                    },
                    _ => {
                        files.give_up();
                        verdict
                    }
                })
            }
        }
    }

    /// `None` when it cannot be relied on, which is told.
    async fn read_manifest(&mut self, file: &BackupFile) -> Result<Option<Accounts>, Failure> {
        let object = manifest_object(&self.asker, file);
        if self.is_told(&object.below) {
            return Ok(None);
        }
        if object.stored_bytes > MANIFEST_BYTES_MAX {
            let what = format!("{} bytes is more than a manifest has", object.stored_bytes);
            self.found(Fault::new(object.below, FaultKind::Content, what).of_backup(file.id)).await?;
            return Ok(None);
        }
        let mut manifest = self.parsed(&object, file).await?;
        if manifest.is_err() {
            self.pause().await;
            manifest = self.parsed(&object, file).await?;
        }
        self.read(&object, manifest.is_ok());
        match manifest {
            Ok(manifest) => Ok(Some(Accounts::new(manifest))),
            Err((kind, what)) => {
                if self.is_still_there(file.id).await? {
                    self.found(Fault::new(object.below, kind, what).of_backup(file.id)).await?;
                }
                Ok(None)
            }
        }
    }

    async fn parsed(
        &self,
        object: &Object,
        file: &BackupFile,
    ) -> Result<Result<Manifest, (FaultKind, String)>, Failure> {
        let (verdict, collected) = self.once(object, Collected::default()).await?;
        if let Verdict::Faulty(kind, what) = verdict {
            return Ok(Err((kind, what)));
        }
        let parsed = match collected.fault {
            Some(fault) => Err(fault),
            None => collected.collector.finish().map_err(|error| error.to_string()),
        };
        let checked = parsed.and_then(|manifest| match contradiction(&manifest, file) {
            Some(fault) => Err(fault),
            None => Ok(manifest),
        });
        Ok(checked.map_err(|fault| (FaultKind::Content, fault)))
    }

    /// Neither deleted nor about to be.
    async fn is_still_there(&self, id: BackupId) -> Result<bool, Failure> {
        let lineage = &self.asker.archive.lineage;
        let is_dead = self.asker.stat(&lineage.backup_dead(id)).await?.is_some();
        Ok(!is_dead && self.asker.stat(&lineage.backup_json(id)).await?.is_some())
    }

    /// One object by itself.
    async fn once<S: Sink>(&self, object: &Object, sink: S) -> Result<(Verdict, S), Failure> {
        let archive = &self.asker.archive;
        let mut reader = Reader::start(archive, vec![object.wanted()], &self.options.pace, self.options.patience);
        examine(&mut reader, 0, object, archive.keys.identities.as_ref(), sink).await
    }
}

/// Why this cannot be the manifest of this backup.
fn contradiction(manifest: &Manifest, file: &BackupFile) -> Option<String> {
    let summary = &manifest.summary;
    if let Some(found) = summary.system_id.filter(|&id| id != file.system_id) {
        return Some(format!("it is of system {found}, the backup of {}", file.system_id));
    }
    if summary.files != file.manifest.files {
        return Some(format!("it lists {} files, backup.json says {}", summary.files, file.manifest.files));
    }
    let needed = (file.timeline, file.start_lsn, file.stop_lsn);
    let is_same = |range: &crate::catalog::manifest::WalRange| (range.timeline, range.start, range.end) == needed;
    if !summary.wal_ranges.iter().any(is_same) {
        let (timeline, start, stop) = needed;
        return Some(format!("it does not ask for WAL {start} to {stop} of timeline {timeline}, as backup.json does"));
    }
    None
}
