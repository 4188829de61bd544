//! The repositories of a cluster at the start of a stream: which of them answer, which lineage they continue, which
//! stay out, and why.
//!
//! Owns: that an archive begins only where it may, and goes on as long as one repository is there.
//! Does not own: where the stream goes on (`startup.rs`), how one that is out comes back (`absence.rs`).

use std::sync::Arc;
use std::time::Duration;

use futures_util::future;

use super::startup::{Server, SlotPresence};
use super::world::{ClusterOptions, Repository, World};
use crate::catalog::lineage::{LineageFile, RepositoryFile};
use crate::catalog::store::{self, Archive, CatalogError};
use crate::error::{Disposition, ExitCode, Failure};
use crate::repository::layout::Lineage;
use crate::repository::{Backend, StoreError, StoreErrorKind};

/// A repository that has not answered by then is absent this time; it must not hold up the others.
const OPEN_DEADLINE: Duration = Duration::from_secs(20);

/// A repository that takes part.
#[derive(Clone, Debug)]
pub struct Opened {
    /// Its place in the configuration.
    pub index: usize,
    pub name: String,
    /// Of `repository.json`: epochs are taken in this order, and the ledger names it.
    pub id: String,
    pub archive: Archive,
}

/// One that does not.
#[derive(Clone, Debug)]
pub struct Absent {
    pub index: usize,
    pub why: Failure,
}

/// At least one repository takes part.
#[derive(Clone, Debug)]
pub struct Opening {
    pub file: LineageFile,
    /// In the order of the configuration.
    pub present: Vec<Opened>,
    pub absent: Vec<Absent>,
}

impl Opening {
    /// Takes one out, for whom something has just failed; fails with it when no other is there, and with what stops
    /// the cluster.
    pub fn leave_out(&mut self, index: usize, why: Failure) -> Result<(), Failure> {
        let is_last = self.present.iter().all(|opened| opened.index == index);
        if is_last || why.disposition == Disposition::Stop {
            return Err(why);
        }
        self.present.retain(|opened| opened.index != index);
        self.absent.push(Absent { index, why });
        Ok(())
    }

    /// Does `step` in every repository. One in which the store fails is absent from now on; what stops the cluster
    /// stops it, and so does a failure in the last one.
    ///
    /// One value for each that is still present, in their order.
    pub async fn in_each<T, F>(&mut self, step: impl Fn(Opened) -> F) -> Result<Vec<T>, Failure>
    where
        F: Future<Output = Result<T, Failure>>,
    {
        let results = future::join_all(self.present.iter().map(|opened| within(step(opened.clone())))).await;
        let mut values = Vec::new();
        let indexes: Vec<usize> = self.present.iter().map(|opened| opened.index).collect();
        for (index, result) in indexes.into_iter().zip(results) {
            match result {
                Ok(value) => values.push(value),
                Err(failure) => self.leave_out(index, failure)?,
            }
        }
        Ok(values)
    }
}

/// One step in one repository. A directory of a large archive may take a while; a store that says nothing at all must
/// not hold up the others for ever.
async fn within<T>(step: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    const STEP_DEADLINE: Duration = Duration::from_secs(120);
    match tokio::time::timeout(STEP_DEADLINE, step).await {
        Ok(done) => done,
        Err(_) => {
            let message = format!("the repository gave no answer within {STEP_DEADLINE:?}");
            Err(Failure::new(ExitCode::Unavailable, message).disposition(Disposition::Retry))
        }
    }
}

/// What a repository says when it is looked at.
#[derive(Clone, Debug)]
pub struct Look {
    pub file: Option<RepositoryFile>,
    /// Its root is not there.
    pub missing: Option<StoreError>,
    pub lineages: Vec<(Lineage, LineageFile)>,
}

impl Look {
    fn lineage(&self, wanted: &Lineage) -> Option<&LineageFile> {
        self.lineages.iter().find(|(lineage, _)| lineage == wanted).map(|(_, file)| file)
    }
}

/// Looks at one repository, within the deadline.
pub async fn look(repository: &Repository, cluster: &str) -> Result<Look, Failure> {
    let backend = repository.backend.as_ref();
    let looked = async {
        let read = async {
            backend.look_anew().await?;
            store::read_repository(backend).await
        };
        let file = match read.await {
            Err(CatalogError::Store(error)) if error.is(StoreErrorKind::RootMissing) => {
                return Ok(Look { file: None, missing: Some(error), lineages: Vec::new() });
            }
            read => read?,
        };
        let lineages = match &file {
            Some(_) => store::lineages(backend, cluster).await?,
            None => Vec::new(),
        };
        Ok::<_, CatalogError>(Look { file, missing: None, lineages })
    };
    match tokio::time::timeout(OPEN_DEADLINE, looked).await {
        Ok(looked) => Ok(looked?),
        Err(_) => {
            let message = format!("{} gave no answer within {OPEN_DEADLINE:?}", backend.describe());
            Err(Failure::new(ExitCode::Unavailable, message).disposition(Disposition::Retry))
        }
    }
}

/// Opens every repository at once, finds the lineage this server continues, or creates one where that is safe: only
/// for a slot that does not exist and a timeline without history, or for a server of a higher major version
/// (pg_upgrade); and only when every repository has answered, since any of them may hold it.
///
/// `skipped` tells which are not asked, and why: one that has just failed would hold up every attempt.
pub async fn open(
    world: &World,
    options: &ClusterOptions,
    server: &Server,
    slot: SlotPresence,
    skipped: impl Fn(usize) -> Option<Failure>,
) -> Result<Opening, Failure> {
    let looks = world.repositories.iter().enumerate().map(|(index, repository)| {
        let skipped = skipped(index);
        async move {
            match skipped {
                Some(why) => Err(why),
                None => look(repository, &options.name).await,
            }
        }
    });
    let looks = future::join_all(looks).await;
    let answered = looks.iter().filter_map(|look| look.as_ref().ok());
    let ours = answered.flat_map(|look| &look.lineages).filter(|(it, _)| it.system_id == server.identity.system_id);
    match ours.max_by_key(|(lineage, _)| lineage.ordinal) {
        Some((lineage, file)) => join(world, options, server, lineage, file, &looks).await,
        None => begin(world, options, server, slot, &looks).await,
    }
}

/// The first repository's part of [`open`], for commands.
pub async fn open_lineage(
    world: &World,
    options: &ClusterOptions,
    server: &Server,
    slot: SlotPresence,
) -> Result<(Archive, LineageFile), Failure> {
    let mut opening = open(world, options, server, slot, |_| None).await?;
    Ok((opening.present.swap_remove(0).archive, opening.file))
}

/// Goes on with a lineage that some of the repositories hold.
async fn join(
    world: &World,
    options: &ClusterOptions,
    server: &Server,
    lineage: &Lineage,
    file: &LineageFile,
    looks: &[Result<Look, Failure>],
) -> Result<Opening, Failure> {
    let mut opening = Opening { file: file.clone(), present: Vec::new(), absent: Vec::new() };
    for (index, (repository, look)) in world.repositories.iter().zip(looks).enumerate() {
        let joined = match look {
            Err(failure) => Err(failure.clone()),
            Ok(look) => join_one(repository, options, server, lineage, file, look).await,
        };
        match joined {
            Ok((archive, id)) => opening.present.push(Opened { index, name: repository.name.clone(), id, archive }),
            Err(failure) if failure.disposition == Disposition::Stop => return Err(failure),
            Err(why) => opening.absent.push(Absent { index, why }),
        }
    }
    // The one with the earliest start knows where the archive starts.
    let files = looks.iter().filter_map(|look| look.as_ref().ok()?.lineage(lineage));
    if let Some(earliest) = files.filter(|file| file.start_lsn.is_some()).min_by_key(|file| file.start_lsn) {
        opening.file = earliest.clone();
    }
    match opening.present.is_empty() {
        true => Err(opening.absent.swap_remove(0).why),
        false => Ok(opening),
    }
}

async fn join_one(
    repository: &Repository,
    options: &ClusterOptions,
    server: &Server,
    lineage: &Lineage,
    file: &LineageFile,
    look: &Look,
) -> Result<(Archive, String), Failure> {
    let archive = Archive::new(repository.backend.clone(), lineage.clone()).with_keys(options.keys.clone());
    let Some(repository_file) = &look.file else {
        return Err(emptied(repository, options, look));
    };
    if let Some(file) = look.lineage(lineage) {
        check_same_build(file, server)?;
        return Ok((archive, repository_file.id.clone()));
    }
    let is_strange = |(other, _): &(Lineage, LineageFile)| other.system_id != lineage.system_id;
    if look.lineages.iter().all(is_strange)
        && let Some((other, _)) = look.lineages.last()
        && look.lineages.iter().all(|(_, other)| other.created >= file.created)
    {
        let message = format!(
            "{} holds cluster {} with system {}, the others hold it with {}",
            repository.backend.describe(),
            options.name,
            other.system_id,
            lineage.system_id
        );
        return Err(Failure::new(ExitCode::Config, message).hint("is this the right repository for this cluster?"));
    }
    // Prepared by `seawall init --create`, or away when this lineage began.
    check_same_build(file, server)?;
    accept_existing(archive.create_lineage(file).await)?;
    tracing::info!(repository = repository.name, lineage = %lineage.directory_name(), "the repository joins the archive");
    Ok((archive, repository_file.id.clone()))
}

/// Nothing at all, where others hold the archive: a volume that is not mounted, or was made anew.
pub fn emptied(repository: &Repository, options: &ClusterOptions, look: &Look) -> Failure {
    let what = if look.missing.is_some() { "is not there" } else { "is empty" };
    let location = repository.backend.describe();
    let message = format!("{location} {what}, but other repositories hold cluster {}", options.name);
    Failure::new(ExitCode::Config, message).hint(
        "is its volume mounted, and is its `url` right? If it was lost, or is new, run `seawall init --create`: what the others hold is copied there",
    )
}

/// Begins an archive, the same in every repository.
async fn begin(
    world: &World,
    options: &ClusterOptions,
    server: &Server,
    slot: SlotPresence,
    looks: &[Result<Look, Failure>],
) -> Result<Opening, Failure> {
    let is_lone = looks.len() == 1;
    let mut answered = Vec::new();
    for (repository, look) in world.repositories.iter().zip(looks) {
        match look {
            Ok(look) => answered.push((repository, look)),
            Err(failure) if is_lone => return Err(failure.clone()),
            Err(failure) => {
                let step =
                    format_args!("an archive begins when every repository answers: repository {}", repository.name);
                return Err(failure.clone().context(step));
            }
        }
    }
    let lineages = answered.iter().flat_map(|(_, look)| &look.lineages);
    match lineages.max_by_key(|(_, file)| file.created) {
        Some((newest, file)) if major_of(&file.server_version) >= Some(server.major) => {
            let message = format!(
                "the server's system identifier is {}, this repository holds cluster {} with {}",
                server.identity.system_id, options.name, newest.system_id
            );
            return Err(Failure::new(ExitCode::Config, message).hint(
                "is this the right server, and the right repository? If it replaces the old one, run `seawall init --new-lineage`",
            ));
        }
        Some(_) => tracing::info!(version = server.version, "a server of a higher major version: a new lineage begins"),
        None => {
            if let Err(refused) = refuse_unexpected_emptiness(world, options, server, slot) {
                // A root that is not there is the likelier cause.
                let missing = answered.iter().find_map(|(_, look)| look.missing.clone());
                return Err(missing.map_or(refused, Failure::from));
            }
        }
    }
    let lineage = Lineage::new(&options.name, server.identity.system_id, 1);
    // Every repository.json before any lineage.json: where a crash comes between, the lineage is joined by those that
    // lack it, and nobody looks emptied.
    for (repository, look) in &answered {
        if look.missing.is_some() {
            repository.backend.create_missing_root().await?;
        }
        create_repository(world, &repository.backend, look.file.is_some()).await?;
    }
    let mut file: Option<LineageFile> = None;
    let mut present = Vec::new();
    for (index, (repository, _)) in answered.into_iter().enumerate() {
        let archive = match &file {
            None => {
                let (archive, created) =
                    create_lineage(world, &repository.backend, options, server, lineage.clone(), true).await?;
                file = Some(created);
                archive
            }
            Some(file) => {
                let archive = Archive::new(repository.backend.clone(), lineage.clone()).with_keys(options.keys.clone());
                accept_existing(archive.create_lineage(file).await)?;
                archive
            }
        };
        let id = store::read_repository(repository.backend.as_ref()).await?.map(|file| file.id).unwrap_or_default();
        present.push(Opened { index, name: repository.name.clone(), id, archive });
    }
    let file = file.expect("there is at least one repository");
    Ok(Opening { file, present, absent: Vec::new() })
}

fn major_of(version: &str) -> Option<u32> {
    let digits: String = version.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

fn check_same_build(file: &LineageFile, server: &Server) -> Result<(), Failure> {
    if file.segment_size == server.segment_size {
        return Ok(());
    }
    let message = format!(
        "the server's WAL segments are {} bytes, the archive's {}",
        server.segment_size.bytes(),
        file.segment_size.bytes()
    );
    Err(Failure::new(ExitCode::Config, message)
        .hint("was pg_resetwal --wal-segsize used? Continue with `seawall init --new-lineage`"))
}

/// An existing slot, or a promoted server, with an empty repository: an unmounted volume or a mistyped path,
/// far more often than a beginning.
fn refuse_unexpected_emptiness(
    world: &World,
    options: &ClusterOptions,
    server: &Server,
    slot: SlotPresence,
) -> Result<(), Failure> {
    let location = match &world.repositories[..] {
        [repository] => repository.backend.describe(),
        _ => "no repository".to_string(),
    };
    let promoted = !server.history.ancestors().is_empty();
    let reason = match slot {
        SlotPresence::Absent if !promoted => return Ok(()),
        SlotPresence::Absent => format!("the server is on timeline {}", server.identity.timeline),
        SlotPresence::Present => format!("slot {} already exists on the server", options.slot),
        SlotPresence::Unknown => format!("it is not known whether slot {} exists", options.slot),
    };
    let message = match world.repositories.len() {
        1 => format!("{reason}, but {location} holds nothing for cluster {}", options.name),
        _ => format!("{reason}, but {location} holds anything for cluster {}", options.name),
    };
    Err(Failure::new(ExitCode::Config, message).hint(
        "is the repository's volume mounted, and is its `url` right? If the archive shall really start here, run `seawall init --create`",
    ))
}

/// repository.json, then lineage.json; the slot comes after both.
pub async fn create_lineage(
    world: &World,
    backend: &Arc<dyn Backend>,
    options: &ClusterOptions,
    server: &Server,
    lineage: Lineage,
    repository_exists: bool,
) -> Result<(Archive, LineageFile), Failure> {
    create_repository(world, backend, repository_exists).await?;
    let file = LineageFile {
        schema: 1,
        system_id: server.identity.system_id,
        server_version: server.version.clone(),
        segment_size: server.segment_size,
        created: world.clock.now(),
        start_timeline: server.identity.timeline,
        start_lsn: Some(server.segment_size.floor(server.identity.flush_lsn)),
        slot: Some(options.slot.to_string()),
    };
    let archive = Archive::new(backend.clone(), lineage).with_keys(options.keys.clone());
    accept_existing(archive.create_lineage(&file).await)?;
    let file = archive.lineage_file().await?;
    tracing::info!(lineage = %archive.lineage.directory_name(), start = ?file.start_lsn, "an archive begins");
    Ok((archive, file))
}

async fn create_repository(world: &World, backend: &Arc<dyn Backend>, exists: bool) -> Result<(), Failure> {
    if exists {
        return Ok(());
    }
    let id = format!("{:08x}{:08x}", world.random_u32(), world.random_u32());
    accept_existing(store::create_repository(backend.as_ref(), world.clock.now(), &id).await.map(drop))
}

/// Somebody was faster, or our own success was not answered: what is there counts.
fn accept_existing(created: Result<(), CatalogError>) -> Result<(), Failure> {
    match created {
        Err(CatalogError::Store(error)) if error.is(StoreErrorKind::AlreadyExists) => Ok(()),
        other => Ok(other?),
    }
}
