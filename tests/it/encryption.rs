//! Archives encrypted to age recipients: what is stored is readable with an identity and with nothing else, and the
//! agent, which has none, still tells its own objects from others.

use std::fs;
use std::path::PathBuf;

use seawall::agent::cluster::State;
use seawall::catalog::ledger::FactKind;
use seawall::catalog::{Archive, Crc32, IndexEntry};
use seawall::codec::decode::ObjectDecoder;
use seawall::codec::encrypt::{Encryptor, Identities, Keys, Recipients};
use seawall::codec::{Encoder, Form, LEVEL_DEFAULT};
use seawall::error::{Disposition, ExitCode};
use seawall::repository::{Backend, Facts, Key, layout};
use seawall::testkit::store::{FaultyStore, Traits};
use seawall::wal::{Lsn, SegmentName, SegmentSize, TimelineId};

use crate::support::archived::{Archived, create_journal, decrypt, note};
use crate::support::model::{MIB, Model, Running, archives, facts, on_virtual_time};
use crate::support::on_every_major;
use crate::support::postgres::Server;
use crate::support::process;
use crate::support::rig::PATIENCE;

on_every_major!(an_encrypted_archive_holds_the_servers_bytes_and_keys_can_change);
fn an_encrypted_archive_holds_the_servers_bytes_and_keys_can_change(major: u32) {
    let server = Server::builder(major).wal_segment_mib(1).setting("wal_keep_size", "256MB").start();
    create_journal(&server);
    let archive = Archived::of(&server);
    let write = |text: &str| {
        server.sql("create table if not exists filler (content text)");
        server.sql("insert into filler select md5(i::text) from generate_series(1, 30000) i");
        note(&server, text);
        archive.wait_acknowledged(&server);
    };
    // First without, then to one key, then to another and a third: each takes effect with the next object.
    let mut agent = archive.streaming_agent();
    write("plain");
    assert!(agent.terminate(PATIENCE).success());
    let plain = objects(&archive);
    assert!(plain.iter().all(|path| !is_encrypted(path)));

    archive.configure(&format!("encrypt_to = [\"{}\"]\n", archive.new_key()));
    let mut agent = archive.streaming_agent();
    write("one key");
    assert!(agent.terminate(PATIENCE).success());
    let first = fs::read(archive.identity_file()).expect("it was written");
    let to_first: Vec<PathBuf> = objects(&archive).into_iter().filter(|path| !plain.contains(path)).collect();
    assert!(to_first.len() > 2 && to_first.iter().all(|path| is_encrypted(path)), "{to_first:?}");

    let text = fs::read_to_string(archive.config()).expect("the configuration can be read");
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with("encrypt_to")).collect();
    fs::write(archive.config(), lines.join("\n") + "\n").expect("a configuration can be written");
    let two = [archive.new_key(), archive.new_key()];
    archive.configure(&format!("encrypt_to = {two:?}\n"));
    let agent = archive.streaming_agent();
    write("two other keys");

    let compared = archive.compare_with_wal_of(&server);
    assert!(compared.segments > 6 && compared.encrypted > 4 && compared.tail_bytes > 0, "{compared:?}");
    assert!(compared.encrypted < compared.segments, "the first ones are plain: {compared:?}");
    archive.assert_no_gaps();
    // Also what an agent that ended could not drop any more.
    process::eventually(PATIENCE, "no marker is left", || {
        let files = files_below(&archive.repository());
        files.iter().all(|path| !path.to_string_lossy().contains(".raw-")).then_some(())
    });
    drop(agent);

    // Old objects are the first key's alone, new ones not the first key's; either of two keys reads.
    let identities = |content: &[u8]| age::IdentityFile::from_buffer(content).expect("an identity file");
    let file = fs::read_to_string(archive.identity_file()).expect("it was written");
    let secrets: Vec<&str> = file.lines().filter(|line| !line.starts_with('#')).collect();
    let is_old = |path: &&PathBuf| to_first.contains(path);
    let now = objects(&archive);
    for path in now.iter().filter(is_old) {
        assert!(decrypt(path, identities(&first)).is_ok());
        assert!(matches!(decrypt(path, identities(secrets[1].as_bytes())), Err(age::DecryptError::NoMatchingKeys)));
    }
    let new: Vec<&PathBuf> = now.iter().filter(|path| !is_old(path) && is_encrypted(path)).collect();
    assert!(!new.is_empty());
    for path in new {
        assert!(matches!(decrypt(path, identities(&first)), Err(age::DecryptError::NoMatchingKeys)));
        assert!(decrypt(path, identities(secrets[1].as_bytes())).is_ok());
        assert!(decrypt(path, identities(secrets[2].as_bytes())).is_ok());
    }
}

fn is_encrypted(path: &std::path::Path) -> bool {
    path.extension().is_some_and(|extension| extension == "age")
}

fn files_below(directory: &std::path::Path) -> Vec<PathBuf> {
    let (mut files, mut directories) = (Vec::new(), vec![directory.to_path_buf()]);
    while let Some(directory) = directories.pop() {
        // One that has just been removed holds nothing.
        for entry in fs::read_dir(directory).into_iter().flatten() {
            let path = entry.expect("a directory can be listed").path();
            if path.is_dir() { directories.push(path) } else { files.push(path) }
        }
    }
    files
}

/// Segments and tails.
fn objects(archive: &Archived) -> Vec<PathBuf> {
    let is_wal = |path: &PathBuf| {
        let name = path.file_name().expect("a file has a name").to_string_lossy().into_owned();
        name.ends_with(".zst") || name.ends_with(".zst.age")
    };
    files_below(&archive.repository()).into_iter().filter(is_wal).collect()
}

// --- On models ---------------------------------------------------------------------------------------------------

/// Two pairs of a recipient and its identity.
fn keys() -> (Keys, Identities) {
    const IDENTITY: &[u8] = b"AGE-SECRET-KEY-1GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33";
    let identities = Identities::parse(IDENTITY).expect("an identity");
    let recipients = Recipients::parse(&identities.public_keys()).expect("its recipient");
    (Keys { recipients: Some(recipients), identities: None }, identities)
}

fn decoded(stored: &[u8], bytes: u64) -> Vec<u8> {
    let mut raw = Vec::new();
    let mut sink = |bytes: &[u8]| {
        raw.extend_from_slice(bytes);
        Ok(())
    };
    let mut decoder = ObjectDecoder::new(Form::Encrypted, Some(&keys().1), bytes).expect("there is an identity");
    decoder.feed(stored, &mut sink).expect("it decodes");
    decoder.finish(&mut sink).expect("it decodes");
    raw
}

/// An encrypting agent's archive of one model, and the segment that comes next: written, not published.
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
    async fn of(traits: Traits) -> NextSegment {
        let (mut model, store) = (Model::new(), FaultyStore::new(1).with_traits(traits));
        model.keys = keys().0;
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

    fn key(&self, form: Form) -> Key {
        self.archive.lineage.segment(self.name, form)
    }

    /// An object of `raw` as another run, or another agent, would have made it.
    fn encrypted(&self, raw: &[u8]) -> bytes::Bytes {
        let mut encryptor = Encryptor::new(keys().0.recipients.as_ref().expect("there is one"));
        let frame = Encoder::new(LEVEL_DEFAULT).encode(raw);
        [encryptor.push(&frame.bytes), encryptor.finish()].concat().into()
    }

    async fn put(&self, body: &bytes::Bytes, raw_crc32: Option<u32>) {
        let facts = Facts { stored_crc32: None, raw_crc32 };
        self.store
            .put_new_with(&self.key(Form::Encrypted), std::slice::from_ref(body), &facts)
            .await
            .expect("the name is free");
    }

    async fn announce(&self, raw_crc32: u32) {
        let key = self.archive.lineage.raw_marker(self.name, raw_crc32);
        self.store.put_new(&key, &[]).await.expect("the name is free");
    }

    fn object(&self, key: &Key) -> Option<bytes::Bytes> {
        self.store.memory().objects().get(key).cloned()
    }

    async fn entry(&self) -> IndexEntry {
        let size = self.archive.lineage_file().await.expect("the lineage is readable").segment_size;
        let directories = self.archive.timeline(TimelineId(1), size).await.expect("the catalog is readable");
        directories.iter().find_map(|directory| directory.sealed(self.name)).expect("it is indexed").clone()
    }

    fn reported(&self) -> Lsn {
        self.model.server.with(|state| state.max_flush_reported)
    }

    /// The agent takes the object that is there for its own content, and says what is there.
    async fn accepted(self, theirs: &bytes::Bytes, form: Form) {
        self.model.publish();
        self.model.wait_acknowledged("seawall").await;
        assert!(self.model.wal.flush_lsn() > self.end);
        let other = if form == Form::Plain { Form::Encrypted } else { Form::Plain };
        assert_eq!(self.object(&self.key(form)).as_ref(), Some(theirs), "it is not replaced");
        assert_eq!(self.object(&self.key(other)), None, "a segment has one object");
        let entry = self.entry().await;
        assert_eq!(entry.raw_crc32, Crc32(crc32fast::hash(&self.raw)));
        assert_eq!((entry.stored_bytes, entry.stored_crc32), (theirs.len() as u64, Crc32(crc32fast::hash(theirs))));
        assert_eq!(facts(self.store.memory(), FactKind::Conflict).await, []);
        tokio::time::sleep(PATIENCE).await;
        let left: Vec<Key> = self.store.memory().objects().into_keys().collect();
        assert!(left.iter().all(|key| !key.as_str().contains(".raw-")), "{left:?}");
        self.agent.kill().await;
    }

    /// The agent keeps its content beside the one that is there, and stops.
    async fn conflicts(self, theirs: &bytes::Bytes) {
        self.model.publish();
        let (key, name, lineage) = (self.key(Form::Encrypted), self.name, self.archive.lineage.clone());
        let (store, raw, end) = (self.store.clone(), self.raw.clone(), self.end);
        let failure = self.agent.wait_end().await;
        assert_eq!((failure.exit_code, failure.disposition), (ExitCode::Data, Disposition::Stop), "{failure}");
        assert!(self.model.server.with(|state| state.max_flush_reported) < end);
        let objects = store.memory().objects();
        assert_eq!(objects.get(&key), Some(theirs), "it is not replaced");
        let ours = &objects[&lineage.conflict(name, crc32fast::hash(&raw), Form::Encrypted)];
        assert!(decoded(ours, MIB) == raw, "ours is kept beside it");
        assert_eq!(facts(store.memory(), FactKind::Conflict).await.len(), 1);
    }
}

#[test]
fn an_object_of_an_earlier_run_is_known_by_its_marker() {
    on_virtual_time(async {
        let next = NextSegment::of(Traits::LOCAL).await;
        let body = next.encrypted(&next.raw);
        next.announce(crc32fast::hash(&next.raw)).await;
        next.put(&body, None).await;
        next.accepted(&body, Form::Encrypted).await;
    });
}

#[test]
fn an_object_of_an_earlier_run_is_known_by_what_the_store_keeps_with_it() {
    on_virtual_time(async {
        let next = NextSegment::of(Traits::OBJECT_STORE).await;
        let body = next.encrypted(&next.raw);
        next.put(&body, Some(crc32fast::hash(&next.raw))).await;
        next.accepted(&body, Form::Encrypted).await;
    });
}

#[test]
fn a_plain_object_from_before_encryption_accepted() {
    on_virtual_time(async {
        let next = NextSegment::of(Traits::LOCAL).await;
        let frame = Encoder::new(19).encode(&next.raw);
        next.store.put_new(&next.key(Form::Plain), std::slice::from_ref(&frame.bytes)).await.expect("the name is free");
        next.accepted(&frame.bytes, Form::Plain).await;
    });
}

#[test]
fn other_content_conflicts_by_marker_and_by_metadata() {
    on_virtual_time(async {
        for traits in [Traits::LOCAL, Traits::OBJECT_STORE] {
            let next = NextSegment::of(traits).await;
            let mut other = next.raw.clone();
            other[MIB as usize / 2] ^= 1;
            let body = next.encrypted(&other);
            if !traits.keeps_facts {
                next.announce(crc32fast::hash(&other)).await;
            }
            next.put(&body, Some(crc32fast::hash(&other))).await;
            next.conflicts(&body).await;
        }
    });
}

/// Two announced contents: whichever is stored, this name has had two.
#[test]
fn two_markers_are_a_conflict() {
    on_virtual_time(async {
        let next = NextSegment::of(Traits::LOCAL).await;
        let body = next.encrypted(&next.raw);
        next.announce(crc32fast::hash(&next.raw)).await;
        next.announce(0xBAD).await;
        next.put(&body, None).await;
        next.conflicts(&body).await;
    });
}

/// An object nobody announced could hold anything: nothing is claimed, nothing is replaced, and it is said.
#[test]
fn what_cannot_be_compared_is_neither_claimed_nor_replaced() {
    on_virtual_time(async {
        for traits in [Traits::LOCAL, Traits::OBJECT_STORE] {
            let next = NextSegment::of(traits).await;
            let body = next.encrypted(&next.raw);
            next.put(&body, None).await;
            next.model.publish();
            let failure = next.agent.wait_failure().await;
            assert_eq!((failure.exit_code, failure.disposition), (ExitCode::Data, Disposition::Operator), "{failure}");
            assert!(failure.hint.as_ref().is_some_and(|hint| hint.contains("identity_file")), "{failure:?}");
            tokio::time::sleep(PATIENCE * 10).await;
            assert!(next.reported() < next.end, "{} is acknowledged", next.reported());
            assert_eq!(next.object(&next.key(Form::Encrypted)), Some(body));
            assert!(next.store.memory().objects().into_keys().all(|key| !key.as_str().contains(".raw-")));
            next.agent.kill().await;

            // With an identity it is read.
            let mut model = next.model;
            model.keys.identities = Some(keys().1);
            let agent = model.agent("seawall", &next.store);
            model.wait_acknowledged("seawall").await;
            agent.kill().await;
        }
    });
}

/// A record larger than memory by far: its segments leave memory before they are proven, into uploads that give nothing
/// back.
#[test]
fn a_record_over_many_segments_passes_where_nothing_can_be_read_back() {
    on_virtual_time(async {
        for (traits, keys) in
            [(Traits::LOCAL, keys().0), (Traits::OBJECT_STORE, keys().0), (Traits::OBJECT_STORE, Keys::default())]
        {
            let (mut model, store) = (Model::new(), FaultyStore::new(1).with_traits(traits));
            let form = if keys.recipients.is_some() { Form::Encrypted } else { Form::Plain };
            model.keys = keys;
            let agent = model.agent("seawall", &store);
            agent.wait_state(State::Streaming).await;
            model.write(300_000, 1);
            let mut rng = fastrand::Rng::with_seed(1);
            let noise: Vec<u8> = (0..40 << 20).map(|_| rng.u8(..)).collect();
            model.wal.insert(9000, &noise);
            model.write(300_000, 2);
            model.wait_acknowledged("seawall").await;
            assert!(store.calls().uploads_begun > 30, "{:?}", store.calls());
            agent.kill().await;

            let archive = archives(store.memory()).await.remove(0);
            let size = SegmentSize::new(MIB).expect("a power of two");
            let objects = store.memory().objects();
            let first = size.segment_of(model.wal.start());
            let last = size.segment_of(model.wal.flush_lsn());
            for number in (first.0..last.0).map(seawall::wal::SegmentNumber) {
                let name = SegmentName::new(TimelineId(1), number, size);
                let stored = &objects[&archive.lineage.segment(name, form)];
                let raw = match form {
                    Form::Encrypted => decoded(stored, MIB),
                    Form::Plain => zstd::stream::decode_all(&stored[..]).expect("it decodes"),
                };
                assert!(raw == model.wal.bytes(size.start_of(number)..size.end_of(number)), "{name}");
            }
        }
    });
}

/// Measures: `SEAWALL_MEASURE=1 cargo test --release --test it encryption::what_encryption_costs -- --nocapture`.
#[test]
fn what_encryption_costs() {
    if std::env::var_os("SEAWALL_MEASURE").is_none() {
        return;
    }
    let mut rng = fastrand::Rng::with_seed(1);
    let frame: Vec<u8> = (0..350_000).map(|_| rng.u8(..)).collect();
    let begun = std::time::Instant::now();
    let mut stored = 0;
    for _ in 0..200 {
        let mut encryptor = Encryptor::new(keys().0.recipients.as_ref().expect("there is one"));
        for _ in 0..16 {
            stored += encryptor.push(&frame).len();
        }
        stored += encryptor.finish().len();
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("age: {:.0} MiB/s", stored as f64 / f64::from(1 << 20) / seconds);
}
