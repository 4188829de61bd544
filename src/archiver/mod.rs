//! What happens to encoded frames in one repository: tails while a segment is open, the segment when it is
//! whole, its index entry, then the tails go. In parallel, but positions advance only over a gap-free prefix.
//!
//! Owns: the order of writes to one repository and the frontier they reach.
//! Does not own: proof (`receiver`), the bytes' encoding (`codec`), what is acknowledged (`receiver/progress.rs`).
//! Rests on `proto-notes/07-repository-format.md`, "order of writes".

mod body;
mod compare;
pub mod copy;
mod encode;
mod index;
pub mod mend;
mod outlet;
mod push;
mod queue;
pub mod reach;
pub mod repair;
mod segment;
mod spooling;
mod tail;
mod workers;
mod writer;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{Mutex, mpsc};
use tokio::time::Instant;

pub use encode::{Encoded, run_encoding};
pub use outlet::{Finished, Outlet, Outlets};
pub use reach::Reach;
pub use spooling::{SpoolHealth, Spooling, SpoolingOptions};
pub use workers::Workers;
pub use writer::{ArchiveError, StoreHealth, Writer};

use crate::catalog::DirectoryContents;
use crate::catalog::index::IndexEntry;
use crate::codec::Form;
use crate::receiver::resume::Frontier;
use crate::receiver::{Cut, MemoryBudget, Sealed};
use crate::repository::layout::{IndexName, TailName};
use crate::repository::{Key, StoreErrorKind};
use crate::wal::{Lsn, SegmentName, SegmentNumber, SegmentSize, TimelineId};
use index::IndexGroups;
use push::Making;
use queue::Queue;
use segment::{Segment, Slot};
use tail::plan_tail;

#[derive(Clone, Debug)]
pub struct ArchiverOptions {
    pub timeline: TimelineId,
    pub segment_size: SegmentSize,
    /// What frames in memory count against.
    pub memory: MemoryBudget,
}

/// Segments stored at once: more only helps where a store answers slowly and has the bandwidth for it.
const PUSHES_MAX: usize = 4;
/// Pieces between the encoding stage and an archiver, which takes them at once: they count against the budget.
pub const ENCODED_MAX: usize = 8;
/// Superfluous objects are deleted when there are this many, or the first has waited this long.
const CLEANED_AT_ONCE: usize = 64;
const CLEANING_DELAY: Duration = Duration::from_secs(1);
/// Index entries per object; also bounds what one failed put has to repeat.
const INDEX_BATCH_MAX: usize = 64;

/// One repository's writer for one stream. Ends when its input closes and everything is stored, or fails.
/// May be dropped at any await: every object is complete or absent.
pub struct Archiver {
    options: ArchiverOptions,
    writer: Writer,
    workers: Workers,
    reach: Reach,
    queue: Queue,
    /// Segments that are not stored yet.
    segments: BTreeMap<SegmentNumber, Work>,
    /// Stored tails by segment, until the segment is indexed.
    tails: BTreeMap<SegmentNumber, Vec<TailName>>,
    /// The newest cut that is not stored yet.
    cut: Option<Arc<Cut>>,
    /// What announced the content of stored segments that are not indexed yet.
    markers: BTreeMap<SegmentNumber, Key>,
    /// Entries of stored segments, waiting for their turn in the index.
    entries: BTreeMap<SegmentNumber, IndexEntry>,
    next_to_index: SegmentNumber,
    groups: IndexGroups,
    /// Objects that newer ones made superfluous.
    superfluous: Vec<Key>,
    /// When they are deleted at the latest.
    clean_at: Option<Instant>,
    jobs: FuturesUnordered<BoxFuture<'static, Result<Done, ArchiveError>>>,
    running: Running,
}

impl std::fmt::Debug for Archiver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Archiver").field("options", &self.options).field("queue", &self.queue).finish_non_exhaustive()
    }
}

/// Which jobs are under way.
#[derive(Debug, Default)]
struct Running {
    pushes: usize,
    tail: bool,
    index: bool,
    moving: Option<SegmentNumber>,
    /// The last segment whose bytes were said to wait for the whole of it.
    waiting: Option<SegmentNumber>,
    compaction: bool,
    cleaning: bool,
}

/// A segment on its way into the repository.
struct Work {
    segment: Segment,
    state: State,
}

enum State {
    /// Its end is not proven.
    Open,
    /// Whole; waits for its turn.
    Sealed(Arc<Sealed>),
    Pushing,
}

/// A job's result.
enum Done {
    Tail { number: SegmentNumber, tail: TailName, absorbed: Vec<TailName> },
    TailSuperseded,
    Pushed { number: SegmentNumber, entry: Box<IndexEntry>, marker: Option<Key> },
    Indexed { name: IndexName, entries: Vec<IndexEntry> },
    Moved { number: SegmentNumber, slots: Vec<Slot> },
    Compacted { merged: IndexName },
    Cleaned,
}

impl Archiver {
    pub fn new(
        options: ArchiverOptions,
        writer: Writer,
        workers: Workers,
        reach: Reach,
        frontier: &Frontier,
    ) -> Archiver {
        let first = options.segment_size.segment_of(frontier.segment_start);
        let tails = BTreeMap::from([(first, frontier.tails.clone())]);
        Archiver {
            queue: Queue::new(frontier.stored()),
            segments: BTreeMap::new(),
            tails,
            cut: None,
            superfluous: Vec::new(),
            clean_at: None,
            markers: BTreeMap::new(),
            entries: BTreeMap::new(),
            next_to_index: first,
            groups: IndexGroups::default(),
            jobs: FuturesUnordered::new(),
            running: Running::default(),
            options,
            writer,
            workers,
            reach,
        }
    }

    /// Takes over what earlier writers left in the directory it goes on in: small index objects to merge, and
    /// tails of segments that are sealed and indexed by now, which only a crash left behind. Tails that do not
    /// agree with the others stay: they are evidence.
    pub fn adopt(&mut self, contents: &DirectoryContents) {
        self.groups.adopt(contents);
        for (&name, tails) in &contents.tails {
            if contents.sealed(name).is_none() {
                continue;
            }
            let refused = contents.tail_chain(name).refused;
            let agreeing = tails.iter().map(|tail| tail.name).filter(|tail| !refused.contains(tail));
            let lineage = &self.writer.archive.lineage;
            self.superfluous.extend(agreeing.map(|tail| lineage.tail(name, &tail)));
        }
        for (&name, markers) in &contents.raw_markers {
            if contents.sealed(name).is_some() {
                let lineage = &self.writer.archive.lineage;
                self.superfluous.extend(markers.iter().map(|&raw_crc32| lineage.raw_marker(name, raw_crc32)));
            }
        }
    }

    pub async fn run(mut self, mut input: mpsc::Receiver<Encoded>) -> Result<(), ArchiveError> {
        let mut open = true;
        loop {
            self.start_jobs(open);
            if !open && self.jobs.is_empty() {
                return Ok(());
            }
            let clean_at = self.clean_at.unwrap_or_else(Instant::now);
            tokio::select! {
                biased;
                Some(done) = self.jobs.next(), if !self.jobs.is_empty() => self.handle_done(done?),
                encoded = input.recv(), if open => match encoded {
                    Some(encoded) => self.handle_encoded(encoded),
                    None => open = false,
                },
                () = tokio::time::sleep_until(clean_at), if open && self.clean_at.is_some() => {}
            }
        }
    }

    fn handle_encoded(&mut self, encoded: Encoded) {
        match encoded {
            Encoded::Frame(frame) => {
                let number = self.options.segment_size.segment_of(frame.start);
                self.work(number).segment.append(frame);
            }
            Encoded::Cut(cut) => self.cut = Some(cut),
            Encoded::Seal(sealed) => {
                let number = sealed.number;
                self.work(number).state = State::Sealed(sealed);
            }
        }
    }

    fn work(&mut self, number: SegmentNumber) -> &mut Work {
        let (start, reads_back) = (self.options.segment_size.start_of(number), self.reads_back());
        let new = || Work { segment: Segment::new(start, reads_back), state: State::Open };
        self.segments.entry(number).or_insert_with(new)
    }

    /// Whether frames that moved into an upload can still be made a tail of. An identity might decrypt them, but is not
    /// the writer's to use.
    fn reads_back(&self) -> bool {
        self.writer.archive.form() == Form::Plain && self.writer.archive.backend.reads_back()
    }

    fn making(&self) -> Making {
        Making { workers: self.workers.clone(), memory: self.options.memory.clone() }
    }

    fn handle_done(&mut self, done: Done) {
        match done {
            Done::Tail { number, tail, absorbed } => {
                self.running.tail = false;
                self.handle_tail(number, tail, &absorbed);
            }
            Done::TailSuperseded => self.running.tail = false,
            Done::Pushed { number, entry, marker } => {
                self.running.pushes -= 1;
                self.segments.remove(&number);
                self.markers.extend(marker.map(|marker| (number, marker)));
                self.entries.insert(number, *entry);
            }
            Done::Indexed { name, entries } => {
                self.running.index = false;
                for entry in &entries {
                    let record_end = entry.summary.record_end.unwrap_or_default();
                    self.handle_durable(entry.start_lsn, entry.end_lsn, record_end);
                    let number = entry.segment.number(self.options.segment_size).expect("named from a number");
                    let tails = self.tails.remove(&number).unwrap_or_default();
                    self.give_up_tails(number, &tails);
                    self.superfluous.extend(self.markers.remove(&number));
                }
                self.groups.add(name, entries);
            }
            Done::Moved { number, slots } => {
                self.running.moving = None;
                if let Some(work) = self.segments.get_mut(&number) {
                    work.segment.slots.splice(..slots.len(), slots);
                }
            }
            Done::Compacted { merged } => {
                self.running.compaction = false;
                let lineage = &self.writer.archive.lineage;
                let parts = self.groups.replace(merged);
                self.superfluous.extend(parts.into_iter().map(|part| lineage.index(part)));
            }
            Done::Cleaned => self.running.cleaning = false,
        }
    }

    fn handle_tail(&mut self, number: SegmentNumber, tail: TailName, absorbed: &[TailName]) {
        self.give_up_tails(number, absorbed);
        if number < self.next_to_index {
            // The segment was stored and indexed while this tail was under way.
            return self.give_up_tails(number, &[tail]);
        }
        let tails = self.tails.entry(number).or_default();
        tails.retain(|held| !absorbed.contains(held));
        tails.push(tail);
        self.handle_durable(tail.from, tail.to, tail.to);
    }

    fn give_up_tails(&mut self, number: SegmentNumber, tails: &[TailName]) {
        let name = self.name_of(number);
        let lineage = &self.writer.archive.lineage;
        self.superfluous.extend(tails.iter().map(|tail| lineage.tail(name, tail)));
    }

    fn handle_durable(&mut self, from: Lsn, to: Lsn, record_end: Lsn) {
        let before = self.queue.frontier();
        self.queue.handle_durable(from, to, record_end);
        let frontier = self.queue.frontier();
        if frontier != before {
            self.reach.handle_run(frontier);
        }
    }

    fn name_of(&self, number: SegmentNumber) -> SegmentName {
        SegmentName::new(self.options.timeline, number, self.options.segment_size)
    }

    fn start_jobs(&mut self, open: bool) {
        self.start_moving();
        while self.running.pushes < PUSHES_MAX && self.start_push() {}
        self.start_index();
        self.start_tail();
        if open {
            self.start_compaction();
        }
        self.start_cleaning(open);
    }

    /// Moves frames out of memory into an unfinished upload: of a segment that holds more than a quarter of the
    /// budget, or, when half of it is used, of the one that holds most. A record can span many segments, none
    /// of which can be stored before it is proven: without this they would fill the budget and wait for ever.
    fn start_moving(&mut self) {
        if self.running.moving.is_some() {
            return;
        }
        let memory = &self.options.memory;
        let limit = memory.limit_bytes() / 4;
        let pressed = memory.held_bytes() >= memory.limit_bytes() / 2;
        let movable = self.segments.iter().filter_map(|(&number, work)| {
            let end = self.movable_end(number, work)?;
            let held = work.segment.held_bytes(end);
            let is_due = work.segment.held_bytes(Lsn::MAX) > limit || (pressed && matches!(work.state, State::Open));
            (held > 0 && is_due).then_some((held, number, end))
        });
        let Some((_, number, end)) = movable.max_by_key(|&(held, ..)| held) else { return };
        let key = self.writer.archive.lineage.segment(self.name_of(number), self.writer.archive.form());
        let segment = &mut self.segments.get_mut(&number).expect("found above").segment;
        let upload = segment.upload.get_or_insert_with(|| Arc::new(Mutex::new(None))).clone();
        let segment = segment.below(end);
        let (writer, workers) = (self.writer.clone(), self.workers.clone());
        self.running.moving = Some(number);
        self.jobs.push(Box::pin(async move {
            push::begin_upload(&writer, &upload, &key).await?;
            let (slots, start) = (segment.moved(), segment.start);
            push::append_to_upload(&writer, &workers, &upload, segment.into_held(), start).await?;
            Ok(Done::Moved { number, slots })
        }));
    }

    /// Up to where the frames of a segment may leave memory; `None`: not at all.
    ///
    /// Where they can be read back, all may. Where they cannot, none may go whose bytes are going to be a tail: those
    /// below the stored tails' end are one already, and those of a whole segment above the last record that ends in it
    /// never are. What then is left in memory are proven bytes, which wait for a tail that is on its way (the receiver
    /// cuts one as soon as it pauses), and of an unfinished segment the beginning of a record. Where that alone would
    /// fill the budget, because segments are larger than it, it goes too: then only the whole segment can make what
    /// follows durable.
    fn movable_end(&self, number: SegmentNumber, work: &Work) -> Option<Lsn> {
        let size = self.options.segment_size;
        if matches!(work.state, State::Pushing) {
            return None;
        }
        if self.reads_back() || matches!(work.state, State::Sealed(_)) {
            return Some(size.end_of(number));
        }
        let start = size.start_of(number);
        let covered = self.tails.get(&number).into_iter().flatten().map(|tail| tail.to).max().unwrap_or(start);
        let is_whole = work.segment.end() == size.end_of(number);
        let fills_memory = work.segment.held_bytes(Lsn::MAX) > self.options.memory.room_bytes();
        let waits_for_no_tail = self.reach.proven() <= covered && (is_whole || fills_memory);
        let has_no_tail_any_more = work.segment.at_hand_from() > covered;
        Some(if waits_for_no_tail || has_no_tail_any_more { size.end_of(number) } else { covered })
    }

    /// Starts to store the lowest sealed segment that is not being stored.
    fn start_push(&mut self) -> bool {
        let moving = self.running.moving;
        let ready = self.segments.iter_mut().find_map(|(&number, work)| match &work.state {
            State::Sealed(sealed) if moving != Some(number) => Some((number, sealed.clone(), work)),
            _ => None,
        });
        let Some((number, sealed, work)) = ready else { return false };
        work.state = State::Pushing;
        // Taken out: its frames leave memory while they are stored.
        let empty = Segment::new(work.segment.start, work.segment.reads_back);
        let segment = std::mem::replace(&mut work.segment, empty);
        let making = self.making();
        let (writer, name, size) = (self.writer.clone(), self.name_of(number), self.options.segment_size);
        self.running.pushes += 1;
        self.jobs.push(Box::pin(async move {
            let pushed = push::push_segment(&writer, &making, name, size, segment, &sealed).await?;
            Ok(Done::Pushed { number, entry: Box::new(pushed.entry), marker: pushed.marker })
        }));
        true
    }

    /// Writes the entries of the stored segments that come next, without a hole, of one directory.
    fn start_index(&mut self) {
        if self.running.index {
            return;
        }
        let mut batch: Vec<IndexEntry> = Vec::new();
        while let Some(entry) = self.entries.get(&self.next_to_index) {
            let other_directory = batch.first().is_some_and(|first| first.segment.high != entry.segment.high);
            if other_directory || batch.len() == INDEX_BATCH_MAX {
                break;
            }
            batch.extend(self.entries.remove(&self.next_to_index));
            self.next_to_index = self.next_to_index.next();
        }
        let (Some(first), Some(last)) = (batch.first(), batch.last()) else { return };
        let name = IndexName { first: first.segment, last: last.segment, epoch: self.writer.epoch };
        let (writer, size) = (self.writer.clone(), self.options.segment_size);
        self.running.index = true;
        self.jobs.push(Box::pin(async move {
            index::put_index(&writer, name, size, &batch).await?;
            Ok(Done::Indexed { name, entries: batch })
        }));
    }

    /// Makes the newest cut durable, unless its segment is sealed meanwhile: then the segment does.
    ///
    /// A tail waits until everything below its segment is durable and indexed. Before, it could not be
    /// acknowledged anyway, and a crash would leave bytes beyond a hole that nothing explains: the next agent
    /// would take them for the archive's end (seed 834 of the simulation did).
    fn start_tail(&mut self) {
        let size = self.options.segment_size;
        let is_next = |cut: &Arc<Cut>| {
            let segment_start = size.start_of(size.segment_before(cut.to));
            segment_start <= self.queue.frontier().bytes_end
        };
        if self.running.tail || !self.cut.as_ref().is_some_and(is_next) {
            return;
        }
        let Some(cut) = self.cut.take() else { return };
        let number = size.segment_before(cut.to);
        let segment = match self.segments.get(&number) {
            Some(work) if matches!(work.state, State::Open) => work.segment.clone(),
            Some(_) => return,
            None if self.is_past(number) => return,
            // The whole segment so far fits in the cut's own frame.
            None => Segment::new(size.start_of(number), self.reads_back()),
        };
        let stored = self.tails.get(&number).map_or(&[][..], Vec::as_slice);
        let at_hand_from = segment.at_hand_from();
        let Some(plan) = plan_tail(stored, segment.start, at_hand_from, cut.to, cut.is_final) else {
            self.say_if_it_has_to_wait(number, cut.to, at_hand_from);
            return;
        };
        let first_of_segment = stored.is_empty();
        let (writer, making, name) = (self.writer.clone(), self.making(), self.name_of(number));
        self.running.tail = true;
        self.jobs.push(Box::pin(async move {
            let absorbed = plan.absorbed.clone();
            match push::push_tail(&writer, &making, name, segment, plan, cut, first_of_segment).await {
                Ok(tail) => Ok(Done::Tail { number, tail, absorbed }),
                // The segment was sealed and its upload completed under our hands.
                Err(ArchiveError::Store(error)) if error.is(StoreErrorKind::NotFound) => Ok(Done::TailSuperseded),
                Err(error) => Err(error),
            }
        }));
    }

    /// A cut that cannot become a tail is worth a word, once for each segment.
    fn say_if_it_has_to_wait(&mut self, number: SegmentNumber, to: Lsn, at_hand_from: Lsn) {
        let start = self.options.segment_size.start_of(number);
        let covered = self.tails.get(&number).into_iter().flatten().map(|tail| tail.to).max().unwrap_or(start);
        if to > covered && at_hand_from > covered && self.running.waiting != Some(number) {
            self.running.waiting = Some(number);
            tracing::warn!(
                from = %covered,
                %to,
                segment = %self.name_of(number),
                hint = "set `memory` to twice the size of a segment, or configure a spool",
                "WAL waits for its whole segment to become durable: a record did not fit into memory"
            );
        }
    }

    /// Whether this segment was sealed, stored and let go.
    fn is_past(&self, number: SegmentNumber) -> bool {
        number < self.next_to_index || self.entries.contains_key(&number)
    }

    fn start_compaction(&mut self) {
        if self.running.compaction {
            return;
        }
        let Some((name, entries)) = self.groups.plan_merge(self.writer.epoch) else { return };
        let (writer, size) = (self.writer.clone(), self.options.segment_size);
        self.running.compaction = true;
        self.jobs.push(Box::pin(async move {
            index::put_index(&writer, name, size, &entries).await?;
            Ok(Done::Compacted { merged: name })
        }));
    }

    /// Deletes what newer objects made superfluous. One attempt: what stays is `expire`'s to delete.
    fn start_cleaning(&mut self, open: bool) {
        if self.running.cleaning || self.superfluous.is_empty() {
            return;
        }
        // A writer of one tail after the other gathers them: deleting holds up a disk's journal, and costs requests.
        let clean_at = *self.clean_at.get_or_insert_with(|| Instant::now() + CLEANING_DELAY);
        if open && self.superfluous.len() < CLEANED_AT_ONCE && Instant::now() < clean_at {
            return;
        }
        self.clean_at = None;
        let keys = std::mem::take(&mut self.superfluous);
        let writer = self.writer.clone();
        self.running.cleaning = true;
        self.jobs.push(Box::pin(async move {
            if let Err(error) = writer.archive.backend.delete_all(&keys).await {
                tracing::debug!(%error, "superfluous objects stay");
            }
            Ok(Done::Cleaned)
        }));
    }
}
