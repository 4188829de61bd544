//! Owns: `backup`: a base backup by hand, beside the agent and under the same lease; showing how far it is.
//! Does not own: taking one (`agent/backup`, `backup`), when the agent does.

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::args::{BackupArgs, Global};
use super::list::line;
use super::progress::{Shown, Step};
use super::repositories::{self, Look};
use super::server::{self, ServerFacts};
use super::{Verdict, output, setup};
use crate::agent::backup::lease::Patience;
use crate::agent::backup::{Done, Job, Place, running};
use crate::agent::world::World;
use crate::archiver::Workers;
use crate::backup::BackupProgress;
use crate::catalog::shelf::{Outcome, Shelved};
use crate::config::{ClusterConfig, Location, RepositoryConfig};
use crate::error::{Disposition, ExitCode, Failure};
use crate::monitor::backup::BackupEntry;
use crate::postgres::{Purpose, connect};
use crate::replication::Login;
use crate::repository::layout::Lineage;
use crate::wal::{SegmentSize, SystemId};

pub fn run(global: &Global, args: &BackupArgs) -> Result<Verdict, Failure> {
    let cluster = setup::cluster(global)?;
    refuse_beside_single_writer(&cluster)?;
    let (entry, failed) =
        setup::block_on_threads(setup::threads_for_roots(cluster.repositories.len()), take(&cluster, args, global))??;
    match global.json {
        true => output::json(&entry),
        false => output::text(&line(&entry)),
    }
    match failed.into_iter().next() {
        None => Ok(Verdict::Fine),
        // It exists, and not everywhere it should.
        Some((repository, why)) => Err(why.context(format_args!("repository {repository} does not have it"))),
    }
}

/// A store without conditional writes cannot keep two apart: no lease on it means anything.
fn refuse_beside_single_writer(cluster: &ClusterConfig) -> Result<(), Failure> {
    let is_single = |repository: &&RepositoryConfig| match &repository.location {
        Location::S3(options) => options.single_writer,
        Location::Local(_) => false,
    };
    match cluster.repositories.iter().find(is_single) {
        None => Ok(()),
        Some(repository) => {
            let message =
                format!("repository {} has single_writer = true: only the agent takes backups there", repository.name);
            Err(Failure::new(ExitCode::Config, message).hint("the agent takes them by itself (backup.automatic)"))
        }
    }
}

async fn take(
    cluster: &ClusterConfig,
    args: &BackupArgs,
    global: &Global,
) -> Result<(BackupEntry, Vec<(String, Failure)>), Failure> {
    let stop = CancellationToken::new();
    tokio::spawn(stop_by_signal(stop.clone()));
    let world = setup::world(cluster, Workers::inline());
    let options = setup::options(cluster, None)?;
    let mut settings = setup::backups(cluster);
    if let Some(label) = &args.label {
        settings.options.label = Some(label.clone());
    }
    let primary = primary(&world).await?;
    refuse_without_stream(cluster, server::ask(&world, &options.slot).await)?;
    let system_id = primary.system_id;
    let looks = repositories::look(&cluster.repositories, &cluster.name).await;
    let (lineage, segment_size) = lineage(&looks, cluster, system_id)?;
    let (places, mut failed) = places(&looks, &lineage, &options.keys);
    let job = Job {
        world: &world,
        cluster: &options,
        settings: &settings,
        places,
        segment_size,
        primary: primary.login,
        purpose: "`seawall backup`".to_string(),
        patience: if args.wait { Patience::Wait } else { Patience::None },
        status: None,
        decided_by: None,
    };
    let (progress, watching) = watch::channel(BackupProgress::default());
    let shown = Shown::new(global);
    let done = tokio::select! {
        done = job.run(&progress, &stop) => done,
        () = shown.follow(watching, step, |now, _| running(now).to_text()) => unreachable!("it follows for as long as it is asked to"),
    };
    drop(shown);
    let done = done?;
    let entry = entry(cluster, &lineage, &done);
    if let Some(missing) = &done.missing_config {
        tracing::info!(
            hint = "`seawall init` prints the grants; a backup is complete without it",
            "configuration outside the data directory is not in the backup: {missing}"
        );
    }
    failed.extend(done.failed);
    Ok((entry, failed))
}

/// Gives the backup up in good order; a second one ends at once, as a crash would.
async fn stop_by_signal(stop: CancellationToken) {
    let (Ok(mut terminate), Ok(mut interrupt)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return;
    };
    for is_first in [true, false] {
        let code = tokio::select! {
            _ = terminate.recv() => 143,
            _ = interrupt.recv() => 130,
        };
        if !is_first {
            std::process::exit(code);
        }
        tracing::warn!("the backup is given up; a second signal ends at once");
        stop.cancel();
    }
}

struct Primary {
    login: Login,
    system_id: SystemId,
}

async fn primary(world: &World) -> Result<Primary, Failure> {
    let logins = world.logins.logins(Purpose::Physical)?;
    let connected = connect::connect_or_explain(world.dialer.as_ref(), &logins, world.logins.wanted()).await?;
    let connect::Connected { mut connection, login, .. } = connected;
    let identity = connection.identify_system().await?;
    connection.close().await;
    Ok(Primary { login, system_id: identity.system_id })
}

/// A backup is worth nothing without the WAL written meanwhile: somebody has to archive it. Where the server cannot be
/// asked, the wait for that WAL will tell.
fn refuse_without_stream(cluster: &ClusterConfig, facts: Result<ServerFacts, Failure>) -> Result<(), Failure> {
    let slot = &cluster.slot;
    let facts = match facts {
        Ok(facts) => facts,
        Err(failure) => {
            tracing::debug!(%failure, "cannot ask whether anybody streams");
            return Ok(());
        }
    };
    let message = match &facts.slot {
        None => format!("there is no slot {slot} on the server: nobody archives its WAL"),
        Some(row) if !row.active => format!("nobody streams from slot {slot}: the backup's WAL would not be archived"),
        Some(_) => return Ok(()),
    };
    Err(Failure::new(ExitCode::Unavailable, message)
        .disposition(Disposition::Retry)
        .hint("start `seawall run` for this cluster, and take the backup while it streams"))
}

/// The newest one of this server, and its segments' size.
fn lineage(looks: &[Look], cluster: &ClusterConfig, system_id: SystemId) -> Result<(Lineage, SegmentSize), Failure> {
    let lineages = repositories::all_lineages(looks);
    let ours = lineages.iter().filter(|(lineage, _)| lineage.system_id == system_id);
    let newest = ours.max_by_key(|(lineage, file)| (file.created, lineage.ordinal));
    match newest {
        Some((lineage, file)) => Ok((lineage.clone(), file.segment_size)),
        None if lineages.is_empty() => Err(repositories::nothing(looks, &cluster.name)),
        None => {
            let message = format!("no repository holds an archive of system {system_id}, which the server is");
            Err(Failure::new(ExitCode::Config, message).hint("does `postgres` name the server that is archived?"))
        }
    }
}

/// Where the backup goes, and why not to the others.
fn places(
    looks: &[Look],
    lineage: &Lineage,
    keys: &crate::codec::encrypt::Keys,
) -> (Vec<Place>, Vec<(String, Failure)>) {
    let (mut places, mut failed) = (Vec::new(), Vec::new());
    for (index, look) in looks.iter().enumerate() {
        let name = look.config.name.clone();
        let file = look.readable().map(|found| found.file.clone());
        match (file, look.file_of(lineage)) {
            (Ok(Some(file)), Some(_)) => {
                let archive = look.archive(lineage).with_keys(keys.clone());
                places.push(Place { index, name, id: file.id, archive });
            }
            (Ok(_), _) => {
                let message = format!("{} holds no WAL of this cluster yet", look.backend.describe());
                failed.push((name, Failure::new(ExitCode::Unavailable, message)));
            }
            (Err(failure), _) => failed.push((name, failure)),
        }
    }
    for (name, why) in &failed {
        tracing::warn!(repository = name, hint = why.hint.as_deref(), "no backup goes there: {why}");
    }
    (places, failed)
}

fn entry(cluster: &ClusterConfig, lineage: &Lineage, done: &Done) -> BackupEntry {
    let shelved = Shelved {
        id: done.id,
        outcome: Outcome::Complete,
        repositories: done.files.iter().map(|(name, _)| name.clone()).collect(),
        begin: None,
        file: done.files.first().map(|(_, file)| file.clone()),
        is_pinned: false,
        cause: None,
    };
    BackupEntry::new(&cluster.name, &lineage.directory_name(), &shelved)
}

fn step(now: &BackupProgress) -> Step {
    let total = now.raw_bytes_expected.unwrap_or_default().max(now.raw_bytes);
    Step { phase: now.phase.word(), done: now.raw_bytes, total }
}
