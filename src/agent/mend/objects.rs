//! Owns: making whole what can only be made whole in its own place: objects of backups, histories, tails. The damaged
//! object is deleted under the lease, when what replaces it is here.
//! Does not own: segments (`mod.rs`), which get a repair beside them.

use super::server::{Asked, Servers};
use super::{Case, Mender, Outcome};
use crate::agent::backup::lease::{Lease, Patience, Tenant};
use crate::archiver::copy::{self, Expected, Trouble};
use crate::archiver::{ArchiveError, Writer, mend};
use crate::catalog::backup::BackupFile;
use crate::catalog::damage::Damage;
use crate::catalog::store::Archive;
use crate::catalog::{CatalogError, TailObject};
use crate::codec::Form;
use crate::error::Failure;
use crate::repository::layout::{BackupId, Lineage, TailName};
use crate::repository::{Key, StoreError, StoreErrorKind};
use crate::wal::{SegmentName, TimelineId};

impl Mender {
    /// The object goes with nothing in its place: what it is of is told damaged.
    pub(super) async fn delete(&self, case: &Case<'_>, target: &Writer, damage: &Damage) -> Result<(), Trouble> {
        let Some(key) = target.archive.lineage.object(&damage.object) else { return Ok(()) };
        let lease = self.lease(case).await?;
        let deleted = async {
            confirm(&lease).await?;
            Ok(target.call_once(target.archive.backend.delete_all(&[key])).await?)
        };
        let deleted = deleted.await;
        lease.release().await;
        deleted
    }

    /// A tail nobody needs any more, or another repository's copy of it.
    pub(super) async fn mend_tail(
        &self,
        case: &Case<'_>,
        target: &Writer,
        name: SegmentName,
        tail: &TailName,
    ) -> Result<Outcome, Trouble> {
        let archive = &target.archive;
        let contents = target.retry(|| archive.directory_around(name, case.segment_size)).await?;
        if contents.sealed(name).is_some() {
            return Ok(Outcome::Mended("its segment is stored whole by now".to_string(), case.place.id.clone()));
        }
        let expected = match tail.form {
            form @ Form::Plain => Expected::Raw { crc32: tail.raw_crc32, bytes: tail.to - tail.from, form },
            Form::Encrypted => Expected::Length,
        };
        for source in case.others() {
            let listed: Vec<TailObject> = copy::ask(source.archive.tails(name, case.segment_size)).await?;
            let damages = copy::ask(source.archive.damages()).await?;
            let key = source.archive.lineage.tail(name, tail);
            let is_good = damages.iter().all(|damage| source.archive.lineage.below(&key) != Some(&damage.object));
            let Some(theirs) = listed.iter().find(|theirs| theirs.name == *tail).filter(|_| is_good) else { continue };
            let keys = (&key, &archive.lineage.tail(name, tail));
            if self.replace(case, target, &source.archive, keys, theirs.stored_bytes, expected).await? {
                return Ok(Outcome::Mended("copied from another repository".to_string(), source.id.clone()));
            }
        }
        Ok(Outcome::Later(
            "no other repository has it; the next tails, or the whole segment, will replace it".to_string(),
        ))
    }

    pub(super) async fn mend_history(
        &self,
        case: &Case<'_>,
        target: &Writer,
        timeline: TimelineId,
    ) -> Result<Outcome, Trouble> {
        let archive = &target.archive;
        let mut found = None;
        for source in case.others() {
            match copy::ask(source.archive.history(timeline)).await {
                Ok(Some((content, _))) => {
                    found = Some((content, source.id.clone(), "copied from another repository"));
                    break;
                }
                Ok(None) => {}
                Err(trouble) => tracing::debug!(repository = source.name, %trouble, "its history cannot be had"),
            }
        }
        if found.is_none() {
            let servers = match Servers::new(&self.world, archive.lineage.system_id, &case.watched.address) {
                Ok(servers) => servers,
                Err(failure) => return Ok(Outcome::Later(failure.to_string())),
            };
            match servers.history(timeline).await {
                Asked::Got(content, host) => found = Some((content, host, "given by the server once more")),
                Asked::Gone(why) | Asked::Unknown(why) => return Ok(Outcome::Later(why)),
            }
        }
        let (content, by, how) = found.expect("looked for above");
        if let Ok(Some((stored, _))) = target.retry(|| archive.history(timeline)).await
            && stored == content
        {
            return Ok(Outcome::Mended("it reads well".to_string(), case.place.id.clone()));
        }
        let lease = self.lease(case).await?;
        let key = archive.lineage.history(timeline);
        let replaced = mend::replace_with(target, &key, content, || confirm(&lease)).await;
        lease.release().await;
        replaced.map(|()| Outcome::Mended(how.to_string(), by))
    }

    /// An object of a backup that another repository has, the very same.
    pub(super) async fn mend_backup(
        &self,
        case: &Case<'_>,
        target: &Writer,
        id: BackupId,
        damage: &Damage,
    ) -> Result<Outcome, Trouble> {
        let archive = &target.archive;
        let Some(key) = archive.lineage.object(&damage.object) else {
            return Ok(Outcome::Lost("its name is none of ours".to_string()));
        };
        let record = target.retry(|| archive.backup_record(id)).await?;
        if record.is_dead {
            return Ok(Outcome::Mended("the backup is being deleted".to_string(), case.place.id.clone()));
        }
        let mut why = "no other repository has this backup".to_string();
        let mut is_sure = case.is_complete;
        for source in case.others() {
            let theirs = match copy::ask(source.archive.backup_record(id)).await {
                Ok(theirs) => theirs,
                Err(trouble) => {
                    is_sure = false;
                    why = trouble.to_string();
                    continue;
                }
            };
            let Some(file) = theirs.complete() else { continue };
            let wanted = match wanted(target, &key, record.backup.as_ref(), file).await? {
                Ok(wanted) => wanted,
                Err(fault) => {
                    why = fault.to_string();
                    continue;
                }
            };
            let (bytes, expected) = match wanted {
                Wanted::Object { bytes, crc32 } => (bytes, Expected::Stored(crc32)),
                Wanted::Mark => match copy::ask(source.archive.backend.stat(&key)).await? {
                    Some(bytes) => (bytes, Expected::Length),
                    None => continue,
                },
            };
            if self.replace(case, target, &source.archive, (&key, &key), bytes, expected).await? {
                return Ok(Outcome::Mended("copied from another repository".to_string(), source.id.clone()));
            }
            why = "what another repository has of it is damaged too".to_string();
        }
        Ok(if is_sure { Outcome::Lost(why) } else { Outcome::Later(why) })
    }

    /// False where the source's object is not what it should be.
    async fn replace(
        &self,
        case: &Case<'_>,
        target: &Writer,
        source: &Archive,
        keys: (&Key, &Key),
        bytes: u64,
        expected: Expected,
    ) -> Result<bool, Trouble> {
        let lease = self.lease(case).await?;
        let replaced = mend::replace(target, source, keys, bytes, expected, || confirm(&lease)).await;
        lease.release().await;
        match replaced {
            Ok(()) => Ok(true),
            Err(Trouble::Damaged(what)) => {
                tracing::warn!(what, "a copy is damaged too");
                Ok(false)
            }
            Err(trouble) => Err(trouble),
        }
    }

    async fn lease(&self, case: &Case<'_>) -> Result<Lease, Trouble> {
        let holder = format!("{:032x}", self.world.random.lock().expect("no holder panics").u128(..));
        let (host, clock) = (self.options.host.clone(), self.world.clock.clone());
        let tenant = Tenant { holder, host, purpose: "mending what is damaged".to_string(), clock };
        let places = std::slice::from_ref(case.place);
        let acquired = Lease::acquire(places, &tenant, Patience::None).await;
        acquired.map(|(lease, _)| lease).map_err(|failure| unavailable(&failure))
    }
}

async fn confirm(lease: &Lease) -> Result<(), Trouble> {
    match lease.parts().first() {
        Some(part) => part.confirm().await.map_err(|failure| unavailable(&failure)),
        None => Ok(()),
    }
}

fn unavailable(failure: &Failure) -> Trouble {
    let error = StoreError::new(StoreErrorKind::Unavailable, "lock", "the lineage".to_string(), failure.to_string());
    Trouble::Target(ArchiveError::Store(error))
}

/// What an object of a backup has to be.
enum Wanted {
    Object {
        bytes: u64,
        crc32: u32,
    },
    /// `backup.json` itself, of a repository that has the same objects.
    Mark,
}

/// What the object `key` of a backup has to be, by its own `backup.json` or, where that cannot be read, by another
/// repository's; the fault where theirs is not the same object.
async fn wanted(
    target: &Writer,
    key: &Key,
    own: Option<&BackupFile>,
    theirs: &BackupFile,
) -> Result<Result<Wanted, &'static str>, Trouble> {
    let lineage = &target.archive.lineage;
    if *key == lineage.backup_json(theirs.id) {
        return match own {
            Some(_) => Ok(Err("it reads well: what is wrong with it is not known")),
            None => Ok(holds_the_same(target, theirs).await?.then_some(Wanted::Mark).ok_or("their objects are others")),
        };
    }
    let Some(own) = own else { return Ok(Err("backup.json has to be whole first")) };
    let found = (object_in(lineage, key, own), object_in(lineage, key, theirs));
    Ok(match found {
        (Some(ours), Some(theirs)) if ours == theirs => Ok(Wanted::Object { bytes: ours.0, crc32: ours.1 }),
        (Some(_), _) => Err("another repository stored other bytes for it"),
        (None, _) => Err("backup.json does not say what it holds"),
    })
}

/// Length and CRC-32 of an object, as stored.
fn object_in(lineage: &Lineage, key: &Key, file: &BackupFile) -> Option<(u64, u32)> {
    if *key == lineage.backup_manifest(file.id) {
        return Some((file.manifest.bytes, file.manifest.crc32.0));
    }
    let volumes = file.volumes.iter().map(|volume| {
        let is_it = lineage.volume(file.id, volume.name(), volume.form) == *key;
        (is_it, volume.stored_bytes, volume.stored_crc32.0)
    });
    let config = file.config.iter().map(|config| {
        let is_it = lineage.backup_config(file.id, &config.name, config.form).as_ref() == Some(key);
        (is_it, config.stored_bytes, config.stored_crc32.0)
    });
    volumes.chain(config).find(|(is_it, ..)| *is_it).map(|(_, bytes, crc32)| (bytes, crc32))
}

/// Whether every object their `backup.json` describes is there, in its length.
async fn holds_the_same(target: &Writer, theirs: &BackupFile) -> Result<bool, CatalogError> {
    let (archive, id) = (&target.archive, theirs.id);
    let lineage = &archive.lineage;
    let volumes =
        theirs.volumes.iter().map(|volume| (lineage.volume(id, volume.name(), volume.form), volume.stored_bytes));
    let manifest = (lineage.backup_manifest(id), theirs.manifest.bytes);
    for (key, bytes) in volumes.chain([manifest]) {
        if archive.backend.stat(&key).await? != Some(bytes) {
            return Ok(false);
        }
    }
    Ok(true)
}
