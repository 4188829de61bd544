//! Owns: looking into every repository of a cluster for the verbs that read: what each holds, or why it cannot be read.
//! Does not own: what follows from that (the verbs), how the agent opens them (`agent`).

use std::sync::Arc;

use futures_util::future::join_all;

use super::setup;
use crate::catalog::lineage::{LineageFile, RepositoryFile};
use crate::catalog::store::{self, Archive, CatalogError};
use crate::catalog::{Catalog, Holdings};
use crate::config::{Location, RepositoryConfig};
use crate::error::{ExitCode, Failure};
use crate::repository::layout::Lineage;
use crate::repository::{Backend, StoreError, StoreErrorKind};

/// A repository as it is configured, and what it says.
#[derive(Debug)]
pub struct Look {
    pub config: RepositoryConfig,
    pub backend: Arc<dyn Backend>,
    pub found: Result<Found, Failure>,
}

/// What a repository that can be read holds of one cluster.
#[derive(Debug)]
pub struct Found {
    /// `None`: there is none of seawall's at this place.
    pub file: Option<RepositoryFile>,
    /// The place itself is not there.
    pub missing: Option<StoreError>,
    /// Oldest first.
    pub lineages: Vec<(Lineage, LineageFile)>,
}

impl Look {
    /// It answers, and is a repository: else why not, with a hint.
    pub fn readable(&self) -> Result<&Found, Failure> {
        let found = self.found.as_ref().map_err(Clone::clone)?;
        match (&found.missing, &found.file) {
            (Some(error), _) => Err(error.clone().into()),
            (None, None) => {
                let message = format!("{} holds no repository of seawall's", self.backend.describe());
                Err(Failure::new(ExitCode::Config, message)
                    .hint("is `url` (or --repository) the right one, and is the volume mounted?"))
            }
            (None, Some(_)) => Ok(found),
        }
    }

    /// The lineages it holds, none where it cannot be read.
    pub fn lineages(&self) -> &[(Lineage, LineageFile)] {
        self.found.as_ref().map_or(&[], |found| &found.lineages)
    }

    pub fn file_of(&self, wanted: &Lineage) -> Option<&LineageFile> {
        self.lineages().iter().find(|(lineage, _)| lineage == wanted).map(|(_, file)| file)
    }

    pub fn archive(&self, lineage: &Lineage) -> Archive {
        Archive::new(self.backend.clone(), lineage.clone())
    }
}

/// Looks into all of them at once. They stay in the order given.
pub async fn look(repositories: &[RepositoryConfig], cluster: &str) -> Vec<Look> {
    join_all(repositories.iter().map(|config| look_into(config, cluster))).await
}

async fn look_into(config: &RepositoryConfig, cluster: &str) -> Look {
    let backend = setup::backend(config);
    let found = async {
        let file = match store::read_repository(backend.as_ref()).await {
            Err(CatalogError::Store(error)) if error.is(StoreErrorKind::RootMissing) => {
                return Ok(Found { file: None, missing: Some(error), lineages: Vec::new() });
            }
            read => read?,
        };
        let lineages = match &file {
            Some(_) => store::lineages(backend.as_ref(), cluster).await?,
            None => Vec::new(),
        };
        Ok::<_, CatalogError>(Found { file, missing: None, lineages })
    };
    let found = found.await.map_err(Failure::from);
    Look { config: config.clone(), backend, found }
}

/// Every lineage that any of them holds, oldest first.
pub fn all_lineages(looks: &[Look]) -> Vec<(Lineage, LineageFile)> {
    let mut all: Vec<(Lineage, LineageFile)> = Vec::new();
    for (lineage, file) in looks.iter().flat_map(Look::lineages) {
        if all.iter().all(|(known, _)| known != lineage) {
            all.push((lineage.clone(), file.clone()));
        }
    }
    all.sort_by_key(|(lineage, file)| (file.created, lineage.system_id, lineage.ordinal));
    all
}

/// What one repository holds of a lineage.
#[derive(Debug)]
pub struct Copy<'a> {
    pub repository: &'a str,
    pub catalog: Catalog,
}

/// One that cannot say what it holds of a lineage, or of anything.
#[derive(Clone, Debug)]
pub struct Unread {
    pub repository: String,
    pub failure: Failure,
}

/// Reads a lineage in every repository. One that could be expected to have it and has not is unread too.
pub async fn copies<'a>(looks: &'a [Look], lineage: &Lineage) -> (Vec<Copy<'a>>, Vec<Unread>) {
    let is_newest = all_lineages(looks).last().is_some_and(|(newest, _)| newest == lineage);
    let read = looks.iter().map(async |look| {
        look.readable()?;
        match look.file_of(lineage) {
            Some(_) => look.archive(lineage).load_catalog().await.map(Some).map_err(Failure::from),
            None if is_newest => Err(empty(look, lineage)),
            None => Ok(None),
        }
    });
    let (mut copies, mut unread) = (Vec::new(), Vec::new());
    for (look, read) in looks.iter().zip(join_all(read).await) {
        match read {
            Ok(Some(catalog)) => copies.push(Copy { repository: &look.config.name, catalog }),
            Ok(None) => {}
            Err(failure) => unread.push(Unread { repository: look.config.name.clone(), failure }),
        }
    }
    (copies, unread)
}

/// What the copies are together.
pub fn union(lineage: &Lineage, copies: &[Copy<'_>]) -> Result<Holdings, Failure> {
    let catalogs: Vec<&Catalog> = copies.iter().map(|copy| &copy.catalog).collect();
    Holdings::union(&catalogs).map_err(|error| {
        let names: Vec<&str> = copies.iter().map(|copy| copy.repository).collect();
        let (cluster, name) = (&lineage.cluster, lineage.directory_name());
        let message = format!("{} do not hold one lineage {name} of cluster {cluster}: {error}", names.join(" and "));
        Failure::new(ExitCode::Data, message)
            .hint("two servers archived to one of them; continue with `seawall init --new-lineage`")
    })
}

fn empty(look: &Look, lineage: &Lineage) -> Failure {
    let (location, name) = (look.backend.describe(), lineage.directory_name());
    Failure::new(ExitCode::Config, format!("{location} holds no lineage {name} of cluster {}", lineage.cluster))
        .hint("is its volume mounted, and is its `url` right? If it is new, or was lost, run `seawall init --create`")
}

/// Nothing can be told: why, by the first repository that says something about it.
pub fn nothing(looks: &[Look], cluster: &str) -> Failure {
    let unreadable = looks.iter().find_map(|look| look.found.as_ref().err().cloned());
    let missing = looks.iter().find_map(|look| look.found.as_ref().ok()?.missing.clone());
    unreadable.or_else(|| missing.map(Failure::from)).unwrap_or_else(|| {
        let locations: Vec<String> = looks.iter().map(|look| look.backend.describe()).collect();
        let message = format!("{} holds nothing for cluster {cluster}", locations.join(" or "));
        Failure::new(ExitCode::Config, message)
            .hint("is --cluster right, and is `url` (or --repository) the right one? `seawall run` begins an archive")
    })
}

/// Nearest first: directories, then what is reached over a network; otherwise as configured.
pub fn nearest_first(repositories: &[RepositoryConfig]) -> Vec<RepositoryConfig> {
    let mut sorted = repositories.to_vec();
    sorted.sort_by_key(|repository| !matches!(repository.location, Location::Local(_)));
    sorted
}
