//! The whole way: a server's commits through `seawall run` into a repository, and back through `wal-get` into a
//! server that knows nothing else.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use rustix::process::Signal;
use seawall::wal::Lsn;

use crate::support::archived::{Archived, create_journal, note, notes, zstd_decode};
use crate::support::on_every_major;
use crate::support::postgres::{self, Installation, Server, Stop};
use crate::support::process::{self, Reaped, Scratch};

/// For an agent to end, or to find its server again.
const AGENT_DEADLINE: Duration = process::DEADLINE;
/// The promise is that a stop never hangs; how long it takes on a busy machine is not the point.
const STOP_PATIENCE: Duration = process::DEADLINE;

/// A record over several segments of 1 MiB.
const LARGE_RECORD: &str = "select pg_logical_emit_message(true, 'large', repeat('x', 3000000))";

on_every_major!(a_destroyed_server_comes_back_from_the_archive_alone);
fn a_destroyed_server_comes_back_from_the_archive_alone(major: u32) {
    let mut server = Server::builder(major).wal_segment_mib(1).start();
    let archive = Archived::of(&server);
    let mut agent = archive.streaming_agent();
    let backup = server.base_backup_without_wal();
    create_journal(&server);
    server.pgbench_init(1);

    let load = server.pgbench_background(2, 300);
    note(&server, "with an agent");
    server.sql(LARGE_RECORD);
    println!("PostgreSQL {major}: {}", measured_lag(&server));
    agent.kill9();
    note(&server, "without an agent");
    server.sql(LARGE_RECORD);
    server.switch_wal();
    note(&server, "in a new segment");
    let mut agent = archive.streaming_agent();
    server.sql(LARGE_RECORD);
    for round in 0..10 {
        note(&server, &format!("with another agent, {round}"));
    }
    drop(load);
    server.wait_no_load();
    server.sql("select pg_logical_emit_message(false, 'last', 'flushed by the commit after it')");
    note(&server, "the last one");
    archive.wait_acknowledged(&server);

    let before = contents(&server);
    server.kill9();
    drop(server);
    let restored = backup.recover(&archive.restore_command(&[])).start_recovered().expect("the archive has all of it");
    assert_eq!(notes(&restored).last().map(String::as_str), Some("the last one"));
    assert_eq!(contents(&restored), before);
    assert_eq!(restored.timeline(), 2, "it reached the end and was promoted");
    archive.assert_no_gaps();
    assert!(agent.terminate(AGENT_DEADLINE).success(), "an agent without a server stops when it is told to");
}

/// Everything the load could have changed.
fn contents(server: &Server) -> Vec<Vec<String>> {
    server.sql(
        "select 'journal', count(*), max(id), 0 from journal \
         union all select 'history', count(*), 0, coalesce(sum(delta), 0) from pgbench_history \
         union all select 'accounts', count(*), 0, sum(abalance) from pgbench_accounts \
         union all select 'branches', count(*), 0, sum(bbalance) from pgbench_branches",
    )
}

/// From a commit to the slot's position beyond it. Measured, not judged: the machine has other work.
fn measured_lag(server: &Server) -> String {
    let rounds = 8;
    server.sql("create table lag (ms float8)");
    server.sql(&format!(
        "do $$ declare lsn pg_lsn; began timestamptz; begin
           for i in 1..{rounds} loop
             insert into journal (note) values ('measured'); commit;
             began := clock_timestamp(); lsn := pg_current_wal_flush_lsn();
             while (select restart_lsn < lsn from pg_replication_slots where slot_name = 'seawall')
               and clock_timestamp() < began + interval '20 s' loop perform pg_sleep(0.005); end loop;
             insert into lag values (1000 * extract(epoch from clock_timestamp() - began));
             perform pg_sleep(0.07);
           end loop;
         end $$"
    ));
    let row = server.sql("select round(min(ms)), round(avg(ms)), round(max(ms)) from lag").remove(0);
    format!("commit to slot, {rounds} times under load: least {} ms, mean {} ms, most {} ms", row[0], row[1], row[2])
}

// --- The same bytes as PostgreSQL's own tool -----------------------------------------------------------------------

#[test]
fn segments_equal_those_of_pg_receivewal() {
    for major in [15, 18].into_iter().filter(|&major| postgres::is_installed(major)) {
        let server = Server::builder(major).wal_segment_mib(1).start();
        server.create_slot("reference");
        let directory = Scratch::new();
        let mut receivewal = Installation::of(major).expect("it is installed").command("pg_receivewal");
        receivewal.args(["--slot=reference", "--no-loop", "-d", &server.conninfo(), "-D"]).arg(directory.path());
        let child = receivewal.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let receivewal = Reaped(child.expect("pg_receivewal starts"));
        let archive = Archived::of(&server);
        let _agent = archive.streaming_agent();

        server.pgbench_init(1);
        server.sql(LARGE_RECORD);
        server.switch_wal();
        server.pgbench_transactions(50);
        server.sql(LARGE_RECORD);
        let last = server.current_segment();
        server.switch_wal();
        note_somewhere(&server);
        archive.wait_acknowledged(&server);
        let reference = |name: &str| directory.join(name);
        process::eventually(AGENT_DEADLINE, "pg_receivewal completes a segment", || {
            reference(&last).exists().then_some(())
        });
        receivewal.signal(Signal::INT);

        let segments = sealed_files(&archive);
        let theirs: Vec<String> = complete_files(directory.path());
        let ours: Vec<&String> = segments.keys().collect();
        assert!(ours.len() > 10, "{ours:?}");
        assert_eq!(ours, theirs.iter().collect::<Vec<_>>(), "on PostgreSQL {major}");
        for (name, path) in &segments {
            let same = zstd_decode(path) == fs::read(reference(name)).expect("it was listed");
            assert!(same, "{name} differs from pg_receivewal's on PostgreSQL {major}");
        }
    }
}

/// WAL in the segment after a switch.
fn note_somewhere(server: &Server) {
    create_journal(server);
    note(server, "after the switch");
}

/// Files with a segment's name: pg_receivewal's others end in `.partial`.
fn complete_files(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).expect("it can be listed");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("it can be listed").file_name().into_string().expect("names are text"))
        .collect();
    names.retain(|name| name.len() == 24);
    names.sort();
    names
}

/// The sealed segments' objects, found as somebody without Seawall would.
fn sealed_files(archive: &Archived) -> BTreeMap<String, PathBuf> {
    let files = tree(&archive.repository()).into_keys();
    let segment = |path: PathBuf| {
        let name = path.file_name()?.to_str()?.strip_suffix(".zst")?.to_owned();
        (name.len() == 24 && name.bytes().all(|byte| byte.is_ascii_hexdigit())).then_some((name, path))
    };
    files.filter_map(segment).collect()
}

// --- A server that stops -------------------------------------------------------------------------------------------

#[test]
fn pg13_stops_with_an_agent_and_is_found_again() {
    stops_with_an_agent_and_is_found_again(13);
}

#[test]
fn pg15_stops_with_an_agent_and_is_found_again() {
    stops_with_an_agent_and_is_found_again(15);
}

#[test]
fn pg18_stops_with_an_agent_and_is_found_again() {
    stops_with_an_agent_and_is_found_again(18);
}

fn stops_with_an_agent_and_is_found_again(major: u32) {
    if !postgres::is_installed(major) {
        return;
    }
    // A stop waits for the agent, and is not ended by the server's patience with it.
    let builder = Server::builder(major).wal_segment_mib(1).setting("wal_keep_size", "256MB");
    let mut server = builder.setting("wal_sender_timeout", "30min").start();
    let archive = Archived::of(&server);
    let mut agent = archive.streaming_agent();
    create_journal(&server);
    server.pgbench_init(1);
    archive.wait_acknowledged(&server);

    stop_and_start(&mut server, &archive, Stop::Fast, "idle");
    let load = server.pgbench_background(4, 300);
    thread::sleep(Duration::from_secs(1));
    stop_and_start(&mut server, &archive, Stop::Fast, "under load");
    drop(load);
    stop_and_start(&mut server, &archive, Stop::Smart, "smart and idle");

    // A smart stop lets sessions finish: what they still write must not be lost.
    let mut session = Installation::newest_with("psql").command("psql");
    let slow = "select pg_sleep(2); insert into journal (note) values ('while it stops')";
    session.args(["-X", "-d", &server.conninfo(), "-c", slow]).stdout(Stdio::null());
    let session = Reaped(session.spawn().expect("psql starts"));
    process::eventually(AGENT_DEADLINE, "the session is at work", || {
        let at_work = "select count(*) from pg_stat_activity where query like 'select pg_sleep(2)%'";
        (server.value(at_work) == "1").then_some(())
    });
    stop_and_start(&mut server, &archive, Stop::Smart, "smart with a session");
    drop(session);
    assert!(notes(&server).contains(&"while it stops".to_owned()));

    archive.wait_acknowledged(&server);
    assert!(agent.is_running(), "one agent outlives all of it");
    let compared = archive.compare_with_wal_of(&server);
    assert!(compared.segments > 10 && compared.tail_bytes > 0, "{compared:?}");
    archive.assert_no_gaps();
}

fn stop_and_start(server: &mut Server, archive: &Archived, how: Stop, when: &str) {
    server.begin_stop(how);
    server.wait_stopped(STOP_PATIENCE);
    let durable = archive.durable(1);
    server.start();
    // A clean start writes no checkpoint of its own: this one is the stop's, the last record before it.
    let shutdown: Lsn = server.value("select checkpoint_lsn from pg_control_checkpoint()").parse().expect("an LSN");
    assert!(durable > shutdown, "{when}: the stop's checkpoint at {shutdown} was not waited for: {durable} is durable");
    let slot = "select restart_lsn from pg_replication_slots where slot_name = 'seawall'";
    let slot: Lsn = server.value(slot).parse().expect("an LSN");
    assert!(slot <= archive.durable(1), "{when}: the slot is at {slot}, {durable} was durable");
    note(server, when);
    archive.wait_acknowledged(server);
}

// --- A server that does nothing ------------------------------------------------------------------------------------

#[test]
fn an_idle_server_costs_no_writes() {
    const WATCHED: Duration = Duration::from_secs(20);
    let Some(major) = postgres::newest_major() else { return };
    let builder = Server::builder(major).wal_segment_mib(1);
    let server = builder.setting("autovacuum", "off").setting("checkpoint_timeout", "1h").start();
    let archive = Archived::of(&server);
    let mut agent = archive.streaming_agent();
    server.pgbench_init(1);
    // The server itself logs its running transactions some seconds after the last write, and superfluous objects go
    // after the acknowledgement: from some moment on both leave the repository alone.
    let mut seen = None;
    for _ in 0..10 {
        archive.wait_acknowledged(&server);
        let now = (server.flush_lsn(), tree(&archive.repository()));
        if seen.as_ref() == Some(&now) {
            assert!(agent.is_running());
            return;
        }
        seen = Some(now);
        thread::sleep(WATCHED);
    }
    panic!("the repository was touched again and again, or the server was never idle");
}

/// Inode, size and times of everything below a directory, and its own.
fn tree(directory: &Path) -> BTreeMap<PathBuf, (u64, u64, i64, i64, i64, i64)> {
    let mut found = BTreeMap::new();
    let mut open = vec![directory.to_owned()];
    while let Some(path) = open.pop() {
        let Ok(data) = fs::symlink_metadata(&path) else { continue };
        if data.is_dir() {
            // One that has just been removed holds nothing.
            open.extend(fs::read_dir(&path).into_iter().flatten().flatten().map(|entry| entry.path()));
        }
        let times = (data.mtime(), data.mtime_nsec(), data.ctime(), data.ctime_nsec());
        found.insert(path, (data.ino(), data.size(), times.0, times.1, times.2, times.3));
    }
    found
}
