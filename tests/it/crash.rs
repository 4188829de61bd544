//! Crashes of the agent and of the server, at any moment: nothing the server was told is durable is ever missing,
//! and nothing that was stored is ever different.

use std::process::Stdio;
use std::thread;
use std::time::Duration;

use seawall::wal::Lsn;

use crate::support::archived::{Archived, create_journal, note, notes, released_slot};
use crate::support::postgres::{self, Installation, Server};
use crate::support::process::{self, Reaped};

#[test]
fn an_agent_killed_at_any_moment_has_promised_nothing_it_does_not_hold() {
    const KILLS: u32 = 15;
    let Some(major) = postgres::newest_major() else { return };
    // The server keeps everything, so that all of it can be compared at the end.
    let server = Server::builder(major).wal_segment_mib(1).setting("wal_keep_size", "2GB").start();
    let archive = Archived::of(&server);
    let mut agent = archive.streaming_agent();
    let backup = server.base_backup_without_wal();
    create_journal(&server);
    server.pgbench_init(1);
    let load = server.pgbench_background(2, 300);
    let mut slot = Lsn::ZERO;
    for kill in 1..=KILLS {
        // Before it streams, in its first tail, in the middle of many.
        thread::sleep(Duration::from_millis(fastrand::u64(20..700)));
        note(&server, &format!("before kill {kill}"));
        agent.kill9();
        let promised = released_slot(&server);
        let held = archive.durable(1);
        assert!(promised <= held, "kill {kill}: the server was told {promised}, the repository ends at {held}");
        assert!(promised >= slot, "kill {kill}: the slot went back from {slot} to {promised}");
        slot = promised;
        agent = archive.agent();
    }
    drop(load);
    server.wait_no_load();
    note(&server, "the last one");
    archive.wait_acknowledged(&server);
    assert!(agent.is_running());
    let compared = archive.compare_with_wal_of(&server);
    assert!(compared.segments > 10 && compared.tail_bytes > 0, "{compared:?}");
    archive.assert_no_gaps();
    let expected = notes(&server);
    drop(server);
    let restored = backup.recover(&archive.restore_command(&[])).start_recovered().expect("the archive has all of it");
    assert_eq!(notes(&restored), expected);
}

#[test]
fn pg13_crash_in_a_large_record_is_followed() {
    crash_in_a_large_record_is_followed(13);
}

#[test]
fn pg15_crash_in_a_large_record_is_followed() {
    crash_in_a_large_record_is_followed(15);
}

#[test]
fn pg18_crash_in_a_large_record_is_followed() {
    crash_in_a_large_record_is_followed(18);
}

/// Small WAL buffers write a large record out while it is inserted, and a segment's end flushes it: what the agent has
/// received of it the restarted server marks as overwritten.
fn crash_in_a_large_record_is_followed(major: u32) {
    const CRASHES: u32 = 6;
    if !postgres::is_installed(major) {
        return;
    }
    let builder = Server::builder(major).wal_segment_mib(1).setting("wal_buffers", "32kB");
    let mut server = builder.setting("wal_keep_size", "2GB").start();
    let archive = Archived::of(&server);
    let mut agent = archive.streaming_agent();
    let backup = server.base_backup_without_wal();
    create_journal(&server);
    for crash in 1..=CRASHES {
        note(&server, &format!("before crash {crash}"));
        let begun = server.flush_lsn();
        let large = "select pg_logical_emit_message(false, 'large', repeat('x', 100000000))";
        let mut psql = Installation::newest_with("psql").command("psql");
        psql.args(["-X", "-d", &server.conninfo(), "-c", large]).stdout(Stdio::null()).stderr(Stdio::null());
        let psql = Reaped(psql.spawn().expect("psql starts"));
        // Until its first segments are out, or it was too fast for us.
        let enough = begun + (2 << 20);
        process::eventually(process::DEADLINE, "the record's beginning is on disk", || {
            (server.flush_lsn() >= enough).then_some(())
        });
        thread::sleep(Duration::from_millis(fastrand::u64(0..30)));
        server.kill9();
        drop(psql);
        server.start();
        note(&server, &format!("after crash {crash}"));
        archive.wait_acknowledged(&server);
        assert!(agent.is_running());
    }
    let compared = archive.compare_with_wal_of(&server);
    assert!(compared.segments > 10 && compared.tail_bytes > 0, "{compared:?}");
    archive.assert_no_gaps();
    let expected = notes(&server);
    let reconnects = agent.stderr().matches("streaming").count();
    drop(server);
    let restored = backup.recover(&archive.restore_command(&[])).start_recovered().expect("the archive has all of it");
    assert_eq!(notes(&restored), expected);
    let overwritten = restored.log().matches("successfully skipped missing contrecord").count();
    println!("PostgreSQL {major}: {overwritten} of {CRASHES} crashes cut a record; {reconnects} streams");
}
