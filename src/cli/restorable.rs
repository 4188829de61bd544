//! Owns: reading what questions about restoring are asked of: the WAL and the backups of a lineage, in all repositories.
//! Does not own: what can be restored (`restore/reach.rs`), how it is shown (the verbs).

use futures_util::future::join_all;

use super::repositories::{self, Look, Unread};
use crate::catalog::{BackupRecord, Holdings};
use crate::error::{ExitCode, Failure};
use crate::repository::layout::Lineage;
use crate::restore::reach::{self, KnownBackup, Reach};

/// One lineage, as all repositories that can be read hold it together.
#[derive(Debug)]
pub struct Restorable {
    pub held: Holdings,
    /// Complete ones.
    pub backups: Vec<KnownBackup>,
    /// They may hold more.
    pub unread: Vec<Unread>,
}

impl Restorable {
    pub fn reach(&self) -> Reach<'_> {
        Reach::new(&self.held, &self.backups)
    }
}

pub async fn read(looks: &[Look], lineage: &Lineage) -> Result<Restorable, Failure> {
    // The backups first: what a complete one needs is there before it is.
    let (records, mut unread) = records(looks, lineage).await;
    let (copies, unread_copies) = repositories::copies(looks, lineage).await;
    for unread_copy in unread_copies {
        if unread.iter().all(|known| known.repository != unread_copy.repository) {
            unread.push(unread_copy);
        }
    }
    if copies.is_empty() {
        return Err(unread.into_iter().next().expect("a lineage was found somewhere").failure);
    }
    let held = repositories::union(lineage, &copies)?;
    let records: Vec<(&str, &[BackupRecord])> = records.iter().map(|(name, of)| (*name, of.as_slice())).collect();
    let backups = reach::known_backups(&records).map_err(|error| {
        Failure::new(ExitCode::Data, error.to_string())
            .hint("they are no copies of one archive: choose one by leaving the others out of `repositories`")
    })?;
    Ok(Restorable { held, backups, unread })
}

/// What each repository has of backups, in the order given.
async fn records<'a>(looks: &'a [Look], lineage: &Lineage) -> (Vec<(&'a str, Vec<BackupRecord>)>, Vec<Unread>) {
    let holders: Vec<&Look> = looks.iter().filter(|look| look.file_of(lineage).is_some()).collect();
    let read = holders.iter().map(|look| async { look.archive(lineage).backup_records().await.map_err(Failure::from) });
    let (mut records, mut unread) = (Vec::new(), Vec::new());
    for (look, read) in holders.iter().zip(join_all(read).await) {
        let name = look.config.name.as_str();
        match read {
            Ok(found) => records.push((name, found)),
            Err(failure) => unread.push(Unread { repository: name.to_string(), failure }),
        }
    }
    (records, unread)
}
