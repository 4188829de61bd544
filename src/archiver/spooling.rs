//! What happens to encoded frames on local disk. Without a contract about it the spool is memory's overflow: frames
//! go there, oldest first, when half of the budget is used, until a quarter is. With `acknowledge = "spool"` it is a
//! journal: everything goes there in the order of the stream and is synced, and what is proven of it is acknowledged.
//!
//! Owns: which frames are written when, when they leave memory, what the journal may claim, when files go.
//! Does not own: the files (`spool`), what is acknowledged (`receiver/progress.rs`).
//! Rests on `proto-notes/08-durability.md`, "the spool".
//!
//! Overflow is not synced: nothing is promised about it, and after a power loss its checksums tell what is there.
//!
//! The journal claims only what a crash would leave for the next agent to begin with: a run that starts with a
//! segment, at or below what the repositories hold. A failure ends the run; the next one begins with the next segment,
//! and counts once the repositories have reached its start.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::encode::{Encoded, HeldFrame};
use super::workers::Workers;
use crate::codec::Encoder;
use crate::error::Advice;
use crate::receiver::{Acknowledge, Cut, MemoryBudget, Progress, Stored};
use crate::spool::{LineageSpool, RunFile, RunWriter, SpoolError, Written};
use crate::wal::{Lsn, SegmentSize, TimelineId};

/// Written at once, between two looks at what else is to be done. More would delay a sync that somebody waits for.
const BATCH_BYTES: u64 = 8 << 20;
/// After a failure the disk is left alone for this long.
const RETRY_AFTER: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct SpoolingOptions {
    pub timeline: TimelineId,
    pub segment_size: SegmentSize,
    pub memory: MemoryBudget,
    pub acknowledge: Acknowledge,
}

/// How the spool is doing, for `status`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpoolHealth {
    /// Why nothing is written at the moment.
    pub failure: Option<String>,
    pub used_bytes: u64,
    pub limit_bytes: u64,
}

/// One stream's way through the spool. Ends when its input closes; what was written stays for the next agent.
/// May be dropped at any await: a write under way then ends by itself.
#[derive(Debug)]
pub struct Spooling {
    options: SpoolingOptions,
    spool: LineageSpool,
    workers: Workers,
    progress: Arc<watch::Sender<Progress>>,
    health: Arc<watch::Sender<SpoolHealth>>,
    /// `None` while a batch is being written.
    writer: Option<RunWriter>,
    /// For the journal: what is not written yet, kept until it is.
    journal: VecDeque<Entry>,
    /// Encoded bytes only the journal may be keeping in memory.
    journal_bytes: u64,
    run: Run,
    /// In the order of the stream: frames in memory that are not in the spool.
    unspooled: VecDeque<Weak<HeldFrame>>,
    /// In the order of the stream: frames that are in both.
    spooled: VecDeque<(Weak<HeldFrame>, Written)>,
    /// Files by the end of their segment.
    files: BTreeMap<Lsn, Vec<Arc<RunFile>>>,
    is_spilling: bool,
    retry_at: Option<Instant>,
}

/// What the journal has to write.
#[derive(Debug)]
enum Entry {
    Frame(Arc<HeldFrame>),
    Cut(Arc<Cut>),
    /// A segment's end is proven: its last record end.
    Seal {
        record_end: Lsn,
    },
}

/// The journal's current run: contiguous, durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    /// A segment's first frame begins the next.
    Waiting,
    Going {
        start: Lsn,
        /// Up to here it was handed to the writer.
        end: Lsn,
        /// Up to here it is synced.
        synced: Stored,
    },
}

/// A batch's result, and the writer back.
struct Batch {
    writer: RunWriter,
    written: Vec<(Weak<HeldFrame>, Written)>,
    /// Files that were begun.
    files: Vec<Arc<RunFile>>,
    /// Pieces whose frame is durable as a whole now.
    ended_tails: Vec<Arc<RunFile>>,
    /// What of the journal's run is durable, and where the run began.
    synced: Option<(Lsn, Stored)>,
    /// Frames that a failure kept from being written.
    unwritten: Vec<Weak<HeldFrame>>,
    failure: Option<SpoolError>,
}

impl Spooling {
    pub fn new(
        options: SpoolingOptions,
        spool: LineageSpool,
        workers: Workers,
        progress: Arc<watch::Sender<Progress>>,
        health: Arc<watch::Sender<SpoolHealth>>,
    ) -> Spooling {
        let writer = spool.writer(options.timeline, options.segment_size);
        Spooling {
            options,
            spool,
            workers,
            progress,
            health,
            writer: Some(writer),
            journal: VecDeque::new(),
            journal_bytes: 0,
            run: Run::Waiting,
            unspooled: VecDeque::new(),
            spooled: VecDeque::new(),
            files: BTreeMap::new(),
            is_spilling: false,
            retry_at: None,
        }
    }

    pub async fn run(mut self, mut input: mpsc::Receiver<Encoded>) {
        let mut progress = self.progress.subscribe();
        let mut writing: Option<JoinHandle<Batch>> = None;
        let mut open = true;
        loop {
            if writing.is_none() {
                writing = self.start_batch();
            }
            if !open && writing.is_none() && (self.journal.is_empty() || self.retry_at.is_some()) {
                return;
            }
            let retry_at = self.retry_at.unwrap_or_else(Instant::now);
            tokio::select! {
                biased;
                batch = async { writing.as_mut().expect("checked: there is one").await }, if writing.is_some() => {
                    writing = None;
                    self.handle_batch(batch.expect("writing to the spool does not panic"));
                }
                encoded = input.recv(), if open => match encoded {
                    Some(encoded) => self.handle_encoded(encoded),
                    None => open = false,
                },
                changed = progress.changed() => {
                    changed.expect("this task holds a sender");
                    self.claim();
                    self.sweep();
                }
                () = tokio::time::sleep_until(retry_at), if self.retry_at.is_some() => self.retry_at = None,
            }
        }
    }

    fn is_journal(&self) -> bool {
        self.options.acknowledge == Acknowledge::Spool
    }

    fn handle_encoded(&mut self, encoded: Encoded) {
        if !self.is_journal() {
            if let Encoded::Frame(frame) = encoded {
                self.unspooled.push_back(Arc::downgrade(&frame));
            }
            return;
        }
        let entry = match encoded {
            Encoded::Frame(frame) => Entry::Frame(frame),
            Encoded::Cut(cut) => {
                // A later cut holds all of an earlier one.
                if let Some(Entry::Cut(_)) = self.journal.back() {
                    self.journal.pop_back();
                }
                Entry::Cut(cut)
            }
            Encoded::Seal(sealed) => match sealed.summary.record_end {
                Some(record_end) => Entry::Seal { record_end },
                None => return,
            },
        };
        if !self.admit(&entry) {
            if let Entry::Frame(frame) = entry {
                self.unspooled.push_back(Arc::downgrade(&frame));
            }
            return;
        }
        if let Entry::Frame(frame) = &entry {
            self.journal_bytes += frame.stored_bytes;
        }
        self.journal.push_back(entry);
        if self.journal_bytes > self.options.memory.limit_bytes() / 2 {
            self.fail("its disk takes WAL slower than the server writes it", None);
        }
    }

    /// Whether the journal's run takes this; begins a run where one can.
    fn admit(&mut self, entry: &Entry) -> bool {
        match (entry, &mut self.run) {
            (Entry::Frame(frame), Run::Going { end, .. }) if *end == frame.start => {
                *end = frame.end();
                true
            }
            (Entry::Frame(frame), run) => {
                let size = self.options.segment_size;
                let may_begin = size.is_start(frame.start)
                    && self.retry_at.is_none()
                    && self.spool.has_room_for(self.spool.usage().limit_bytes() / 16);
                if may_begin {
                    let synced = Stored { record_end: Lsn::ZERO, bytes_end: frame.start };
                    *run = Run::Going { start: frame.start, end: frame.end(), synced };
                }
                may_begin
            }
            (Entry::Cut(cut), run @ Run::Waiting) => {
                // The segment's first frame is not whole yet.
                let Some(partial) = cut.partial.as_ref() else { return false };
                let start = partial.start;
                // After a failure the pieces of this frame may have left a file under its name.
                let may_begin = self.options.segment_size.is_start(start) && self.health.borrow().failure.is_none();
                if may_begin {
                    let synced = Stored { record_end: Lsn::ZERO, bytes_end: start };
                    *run = Run::Going { start, end: start, synced };
                }
                may_begin
            }
            (Entry::Cut(cut), Run::Going { end, .. }) => match &cut.partial {
                Some(partial) => partial.start == *end,
                None => cut.to <= *end,
            },
            (Entry::Seal { .. }, Run::Going { .. }) => true,
            (Entry::Seal { .. }, Run::Waiting) => false,
        }
    }

    // --- Writing ---

    fn start_batch(&mut self) -> Option<JoinHandle<Batch>> {
        if self.retry_at.is_some() {
            return None;
        }
        let entries = if self.is_journal() { self.take_journal() } else { self.take_overflow() };
        if entries.is_empty() {
            return None;
        }
        let writer = self.writer.take()?;
        let workers = self.workers.clone();
        let synced = match self.run {
            Run::Going { start, synced, .. } if self.is_journal() => Some((start, synced)),
            _ => None,
        };
        Some(tokio::spawn(async move { workers.run(move |encoder| write(writer, entries, synced, encoder)).await }))
    }

    fn take_journal(&mut self) -> Vec<Entry> {
        let mut taken = Vec::new();
        let mut bytes = 0;
        while bytes < BATCH_BYTES
            && let Some(entry) = self.journal.pop_front()
        {
            if let Entry::Frame(frame) = &entry {
                bytes += frame.stored_bytes;
            }
            taken.push(entry);
        }
        self.journal_bytes -= bytes;
        if taken.is_empty() {
            self.leave_memory();
        }
        taken
    }

    /// The oldest frames, when memory is half full: as many as bring it down to a quarter.
    fn take_overflow(&mut self) -> Vec<Entry> {
        let mut taken = Vec::new();
        let mut bytes = 0;
        let surplus = self.surplus().min(BATCH_BYTES);
        while bytes < surplus
            && let Some(frame) = self.unspooled.pop_front()
        {
            if let Some(frame) = frame.upgrade() {
                if !self.spool.has_room_for(bytes + frame.stored_bytes) {
                    self.unspooled.push_front(Arc::downgrade(&frame));
                    self.say_failure(&SpoolError::Full {
                        used_bytes: self.spool.usage().used_bytes(),
                        limit_bytes: self.spool.usage().limit_bytes(),
                    });
                    break;
                }
                bytes += frame.stored_bytes;
                taken.push(Entry::Frame(frame));
            }
        }
        taken
    }

    /// How much memory is to be freed now.
    fn surplus(&mut self) -> u64 {
        let memory = &self.options.memory;
        let (held, limit) = (memory.held_bytes(), memory.limit_bytes());
        self.is_spilling = held >= if self.is_spilling { limit / 4 + 1 } else { limit / 2 };
        if self.is_spilling { held - limit / 4 } else { 0 }
    }

    /// Frames the journal has written need no memory any more when it is short.
    fn leave_memory(&mut self) {
        while self.surplus() > 0
            && let Some((frame, written)) = self.spooled.pop_front()
        {
            if let Some(frame) = frame.upgrade() {
                frame.leave_memory(written);
            }
        }
    }

    fn handle_batch(&mut self, batch: Batch) {
        self.writer = Some(batch.writer);
        let size = self.options.segment_size;
        for file in batch.files {
            let end = file.name.segment.number(size).map_or(file.name.from, |number| size.end_of(number));
            self.files.entry(end).or_default().push(file);
        }
        for tail in batch.ended_tails {
            self.remove(&tail);
        }
        for (frame, written) in batch.written {
            match frame.upgrade() {
                Some(held) if !self.is_journal() => held.leave_memory(written),
                Some(_) => self.spooled.push_back((frame, written)),
                None => {}
            }
        }
        for frame in batch.unwritten.into_iter().rev() {
            self.unspooled.push_front(frame);
        }
        match batch.failure {
            Some(error) => self.fail("", Some(error)),
            None => self.say_success(),
        }
        // A run that was given up meanwhile is not another one's.
        if let (Some((of, now)), Run::Going { start, synced, .. }) = (batch.synced, &mut self.run)
            && of == *start
        {
            *synced = now;
            self.claim();
        }
        self.leave_memory_if_journal();
        self.sweep();
    }

    fn leave_memory_if_journal(&mut self) {
        if self.is_journal() {
            self.leave_memory();
        }
    }

    /// Ends the run and leaves the disk alone for a while. What was claimed stays true: it is synced.
    fn fail(&mut self, why: &str, error: Option<SpoolError>) {
        match &error {
            Some(error) => self.say_failure(error),
            None => self.say(why.to_string(), None),
        }
        self.run = Run::Waiting;
        self.retry_at = Some(Instant::now() + RETRY_AFTER);
        for entry in std::mem::take(&mut self.journal) {
            if let Entry::Frame(frame) = entry {
                self.unspooled.push_back(Arc::downgrade(&frame));
            }
        }
        self.journal_bytes = 0;
        if let Some(writer) = &mut self.writer {
            writer.give_up();
        }
    }

    // --- Claims and files ---

    /// Reports what is synced, if a crash now would leave it usable: the repositories reach the run's start.
    fn claim(&mut self) {
        let Run::Going { start, synced, .. } = self.run else { return };
        let reached = self.reached();
        self.progress.send_if_modified(|progress| {
            let before = progress.spooled();
            let is_ahead = synced.record_end > before.record_end && synced.bytes_end >= before.bytes_end;
            if start > reached || !is_ahead {
                return false;
            }
            progress.handle_spooled(synced);
            true
        });
    }

    /// The end of what as many repositories as required hold, contiguously.
    fn reached(&self) -> Lsn {
        let progress = self.progress.borrow();
        let mut ends: Vec<Lsn> = progress.stored().iter().map(|stored| stored.bytes_end).collect();
        ends.sort_unstable_by(|a, b| b.cmp(a));
        ends[progress.required() - 1]
    }

    /// Removes the files of segments the repositories hold, once nobody reads them any more.
    fn sweep(&mut self) {
        let reached = self.reached();
        while self.spooled.front().is_some_and(|(frame, _)| frame.strong_count() == 0) {
            self.spooled.pop_front();
        }
        while self.unspooled.front().is_some_and(|frame| frame.strong_count() == 0) {
            self.unspooled.pop_front();
        }
        // The file that is being appended to is the writer's, too: it stays until the next segment's takes its place.
        let stored: Vec<Lsn> = self.files.range(..=reached).map(|(&end, _)| end).collect();
        for end in stored {
            let files = self.files.remove(&end).unwrap_or_default();
            let (unread, read): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| Arc::strong_count(file) == 1);
            unread.iter().for_each(|file| self.remove(file));
            if !read.is_empty() {
                self.files.insert(end, read);
            }
        }
        self.publish();
    }

    fn remove(&self, file: &RunFile) {
        if let Err(error) = file.remove() {
            tracing::warn!(%error, "a file of the spool stays although nobody needs it");
        }
    }

    // --- What is said ---

    fn say_failure(&self, error: &SpoolError) {
        self.say(error.to_string(), error.hint());
    }

    /// Once, until it works again.
    fn say(&self, failure: String, hint: Option<String>) {
        if self.health.borrow().failure.is_none() {
            let consequence = match self.options.acknowledge {
                Acknowledge::Spool => "only what the repositories hold is acknowledged",
                Acknowledge::Repository => "what memory has no room for stays on the server",
            };
            tracing::warn!(hint, "the spool takes no WAL, {consequence}: {failure}");
        }
        self.health.send_modify(|health| health.failure = Some(failure));
    }

    fn say_success(&self) {
        if self.health.borrow().failure.is_some() {
            tracing::info!("the spool takes WAL again");
            self.health.send_modify(|health| health.failure = None);
        }
    }

    fn publish(&self) {
        let usage = self.spool.usage();
        let (used_bytes, limit_bytes) = (usage.used_bytes(), usage.limit_bytes());
        self.health.send_if_modified(|health| {
            let before = std::mem::replace(&mut health.used_bytes, used_bytes);
            health.limit_bytes = limit_bytes;
            before != used_bytes
        });
    }
}

/// Writes a batch; for the journal (`synced` is its run so far) makes it durable. On a thread of its own.
fn write(writer: RunWriter, entries: Vec<Entry>, synced: Option<(Lsn, Stored)>, encoder: &mut Encoder) -> Batch {
    let (written, files, ended_tails, unwritten) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut batch = Batch { writer, written, files, ended_tails, synced: None, unwritten, failure: None };
    let mut reached = synced.map(|(_, reached)| reached);
    let mut entries = entries.into_iter();
    let mut appended = Ok(());
    for entry in entries.by_ref() {
        appended = append(&mut batch, &entry, &mut reached, encoder);
        if appended.is_err() {
            batch.unwritten.extend(frame_of(&entry));
            break;
        }
    }
    batch.unwritten.extend(entries.filter_map(|entry| frame_of(&entry)));
    if appended.is_ok() && synced.is_some() {
        appended = batch.writer.sync();
    }
    match appended {
        Ok(()) => batch.synced = synced.zip(reached).map(|((start, _), reached)| (start, reached)),
        Err(error) => {
            batch.failure = Some(error);
            batch.writer.give_up();
            // Nothing says that their frames are on the disk: they stay until their segment is stored.
            batch.ended_tails.clear();
        }
    }
    batch
}

fn frame_of(entry: &Entry) -> Option<Weak<HeldFrame>> {
    match entry {
        Entry::Frame(frame) => Some(Arc::downgrade(frame)),
        _ => None,
    }
}

/// Appends one entry and moves `reached`, which counts once it is synced.
fn append(
    batch: &mut Batch,
    entry: &Entry,
    reached: &mut Option<Stored>,
    encoder: &mut Encoder,
) -> Result<(), SpoolError> {
    let mut reach = |bytes_end: Lsn, record_end: Lsn| {
        if let Some(reached) = reached {
            reached.bytes_end = reached.bytes_end.max(bytes_end);
            reached.record_end = reached.record_end.max(record_end.min(reached.bytes_end));
        }
    };
    match entry {
        Entry::Frame(frame) => {
            let bytes = frame.in_memory().expect("a frame leaves memory only once it was written here");
            let written = batch.writer.append_frame(frame.start, frame.end(), &bytes)?;
            if written.offset == 0 {
                batch.files.push(written.file.clone());
            }
            batch.written.push((Arc::downgrade(frame), written));
            batch.ended_tails.extend(batch.writer.end_tail());
            reach(frame.end(), Lsn::ZERO);
        }
        Entry::Cut(cut) => {
            if let Some(partial) = &cut.partial {
                let from = batch.writer.tail_end(partial.start);
                if from < cut.to {
                    let piece = (from - partial.start) as usize..(cut.to - partial.start) as usize;
                    let piece = encoder.encode(&partial.bytes()[piece]);
                    let file = batch.writer.append_tail(partial.start, cut.to, &piece.bytes)?;
                    if from == partial.start {
                        batch.files.push(file);
                    }
                }
            }
            reach(cut.to, cut.to);
        }
        Entry::Seal { record_end } => reach(Lsn::ZERO, *record_end),
    }
    Ok(())
}
