//! Owns: the proof that the WAL of a line is one chain of records, from segment to segment, and that the index says of it
//! what it holds.
//! Does not own: reading segments (`content.rs`), the proof itself (`wal::scanner`).
//! Pure.

use std::collections::VecDeque;

use super::content::Sink;
use crate::catalog::IndexEntry;
use crate::wal::{Carry, Lsn, Proof, ScanOptions, Scanner, SegmentSize, SegmentSummary};

/// Reads pieces of one timeline's WAL, each where the one before it ends, or anew.
#[derive(Debug)]
pub struct Chain {
    options: ScanOptions,
    /// Otherwise pieces pass unread: what comes before them is not read, or not known.
    is_on: bool,
    /// `None`: what comes next is not connected with what came.
    scanner: Option<Scanner>,
    /// Raw bytes of the piece under way that do not count: another one had them.
    skip: u64,
    /// Segments whose records are not all proven yet, with what the index says of them. At most as many as one record
    /// can span.
    waiting: VecDeque<IndexEntry>,
    fault: Option<String>,
    /// What the index says wrongly of earlier segments.
    lies: Vec<(IndexEntry, String)>,
}

impl Chain {
    pub fn new(options: ScanOptions, is_on: bool) -> Chain {
        Chain { options, is_on, scanner: None, skip: 0, waiting: VecDeque::new(), fault: None, lies: Vec::new() }
    }

    /// One that knows nothing of this one's WAL.
    pub fn anew(&self) -> Chain {
        Chain::new(self.options.clone(), self.is_on)
    }

    pub fn size(&self) -> SegmentSize {
        self.options.segment_size
    }

    /// Where the chain goes on; `None`: anywhere.
    pub fn position(&self) -> Option<Lsn> {
        self.scanner.as_ref().map(Scanner::position)
    }

    /// Prepares for the piece that begins at `from`, of which bytes before `counts_from` were read already. False when
    /// nothing can be told of it: it begins inside a segment, and what lies before it is not known.
    pub fn begin(&mut self, from: Lsn, counts_from: Lsn, carry: Option<Carry>) -> bool {
        self.fault = None;
        self.skip = counts_from.saturating_distance(from);
        if self.position() == Some(counts_from) {
            return true;
        }
        self.break_off();
        if !self.is_on || !self.size().is_start(counts_from) {
            return false;
        }
        self.scanner = Some(Scanner::new(self.options.clone(), counts_from, carry.unwrap_or_default()));
        true
    }

    /// The state at the start of the segment that comes next, to read that again by itself.
    pub fn carry(&self) -> Option<Carry> {
        self.scanner.as_ref().map(Scanner::carry_at_segment_start)
    }

    /// A piece was read whole, and its bytes are the right ones. `entry` is what the index says of a sealed segment.
    pub fn finish(&mut self, entry: Option<&IndexEntry>) -> Option<String> {
        if let Some(fault) = self.fault.take() {
            self.break_off();
            return Some(fault);
        }
        let scanner = self.scanner.as_mut()?;
        if let Some(entry) = entry {
            let told = carry_differs(scanner, entry);
            self.waiting.push_back(entry.clone());
            while let Some((number, summary)) = scanner.poll_segment() {
                let start = self.options.segment_size.start_of(number);
                while self.waiting.front().is_some_and(|entry| entry.start_lsn < start) {
                    self.waiting.pop_front();
                }
                if self.waiting.front().is_some_and(|entry| entry.start_lsn == start)
                    && let Some(entry) = self.waiting.pop_front()
                    && let Some(lie) = summary_differs(&summary, &entry)
                {
                    self.lies.push((entry, lie));
                }
            }
            if let Some(told) = told {
                let is_told = self.lies.iter().any(|(known, _)| known.segment == entry.segment);
                if !is_told {
                    self.lies.push((entry.clone(), told));
                }
            }
        }
        None
    }

    /// What comes next has nothing to do with what came.
    pub fn break_off(&mut self) {
        self.scanner = None;
        self.waiting.clear();
        self.fault = None;
    }

    /// What was found out about the index meanwhile.
    pub fn take_lies(&mut self) -> Vec<(IndexEntry, String)> {
        std::mem::take(&mut self.lies)
    }
}

impl Sink for Chain {
    fn take(&mut self, raw: &[u8]) {
        let skipped = self.skip.min(raw.len() as u64);
        self.skip -= skipped;
        let raw = &raw[skipped as usize..];
        if self.fault.is_some() || raw.is_empty() {
            return;
        }
        if let Some(scanner) = &mut self.scanner {
            let position = scanner.position();
            self.fault = scanner.feed(position, raw).err().map(|error| error.to_string());
        }
    }
}

/// The scanner's state at a segment's end, against what the index says it is. Where the scanner began in the middle of
/// the WAL, it knows less than whoever wrote the index until it has met a record.
fn carry_differs(scanner: &Scanner, entry: &IndexEntry) -> Option<String> {
    let found = scanner.carry_at_segment_start();
    let knows = scanner.proof() == Proof::Proven && scanner.is_linked() && found.last_record.is_some();
    let is_there = scanner.position() == entry.end_lsn;
    (knows && is_there && found != entry.summary.carry)
        .then(|| "the index says of its end what its records do not".to_string())
}

fn summary_differs(found: &SegmentSummary, entry: &IndexEntry) -> Option<String> {
    let said = &entry.summary;
    let differs =
        |what: &str, found: String, said: String| Some(format!("the index says it has {what} {said}, it has {found}"));
    if found.proof != said.proof {
        return differs("proof", format!("{:?}", found.proof), format!("{:?}", said.proof));
    }
    if found.record_count != said.record_count {
        return differs("a record count of", found.record_count.to_string(), said.record_count.to_string());
    }
    // What may be unknown to a scanner that began here is no lie of the index.
    if found.last_record.is_some() && found.last_record != said.last_record {
        return differs("its last record at", format!("{:?}", found.last_record), format!("{:?}", said.last_record));
    }
    if found.min_commit_time != said.min_commit_time
        || found.max_commit_time != said.max_commit_time
        || found.min_xid != said.min_xid
        || found.max_xid != said.max_xid
        || found.restore_points != said.restore_points
        || found.drops != said.drops
        || found.truncations != said.truncations
    {
        return Some("the index does not say which commits, restore points, drops and truncations it has".to_string());
    }
    None
}
