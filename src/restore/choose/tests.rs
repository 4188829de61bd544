//! Which backup, which line, where to stop; what is refused and what is named instead. The WAL is told by a table of
//! records, as reading it would tell them.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use async_trait::async_trait;

use super::*;
use crate::catalog::union::Part;
use crate::catalog::{BackupFile, BackupRecord, Holdings, Piece, Source};
use crate::repository::layout::{Epoch, TailName};
use crate::restore::reach::{known_backups, tests::backup_file};
use crate::wal::{Proof, SegmentSize};

const MIB: u64 = 1 << 20;
const DAY: i64 = 1_790_000_000;

fn lsn(mib: u64) -> Lsn {
    Lsn(mib * MIB)
}

fn at(second: i64) -> Timestamp {
    Timestamp::from_second(DAY + second).unwrap()
}

/// Records by timeline, at whole MiB.
#[derive(Debug, Default)]
struct Archived {
    records: Vec<(u32, Found)>,
    parts: BTreeMap<TimelineId, Vec<Part>>,
    histories: Vec<History>,
    backups: Vec<BackupFile>,
}

impl Archived {
    fn end(mut self, timeline: u32, mib: u64, kind: FoundKind, xid: u32, second: i64) -> Archived {
        self.records.push((timeline, Found { lsn: lsn(mib), kind, xid: Some(xid), time: Some(at(second)) }));
        self
    }

    fn commit(self, timeline: u32, mib: u64, xid: u32, second: i64) -> Archived {
        self.end(timeline, mib, FoundKind::Commit, xid, second)
    }

    fn wal(mut self, timeline: u32, from: u64, to: u64) -> Archived {
        let commits = self.records.iter().filter(|(tl, found)| *tl == timeline && found.lsn < lsn(to));
        let last_commit = commits.max_by_key(|(_, found)| found.lsn).and_then(|(_, found)| found.time);
        let (epoch, raw_crc32, form) = (Epoch(1), 0, Default::default());
        let tail = TailName { epoch, from: lsn(from), to: lsn(to), raw_crc32, last_commit, form };
        let piece =
            Piece { from: lsn(from), to: lsn(to), proof: Proof::Proven, last_commit, source: Source::Tail(tail) };
        self.parts.entry(TimelineId(timeline)).or_default().push(Part::Piece(piece));
        self
    }

    fn fork(mut self, timeline: u32, parent: u32, mib: u64) -> Archived {
        let text = format!("{parent}\t0/{:X}\tx\n", mib * MIB);
        self.histories.push(History::parse(TimelineId(timeline), text.as_bytes()).unwrap());
        self
    }

    /// Finished at `second`.
    fn backup(mut self, timeline: u32, start: u64, stop: u64, second: i64) -> Archived {
        let commits = self.records.iter().filter(|(tl, found)| *tl == timeline && found.lsn < lsn(stop));
        let stop_time = commits.max_by_key(|(_, found)| found.lsn).and_then(|(_, found)| found.time);
        let file = backup_file(second, timeline, lsn(start), lsn(stop));
        self.backups.push(BackupFile { stop_time, ..file });
        self
    }

    fn holdings(&self) -> Holdings {
        Holdings {
            segment_size: SegmentSize::new(8 * MIB).unwrap(),
            start_timeline: TimelineId(1),
            start_lsn: None,
            histories: self.histories.iter().map(|history| (history.timeline, history.clone())).collect(),
            parts: self.parts.clone(),
            ledger: Vec::new(),
            expired: BTreeMap::new(),
            disputed: BTreeSet::new(),
        }
    }

    fn ask(&self, wish: Wish) -> Result<Chosen, Unchosen> {
        self.ask_with(wish, |circumstances| circumstances)
    }

    fn ask_with(&self, wish: Wish, with: impl Fn(Circumstances) -> Circumstances) -> Result<Chosen, Unchosen> {
        let held = self.holdings();
        let record = |file: &BackupFile| BackupRecord::of(file.clone());
        let backups = known_backups(&[("a", &self.backups.iter().map(record).collect::<Vec<_>>())]).unwrap();
        let reach = Reach::new(&held, &backups);
        let circumstances = with(Circumstances { now: at(1_000_000), backup: None, server: None });
        futures_util::FutureExt::now_or_never(choose(&reach, self, &wish, circumstances)).expect("it never waits")
    }

    /// (start of the backup in MiB, what PostgreSQL is told, the record it stops at in MiB)
    fn told(&self, target: &str) -> (u64, Stop, Option<u64>) {
        self.told_for(wish(target))
    }

    fn told_for(&self, wish: Wish) -> (u64, Stop, Option<u64>) {
        let chosen = self.ask(wish).unwrap();
        (chosen.backup.start_lsn.0 / MIB, chosen.stop, chosen.stop_at.map(|at| at.lsn.0 / MIB))
    }

    fn refusal(&self, target: &str) -> String {
        self.refusal_for(wish(target))
    }

    fn refusal_for(&self, wish: Wish) -> String {
        match self.ask(wish) {
            Err(Unchosen::Refused(Refusal { message, nearest })) => {
                let nearest: Vec<String> =
                    nearest.into_iter().map(|it| format!("{}: {}", it.what, it.arguments)).collect();
                format!("{message} | {}", nearest.join(" | "))
            }
            other => panic!("not refused: {other:?}"),
        }
    }
}

#[async_trait]
impl Search for Archived {
    async fn find(
        &self,
        path: &History,
        range: Range<Lsn>,
        readable: Lsn,
        sought: Sought,
    ) -> Result<Vec<Found>, SearchError> {
        assert!(range.start < range.end && range.end <= readable, "{range:?} up to {readable}");
        let is_there = |(timeline, found): &&(u32, Found)| {
            let timeline = TimelineId(*timeline);
            path.contains(timeline)
                && found.lsn < path.end_of(timeline).unwrap_or(Lsn::MAX)
                && path.begin_of(timeline).is_some_and(|begin| begin <= found.lsn)
                && range.contains(&found.lsn)
        };
        let mut all: Vec<Found> = self.records.iter().filter(is_there).map(|(_, found)| *found).collect();
        all.sort_by_key(|found| found.lsn);
        Ok(match sought {
            Sought::EndPast { time, or_at } => {
                all.retain(|it| it.time.is_some_and(|at| at > time || or_at && at == time));
                all
            }
            Sought::EndOf { xid } => {
                all.retain(|it| it.xid == Some(xid));
                all
            }
            Sought::RestorePoint { name } => {
                all.retain(|it| it.kind == FoundKind::RestorePoint && name == "p");
                all
            }
            Sought::RecordFrom(from) => {
                all.retain(|it| it.lsn >= from);
                all
            }
            Sought::LastTime | Sought::LastRecord => all.into_iter().last().into_iter().collect(),
            Sought::CommitsAround { .. } | Sought::CommitsBetween { .. } => {
                unreachable!("no target is a list of commits")
            }
        })
    }
}

fn wish(target: &str) -> Wish {
    let target = match target.strip_prefix('@') {
        Some(second) => Target::Time(at(second.parse().unwrap())),
        None => Target::parse(target, None).unwrap(),
    };
    Wish { target, ..Wish::default() }
}

fn on(target: &str, timeline: u32) -> Wish {
    Wish { timeline: TimelineChoice::Number(TimelineId(timeline)), ..wish(target) }
}

fn text(mib: u64) -> String {
    format!("lsn:{}", lsn(mib))
}

/// Two backups, a commit every ten seconds: at 10 MiB at second 100, at 90 MiB at second 900.
fn two_backups() -> Archived {
    let mut archived = Archived::default();
    for n in 1..=9 {
        archived = archived.commit(1, n * 10, 700 + n as u32, n as i64 * 100);
    }
    archived.wal(1, 0, 96).backup(1, 16, 25, 260).backup(1, 48, 55, 560)
}

#[test]
fn a_time_takes_the_newest_backup_that_shows_nothing_later() {
    let archived = two_backups();
    let stop = |second| Stop::Time(at(second));
    assert_eq!(archived.told("@650"), (48, stop(650), Some(70)));
    assert_eq!(
        archived.told("@500"),
        (48, stop(500), Some(60)),
        "the last commit before its consistency is of that time"
    );
    assert_eq!(archived.told("@499"), (16, stop(499), Some(50)));
    assert_eq!(archived.told("@700"), (48, stop(700), Some(80)), "inclusive: after the commits of that very time");
    let exclusive = Wish { exclusive: true, ..wish("@700") };
    assert_eq!(archived.told_for(exclusive), (48, stop(700), Some(70)));
    let exclusive = Wish { exclusive: true, ..wish("@500") };
    assert_eq!(
        archived.told_for(exclusive),
        (16, stop(500), Some(50)),
        "the newest backup shows the commit of that time"
    );
}

#[test]
fn a_time_no_transaction_ends_after_is_the_end_only_when_that_is_known() {
    let archived = two_backups();
    assert_eq!(archived.told("@900"), (48, Stop::End, None));
    let refused = archived.refusal("@901");
    assert!(refused.contains("the last transaction in it ended at") && refused.ends_with(": --to latest"), "{refused}");
    let refused = archived.refusal("@1000001");
    assert!(refused.contains("in the future") && refused.contains("--to latest"), "{refused}");
    // A live server that has written nothing since then knows.
    let server = |timeline, end, second| {
        let server = ServerEnd { timeline: TimelineId(timeline), lsn: lsn(end), at: at(second) };
        archived.ask_with(wish("@950"), move |known| Circumstances { server: Some(server), ..known })
    };
    assert_eq!(server(1, 96, 960).unwrap().stop, Stop::End);
    for wrong in [server(1, 97, 960), server(2, 96, 960), server(1, 96, 949)] {
        assert!(matches!(wrong, Err(Unchosen::Refused(_))), "{wrong:?}");
    }
    // A rollback is an end too: PostgreSQL stops at it.
    let archived = two_backups().end(1, 95, FoundKind::Rollback, 999, 1000);
    assert_eq!(archived.told("@950"), (48, Stop::Time(at(950)), Some(95)));
}

#[test]
fn a_time_before_the_first_consistency_is_refused_with_it() {
    let archived = two_backups();
    assert_eq!(archived.told("@200"), (16, Stop::Time(at(200)), Some(30)));
    let refused = archived.refusal("@199");
    assert!(
        refused.contains("before the first state") && refused.ends_with(&format!(": --to {}", text(25))),
        "{refused}"
    );
    // Nothing was committed before or during the backup: it is of the time at which it was taken, and of no earlier.
    let fresh = Archived::default().commit(1, 50, 700, 500).wal(1, 0, 96).backup(1, 16, 25, 260);
    assert_eq!(fresh.told("@300").0, 16);
    assert!(fresh.refusal("@100").contains("before the first state"));
}

#[test]
fn a_rollback_inside_a_backup_stops_recovery_too_early() {
    let archived = Archived::default()
        .commit(1, 10, 700, 100)
        .end(1, 20, FoundKind::Rollback, 701, 250)
        .commit(1, 50, 702, 500)
        .wal(1, 0, 96)
        .backup(1, 16, 25, 260);
    // As the catalog tells it, the last commit was at 100.
    let archived =
        Archived { backups: vec![BackupFile { stop_time: Some(at(100)), ..archived.backups[0].clone() }], ..archived };
    assert!(archived.refusal("@200").contains("before the first state"));
    assert_eq!(archived.told("@250"), (16, Stop::Time(at(250)), Some(50)));
}

#[test]
fn times_that_jump_back_stop_recovery_where_postgresql_stops() {
    // The clock was an hour ahead for one commit before the second backup, and for one after it.
    let archived = Archived::default()
        .commit(1, 10, 700, 100)
        .commit(1, 30, 701, 3900)
        .commit(1, 40, 702, 400)
        .wal(1, 0, 48)
        .backup(1, 41, 47, 460)
        .commit(1, 60, 703, 4200)
        .commit(1, 70, 704, 700)
        .wal(1, 48, 96);
    assert_eq!(archived.told("@500"), (41, Stop::Time(at(500)), Some(60)));
}

#[test]
fn an_lsn_needs_a_record_to_stop_at_and_ends_with_the_wal_otherwise() {
    let archived = two_backups();
    assert_eq!(archived.told(&text(60)), (48, Stop::Lsn(lsn(60)), Some(60)));
    assert_eq!(archived.told(&text(61)), (48, Stop::Lsn(lsn(61)), Some(70)));
    assert_eq!(archived.told(&text(55)), (48, Stop::Lsn(lsn(55)), Some(60)));
    assert_eq!(archived.told(&text(54)), (16, Stop::Lsn(lsn(54)), Some(60)));
    assert_eq!(archived.told(&text(93)), (48, Stop::End, None));
    assert!(archived.refusal(&text(97)).ends_with(": --to latest"));
    let refused = archived.refusal(&text(24));
    assert!(refused.ends_with(&format!(": --to {}", text(25))), "{refused}");
}

#[test]
fn a_gap_is_named_with_both_of_its_sides() {
    let archived = Archived::default()
        .commit(1, 10, 700, 100)
        .commit(1, 30, 701, 300)
        .wal(1, 0, 40)
        .backup(1, 11, 20, 160)
        .commit(1, 50, 702, 500)
        .commit(1, 70, 703, 700)
        .wal(1, 48, 96)
        .backup(1, 56, 60, 600);
    assert_eq!(archived.told("@300"), (11, Stop::End, None));
    assert_eq!(archived.told("latest"), (56, Stop::End, None));
    for target in ["@400", &text(45)] {
        let refused = archived.refusal(target);
        assert!(refused.contains("gap 1-0000000002800000-0000000003000000"), "{refused}");
        assert!(refused.contains(&format!(": --to {} | ", text(40))), "{refused}");
        assert!(refused.ends_with(&format!(": --to {}", text(60))), "{refused}");
    }
    let open = Archived { backups: archived.backups[..1].to_vec(), ..archived };
    let refused = open.refusal("latest");
    assert!(
        refused.contains("ends at 0/02800000; gap") && refused.contains(&format!("--to {}", text(40))),
        "{refused}"
    );
}

#[test]
fn a_time_in_a_gap_has_no_state_after_it_where_no_backup_follows() {
    let archived = Archived::default().commit(1, 10, 700, 100).commit(1, 30, 701, 300).wal(1, 0, 40).wal(1, 48, 96);
    let archived = archived.backup(1, 11, 20, 160);
    let unknown = BackupFile { stop_time: None, ..archived.backups[0].clone() };
    let archived = Archived { backups: vec![unknown], ..archived };
    let refused = archived.refusal("@400");
    assert!(refused.ends_with(&format!(": --to {}", text(40))), "{refused}");
    assert!(archived.refusal("@50").ends_with(&format!(": --to {}", text(20))));
}

#[test]
fn an_action_at_the_end_needs_a_record_to_stop_after() {
    let archived = two_backups();
    let pause = |target| Wish { action: Action::Pause, ..wish(target) };
    assert_eq!(archived.told_for(pause("latest")), (48, Stop::Lsn(lsn(90)), Some(90)));
    assert_eq!(archived.told_for(pause("@900")), (48, Stop::Lsn(lsn(90)), Some(90)));
    assert_eq!(archived.told("latest"), (48, Stop::End, None));
}

#[test]
fn a_transaction_is_found_where_it_ended() {
    let archived = two_backups().end(1, 57, FoundKind::Rollback, 800, 570);
    assert_eq!(archived.told("xid:707"), (48, Stop::Xid(707), Some(70)));
    assert_eq!(archived.told("xid:800"), (48, Stop::Xid(800), Some(57)));
    assert_eq!(archived.told("xid:703"), (16, Stop::Xid(703), Some(30)));
    assert!(archived.refusal("xid:702").contains("transaction 702 (committed"), "before the first consistency");
    assert!(archived.refusal("xid:4000").contains("not in the WAL of timeline 1"));
    // The counter has gone round.
    let twice = archived.commit(1, 92, 707, 920);
    let refused = twice.refusal("xid:707");
    assert!(refused.contains("there 2 times") && refused.ends_with(&format!("--to {}", text(92))), "{refused}");
}

#[test]
fn a_restore_point_is_found_by_its_name() {
    let archived = two_backups().end(1, 58, FoundKind::RestorePoint, 0, 580);
    assert_eq!(archived.told("name:p"), (48, Stop::Name("p".into()), Some(58)));
    assert!(archived.refusal("name:q").contains("restore point \"q\" is not in the WAL"));
    let twice = archived.end(1, 59, FoundKind::RestorePoint, 0, 590);
    assert!(twice.refusal("name:p").contains(&format!("--to {} | ", text(58))));
}

/// Timeline 2 leaves 1 at 44 MiB; both go on.
fn forked() -> Archived {
    Archived::default()
        .commit(1, 10, 700, 100)
        .commit(1, 50, 701, 500)
        .commit(1, 58, 702, 580)
        .commit(2, 46, 701, 600)
        .commit(2, 70, 703, 700)
        .wal(1, 0, 60)
        .wal(2, 40, 90)
        .fork(2, 1, 44)
        .backup(1, 11, 20, 160)
        .backup(1, 52, 54, 540)
}

#[test]
fn a_line_is_never_left_and_other_lines_are_named() {
    let archived = forked();
    assert_eq!(archived.told("latest"), (11, Stop::End, None));
    assert_eq!(archived.ask(wish("latest")).unwrap().path.timeline, TimelineId(2));
    assert_eq!(archived.told_for(on("latest", 1)), (52, Stop::End, None));
    assert_eq!(archived.told("@550"), (11, Stop::Time(at(550)), Some(46)), "the commit at 500 is another line's");
    assert_eq!(archived.told_for(on("@550", 1)), (52, Stop::Time(at(550)), Some(58)));
    assert_eq!(archived.ask(wish("@550")).unwrap().remarks.len(), 1, "timeline 1 has that time too");
    let chosen = archived.ask(wish("xid:701")).unwrap();
    assert_eq!(chosen.stop_at.unwrap().lsn, lsn(46));
    assert!(chosen.remarks[0].contains("timeline 1 too"), "{:?}", chosen.remarks);
    let refused = archived.refusal("xid:702");
    assert!(refused.ends_with("--to xid:702 --timeline 1"), "{refused}");
    assert!(archived.refusal_for(on("latest", 7)).contains("how timeline 7 came to be"));
    let current = Wish { timeline: TimelineChoice::Current, ..wish("latest") };
    assert_eq!(archived.ask(current).unwrap().path.timeline, TimelineId(1), "where the newest backup was taken");
}

#[test]
fn a_named_backup_is_the_only_one() {
    let archived = two_backups();
    let first = archived.backups[0].id;
    let only = |target| archived.ask_with(wish(target), |known| Circumstances { backup: Some(first), ..known });
    assert_eq!(only("@650").unwrap().backup.id, first);
    assert_eq!(only("latest").unwrap().backup.id, first);
    assert_eq!(only("immediate").unwrap().replay.to, lsn(32), "the segment it is in");
    assert_eq!(archived.told("immediate").0, 48);
    let none = archived.ask_with(wish("latest"), |known| {
        let id = "20200101T000000Z-full".parse().unwrap();
        Circumstances { backup: Some(id), ..known }
    });
    assert!(matches!(none, Err(Unchosen::Refused(_))));
}

#[test]
fn wishes_that_contradict_themselves_are_usage() {
    let archived = two_backups();
    for target in ["latest", "immediate", "name:p"] {
        let wish = Wish { exclusive: true, ..wish(target) };
        assert!(matches!(archived.ask(wish), Err(Unchosen::Usage(_))), "{target}");
    }
    let standby = Wish { standby: true, ..wish("@650") };
    assert!(matches!(archived.ask(standby), Err(Unchosen::Usage(_))));
}
