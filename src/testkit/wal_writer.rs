//! Owns: a generator of valid WAL, byte for byte as PostgreSQL 13 to 19 lays it out.
//! Does not own: checking WAL; it shares no code with the scanner, so that one can test the other.
//! Rests on `proto-notes/05-wal-format.md`.

use std::ops::Range;

use jiff::Timestamp;

use crate::wal::{History, Lsn, SegmentSize, SystemId, TimelineId};

const PAGE: u64 = 8192;
const CONTRECORD: u16 = 0x0001;
const LONG_HEADER: u16 = 0x0002;
/// Up to 18: `XLP_BKP_REMOVABLE`, set on every page while no exclusive backup runs.
const BKP_REMOVABLE: u16 = 0x0004;

/// Tablespace, database, relfilenode.
pub type Relation = (u32, u32, u32);

/// A commit that was written: xid, record start, record end, commit time.
pub type WrittenCommit = (u32, Lsn, Lsn, Timestamp);

/// Writes records one behind the other, as one server on one timeline does.
#[derive(Clone, Debug)]
pub struct WalWriter {
    version: u32,
    system_id: SystemId,
    segment_size: SegmentSize,
    timeline: TimelineId,
    /// Oldest first: timeline and where it was left.
    ancestors: Vec<(TimelineId, Lsn)>,
    start: Lsn,
    wal: Vec<u8>,
    record_starts: Vec<Lsn>,
    record_ends: Vec<Lsn>,
    commits: Vec<WrittenCommit>,
}

impl WalWriter {
    /// WAL that begins with the segment at `start`; its first record lies at `start + 40`.
    pub fn new(
        version: u32,
        system_id: SystemId,
        segment_size: SegmentSize,
        timeline: TimelineId,
        start: Lsn,
    ) -> WalWriter {
        assert!((13..=19).contains(&version), "no WAL format for version {version}");
        assert!(segment_size.is_start(start), "{start} is not the start of a segment");
        WalWriter {
            version,
            system_id,
            segment_size,
            timeline,
            ancestors: Vec::new(),
            start,
            wal: Vec::new(),
            record_starts: Vec::new(),
            record_ends: Vec::new(),
            commits: Vec::new(),
        }
    }

    // ---- reading ----

    pub fn start(&self) -> Lsn {
        self.start
    }

    /// What a server that has flushed everything reports: the aligned end of the last record.
    pub fn flush_lsn(&self) -> Lsn {
        self.start + self.wal.len() as u64
    }

    /// Panics outside `start()..flush_lsn()`: a server has no such bytes either.
    pub fn bytes(&self, range: Range<Lsn>) -> &[u8] {
        &self.wal[(range.start - self.start) as usize..(range.end - self.start) as usize]
    }

    pub fn timeline(&self) -> TimelineId {
        self.timeline
    }

    pub fn version(&self) -> u32 {
        self.version
    }

    pub fn system_id(&self) -> SystemId {
        self.system_id
    }

    pub fn segment_size(&self) -> SegmentSize {
        self.segment_size
    }

    /// Aligned ends of all records up to now, those of ancestors up to the fork included.
    pub fn record_ends(&self) -> &[Lsn] {
        &self.record_ends
    }

    pub fn record_starts(&self) -> &[Lsn] {
        &self.record_starts
    }

    pub fn commits(&self) -> &[WrittenCommit] {
        &self.commits
    }

    /// Content of this timeline's history file; empty for a first timeline, which has none.
    pub fn history_file(&self) -> String {
        let line = |(timeline, end): &(TimelineId, Lsn)| format!("{timeline}\t{end}\tno recovery target specified\n\n");
        self.ancestors.iter().map(line).collect()
    }

    pub fn history(&self) -> History {
        History::parse(self.timeline, self.history_file().as_bytes()).expect("the writer forks upwards")
    }

    // ---- records ----

    /// A record without blocks (a logical message by its resource manager); `payload` may be many segments long.
    pub fn insert(&mut self, xid: u32, payload: &[u8]) -> Lsn {
        self.record(21, 0x00, xid, &main_data(payload))
    }

    /// A record that refers to a block, like most: `data` belongs to the block, `main` to the record.
    pub fn insert_block(&mut self, xid: u32, relation: Relation, block: u32, data: &[u8], main: &[u8]) -> Lsn {
        let mut body = vec![0u8, 0x20];
        body.extend(u16::try_from(data.len()).expect("block data is at most 64 KiB").to_le_bytes());
        body.extend(relation_bytes(relation));
        body.extend(block.to_le_bytes());
        let with_main = main_data(main);
        let (main_header, main) = with_main.split_at(with_main.len() - main.len());
        body.extend([main_header, data, main].concat());
        self.record(10, 0x00, xid, &body)
    }

    /// `XLOG_NOOP` of any length from 24 bytes on, except those that no form of main data has.
    pub fn noop(&mut self, record_bytes: usize) -> Lsn {
        let payload = match record_bytes.checked_sub(24).expect("a record has at least 24 bytes") {
            0 => 0,
            body @ 3..=257 => body - 2,
            body @ 261.. => body - 5,
            body => panic!("no record has {body} bytes of main data and its header"),
        };
        self.record(0, 0x20, 0, &main_data(&vec![0; payload]))
    }

    pub fn commit(&mut self, xid: u32, time: Timestamp) -> Lsn {
        self.write_commit(0x00, xid, xid, time, &microseconds(time).to_le_bytes())
    }

    /// `COMMIT PREPARED`: the xid stands in the details, not in the header.
    pub fn commit_prepared(&mut self, xid: u32, time: Timestamp) -> Lsn {
        let mut main = microseconds(time).to_le_bytes().to_vec();
        extend_words(&mut main, &[16 | 128, xid]);
        main.extend(b"gid\0");
        self.write_commit(0xB0, 0, xid, time, &main)
    }

    /// A commit with what a DROP leaves in it: database, relations, statistics (15+), invalidation messages.
    pub fn commit_dropping(&mut self, xid: u32, time: Timestamp, relations: &[Relation]) -> Lsn {
        let mut main = microseconds(time).to_le_bytes().to_vec();
        let stats = if self.version >= 15 { 256 } else { 0 };
        extend_words(&mut main, &[1 | 4 | 8 | stats, 5, 1663, relations.len() as u32]);
        for relation in relations {
            main.extend(relation_bytes(*relation));
        }
        if self.version >= 15 {
            extend_words(&mut main, &[1, 2, 5, 16384]);
            main.extend(vec![0; if self.version >= 18 { 4 } else { 0 }]);
        }
        extend_words(&mut main, &[1, 0xFE, 5, 1247, 0]);
        self.write_commit(0x80, xid, xid, time, &main)
    }

    pub fn abort(&mut self, xid: u32, time: Timestamp) -> Lsn {
        self.record(1, 0x20, xid, &main_data(&microseconds(time).to_le_bytes()))
    }

    pub fn truncate_relation(&mut self, xid: u32, relation: Relation) -> Lsn {
        let mut main = 0u32.to_le_bytes().to_vec();
        main.extend(relation_bytes(relation));
        main.extend(7u32.to_le_bytes());
        self.record(2, 0x21, xid, &main_data(&main))
    }

    pub fn restore_point(&mut self, name: &str, time: Timestamp) -> Lsn {
        assert!(name.len() < 64, "a restore point's name has at most 63 bytes");
        let mut main = microseconds(time).to_le_bytes().to_vec();
        main.extend(name.as_bytes());
        main.resize(8 + 64, 0);
        self.record(0, 0x70, 0, &main_data(&main))
    }

    /// The first record of a child timeline.
    pub fn end_of_recovery(&mut self, time: Timestamp) -> Lsn {
        let parent = self.ancestors.last().map_or(self.timeline, |(parent, _)| *parent);
        let mut main = microseconds(time).to_le_bytes().to_vec();
        extend_words(&mut main, &[self.timeline.0, parent.0]);
        if self.version >= 17 {
            extend_words(&mut main, &[1]);
        }
        self.record(0, 0x90, 0, &main_data(&main))
    }

    /// `pg_switch_wal()`: the rest of the segment is zeros. Like the server, does nothing at the start of one.
    pub fn switch(&mut self) {
        if matches!(self.segment_size.offset_of(self.flush_lsn()), 0 | 40) {
            return;
        }
        self.record(0, 0x40, 0, &[]);
        let end = self.flush_lsn();
        if !self.segment_size.is_start(end) {
            let segment_end = self.segment_size.floor(end) + self.segment_size.bytes();
            self.wal.resize((segment_end - self.start) as usize, 0);
        }
        if let Some(last) = self.record_ends.last_mut() {
            *last = self.start + self.wal.len() as u64;
        }
    }

    // ---- what happens to servers ----

    /// A promotion at `at`, the end of a record (or the start of the WAL). The child's WAL begins with the segment
    /// that holds `at`, with the parent's bytes up to there.
    pub fn fork(&self, at: Lsn, timeline: TimelineId) -> WalWriter {
        assert!(timeline > self.timeline, "a child's timeline is higher");
        assert!(at == self.start || self.record_ends.contains(&at), "{at} is not the end of a record");
        let start = self.segment_size.floor(at);
        let records = self.record_ends.partition_point(|end| *end <= at);
        let mut ancestors = self.ancestors.clone();
        ancestors.push((self.timeline, at));
        WalWriter {
            timeline,
            ancestors,
            start,
            wal: self.bytes(start.max(self.start)..at).to_vec(),
            record_starts: self.record_starts[..records].to_vec(),
            record_ends: self.record_ends[..records].to_vec(),
            commits: self.commits.iter().filter(|(_, _, end, _)| *end <= at).copied().collect(),
            ..*self
        }
    }

    /// A crash before the last record was written whole: it must cross a page. The server gives it up at a page end
    /// and goes on behind it with a record that says so.
    pub fn overwrite_contrecord(&mut self, time: Timestamp) -> Lsn {
        let (cut, end) = (self.record_starts.pop(), self.record_ends.pop());
        let (cut, end) = cut.zip(end).expect("a record was written");
        self.commits.retain(|(_, start, _, _)| *start != cut);
        let (first, last) = (cut.0 / PAGE + 1, (end.0 - 1) / PAGE);
        assert!(first <= last, "the last record does not cross a page");
        let page = Lsn((first + (last - first) / 2) * PAGE);
        self.wal.truncate((page - self.start) as usize);
        self.page_header(if self.version >= 19 { 0x0004 } else { 0x0008 }, 0);
        let mut main = cut.0.to_le_bytes().to_vec();
        main.extend(microseconds(time).to_le_bytes());
        self.record(0, 0xD0, 0, &main_data(&main))
    }

    // ---- layout ----

    fn write_commit(&mut self, info: u8, header_xid: u32, xid: u32, time: Timestamp, main: &[u8]) -> Lsn {
        let end = self.record(1, info, header_xid, &main_data(main));
        let start = *self.record_starts.last().expect("just written");
        self.commits.push((xid, start, end, time));
        end
    }

    /// Writes a record whose fragments are `body`; returns its aligned end.
    pub fn record(&mut self, resource_manager: u8, info: u8, xid: u32, body: &[u8]) -> Lsn {
        let total = u32::try_from(24 + body.len()).expect("a record is at most 1020 MiB");
        let prev = self.record_starts.last().copied().unwrap_or_default();
        let mut record = Vec::with_capacity(24 + body.len());
        extend_words(&mut record, &[total, xid]);
        record.extend(prev.0.to_le_bytes());
        record.extend([info, resource_manager, 0, 0]);
        let crc = crc32c::crc32c_append(crc32c::crc32c(body), &record);
        record.extend(crc.to_le_bytes());
        record.extend_from_slice(body);
        self.write(&record)
    }

    fn write(&mut self, record: &[u8]) -> Lsn {
        if self.flush_lsn().0.is_multiple_of(PAGE) {
            self.page_header(0, 0);
        }
        self.record_starts.push(self.flush_lsn());
        let mut rest = record;
        loop {
            let room = (PAGE - self.flush_lsn().0 % PAGE) as usize;
            let (piece, left) = rest.split_at(rest.len().min(room));
            self.wal.extend_from_slice(piece);
            rest = left;
            if rest.is_empty() {
                break;
            }
            self.page_header(CONTRECORD, rest.len() as u32);
        }
        self.wal.resize(self.wal.len().next_multiple_of(8), 0);
        self.record_ends.push(self.flush_lsn());
        self.flush_lsn()
    }

    fn page_header(&mut self, flags: u16, remaining: u32) {
        let address = self.flush_lsn();
        let long = self.segment_size.is_start(address);
        let removable = if self.version <= 18 { BKP_REMOVABLE } else { 0 };
        let flags = flags | removable | if long { LONG_HEADER } else { 0 };
        let magic: u16 = [0xD106, 0xD10D, 0xD110, 0xD113, 0xD116, 0xD118, 0xD121][self.version as usize - 13];
        self.wal.extend(magic.to_le_bytes());
        self.wal.extend(flags.to_le_bytes());
        self.wal.extend(self.timeline.0.to_le_bytes());
        self.wal.extend(address.0.to_le_bytes());
        extend_words(&mut self.wal, &[remaining, 0]);
        if long {
            self.wal.extend(self.system_id.0.to_le_bytes());
            extend_words(&mut self.wal, &[self.segment_size.bytes() as u32, PAGE as u32]);
        }
    }
}

/// The main data with its fragment header; nothing at all when there is none.
fn main_data(payload: &[u8]) -> Vec<u8> {
    let header = match payload.len() {
        0 => vec![],
        length @ 1..=255 => vec![255, length as u8],
        length => [&[254], &(length as u32).to_le_bytes()[..]].concat(),
    };
    [&header, payload].concat()
}

fn relation_bytes((tablespace, database, number): Relation) -> Vec<u8> {
    [tablespace, database, number].iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn extend_words(bytes: &mut Vec<u8>, words: &[u32]) {
    bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
}

/// Microseconds since 2000-01-01.
fn microseconds(time: Timestamp) -> i64 {
    time.as_microsecond() - 946_684_800_000_000
}
