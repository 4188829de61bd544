use proptest::prelude::*;

use super::*;

/// From PostgreSQL 16, with most of its files left out and the checksum computed anew (`sha256sum` of all lines but the
/// last).
const VERSION_1: &str = r#"{ "PostgreSQL-Backup-Manifest-Version": 1,
"Files": [
{ "Path": "backup_label", "Size": 227, "Last-Modified": "2026-11-22 11:28:15 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "6e5cd1b1" },
{ "Path": "pg_tblspc/16384/PG_16_202307071/5/16385", "Size": 8192, "Last-Modified": "2026-11-22 11:28:15 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "0a1b2c3d" },
{ "Encoded-Path": "6261642dff6e616d65", "Size": 0, "Last-Modified": "2026-11-22 11:28:15 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "00000000" },
{ "Path": "with \"quotes\" and \\", "Size": 3, "Last-Modified": "2026-11-22 11:28:15 GMT" },
{ "Path": "global/pg_control", "Size": 8192, "Last-Modified": "2026-11-22 11:28:15 GMT", "Checksum-Algorithm": "CRC32C", "Checksum": "ffffffff" }
],
"WAL-Ranges": [
{ "Timeline": 2, "Start-LSN": "0/3000028", "End-LSN": "0/3000100" },
{ "Timeline": 1, "Start-LSN": "0/2000028", "End-LSN": "0/3000028" }
],
"#;

const VERSION_2: &str = r#"{ "PostgreSQL-Backup-Manifest-Version": 2,
"System-Identifier": 7575466000123456789,
"Files": [
{ "Path": "backup_label", "Size": 5, "Last-Modified": "2026-11-22 11:28:15 GMT", "Checksum-Algorithm": "SHA224", "Checksum": "ea09ae9cc6768c50fcee903ed054556e5bfc8347907f12598aa24193" }
],
"WAL-Ranges": [
{ "Timeline": 1, "Start-LSN": "0/2000028", "End-LSN": "0/2000120" }
],
"#;

fn sealed(lines: &str) -> Vec<u8> {
    let sum = encode_hex(digest::digest(&digest::SHA256, lines.as_bytes()).as_ref());
    format!("{lines}\"Manifest-Checksum\": \"{sum}\"}}\n").into_bytes()
}

fn read(bytes: &[u8], step: usize) -> Result<Manifest, ManifestError> {
    let mut collector = ManifestCollector::default();
    for piece in bytes.chunks(step) {
        collector.push(piece)?;
    }
    collector.finish()
}

#[test]
fn both_versions_are_read_in_pieces_of_any_size() {
    let bytes = sealed(VERSION_1);
    for step in [1, 2, 77, 1000, bytes.len()] {
        let manifest = read(&bytes, step).unwrap();
        let summary = &manifest.summary;
        assert_eq!((summary.version, summary.system_id, summary.files), (1, None, 5));
        assert_eq!(summary.bytes, bytes.len() as u64);
        let newest = WalRange { timeline: TimelineId(2), start: Lsn(0x300_0028), end: Lsn(0x300_0100) };
        assert_eq!(summary.wal_ranges[0], newest);
        assert_eq!(summary.wal_ranges.len(), 2);
        let paths: Vec<Vec<u8>> = manifest.files.iter().map(|file| file.path.into_owned()).collect();
        assert_eq!(paths[1], b"pg_tblspc/16384/PG_16_202307071/5/16385");
        assert_eq!(paths[2], b"bad-\xffname");
        assert_eq!(paths[3], b"with \"quotes\" and \\");
        let found = manifest.files.find(b"global/pg_control").unwrap();
        assert_eq!(manifest.files.file(found).checksum.to_string(), "ffffffff");
        assert_eq!(manifest.files.file(3).checksum.algorithm(), ChecksumAlgorithm::None);
        assert_eq!(manifest.files.find(b"global/pg"), None);
    }
    let manifest = read(&sealed(VERSION_2), 100).unwrap();
    assert_eq!(manifest.summary.system_id, Some(SystemId(7575466000123456789)));
    let mut hasher = FileHasher::new(ChecksumAlgorithm::Sha224);
    hasher.update(b"he");
    hasher.update(b"llo");
    assert_eq!(manifest.files.file(0).checksum, hasher.finish());
}

#[test]
fn a_list_of_no_files_is_a_list() {
    let lines = "{ \"PostgreSQL-Backup-Manifest-Version\": 1,\n\"Files\": [\n],\n\"WAL-Ranges\": [\n],\n";
    assert_eq!(read(&sealed(lines), 1000).unwrap().files.len(), 0);
}

#[test]
fn every_changed_byte_and_every_truncation_is_found() {
    let bytes = sealed(VERSION_1);
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x20;
        assert!(read(&changed, 4096).is_err(), "byte {at}");
        assert!(read(&bytes[..at], 4096).is_err(), "cut at {at}");
    }
    assert_eq!(read(&[&bytes[..], b"\n"].concat(), 4096).unwrap_err(), ManifestError::AfterEnd);
    assert_eq!(read(&[&bytes[..], b"x"].concat(), 4096).unwrap_err(), ManifestError::AfterEnd);
}

#[test]
fn what_postgresql_does_not_write_is_refused_with_its_line() {
    let refused = |from: &str, to: &str| {
        assert!(VERSION_1.contains(from), "{from}");
        read(&sealed(&VERSION_1.replacen(from, to, 1)), 4096).unwrap_err().to_string()
    };
    assert_eq!(refused("Version\": 1", "Version\": 3"), "it has version 3; this seawall knows versions 1 and 2");
    assert!(refused("\"Files\": [", "\"File\": [").contains("line 2 does not begin the list of files"));
    assert!(refused("\"Size\": 227", "\"Size\": -1").contains("line 3 is no file of a manifest"));
    assert!(refused("6e5cd1b1", "6e5cd1").contains("no CRC32C checksum"));
    assert!(refused("6e5cd1b1", "6e5cd1bg").contains("no CRC32C checksum"));
    assert!(refused("CRC32C", "MD5").contains("of a kind nobody knows"));
    assert!(refused("CRC32C", "NONE").contains("of a kind nobody knows"));
    assert!(refused("\"Path\": \"backup_label\"", "\"Path\": \"\"").contains("empty path"));
    assert!(refused("\"Path\": \"backup_label\"", "\"Other\": 1").contains("unknown field"));
    assert!(refused("\"Path\": \"backup_label\", ", "").contains("neither Path nor Encoded-Path"));
    assert!(refused("6261642d", "626164xx").contains("not hexadecimal"));
    assert!(refused("\"Checksum\": \"6e5cd1b1\" },", "\"Checksum\": \"6e5cd1b1\" }").contains("no comma"));
    assert!(refused("\"ffffffff\" }", "\"ffffffff\" },").contains("announced another"));
    assert!(refused("0/3000100", "0/3000000").contains("no WAL range that can be"));
    assert!(refused("\"Timeline\": 2", "\"Timeline\": 0").contains("no WAL range that can be"));
    assert!(refused("global/pg_control", "backup_label").contains("lists file \"backup_label\" twice"));
    let long = format!("{{ \"PostgreSQL-Backup-Manifest-Version\": 1,{}", " ".repeat(LINE_BYTES_MAX));
    assert!(read(long.as_bytes(), 100).unwrap_err().to_string().contains("line 1 is longer"));
    assert!(read(format!("{long}\n").as_bytes(), 1 << 20).unwrap_err().to_string().contains("line 1 is longer"));
}

/// Values from the definitions of the algorithms; CRC-32C with its least byte first.
#[test]
fn files_are_summed_up_as_the_server_does() {
    let sum = |algorithm| {
        let mut hasher = FileHasher::new(algorithm);
        hasher.update(b"1234");
        hasher.update(b"56789");
        hasher.finish()
    };
    assert_eq!(sum(ChecksumAlgorithm::Crc32c).to_string(), "839206e3"); // 0xE3069283
    let sha256 = "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225";
    assert_eq!(sum(ChecksumAlgorithm::Sha256).to_string(), sha256);
    assert_eq!(sum(ChecksumAlgorithm::None).as_bytes(), b"");
    for algorithm in ChecksumAlgorithm::ALL {
        assert_eq!(sum(algorithm).as_bytes().len(), algorithm.digest_bytes());
        assert_eq!(ChecksumAlgorithm::parse(&algorithm.name().to_lowercase()), Some(algorithm));
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes: Vec<u8>, at in 0..VERSION_1.len(), step in 1..100usize) {
        let _ = read(&bytes, step);
        let spliced = [&VERSION_1.as_bytes()[..at], &bytes, &VERSION_1.as_bytes()[at..]].concat();
        if let Ok(manifest) = read(&spliced, step) {
            prop_assert_eq!(manifest.summary.files as usize, manifest.files.len());
        }
    }
}
