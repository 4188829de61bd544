//! What stands on the page, that it is text, and that it stays small. Looking at it is for people.

use std::sync::Arc;

use super::*;
use crate::catalog::{Crc32, DirectoryContents, DirectoryDigest, FactKind, IndexEntry, contents::SegmentObject};
use crate::cli::gaps::report::{self, BackupReport, GapReport, TimelineReport};
use crate::codec::Form;
use crate::repository::layout::WalDirectory;
use crate::wal::{Lsn, SegmentName, SegmentNumber, SegmentSize, SegmentSummary, TimelineId};

const GIB: u64 = 1 << 30;

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn gap(from: u64, to: u64, state: GapState, cause: &str) -> ShownGap {
    ShownGap {
        id: format!("1-{from}-{to}"),
        cluster: "main".into(),
        lineage: "7".into(),
        timeline: 1,
        from_lsn: Lsn(from),
        to_lsn: Lsn(to),
        bytes: to - from,
        detected: Some(at("2026-11-20T08:00:00Z")),
        cause: Some(cause.into()),
        state,
        healed_by: (state == GapState::Healed).then(|| "20261120T090000Z-full".into()),
    }
}

fn run(from: u64, to: u64) -> RunReport {
    let last_commit = Some(at("2026-11-21T08:00:00Z"));
    RunReport { from: Lsn(from), to: Lsn(to), last_commit, proof: Proof::Proven }
}

/// Directories of one timeline with one segment each.
fn contents(count: u32) -> Vec<DirectoryContents> {
    let size = SegmentSize::MIB_16;
    let directory = |high: u32| {
        let segment = SegmentName::new(TimelineId(1), SegmentNumber(u64::from(high) * 256), size);
        let mut contents = DirectoryContents::new(WalDirectory::of(segment), size);
        let start_lsn = Lsn(u64::from(high) << 32);
        let entry = IndexEntry {
            segment,
            start_lsn,
            end_lsn: start_lsn + size.bytes(),
            raw_bytes: size.bytes(),
            raw_crc32: Crc32(high),
            stored_bytes: 1000,
            stored_crc32: Crc32(7),
            summary: SegmentSummary { record_count: 10, ..SegmentSummary::empty(None) },
        };
        contents.segments.insert(segment, vec![SegmentObject { form: Form::Plain, stored_bytes: 1000 }]);
        contents.add_entry(entry);
        contents
    };
    (0..count).map(directory).collect()
}

fn directories(count: u32) -> Vec<Arc<DirectoryDigest>> {
    digests(contents(count))
}

fn digests(contents: Vec<DirectoryContents>) -> Vec<Arc<DirectoryDigest>> {
    contents.into_iter().map(|contents| Arc::new(DirectoryDigest::of(contents))).collect()
}

fn sample() -> Report {
    let gaps = vec![
        gap(3 * GIB, 3 * GIB + (48 << 20), GapState::Healed, "the slot was lost: max_slot_wal_keep_size was exceeded"),
        gap(5 * GIB, 5 * GIB + (1 << 20), GapState::Open, "<script>alert(1)</script> & more"),
    ];
    let mut verify = LedgerFact::new(FactKind::Verify, at("2026-11-19T04:00:00Z"), "every object read back");
    for (name, value) in [("mode", "full".into()), ("objects", 812.into()), ("bytes", GIB.into()), ("faults", 0.into())]
    {
        verify.details.insert(name.into(), value);
    }
    let fact = LedgerFact::new(FactKind::Gap, at("2026-11-20T08:00:00Z"), "the slot was lost").about(
        TimelineId(1),
        Lsn(3 * GIB),
        Lsn(3 * GIB + (48 << 20)),
    );
    let repository = |name: &str, count: u32, verified: Vec<LedgerFact>| RepositoryReport {
        name: name.into(),
        location: format!("s3://{name}/wal"),
        ranges: report::ranges(&directories(count)),
        ledger_facts: 3,
        verified,
        facts: vec![fact.clone()],
    };
    let timeline =
        |timeline: u32, parent: Option<(u32, u64)>, runs: Vec<RunReport>, windows: Vec<(u64, u64)>| TimelineReport {
            timeline: TimelineId(timeline),
            parent: parent.map(|(parent, at)| (TimelineId(parent), Lsn(at))),
            runs,
            windows: windows.into_iter().map(|(from, to)| (Lsn(from), Lsn(to))).collect(),
        };
    let backup = |id: &str, timeline: u32, lsn: u64| BackupReport {
        id: id.parse().unwrap(),
        timeline: TimelineId(timeline),
        start_lsn: Lsn(lsn),
        stop_lsn: Lsn(lsn + (32 << 20)),
        finished: at("2026-11-20T09:00:00Z"),
        repositories: vec!["near".into(), "offsite".into()],
    };
    let lineage = LineageReport {
        cluster: "main".into(),
        lineage: "7432109876543210123".into(),
        system_id: "7432109876543210123".into(),
        server_version: "18.1".into(),
        segment_size: SegmentSize::MIB_16,
        created: at("2026-11-01T00:00:00Z"),
        start_lsn: Some(Lsn(GIB)),
        timelines: vec![
            timeline(
                1,
                None,
                vec![run(GIB, 3 * GIB), run(3 * GIB + (48 << 20), 5 * GIB), run(5 * GIB + (1 << 20), 7 * GIB)],
                vec![(GIB + (200 << 20), 3 * GIB), (3 * GIB + (300 << 20), 5 * GIB)],
            ),
            timeline(
                2,
                Some((1, 6 * GIB + (512 << 20))),
                vec![run(6 * GIB + (512 << 20), 9 * GIB)],
                vec![(7 * GIB, 9 * GIB)],
            ),
        ],
        backups: vec![
            backup("20261101T010000Z-full", 1, GIB + (168 << 20)),
            backup("20261120T083000Z-full", 1, 3 * GIB + (268 << 20)),
            backup("20261121T083000Z-full", 2, 7 * GIB - (32 << 20)),
        ],
        gaps: gaps.iter().map(|gap| GapReport { gap: gap.clone(), before: gap.detected, after: None }).collect(),
        repositories: vec![repository("near", 3, vec![verify]), repository("offsite", 2, Vec::new())],
        times: (1..10u64).map(|n| (Lsn(n * GIB), at(&format!("2026-11-{:02}T12:00:00Z", n * 2)))).collect(),
    };
    Report {
        made: at("2026-11-22T11:00:00Z"),
        host: Some("backup-1".into()),
        lineages: vec![lineage],
        gaps,
        lacks: Vec::new(),
        unread: vec!["repository <far> cannot be read".into()],
    }
}

#[test]
fn the_page_stands_alone_and_shows_causes_as_text() {
    let page = page(&sample());
    if let Some(path) = std::env::var_os("SEAWALL_PAGE") {
        std::fs::write(path, &page).unwrap();
    }
    assert!(page.starts_with("<!DOCTYPE html>") && page.ends_with("</html>\n"));
    assert!(page.contains("1 open, 1 healed") && page.contains("&lt;script&gt;alert(1)&lt;/script&gt; &amp; more"));
    assert!(page.contains("repository &lt;far&gt; cannot be read"));
    for absent in ["<script", "http:", "https:", "@import", "src=", "href="] {
        assert!(!page.contains(absent), "{absent}");
    }
    for present in ["0/C0000000", "50331648", "20261120T090000Z-full", "full, 812 objects, 1.0 GiB", "0 faults"] {
        assert!(page.contains(present), "{present}");
    }
    assert!(page.contains("the ledger tells of no verification"), "of the other repository");
}

#[test]
fn an_archive_of_ten_thousand_directories_has_a_page_of_the_same_length() {
    let mut report = sample();
    report.lineages[0].repositories[0].ranges = report::ranges(&directories(10_000));
    report.lineages[0].timelines[0].runs = (0..10_000u64).map(|n| run(n << 32, (n << 32) + (16 << 20))).collect();
    report.lineages[0].gaps = (0..10_000u64)
        .map(|n| gap((n << 32) + (16 << 20), (n + 1) << 32, GapState::Open, "lost"))
        .map(|gap| GapReport { gap, before: None, after: None })
        .collect();
    let page = page(&report);
    assert!(page.len() < 300_000, "{} bytes", page.len());
    assert!(page.contains("And 9500 more gaps"));
}

/// What the page tells an auditor to compute: CRC-32 over the lines, in the order of the names.
#[test]
fn the_list_has_the_crc_that_the_recipe_gives() {
    let ranges = report::ranges(&directories(3));
    let lines = "000000010000000000000000 00000000 00000007\n";
    assert_eq!(ranges[0].list_crc32.0, crc32fast::hash(lines.as_bytes()));
    assert_eq!((ranges.len(), ranges[2].segments, ranges[2].records), (3, 1, 10));
    let mut damaged = contents(1);
    damaged[0].segments.values_mut().flatten().for_each(|object| object.stored_bytes -= 1);
    let range = &report::ranges(&digests(damaged))[0];
    assert_eq!((range.segments, range.missing, range.list_crc32.0), (0, 1, 0));
}
