//! Carrying a restore out: from a plan to a data directory that a server can be started on.
//!
//! Owns: the order of it, and that until its last step nothing can be started by mistake.
//! Does not own: the plan (`restore/plan.rs`), the recovery that follows (`wal_get.rs`).
//!
//! ```text
//!  pin ─▶ copies, manifest ─▶ ground, tablespaces: refuse ─▶ note ─▶ (delta: keep, remove) ─▶ volumes, in parallel
//!        (nothing is written)                                                                     │
//!  start command ◀─ pg_control in place ◀─ all on the disk ◀─ settings, signal, marker ◀──────────┘
//! ```

mod config;
mod copies;
mod delta;
mod error;
mod finish;
mod ground;
mod members;
mod owner;
mod pin;
mod settings;
mod site;
mod tablespaces;
#[cfg(test)]
mod tests;
mod tree;
mod unpack;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures_util::stream::{self, StreamExt, TryStreamExt};
use jiff::Timestamp;
use tokio::sync::watch;

pub use error::{CopyFault, Faults, RestoreError};
pub use owner::parse_owner;
pub use tablespaces::Mapping;

use config::Configuration;
use copies::Copy;
use finish::{Additions, Watched};
use ground::UnfinishedFile;
use settings::{Recovery, Timeline};
use site::{Accounts, Meter, Site};
use tablespaces::Place;
use tree::Tree;

use super::marker::{RestoreId, RestoreMarker};
use super::plan::RestorePlan;
use super::prefetch;
use super::wal_get::Holder;
use crate::catalog::backup::TablespaceEntry;
use crate::catalog::manifest::Manifest;
use crate::repository::layout::BackupType;
use crate::secret::Secret;

const JOBS_DEFAULT_MIN: usize = 4;

/// What the operator decides beyond the plan.
#[derive(Clone, Debug)]
pub struct ExecuteOptions {
    pub pgdata: PathBuf,
    /// Keep what matches in a used directory.
    pub delta: bool,
    /// User and group of the files, by number; `None`: as root, the owner of PGDATA or of its parent directory.
    pub owner: Option<(u32, u32)>,
    pub tablespaces: Vec<Mapping>,
    /// For a standby that shall stream; without it, it lives from the archive.
    pub primary_conninfo: Option<Secret>,
    /// Volumes at a time.
    pub jobs: Option<usize>,
    /// The words that run this program and tell it where the archive is, absolute, without the verb:
    /// `/usr/bin/seawall --config /etc/seawall.toml --cluster main`.
    pub seawall: Vec<String>,
    pub host: Option<String>,
}

/// How far it is. Rates and forecasts are for whoever looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RestoreProgress {
    pub phase: Phase,
    /// Of this phase, uncompressed; 0 where it does not count bytes.
    pub bytes_total: u64,
    pub bytes_done: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Phase {
    #[default]
    Preparing,
    /// What is there, with the manifest.
    Comparing,
    Restoring,
    /// Everything onto the disk.
    Syncing,
    Finished,
}

impl Phase {
    pub fn word(self) -> &'static str {
        match self {
            Phase::Preparing => "preparing",
            Phase::Comparing => "comparing",
            Phase::Restoring => "restoring",
            Phase::Syncing => "syncing",
            Phase::Finished => "finished",
        }
    }
}

/// A restore that is complete but for its recovery.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Restored {
    pub id: RestoreId,
    pub pgdata: PathBuf,
    pub files: u64,
    /// Of them, kept as they were.
    pub kept_files: u64,
    /// Uncompressed, of the volumes that were fetched.
    pub bytes: u64,
    /// One line for a shell.
    pub start_command: String,
    pub pinned: bool,
    /// What the operator has to know, in sentences.
    pub remarks: Vec<String>,
}

/// Carries `plan` out with what `holders` hold. When this fails nothing can be started on what is there, and a second
/// run with `delta` goes on. It may be dropped at any await, with the same result.
pub async fn execute(
    plan: &RestorePlan,
    holders: &[Holder],
    options: &ExecuteOptions,
    progress: watch::Sender<RestoreProgress>,
) -> Result<Restored, RestoreError> {
    let backup = plan.backup();
    if backup.backup_type != BackupType::Full {
        return Err(RestoreError::Incremental { backup: backup.id });
    }
    let server_major = server_major(&backup.server_version)?;
    let pgdata = absolute(&options.pgdata)?;
    let places = tablespaces::places(&backup.tablespaces, &options.tablespaces, &pgdata)?;
    let id = RestoreId(fastrand::u64(1..));
    let work = Work { plan, options, pgdata, places, id, server_major, jobs: jobs(options.jobs) };
    // What can be refused is refused before anything is written anywhere.
    work.survey().await?;
    let pinned = pin::put(id, plan, holders, options.host.as_deref()).await;
    if let Some(what) = pin::too_late(plan, holders).await {
        prefetch::pin::release(holders, id).await;
        return Err(RestoreError::Overtaken { what });
    }
    tokio::select! {
        restored = work.carry_out(holders, pinned, Meter::new(progress)) => restored,
        () = pin::keep_renewed(id, holders) => unreachable!("a pin is renewed for ever"),
    }
}

struct Work<'a> {
    plan: &'a RestorePlan,
    options: &'a ExecuteOptions,
    pgdata: PathBuf,
    places: Vec<Place>,
    id: RestoreId,
    /// 18 for 18.1.
    server_major: u32,
    jobs: usize,
}

impl Work<'_> {
    /// Whether there is a place for it.
    async fn survey(&self) -> Result<(), RestoreError> {
        self.take_ground().await.map(drop)
    }

    async fn take_ground(&self) -> Result<Taken, RestoreError> {
        let (pgdata, places, delta) = (self.pgdata.clone(), self.places.clone(), self.options.delta);
        let said =
            self.options.owner.map(|(uid, gid)| (rustix::fs::Uid::from_raw(uid), rustix::fs::Gid::from_raw(gid)));
        let (system_id, needed) = (self.plan.system_id, self.needed_bytes());
        blocking(move || {
            let owner = ground::owner(&pgdata, said)?;
            let ground = ground::take(&pgdata, owner, system_id, delta)?;
            let unfinished = ground.unfinished.as_ref().map(|note| note.tablespaces.clone()).unwrap_or_default();
            let tablespaces = tablespaces::take(&places, &ground, &unfinished)?;
            if !ground.is_used {
                refuse_too_small(&ground.tree, &tablespaces, &needed)?;
            }
            Ok(Taken { ground, tablespaces })
        })
        .await
    }

    /// Uncompressed bytes of PGDATA, and of each tablespace.
    fn needed_bytes(&self) -> BTreeMap<Option<u32>, u64> {
        let mut needed = BTreeMap::new();
        for volume in &self.plan.backup().volumes {
            let inside = |oid: &u32| self.places.iter().any(|place| place.oid == *oid && place.location.is_none());
            let stream = volume.tablespace.filter(|oid| !inside(oid));
            let bytes: &mut u64 = needed.entry(stream).or_default();
            *bytes = bytes.saturating_add(volume.raw_bytes);
        }
        needed
    }

    async fn carry_out(&self, holders: &[Holder], pinned: bool, meter: Meter) -> Result<Restored, RestoreError> {
        let copies = copies::open(self.plan, holders).await?;
        let manifest = copies::manifest(&copies).await?;
        let (configuration, files, remarks) = self.configuration(&copies, &manifest).await?;
        let (site, watched) = self.begin(manifest, meter).await?;
        let bytes = self.fetch_volumes(&site, &copies).await?;
        self.write_manifest(&site, &copies).await?;
        let additions = self.additions(files, pinned);
        let site = {
            let site = site.clone();
            blocking(move || {
                site.meter.enter(Phase::Syncing, 0);
                finish::write_additions(&site, &additions)?;
                finish::make_startable(&site, &watched)?;
                site.meter.enter(Phase::Finished, 0);
                Ok(site)
            })
            .await?
        };
        let user = site.ground.tree.owner().and_then(|(uid, _)| owner::name_of(uid.as_raw()));
        let pg_ctl = config::pg_ctl(self.server_major);
        Ok(Restored {
            id: self.id,
            pgdata: self.pgdata.clone(),
            files: site.manifest.files.len() as u64,
            kept_files: site.accounts.kept_count(),
            bytes,
            start_command: config::start_command(&configuration, &self.pgdata, &pg_ctl, user.as_deref()),
            pinned,
            remarks,
        })
    }

    /// From here on the directory is ours, and cannot be started.
    async fn begin(&self, manifest: Manifest, meter: Meter) -> Result<(Arc<Site>, Vec<Watched>), RestoreError> {
        let taken = self.take_ground().await?;
        let (places, jobs) = (self.places.clone(), self.jobs);
        let location = |place: &Place| {
            let location = place.location.as_ref()?.to_string_lossy().into_owned();
            Some(TablespaceEntry { oid: place.oid, location })
        };
        let note = UnfinishedFile {
            schema: 1,
            system_id: self.plan.system_id,
            backup: self.plan.backup().id,
            began: Timestamp::now(),
            tablespaces: places.iter().filter_map(location).collect(),
        };
        blocking(move || {
            let Taken { ground, mut tablespaces } = taken;
            ground::begin(&ground, &note)?;
            tablespaces::link(&places, &ground.tree)?;
            tablespaces::take_inside(&places, &ground, &mut tablespaces)?;
            for tree in tablespaces.values() {
                let access = tree.root().set_access(tree::directory_mode(0o700), tree.owner());
                access.map_err(|source| RestoreError::local("set the mode of", tree.path(), source))?;
            }
            let is_used = ground.is_used;
            let accounts = Accounts::new(manifest.files.len());
            let group_reads = AtomicBool::new(false);
            let site = Site { ground, tablespaces, manifest, accounts, meter, group_reads };
            let trees = std::iter::once(&site.ground.tree).chain(site.tablespaces.values());
            let watched = trees.map(finish::watch).collect::<Result<_, _>>()?;
            if is_used {
                delta::keep_what_matches(&site, jobs)?;
            }
            Ok((Arc::new(site), watched))
        })
        .await
    }

    /// Every volume of which a file is wanted; tells the bytes they hold.
    async fn fetch_volumes(&self, site: &Arc<Site>, copies: &[Copy]) -> Result<u64, RestoreError> {
        let wanted = self.wanted(site);
        let bytes = self.fetch(site, copies, &wanted).await?;
        let Some(missing) = site.accounts.first_missing() else { return Ok(bytes) };
        // The counts say which volume holds which file, and are a hint.
        let passed_over: Vec<usize> =
            (0..self.plan.backup().volumes.len()).filter(|index| !wanted.contains(index)).collect();
        let more = self.fetch(site, copies, &passed_over).await?;
        match site.accounts.first_missing() {
            None => Ok(bytes + more),
            Some(_) => {
                let path = crate::codec::tar::shown(site.manifest.files.path(missing));
                Err(RestoreError::Inconsistent {
                    fault: format!("no volume holds \"{path}\", which its manifest lists"),
                })
            }
        }
    }

    /// The volumes that are not kept whole. The manifest lists files in the order of the volumes.
    fn wanted(&self, site: &Site) -> Vec<usize> {
        let mut first = 0_usize;
        let mut wanted = Vec::new();
        for (index, volume) in self.plan.backup().volumes.iter().enumerate() {
            let count = usize::try_from(volume.manifest_files).unwrap_or(usize::MAX);
            let end = first.saturating_add(count).min(site.manifest.files.len());
            let is_kept = count > 0 && end - first == count && (first..end).all(|file| site.accounts.is_there(file));
            if !is_kept {
                wanted.push(index);
            }
            first = end;
        }
        wanted
    }

    async fn fetch(&self, site: &Arc<Site>, copies: &[Copy], wanted: &[usize]) -> Result<u64, RestoreError> {
        let raw_bytes = |&index: &usize| self.plan.backup().volumes[index].raw_bytes;
        let total = wanted.iter().map(raw_bytes).sum();
        site.meter.enter(Phase::Restoring, total);
        // The largest first: the last to end then ends soon after the others.
        let mut order = wanted.to_vec();
        order.sort_by_key(|index| std::cmp::Reverse(raw_bytes(index)));
        let chunk_bytes = copies::chunk_bytes(self.jobs.min(order.len().max(1)));
        let volumes = stream::iter(order).map(|index| copies::volume(site, copies, index, chunk_bytes));
        volumes.buffer_unordered(self.jobs).try_collect::<()>().await?;
        Ok(total)
    }

    async fn write_manifest(&self, site: &Arc<Site>, copies: &[Copy]) -> Result<(), RestoreError> {
        let mut file = finish::begin_manifest(site)?;
        let mut written = Ok(());
        let mut sink = |chunk: Option<&[u8]>| {
            let step = match chunk {
                None => finish::begin_manifest(site).map(|again| file = again),
                Some(chunk) => finish::write_manifest(site, &mut file, chunk),
            };
            written = std::mem::replace(&mut written, Ok(())).and(step);
        };
        copies::manifest_bytes(copies, &mut sink).await?;
        written
    }

    /// What becomes of configuration the source kept elsewhere, the files to write for it, and what to say.
    async fn configuration(
        &self,
        copies: &[Copy],
        manifest: &Manifest,
    ) -> Result<(Configuration, Vec<(String, Vec<u8>)>, Vec<String>), RestoreError> {
        let entries = &copies[0].backup.config;
        let is_inside = manifest.files.find(config::MAIN.as_bytes()).is_some();
        let main = entries.iter().find(|entry| entry.name == config::MAIN);
        let original = main.and_then(|entry| std::fs::read(&entry.path).ok());
        let decided = config::decide(entries, is_inside, original.as_deref(), &self.pgdata);
        let mut files = Vec::new();
        let mut remarks = self.plan.remarks.clone();
        match &decided {
            Configuration::Inside => {
                for entry in entries.iter().filter(|entry| !std::path::Path::new(&entry.path).exists()) {
                    remarks.push(format!(
                        "the source's configuration names {}, which is not here; the backup has it as config/{}",
                        entry.path, entry.name
                    ));
                }
            }
            Configuration::Original(path) => {
                remarks.push(format!("{} is used as it is: it names this data directory", path.display()));
            }
            Configuration::Nowhere => remarks.push(
                "the source kept postgresql.conf outside its data directory, and the backup has none: put one into the \
                 data directory, or start with -o '-c config_file=…'"
                    .to_string(),
            ),
            Configuration::Captured => {
                let names: Vec<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
                for (index, entry) in entries.iter().enumerate() {
                    if !config::belongs_in_copy(&entry.name) || manifest.files.find(entry.name.as_bytes()).is_some() {
                        continue;
                    }
                    let content = copies::config(copies, index).await?;
                    let content = match entry.name == config::MAIN {
                        true => config::main_file(&content, &self.pgdata, &names),
                        false => content,
                    };
                    files.push((entry.name.clone(), content));
                }
                remarks.push(format!(
                    "the source's configuration was outside its data directory ({}): it is in the copy now, and points to it",
                    main.map(|entry| entry.path.as_str()).unwrap_or_default()
                ));
            }
        }
        Ok((decided, files, remarks))
    }

    fn additions(&self, files: Vec<(String, Vec<u8>)>, pinned: bool) -> Additions {
        let plan = self.plan;
        let words = || self.options.seawall.iter().map(String::as_str);
        let id = self.id.to_string();
        let restore_command = settings::command(words().chain(["wal-get", "--restore", &id]));
        let recovery = Recovery {
            server_major: self.server_major,
            stop: plan.stop.clone(),
            inclusive: plan.inclusive,
            action: plan.action,
            timeline: if plan.follow { Timeline::Latest } else { Timeline::Number(plan.timeline()) },
            standby: plan.standby,
            primary_conninfo: self.options.primary_conninfo.clone(),
            restore_command: format!("{restore_command} %f \"%p\""),
            recovery_end_command: settings::command(words().chain(["wal-get", "--restore-end", &id])),
        };
        let marker = RestoreMarker {
            schema: RestoreMarker::SCHEMA,
            id: self.id,
            cluster: plan.lineage.cluster.clone(),
            lineage: plan.lineage.directory_name(),
            system_id: plan.system_id,
            segment_size: plan.segment_size,
            path: RestoreMarker::path_of(&plan.path),
            follow: plan.follow,
            start_lsn: plan.start_lsn,
            end_lsn: (!plan.standby).then_some(plan.end_lsn),
            standby: plan.standby,
            backup: plan.backup().id,
            target: plan.target.to_string(),
            created: Timestamp::now(),
            pinned,
        };
        Additions { recovery, places: self.places.clone(), marker, files }
    }
}

struct Taken {
    ground: ground::Ground,
    tablespaces: BTreeMap<u32, Tree>,
}

/// Settings differ between versions, and a server does not start with one it does not know.
fn server_major(version: &str) -> Result<u32, RestoreError> {
    /// The first with `recovery.signal`, and settings instead of recovery.conf.
    const OLDEST: u32 = 12;
    let digits = version.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
    digits.parse().ok().filter(|&major| major >= OLDEST).ok_or_else(|| RestoreError::Inconsistent {
        fault: format!("{version:?} is no version of PostgreSQL that can be restored"),
    })
}

fn jobs(said: Option<usize>) -> usize {
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    said.unwrap_or(cores.max(JOBS_DEFAULT_MIN)).clamp(1, copies::JOBS_MAX)
}

/// The server runs in this directory: a relative name would mean another place to it.
fn absolute(path: &std::path::Path) -> Result<PathBuf, RestoreError> {
    let usage = |fault: &str| RestoreError::Usage {
        option: "--pgdata",
        value: path.display().to_string(),
        fault: fault.to_string(),
    };
    let path = std::path::absolute(path).map_err(|error| usage(&error.to_string()))?;
    match path.components().any(|part| matches!(part, std::path::Component::ParentDir)) {
        true => Err(usage("name it without `..`")),
        false if path.parent().is_none() => Err(usage("this is no place for a data directory")),
        false => Ok(path),
    }
}

/// Refuses what cannot fit, before it is begun.
fn refuse_too_small(
    pgdata: &Tree,
    tablespaces: &BTreeMap<u32, Tree>,
    needed: &BTreeMap<Option<u32>, u64>,
) -> Result<(), RestoreError> {
    let mut volumes: BTreeMap<u64, (PathBuf, u64, u64)> = BTreeMap::new();
    for (stream, bytes) in needed {
        let tree = stream.and_then(|oid| tablespaces.get(&oid)).unwrap_or(pgdata);
        let local = |source| RestoreError::local("open", tree.path(), source);
        let (device, _) = tree.root().identity().map_err(local)?;
        let stat = tree.root().file_system().map_err(local)?;
        let blocks = if rustix::process::geteuid().is_root() { stat.f_bfree } else { stat.f_bavail };
        let free = blocks.saturating_mul(u64::try_from(stat.f_bsize).unwrap_or(0));
        let volume = volumes.entry(device).or_insert((tree.path().to_path_buf(), 0, free));
        volume.1 = volume.1.saturating_add(*bytes);
    }
    match volumes.into_values().find(|(_, needed, free)| needed > free) {
        Some((path, needed_bytes, free_bytes)) => Err(RestoreError::TooSmall { path, needed_bytes, free_bytes }),
        None => Ok(()),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, RestoreError> + Send + 'static,
) -> Result<T, RestoreError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}
