//! Promotions, failovers and forks: the archive follows the line that goes on, keeps the one that ended, and never
//! lets one leak into the other.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use seawall::catalog::FactKind;
use seawall::wal::TimelineId;

use crate::support::archived::{Archived, create_journal, note, notes};
use crate::support::postgres::{self, BaseBackup, Server, Stop};
use crate::support::process;

fn primary(major: u32) -> Server {
    Server::builder(major).wal_segment_mib(1).setting("wal_keep_size", "256MB").start()
}

/// Writes something longer than a segment, and says so in the journal.
fn write(server: &Server, what: &str) {
    server.sql("select pg_logical_emit_message(true, 'large', repeat('x', 2500000))");
    note(server, what);
}

/// What a copy knows that recovered to the newest timeline, by the archive alone.
fn recovered(backup: &BaseBackup, archive: &Archived) -> Vec<String> {
    let latest = backup.recover(&archive.restore_command(&[])).start_recovered();
    notes(&latest.expect("the archive leads to the newest timeline"))
}

/// The same for one timeline, whole.
fn recovered_to(timeline: u32, backup: &BaseBackup, archive: &Archived) -> Vec<String> {
    let number = timeline.to_string();
    let command = archive.restore_command(&["--timeline", &number]);
    let recovering = backup.recover(&command).setting("recovery_target_timeline", &number);
    notes(&recovering.start_recovered().expect("the archive holds the whole timeline"))
}

// --- A standby promoted under the stream ---------------------------------------------------------------------------

#[test]
fn pg15_stream_from_a_standby_goes_on_over_its_promotion() {
    stream_from_a_standby_goes_on_over_its_promotion(15);
}

#[test]
fn pg18_stream_from_a_standby_goes_on_over_its_promotion() {
    stream_from_a_standby_goes_on_over_its_promotion(18);
}

fn stream_from_a_standby_goes_on_over_its_promotion(major: u32) {
    if !postgres::is_installed(major) {
        return;
    }
    let mut primary = primary(major);
    let mut standby = Server::standby_of(&primary).start();
    let archive = Archived::of(&standby);
    let mut agent = archive.streaming_agent();
    let backup = primary.base_backup_without_wal();
    create_journal(&primary);
    // A long tail and a short one, which only the end of the timeline makes one.
    write(&primary, "on the primary");
    for what in ["acknowledged", "the last before"] {
        note(&primary, what);
        standby.wait_replayed(primary.flush_lsn());
        archive.wait_acknowledged(&standby);
    }

    standby.promote();
    primary.kill9();
    write(&standby, "after the promotion");
    standby.switch_wal();
    note(&standby, "the last after");
    archive.wait_acknowledged(&standby);
    assert!(agent.is_running());
    assert!(agent.stderr().contains("the timeline ended"), "it followed the end of the timeline in the stream");

    let catalog = archive.catalog();
    let history = fs::metadata(archive.path_of(&catalog.lineage.history(TimelineId(2)))).expect("it is archived");
    let history = history.modified().expect("files have times");
    let first = oldest_file(&archive.path_of(&catalog.lineage.wal()), "00000002").expect("timeline 2 has objects");
    assert!(history <= first, "a segment of timeline 2 was there before its history");
    // What is superfluous goes after the acknowledgement.
    process::eventually(process::DEADLINE, "the ended segment's tails become one", || {
        let catalog = archive.catalog();
        let mut parts = catalog.timelines[&TimelineId(1)].iter().flat_map(|directory| directory.tails.values());
        parts.all(|tails| tails.len() == 1).then_some(())
    });

    let before = ["on the primary", "acknowledged", "the last before"];
    assert_eq!(recovered(&backup, &archive), [&before[..], &["after the promotion", "the last after"]].concat());
    assert_eq!(recovered_to(1, &backup, &archive), before);
    archive.assert_no_gaps();
    assert!(archive.compare_with_wal_of(&standby).segments > 2);
}

/// When the oldest object below directories of this prefix was written.
fn oldest_file(wal: &Path, prefix: &str) -> Option<SystemTime> {
    let entries = fs::read_dir(wal).expect("it can be listed").map(|entry| entry.expect("it can be listed").path());
    let timeline =
        entries.filter(|path| path.is_dir() && path.file_name().unwrap().to_str().unwrap().starts_with(prefix));
    timeline.filter_map(|directory| oldest_below(&directory)).min()
}

fn oldest_below(directory: &Path) -> Option<SystemTime> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let times = entries.filter_map(|entry| match entry.path() {
        path if path.is_dir() => oldest_below(&path),
        // A tail may have been replaced since it was listed.
        path => Some(fs::metadata(path).ok()?.modified().expect("files have times")),
    });
    times.min()
}

// --- Failover ------------------------------------------------------------------------------------------------------

#[test]
fn pg15_failover_is_followed_to_the_other_host() {
    failover_is_followed_to_the_other_host(15);
}

#[test]
fn pg18_failover_is_followed_to_the_other_host() {
    failover_is_followed_to_the_other_host(18);
}

fn failover_is_followed_to_the_other_host(major: u32) {
    if !postgres::is_installed(major) {
        return;
    }
    let mut primary = primary(major);
    let mut standby = Server::standby_of(&primary).start();
    let archive = Archived::by_conninfo(&either_of(&standby, &primary));
    let mut agent = archive.streaming_agent();
    let backup = primary.base_backup_without_wal();
    create_journal(&primary);
    write(&primary, "on the primary");
    archive.wait_acknowledged(&primary);
    // The agent does not see the last of it: its new server must have it.
    agent.signal(rustix::process::Signal::STOP);
    write(&primary, "on the primary, unseen");
    primary.switch_wal(); // the fork lies at a segment's start
    standby.wait_replayed(primary.flush_lsn());
    primary.kill9();
    standby.promote();
    agent.signal(rustix::process::Signal::CONT);
    note(&standby, "on the new primary");
    archive.wait_acknowledged(&standby);
    write(&standby, "later");
    archive.wait_acknowledged(&standby);

    assert!(agent.is_running());
    let all = ["on the primary", "on the primary, unseen", "on the new primary", "later"];
    assert_eq!(recovered(&backup, &archive), all);
    assert_eq!(recovered_to(1, &backup, &archive), all[..2]);
    archive.assert_no_gaps();
    assert!(archive.compare_with_wal_of(&standby).segments > 2);
}

fn either_of(first: &Server, second: &Server) -> String {
    let (hosts, others) = (first.socket_dir(), second.socket_dir());
    format!(
        "host={},{} port={},{} user=postgres dbname=postgres target_session_attrs=read-write",
        hosts.display(),
        others.display(),
        first.port(),
        second.port()
    )
}

#[test]
fn three_promotions_in_a_row_are_followed_even_unwatched() {
    let Some(major) = postgres::newest_major() else { return };
    let mut server = primary(major);
    let archive = Archived::of(&server);
    let mut agent = archive.streaming_agent();
    let backup = server.base_backup_without_wal();
    create_journal(&server);
    let mut expected = Vec::new();
    for timeline in 1..=4 {
        let what = format!("on timeline {timeline}");
        write(&server, &what);
        expected.push(what);
        // Nobody looks while timelines 2 and 3 end.
        if timeline != 3 {
            archive.wait_acknowledged(&server);
        }
        if timeline == 2 {
            agent.kill9();
            write(&server, "unseen");
            expected.push("unseen".to_owned());
        }
        if timeline < 4 {
            server.stop(Stop::Fast);
            server.write_data_file("standby.signal", "");
            server.start();
            server.promote();
        }
        if timeline == 3 {
            // A server may have lost its ancestors' history: the archive has what it was shown before.
            fs::remove_file(server.wal_dir().join("00000002.history")).expect("the server keeps histories");
            agent = archive.streaming_agent();
        }
    }
    assert_eq!(server.timeline(), 4);
    archive.wait_acknowledged(&server);
    assert!(agent.is_running());
    let catalog = archive.catalog();
    assert_eq!(catalog.histories.keys().map(|timeline| timeline.0).collect::<Vec<_>>(), [2, 3, 4]);
    archive.assert_no_gaps();
    assert_eq!(recovered(&backup, &archive), expected);
    assert_eq!(recovered_to(2, &backup, &archive), expected[..3]);
    let compared = archive.compare_with_wal_of(&server);
    assert!(compared.segments > 4 && compared.tail_bytes > 0, "{compared:?}");
}

// --- A failover that loses WAL the archive holds -------------------------------------------------------------------

#[test]
fn pg15_abandoned_wal_stays_on_its_own_timeline() {
    abandoned_wal_stays_on_its_own_timeline(15);
}

#[test]
fn pg18_abandoned_wal_stays_on_its_own_timeline() {
    abandoned_wal_stays_on_its_own_timeline(18);
}

fn abandoned_wal_stays_on_its_own_timeline(major: u32) {
    if !postgres::is_installed(major) {
        return;
    }
    let mut primary = primary(major);
    let mut standby = Server::standby_of(&primary).start();
    let archive = Archived::by_conninfo(&either_of(&primary, &standby));
    let mut agent = archive.streaming_agent();
    let backup = primary.base_backup_without_wal();
    create_journal(&primary);
    write(&primary, "before the fork");
    standby.wait_replayed(primary.flush_lsn());
    standby.promote();
    for round in 0..3 {
        write(&primary, &format!("abandoned {round}"));
    }
    archive.wait_acknowledged(&primary);
    let abandoned = archive.durable(1);
    primary.kill9();

    // The agent goes over by itself, and finds that its archive knows more than the new primary.
    note(&standby, "on the new line");
    archive.wait_acknowledged(&standby);
    assert!(agent.is_running());
    let catalog = archive.catalog();
    let forks: Vec<_> = catalog.ledger.iter().filter(|fact| fact.kind == FactKind::Fork).collect();
    let fork = catalog.histories[&TimelineId(2)].parent().expect("timeline 2 has a parent").end;
    assert_eq!(forks.len(), 1, "{forks:#?}");
    assert_eq!((forks[0].timeline, forks[0].from_lsn), (Some(TimelineId(1)), Some(fork)));
    assert_eq!(forks[0].to_lsn, Some(abandoned));
    assert_eq!(archive.durable(1), abandoned, "the old timeline is kept");
    archive.assert_no_gaps();

    let old_line = ["before the fork", "abandoned 0", "abandoned 1", "abandoned 2"];
    assert_eq!(recovered(&backup, &archive), ["before the fork", "on the new line"]);
    assert_eq!(recovered_to(1, &backup, &archive), old_line);

    // Nothing of the new timeline but its history: by name alone, the old one's segments would be served.
    let bare = archive.copy();
    let wal = bare.path_of(&catalog.lineage.wal());
    let entries = fs::read_dir(&wal).expect("it can be listed").map(|entry| entry.expect("it can be listed").path());
    let of_new = |path: &std::path::PathBuf| {
        path.is_dir() && path.file_name().unwrap().to_str().unwrap().starts_with("00000002")
    };
    let removed = entries.filter(of_new).map(|directory| fs::remove_dir_all(directory).expect("it can be removed"));
    assert_eq!(removed.count(), 1);
    assert_eq!(recovered(&backup, &bare), ["before the fork"]);
    assert_eq!(recovered_to(1, &backup, &bare), old_line);
}
