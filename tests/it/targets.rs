//! What can be restored, and that PostgreSQL ends up there: every kind of target is planned, and recovered to by a real
//! server with what the plan says. Backups are `pg_basebackup`'s, and the catalog is told where they lie in the WAL.

use std::fs;

use jiff::Timestamp;
use seawall::catalog::backup::{BackupFile, BeginFile, ManifestEntry};
use seawall::catalog::index::Crc32;
use seawall::repository::layout::{BackupId, BackupType};
use seawall::restore::marker::{RestoreId, RestoreMarker};
use seawall::wal::{History, Lsn, TimelineId};
use serde_json::Value;

use crate::support::archived::{self, Archived, create_journal, note, notes};
use crate::support::postgres::{self, BaseBackup, Server};
use crate::support::{agent, process};

/// A backup, as the catalog knows it and as it can be recovered.
struct Taken {
    id: BackupId,
    copy: BaseBackup,
    stop_lsn: Lsn,
}

/// Has `pg_basebackup` take one, and enters it. `second` makes its id.
fn take(server: &Server, archive: &Archived, second: i64) -> Taken {
    let copy = server.base_backup_without_wal();
    let label = fs::read_to_string(copy.path().join("backup_label")).expect("a backup has a label");
    let start_lsn = label.lines().find_map(|line| line.strip_prefix("START WAL LOCATION: ")).expect("a start");
    let manifest = fs::read_to_string(copy.path().join("backup_manifest")).expect("a backup has a manifest");
    let manifest: Value = serde_json::from_str(&manifest).expect("it is JSON");
    let stop_lsn: Lsn = manifest["WAL-Ranges"][0]["End-LSN"].as_str().expect("an end").parse().expect("an LSN");
    let id = BackupId::new(Timestamp::from_second(1_790_000_000 + second).unwrap(), BackupType::Full);
    archive.wait_acknowledged(server);
    let stored = archive.archive();
    let lineage = archived::block_on(stored.lineage_file()).expect("a lineage has its file");
    let finished: Timestamp = server.value("select to_json(now())#>>'{}'").parse().expect("a time");
    let file = BackupFile {
        schema: 1,
        id,
        backup_type: BackupType::Full,
        parent: None,
        fallback: None,
        label: None,
        started: finished,
        finished,
        system_id: lineage.system_id,
        server_version: lineage.server_version,
        segment_size: lineage.segment_size,
        timeline: TimelineId(server.timeline()),
        start_lsn: start_lsn.split(' ').next().unwrap().parse().expect("an LSN"),
        stop_lsn,
        stop_time: None,
        from_standby: false,
        data_checksums: Some(false),
        raw_bytes: 30 << 20,
        stored_bytes: 3 << 20,
        manifest: ManifestEntry { bytes: 1, crc32: Crc32(0), files: 1, checksums: "CRC32C".into() },
        tablespaces: Vec::new(),
        volumes: Vec::new(),
        config: Vec::new(),
        version: "0.1.0".into(),
    };
    let begin = BeginFile {
        schema: 1,
        id,
        backup_type: BackupType::Full,
        parent: None,
        label: None,
        started: finished,
        slot_restart_lsn: file.start_lsn,
        timeline: file.timeline,
        lease: None,
        host: None,
        version: file.version.clone(),
    };
    assert!(archived::block_on(stored.begin_backup(&begin)).expect("it can be written"));
    assert!(archived::block_on(stored.commit_backup(&file)).expect("it can be written"));
    Taken { id, copy, stop_lsn }
}

/// What the journal's rows say of their commits: note, transaction, time; by number of the note.
struct Commit {
    xid: String,
    time: Timestamp,
}

fn commits(server: &Server) -> Vec<Commit> {
    let rows = server.sql("select xmin, to_json(pg_xact_commit_timestamp(xmin))#>>'{}' from journal order by id");
    let commit = |row: Vec<String>| Commit { xid: row[0].clone(), time: row[1].parse().expect("a time") };
    rows.into_iter().map(commit).collect()
}

struct Scene {
    archive: Archived,
    taken: Vec<Taken>,
    major: u32,
}

impl Scene {
    fn seawall(&self, arguments: &[&str]) -> std::process::Output {
        let config = self.archive.config_argument();
        agent::seawall([arguments, &["--config", &config]].concat())
    }

    fn plan(&self, arguments: &[&str]) -> Value {
        let output = self.seawall(&[&["restore", "--plan", "--json"], arguments].concat());
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_str(&text).expect("it is JSON")
    }

    /// The same for what can be planned only while the archive has all there is: a server writes now and then.
    fn eventual_plan(&self, arguments: &[&str]) -> Value {
        process::eventually(process::DEADLINE, "the archive has all there is", || {
            let output = self.seawall(&[&["restore", "--plan", "--json"], arguments].concat());
            output.status.success().then(|| serde_json::from_slice(&output.stdout).expect("it is JSON"))
        })
    }

    /// Recovers to a target as its plan says: the notes that are there then.
    fn recovered(&self, arguments: &[&str]) -> Vec<String> {
        self.recovered_by(&self.plan(arguments), arguments)
    }

    fn recovered_by(&self, plan: &Value, arguments: &[&str]) -> Vec<String> {
        let taken = self.taken.iter().find(|taken| plan["backup"]["id"] == taken.id.to_string());
        let taken = taken.unwrap_or_else(|| panic!("an unknown backup: {plan}"));
        let stop = &plan["stop"];
        let timeline = plan["timeline"].to_string();
        let mut recovery = taken.copy.recover(&self.archive.restore_command(&["--timeline", &timeline]));
        recovery = recovery.setting("recovery_target_timeline", &timeline);
        recovery = recovery.setting("recovery_target_action", stop["action"].as_str().unwrap());
        if let (Some(name), Some(value)) = (stop["setting"].as_str(), stop["value"].as_str()) {
            let inclusive = if stop["inclusive"] == true { "on" } else { "off" };
            recovery = recovery.setting(name, value).setting("recovery_target_inclusive", inclusive);
        }
        let server = recovery.start_recovered().unwrap_or_else(|log| panic!("{arguments:?}, {plan}:\n{log}"));
        notes(&server)
    }

    /// The target is refused with this code; everything that is said about it.
    fn refused(&self, arguments: &[&str], code: i32) -> String {
        let output = self.seawall(&[&["restore", "--plan"], arguments].concat());
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{arguments:?} on {}: {said}", self.major);
        said
    }
}

fn first(count: usize) -> Vec<String> {
    (1..=count).map(|n| n.to_string()).collect()
}

#[test]
fn every_kind_of_target_is_planned_and_reached() {
    for major in [13, 18].into_iter().filter(|&major| postgres::is_installed(major)) {
        let server = Server::builder(major).wal_segment_mib(1).setting("track_commit_timestamp", "on");
        let server = server.setting("autovacuum", "off").start(); // it commits too
        let archive = Archived::by_conninfo(&server.conninfo());
        let _agent = archive.streaming_agent();
        create_journal(&server);
        let mut scene = Scene { archive, taken: Vec::new(), major };
        let mut ends = Vec::new();
        for number in 1..=12 {
            note(&server, &number.to_string());
            ends.push(server.flush_lsn());
            match number {
                3 => scene.taken.push(take(&server, &scene.archive, 3)),
                5 | 10 => drop(server.switch_wal()),
                6 => drop(server.sql("select pg_create_restore_point('mark')")),
                8 => scene.taken.push(take(&server, &scene.archive, 8)),
                _ => {}
            }
        }
        scene.archive.wait_acknowledged(&server);
        let commits = commits(&server);
        let time = |number: usize| commits[number - 1].time.to_string();
        let xid = |number: usize| format!("xid:{}", commits[number - 1].xid);
        let lsn = |number: usize| format!("lsn:{}", ends[number - 1]);

        let window = scene.seawall(&["window", "--json"]);
        assert!(window.status.success());
        let window: Value = serde_json::from_slice(&window.stdout).unwrap();
        let interval = &window["lineages"][0]["timelines"][0]["intervals"][0];
        assert_eq!(interval["from"]["lsn"], scene.taken[0].stop_lsn.to_string(), "{window}");
        assert_eq!(interval["to"]["time"], time(12), "{window}");
        assert_eq!(
            (interval["ends_because"].as_str(), interval["proven"].as_bool()),
            (Some("end_of_archive"), Some(true))
        );
        assert_eq!(interval["backups"].as_array().unwrap().len(), 2);

        assert_eq!(scene.recovered(&[]), first(12));
        assert_eq!(scene.recovered(&["--to", "immediate"]), first(8));
        assert_eq!(scene.recovered(&["--to", &time(5)]), first(5));
        assert_eq!(scene.recovered(&["--to", &time(10), "--exclusive"]), first(9));
        // Nothing ends after it, PostgreSQL alone would fail: see below.
        assert_eq!(scene.recovered(&["--to", &time(12)]), first(12));
        assert_eq!(scene.recovered(&["--to", &lsn(5)]), first(5));
        assert_eq!(scene.recovered(&["--to", &lsn(11), "--exclusive"]), first(11));
        assert_eq!(scene.recovered(&["--to", &xid(7)]), first(7));
        assert_eq!(scene.recovered(&["--to", &xid(11), "--exclusive"]), first(10));
        assert_eq!(scene.recovered(&["--to", "name:mark"]), first(6));
        assert_eq!(scene.plan(&["--to", &time(9)])["backup"]["id"], scene.taken[1].id.to_string());

        let said = scene.refused(&["--to", "2001-01-01 00:00Z"], 1);
        assert!(said.contains(&format!("--to lsn:{}", scene.taken[0].stop_lsn)), "{said}");
        let said = scene.refused(&["--to", "2099-01-01 00:00Z"], 1);
        assert!(said.contains("in the future") && said.contains("--to latest"), "{said}");
        assert!(scene.refused(&["--to", "2026-11-22 14:05"], 64).contains("--tz"));
        assert!(scene.refused(&["--to", "lsn:FF/0"], 1).contains("--to latest"));
        assert!(scene.refused(&["--to", &xid(2)], 1).contains("cannot be restored"));
        scene.refused(&["--to", "name:nothing of the kind"], 1);
        scene.refused(&["--timeline", "7"], 1);
    }
}

/// An idle server: PostgreSQL never stops at a time after its last transaction. The end of the WAL is the state at that
/// time if nothing was written since, which only the server can tell.
#[test]
fn a_time_at_which_the_server_was_idle_is_the_end_of_the_wal_while_the_server_says_so() {
    for major in [13, 18].into_iter().filter(|&major| postgres::is_installed(major)) {
        let server = Server::builder(major).wal_segment_mib(1).setting("autovacuum", "off").start();
        let archive = Archived::by_conninfo(&server.conninfo());
        let _agent = archive.streaming_agent();
        create_journal(&server);
        note(&server, "1");
        let mut scene = Scene { archive, taken: Vec::new(), major };
        scene.taken.push(take(&server, &scene.archive, 1));
        note(&server, "2");
        let later = server.value("select to_json(clock_timestamp())#>>'{}'");
        scene.archive.wait_acknowledged(&server);

        // The server writes a little now and then: what is not archived yet is not known to be nothing.
        let plan = scene.eventual_plan(&["--to", &later]);
        assert_eq!(plan["stop"]["setting"], Value::Null, "{plan}");
        assert!(plan["remarks"][0].as_str().unwrap().contains("the server has written nothing"), "{plan}");
        assert_eq!(scene.recovered_by(&plan, &["--to", &later]), first(2));

        // What PostgreSQL says of that time.
        let alone = scene.taken[0].copy.recover(&scene.archive.restore_command(&[]));
        let log = alone.setting("recovery_target_time", &later).start_recovered().expect_err("it cannot get there");
        assert!(log.contains("recovery ended before configured recovery target was reached"), "{log}");

        // A rollback is an end of a transaction as well: in the unfinished segment, which is read, it is found.
        server.sql("begin; insert into journal (note) values ('never'); rollback");
        server.sql("checkpoint");
        scene.archive.wait_acknowledged(&server);
        assert_eq!(scene.plan(&["--to", &later])["stop"]["setting"], "recovery_target_time");
        assert_eq!(scene.recovered(&["--to", &later]), first(2));

        // Nobody is there to tell.
        let after = server.value("select to_json(clock_timestamp())#>>'{}'");
        drop(server);
        let said = scene.refused(&["--to", &after], 1);
        assert!(said.contains("the last transaction in it ended at") && said.contains("--to latest"), "{said}");
    }
}

#[test]
fn nothing_can_be_restored_without_a_backup() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let archive = Archived::by_conninfo(&server.conninfo());
    let _agent = archive.streaming_agent();
    create_journal(&server);
    archive.wait_acknowledged(&server);
    let scene = Scene { archive, taken: Vec::new(), major };
    let window = scene.seawall(&["window"]);
    assert_eq!(window.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&window.stdout).contains("it has no complete backup"));
    assert!(scene.refused(&[], 1).contains("no complete backup"));
}

/// The old primary goes on after the standby was promoted, and the archive keeps both lines.
#[test]
fn each_line_is_planned_by_itself() {
    let Some(major) = postgres::newest_major() else { return };
    let mut primary = Server::builder(major).wal_segment_mib(1).setting("wal_keep_size", "256MB").start();
    let mut standby = Server::standby_of(&primary).start();
    let hosts = format!("{},{}", primary.socket_dir().display(), standby.socket_dir().display());
    let ports = format!("{},{}", primary.port(), standby.port());
    let archive = Archived::by_conninfo(&format!(
        "host={hosts} port={ports} user=postgres dbname=postgres target_session_attrs=read-write"
    ));
    let _agent = archive.streaming_agent();
    create_journal(&primary);
    note(&primary, "1");
    let mut scene = Scene { archive, taken: Vec::new(), major };
    scene.taken.push(take(&primary, &scene.archive, 1));
    note(&primary, "2");
    standby.wait_replayed(primary.flush_lsn());
    standby.promote();
    note(&primary, "abandoned");
    primary.switch_wal();
    scene.taken.push(take(&primary, &scene.archive, 2));
    note(&primary, "abandoned too");
    scene.archive.wait_acknowledged(&primary);
    primary.kill9();
    let abandoned = scene.archive.durable(1); // whatever the server has written of its own accord since
    note(&standby, "3");
    // Another server, another counter: this transaction may have the number of an abandoned one.
    let xid = standby.value("select max(xmin::text::bigint) from journal");
    standby.switch_wal();
    scene.archive.wait_acknowledged(&standby);
    scene.taken.push(take(&standby, &scene.archive, 3));
    note(&standby, "4");
    scene.archive.wait_acknowledged(&standby);

    let on_line = ["1", "2", "3", "4"];
    let old_line = ["1", "2", "abandoned", "abandoned too"];
    let backup = |arguments: &[&str]| scene.plan(arguments)["backup"]["id"].as_str().unwrap().to_string();
    assert_eq!(scene.recovered(&[]), on_line);
    assert_eq!(scene.recovered(&["--timeline", "1"]), old_line);
    assert_eq!(backup(&["--timeline", "1"]), scene.taken[1].id.to_string());
    // The backup on the abandoned part of timeline 1 is no start for line 2.
    assert_eq!(scene.recovered(&["--to", &format!("xid:{xid}")]), on_line[..3]);
    assert_eq!(backup(&["--to", &format!("xid:{xid}")]), scene.taken[0].id.to_string());
    assert_eq!(scene.recovered(&["--timeline", "current"]), on_line);
    let only = scene.taken[1].id.to_string();
    assert_eq!(scene.recovered(&["--timeline", "current", "--backup", &only]), old_line);
    assert!(scene.refused(&["--backup", &only], 1).contains("cannot be replayed along timeline 2"));
    assert_eq!(scene.recovered(&["--timeline", "1", "--to", &format!("lsn:{abandoned}")]), old_line);

    let window: Value = serde_json::from_slice(&scene.seawall(&["window", "--json"]).stdout).unwrap();
    let timelines = window["lineages"][0]["timelines"].as_array().unwrap();
    let ends: Vec<&str> = timelines.iter().map(|line| line["intervals"][0]["ends_because"].as_str().unwrap()).collect();
    assert_eq!(ends, ["end_of_timeline", "end_of_archive"], "{window}");
    assert_eq!(timelines[0]["intervals"][0]["to"]["lsn"], abandoned.to_string(), "{window}");
}

/// WAL is missing: what lies before the gap is reached to its last byte, what lies in it is refused, and what follows
/// needs a backup of its own.
#[test]
fn a_restore_goes_up_to_a_gap_and_not_into_it() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).setting("track_commit_timestamp", "on").start();
    let archive = Archived::by_conninfo(&server.conninfo());
    let _agent = archive.streaming_agent();
    create_journal(&server);
    note(&server, "1");
    let mut scene = Scene { archive, taken: Vec::new(), major };
    scene.taken.push(take(&server, &scene.archive, 1));
    note(&server, "2");
    server.switch_wal();
    let lost = server.current_segment();
    note(&server, "lost");
    server.switch_wal();
    note(&server, "3");
    server.switch_wal();
    note(&server, "4");
    scene.archive.wait_acknowledged(&server);
    let lost_time = commits(&server)[2].time.to_string();

    let catalog = scene.archive.catalog();
    let name = lost.parse().expect("a segment's name");
    fs::remove_file(scene.archive.path_of(&catalog.lineage.segment(name, Default::default()))).expect("it is sealed");
    let open = |said: &str| said.contains("gap 1-") && said.contains("--to lsn:");
    let said = scene.refused(&[], 1);
    assert!(open(&said), "{said}");
    let said = scene.refused(&["--to", &lost_time], 1);
    assert!(open(&said), "{said}");
    let edge = said.split("--to lsn:").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap().to_string();
    let status: Value = serde_json::from_slice(&scene.seawall(&["status", "--json"]).stdout).unwrap();
    assert_eq!(status["clusters"][0]["window"]["to"]["lsn"], edge, "{status}");
    assert_eq!(status["clusters"][0]["health"], "failing");

    // As `restore` leaves it: the recovery ends where its plan does, and not with an error about the gap behind it.
    let plan = scene.plan(&["--to", &format!("lsn:{edge}")]);
    assert_eq!((plan["stop"]["setting"].clone(), &plan["end"]["lsn"]), (Value::Null, &Value::from(edge)));
    let marker = RestoreMarker {
        schema: RestoreMarker::SCHEMA,
        id: RestoreId(7),
        cluster: "main".into(),
        lineage: catalog.lineage.directory_name(),
        system_id: catalog.lineage.system_id,
        segment_size: catalog.segment_size(),
        path: RestoreMarker::path_of(&History::root(TimelineId(1))),
        follow: false,
        start_lsn: plan["start_lsn"].as_str().unwrap().parse().unwrap(),
        end_lsn: Some(plan["end"]["lsn"].as_str().unwrap().parse().unwrap()),
        standby: false,
        backup: scene.taken[0].id,
        target: "the gap's edge".into(),
        created: Timestamp::UNIX_EPOCH,
        pinned: false,
    };
    marker.write(&scene.taken[0].copy.path()).expect("it can be written");
    let command = scene.archive.restore_command(&["--restore", "0000000000000007"]);
    let restored = scene.taken[0].copy.recover(&command).start_recovered();
    assert_eq!(notes(&restored.unwrap_or_else(|log| panic!("{log}"))), ["1", "2"]);

    // A backup behind the gap begins a new part.
    scene.taken.push(take(&server, &scene.archive, 2));
    note(&server, "5");
    scene.archive.wait_acknowledged(&server);
    assert_eq!(scene.recovered(&[]).len(), 6);
    let said = scene.refused(&["--to", &lost_time], 1);
    let behind = format!("--to lsn:{}", scene.taken[1].stop_lsn);
    assert!(open(&said) && said.contains(&behind), "{said}");
}
