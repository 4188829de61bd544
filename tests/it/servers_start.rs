//! The tests' own ground: every server here starts, crashes, recovers, is copied and promoted as the harness says.

use std::path::Path;

use crate::support::on_every_major;
use crate::support::postgres::{self, Server, Stop};
use crate::support::process;

on_every_major!(answers_after_start_restart_and_crash);
fn answers_after_start_restart_and_crash(major: u32) {
    let mut server = Server::builder(major).wal_segment_mib(1).setting("wal_keep_size", "32MB").start();
    assert_eq!(server.value("show wal_segment_size"), "1MB");
    assert_eq!(server.value("select current_setting('server_version_num')::int / 10000"), major.to_string());
    assert_eq!(server.sql("select 1, null, 'a b' union all select 2, 'x', ''"), [["1", "", "a b"], ["2", "x", ""]]);
    assert!(server.try_sql("select 1/0").unwrap_err().contains("division by zero"));

    server.sql("create table t as select 1 as i");
    server.restart();
    server.sql("insert into t select generate_series(2, 5000)");
    let flushed = server.flush_lsn();
    server.kill9();
    server.start();
    assert_eq!(server.value("select count(*) from t"), "5000");
    assert!(server.flush_lsn() >= flushed, "a crash takes nothing that was flushed");
    assert!(server.log().contains("redo done at") || server.log().contains("redo is not required"));

    server.stop(Stop::Immediate);
    server.start();
    server.stop(Stop::Fast);
    assert!(server.has_stopped());
}

on_every_major!(standby_follows_and_is_promoted);
fn standby_follows_and_is_promoted(major: u32) {
    let primary = Server::builder(major).wal_segment_mib(1).start();
    let mut standby = Server::standby_of(&primary).start();
    primary.pgbench_init(1);
    let flushed = primary.flush_lsn();
    standby.wait_replayed(flushed);
    standby.promote();
    standby.sql("create table only_here (i int)");
    assert_eq!((primary.timeline(), standby.timeline()), (1, 2));
    assert_eq!(standby.system_id(), primary.system_id());
}

on_every_major!(backup_recovers_by_restore_command);
fn backup_recovers_by_restore_command(major: u32) {
    let server = Server::builder(major).wal_segment_mib(1).checksums().setting("wal_keep_size", "64MB").start();
    let backup = server.base_backup_without_wal();
    server.sql("create table after_backup as select generate_series(1, 1000) as i");
    server.switch_wal();
    server.pgbench(&["-i", "-q", "-s", "1"]);

    let from_origin = format!("cp '{}'/%f %p", server.wal_dir().display());
    let recovered = backup.recover(&from_origin).start_recovered().expect("the WAL is all there");
    assert_eq!(recovered.value("select count(*) from after_backup"), "1000");
    assert_eq!(recovered.value("show data_checksums"), "on");

    let log = backup.recover("false").start_recovered().expect_err("without WAL it cannot become consistent");
    assert!(log.contains("could not locate required checkpoint record"), "{log}");
}

#[test]
fn load_runs_beside_the_test_and_ends() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    server.create_slot("held");
    server.pgbench_init(1);
    let before = server.flush_lsn();
    server.pgbench_background(2, 1).wait(process::DEADLINE);
    server.pgbench_transactions(10);
    assert!(server.flush_lsn() > before);
    drop(server.pgbench_background(1, 600));
    assert_eq!(server.value("select slot_name from pg_replication_slots"), "held");
}

#[test]
fn nothing_outlives_a_server() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).start();
    let directory = server.socket_dir();
    let pid: u32 = server.value("select pg_backend_pid()").parse().expect("a process id");
    assert!(directory.exists());
    drop(server);
    assert!(!directory.exists());
    assert!(!Path::new(&format!("/proc/{pid}")).exists());
}

#[test]
fn rejects_the_role_its_hba_lines_reject() {
    let Some(major) = postgres::newest_major() else { return };
    let mut server = Server::builder(major).hba("host all all 127.0.0.1/32 reject").start();
    let mut psql = postgres::Installation::newest_with("psql").command("psql");
    let refused = process::run(psql.args(["-X", "-d", &server.tcp_conninfo(), "-c", "select 1"]), process::DEADLINE);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("pg_hba.conf rejects"));
    server.set("work_mem", "1MB");
    server.reload();
    process::eventually(process::DEADLINE, "the setting holds", || {
        (server.value("show work_mem") == "1MB").then_some(())
    });
}
