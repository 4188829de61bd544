//! Owns: `wal-get`: which repositories, which keys, which lineage and which restore a `restore_command` is about.
//! Does not own: what is delivered, absent or a hole (`restore/wal_get.rs`), what is fetched ahead (`restore/prefetch`),
//! the process that does it (`wal_get/helper.rs`), the exit code's contract (`mod.rs`).

pub mod helper;

use std::ffi::OsString;
use std::future::Future;
use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;

use super::args::{Global, WalGetArgs};
use super::repositories::{self, Look};
use super::{Verdict, keys, setup};
use crate::catalog::store::Archive;
use crate::config::{ArchiveConfig, RepositoryConfig};
use crate::error::{Disposition, ExitCode, Failure};
use crate::repository::layout::Lineage;
use crate::restore::marker::RestoreMarker;
use crate::restore::prefetch::{self, Answer};
use crate::restore::wal_get::{Holder, Outcome, PathChoice, WalGet, read_system_id};
use crate::wal::SystemId;

const RETRY_PAUSE: Duration = Duration::from_millis(200);

pub fn run(global: &Global, args: &WalGetArgs) -> Result<Verdict, Failure> {
    if let Some(id) = args.restore_end {
        helper::end_restore(global, id);
        return Ok(Verdict::Fine);
    }
    let marker = match args.restore {
        Some(id) => RestoreMarker::read(Path::new("."))?.filter(|marker| marker.id == id),
        None => None,
    };
    let config = config(global, marker.as_ref())?;
    if args.prefetch {
        return helper::run(&config, args, marker);
    }
    let (Some(name), Some(dest)) = (&args.name, &args.dest) else {
        return Err(Failure::new(ExitCode::Usage, "a name and a destination are needed").hint("seawall wal-get %f %p"));
    };
    match (&marker, args.restore) {
        (Some(marker), _) if args.ahead > 0 => helper::start(marker.id, name),
        (None, Some(id)) => tracing::info!("restore {id} is over: the newest line of the archive is followed"),
        _ => {}
    }
    match setup::block_on(deliver(&config, args, marker.as_ref(), name, dest))?? {
        Outcome::Delivered => Ok(Verdict::Fine),
        Outcome::Absent(absence) => {
            tracing::info!(name, "not in the archive: {absence}");
            Ok(Verdict::Finding)
        }
    }
}

/// What can be done without configuration, runtime or store: most requests of a recovery. `None`: all the rest.
pub fn at_once(arguments: &[OsString]) -> Option<Verdict> {
    let (name_at, id) = (helper::name_at(arguments)?, helper::restore_id(arguments)?);
    let dest = Path::new(arguments.get(name_at + 1)?);
    match prefetch::deliver(id, arguments[name_at].to_str()?, dest) {
        Answer::Delivered => Some(Verdict::Fine),
        Answer::Absent => Some(Verdict::Finding),
        Answer::Direct | Answer::NoHelper => None,
    }
}

fn config(global: &Global, marker: Option<&RestoreMarker>) -> Result<ArchiveConfig, Failure> {
    let archives = setup::archives(global)?;
    let cluster = global.cluster.as_deref().or(marker.map(|marker| marker.cluster.as_str()));
    Ok(ArchiveConfig::choose(&archives, cluster)?.clone())
}

async fn deliver(
    config: &ArchiveConfig,
    args: &WalGetArgs,
    marker: Option<&RestoreMarker>,
    name: &str,
    dest: &Path,
) -> Result<Outcome, Failure> {
    let wal_get = match marker {
        Some(marker) => of_restore(config, marker)?,
        None => {
            let repositories = repositories::nearest_first(&config.repositories);
            let lineage = patiently(args.patience, || lineage(&repositories, &config.cluster, args)).await?;
            WalGet::new(holders(config, &lineage)?, args.timeline.map_or(PathChoice::Latest, PathChoice::Timeline))
        }
    };
    Ok(WalGet { patience: args.patience, ..wal_get }.get(name, dest).await?)
}

/// What a restore has planned with.
fn of_restore(config: &ArchiveConfig, marker: &RestoreMarker) -> Result<WalGet, Failure> {
    let lineage = marker.lineage().expect("a marker that was read has one");
    let wal_get = WalGet::new(holders(config, &lineage)?, prefetch::path_choice(marker));
    Ok(WalGet { plan_end: marker.end_lsn, ..wal_get })
}

fn holders(config: &ArchiveConfig, lineage: &Lineage) -> Result<Vec<Holder>, Failure> {
    let keys = keys::reading(config.identity_file.as_deref())?;
    let holder = |repository: &RepositoryConfig| {
        let archive = Archive::new(setup::backend(repository), lineage.clone()).with_keys(keys.clone());
        Holder::new(&repository.name, archive)
    };
    Ok(repositories::nearest_first(&config.repositories).iter().map(holder).collect())
}

/// Asks again while the store may answer in a moment.
async fn patiently<T, F>(patience: Duration, mut ask: impl FnMut() -> F) -> Result<T, Failure>
where
    F: Future<Output = Result<T, Failure>>,
{
    let started = Instant::now();
    loop {
        match ask().await {
            Err(failure)
                if failure.disposition == Disposition::Retry && started.elapsed() + RETRY_PAUSE <= patience =>
            {
                tokio::time::sleep(RETRY_PAUSE).await;
            }
            answered => return answered,
        }
    }
}

/// The lineage that is named, else the newest of the system whose data directory this is, else the cluster's newest:
/// of those that any repository holds that can be read. Whether all can be is asked again for each answer.
async fn lineage(repositories: &[RepositoryConfig], cluster: &str, args: &WalGetArgs) -> Result<Lineage, Failure> {
    if let Some(name) = &args.lineage {
        return Lineage::parse(cluster, name).ok_or_else(|| {
            Failure::new(ExitCode::Usage, format!("{name:?} is not a lineage's name"))
                .hint("it is a directory below the cluster's: <system-id> or <system-id>-<n>")
        });
    }
    let looks = repositories::look(repositories, cluster).await;
    let lineages = repositories::all_lineages(&looks);
    let found = match system_id(Path::new("."))? {
        Some(id) => {
            let ours = lineages.iter().filter(|(lineage, _)| lineage.system_id == id);
            ours.max_by_key(|(lineage, _)| lineage.ordinal)
                .ok_or_else(|| no_lineage(format!("nothing of system {id} for cluster {cluster}"), &looks))
        }
        None => lineages.last().ok_or_else(|| no_lineage(format!("nothing for cluster {cluster}"), &looks)),
    };
    found.map(|(lineage, _)| lineage.clone())
}

/// One that cannot be read may have it.
fn no_lineage(what: String, looks: &[Look]) -> Failure {
    if let Some(unreadable) = looks.iter().find_map(|look| look.readable().err()) {
        return unreadable;
    }
    let locations: Vec<String> = looks.iter().map(|look| look.backend.describe()).collect();
    let names: Vec<String> =
        repositories::all_lineages(looks).iter().map(|(lineage, _)| lineage.directory_name()).collect();
    let failure = Failure::new(ExitCode::Config, format!("{} holds {what}", locations.join(" or ")));
    match names.is_empty() {
        true => failure.hint("is --cluster right, and is `url` (or --repository) the right one?"),
        false => failure.hint(format!("name one with --lineage: {}", names.join(", "))),
    }
}

/// Of the data directory this is, if it is one.
fn system_id(directory: &Path) -> Result<Option<SystemId>, Failure> {
    match read_system_id(directory) {
        Ok(id) => Ok(Some(id)),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(error) => {
            Err(Failure::new(ExitCode::Permission, format!("could not read global/pg_control here: {error}"))
                .hint("run it as the owner of the data directory, or name the archive with --lineage"))
        }
    }
}
