//! Owns: how `find` answers: table, JSON, and the command that goes back.
//! Does not own: what is found (`find.rs`, `catalog::events`).

use serde::Serialize;

use crate::catalog::events::{Event, EventKind};
use crate::cli::args::Global;
use crate::cli::output;
use crate::config::ArchiveConfig;

/// A text table shows so many relations of one event.
const RELATIONS_SHOWN: usize = 3;

#[derive(Debug, Default, Serialize)]
pub struct Answer {
    pub events: Vec<ShownEvent>,
    /// There are more commits than were asked for.
    pub more: bool,
    /// Why the server could not be asked for names.
    pub unnamed: Option<String>,
    /// What could not be looked into, and may hold more.
    pub unread: Vec<String>,
}

#[derive(Debug, Serialize)]
pub struct ShownEvent {
    pub cluster: String,
    pub lineage: String,
    #[serde(flatten)]
    pub event: Event,
}

/// What stands before `--to …`.
pub fn command(global: &Global, archives: &[ArchiveConfig], cluster: &str) -> String {
    let mut words = vec!["seawall".to_string()];
    if let Some(config) = &global.config {
        words.extend(["--config".to_string(), config.display().to_string()]);
    }
    if let Some(url) = &global.repository {
        words.extend(["--repository".to_string(), url.clone()]);
    }
    if archives.len() > 1 {
        words.extend(["--cluster".to_string(), cluster.to_string()]);
    }
    words.join(" ")
}

impl Answer {
    pub fn print(&self, with_commits: bool, command: &str) {
        if self.events.is_empty() {
            output::text(match with_commits {
                true => "no commit was found",
                false => "nothing was dropped or truncated, and there is no restore point",
            });
        } else {
            output::text(&self.table(with_commits));
            output::note(format_args!(
                "go back with: {command} restore --pgdata DIR --to …, or look first with --plan"
            ));
        }
        let mut hints: Vec<&String> = self.events.iter().filter_map(|shown| shown.event.hint.as_ref()).collect();
        hints.dedup();
        hints.iter().for_each(|hint| output::note(format_args!("drop database: {hint}")));
        if self.more {
            output::note("there are more: narrow the times, or raise --count");
        }
        if let Some(why) = &self.unnamed {
            output::note(format_args!("names of relations are not known: {why}"));
        }
        self.unread.iter().for_each(|unread| output::note(format_args!("not looked into: {unread}")));
    }

    /// As wide as it is: what is copied from it must be whole.
    fn table(&self, with_commits: bool) -> String {
        let mut header = vec!["TIME", "WHAT", "XID", "LSN", "TIMELINE", "TO STOP JUST BEFORE"];
        header.extend(with_commits.then_some("JUST AFTER"));
        let mut table = output::wide_table(&header);
        for ShownEvent { event, .. } in &self.events {
            let time = event.time.map_or("-".to_string(), |time| time.strftime("%Y-%m-%d %H:%M:%S%.6fZ").to_string());
            let xid = event.xid.map_or("-".to_string(), |xid| xid.to_string());
            let mut row = vec![time, what(event), xid, event.lsn.to_string(), event.timeline.to_string()];
            row.push(format!("restore {}", event.restore));
            if with_commits {
                row.push(event.restore_after.as_ref().map_or("-".to_string(), |after| format!("restore {after}")));
            }
            table.add_row(row);
        }
        table.to_string()
    }
}

fn what(event: &Event) -> String {
    let name = |path: &String| event.names.get(path).cloned().unwrap_or_else(|| path.clone());
    let shown = event.relations.iter().take(RELATIONS_SHOWN).map(name).collect::<Vec<_>>().join(" ");
    let more = match event.relations.len().saturating_sub(RELATIONS_SHOWN) {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    let database = event.database.as_ref().map(|name| format!(" in {name}")).unwrap_or_default();
    let changed = match event.changed.split_at_checked(RELATIONS_SHOWN) {
        _ if event.changed.is_empty() => String::new(),
        None | Some((_, [])) => format!(", changing {}", event.changed.join(" ")),
        Some((first, rest)) => format!(", changing {} and {} more", first.join(" "), rest.len()),
    };
    match event.kind {
        EventKind::Drop => format!("drop {shown}{more}{database}{changed}"),
        EventKind::Truncation => format!("truncate {shown}{more}{database}"),
        EventKind::DropDatabase => format!("drop database files {shown}{more}"),
        EventKind::DropTablespace => format!("drop tablespace {shown}"),
        EventKind::RestorePoint => format!("restore point {}", event.name.as_deref().unwrap_or("?")),
        EventKind::Commit => "commit".to_string(),
        EventKind::Rollback => "rollback".to_string(),
    }
}
