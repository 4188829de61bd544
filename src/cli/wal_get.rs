//! Owns: `wal-get`: which archive and which lineage a `restore_command` is about.
//! Does not own: what is delivered, absent or a hole (`restore/wal_get.rs`), the exit code's contract (`mod.rs`).

use std::future::Future;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::args::{Global, WalGetArgs};
use super::{Verdict, setup};
use crate::catalog::lineage::LineageFile;
use crate::catalog::store::{self, Archive};
use crate::config::ArchiveConfig;
use crate::error::{Disposition, ExitCode, Failure};
use crate::repository::Backend;
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
    let backend: Arc<dyn Backend> = setup::backend(&config.repositories[0]);
    let lineage = patiently(args.patience, || lineage(backend.as_ref(), &config.cluster, args)).await?;
    let path = args.timeline.map_or(PathChoice::Latest, PathChoice::Timeline);
    let wal_get = WalGet {
        patience: args.patience,
        ..WalGet::new(
            vec![Holder {
                repository: config.repositories[0].name.clone(),
                archive: Archive::new(backend.clone(), lineage),
            }],
            path,
        )
    };
    Ok(wal_get.get(&args.name, &args.dest).await?)
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

/// The lineage that is named, else the newest of the system whose data directory this is, else the cluster's newest.
async fn lineage(backend: &dyn Backend, cluster: &str, args: &WalGetArgs) -> Result<Lineage, Failure> {
    let location = backend.describe();
    if store::read_repository(backend).await?.is_none() {
        return Err(Failure::new(ExitCode::Config, format!("{location} holds no repository of seawall's"))
            .hint("is `url` (or --repository) the right one, and is the volume mounted?"));
    }
    if let Some(name) = &args.lineage {
        return Lineage::parse(cluster, name).ok_or_else(|| {
            Failure::new(ExitCode::Usage, format!("{name:?} is not a lineage's name"))
                .hint("it is a directory below the cluster's: <system-id> or <system-id>-<n>")
        });
    }
    let lineages = store::lineages(backend, cluster).await?;
    let names = names(&lineages);
    let found = match system_id(Path::new("."))? {
        Some(id) => {
            let ours = lineages.into_iter().filter(|(lineage, _)| lineage.system_id == id);
            let newest = ours.max_by_key(|(lineage, _)| lineage.ordinal);
            newest.ok_or_else(|| no_lineage(format!("nothing of system {id} for cluster {cluster}"), &location, &names))
        }
        None => {
            let newest = lineages.into_iter().next_back();
            newest.ok_or_else(|| no_lineage(format!("nothing for cluster {cluster}"), &location, &names))
        }
    };
    found.map(|(lineage, _)| lineage)
}

fn names(lineages: &[(Lineage, LineageFile)]) -> String {
    let names: Vec<String> = lineages.iter().map(|(lineage, _)| lineage.directory_name()).collect();
    names.join(", ")
}

fn no_lineage(what: String, location: &str, names: &str) -> Failure {
    let failure = Failure::new(ExitCode::Config, format!("{location} holds {what}"));
    match names {
        "" => failure.hint("is --cluster right, and is `url` (or --repository) the right one?"),
        names => failure.hint(format!("name one with --lineage: {names}")),
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
