//! The connection against the model server, over memory and over real sockets; against a live one when told where.

use std::path::PathBuf;

use super::*;
use crate::error::{Advice, Disposition, ExitCode};
use crate::replication::{Address, NetDialer, Security, SessionKind, StartFault};
use crate::secret::Secret;
use crate::testkit::walsender::{ModelAuth, ModelServer, ModelWal};
use crate::wal::SystemId;

const START: Lsn = Lsn(0x100_0000);
const ONE: TimelineId = TimelineId(1);

fn login() -> Login {
    Login {
        address: Address::Tcp { host: "model".into(), ip: None, port: 5432 },
        ssl_mode: SslMode::Disable,
        security: Security::default(),
        user: "archiver".into(),
        password: Some(Secret::new("geheim")),
        kind: SessionKind::Physical,
        application_name: "seawall".into(),
        options: String::new(),
        connect_timeout: Duration::from_secs(5),
        answer_timeout: Duration::from_secs(5),
        keepalive: Some((Duration::from_secs(10), Duration::from_secs(5), 3)),
        tcp_user_timeout: Some(Duration::from_secs(30)),
    }
}

fn bytes(count: usize) -> Vec<u8> {
    (0..count).map(|i| ((i * 31) >> 3) as u8).collect()
}

/// A server with `count` bytes of WAL and a slot `s`.
fn server(count: usize) -> ModelServer {
    let size = SegmentSize::new(1 << 20).unwrap();
    let server = ModelServer::new(SystemId(7), size, START);
    server.with(|state| {
        state.append(&bytes(count));
        state.slots.insert("s".into(), Default::default());
    });
    server
}

fn slot() -> SlotName {
    SlotName::new("s").unwrap()
}

async fn open(server: &ModelServer) -> Connection {
    Connection::open(&server.dialer(), &login()).await.unwrap()
}

async fn start(server: &ModelServer, lsn: Lsn) -> Connection {
    let mut connection = open(server).await;
    assert_eq!(connection.start_replication(&slot(), lsn, ONE).await, Ok(Start::Streaming));
    connection
}

/// Owned, so that tests can keep it.
#[derive(Debug, PartialEq)]
enum Seen {
    Wal(Vec<u8>),
    Keepalive(Lsn, bool),
    TimelineEnd,
}

/// The next event, filling as needed.
async fn event(connection: &mut Connection) -> Result<Seen, ReplicationError> {
    loop {
        match connection.next_event()? {
            Some(StreamEvent::Wal { bytes, .. }) => return Ok(Seen::Wal(bytes.to_vec())),
            Some(StreamEvent::Keepalive { server_end, reply_requested, .. }) => {
                return Ok(Seen::Keepalive(server_end, reply_requested));
            }
            Some(StreamEvent::TimelineEnd) => return Ok(Seen::TimelineEnd),
            None => {}
        }
        connection.fill().await?;
    }
}

async fn read_wal(connection: &mut Connection, count: usize) -> Result<Vec<u8>, ReplicationError> {
    let mut wal = Vec::new();
    while wal.len() < count {
        if let Seen::Wal(piece) = event(connection).await? {
            wal.extend_from_slice(&piece);
        }
    }
    Ok(wal)
}

fn status(lsn: Lsn) -> StatusUpdate {
    StatusUpdate { write: lsn, flush: lsn, ..StatusUpdate::default() }
}

#[tokio::test(start_paused = true)]
async fn commands_are_answered() {
    let server = server(3 << 20);
    let mut connection = open(&server).await;
    assert_eq!(
        (connection.server_major(), connection.in_hot_standby(), connection.encrypted()),
        (17, Some(false), false)
    );
    let identity = connection.identify_system().await.unwrap();
    assert_eq!(identity, SystemIdentity { system_id: SystemId(7), timeline: ONE, flush_lsn: START + (3 << 20) });
    assert_eq!(connection.wal_segment_size().await.unwrap().bytes(), 1 << 20);
    assert_eq!(connection.show("wal_level").await.unwrap(), "replica");
    let unknown = connection.show("no_such_setting").await.unwrap_err();
    assert_eq!(unknown.sqlstate(), Some("42704"));
    assert_eq!(connection.timeline_history(ONE).await, Ok(None));
    let new = SlotName::new("new").unwrap();
    assert_eq!(connection.read_slot(&new).await, Ok(SlotReading::Missing));
    connection.create_physical_slot(&new).await.unwrap();
    assert_eq!(connection.create_physical_slot(&new).await.unwrap_err().sqlstate(), Some("42710"));
    let reserved = SlotReading::Reserved { restart_lsn: START + (3 << 20), restart_timeline: ONE };
    assert_eq!(connection.read_slot(&new).await, Ok(reserved));
    assert_eq!(connection.read_slot(&slot()).await, Ok(SlotReading::NotReserved));
    connection.drop_slot(&new).await.unwrap();
    assert_eq!(connection.query("SELECT 1").await.unwrap_err().sqlstate(), Some("0A000"));
    assert!(matches!(connection.show("a b").await, Err(ReplicationError::Misuse { .. })));
    connection.close().await;
}

#[tokio::test(start_paused = true)]
async fn sql_sessions_use_the_same_queries() {
    let server = server(0);
    server.with(|state| {
        state.sql = Some(std::sync::Arc::new(|_, text| {
            Ok((vec!["a".into(), "b".into()], vec![vec![Some(text.into()), None]]))
        }));
    });
    let sql = Login { kind: SessionKind::Sql { database: "app".into() }, ..login() };
    let mut connection = Connection::open(&server.dialer(), &sql).await.unwrap();
    let result = connection.query("SELECT x").await.unwrap();
    assert_eq!((result.text(0, 0), result.text(0, 1), result.columns.len()), (Some("SELECT x"), None, 2));
}

#[tokio::test(start_paused = true)]
async fn older_servers_are_not_asked_what_they_do_not_know() {
    let server = server(0);
    server.with(|state| state.server_version = "13.23 (Debian)".into());
    let mut connection = open(&server).await;
    assert_eq!((connection.server_major(), connection.in_hot_standby()), (13, None));
    assert_eq!(connection.read_slot(&slot()).await, Ok(SlotReading::Unsupported));
}

#[tokio::test(start_paused = true)]
async fn every_way_to_log_in() {
    let server = server(0);
    let right = || "geheim".to_string();
    for auth in [ModelAuth::Trust, ModelAuth::Password(right()), ModelAuth::Md5(right()), ModelAuth::Scram(right())] {
        server.with(|state| state.auth = auth.clone());
        open(&server).await.identify_system().await.unwrap();
    }
    let wrong = || "falsch".to_string();
    for auth in [ModelAuth::Password(wrong()), ModelAuth::Md5(wrong()), ModelAuth::Scram(wrong())] {
        server.with(|state| state.auth = auth.clone());
        let error = Connection::open(&server.dialer(), &login()).await.unwrap_err();
        assert_eq!((error.sqlstate(), error.exit_code()), (Some("28P01"), ExitCode::Permission), "{auth:?}");
        assert!(!format!("{error:?} {error} {:?}", error.hint()).contains("geheim"));
    }
    server.with(|state| state.auth = ModelAuth::ScramIterations(2_000_000));
    let error = Connection::open(&server.dialer(), &login()).await.unwrap_err();
    assert!(matches!(error, ConnectError::ScramIterations { count: 2_000_000, .. }));
    server.with(|state| state.auth = ModelAuth::Request(7));
    let error = Connection::open(&server.dialer(), &login()).await.unwrap_err();
    assert!(error.to_string().contains("GSSAPI"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn refusals_keep_their_meaning() {
    let server = server(0);
    server.with(|state| state.faults.refuse = Some("53300".into()));
    let error = Connection::open(&server.dialer(), &login()).await.unwrap_err();
    assert_eq!((error.disposition(), error.exit_code()), (Disposition::Reconnect, ExitCode::TryAgain));
    server.with(|state| (state.faults.refuse, state.stopping) = (None, true));
    let error = Connection::open(&server.dialer(), &login()).await.unwrap_err();
    assert_eq!(error.sqlstate(), Some("57P03"));
}

#[tokio::test(start_paused = true)]
async fn a_silent_server_costs_the_time_out_and_no_more() {
    let server = server(0);
    server.with(|state| state.faults.stall_writing = true);
    let began = tokio::time::Instant::now();
    let error = Connection::open(&server.dialer(), &login()).await.unwrap_err();
    assert!(matches!(error, ConnectError::Timeout { .. }), "{error}");
    assert_eq!(began.elapsed(), Duration::from_secs(5));

    server.with(|state| state.faults.stall_writing = false);
    let mut connection = open(&server).await;
    server.with(|state| state.faults.stall_writing = true);
    assert!(matches!(connection.identify_system().await, Err(ReplicationError::Timeout { .. })));
    assert!(matches!(connection.identify_system().await, Err(ReplicationError::Misuse { state: "broken", .. })));
}

#[tokio::test(start_paused = true)]
async fn wal_arrives_whatever_the_message_sizes() {
    for sizes in [vec![128 << 10], vec![1], vec![8192, 1, 3], vec![1 << 20]] {
        let count = if sizes == [1] { 5000 } else { 3 << 20 };
        let (server, wal) = (server(count), bytes(count));
        server.with(|state| state.message_sizes = sizes);
        let mut connection = start(&server, START).await;
        let mut expected = START;
        while expected < START + count as u64 {
            connection.fill().await.unwrap();
            while let Some(event) = connection.next_event().unwrap() {
                let StreamEvent::Wal { start, server_end, bytes: piece, .. } = event else { panic!("{event:?}") };
                assert_eq!((start, server_end), (expected, START + count as u64));
                let at = (start - START) as usize;
                assert!(piece == &wal[at..at + piece.len()]);
                expected = start + piece.len() as u64;
            }
        }
        assert_eq!(connection.finish_stream().await, Ok(None));
        connection.identify_system().await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn refusals_after_copy_both_leave_the_connection_usable() {
    let server = server(2 << 20);
    server.with(|state| state.oldest_lsn = START + (1 << 20));
    let mut connection = open(&server).await;
    let cases = [(START, StartFault::SegmentRemoved), (START + (5 << 20), StartFault::AheadOfServerOrNotInHistory)];
    for (lsn, fault) in cases {
        assert_eq!(connection.start_replication(&slot(), lsn, ONE).await, Ok(Start::Streaming));
        connection.queue_status(status(lsn));
        let error = event(&mut connection).await.unwrap_err();
        assert_eq!(StartFault::of(&error), Some(fault));
        let ReplicationError::Server(server_error) = &error else { panic!("{error}") };
        assert_eq!(server_error.phase, Phase::StartReplication);
        assert!(error.leaves_connection_usable());
        // Both ways on: the next command settles the stream by itself, or the caller does.
        if fault == StartFault::SegmentRemoved {
            assert_eq!(connection.finish_stream().await, Ok(None));
        }
        connection.identify_system().await.unwrap();
    }
    assert_eq!(connection.start_replication(&slot(), START + (1 << 20), ONE).await, Ok(Start::Streaming));
    assert_eq!(read_wal(&mut connection, 1 << 20).await.unwrap(), bytes(2 << 20)[1 << 20..]);
}

#[tokio::test(start_paused = true)]
async fn refusals_before_copy_both() {
    let server = server(1 << 20);
    let mut connection = open(&server).await;
    let missing = SlotName::new("nope").unwrap();
    let error = connection.start_replication(&missing, START, ONE).await.unwrap_err();
    assert_eq!(StartFault::of(&error), Some(StartFault::SlotMissing));
    let error = connection.start_replication(&slot(), START, TimelineId(5)).await.unwrap_err();
    assert_eq!(StartFault::of(&error), Some(StartFault::AheadOfServerOrNotInHistory));
    let mut other = start(&server, START).await;
    let error = connection.start_replication(&slot(), START, ONE).await.unwrap_err();
    assert_eq!((StartFault::of(&error), error.disposition()), (Some(StartFault::SlotBusy), Disposition::Retry));
    other.finish_stream().await.unwrap();
    server.with(|state| {
        state.server_version = "18.4".into();
        state.slots.get_mut("s").unwrap().lost = true;
    });
    let error = connection.start_replication(&slot(), START, ONE).await.unwrap_err();
    assert_eq!(StartFault::of(&error), Some(StartFault::SlotLost));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_timeline_names_the_next() {
    let server = server(1 << 20);
    server.with(|state| state.in_recovery = true);
    let mut connection = start(&server, START).await;
    read_wal(&mut connection, 1 << 20).await.unwrap();
    let switch = START + (1 << 20);
    server.with(|state| {
        state.promote(TimelineId(2), switch);
        state.append(&[9; 100]);
    });
    assert_eq!(event(&mut connection).await, Ok(Seen::TimelineEnd));
    assert_eq!(event(&mut connection).await, Ok(Seen::TimelineEnd), "it stays at the end");
    let end = TimelineEnd { next_timeline: TimelineId(2), next_start: switch };
    assert_eq!(connection.finish_stream().await, Ok(Some(end)));
    assert_eq!(connection.in_hot_standby(), Some(false));
    let (name, content) = connection.timeline_history(TimelineId(2)).await.unwrap().unwrap();
    assert_eq!((name.as_str(), &content[..2]), ("00000002.history", &b"1\t"[..]));

    // Exactly at the switch there is nothing to copy; past it is another history.
    assert_eq!(connection.start_replication(&slot(), switch, ONE).await, Ok(Start::TimelineEnded(end)));
    let error = connection.start_replication(&slot(), switch + 8, ONE).await.unwrap_err();
    let ReplicationError::Server(error) = error else { panic!("{error}") };
    assert!(error.detail.unwrap().contains(&switch.to_string()));

    assert_eq!(connection.start_replication(&slot(), switch, TimelineId(2)).await, Ok(Start::Streaming));
    assert_eq!(read_wal(&mut connection, 100).await.unwrap(), [9; 100]);
}

#[tokio::test(start_paused = true)]
async fn only_the_newest_status_is_sent() {
    let server = server(0);
    let mut connection = start(&server, START).await;
    for n in 1..=1000 {
        connection.queue_status(StatusUpdate { reply_requested: n == 1, ..status(START + n) });
    }
    assert!(connection.has_output());
    connection.flush_output().await.unwrap();
    assert!(!connection.has_output());
    // The request of the first one still stands.
    assert_eq!(event(&mut connection).await, Ok(Seen::Keepalive(START, false)));
    let sent = server.with(|state| state.statuses.clone());
    assert_eq!(sent.len(), 1);
    assert_eq!((sent[0].status.flush, sent[0].status.reply_requested), (START + 1000, true));
    assert_eq!(server.with(|state| state.slots["s"].restart_lsn), Some(START + 1000));
}

#[tokio::test(start_paused = true)]
async fn a_peer_that_stops_reading_does_not_stop_us() {
    let server = server(0);
    let mut connection = start(&server, START).await;
    server.with(|state| state.faults.stall_reading = true);
    for n in 0..20_000 {
        connection.queue_status(status(START + n));
        let _ = timeout(Duration::ZERO, connection.flush_output()).await;
    }
    assert!(connection.has_output(), "the pipe is full");
    server.with(|state| state.append(&bytes(1 << 20)));
    assert_eq!(read_wal(&mut connection, 1 << 20).await.unwrap(), bytes(1 << 20));
    server.with(|state| state.faults.stall_reading = false);
    connection.flush_output().await.unwrap();
    connection.finish_stream().await.unwrap();
    assert_eq!(server.with(|state| state.max_flush_reported), START + 19_999);
}

#[tokio::test(start_paused = true)]
async fn a_cut_inside_a_message_gives_what_arrived_and_then_the_end() {
    for cut in [0u64, 1, 4, 5, 29, 30, 31, 100_000, (128 << 10) + 30, (128 << 10) + 35, 700_001] {
        let server = server(1 << 20);
        server.with(|state| state.faults.cut_after = Some(cut));
        let mut connection = start(&server, START).await;
        let mut wal = Vec::new();
        let error = loop {
            match event(&mut connection).await {
                Ok(Seen::Wal(piece)) => wal.extend_from_slice(&piece),
                Ok(other) => panic!("{other:?}"),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, ReplicationError::Closed { .. }), "{error}");
        assert!(wal == bytes(1 << 20)[..wal.len()]);
        let whole = 30 + (128 << 10);
        let expected = cut / whole * (128 << 10) + (cut % whole).saturating_sub(30);
        assert_eq!(wal.len() as u64, expected, "cut after {cut}");
        assert_eq!(server.with(|state| state.slots["s"].active), None);
    }
}

#[tokio::test(start_paused = true)]
async fn garbage_in_the_stream_is_an_error_in_bounded_memory() {
    for garbage in [
        &b"d\x7f\xff\xff\xff"[..],
        b"d\0\0\0\x03",
        b"d\x80\0\0\0",
        b"!\0\0\0\x04",
        b"\0\0\0\0\0",
        b"d\0\0\0\x05z",
        b"Z\0\0\0\x05I",
    ] {
        let server = server(1000);
        server.with(|state| state.faults.garbage = Some(garbage.to_vec()));
        let mut connection = start(&server, START).await;
        let error = event(&mut connection).await.unwrap_err();
        assert!(matches!(error, ReplicationError::Protocol { .. }), "{garbage:?}: {error}");
        assert!(!error.leaves_connection_usable());
        assert!(matches!(connection.finish_stream().await, Err(ReplicationError::Misuse { .. })));
    }
}

#[tokio::test(start_paused = true)]
async fn an_error_in_the_stream_is_told_from_a_refusal() {
    let server = server(1000);
    let mut connection = start(&server, START).await;
    read_wal(&mut connection, 1000).await.unwrap();
    server.with(|state| state.faults.error = Some("58P01".into()));
    let ReplicationError::Server(error) = event(&mut connection).await.unwrap_err() else { panic!() };
    assert_eq!((error.phase, error.sqlstate.as_str()), (Phase::Streaming, "58P01"));
    connection.identify_system().await.unwrap();

    connection.start_replication(&slot(), START + 1000, ONE).await.unwrap();
    server.with(|state| state.faults.error = Some("57P01".into()));
    let error = event(&mut connection).await.unwrap_err();
    assert_eq!((error.sqlstate(), error.disposition()), (Some("57P01"), Disposition::Reconnect));
    assert!(!error.leaves_connection_usable());
    assert!(matches!(connection.identify_system().await, Err(ReplicationError::Misuse { .. })));
}

#[tokio::test(start_paused = true)]
async fn a_stopping_server_waits_for_the_acknowledgement() {
    let server = server(1000);
    let mut connection = start(&server, START).await;
    read_wal(&mut connection, 1000).await.unwrap();
    connection.queue_status(status(START + 500));
    connection.flush_output().await.unwrap();
    server.with(|state| state.stopping = true);
    for _ in 0..3 {
        assert_eq!(event(&mut connection).await, Ok(Seen::Keepalive(START + 1000, true)));
        connection.queue_status(status(START + 500));
    }
    assert_eq!(event(&mut connection).await, Ok(Seen::Keepalive(START + 1000, true)));
    connection.queue_status(status(START + 1000));
    assert_eq!(event(&mut connection).await, Err(ReplicationError::ServerStopping));
    assert_eq!(server.with(|state| state.sessions_open), 0);
}

#[tokio::test(start_paused = true)]
async fn a_crashed_server_ends_every_session() {
    let server = server(1000);
    let mut streaming = start(&server, START).await;
    let mut idle = open(&server).await;
    server.with(|state| state.crash());
    let error = read_wal(&mut streaming, 2000).await.unwrap_err();
    assert!(matches!(error, ReplicationError::Closed { .. }), "{error}");
    let error = idle.identify_system().await.unwrap_err();
    assert_eq!(error.disposition(), Disposition::Reconnect, "{error}");
    assert_eq!(server.with(|state| (state.sessions_open, state.slots["s"].active)), (0, None));
    server.with(|state| state.faults.unreachable = true);
    assert!(Connection::open(&server.dialer(), &login()).await.is_err());
    server.with(|state| state.faults.unreachable = false);
    start(&server, START).await;
}

#[tokio::test(start_paused = true)]
async fn an_idle_server_pings_and_then_hangs_up() {
    let server = server(0);
    server.with(|state| state.wal_sender_timeout = Some(Duration::from_secs(3)));
    let began = tokio::time::Instant::now();
    let mut connection = start(&server, START).await;
    assert_eq!(event(&mut connection).await, Ok(Seen::Keepalive(START, true)));
    assert_eq!(began.elapsed().as_millis() / 10, 150);
    let error = event(&mut connection).await.unwrap_err();
    assert_eq!(error, ReplicationError::Closed { phase: Phase::StartReplication });
    assert_eq!(began.elapsed().as_millis() / 10, 300);
}

#[tokio::test(start_paused = true)]
async fn a_dropped_fill_loses_nothing() {
    let server = server(0);
    let mut connection = start(&server, START).await;
    assert!(timeout(Duration::from_millis(1), connection.fill()).await.is_err());
    server.with(|state| state.append(&bytes(300_000)));
    let mut wal = Vec::new();
    while wal.len() < 300_000 {
        let _ = timeout(Duration::ZERO, connection.fill()).await;
        while let Some(StreamEvent::Wal { bytes, .. }) = connection.next_event().unwrap() {
            wal.extend_from_slice(bytes);
        }
    }
    assert!(wal == bytes(300_000));
}

#[tokio::test(start_paused = true)]
async fn an_abandoned_command_is_not_mistaken_for_the_next() {
    let server = server(0);
    let mut connection = open(&server).await;
    server.with(|state| state.faults.stall_writing = true);
    assert!(timeout(Duration::from_millis(1), connection.identify_system()).await.is_err());
    server.with(|state| state.faults.stall_writing = false);
    let error = connection.show("wal_level").await.unwrap_err();
    assert!(matches!(error, ReplicationError::Misuse { .. }), "{error}");
}

#[tokio::test]
async fn over_tcp_and_without_tls_as_the_mode_says() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = server(1 << 20);
    tokio::spawn(server.clone().serve_tcp(listener));
    let address = Address::Tcp { host: "localhost".into(), ip: Some([127, 0, 0, 1].into()), port };
    let prefer = Login { address, ssl_mode: SslMode::Prefer, ..login() };
    let mut connection = Connection::open(&NetDialer, &prefer).await.unwrap();
    connection.start_replication(&slot(), START, ONE).await.unwrap();
    assert_eq!(read_wal(&mut connection, 1 << 20).await.unwrap(), bytes(1 << 20));
    let require = Login { ssl_mode: SslMode::Require, ..prefer.clone() };
    let error = Connection::open(&NetDialer, &require).await.unwrap_err();
    assert!(matches!(error, ConnectError::TlsNotOffered { .. }), "{error}");

    server.with(|state| state.faults.tls_answer = Some(b'E'));
    // An error in place of an answer ends the attempt in every mode, as in libpq: it is no refusal of TLS.
    let error = Connection::open(&NetDialer, &prefer).await.unwrap_err();
    assert!(matches!(error, ConnectError::TlsError { .. }), "{error}");
    let error = Connection::open(&NetDialer, &require).await.unwrap_err();
    assert!(matches!(error, ConnectError::TlsError { .. }), "{error}");
}

#[tokio::test]
async fn nobody_listening_names_everything_tried() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let address = Address::Tcp { host: "localhost".into(), ip: None, port };
    let error = Connection::open(&NetDialer, &Login { address, ..login() }).await.unwrap_err();
    assert!(error.to_string().contains(&format!("127.0.0.1:{port}: Connection refused")), "{error}");
    assert_eq!(error.exit_code(), ExitCode::Unavailable);
    let address = Address::Unix { directory: PathBuf::from("/nonexistent"), port: 1 };
    let error = Connection::open(&NetDialer, &Login { address, ..login() }).await.unwrap_err();
    assert!(error.to_string().contains("/nonexistent/.s.PGSQL.1"), "{error}");
}

/// How fast bytes go from the model over loopback through `next_event`; run with `--ignored` in release mode.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "a measurement"]
async fn rate_against_the_model() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = server(0);
    let total = 8u64 << 30;
    let wal = ModelWal { start: START, bytes: bytes(16 << 20).into(), flush: START + total, cyclic: true };
    server.with(|state| state.wal.insert(ONE, wal));
    tokio::spawn(server.clone().serve_tcp(listener));
    let address = Address::Tcp { host: "localhost".into(), ip: Some([127, 0, 0, 1].into()), port };
    let mut connection = Connection::open(&NetDialer, &Login { address, ..login() }).await.unwrap();
    connection.start_replication(&slot(), START, ONE).await.unwrap();
    let (began, mut received) = (std::time::Instant::now(), 0);
    while received < total {
        connection.fill().await.unwrap();
        while let Some(event) = connection.next_event().unwrap() {
            if let StreamEvent::Wal { bytes, .. } = event {
                received += bytes.len() as u64;
            }
        }
    }
    println!("{:.2} GiB/s from the model", total as f64 / f64::from(1 << 30) / began.elapsed().as_secs_f64());
}

/// `SEAWALL_LIVE_CONN="<host or directory> <port> <user> <password or -> <disable|prefer|require>"`: commands and
/// streaming against a real server, whose WAL from the slot's restart_lsn is read to its end.
#[tokio::test]
async fn a_live_server() {
    let Ok(text) = std::env::var("SEAWALL_LIVE_CONN") else { return };
    let [host, port, user, password, mode] = text.split(' ').collect::<Vec<_>>()[..] else { panic!("five words") };
    let port = port.parse().unwrap();
    let address = match host.starts_with(['/', '@']) {
        true => Address::Unix { directory: host.into(), port },
        false => Address::Tcp { host: host.into(), ip: None, port },
    };
    let ssl_mode = match mode {
        "disable" => SslMode::Disable,
        "prefer" => SslMode::Prefer,
        _ => SslMode::Require,
    };
    let password = (password != "-").then(|| Secret::new(password));
    let login =
        Login { address, user: user.into(), password, ssl_mode, options: "-c wal_sender_timeout=3s".into(), ..login() };
    let mut connection = match Connection::open(&NetDialer, &login).await {
        Ok(connection) => connection,
        Err(error) => {
            return println!("{error}\n  hint: {}\n  exit {:?}", error.hint().unwrap_or_default(), error.exit_code());
        }
    };
    println!(
        "encrypted {}, major {}, standby {:?}",
        connection.encrypted(),
        connection.server_major(),
        connection.in_hot_standby()
    );
    let identity = connection.identify_system().await.unwrap();
    let size = connection.wal_segment_size().await.unwrap();
    println!("{identity:?} {size:?} wal_sender_timeout {}", connection.show("wal_sender_timeout").await.unwrap());
    println!("history of 1: {:?}", connection.timeline_history(ONE).await.unwrap());
    println!("SQL: {:?}", connection.query("SELECT 1").await.unwrap_err().to_string());
    let slot = SlotName::new("seawall_live").unwrap();
    println!("slot: {:?}", connection.read_slot(&slot).await.unwrap());
    if let Err(error) = connection.create_physical_slot(&slot).await {
        println!("create: {error}");
    }
    let SlotReading::Reserved { restart_lsn, restart_timeline } = connection.read_slot(&slot).await.unwrap() else {
        panic!("a slot made with RESERVE_WAL holds WAL")
    };
    let ahead = identity.flush_lsn + (1 << 40);
    for lsn in [Lsn(size.bytes()), ahead] {
        match connection.start_replication(&slot, lsn, restart_timeline).await {
            Ok(_) => match event(&mut connection).await {
                Err(error) => println!("{lsn}: {:?}: {error}", StartFault::of(&error)),
                Ok(_) => drop(connection.finish_stream().await.unwrap()),
            },
            Err(error) => println!("{lsn}: before the copy: {:?}: {error}", StartFault::of(&error)),
        }
    }
    let error = connection.start_replication(&slot, restart_lsn, TimelineId(99)).await.unwrap_err();
    println!("timeline 99: {:?}: {error}", StartFault::of(&error));
    let from = size.floor(restart_lsn);
    assert_eq!(connection.start_replication(&slot, from, restart_timeline).await.unwrap(), Start::Streaming);
    let (began, mut next) = (std::time::Instant::now(), from);
    while next < identity.flush_lsn {
        connection.fill().await.unwrap();
        while let Some(event) = connection.next_event().unwrap() {
            if let StreamEvent::Wal { start, bytes, .. } = event {
                assert_eq!(start, next);
                next = start + bytes.len() as u64;
            }
        }
        connection.queue_status(StatusUpdate { write: next, flush: from, ..StatusUpdate::default() });
    }
    let (count, seconds) = (next - from, began.elapsed().as_secs_f64());
    println!("{count} bytes of WAL in {seconds:.3} s: {:.0} MiB/s", count as f64 / f64::from(1 << 20) / seconds);
    connection.queue_status(StatusUpdate {
        reply_requested: true,
        write: next,
        flush: from,
        ..StatusUpdate::default()
    });
    println!("asked for a keepalive: {:?}", event(&mut connection).await.unwrap());
    println!("idle: {:?} after {:?}", event(&mut connection).await.unwrap(), began.elapsed());
    println!("finish: {:?}", connection.finish_stream().await.unwrap());
    connection.identify_system().await.unwrap();
    println!("slot: {:?}", connection.read_slot(&slot).await.unwrap());
    connection.drop_slot(&slot).await.unwrap();
    connection.close().await;
}

/// `SEAWALL_LIVE_END="<socket directory> <port> <user>"`: streams and acknowledges until the server is stopped or
/// promoted by somebody else, and follows it onto the next timeline.
#[tokio::test]
async fn a_live_end() {
    let Ok(text) = std::env::var("SEAWALL_LIVE_END") else { return };
    let [directory, port, user] = text.split(' ').collect::<Vec<_>>()[..] else { panic!("three words") };
    let address = Address::Unix { directory: directory.into(), port: port.parse().unwrap() };
    let mut connection = Connection::open(&NetDialer, &Login { address, user: user.into(), ..login() }).await.unwrap();
    let identity = connection.identify_system().await.unwrap();
    let slot = SlotName::new("seawall_end").unwrap();
    let _ = connection.create_physical_slot(&slot).await;
    println!("standby {:?}, {identity:?}", connection.in_hot_standby());
    let from = connection.wal_segment_size().await.unwrap().floor(identity.flush_lsn);
    connection.start_replication(&slot, from, identity.timeline).await.unwrap();
    let error = loop {
        match connection.next_event() {
            Ok(Some(StreamEvent::Wal { start, bytes, .. })) => {
                let end = start + bytes.len() as u64;
                connection.queue_status(status(end));
            }
            Ok(Some(StreamEvent::Keepalive { server_end, .. })) => connection.queue_status(status(server_end)),
            Ok(Some(StreamEvent::TimelineEnd)) => break None,
            Ok(None) => connection.fill().await.unwrap(),
            Err(error) => break Some(error),
        }
    };
    if let Some(error) = error {
        return println!("ended: {error}");
    }
    let end = connection.finish_stream().await.unwrap().unwrap();
    println!("{end:?}, standby {:?}", connection.in_hot_standby());
    println!("{:?}", connection.timeline_history(end.next_timeline).await.unwrap());
    let old = identity.timeline;
    println!("at the end: {:?}", connection.start_replication(&slot, end.next_start, old).await.unwrap());
    let past = connection.start_replication(&slot, end.next_start + 8, old).await.unwrap_err();
    println!("past the end: {past}");
    println!("next: {:?}", connection.start_replication(&slot, end.next_start, end.next_timeline).await.unwrap());
    read_wal(&mut connection, 1).await.unwrap();
    println!("finish: {:?}", connection.finish_stream().await.unwrap());
}
