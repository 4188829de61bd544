//! When did it happen: found in sealed segments and in the unfinished one, with names where they are certain, and the
//! restores it suggests stop where it says.

use std::time::Duration;

use serde_json::Value;

use crate::support::agent;
use crate::support::archived::{Archived, create_journal, note, notes};
use crate::support::postgres::{self, BaseBackup, Installation, Server};
use crate::support::process;

const DEADLINE: Duration = Duration::from_secs(120);

#[test]
fn what_was_dropped_is_found_with_the_target_that_stops_before_it() {
    for major in [13, 18].into_iter().filter(|&major| postgres::is_installed(major)) {
        let server = Server::builder(major).wal_segment_mib(1).start();
        let archive = Archived::of(&server);
        let _agent = archive.streaming_agent();
        let backup = server.base_backup_without_wal();
        create_journal(&server);
        server.sql("create table early as select generate_series(1, 10) n");
        server.sql("create table late as select generate_series(1, 10) n");
        let file = |table: &str| server.value(&format!("select pg_relation_filenode('{table}')"));
        let (early, late) = (file("early"), file("late"));
        server.sql("drop table early");
        server.sql("select pg_create_restore_point('before the switch')");
        server.switch_wal();
        note(&server, "the last one before the accident");
        server.sql("drop table late");
        note(&server, "after the accident");
        archive.wait_acknowledged(&server);

        let answer: Value = serde_json::from_str(&answer_of(&archive, &["find", "--json"])).unwrap();
        let events = answer["events"].as_array().unwrap();
        let dropped = |file: &str| {
            let holds = |event: &&Value| {
                let relations = event["relations"].as_array().unwrap();
                event["kind"] == "drop"
                    && relations.iter().any(|it| it.as_str().unwrap().ends_with(&format!("/{file}")))
            };
            events.iter().find(holds).unwrap_or_else(|| panic!("{file} is not in {answer}"))
        };
        let point = events.iter().find(|event| event["kind"] == "restore_point").expect("a restore point");
        assert_eq!(point["restore"], "--to 'name:before the switch'");
        let lsn = |event: &Value| event["lsn"].as_str().unwrap().to_string();
        assert!(lsn(dropped(&early)) < lsn(point) && lsn(point) < lsn(dropped(&late)));
        let accident = dropped(&late);
        assert_eq!(accident["restore"], format!("--to lsn:{} --exclusive", lsn(accident)));
        let time = accident["time"].as_str().unwrap();
        let around = answer_of(&archive, &["find", "--json", "--since", time, "--until", time]);
        let around: Value = serde_json::from_str(&around).unwrap();
        assert_eq!(around["events"].as_array().unwrap().len(), 1, "{around}");
        let table = answer_of(&archive, &["find"]);
        assert!(table.contains(&format!("restore --to lsn:{} --exclusive", lsn(accident))), "{table}");

        // PostgreSQL agrees on where that is.
        let recovery = backup.recover(&archive.restore_command(&[]));
        let recovery = recovery.setting("recovery_target_lsn", &lsn(accident));
        let recovery =
            recovery.setting("recovery_target_inclusive", "off").setting("recovery_target_action", "promote");
        let restored = recovery.start_recovered().expect("the target is reached");
        assert_eq!(restored.value("select count(*) from late"), "10");
        assert_eq!(restored.value("select to_regclass('early') is null"), "t");
        assert_eq!(restored.value("select count(*) from journal"), "1");
    }
}

#[test]
fn commits_are_found_with_the_targets_before_and_after_them() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).setting("track_commit_timestamp", "on");
    let server = server.setting("autovacuum", "off").start();
    let archive = Archived::of(&server);
    let _agent = archive.streaming_agent();
    create_journal(&server);
    let backup = server.base_backup_without_wal();
    for number in 0..12 {
        note(&server, &format!("note {number}"));
        if number % 3 == 0 {
            server.switch_wal();
        }
    }
    archive.wait_acknowledged(&server);
    let known = server.sql(
        "select xmin, to_char(pg_xact_commit_timestamp(xmin) at time zone 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.USZ') \
         from journal order by id",
    );
    let (xid, time) = (|at: usize| known[at][0].as_str(), |at: usize| known[at][1].as_str());
    let xids = |answer: &Value| -> Vec<String> {
        let events = answer["events"].as_array().unwrap().iter();
        events.filter(|event| event["kind"] == "commit").map(|event| event["xid"].to_string()).collect()
    };
    let expected = |range: std::ops::Range<usize>| range.map(|at| xid(at).to_string()).collect::<Vec<_>>();

    let around = json_of(&archive, &["find", "--around", time(5), "--count", "3"]);
    assert_eq!(xids(&around), expected(3..9), "{around}");
    let sixth = &around["events"][2];
    let lsn = sixth["lsn"].as_str().unwrap();
    assert_eq!(sixth["restore"], format!("--to lsn:{lsn} --exclusive"));
    assert_eq!(sixth["restore_after"], format!("--to lsn:{lsn}"));
    assert_eq!(xids(&json_of(&archive, &["find", "--around", lsn, "--count", "2"])), expected(3..7));
    let between = json_of(&archive, &["find", "--commits", "--since", time(2), "--until", time(9)]);
    assert_eq!((xids(&between), &between["more"]), (expected(2..10), &Value::Bool(false)));
    let some = json_of(&archive, &["find", "--commits", "--since", time(2), "--count", "4"]);
    assert_eq!((xids(&some), &some["more"]), (expected(2..6), &Value::Bool(true)));
    let one = json_of(&archive, &["find", "--xid", xid(5)]);
    assert_eq!((xids(&one), &one["events"][0]["lsn"]), (expected(5..6), &sixth["lsn"]));
    assert_eq!(json_of(&archive, &["find", "--xid", "2000000000"])["events"], Value::Array(Vec::new()));
    let table = answer_of(&archive, &["find", "--around", lsn]);
    let line = table.lines().find(|line| line.contains(&format!(" {} ", xid(5)))).expect("it has a line");
    let before = format!("restore --to lsn:{lsn} --exclusive");
    assert!(line.contains(&before) && line.trim_end().ends_with(&format!("restore --to lsn:{lsn}")), "{table}");
    let unbounded = agent::seawall(["find", "--commits", "--config", &archive.config_argument()]);
    assert_eq!(unbounded.status.code(), Some(64), "it would read the whole archive");

    for (inclusive, count) in [("off", 5), ("on", 6)] {
        let restored = recovered(&backup, &archive, lsn, inclusive);
        assert_eq!(notes(&restored).len(), count, "inclusive {inclusive}");
    }
}

#[test]
fn names_are_told_only_where_they_are_certain() {
    for major in [13, 18].into_iter().filter(|&major| postgres::is_installed(major)) {
        names_are_told_on(major);
    }
}

fn names_are_told_on(major: u32) {
    let server = Server::builder(major).wal_segment_mib(1).setting("autovacuum", "off").start();
    let archive = Archived::of(&server);
    let _agent = archive.streaming_agent();
    server.sql("create table kept as select generate_series(1, 10) n");
    server.sql("create table cut as select generate_series(1, 10000) n");
    server.sql("create table gone as select generate_series(1, 10000) n");
    let path = |table: &str| {
        server.value(&format!(
            "select format('%s/%s/%s', coalesce(nullif(c.reltablespace, 0), d.dattablespace), d.oid, \
             pg_relation_filenode(c.oid)) from pg_class c, pg_database d \
             where c.oid = '{table}'::regclass and d.datname = current_database()"
        ))
    };
    let (kept, cut, gone) = (path("kept"), path("cut"), path("gone"));
    server.sql("truncate kept");
    for table in ["cut", "gone"] {
        server.sql(&format!("delete from {table}"));
        server.sql(&format!("vacuum {table}"));
    }
    server.sql("drop table gone");
    archive.wait_acknowledged(&server);

    let answer = json_of(&archive, &["find"]);
    assert_eq!(answer["unnamed"], Value::Null, "{answer}");
    let about = |kind: &str, path: &str| {
        let holds = |event: &&Value| {
            event["kind"] == kind && event["relations"].as_array().unwrap().iter().any(|it| it == path)
        };
        let found = answer["events"].as_array().unwrap().iter().find(holds);
        found.unwrap_or_else(|| panic!("no {kind} of {path} in {answer}")).clone()
    };
    let (truncate, vacuum) = (about("drop", &kept), about("truncation", &cut));
    assert_eq!(
        (&truncate["database"], &truncate["changed"]),
        (&"postgres".into(), &serde_json::json!(["public.kept"]))
    );
    assert_eq!(vacuum["names"], serde_json::json!({ cut.as_str(): "public.cut" }));
    assert_eq!(about("truncation", &gone)["names"], serde_json::json!({}), "its number may be another's now");
    assert_eq!(about("drop", &gone)["changed"], serde_json::json!([]));
    let count = |arguments: &[&str]| json_of(&archive, arguments)["events"].as_array().unwrap().len();
    assert_eq!(count(&["find", "--relation", "kept"]), 1);
    assert_eq!(count(&["find", "--relation", "postgres.public.c?t", "--kind", "truncation"]), 1);
    assert_eq!(count(&["find", "--relation", &gone]), 2);
    assert_eq!(count(&["find", "--kind", "restore-point,drop-tablespace"]), 0);

    // Without the server the events are the same, and have no names.
    let alone = json_of(&archive.copy(), &["find"]);
    assert!(alone["unnamed"].is_string(), "{alone}");
    let places = |answer: &Value| -> Vec<Value> {
        answer["events"].as_array().unwrap().iter().map(|event| event["lsn"].clone()).collect()
    };
    assert_eq!(places(&alone), places(&answer));
}

#[test]
fn what_happened_on_a_line_that_was_left_is_shown_with_its_timeline_and_no_name() {
    let Some(major) = postgres::newest_major() else { return };
    let primary = Server::builder(major).wal_segment_mib(1).setting("wal_keep_size", "256MB");
    let mut primary = primary.setting("autovacuum", "off").start();
    let mut standby = Server::standby_of(&primary).start();
    let archive = Archived::of(&primary);
    let mut agent = archive.streaming_agent();
    for table in ["shared", "kept"] {
        primary.sql(&format!("create table {table} as select generate_series(1, 10) n"));
    }
    let file = |server: &Server, table: &str| server.value(&format!("select pg_relation_filenode('{table}')"));
    let (shared, kept) = (file(&primary, "shared"), file(&primary, "kept"));
    primary.sql("drop table shared");
    standby.wait_replayed(primary.flush_lsn());
    standby.promote();
    // The old primary goes on for a while: what follows is on timeline 1 only.
    primary.sql("truncate kept");
    archive.wait_acknowledged(&primary);
    agent.kill9();
    primary.kill9();
    archive.point_at(&standby.conninfo());
    let _agent = archive.streaming_agent();
    standby.sql("drop table kept");
    archive.wait_acknowledged(&standby);

    let answer = json_of(&archive, &["find", "--kind", "drop"]);
    let of = |file: &str| -> Vec<(Value, Value, bool)> {
        let events = answer["events"].as_array().unwrap().iter();
        let about = events.filter(|event| {
            event["relations"].as_array().unwrap().iter().any(|it| it.as_str().unwrap().ends_with(&format!("/{file}")))
        });
        let facts = |event: &Value| {
            let leads_off = event["restore"].as_str().unwrap().ends_with(" --timeline 1");
            (event["timeline"].clone(), event["database"].clone(), leads_off)
        };
        about.map(facts).collect()
    };
    assert_eq!(of(&shared), [(1.into(), "postgres".into(), false)], "once, although both timelines have it: {answer}");
    assert_eq!(of(&kept), [(1.into(), Value::Null, true), (2.into(), "postgres".into(), false)], "{answer}");
    let on = |timeline: &str| {
        let answer = json_of(&archive, &["find", "--kind", "drop", "--relation", &kept, "--timeline", timeline]);
        answer["events"].as_array().unwrap().iter().map(|event| event["timeline"].clone()).collect::<Vec<_>>()
    };
    assert_eq!((on("1"), on("2")), (vec![1.into()], vec![2.into()]));
}

#[test]
fn a_dropped_database_is_found_and_brought_back() {
    for major in [13, 18].into_iter().filter(|&major| postgres::is_installed(major)) {
        let server = Server::builder(major).wal_segment_mib(1).start();
        let archive = Archived::of(&server);
        let _agent = archive.streaming_agent();
        server.sql("create database shop");
        in_database(&server, "shop", "create table orders as select generate_series(1, 10) n");
        let oid = server.value("select oid from pg_database where datname = 'shop'");
        let backup = server.base_backup_without_wal();
        server.sql("drop database shop");
        archive.wait_acknowledged(&server);

        let answer = json_of(&archive, &["find", "--kind", "drop-database"]);
        let event = &answer["events"][0];
        assert_eq!(event["relations"], serde_json::json!([format!("1663/{oid}")]), "{answer}");
        let restored = recovered(&backup, &archive, event["lsn"].as_str().unwrap(), "off");
        let hint = event["hint"].as_str().unwrap();
        restored.sql(&hint[hint.find("UPDATE").unwrap()..]);
        assert_eq!(in_database(&restored, "shop", "select count(*) from orders"), "10", "{hint}");
    }
}

/// The copy as the target says, promoted.
fn recovered(backup: &BaseBackup, archive: &Archived, lsn: &str, inclusive: &str) -> Server {
    let recovery = backup.recover(&archive.restore_command(&[])).setting("recovery_target_lsn", lsn);
    let recovery = recovery.setting("recovery_target_inclusive", inclusive);
    recovery.setting("recovery_target_action", "promote").start_recovered().expect("the target is reached")
}

fn in_database(server: &Server, database: &str, statement: &str) -> String {
    let conninfo = server.conninfo().replace("dbname=postgres", &format!("dbname={database}"));
    let mut psql = Installation::newest_with("psql").command("psql");
    process::run_ok(psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", &conninfo, "-c", statement]), DEADLINE)
        .trim()
        .to_string()
}

fn json_of(archive: &Archived, arguments: &[&str]) -> Value {
    serde_json::from_str(&answer_of(archive, &[arguments, &["--json"]].concat())).expect("it answers in JSON")
}

fn answer_of(archive: &Archived, arguments: &[&str]) -> String {
    let config = archive.config_argument();
    agent::seawall_ok([arguments, &["--config", &config]].concat())
}
