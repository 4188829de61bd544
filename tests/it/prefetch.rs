//! WAL that is held ready ahead of replay: what PostgreSQL gets is what the server wrote, whatever happens to the helper.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use seawall::restore::marker::RestoreMarker;
use seawall::wal::{History, Lsn, SegmentName, TimelineId};

use crate::support::agent;
use crate::support::archived::{Archived, create_journal, note, notes};
use crate::support::postgres::{self, BaseBackup, Server};
use crate::support::process;
use crate::support::restored::{self, DataDir, ID, OTHER_ID};
use crate::support::s3::{Fault, Operation, Rule, S3Server};
use crate::support::s3_rig::{Reach, S3Rig};

const DEADLINE: Duration = process::DEADLINE;

fn primary(major: u32, segment_mib: u32) -> Server {
    Server::builder(major)
        .wal_segment_mib(segment_mib)
        .setting("wal_keep_size", "2GB")
        .setting("min_wal_size", "256MB")
        .start()
}

/// Writes something over several segments of 1 MiB, and says so in the journal.
fn write(server: &Server, what: &str) {
    server.sql("select pg_logical_emit_message(true, 'large', repeat('x', 2500000))");
    note(server, what);
}

/// Nearly empty segments, as an `archive_timeout` makes them.
fn switches(server: &Server, count: usize) {
    for round in 0..count {
        note(server, &format!("switch {round}"));
        server.switch_wal();
    }
}

/// The sealed segments of timeline 1 in an archive, and the server's own bytes of them.
fn sealed(archive: &Archived, server: &Server) -> BTreeMap<String, Vec<u8>> {
    let catalog = archive.catalog();
    let names =
        catalog.timelines[&TimelineId(1)].iter().flat_map(|directory| directory.indexed().map(|digest| digest.segment));
    let files =
        names.filter_map(|name| Some((name.to_string(), fs::read(server.wal_dir().join(name.to_string())).ok()?)));
    files.collect()
}

fn latest_marker(archive: &Archived, start: Lsn, path: &History) -> RestoreMarker {
    let catalog = archive.catalog();
    restored::marker(&catalog.lineage, catalog.segment_size(), path, start, Some(Lsn::MAX))
}

fn root() -> History {
    History::root(TimelineId(1))
}

fn start_of(archive: &Archived, name: &str) -> Lsn {
    let size = archive.catalog().segment_size();
    size.start_of(name.parse::<SegmentName>().unwrap().number(size).unwrap())
}

/// `seawall wal-get --restore ID` from this archive; a name and a destination follow.
fn wal_get(archive: &Archived, arguments: &[&str]) -> Command {
    let mut command = agent::command(["wal-get", "--restore", &ID.to_string(), "--config"]);
    command.arg(archive.config()).args(arguments);
    command
}

fn end_restore(archive: &Archived, directory: &DataDir) {
    let mut command = agent::command(["wal-get", "--restore-end", &ID.to_string(), "--config"]);
    process::run_ok(command.arg(archive.config()).current_dir(directory.path()), DEADLINE);
}

/// An archive with some dozens of segments, most of them nearly empty, and its server.
fn archived(major: u32) -> (Server, Archived) {
    let server = primary(major, 1);
    let archive = Archived::of(&server);
    let mut agent = archive.streaming_agent();
    create_journal(&server);
    for round in 0..3 {
        write(&server, &format!("round {round}"));
        switches(&server, 12);
    }
    note(&server, "in an unfinished segment");
    archive.wait_acknowledged(&server);
    assert!(agent.terminate(DEADLINE).success());
    (server, archive)
}

#[test]
fn what_is_held_ready_is_what_the_server_wrote() {
    let Some(major) = postgres::newest_major() else { return };
    let (server, archive) = archived(major);
    let segments = sealed(&archive, &server);
    assert!(segments.len() > 35, "{}", segments.len());
    let names: Vec<&String> = segments.keys().collect();
    let directory = DataDir::with(&latest_marker(&archive, start_of(&archive, names[0]), &root()));
    let leftover = directory.path().join(format!("pg_wal/.seawall-{OTHER_ID}"));
    fs::create_dir(&leftover).unwrap();
    fs::write(leftover.join("000000010000000000000001-00000000"), "of an earlier restore").unwrap();

    // The first request goes without; from then on at most so much is ahead.
    let ahead = ["--ahead", "8MiB"];
    directory.ask(&mut wal_get(&archive, &ahead), names[0]).is(&segments[names[0]]);
    let helper = restored::helper(directory.path());
    for at in 1..names.len() {
        process::eventually(DEADLINE, "the window is full", || {
            let ready = restored::ready(directory.path());
            let wanted: Vec<&String> = names[at..].iter().take(8).copied().collect();
            (ready.iter().collect::<Vec<_>>() == wanted).then_some(())
        });
        // A configuration that is not there: none is read for what is ready.
        let mut fast = agent::command(["wal-get", "--config", "/nowhere", "--restore", &ID.to_string()]);
        directory.ask(&mut fast, names[at]).is(&segments[names[at]]);
    }
    assert_eq!(restored::helpers(directory.path()), [helper], "one helper served all of it");
    assert!(!leftover.exists(), "what an earlier restore left is removed");
    // Beyond the end: the unfinished segment, then nothing, then what never was.
    let mut beyond: SegmentName = names[names.len() - 1].parse().unwrap();
    beyond.low += 1;
    assert_eq!(directory.ask(&mut wal_get(&archive, &ahead), &beyond.to_string()).code, Some(0));
    beyond.low += 1;
    directory.ask(&mut wal_get(&archive, &ahead), &beyond.to_string()).is_absent();
    directory.ask(&mut wal_get(&archive, &ahead), "00000002.history").is_absent();
    // Recovery goes back: what was handed over is had again.
    directory.ask(&mut wal_get(&archive, &ahead), names[3]).is(&segments[names[3]]);
    directory.ask(&mut wal_get(&archive, &ahead), names[4]).is(&segments[names[4]]);
    assert_eq!(restored::helpers(directory.path()), [helper]);

    end_restore(&archive, &directory);
    restored::wait_no_helper(directory.path());
    assert!(!directory.prefetch().exists() && RestoreMarker::read(directory.path()).unwrap().is_none());
    end_restore(&archive, &directory); // once more: nothing to do
}

#[test]
fn no_fate_of_the_helper_changes_what_is_delivered() {
    let Some(major) = postgres::newest_major() else { return };
    let (server, archive) = archived(major);
    let segments = sealed(&archive, &server);
    let names: Vec<&String> = segments.keys().collect();
    let directory = DataDir::with(&latest_marker(&archive, start_of(&archive, names[0]), &root()));
    let ask = |at: usize| directory.ask(&mut wal_get(&archive, &[]), names[at]).is(&segments[names[at]]);
    let wait_ready = |name: &String| {
        process::eventually(DEADLINE, "it is held ready", || {
            restored::ready(directory.path()).contains(name).then_some(())
        })
    };
    ask(0);

    // Killed with files ready: they are used, and the next miss starts another.
    wait_ready(names[2]);
    restored::kill(restored::helper(directory.path()));
    ask(1);
    for name in restored::ready(directory.path()) {
        for entry in fs::read_dir(directory.prefetch()).unwrap().map(|entry| entry.unwrap().path()) {
            if entry.file_name().unwrap().to_str().unwrap().starts_with(&name) {
                fs::remove_file(entry).unwrap();
            }
        }
    }
    ask(2);
    wait_ready(names[3]);

    // Damaged on this disk: found, removed, had again.
    let damaged = fs::read_dir(directory.prefetch()).unwrap().map(|entry| entry.unwrap().path());
    let damaged = damaged.filter(|path| path.to_str().unwrap().contains(names[3].as_str()));
    damaged.for_each(|path| fs::File::options().write(true).open(path).unwrap().write_all_at(b"xx", 9000).unwrap());
    ask(3);

    // Stopped: not waited for longer than a living one takes to say that it lives. (1 was handed over before.)
    wait_ready(names[4]);
    let helper = restored::helper(directory.path());
    rustix::process::kill_process(helper, Signal::STOP).unwrap();
    ask(1);
    ask(4);
    assert_eq!(restored::helpers(directory.path()), [helper], "no second one beside it");
    restored::kill(helper);

    // A directory that cannot be written to, as a file in its place: everything without a helper.
    fs::remove_dir_all(directory.prefetch()).unwrap();
    fs::write(directory.prefetch(), "in the way").unwrap();
    for at in 5..8 {
        let asked = directory.ask(&mut wal_get(&archive, &[]), names[at]);
        asked.is(&segments[names[at]]);
        assert!(asked.stderr.contains("could not start fetching ahead"), "{}", asked.stderr);
    }
    fs::remove_file(directory.prefetch()).unwrap();

    // The marker goes, and with it the helper and its directory.
    ask(8);
    restored::helper_at_work(directory.path());
    fs::remove_file(directory.path().join("seawall.restore.json")).unwrap();
    restored::wait_no_helper(directory.path());
    assert!(!directory.prefetch().exists());
}

#[test]
fn a_marker_counts_for_its_own_restore_only() {
    let Some(major) = postgres::newest_major() else { return };
    let (server, archive) = archived(major);
    let segments = sealed(&archive, &server);
    let names: Vec<&String> = segments.keys().collect();
    let start = start_of(&archive, names[0]);
    let marker = latest_marker(&archive, start, &root());
    let end = start_of(&archive, names[5]);
    let directory = DataDir::with(&RestoreMarker { end_lsn: Some(end), ..marker.clone() });
    let of = |id: &str, name: &str| {
        let mut command = agent::command(["wal-get", "--ahead", "0", "--restore", id, "--config"]);
        directory.ask(command.arg(archive.config()), name)
    };
    of(&ID.to_string(), names[4]).is(&segments[names[4]]);
    of(&ID.to_string(), names[5]).is_absent();
    assert!(!directory.prefetch().exists(), "nothing is fetched ahead");
    of(&OTHER_ID.to_string(), names[5]).is(&segments[names[5]]);
    // One that cannot be read is an error, not the newest line.
    fs::write(directory.path().join("seawall.restore.json"), "{").unwrap();
    let asked = of(&ID.to_string(), names[4]);
    assert_eq!(asked.code, Some(255));
    assert!(asked.stderr.contains("seawall.restore.json does not tell about a restore"), "{}", asked.stderr);
    // A path that has left this timeline.
    let forked = History::parse(TimelineId(2), format!("1\t{end}\tx\n").as_bytes()).unwrap();
    latest_marker(&archive, start, &forked).write(directory.path()).unwrap();
    of(&ID.to_string(), names[4]).is(&segments[names[4]]);
    of(&ID.to_string(), names[5]).is_absent();
    // What is said without a name, or with two, is never "not in the archive".
    for words in [&["--restore", "beef"][..], &["--prefetch"], &["--restore-end", "x"], &["--from", "x", "--prefetch"]]
    {
        let output = agent::seawall([&["wal-get"], words, &[names[0], "x"]].concat());
        assert_eq!(output.status.code(), Some(255), "{words:?}");
    }
}

// --- Real recoveries -----------------------------------------------------------------------------------------------

/// A recovery of this backup as a restore would set it up.
fn recovering(backup: &BaseBackup, archive: &Archived, path: &History) -> postgres::Builder {
    let marker = latest_marker(archive, restored::start_lsn(&backup.path()), path);
    marker.write(&backup.path()).expect("a marker can be written");
    let restore = archive.restore_command(&["--restore", &ID.to_string(), "--ahead", "64MiB"]);
    let end = restore.replace(" %f \"%p\"", "").replace("\"--restore\"", "\"--restore-end\"");
    let end = end.replace(" \"--ahead\" \"64MiB\"", "");
    backup
        .recover(&restore)
        .setting("min_wal_size", "256MB")
        .setting("recovery_end_command", &end)
        .setting("recovery_target_timeline", &path.timeline.to_string())
}

/// What a recovery with prefetch must leave behind, and nothing of its own.
fn assert_recovered(server: &Server, expected: &[String]) {
    assert_eq!(notes(server), expected);
    assert!(!server.data_dir().join("seawall.restore.json").exists(), "{}", server.log());
    restored::wait_no_helper(&server.data_dir());
    assert!(!restored::prefetch_of(&server.data_dir()).exists(), "{}", server.log());
}

#[test]
fn pg13_recovers_with_a_helper_that_is_killed_again_and_again() {
    recovers_with_a_helper_that_is_killed_again_and_again(13);
}

#[test]
fn pg18_recovers_with_a_helper_that_is_killed_again_and_again() {
    recovers_with_a_helper_that_is_killed_again_and_again(18);
}

fn recovers_with_a_helper_that_is_killed_again_and_again(major: u32) {
    if !postgres::is_installed(major) {
        return;
    }
    let server = primary(major, 1);
    let archive = Archived::of(&server);
    let mut agent = archive.streaming_agent();
    let backup = server.base_backup_without_wal();
    create_journal(&server);
    server.pgbench_init(2);
    for round in 0..4 {
        write(&server, &format!("round {round}"));
        switches(&server, 10);
    }
    archive.wait_acknowledged(&server);
    assert!(agent.terminate(DEADLINE).success());
    let expected = notes(&server);

    let mut copy = recovering(&backup, &archive, &root()).launch();
    let mut killed = 0;
    let pgdata = copy.data_dir();
    let is_over = || !pgdata.join("recovery.signal").exists();
    process::eventually(DEADLINE, "recovery ends", || {
        for helper in restored::helpers(&pgdata) {
            restored::kill(helper);
            killed += 1;
        }
        is_over().then_some(())
    });
    copy.await_recovered().expect("the archive has all of it");
    println!("PostgreSQL {major}: {killed} helpers killed");
    assert!(killed > 0);
    assert_recovered(&copy, &expected);
}

#[test]
fn pg14_recovers_segments_of_16_mib() {
    recovers_segments_of(14, 16, 24);
}

#[test]
fn pg18_recovers_segments_of_64_mib() {
    recovers_segments_of(18, 64, 8);
}

fn recovers_segments_of(major: u32, segment_mib: u32, count: usize) {
    if !postgres::is_installed(major) {
        return;
    }
    let server = primary(major, segment_mib);
    let archive = Archived::of(&server);
    let mut agent = archive.streaming_agent();
    let backup = server.base_backup_without_wal();
    create_journal(&server);
    switches(&server, count);
    archive.wait_acknowledged(&server);
    assert!(agent.terminate(DEADLINE).success());
    let recovered = recovering(&backup, &archive, &root()).start_recovered().expect("the archive has all of it");
    assert_recovered(&recovered, &notes(&server));
}

#[test]
fn a_recovery_crosses_forks_and_leaves_the_other_line_alone() {
    let Some(major) = postgres::newest_major() else { return };
    let mut old = primary(major, 1);
    let mut standby = Server::standby_of(&old).start();
    let archive = Archived::by_conninfo(&old.conninfo());
    let mut agent = archive.streaming_agent();
    let backup = old.base_backup_without_wal();
    create_journal(&old);
    write(&old, "before the fork");
    switches(&old, 5);
    standby.wait_replayed(old.flush_lsn());
    standby.promote();
    write(&old, "abandoned");
    switches(&old, 3);
    archive.wait_acknowledged(&old);
    let abandoned = notes(&old);
    assert!(agent.terminate(DEADLINE).success());
    old.kill9();
    archive.point_at(&standby.conninfo());
    let _agent = archive.streaming_agent();
    write(&standby, "on the new line");
    switches(&standby, 5);
    archive.wait_acknowledged(&standby);
    let expected = notes(&standby);

    let history = archive.catalog().histories[&TimelineId(2)].clone();
    let recovered = recovering(&backup, &archive, &history).start_recovered().expect("the archive has all of it");
    assert_recovered(&recovered, &expected);
    let recovered = recovering(&backup, &archive, &root()).start_recovered().expect("the old line is there whole");
    assert_recovered(&recovered, &abandoned);
}

// --- A store at a distance, and one that fails ---------------------------------------------------------------------

fn s3_wal_get(rig: &S3Rig<'_>, arguments: &[&str]) -> Command {
    let id = ID.to_string();
    rig.command(&[&["wal-get", "--restore", &id], arguments].concat())
}

#[test]
fn a_store_at_a_distance_is_asked_ahead_of_time_and_sparingly() {
    let Some(major) = postgres::newest_major() else { return };
    let server = primary(major, 1);
    let store = S3Server::start();
    let rig = S3Rig::new(&server, "seawall", Reach::of(&store));
    let mut agent = rig.start();
    agent.wait_for_log("streaming", DEADLINE);
    create_journal(&server);
    switches(&server, 40);
    note(&server, "in an unfinished segment");
    rig.wait_archived(&mut agent);
    assert!(agent.terminate(DEADLINE).success());
    let (lineage, size) = rig.lineage(&store);
    let names: Vec<String> = rig.sealed(&store);
    let theirs = |name: &String| fs::read(server.wal_dir().join(name)).expect("wal_keep_size keeps it");
    let number = names[0].parse::<SegmentName>().unwrap().number(size).unwrap();
    let marker = restored::marker(&lineage, size, &root(), size.start_of(number), None);
    let directory = DataDir::with(&marker);
    store.fault(Rule::new(Fault::Delay(Duration::from_millis(50))));

    directory.ask(&mut s3_wal_get(&rig, &[]), &names[0]).is(&theirs(&names[0]));
    let ready = |name: &String| restored::ready(directory.path()).contains(name).then_some(());
    for name in &names[1..] {
        process::eventually(DEADLINE, "it is held ready", || ready(name));
        directory.ask(&mut s3_wal_get(&rig, &[]), name).is(&theirs(name));
    }
    // A standby has all there is: the unfinished segment, then what is not there yet, every five seconds.
    let mut next: SegmentName = names[names.len() - 1].parse().unwrap();
    next.low += 1;
    assert_eq!(directory.ask(&mut s3_wal_get(&rig, &[]), &next.to_string()).code, Some(0));
    next.low += 1;
    directory.ask(&mut s3_wal_get(&rig, &[]), &next.to_string()).is_absent();
    let mut polls = BTreeMap::new();
    for (name, ahead) in [(next.to_string(), "1MiB"), ("00000002.history".to_owned(), "1MiB"), (next.to_string(), "0")]
    {
        if ahead == "0" {
            restored::kill(restored::helper(directory.path()));
        }
        // The first one reads what later ones remember.
        directory.ask(&mut s3_wal_get(&rig, &["--ahead", ahead]), &name).is_absent();
        store.forget_requests();
        let begun = Instant::now();
        directory.ask(&mut s3_wal_get(&rig, &["--ahead", ahead]), &name).is_absent();
        let seconds = begun.elapsed().as_secs() as usize;
        let requests: Vec<String> =
            store.requests().iter().map(|seen| format!("{:?} {} {}", seen.operation, seen.status, seen.key)).collect();
        println!("{name} is absent: {requests:#?}");
        polls.insert((name, ahead), (requests.len(), seconds));
    }
    println!("requests of a poll, and its seconds: {polls:?}");
    // Four or eight, beside what a helper does of its own accord each second; an archive that was read anew would take
    // dozens.
    let is_sparing = |(requests, seconds): &(usize, usize)| *requests <= 16 + 8 * seconds;
    assert!(polls.values().all(is_sparing), "{polls:?}");

    // A store that fails is an error of wal-get's, never the end of WAL; what is ready is handed over all the same.
    store.heal();
    store.fault(Rule::new(Fault::error(500, "InternalError")));
    let impatient = ["--patience", "500ms"];
    let asked = directory.ask(&mut s3_wal_get(&rig, &impatient), &next.to_string());
    assert_eq!((asked.code, asked.delivered), (Some(255), None), "{}", asked.stderr);
    let asked = directory.ask(&mut s3_wal_get(&rig, &impatient), "00000002.history");
    assert_eq!((asked.code, asked.delivered), (Some(255), None), "{}", asked.stderr);
    store.heal();
    directory.ask(&mut s3_wal_get(&rig, &[]), &next.to_string()).is_absent();
    restored::helper(directory.path());
    assert_eq!(store.count(Operation::PutObject), 0);
}

#[test]
fn a_store_that_fails_for_a_while_slows_a_helper_and_does_not_end_it() {
    let Some(major) = postgres::newest_major() else { return };
    let server = primary(major, 1);
    let store = S3Server::start();
    let rig = S3Rig::new(&server, "seawall", Reach::of(&store));
    let mut agent = rig.start();
    agent.wait_for_log("streaming", DEADLINE);
    create_journal(&server);
    switches(&server, 20);
    rig.wait_archived(&mut agent);
    assert!(agent.terminate(DEADLINE).success());
    let (lineage, size) = rig.lineage(&store);
    let names: Vec<String> = rig.sealed(&store);
    let theirs = |name: &String| fs::read(server.wal_dir().join(name)).expect("wal_keep_size keeps it");
    let number = names[0].parse::<SegmentName>().unwrap().number(size).unwrap();
    let marker = restored::marker(&lineage, size, &root(), size.start_of(number), Some(Lsn::MAX));
    let directory = DataDir::with(&marker);
    // Every third read is refused, and every seventh breaks off.
    store.fault(Rule::new(Fault::error(500, "InternalError")).on(Operation::GetObject).every(3));
    store.fault(Rule::new(Fault::ShortBody { missing: 10 }).on(Operation::GetObject).every(7));
    for name in &names {
        directory.ask(&mut s3_wal_get(&rig, &["--ahead", "4MiB"]), name).is(&theirs(name));
    }
    assert!(store.faulted() > 5);
    // Another one that was started while the first was not there yet ends by itself.
    process::eventually(DEADLINE, "one helper is at work", || {
        (restored::helpers(directory.path()).len() == 1).then_some(())
    });
}

#[test]
fn a_helper_does_not_outlive_the_server_it_works_for() {
    let Some(major) = postgres::newest_major() else { return };
    let (server, archive) = archived(major);
    let segments = sealed(&archive, &server);
    let names: Vec<&String> = segments.keys().collect();
    let directory = DataDir::with(&latest_marker(&archive, start_of(&archive, names[0]), &root()));
    let postmaster = process::Reaped(Command::new("sleep").arg("600").spawn().expect("sleep starts"));
    let pid_file = directory.path().join("postmaster.pid");
    fs::write(&pid_file, format!("{}\n/data\n", postmaster.0.id())).unwrap();
    directory.ask(&mut wal_get(&archive, &[]), names[0]).is(&segments[names[0]]);
    restored::helper_at_work(directory.path());
    drop(postmaster); // a crash: its file stays
    restored::wait_no_helper(directory.path());
    assert!(!directory.prefetch().exists());
    // Recovery is started again: the marker still counts.
    let postmaster = process::Reaped(Command::new("sleep").arg("600").spawn().expect("sleep starts"));
    fs::write(&pid_file, format!("{}\n/data\n", postmaster.0.id())).unwrap();
    directory.ask(&mut wal_get(&archive, &[]), names[1]).is(&segments[names[1]]);
    restored::helper_at_work(directory.path());
    fs::remove_file(pid_file).unwrap(); // it has stopped
    restored::wait_no_helper(directory.path());
    assert!(!directory.prefetch().exists());
}

// --- Who may see it ------------------------------------------------------------------------------------------------

#[test]
fn what_is_held_ready_is_its_owners_alone_and_the_helper_holds_nothing_of_the_server() {
    let Some(major) = postgres::newest_major() else { return };
    let (server, archive) = archived(major);
    let names: Vec<String> = sealed(&archive, &server).into_keys().collect();
    let directory = DataDir::with(&latest_marker(&archive, start_of(&archive, &names[0]), &root()));
    // As PostgreSQL before 16 leaves its files open for its commands: the shell opens one more.
    let held = directory.path().join("relation");
    fs::write(&held, "").unwrap();
    let get = format!(
        "exec 9<relation; exec \"{}\" wal-get --restore {ID} --config \"{}\" \"$1\" \"$2\"",
        agent::binary().display(),
        archive.config().display()
    );
    let mut shell = Command::new("sh");
    directory.ask(shell.args(["-c", &get, "sh"]), &names[0]).code.expect("no signal");
    let helper = restored::helper(directory.path());
    let files = format!("/proc/{}/fd", helper.as_raw_nonzero());
    process::eventually(DEADLINE, "it holds segments ready", || restored::ready(directory.path()).first().cloned());
    let open: Vec<_> =
        fs::read_dir(files).unwrap().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok()).collect();
    assert!(!open.contains(&held), "{open:?}");
    assert!(open.iter().any(|path| path.ends_with("log")), "{open:?}");
    let mode = |path: &Path| fs::metadata(path).map(|found| found.permissions().mode() & 0o777);
    assert_eq!(mode(&directory.prefetch()).unwrap(), 0o700);
    for entry in fs::read_dir(directory.prefetch()).unwrap().map(|entry| entry.unwrap().path()) {
        // What was being written has another name by now.
        let Ok(mode) = mode(&entry) else { continue };
        assert!(mode & 0o077 == 0 || entry.ends_with("socket"), "{entry:?}: {mode:o}");
    }
    end_restore(&archive, &directory);
    process::eventually(DEADLINE, "the helper is gone", || (!process::is_alive(helper)).then_some(()));
}
