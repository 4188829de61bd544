//! Owns: `list`: the backups of every lineage in all repositories together, as table or JSON; reading them, for the
//! other verbs.
//! Does not own: what has become of a backup (`catalog::shelf`), the JSON object (`monitor/backup.rs`).

use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};
use serde::Serialize;

use super::args::{Global, ListArgs};
use super::repositories::{self, Look, Unread};
use super::{Verdict, output, setup};
use crate::catalog::shelf::{self, Shelf, Shelved};
use crate::config::ArchiveConfig;
use crate::error::Failure;
use crate::monitor::backup::{BackupEntry, BackupStatus};
use crate::repository::layout::Lineage;

#[derive(Debug, Serialize)]
struct Answer {
    backups: Vec<BackupEntry>,
    /// They may hold more than is listed.
    unread: Vec<String>,
}

pub fn run(global: &Global, args: &ListArgs) -> Result<Verdict, Failure> {
    let chosen = setup::chosen_archives(global)?;
    let mut answer = setup::block_on(find(&chosen))??;
    answer.backups.retain(|entry| args.all || entry.status != BackupStatus::Failed);
    match global.json {
        true => output::json(&answer),
        false => print(&answer, args.all),
    }
    Ok(if answer.unread.is_empty() { Verdict::Fine } else { Verdict::Finding })
}

async fn find(archives: &[ArchiveConfig]) -> Result<Answer, Failure> {
    let mut answer = Answer { backups: Vec::new(), unread: Vec::new() };
    for config in archives {
        let looks = repositories::look(&config.repositories, &config.cluster).await;
        let lineages = repositories::all_lineages(&looks);
        if lineages.is_empty() {
            return Err(repositories::nothing(&looks, &config.cluster));
        }
        for (lineage, _) in lineages {
            let (shelves, unread) = shelves(&looks, &lineage).await;
            if shelves.is_empty() {
                return Err(unread.into_iter().next().expect("a lineage was found somewhere").failure);
            }
            let name = lineage.directory_name();
            let entry = |shelved: &Shelved| BackupEntry::new(&config.cluster, &name, shelved);
            answer.backups.extend(union(&shelves).iter().map(entry));
            for Unread { repository, failure } in unread {
                let cluster = &config.cluster;
                let line = format!(
                    "repository {repository} of cluster {cluster} cannot be read, and may hold more: {failure}"
                );
                if !answer.unread.contains(&line) {
                    answer.unread.push(line);
                }
            }
        }
    }
    Ok(answer)
}

/// What every repository that can be read holds of a lineage's backups, and the others with why.
pub async fn shelves<'a>(looks: &'a [Look], lineage: &Lineage) -> (Vec<(&'a Look, Shelf)>, Vec<Unread>) {
    let read = looks.iter().map(async |look| {
        look.readable()?;
        match look.file_of(lineage) {
            Some(_) => look.archive(lineage).shelf().await.map(Some).map_err(Failure::from),
            None => Ok(None),
        }
    });
    let (mut shelves, mut unread) = (Vec::new(), Vec::new());
    for (look, read) in looks.iter().zip(join_all(read).await) {
        match read {
            Ok(Some(shelf)) => shelves.push((look, shelf)),
            Ok(None) => {}
            Err(failure) => unread.push(Unread { repository: look.config.name.clone(), failure }),
        }
    }
    (shelves, unread)
}

/// The backups of all of them together, oldest first.
pub fn union(shelves: &[(&Look, Shelf)]) -> Vec<Shelved> {
    let named: Vec<(&str, &Shelf)> = shelves.iter().map(|(look, shelf)| (look.config.name.as_str(), shelf)).collect();
    shelf::union(&named, Timestamp::now())
}

const COLUMNS: [&str; 11] =
    ["ID", "TYPE", "FINISHED", "TOOK", "SIZE", "STORED", "START", "STOP", "TIMELINE", "STATUS", "LABEL"];

fn print(answer: &Answer, all: bool) {
    let several = |of: fn(&BackupEntry) -> &String| {
        let mut values: Vec<&String> = answer.backups.iter().map(of).collect();
        values.sort();
        values.dedup();
        values.len() > 1
    };
    let several_clusters = several(|entry| &entry.cluster);
    let is_partial = answer.backups.iter().any(|entry| entry.repositories != answer.backups[0].repositories);
    let several_repositories = is_partial || answer.backups.iter().any(|entry| entry.repositories.len() > 1);
    let mut header: Vec<&str> = COLUMNS.to_vec();
    if several_clusters {
        header.insert(0, "CLUSTER");
    }
    if several_repositories {
        header.push("REPOSITORIES");
    }
    match (answer.backups.is_empty(), all) {
        (true, true) => output::text("no backups"),
        (true, false) => output::text("no backups (--all shows those that failed)"),
        (false, _) => {
            let mut table = output::table(&header);
            for entry in &answer.backups {
                let mut cells = cells(entry).to_vec();
                if several_clusters {
                    cells.insert(0, entry.cluster.clone());
                }
                if several_repositories {
                    cells.push(entry.repositories.join(", "));
                }
                table.add_row(cells);
            }
            output::text(&table.to_string());
        }
    }
    for (entry, cause) in answer.backups.iter().filter_map(|entry| Some((entry, entry.cause.as_ref()?))) {
        output::text(&format!("{} failed: {cause}", entry.id));
    }
    answer.unread.iter().for_each(|line| output::text(line));
}

fn cells(entry: &BackupEntry) -> [String; 11] {
    let lsn = |lsn: Option<crate::wal::Lsn>| lsn.map_or(String::new(), |lsn| lsn.to_string());
    let size = |bytes: Option<u64>| bytes.map_or(String::new(), output::size);
    let pinned = if entry.pinned { ", pinned" } else { "" };
    [
        entry.id.clone(),
        entry.backup_type.to_string(),
        entry.finished.map_or(String::new(), |at| at.strftime("%Y-%m-%d %H:%M:%SZ").to_string()),
        entry.finished.map_or(String::new(), |at| took(at.duration_since(entry.started))),
        size(entry.raw_bytes),
        size(entry.stored_bytes),
        lsn(entry.start_lsn),
        lsn(entry.stop_lsn),
        entry.timeline.map_or(String::new(), |timeline| timeline.to_string()),
        format!("{}{pinned}", entry.status.word()),
        entry.label.clone().unwrap_or_default(),
    ]
}

/// To the second; `0s` for less.
fn took(duration: SignedDuration) -> String {
    format!("{:#}", SignedDuration::from_secs(duration.as_secs()))
}

/// A backup's line, for people.
pub fn line(entry: &BackupEntry) -> String {
    let size = |bytes: Option<u64>| bytes.map_or("unknown".to_string(), output::size);
    let lsn = |lsn: Option<crate::wal::Lsn>| lsn.map_or("unknown".to_string(), |lsn| lsn.to_string());
    let took = entry.finished.map_or("unknown".to_string(), |at| took(at.duration_since(entry.started)));
    format!(
        "{}: {}, {} ({} stored) in {took}, from {} to {}, in {}",
        entry.id,
        entry.status.word(),
        size(entry.raw_bytes),
        size(entry.stored_bytes),
        lsn(entry.start_lsn),
        lsn(entry.stop_lsn),
        entry.repositories.join(", ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_shown_to_the_second() {
        assert_eq!(took(SignedDuration::from_millis(999)), "0s");
        assert_eq!(took(SignedDuration::from_millis(3_723_999)), "1h 2m 3s");
    }
}
