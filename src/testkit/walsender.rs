//! Owns: a model server: slots, timelines and WAL in memory, served by a walsender that speaks the wire protocol.
//! Does not own: what its WAL means (`wal_writer`). proto-notes/01-startup.md to
//! 03-streaming.md; behaviour as measured on 13 to 18.
//!
//! Deterministic on a paused clock: no randomness but SCRAM's salt, no time but tokio's.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::replication::framing::{Fields, Header};
use crate::replication::message::{StatusUpdate, encode_keepalive, encode_wal_data};
use crate::replication::{ConnectError, Dial, Login, Transport};
use crate::wal::{History, Lsn, SegmentSize, SystemId, TimelineId};

/// What a walsender puts into one WALData message.
pub const MESSAGE_BYTES: usize = 128 << 10;

/// What one side of a simulated connection may have sent that the other has not read.
const DUPLEX_BYTES: usize = 256 << 10;

/// Older status updates are forgotten: a long simulation must not keep them all.
const STATUSES_MAX: usize = 100_000;

/// The WAL of one timeline, from `start`; the server serves what lies before `flush`.
#[derive(Clone, Debug, Default)]
pub struct ModelWal {
    pub start: Lsn,
    pub bytes: Arc<Vec<u8>>,
    pub flush: Lsn,
    /// The bytes repeat without end: a bench serves many GiB from a few MiB.
    pub cyclic: bool,
}

impl ModelWal {
    /// Appends the WAL from `from` to `to`, which must exist.
    fn copy(&self, from: Lsn, to: Lsn, out: &mut Vec<u8>) {
        let mut at = (from - self.start) as usize;
        let mut left = (to - from) as usize;
        if self.cyclic {
            at %= self.bytes.len();
        }
        while left > 0 {
            let count = left.min(self.bytes.len() - at);
            out.extend_from_slice(&self.bytes[at..at + count]);
            (at, left) = (0, left - count);
            assert!(left == 0 || self.cyclic, "the model serves only WAL it has");
        }
    }
}

/// A physical replication slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ModelSlot {
    /// Exactly what was last reported as flushed, forwards or backwards.
    pub restart_lsn: Option<Lsn>,
    /// The session that streams from it.
    pub active: Option<u64>,
    /// Invalidated: 18 and later refuse it.
    pub lost: bool,
}

/// How the model asks who is there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ModelAuth {
    #[default]
    Trust,
    Password(String),
    Md5(String),
    Scram(String),
    /// SCRAM with this many iterations announced.
    ScramIterations(u32),
    /// Any other authentication request, by its number.
    Request(i32),
}

/// What goes wrong, and when. Each fault of one occurrence is taken by the first session it befalls.
#[derive(Clone, Debug, Default)]
pub struct Faults {
    /// Nobody can connect through [`ModelServer::dialer`]: the host is down.
    pub unreachable: bool,
    /// Refuses every new session with this SQLSTATE.
    pub refuse: Option<String>,
    /// Once: closes the connection after this many more bytes of a stream, wherever that is in a message.
    pub cut_after: Option<u64>,
    /// Once: these bytes instead of the next message of a stream.
    pub garbage: Option<Vec<u8>>,
    /// Once: the next message of a stream is this error, by SQLSTATE, and the stream ends; with `57P..` the session.
    pub error: Option<String>,
    /// The WAL byte at each of these positions is sent with all its bits turned.
    pub corrupt: BTreeSet<Lsn>,
    /// The server stops reading.
    pub stall_reading: bool,
    /// The server stops writing.
    pub stall_writing: bool,
    /// The answer to a TLS request.
    pub tls_answer: Option<u8>,
}

/// A status update, by whom and when (tokio's time since the server was made).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordedStatus {
    pub session: u64,
    pub at: Duration,
    pub status: StatusUpdate,
}

/// The columns and rows of an answer to SQL, or an SQLSTATE.
pub type SqlAnswer = Result<(Vec<String>, Vec<Vec<Option<String>>>), String>;
/// What an ordinary session answers to a query.
pub type SqlHook = Arc<dyn Fn(&mut ModelState, &str) -> SqlAnswer + Send + Sync>;

/// Everything the server knows. Change it through [`ModelServer::with`], so that its sessions notice.
pub struct ModelState {
    pub system_id: SystemId,
    pub server_version: String,
    pub segment_size: SegmentSize,
    pub timeline: TimelineId,
    pub wal: BTreeMap<TimelineId, ModelWal>,
    /// WAL before this has been removed.
    pub oldest_lsn: Lsn,
    pub histories: BTreeMap<TimelineId, Bytes>,
    pub slots: BTreeMap<String, ModelSlot>,
    pub in_recovery: bool,
    /// A fast shutdown has begun: no new sessions, walsenders end once everything is acknowledged.
    pub stopping: bool,
    /// `SHOW` answers beside, or instead of, the built-in ones.
    pub settings: BTreeMap<String, String>,
    pub auth: ModelAuth,
    /// Of a session: pings at half of it without a client message, ends at all of it.
    pub wal_sender_timeout: Option<Duration>,
    /// The payload sizes of WALData messages, taken in turn.
    pub message_sizes: Vec<usize>,
    pub sql: Option<SqlHook>,
    pub faults: Faults,
    pub statuses: Vec<RecordedStatus>,
    pub max_flush_reported: Lsn,
    /// Sessions opened, also those refused.
    pub sessions_opened: u64,
    pub sessions_open: u64,
    /// Sessions up to this number are dead: see [`ModelState::crash`].
    dead: u64,
    /// Every command and query, in order.
    pub commands: Vec<String>,
    pub keepalives_sent: u64,
    /// The start-up parameters of the last session.
    pub startup: BTreeMap<String, String>,
    /// How far each streaming session has sent.
    pub sent: BTreeMap<u64, Lsn>,
    started: Instant,
}

impl fmt::Debug for ModelState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ModelState")
            .field("timeline", &self.timeline)
            .field("slots", &self.slots)
            .finish_non_exhaustive()
    }
}

impl ModelState {
    /// The flush position of the current timeline.
    pub fn flush_lsn(&self) -> Lsn {
        self.wal.get(&self.timeline).map_or(Lsn::ZERO, |wal| wal.flush)
    }

    /// Adds WAL at the end of the current timeline and flushes it.
    pub fn append(&mut self, bytes: &[u8]) {
        let wal = self.wal.entry(self.timeline).or_default();
        Arc::make_mut(&mut wal.bytes).extend_from_slice(bytes);
        wal.flush = wal.start + wal.bytes.len() as u64;
    }

    /// Starts a new timeline at `switch` on the current one: its history, and its WAL from the start of the switch
    /// segment, whose first part repeats the old timeline's. The old timeline ends there for every session.
    pub fn promote(&mut self, timeline: TimelineId, switch: Lsn) {
        let old = self.wal[&self.timeline].clone();
        let start = self.segment_size.floor(switch).max(old.start);
        let mut bytes = Vec::new();
        old.copy(start, switch, &mut bytes);
        let mut history = self.histories.get(&self.timeline).map_or(Vec::new(), |bytes| bytes.to_vec());
        history.extend_from_slice(format!("{}\t{switch}\tno recovery target specified\n\n", self.timeline).as_bytes());
        self.histories.insert(timeline, history.into());
        self.wal.insert(timeline, ModelWal { start, bytes: Arc::new(bytes), flush: switch, cyclic: false });
        self.timeline = timeline;
        self.in_recovery = false;
    }

    /// Every open session ends at once, without a word, as in a crash or a cut network. New ones are welcome.
    pub fn crash(&mut self) {
        self.dead = self.sessions_opened;
    }

    /// PostgreSQL's major version.
    pub fn major(&self) -> u32 {
        self.server_version
            .split(|c: char| !c.is_ascii_digit())
            .next()
            .and_then(|digits| digits.parse().ok())
            .unwrap_or(0)
    }

    /// Microseconds since 2000: 2026-01-01 when the server was made, then tokio's time.
    pub fn now(&self) -> i64 {
        820_454_400_000_000 + self.started.elapsed().as_micros() as i64
    }

    fn history(&self) -> History {
        let text = self.histories.get(&self.timeline).map_or(&b""[..], |bytes| &bytes[..]);
        History::parse(self.timeline, text).expect("the model's history files are well formed")
    }

    /// Where `timeline` ends, when it is not the current one; an error when it is a stranger.
    fn end_of(&self, timeline: TimelineId) -> Result<Option<Lsn>, Refusal> {
        if timeline == self.timeline {
            return Ok(None);
        }
        let unknown =
            || Refusal::new("XX000", format!("requested timeline {timeline} is not in this server's history"));
        self.history().end_of(timeline).map(Some).ok_or_else(unknown)
    }

    fn record(&mut self, session: u64, slot: &str, status: StatusUpdate) {
        if self.statuses.len() == STATUSES_MAX {
            self.statuses.drain(..STATUSES_MAX / 2);
        }
        self.statuses.push(RecordedStatus { session, at: self.started.elapsed(), status });
        self.max_flush_reported = self.max_flush_reported.max(status.flush);
        if let Some(slot) = self.slots.get_mut(slot)
            && status.flush != Lsn::ZERO
        {
            slot.restart_lsn = Some(status.flush);
        }
    }

    fn setting(&self, name: &str) -> Option<String> {
        if let Some(value) = self.settings.get(name) {
            return Some(value.clone());
        }
        let megabytes = self.segment_size.bytes() >> 20;
        Some(match name {
            "wal_segment_size" if megabytes == 1024 => "1GB".to_string(),
            "wal_segment_size" => format!("{megabytes}MB"),
            "server_version_num" => (self.major() * 10_000).to_string(),
            "server_version" => self.server_version.clone(),
            "wal_sender_timeout" => self.wal_sender_timeout.map_or("0".to_string(), |t| format!("{}ms", t.as_millis())),
            "wal_level" => "replica".to_string(),
            "transaction_read_only" => if self.in_recovery { "on" } else { "off" }.to_string(),
            "data_directory_mode" => "0700".to_string(),
            "wal_block_size" | "block_size" => "8192".to_string(),
            "archive_mode" => "off".to_string(),
            "full_page_writes" | "data_checksums" => "on".to_string(),
            _ => return None,
        })
    }
}

/// An ErrorResponse of the model.
#[derive(Debug)]
struct Refusal {
    sqlstate: String,
    message: String,
    detail: Option<String>,
}

impl Refusal {
    fn new(sqlstate: &str, message: impl Into<String>) -> Refusal {
        Refusal { sqlstate: sqlstate.to_string(), message: message.into(), detail: None }
    }

    fn encode(&self, severity: &str) -> Vec<u8> {
        let mut body = format!("S{severity}\0V{severity}\0C{}\0M{}\0", self.sqlstate, self.message).into_bytes();
        if let Some(detail) = &self.detail {
            body.extend_from_slice(format!("D{detail}\0").as_bytes());
        }
        body.push(0);
        body
    }
}

/// The server; clones share it.
#[derive(Clone, Debug)]
pub struct ModelServer {
    state: Arc<Mutex<ModelState>>,
    changed: Arc<watch::Sender<u64>>,
}

impl ModelServer {
    /// A primary of version 17 on timeline 1 with no WAL; its first byte of WAL will be at `start`.
    pub fn new(system_id: SystemId, segment_size: SegmentSize, start: Lsn) -> ModelServer {
        let wal = ModelWal { start, flush: start, ..ModelWal::default() };
        let state = ModelState {
            system_id,
            server_version: "17.10".to_string(),
            segment_size,
            timeline: TimelineId(1),
            wal: BTreeMap::from([(TimelineId(1), wal)]),
            oldest_lsn: start,
            histories: BTreeMap::new(),
            slots: BTreeMap::new(),
            in_recovery: false,
            stopping: false,
            settings: BTreeMap::new(),
            auth: ModelAuth::Trust,
            wal_sender_timeout: None,
            message_sizes: vec![MESSAGE_BYTES],
            sql: None,
            faults: Faults::default(),
            statuses: Vec::new(),
            max_flush_reported: Lsn::ZERO,
            sessions_opened: 0,
            sessions_open: 0,
            dead: 0,
            commands: Vec::new(),
            keepalives_sent: 0,
            startup: BTreeMap::new(),
            sent: BTreeMap::new(),
            started: Instant::now(),
        };
        ModelServer { state: Arc::new(Mutex::new(state)), changed: Arc::new(watch::Sender::new(0)) }
    }

    /// Looks at the state or changes it; sessions waiting for something look again.
    pub fn with<T>(&self, change: impl FnOnce(&mut ModelState) -> T) -> T {
        let result = self.peek(change);
        self.changed.send_modify(|version| *version += 1);
        result
    }

    fn peek<T>(&self, look: impl FnOnce(&mut ModelState) -> T) -> T {
        look(&mut self.state.lock().unwrap_or_else(|poisoned| poisoned.into_inner()))
    }

    /// Connects through memory; the server's side is a task of its own.
    pub fn dialer(&self) -> ModelDialer {
        ModelDialer { server: self.clone() }
    }

    /// Serves every connection to `listener`, each in a task, until the future is dropped.
    pub async fn serve_tcp(self, listener: tokio::net::TcpListener) -> io::Result<()> {
        loop {
            let (stream, _) = listener.accept().await?;
            stream.set_nodelay(true)?;
            tokio::spawn(self.clone().serve(stream));
        }
    }

    /// One session, from the start-up packet to its end.
    pub async fn serve<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(self, stream: S) {
        let id = self.with(|state| {
            state.sessions_opened += 1;
            state.sessions_open += 1;
            state.sessions_opened
        });
        let (reader, writer) = tokio::io::split(stream);
        let changed = self.changed.subscribe();
        let mut session = Session {
            _open: OpenSession { server: self.clone(), id },
            server: self,
            id,
            reader,
            writer,
            changed,
            input: Vec::new(),
            output: Vec::new(),
            physical: false,
            cut: None,
        };
        // How a session ends is its client's affair; the model's own state tells the rest.
        let _ = session.run().await;
    }
}

/// The simulation's way to open a transport.
#[derive(Clone, Debug)]
pub struct ModelDialer {
    server: ModelServer,
}

#[async_trait]
impl Dial for ModelDialer {
    async fn dial(&self, login: &Login) -> Result<Box<dyn Transport>, ConnectError> {
        if self.server.peek(|state| state.faults.unreachable) {
            let tried = vec!["no route to host".to_string()];
            return Err(ConnectError::Network { target: login.address.to_string(), tried });
        }
        let (client, server) = tokio::io::duplex(DUPLEX_BYTES);
        tokio::spawn(self.server.clone().serve(server));
        Ok(Box::new(client))
    }
}

/// Releases what a session holds, however it ends.
struct OpenSession {
    server: ModelServer,
    id: u64,
}

impl Drop for OpenSession {
    fn drop(&mut self) {
        self.server.with(|state| {
            state.sessions_open -= 1;
            release_slots(state, self.id);
        });
    }
}

fn release_slots(state: &mut ModelState, session: u64) {
    for slot in state.slots.values_mut().filter(|slot| slot.active == Some(session)) {
        slot.active = None;
    }
    state.sent.remove(&session);
}

fn gone() -> io::Error {
    io::ErrorKind::BrokenPipe.into()
}

/// One backend process.
struct Session<S> {
    _open: OpenSession,
    server: ModelServer,
    id: u64,
    reader: ReadHalf<S>,
    writer: WriteHalf<S>,
    changed: watch::Receiver<u64>,
    input: Vec<u8>,
    output: Vec<u8>,
    physical: bool,
    /// How many bytes of the stream may still be written before the connection is cut.
    cut: Option<u64>,
}

/// Start-up and authentication.
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Session<S> {
    async fn run(&mut self) -> io::Result<()> {
        let parameters = self.startup().await?;
        let user = parameters.get("user").cloned().unwrap_or_default();
        self.physical = parameters.get("replication").is_some_and(|value| value == "true");
        let (auth, refusal) = self.server.with(|state| {
            state.startup = parameters;
            let stopping = state.stopping.then(|| "57P03".to_string());
            (state.auth.clone(), state.faults.refuse.clone().or(stopping))
        });
        if let Some(sqlstate) = refusal {
            return self.fatal(&Refusal::new(&sqlstate, "the model refuses this session")).await;
        }
        if !self.authenticate(&auth, &user).await? {
            return self
                .fatal(&Refusal::new("28P01", format!("password authentication failed for user \"{user}\"")))
                .await;
        }
        self.greet().await?;
        while let Some((tag, body)) = self.receive().await? {
            match tag {
                b'Q' => self.query(&String::from_utf8_lossy(body.strip_suffix(b"\0").unwrap_or(&body))).await?,
                // Late copy messages after a failed stream are ignored, as PostgreSQL does.
                b'd' | b'c' | b'f' => {}
                b'X' => return Ok(()),
                _ => return self.fatal(&Refusal::new("08P01", "extended query protocol not supported")).await,
            }
        }
        Ok(())
    }

    /// Reads the start-up packet, after a TLS request if there is one.
    async fn startup(&mut self) -> io::Result<BTreeMap<String, String>> {
        loop {
            let length = self.reader.read_u32().await? as usize;
            let mut packet = vec![0; length.clamp(8, 10_000) - 4];
            self.reader.read_exact(&mut packet).await?;
            if packet[..4] == 80_877_103u32.to_be_bytes() {
                let answer = self.server.peek(|state| state.faults.tls_answer).unwrap_or(b'N');
                self.writer.write_all(&[answer]).await?;
                continue;
            }
            let mut fields = Fields(&packet[4..]);
            let mut parameters = BTreeMap::new();
            while let (Some(name), Some(value)) = (fields.c_string().filter(|name| !name.is_empty()), fields.c_string())
            {
                let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
                parameters.insert(text(name), text(value));
            }
            return Ok(parameters);
        }
    }

    async fn authenticate(&mut self, auth: &ModelAuth, user: &str) -> io::Result<bool> {
        let proven = match auth {
            ModelAuth::Trust => true,
            ModelAuth::Password(password) => {
                self.request_auth(3, b"").await?;
                self.receive_auth().await?.strip_suffix(b"\0") == Some(password.as_bytes())
            }
            ModelAuth::Md5(password) => {
                let salt = [1, 2, 3, 4];
                self.request_auth(5, &salt).await?;
                let expected = postgres_protocol::authentication::md5_hash(user.as_bytes(), password.as_bytes(), salt);
                self.receive_auth().await?.strip_suffix(b"\0") == Some(expected.as_bytes())
            }
            ModelAuth::Scram(password) => self.authenticate_scram(password).await?,
            ModelAuth::ScramIterations(count) => {
                self.request_auth(10, b"SCRAM-SHA-256\0\0").await?;
                let first = self.receive_auth().await?;
                let nonce = scram::client_nonce(&first).ok_or_else(gone)?;
                self.request_auth(11, format!("r={nonce}server,s=AAAA,i={count}").as_bytes()).await?;
                self.receive_auth().await?;
                false
            }
            ModelAuth::Request(code) => {
                self.request_auth(*code, b"").await?;
                self.receive_auth().await?;
                false
            }
        };
        if proven {
            self.request_auth(0, b"").await?;
        }
        Ok(proven)
    }

    async fn authenticate_scram(&mut self, password: &str) -> io::Result<bool> {
        self.request_auth(10, b"SCRAM-SHA-256\0\0").await?;
        let first = self.receive_auth().await?;
        let nonce = scram::client_nonce(&first).ok_or_else(gone)?;
        let verifier = scram::Verifier::new(password);
        let challenge = format!("r={nonce}server,s={},i={}", verifier.salt, verifier.iterations);
        self.request_auth(11, challenge.as_bytes()).await?;
        let proof = self.receive_auth().await?;
        let Some(signature) = verifier.check(&nonce, &challenge, &String::from_utf8_lossy(&proof)) else {
            return Ok(false);
        };
        self.request_auth(12, format!("v={signature}").as_bytes()).await?;
        Ok(true)
    }

    async fn request_auth(&mut self, code: i32, data: &[u8]) -> io::Result<()> {
        let body = [&code.to_be_bytes()[..], data].concat();
        self.push(b'R', &body);
        self.flush().await
    }

    async fn receive_auth(&mut self) -> io::Result<Vec<u8>> {
        match self.receive().await? {
            Some((b'p', body)) => Ok(body),
            _ => Err(gone()),
        }
    }

    async fn greet(&mut self) -> io::Result<()> {
        let (version, standby, major) =
            self.server.peek(|state| (state.server_version.clone(), state.in_recovery, state.major()));
        self.push(b'S', format!("server_version\0{version}\0").as_bytes());
        self.push(b'S', b"client_encoding\0UTF8\0");
        if major >= 14 {
            self.push_hot_standby(standby);
        }
        self.push(b'K', &[0, 0, 0, 1, 0, 0, 0, 2]);
        self.push(b'Z', b"I");
        self.flush().await
    }

    fn push_hot_standby(&mut self, standby: bool) {
        self.push(b'S', format!("in_hot_standby\0{}\0", if standby { "on" } else { "off" }).as_bytes());
    }

    async fn fatal(&mut self, refusal: &Refusal) -> io::Result<()> {
        self.push(b'E', &refusal.encode("FATAL"));
        self.flush().await?;
        self.writer.shutdown().await
    }
}

/// Commands.
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Session<S> {
    async fn query(&mut self, text: &str) -> io::Result<()> {
        let words: Vec<&str> = text.trim_end_matches(';').split_whitespace().collect();
        self.server.with(|state| state.commands.push(text.to_string()));
        let outcome = match words.as_slice() {
            ["START_REPLICATION", arguments @ ..] if self.physical => return self.start_replication(arguments).await,
            _ if self.physical => self.command(&words),
            _ => self.sql(text),
        };
        if let Err(refusal) = outcome {
            self.push(b'E', &refusal.encode("ERROR"));
        }
        self.push(b'Z', b"I");
        self.flush().await
    }

    fn sql(&mut self, text: &str) -> Result<(), Refusal> {
        let Some(hook) = self.server.peek(|state| state.sql.clone()) else {
            return Err(Refusal::new("0A000", "the model answers no SQL without a hook"));
        };
        let answer = self.server.with(|state| hook(state, text));
        let (columns, rows) = answer.map_err(|sqlstate| Refusal::new(&sqlstate, "the model's SQL hook refuses"))?;
        self.describe(&columns.iter().map(String::as_str).collect::<Vec<_>>());
        for row in &rows {
            self.push_row(&row.iter().map(|value| value.as_ref().map(String::as_bytes)).collect::<Vec<_>>());
        }
        self.push(b'C', b"SELECT\0");
        Ok(())
    }

    fn command(&mut self, words: &[&str]) -> Result<(), Refusal> {
        if self.server.peek(|state| state.stopping) {
            return Err(Refusal::new("55000", "cannot execute new commands while WAL sender is in stopping mode"));
        }
        match words {
            ["IDENTIFY_SYSTEM"] => {
                let (id, timeline, flush) =
                    self.server.peek(|state| (state.system_id, state.timeline, state.flush_lsn()));
                let values = [id.to_string(), timeline.to_string(), flush.to_string()];
                let [id, timeline, flush] = values.each_ref().map(|value| Some(value.as_bytes()));
                self.answer(
                    "IDENTIFY_SYSTEM",
                    &["systemid", "timeline", "xlogpos", "dbname"],
                    &[id, timeline, flush, None],
                );
            }
            ["SHOW", name] => {
                let unknown = || Refusal::new("42704", format!("unrecognized configuration parameter \"{name}\""));
                let value = self.server.peek(|state| state.setting(name)).ok_or_else(unknown)?;
                self.answer("SHOW", &[name], &[Some(value.as_bytes())]);
            }
            ["TIMELINE_HISTORY", timeline] => self.timeline_history(timeline)?,
            ["CREATE_REPLICATION_SLOT", name, "PHYSICAL", reserve @ ..] => {
                self.create_slot(unquote(name), !reserve.is_empty())?
            }
            ["READ_REPLICATION_SLOT", name] => self.read_slot(unquote(name))?,
            ["DROP_REPLICATION_SLOT", name, ..] => self.drop_slot(unquote(name))?,
            _ => {
                let text = "cannot execute SQL commands in WAL sender for physical replication";
                return Err(Refusal::new("0A000", text));
            }
        }
        Ok(())
    }

    fn timeline_history(&mut self, timeline: &str) -> Result<(), Refusal> {
        let timeline: u32 = timeline.parse().map_err(|_| Refusal::new("42601", "syntax error"))?;
        let name = format!("{timeline:08X}.history");
        self.describe(&["filename", "content"]);
        let content = self.server.peek(|state| state.histories.get(&TimelineId(timeline)).cloned());
        let missing =
            || Refusal::new("58P01", format!("could not open file \"pg_wal/{name}\": No such file or directory"));
        let content = content.ok_or_else(missing)?;
        self.push_row(&[Some(name.as_bytes()), Some(&content)]);
        self.push(b'C', b"TIMELINE_HISTORY\0");
        Ok(())
    }

    fn create_slot(&mut self, name: &str, reserve: bool) -> Result<(), Refusal> {
        self.server.with(|state| {
            if state.slots.contains_key(name) {
                return Err(Refusal::new("42710", format!("replication slot \"{name}\" already exists")));
            }
            // At the redo position, which for the model is the start of the current segment.
            let redo = state.segment_size.floor(state.flush_lsn()).max(state.oldest_lsn);
            let restart_lsn = reserve.then_some(redo);
            state.slots.insert(name.to_string(), ModelSlot { restart_lsn, ..ModelSlot::default() });
            Ok(())
        })?;
        let columns = ["slot_name", "consistent_point", "snapshot_name", "output_plugin"];
        self.answer("CREATE_REPLICATION_SLOT", &columns, &[Some(name.as_bytes()), Some(b"0/0"), None, None]);
        Ok(())
    }

    fn read_slot(&mut self, name: &str) -> Result<(), Refusal> {
        let (slot, timeline, major) =
            self.server.peek(|state| (state.slots.get(name).cloned(), state.timeline, state.major()));
        if major < 15 {
            return Err(Refusal::new("0A000", "cannot execute SQL commands in WAL sender for physical replication"));
        }
        let restart = slot.as_ref().and_then(|slot| slot.restart_lsn).map(|lsn| lsn.to_string());
        let timeline = restart.is_some().then(|| timeline.to_string());
        let bytes = |text: &Option<String>| text.as_ref().map(|text| text.clone().into_bytes());
        let (restart, timeline) = (bytes(&restart), bytes(&timeline));
        let kind = slot.map(|_| &b"physical"[..]);
        let columns = ["slot_type", "restart_lsn", "restart_tli"];
        self.answer("READ_REPLICATION_SLOT", &columns, &[kind, restart.as_deref(), timeline.as_deref()]);
        Ok(())
    }

    fn drop_slot(&mut self, name: &str) -> Result<(), Refusal> {
        self.server.with(|state| {
            let slot = state.slots.get(name).ok_or_else(|| missing_slot(name))?;
            if let Some(pid) = slot.active {
                return Err(busy_slot(name, pid));
            }
            state.slots.remove(name);
            Ok(())
        })?;
        self.push(b'C', b"DROP_REPLICATION_SLOT\0");
        Ok(())
    }

    fn answer(&mut self, tag: &str, columns: &[&str], values: &[Option<&[u8]>]) {
        self.describe(columns);
        self.push_row(values);
        self.push(b'C', format!("{tag}\0").as_bytes());
    }

    fn describe(&mut self, columns: &[&str]) {
        let mut body = (columns.len() as i16).to_be_bytes().to_vec();
        for name in columns {
            body.extend_from_slice(name.as_bytes());
            body.extend_from_slice(&[0; 19]);
        }
        self.push(b'T', &body);
    }

    fn push_row(&mut self, values: &[Option<&[u8]>]) {
        let mut body = (values.len() as i16).to_be_bytes().to_vec();
        for value in values {
            body.extend_from_slice(&value.map_or(-1, |bytes| bytes.len() as i32).to_be_bytes());
            body.extend_from_slice(value.unwrap_or_default());
        }
        self.push(b'D', &body);
    }
}

fn unquote(name: &str) -> &str {
    name.trim_matches('"')
}

fn missing_slot(name: &str) -> Refusal {
    Refusal::new("42704", format!("replication slot \"{name}\" does not exist"))
}

fn busy_slot(name: &str, pid: u64) -> Refusal {
    Refusal::new("55006", format!("replication slot \"{name}\" is active for PID {pid}"))
}

/// One stream.
#[derive(Debug)]
struct Sending {
    slot: String,
    timeline: TimelineId,
    sent: Lsn,
    write: Lsn,
    flush: Lsn,
    /// How much of `output` is written.
    written: usize,
    message_count: usize,
    ping_unanswered: bool,
    last_heard: Instant,
    client_done: bool,
    server_done: bool,
}

/// What a stream does after looking at the state.
enum Next {
    /// The output holds something to write.
    Write,
    /// Nothing to send until the state changes, the client speaks, or the time has come.
    Wait,
    /// Both sides ended the copy.
    Done,
    Refused(Refusal),
    /// Everything is acknowledged and the server stops.
    Stopped,
}

/// Streaming.
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Session<S> {
    async fn start_replication(&mut self, arguments: &[&str]) -> io::Result<()> {
        let (mut sending, end) = match self.prepare_stream(arguments) {
            Ok(prepared) => prepared,
            Err(refusal) => return self.end_with_error(&refusal).await,
        };
        // Exactly at the end of an old timeline: no copy at all.
        if end != Some(sending.sent) {
            self.push(b'W', &[0, 0, 0]);
            self.flush().await?;
            self.cut = self.server.peek(|state| state.faults.cut_after.take());
            match self.stream(&mut sending).await? {
                Next::Refused(refusal) if refusal.sqlstate.starts_with("57P") => {
                    self.fatal(&refusal).await?;
                    return Err(gone());
                }
                Next::Refused(refusal) => return self.end_with_error(&refusal).await,
                Next::Stopped => {
                    self.push(b'C', b"COPY 0\0");
                    self.flush().await?;
                    self.writer.shutdown().await?;
                    return Err(gone());
                }
                _ => self.cut = None,
            }
        }
        self.end_stream(&sending).await
    }

    /// The row that names the next timeline, when the one streamed is not the current one; then the session goes on.
    async fn end_stream(&mut self, sending: &Sending) -> io::Result<()> {
        let (next, standby) = self.server.with(|state| {
            release_slots(state, self.id);
            let history = state.history();
            let next = history.child_of(sending.timeline).zip(history.end_of(sending.timeline));
            (next, state.in_recovery)
        });
        if let Some((timeline, switch)) = next {
            self.describe(&["next_tli", "next_tli_startpos"]);
            self.push_row(&[Some(timeline.to_string().as_bytes()), Some(switch.to_string().as_bytes())]);
        }
        self.push(b'C', b"START_STREAMING\0");
        self.push(b'C', b"START_REPLICATION\0");
        if self.server.peek(|state| state.major() >= 14) {
            self.push_hot_standby(standby);
        }
        self.push(b'Z', b"I");
        self.flush().await
    }

    async fn end_with_error(&mut self, refusal: &Refusal) -> io::Result<()> {
        self.server.with(|state| release_slots(state, self.id));
        self.cut = None;
        self.push(b'E', &refusal.encode("ERROR"));
        self.push(b'Z', b"I");
        self.flush().await
    }

    /// Checks what PostgreSQL checks before CopyBothResponse, and takes the slot. Gives the timeline's end too.
    fn prepare_stream(&mut self, arguments: &[&str]) -> Result<(Sending, Option<Lsn>), Refusal> {
        let syntax = || Refusal::new("42601", "syntax error");
        let (slot, rest) = match arguments {
            ["SLOT", name, rest @ ..] => (unquote(name).to_string(), rest),
            rest => (String::new(), rest),
        };
        let rest = rest.strip_prefix(&["PHYSICAL"]).unwrap_or(rest);
        let (start, timeline) = match rest {
            [start] => (start, None),
            [start, "TIMELINE", timeline] => (start, Some(timeline.parse().map_err(|_| syntax())?)),
            _ => return Err(syntax()),
        };
        let start: Lsn = start.parse().map_err(|_| syntax())?;
        let session = self.id;
        self.server.with(|state| {
            if state.stopping {
                return Err(Refusal::new("55000", "cannot execute new commands while WAL sender is in stopping mode"));
            }
            take_slot(state, &slot, session)?;
            let timeline = timeline.map_or(state.timeline, TimelineId);
            let end = check_history(state, timeline, start)?;
            let sending = Sending {
                slot,
                timeline,
                sent: start,
                write: Lsn::ZERO,
                flush: Lsn::ZERO,
                written: 0,
                message_count: 0,
                ping_unanswered: false,
                last_heard: Instant::now(),
                client_done: false,
                server_done: false,
            };
            Ok((sending, end))
        })
    }

    /// Sends and listens until the stream ends.
    async fn stream(&mut self, sending: &mut Sending) -> io::Result<Next> {
        let start = sending.sent;
        let flush = self.server.peek(|state| state.wal.get(&sending.timeline).map_or(Lsn::ZERO, |wal| wal.flush));
        if flush < start {
            let text =
                format!("requested starting point {start} is ahead of the WAL flush position of this server {flush}");
            return Ok(Next::Refused(Refusal::new("XX000", text)));
        }
        let mut chunk = vec![0; 16 << 10];
        loop {
            self.changed.borrow_and_update();
            self.live()?;
            while let Some((tag, body)) = take_message(&mut self.input)? {
                self.hear(sending, tag, &body)?;
            }
            let next = if sending.written < self.output.len() { Next::Write } else { self.next(sending) };
            if !matches!(next, Next::Write | Next::Wait) {
                return Ok(next);
            }
            let (deaf, mute) = self.server.peek(|state| (state.faults.stall_reading, state.faults.stall_writing));
            if self.cut == Some(0) {
                self.writer.shutdown().await?;
                return Err(gone());
            }
            let allowed = self.cut.map_or(usize::MAX, |left| left as usize);
            let unwritten = &self.output[sending.written..];
            let unwritten = &unwritten[..unwritten.len().min(allowed)];
            let wake = self.wake_at(sending);
            tokio::select! {
                biased;
                count = self.reader.read(&mut chunk), if !deaf => match count? {
                    0 => return Err(gone()),
                    count => self.input.extend_from_slice(&chunk[..count]),
                },
                count = self.writer.write(unwritten), if !mute && !unwritten.is_empty() => {
                    let count = count?;
                    sending.written += count;
                    if let Some(left) = &mut self.cut {
                        *left -= count as u64;
                    }
                }
                _ = self.changed.changed() => {}
                () = sleep_until(wake), if wake.is_some() => {
                    if self.server.peek(|state| state.wal_sender_timeout)
                        .is_some_and(|timeout| sending.last_heard.elapsed() >= timeout) {
                        return Err(gone());
                    }
                }
            }
        }
    }

    /// When there is something to do although nothing happens: a ping, then the end.
    fn wake_at(&self, sending: &Sending) -> Option<Instant> {
        let timeout = self.server.peek(|state| state.wal_sender_timeout)?;
        // A ping waits behind what the client does not read.
        let no_ping = sending.ping_unanswered || sending.server_done || sending.written < self.output.len();
        Some(sending.last_heard + if no_ping { timeout } else { timeout / 2 })
    }

    /// Takes a message of the client's.
    fn hear(&mut self, sending: &mut Sending, tag: u8, body: &[u8]) -> io::Result<()> {
        sending.last_heard = Instant::now();
        sending.ping_unanswered = false;
        match (tag, StatusUpdate::decode(body)) {
            (b'd', Some(status)) => {
                (sending.write, sending.flush) = (status.write, status.flush);
                // Everybody else is told as well: tests wait for slots to move.
                self.server.with(|state| state.record(self.id, &sending.slot, status));
                if status.reply_requested {
                    self.push_keepalive(sending, false);
                }
                Ok(())
            }
            (b'c', _) => {
                sending.client_done = true;
                Ok(())
            }
            // PostgreSQL closes the connection without a word.
            _ => Err(gone()),
        }
    }

    fn push_keepalive(&mut self, sending: &mut Sending, reply_requested: bool) {
        let now = self.server.peek(|state| {
            state.keepalives_sent += 1;
            state.now()
        });
        self.forget_written(sending);
        encode_keepalive(&mut self.output, sending.sent, now, reply_requested);
    }

    fn forget_written(&mut self, sending: &mut Sending) {
        if sending.written == self.output.len() {
            self.output.clear();
            sending.written = 0;
        }
    }

    /// Puts the next message into the (empty) output.
    fn next(&mut self, sending: &mut Sending) -> Next {
        self.forget_written(sending);
        if sending.server_done {
            return if sending.client_done { Next::Done } else { Next::Wait };
        }
        if sending.client_done {
            return self.end_copy(sending);
        }
        let output = &mut self.output;
        let outcome = self.server.peek(|state| fill_output(state, self.id, sending, output));
        match outcome {
            Filled::Message => Next::Write,
            Filled::Refused(refusal) => Next::Refused(refusal),
            Filled::TimelineEnd => self.end_copy(sending),
            Filled::CaughtUp { stopping: false } => self.ping_if_due(sending),
            Filled::CaughtUp { stopping: true } => {
                let acknowledged = if sending.flush != Lsn::ZERO { sending.flush } else { sending.write };
                if acknowledged == sending.sent {
                    return Next::Stopped;
                }
                self.ping(sending)
            }
        }
    }

    fn end_copy(&mut self, sending: &mut Sending) -> Next {
        sending.server_done = true;
        self.push(b'c', b"");
        Next::Write
    }

    fn ping_if_due(&mut self, sending: &mut Sending) -> Next {
        let timeout = self.server.peek(|state| state.wal_sender_timeout);
        match timeout.is_some_and(|timeout| sending.last_heard.elapsed() >= timeout / 2) {
            true => self.ping(sending),
            false => Next::Wait,
        }
    }

    fn ping(&mut self, sending: &mut Sending) -> Next {
        if sending.ping_unanswered {
            return Next::Wait;
        }
        sending.ping_unanswered = true;
        self.push_keepalive(sending, true);
        Next::Write
    }
}

async fn sleep_until(wake: Option<Instant>) {
    if let Some(wake) = wake {
        tokio::time::sleep_until(wake).await;
    }
}

fn take_slot(state: &mut ModelState, name: &str, session: u64) -> Result<(), Refusal> {
    if name.is_empty() {
        return Ok(());
    }
    let major = state.major();
    let slot = state.slots.get_mut(name).ok_or_else(|| missing_slot(name))?;
    if let Some(pid) = slot.active {
        return Err(busy_slot(name, pid));
    }
    if slot.lost && major >= 18 {
        let mut refusal = Refusal::new("55000", format!("can no longer access replication slot \"{name}\""));
        refusal.detail = Some("This replication slot has been invalidated due to \"wal_removed\".".to_string());
        return Err(refusal);
    }
    slot.active = Some(session);
    Ok(())
}

fn check_history(state: &ModelState, timeline: TimelineId, start: Lsn) -> Result<Option<Lsn>, Refusal> {
    let end = state.end_of(timeline)?;
    match end {
        Some(end) if start > end => {
            let text =
                format!("requested starting point {start} on timeline {timeline} is not in this server's history");
            let mut refusal = Refusal::new("XX000", text);
            refusal.detail = Some(format!("This server's history forked from timeline {timeline} at {end}."));
            Err(refusal)
        }
        end => Ok(end),
    }
}

enum Filled {
    Message,
    TimelineEnd,
    CaughtUp { stopping: bool },
    Refused(Refusal),
}

/// One WALData message, as XLogSendPhysical would cut it.
fn fill_output(state: &mut ModelState, session: u64, sending: &mut Sending, output: &mut Vec<u8>) -> Filled {
    if let Some(garbage) = state.faults.garbage.take() {
        output.extend_from_slice(&garbage);
        return Filled::Message;
    }
    if let Some(sqlstate) = state.faults.error.take() {
        return Filled::Refused(Refusal::new(&sqlstate, "the model was told to fail here"));
    }
    let switch = match state.end_of(sending.timeline) {
        Ok(switch) => switch,
        Err(refusal) => return Filled::Refused(refusal),
    };
    let wal = &state.wal[&sending.timeline];
    let end = switch.unwrap_or(wal.flush);
    if sending.sent >= end {
        return if switch.is_some() { Filled::TimelineEnd } else { Filled::CaughtUp { stopping: state.stopping } };
    }
    if sending.sent < state.oldest_lsn.max(wal.start) {
        let number = state.segment_size.segment_of(sending.sent);
        let name = crate::wal::SegmentName::new(sending.timeline, number, state.segment_size);
        return Filled::Refused(Refusal::new(
            "58P01",
            format!("requested WAL segment {name} has already been removed"),
        ));
    }
    let size = state.message_sizes[sending.message_count % state.message_sizes.len()] as u64;
    let to = end.min(sending.sent + size);
    encode_wal_data(output, sending.sent, end, state.now(), &[]);
    let payload = output.len();
    wal.copy(sending.sent, to, output);
    let length = (to - sending.sent) as usize;
    let body = (4 + crate::replication::message::WAL_DATA_HEADER_BYTES + length) as u32;
    let header = payload - crate::replication::message::WAL_DATA_HEADER_BYTES - 4;
    output[header..header + 4].copy_from_slice(&body.to_be_bytes());
    for lsn in state.faults.corrupt.range(sending.sent..to) {
        output[payload + (*lsn - sending.sent) as usize] ^= 0xFF;
    }
    sending.message_count += 1;
    sending.sent = to;
    state.sent.insert(session, to);
    Filled::Message
}

/// Bytes.
impl<S: AsyncRead + AsyncWrite + Unpin + Send> Session<S> {
    fn push(&mut self, tag: u8, body: &[u8]) {
        self.output.push(tag);
        self.output.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
        self.output.extend_from_slice(body);
    }

    async fn flush(&mut self) -> io::Result<()> {
        while self.server.peek(|state| state.faults.stall_writing) {
            self.changed.changed().await.map_err(|_| gone())?;
            self.live()?;
        }
        self.writer.write_all(&self.output).await?;
        self.output.clear();
        self.writer.flush().await
    }

    /// The next message of the client's, `None` at its end.
    async fn receive(&mut self) -> io::Result<Option<(u8, Vec<u8>)>> {
        let mut chunk = [0; 4096];
        loop {
            if let Some(message) = take_message(&mut self.input)? {
                return Ok(Some(message));
            }
            self.changed.borrow_and_update();
            self.live()?;
            if self.physical && self.server.peek(|state| state.stopping) {
                // The last to go, when the ordinary sessions have ended; walsenders in mid-stream stay.
                self.fatal(&Refusal::new("57P01", "terminating connection due to administrator command")).await?;
                return Ok(None);
            }
            let deaf = self.server.peek(|state| state.faults.stall_reading);
            tokio::select! {
                biased;
                _ = self.changed.changed() => {}
                count = self.reader.read(&mut chunk), if !deaf => match count? {
                    0 => return Ok(None),
                    count => self.input.extend_from_slice(&chunk[..count]),
                }
            }
        }
    }

    /// An error once the server has crashed.
    fn live(&self) -> io::Result<()> {
        if self.server.peek(|state| self.id <= state.dead) { Err(gone()) } else { Ok(()) }
    }
}

fn take_message(input: &mut Vec<u8>) -> io::Result<Option<(u8, Vec<u8>)>> {
    let Some(header) = Header::decode(input).map_err(io::Error::other)? else { return Ok(None) };
    let whole = 5 + header.body_bytes;
    if input.len() < whole {
        return Ok(None);
    }
    let body = input[5..whole].to_vec();
    input.drain(..whole);
    Ok(Some((header.tag, body)))
}

/// The server's half of SCRAM-SHA-256 (RFC 5802), on the verifier `postgres-protocol` makes.
mod scram {
    use rustls::SupportedCipherSuite;
    use rustls::crypto::aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256;

    pub(super) struct Verifier {
        pub(super) salt: String,
        pub(super) iterations: u32,
        stored_key: Vec<u8>,
        server_key: Vec<u8>,
    }

    impl Verifier {
        pub(super) fn new(password: &str) -> Verifier {
            // SCRAM-SHA-256$<iterations>:<salt>$<StoredKey>:<ServerKey>
            let text = postgres_protocol::password::scram_sha_256(password.as_bytes());
            let parts: Vec<&str> = text.split(['$', ':']).collect();
            Verifier {
                iterations: parts[1].parse().expect("the verifier's second part is a number"),
                salt: parts[2].to_string(),
                stored_key: decode(parts[3]),
                server_key: decode(parts[4]),
            }
        }

        /// Checks the client's proof; the server's signature if it is right.
        pub(super) fn check(&self, client_nonce: &str, challenge: &str, last: &str) -> Option<String> {
            let (without_proof, proof) = last.rsplit_once(",p=")?;
            if !without_proof.ends_with(&format!("r={client_nonce}server")) {
                return None;
            }
            let message = format!("n=,r={client_nonce},{challenge},{without_proof}");
            let signature = hmac(&self.stored_key, message.as_bytes());
            let client_key: Vec<u8> = decode(proof).iter().zip(signature).map(|(proof, byte)| proof ^ byte).collect();
            (sha256(&client_key) == self.stored_key).then(|| encode(&hmac(&self.server_key, message.as_bytes())))
        }
    }

    /// From a SASLInitialResponse: mechanism, length, `n,,n=,r=<nonce>`.
    pub(super) fn client_nonce(first: &[u8]) -> Option<String> {
        let text = String::from_utf8_lossy(first);
        text.split_once("n,,n=,r=").map(|(_, nonce)| nonce.to_string())
    }

    fn sha256(data: &[u8]) -> Vec<u8> {
        let SupportedCipherSuite::Tls13(suite) = TLS13_AES_128_GCM_SHA256 else {
            unreachable!("it is a TLS 1.3 suite")
        };
        suite.common.hash_provider.hash(data).as_ref().to_vec()
    }

    fn hmac(key: &[u8], data: &[u8]) -> Vec<u8> {
        let mut block = [0u8; 64];
        block[..key.len()].copy_from_slice(key);
        let pad = |byte: u8| block.map(|b| b ^ byte).to_vec();
        let inner = sha256(&[pad(0x36), data.to_vec()].concat());
        sha256(&[pad(0x5c), inner].concat())
    }

    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

    fn encode(bytes: &[u8]) -> String {
        let mut text = String::new();
        for chunk in bytes.chunks(3) {
            let word = chunk.iter().fold(0u32, |word, byte| word << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
            for place in 0..4 {
                let letter = ALPHABET[(word >> (18 - 6 * place) & 63) as usize] as char;
                text.push(if place > chunk.len() { '=' } else { letter });
            }
        }
        text
    }

    fn decode(text: &str) -> Vec<u8> {
        let (mut bytes, mut word, mut bits) = (Vec::new(), 0u32, 0);
        for value in text.bytes().filter_map(|byte| ALPHABET.iter().position(|&letter| letter == byte)) {
            word = word << 6 | value as u32;
            bits += 6;
            if bits >= 8 {
                bits -= 8;
                bytes.push((word >> bits) as u8);
            }
        }
        bytes
    }
}
