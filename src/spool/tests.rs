use super::*;
use crate::codec::{Encoder, FRAME_BYTES, LEVEL_DEFAULT};
use crate::wal::SegmentSize;

const SIZE: SegmentSize = SegmentSize::MIB_16;
const START: Lsn = Lsn(3 << 24);

fn spool(limit_bytes: u64) -> (tempfile::TempDir, SpoolOptions) {
    let directory = tempfile::tempdir().unwrap();
    let options = SpoolOptions { path: directory.path().join("spool"), limit_bytes };
    (directory, options)
}

fn frame(index: u64) -> Vec<u8> {
    (0..FRAME_BYTES).map(|at| ((at as u64 * 31 + index * 7) % 251) as u8).collect()
}

fn write_frames(writer: &mut RunWriter, frames: std::ops::Range<u64>) {
    let mut encoder = Encoder::new(LEVEL_DEFAULT);
    for index in frames {
        let start = START + index * FRAME_BYTES as u64;
        writer.append_frame(start, start + FRAME_BYTES as u64, &encoder.encode(&frame(index)).bytes).unwrap();
    }
}

fn read_all(lineage: &LineageSpool) -> (Lsn, Option<String>) {
    let mut reader = lineage.reader(lineage.runs().unwrap(), SIZE);
    let mut position = START;
    while let Some(raw) = reader.next(position).unwrap() {
        let index = (position - START) / FRAME_BYTES as u64;
        let within = ((position - START) % FRAME_BYTES as u64) as usize;
        assert_eq!(raw, frame(index)[within..within + raw.len()]);
        position = position + raw.len() as u64;
    }
    (position, reader.damage().map(String::from))
}

#[test]
fn frames_over_segments_and_pieces_of_the_last_are_read_back() {
    let (_directory, options) = spool(1 << 30);
    let spool = Spool::open(&options, "main").unwrap();
    let lineage = spool.lineage("7").unwrap();
    let mut writer = lineage.writer(TimelineId(1), SIZE);
    writer.begin_batch();
    write_frames(&mut writer, 0..18);
    let start = START + 18 * FRAME_BYTES as u64;
    let mut encoder = Encoder::new(LEVEL_DEFAULT);
    for (from, to) in [(0, 1000), (1000, 5000)] {
        assert_eq!(writer.tail_end(start), start + from as u64);
        writer.append_tail(start, start + to as u64, &encoder.encode(&frame(18)[from..to]).bytes).unwrap();
    }
    writer.sync().unwrap();
    assert_eq!(lineage.runs().unwrap().len(), 3);
    assert_eq!(read_all(&lineage), (start + 5000, None));
    // Another process finds the same, and as many bytes used.
    let used = spool.usage().used_bytes();
    drop((spool, lineage, writer));
    let again = Spool::open(&options, "main").unwrap();
    assert_eq!(again.usage().used_bytes(), used);
    assert_eq!(read_all(&again.lineages().unwrap()[0]).0, start + 5000);
}

#[test]
fn a_cut_off_frame_ends_the_run_and_a_damaged_one_is_named() {
    let (_directory, options) = spool(1 << 30);
    let spool = Spool::open(&options, "main").unwrap();
    let lineage = spool.lineage("7").unwrap();
    let mut writer = lineage.writer(TimelineId(1), SIZE);
    write_frames(&mut writer, 0..3);
    let path = lineage.path().join(lineage.runs().unwrap()[0].to_string());
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert_eq!(read_all(&lineage), (START + 2 * FRAME_BYTES as u64, None));
    let mut damaged = whole.clone();
    let middle = whole.len() / 2;
    damaged[middle] ^= 1;
    std::fs::write(&path, &damaged).unwrap();
    let (end, damage) = read_all(&lineage);
    assert!(end < START + 3 * FRAME_BYTES as u64 && damage.is_some(), "{end} {damage:?}");
}

#[test]
fn a_batch_that_is_given_up_leaves_nothing_and_frees_its_names() {
    let (_directory, options) = spool(1 << 30);
    let spool = Spool::open(&options, "main").unwrap();
    let lineage = spool.lineage("7").unwrap();
    let mut writer = lineage.writer(TimelineId(1), SIZE);
    writer.begin_batch();
    write_frames(&mut writer, 0..2);
    writer.sync().unwrap();
    let used = spool.usage().used_bytes();
    writer.begin_batch();
    write_frames(&mut writer, 2..20);
    writer.give_up();
    assert_eq!(spool.usage().used_bytes(), used);
    assert_eq!(read_all(&lineage).0, START + 2 * FRAME_BYTES as u64);
    writer.begin_batch();
    write_frames(&mut writer, 2..20);
    writer.sync().unwrap();
    assert_eq!(read_all(&lineage).0, START + 20 * FRAME_BYTES as u64);
}

#[test]
fn the_limit_holds_and_what_is_removed_counts_no_more() {
    let (_directory, options) = spool(1000);
    let spool = Spool::open(&options, "main").unwrap();
    let lineage = spool.lineage("7").unwrap();
    let mut writer = lineage.writer(TimelineId(1), SIZE);
    writer.begin_batch();
    writer.append_frame(START, START + FRAME_BYTES as u64, &[0; 900]).unwrap();
    let second = writer.append_frame(START + FRAME_BYTES as u64, START + 2 * FRAME_BYTES as u64, &[0; 101]);
    assert!(matches!(second, Err(SpoolError::Full { used_bytes: 900, limit_bytes: 1000 })));
    let run = lineage.runs().unwrap()[0];
    lineage.remove(run).unwrap();
    lineage.remove(run).unwrap();
    assert_eq!(spool.usage().used_bytes(), 0);
}

#[test]
fn a_second_process_is_kept_out_and_files_are_private() {
    use std::os::unix::fs::PermissionsExt;
    let (_directory, options) = spool(1 << 20);
    let spool = Spool::open(&options, "main").unwrap();
    assert!(matches!(Spool::open(&options, "main"), Err(SpoolError::Locked { .. })));
    assert!(Spool::open(&options, "other").is_ok(), "another cluster's is its own");
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(spool.path()), mode(&spool.path().join(LOCK))), (0o700, 0o600));
}

#[test]
fn a_newer_or_damaged_marker_is_refused() {
    let (_directory, options) = spool(1 << 20);
    let spool = Spool::open(&options, "main").unwrap();
    let lineage = spool.lineage("7").unwrap();
    assert!(lineage.marker().unwrap().is_none());
    for text in ["{\"schema\": 2}", "", "{}", "[1]"] {
        std::fs::write(lineage.path().join(MARKER), text).unwrap();
        assert!(matches!(lineage.marker(), Err(SpoolError::Marker { .. })), "{text:?}");
    }
}
