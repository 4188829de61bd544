//! When something else fails: the repository, the slot, the server's identity. The server is never harmed by it, and
//! a recovery stops rather than end early.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use seawall::continuity::{self, GapState};
use seawall::wal::Lsn;

use crate::support::archived::{Archived, create_journal, note, notes, released_slot};
use crate::support::postgres::{self, Server, Stop};
use crate::support::process;

const AGENT_DEADLINE: Duration = process::DEADLINE;
/// The grace is 3 s here; the promise is that a stop does not hang for ever.
const STOP_PATIENCE: Duration = process::DEADLINE;

/// Closes or opens the repository for the agent: it is the service user, whom a mode binds.
fn set_mode(archive: &Archived, mode: u32) {
    let wal = archive.path_of(&archive.archive().lineage.wal());
    let mut open = vec![wal];
    while let Some(directory) = open.pop() {
        match fs::set_permissions(&directory, fs::Permissions::from_mode(mode)) {
            // A tail's directory goes with its tails.
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            set => set.expect("a mode can be set"),
        }
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten().map(|entry| entry.path());
        open.extend(entries.filter(|path| path.is_dir()));
    }
}

#[test]
fn a_server_stops_while_the_repository_takes_nothing() {
    for major in [13, 18].into_iter().filter(|&major| postgres::is_installed(major)) {
        let mut server = Server::builder(major).wal_segment_mib(1).setting("wal_sender_timeout", "4s").start();
        let archive = Archived::of(&server);
        archive.configure("shutdown_grace = \"3s\"\n");
        let mut agent = archive.streaming_agent();
        let backup = server.base_backup_without_wal();
        create_journal(&server);
        note(&server, "with a repository");
        archive.wait_acknowledged(&server);

        set_mode(&archive, 0o500);
        note(&server, "without a repository");
        agent.wait_for_log("does not take WAL", AGENT_DEADLINE);
        server.begin_stop(Stop::Fast);
        server.wait_stopped(STOP_PATIENCE);
        server.start();
        note(&server, "after the stop");
        set_mode(&archive, 0o700);
        archive.wait_acknowledged(&server);
        assert!(agent.is_running());
        archive.assert_no_gaps();
        let expected = notes(&server);
        let restored = backup.recover(&archive.restore_command(&[])).start_recovered().expect("all of it is there");
        assert_eq!(notes(&restored), expected);
    }
}

#[test]
fn a_server_stops_while_the_agent_does_not_read() {
    for major in [13, 18].into_iter().filter(|&major| postgres::is_installed(major)) {
        let mut server = Server::builder(major).wal_segment_mib(1).setting("wal_sender_timeout", "4s").start();
        let archive = Archived::of(&server);
        archive.configure("memory = \"8MiB\"\nshutdown_grace = \"3s\"\n");
        let mut agent = archive.streaming_agent();
        create_journal(&server);
        archive.wait_acknowledged(&server);
        set_mode(&archive, 0o500);
        // Random, so that it does not shrink.
        server.sql("create table noise as select gen_random_uuid() from generate_series(1, 600000)");
        agent.wait_for_log("reading pauses", AGENT_DEADLINE);
        server.begin_stop(Stop::Fast);
        server.wait_stopped(STOP_PATIENCE);
        server.start();
        note(&server, "after the stop");
        set_mode(&archive, 0o700);
        archive.wait_acknowledged(&server);
        assert!(agent.is_running());
        archive.assert_no_gaps();
    }
}

#[test]
fn a_gap_is_named_and_stops_a_recovery() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let archive = Archived::of(&server);
    let mut agent = archive.streaming_agent();
    let backup = server.base_backup_without_wal();
    create_journal(&server);
    note(&server, "before the gap");
    archive.wait_acknowledged(&server);
    agent.kill9();
    let held = archive.durable(1);
    released_slot(&server);
    server.sql("select pg_drop_replication_slot('seawall')");
    for _ in 0..8 {
        note(&server, "in the gap");
        server.sql("select pg_logical_emit_message(true, 'large', repeat('x', 2500000))");
        server.switch_wal();
        server.sql("checkpoint");
    }
    let mut agent = archive.streaming_agent();
    note(&server, "after the gap");
    archive.wait_acknowledged(&server);
    assert!(agent.is_running());
    let gaps = continuity::gaps(&archive.catalog());
    assert_eq!(gaps.len(), 1, "{gaps:#?}");
    assert_eq!((gaps[0].state, gaps[0].from), (GapState::Open, held));
    assert!(gaps[0].to > held + (1 << 20), "{gaps:#?}");
    assert!(gaps[0].cause.as_deref().is_some_and(|cause| cause.contains("did not exist")), "{gaps:#?}");

    let log = backup.recover(&archive.restore_command(&[])).start_recovered().expect_err("it must not promote");
    assert!(log.contains("is a hole in the archive"), "{log}");
}

#[test]
fn a_clone_on_the_same_timeline_is_refused_and_harms_nothing() {
    let Some(major) = postgres::newest_major() else { return };
    let mut primary = Server::builder(major).wal_segment_mib(1).setting("wal_keep_size", "256MB").start();
    let archive = Archived::of(&primary);
    let mut agent = archive.streaming_agent();
    let mut one = Server::standby_of(&primary).start();
    let mut other = Server::standby_of(&primary).start();
    let backup = primary.base_backup_without_wal();
    create_journal(&primary);
    note(&primary, "common");
    let common = primary.flush_lsn();
    archive.wait_acknowledged(&primary);
    one.wait_replayed(common);
    other.wait_replayed(common);
    primary.kill9();
    agent.kill9();
    one.promote();
    note(&one, "one");
    archive.point_at(&one.conninfo());
    let mut agent = archive.streaming_agent();
    archive.wait_acknowledged(&one);
    agent.kill9();
    let held: Lsn = archive.durable(2);

    other.promote();
    for _ in 0..3 {
        note(&other, "other");
        other.sql("select pg_logical_emit_message(true, 'large', repeat('x', 2500000))");
    }
    archive.point_at(&other.conninfo());
    let mut stranger = archive.agent();
    let status = stranger.wait(AGENT_DEADLINE);
    assert!([Some(65), Some(78)].contains(&status.code()), "{status}: {}", stranger.stderr());
    assert_eq!(archive.durable(2), held);
    archive.compare_with_wal_of(&one);
    let restored = backup.recover(&archive.restore_command(&[])).start_recovered().expect("all of it is there");
    assert_eq!(notes(&restored), ["common", "one"]);
    archive.point_at(&one.conninfo());
    let _agent = archive.streaming_agent();
    note(&one, "one again");
    archive.wait_acknowledged(&one);
    process::eventually(AGENT_DEADLINE, "the archive goes on", || (archive.durable(2) > held).then_some(()));
}

#[test]
fn promotions_under_an_agent_that_is_killed_around_them() {
    let Some(major) = postgres::newest_major() else { return };
    let mut server = Server::builder(major).wal_segment_mib(1).setting("wal_keep_size", "1GB").start();
    let archive = Archived::of(&server);
    let mut agent = archive.streaming_agent();
    let backup = server.base_backup_without_wal();
    create_journal(&server);
    for timeline in 1..=8 {
        note(&server, &format!("on {timeline}"));
        server.sql("select pg_logical_emit_message(true, 'large', repeat('x', 1500000))");
        if timeline % 2 == 0 {
            server.switch_wal();
        }
        server.stop(Stop::Fast);
        server.write_data_file("standby.signal", "");
        server.start();
        if timeline % 3 != 0 {
            // It streams from the standby when that is promoted.
            let streams = "select count(*) = 1 from pg_replication_slots where active";
            process::eventually(AGENT_DEADLINE, "it streams", || (server.value(streams) == "t").then_some(()));
        }
        let killer = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(fastrand::u64(0..500)));
            agent.kill9();
        });
        server.promote();
        killer.join().unwrap();
        agent = archive.agent();
    }
    note(&server, "the last");
    archive.wait_acknowledged(&server);
    archive.assert_no_gaps();
    let expected = notes(&server);
    let compared = archive.compare_with_wal_of(&server);
    assert!(compared.segments > 8, "{compared:?}");
    let restored = backup.recover(&archive.restore_command(&[])).start_recovered().expect("all of it is there");
    assert_eq!(notes(&restored), expected);
}
