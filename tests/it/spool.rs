//! The spool: memory's overflow while the repository takes nothing, and the journal of `acknowledge = "spool"`. A
//! backlog costs disk, not memory and not the connection; what was acknowledged outlives the agent and the server.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use seawall::wal::Lsn;

use crate::support::agent::Agent;
use crate::support::archived::{Archived, create_journal, note, notes, released_slot};
use crate::support::postgres::{self, Server};
use crate::support::process::{self, Scratch};
use crate::support::rig::resident_bytes;

const DEADLINE: Duration = process::DEADLINE;
/// Long enough for an agent that hardly gets a processor, short enough for a test to outlast it.
const WAL_SENDER_TIMEOUT: &str = "12s";
/// Nothing listens there.
const NOBODY: &str = "host=127.0.0.1 port=9 user=nobody dbname=postgres connect_timeout=2";

/// An archive with a spool.
struct Spooled {
    archive: Archived,
    conninfo: String,
    lines: String,
    limit: String,
    place: Scratch,
}

impl Spooled {
    /// `lines` go into the cluster's table.
    fn of(server: &Server, limit: &str, lines: &str) -> Spooled {
        let spooled = Spooled {
            archive: Archived::of(server),
            conninfo: server.conninfo(),
            lines: lines.to_string(),
            limit: limit.to_string(),
            place: Scratch::new(),
        };
        spooled.point_at(&server.conninfo());
        spooled
    }

    fn point_at(&self, conninfo: &str) {
        self.archive.point_at(conninfo);
        self.archive.configure(&self.lines);
        let mut text = fs::read_to_string(self.archive.config()).expect("the configuration can be read");
        text.push_str(&format!("\n[spool]\npath = \"{}\"\nlimit = \"{}\"\n", self.path().display(), self.limit));
        fs::write(self.archive.config(), text).expect("a configuration can be written");
    }

    fn path(&self) -> PathBuf {
        self.place.join("spool")
    }

    /// Files of WAL, in order, whose names end in this.
    fn files(&self, extension: &str) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut directories = vec![self.path()];
        while let Some(directory) = directories.pop() {
            for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                match entry.path() {
                    path if path.is_dir() => directories.push(path),
                    path if path.to_string_lossy().ends_with(extension) => found.push(path),
                    _ => {}
                }
            }
        }
        found.sort();
        found
    }

    fn wait_used(&self, bytes: u64) {
        process::eventually(DEADLINE, "the spool fills", || {
            let length = |path: PathBuf| fs::metadata(path).map_or(0, |found| found.len());
            (self.files(".zst").into_iter().map(length).sum::<u64>() >= bytes).then_some(())
        });
    }

    fn wait_empty(&self) {
        process::eventually(DEADLINE, "the spool empties", || self.files(".zst").is_empty().then_some(()));
    }

    /// The repository takes nothing until [`Spooled::open`]: the agent is the service user, whom a mode binds.
    fn close(&self) {
        self.set_mode(0o500);
    }

    fn open(&self) {
        self.set_mode(0o700);
    }

    fn set_mode(&self, mode: u32) {
        let mut open = vec![self.archive.path_of(&self.archive.archive().lineage.wal())];
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

    /// An agent without a server, until everything promised is in the repository and the spool is empty.
    fn drain_alone(&self, promised: Lsn) {
        self.point_at(NOBODY);
        let mut agent = self.archive.agent();
        self.wait_empty();
        let held = self.archive.durable(1);
        assert!(held >= promised, "the server was told {promised}, the repository ends at {held}");
        agent.kill9();
        self.point_at(&self.conninfo);
    }
}

/// Writes about `mib` MiB of WAL that hardly shrinks, 8 MiB at a time.
fn write_wal(server: &Server, mib: u32) {
    let noise = "select string_agg(md5(random()::text || i), '') from generate_series(1, 262144) i";
    server.sql(&format!(
        "do $$ declare noise text := ({noise}); begin for i in 1..{} loop \
         perform pg_logical_emit_message(false, 'noise', noise); end loop; end $$",
        mib.div_ceil(8)
    ));
}

/// Who serves the slot.
fn walsender(server: &Server) -> String {
    server.value("select coalesce(active_pid, 0) from pg_replication_slots where slot_name = 'seawall'")
}

/// Until the server has had, from the connection there is, an answer it would otherwise have waited too long for.
fn wait_longer_than_the_server_waits(server: &Server) {
    let from = server.value("select clock_timestamp()");
    let outlived = format!(
        "select coalesce(max(reply_time) > timestamptz '{from}' + interval '{WAL_SENDER_TIMEOUT}', false) from pg_stat_replication"
    );
    process::eventually(DEADLINE, "the connection outlives the server's patience", || {
        (server.value(&outlived) == "t").then_some(())
    });
}

#[test]
fn a_backlog_goes_to_disk_and_the_connection_lives_on() {
    const BACKLOG_MIB: u32 = 1024;
    let Some(major) = postgres::newest_major() else { return };
    let builder = Server::builder(major).setting("wal_sender_timeout", WAL_SENDER_TIMEOUT);
    let server = builder.setting("max_wal_size", "4GB").start();
    let spooled = Spooled::of(&server, "10GiB", "memory = \"16MiB\"\n");
    let mut agent = spooled.archive.streaming_agent();
    create_journal(&server);
    spooled.archive.wait_acknowledged(&server);
    let connection = walsender(&server);
    spooled.close();
    write_wal(&server, BACKLOG_MIB);
    note(&server, "at the end of the backlog");
    spooled.wait_used(u64::from(BACKLOG_MIB) << 19);
    let told = server.value("select restart_lsn from pg_replication_slots");
    wait_longer_than_the_server_waits(&server);
    // For a moment, when the disk is slower than the server, it may pause; but not until the repository is back.
    process::eventually(DEADLINE, "reading goes on: the spool has room", || {
        let log = agent.stderr();
        (log.matches("reading pauses").count() == log.matches("reading goes on").count()).then_some(())
    });
    let peak = peak_bytes(agent.pid());
    assert_eq!(walsender(&server), connection, "the connection was lost");
    assert_eq!(server.value("select restart_lsn from pg_replication_slots"), told, "nothing was stored meanwhile");
    let log = agent.stderr();
    assert!(!log.contains("the repository takes WAL again"), "it is looked at meanwhile, but takes nothing");
    assert!(peak < 160 << 20, "{} MiB resident at the peak", peak >> 20);
    println!("peak {} MiB, now {} MiB", peak >> 20, resident_bytes(agent.pid()) >> 20);
    spooled.open();
    spooled.archive.wait_acknowledged(&server);
    assert_eq!(walsender(&server), connection, "the connection was lost");
    assert!(agent.is_running());
    let compared = spooled.archive.compare_with_wal_of(&server);
    assert!(compared.segments as u32 > BACKLOG_MIB / 16 - 8, "{compared:?}");
    spooled.archive.assert_no_gaps();
    // Although the server writes nothing more. What is left is of the segment that is still being written.
    let unfinished = server.value("select pg_walfile_name(pg_current_wal_insert_lsn())");
    process::eventually(DEADLINE, "the spool empties", || {
        let is_of_it =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&unfinished));
        spooled.files(".zst").iter().all(is_of_it).then_some(())
    });
}

/// VmHWM: the most that was ever resident.
fn peak_bytes(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process is there");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("Linux says so");
    let kib: u64 = line.split_whitespace().nth(1).expect("a number follows").parse().expect("a number");
    kib << 10
}

#[test]
fn overflow_is_brought_into_the_repository_after_a_crash() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let spooled = Spooled::of(&server, "1GiB", "memory = \"8MiB\"\n");
    let mut agent = spooled.archive.streaming_agent();
    create_journal(&server);
    spooled.archive.wait_acknowledged(&server);
    let before = spooled.archive.durable(1);
    spooled.close();
    write_wal(&server, 128);
    spooled.wait_used(40 << 20);
    agent.kill9();
    spooled.open();
    spooled.drain_alone(before + (30 << 20));
    note(&server, "after the crash");
    let mut agent = spooled.archive.streaming_agent();
    spooled.archive.wait_acknowledged(&server);
    assert!(agent.is_running());
    spooled.archive.compare_with_wal_of(&server);
    spooled.archive.assert_no_gaps();
}

#[test]
fn a_full_spool_stops_reading_and_nothing_else() {
    let Some(major) = postgres::newest_major() else { return };
    let builder = Server::builder(major).wal_segment_mib(1).setting("wal_sender_timeout", WAL_SENDER_TIMEOUT);
    let server = builder.start();
    let spooled = Spooled::of(&server, "64MiB", "memory = \"8MiB\"\n");
    let mut agent = spooled.archive.streaming_agent();
    create_journal(&server);
    spooled.archive.wait_acknowledged(&server);
    let connection = walsender(&server);
    spooled.close();
    write_wal(&server, 256);
    agent.wait_for_log("the spool is full", DEADLINE);
    agent.wait_for_log("reading pauses", DEADLINE);
    wait_longer_than_the_server_waits(&server);
    assert_eq!(walsender(&server), connection, "the connection was lost");
    spooled.open();
    spooled.archive.wait_acknowledged(&server);
    assert_eq!(walsender(&server), connection, "the connection was lost");
    assert!(agent.is_running());
    spooled.archive.compare_with_wal_of(&server);
    spooled.archive.assert_no_gaps();
}

/// A file system of its own for the spool, unmounted at the end.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    /// `None` where we may not mount one.
    fn mount(path: &'a Path, mib: u32) -> Option<SmallDisk<'a>> {
        fs::create_dir_all(path).expect("a mount point can be made");
        let mut command = std::process::Command::new("mount");
        command.args(["-t", "tmpfs", "-o", &format!("size={mib}m,mode=0777"), "none"]).arg(path);
        let mounted = process::run(&mut command, DEADLINE).status.success();
        if !mounted {
            println!("skipped: a small file system cannot be mounted here");
        }
        mounted.then_some(SmallDisk(path))
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        let _ = process::run(std::process::Command::new("umount").args(["-l"]).arg(self.0), DEADLINE);
    }
}

#[test]
fn a_full_disk_under_the_journal_falls_back_to_the_repository() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let spooled = Spooled::of(&server, "1GiB", "memory = \"8MiB\"\nacknowledge = \"spool\"\n");
    let path = spooled.path();
    let Some(_disk) = SmallDisk::mount(&path, 24) else { return };
    let mut agent = spooled.archive.streaming_agent();
    assert!(agent.stderr().contains("it is a tmpfs"), "a volatile spool is warned of");
    create_journal(&server);
    spooled.archive.wait_acknowledged(&server);
    spooled.close();
    write_wal(&server, 96);
    agent.wait_for_log("only what the repositories hold is acknowledged", DEADLINE);
    assert!(agent.stderr().contains("No space left"), "the reason is said");
    spooled.open();
    spooled.archive.wait_acknowledged(&server);
    // It leaves the disk alone for a while, then tries with the next frame there is.
    process::eventually(DEADLINE, "the spool takes WAL again", || {
        write_wal(&server, 8);
        agent.stderr().contains("the spool takes WAL again").then_some(())
    });
    spooled.archive.wait_acknowledged(&server);
    assert!(agent.is_running());
    spooled.archive.compare_with_wal_of(&server);
    spooled.archive.assert_no_gaps();
}

#[test]
fn the_journal_is_acknowledged_while_the_repository_is_down_and_outlives_agent_and_server() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let spooled = Spooled::of(&server, "1GiB", "acknowledge = \"spool\"\n");
    let mut agent = spooled.archive.streaming_agent();
    let backup = server.base_backup_without_wal();
    create_journal(&server);
    spooled.archive.wait_acknowledged(&server);
    spooled.close();
    let stored = spooled.archive.durable(1);
    for count in 1..=20 {
        note(&server, &format!("while the repository is down: {count}"));
    }
    write_wal(&server, 24);
    note(&server, "the last one");
    spooled.archive.wait_acknowledged(&server);
    assert_eq!(spooled.archive.durable(1), stored, "the repository took something");
    agent.kill9();
    let promised = released_slot(&server);
    assert!(promised > stored + (20 << 20), "{promised} was acknowledged, {stored} stored");
    let expected = notes(&server);
    drop(server);
    spooled.open();
    spooled.drain_alone(promised);
    let command = spooled.archive.restore_command(&[]);
    let restored = backup.recover(&command).start_recovered().expect("the archive has all of it");
    assert_eq!(notes(&restored), expected);
}

#[test]
fn an_agent_killed_at_any_moment_has_promised_nothing_that_spool_and_repository_do_not_hold() {
    const KILLS: u32 = 12;
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).setting("wal_keep_size", "4GB").start();
    let spooled = Spooled::of(&server, "2GiB", "memory = \"8MiB\"\nacknowledge = \"spool\"\n");
    let mut agent = spooled.archive.streaming_agent();
    let backup = server.base_backup_without_wal();
    create_journal(&server);
    server.pgbench_init(1);
    let load = server.pgbench_background(2, 300);
    for kill in 1..=KILLS {
        let is_closed = kill % 3 != 0;
        if is_closed {
            spooled.close();
        }
        thread::sleep(Duration::from_millis(fastrand::u64(50..900)));
        note(&server, &format!("before kill {kill}"));
        if kill % 4 == 0 {
            write_wal(&server, 32);
        }
        agent.kill9();
        let promised = released_slot(&server);
        spooled.open();
        // While it drains, too.
        spooled.point_at(NOBODY);
        let mut draining = spooled.archive.agent();
        thread::sleep(Duration::from_millis(fastrand::u64(20..400)));
        draining.kill9();
        spooled.drain_alone(promised);
        agent = spooled.archive.streaming_agent();
    }
    drop(load);
    server.wait_no_load();
    note(&server, "the last one");
    spooled.archive.wait_acknowledged(&server);
    assert!(agent.is_running());
    let compared = spooled.archive.compare_with_wal_of(&server);
    assert!(compared.segments > 10, "{compared:?}");
    spooled.archive.assert_no_gaps();
    assert!(spooled.files(".refused").is_empty(), "nothing was damaged");
    let expected = notes(&server);
    drop(server);
    let restored =
        backup.recover(&spooled.archive.restore_command(&[])).start_recovered().expect("the archive has all of it");
    assert_eq!(notes(&restored), expected);
}

/// Fills the spool, ends the agent, and damages a frame in the middle.
fn damaged(server: &Server, spooled: &Spooled) {
    let mut agent = spooled.archive.streaming_agent();
    create_journal(server);
    spooled.archive.wait_acknowledged(server);
    spooled.close();
    write_wal(server, 64);
    spooled.wait_used(20 << 20);
    agent.kill9();
    let files = spooled.files(".zst");
    let file = fs::OpenOptions::new().read(true).write(true).open(&files[files.len() / 2]).expect("it is there");
    let mut byte = [0];
    file.read_exact_at(&mut byte, 1000).expect("a frame is longer");
    file.write_all_at(&[byte[0] ^ 0x10], 1000).expect("it can be written");
    spooled.open();
}

fn settles_without_gaps(server: &Server, spooled: &Spooled, agent: &mut Agent) {
    spooled.archive.wait_acknowledged(server);
    assert!(agent.is_running());
    spooled.archive.compare_with_wal_of(server);
    spooled.archive.assert_no_gaps();
}

#[test]
fn damaged_overflow_is_received_again() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let spooled = Spooled::of(&server, "1GiB", "memory = \"8MiB\"\n");
    damaged(&server, &spooled);
    let mut agent = spooled.archive.streaming_agent();
    agent.wait_for_log("is received again", DEADLINE);
    settles_without_gaps(&server, &spooled, &mut agent);
    assert!(spooled.files(".refused").is_empty());
}

#[test]
fn a_damaged_journal_is_kept_and_said() {
    let Some(major) = postgres::newest_major() else { return };
    // The server has it still, although it was told that it need not.
    let server = Server::builder(major).wal_segment_mib(1).setting("wal_keep_size", "1GB").start();
    let spooled = Spooled::of(&server, "1GiB", "memory = \"8MiB\"\nacknowledge = \"spool\"\n");
    damaged(&server, &spooled);
    let mut agent = spooled.archive.streaming_agent();
    agent.wait_for_log("WAL in the spool cannot be used", DEADLINE);
    agent.wait_for_log("which neither repository nor spool holds", DEADLINE);
    settles_without_gaps(&server, &spooled, &mut agent);
    assert!(!spooled.files(".refused").is_empty(), "it is kept");
}

#[test]
fn wal_of_another_cluster_is_neither_used_nor_removed() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let spooled = Spooled::of(&server, "1GiB", "memory = \"8MiB\"\n");
    let mut agent = spooled.archive.streaming_agent();
    create_journal(&server);
    spooled.archive.wait_acknowledged(&server);
    spooled.close();
    write_wal(&server, 32);
    spooled.wait_used(4 << 20);
    agent.kill9();
    spooled.open();
    let files = spooled.files(".zst");
    let marker = spooled.files("spool.json").remove(0);
    let text = fs::read_to_string(&marker).expect("it is there");
    for other in ["\"cluster\": \"other\"", "\"cluster\": \"main\", \"repositories\": []"] {
        let changed = text.replace("\"cluster\": \"main\"", other);
        // The last of two equal keys would count: there may be one list of repositories only.
        let changed = match other.contains("repositories") {
            true => changed.replacen("\"repositories\": [\n", "\"before\": [\n", 1),
            false => changed,
        };
        fs::write(&marker, changed).expect("it can be changed");
        let mut agent = spooled.archive.agent();
        assert_eq!(agent.wait(DEADLINE).code(), Some(78), "{}", agent.stderr());
        assert!(agent.stderr().contains("holds WAL of"), "{}", agent.stderr());
        assert_eq!(spooled.files(".zst"), files, "nothing is removed");
    }
    fs::write(&marker, text).expect("it can be changed back");
    let mut agent = spooled.archive.streaming_agent();
    settles_without_gaps(&server, &spooled, &mut agent);
}

#[test]
fn a_spool_that_cannot_be_written_is_done_without() {
    let Some(major) = postgres::newest_major() else { return };
    let server = Server::builder(major).wal_segment_mib(1).start();
    let spooled = Spooled::of(&server, "1GiB", "memory = \"8MiB\"\n");
    fs::create_dir(spooled.path()).expect("it can be made");
    fs::set_permissions(spooled.path(), fs::Permissions::from_mode(0o555)).expect("a mode can be set");
    let mut agent = spooled.archive.streaming_agent();
    assert!(agent.stderr().contains("going on without a spool"), "{}", agent.stderr());
    create_journal(&server);
    settles_without_gaps(&server, &spooled, &mut agent);
    drop(agent);
    // With the contract it may hold what nobody else does: nothing goes on without it.
    let journal = Spooled { lines: "acknowledge = \"spool\"\n".into(), ..spooled };
    journal.point_at(&server.conninfo());
    let mut agent = journal.archive.agent();
    assert_eq!(agent.wait(DEADLINE).code(), Some(77), "{}", agent.stderr());
}
