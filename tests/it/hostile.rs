//! Servers that send damage, lies, silence and garbage, or are not who they were: nothing wrong is stored or
//! acknowledged, and it is said why.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::time::Duration;

use seawall::agent::cluster::State;
use seawall::catalog::ledger::FactKind;
use seawall::catalog::{Archive, Crc32};
use seawall::codec::Form;
use seawall::codec::{EncodedFrame, Encoder, LEVEL_DEFAULT, decode};
use seawall::error::{Disposition, ExitCode};
use seawall::repository::{Key, layout};
use seawall::testkit::store::{FaultyStore, MemoryStore};
use seawall::testkit::walsender::ModelSlot;
use seawall::wal::{Lsn, SegmentName, SegmentSize, SystemId, TimelineId};

use crate::support::agent;
use crate::support::model::{MIB, Model, Running, SYSTEM, archives, facts, on_virtual_time};
use crate::support::postgres::{self, Server};
use crate::support::process::{self, Scratch};
use crate::support::rig::{PATIENCE, Rig};

/// The WAL in a repository, name by name.
fn wal_objects(memory: &MemoryStore) -> Vec<(String, bytes::Bytes)> {
    let objects = memory.objects().into_iter().map(|(key, body)| (key.to_string(), body));
    objects.filter(|(key, _)| key.contains("/wal/")).collect()
}

#[test]
fn a_byte_damaged_once_is_asked_for_again() {
    on_virtual_time(async {
        let (mut model, store) = (Model::new(), FaultyStore::new(1));
        let agent = model.agent("seawall", &store);
        agent.wait_state(State::Streaming).await;
        let at = model.write(100_000, 1);
        model.wait_acknowledged("seawall").await;
        model.server.with(|state| state.faults.corrupt.insert(at + 500));
        model.write(100_000, 2);
        agent.wait_failure().await;
        model.server.with(|state| state.faults.corrupt.clear());
        model.wait_acknowledged("seawall").await;
        assert_eq!(facts(store.memory(), FactKind::CorruptAtSource).await, []);
    });
}

#[test]
fn a_byte_damaged_at_the_source_stops_the_cluster() {
    on_virtual_time(async {
        let (mut model, store) = (Model::new(), FaultyStore::new(1));
        let agent = model.agent("seawall", &store);
        agent.wait_state(State::Streaming).await;
        let at = model.write(100_000, 1);
        model.wait_acknowledged("seawall").await;
        model.server.with(|state| state.faults.corrupt.insert(at + 500));
        model.write(2_000_000, 2);
        let failure = agent.wait_end().await;
        assert_eq!((failure.exit_code, failure.disposition), (ExitCode::Data, Disposition::Stop), "{failure}");
        let known = facts(store.memory(), FactKind::CorruptAtSource).await;
        assert_eq!(known.len(), 1, "{known:?}");
        assert!(model.server.with(|state| state.max_flush_reported) <= known[0].from_lsn.expect("a place"));

        let again = model.agent("seawall", &store).wait_end().await;
        assert_eq!(again.exit_code, ExitCode::Data);
        assert_eq!(facts(store.memory(), FactKind::CorruptAtSource).await.len(), 1, "said once");
        assert!(model.server.with(|state| state.max_flush_reported) <= known[0].from_lsn.expect("a place"));
    });
}

/// An archive of 1.8 MB of timeline 1 by a model that is gone.
async fn archived() -> FaultyStore {
    let (mut model, store) = (Model::new(), FaultyStore::new(1));
    let agent = model.agent("seawall", &store);
    agent.wait_state(State::Streaming).await;
    model.write(1_500_000, 1);
    model.write(300_000, 2);
    model.wait_acknowledged("seawall").await;
    agent.kill().await;
    store
}

#[test]
fn a_clone_with_other_wal_is_refused() {
    on_virtual_time(async {
        let store = archived().await;
        let before = wal_objects(store.memory());
        let mut clone = Model::new();
        clone.write(1_500_000, 1);
        clone.write(900_000, 3);
        // With a slot copied as it was, every position that the archive holds could be reported on it.
        let slot = ModelSlot { restart_lsn: Some(clone.wal.start()), ..ModelSlot::default() };
        clone.server.with(|state| state.slots.insert("seawall".into(), slot));
        let failure = clone.agent("seawall", &store).wait_end().await;
        assert_eq!((failure.exit_code, failure.disposition), (ExitCode::Data, Disposition::Stop), "{failure}");
        assert_eq!(wal_objects(store.memory()), before, "the first one's archive is unharmed");
        assert_eq!(clone.server.with(|state| state.max_flush_reported), Lsn::ZERO, "nothing was acknowledged");
    });
}

#[test]
fn a_server_behind_the_archive_is_refused() {
    on_virtual_time(async {
        let store = archived().await;
        let before = wal_objects(store.memory());
        let mut older = Model::new();
        older.write(1_500_000, 1);
        let agent = older.agent("seawall", &store);
        let failure = agent.wait_failure().await;
        assert_eq!(failure.exit_code, ExitCode::Data, "{failure}");
        assert!(failure.message.contains("only written"), "{failure}");
        tokio::time::sleep(Duration::from_secs(300)).await;
        assert_eq!(wal_objects(store.memory()), before);
        assert_eq!(older.server.with(|state| state.max_flush_reported), Lsn::ZERO);
    });
}

#[test]
fn another_system_is_refused_unless_it_is_an_upgrade() {
    on_virtual_time(async {
        let store = archived().await;
        let before = wal_objects(store.memory());
        let stranger = SystemId(SYSTEM.0 + 1);
        let mut other = Model::of(17, stranger);
        other.write(100_000, 1);
        let agent = other.agent("seawall", &store);
        let failure = agent.wait_failure().await;
        assert_eq!(failure.exit_code, ExitCode::Config, "{failure}");
        assert!(failure.hint.expect("a hint").contains("init --new-lineage"));
        agent.kill().await;
        assert_eq!(wal_objects(store.memory()), before);

        let mut upgraded = Model::of(18, stranger);
        let agent = upgraded.agent("seawall", &store);
        agent.wait_state(State::Streaming).await;
        upgraded.write(100_000, 1);
        upgraded.wait_acknowledged("seawall").await;
        assert_eq!(archives(store.memory()).await.len(), 2, "a lineage beside the old one");
        let after = wal_objects(store.memory());
        assert!(before.iter().all(|object| after.contains(object)), "the old one is as it was");
        agent.kill().await;
    });
}

#[test]
fn two_histories_of_one_number_and_a_demoted_server_are_refused() {
    on_virtual_time(async {
        let (mut model, store) = (Model::new(), FaultyStore::new(1));
        let agent = model.agent("seawall", &store);
        agent.wait_state(State::Streaming).await;
        let fork = model.write(300_000, 1);
        model.wait_acknowledged("seawall").await;
        model.wal = model.wal.fork(fork, TimelineId(2));
        model.server.with(|state| state.promote(TimelineId(2), fork));
        model.write(300_000, 2);
        model.wait_acknowledged("seawall").await;
        agent.kill().await;
        let before = wal_objects(store.memory());

        // Another standby of the same origin, promoted a little later to the same number.
        let mut twin = Model::new();
        twin.write(300_000, 1);
        let later = twin.write(8_000, 1);
        twin.wal = twin.wal.fork(later, TimelineId(2));
        twin.server.with(|state| state.promote(TimelineId(2), later));
        twin.write(900_000, 3);
        let failure = twin.agent("seawall", &store).wait_end().await;
        assert_eq!((failure.exit_code, failure.disposition), (ExitCode::Data, Disposition::Stop), "{failure}");
        assert_eq!(wal_objects(store.memory()), before);

        // The old primary, not rewound.
        let mut demoted = Model::new();
        demoted.write(900_000, 1);
        let agent = demoted.agent("seawall", &store);
        let failure = agent.wait_failure().await;
        assert_eq!(failure.exit_code, ExitCode::Data);
        assert!(failure.hint.expect("a hint").contains("former primary"));
        assert_eq!(wal_objects(store.memory()), before);
    });
}

#[test]
fn garbage_cuts_errors_and_silence_end_the_connection_and_nothing_else() {
    on_virtual_time(async {
        let (mut model, store) = (Model::new(), FaultyStore::new(1));
        model.server.with(|state| state.wal_sender_timeout = Some(Duration::from_secs(20)));
        let agent = model.agent("seawall", &store);
        agent.wait_state(State::Streaming).await;
        let garbage: [&[u8]; 8] = [
            &[0; 64],
            &[0xFF; 64],
            b"d\0\0\0\0",
            b"d\0\0\0\x03w",
            b"d\x7F\xFF\xFF\xFFw",
            b"d\x80\0\0\0w",
            b"d\0\0\0\x05w",
            b"HTTP/1.1 400 Bad Request\r\n\r\n",
        ];
        for (value, bytes) in garbage.into_iter().enumerate() {
            model.server.with(|state| state.faults.garbage = Some(bytes.to_vec()));
            model.write(50_000, value as u8);
            model.wait_acknowledged("seawall").await;
        }
        for after in [0, 1, 4, 5, 29, 30, 31, 7_000] {
            model.server.with(|state| state.faults.cut_after = Some(after));
            model.write(50_000, 1);
            model.wait_acknowledged("seawall").await;
        }
        for sqlstate in ["58P01", "53300", "57P01", "XX000"] {
            model.server.with(|state| state.faults.error = Some(sqlstate.into()));
            model.write(50_000, 2);
            model.wait_acknowledged("seawall").await;
        }
        // A peer that is gone without a word, while idle.
        let sessions = model.server.with(|state| state.sessions_opened);
        model.server.with(|state| state.faults.stall_writing = true);
        agent.wait_failure().await;
        model.server.with(|state| state.faults.stall_writing = false);
        model.write(50_000, 3);
        model.wait_acknowledged("seawall").await;
        assert!(model.server.with(|state| state.sessions_opened) > sessions);
        assert_eq!(facts(store.memory(), FactKind::Gap).await, []);
        assert!(!agent.task.is_finished());
    });
}

#[test]
fn wal_of_an_unknown_format_is_stored_and_called_unproven() {
    on_virtual_time(async {
        let (mut model, store) = (Model::of(18, SYSTEM), FaultyStore::new(1));
        model.write(2_500_000, 1);
        let mut bytes = model.wal.bytes(model.wal.start()..model.wal.flush_lsn()).to_vec();
        for page in bytes.chunks_mut(8192) {
            page[..2].copy_from_slice(&0xD1F2u16.to_le_bytes());
        }
        let start = model.wal.start();
        model.server.with(|state| {
            // A version nobody knows yet: with a known one, another magic is damage.
            state.server_version = "21.1".into();
            let wal = state.wal.get_mut(&TimelineId(1)).expect("it has one");
            wal.bytes = std::sync::Arc::new(bytes);
            // As if the archive began with the first segment, before anything else was written.
            wal.flush = start + MIB / 2;
        });
        let agent = model.agent("seawall", &store);
        agent.wait_state(State::Streaming).await;
        let end = model.wal.flush_lsn();
        model.server.with(|state| state.wal.get_mut(&TimelineId(1)).expect("it has one").flush = end);
        model.wait_acknowledged("seawall").await;
        let index = store.memory().objects().into_iter().filter(|(key, _)| key.as_str().ends_with(".index.json"));
        let texts: Vec<String> = index.map(|(_, body)| String::from_utf8_lossy(&body).into_owned()).collect();
        assert!(!texts.is_empty() && texts.iter().all(|text| text.contains("unproven")), "{texts:?}");
        agent.kill().await;

        let scratch = Scratch::new();
        for (key, body) in store.memory().objects() {
            let path = scratch.join("repository").join(key.to_string());
            std::fs::create_dir_all(path.parent().expect("a key is below")).expect("a directory can be made");
            std::fs::write(path, body).expect("a test's file can be written");
        }
        let url = format!("file://{}", scratch.join("repository").display());
        let nobody = "host=127.0.0.1 port=1 user=seawall";
        let output = agent::seawall(["status", "--json", "--postgres", nobody, "--repository", &url]);
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        let reasons = answer["clusters"][0]["reasons"].as_array().expect("a list").clone();
        let is_said = reasons.iter().any(|reason| reason.as_str().is_some_and(|text| text.contains("unproven")));
        assert!(is_said, "{answer}");
    });
}

/// An agent's archive of one model, and the segment that comes next: written, not published.
struct NextSegment {
    model: Model,
    store: FaultyStore,
    agent: Running,
    archive: Archive,
    name: SegmentName,
    end: Lsn,
    raw: Vec<u8>,
}

impl NextSegment {
    async fn new() -> NextSegment {
        let (mut model, store) = (Model::new(), FaultyStore::new(1));
        let agent = model.agent("seawall", &store);
        agent.wait_state(State::Streaming).await;
        model.write(1_500_000, 1);
        model.wait_acknowledged("seawall").await;
        let size = SegmentSize::new(MIB).expect("a power of two");
        let start = size.floor(model.wal.flush_lsn());
        let (name, end) = (layout::segment_at(TimelineId(1), start, size), start + MIB);
        for _ in 0..400 {
            model.wal.insert(9000, &[7; 4000]);
        }
        let raw = model.wal.bytes(start..end).to_vec();
        let archive = archives(store.memory()).await.remove(0);
        NextSegment { model, store, agent, archive, name, end, raw }
    }

    /// Puts an object of `raw` under the segment's name, as somebody else would.
    fn put(&self, raw: &[u8]) -> EncodedFrame {
        let frame = Encoder::new(19).encode(raw);
        let key = self.archive.lineage.segment(self.name, Form::Plain);
        self.store.memory().tamper(|objects| assert!(objects.insert(key, frame.bytes.clone()).is_none()));
        frame
    }

    fn object(&self, key: &Key) -> Option<bytes::Bytes> {
        self.store.memory().objects().get(key).cloned()
    }
}

#[test]
fn another_content_under_a_segments_name_is_kept_and_stops_the_cluster() {
    on_virtual_time(async {
        let next = NextSegment::new().await;
        let mut other = next.raw.clone();
        other[MIB as usize / 2] ^= 1;
        let theirs = next.put(&other);
        next.model.publish();
        let failure = next.agent.wait_end().await;
        assert_eq!((failure.exit_code, failure.disposition), (ExitCode::Data, Disposition::Stop), "{failure}");
        assert!(failure.hint.is_some_and(|hint| hint.contains("--new-lineage")));

        let reported = |model: &Model| model.server.with(|state| state.max_flush_reported);
        let before = reported(&next.model);
        assert!(before < next.end, "{before} is acknowledged");
        // Whoever starts it again is told the same, and it does no more.
        let again = next.model.agent("seawall", &next.store).wait_end().await;
        assert_eq!(again.exit_code, ExitCode::Data, "{again}");
        assert!(reported(&next.model) < next.end, "{} is acknowledged", reported(&next.model));

        let objects = next.store.memory().objects();
        assert_eq!(
            objects.get(&next.archive.lineage.segment(next.name, Form::Plain)),
            Some(&theirs.bytes),
            "it is not replaced"
        );
        let ours = &objects[&next.archive.lineage.conflict(next.name, crc32fast::hash(&next.raw), Form::Plain)];
        let (raw, _) = decode::decode_exact(ours, MIB as usize).expect("ours is whole");
        assert!(raw == next.raw, "ours is kept beside it");
        let known = facts(next.store.memory(), FactKind::Conflict).await;
        assert_eq!(known.len(), 1, "said once: {known:?}");
        assert_eq!(known[0].to_lsn, Some(next.end));
    });
}

#[test]
fn equal_content_stored_otherwise_is_accepted_as_it_is() {
    on_virtual_time(async {
        let next = NextSegment::new().await;
        let theirs = next.put(&next.raw);
        next.model.publish();
        next.model.wait_acknowledged("seawall").await;
        assert!(next.model.wal.flush_lsn() > next.end);

        assert_eq!(next.object(&next.archive.lineage.segment(next.name, Form::Plain)).as_ref(), Some(&theirs.bytes));
        assert_eq!(next.object(&next.archive.lineage.conflict(next.name, theirs.raw_crc32, Form::Plain)), None);
        let catalog = next.archive.load_catalog().await.expect("the catalog is readable");
        let directories = &catalog.timelines[&TimelineId(1)];
        let entry = directories.iter().find_map(|directory| directory.sealed(next.name)).expect("it is indexed");
        assert_eq!((entry.raw_crc32, entry.stored_crc32), (Crc32(theirs.raw_crc32), Crc32(theirs.stored_crc32)));
        assert_eq!(entry.stored_bytes, theirs.bytes.len() as u64);
        assert_ne!(theirs.bytes, Encoder::new(LEVEL_DEFAULT).encode(&next.raw).bytes, "the test tells them apart");
        assert_eq!(facts(next.store.memory(), FactKind::Conflict).await, []);
        next.agent.kill().await;
    });
}

/// What the server says reaches a terminal as text, and a password reaches nobody.
#[test]
fn what_a_server_says_is_escaped_and_no_password_is_printed() {
    const CANARY: &str = "canary-7f3a9c";
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("bound").port();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut packet = [0; 4096];
            let count = stream.read(&mut packet).unwrap_or(0);
            if packet[..count].get(4..8) == Some(&80_877_103u32.to_be_bytes()[..]) {
                let _ = stream.write_all(b"N");
                let _ = stream.read(&mut packet);
            }
            let _ = stream.write_all(b"R\0\0\0\x08\0\0\0\x03"); // a password in clear, please
            let _ = stream.read(&mut packet);
            let fields = b"SFATAL\0VFATAL\0C28P01\0M\x1b[31mno\nway\x1b]0;owned\x07\0\0";
            let mut error = vec![b'E'];
            error.extend_from_slice(&(fields.len() as u32 + 4).to_be_bytes());
            error.extend_from_slice(fields);
            let _ = stream.write_all(&error);
        }
    });
    let scratch = Scratch::new();
    let passfile = scratch.join("passfile");
    std::fs::write(&passfile, format!("*:*:*:*:{CANARY}\n")).expect("a test's file can be written");
    std::fs::set_permissions(&passfile, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("ours");
    let url = format!("file://{}", scratch.join("repository").display());
    let host = format!("host=127.0.0.1 port={port} user=seawall");
    let by_passfile = format!("{host} passfile={}", passfile.display());
    let by_conninfo = format!("{host} password={CANARY}");
    for (conninfo, environment) in [(host.as_str(), true), (&by_passfile, false), (&by_conninfo, false)] {
        for format in ["text", "json"] {
            let arguments = ["run", "-vv", "--log-format", format, "--postgres", conninfo, "--repository", &url];
            let mut command = agent::command(arguments);
            if environment {
                command.env("PGPASSWORD", CANARY);
            }
            let mut running = agent::Agent::spawn(command);
            running.wait_for_log("no\\", PATIENCE);
            running.terminate(PATIENCE);
            let output = format!("{}{}", running.stdout(), running.stderr());
            assert!(!output.contains('\x1b') && !output.contains('\x07'), "{output:?}");
            assert!(!output.contains(CANARY), "{output}");
            if format == "json" {
                let log = running.stderr();
                for line in log.lines() {
                    serde_json::from_str::<serde_json::Value>(line).expect("each line is JSON");
                }
            }
        }
        for verb in ["check", "status", "gaps"] {
            let arguments = [verb, "--json", "--postgres", conninfo, "--repository", &url];
            let mut command = agent::command(arguments);
            if environment {
                command.env("PGPASSWORD", CANARY);
            }
            let output = process::run(&mut command, PATIENCE);
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            assert!(!text.contains(CANARY) && !text.contains('\x1b'), "{verb}: {text}");
        }
    }
}

#[test]
fn an_accidental_synchronous_standby_does_not_hang_commits() {
    let Some(major) = postgres::newest_major() else { return };
    let mut rig = Rig::new(Server::builder(major).wal_segment_mib(1).start());
    let agent = rig.start();
    process::eventually(PATIENCE, "the slot reserves WAL", || rig.slot()?.restart_lsn);
    rig.write();
    rig.wait_archived();
    rig.server.set("synchronous_standby_names", "*");
    rig.server.reload();
    process::eventually(PATIENCE, "it is synchronous", || {
        (rig.server.value("select sync_state from pg_stat_replication") == "sync").then_some(())
    });
    rig.server.sql("create table synchronous (i int)");
    rig.server.set("synchronous_commit", "remote_apply");
    rig.server.reload();
    rig.server.sql("insert into synchronous values (1)");
    drop(agent);

    let mut agent = rig.start();
    agent.wait_for_log("commits wait for this archive", PATIENCE);
    let config = rig.config("seawall");
    let output = agent::seawall(["status", "--json", "--config", config.to_str().expect("UTF-8")]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("it is a synchronous standby (sync)"), "{text}");
    let sessions =
        "select count(*) from pg_stat_activity where application_name = 'seawall' and backend_type = 'client backend'";
    assert_eq!(rig.server.value(sessions), "0", "no session stays, it would hold back a smart stop");
}
