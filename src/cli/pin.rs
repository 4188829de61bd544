//! Owns: `pin` and `unpin`: an operator's word that a backup stays, in every repository that holds it.
//! Does not own: what a pin means to retention, pins of restores.

use jiff::Timestamp;

use super::args::{Global, PinArgs};
use super::list::shelves;
use super::repositories::{self, Look};
use super::{Verdict, output, setup};
use crate::catalog::Archive;
use crate::catalog::backup::{BackupFile, PinFile, PinKind};
use crate::catalog::shelf::Shelf;
use crate::config::ArchiveConfig;
use crate::error::{Disposition, ExitCode, Failure};
use crate::repository::layout::{BackupId, Lineage, PinName};

/// What is done to a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Word {
    Pin,
    Unpin,
}

pub fn run(global: &Global, args: &PinArgs, word: Word) -> Result<Verdict, Failure> {
    let id: BackupId = args
        .backup
        .parse()
        .map_err(|error: crate::repository::layout::BackupIdError| Failure::new(ExitCode::Usage, error.to_string()))?;
    let archives = setup::archives(global)?;
    let archive = ArchiveConfig::choose(&archives, global.cluster.as_deref())?.clone();
    let done = setup::block_on(say(&archive, id, word))??;
    let (verb, already) = match word {
        Word::Pin => ("pinned", "is pinned already"),
        Word::Unpin => ("no longer pinned", "is not pinned"),
    };
    match done.is_empty() {
        true => output::note(format_args!("{id} {already}")),
        false => output::note(format_args!("{id} {verb} in {}", done.join(", "))),
    }
    Ok(Verdict::Fine)
}

/// The names of the repositories in which anything had to be said.
async fn say(config: &ArchiveConfig, id: BackupId, word: Word) -> Result<Vec<String>, Failure> {
    let looks = repositories::look(&config.repositories, &config.cluster).await;
    let lineages = repositories::all_lineages(&looks);
    if lineages.is_empty() {
        return Err(repositories::nothing(&looks, &config.cluster));
    }
    let (mut is_there, mut done, mut unread) = (false, Vec::new(), None);
    for (lineage, _) in lineages {
        let (shelves, missing) = shelves(&looks, &lineage).await;
        for (look, shelf) in shelves {
            let Some(file) = shelf.complete().find(|file| file.id == id) else { continue };
            is_there = true;
            let said = match word {
                Word::Pin => pin(look, &lineage, &shelf, file).await?,
                Word::Unpin => unpin(look, &lineage, &shelf, file).await?,
            };
            if said {
                done.push(look.config.name.clone());
            }
        }
        unread = unread.or(missing.into_iter().next());
    }
    match (is_there, unread) {
        (_, Some(unread)) => Err(unread.failure.context(format_args!(
            "repository {} cannot be read; what it holds of {id} is as it was",
            unread.repository
        ))),
        (false, None) => {
            let message = format!("there is no complete backup {id} of cluster {}", config.cluster);
            Err(Failure::new(ExitCode::Usage, message).hint("`seawall list` shows those there are"))
        }
        (true, None) => Ok(done),
    }
}

async fn pin(look: &Look, lineage: &Lineage, shelf: &Shelf, file: &BackupFile) -> Result<bool, Failure> {
    let now = Timestamp::now();
    if shelf.pins_on(file.id, now).next().is_some() {
        return Ok(false);
    }
    let pin = PinFile {
        schema: 1,
        kind: PinKind::Operator,
        backup: file.id,
        from_lsn: None,
        to_lsn: None,
        timeline: file.timeline,
        created: now,
        expires: None,
        released: false,
        host: setup::host_name(),
    };
    let archive = look.archive(lineage);
    let name = loop {
        // Somebody else's number: another one is drawn.
        let name = PinName { id: fastrand::u64(..), number: 1 };
        if archive.put_pin(name, &pin).await? {
            break name;
        }
    };
    // `expire` announces and then looks for pins; here it is the other way round, so that one of the two sees the other.
    if archive.expired().await?.backups().contains(&file.id) {
        lift(&archive, name, &pin).await?;
        let message = format!("backup {} is being removed from {} by `expire`", file.id, look.config.name);
        return Err(Failure::new(ExitCode::TryAgain, message)
            .disposition(Disposition::Retry)
            .hint("`seawall list` shows whether it is kept after all; if so, pin it again"));
    }
    Ok(true)
}

/// Where the number is taken, somebody else has just lifted it.
async fn lift(archive: &Archive, name: PinName, pin: &PinFile) -> Result<(), Failure> {
    let next = PinName { id: name.id, number: name.number + 1 };
    let lifted = PinFile { released: true, created: Timestamp::now(), host: setup::host_name(), ..pin.clone() };
    archive.put_pin(next, &lifted).await?;
    Ok(())
}

/// Lifts every pin of an operator there is.
async fn unpin(look: &Look, lineage: &Lineage, shelf: &Shelf, file: &BackupFile) -> Result<bool, Failure> {
    let now = Timestamp::now();
    let mut said = false;
    for (name, pin) in shelf.pins_on(file.id, now) {
        lift(&look.archive(lineage), name, pin).await?;
        said = true;
    }
    Ok(said)
}
