//! Owns: getting a backup's objects from whichever repository has them whole: its copies, its manifest, its volumes.
//! Does not own: what is done with a volume's bytes (`unpack.rs`), which backup (the plan).
//!
//! ```text
//!  fetch (async, ranges in order, two at a time) ──Bytes──▶ unpack (a thread of its own)
//! ```
//! A volume that is missing, unreachable or damaged in one repository is taken from the next; what the failed attempt
//! wrote is written again.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::error::{CopyFault, Faults, RestoreError};
use super::members;
use super::site::{CONTROL, Site};
use super::unpack::{UnpackFault, unpack};
use crate::catalog::backup::{BackupFile, ConfigEntry};
use crate::catalog::manifest::{Manifest, ManifestCollector};
use crate::catalog::store::place;
use crate::catalog::{Archive, CatalogError};
use crate::codec::Form;
use crate::codec::decode::{DecodeError, ObjectDecoder};
use crate::codec::encrypt::{DecryptError, Decryptor, Identities};
use crate::error::{Advice, Disposition};
use crate::repository::{Key, StoreErrorKind};
use crate::restore::plan::RestorePlan;
use crate::restore::wal_get::Holder;

/// Chunks of one volume in memory: being fetched, waiting, being unpacked.
const FETCHES: usize = 2;
const WAITING: usize = 1;
const CHUNKS_OF_A_JOB: u64 = FETCHES as u64 + WAITING as u64 + 1;
/// Of stored bytes, all jobs together.
const MEMORY_BYTES: u64 = 64 << 20;
const CHUNK_BYTES_MAX: u64 = 4 << 20;
pub const JOBS_MAX: usize = 16;
/// No single question to a store may hang longer.
const ANSWER_DEADLINE: Duration = Duration::from_secs(120);
/// How long a store that does not answer is asked again before another copy is taken.
const PATIENCE: Duration = Duration::from_secs(20);
const RETRY_PAUSE: Duration = Duration::from_millis(200);
const RETRY_PAUSE_MAX: Duration = Duration::from_secs(3);
/// A million files take about 150 MB.
const MANIFEST_BYTES_MAX: u64 = 4 << 30;
/// Without them it is no data directory.
const NEEDED: [&[u8]; 3] = [b"PG_VERSION", b"backup_label", CONTROL];
pub const CONFIG_BYTES_MAX: u64 = 16 << 20;
/// Enough of an encrypted object to tell whether it can be read.
const KEY_PROBE_BYTES: u64 = 64 << 10;

/// The backup in one repository, which has been looked at.
#[derive(Clone, Debug)]
pub struct Copy {
    pub repository: String,
    pub archive: Archive,
    pub backup: BackupFile,
}

/// How large the pieces are that so many jobs fetch at a time.
pub fn chunk_bytes(jobs: usize) -> u64 {
    (MEMORY_BYTES / (jobs as u64 * CHUNKS_OF_A_JOB)).min(CHUNK_BYTES_MAX)
}

/// The repositories of the plan that hold the backup now, and can be read with the keys at hand.
pub async fn open(plan: &RestorePlan, holders: &[Holder]) -> Result<Vec<Copy>, RestoreError> {
    let planned = plan.backup();
    let mut copies = Vec::new();
    let mut faults = Faults::default();
    for one in &plan.copies {
        let Some(holder) = holders.iter().find(|holder| holder.repository == one.repository) else { continue };
        let copy =
            Copy { repository: one.repository.clone(), archive: holder.archive.clone(), backup: one.backup().clone() };
        match examine(&copy, planned).await {
            Ok(()) => copies.push(copy),
            Err(fault) => {
                tracing::warn!(repository = one.repository, "its copy of the backup is not used: {fault}");
                faults.0.push((one.repository.clone(), fault));
            }
        }
    }
    match copies.is_empty() {
        true => Err(faults.no_copy(planned.id)),
        false => Ok(copies),
    }
}

/// Asked after the pin was put: whoever deletes looks at pins after it has said that the backup is dead.
async fn examine(copy: &Copy, planned: &BackupFile) -> Result<(), CopyFault> {
    let different = |fault: &str| Err(CopyFault::Different { fault: fault.to_string() });
    let object = || place(copy.archive.backend.as_ref(), &copy.archive.lineage.backup_json(planned.id));
    let record = patiently(|| copy.archive.backup_record(planned.id)).await?;
    match record.complete() {
        None if record.is_dead => return different("it is being deleted"),
        None => return Err(CopyFault::Missing { object: object() }),
        Some(found) if *found != copy.backup => return different("backup.json has changed since the plan was made"),
        Some(_) => {}
    }
    let facts = |backup: &BackupFile| {
        let volume = |volume: &crate::catalog::backup::VolumeEntry| (volume.name(), volume.raw_bytes, volume.raw_crc32);
        let volumes: Vec<_> = backup.volumes.iter().map(volume).collect();
        (backup.manifest.clone(), backup.tablespaces.clone(), volumes)
    };
    if facts(&copy.backup) != facts(planned) {
        return different("its content is not that of the copy the plan was made from");
    }
    let encrypted = copy.backup.volumes.iter().position(|volume| volume.form == Form::Encrypted);
    match encrypted {
        Some(index) => probe_key(copy, index).await,
        None => Ok(()),
    }
}

async fn probe_key(copy: &Copy, index: usize) -> Result<(), CopyFault> {
    let volume = &copy.backup.volumes[index];
    let key = copy.archive.lineage.volume(copy.backup.id, volume.name(), volume.form);
    let object = place(copy.archive.backend.as_ref(), &key);
    let about_keys = |error: DecodeError| CopyFault::Key { object: object.clone(), source: error };
    let decoder = ObjectDecoder::new(volume.form, copy.archive.keys.identities.as_ref(), volume.raw_bytes);
    let mut decoder = decoder.map_err(about_keys)?;
    let first = fetch(&copy.archive, &key, 0..volume.stored_bytes.min(KEY_PROBE_BYTES)).await?;
    match decoder.feed(&first, &mut |_| Ok(())) {
        Err(error) if error.is_about_keys() => Err(about_keys(error)),
        // Damage is found, and got around, where the volume is read.
        _ => Ok(()),
    }
}

/// The manifest, from the first copy that has it whole. What it lists can be written as it is named.
pub async fn manifest(copies: &[Copy]) -> Result<Manifest, RestoreError> {
    let mut faults = Faults::default();
    for copy in copies {
        let mut collector = ManifestCollector::default();
        let mut parsed = Ok(());
        let read = each_of_manifest(copy, |chunk| {
            parsed = collector.push(chunk);
            parsed.is_ok()
        });
        let fault = match (read.await, parsed.and_then(|()| collector.finish())) {
            (Err(fault), _) => fault,
            (Ok(()), Err(error)) => damaged_manifest(copy, error.to_string()),
            (Ok(()), Ok(manifest)) => match contradiction(&manifest, &copy.backup) {
                Some(fault) => damaged_manifest(copy, fault),
                None => return Ok(manifest),
            },
        };
        faults.note(copy, "the manifest", fault);
    }
    Err(faults.unobtainable(copies, "the manifest"))
}

/// The manifest's own bytes, from the first copy that has them whole.
pub async fn manifest_bytes(copies: &[Copy], sink: &mut (dyn FnMut(Option<&[u8]>) + Send)) -> Result<(), RestoreError> {
    let mut faults = Faults::default();
    for copy in copies {
        sink(None);
        match each_of_manifest(copy, |chunk| {
            sink(Some(chunk));
            true
        })
        .await
        {
            Ok(()) => return Ok(()),
            Err(fault) => faults.note(copy, "the manifest", fault),
        }
    }
    Err(faults.unobtainable(copies, "the manifest"))
}

/// Hands the manifest over piece by piece, until `take` has had enough; its CRC-32 is checked at its end.
async fn each_of_manifest(copy: &Copy, mut take: impl FnMut(&[u8]) -> bool) -> Result<(), CopyFault> {
    let key = copy.archive.lineage.backup_manifest(copy.backup.id);
    let entry = &copy.backup.manifest;
    if entry.bytes > MANIFEST_BYTES_MAX {
        return Err(damaged_manifest(copy, format!("{} bytes is more than a manifest has", entry.bytes)));
    }
    let mut crc32 = crc32fast::Hasher::new();
    for range in ranges(entry.bytes, CHUNK_BYTES_MAX) {
        let chunk = fetch(&copy.archive, &key, range).await?;
        crc32.update(&chunk);
        if !take(&chunk) {
            return Ok(());
        }
    }
    match crc32.finalize() {
        found if found == entry.crc32.0 => Ok(()),
        found => Err(damaged_manifest(copy, format!("its CRC-32 is {found:08x}, not {:08x}", entry.crc32.0))),
    }
}

fn damaged_manifest(copy: &Copy, fault: String) -> CopyFault {
    let key = copy.archive.lineage.backup_manifest(copy.backup.id);
    CopyFault::Damaged { object: place(copy.archive.backend.as_ref(), &key), fault }
}

/// Why this cannot be the manifest of this backup.
fn contradiction(manifest: &Manifest, backup: &BackupFile) -> Option<String> {
    let summary = &manifest.summary;
    if let Some(found) = summary.system_id.filter(|&id| id != backup.system_id) {
        return Some(format!("it is of system {found}"));
    }
    if summary.files != backup.manifest.files {
        return Some(format!("it lists {} files, backup.json says {}", summary.files, backup.manifest.files));
    }
    if let Some(missing) = NEEDED.iter().find(|path| manifest.files.find(path).is_none()) {
        return Some(format!("it lists no {}", crate::codec::tar::shown(missing)));
    }
    let mut bytes: u64 = 0;
    for file in manifest.files.iter() {
        if !members::is_plain(&file.path) {
            let path = crate::codec::tar::shown(&file.path);
            return Some(format!("it lists \"{path}\", which is no path in a data directory"));
        }
        bytes = bytes.saturating_add(file.size);
    }
    (bytes > backup.raw_bytes).then(|| format!("its files have {bytes} bytes, the volumes {}", backup.raw_bytes))
}

/// One volume's files, from the first copy that has it whole.
pub async fn volume(site: &Arc<Site>, copies: &[Copy], index: usize, chunk_bytes: u64) -> Result<(), RestoreError> {
    let what = format!("volume {}", copies[0].backup.volumes[index].name());
    let mut faults = Faults::default();
    for copy in copies {
        match attempt(site, copy, index, chunk_bytes).await {
            Ok(()) => return Ok(()),
            Err(Failed::Here(error)) => return Err(error),
            Err(Failed::Copy(fault)) => faults.note(copy, &what, fault),
        }
    }
    Err(faults.unobtainable(copies, &what))
}

enum Failed {
    Here(RestoreError),
    Copy(CopyFault),
}

async fn attempt(site: &Arc<Site>, copy: &Copy, index: usize, chunk_bytes: u64) -> Result<(), Failed> {
    let entry = copy.backup.volumes[index].clone();
    let key = copy.archive.lineage.volume(copy.backup.id, entry.name(), entry.form);
    let object = place(copy.archive.backend.as_ref(), &key);
    let about_keys = |source| Failed::Copy(CopyFault::Key { object: object.clone(), source });
    let decoder = ObjectDecoder::new(entry.form, copy.archive.keys.identities.as_ref(), entry.raw_bytes);
    let decoder = decoder.map_err(about_keys)?;
    let ours = site.accounts.attempt();
    let (sender, chunks) = mpsc::channel(WAITING);
    let unpacked = {
        let (site, entry) = (site.clone(), entry.clone());
        tokio::task::spawn_blocking(move || unpack(&site, &entry, ours, decoder, chunks))
    };
    let fetched = feed(copy, &key, entry.stored_bytes, chunk_bytes, sender).await;
    let unpacked = match unpacked.await {
        Ok(unpacked) => unpacked,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(UnpackFault::CutShort),
    };
    let failed = match (fetched, unpacked) {
        (Ok(()), Ok(())) => return Ok(()),
        (_, Err(UnpackFault::Here(error))) => return Err(Failed::Here(error)),
        (_, Err(UnpackFault::Key(error))) => about_keys(error),
        (Ok(()), Err(UnpackFault::Damaged(fault))) => Failed::Copy(CopyFault::Damaged { object, fault }),
        (Err(_), Err(UnpackFault::Damaged(fault))) => Failed::Copy(CopyFault::Damaged { object, fault }),
        (Err(fault), _) => Failed::Copy(fault),
        (Ok(()), Err(UnpackFault::CutShort)) => {
            Failed::Copy(CopyFault::Damaged { object, fault: "it ends too early".to_string() })
        }
    };
    site.accounts.release(ours);
    Err(failed)
}

/// Sends a volume's stored bytes, in order; ends early, without an error, when nobody takes them any more.
async fn feed(
    copy: &Copy,
    key: &Key,
    stored_bytes: u64,
    chunk_bytes: u64,
    sender: mpsc::Sender<Bytes>,
) -> Result<(), CopyFault> {
    let fetches = stream::iter(ranges(stored_bytes, chunk_bytes)).map(|range| fetch(&copy.archive, key, range));
    let mut fetches = std::pin::pin!(fetches.buffered(FETCHES));
    while let Some(chunk) = fetches.next().await {
        if sender.send(chunk?).await.is_err() {
            break;
        }
    }
    Ok(())
}

/// A small object in memory: configuration.
pub async fn config(copies: &[Copy], index: usize) -> Result<Vec<u8>, RestoreError> {
    let what = format!("configuration file {}", copies[0].backup.config[index].name);
    let mut faults = Faults::default();
    for copy in copies {
        let Some(entry) = copy.backup.config.get(index) else { continue };
        match read_config(copy, entry).await {
            Ok(content) => return Ok(content),
            Err(fault) => faults.note(copy, &what, fault),
        }
    }
    Err(faults.unobtainable(copies, &what))
}

async fn read_config(copy: &Copy, entry: &ConfigEntry) -> Result<Vec<u8>, CopyFault> {
    let refused = |fault: &str| CopyFault::Damaged { object: entry.name.clone(), fault: fault.to_string() };
    let key = copy.archive.lineage.backup_config(copy.backup.id, &entry.name, entry.form);
    let key = key.ok_or_else(|| refused("its name leads elsewhere"))?;
    if entry.stored_bytes > CONFIG_BYTES_MAX || entry.raw_bytes > CONFIG_BYTES_MAX {
        return Err(refused("it is larger than a configuration file"));
    }
    let object = place(copy.archive.backend.as_ref(), &key);
    let damaged = |fault: String| CopyFault::Damaged { object: object.clone(), fault };
    let stored = fetch(&copy.archive, &key, 0..entry.stored_bytes).await?;
    if crc32fast::hash(&stored) != entry.stored_crc32.0 {
        return Err(damaged("its bytes are not those that were stored".to_string()));
    }
    let content = opened(entry.form, copy.archive.keys.identities.as_ref(), &stored).map_err(|error| {
        match error.is_about_keys() {
            true => CopyFault::Key { object: object.clone(), source: error },
            false => damaged(error.to_string()),
        }
    })?;
    match crc32fast::hash(&content) == entry.raw_crc32.0 {
        true => Ok(content),
        false => Err(damaged("its content is not what it was".to_string())),
    }
}

/// Configuration is stored as it is, or as an age stream of that.
fn opened(form: Form, identities: Option<&Identities>, stored: &[u8]) -> Result<Vec<u8>, DecodeError> {
    if form == Form::Plain {
        return Ok(stored.to_vec());
    }
    let mut content = Vec::new();
    let mut sink = |plain: &[u8]| -> Result<(), DecodeError> {
        content.extend_from_slice(plain);
        Ok(())
    };
    let mut decryptor = Decryptor::new(identities.ok_or(DecryptError::NoIdentity)?);
    decryptor.feed(stored, &mut sink)?;
    decryptor.finish(&mut sink)?;
    Ok(content)
}

fn ranges(bytes: u64, step: u64) -> impl Iterator<Item = std::ops::Range<u64>> {
    (0..bytes.div_ceil(step)).map(move |index| index * step..((index + 1) * step).min(bytes))
}

async fn fetch(archive: &Archive, key: &Key, range: std::ops::Range<u64>) -> Result<Bytes, CopyFault> {
    let object = || place(archive.backend.as_ref(), key);
    let wanted = range.end - range.start;
    let fetched = patiently(|| async { Ok(archive.backend.fetch(key, range.clone()).await?) }).await;
    match fetched {
        Ok(chunk) if chunk.len() as u64 == wanted => Ok(chunk),
        Ok(chunk) => {
            let fault = format!("{} of {wanted} bytes could be read from byte {} on", chunk.len(), range.start);
            Err(CopyFault::Damaged { object: object(), fault })
        }
        Err(CopyFault::Catalog(CatalogError::Store(error))) if error.is(StoreErrorKind::NotFound) => {
            Err(CopyFault::Missing { object: object() })
        }
        Err(fault) => Err(fault),
    }
}

/// Asks again while the store may answer in a moment.
async fn patiently<T, F>(ask: impl Fn() -> F) -> Result<T, CopyFault>
where
    F: Future<Output = Result<T, CatalogError>>,
{
    let started = Instant::now();
    let mut pause = RETRY_PAUSE;
    loop {
        let fault = match tokio::time::timeout(ANSWER_DEADLINE, ask()).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(CatalogError::Store(error))) if error.is(StoreErrorKind::NotFound) => {
                return Err(CatalogError::Store(error).into());
            }
            Ok(Err(error)) if error.disposition() == Disposition::Retry => CopyFault::from(error),
            Ok(Err(error)) => return Err(error.into()),
            Err(_) => CopyFault::Silent { seconds: ANSWER_DEADLINE.as_secs() },
        };
        if started.elapsed() + pause > PATIENCE {
            return Err(fault);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY_PAUSE_MAX);
    }
}

impl Faults {
    fn note(&mut self, copy: &Copy, what: &str, fault: CopyFault) {
        tracing::warn!(repository = copy.repository, "{what} cannot be had from it: {fault}");
        self.0.push((copy.repository.clone(), fault));
    }

    fn unobtainable(self, copies: &[Copy], what: &str) -> RestoreError {
        let backup = copies[0].backup.id;
        self.key_error().unwrap_or_else(|faults| RestoreError::Unobtainable { backup, what: what.to_string(), faults })
    }

    fn no_copy(self, backup: crate::repository::layout::BackupId) -> RestoreError {
        self.key_error().unwrap_or_else(|faults| RestoreError::NoCopy { backup, faults })
    }

    /// A key is what helps, if one of them only lacks that.
    fn key_error(mut self) -> Result<RestoreError, Faults> {
        let is_key = |(_, fault): &(String, CopyFault)| matches!(fault, CopyFault::Key { .. });
        match self.0.iter().position(is_key).map(|at| self.0.swap_remove(at)) {
            Some((_, CopyFault::Key { object, source })) => Ok(RestoreError::Key { object, source }),
            _ => Err(self),
        }
    }
}
