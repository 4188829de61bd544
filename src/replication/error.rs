//! Owns: what can go wrong with a connection, told apart by SQLSTATE and phase, never by the server's words.
//! Does not own: what is done about it (`receiver`). proto-notes/02-commands.md, "errors at start".

use std::io;
use std::time::Duration;

use crate::error::{Advice, Disposition, ExitCode};

use super::framing::{Fields, ProtocolError};
use super::tls::fault::TlsFault;
use super::{Address, Login, SessionKind};

/// What was going on when the server refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Start-up and authentication.
    Connect,
    /// A command or query, by its first words.
    Command(&'static str),
    /// START_REPLICATION, until the first WAL arrives: the server may refuse after it said CopyBothResponse.
    StartReplication,
    Streaming,
}

impl std::fmt::Display for Phase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Phase::Connect => f.write_str("connect"),
            Phase::Command(command) => write!(f, "run {command}"),
            Phase::StartReplication => f.write_str("start replication"),
            Phase::Streaming => f.write_str("stream WAL"),
        }
    }
}

/// An ErrorResponse. Its texts are already escaped and shortened: they may be printed and logged as they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerError {
    /// `ERROR`, `FATAL` or `PANIC`; after the last two the server closes the connection.
    pub severity: String,
    pub sqlstate: String,
    pub message: String,
    pub detail: Option<String>,
    pub hint: Option<String>,
    pub phase: Phase,
}

impl ServerError {
    /// Reads the body of an ErrorResponse. A damaged one gives what could be read: it is an error either way.
    pub fn decode(body: &[u8], phase: Phase) -> ServerError {
        let mut error = ServerError {
            severity: "ERROR".to_string(),
            sqlstate: "XX000".to_string(),
            message: String::new(),
            detail: None,
            hint: None,
            phase,
        };
        let mut fields = Fields(body);
        while let Some(kind) = fields.u8().filter(|&kind| kind != 0) {
            let Some(value) = fields.c_string() else { break };
            let text = || escape(&String::from_utf8_lossy(value));
            match kind {
                // `S` is translated by lc_messages, `V` (9.6 and later) is not.
                b'V' => error.severity = text(),
                b'C' => error.sqlstate = text(),
                b'M' => error.message = text(),
                b'D' => error.detail = Some(text()),
                b'H' => error.hint = Some(text()),
                _ => {}
            }
        }
        error
    }

    /// Whether the server closes the connection after this.
    pub fn is_fatal(&self) -> bool {
        self.severity != "ERROR"
    }
}

impl std::fmt::Display for ServerError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.message, self.sqlstate)?;
        match &self.detail {
            Some(detail) => write!(f, ": {detail}"),
            None => Ok(()),
        }
    }
}

/// Makes a peer's text safe to print: one line, no terminal control, no invisible reordering, bounded.
pub fn escape(text: &str) -> String {
    const CHARS_MAX: usize = 1000;
    let invisible = |c: char| matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    let mut safe = String::with_capacity(text.len().min(CHARS_MAX));
    for (count, c) in text.chars().enumerate() {
        if count == CHARS_MAX {
            safe.push('…');
            break;
        }
        if c.is_control() || invisible(c) { safe.extend(c.escape_default()) } else { safe.push(c) }
    }
    safe
}

/// Whom a connection was meant for: what messages and hints need to know, and no secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    /// `host:port`, or the socket's path.
    pub target: String,
    pub user: String,
    /// `replication`, or the database: what the database column of pg_hba.conf is compared with.
    pub database: String,
    pub physical: bool,
    pub unix: bool,
}

impl Peer {
    pub fn of(login: &Login) -> Peer {
        let (database, physical) = match &login.kind {
            SessionKind::Physical => ("replication".to_string(), true),
            SessionKind::Sql { database } => (escape(database), false),
        };
        let unix = matches!(login.address, Address::Unix { .. });
        Peer { target: escape(&login.address.to_string()), user: escape(&login.user), database, physical, unix }
    }

    fn hba_hint(&self) -> String {
        let line = match self.unix {
            true => format!("local {} {} scram-sha-256", self.database, self.user),
            false => format!("host {} {} <address of this machine>/32 scram-sha-256", self.database, self.user),
        };
        let physical = match self.physical {
            true => "; the database column must say `replication` (`all` does not match it)",
            false => "",
        };
        format!("add the line `{line}` to the server's pg_hba.conf and reload it{physical}.")
    }
}

const POOLER_HINT: &str = "this looks like a connection pooler (such as PgBouncer); replication needs a direct \
                           connection: use PostgreSQL's own host and port.";

/// Why no session was opened.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConnectError {
    #[error("could not connect to {target}: {}", .tried.join("; "))]
    Network { target: String, tried: Vec<String> },
    #[error("could not connect to {target}: no answer within {after:?}")]
    Timeout { target: String, after: Duration },
    #[error("could not connect to {target}: the server closed the connection during start-up")]
    Closed { target: String },
    #[error("could not connect to {}: {error}", .peer.target)]
    Server { peer: Box<Peer>, error: Box<ServerError> },
    #[error("could not connect to {target}: the server does not offer TLS, and sslmode is `{mode}`")]
    TlsNotOffered { target: String, mode: &'static str },
    /// In place of `S` or `N`: it could not even start a process, or is no PostgreSQL.
    #[error("could not connect to {target}: the server answered the TLS request with an error")]
    TlsError { target: String },
    #[error("could not connect to {target}: the server's answer to the TLS request is no answer of PostgreSQL's")]
    TlsAnswer { target: String },
    #[error("could not set up TLS with {target}: {fault}")]
    Tls { target: String, fault: Box<TlsFault> },
    /// The server's way of letting us in is weaker than what was asked for; nothing secret was sent.
    #[error("could not log in to {target}: {cause}")]
    Policy { target: String, cause: String, hint: &'static str },
    #[error("could not log in to {target}: the server asks user {user} for a password and none is configured")]
    PasswordMissing { target: String, user: String },
    #[error("could not log in to {target}: authentication method {method} is not supported")]
    Method { target: String, method: String },
    #[error(
        "could not log in to {target}: the server asks for {count} SCRAM iterations, more than the 100000 supported"
    )]
    ScramIterations { target: String, count: u64 },
    #[error("could not log in to {target}: SCRAM exchange failed: {cause}")]
    Scram { target: String, cause: String },
    #[error("could not connect to {target}: {cause}")]
    Login { target: String, cause: &'static str },
    #[error("could not connect to {target}: {error}")]
    Protocol { target: String, error: ProtocolError },
}

impl ConnectError {
    /// The SQLSTATE, when it was the server that refused.
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            ConnectError::Server { error, .. } => Some(&error.sqlstate),
            _ => None,
        }
    }
}

impl Advice for ConnectError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            ConnectError::Network { .. } => "is the server running and reachable from here?".to_string(),
            ConnectError::Timeout { .. } => "is a firewall dropping packets, or the server overloaded?".to_string(),
            ConnectError::Closed { .. } => {
                "is this a PostgreSQL server? See its log for the reason it hung up.".to_string()
            }
            ConnectError::Server { peer, error } => return connect_hint(peer, error),
            ConnectError::TlsNotOffered { .. } => "switch `ssl` on at the server.".to_string(),
            ConnectError::TlsAnswer { .. } | ConnectError::Protocol { .. } => {
                "is this host and port really a PostgreSQL server?".to_string()
            }
            ConnectError::TlsError { .. } => "see the server's log: it may be out of processes or memory.".to_string(),
            ConnectError::Tls { fault, .. } => fault.hint(),
            ConnectError::Policy { hint, .. } => hint.to_string(),
            ConnectError::PasswordMissing { .. } => {
                "put the password into a passfile (the database field for replication is `replication`).".to_string()
            }
            ConnectError::Method { .. } => {
                "use scram-sha-256 for this user in pg_hba.conf; GSSAPI, SSPI, PAM dialogues and OAuth are not built."
                    .to_string()
            }
            ConnectError::ScramIterations { .. } => {
                "set `scram_iterations` to at most 100000 on the server and set this role's password again.".to_string()
            }
            ConnectError::Scram { .. } => "is something between this machine and the server?".to_string(),
            ConnectError::Login { .. } => return None,
        })
    }

    fn disposition(&self) -> Disposition {
        match self {
            ConnectError::Network { .. }
            | ConnectError::Timeout { .. }
            | ConnectError::Closed { .. }
            | ConnectError::TlsError { .. } => Disposition::Reconnect,
            ConnectError::Tls { fault, .. } if fault.is_passing() => Disposition::Reconnect,
            ConnectError::Server { error, .. } => connect_verdict(&error.sqlstate).0,
            _ => Disposition::Operator,
        }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            ConnectError::Network { .. }
            | ConnectError::Timeout { .. }
            | ConnectError::Closed { .. }
            | ConnectError::TlsError { .. } => ExitCode::Unavailable,
            ConnectError::Tls { fault, .. } if fault.is_passing() => ExitCode::Unavailable,
            ConnectError::Server { error, .. } => connect_verdict(&error.sqlstate).1,
            ConnectError::Scram { .. } | ConnectError::Policy { .. } => ExitCode::Permission,
            _ => ExitCode::Config,
        }
    }
}

fn connect_verdict(sqlstate: &str) -> (Disposition, ExitCode) {
    match sqlstate {
        // Starting, stopping, killed by an administrator or a crash of a neighbour.
        "57P01" | "57P02" | "57P03" => (Disposition::Reconnect, ExitCode::Unavailable),
        "53300" => (Disposition::Reconnect, ExitCode::TryAgain),
        "28000" | "28P01" | "42501" => (Disposition::Operator, ExitCode::Permission),
        _ if sqlstate.starts_with("53") => (Disposition::Reconnect, ExitCode::Unavailable),
        _ if sqlstate.starts_with("XX") => (Disposition::Reconnect, ExitCode::Unavailable),
        _ => (Disposition::Operator, ExitCode::Config),
    }
}

fn connect_hint(peer: &Peer, error: &ServerError) -> Option<String> {
    Some(match error.sqlstate.as_str() {
        "28P01" => format!("the password for user {} is wrong, or the role does not exist or has none.", peer.user),
        "28000" => format!("{} Or the role does not exist or may not log in.", peer.hba_hint()),
        "42501" if peer.physical => format!("run `ALTER ROLE {} REPLICATION` on the server.", quote_ident(&peer.user)),
        "42501" => format!("grant user {} CONNECT on database {}.", peer.user, peer.database),
        "53300" if peer.physical => {
            "raise max_wal_senders (or max_connections) on the server, or end walsenders that are not needed."
                .to_string()
        }
        "53300" => "raise max_connections on the server, or end connections that are not needed.".to_string(),
        "57P03" => "the server is starting, stopping or recovering; it will be tried again.".to_string(),
        "57P01" | "57P02" => "the server ended the session; it will be tried again.".to_string(),
        // PostgreSQL looks up no database for a physical walsender and knows the parameter: this is no PostgreSQL.
        "08P01" | "3D000" if peer.physical => POOLER_HINT.to_string(),
        "3D000" => format!("database {} does not exist; name another one.", peer.database),
        "42704" | "22023" => "is every setting in `options` known to this server's version?".to_string(),
        _ => return error.hint.clone(),
    })
}

/// A name as SQL quotes it, unless it needs no quotes.
fn quote_ident(name: &str) -> String {
    let plain = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_')
        && !name.starts_with(|c: char| c.is_ascii_digit());
    if plain { name.to_string() } else { format!("\"{}\"", name.replace('"', "\"\"")) }
}

/// What went wrong on an open connection.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplicationError {
    #[error("could not {phase}: {error}", phase = .0.phase, error = .0)]
    Server(Box<ServerError>),
    /// The peer vanished: EOF without a word.
    #[error("could not {phase}: the server closed the connection")]
    Closed { phase: Phase },
    #[error("could not {phase}: the connection broke: {cause}")]
    Io { phase: Phase, kind: io::ErrorKind, cause: String },
    #[error("could not {phase}: no answer within {after:?}")]
    Timeout { phase: Phase, after: Duration },
    #[error("could not {phase}: {error}")]
    Protocol { phase: Phase, error: ProtocolError },
    /// The server answered in due form, but not with what the command promises.
    #[error("could not {phase}: {cause}")]
    Answer { phase: Phase, cause: String },
    /// The server has sent everything and is shutting down (CommandComplete within the stream).
    #[error("the server ended the stream: it is shutting down")]
    ServerStopping,
    /// A call this connection is not ready for: a bug of ours.
    #[error("could not {phase}: the connection is {state}")]
    Misuse { phase: Phase, state: &'static str },
}

impl ReplicationError {
    pub fn sqlstate(&self) -> Option<&str> {
        match self {
            ReplicationError::Server(error) => Some(&error.sqlstate),
            _ => None,
        }
    }

    /// Whether the same connection takes further commands after this error.
    pub fn leaves_connection_usable(&self) -> bool {
        match self {
            ReplicationError::Server(error) => !error.is_fatal(),
            ReplicationError::Answer { .. } => true,
            _ => false,
        }
    }
}

impl Advice for ReplicationError {
    fn hint(&self) -> Option<String> {
        match self {
            ReplicationError::Server(error) => server_hint(error),
            ReplicationError::Timeout { .. } => Some("is the server overloaded, or the network cut?".to_string()),
            ReplicationError::Protocol { .. } => Some("is something other than PostgreSQL in the path?".to_string()),
            _ => None,
        }
    }

    fn disposition(&self) -> Disposition {
        match self {
            ReplicationError::Server(error) => server_verdict(error).0,
            ReplicationError::Answer { .. } => Disposition::Operator,
            ReplicationError::Misuse { .. } => Disposition::Stop,
            _ => Disposition::Reconnect,
        }
    }

    fn exit_code(&self) -> ExitCode {
        match self {
            ReplicationError::Server(error) => server_verdict(error).1,
            ReplicationError::Protocol { .. } | ReplicationError::Answer { .. } => ExitCode::Data,
            ReplicationError::Misuse { .. } => ExitCode::Internal,
            _ => ExitCode::Unavailable,
        }
    }
}

fn server_verdict(error: &ServerError) -> (Disposition, ExitCode) {
    match error.sqlstate.as_str() {
        "55006" => (Disposition::Retry, ExitCode::TryAgain),
        "57P01" | "57P02" | "57P03" => (Disposition::Reconnect, ExitCode::Unavailable),
        "53300" => (Disposition::Reconnect, ExitCode::TryAgain),
        "42501" | "28000" | "28P01" => (Disposition::Operator, ExitCode::Permission),
        "42704" | "42710" | "42602" | "42601" | "0A000" => (Disposition::Operator, ExitCode::Config),
        // Segment removed, slot lost: the archive has a gap whatever is done now.
        "58P01" => (Disposition::Operator, ExitCode::Finding),
        "55000" if error.phase == Phase::StartReplication => (Disposition::Operator, ExitCode::Finding),
        // Ahead of the server or off its history: another server than before. May be a standby that lags.
        "XX000" if error.phase == Phase::StartReplication => (Disposition::Operator, ExitCode::Data),
        _ => (Disposition::Reconnect, ExitCode::Unavailable),
    }
}

fn server_hint(error: &ServerError) -> Option<String> {
    let starting = matches!(error.phase, Phase::StartReplication | Phase::Streaming);
    Some(match error.sqlstate.as_str() {
        "42704" if starting => {
            "the slot does not exist on this server; after a failover it must be created again.".into()
        }
        "55006" => {
            "another session uses the slot: a second archiver, or our last session until wal_sender_timeout.".into()
        }
        "58P01" if starting => {
            "the server has removed this WAL: the archive has a gap from here; take a new base backup.".into()
        }
        "55000" if starting => {
            "if the slot was invalidated, drop it, let it be created again and take a new base backup; if the server \
             is stopping, try again later."
                .into()
        }
        "XX000" if error.phase == Phase::StartReplication => {
            "the archive holds WAL this server does not have: is it another server, or a standby that lags?".into()
        }
        "53400" => "raise max_replication_slots on the server, or drop slots that are not needed.".into(),
        "42501" => "the role needs the REPLICATION attribute (`ALTER ROLE … REPLICATION`).".into(),
        // A walsender knows its own commands; an ordinary session takes them for bad SQL.
        "42601" if error.phase == Phase::Command("IDENTIFY_SYSTEM") => POOLER_HINT.to_string(),
        _ => return error.hint.clone(),
    })
}

/// Why START_REPLICATION (or the stream it began) was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StartFault {
    SlotMissing,
    SlotBusy,
    /// Invalidated (18 and later say so), or not usable for physical replication; or the server is stopping:
    /// they share 55000, so look at the slot before deciding.
    SlotLost,
    SegmentRemoved,
    /// The server has no such WAL: told apart by what is already known (its flush LSN, its history).
    AheadOfServerOrNotInHistory,
    Other,
}

impl StartFault {
    /// `None` when it was not the server that refused.
    pub fn of(error: &ReplicationError) -> Option<StartFault> {
        Some(match error.sqlstate()? {
            "42704" => StartFault::SlotMissing,
            "55006" => StartFault::SlotBusy,
            "55000" => StartFault::SlotLost,
            "58P01" => StartFault::SegmentRemoved,
            "XX000" => StartFault::AheadOfServerOrNotInHistory,
            _ => StartFault::Other,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(fields: &[(u8, &str)]) -> Vec<u8> {
        let mut body = Vec::new();
        for (kind, value) in fields {
            body.push(*kind);
            body.extend_from_slice(value.as_bytes());
            body.push(0);
        }
        body.push(0);
        body
    }

    fn peer(physical: bool) -> Peer {
        let database = if physical { "replication" } else { "app" }.to_string();
        Peer { target: "db:5432".into(), user: "Arch".into(), database, physical, unix: false }
    }

    fn refused(sqlstate: &str) -> ConnectError {
        let error = ServerError::decode(&body(&[(b'C', sqlstate), (b'V', "FATAL"), (b'M', "nein")]), Phase::Connect);
        ConnectError::Server { peer: peer(true).into(), error: error.into() }
    }

    #[test]
    fn a_servers_text_cannot_drive_a_terminal() {
        let raw = body(&[(b'S', "FEHLER"), (b'M', "a\x1b[31m\nb\u{202e}c"), (b'D', "d\r")]);
        let error = ServerError::decode(&raw, Phase::Connect);
        assert_eq!(error.message, "a\\u{1b}[31m\\nb\\u{202e}c");
        assert_eq!(error.detail.as_deref(), Some("d\\r"));
        assert_eq!(error.severity, "ERROR");
        assert!(escape(&"x".repeat(100_000)).len() < 1010);
    }

    #[test]
    fn a_damaged_error_is_still_an_error() {
        for raw in [&b""[..], b"M", b"Mno end", b"C42", b"\0", b"M\0C"] {
            ServerError::decode(raw, Phase::Streaming);
        }
        let lossy = ServerError::decode(b"M\xff\xfe\0\0", Phase::Streaming);
        assert_eq!(lossy.message, "\u{fffd}\u{fffd}");
    }

    #[test]
    fn refusals_tell_the_operator_what_to_do() {
        let hint = |sqlstate| refused(sqlstate).hint().unwrap();
        assert!(hint("28000").contains("host replication Arch"), "{}", hint("28000"));
        assert!(hint("28000").contains("`replication`"));
        assert!(hint("42501").contains("ALTER ROLE \"Arch\" REPLICATION"));
        assert!(hint("53300").contains("max_wal_senders"));
        assert!(hint("08P01").contains("direct connection"));
        assert!(hint("28P01").contains("password"));
        assert_eq!(refused("28P01").exit_code(), ExitCode::Permission);
        assert_eq!(refused("53300").exit_code(), ExitCode::TryAgain);
        assert_eq!(refused("57P03").disposition(), Disposition::Reconnect);
        assert_eq!(refused("57P03").exit_code(), ExitCode::Unavailable);
        assert_eq!(refused("42704").exit_code(), ExitCode::Config);
    }

    #[test]
    fn start_faults_go_by_sqlstate() {
        let fault = |sqlstate: &str| {
            let error = ServerError::decode(&body(&[(b'C', sqlstate), (b'M', "x")]), Phase::StartReplication);
            StartFault::of(&ReplicationError::Server(error.into())).unwrap()
        };
        assert_eq!(fault("42704"), StartFault::SlotMissing);
        assert_eq!(fault("55006"), StartFault::SlotBusy);
        assert_eq!(fault("55000"), StartFault::SlotLost);
        assert_eq!(fault("58P01"), StartFault::SegmentRemoved);
        assert_eq!(fault("XX000"), StartFault::AheadOfServerOrNotInHistory);
        assert_eq!(fault("57P01"), StartFault::Other);
        assert_eq!(StartFault::of(&ReplicationError::ServerStopping), None);
    }
}
