//! The life of a chunk of WAL, from the socket to the pipeline: prove it, copy it once, hand it on, and keep
//! the server told what is durable.
//!
//! Owns: byte order and continuity of one timeline's stream, when a tail is cut, when reading pauses.
//! Does not own: compression and storage (`archiver`), connecting and choosing the start (`agent`).
//! Rests on `proto-notes/03-streaming.md`.

mod framer;
mod heartbeat;
mod memory;
mod progress;
pub mod resume;

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub use framer::{Framer, RawFrame};
pub use memory::{MemoryBudget, MemoryHold};
pub use progress::{Acknowledge, Progress, Stored};

use crate::error::{Advice, Disposition, ExitCode};
use crate::replication::{Connection, ReplicationError, StatusUpdate, StreamEvent, TimelineEnd};
use crate::wal::{Lsn, ScanError, Scanner, SegmentNumber, SegmentSummary};
use heartbeat::{Due, Heartbeat, HeartbeatOptions, StopDetector};
use resume::{Divergence, Frontier, PrefixCheck};

/// What the receiver hands on, in this order: frames, then what their bytes turned out to prove.
#[derive(Debug)]
#[allow(clippy::large_enum_variant)] // one seal for sixteen frames or more, and two pieces in the channel at most
pub enum Piece {
    Frame(RawFrame),
    Cut(Cut),
    Seal(Sealed),
}

/// Everything below `to`, a record end, is to become durable now.
#[derive(Debug)]
pub struct Cut {
    pub to: Lsn,
    /// The bytes below `to` of a frame that was not handed over yet.
    pub partial: Option<RawFrame>,
    pub last_commit: Option<Timestamp>,
    /// The timeline ends here: one tail shall hold its last segment.
    pub is_final: bool,
}

/// A segment whose last byte is proven.
#[derive(Debug)]
pub struct Sealed {
    pub number: SegmentNumber,
    pub summary: SegmentSummary,
}

#[derive(Clone, Debug)]
pub struct ReceiverOptions {
    /// A byte waits at most this long before its upload starts. Shorter: less to lose, more objects.
    pub tail_interval: Duration,
    /// At most a quarter of the server's `wal_sender_timeout`.
    pub status_interval: Duration,
    /// After this long without a byte the server is asked for an answer, after twice as long given up.
    pub silence: Duration,
    /// How long a stop (ours or the server's) waits for the last bytes to become durable.
    pub shutdown_grace: Duration,
}

/// Why a stream ended without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEnd {
    /// The server's timeline ended; the next one begins there.
    Timeline(TimelineEnd),
    /// We were told to stop; `settled` when everything received became durable first.
    Stopped { settled: bool },
    /// The server is stopping and was let go; what is not durable stays in the slot.
    ServerStopping,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum ReceiveError {
    #[error(transparent)]
    Replication(#[from] ReplicationError),
    #[error(transparent)]
    Scan(#[from] ScanError),
    #[error(transparent)]
    Diverged(#[from] Divergence),
    #[error("the server sent WAL from {found}, {expected} comes next")]
    NotContiguous { expected: Lsn, found: Lsn },
    #[error("no answer from the server for {0:?}")]
    PeerDead(Duration),
    /// The archiver ended first; its own error says why.
    #[error("the archiver ended")]
    PipelineClosed,
}

impl Advice for ReceiveError {
    fn hint(&self) -> Option<String> {
        match self {
            ReceiveError::Replication(error) => error.hint(),
            ReceiveError::Scan(_) => Some(
                "the record is asked for once more; if it arrives damaged again it is damaged on the server".into(),
            ),
            ReceiveError::Diverged(error) => error.hint(),
            ReceiveError::NotContiguous { .. } => Some("is there a proxy between seawall and the server?".into()),
            ReceiveError::PeerDead(_) => {
                Some("the connection is opened anew; check the network if this repeats".into())
            }
            ReceiveError::PipelineClosed => None,
        }
    }

    fn disposition(&self) -> Disposition {
        match self {
            ReceiveError::Replication(error) => error.disposition(),
            ReceiveError::Diverged(error) => error.disposition(),
            _ => Disposition::Reconnect,
        }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            ReceiveError::Replication(error) => error.exit_code(),
            ReceiveError::Diverged(error) => error.exit_code(),
            ReceiveError::Scan(_) | ReceiveError::NotContiguous { .. } => ExitCode::Data,
            ReceiveError::PeerDead(_) => ExitCode::Unavailable,
            ReceiveError::PipelineClosed => ExitCode::Internal,
        }
    }
}

/// The receiver's surroundings: where it hands on, whom it tells, who stops it.
#[derive(Debug)]
pub struct Wiring {
    pub pieces: mpsc::Sender<Piece>,
    pub progress: Arc<watch::Sender<Progress>>,
    pub memory: MemoryBudget,
    /// Drain: receive no more, make durable what there is, tell the server, end.
    pub stop: CancellationToken,
    /// The server is stopping, as somebody found who does not need the stream for it.
    pub server_stopping: CancellationToken,
    /// Paused, streaming, stopping: for `status`.
    pub activity: Arc<watch::Sender<Activity>>,
    /// Commits on the server wait for what is acknowledged: cut as soon as the cut before is acknowledged.
    pub synchronous: watch::Receiver<bool>,
    pub clock: Clock,
}

/// The wall clock: the real one, or the simulation's.
#[derive(Clone)]
pub struct Clock(pub Arc<dyn Fn() -> Timestamp + Send + Sync>);

impl Clock {
    pub fn system() -> Clock {
        Clock(Arc::new(Timestamp::now))
    }

    pub fn now(&self) -> Timestamp {
        (self.0)()
    }

    /// µs since 2000-01-01, as the replication protocol counts.
    pub fn postgres_micros(&self) -> i64 {
        const POSTGRES_EPOCH: i64 = 946_684_800;
        self.now().as_microsecond() - POSTGRES_EPOCH * 1_000_000
    }
}

impl std::fmt::Debug for Clock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Clock")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    Streaming,
    /// Not reading: the repository takes WAL slower than the server writes it.
    Paused,
    ServerStopping,
}

/// One stream on one timeline. [`Receiver::run`] may be dropped at any await: nothing it holds is durable
/// or promised, and the next stream starts from what the repository holds.
#[derive(Debug)]
pub struct Receiver<'a> {
    connection: &'a mut Connection,
    options: ReceiverOptions,
    wiring: Wiring,
    scanner: Scanner,
    framer: Framer,
    prefix: PrefixCheck,
    /// What was durable when the stream began.
    resumed: Stored,
    heartbeat: Heartbeat,
    stops: StopDetector,
    started: Instant,
    /// Pieces that did not fit the channel; while there are any, nothing is read.
    outbox: VecDeque<Piece>,
    /// Up to here a cut was handed on, or it was durable before.
    cut_to: Lsn,
    /// The end of the cut handed on last.
    last_cut: Option<Lsn>,
    /// Since when there are proven bytes above `cut_to`.
    uncut_since: Option<Instant>,
    paused: bool,
    ending: Option<Ending>,
    told: Lsn,
}

/// What ended a wait.
enum Woken {
    Stop,
    ServerStopping,
    HandedOn,
    Stored,
    MemoryReleased,
    Timer,
    /// Bytes were sent or (true) received.
    Exchanged(Result<bool, ReplicationError>),
}

/// The stream is to end once everything is settled, or at the deadline.
#[derive(Clone, Copy, Debug)]
struct Ending {
    deadline: Instant,
    by_server: bool,
}

impl<'a> Receiver<'a> {
    /// `connection` has just been granted START_REPLICATION at `frontier.segment_start`.
    pub fn new(
        connection: &'a mut Connection,
        frontier: &Frontier,
        scanner: Scanner,
        options: ReceiverOptions,
        wiring: Wiring,
    ) -> Receiver<'a> {
        let resumed = frontier.stored();
        let timers = HeartbeatOptions { status_interval: options.status_interval, silence: options.silence };
        Receiver {
            connection,
            options,
            wiring,
            scanner,
            framer: Framer::new(frontier.segment_start),
            prefix: PrefixCheck::new(&frontier.tails),
            resumed,
            heartbeat: Heartbeat::new(timers, Duration::ZERO),
            stops: StopDetector::default(),
            started: Instant::now(),
            outbox: VecDeque::new(),
            cut_to: resumed.bytes_end,
            last_cut: None,
            uncut_since: None,
            paused: false,
            ending: None,
            told: Lsn::ZERO,
        }
    }

    /// Everything above `lsn` is cut, also what one repository holds already: another may not.
    pub fn cutting_from(mut self, lsn: Lsn) -> Receiver<'a> {
        self.cut_to = self.cut_to.min(lsn);
        self
    }

    pub async fn run(mut self) -> Result<StreamEnd, ReceiveError> {
        let mut progress = self.wiring.progress.subscribe();
        // What came with the grant is in the buffer already: often the first WAL, and before 16 the refusal of a
        // removed segment, after which the server is silent for ever.
        if let Some(end) = self.take_events().await? {
            return Ok(end);
        }
        loop {
            self.keep_time()?;
            if let Some(end) = self.poll_end() {
                self.say_goodbye().await;
                return Ok(end);
            }
            let reading = self.outbox.is_empty() && !self.paused && !self.is_draining();
            let writing = self.connection.has_output();
            let wake = self.next_wake();
            let woken = tokio::select! {
                biased;
                () = self.wiring.stop.cancelled(), if self.ending.is_none() => Woken::Stop,
                () = self.wiring.server_stopping.cancelled(), if self.ending.is_none() => Woken::ServerStopping,
                permit = self.wiring.pieces.reserve(), if !self.outbox.is_empty() => {
                    let permit = permit.map_err(|_| ReceiveError::PipelineClosed)?;
                    permit.send(self.outbox.pop_front().expect("checked: there is one"));
                    Woken::HandedOn
                }
                () = self.wiring.pieces.closed(), if self.outbox.is_empty() => return Err(ReceiveError::PipelineClosed),
                changed = progress.changed() => {
                    changed.expect("this task holds a sender");
                    Woken::Stored
                }
                () = self.wiring.memory.released(), if self.paused => Woken::MemoryReleased,
                () = tokio::time::sleep_until(wake) => Woken::Timer,
                heard = exchange(self.connection, reading), if reading || writing => Woken::Exchanged(heard),
            };
            match woken {
                Woken::Stop => self.begin_ending(false),
                Woken::ServerStopping => self.begin_ending(true),
                Woken::Stored => self.tell_progress(),
                Woken::MemoryReleased => self.review_pause(),
                Woken::HandedOn | Woken::Timer | Woken::Exchanged(Ok(false)) => {}
                Woken::Exchanged(Ok(true)) => {
                    if let Some(end) = self.take_events().await? {
                        return Ok(end);
                    }
                }
                Woken::Exchanged(Err(ReplicationError::ServerStopping)) => return Ok(StreamEnd::ServerStopping),
                Woken::Exchanged(Err(error)) => return Err(error.into()),
            }
        }
    }

    fn is_draining(&self) -> bool {
        self.ending.is_some_and(|ending| !ending.by_server)
    }

    fn begin_ending(&mut self, by_server: bool) {
        self.ending = Some(Ending { deadline: Instant::now() + self.options.shutdown_grace, by_server });
        if by_server {
            self.wiring.activity.send_replace(Activity::ServerStopping);
        }
        self.cut(false);
    }

    /// Statuses, probes and cuts that have become due.
    fn keep_time(&mut self) -> Result<(), ReceiveError> {
        let now = self.started.elapsed();
        if self.paused {
            self.heartbeat.handle_not_reading(now);
        }
        match self.heartbeat.poll(now) {
            Some(Due::PeerDead) => return Err(ReceiveError::PeerDead(2 * self.options.silence)),
            Some(Due::Status { reply_requested }) => self.queue_status(reply_requested),
            None => {}
        }
        let tail_interval = self.options.tail_interval;
        let due = self.uncut_since.is_some_and(|since| since.elapsed() >= tail_interval || self.may_group_commit());
        if (due || self.ending.is_some()) && self.outbox.is_empty() {
            self.cut(false);
        }
        Ok(())
    }

    /// Whether commits wait for what is proven, and nothing they have to wait for first: one tail at a time holds
    /// everything that was committed while the tail before it was stored.
    fn may_group_commit(&self) -> bool {
        *self.wiring.synchronous.borrow() && self.last_cut.is_none_or(|to| self.wiring.progress.borrow().is_durable(to))
    }

    fn next_wake(&self) -> Instant {
        let mut wake = self.started + self.heartbeat.next_timeout();
        if let Some(since) = self.uncut_since.filter(|_| self.outbox.is_empty()) {
            wake = wake.min(since + self.options.tail_interval);
        }
        if let Some(ending) = self.ending {
            wake = wake.min(ending.deadline);
        }
        wake
    }

    fn poll_end(&self) -> Option<StreamEnd> {
        let ending = self.ending?;
        let settled = {
            let progress = self.wiring.progress.borrow();
            let proven = progress.proven();
            self.outbox.is_empty() && progress.is_settled(proven.min(self.cut_to))
        };
        let over = Instant::now() >= ending.deadline;
        match ending.by_server {
            // A stopping server closes the stream by itself once it is told that everything is flushed.
            true => over.then_some(StreamEnd::ServerStopping),
            false => (settled || over).then_some(StreamEnd::Stopped { settled }),
        }
    }

    /// Takes everything the buffer holds.
    async fn take_events(&mut self) -> Result<Option<StreamEnd>, ReceiveError> {
        let now = self.started.elapsed();
        self.heartbeat.handle_heard(now);
        loop {
            let event = match self.connection.next_event() {
                Ok(Some(event)) => event,
                Ok(None) => break,
                // It has sent everything, was told that everything is flushed, and goes.
                Err(ReplicationError::ServerStopping) => return Ok(Some(StreamEnd::ServerStopping)),
                Err(error) => return Err(error.into()),
            };
            match event {
                StreamEvent::Wal { start, server_end, bytes, .. } => {
                    self.wiring.progress.send_if_modified(|progress| {
                        progress.handle_server_end(server_end);
                        false
                    });
                    let chunk = Chunk { start, bytes };
                    chunk.prove(&mut self.scanner, &mut self.prefix)?;
                    let outbox = &mut self.outbox;
                    self.framer.push(bytes, |frame| outbox.push_back(Piece::Frame(frame)));
                    while let Some((number, summary)) = self.scanner.poll_segment() {
                        // What lies above its end was proven only now: its clock starts anew.
                        self.cut_to = self.cut_to.max(self.scanner.segment_size().end_of(number));
                        self.uncut_since = None;
                        self.outbox.push_back(Piece::Seal(Sealed { number, summary }));
                    }
                }
                StreamEvent::Keepalive { server_end, reply_requested, .. } => {
                    self.handle_keepalive(now, server_end, reply_requested);
                }
                StreamEvent::TimelineEnd => return self.end_timeline().await.map(Some),
            }
        }
        self.account_received();
        Ok(None)
    }

    fn handle_keepalive(&mut self, now: Duration, server_end: Lsn, reply_requested: bool) {
        self.wiring.progress.send_if_modified(|progress| {
            progress.handle_server_end(server_end);
            false
        });
        if !reply_requested {
            return;
        }
        self.queue_status(false);
        let received = self.scanner.position();
        let stopping = self.stops.handle_keepalive(now, server_end, received, self.told);
        if stopping && self.ending.is_none() {
            tracing::info!(%received, flushed = %self.told, "the server is stopping: making the tail durable at once");
            self.begin_ending(true);
        }
    }

    /// Publishes what the last chunks brought.
    fn account_received(&mut self) {
        let (received, proven) = (self.scanner.position(), self.scanner.proven());
        let matched = self.is_prefix_matched(proven);
        let last_commit = self.scanner.last_commit();
        self.wiring.progress.send_if_modified(|progress| {
            progress.handle_received(received, proven);
            progress.handle_commit(last_commit);
            let newly = matched && !progress.prefix_matched();
            if newly {
                progress.handle_prefix_matched();
            }
            newly
        });
        if proven > self.cut_to && self.uncut_since.is_none() {
            self.uncut_since = Some(Instant::now());
        }
        self.review_pause();
    }

    /// The repeated prefix equals what is stored, and the chain of records goes on beyond the segment's start.
    fn is_prefix_matched(&self, proven: Lsn) -> bool {
        self.prefix.is_done() && proven >= self.resumed.record_end && self.scanner.is_linked()
    }

    fn review_pause(&mut self) {
        let memory = &self.wiring.memory;
        let paused = if self.paused { !memory.has_room() } else { memory.is_exhausted() };
        if paused != self.paused {
            self.paused = paused;
            tracing::info!(
                held_bytes = memory.held_bytes(),
                limit_bytes = memory.limit_bytes(),
                paused,
                "reading {}",
                if paused { "pauses: the repository is behind" } else { "goes on" }
            );
            self.wiring.activity.send_replace(if paused { Activity::Paused } else { Activity::Streaming });
            if paused {
                // What becomes a tail can leave memory.
                self.cut(false);
            }
        }
    }

    /// Hands on a cut at `proven`, unless there is nothing new below it.
    fn cut(&mut self, is_final: bool) {
        let to = self.scanner.proven();
        self.uncut_since = None;
        if to <= self.cut_to && !is_final {
            return;
        }
        self.cut_to = self.cut_to.max(to);
        let last_commit = self.scanner.last_commit().map(|commit| commit.time);
        let partial = self.framer.partial(to);
        self.last_cut = Some(to);
        self.outbox.push_back(Piece::Cut(Cut { to, partial, last_commit, is_final }));
    }

    fn tell_progress(&mut self) {
        let acknowledged = self.wiring.progress.borrow().acknowledged();
        if acknowledged != self.told {
            self.queue_status(false);
        }
    }

    fn queue_status(&mut self, reply_requested: bool) {
        let (write, flush) = {
            let progress = self.wiring.progress.borrow();
            (progress.received(), progress.acknowledged())
        };
        // Apply equal to flush: a commit that waits for `remote_apply` must not wait for ever on a zero.
        let now = self.wiring.clock.postgres_micros();
        self.connection.queue_status(StatusUpdate { write, flush, apply: flush, reply_requested, now });
        self.told = flush;
        self.heartbeat.handle_status_sent(self.started.elapsed());
    }

    /// The server sent CopyDone: hand on what is left, answer, learn what comes next.
    async fn end_timeline(&mut self) -> Result<StreamEnd, ReceiveError> {
        self.account_received();
        self.cut(true);
        while let Some(piece) = self.outbox.pop_front() {
            self.wiring.pieces.send(piece).await.map_err(|_| ReceiveError::PipelineClosed)?;
        }
        match self.connection.finish_stream().await? {
            Some(end) => Ok(StreamEnd::Timeline(end)),
            None => Ok(StreamEnd::ServerStopping),
        }
    }

    /// The last status, so that the slot is where the archive is; then the end of the stream, if there is time.
    async fn say_goodbye(&mut self) {
        self.queue_status(false);
        let goodbye = async {
            self.connection.flush_output().await?;
            self.connection.finish_stream().await
        };
        if let Err(error) = tokio::time::timeout(Duration::from_secs(2), goodbye).await {
            tracing::debug!(%error, "the stream was closed without the server's answer");
        }
    }
}

/// Sends what is queued and, when `reading`, receives: then true. May be dropped at any time.
async fn exchange(connection: &mut Connection, reading: bool) -> Result<bool, ReplicationError> {
    if reading { connection.fill().await.map(|()| true) } else { connection.flush_output().await.map(|()| false) }
}

/// Bytes as they came.
struct Chunk<'b> {
    start: Lsn,
    bytes: &'b [u8],
}

impl Chunk<'_> {
    /// Continuous, equal to what is stored, valid: in this order.
    fn prove(&self, scanner: &mut Scanner, prefix: &mut PrefixCheck) -> Result<(), ReceiveError> {
        if self.start != scanner.position() {
            return Err(ReceiveError::NotContiguous { expected: scanner.position(), found: self.start });
        }
        if !prefix.is_done() {
            prefix.observe(self.start, self.bytes)?;
        }
        Ok(scanner.feed(self.start, self.bytes)?)
    }
}
