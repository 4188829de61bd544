//! When did it happen: found in sealed segments and in the unfinished one, and the restore it suggests stops before it.

use serde_json::Value;

use crate::support::agent;
use crate::support::archived::{Archived, create_journal, note};
use crate::support::postgres::{self, Server};

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

fn answer_of(archive: &Archived, arguments: &[&str]) -> String {
    let config = archive.config_argument();
    agent::seawall_ok([arguments, &["--config", &config]].concat())
}
