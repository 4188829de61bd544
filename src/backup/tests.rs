use super::intake::{Intake, Portion};
use super::verdict::{Bounds, ManifestCheck, agree};
use super::*;
use crate::catalog::manifest::FileHasher;
use crate::codec::tar::TRAILER;
use crate::repository::layout::TarStream;
use crate::wal::SystemId;

/// The agent runs it on a task of its own.
#[test]
fn taking_a_backup_can_be_spawned() {
    fn spawnable<T: Send>(_: &dyn Fn(Connection, Request, &'static dyn Surroundings) -> T) {}
    spawnable(&|connection, request, surroundings| async move {
        let (progress, _) = watch::channel(BackupProgress::default());
        take(connection, request, surroundings, &progress, &CancellationToken::new()).await
    });
}

// --- From tars to volumes ----------------------------------------------------------------------------------------

fn member(path: &str, kind: tar::EntryType, data: &[u8]) -> Vec<u8> {
    let mut header = tar::Header::new_ustar();
    header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
    header.set_entry_type(kind);
    header.set_size(data.len() as u64);
    header.set_mode(0o600);
    header.set_uid(1);
    header.set_gid(1);
    header.set_mtime(1);
    if kind == tar::EntryType::Symlink || kind == tar::EntryType::Link {
        header.set_link_name("elsewhere").unwrap();
    }
    header.set_cksum();
    let mut bytes = [header.as_bytes(), data].concat();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn file(path: &str, data: &[u8]) -> Vec<u8> {
    member(path, tar::EntryType::Regular, data)
}

/// The volumes of a stream, each with how many files it holds.
fn volumes(intake: &mut Intake, tar: &[u8], step: usize) -> Result<Vec<(Vec<u8>, u64)>, BackupError> {
    let (mut volumes, mut volume) = (Vec::new(), Vec::new());
    for mut piece in tar.chunks(step) {
        while let Some(portion) = intake.next(&mut piece)? {
            match portion {
                Portion::Bytes(bytes) => volume.extend_from_slice(bytes),
                Portion::VolumeEnd(end) => {
                    assert_eq!(end.raw_bytes, volume.len() as u64);
                    volumes.push((std::mem::take(&mut volume), end.files));
                }
            }
        }
    }
    let end = intake.end_stream()?;
    assert_eq!(end.raw_bytes, volume.len() as u64);
    volumes.push((volume, end.files));
    Ok(volumes)
}

fn intake(volume_bytes: u64) -> Intake {
    let mut intake = Intake::new(ChecksumAlgorithm::Crc32c, volume_bytes, true);
    intake.begin_stream(TarStream::Base);
    intake
}

#[test]
fn volumes_are_whole_members_however_the_stream_arrives() {
    let members = [
        file("backup_label", b"label"),
        member("base", tar::EntryType::Directory, b""),
        file("base/1", &[1; 3000]),
        file("base/2", &[2; 1000]),
        file("base/large", &[3; 20_000]),
        file("base/3", b""),
        file("global/pg_control", &[4; 512]),
    ];
    let tar = [&members.concat()[..], &TRAILER].concat();
    for step in [1, 511, 512, 513, 4000, 100_000] {
        let mut whole = intake(8192);
        let found = volumes(&mut whole, &tar, step).unwrap();
        let expected = [(members[..4].concat(), 3), (members[4].clone(), 1), (members[5..].concat(), 2)];
        assert!(found == expected, "in pieces of {step}: {:?}", found.iter().map(|v| v.0.len()).collect::<Vec<_>>());
        let (files, kept) = whole.finish();
        assert_eq!(files.len(), 6);
        assert_eq!(files.path(3), b"base/large");
        assert_eq!(kept.backup_label.as_deref(), Some(&b"label"[..]));
        assert_eq!(kept.pg_control, Some(vec![4; 512]));
    }
    // A volume may be exactly as long as it may be, its trailer counted.
    let length = (members[..4].concat().len() + TRAILER.len()) as u64;
    assert_eq!(volumes(&mut intake(length), &tar, 99).unwrap()[0].1, 3);
    assert_eq!(volumes(&mut intake(length - 1), &tar, 99).unwrap()[0].1, 2);
}

#[test]
fn an_empty_tablespace_is_one_empty_volume_and_others_files_have_their_place() {
    let mut whole = intake(8192);
    whole.begin_stream(TarStream::Tablespace(16384));
    assert_eq!(volumes(&mut whole, &TRAILER, 100).unwrap(), [(Vec::new(), 0)]);
    whole.begin_stream(TarStream::Tablespace(16385));
    volumes(&mut whole, &[file("PG_18/5/1", b"x"), TRAILER.to_vec()].concat(), 100).unwrap();
    assert_eq!(whole.finish().0.path(0), b"pg_tblspc/16385/PG_18/5/1");
}

#[test]
fn a_tar_without_its_trailer_is_one_of_13_or_14_or_cut_off() {
    let tar = file("a", b"b");
    assert!(volumes(&mut intake(8192), &tar, 100).unwrap_err().to_string().contains("without its trailer"));
    let mut old = Intake::new(ChecksumAlgorithm::Crc32c, 8192, false);
    assert_eq!(volumes(&mut old, &tar, 100).unwrap(), [(tar.clone(), 1)]);
    let cut = volumes(&mut Intake::new(ChecksumAlgorithm::Crc32c, 8192, false), &tar[..1000], 100);
    assert!(matches!(cut, Err(BackupError::Tar { .. })));
}

#[test]
fn what_nobody_could_restore_is_refused() {
    use tar::EntryType;
    let refused = |member: Vec<u8>| volumes(&mut intake(8192), &member, 512).unwrap_err().to_string();
    for path in ["../a", "/etc/passwd", "a/../b", "a//b", ".", ".."] {
        assert!(refused(file(path, b"")).contains("outside the data directory"), "{path}");
    }
    assert!(refused(member("postgresql.conf", EntryType::Symlink, b"")).contains("a link to \"elsewhere\""));
    assert!(refused(member("a", EntryType::Link, b"")).contains("a hard link"));
    assert!(refused(member("a", EntryType::Char, b"")).contains("of type '3'"));
    assert!(refused(member("a", EntryType::Fifo, b"")).contains("of type '6'"));
    volumes(&mut intake(8192), &[file("./pg_wal/archive_status", b""), TRAILER.to_vec()].concat(), 512).unwrap();
}

// --- Against the manifest ----------------------------------------------------------------------------------------

const SYSTEM: SystemId = SystemId(7575466000123456789);

fn entry(path: &str, data: &[u8]) -> String {
    let mut hasher = FileHasher::new(ChecksumAlgorithm::Crc32c);
    hasher.update(data);
    let (size, sum) = (data.len(), hasher.finish());
    format!("{{ \"Path\": \"{path}\", \"Size\": {size}, \"Checksum-Algorithm\": \"CRC32C\", \"Checksum\": \"{sum}\" }}")
}

fn manifest(entries: &[String]) -> String {
    let files = entries.join(",\n");
    let lines = format!(
        "{{ \"PostgreSQL-Backup-Manifest-Version\": 2,\n\"System-Identifier\": {SYSTEM},\n\"Files\": [\n{files}\n],\n\
         \"WAL-Ranges\": [\n{{ \"Timeline\": 1, \"Start-LSN\": \"0/2000028\", \"End-LSN\": \"0/2000120\" }}\n],\n"
    );
    let sum = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, lines.as_bytes());
    let hex: String = sum.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{lines}\"Manifest-Checksum\": \"{hex}\"}}\n")
}

const LABEL: &str = "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/2000060\n\
                     BACKUP METHOD: streamed\nBACKUP FROM: primary\nSTART TIME: 2026-11-22 11:28:15 UTC\n\
                     LABEL: seawall\nSTART TIMELINE: 1\n";

/// What came: three files, in order.
fn came(label: &str, control: &[u8]) -> Intake {
    let tar = [file("backup_label", label.as_bytes()), file("base/1", b"one"), file("global/pg_control", control)];
    let mut whole = intake(1 << 20);
    volumes(&mut whole, &[&tar.concat()[..], &TRAILER].concat(), 1000).unwrap();
    whole
}

/// Whether what came and what is listed agree.
fn judged(label: &str, control: &[u8], entries: &[String]) -> Result<bool, BackupError> {
    let (files, kept) = came(label, control).finish();
    let mut check = ManifestCheck::new(files, ChecksumAlgorithm::Crc32c);
    for piece in manifest(entries).as_bytes().chunks(7) {
        check.push(piece)?;
    }
    let summary = check.finish()?;
    let bounds = Bounds { system_id: SYSTEM, timeline: TimelineId(1), start: Lsn(0x200_0028), stop: Lsn(0x200_0120) };
    agree(&bounds, "seawall", &kept, &summary)
}

#[test]
fn what_came_is_what_is_listed_in_any_order_and_nothing_else() {
    let control = SYSTEM.0.to_le_bytes();
    let entries =
        [entry("backup_label", LABEL.as_bytes()), entry("base/1", b"one"), entry("global/pg_control", &control)];
    assert!(!judged(LABEL, &control, &entries).unwrap());
    let mut reversed = entries.clone();
    reversed.reverse();
    assert!(!judged(LABEL, &control, &reversed).unwrap());
    let refused = |entries: &[String]| judged(LABEL, &control, entries).unwrap_err().to_string();
    assert!(refused(&entries[..2]).contains("\"global/pg_control\" came, and the manifest does not list it"));
    assert!(
        refused(&[&entries[..], &[entry("b", b"")]].concat()).contains("\"b\" is in the manifest, and did not come")
    );
    assert!(refused(&[&entries[..], &entries[1..2]].concat()).contains("lists file \"base/1\" twice"));
    let with = |other: String| [entries[0].clone(), other, entries[2].clone()];
    assert!(refused(&with(entry("base/1", b"on"))).contains("came with 3 bytes, the manifest says 2"));
    assert!(refused(&with(entry("base/1", b"two"))).contains("came with checksum CRC32C"));
    let without = "{ \"Path\": \"base/1\", \"Size\": 3 }".to_string();
    assert!(refused(&with(without)).contains("has a NONE checksum"));
}

#[test]
fn the_label_and_the_control_file_must_be_of_this_backup() {
    let judge = |label: &str, control: &[u8]| {
        let entries =
            [entry("backup_label", label.as_bytes()), entry("base/1", b"one"), entry("global/pg_control", control)];
        judged(label, control, &entries)
    };
    let control = SYSTEM.0.to_le_bytes();
    let replaced = |from: &str, to: &str| {
        assert!(LABEL.contains(from));
        judge(&LABEL.replace(from, to), &control)
    };
    assert!(replaced("FROM: primary", "FROM: standby").unwrap());
    assert!(!replaced("FROM: primary", "FROM: master").unwrap());
    assert!(!judge(LABEL, &SYSTEM.0.to_be_bytes()).unwrap());
    for (from, to) in [
        ("0/2000028", "0/3000028"),
        ("TIMELINE: 1", "TIMELINE: 2"),
        ("LABEL: seawall", "LABEL: other"),
        ("METHOD: streamed", "METHOD: pg_start_backup"),
        ("FROM: primary", "FROM: somewhere"),
        ("START TIME", "INCREMENTAL FROM LSN: 0/1\nSTART TIME"),
        ("CHECKPOINT LOCATION", "CHECKPOINT"),
    ] {
        replaced(from, to).expect_err(to);
    }
    judge(LABEL, &8_u64.to_le_bytes()).unwrap_err();
    judge(LABEL, b"short").unwrap_err();
}
