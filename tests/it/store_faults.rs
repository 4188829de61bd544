//! A repository that is full, gone, or closed to us, and a server that stops meanwhile: the server is never harmed,
//! nothing is acknowledged that is not durable, and the agent goes on by itself.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use seawall::catalog::ledger::FactKind;
use seawall::replication::{Address, Connection, Login, NetDialer, Security, SessionKind, SlotName, SslMode, Start};
use seawall::wal::{Lsn, TimelineId};

use crate::support::agent::{Agent, Signal};
use crate::support::on_every_major;
use crate::support::postgres::{self, Server, Stop};
use crate::support::process::{self, eventually};
use crate::support::rig::{PATIENCE, Rig, resident_bytes, wait_for};

const MIB: u64 = 1 << 20;

fn login(server: &Server, kind: SessionKind) -> Login {
    Login {
        address: Address::Unix { directory: server.socket_dir(), port: server.port() },
        ssl_mode: SslMode::Disable,
        security: Security::default(),
        user: "postgres".into(),
        password: None,
        kind,
        application_name: "test".into(),
        options: String::new(),
        connect_timeout: PATIENCE,
        answer_timeout: PATIENCE,
        keepalive: None,
        tcp_user_timeout: None,
    }
}

on_every_major!(a_fast_stop_refuses_first_and_ends_idle_walsenders_last);
fn a_fast_stop_refuses_first_and_ends_idle_walsenders_last(major: u32) {
    // Nobody answers for the stream below.
    let mut server = Server::builder(major).wal_segment_mib(1).setting("wal_sender_timeout", "30min").start();
    server.create_slot("held");
    let physical = login(&server, SessionKind::Physical);
    let start = Lsn(server.flush_lsn().0 / MIB * MIB);
    wait_for(async {
        let ordinary = login(&server, SessionKind::Sql { database: "postgres".into() });
        let mut ordinary = Connection::open(&NetDialer, &ordinary).await.expect("an ordinary session");
        ordinary.query("select 1").await.expect("it answers");
        // It acknowledges nothing, so that the stop waits for it.
        let mut streaming = Connection::open(&NetDialer, &physical).await.expect("a walsender");
        let slot = SlotName::new("held").expect("a valid name");
        let started = streaming.start_replication(&slot, start, TimelineId(1)).await.expect("it streams");
        assert_eq!(started, Start::Streaming);
        let mut idle = Connection::open(&NetDialer, &physical).await.expect("a walsender");
        idle.identify_system().await.expect("it answers");

        // A smart stop refuses, while the ordinary session goes on writing and nothing of ours ends.
        server.begin_stop(Stop::Smart);
        refused(&physical).await;
        let ended = tokio::time::timeout(Duration::from_secs(1), idle.wait_for_end()).await;
        assert!(ended.is_err(), "{ended:?}");
        ordinary.query("create table written_during_a_smart_stop ()").await.expect("it still writes");

        server.begin_stop(Stop::Fast);
        let end = idle.wait_for_end().await;
        assert_eq!(end.sqlstate(), Some("57P01"), "{end}");
        let probe = Connection::open(&NetDialer, &physical).await.expect_err("nobody comes in any more");
        assert_eq!(probe.sqlstate(), Some("57P03"), "{probe}");
        drop(streaming);
    });
    server.wait_stopped(PATIENCE);
}

/// The postmaster may take a moment to hear of its signal.
async fn refused(login: &Login) {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    while tokio::time::Instant::now() < deadline {
        match Connection::open(&NetDialer, login).await {
            Err(error) => return assert_eq!(error.sqlstate(), Some("57P03"), "{error}"),
            Ok(session) => session.close().await,
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("a stopping server takes sessions");
}

/// A rig whose store a test takes away: small memory.
fn rig(server: postgres::Builder) -> Rig {
    let mut rig = Rig::new(server.setting("max_wal_size", "1GB").start());
    rig.settings.push_str("memory = \"8MiB\"\n");
    rig
}

/// An agent that has archived something.
fn working(rig: &Rig) -> Agent {
    let agent = rig.start();
    eventually(PATIENCE, "the slot reserves WAL", || rig.slot()?.restart_lsn);
    rig.write();
    rig.wait_archived();
    agent
}

fn move_away(rig: &Rig) -> PathBuf {
    let away = rig.scratch.join("away");
    fs::rename(rig.repository(), &away).expect("our directory can be renamed");
    away
}

fn move_back(rig: &Rig, away: &Path) {
    fs::rename(away, rig.repository()).expect("our directory can be renamed");
}

on_every_major!(a_stopping_server_is_let_go_while_nothing_is_read);
fn a_stopping_server_is_let_go_while_nothing_is_read(major: u32) {
    let mut rig = rig(Server::builder(major).wal_segment_mib(1));
    rig.settings.push_str("shutdown_grace = \"3s\"\n");
    let mut agent = working(&rig);
    let away = move_away(&rig);
    rig.write_much();
    agent.wait_for_log("reading pauses", PATIENCE);
    eventually(PATIENCE, "an idle session is held", || {
        let idle = "select count(*) from pg_stat_activity where backend_type = 'walsender' and state is distinct from 'active'";
        (rig.server.value(idle) != "0").then_some(())
    });

    rig.server.begin_stop(Stop::Fast);
    rig.server.wait_stopped(PATIENCE);
    agent.wait_for_log("the server is stopping while its stream stands still", PATIENCE);
    agent.kill9();
    move_back(&rig, &away);
    let durable = rig.durable();
    rig.server.start();
    assert!(rig.restart_lsn() <= durable, "{} is acknowledged, {durable} durable", rig.restart_lsn());

    let agent = rig.start();
    rig.wait_archived();
    assert_eq!(rig.facts(FactKind::Gap), []);
    drop(agent);
}

/// A file system of a size, unmounted at the end; only root can make one.
struct Volume(PathBuf);

impl Volume {
    fn mount(at: PathBuf, size: &str) -> Option<Volume> {
        fs::create_dir_all(&at).expect("a directory can be made");
        let mount =
            Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={size}"), "none"]).arg(&at).status();
        if !mount.is_ok_and(|status| status.success()) {
            println!("skipped: no file system can be mounted here (not root?)");
            return None;
        }
        Some(Volume(at))
    }

    fn resize(&self, size: &str) {
        let options = format!("remount,size={size}");
        let status = Command::new("mount").args(["-o", &options]).arg(&self.0).status().expect("mount runs");
        assert!(status.success());
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk_pauses_reading_and_nothing_else() {
    let Some(major) = postgres::newest_major() else { return };
    // Short enough for a test to outlast it, long enough for an agent that hardly gets a processor.
    let rig = rig(Server::builder(major).wal_segment_mib(1).setting("wal_sender_timeout", "12s"));
    let Some(volume) = Volume::mount(rig.repository(), "6m") else { return };
    let mut agent = working(&rig);
    let walsender = || rig.server.value("select active_pid from pg_replication_slots where slot_name = 'seawall'");
    let before = walsender();

    rig.write_much();
    agent.wait_for_log("the repository does not take WAL", PATIENCE);
    agent.wait_for_log("reading pauses", PATIENCE);
    let from = rig.server.value("select clock_timestamp()");
    let outlived = format!(
        "select coalesce(max(reply_time) > timestamptz '{from}' + interval '12s', false) from pg_stat_replication"
    );
    eventually(PATIENCE, "the connection outlives the server's patience", || {
        (rig.server.value(&outlived) == "t").then_some(())
    });
    assert_eq!(walsender(), before, "the connection has stayed");
    let restart = rig.restart_lsn();
    assert!(restart <= rig.durable(), "{restart} is acknowledged, {} durable", rig.durable());
    let resident = resident_bytes(agent.pid());
    println!("resident while paused: {} MiB", resident / MIB);
    assert!(resident < 128 * MIB, "{} MiB", resident / MIB);

    volume.resize("300m");
    agent.wait_for_log("the repository takes WAL again", PATIENCE);
    rig.wait_archived();
    assert_eq!(walsender(), before, "the connection has stayed");
    assert!(agent.terminate(PATIENCE).success());
    rig.wait_slot_is_where_the_archive_ends();
    drop(rig);
    drop(volume);
}

#[test]
fn a_repository_that_vanishes_and_returns() {
    let Some(major) = postgres::newest_major() else { return };
    let rig = rig(Server::builder(major).wal_segment_mib(1));
    let mut agent = working(&rig);
    let acknowledged = rig.restart_lsn();
    let away = move_away(&rig);
    rig.write();
    agent.wait_for_log("the repository does not take WAL", PATIENCE);
    assert!(agent.stderr().contains("mounted"), "the hint says what to look at:\n{}", agent.stderr());
    assert!(!rig.repository().exists(), "an empty repository is not made in its place");
    assert!(rig.restart_lsn() >= acknowledged);
    move_back(&rig, &away);
    rig.wait_archived();
    agent.wait_for_log("the repository takes WAL again", PATIENCE);
    assert!(agent.terminate(PATIENCE).success());
    rig.wait_slot_is_where_the_archive_ends();
}

#[test]
fn a_repository_closed_to_us_is_said_and_waited_for() {
    let Some(major) = postgres::newest_major() else { return };
    let rig = rig(Server::builder(major).wal_segment_mib(1));
    fs::create_dir(rig.repository()).expect("a directory can be made");
    process::give_to_service_user(&rig.repository());
    let config = rig.config("seawall");
    let mut agent = Agent::start_as_service_user(&rig.scratch, ["run", "--config", config.to_str().expect("UTF-8")]);
    eventually(PATIENCE, "the slot reserves WAL", || rig.slot()?.restart_lsn);
    rig.write();
    rig.wait_archived();
    let find = Command::new("find").arg(rig.repository()).args(["-type", "d"]).output().expect("find runs");
    let directories: Vec<_> = String::from_utf8_lossy(&find.stdout).lines().map(PathBuf::from).collect();
    let chmod = |mode: u32| {
        for directory in &directories {
            // A tail's directory may have gone with its tails.
            let _ = fs::set_permissions(directory, fs::Permissions::from_mode(mode));
        }
    };
    chmod(0o500);
    rig.write();
    agent.wait_for_log("the repository does not take WAL", PATIENCE);
    assert!(agent.stderr().to_lowercase().contains("permission"), "{}", agent.stderr());
    chmod(0o700);
    rig.wait_archived();
    assert!(agent.terminate(PATIENCE).success());
}

#[test]
fn sigterm_with_a_dead_store_ends_within_its_grace_and_lies_to_nobody() {
    let Some(major) = postgres::newest_major() else { return };
    let mut rig = rig(Server::builder(major).wal_segment_mib(1));
    rig.settings.push_str("shutdown_grace = \"3s\"\n");
    let mut agent = working(&rig);
    let away = move_away(&rig);
    rig.write_much();
    agent.wait_for_log("reading pauses", PATIENCE);
    let status = agent.terminate(PATIENCE);
    assert!(status.success(), "what is not durable is in the slot, nothing is lost: {status}");
    assert!(agent.stderr().contains("the slot holds the rest"), "{}", agent.stderr());
    move_back(&rig, &away);
    assert!(rig.restart_lsn() <= rig.durable());
}

#[test]
fn a_second_sigterm_ends_at_once() {
    let Some(major) = postgres::newest_major() else { return };
    let mut rig = Rig::new(Server::builder(major).wal_segment_mib(1).start());
    rig.settings.push_str("shutdown_grace = \"1h\"\n");
    let mut agent = working(&rig);
    let away = move_away(&rig);
    rig.write();
    agent.wait_for_log("the repository does not take WAL", PATIENCE);
    agent.signal(Signal::TERM);
    agent.wait_for_log("a second signal ends at once", PATIENCE);
    assert!(agent.is_running());
    agent.signal(Signal::TERM);
    assert_eq!(agent.wait(PATIENCE).code(), Some(143));
    move_back(&rig, &away);
    assert!(rig.restart_lsn() <= rig.durable());
}
