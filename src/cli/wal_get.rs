//! Owns: `wal-get`: which repositories, which keys and which lineage a `restore_command` is about.
//! Does not own: what is delivered, absent or a hole (`restore/wal_get.rs`), the exit code's contract (`mod.rs`).

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
use crate::restore::wal_get::{Holder, Outcome, PathChoice, WalGet, read_system_id};
use crate::wal::SystemId;

const RETRY_PAUSE: Duration = Duration::from_millis(200);

pub fn run(global: &Global, args: &WalGetArgs) -> Result<Verdict, Failure> {
    let archives = setup::archives(global)?;
    let config = ArchiveConfig::choose(&archives, global.cluster.as_deref())?;
    match setup::block_on(deliver(config, args))?? {
        Outcome::Delivered => Ok(Verdict::Fine),
        Outcome::Absent(absence) => {
            tracing::info!(name = args.name, "not in the archive: {absence}");
            Ok(Verdict::Finding)
        }
    }
}

async fn deliver(config: &ArchiveConfig, args: &WalGetArgs) -> Result<Outcome, Failure> {
    let keys = keys::reading(config.identity_file.as_deref())?;
    let repositories = repositories::nearest_first(&config.repositories);
    let lineage = patiently(args.patience, || lineage(&repositories, &config.cluster, args)).await?;
    let holder = |repository: &RepositoryConfig| Holder {
        repository: repository.name.clone(),
        archive: Archive::new(setup::backend(repository), lineage.clone()).with_keys(keys.clone()),
    };
    let path = args.timeline.map_or(PathChoice::Latest, PathChoice::Timeline);
    let wal_get = WalGet::new(repositories.iter().map(holder).collect(), path);
    Ok(WalGet { patience: args.patience, ..wal_get }.get(&args.name, &args.dest).await?)
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
