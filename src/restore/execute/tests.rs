//! Backups made by hand: those a server makes are restored in `tests/it/restores.rs`; here are the ones it never makes.

use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::Mutex;

use aws_lc_rs::digest;
use bytes::Bytes;
use tempfile::TempDir;

use super::*;
use crate::catalog::Archive;
use crate::catalog::backup::{BackupFile, BeginFile, ConfigEntry, ManifestEntry, PinKind, VolumeEntry};
use crate::catalog::index::Crc32;
use crate::catalog::ledger::{BACKUPS, FactKind, LedgerFact, SegmentRange};
use crate::catalog::manifest::{ChecksumAlgorithm, FileHasher};
use crate::codec::encrypt::{Encryptor, Identities, Keys, Recipients};
use crate::codec::{Encoder, FRAME_BYTES, Form};
use crate::error::{Advice, ExitCode};
use crate::repository::layout::{BackupId, Lineage};
use crate::repository::{Backend, Key};
use crate::restore::plan::{BackupCopy, Replay, Stop};
use crate::restore::target::{Action, Target};
use crate::testkit::store::MemoryStore;
use crate::wal::{History, Lsn, SegmentSize, SystemId, TimelineId};

const SYSTEM: SystemId = SystemId(7);
const TABLESPACE: u32 = 16384;

/// A member of a tar that is being made.
#[derive(Clone, Debug)]
struct Item {
    name: Vec<u8>,
    kind: tar::EntryType,
    mode: u32,
    data: Vec<u8>,
    /// What the header says, where that is not so.
    size: Option<u64>,
    /// Whether the manifest lists it.
    is_listed: bool,
}

fn item(name: &str, kind: tar::EntryType, data: &[u8]) -> Item {
    Item { name: name.into(), kind, mode: 0o600, data: data.to_vec(), size: None, is_listed: kind.is_file() }
}

fn file(name: &str, data: &[u8]) -> Item {
    item(name, tar::EntryType::Regular, data)
}

fn directory(name: &str) -> Item {
    item(name, tar::EntryType::Directory, b"")
}

/// The bytes a volume has before compression; names are put in as they are, whatever they are.
fn tar_of(items: &[Item]) -> Vec<u8> {
    let mut out = Vec::new();
    for item in items {
        let mut header = tar::Header::new_ustar();
        let name = &mut header.as_old_mut().name;
        name[..item.name.len()].copy_from_slice(&item.name);
        header.set_entry_type(item.kind);
        header.set_mode(item.mode);
        header.set_uid(26);
        header.set_gid(26);
        header.set_mtime(1_700_000_000);
        header.set_size(item.size.unwrap_or(item.data.len() as u64));
        header.as_old_mut().linkname[..11].copy_from_slice(b"/etc/passwd");
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(&item.data);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn compressed(raw: &[u8]) -> Vec<u8> {
    let mut encoder = Encoder::new(1);
    raw.chunks(FRAME_BYTES).flat_map(|frame| encoder.encode(frame).bytes.to_vec()).collect()
}

fn manifest_of(files: &[(Vec<u8>, Vec<u8>)], algorithm: ChecksumAlgorithm) -> Vec<u8> {
    let line = |(path, data): &(Vec<u8>, Vec<u8>)| {
        let path = match std::str::from_utf8(path) {
            Ok(path) => format!("\"Path\": {}", serde_json::to_string(path).unwrap()),
            Err(_) => format!("\"Encoded-Path\": \"{}\"", path.iter().map(|b| format!("{b:02x}")).collect::<String>()),
        };
        let mut hasher = FileHasher::new(algorithm);
        hasher.update(data);
        let checksum = match algorithm {
            ChecksumAlgorithm::None => String::new(),
            _ => format!(", \"Checksum-Algorithm\": \"{algorithm}\", \"Checksum\": \"{}\"", hasher.finish()),
        };
        format!("{{ {path}, \"Size\": {}, \"Last-Modified\": \"2026-11-22 11:00:00 GMT\"{checksum} }}", data.len())
    };
    let lines: Vec<String> = files.iter().map(line).collect();
    let text = format!(
        "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": 7,\n\"Files\": [\n{}\n],\n\"WAL-Ranges\": [\n\
         {{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000120\" }}\n],\n",
        lines.join(",\n")
    );
    let sum = digest::digest(&digest::SHA256, text.as_bytes());
    let sum: String = sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{text}\"Manifest-Checksum\": \"{sum}\"}}\n").into_bytes()
}

/// A backup to be restored, in one store or two, and where to.
struct Case {
    scratch: TempDir,
    volumes: Vec<(Option<u32>, Vec<Item>)>,
    /// Listed in the manifest beside what the volumes hold.
    listed: Vec<(Vec<u8>, Vec<u8>)>,
    algorithm: ChecksumAlgorithm,
    tablespaces: Vec<TablespaceEntry>,
    config: Vec<(&'static str, &'static str, &'static [u8])>,
    recipients: Option<Recipients>,
    identities: Option<Identities>,
    stores: Vec<MemoryStore>,
    standby: bool,
    delta: bool,
    mappings: Vec<Mapping>,
    change_backup: fn(&mut BackupFile),
}

const CONTROL_DATA: [u8; 16] = [7, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];

fn case() -> Case {
    let base = vec![
        file("backup_label", b"START WAL LOCATION\n"),
        directory("base/"),
        directory("base/5/"),
        file("base/5/1259", &[1; 20_000]),
        file("base/5/empty", b""),
        directory("pg_notify/"),
    ];
    let last = vec![
        file("PG_VERSION", b"18\n"),
        file("postgresql.auto.conf", b"work_mem = '64MB'\nprimary_conninfo = 'host=source'\n"),
        file("standby.signal", b""),
        file("postgresql.conf", b"port = 5432\n"),
        directory("global/"),
        file("global/1262", &[2; 9000]),
        file("global/pg_control", &CONTROL_DATA),
    ];
    Case {
        scratch: tempfile::tempdir().unwrap(),
        volumes: vec![(None, base), (None, last)],
        listed: Vec::new(),
        algorithm: ChecksumAlgorithm::Crc32c,
        tablespaces: Vec::new(),
        config: Vec::new(),
        recipients: None,
        identities: None,
        stores: vec![MemoryStore::default()],
        standby: false,
        delta: false,
        mappings: Vec::new(),
        change_backup: |_| {},
    }
}

impl Case {
    fn with(mut self, change: impl FnOnce(&mut Case)) -> Case {
        change(&mut self);
        self
    }

    fn pgdata(&self) -> PathBuf {
        self.scratch.path().join("pgdata")
    }

    fn lineage(&self) -> Lineage {
        Lineage::new("main", SYSTEM, 1)
    }

    fn id(&self) -> BackupId {
        "20261122T110000Z-full".parse().unwrap()
    }

    fn form(&self) -> Form {
        if self.recipients.is_some() { Form::Encrypted } else { Form::Plain }
    }

    fn sealed(&self, plain: Vec<u8>) -> Vec<u8> {
        let Some(recipients) = &self.recipients else { return plain };
        let mut encryptor = Encryptor::new(recipients);
        let first = encryptor.push(&plain);
        [first, encryptor.finish()].concat()
    }

    fn listed_files(&self) -> Vec<(Vec<u8>, Vec<u8>)> {
        let mut files = Vec::new();
        for (tablespace, items) in &self.volumes {
            let prefix = tablespace.map_or(Vec::new(), site::prefix_of);
            for item in items.iter().filter(|item| item.is_listed) {
                files.push(([&prefix, item.name.as_slice()].concat(), item.data.clone()));
            }
        }
        files.extend(self.listed.clone());
        files
    }

    /// Stores the backup where it is not stored yet; tells the plan.
    fn stored(&self) -> RestorePlan {
        let files = self.listed_files();
        let manifest = manifest_of(&files, self.algorithm);
        let mut backup = BackupFile {
            schema: 1,
            id: self.id(),
            backup_type: BackupType::Full,
            parent: None,
            fallback: None,
            label: None,
            started: self.id().started(),
            finished: self.id().started(),
            system_id: SYSTEM,
            server_version: "18.4".into(),
            segment_size: SegmentSize::MIB_16,
            timeline: TimelineId(1),
            start_lsn: Lsn(0x200_0028),
            stop_lsn: Lsn(0x200_0120),
            stop_time: None,
            from_standby: false,
            data_checksums: Some(true),
            raw_bytes: 0,
            stored_bytes: 0,
            manifest: ManifestEntry {
                bytes: manifest.len() as u64,
                crc32: Crc32(crc32fast::hash(&manifest)),
                files: files.len() as u64,
                checksums: self.algorithm.to_string(),
            },
            tablespaces: self.tablespaces.clone(),
            volumes: Vec::new(),
            config: Vec::new(),
            version: "0.1.0".into(),
        };
        let (lineage, form) = (self.lineage(), self.form());
        let mut objects: Vec<(Key, Vec<u8>)> = vec![(lineage.backup_manifest(backup.id), manifest)];
        for (number, (tablespace, items)) in self.volumes.iter().enumerate() {
            let raw = tar_of(items);
            let stored = self.sealed(compressed(&raw));
            let entry = VolumeEntry {
                tablespace: *tablespace,
                number: number as u32 + 1,
                form,
                raw_bytes: raw.len() as u64,
                raw_crc32: Crc32(crc32fast::hash(&raw)),
                stored_bytes: stored.len() as u64,
                stored_crc32: Crc32(crc32fast::hash(&stored)),
                manifest_files: items.iter().filter(|item| item.is_listed).count() as u64,
            };
            backup.raw_bytes += raw.len() as u64;
            objects.push((lineage.volume(backup.id, entry.name(), form), stored));
            backup.volumes.push(entry);
        }
        for (name, path, content) in &self.config {
            let stored = self.sealed(content.to_vec());
            backup.config.push(ConfigEntry {
                name: name.to_string(),
                path: path.to_string(),
                form,
                raw_bytes: content.len() as u64,
                raw_crc32: Crc32(crc32fast::hash(content)),
                stored_bytes: stored.len() as u64,
                stored_crc32: Crc32(crc32fast::hash(&stored)),
            });
            objects.push((lineage.backup_config(backup.id, name, form).unwrap(), stored));
        }
        (self.change_backup)(&mut backup);
        let begin = BeginFile {
            schema: 1,
            id: backup.id,
            backup_type: BackupType::Full,
            parent: None,
            label: None,
            started: backup.started,
            slot_restart_lsn: backup.start_lsn,
            timeline: TimelineId(1),
            lease: None,
            host: None,
            version: "0.1.0".into(),
        };
        let json = |value: serde_json::Value| value.to_string().into_bytes();
        objects.push((lineage.backup_begin(backup.id), json(serde_json::to_value(&begin).unwrap())));
        objects.push((lineage.backup_json(backup.id), json(serde_json::to_value(&backup).unwrap())));
        for store in &self.stores {
            store.tamper(|stored| {
                for (key, body) in &objects {
                    stored.entry(key.clone()).or_insert_with(|| Bytes::from(body.clone()));
                }
            });
        }
        let copy = |index: usize| BackupCopy { repository: format!("store{index}"), chain: vec![backup.clone()] };
        RestorePlan {
            lineage,
            system_id: SYSTEM,
            segment_size: SegmentSize::MIB_16,
            copies: (0..self.stores.len()).map(copy).collect(),
            path: History::root(TimelineId(1)),
            follow: self.standby,
            standby: self.standby,
            target: Target::Latest,
            stop: Stop::End,
            inclusive: true,
            action: Action::Promote,
            start_lsn: backup.start_lsn,
            consistent_lsn: backup.stop_lsn,
            end_lsn: Lsn(0x400_0000),
            end_time: None,
            stop_at: None,
            replay: Replay { from: backup.start_lsn, to: Lsn(0x400_0000) },
            remarks: Vec::new(),
        }
    }

    fn holders(&self) -> Vec<Holder> {
        let holder = |(index, store): (usize, &MemoryStore)| {
            let keys = Keys { recipients: None, identities: self.identities.clone() };
            let backend: Arc<dyn Backend> = Arc::new(store.clone());
            Holder::new(&format!("store{index}"), Archive::new(backend, self.lineage()).with_keys(keys))
        };
        self.stores.iter().enumerate().map(holder).collect()
    }

    fn options(&self) -> ExecuteOptions {
        ExecuteOptions {
            pgdata: self.pgdata(),
            delta: self.delta,
            owner: Some((rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw())),
            tablespaces: self.mappings.clone(),
            primary_conninfo: None,
            jobs: None,
            seawall: vec!["/usr/bin/seawall".into(), "--config".into(), "/etc/sea wall.toml".into()],
            host: None,
        }
    }

    async fn restored(&self) -> Result<Restored, RestoreError> {
        execute(&self.stored(), &self.holders(), &self.options(), watch::channel(RestoreProgress::default()).0).await
    }

    /// It fails, as bad data does, and nothing can be started.
    async fn refused(&self) -> String {
        let error = self.restored().await.expect_err("this is not restored");
        assert_eq!(error.exit_code(), ExitCode::Data, "{error}");
        assert!(!self.pgdata().join("global/pg_control").exists());
        error.to_string()
    }

    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.pgdata().join(name)).unwrap()
    }

    /// Every file of the backup is there with its content, but for those a restore leaves out or writes itself.
    fn assert_whole(&self) {
        for (path, data) in self.listed_files() {
            let name = String::from_utf8(path.clone()).unwrap();
            let found = std::fs::read(self.pgdata().join(&name));
            match name.as_str() {
                "postgresql.auto.conf" => {}
                _ if members::is_dropped(&path) => {}
                _ => assert!(found.unwrap() == data, "{name}"),
            }
        }
    }

    fn volume_key(&self, index: usize) -> Key {
        let volume = self.stored().backup().volumes[index].clone();
        self.lineage().volume(self.id(), volume.name(), volume.form)
    }

    fn damage(&self, store: usize, key: &Key) {
        self.stores[store].tamper(|objects| {
            let mut body = objects[key].to_vec();
            let at = body.len() / 2;
            body[at] ^= 1;
            objects.insert(key.clone(), body.into());
        });
    }
}

#[tokio::test]
async fn a_directory_that_a_server_can_be_started_on() {
    let case = case();
    let restored = case.restored().await.unwrap();
    case.assert_whole();
    assert_eq!((restored.files, restored.kept_files, restored.pinned), (9, 0, true));
    let auto_conf = case.read("postgresql.auto.conf");
    assert!(
        auto_conf.contains("work_mem = '64MB'\n# of the source: primary_conninfo = 'host=source'\n"),
        "{auto_conf}"
    );
    let id = restored.id;
    let command = format!(
        "restore_command = '/usr/bin/seawall --config ''/etc/sea wall.toml'' wal-get --restore {id} %f \"%p\"'"
    );
    assert!(auto_conf.contains(&command), "{auto_conf}");
    assert_eq!(case.read("recovery.signal"), "");
    assert!(!case.pgdata().join("standby.signal").exists());
    assert!(!case.pgdata().join(ground::UNFINISHED).exists());
    assert!(case.pgdata().join("pg_wal/summaries").is_dir() && case.pgdata().join("pg_twophase").is_dir());
    assert_eq!(case.pgdata().metadata().unwrap().mode() & 0o7777, 0o700);
    let marker = RestoreMarker::read(&case.pgdata()).unwrap().unwrap();
    assert_eq!((marker.id, marker.end_lsn, marker.pinned), (id, Some(Lsn(0x400_0000)), true));
    let pins = case.holders()[0].archive.pins().await.unwrap();
    let (name, pin) = pins.first_key_value().unwrap();
    assert_eq!((name.id, pin.kind, pin.backup), (id.0, PinKind::Restore, case.id()));
    assert!(restored.start_command.ends_with(&format!("-D {} start", case.pgdata().display())));
    let manifest = case.pgdata().join("backup_manifest");
    assert_eq!(std::fs::read(manifest).unwrap(), manifest_of(&case.listed_files(), case.algorithm));
}

#[tokio::test]
async fn a_standby_lives_from_the_archive() {
    let case = case().with(|case| case.standby = true);
    case.restored().await.unwrap();
    assert!(case.pgdata().join("standby.signal").exists() && !case.pgdata().join("recovery.signal").exists());
    let auto_conf = case.read("postgresql.auto.conf");
    assert!(auto_conf.contains("recovery_target_timeline = 'latest'") && auto_conf.contains("primary_conninfo = ''"));
    assert_eq!(RestoreMarker::read(&case.pgdata()).unwrap().unwrap().end_lsn, None);
}

#[tokio::test]
async fn modes_follow_the_source() {
    let group = |case: &mut Case| {
        for item in case.volumes.iter_mut().flat_map(|(_, items)| items) {
            item.mode = if item.kind.is_dir() { 0o750 } else { 0o640 };
        }
    };
    let case = case().with(group);
    case.restored().await.unwrap();
    let mode = |name: &str| case.pgdata().join(name).metadata().unwrap().mode() & 0o7777;
    assert_eq!(["", "base/5", "base/5/1259", "global/pg_control"].map(mode), [0o750, 0o750, 0o640, 0o640]);
}

/// Each of them was put into a tar by somebody who wants a restore to write elsewhere, or too much.
#[tokio::test]
async fn hostile_members_are_refused_and_nothing_is_written_elsewhere() {
    let hostile: Vec<(Item, &str)> = vec![
        (file("../outside", b"x"), "`..`"),
        (file("base/../../outside", b"x"), "`..`"),
        (file("/tmp/seawall-outside", b"x"), "absolute"),
        (file("base//5", b"x"), "empty part"),
        (file("./base/x", b"x"), "`.`"),
        (directory("../outside/"), "`..`"),
        (item("base/link", tar::EntryType::Symlink, b""), "neither a file nor a directory"),
        (item("pg_wal", tar::EntryType::Symlink, b""), "neither a file nor a directory"),
        (item("base/5/hard", tar::EntryType::Link, b""), "neither a file nor a directory"),
        (item("base/device", tar::EntryType::Block, b""), "neither a file nor a directory"),
        (item("base/pipe", tar::EntryType::Fifo, b""), "neither a file nor a directory"),
        (file("pg_tblspc/16384/PG_18_1/5/1", b"x"), "a tar of its own"),
        (Item { is_listed: false, ..file("base/5/unlisted", b"x") }, "does not list"),
        (Item { is_listed: false, ..file("base/5/1259", b"x") }, "the manifest says 20000"),
        (Item { is_listed: false, ..file("base/5/1259", &[1; 20_000]) }, "a second time"),
        (Item { size: Some(1 << 60), is_listed: false, ..file("base/5/1259", b"") }, "more than the"),
        (item("base/5/sparse", tar::EntryType::GNUSparse, b""), "never writes"),
        (item("base/5/pax", tar::EntryType::XHeader, b""), "never writes"),
    ];
    for (item, fault) in hostile {
        let name = String::from_utf8_lossy(&item.name).into_owned();
        let case = case().with(|case| case.volumes[0].1.push(Item { is_listed: false, ..item }));
        let error = case.refused().await;
        assert!(error.contains(fault), "{name}: {error}");
        let names = std::fs::read_dir(case.scratch.path()).unwrap().count();
        assert!(names == 1 && !Path::new("/tmp/seawall-outside").exists(), "{name}");
    }
}

#[tokio::test]
async fn a_hostile_manifest_is_refused() {
    for path in ["../x", "/etc/cron.d/x", "base/./x", "a\0b", ""] {
        let case = case().with(|case| case.listed.push((path.into(), b"x".to_vec())));
        let error = case.refused().await;
        assert!(error.contains("no path in a data directory") || error.contains("path"), "{path:?}: {error}");
        assert!(!case.pgdata().join("PG_VERSION").exists());
    }
}

#[tokio::test]
async fn a_file_that_no_volume_holds_is_missed() {
    let case = case().with(|case| case.listed.push((b"base/5/2619".to_vec(), Vec::new())));
    let error = case.refused().await;
    assert!(error.contains("no volume holds \"base/5/2619\""), "{error}");
}

/// Volumes that decode to more than they say, and pages that are not what the manifest lists.
#[tokio::test]
async fn content_is_held_to_what_was_promised() {
    let bomb = case().with(|case| case.change_backup = |backup| backup.volumes[0].raw_bytes -= 1);
    assert!(bomb.refused().await.contains("decodes to more than"));
    let short = case().with(|case| case.change_backup = |backup| backup.volumes[0].raw_bytes += 1);
    assert!(short.refused().await.contains("expected"));
    let raw = case().with(|case| case.change_backup = |backup| backup.volumes[0].raw_crc32 = Crc32(1));
    assert!(raw.refused().await.contains("raw bytes"));
    let stored = case().with(|case| case.change_backup = |backup| backup.volumes[1].stored_crc32 = Crc32(1));
    assert!(stored.refused().await.contains("stored bytes"));
    for algorithm in [ChecksumAlgorithm::Crc32c, ChecksumAlgorithm::Sha256, ChecksumAlgorithm::Sha512] {
        let case = case().with(|case| {
            case.algorithm = algorithm;
            // The manifest lists another content of the same length.
            case.volumes[0].1[3].is_listed = false;
            case.listed.push((b"base/5/1259".to_vec(), vec![9; 20_000]));
        });
        assert!(case.refused().await.contains("the manifest says"), "{algorithm}");
    }
}

#[tokio::test]
async fn a_volume_comes_from_the_repository_that_has_it_whole() {
    for what in ["missing", "damaged"] {
        let case = case().with(|case| case.stores.push(MemoryStore::default()));
        let [first, last, manifest] =
            [case.volume_key(0), case.volume_key(1), case.lineage().backup_manifest(case.id())];
        for (store, key) in [(0, &first), (1, &last), (0, &manifest)] {
            match what {
                "missing" => case.stores[store].tamper(|objects| drop(objects.remove(key))),
                _ => case.damage(store, key),
            }
        }
        let plan = case.stored_plan();
        let progress = watch::channel(RestoreProgress::default());
        execute(&plan, &case.holders(), &case.options(), progress.0).await.unwrap();
        case.assert_whole();
        for store in [0, 1] {
            case.stores[store].tamper(|objects| drop(objects.remove(&first)));
        }
        let again = ExecuteOptions { pgdata: case.scratch.path().join("again"), ..case.options() };
        let error = execute(&plan, &case.holders(), &again, watch::channel(RestoreProgress::default()).0).await;
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("volume base/0001.tar") && error.contains("store0") && error.contains("store1"),
            "{error}"
        );
        assert!(!again.pgdata.join("global/pg_control").exists());
    }
}

impl Case {
    /// The plan, without storing anything again.
    fn stored_plan(&self) -> RestorePlan {
        let keep: Vec<_> = self.stores.iter().map(|store| store.objects()).collect();
        let plan = self.stored();
        for (store, kept) in self.stores.iter().zip(keep) {
            store.tamper(|objects| *objects = kept);
        }
        plan
    }
}

#[tokio::test]
async fn a_backup_that_is_being_deleted_is_not_restored() {
    let case = case();
    let plan = case.stored();
    case.stores[0].tamper(|objects| {
        objects.insert(case.lineage().backup_dead(case.id()), Bytes::from_static(b"{}"));
    });
    let error = execute(&plan, &case.holders(), &case.options(), watch::channel(RestoreProgress::default()).0).await;
    assert!(error.unwrap_err().to_string().contains("being deleted"));
}

#[tokio::test]
async fn encrypted_backups_need_their_key_before_anything_is_written() {
    let keys = |secret: &str| Identities::parse(secret.as_bytes()).unwrap();
    let ours = keys(OUR_KEY);
    let sealed = |identities: Option<Identities>| {
        case().with(|case| {
            case.recipients = Some(Recipients::parse(&ours.public_keys()).unwrap());
            case.identities = identities;
        })
    };
    let case = sealed(Some(ours.clone()));
    case.restored().await.unwrap();
    case.assert_whole();
    for identities in [None, Some(keys(OTHER_KEY))] {
        let case = sealed(identities);
        let error = case.restored().await.unwrap_err();
        assert_eq!(error.exit_code(), ExitCode::Config);
        assert!(error.hint().unwrap().contains("identity_file"), "{error}");
        assert!(!case.pgdata().join("PG_VERSION").exists());
    }
}

/// Made for this test.
const OUR_KEY: &str = "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX";
const OTHER_KEY: &str = "AGE-SECRET-KEY-1GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33";

#[tokio::test]
async fn tablespaces_go_where_they_are_sent() {
    let case = case().with(|case| {
        let old = case.scratch.path().join("source's").to_str().unwrap().to_string();
        std::fs::create_dir_all(format!("{old}/PG_18_202506291")).unwrap();
        case.tablespaces.push(TablespaceEntry { oid: TABLESPACE, location: old.clone() });
        case.tablespaces.push(TablespaceEntry { oid: 16390, location: "pg_tblspc/16390".into() });
        let member = |name: &str| vec![directory("PG_18_202506291/5/"), file(name, b"page")];
        case.volumes.insert(0, (Some(TABLESPACE), member("PG_18_202506291/5/1")));
        case.volumes.insert(1, (Some(16390), member("PG_18_202506291/5/2")));
        let base = &mut case.volumes[2].1;
        base.push(file("tablespace_map", format!("{TABLESPACE} {old}\n").as_bytes()));
        base.push(item("pg_tblspc/16384/", tar::EntryType::Symlink, b""));
    });
    let error = case.restored().await.unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::Usage);
    assert!(error.to_string().contains("a server uses"), "{error}");
    let [old, new] = ["source's", "new place"].map(|name| case.scratch.path().join(name));
    let case = case.with(|case| case.mappings.push(Mapping { old: old.clone(), new: new.clone() }));
    case.restored().await.unwrap();
    case.assert_whole();
    assert_eq!(std::fs::read_link(case.pgdata().join("pg_tblspc/16384")).unwrap(), new);
    assert_eq!(case.read("tablespace_map"), format!("{TABLESPACE} {}\n", new.display()));
    assert_eq!(std::fs::read(new.join("PG_18_202506291/5/1")).unwrap(), b"page");
    assert_eq!(case.read("pg_tblspc/16390/PG_18_202506291/5/2"), "page");
    assert_eq!(std::fs::read_dir(old.join("PG_18_202506291")).unwrap().count(), 0);
    // Again, over what is there.
    let case = case.with(|case| case.delta = true);
    std::fs::write(new.join("PG_18_202506291/5/1"), b"gone").unwrap();
    std::fs::write(new.join("PG_18_202506291/5/3"), b"superfluous").unwrap();
    std::fs::create_dir(new.join("PG_17_202406281")).unwrap();
    case.restored().await.unwrap();
    case.assert_whole();
    assert!(!new.join("PG_18_202506291/5/3").exists() && new.join("PG_17_202406281").exists());
}

#[tokio::test]
async fn delta_keeps_what_matches_and_nothing_else() {
    let case = case();
    case.restored().await.unwrap();
    let at = |name: &str| case.pgdata().join(name);
    let outside = case.scratch.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("kept"), b"").unwrap();
    std::fs::write(at("global/1262"), [3; 9000]).unwrap();
    std::fs::write(at("base/5/9999"), b"superfluous").unwrap();
    std::fs::create_dir(at("base/6")).unwrap();
    std::fs::write(at("base/6/1"), b"a dropped database").unwrap();
    std::fs::write(at("pg_wal/000000010000000000000002"), b"WAL of another line").unwrap();
    std::fs::remove_dir_all(at("pg_xact")).unwrap();
    symlink(&outside, at("pg_xact")).unwrap();
    std::fs::remove_file(at("base/5/empty")).unwrap();
    std::fs::create_dir(at("base/5/empty")).unwrap();
    let inode = at("base/5/1259").metadata().unwrap().ino();
    let error = case.restored().await.unwrap_err();
    assert_eq!(error.exit_code(), ExitCode::Usage, "{error}");
    assert!(error.to_string().contains("PostgreSQL 18 data of system 7"), "{error}");
    let case = case.with(|case| case.delta = true);
    let restored = case.restored().await.unwrap();
    case.assert_whole();
    for name in ["base/5/9999", "base/6", "pg_wal/000000010000000000000002"] {
        assert!(!case.pgdata().join(name).exists(), "{name}");
    }
    assert!(!case.pgdata().join("pg_xact").is_symlink() && outside.join("kept").exists());
    assert_eq!(case.pgdata().join("base/5/1259").metadata().unwrap().ino(), inode);
    // Not kept: what was damaged or written anew, what the restore leaves out, pg_control.
    assert_eq!(restored.kept_files, 4, "{restored:?}");
    // A file that another directory has too would be changed there by the server.
    std::fs::hard_link(case.pgdata().join("base/5/1259"), outside.join("theirs")).unwrap();
    case.restored().await.unwrap();
    assert_ne!(case.pgdata().join("base/5/1259").metadata().unwrap().ino(), inode);
}

/// Where nothing is known of a file's content nothing is kept.
#[tokio::test]
async fn delta_trusts_no_file_without_a_checksum() {
    let case = case().with(|case| case.algorithm = ChecksumAlgorithm::None);
    case.restored().await.unwrap();
    std::fs::write(case.pgdata().join("global/1262"), [3; 9000]).unwrap();
    let case = case.with(|case| case.delta = true);
    case.restored().await.unwrap();
    case.assert_whole();
}

/// As after a kill at any moment: whatever is left, nothing starts, and --delta ends it.
#[tokio::test]
async fn what_was_interrupted_is_gone_on_with() {
    let case = case();
    let plan = case.stored();
    let volume = case.volume_key(1);
    let mut taken = None;
    case.stores[0].tamper(|objects| taken = objects.remove(&volume));
    let run = |options: ExecuteOptions| {
        let (plan, holders) = (plan.clone(), case.holders());
        async move { execute(&plan, &holders, &options, watch::channel(RestoreProgress::default()).0).await }
    };
    let error = run(ExecuteOptions { jobs: Some(1), ..case.options() }).await.unwrap_err();
    assert!(matches!(error, RestoreError::Unobtainable { .. }), "{error}");
    assert!(case.pgdata().join("base/5/1259").exists() && !case.pgdata().join("global/pg_control").exists());
    case.stores[0].tamper(|objects| drop(objects.insert(volume, taken.unwrap())));
    let error = run(case.options()).await.unwrap_err().to_string();
    assert!(error.contains("unfinished restore of backup 20261122T110000Z-full"), "{error}");
    let restored = run(ExecuteOptions { delta: true, ..case.options() }).await.unwrap();
    assert_eq!(restored.kept_files, 3, "{restored:?}");
    case.assert_whole();
}

#[tokio::test]
async fn configuration_from_elsewhere_goes_into_the_copy() {
    let case = case().with(|case| {
        case.volumes[1].1.retain(|item| item.name != b"postgresql.conf");
        case.config = vec![
            (
                "postgresql.conf",
                "/nowhere/18/main/postgresql.conf",
                b"data_directory = '/live'\ninclude_dir = 'conf.d'\n",
            ),
            ("pg_hba.conf", "/nowhere/18/main/pg_hba.conf", b"local all all peer\n"),
            ("conf.d/a.conf", "/nowhere/18/main/conf.d/a.conf", b"port = 6000\n"),
        ];
    });
    let restored = case.restored().await.unwrap();
    let main = case.read("postgresql.conf");
    assert!(main.contains(&format!("data_directory = '{}'", case.pgdata().display())), "{main}");
    assert_eq!(case.read("conf.d/a.conf"), "port = 6000\n");
    assert!(restored.remarks.iter().any(|remark| remark.contains("/nowhere/18/main")), "{restored:?}");
}

#[tokio::test]
async fn progress_comes_to_its_end() {
    let case = case().with(|case| case.volumes[0].1.push(file("base/5/large", &vec![7; 5 << 20])));
    let plan = case.stored();
    let (sender, mut receiver) = watch::channel(RestoreProgress::default());
    let seen = Arc::new(Mutex::new(Vec::new()));
    let watching = {
        let seen = seen.clone();
        tokio::spawn(async move {
            while receiver.changed().await.is_ok() {
                seen.lock().unwrap().push(*receiver.borrow_and_update());
            }
        })
    };
    execute(&plan, &case.holders(), &case.options(), sender).await.unwrap();
    watching.await.unwrap();
    let seen = seen.lock().unwrap();
    assert_eq!(seen.last().unwrap().phase, Phase::Finished);
    assert!(seen.iter().all(|progress| progress.bytes_done <= progress.bytes_total), "{seen:?}");
}

/// What `expire` does before the restore has put its pin, and after the plan was made.
async fn announce(archive: &Archive, first: &str, last: &str, backups: &[BackupId]) -> LedgerFact {
    let mut fact = LedgerFact::new(FactKind::Expired, "2026-11-22T11:00:00Z".parse().unwrap(), "retention");
    fact.segments.push(SegmentRange { first: first.parse().unwrap(), last: last.parse().unwrap() });
    let ids: Vec<String> = backups.iter().map(BackupId::to_string).collect();
    fact.details.insert(BACKUPS.into(), ids.into());
    let fact = fact.with_announcement(7);
    archive.append_ledger(&fact, 7).await.unwrap();
    fact
}

#[tokio::test]
async fn one_that_needs_what_was_announced_meanwhile_writes_nothing() {
    let needed = "000000010000000000000002";
    for stores in [1, 2] {
        let case = case().with(|case| case.stores = (0..stores).map(|_| MemoryStore::default()).collect());
        let plan = case.stored();
        let holders = case.holders();
        assert_eq!((plan.start_lsn.0 >> 24, plan.end_lsn), (2, Lsn(0x400_0000)), "segments 2 and 3");
        announce(&holders[0].archive, "000000010000000000000000", needed, &[]).await;
        if let Some(other) = holders.get(1) {
            let name = needed.parse().unwrap();
            other
                .archive
                .backend
                .put_new(&case.lineage().segment(name, Form::Plain), &[Bytes::from("x")])
                .await
                .unwrap();
        }
        let restored = case.restored().await;
        let pins = holders[0].archive.pins().await.unwrap();
        match (stores, restored) {
            (1, Err(error @ RestoreError::Overtaken { .. })) => {
                assert_eq!(error.exit_code(), ExitCode::TryAgain);
                assert!(error.to_string().contains(needed), "{error}");
                assert!(pins.values().all(|pin| pin.released) && !pins.is_empty(), "{pins:?}");
                assert!(std::fs::read_dir(case.pgdata()).unwrap().next().is_none());
            }
            (2, Ok(_)) => assert!(pins.values().all(|pin| !pin.released), "another repository keeps it"),
            (_, other) => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn what_is_announced_counts_for_what_the_restore_needs_only() {
    let needed = ["000000010000000000000002", "000000010000000000000003"];
    for (first, last, is_needed) in [
        ("000000010000000000000000", "000000010000000000000001", false),
        ("000000010000000000000004", "000000010000000000000009", false),
        ("000000020000000000000000", "000000020000000000000009", false),
        (needed[1], needed[1], true),
    ] {
        let case = case();
        case.stored();
        announce(&case.holders()[0].archive, first, last, &[]).await;
        let restored = case.restored().await;
        assert_eq!(matches!(restored, Err(RestoreError::Overtaken { .. })), is_needed, "{first}: {restored:?}");
    }
    // Taken back, it is as if it had never been said.
    let case = case();
    case.stored();
    let archive = &case.holders()[0].archive;
    let mut fact = announce(archive, needed[0], needed[0], &[case.id()]).await;
    assert!(matches!(case.restored().await, Err(RestoreError::Overtaken { .. })));
    fact.kind = FactKind::ExpiredWithdrawn;
    fact.segments.clear();
    archive.append_ledger(&fact, 7).await.unwrap();
    case.restored().await.unwrap();
}

#[tokio::test]
async fn a_backup_that_goes_is_not_restored_unless_another_repository_keeps_it() {
    for (stores, by_ledger) in [(1, false), (1, true), (2, false), (2, true)] {
        let case = case().with(|case| case.stores = (0..stores).map(|_| MemoryStore::default()).collect());
        case.stored();
        let archive = &case.holders()[0].archive;
        if by_ledger {
            announce(archive, "000000010000000000000000", "000000010000000000000000", &[case.id()]).await;
        } else {
            case.stores[0].tamper(|objects| drop(objects.remove(&case.lineage().backup_begin(case.id()))));
        }
        let (plan, options) = (case.stored_plan(), case.options());
        let restored = execute(&plan, &case.holders(), &options, watch::channel(RestoreProgress::default()).0).await;
        match stores {
            1 => assert!(matches!(restored, Err(RestoreError::Overtaken { .. })), "{restored:?}"),
            _ => drop(restored.unwrap()),
        }
    }
}
