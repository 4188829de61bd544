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
//! segment, at or below what the repositories hold. A batch that fails is taken back and written again later; frames
//! that the repositories have taken by then end the run. The next one begins with a segment, and counts once the
//! repositories have reached its start.

use std::collections::{BTreeMap, VecDeque};
use std::io::ErrorKind;
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
/// Files that were still being read when they became superfluous are looked at again this often.
const SWEEP_INTERVAL: Duration = Duration::from_secs(1);
/// A disk that has not taken a batch for this long is not waited for: the repositories may be faster.
const STUCK_AFTER: Duration = Duration::from_secs(10);

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
    /// For the journal: what is not written yet.
    journal: VecDeque<Entry>,
    run: Run,
    /// The run before the batch that is being written.
    run_before: Run,
    stuck_at: Option<Instant>,
    /// In the order of the stream: frames in memory that are not in the spool.
    unspooled: VecDeque<Weak<HeldFrame>>,
    /// In the order of the stream: frames that are in both.
    spooled: VecDeque<(Weak<HeldFrame>, Written)>,
    /// Files by the end of their segment.
    files: BTreeMap<Lsn, Vec<Arc<RunFile>>>,
    is_spilling: bool,
    retry_at: Option<Instant>,
    /// Nothing else may happen that would bring the next look at them: a server can be idle for hours.
    sweep_at: Option<Instant>,
}

/// What is to be written.
#[derive(Debug)]
enum Entry {
    /// Kept in memory until it is written, as long as the disk takes WAL: then nothing may be missing. While it does
    /// not, the journal keeps nothing that the repositories no longer need.
    Frame(Weak<HeldFrame>, Option<Arc<HeldFrame>>),
    Cut(Arc<Cut>),
    /// A record ends here, in a frame before.
    RecordEnd(Lsn),
}

/// The journal's current run: contiguous, durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Run {
    /// A segment's first frame begins the next.
    Waiting,
    Going {
        start: Lsn,
        /// The next frame to be written begins here.
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
    /// What of the journal's run is durable.
    synced: Option<Stored>,
    /// What went wrong, and everything that is to be written again.
    failure: Option<(SpoolError, Vec<Entry>)>,
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
            run: Run::Waiting,
            run_before: Run::Waiting,
            stuck_at: None,
            unspooled: VecDeque::new(),
            spooled: VecDeque::new(),
            files: BTreeMap::new(),
            is_spilling: false,
            retry_at: None,
            sweep_at: None,
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
            // What cannot be written now is nothing to wait for at the end.
            if !open && writing.is_none() {
                return;
            }
            let retry_at = self.retry_at.unwrap_or_else(Instant::now);
            let stuck_at = self.stuck_at.unwrap_or_else(Instant::now);
            let sweep_at = self.sweep_at.unwrap_or_else(Instant::now);
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
                () = tokio::time::sleep_until(sweep_at), if self.sweep_at.is_some() => self.sweep(),
                () = tokio::time::sleep_until(stuck_at), if self.stuck_at.is_some() => {
                    self.stuck_at = None;
                    self.say(format!("its disk has not taken a write for {STUCK_AFTER:?}"), None);
                    self.let_go();
                }
            }
        }
    }

    fn is_journal(&self) -> bool {
        self.options.acknowledge == Acknowledge::Spool
    }

    fn handle_encoded(&mut self, encoded: Encoded) {
        let is_failing = self.is_failing();
        match encoded {
            Encoded::Frame(frame) if !self.is_journal() => self.unspooled.push_back(Arc::downgrade(&frame)),
            Encoded::Frame(frame) => {
                let covered = match self.journal.back() {
                    // All of the cut's bytes are in the frame.
                    Some(Entry::Cut(cut)) => Some(cut.to),
                    _ => None,
                };
                if covered.is_some() {
                    self.journal.pop_back();
                }
                let kept = Some(frame.clone()).filter(|_| !is_failing);
                self.journal.push_back(Entry::Frame(Arc::downgrade(&frame), kept));
                self.journal.extend(covered.map(Entry::RecordEnd));
            }
            Encoded::Cut(cut) if self.is_journal() && !is_failing => {
                // A later cut holds all of an earlier one.
                if let Some(Entry::Cut(_)) = self.journal.back() {
                    self.journal.pop_back();
                }
                self.journal.push_back(Entry::Cut(cut));
            }
            Encoded::Seal(sealed) if self.is_journal() => {
                self.journal.extend(sealed.summary.record_end.map(Entry::RecordEnd));
            }
            Encoded::Cut(_) | Encoded::Seal(_) => {}
        }
        if is_failing {
            self.forget_stored();
        }
    }

    fn is_failing(&self) -> bool {
        self.health.borrow().failure.is_some()
    }

    /// While the disk takes nothing, what the repositories have taken is nothing to write any more.
    fn forget_stored(&mut self) {
        let is_gone = |entry: &Entry| match entry {
            Entry::Frame(frame, _) => frame.strong_count() == 0,
            Entry::Cut(_) | Entry::RecordEnd(_) => true,
        };
        while self.journal.front().is_some_and(is_gone) {
            self.journal.pop_front();
        }
    }

    /// Keeps nothing in memory for the journal's sake.
    fn let_go(&mut self) {
        for entry in &mut self.journal {
            if let Entry::Frame(_, kept) = entry {
                *kept = None;
            }
        }
        self.journal.retain(|entry| !matches!(entry, Entry::Cut(_)));
    }

    /// Whether the journal's run takes this; begins a run where one can.
    fn admit(&mut self, entry: &Entry) -> bool {
        let size = self.options.segment_size;
        let begun = |start: Lsn, end: Lsn| Run::Going {
            start,
            end,
            synced: Stored { record_end: Lsn::ZERO, bytes_end: start },
        };
        match (entry, &mut self.run) {
            (Entry::Frame(frame, _), run) => {
                let frame = frame.upgrade();
                match (frame, &mut *run) {
                    (Some(frame), Run::Going { end, .. }) if *end == frame.start => *end = frame.end(),
                    (Some(frame), run) if size.is_start(frame.start) => *run = begun(frame.start, frame.end()),
                    // Missing, or behind what is missing.
                    (_, run) => {
                        *run = Run::Waiting;
                        return false;
                    }
                }
                true
            }
            (Entry::Cut(cut), run) => match (&cut.partial, &mut *run) {
                (Some(partial), Run::Going { end, .. }) => partial.start == *end,
                (None, Run::Going { end, .. }) => cut.to <= *end,
                (Some(partial), run) if size.is_start(partial.start) => {
                    *run = begun(partial.start, partial.start);
                    true
                }
                _ => false,
            },
            (Entry::RecordEnd(_), run) => matches!(run, Run::Going { .. }),
        }
    }

    // --- Writing ---

    fn start_batch(&mut self) -> Option<JoinHandle<Batch>> {
        if self.retry_at.is_some() || self.writer.is_none() {
            return None;
        }
        self.run_before = self.run;
        let entries = if self.is_journal() { self.take_journal() } else { self.take_overflow() };
        if entries.is_empty() {
            return None;
        }
        let writer = self.writer.take()?;
        let workers = self.workers.clone();
        let synced = match self.run {
            Run::Going { synced, .. } if self.is_journal() => Some(synced),
            _ => None,
        };
        self.stuck_at = Some(Instant::now() + STUCK_AFTER);
        Some(tokio::spawn(async move { workers.run(move |encoder| write(writer, entries, synced, encoder)).await }))
    }

    /// What comes next in the journal, of one run.
    fn take_journal(&mut self) -> Vec<Entry> {
        let mut taken = Vec::new();
        let mut bytes = 0;
        while bytes < BATCH_BYTES
            && let Some(entry) = self.journal.pop_front()
        {
            let next_bytes = match &entry {
                Entry::Frame(frame, _) => frame.upgrade().map_or(0, |frame| frame.stored_bytes),
                Entry::Cut(cut) => cut.partial.as_ref().map_or(0, |partial| cut.to - partial.start),
                Entry::RecordEnd(_) => 0,
            };
            if !self.spool.has_room_for(bytes + next_bytes) {
                self.journal.push_front(entry);
                if taken.is_empty() {
                    self.say_full();
                    self.let_go();
                    self.retry_at = Some(Instant::now() + RETRY_AFTER);
                }
                break;
            }
            let run = self.run;
            if !self.admit(&entry) {
                continue;
            }
            let is_another = |run: Run, other: Run| match (run, other) {
                (Run::Going { start, .. }, Run::Going { start: other, .. }) => start != other,
                _ => false,
            };
            if !taken.is_empty() && is_another(run, self.run) {
                self.run = run;
                self.journal.push_front(entry);
                break;
            }
            bytes += next_bytes;
            taken.push(match entry {
                // From here to the disk it must not go away.
                Entry::Frame(frame, kept) => Entry::Frame(frame.clone(), kept.or_else(|| frame.upgrade())),
                other => other,
            });
        }
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
                    if taken.is_empty() {
                        self.say_full();
                    }
                    break;
                }
                bytes += frame.stored_bytes;
                taken.push(Entry::Frame(Arc::downgrade(&frame), Some(frame)));
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
        self.stuck_at = None;
        if let Some((error, entries)) = batch.failure {
            self.say_failure(&error);
            self.run = self.run_before;
            self.retry_at = Some(Instant::now() + RETRY_AFTER);
            for entry in entries.into_iter().rev() {
                match entry {
                    Entry::Frame(frame, _) if !self.is_journal() => self.unspooled.push_front(frame),
                    entry => self.journal.push_front(entry),
                }
            }
            self.let_go();
            return;
        }
        self.say_success();
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
        if let (Some(now), Run::Going { synced, .. }) = (batch.synced, &mut self.run) {
            *synced = now;
            self.claim();
        }
        if self.is_journal() {
            self.leave_memory();
        }
        self.sweep();
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
        // While a batch is being written the file it goes to has a reader: the batch's end brings the next look.
        if let Some(writer) = &mut self.writer {
            writer.close_up_to(reached);
        }
        self.sweep_at = None;
        let stored: Vec<Lsn> = self.files.range(..=reached).map(|(&end, _)| end).collect();
        for end in stored {
            let files = self.files.remove(&end).unwrap_or_default();
            let (unread, read): (Vec<_>, Vec<_>) = files.into_iter().partition(|file| Arc::strong_count(file) == 1);
            unread.iter().for_each(|file| self.remove(file));
            if !read.is_empty() {
                self.files.insert(end, read);
                self.sweep_at = Some(Instant::now() + SWEEP_INTERVAL);
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

    fn say_full(&self) {
        let usage = self.spool.usage();
        self.say_failure(&SpoolError::Full { used_bytes: usage.used_bytes(), limit_bytes: usage.limit_bytes() });
    }

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
fn write(mut writer: RunWriter, entries: Vec<Entry>, synced: Option<Stored>, encoder: &mut Encoder) -> Batch {
    writer.begin_batch();
    let (written, files, ended_tails) = (Vec::new(), Vec::new(), Vec::new());
    let mut batch = Batch { writer, written, files, ended_tails, synced, failure: None };
    let mut appended = entries.iter().try_for_each(|entry| append(&mut batch, entry, encoder));
    if appended.is_ok() && synced.is_some() {
        appended = batch.writer.sync();
    }
    match appended {
        Ok(()) => batch.writer.end_batch(),
        Err(error) => {
            batch.writer.give_up();
            batch.failure = Some((error, entries));
        }
    }
    batch
}

/// Appends one entry and says how far that reaches, which counts once it is synced.
fn append(batch: &mut Batch, entry: &Entry, encoder: &mut Encoder) -> Result<(), SpoolError> {
    let (bytes_end, record_end) = match entry {
        Entry::Frame(_, frame) => {
            let frame = frame.as_ref().expect("what is being written is kept");
            let bytes = frame.in_memory().expect("a frame leaves memory only once it was written here");
            let written = batch.writer.append_frame(frame.start, frame.end(), &bytes)?;
            if written.offset == 0 {
                batch.files.push(written.file.clone());
            }
            batch.written.push((Arc::downgrade(frame), written));
            batch.ended_tails.extend(batch.writer.end_tail());
            (frame.end(), Lsn::ZERO)
        }
        Entry::Cut(cut) => {
            if let Some(partial) = &cut.partial {
                let from = batch.writer.tail_end(partial.start);
                if from < cut.to {
                    let piece = (from - partial.start) as usize..(cut.to - partial.start) as usize;
                    let piece = encoder.encode(&partial.bytes()[piece]);
                    match batch.writer.append_tail(partial.start, cut.to, &piece.bytes) {
                        Ok(file) if from == partial.start => batch.files.push(file),
                        Ok(_) => {}
                        // Pieces from before a failure: they stay as they are until the frame is whole.
                        Err(SpoolError::Io { source, .. }) if source.kind() == ErrorKind::AlreadyExists => {
                            return Ok(());
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
            (cut.to, cut.to)
        }
        Entry::RecordEnd(record_end) => (Lsn::ZERO, *record_end),
    };
    if let Some(reached) = &mut batch.synced {
        reached.bytes_end = reached.bytes_end.max(bytes_end);
        if record_end <= reached.bytes_end {
            reached.record_end = reached.record_end.max(record_end);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
