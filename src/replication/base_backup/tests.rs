use super::super::framing::{ReadBuffer, frame};
use super::*;

fn options() -> BaseBackupOptions {
    BaseBackupOptions {
        label: "it's".to_string(),
        checkpoint: Checkpoint::Fast,
        max_rate_kib: None,
        manifest_checksums: "CRC32C",
        compression: None,
    }
}

#[test]
fn each_version_gets_the_syntax_it_takes() {
    let old =
        "BASE_BACKUP LABEL 'it''s' PROGRESS FAST NOWAIT TABLESPACE_MAP MANIFEST 'yes' MANIFEST_CHECKSUMS 'CRC32C'";
    assert_eq!(options().command(13).unwrap(), old);
    let new = "BASE_BACKUP (LABEL 'it''s', PROGRESS, CHECKPOINT 'fast', WAIT 0, TABLESPACE_MAP, MANIFEST 'yes', \
               MANIFEST_CHECKSUMS 'CRC32C')";
    assert_eq!(options().command(15).unwrap(), new);
    let spread = BaseBackupOptions { checkpoint: Checkpoint::Spread, max_rate_kib: Some(1024), ..options() };
    assert!(spread.command(14).unwrap().contains("PROGRESS NOWAIT MAX_RATE 1024"));
    assert!(spread.command(18).unwrap().contains("CHECKPOINT 'spread', WAIT 0, MAX_RATE 1024"));
    let zstd = ServerCompression { method: CompressionMethod::Zstd, level: Some(3) };
    let compressed = BaseBackupOptions { compression: Some(zstd), ..options() };
    assert!(compressed.command(16).unwrap().ends_with("COMPRESSION 'zstd', COMPRESSION_DETAIL 'level=3')"));
    assert_eq!(compressed.command(14), Err(OptionsError::NoCompression(14)));
}

#[test]
fn options_no_server_takes_are_refused_before_it_is_asked() {
    let with = |label: &str, rate| BaseBackupOptions { label: label.to_string(), max_rate_kib: rate, ..options() };
    assert_eq!(with("a\nb", None).command(18), Err(OptionsError::LabelNotALine));
    assert_eq!(with(&"ä".repeat(512), None).command(18), Err(OptionsError::LabelTooLong(1024)));
    assert!(with(&"a".repeat(1023), None).command(18).is_ok());
    for rate in [0, 31, 1_048_577] {
        assert_eq!(with("a", Some(rate)).command(18), Err(OptionsError::MaxRate(rate)));
    }
    assert!(with("a", Some(32)).command(13).is_ok());
}

fn described(columns: i16) -> Vec<u8> {
    let mut body = columns.to_be_bytes().to_vec();
    for _ in 0..columns {
        body.extend_from_slice(b"c\0");
        body.extend_from_slice(&[0; 18]);
    }
    frame(b'T', &body)
}

fn row(values: &[Option<&str>]) -> Vec<u8> {
    let mut body = (values.len() as i16).to_be_bytes().to_vec();
    for value in values {
        body.extend_from_slice(&value.map_or(-1, |text| text.len() as i32).to_be_bytes());
        body.extend_from_slice(value.unwrap_or_default().as_bytes());
    }
    frame(b'D', &body)
}

fn answer(columns: i16, rows: &[&[Option<&str>]]) -> Vec<u8> {
    let rows: Vec<u8> = rows.iter().flat_map(|values| row(values)).collect();
    [described(columns), rows, frame(b'C', b"SELECT\0")].concat()
}

fn beginning() -> Vec<u8> {
    let spaces: [&[Option<&str>]; 2] = [&[Some("16384"), Some("/ts"), Some("8")], &[None, None, Some("100")]];
    [answer(2, &[&[Some("0/2000028"), Some("1")]]), answer(3, &spaces)].concat()
}

fn end() -> Vec<u8> {
    let row: &[Option<&str>] = &[Some("0/2000120"), Some("1")];
    [answer(2, &[row]), frame(b'C', b"BASE_BACKUP\0"), frame(b'Z', b"I")].concat()
}

fn out() -> Vec<u8> {
    frame(b'H', &[0, 0, 0])
}

fn data(body: &[u8]) -> Vec<u8> {
    frame(b'd', body)
}

fn old_framing() -> Vec<u8> {
    let copy = |bytes: &[&[u8]]| [out(), bytes.iter().flat_map(|body| data(body)).collect(), frame(b'c', b"")].concat();
    [beginning(), copy(&[b"first", b"1"]), copy(&[b"base"]), copy(&[b"mani", b"fest"]), end()].concat()
}

fn typed(archives: [&[u8]; 2]) -> Vec<u8> {
    [
        out(),
        data(archives[0]),
        data(b"dfirst"),
        data(b"p\0\0\0\0\0\0\0\x05"),
        data(b"d1"),
        data(archives[1]),
        data(b"dbase"),
        data(b"m"),
        data(b"dmani"),
        data(b"dfest"),
        frame(b'c', b""),
    ]
    .concat()
}

fn new_framing() -> Vec<u8> {
    [beginning(), typed([b"n16384.tar\0/ts\0", b"nbase.tar\0\0"]), end()].concat()
}

/// Everything said, in words; bytes that follow one another joined.
fn read(bytes: &[u8], step: usize, mut decoder: BackupDecoder) -> Result<String, BackupFault> {
    let (mut buffer, mut said) = (ReadBuffer::default(), String::new());
    for chunk in bytes.chunks(step) {
        buffer.spare()[..chunk.len()].copy_from_slice(chunk);
        buffer.received(chunk.len());
        while let Some(found) = buffer.next_frame()? {
            match decoder.handle(found.tag, buffer.slice(found.body))? {
                BackupEvent::Aside => {}
                BackupEvent::Start(start) => said += &format!("start {} {}:", start.lsn, start.streams.len()),
                BackupEvent::Archive(index) => said += &format!(" [{index}] "),
                BackupEvent::Data(bytes) | BackupEvent::Manifest(bytes) => said += &String::from_utf8_lossy(bytes),
                BackupEvent::ManifestBegins => said += " [m] ",
                BackupEvent::End { stop, timeline } => said += &format!(" end {stop} {timeline}"),
                BackupEvent::Complete => said += " complete",
            }
        }
    }
    Ok(said)
}

const SAID: &str = "start 0/02000028 2: [0] first1 [1] base [m] manifest end 0/02000120 1 complete";

#[test]
fn both_framings_say_the_same_however_they_are_cut() {
    let (old, new) = (old_framing(), new_framing());
    for step in [1, 2, 3, 7, 100, 100_000] {
        assert_eq!(read(&old, step, BackupDecoder::new(14, None)).unwrap(), SAID, "in pieces of {step}");
        assert_eq!(read(&new, step, BackupDecoder::new(18, None)).unwrap(), SAID, "in pieces of {step}");
    }
    for at in 0..new.len() {
        let said = read(&new[..at], 50, BackupDecoder::new(15, None)).unwrap();
        assert!(SAID.starts_with(&said) && said != SAID, "cut at {at}");
        let said = read(&old[..at.min(old.len() - 1)], 50, BackupDecoder::new(13, None)).unwrap();
        assert!(SAID.starts_with(&said) && said != SAID, "cut at {at}");
    }
}

#[test]
fn compressed_archives_have_their_own_names() {
    let gzip = || BackupDecoder::new(17, Some(CompressionMethod::Gzip));
    let named = [beginning(), typed([b"n16384.tar.gz\0/ts\0", b"nbase.tar.gz\0\0"]), end()].concat();
    assert_eq!(read(&named, 99, gzip()).unwrap(), SAID);
    let error = read(&new_framing(), 99, gzip()).unwrap_err();
    assert_eq!(error, BackupFault::Answer("archive \"16384.tar\" comes where \"16384.tar.gz\" should".into()));
}

#[test]
fn what_comes_out_of_turn_is_refused() {
    let refused =
        |bytes: Vec<u8>| read(&[beginning(), bytes].concat(), 1000, BackupDecoder::new(18, None)).unwrap_err();
    let first = || [out(), data(b"n16384.tar\0/ts\0")].concat();
    let both = || [first(), data(b"nbase.tar\0\0")].concat();
    let hostile = [
        end(),
        [out(), data(b"dx")].concat(),
        [out(), data(b"m")].concat(),
        [out(), data(b"")].concat(),
        [out(), data(b"nbase.tar\0\0")].concat(),
        [out(), data(b"n16384.tar\0/ts")].concat(),
        [out(), data(b"n16384.tar\0/ts\0x")].concat(),
        [first(), data(b"q")].concat(),
        [first(), data(b"p123")].concat(),
        [first(), data(b"m")].concat(),
        [first(), frame(b'c', b"")].concat(),
        [both(), frame(b'c', b"")].concat(),
        [both(), data(b"n5.tar\0\0")].concat(),
        [both(), data(b"mx")].concat(),
        [both(), data(b"m"), data(b"m")].concat(),
        [both(), data(b"m"), data(b"nbase.tar\0\0")].concat(),
        [both(), data(b"m"), frame(b'c', b""), out()].concat(),
        [both(), data(b"m"), frame(b'c', b""), frame(b'Z', b"I")].concat(),
        [both(), data(b"m"), frame(b'c', b""), answer(2, &[])].concat(),
        [both(), data(b"m"), frame(b'c', b""), answer(2, &[&[Some("x"), Some("1")]])].concat(),
        frame(b'W', &[0, 0, 0]),
    ];
    for bytes in hostile {
        refused(bytes);
    }
    let spaces = |rows: &[&[Option<&str>]]| {
        let bytes = [answer(2, &[&[Some("0/1"), Some("1")]]), answer(3, rows)].concat();
        read(&bytes, 1000, BackupDecoder::new(13, None)).unwrap_err()
    };
    let base: &[Option<&str>] = &[None, None, Some("1")];
    let space: &[Option<&str>] = &[Some("5"), Some("/x"), None];
    for rows in [&[][..], &[space], &[base, space], &[base, base], &[space, space, base]] {
        spaces(rows);
    }
    spaces(&[&[Some("x"), Some("/x"), None], base]);
    spaces(&[&[Some("5"), None, None], base]);
    // 13 and 14 have as many copies as were announced, and no more.
    let extra = [old_framing_up_to_end(), out()].concat();
    read(&extra, 1000, BackupDecoder::new(13, None)).unwrap_err();
}

fn old_framing_up_to_end() -> Vec<u8> {
    let old = old_framing();
    old[..old.len() - end().len()].to_vec()
}

proptest::proptest! {
    #[test]
    fn no_bytes_make_the_decoder_panic(
        bytes: Vec<u8>,
        at in 0..1000usize,
        major in 13..19u32,
        tag: u8,
    ) {
        let valid = if major < 15 { old_framing() } else { new_framing() };
        let at = at % valid.len();
        let mut decoder = BackupDecoder::new(major, None);
        let _ = decoder.handle(tag, &bytes);
        let spliced = [&valid[..at], &frame(tag, &bytes), &valid[at..]].concat();
        let _ = read(&spliced, 64, BackupDecoder::new(major, None));
    }
}
