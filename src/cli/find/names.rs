//! Owns: names for what events are about, asked of the live server, where they are certain.
//! Does not own: what the archive says of removed files (`catalog::events`), who the server is (`cli/server.rs`, `config`).
//!
//! A number alone names nothing: a file's number is given again after a failover on another timeline, or after four
//! billion others. So a server is asked only about events on its own line of history, and
//! - a file that was cut has the name its number has now only if the archive knows of no removal since;
//! - a file that was removed has no name any more. What its transaction changed and still exists is said instead: a
//!   relation that was truncated or rewritten is among that. Transactions are told apart by their 32 bits only while the
//!   server has not used them all once.
//!
//! Between the archive's end and the answer a number could come into other hands only by four billion others.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::Evidence;
use crate::archiver::Workers;
use crate::catalog::contents::segment_span;
use crate::catalog::events::{Event, EventKind, Removals};
use crate::cli::args::Global;
use crate::cli::setup;
use crate::error::Failure;
use crate::postgres::{Purpose, connect, sql};
use crate::replication::{Connection, Dial, Login, QueryResult, SessionKind};
use crate::repository::layout::Lineage;
use crate::restore::reach::Reach;
use crate::wal::{History, Lsn, SystemId, TimelineId};

/// For all questions together.
const PATIENCE: Duration = Duration::from_secs(10);
/// Each takes a session of its own.
const DATABASES_MAX: usize = 32;
/// Asked for in one database.
const ITEMS_MAX: usize = 1000;

/// Adds what the server tells; else tells why it does not.
pub async fn add(
    global: &Global,
    lineage: &Lineage,
    reach: &Reach<'_>,
    evidence: &Evidence,
    events: &mut [Event],
) -> Option<String> {
    let has_names = |event: &Event| matches!(event.kind, EventKind::Drop | EventKind::Truncation);
    if !events.iter().any(has_names) {
        return None;
    }
    // Archives can be looked into where no server is configured.
    let cluster = setup::cluster(global).ok()?;
    let world = setup::world(&cluster, Workers::inline());
    let naming = Naming { lineage, reach, evidence };
    let asked = async {
        let logins = world.logins.logins(Purpose::Sql)?;
        let connected = connect::connect_or_explain(world.dialer.as_ref(), &logins, world.logins.wanted()).await?;
        naming.add(world.dialer.as_ref(), connected.connection, &connected.login, events).await
    };
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(why)) => why,
        Ok(Err(failure)) => Some(failure.message),
        Err(_) => Some(format!("the server did not answer all questions within {} s", PATIENCE.as_secs())),
    }
}

struct Naming<'a> {
    lineage: &'a Lineage,
    reach: &'a Reach<'a>,
    evidence: &'a Evidence,
}

/// What one database is asked.
#[derive(Debug, Default)]
struct Questions {
    /// Tablespace and number of files that are still those that events were about.
    files: BTreeSet<(u32, u32)>,
    transactions: BTreeSet<u32>,
}

impl Naming<'_> {
    async fn add(
        &self,
        dialer: &dyn Dial,
        mut connection: Connection,
        login: &Login,
        events: &mut [Event],
    ) -> Result<Option<String>, Failure> {
        let server = connection.query(SERVER).await?;
        let databases = connection.query(DATABASES).await?;
        connection.close().await;
        let system_id: Option<SystemId> = server.text(0, 0).and_then(|text| text.parse().ok());
        if system_id != Some(self.lineage.system_id) {
            return Ok(Some(format!(
                "the server is not the one whose WAL lineage {} holds",
                self.lineage.directory_name()
            )));
        }
        let timeline = server.text(0, 1).and_then(|text| u32::from_str_radix(text, 16).ok()).map(TimelineId);
        let Some(timeline) = timeline else {
            return Ok(Some("the server is a standby, whose line of history may change".to_string()));
        };
        let Some(line) = self.reach.line(timeline) else {
            return Ok(Some(format!("the server is on timeline {timeline}, which the archive does not know")));
        };
        let ids_are_unique = server.text(0, 2) == Some("0");
        let databases = databases_of(&databases);
        let is_own = |event: &Event| super::is_on(&line.path, event.timeline, event.lsn);
        let mut own: Vec<&mut Event> = events.iter_mut().filter(|event| is_own(event)).collect();
        let removals = self.removals(&line.path, line.stretches.last().map(|last| last.from), &own);
        let mut questions: BTreeMap<u32, Questions> = BTreeMap::new();
        for event in &mut own {
            let Some(database) = event.relations.first().and_then(|path| parts(path)).map(|(_, database, _)| database)
            else {
                continue;
            };
            // A database that is there can be a later one of that number only if that one was removed.
            if event.relations.iter().all(|path| removals.directory_is_still(path, event.lsn)) {
                event.database = databases.get(&database).cloned();
            }
            if event.database.is_none() {
                continue;
            }
            let asked = questions.entry(database).or_default();
            match event.kind {
                EventKind::Truncation => {
                    let still = event.relations.iter().filter(|path| removals.is_still(path, event.lsn));
                    asked.files.extend(still.filter_map(|path| parts(path)).map(|(space, _, file)| (space, file)));
                }
                EventKind::Drop if ids_are_unique => asked.transactions.extend(event.xid),
                _ => {}
            }
        }
        questions.retain(|_, asked| !asked.files.is_empty() || !asked.transactions.is_empty());
        let mut why = (questions.len() > DATABASES_MAX).then(|| format!("only {DATABASES_MAX} databases were asked"));
        for (oid, asked) in questions.into_iter().take(DATABASES_MAX) {
            let database = databases.get(&oid).cloned().unwrap_or_default();
            // One that lets nobody in is no reason to leave the others out.
            match ask(dialer, login, &database, &asked).await {
                Ok(answers) => answers.tell(oid, &mut own),
                Err(failure) => why = Some(format!("database {database}: {}", failure.message)),
            }
        }
        Ok(why)
    }

    /// What the archive knows of the files that events on the server's line are about.
    fn removals(&self, path: &History, certain_from: Option<Lsn>, events: &[&mut Event]) -> Removals {
        let mut removals = Removals::of(events.iter().flat_map(|event| event.relations.iter().cloned()));
        for said in &self.evidence.said {
            let Some(span) = segment_span(said.name, self.reach.size()) else { continue };
            let timelines = path.ancestors().iter().map(|entry| entry.timeline).chain([path.timeline]);
            // A child's first segment has records of its parent.
            for timeline in timelines.filter(|timeline| said.path.contains(*timeline)) {
                let begin = path.begin_of(timeline).unwrap_or(Lsn::MAX).max(span.start);
                let ends = [Some(span.end), path.end_of(timeline), said.path.end_of(timeline)];
                let end = ends.into_iter().flatten().min().unwrap_or(span.end);
                if begin < end {
                    removals.take(&said.summary, begin, end);
                }
            }
        }
        match certain_from {
            Some(lsn) if self.evidence.is_whole => removals.uncertain_before(lsn),
            _ => removals.uncertain_before(Lsn::MAX),
        }
        removals
    }
}

/// Tablespace, database, file.
fn parts(path: &str) -> Option<(u32, u32, u32)> {
    let mut numbers = path.split('/').map(|number| number.parse().ok());
    let parts = (numbers.next()??, numbers.next()??, numbers.next()??);
    numbers.next().is_none().then_some(parts)
}

fn databases_of(answer: &QueryResult) -> BTreeMap<u32, String> {
    let row = |row: usize| Some((answer.text(row, 0)?.parse().ok()?, answer.text(row, 1)?.to_string()));
    (0..answer.rows.len()).filter_map(row).collect()
}

/// `schema.name` by tablespace and number, and by transaction.
#[derive(Debug, Default)]
struct Answers {
    files: BTreeMap<(u32, u32), String>,
    transactions: BTreeMap<u32, Vec<String>>,
}

impl Answers {
    fn tell(&self, database: u32, events: &mut [&mut Event]) {
        for event in events {
            for path in &event.relations {
                let Some((space, _, file)) = parts(path).filter(|(_, of, _)| *of == database) else { continue };
                if let (EventKind::Truncation, Some(name)) = (event.kind, self.files.get(&(space, file))) {
                    event.names.insert(path.clone(), name.clone());
                }
            }
            let is_in = event.relations.first().and_then(|path| parts(path)).is_some_and(|(_, of, _)| of == database);
            if event.kind == EventKind::Drop && is_in {
                event.changed = event.xid.and_then(|xid| self.transactions.get(&xid)).cloned().unwrap_or_default();
            }
        }
    }
}

async fn ask(dialer: &dyn Dial, login: &Login, database: &str, asked: &Questions) -> Result<Answers, Failure> {
    let login = Login { kind: SessionKind::Sql { database: database.to_string() }, ..login.clone() };
    let mut answers = Answers::default();
    let answer = sql::ask(dialer, &login, &question(asked)).await?;
    for row in 0..answer.rows.len() {
        let number = |column: usize| answer.text(row, column).and_then(|text| text.parse::<u32>().ok());
        let Some(name) = answer.text(row, 3).map(str::to_string) else { continue };
        match (number(0), number(1), number(2)) {
            (Some(space), Some(file), _) => drop(answers.files.insert((space, file), name)),
            (_, _, Some(xid)) => answers.transactions.entry(xid).or_default().push(name),
            _ => {}
        }
    }
    Ok(answers)
}

/// System identifier, timeline unless it is a standby, how often transaction ids have begun anew.
const SERVER: &str = "\
    SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system()), \
           CASE WHEN NOT pg_catalog.pg_is_in_recovery() \
           THEN substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_flush_lsn()), 1, 8) END, \
           pg_catalog.pg_snapshot_xmax(pg_catalog.pg_current_snapshot())::text::bigint >> 32";

const DATABASES: &str = "SELECT oid, datname FROM pg_catalog.pg_database WHERE datallowconn LIMIT 10000";

/// Only numbers are put in. NULL is the fourth of each list, so that an empty one is a list.
fn question(asked: &Questions) -> String {
    let files = asked.files.iter().take(ITEMS_MAX).map(|(space, file)| format!(", ({space}::oid, {file}::oid)"));
    let transactions = asked.transactions.iter().take(ITEMS_MAX).map(|xid| format!(", '{xid}'"));
    format!(
        "SELECT f.space::text, f.file::text, NULL, \
                pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) \
         FROM (VALUES (NULL::oid, NULL::oid){}) AS f(space, file) \
         JOIN pg_catalog.pg_class c ON c.oid = pg_catalog.pg_filenode_relation(f.space, f.file) \
         JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         UNION ALL SELECT * FROM ( \
         SELECT NULL, NULL, c.xmin::text, pg_catalog.quote_ident(n.nspname) || '.' || pg_catalog.quote_ident(c.relname) \
         FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid = c.relnamespace \
         WHERE c.xmin::text IN (''{}) AND c.relkind IN ('r', 'p', 'm') AND n.nspname <> 'pg_toast' \
         ORDER BY c.oid LIMIT {ITEMS_MAX}) AS changed",
        files.collect::<String>(),
        transactions.collect::<String>(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_three_numbers() {
        assert_eq!(parts("1663/5/16400"), Some((1663, 5, 16400)));
        for path in ["1663/5", "16500", "", "1663/5/16400/1", "1663/x/1"] {
            assert_eq!(parts(path), None, "{path}");
        }
    }

    #[test]
    fn numbers_are_all_a_question_holds() {
        let asked = Questions { files: [(1663, 16400)].into(), transactions: [741, 742].into() };
        let text = question(&asked);
        assert!(
            text.contains(", (1663::oid, 16400::oid))") && text.contains("('',") && text.contains("'742')"),
            "{text}"
        );
    }
}
