//! Owns: one open session: bytes in and out, which call is allowed when, and the time an answer may take.
//! Does not own: what the bytes mean (`framing`, `message`, `command`, `handshake`), when to send a status update,
//! whether the WAL continues where it should. proto-notes/01-startup.md to 03-streaming.md.

mod base_backup;

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::timeout;

use crate::wal::{Lsn, SegmentSize, TimelineId};

use super::command::{self, BadAnswer, QueryResult, SlotName, SlotReading, SystemIdentity, TimelineEnd};
use super::error::{ConnectError, Peer, Phase, ReplicationError, ServerError};
use super::framing::{Frame, ProtocolError, ReadBuffer};
use super::handshake::{Handshake, Parameters, Step, startup_packet};
use super::message::{StatusUpdate, StreamDecoder, StreamItem};
use super::tls::fault::TlsFault;
use super::tls::{Dial, TlsFacts, Transport, tell_once};
use super::{Login, SslMode};

pub use base_backup::BackupWord;

/// What START_REPLICATION came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    Streaming,
    /// The start is exactly where the timeline ends: there is nothing to stream, and no copy began.
    TimelineEnded(TimelineEnd),
}

/// One thing the stream says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StreamEvent<'a> {
    /// WAL, as it arrived: `start` is the LSN of this piece, not of the message it came in.
    Wal {
        start: Lsn,
        server_end: Lsn,
        sent_at: i64,
        bytes: &'a [u8],
    },
    Keepalive {
        server_end: Lsn,
        sent_at: i64,
        reply_requested: bool,
    },
    /// The timeline's WAL is complete: [`Connection::finish_stream`] says what follows.
    TimelineEnd,
}

/// ```text
///           ┌───────────── answer ─────────────┐
///           ▼                                  │
///         Ready ── command ──► Busy ── error, cancelled ──► Broken
///           ▲                   │                              ▲
///           │            CopyBothResponse                      │
///           │                   ▼                              │
///           │               Streaming ── CopyDone ─► ServerDone│
///           │                   │ ErrorResponse        │       │
///           │                   ▼                      │     (EOF, nonsense,
///           └── settle ──── StreamFailed               │      time-out, fatal error)
///           └──────────── finish_stream ◄──────────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Ready,
    /// Within a command; seen by the next one only if that future was dropped half-way.
    Busy,
    Streaming,
    BaseBackup,
    /// The server ended the copy; it waits for our CopyDone.
    ServerDone,
    /// The server ended the stream, or the base backup, with an error: ReadyForQuery is still to come, and no CopyDone may
    /// be sent.
    StreamFailed,
    Broken,
}

impl State {
    fn name(self) -> &'static str {
        match self {
            State::Ready => "not streaming",
            State::Busy => "in the middle of an abandoned command",
            State::Streaming | State::ServerDone => "streaming",
            State::BaseBackup => "in the middle of a base backup",
            State::StreamFailed => "at the end of a failed stream",
            State::Broken => "broken",
        }
    }
}

/// Bytes on their way out. At most one status update waits behind the one being sent: a newer one replaces it.
#[derive(Debug, Default)]
struct Output {
    bytes: Vec<u8>,
    sent: usize,
    waiting: Option<StatusUpdate>,
    unflushed: bool,
}

impl Output {
    fn is_empty(&self) -> bool {
        self.sent == self.bytes.len() && self.waiting.is_none() && !self.unflushed
    }

    fn queue_status(&mut self, mut status: StatusUpdate) {
        // The replaced one's request for an answer still stands.
        status.reply_requested |= self.waiting.is_some_and(|older| older.reply_requested);
        self.waiting = Some(status);
    }

    /// The bytes to write next.
    fn pending(&mut self) -> &[u8] {
        if self.sent == self.bytes.len() {
            self.bytes.clear();
            self.sent = 0;
            if let Some(status) = self.waiting.take() {
                self.bytes.extend_from_slice(&status.encode());
            }
        }
        &self.bytes[self.sent..]
    }

    /// Puts `message` behind everything queued.
    fn push(&mut self, message: &[u8]) {
        if let Some(status) = self.waiting.take() {
            self.bytes.extend_from_slice(&status.encode());
        }
        self.bytes.extend_from_slice(message);
    }
}

/// One session with a server.
///
/// Command futures (`query`, `show`, …) must not be dropped before they end; if one is, the connection refuses
/// further work. `fill` and `flush_output` may be dropped at any time.
pub struct Connection {
    transport: Box<dyn Transport>,
    input: ReadBuffer,
    output: Output,
    state: State,
    decoder: StreamDecoder,
    /// Whether WAL arrived since START_REPLICATION: it tells a refusal from a failure.
    received_wal: bool,
    parameters: Parameters,
    answer_timeout: Duration,
    tls: Option<TlsFacts>,
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").field("state", &self.state).field("encrypted", &self.encrypted()).finish()
    }
}

/// Opening a session.
impl Connection {
    /// Dials, sets up TLS and logs in, all within `login.connect_timeout`.
    pub async fn open(dialer: &dyn Dial, login: &Login) -> Result<Connection, ConnectError> {
        let target = || Peer::of(login).target;
        timeout(login.connect_timeout, Connection::open_as_preferred(dialer, login))
            .await
            .unwrap_or_else(|_| Err(ConnectError::Timeout { target: target(), after: login.connect_timeout }))
    }

    async fn open_as_preferred(dialer: &dyn Dial, login: &Login) -> Result<Connection, ConnectError> {
        let (first, second) = match login.ssl_mode {
            SslMode::Allow => (SslMode::Disable, Some(SslMode::Require)),
            SslMode::Prefer => (SslMode::Prefer, Some(SslMode::Disable)),
            only => (only, None),
        };
        let (refused, was_encrypted) = match Connection::open_once(dialer, login, first).await {
            Ok(connection) => return Ok(connection),
            Err(refused) => refused,
        };
        // libpq tries the other way after any refusal but "cannot connect now". So do we where that adds TLS; where it
        // would give TLS up, only after pg_hba.conf may have said that it wants none.
        let go_on = match (login.ssl_mode, refused.sqlstate()) {
            (SslMode::Allow, Some(state)) => state != "57P03",
            (SslMode::Prefer, Some(state)) => was_encrypted && state == "28000",
            _ => false,
        };
        match second.filter(|_| go_on) {
            // Of the two refusals the first is the one to act on.
            Some(second) => Connection::open_once(dialer, login, second).await.map_err(|_| refused),
            None => Err(refused),
        }
    }

    /// The error comes with whether the session had TLS.
    async fn open_once(
        dialer: &dyn Dial,
        login: &Login,
        ssl_mode: SslMode,
    ) -> Result<Connection, (ConnectError, bool)> {
        let attempt = Login { ssl_mode, ..login.clone() };
        let mut connection = Connection::dial(dialer, &attempt).await.map_err(|error| (error, false))?;
        connection.log_in(&attempt).await.map_err(|error| (error, connection.encrypted()))?;
        let was_not_demanded = matches!(login.ssl_mode, SslMode::Allow | SslMode::Prefer);
        if was_not_demanded && !connection.encrypted() && login.address.is_remote() {
            tell_once(
                &login.address,
                &format!("the session is not encrypted: sslmode={} permits that", login.ssl_mode.name()),
            );
        }
        Ok(connection)
    }

    async fn dial(dialer: &dyn Dial, login: &Login) -> Result<Connection, ConnectError> {
        let transport = dialer.dial(login).await?;
        Ok(Connection {
            tls: transport.tls().cloned(),
            transport,
            input: ReadBuffer::default(),
            output: Output::default(),
            state: State::Busy,
            decoder: StreamDecoder::default(),
            received_wal: false,
            parameters: Parameters::default(),
            answer_timeout: login.answer_timeout,
        })
    }

    async fn log_in(&mut self, login: &Login) -> Result<(), ConnectError> {
        let target = Peer::of(login).target;
        let is_tls = self.encrypted();
        let broken = |error| during_connect(&target, is_tls, error);
        self.send(&startup_packet(login)?, Phase::Connect).await.map_err(broken)?;
        let facts = self.tls.clone();
        let mut handshake = Handshake::new(login, facts.as_ref());
        loop {
            let frame = self.receive(Phase::Connect).await.map_err(broken)?;
            match handshake.handle(frame.tag, self.input.slice(frame.body))? {
                Step::Continue => {}
                Step::Send(message) => self.send(&message, Phase::Connect).await.map_err(broken)?,
                Step::Done => break,
            }
        }
        self.parameters = handshake.parameters;
        self.state = State::Ready;
        Ok(())
    }

    /// Says good-bye, so that the server does not log a lost connection.
    pub async fn close(mut self) {
        if self.state == State::Ready {
            let mut message = BytesMut::new();
            frontend::terminate(&mut message);
            let _ = timeout(Duration::from_secs(1), self.send(&message, Phase::Command("Terminate"))).await;
            let _ = timeout(Duration::from_secs(1), self.transport.shutdown()).await;
        }
    }
}

fn during_connect(target: &str, is_tls: bool, error: ReplicationError) -> ConnectError {
    let target = target.to_string();
    match error {
        // In TLS 1.3 a server refuses our certificate only after the handshake: by an alert.
        ReplicationError::Io { kind: io::ErrorKind::InvalidData, cause, .. } if is_tls => {
            ConnectError::Tls { target, fault: TlsFault::Handshake(cause).into() }
        }
        ReplicationError::Protocol { error, .. } => ConnectError::Protocol { target, error },
        ReplicationError::Io { cause, .. } => ConnectError::Network { target, tried: vec![cause] },
        _ => ConnectError::Closed { target },
    }
}

/// What the server said about itself.
impl Connection {
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.value(name)
    }

    /// The leading number of `server_version` (distributions append text); 0 when it was not told.
    pub fn server_major(&self) -> u32 {
        let version = self.parameter("server_version").unwrap_or_default();
        let digits = version.bytes().take_while(u8::is_ascii_digit).count();
        version[..digits].parse().unwrap_or(0)
    }

    /// Whether the server is a standby; `None` from 13, which does not say (`SHOW transaction_read_only` does).
    pub fn in_hot_standby(&self) -> Option<bool> {
        self.parameter("in_hot_standby").map(|value| value == "on")
    }

    pub fn encrypted(&self) -> bool {
        self.tls.is_some()
    }

    /// What the TLS handshake found out; `None` without TLS.
    pub fn tls(&self) -> Option<&TlsFacts> {
        self.tls.as_ref()
    }
}

/// Commands.
impl Connection {
    /// Runs one simple query: SQL in an ordinary session, a replication command in a walsender.
    pub async fn query(&mut self, sql: &str) -> Result<QueryResult, ReplicationError> {
        self.command(sql, Phase::Command("a query")).await
    }

    pub async fn identify_system(&mut self) -> Result<SystemIdentity, ReplicationError> {
        let phase = Phase::Command("IDENTIFY_SYSTEM");
        let result = self.command(command::IDENTIFY_SYSTEM, phase).await?;
        command::decode_identify_system(&result).map_err(bad_answer(phase))
    }

    pub async fn show(&mut self, name: &str) -> Result<String, ReplicationError> {
        let phase = Phase::Command("SHOW");
        let sql = command::show(name).ok_or(ReplicationError::Misuse { phase, state: "given no setting's name" })?;
        let result = self.command(&sql, phase).await?;
        command::decode_show(&result).map_err(bad_answer(phase))
    }

    pub async fn wal_segment_size(&mut self) -> Result<SegmentSize, ReplicationError> {
        let text = self.show("wal_segment_size").await?;
        command::parse_segment_size(&text).map_err(bad_answer(Phase::Command("SHOW")))
    }

    /// The history file's name and content; `None` when the server has none, as for timeline 1.
    pub async fn timeline_history(
        &mut self,
        timeline: TimelineId,
    ) -> Result<Option<(String, Bytes)>, ReplicationError> {
        let phase = Phase::Command("TIMELINE_HISTORY");
        match self.command(&command::timeline_history(timeline), phase).await {
            Ok(result) => command::decode_timeline_history(result).map(Some).map_err(bad_answer(phase)),
            Err(ReplicationError::Server(error)) if command::is_missing_history(&error) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates a slot that holds WAL from now on. If it exists, the error's SQLSTATE is 42710.
    pub async fn create_physical_slot(&mut self, name: &SlotName) -> Result<(), ReplicationError> {
        let phase = Phase::Command("CREATE_REPLICATION_SLOT");
        self.command(&command::create_physical_slot(name), phase).await.map(drop)
    }

    pub async fn read_slot(&mut self, name: &SlotName) -> Result<SlotReading, ReplicationError> {
        if matches!(self.server_major(), 1..15) {
            return Ok(SlotReading::Unsupported);
        }
        let phase = Phase::Command("READ_REPLICATION_SLOT");
        let result = self.command(&command::read_slot(name), phase).await?;
        command::decode_read_slot(&result).map_err(bad_answer(phase))
    }

    pub async fn drop_slot(&mut self, name: &SlotName) -> Result<(), ReplicationError> {
        let phase = Phase::Command("DROP_REPLICATION_SLOT");
        self.command(&command::drop_slot(name), phase).await.map(drop)
    }

    /// Begins streaming. After `Streaming` the server may still refuse: then [`next_event`](Self::next_event) gives
    /// the error, and the connection takes commands again.
    pub async fn start_replication(
        &mut self,
        slot: &SlotName,
        start: Lsn,
        timeline: TimelineId,
    ) -> Result<Start, ReplicationError> {
        self.start(command::start_replication(slot, start, timeline)).await
    }

    /// As [`start_replication`](Self::start_replication), of WAL that no slot holds.
    pub async fn start_without_slot(&mut self, start: Lsn, timeline: TimelineId) -> Result<Start, ReplicationError> {
        self.start(command::start_replication_without_slot(start, timeline)).await
    }

    async fn start(&mut self, sql: String) -> Result<Start, ReplicationError> {
        let phase = Phase::StartReplication;
        self.received_wal = false;
        self.decoder = StreamDecoder::default();
        match self.exchange(&sql, phase).await? {
            None => Ok(Start::Streaming),
            Some(result) => match command::decode_timeline_end(&result).map_err(bad_answer(phase))? {
                Some(end) => Ok(Start::TimelineEnded(end)),
                None => Err(bad_answer(phase)("the server neither streams nor names the next timeline".to_string())),
            },
        }
    }

    /// Waits, with nothing asked, for the server to end the session: its last word. May be dropped at any time.
    pub async fn wait_for_end(&mut self) -> ReplicationError {
        let phase = Phase::Command("nothing");
        if self.state != State::Ready {
            return ReplicationError::Misuse { phase, state: self.state.name() };
        }
        loop {
            let Frame { tag, body } = match self.receive(phase).await {
                Ok(frame) => frame,
                Err(error) => return error,
            };
            let body = self.input.slice(body);
            let taken = match tag {
                b'S' => self.parameters.update(body),
                b'N' | b'A' => Ok(()),
                b'E' => {
                    let error = ServerError::decode(body, phase);
                    return self.broken(ReplicationError::Server(error.into()));
                }
                _ => Err(unexpected(tag)),
            };
            if let Err(error) = taken {
                return self.broken(protocol(phase, error));
            }
        }
    }

    async fn command(&mut self, sql: &str, phase: Phase) -> Result<QueryResult, ReplicationError> {
        match self.exchange(sql, phase).await? {
            Some(result) => Ok(result),
            None => Err(self.broken(protocol(phase, unexpected(b'W')))),
        }
    }

    /// Sends `sql` and reads the answer to ReadyForQuery; `None` when CopyBothResponse came instead.
    async fn exchange(&mut self, sql: &str, phase: Phase) -> Result<Option<QueryResult>, ReplicationError> {
        let after = self.answer_timeout;
        match timeout(after, self.exchange_untimed(sql, phase)).await {
            Ok(answer) => answer,
            Err(_) => Err(self.broken(ReplicationError::Timeout { phase, after })),
        }
    }

    async fn exchange_untimed(&mut self, sql: &str, phase: Phase) -> Result<Option<QueryResult>, ReplicationError> {
        if self.state == State::StreamFailed {
            self.settle(phase).await?;
        }
        if self.state != State::Ready {
            return Err(ReplicationError::Misuse { phase, state: self.state.name() });
        }
        let mut message = BytesMut::new();
        if frontend::query(sql, &mut message).is_err() {
            return Err(ReplicationError::Misuse { phase, state: "given a query with a zero byte" });
        }
        self.state = State::Busy;
        self.send(&message, phase).await?;
        self.read_answer(phase).await
    }

    async fn read_answer(&mut self, phase: Phase) -> Result<Option<QueryResult>, ReplicationError> {
        let mut result = QueryResult::default();
        let mut refused = None;
        loop {
            let Frame { tag, body } = self.receive(phase).await?;
            let body = self.input.slice(body);
            let taken = match tag {
                b'T' => result.describe(body),
                b'D' => result.push_row(body),
                b'S' => self.parameters.update(body),
                b'C' | b'I' | b'N' | b'A' => Ok(()),
                b'E' => {
                    let error = ServerError::decode(body, phase);
                    if error.is_fatal() {
                        return Err(self.broken(ReplicationError::Server(error.into())));
                    }
                    refused = Some(error);
                    Ok(())
                }
                b'W' if phase == Phase::StartReplication && refused.is_none() => {
                    self.state = State::Streaming;
                    return Ok(None);
                }
                b'Z' => {
                    self.state = State::Ready;
                    return refused.map_or(Ok(Some(result)), |error| Err(ReplicationError::Server(error.into())));
                }
                _ => Err(unexpected(tag)),
            };
            taken.map_err(|error| self.broken(protocol(phase, error)))?;
        }
    }
}

fn bad_answer(phase: Phase) -> impl Fn(BadAnswer) -> ReplicationError {
    move |cause| ReplicationError::Answer { phase, cause }
}

fn protocol(phase: Phase, error: ProtocolError) -> ReplicationError {
    ReplicationError::Protocol { phase, error }
}

fn unexpected(tag: u8) -> ProtocolError {
    ProtocolError::Unexpected { tag, during: "reading an answer" }
}

/// Streaming.
impl Connection {
    /// Receives more bytes, and meanwhile sends what is queued: a peer that stops reading does not stop us from
    /// reading. May be dropped at any time. EOF is [`ReplicationError::Closed`].
    pub async fn fill(&mut self) -> Result<(), ReplicationError> {
        let phase = self.stream_phase();
        if !matches!(self.state, State::Streaming | State::ServerDone) {
            return Err(ReplicationError::Misuse { phase, state: self.state.name() });
        }
        poll_fn(|context| self.poll_exchange_bytes(context, phase)).await
    }

    /// The next thing the stream says, from what was received; `None` asks for another [`fill`](Self::fill).
    pub fn next_event(&mut self) -> Result<Option<StreamEvent<'_>>, ReplicationError> {
        match self.next_item()? {
            None => Ok(None),
            Some(StreamItem::Wal { start, server_end, sent_at, bytes }) => {
                Ok(Some(StreamEvent::Wal { start, server_end, sent_at, bytes: self.input.slice(bytes) }))
            }
            Some(StreamItem::Keepalive { server_end, sent_at, reply_requested }) => {
                Ok(Some(StreamEvent::Keepalive { server_end, sent_at, reply_requested }))
            }
            Some(_) => Ok(Some(StreamEvent::TimelineEnd)),
        }
    }

    /// The next item of the copy; whatever else the server says is dealt with here.
    fn next_item(&mut self) -> Result<Option<StreamItem>, ReplicationError> {
        let phase = self.stream_phase();
        match self.state {
            State::Streaming => {}
            State::ServerDone => return Ok(Some(StreamItem::CopyDone)),
            _ => return Err(ReplicationError::Misuse { phase, state: self.state.name() }),
        }
        self.decode_item(phase)
    }

    fn decode_item(&mut self, phase: Phase) -> Result<Option<StreamItem>, ReplicationError> {
        loop {
            let item = self.decoder.next(&mut self.input).map_err(|error| self.broken(protocol(phase, error)))?;
            match item {
                Some(StreamItem::Other(frame)) => self.take_aside(frame, phase)?,
                Some(StreamItem::CopyDone) => {
                    self.state = State::ServerDone;
                    return Ok(Some(StreamItem::CopyDone));
                }
                Some(item) => {
                    self.received_wal |= matches!(item, StreamItem::Wal { .. });
                    return Ok(Some(item));
                }
                None => return Ok(None),
            }
        }
    }

    /// Takes a message that came between those of the copy.
    fn take_aside(&mut self, frame: Frame, phase: Phase) -> Result<(), ReplicationError> {
        let body = self.input.slice(frame.body);
        match frame.tag {
            b'S' => self.parameters.update(body).map_err(|error| self.broken(protocol(phase, error))),
            b'N' | b'A' => Ok(()),
            b'E' => {
                let error = ServerError::decode(body, phase);
                self.state = if error.is_fatal() { State::Broken } else { State::StreamFailed };
                Err(ReplicationError::Server(error.into()))
            }
            // Without CopyDone: everything was sent and acknowledged, and the server shuts down (proto-notes/03-streaming.md, "a stopping server").
            b'C' => Err(self.broken(ReplicationError::ServerStopping)),
            tag => {
                let error = ProtocolError::Unexpected { tag, during: "streaming" };
                Err(self.broken(protocol(phase, error)))
            }
        }
    }

    /// Queues a status update. One that is not on its way yet is replaced: only the newest is worth sending.
    pub fn queue_status(&mut self, status: StatusUpdate) {
        if self.state == State::Streaming {
            self.output.queue_status(status);
        }
    }

    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Sends what is queued. May be dropped at any time: what was sent stays sent, the rest stays queued.
    pub async fn flush_output(&mut self) -> Result<(), ReplicationError> {
        let phase = self.stream_phase();
        let sent = poll_fn(|context| self.poll_write(context)).await;
        sent.map_err(|error| self.broken(io_error(phase, &error)))
    }

    /// Ends the stream: sends CopyDone unless the stream has failed, drops the WAL still coming, and reads to
    /// ReadyForQuery, all within the answer timeout. Then the connection takes commands.
    ///
    /// Says which timeline follows when the one streamed is not the server's current one, also when it was not
    /// streamed to its end.
    pub async fn finish_stream(&mut self) -> Result<Option<TimelineEnd>, ReplicationError> {
        let (phase, after) = (Phase::Streaming, self.answer_timeout);
        match timeout(after, self.finish_untimed(phase)).await {
            Ok(end) => end,
            Err(_) => Err(self.broken(ReplicationError::Timeout { phase, after })),
        }
    }

    async fn finish_untimed(&mut self, phase: Phase) -> Result<Option<TimelineEnd>, ReplicationError> {
        match self.state {
            State::StreamFailed => return self.settle(phase).await.map(|()| None),
            State::Streaming | State::ServerDone => {}
            _ => return Err(ReplicationError::Misuse { phase, state: self.state.name() }),
        }
        let mut message = BytesMut::new();
        frontend::copy_done(&mut message);
        self.output.push(&message);
        // From here on the stream cannot be taken up again, should this future be dropped.
        if std::mem::replace(&mut self.state, State::Busy) == State::Streaming {
            self.drop_rest_of_copy(phase).await?;
        }
        self.flush_output().await?;
        let result = self.read_answer(phase).await?;
        command::decode_timeline_end(&result.unwrap_or_default()).map_err(bad_answer(phase))
    }

    async fn drop_rest_of_copy(&mut self, phase: Phase) -> Result<(), ReplicationError> {
        loop {
            match self.decode_item(phase)? {
                Some(StreamItem::CopyDone) => break,
                Some(_) => {}
                None => poll_fn(|context| self.poll_exchange_bytes(context, phase)).await?,
            }
        }
        self.state = State::Busy;
        Ok(())
    }

    /// Reads to the ReadyForQuery that follows an error in the stream.
    async fn settle(&mut self, phase: Phase) -> Result<(), ReplicationError> {
        self.state = State::Busy;
        // Status updates for a stream that is no more would be a protocol error now; a partly sent one must end.
        self.output.waiting = None;
        self.flush_output().await?;
        self.read_answer(phase).await.map(drop)
    }

    fn stream_phase(&self) -> Phase {
        if self.received_wal { Phase::Streaming } else { Phase::StartReplication }
    }
}

/// Bytes.
impl Connection {
    async fn send(&mut self, message: &[u8], phase: Phase) -> Result<(), ReplicationError> {
        self.output.push(message);
        let sent = poll_fn(|context| self.poll_write(context)).await;
        sent.map_err(|error| self.broken(io_error(phase, &error)))
    }

    /// The next whole message.
    async fn receive(&mut self, phase: Phase) -> Result<Frame, ReplicationError> {
        loop {
            match self.input.next_frame() {
                Ok(Some(frame)) => return Ok(frame),
                Ok(None) => poll_fn(|context| self.poll_read(context, phase)).await?,
                Err(error) => return Err(self.broken(protocol(phase, error))),
            }
        }
    }

    /// Writes what can be written and reads what can be read; ready when something was read.
    fn poll_exchange_bytes(&mut self, context: &mut Context<'_>, phase: Phase) -> Poll<Result<(), ReplicationError>> {
        let write_error = match self.output.is_empty() {
            true => None,
            false => match self.poll_write(context) {
                Poll::Ready(Err(error)) => Some(error),
                _ => None,
            },
        };
        // The server may have said why it hung up: read that before reporting that it did.
        match (self.poll_read(context, phase), write_error) {
            (Poll::Ready(Ok(())), _) => Poll::Ready(Ok(())),
            (_, Some(error)) => Poll::Ready(Err(self.broken(io_error(phase, &error)))),
            (read, None) => read,
        }
    }

    fn poll_read(&mut self, context: &mut Context<'_>, phase: Phase) -> Poll<Result<(), ReplicationError>> {
        let mut room = ReadBuf::new(self.input.spare());
        let outcome = ready!(Pin::new(&mut self.transport).poll_read(context, &mut room));
        let count = room.filled().len();
        self.input.received(count);
        Poll::Ready(match outcome {
            Ok(()) if count > 0 => Ok(()),
            Ok(()) => Err(self.broken(ReplicationError::Closed { phase })),
            Err(error) => Err(self.broken(io_error(phase, &error))),
        })
    }

    /// Ready when everything queued is with the kernel.
    fn poll_write(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.output.pending().is_empty() {
            let count = ready!(Pin::new(&mut self.transport).poll_write(context, self.output.pending()))?;
            if count == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.output.sent += count;
            self.output.unflushed = true;
        }
        if self.output.unflushed {
            ready!(Pin::new(&mut self.transport).poll_flush(context))?;
            self.output.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn broken(&mut self, error: ReplicationError) -> ReplicationError {
        self.state = State::Broken;
        error
    }
}

fn io_error(phase: Phase, error: &io::Error) -> ReplicationError {
    // Peers that go away without a word do it in several ways.
    match error.kind() {
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset => ReplicationError::Closed { phase },
        kind => ReplicationError::Io { phase, kind, cause: error.to_string() },
    }
}

#[cfg(test)]
mod tests;
