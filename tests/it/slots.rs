//! The slot matrix: absent, dropped, emptied by hand, lost, of the wrong kind, busy. On every major, since each has
//! its own idea of a lost slot (proto-notes/02-commands.md).

use seawall::catalog::ledger::FactKind;
use seawall::wal::Lsn;

use crate::support::agent::{self, Agent};
use crate::support::on_every_major;
use crate::support::postgres::Server;
use crate::support::process::eventually;
use crate::support::rig::{PATIENCE, Rig};

fn small(major: u32) -> crate::support::postgres::Builder {
    Server::builder(major)
        .wal_segment_mib(1)
        .setting("max_wal_size", "4MB")
        .setting("min_wal_size", "2MB")
        .setting("checkpoint_timeout", "1h")
}

/// Stops the agent in good order: exit 0, and the slot is exactly where the archive ends.
fn stop(rig: &Rig, mut agent: Agent) -> Lsn {
    let status = agent.terminate(PATIENCE);
    assert!(status.success(), "{status}");
    rig.wait_slot_is_where_the_archive_ends()
}

/// Writes until the server has removed the segment that holds `lsn`.
fn remove_wal(rig: &Rig, lsn: Lsn) {
    let wanted = rig.server.value(&format!("select pg_walfile_name('{lsn}'::pg_lsn)"));
    eventually(PATIENCE, "old WAL is removed", || {
        rig.write();
        rig.server.switch_wal();
        rig.server.sql("checkpoint");
        let files = std::fs::read_dir(rig.server.wal_dir()).expect("pg_wal can be listed");
        let names = files.filter_map(|file| file.ok()?.file_name().into_string().ok());
        let oldest = names.filter(|name| name.len() == 24).min().expect("a server has WAL");
        (oldest > wanted).then_some(())
    });
}

/// The archive has exactly one gap, from `durable` to where its newest run begins.
fn assert_one_gap(rig: &Rig, durable: Lsn, cause: &str) {
    let gaps = rig.facts(FactKind::Gap);
    assert_eq!(gaps.len(), 1, "{gaps:?}");
    assert_eq!(gaps[0].from_lsn, Some(durable));
    assert_eq!(gaps[0].to_lsn, rig.state().run_from, "the gap ends where the new run begins");
    assert!(gaps[0].cause.contains(cause), "{}", gaps[0].cause);
    let config = rig.config("seawall");
    let shown = agent::seawall(["gaps", "--json", "--config", config.to_str().expect("UTF-8")]);
    assert_eq!(shown.status.code(), Some(1), "{shown:?}");
    let answer: serde_json::Value = serde_json::from_slice(&shown.stdout).expect("JSON");
    let list = answer["gaps"].as_array().expect("a list");
    assert_eq!(list.len(), 1, "{answer}");
    assert_eq!(list[0]["from_lsn"], durable.to_string());
    assert_eq!(list[0]["to_lsn"], gaps[0].to_lsn.expect("it has bounds").to_string());
    assert_eq!(list[0]["state"], "open");
}

on_every_major!(a_slot_that_comes_and_goes);
fn a_slot_that_comes_and_goes(major: u32) {
    let mut rig = Rig::new(small(major).setting("wal_keep_size", "64MB").start());

    // Absent: created, and holding WAL from the first moment.
    let agent = rig.start();
    eventually(PATIENCE, "the slot reserves WAL", || rig.slot()?.restart_lsn);
    rig.write();
    rig.wait_archived();
    stop(&rig, agent);

    // Dropped, but its WAL is there: no gap.
    rig.drop_slot();
    rig.write();
    rig.server.switch_wal();
    rig.write();
    let agent = rig.start();
    rig.wait_archived();
    assert_eq!(rig.facts(FactKind::Gap), []);
    stop(&rig, agent);

    // Made by hand, holding nothing: replaced by one that does.
    rig.drop_slot();
    rig.server.sql("select pg_create_physical_replication_slot('seawall')"); // the harness's own reserves
    rig.write();
    let mut agent = rig.start();
    agent.wait_for_log("the slot is lost", PATIENCE);
    rig.write();
    rig.wait_archived();
    assert_eq!(rig.slot().expect("it was created").wal_status, "reserved");
    assert_eq!(rig.facts(FactKind::Gap), []);
    let durable = stop(&rig, agent);

    // Dropped, and its WAL is gone: a gap, said once, and the stream goes on.
    rig.drop_slot();
    rig.server.set("wal_keep_size", "0");
    rig.server.reload();
    remove_wal(&rig, durable);
    let agent = rig.start();
    rig.write();
    eventually(PATIENCE, "the slot is created", || rig.slot()?.restart_lsn);
    rig.wait_archived();
    stop(&rig, agent);
    assert_one_gap(&rig, durable, "did not exist");
    let agent = rig.start();
    rig.write();
    rig.wait_archived();
    stop(&rig, agent);
    assert_one_gap(&rig, durable, "did not exist");
}

on_every_major!(a_lost_slot_is_replaced_and_the_gap_recorded);
fn a_lost_slot_is_replaced_and_the_gap_recorded(major: u32) {
    let rig = Rig::new(small(major).setting("max_slot_wal_keep_size", "1MB").start());
    let agent = rig.start();
    eventually(PATIENCE, "the slot reserves WAL", || rig.slot()?.restart_lsn);
    rig.write();
    rig.wait_archived();
    let durable = stop(&rig, agent);
    remove_wal(&rig, durable);
    assert_eq!(rig.slot().expect("it is there still").wal_status, "lost");

    let mut agent = rig.start();
    agent.wait_for_log("the slot is lost", PATIENCE);
    rig.write();
    eventually(PATIENCE, "a new slot holds WAL", || (rig.slot()?.wal_status == "reserved").then_some(()));
    rig.wait_archived();
    stop(&rig, agent);
    assert_one_gap(&rig, durable, "was lost");

    let agent = rig.start();
    rig.write();
    rig.wait_archived();
    assert!(!agent.stderr().contains("the slot is lost"), "it is not replaced again");
    stop(&rig, agent);
    assert_one_gap(&rig, durable, "was lost");
    assert_eq!(rig.slot().expect("it is there").wal_status, "reserved");
}

on_every_major!(a_busy_slot_is_waited_for);
fn a_busy_slot_is_waited_for(major: u32) {
    let rig = Rig::new(small(major).start());
    let mut first = rig.start();
    eventually(PATIENCE, "the slot reserves WAL", || rig.slot()?.restart_lsn);
    rig.write();
    rig.wait_archived();

    let mut second = rig.start();
    second.wait_for_log("is active for PID", PATIENCE);
    rig.write();
    rig.wait_archived();
    assert!(second.is_running());
    assert!(!second.stderr().contains("\"streaming\"") && !second.stderr().contains(" streaming "));

    first.kill9();
    rig.write();
    second.wait_for_log("streaming", PATIENCE);
    rig.wait_archived();
    stop(&rig, second);
    assert_eq!(rig.facts(FactKind::Gap), []);
}

on_every_major!(a_logical_slot_of_that_name_is_refused);
fn a_logical_slot_of_that_name_is_refused(major: u32) {
    let rig = Rig::new(small(major).setting("wal_level", "logical").start());
    rig.server.sql("select pg_create_logical_replication_slot('seawall', 'pgoutput')");
    let before = rig.slot();
    let config = rig.config("seawall");
    let mut agent = Agent::start(["run", "--log-format", "json", "--config", config.to_str().expect("UTF-8")]);
    assert_eq!(agent.wait(PATIENCE).code(), Some(78));
    assert_eq!(rig.slot(), before, "it is somebody else's");
    assert!(rig.try_archive().is_none(), "nothing was created");

    let log = agent.stderr();
    let lines = log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("not JSON: {line}")));
    let lines: Vec<serde_json::Value> = lines.collect();
    let says = |line: &&serde_json::Value| line["message"].as_str().is_some_and(|text| text.contains("logical slot"));
    let said: Vec<_> = lines.iter().filter(says).collect();
    assert_eq!(said.len(), 1, "a refusal is said once:\n{log}");
    assert_eq!(said[0]["hint"], "choose another name for `slot`");
    assert_eq!((&said[0]["level"], &said[0]["exit_code"]), (&"ERROR".into(), &78.into()));
    assert!(lines.iter().all(|line| line["hint"] != ""), "no hint is no field:\n{log}");
}
