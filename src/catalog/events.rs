//! Owns: what happened in the archive's WAL that somebody may want to go back before: removed relations, databases and
//! tablespaces, truncations, restore points, from what the index says of each segment; single commits beside them; which of
//! them a filter picks; when a file that is there today is the one an event was about.
//! Does not own: reading the index or unfinished segments (`store`, `cli`), asking a server for names (`cli`), restoring.
//! Pure.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::Serialize;

use crate::wal::{Found, FoundKind, Lsn, RelationChange, RestorePoint, SegmentSummary, TimelineId};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A commit that removed relations' files: DROP, TRUNCATE, and what rewrites a table.
    Drop,
    /// A relation's file was cut.
    Truncation,
    /// A database's files were removed from a tablespace: DROP DATABASE, or what moved it elsewhere.
    DropDatabase,
    DropTablespace,
    RestorePoint,
    Commit,
    Rollback,
}

/// Something that happened at one position of one timeline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Event {
    pub kind: EventKind,
    /// `None` where the record has none, as a truncation's.
    pub time: Option<Timestamp>,
    pub xid: Option<u32>,
    pub lsn: Lsn,
    pub timeline: TimelineId,
    /// `<tablespace oid>/<database oid>/<relfilenode>`; of a database `<tablespace oid>/<database oid>`, of a tablespace
    /// its OID.
    pub relations: Vec<String>,
    /// The name of the database the relations are in, where the server could tell.
    pub database: Option<String>,
    /// `schema.name` of those relations whose name is certain, by what stands in `relations`.
    pub names: BTreeMap<String, String>,
    /// Relations that live on and were changed by the same transaction: what was truncated or rewritten is among them.
    pub changed: Vec<String>,
    /// Of a restore point.
    pub name: Option<String>,
    /// What stops just before it, to be put after `seawall restore`; at a restore point: there.
    pub restore: String,
    /// What stops just after it.
    pub restore_after: Option<String>,
    /// What else there is to do.
    pub hint: Option<String>,
}

/// From when to when, both included; `None` is open.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Between {
    pub since: Option<Timestamp>,
    pub until: Option<Timestamp>,
}

impl Between {
    fn holds(&self, time: Timestamp) -> bool {
        self.since.is_none_or(|since| since <= time) && self.until.is_none_or(|until| time <= until)
    }

    /// Whether anything between the first and the last commit of a segment may lie in it. Commits are not in the
    /// order of their times, so what has no time of its own is shown rather than left out.
    pub fn may_touch(&self, summary: &SegmentSummary) -> bool {
        let since = self.since.is_none_or(|since| summary.max_commit_time.is_none_or(|max| since <= max));
        let until = self.until.is_none_or(|until| summary.min_commit_time.is_none_or(|min| min <= until));
        since && until
    }
}

/// What one segment's summary tells, in order.
pub fn events(timeline: TimelineId, summary: &SegmentSummary, between: Between) -> Vec<Event> {
    let may_touch = between.may_touch(summary);
    let change = |kind: EventKind| move |change: &RelationChange| of_change(kind, timeline, change);
    let drops = summary.drops.iter().map(change(EventKind::Drop));
    let truncations = summary.truncations.iter().map(change(EventKind::Truncation));
    let databases = summary.database_removals.iter().map(change(EventKind::DropDatabase));
    let tablespaces = summary.tablespace_removals.iter().map(change(EventKind::DropTablespace));
    let points = summary.restore_points.iter().map(|point| of_point(timeline, point));
    let all = drops.chain(truncations).chain(databases).chain(tablespaces).chain(points);
    let mut events: Vec<Event> = all.filter(|event| event.time.map_or(may_touch, |time| between.holds(time))).collect();
    events.sort_by_key(|event| event.lsn);
    events
}

/// The end of a transaction.
pub fn of_end(timeline: TimelineId, found: &Found) -> Event {
    let kind = match found.kind {
        FoundKind::Rollback => EventKind::Rollback,
        _ => EventKind::Commit,
    };
    Event { time: found.time, xid: found.xid, ..Event::at(kind, timeline, found.lsn) }
}

fn of_change(kind: EventKind, timeline: TimelineId, change: &RelationChange) -> Event {
    Event {
        time: change.time,
        xid: (change.xid != 0).then_some(change.xid),
        relations: change.relations.clone(),
        hint: (kind == EventKind::DropDatabase).then(|| revive(&change.relations)),
        ..Event::at(kind, timeline, change.lsn)
    }
}

/// PostgreSQL marks a database as broken before it removes its files, and no transaction guards that: just before the
/// removal everything is there, and nobody is let in.
fn revive(directories: &[String]) -> String {
    let database = directories.iter().find_map(|directory| directory.rsplit('/').next()).unwrap_or("…");
    format!(
        "if it was DROP DATABASE, the restored server refuses connections to it until \
         UPDATE pg_database SET datconnlimit = -1 WHERE oid = {database}"
    )
}

fn of_point(timeline: TimelineId, point: &RestorePoint) -> Event {
    Event {
        time: Some(point.time),
        name: Some(point.name.clone()),
        restore: format!("--to {}", quoted(&format!("name:{}", point.name))),
        restore_after: None,
        ..Event::at(EventKind::RestorePoint, timeline, point.lsn)
    }
}

impl Event {
    fn at(kind: EventKind, timeline: TimelineId, lsn: Lsn) -> Event {
        Event {
            kind,
            time: None,
            xid: None,
            lsn,
            timeline,
            relations: Vec::new(),
            database: None,
            names: BTreeMap::new(),
            changed: Vec::new(),
            name: None,
            restore: format!("--to lsn:{lsn} --exclusive"),
            restore_after: Some(format!("--to lsn:{lsn}")),
            hint: None,
        }
    }

    /// Adds words to what leads there: which timeline, which lineage.
    pub fn reached_with(&mut self, words: &str) {
        for restore in [Some(&mut self.restore), self.restore_after.as_mut()].into_iter().flatten() {
            restore.push(' ');
            restore.push_str(words);
        }
    }
}

/// Which events somebody wants to see; empty parts let everything pass.
#[derive(Clone, Debug, Default)]
pub struct Filter {
    pub kinds: Vec<EventKind>,
    /// `*` and `?` stand for any characters and any one.
    pub relation: Option<String>,
}

impl Filter {
    pub fn takes(&self, event: &Event) -> bool {
        let kind = self.kinds.is_empty() || self.kinds.contains(&event.kind);
        kind && self.relation.as_ref().is_none_or(|pattern| event.is_about(pattern))
    }
}

impl Event {
    /// Whether a relation is meant: by its path, its file's number, or its name, with or without schema and database.
    fn is_about(&self, pattern: &str) -> bool {
        let in_database = |name: &String| match &self.database {
            Some(database) => format!("{database}.{name}"),
            None => name.clone(),
        };
        let is_named = |name: &String| {
            let bare = name.split_once('.').map_or(name.as_str(), |(_, bare)| bare);
            matches(pattern, bare) || matches(pattern, name) || matches(pattern, &in_database(name))
        };
        let is_path = |path: &String| {
            matches(pattern, path) || path.rsplit('/').next().is_some_and(|number| matches(pattern, number))
        };
        self.relations.iter().any(is_path) || self.names.values().any(is_named) || self.changed.iter().any(is_named)
    }
}

/// Without backtracking over more than one `*`: what somebody types cannot take exponential time.
fn matches(pattern: &str, text: &str) -> bool {
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    let (mut p, mut t) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        match pattern.get(p) {
            Some('*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(&c) if c == '?' || c == text[t] => (p, t) = (p + 1, t + 1),
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    (p, t) = (at + 1, from + 1);
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == '*')
}

/// What a line's WAL says about files that are named by events: whether a file of that name that is there at its end can
/// be another one.
///
/// A file's name is given again only after it was removed, and the index lists removals; where a list was cut, or WAL is
/// missing, nothing is certain before that.
#[derive(Clone, Debug, Default)]
pub struct Removals {
    wanted: BTreeSet<String>,
    last: BTreeMap<String, Lsn>,
    certain_from: Lsn,
}

impl Removals {
    /// Looks for these files only.
    pub fn of(paths: impl IntoIterator<Item = String>) -> Removals {
        let mut wanted: BTreeSet<String> = BTreeSet::new();
        for path in paths {
            if let Some((directory, _)) = path.rsplit_once('/') {
                wanted.insert(directory.to_string());
            }
            wanted.insert(path);
        }
        Removals { wanted, ..Removals::default() }
    }

    /// Takes in what a segment of the line says of records from `begin` on up to `end`: where the line enters and leaves it.
    pub fn take(&mut self, summary: &SegmentSummary, begin: Lsn, end: Lsn) {
        let all = summary.drops.iter().chain(&summary.database_removals);
        for change in all.filter(|change| begin <= change.lsn && change.lsn < end) {
            for path in change.relations.iter().filter(|path| self.wanted.contains(*path)) {
                let last = self.last.entry(path.clone()).or_default();
                *last = change.lsn.max(*last);
            }
        }
        if summary.truncated {
            self.uncertain_before(end);
        }
    }

    /// Something before this position may not be known.
    pub fn uncertain_before(&mut self, lsn: Lsn) {
        self.certain_from = self.certain_from.max(lsn);
    }

    /// Whether the file of this name at the line's end is the one that was there at `lsn`.
    pub fn is_still(&self, path: &str, lsn: Lsn) -> bool {
        let is_removed = self.last.get(path).is_some_and(|last| *last >= lsn);
        self.wanted.contains(path) && !is_removed && self.directory_is_still(path, lsn)
    }

    /// The same of the database it is in.
    pub fn directory_is_still(&self, path: &str, lsn: Lsn) -> bool {
        let Some((directory, _)) = path.rsplit_once('/') else { return false };
        let is_removed = self.last.get(directory).is_some_and(|last| *last >= lsn);
        self.wanted.contains(directory) && lsn >= self.certain_from && !is_removed
    }
}

/// For a shell.
fn quoted(word: &str) -> String {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:@%+,=".contains(&byte);
    match !word.is_empty() && word.bytes().all(plain) {
        true => word.to_string(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn summary() -> SegmentSummary {
        let drop = RelationChange {
            xid: 7,
            lsn: Lsn(0x200),
            time: Some(at("2026-11-22T11:00:00Z")),
            relations: vec!["1663/5/16400".into()],
        };
        let point = RestorePoint { name: "before it's late".into(), lsn: Lsn(0x100), time: at("2026-11-22T10:00:00Z") };
        let cut = RelationChange { xid: 8, lsn: Lsn(0x300), time: None, relations: vec!["1663/5/16400".into()] };
        SegmentSummary {
            restore_points: vec![point],
            drops: vec![drop],
            truncations: vec![cut],
            min_commit_time: Some(at("2026-11-22T09:00:00Z")),
            max_commit_time: Some(at("2026-11-22T11:00:00Z")),
            ..SegmentSummary::empty(None)
        }
    }

    #[test]
    fn each_event_says_how_to_go_back_before_it() {
        let events = events(TimelineId(1), &summary(), Between::default());
        let restores: Vec<&str> = events.iter().map(|event| event.restore.as_str()).collect();
        assert_eq!(
            restores,
            [r"--to 'name:before it'\''s late'", "--to lsn:0/00000200 --exclusive", "--to lsn:0/00000300 --exclusive"]
        );
    }

    #[test]
    fn what_has_no_time_counts_where_its_segment_does() {
        let kinds = |since: Option<&str>, until: Option<&str>| {
            let between = Between { since: since.map(at), until: until.map(at) };
            events(TimelineId(1), &summary(), between).iter().map(|event| event.kind).collect::<Vec<_>>()
        };
        use EventKind::{Drop, RestorePoint, Truncation};
        assert_eq!(kinds(Some("2026-11-22T10:30:00Z"), None), [Drop, Truncation]);
        assert_eq!(kinds(None, Some("2026-11-22T10:30:00Z")), [RestorePoint, Truncation]);
        assert_eq!(kinds(Some("2026-11-22T12:00:00Z"), None), []);
        assert_eq!(kinds(None, Some("2026-11-22T08:00:00Z")), []);
    }

    #[test]
    fn a_commit_has_a_place_before_and_after_it() {
        let found = Found { lsn: Lsn(0x400), kind: FoundKind::Commit, xid: Some(9), time: None };
        let mut event = of_end(TimelineId(1), &found);
        event.reached_with("--timeline 1");
        assert_eq!(event.restore, "--to lsn:0/00000400 --exclusive --timeline 1");
        assert_eq!(event.restore_after.as_deref(), Some("--to lsn:0/00000400 --timeline 1"));
    }

    #[test]
    fn filters_know_relations_by_path_number_and_name() {
        let mut event = of_change(EventKind::Drop, TimelineId(1), &summary().drops[0]);
        event.database = Some("app".into());
        event.changed = vec!["public.orders".into()];
        let takes = |pattern: &str| Filter { relation: Some(pattern.into()), ..Filter::default() }.takes(&event);
        for pattern in ["1663/5/16400", "16400", "*/16400", "orders", "public.orders", "app.public.*", "ord?rs", "*"] {
            assert!(takes(pattern), "{pattern}");
        }
        for pattern in ["1640", "5/16400", "order", "app.orders", "", "?"] {
            assert!(!takes(pattern), "{pattern}");
        }
        assert!(!Filter { kinds: vec![EventKind::Truncation], relation: None }.takes(&event));
        assert!(!matches(&"*a".repeat(40), &"a".repeat(39)), "and it takes no time");
    }

    #[test]
    fn a_name_is_certain_only_while_nothing_was_removed_since() {
        let path = "1663/5/16400".to_string();
        let removals = |summary: &SegmentSummary| {
            let mut removals = Removals::of([path.clone()]);
            removals.take(summary, Lsn(0), Lsn(0x1000));
            removals
        };
        let known = removals(&summary());
        assert!(!known.is_still(&path, Lsn(0x100)) && !known.is_still(&path, Lsn(0x200)));
        assert!(known.is_still(&path, Lsn(0x300)));
        assert!(!known.is_still("1663/5/16401", Lsn(0x300)), "nobody has looked for that one");
        let database =
            RelationChange { relations: vec!["1663/5".into()], lsn: Lsn(0x380), ..summary().drops[0].clone() };
        assert!(
            !removals(&SegmentSummary { database_removals: vec![database], ..summary() }).is_still(&path, Lsn(0x300))
        );
        let cut = removals(&SegmentSummary { truncated: true, ..summary() });
        assert!(!cut.is_still(&path, Lsn(0x300)) && cut.is_still(&path, Lsn(0x1000)));
        let mut left = Removals::of([path.clone()]);
        left.take(&summary(), Lsn(0), Lsn(0x200));
        assert!(left.is_still(&path, Lsn(0x100)), "the line leaves that segment before the drop");
    }
}
