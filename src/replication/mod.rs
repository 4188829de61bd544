//! The replication protocol, client side: our own, on `postgres-protocol`'s frames.
//!
//! Owns: start-up, authentication, TLS, replication commands, the streaming sub-protocol, simple queries.
//! Does not own: which host to try and with which settings (`postgres`), what the WAL means (`wal`),
//! what is acknowledged (`receiver`). Rests on `proto-notes/01-startup.md` to `03-streaming.md`.

pub mod base_backup;
pub mod command;
pub mod connection;
pub mod error;
pub mod framing;
pub mod handshake;
pub mod message;
pub mod security;
pub mod tls;

use std::fmt;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::secret::Secret;

pub use command::{InvalidSlotName, QueryResult, SlotName, SlotReading, SystemIdentity, TimelineEnd};
pub use connection::{BackupWord, Connection, Start, StreamEvent};
pub use error::{ConnectError, Phase, ReplicationError, ServerError, StartFault};
pub use message::StatusUpdate;
pub use security::{AuthPolicy, CertMode, ChannelBinding, Roots, Security, SslMode, TlsVersion};
pub use tls::{Dial, NetDialer, TlsFacts, Transport};

/// Where one server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// `ip` overrides resolving `host`; `host` stays the name TLS and the passfile see.
    Tcp { host: String, ip: Option<IpAddr>, port: u16 },
    /// The socket `<directory>/.s.PGSQL.<port>`; a directory starting with `@` is in the abstract namespace.
    Unix { directory: PathBuf, port: u16 },
}

impl Address {
    /// Whether others could listen in: neither a socket of this machine nor its loopback.
    pub fn is_remote(&self) -> bool {
        match self {
            Address::Unix { .. } => false,
            Address::Tcp { ip: Some(ip), .. } => !ip.is_loopback(),
            Address::Tcp { host, .. } => match host.parse::<IpAddr>() {
                Ok(ip) => !ip.is_loopback(),
                Err(_) => host != "localhost",
            },
        }
    }
}

/// `host:port`, `[ip]:port` where the host is an IPv6 address, or the socket's path.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Address::Tcp { host, port, .. } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Address::Tcp { host, port, .. } => write!(f, "{host}:{port}"),
            Address::Unix { directory, port } => write!(f, "{}/.s.PGSQL.{port}", directory.display()),
        }
    }
}

/// What a session is for: the server treats them differently from the start-up packet on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SessionKind {
    /// A physical walsender (`replication=true`): replication commands, no SQL.
    Physical,
    /// An ordinary session on a database: SQL by simple query.
    Sql { database: String },
}

/// One attempt to open one session on one server.
#[derive(Clone, Debug)]
pub struct Login {
    pub address: Address,
    pub ssl_mode: SslMode,
    pub security: Security,
    pub user: String,
    pub password: Option<Secret>,
    pub kind: SessionKind,
    pub application_name: String,
    /// The start-up packet's `options` (`-c name=value …`); empty for none.
    pub options: String,
    /// For the whole of connecting, TLS and authentication.
    pub connect_timeout: Duration,
    /// For each answer to a command (not for streaming).
    pub answer_timeout: Duration,
    /// `SO_KEEPALIVE` idle, interval, count; `None` switches it off.
    pub keepalive: Option<(Duration, Duration, u32)>,
    pub tcp_user_timeout: Option<Duration>,
}
