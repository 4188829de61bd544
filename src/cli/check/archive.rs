//! Owns: what `check` finds about a cluster's repositories, their agreement, its encryption, and the way back.
//! Does not own: what a store can do (`repository`), what the agent does about a finding (`agent`).

use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;

use super::Check;
use crate::cli::repositories::{self, Look};
use crate::cli::{keys, output};
use crate::config::{ClusterConfig, Location};
use crate::error::{ExitCode, Failure};
use crate::repository::s3::{Finding, Outcome};
use crate::repository::{Backend, S3Backend, layout};
use crate::wal::SystemId;

/// Less than this on the repository's volume is hours, not days, on a busy server.
const FREE_BYTES_MIN: u64 = 10 << 30;

pub async fn examine(cluster: &ClusterConfig, system_id: Option<SystemId>, random: u32) -> Vec<Check> {
    let looks = repositories::look(&cluster.repositories, &cluster.name).await;
    let mut checks = Vec::new();
    for look in &looks {
        let mut of_one = vec![contents(&cluster.name, look, system_id)];
        of_one.extend(store(look, random).await);
        of_one.extend(free_space(&look.config.location));
        if looks.len() > 1 {
            of_one.iter_mut().for_each(|check| check.found.insert_str(0, &format!("{}: ", look.config.name)));
        }
        checks.extend(of_one);
    }
    if looks.len() > 1 {
        checks.extend(agreement(&looks, system_id));
    }
    checks.push(encryption(cluster));
    checks
}

fn contents(cluster: &str, look: &Look, system_id: Option<SystemId>) -> Check {
    const WHAT: &str = "repository";
    let lineages = match &look.found {
        Err(failure) => return Check::failed(WHAT, failure.clone()),
        Ok(found) => match &found.missing {
            Some(error) => return Check::failed(WHAT, error.clone().into()),
            None => &found.lineages,
        },
    };
    let names: Vec<String> = lineages.iter().map(|(lineage, _)| lineage.directory_name()).collect();
    let Some(system_id) = system_id else { return Check::ok(WHAT, format!("lineages: {}", names.join(", "))) };
    match lineages.iter().any(|(lineage, _)| lineage.system_id == system_id) {
        true => Check::ok(WHAT, format!("holds system {system_id} for cluster {cluster}")),
        false if names.is_empty() => {
            Check::ok(WHAT, format!("holds nothing for cluster {cluster} yet: `seawall run` begins"))
        }
        false => Check::problem(
            WHAT,
            format!("holds cluster {cluster} of other systems ({}), the server is {system_id}", names.join(", ")),
            "is this the right server, and the right repository? If it replaces the old one: `seawall init --new-lineage`",
        ),
    }
}

async fn store(look: &Look, random: u32) -> Vec<Check> {
    match &look.config.location {
        Location::Local(_) => vec![match probe(&look.backend, random).await {
            Ok(()) => Check::ok("repository writable", format!("{} stores, reads and deletes", look.config.url)),
            Err(failure) => Check::failed("repository writable", failure),
        }],
        Location::S3(options) => {
            let findings = S3Backend::open(options.clone()).survey(random).await;
            findings.into_iter().map(store_check).collect()
        }
    }
}

fn store_check(finding: Finding) -> Check {
    match finding.outcome {
        Outcome::Good(found) => Check::ok(finding.what, found),
        Outcome::Fair { found, cure } => Check::warning(finding.what, found, cure),
        Outcome::Bad(error) => Check::failed(finding.what, error.into()),
    }
}

/// Stores, reads and deletes a small object.
async fn probe(backend: &Arc<dyn Backend>, random: u32) -> Result<(), Failure> {
    let key = layout::probe(random);
    let body = Bytes::from_static(b"seawall check: may be deleted\n");
    backend.put_new(&key, std::slice::from_ref(&body)).await?;
    let read = backend.fetch(&key, 0..body.len() as u64).await;
    backend.delete(&key).await?;
    match read? == body {
        true => Ok(()),
        false => Err(Failure::new(ExitCode::Data, "the store gave back other bytes than it was given")),
    }
}

fn free_space(location: &Location) -> Option<Check> {
    let Location::Local(path) = location else { return None };
    let found = rustix::fs::statvfs(path).ok()?;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    let text = format!("{} on the repository's volume", output::size(free));
    Some(match free < FREE_BYTES_MIN {
        true => Check::warning(
            "free space",
            text,
            "make room: a full repository stops archiving, and WAL stays on the server",
        ),
        false => Check::ok("free space", text),
    })
}

// --- Several together --------------------------------------------------------------------------------------------

/// Repositories of one cluster are copies of one lineage, each in a place of its own.
fn agreement(looks: &[Look], system_id: Option<SystemId>) -> Vec<Check> {
    const WHAT: &str = "repositories agree";
    let mut checks = Vec::new();
    checks.extend(twins(looks).map(|(one, other)| {
        Check::problem(
            WHAT,
            format!("{one} and {other} are one and the same place"),
            "one copy is no second one: give each repository a `url` of its own",
        )
    }));
    let lineages = repositories::all_lineages(looks);
    let ours = lineages.iter().filter(|(lineage, _)| system_id.is_none_or(|id| lineage.system_id == id));
    let Some((lineage, file)) = ours.max_by_key(|(lineage, file)| (file.created, lineage.ordinal)) else {
        return checks;
    };
    let name = lineage.directory_name();
    for look in looks.iter().filter(|look| look.found.is_ok()) {
        let repository = &look.config.name;
        match look.file_of(lineage) {
            None => checks.push(Check::problem(
                WHAT,
                format!("{repository} holds no lineage {name}, others do"),
                "is its volume mounted, and is its `url` right? If it is new, or was lost: `seawall init --create`",
            )),
            Some(own) if own.segment_size != file.segment_size => checks.push(Check::problem(
                WHAT,
                format!(
                    "{repository} holds lineage {name} with segments of {} bytes, others of {}",
                    own.segment_size.bytes(),
                    file.segment_size.bytes()
                ),
                "they are no copies of one archive: give the cluster other repositories",
            )),
            Some(_) => {}
        }
    }
    if checks.is_empty() {
        checks.push(Check::ok(WHAT, format!("all that can be read hold lineage {name}")));
    }
    checks
}

/// Pairs of names for one place, told by the random id it got when it was made.
fn twins(looks: &[Look]) -> impl Iterator<Item = (&str, &str)> {
    let id = |look: &Look| Some(look.found.as_ref().ok()?.file.as_ref()?.id.clone());
    let pairs =
        looks.iter().enumerate().flat_map(|(index, one)| looks[index + 1..].iter().map(move |other| (one, other)));
    pairs
        .filter(move |(one, other)| id(one).is_some() && id(one) == id(other))
        .map(|(one, other)| (one.config.name.as_str(), other.config.name.as_str()))
}

// --- The way back ------------------------------------------------------------------------------------------------

/// The recipients were checked with the configuration; whether an identity here reads what is written.
fn encryption(cluster: &ClusterConfig) -> Check {
    const WHAT: &str = "encryption";
    let identities = match cluster.identity_file.as_deref().map(keys::read_identities).transpose() {
        Ok(identities) => identities,
        Err(failure) => return Check::failed(WHAT, failure),
    };
    match (&cluster.encrypt_to, identities) {
        (None, None) => Check::ok(WHAT, "none: objects are stored as zstd alone"),
        (None, Some(_)) => Check::ok(WHAT, "new objects are not encrypted; identity_file reads older ones"),
        (Some(recipients), None) => {
            let count = recipients.public_keys().len();
            Check::ok(WHAT, format!("to {count} recipient(s); a restore on this machine needs identity_file"))
        }
        (Some(recipients), Some(identities)) => {
            let written = recipients.public_keys();
            match identities.public_keys().iter().any(|key| written.contains(key)) {
                true => Check::ok(WHAT, format!("to {} recipient(s); identity_file reads it", written.len())),
                false => Check::warning(
                    WHAT,
                    "identity_file belongs to none of the recipients in encrypt_to: it reads nothing written from now on",
                    "add the identity of one of the recipients to identity_file, or its recipient to encrypt_to",
                ),
            }
        }
    }
}

/// The line to put into postgresql.conf of a restored server.
pub fn restore_path(cluster: &ClusterConfig, config: Option<&Path>) -> Check {
    const WHAT: &str = "restore path";
    let program = match std::env::current_exe() {
        Ok(path) => path,
        Err(error) => {
            return Check::warning(
                WHAT,
                format!("could not tell where this program is: {error}"),
                "use an absolute path in restore_command: servers have a short PATH",
            );
        }
    };
    let source = match (&cluster.repositories[..], &cluster.identity_file, config) {
        ([only], None, _) if matches!(only.location, Location::Local(_)) => format!("--repository {}", only.url),
        (_, _, Some(path)) => format!("--config {}", std::path::absolute(path).unwrap_or(path.to_path_buf()).display()),
        ([first, ..], _, None) => format!("--repository {}", first.url),
        ([], _, None) => String::new(),
    };
    let (program, name) = (program.display(), &cluster.name);
    Check::ok(WHAT, format!("restore_command = '{program} {source} --cluster {name} wal-get %f %p'"))
}
