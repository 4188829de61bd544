//! Owns: what happened in the archive's WAL that somebody may want to go back before: removed relations, truncations,
//! restore points, from what the index says of each segment.
//! Does not own: reading the index or unfinished segments (`store`, `cli`), restoring.
//! Pure.

use jiff::Timestamp;
use serde::Serialize;

use super::digest::Digest;
use crate::wal::{Lsn, RelationChange, RestorePoint, SegmentSummary, TimelineId};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A commit that removed relations' files: DROP, TRUNCATE, and what rewrites a table.
    Drop,
    /// A relation's file was cut.
    Truncation,
    RestorePoint,
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
    /// `<tablespace oid>/<database oid>/<relfilenode>`
    pub relations: Vec<String>,
    /// Of a restore point.
    pub name: Option<String>,
    /// What stops just before it, to be put after `seawall restore`; at a restore point: there.
    pub restore: String,
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
        self.may_touch_commits(summary.min_commit_time, summary.max_commit_time)
    }

    /// Whether to look into the whole entry.
    pub fn may_touch_digest(&self, digest: &Digest) -> bool {
        // A restore point has a time of its own, and no commit needs to be beside it.
        digest.restore_points().next().is_some()
            || self.may_touch_commits(digest.min_commit_time(), digest.max_commit_time())
    }

    fn may_touch_commits(&self, min: Option<Timestamp>, max: Option<Timestamp>) -> bool {
        let since = self.since.is_none_or(|since| max.is_none_or(|max| since <= max));
        let until = self.until.is_none_or(|until| min.is_none_or(|min| min <= until));
        since && until
    }
}

/// What one segment's summary tells, in order.
pub fn events(timeline: TimelineId, summary: &SegmentSummary, between: Between) -> Vec<Event> {
    let may_touch = between.may_touch(summary);
    let change = |kind: EventKind| move |change: &RelationChange| of_change(kind, timeline, change);
    let drops = summary.drops.iter().map(change(EventKind::Drop));
    let truncations = summary.truncations.iter().map(change(EventKind::Truncation));
    let points = summary.restore_points.iter().map(|point| of_point(timeline, point));
    let all = drops.chain(truncations).chain(points);
    let mut events: Vec<Event> = all.filter(|event| event.time.map_or(may_touch, |time| between.holds(time))).collect();
    events.sort_by_key(|event| event.lsn);
    events
}

fn of_change(kind: EventKind, timeline: TimelineId, change: &RelationChange) -> Event {
    Event {
        kind,
        time: change.time,
        xid: (change.xid != 0).then_some(change.xid),
        lsn: change.lsn,
        timeline,
        relations: change.relations.clone(),
        name: None,
        restore: format!("--to lsn:{} --exclusive", change.lsn),
    }
}

fn of_point(timeline: TimelineId, point: &RestorePoint) -> Event {
    Event {
        kind: EventKind::RestorePoint,
        time: Some(point.time),
        xid: None,
        lsn: point.lsn,
        timeline,
        relations: Vec::new(),
        name: Some(point.name.clone()),
        restore: format!("--to {}", quoted(&format!("name:{}", point.name))),
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
}
