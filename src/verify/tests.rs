//! Every kind of damage, one by one, on archives made by hand: found in the right mode, at the right object; and none in
//! a sound one. Archives that agents made are looked at in `tests/it/verify.rs` and in the simulation.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::*;
use crate::catalog::backup::{ManifestEntry, VolumeEntry};
use crate::catalog::manifest::{ChecksumAlgorithm, FileHasher};
use crate::catalog::{Crc32, FactKind, IndexEntry, IndexFile, LineageFile};
use crate::codec::encrypt::{Encryptor, Identities, Keys, Recipients};
use crate::codec::{Encoder, FRAME_BYTES, Form};
use crate::repository::Key;
use crate::repository::layout::{BackupType, Epoch, IndexName, Lineage, TailName, segment_at};
use crate::testkit::store::{Faults, FaultyStore, MemoryStore};
use crate::testkit::wal_writer::WalWriter;
use crate::wal::{Carry, History, Lsn, ScanOptions, Scanner, SegmentName, SegmentSize, SystemId, TimelineId};

const MIB: u64 = 1 << 20;
const SYSTEM: SystemId = SystemId(7);
const IDENTITY: &str = "AGE-SECRET-KEY-1GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33";
const START: Lsn = Lsn(3 * MIB);

fn size() -> SegmentSize {
    SegmentSize::new(MIB).unwrap()
}

fn now() -> Timestamp {
    "2026-11-22T11:00:00Z".parse().unwrap()
}

fn lineage() -> Lineage {
    Lineage::new("main", SYSTEM, 1)
}

fn name(number: u64) -> SegmentName {
    segment_at(TimelineId(1), Lsn(number * MIB), size())
}

fn keys() -> Keys {
    let identities = Identities::parse(IDENTITY.as_bytes()).unwrap();
    Keys { recipients: Some(Recipients::parse(&identities.public_keys()).unwrap()), identities: Some(identities) }
}

/// An archive of timeline 1, segments 3 to 7 sealed and a tail of segment 8; of timeline 2, which leaves in segment 6,
/// segments 6 and 7 and two tails; and of a backup of one volume and a file of configuration.
#[derive(Clone)]
struct Built {
    store: MemoryStore,
    keys: Keys,
    form: Form,
}

const BACKUP_WAL: (u64, u64) = (4 * MIB + 40, 5 * MIB + 4000);

impl Built {
    fn new(form: Form) -> Built {
        let keys = if form == Form::Encrypted { keys() } else { Keys::default() };
        let built = Built { store: MemoryStore::default(), keys, form };
        let file = LineageFile {
            schema: 1,
            system_id: SYSTEM,
            server_version: "18.1".into(),
            segment_size: size(),
            created: now(),
            start_timeline: TimelineId(1),
            start_lsn: Some(START),
            slot: None,
        };
        built.json(&lineage().lineage_json(), &file);
        let mut wal = WalWriter::new(18, SYSTEM, size(), TimelineId(1), START);
        fill(&mut wal, Lsn(6 * MIB + 300_000));
        let fork = *wal.record_ends().last().unwrap();
        let mut child = wal.fork(fork, TimelineId(2));
        child.end_of_recovery(now());
        fill(&mut wal, Lsn(8 * MIB + 200_000));
        fill(&mut child, Lsn(8 * MIB + 100_000));
        built.timeline(&wal, 3, 8, &[8 * MIB], &[3..=5, 6..=7]);
        built.put(&lineage().history(TimelineId(2)), child.history_file().as_bytes());
        built.timeline(&child, 6, 8, &[8 * MIB, 8 * MIB + 50_000], &[6..=6, 7..=7]);
        built.backup();
        built
    }

    /// Another store with the same content.
    fn copy(&self) -> Built {
        let store = MemoryStore::default();
        store.tamper(|objects| *objects = self.store.objects());
        Built { store, ..self.clone() }
    }

    fn put(&self, key: &Key, body: &[u8]) {
        self.store.tamper(|objects| drop(objects.insert(key.clone(), Bytes::copy_from_slice(body))));
    }

    fn remove(&self, key: &Key) {
        self.store.tamper(|objects| assert!(objects.remove(key).is_some(), "{key} was there"));
    }

    fn json(&self, key: &Key, value: &impl serde::Serialize) {
        self.put(key, &serde_json::to_vec(value).unwrap());
    }

    fn body(&self, key: &Key) -> Vec<u8> {
        self.store.objects().get(key).unwrap_or_else(|| panic!("{key} is there")).to_vec()
    }

    fn change(&self, key: &Key, change: impl FnOnce(&mut Vec<u8>)) {
        let mut body = self.body(key);
        change(&mut body);
        self.put(key, &body);
    }

    fn sealed(&self, plain: Vec<u8>) -> Vec<u8> {
        match self.form {
            Form::Plain => plain,
            Form::Encrypted => {
                let mut encryptor = Encryptor::new(self.keys.recipients.as_ref().unwrap());
                let first = encryptor.push(&plain);
                [first, encryptor.finish()].concat()
            }
        }
    }

    fn encoded(&self, raw: &[u8]) -> Vec<u8> {
        let mut encoder = Encoder::new(1);
        self.sealed(raw.chunks(FRAME_BYTES).flat_map(|frame| encoder.encode(frame).bytes.to_vec()).collect())
    }

    /// Segments `first` to before `open` as an agent seals them, the rest as tails that begin at `tails`.
    fn timeline(
        &self,
        wal: &WalWriter,
        first: u64,
        open: u64,
        tails: &[u64],
        groups: &[std::ops::RangeInclusive<u64>],
    ) {
        let history = History::parse(wal.timeline(), wal.history_file().as_bytes()).unwrap();
        let options = ScanOptions { system_id: SYSTEM, segment_size: size(), history };
        let mut scanner = Scanner::new(options, Lsn(first * MIB), Carry::default());
        let begin = Lsn(first * MIB);
        scanner.feed(begin, wal.bytes(begin..wal.flush_lsn())).unwrap();
        let mut entries = BTreeMap::new();
        while let Some((number, summary)) = scanner.poll_segment() {
            let (start, end) = (Lsn(number.0 * MIB), Lsn((number.0 + 1) * MIB));
            let (raw, segment) = (wal.bytes(start..end), segment_at(wal.timeline(), start, size()));
            let stored = self.encoded(raw);
            self.put(&lineage().segment(segment, self.form), &stored);
            let entry = IndexEntry {
                segment,
                start_lsn: start,
                end_lsn: end,
                raw_bytes: MIB,
                raw_crc32: Crc32(crc32fast::hash(raw)),
                stored_bytes: stored.len() as u64,
                stored_crc32: Crc32(crc32fast::hash(&stored)),
                summary,
            };
            entries.insert(number.0, entry);
        }
        assert!(entries.keys().copied().eq(first..open), "{:?}", entries.keys());
        for group in groups {
            let name = |number: &u64| segment_at(wal.timeline(), Lsn(number * MIB), size());
            let index = IndexName { first: name(group.start()), last: name(group.end()), epoch: Epoch(1) };
            let entries = group.clone().map(|number| entries[&number].clone()).collect();
            self.json(&lineage().index(index), &IndexFile { schema: 1, segment_size: size(), entries });
        }
        let ends = tails[1..].iter().copied().chain([wal.flush_lsn().0]);
        for (from, to) in tails.iter().zip(ends) {
            let raw = wal.bytes(Lsn(*from)..Lsn(to));
            let tail = self.tail_name(Lsn(*from), raw);
            self.put(&lineage().tail(segment_at(wal.timeline(), Lsn(*from), size()), &tail), &self.encoded(raw));
        }
    }

    fn tail_name(&self, from: Lsn, raw: &[u8]) -> TailName {
        TailName {
            epoch: Epoch(1),
            from,
            to: from + raw.len() as u64,
            raw_crc32: crc32fast::hash(raw),
            last_commit: None,
            form: self.form,
        }
    }

    fn id(&self) -> BackupId {
        BackupId::new(now(), BackupType::Full)
    }

    fn files() -> Vec<(&'static str, Vec<u8>)> {
        vec![("PG_VERSION", b"18\n".to_vec()), ("base/5/1259", vec![1; 20_000]), ("global/pg_control", vec![7; 512])]
    }

    fn backup(&self) {
        self.store_backup(&Built::files(), &Built::files());
    }

    fn store_backup(&self, held: &[(&str, Vec<u8>)], listed: &[(&str, Vec<u8>)]) {
        let (id, manifest, tar) = (self.id(), manifest_of(listed), tar_of(held));
        let stored = self.encoded(&tar);
        let volume = VolumeEntry {
            tablespace: None,
            number: 1,
            form: self.form,
            raw_bytes: tar.len() as u64,
            raw_crc32: Crc32(crc32fast::hash(&tar)),
            stored_bytes: stored.len() as u64,
            stored_crc32: Crc32(crc32fast::hash(&stored)),
            manifest_files: listed.len() as u64,
        };
        self.put(&lineage().volume(id, volume.name(), self.form), &stored);
        self.put(&lineage().backup_manifest(id), &manifest);
        let config = self.sealed(b"port = 5432\n".to_vec());
        self.put(&lineage().backup_config(id, "postgresql.conf", self.form).unwrap(), &config);
        let file = BackupFile {
            schema: 1,
            id,
            backup_type: BackupType::Full,
            parent: None,
            fallback: None,
            label: None,
            started: now(),
            finished: now(),
            system_id: SYSTEM,
            server_version: "18.1".into(),
            segment_size: size(),
            timeline: TimelineId(1),
            start_lsn: Lsn(BACKUP_WAL.0),
            stop_lsn: Lsn(BACKUP_WAL.1),
            stop_time: Some(now()),
            from_standby: false,
            data_checksums: None,
            raw_bytes: tar.len() as u64,
            stored_bytes: stored.len() as u64,
            manifest: ManifestEntry {
                bytes: manifest.len() as u64,
                crc32: Crc32(crc32fast::hash(&manifest)),
                files: listed.len() as u64,
                checksums: "CRC32C".into(),
            },
            tablespaces: Vec::new(),
            volumes: vec![volume],
            config: vec![crate::catalog::backup::ConfigEntry {
                name: "postgresql.conf".into(),
                path: "/etc/postgresql.conf".into(),
                form: self.form,
                raw_bytes: 12,
                raw_crc32: Crc32(crc32fast::hash(b"port = 5432\n")),
                stored_bytes: config.len() as u64,
                stored_crc32: Crc32(crc32fast::hash(&config)),
            }],
            version: "0".into(),
        };
        self.json(&lineage().backup_json(id), &file);
    }

    fn segment(&self, number: u64) -> Key {
        lineage().segment(name(number), self.form)
    }

    fn index(&self) -> Key {
        lineage().index(IndexName { first: name(3), last: name(5), epoch: Epoch(1) })
    }

    fn volume(&self) -> Key {
        let volume =
            crate::repository::layout::VolumeName { stream: crate::repository::layout::TarStream::Base, number: 1 };
        lineage().volume(self.id(), volume, self.form)
    }

    fn tail_of(&self, timeline: u32, place: usize) -> Key {
        let directory = lineage().tail_directory(segment_at(TimelineId(timeline), Lsn(8 * MIB), size()));
        let prefix = format!("{directory}/");
        self.store.objects().into_keys().filter(|key| key.as_str().starts_with(&prefix)).nth(place).unwrap()
    }

    fn change_index(&self, change: impl FnOnce(&mut IndexFile)) {
        let mut file: IndexFile = serde_json::from_slice(&self.body(&self.index())).unwrap();
        change(&mut file);
        self.json(&self.index(), &file);
    }

    fn change_backup(&self, change: impl FnOnce(&mut BackupFile)) {
        let key = lineage().backup_json(self.id());
        let mut file: BackupFile = serde_json::from_slice(&self.body(&key)).unwrap();
        change(&mut file);
        self.json(&key, &file);
    }

    fn archive(&self) -> Archive {
        Archive::new(Arc::new(self.store.clone()), lineage()).with_keys(self.keys.clone())
    }

    fn options(&self, mode: Mode) -> VerifyOptions {
        let clock = Arc::new(|| "2026-11-22T12:00:00Z".parse().unwrap());
        VerifyOptions { mode, share: 1.0, second_look: Duration::ZERO, now: Now(clock), ..VerifyOptions::default() }
    }

    async fn look(&self, mode: Mode) -> Report {
        look_at(&self.archive(), &self.options(mode)).await
    }

    fn facts(&self, kind: FactKind) -> Vec<LedgerFact> {
        let objects = self.store.objects();
        let ledger = objects.iter().filter(|(key, _)| key.as_str().starts_with("main/7/ledger/"));
        let facts = ledger.filter_map(|(_, body)| serde_json::from_slice::<LedgerFact>(body).ok());
        facts.filter(|fact| fact.kind == kind).collect()
    }
}

async fn look_at(archive: &Archive, options: &VerifyOptions) -> Report {
    let (progress, _watching) = watch::channel(Progress::default());
    let outcome = verify(archive, options, &progress).await;
    assert!(outcome.failure.is_none(), "{:?}", outcome.failure);
    outcome.report
}

fn fill(wal: &mut WalWriter, until: Lsn) {
    let mut xid = 700;
    while wal.flush_lsn() < until {
        xid += 1;
        let filler: Vec<u8> = (0..30_000).map(|i| ((i * xid) >> 5) as u8).collect();
        wal.insert(xid, &filler);
        wal.commit(xid, now());
        wal.restore_point(&format!("p{xid}"), now());
    }
}

fn tar_of(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let mut out = Vec::new();
    for (path, data) in files {
        let mut header = tar::Header::new_ustar();
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.set_entry_type(tar::EntryType::Regular);
        header.set_mode(0o600);
        header.set_uid(26);
        header.set_gid(26);
        header.set_mtime(1_700_000_000);
        header.set_size(data.len() as u64);
        header.set_cksum();
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(data);
        out.resize(out.len().next_multiple_of(512), 0);
    }
    out.resize(out.len() + 1024, 0);
    out
}

fn manifest_of(files: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let line = |(path, data): &(&str, Vec<u8>)| {
        let mut hasher = FileHasher::new(ChecksumAlgorithm::Crc32c);
        hasher.update(data);
        format!(
            "{{ \"Path\": \"{path}\", \"Size\": {}, \"Last-Modified\": \"2026-11-22 11:00:00 GMT\", \
             \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{}\" }}",
            data.len(),
            hasher.finish()
        )
    };
    let lines: Vec<String> = files.iter().map(line).collect();
    let text = format!(
        "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": 7,\n\"Files\": [\n{}\n],\n\"WAL-Ranges\": [\n\
         {{ \"Timeline\": 1, \"Start-LSN\": \"0/{:X}\", \"End-LSN\": \"0/{:X}\" }}\n],\n",
        lines.join(",\n"),
        BACKUP_WAL.0,
        BACKUP_WAL.1
    );
    let sum = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes());
    let sum: String = sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{text}\"Manifest-Checksum\": \"{sum}\"}}\n").into_bytes()
}

fn below(key: &Key) -> String {
    lineage().below(key).unwrap().to_string()
}

fn shown(report: &Report) -> String {
    let lines = report.findings.iter().map(|finding| format!("{}: {}", finding.fault.object, finding.fault.what));
    lines.chain(report.notes.lines.iter().map(|line| format!("note {line}"))).collect::<Vec<_>>().join("\n")
}

fn objects(report: &Report) -> Vec<&str> {
    report.findings.iter().map(|finding| finding.fault.object.as_str()).collect()
}

#[tokio::test]
async fn a_sound_archive_has_no_fault() {
    for form in [Form::Plain, Form::Encrypted] {
        let built = Built::new(form);
        for mode in Mode::ALL {
            let report = built.look(mode).await;
            assert!(report.is_sound() && report.complete, "{form:?} {mode}: {}", shown(&report));
            assert!(report.notes.lines.is_empty() && report.notes.unknown_count == 0, "{}", shown(&report));
            assert_eq!((report.counts.segments, report.counts.backups, report.counts.volumes), (7, 1, 1));
            let read = if mode == Mode::Quick { 0 } else { 7 };
            assert_eq!((report.counts.segments_read, report.counts.unexamined), (read, 0), "{mode}");
        }
        let facts = built.facts(FactKind::Verify);
        assert_eq!(facts.len(), 3);
        assert!(facts.iter().all(|fact| VerifyRecord::of(fact).unwrap().complete));
        assert!(built.facts(FactKind::Damaged).is_empty());
    }
}

/// Damage, the modes that find it, where, and as what.
struct Case {
    what: &'static str,
    damage: fn(&Built),
    least: Mode,
    object: fn(&Built) -> Key,
    kind: FaultKind,
}

fn flip(body: &mut [u8], at: usize) {
    body[at] ^= 0x10;
}

const CASES: &[Case] = &[
    Case {
        what: "a bit at the head of a segment",
        damage: |built| built.change(&built.segment(4), |body| flip(body, 3)),
        least: Mode::Sample,
        object: |built| built.segment(4),
        kind: FaultKind::Content,
    },
    Case {
        what: "a bit in the middle of a segment",
        damage: |built| built.change(&built.segment(4), |body| flip(body, 30_000)),
        least: Mode::Sample,
        object: |built| built.segment(4),
        kind: FaultKind::Content,
    },
    Case {
        what: "a bit at the end of a segment",
        damage: |built| {
            built.change(&built.segment(4), |body| {
                let last = body.len() - 1;
                flip(body, last);
            });
        },
        least: Mode::Sample,
        object: |built| built.segment(4),
        kind: FaultKind::Content,
    },
    Case {
        what: "a truncated segment",
        damage: |built| built.change(&built.segment(4), |body| body.truncate(1000)),
        least: Mode::Quick,
        object: |built| built.segment(4),
        kind: FaultKind::Size,
    },
    Case {
        what: "an empty segment",
        damage: |built| built.change(&built.segment(5), Vec::clear),
        least: Mode::Quick,
        object: |built| built.segment(5),
        kind: FaultKind::Size,
    },
    Case {
        what: "a segment that is not there",
        damage: |built| built.remove(&built.segment(3)),
        least: Mode::Quick,
        object: |built| built.segment(3),
        kind: FaultKind::Missing,
    },
    Case {
        what: "an index file that is no JSON",
        damage: |built| built.change(&built.index(), |body| flip(body, 0)),
        least: Mode::Quick,
        object: Built::index,
        kind: FaultKind::Record,
    },
    Case {
        what: "an index file without one of its entries",
        damage: |built| built.change_index(|file| drop(file.entries.remove(1))),
        least: Mode::Quick,
        object: Built::index,
        kind: FaultKind::Record,
    },
    Case {
        what: "an index entry with another stored CRC",
        damage: |built| built.change_index(|file| file.entries[1].stored_crc32.0 ^= 1),
        least: Mode::Sample,
        object: |built| built.segment(4),
        kind: FaultKind::Content,
    },
    Case {
        what: "an index entry with another raw CRC",
        damage: |built| built.change_index(|file| file.entries[1].raw_crc32.0 ^= 1),
        least: Mode::Sample,
        object: |built| built.segment(4),
        kind: FaultKind::Content,
    },
    Case {
        what: "an index entry with another count of records",
        damage: |built| built.change_index(|file| file.entries[1].summary.record_count += 1),
        least: Mode::Full,
        object: Built::index,
        kind: FaultKind::Record,
    },
    Case {
        what: "an index entry without a restore point",
        damage: |built| built.change_index(|file| drop(file.entries[1].summary.restore_points.pop())),
        least: Mode::Full,
        object: Built::index,
        kind: FaultKind::Record,
    },
    Case {
        what: "an index entry with another last record",
        damage: |built| built.change_index(|file| file.entries[1].summary.carry.last_record = Some(Lsn(4 * MIB + 40))),
        least: Mode::Full,
        object: Built::index,
        kind: FaultKind::Record,
    },
    Case {
        what: "WAL that is none, with an index that says the same",
        damage: |built| {
            let raw: Vec<u8> = (0..MIB).map(|i| (i % 251) as u8).collect();
            built.replace_segment(4, &raw);
        },
        least: Mode::Full,
        object: |built| built.segment(4),
        kind: FaultKind::Chain,
    },
    Case {
        what: "a segment of another cluster, with an index that says so",
        damage: |built| {
            let mut wal = WalWriter::new(18, SystemId(8), size(), TimelineId(1), START);
            fill(&mut wal, Lsn(6 * MIB));
            built.replace_segment(4, wal.bytes(Lsn(4 * MIB)..Lsn(5 * MIB)));
        },
        least: Mode::Full,
        object: |built| built.segment(4),
        kind: FaultKind::Chain,
    },
    Case {
        what: "a history file that is not there",
        damage: |built| built.remove(&lineage().history(TimelineId(2))),
        least: Mode::Quick,
        object: |_| lineage().history(TimelineId(2)),
        kind: FaultKind::Missing,
    },
    Case {
        what: "a history file that cannot be read",
        damage: |built| built.put(&lineage().history(TimelineId(2)), b"nonsense\n"),
        least: Mode::Quick,
        object: |_| lineage().history(TimelineId(2)),
        kind: FaultKind::Record,
    },
    Case {
        what: "a bit of a tail",
        damage: |built| built.change(&built.tail_of(2, 1), |body| flip(body, 500)),
        least: Mode::Sample,
        object: |built| built.tail_of(2, 1),
        kind: FaultKind::Content,
    },
    Case {
        what: "an empty tail",
        damage: |built| built.change(&built.tail_of(2, 1), Vec::clear),
        least: Mode::Quick,
        object: |built| built.tail_of(2, 1),
        kind: FaultKind::Size,
    },
    Case {
        what: "a second content for a segment",
        damage: |built| built.put(&lineage().conflict(name(4), 0xBEEF, built.form), b"other"),
        least: Mode::Quick,
        object: |built| lineage().conflict(name(4), 0xBEEF, built.form),
        kind: FaultKind::Conflict,
    },
    Case {
        what: "a bit of a volume",
        damage: |built| built.change(&built.volume(), |body| flip(body, 60)),
        least: Mode::Sample,
        object: Built::volume,
        kind: FaultKind::Content,
    },
    Case {
        what: "a volume that is not there",
        damage: |built| built.remove(&built.volume()),
        least: Mode::Quick,
        object: Built::volume,
        kind: FaultKind::Missing,
    },
    Case {
        what: "a truncated volume",
        damage: |built| built.change(&built.volume(), |body| body.truncate(50)),
        least: Mode::Quick,
        object: Built::volume,
        kind: FaultKind::Size,
    },
    Case {
        what: "a bit of the manifest",
        damage: |built| built.change(&lineage().backup_manifest(built.id()), |body| flip(body, 100)),
        least: Mode::Quick,
        object: |built| lineage().backup_manifest(built.id()),
        kind: FaultKind::Content,
    },
    Case {
        what: "a manifest that is not there",
        damage: |built| built.remove(&lineage().backup_manifest(built.id())),
        least: Mode::Quick,
        object: |built| lineage().backup_manifest(built.id()),
        kind: FaultKind::Missing,
    },
    Case {
        what: "a manifest altered, with a backup.json that says so",
        damage: |built| {
            let key = lineage().backup_manifest(built.id());
            built.change(&key, |body| {
                let at = body.windows(10).position(|window| window == b"PG_VERSION").unwrap();
                body[at] = b'Q';
            });
            let crc32 = crc32fast::hash(&built.body(&key));
            built.change_backup(|file| file.manifest.crc32 = Crc32(crc32));
        },
        least: Mode::Full,
        object: |built| lineage().backup_manifest(built.id()),
        kind: FaultKind::Content,
    },
    Case {
        what: "a file altered inside a volume, with all CRCs put right",
        damage: |built| {
            let mut held = Built::files();
            held[1].1[777] ^= 1;
            built.store_backup(&held, &Built::files());
        },
        least: Mode::Full,
        object: Built::volume,
        kind: FaultKind::Content,
    },
    Case {
        what: "a file in a volume that the manifest does not list",
        damage: |built| {
            let mut held = Built::files();
            held.push(("base/5/9999", b"more".to_vec()));
            built.store_backup(&held, &Built::files());
        },
        least: Mode::Full,
        object: Built::volume,
        kind: FaultKind::Content,
    },
    Case {
        what: "a file that no volume holds",
        damage: |built| built.store_backup(&Built::files()[..2], &Built::files()),
        least: Mode::Full,
        object: |built| lineage().backup_manifest(built.id()),
        kind: FaultKind::Content,
    },
    Case {
        what: "configuration altered",
        damage: |built| {
            let key = lineage().backup_config(built.id(), "postgresql.conf", built.form).unwrap();
            built.change(&key, |body| flip(body, 2));
        },
        least: Mode::Full,
        object: |built| lineage().backup_config(built.id(), "postgresql.conf", built.form).unwrap(),
        kind: FaultKind::Content,
    },
    Case {
        what: "configuration that is not there",
        damage: |built| built.remove(&lineage().backup_config(built.id(), "postgresql.conf", built.form).unwrap()),
        least: Mode::Quick,
        object: |built| lineage().backup_config(built.id(), "postgresql.conf", built.form).unwrap(),
        kind: FaultKind::Missing,
    },
    Case {
        what: "backup.json that cannot be read",
        damage: |built| built.put(&lineage().backup_json(built.id()), b"{"),
        least: Mode::Quick,
        object: |built| lineage().backup_json(built.id()),
        kind: FaultKind::Record,
    },
    Case {
        what: "a fact in the ledger that cannot be read",
        damage: |built| built.put(&lineage().ledger_entry(now(), "gap", 1), b"{}"),
        least: Mode::Quick,
        object: |_| lineage().ledger_entry(now(), "gap", 1),
        kind: FaultKind::Record,
    },
];

impl Built {
    /// Another content for a segment, and an index that describes it.
    fn replace_segment(&self, number: u64, raw: &[u8]) {
        let stored = self.encoded(raw);
        self.put(&self.segment(number), &stored);
        self.change_index(|file| {
            let entry = file.entries.iter_mut().find(|entry| entry.segment == name(number)).unwrap();
            entry.raw_crc32 = Crc32(crc32fast::hash(raw));
            entry.stored_crc32 = Crc32(crc32fast::hash(&stored));
            entry.stored_bytes = stored.len() as u64;
        });
    }
}

async fn find_all(form: Form) {
    let sound = Built::new(form);
    for Case { what, damage, least, object, kind } in CASES {
        for mode in Mode::ALL {
            let built = sound.copy();
            // By name before it is gone.
            let object = below(&object(&built));
            damage(&built);
            let report = built.look(mode).await;
            // Which share of a backup's objects a sample reads is the volumes.
            let is_config = *least == Mode::Full;
            if mode < *least || (is_config && mode == Mode::Sample) {
                assert!(report.is_sound(), "{what}: {mode} should not see it: {}", shown(&report));
                continue;
            }
            assert_eq!(objects(&report), [object.as_str()], "{what}, {mode}: {}", shown(&report));
            let fault = &report.findings[0].fault;
            assert_eq!(fault.kind, *kind, "{what}, {mode}: {}", shown(&report));
            let told = built.facts(FactKind::Damaged);
            assert_eq!(told.len(), usize::from(fault.is_damage()), "{what}");
            let record = VerifyRecord::of(&built.facts(FactKind::Verify)[0]).unwrap();
            assert!(record.complete && record.faults == 1, "{record:?}");
            // It is said again, and written down once.
            let again = built.look(mode).await;
            assert_eq!(objects(&again), [object.as_str()], "{what}, {mode}, again: {}", shown(&again));
            assert_eq!(built.facts(FactKind::Damaged).len(), told.len(), "{what}");
            if fault.is_damage() {
                assert!(again.findings[0].fault.known_since.is_some(), "{what}");
            }
        }
    }
}

#[tokio::test]
async fn every_damage_is_found_at_its_object() {
    find_all(Form::Plain).await;
}

#[tokio::test]
async fn every_damage_is_found_at_its_object_with_the_key() {
    find_all(Form::Encrypted).await;
}

#[tokio::test]
async fn swapped_segments_are_both_named() {
    let built = Built::new(Form::Plain);
    let (one, other) = (built.body(&built.segment(4)), built.body(&built.segment(5)));
    built.put(&built.segment(4), &other);
    built.put(&built.segment(5), &one);
    for mode in [Mode::Sample, Mode::Full] {
        let report = built.look(mode).await;
        assert_eq!(objects(&report)[..2], [below(&built.segment(4)), below(&built.segment(5))], "{}", shown(&report));
    }
}

/// The CRCs of both are those of the index: what is wrong is only seen where they meet.
#[tokio::test]
async fn segments_that_do_not_follow_one_another_are_found() {
    let built = Built::new(Form::Plain);
    let mut wal = WalWriter::new(18, SYSTEM, size(), TimelineId(1), START);
    wal.insert(1, &[9; 1000]);
    fill(&mut wal, Lsn(6 * MIB));
    built.replace_segment(4, wal.bytes(Lsn(4 * MIB)..Lsn(5 * MIB)));
    assert!(built.look(Mode::Sample).await.is_sound());
    let report = built.look(Mode::Full).await;
    assert_eq!(report.findings[0].fault.object, below(&built.segment(4)), "{}", shown(&report));
    assert_eq!(report.findings[0].fault.kind, FaultKind::Chain);
}

#[tokio::test]
async fn without_a_key_stored_bytes_are_examined_and_it_says_so() {
    let mut built = Built::new(Form::Encrypted);
    built.keys = Keys::default();
    let report = built.look(Mode::Full).await;
    assert!(report.is_sound(), "{}", shown(&report));
    // Segments, tails, the volume, the configuration.
    assert_eq!(report.counts.unexamined, 7 + 3 + 1 + 1);
    built.change(&built.segment(4), |body| flip(body, 30_000));
    built.change(&built.volume(), |body| flip(body, 300));
    let report = built.look(Mode::Full).await;
    assert_eq!(objects(&report), [below(&built.volume()), below(&built.segment(4))], "{}", shown(&report));
}

#[tokio::test]
async fn an_index_file_that_is_gone_leaves_objects_nobody_reads() {
    let built = Built::new(Form::Plain);
    built.remove(&built.index());
    let report = built.look(Mode::Quick).await;
    let kinds: Vec<FaultKind> = report.findings.iter().map(|finding| finding.fault.kind).collect();
    let unindexed = kinds.iter().filter(|kind| **kind == FaultKind::Unindexed).count();
    assert_eq!(unindexed, 3, "{}", shown(&report));
    assert!(objects(&report).contains(&below(&built.segment(3)).as_str()));
    assert!(built.facts(FactKind::Damaged).is_empty(), "the objects themselves are well");
}

#[tokio::test]
async fn wal_that_nothing_holds_for_no_reason_is_a_hole() {
    let built = Built::new(Form::Plain);
    built.remove(&lineage().index(IndexName { first: name(6), last: name(7), epoch: Epoch(1) }));
    built.remove(&built.segment(6));
    built.remove(&built.segment(7));
    let report = built.look(Mode::Quick).await;
    assert_eq!(report.findings[0].fault.kind, FaultKind::Hole, "{}", shown(&report));
    let known = LedgerFact::new(FactKind::Gap, now(), "slot lost").about(TimelineId(1), Lsn(6 * MIB), Lsn(8 * MIB));
    built.json(&lineage().ledger_entry(now(), "gap", 7), &known);
    let report = built.look(Mode::Quick).await;
    assert!(report.is_sound() && shown(&report).contains("slot lost"), "{}", shown(&report));
}

#[tokio::test]
async fn a_lack_that_another_repository_may_fill_is_no_fault() {
    let built = Built::new(Form::Plain);
    built.remove(&lineage().index(IndexName { first: name(6), last: name(7), epoch: Epoch(1) }));
    built.remove(&built.segment(6));
    built.remove(&built.segment(7));
    let options = VerifyOptions { is_alone: false, ..built.options(Mode::Quick) };
    let report = look_at(&built.archive(), &options).await;
    assert!(report.is_sound() && shown(&report).contains("another repository"), "{}", shown(&report));
}

#[tokio::test]
async fn a_tail_missing_in_the_middle_is_found() {
    let built = Built::new(Form::Plain);
    let key = built.tail_of(2, 0);
    built.remove(&key);
    let report = built.look(Mode::Quick).await;
    assert_eq!(report.findings.len(), 1, "{}", shown(&report));
    assert_eq!(report.findings[0].fault.wal.unwrap().from, Lsn(8 * MIB));
}

#[tokio::test]
async fn what_seawall_does_not_know_is_left_alone_and_named() {
    let built = Built::new(Form::Plain);
    for path in ["x", "wal/notes.txt", "wal/0000000100000000/readme", "backups/old/a", "ledger/x", "pins/p", "lease/l"]
    {
        built.put(&lineage().object(path).unwrap(), b"?");
    }
    built.put(&lineage().object(&format!("backups/{}/base/x.tar", built.id())).unwrap(), b"?");
    let report = built.look(Mode::Full).await;
    assert!(report.is_sound(), "{}", shown(&report));
    assert_eq!(report.notes.unknown_count, 8, "{:?}", report.notes.unknown);
}

#[tokio::test]
async fn what_is_expired_running_or_being_deleted_is_no_fault() {
    let built = Built::new(Form::Plain);
    let mut expired = LedgerFact::new(FactKind::Expired, now(), "old");
    expired.segments.push(crate::catalog::SegmentRange { first: name(3), last: name(3) });
    built.json(&lineage().ledger_entry(now(), "expired", 1), &expired);
    built.remove(&built.segment(3));
    let other: BackupId = "20261122T100000Z-full".parse().unwrap();
    built.put(&lineage().object(&format!("backups/{other}/base/0001.tar.zst")).unwrap(), b"half");
    let dead: BackupId = "20261121T100000Z-full".parse().unwrap();
    built.json(&lineage().backup_json(dead), &"{}");
    built.json(&lineage().backup_dead(dead), &"{}");
    let report = built.look(Mode::Full).await;
    assert!(report.is_sound(), "{}", shown(&report));
    let notes = shown(&report);
    assert!(
        notes.contains(&format!("{other} was begun")) && notes.contains(&format!("{dead} is being deleted")),
        "{notes}"
    );
}

#[tokio::test]
async fn a_repair_counts_in_the_damaged_objects_place_and_is_read() {
    let built = Built::new(Form::Plain);
    let good = built.body(&built.segment(4));
    built.change(&built.segment(4), |body| flip(body, 30_000));
    assert_eq!(built.look(Mode::Full).await.findings.len(), 1);
    let index: IndexFile = serde_json::from_slice(&built.body(&built.index())).unwrap();
    let repair = lineage().repair(name(4), index.entries[1].raw_crc32.0, Form::Plain);
    built.put(&repair, &good);
    let report = built.look(Mode::Full).await;
    assert!(report.is_sound(), "{}", shown(&report));
    built.change(&repair, |body| flip(body, 20_000));
    let report = built.look(Mode::Full).await;
    assert_eq!(objects(&report), [below(&repair)], "{}", shown(&report));
}

#[tokio::test]
async fn what_was_damaged_and_is_sound_again_is_lifted_by_whoever_has_read_it() {
    let built = Built::new(Form::Plain);
    let good = built.body(&built.segment(4));
    built.change(&built.segment(4), |body| flip(body, 30_000));
    assert_eq!(built.look(Mode::Full).await.findings.len(), 1);
    built.put(&built.segment(4), &good);
    let quick = built.look(Mode::Quick).await;
    assert_eq!(objects(&quick), [below(&built.segment(4))], "nothing was read: {}", shown(&quick));
    assert!(quick.findings[0].fault.known_since.is_some());
    assert!(built.look(Mode::Full).await.is_sound());
    assert_eq!(built.facts(FactKind::Mended).len(), 1);
    assert!(built.look(Mode::Quick).await.is_sound());
}

#[tokio::test]
async fn an_unfinished_run_is_gone_on_with_unless_told_otherwise() {
    let built = Built::new(Form::Plain);
    let record = VerifyRecord {
        run: "abc".into(),
        mode: Mode::Full,
        started: now(),
        finished: None,
        complete: false,
        objects: 5,
        bytes: 1000,
        faults: 0,
        through: Some(below(&built.segment(5))),
    };
    built.json(&lineage().ledger_entry(now(), "verify", 9), &record.to_fact(now()));
    // Behind what it has read nothing is looked at, but by a quick look.
    built.change(&built.segment(4), |body| flip(body, 30_000));
    let report = built.look(Mode::Full).await;
    assert!(report.is_sound(), "{}", shown(&report));
    assert_eq!((report.run.as_str(), report.resumed, report.counts.segments_read), ("abc", Some(now()), 4));
    // Once it is over, the next begins anew.
    assert_eq!(built.look(Mode::Full).await.findings.len(), 1);
    let built = Built::new(Form::Plain);
    built.json(&lineage().ledger_entry(now(), "verify", 9), &record.to_fact(now()));
    let options = VerifyOptions { restart: true, ..built.options(Mode::Full) };
    let report = look_at(&built.archive(), &options).await;
    assert_eq!((report.resumed, report.counts.segments_read), (None, 7));
}

#[tokio::test]
async fn a_run_that_goes_on_behind_all_wal_reads_backups_only() {
    let built = Built::new(Form::Plain);
    let mut record = VerifyRecord {
        run: "abc".into(),
        mode: Mode::Full,
        started: now(),
        finished: None,
        complete: false,
        objects: 5,
        bytes: 1000,
        faults: 0,
        through: Some(format!("wal/0000000200000000/{}.zst", segment_at(TimelineId(2), Lsn(7 * MIB), size()))),
    };
    built.json(&lineage().ledger_entry(now(), "verify", 9), &record.to_fact(now()));
    let report = built.look(Mode::Full).await;
    assert_eq!((report.counts.segments_read, report.counts.volumes_read), (0, 1), "{}", shown(&report));
    record.through = Some(below(&lineage().backup_json(built.id())));
    record.run = "def".into();
    let later: Timestamp = "2026-11-22T12:30:00Z".parse().unwrap();
    built.json(&lineage().ledger_entry(later, "verify", 9), &record.to_fact(later));
    let report = built.look(Mode::Full).await;
    assert_eq!((report.counts.segments_read, report.counts.volumes_read), (0, 0), "{}", shown(&report));
}

#[tokio::test]
async fn how_far_it_came_is_written_down_on_the_way() {
    let built = Built::new(Form::Plain);
    let options = VerifyOptions { note_interval: Duration::ZERO, ..built.options(Mode::Full) };
    assert!(look_at(&built.archive(), &options).await.is_sound());
    let records: Vec<VerifyRecord> = built.facts(FactKind::Verify).iter().filter_map(VerifyRecord::of).collect();
    // Every sealed segment, the backup, the end.
    assert_eq!(records.len(), 7 + 1 + 1);
    assert_eq!(records.iter().filter(|record| record.complete).count(), 1);
    assert!(records.iter().all(|record| record.run == records[0].run));
}

#[tokio::test]
async fn a_sample_reads_its_share_and_another_seed_other_objects() {
    let built = Built::new(Form::Plain);
    let mut seen = std::collections::BTreeSet::new();
    for seed in 0..40 {
        let options = VerifyOptions { share: 0.3, seed, ..built.options(Mode::Sample) };
        let report = look_at(&built.archive(), &options).await;
        assert!(report.counts.segments_read <= 7);
        seen.insert(report.counts.segments_read);
        let again = look_at(&built.archive(), &options).await;
        assert_eq!(again.counts.bytes, report.counts.bytes, "a seed chooses");
    }
    assert!(seen.len() > 2, "{seen:?}");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_does_not_answer_is_no_fault_and_the_next_run_goes_on() {
    let built = Built::new(Form::Plain);
    let store = FaultyStore::around(built.store.clone(), 1);
    let archive = Archive::new(Arc::new(store.clone()), lineage());
    store.set_faults(Faults { outage: true, ..Faults::none() });
    let (progress, _watching) = watch::channel(Progress::default());
    let outcome = verify(&archive, &built.options(Mode::Full), &progress).await;
    assert_eq!(outcome.failure.unwrap().exit_code, ExitCode::Unavailable);
    assert!(outcome.report.is_sound() && !outcome.report.complete);
    assert!(built.facts(FactKind::Verify).is_empty() && built.facts(FactKind::Damaged).is_empty());
    // Slow and wrong at times: asked again.
    store.set_faults(Faults::some());
    let options = VerifyOptions { patience: Duration::from_secs(600), ..built.options(Mode::Full) };
    let report = look_at(&archive, &options).await;
    assert!(report.is_sound() && report.complete, "{}", shown(&report));
}

#[tokio::test]
async fn where_nothing_may_be_written_what_is_found_is_still_said() {
    let built = Built::new(Form::Plain);
    built.remove(&built.segment(3));
    let archive = Archive::new(Arc::new(ReadOnly(built.store.clone())), lineage());
    let report = look_at(&archive, &built.options(Mode::Quick)).await;
    assert_eq!(objects(&report), [below(&built.segment(3))]);
    assert!(report.unrecorded.is_some());
    assert!(built.facts(FactKind::Damaged).is_empty());
}

/// Credentials that may read. No fault of the model store is as narrow.
#[derive(Debug)]
struct ReadOnly(MemoryStore);

#[async_trait::async_trait]
impl crate::repository::Backend for ReadOnly {
    fn describe(&self) -> String {
        self.0.describe()
    }
    async fn put_new_with(
        &self,
        key: &Key,
        _: &[Bytes],
        _: &crate::repository::Facts,
    ) -> Result<(), crate::repository::StoreError> {
        let kind = crate::repository::StoreErrorKind::PermissionDenied;
        Err(crate::repository::StoreError::new(kind, "store", key.as_str(), "denied"))
    }
    async fn begin_upload(
        &self,
        key: &Key,
    ) -> Result<Box<dyn crate::repository::Upload>, crate::repository::StoreError> {
        self.0.begin_upload(key).await
    }
    async fn stat(&self, key: &Key) -> Result<Option<u64>, crate::repository::StoreError> {
        self.0.stat(key).await
    }
    async fn fetch(&self, key: &Key, range: std::ops::Range<u64>) -> Result<Bytes, crate::repository::StoreError> {
        self.0.fetch(key, range).await
    }
    async fn list(
        &self,
        directory: Option<&Key>,
    ) -> Result<Vec<crate::repository::Entry>, crate::repository::StoreError> {
        self.0.list(directory).await
    }
    async fn delete(&self, key: &Key) -> Result<(), crate::repository::StoreError> {
        self.0.delete(key).await
    }
}
