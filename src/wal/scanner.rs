//! The proof that a stream of bytes is a valid WAL, and what its records say on the way.
//!
//! Owns: every check of proto-notes/05-wal-format.md, "what a validator can check": pages, records, their chain.
//! Does not own: where bytes come from, what a fault leads to, what is kept.
//!
//! Bytes are gathered into a page and read from there, so that one byte at a time and 128 KiB at a time take the same
//! path. What is kept beyond the page is a prefix of at most 64 KiB of a record that crosses pages: a record may claim
//! 1020 MiB, and its CRC is computed as it passes.

use serde::{Deserialize, Serialize};

pub use super::carry::{Carry, PendingRecord};
pub use super::fault::{FaultClass, ScanError, ScanFault};

use super::carry::to_hex;
use super::open_segments::OpenSegments;
use super::page::{
    FLAG_CONTRECORD, FLAG_LONG_HEADER, Format, LONG_HEADER_BYTES, LongHeader, PAGE_BYTES, PageHeader, PageMagic,
    SHORT_HEADER_BYTES,
};
use super::record::{self, CRC_OFFSET, RECORD_BYTES_MAX, RECORD_HEADER_BYTES, RecordHeader};
use super::seek::{Found, Seeker, Sought};
use super::{Commit, History, Lsn, SegmentNumber, SegmentSize, SegmentSummary, SystemId, TimelineId};

/// How far the WAL format of a stream is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Proof {
    Proven,
    /// The page magic is not one we know: bytes are passed on as they are, nothing is checked.
    Unproven,
}

#[derive(Clone, Debug)]
pub struct ScanOptions {
    pub system_id: SystemId,
    pub segment_size: SegmentSize,
    /// Of the timeline whose files are read; its ancestors may appear in them up to where it left them.
    pub history: History,
}

/// Reads the WAL of one timeline from the start of a segment on.
#[derive(Debug)]
pub struct Scanner {
    page: Box<PageBuffer>,
    position: Lsn,
    chain: Chain,
    failed: Option<ScanError>,
    /// The last record known at the start: while it is the last one, nothing has linked up with it.
    resumed_after: Option<Lsn>,
}

/// The page that is being received. Aligned, so that the CRC of a record starts on a whole word: records do.
#[repr(align(64))]
struct PageBuffer([u8; PAGE_BYTES]);

impl std::fmt::Debug for PageBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("PageBuffer")
    }
}

static ZEROS: PageBuffer = PageBuffer([0; PAGE_BYTES]);

impl Scanner {
    /// `start` is the start of a segment; `carry` is what the segment before it left behind.
    pub fn new(options: ScanOptions, start: Lsn, carry: Carry) -> Scanner {
        assert!(options.segment_size.is_start(start), "{start} is not the start of a segment");
        Scanner {
            resumed_after: carry.last_record,
            page: Box::new(PageBuffer([0; PAGE_BYTES])),
            position: start,
            chain: Chain::new(options, start, carry),
            failed: None,
        }
    }

    /// The major version the server says it is: its pages then have to have that version's magic. Without it, and
    /// for versions whose magic is not settled, the first page says.
    pub fn for_server(mut self, major: u32) -> Scanner {
        const SETTLED: std::ops::RangeInclusive<u32> = 13..=18;
        let magic = PageMagic::of_version(major).filter(|_| SETTLED.contains(&major));
        if self.chain.magic.is_none()
            && let Some((magic, format)) = magic.and_then(|magic| Some((magic, Format::of(magic)?)))
        {
            (self.chain.magic, self.chain.format) = (Some(magic), format);
        }
        self
    }

    /// Also looks for single records.
    pub fn seeking(mut self, sought: Sought) -> Scanner {
        self.chain.seeker = Some(Seeker::new(sought));
        self
    }

    /// What was looked for, in order; the first few of it.
    pub fn found(&self) -> impl Iterator<Item = &Found> {
        self.chain.seeker.iter().flat_map(Seeker::found)
    }

    /// As many commits were found as were asked for: reading on finds no more.
    pub fn found_all_wanted(&self) -> bool {
        self.chain.seeker.as_ref().is_some_and(Seeker::is_full)
    }

    /// Takes the bytes that follow [`Scanner::position`]. After an error the scanner only repeats it.
    pub fn feed(&mut self, lsn: Lsn, bytes: &[u8]) -> Result<(), ScanError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let result = self.check_contiguous(lsn, bytes.len()).and_then(|()| self.advance(bytes));
        self.failed = result.as_ref().err().cloned();
        result
    }

    /// The next byte expected.
    pub fn position(&self) -> Lsn {
        self.position
    }

    /// The end of the last proven record, where the server's flush position is after it; the start when there is none.
    pub fn proven(&self) -> Lsn {
        match self.chain.proof {
            Proof::Proven => self.chain.proven,
            Proof::Unproven => self.position,
        }
    }

    pub fn proof(&self) -> Proof {
        self.chain.proof
    }

    /// Of the pages; `None` before the first one.
    pub fn magic(&self) -> Option<PageMagic> {
        self.chain.magic
    }

    /// The last commit before [`Scanner::proven`] that began after this scanner's start.
    pub fn last_commit(&self) -> Option<Commit> {
        self.chain.last_commit
    }

    /// Whether a record was proven to follow the last one of the carry (or there is nothing to follow).
    pub fn is_linked(&self) -> bool {
        self.resumed_after.is_none() || self.proof() == Proof::Unproven || self.chain.last_record != self.resumed_after
    }

    pub fn segment_size(&self) -> SegmentSize {
        self.chain.options.segment_size
    }

    /// The next segment whose records are all proven, the one that crosses its end included.
    pub fn poll_segment(&mut self) -> Option<(SegmentNumber, SegmentSummary)> {
        self.chain.segments.poll(self.proven())
    }

    /// What the segment that holds the next byte says so far, proven or not: the fact of a record counts as soon as
    /// its own CRC has been checked.
    pub fn summary_of_open_segment(&self) -> &SegmentSummary {
        self.chain.segments.reading()
    }

    /// The state at the start of the segment that holds the next byte: where a child timeline is read from.
    pub fn carry_at_segment_start(&self) -> Carry {
        self.chain.segment_carry.clone()
    }

    /// The timeline whose files are read.
    pub fn timeline(&self) -> TimelineId {
        self.chain.options.history.timeline
    }

    fn check_contiguous(&self, lsn: Lsn, length: usize) -> Result<(), ScanError> {
        // Nobody's WAL gets near the end of the address space; refusing it here keeps all arithmetic below it plain.
        let in_range = self.position.0.checked_add(length as u64).is_some_and(|end| end < u64::MAX - (4 << 30));
        if lsn == self.position && in_range {
            return Ok(());
        }
        let fault = ScanFault::NotContiguous { found: lsn, expected: self.position };
        Err(ScanError { lsn: self.position, record: self.position, fault, detail: String::new() })
    }

    fn advance(&mut self, mut bytes: &[u8]) -> Result<(), ScanError> {
        while !bytes.is_empty() {
            let filled = (self.position.0 % PAGE_BYTES as u64) as usize;
            let taken = bytes.len().min(PAGE_BYTES - filled);
            let (piece, rest) = bytes.split_at(taken);
            self.page.0[filled..filled + taken].copy_from_slice(piece);
            self.position = self.position + taken as u64;
            self.chain.read(&self.page.0[..filled + taken])?;
            if filled + taken == PAGE_BYTES {
                self.chain.end_page();
            }
            bytes = rest;
        }
        Ok(())
    }
}

/// What the next unread byte of the page is.
///
/// ```text
///            CONTRECORD            last byte            page end             last byte
///   Start ───────────────▶ Skipping ────────▶ Records ───────────▶ Pending ────────────▶ Records
///     └──────────────────────────────────────▶   │  ▲ ◀─────────────────┘ page says OVERWRITE
///                                        switch  ▼  │ segment end
///                                               ZeroTail
/// ```
#[derive(Debug)]
enum State {
    /// At the start of the archive: the first page may continue a record that nobody has seen.
    Start,
    /// In such a record; this much of it remains.
    Skipping { remaining: u64 },
    /// A record begins here.
    Records,
    /// The page end cut this record.
    Pending(Pending),
    /// After a switch record: zeros up to the segment end, page headers included.
    ZeroTail,
}

/// A record that crosses pages.
#[derive(Debug)]
struct Pending {
    lsn: Lsn,
    total: u32,
    received: u32,
    /// Over the bytes behind the header.
    crc: u32,
    /// The first bytes of the record, header included.
    prefix: Vec<u8>,
    /// The prefix behind the header was left behind at a restart: fragments and facts cannot be read.
    header_only: bool,
}

impl Pending {
    fn remaining(&self) -> u64 {
        u64::from(self.total - self.received)
    }

    fn header(&self) -> Option<RecordHeader> {
        self.prefix.first_chunk().map(RecordHeader::parse)
    }

    /// Of the whole record, once all of it was appended.
    fn record_crc(&self) -> u32 {
        crc32c::crc32c_append(self.crc, &self.prefix[..CRC_OFFSET])
    }

    fn append(&mut self, piece: &[u8]) {
        let header_left = RECORD_HEADER_BYTES.saturating_sub(self.received as usize).min(piece.len());
        let (header, body) = piece.split_at(header_left);
        self.prefix.extend_from_slice(header);
        self.crc = crc32c::crc32c_append(self.crc, body);
        self.received += piece.len() as u32;
        if !self.header_only
            && let Some(header) = self.header()
        {
            let room = header.prefix_bytes_max().saturating_sub(self.prefix.len());
            self.prefix.extend_from_slice(&body[..body.len().min(room)]);
        }
    }

    fn to_carry(&self) -> PendingRecord {
        PendingRecord {
            lsn: self.lsn,
            total: self.total,
            received: self.received,
            header: self.prefix.iter().copied().take(RECORD_HEADER_BYTES).collect(),
            crc: self.crc,
        }
    }

    /// `None` when the values cannot belong together: a carry comes from a file.
    fn from_carry(carry: PendingRecord) -> Option<Pending> {
        let PendingRecord { lsn, total, received, header, crc } = carry;
        let length = header.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
        let valid = length == Some(total)
            && (RECORD_HEADER_BYTES as u32..=RECORD_BYTES_MAX).contains(&total)
            && received < total
            && header.len() == RECORD_HEADER_BYTES.min(received as usize);
        let header_only = received > RECORD_HEADER_BYTES as u32;
        valid.then_some(Pending { lsn, total, received, crc, prefix: header, header_only })
    }
}

/// A record that the server gave up at a page end, until the record that says so is read.
#[derive(Debug)]
struct Overwritten {
    /// `None` when it began before the archive.
    lsn: Option<Lsn>,
}

/// The state of the proof. `read` is handed the page as far as it was received, and takes from it what is complete.
#[derive(Debug)]
struct Chain {
    options: ScanOptions,
    proof: Proof,
    magic: Option<PageMagic>,
    format: Format,
    page_timeline: Option<TimelineId>,
    state: State,
    overwritten: Option<Overwritten>,
    /// The page being read, and the first byte in it that was not taken yet.
    page: Lsn,
    cursor: usize,
    last_record: Option<Lsn>,
    record_end: Option<Lsn>,
    proven: Lsn,
    last_commit: Option<Commit>,
    segments: OpenSegments,
    segment_carry: Carry,
    seeker: Option<Seeker>,
}

impl Chain {
    fn new(options: ScanOptions, start: Lsn, carry: Carry) -> Chain {
        let segments = OpenSegments::new(options.segment_size, start, carry.last_record);
        let knows_nothing = carry.last_record.is_none() && carry.pending.is_none();
        let state = match carry.pending.clone().map(Pending::from_carry) {
            _ if knows_nothing => State::Start,
            None => State::Records,
            Some(Some(pending)) => State::Pending(pending),
            Some(None) => State::Start,
        };
        let known = carry.magic.filter(|magic| Format::of(*magic).is_some());
        Chain {
            options,
            proof: Proof::Proven,
            magic: known,
            format: known.and_then(Format::of).unwrap_or(Format { version: 0 }),
            page_timeline: carry.timeline,
            last_record: carry.last_record.filter(|_| !matches!(state, State::Start)),
            state,
            overwritten: None,
            page: start,
            cursor: 0,
            record_end: carry.record_end,
            proven: start,
            last_commit: None,
            segments,
            segment_carry: carry,
            seeker: None,
        }
    }

    fn read(&mut self, page: &[u8]) -> Result<(), ScanError> {
        if matches!(self.state, State::ZeroTail) {
            return self.read_zeros(page);
        }
        if self.proof == Proof::Unproven || (self.cursor == 0 && !self.read_page_header(page)?) {
            return Ok(());
        }
        match self.state {
            State::Skipping { remaining } => self.skip(page, remaining)?,
            State::Pending(_) => self.read_continuation(page)?,
            _ => {}
        }
        self.read_records(page)
    }

    /// The page was received whole and `read` to its end.
    fn end_page(&mut self) {
        self.page = self.page + PAGE_BYTES as u64;
        self.cursor = 0;
        if self.options.segment_size.is_start(self.page) {
            self.end_segment();
        }
    }

    fn end_segment(&mut self) {
        if matches!(self.state, State::ZeroTail) {
            self.prove(self.page);
            self.state = State::Records;
        }
        if self.proof == Proof::Unproven {
            self.record_end = Some(self.page);
        }
        self.segment_carry = self.carry();
        self.segments.close(self.proof, self.segment_carry.clone());
        let no_record_yet = self.last_record.is_none() && !matches!(self.state, State::Pending(_));
        if no_record_yet && self.proof == Proof::Proven {
            self.segments.release_all();
        }
    }

    fn carry(&self) -> Carry {
        let pending = match &self.state {
            State::Pending(pending) => Some(pending.to_carry()),
            _ => None,
        };
        let (last_record, record_end) = (self.last_record, self.record_end);
        Carry { last_record, record_end, pending, timeline: self.page_timeline, magic: self.magic }
    }

    fn prove(&mut self, end: Lsn) {
        self.proven = end;
        self.record_end = Some(end);
    }

    fn read_zeros(&mut self, page: &[u8]) -> Result<(), ScanError> {
        let unread = &page[self.cursor..];
        if *unread != ZEROS.0[..unread.len()] {
            let at = unread.iter().position(|byte| *byte != 0).unwrap_or(0);
            let lsn = self.page + (self.cursor + at) as u64;
            return Err(self.fault_at(lsn, lsn, ScanFault::ZeroTail(unread[at]), unread.get(at..).unwrap_or_default()));
        }
        self.cursor = page.len();
        Ok(())
    }

    /// Passes over a record that began before the archive: there is nothing to check it against.
    fn skip(&mut self, page: &[u8], remaining: u64) -> Result<(), ScanError> {
        let space = (PAGE_BYTES - self.cursor) as u64;
        if remaining >= space {
            if page.len() == PAGE_BYTES {
                self.cursor = PAGE_BYTES;
                let remaining = remaining - space;
                self.state = if remaining == 0 { State::Records } else { State::Skipping { remaining } };
            }
            return Ok(());
        }
        let end = self.cursor + remaining as usize;
        let next = align8(end);
        if next <= page.len() {
            self.check_padding(page, end, self.page)?;
            self.cursor = next;
            self.state = State::Records;
        }
        Ok(())
    }

    // ---- pages ----

    /// Checks the page header; false when it is not there yet, or says nothing we can check.
    fn read_page_header(&mut self, page: &[u8]) -> Result<bool, ScanError> {
        if self.magic.is_none() && !self.learn_format(page)? {
            return Ok(false);
        }
        let at_segment_start = self.options.segment_size.is_start(self.page);
        let header_bytes = if at_segment_start { LONG_HEADER_BYTES } else { SHORT_HEADER_BYTES };
        let (Some(short), true) = (page.first_chunk().map(PageHeader::parse), page.len() >= header_bytes) else {
            return Ok(false);
        };
        let mut checked = self.check_page(&short, at_segment_start);
        if at_segment_start && let Some(long) = page[SHORT_HEADER_BYTES..].first_chunk() {
            checked = checked.and_then(|()| self.check_long_header(&LongHeader::parse(long)));
        }
        checked
            .and_then(|()| self.enter_page(&short))
            .map_err(|fault| self.fault_at(self.page, self.unproven_from(), fault, &page[..header_bytes]))?;
        self.page_timeline = Some(short.timeline);
        self.cursor = header_bytes;
        Ok(true)
    }

    /// The first page tells the format; false while it is unknown, be it for ever.
    fn learn_format(&mut self, page: &[u8]) -> Result<bool, ScanError> {
        let Some(bytes) = page.first_chunk() else { return Ok(false) };
        let magic = PageMagic(u16::from_le_bytes(*bytes));
        if Format::of(PageMagic(magic.0.swap_bytes())).is_some() {
            return Err(self.fault_at(self.page, self.page, ScanFault::ByteOrder(magic), bytes));
        }
        self.magic = Some(magic);
        match Format::of(magic) {
            Some(format) => self.format = format,
            None => {
                self.proof = Proof::Unproven;
                (self.last_record, self.record_end, self.state) = (None, None, State::Records);
            }
        }
        Ok(self.proof == Proof::Proven)
    }

    fn check_page(&self, header: &PageHeader, at_segment_start: bool) -> Result<(), ScanFault> {
        let expected = self.magic.unwrap_or(header.magic);
        if header.magic != expected {
            return Err(ScanFault::MagicChange { found: header.magic, expected });
        }
        let unknown_flags = header.flags & !self.format.known_flags() != 0;
        if unknown_flags || (header.flags & FLAG_LONG_HEADER != 0) != at_segment_start {
            return Err(ScanFault::PageFlags { found: header.flags, magic: header.magic });
        }
        if header.address != self.page {
            return Err(ScanFault::PageAddress { found: header.address, expected: self.page });
        }
        if header.padding != 0 {
            return Err(ScanFault::PagePadding);
        }
        self.check_timeline(header.timeline)
    }

    /// A page carries the timeline of its first record: a child's file may carry an ancestor's up to the fork.
    fn check_timeline(&self, found: TimelineId) -> Result<(), ScanFault> {
        let history = &self.options.history;
        let begins = history.begin_of(found).is_some_and(|begin| begin <= self.page);
        let ended = history.end_of(found).is_some_and(|end| end <= self.page);
        if !begins || ended {
            return Err(ScanFault::Timeline { found, timeline: history.timeline });
        }
        match self.page_timeline {
            Some(previous) if found < previous => Err(ScanFault::TimelineBackwards { found, previous }),
            _ => Ok(()),
        }
    }

    fn check_long_header(&self, header: &LongHeader) -> Result<(), ScanFault> {
        let (found, expected) = (SystemId(header.system_id), self.options.system_id);
        if found != expected {
            return Err(ScanFault::SystemId { found, expected });
        }
        let expected = self.options.segment_size.bytes();
        if u64::from(header.segment_bytes) != expected {
            return Err(ScanFault::SegmentSize { found: header.segment_bytes, expected });
        }
        if header.page_bytes != PAGE_BYTES as u32 {
            return Err(ScanFault::BlockSize { found: header.page_bytes });
        }
        Ok(())
    }

    /// Matches what the page says about its first bytes with what the page before it left open.
    fn enter_page(&mut self, header: &PageHeader) -> Result<(), ScanFault> {
        let continues = header.flags & FLAG_CONTRECORD != 0;
        let overwrites = header.flags & self.format.overwrite_flag() != 0;
        if overwrites {
            return self.enter_overwriting_page(header, continues);
        }
        if continues != (header.remaining != 0) {
            return Err(ScanFault::PageFlags { found: header.flags, magic: header.magic });
        }
        let remaining = header.remaining;
        let expected = match &self.state {
            State::Start if continues && remaining <= RECORD_BYTES_MAX => {
                self.state = State::Skipping { remaining: u64::from(remaining) };
                return Ok(());
            }
            State::Start => 0,
            State::Skipping { remaining } => *remaining,
            State::Pending(pending) => pending.remaining(),
            State::Records | State::ZeroTail => 0,
        };
        match (expected, continues) {
            (0, true) => Err(ScanFault::UnexpectedContinuation { remaining }),
            (0, false) => Ok(()),
            (_, false) => Err(ScanFault::MissingContinuation { expected }),
            _ if u64::from(remaining) != expected => Err(ScanFault::RemainingLength { found: remaining, expected }),
            _ => Ok(()),
        }
    }

    /// After a crash the server gives up a record that it had written in part, and goes on at the next page.
    fn enter_overwriting_page(&mut self, header: &PageHeader, continues: bool) -> Result<(), ScanFault> {
        let lsn = match &self.state {
            State::Start | State::Skipping { .. } => None,
            State::Pending(pending) => Some(pending.lsn),
            State::Records | State::ZeroTail => return Err(ScanFault::MissingOverwrite),
        };
        if continues || header.remaining != 0 {
            return Err(ScanFault::PageFlags { found: header.flags, magic: header.magic });
        }
        self.overwritten = Some(Overwritten { lsn });
        self.state = State::Records;
        Ok(())
    }

    // ---- records ----

    fn read_records(&mut self, page: &[u8]) -> Result<(), ScanError> {
        while matches!(self.state, State::Records | State::Start) && self.cursor < page.len() {
            if !self.read_record(page)? {
                return Ok(());
            }
        }
        if matches!(self.state, State::ZeroTail) { self.read_zeros(page) } else { Ok(()) }
    }

    /// Reads the record at the cursor; false when more of it must be received. A record that the page end cuts becomes
    /// pending once the page is there.
    #[inline]
    fn read_record(&mut self, page: &[u8]) -> Result<bool, ScanError> {
        let unread = &page[self.cursor..];
        let start = self.page + self.cursor as u64;
        let Some(length) = unread.first_chunk() else { return Ok(false) };
        let total = u32::from_le_bytes(*length);
        if !(RECORD_HEADER_BYTES as u32..=RECORD_BYTES_MAX).contains(&total) {
            return Err(self.length_fault(start, total, unread));
        }
        let header = unread.first_chunk().map(RecordHeader::parse);
        if let Some(header) = &header {
            self.check_header(header, start).map_err(|fault| self.record_fault(start, fault, unread))?;
        }
        let end = self.cursor + total as usize;
        if end > PAGE_BYTES {
            if page.len() == PAGE_BYTES {
                self.begin_pending(start, total, unread);
            }
            return Ok(false);
        }
        let (Some(header), Some(record)) = (header, unread.get(..total as usize)) else { return Ok(false) };
        if align8(end) > page.len() {
            return Ok(false);
        }
        check_crc(&header, record::record_crc(record)).map_err(|fault| self.record_fault(start, fault, record))?;
        self.check_padding(page, end, start)?;
        self.segments.count_record(start);
        self.take_content(&header, start, record)?;
        self.finish_record(&header, start, align8(end));
        Ok(true)
    }

    /// What can be told from the header alone.
    #[inline]
    fn check_header(&self, header: &RecordHeader, start: Lsn) -> Result<(), ScanFault> {
        if !self.format.has_resource_manager(header.resource_manager) {
            return Err(ScanFault::ResourceManager(header.resource_manager));
        }
        match self.last_record {
            Some(expected) if header.prev != expected => Err(ScanFault::PreviousLink { found: header.prev, expected }),
            None if header.prev >= start => Err(ScanFault::PreviousLinkAhead { found: header.prev }),
            _ => Ok(()),
        }
    }

    /// The server fills pages from zeroed buffers, so the bytes up to the next record are zero.
    #[inline]
    fn check_padding(&self, page: &[u8], end: usize, record: Lsn) -> Result<(), ScanError> {
        let padding = &page[end..align8(end)];
        match padding.iter().position(|byte| *byte != 0) {
            None => Ok(()),
            Some(at) => Err(self.fault_at(self.page + (end + at) as u64, record, ScanFault::RecordPadding, padding)),
        }
    }

    /// Walks the fragments, and notes what the index wants. `prefix` is as much of the record as is at hand.
    #[inline]
    fn take_content(&mut self, header: &RecordHeader, start: Lsn, prefix: &[u8]) -> Result<(), ScanError> {
        let main = record::main_data(prefix, header.total as usize, self.format)
            .map_err(|what| self.record_fault(start, ScanFault::Fragments(what), prefix))?;
        let main = prefix.get(main.start..main.end.min(prefix.len())).unwrap_or_default();
        if self.overwritten.is_some() || header.is_overwrite_contrecord() {
            self.check_overwrite(header, main).map_err(|fault| self.record_fault(start, fault, prefix))?;
        }
        if let Some(seeker) = &mut self.seeker {
            seeker.see(start, header, main, self.format);
        }
        if let Some(fact) = record::fact(header, main, self.format) {
            self.last_commit = self.segments.note(start, fact).or(self.last_commit);
        }
        Ok(())
    }

    /// The first record after one that was given up names it; no other record does.
    fn check_overwrite(&mut self, header: &RecordHeader, main: &[u8]) -> Result<(), ScanFault> {
        if !header.is_overwrite_contrecord() {
            return Err(ScanFault::MissingOverwrite);
        }
        let overwritten = self.overwritten.as_ref().ok_or(ScanFault::UnexpectedOverwrite)?;
        let found = record::overwritten_lsn(main).ok_or(ScanFault::MissingOverwrite)?;
        match overwritten.lsn {
            Some(expected) if found != expected => Err(ScanFault::OverwrittenLsn { found, expected }),
            _ => {
                self.overwritten = None;
                Ok(())
            }
        }
    }

    #[inline]
    fn finish_record(&mut self, header: &RecordHeader, start: Lsn, next: usize) {
        self.cursor = next;
        self.last_record = Some(start);
        let end = self.page + next as u64;
        self.prove(end);
        if header.is_switch() && !self.options.segment_size.is_start(end) {
            self.state = State::ZeroTail;
        } else if !matches!(self.state, State::Records) {
            self.state = State::Records;
        }
    }

    fn begin_pending(&mut self, start: Lsn, total: u32, piece: &[u8]) {
        let mut pending = Pending { lsn: start, total, received: 0, crc: 0, prefix: Vec::new(), header_only: false };
        pending.append(piece);
        self.cursor = PAGE_BYTES;
        self.state = State::Pending(pending);
    }

    /// Takes this page's part of the pending record, whole: the CRC likes long pieces.
    fn read_continuation(&mut self, page: &[u8]) -> Result<(), ScanError> {
        let State::Pending(pending) = &mut self.state else { return Ok(()) };
        let space = PAGE_BYTES - self.cursor;
        let piece = pending.remaining().min(space as u64) as usize;
        let end = self.cursor + piece;
        if page.len() < align8(end) {
            return Ok(());
        }
        let header_was_cut = pending.prefix.len() < RECORD_HEADER_BYTES;
        pending.append(&page[self.cursor..end]);
        self.cursor = align8(end);
        if header_was_cut {
            self.check_pending_header()?;
        }
        if end < PAGE_BYTES || matches!(&self.state, State::Pending(pending) if pending.remaining() == 0) {
            self.finish_pending(page, end)?;
        }
        Ok(())
    }

    fn check_pending_header(&self) -> Result<(), ScanError> {
        let State::Pending(pending) = &self.state else { return Ok(()) };
        let Some(header) = pending.header() else { return Ok(()) };
        self.check_header(&header, pending.lsn).map_err(|fault| self.record_fault(pending.lsn, fault, &pending.prefix))
    }

    fn finish_pending(&mut self, page: &[u8], end: usize) -> Result<(), ScanError> {
        let State::Pending(pending) = std::mem::replace(&mut self.state, State::Records) else { return Ok(()) };
        let (start, prefix) = (pending.lsn, &pending.prefix);
        let header = pending.header().expect("a record is never shorter than its header");
        check_crc(&header, pending.record_crc()).map_err(|fault| self.record_fault(start, fault, prefix))?;
        self.check_padding(page, end, start)?;
        self.segments.count_long_record(start);
        if !pending.header_only {
            self.take_content(&header, start, prefix)?;
        }
        self.finish_record(&header, start, align8(end));
        Ok(())
    }

    // ---- faults ----

    /// A page that does not fit may be the fault of the record that it should continue.
    fn unproven_from(&self) -> Lsn {
        match &self.state {
            State::Pending(pending) => pending.lsn,
            _ => self.page,
        }
    }

    #[cold]
    fn fault_at(&self, lsn: Lsn, record: Lsn, fault: ScanFault, evidence: &[u8]) -> ScanError {
        let evidence = &evidence[..evidence.len().min(LONG_HEADER_BYTES)];
        ScanError { lsn, record, fault, detail: to_hex(evidence) }
    }

    #[cold]
    fn record_fault(&self, start: Lsn, fault: ScanFault, record: &[u8]) -> ScanError {
        // Until the record that says so is proven, giving up another one is a claim.
        let unproven_from = self.overwritten.as_ref().and_then(|given_up| given_up.lsn).unwrap_or(start);
        self.fault_at(start, unproven_from, fault, &record[..record.len().min(RECORD_HEADER_BYTES)])
    }

    #[cold]
    fn length_fault(&self, start: Lsn, total: u32, unread: &[u8]) -> ScanError {
        // The server never sends bytes past its flush position, so zeros are not "the WAL ends here".
        let fault = if total == 0 { ScanFault::NoRecord } else { ScanFault::RecordLength(total) };
        self.record_fault(start, fault, unread.get(..4).unwrap_or_default())
    }
}

fn check_crc(header: &RecordHeader, computed: u32) -> Result<(), ScanFault> {
    if computed == header.crc { Ok(()) } else { Err(ScanFault::Crc { computed, header: header.crc }) }
}

fn align8(offset: usize) -> usize {
    (offset + 7) & !7
}
