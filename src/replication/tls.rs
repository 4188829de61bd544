//! Owns: how a transport is opened: TCP with its options, Unix sockets, and whether TLS goes on top, as `sslmode` says.
//! Does not own: anything said over it; the handshake (`client`), whether a certificate is believed (`verify`).
//! proto-notes/01-startup.md, "transport".

pub mod certificate;
mod client;
pub mod fault;
mod files;
pub mod names;
mod verify;

use std::collections::BTreeSet;
use std::fmt::Debug;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpStream, UnixStream};

pub use client::TlsFacts;

use super::error::{ConnectError, escape};
use super::{Address, Login, SslMode};

/// SSLRequest: its length and its magic number.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// The least time one of several addresses gets: shorter ones would fail over slow networks.
const ADDRESS_TIMEOUT_MIN: Duration = Duration::from_secs(1);

/// A byte stream to a server.
pub trait Transport: AsyncRead + AsyncWrite + Unpin + Send {
    /// What the TLS handshake found out; `None` without TLS.
    fn tls(&self) -> Option<&TlsFacts> {
        None
    }
}

impl Transport for TcpStream {}
impl Transport for UnixStream {}
impl Transport for DuplexStream {}

/// How a transport is opened. The real one dials; the simulation hands out duplex streams.
#[async_trait]
pub trait Dial: Send + Sync + Debug {
    async fn dial(&self, login: &Login) -> Result<Box<dyn Transport>, ConnectError>;
}

/// Dials over the network.
#[derive(Clone, Copy, Debug, Default)]
pub struct NetDialer;

#[async_trait]
impl Dial for NetDialer {
    async fn dial(&self, login: &Login) -> Result<Box<dyn Transport>, ConnectError> {
        let host = match &login.address {
            // TLS is never used on a Unix socket, whatever sslmode says, as in libpq.
            Address::Unix { directory, port } => return dial_unix(login, directory, *port).await,
            Address::Tcp { host, .. } => host,
        };
        if login.ssl_mode == SslMode::Disable {
            return Ok(Box::new(dial_tcp(login).await?));
        }
        match negotiate_tls(login, host).await {
            // `prefer` tries again without TLS when the server is there but TLS fails, whatever the reason; an answer
            // that is none ends the attempt, in every mode.
            Err(ConnectError::Tls { fault, .. }) if login.ssl_mode == SslMode::Prefer => {
                let plain = dial_tcp(login).await?;
                tell_once(&login.address, &format!("TLS failed, and sslmode=prefer goes on without it: {fault}"));
                Ok(Box::new(plain))
            }
            outcome => outcome,
        }
    }
}

/// Logs what weakens the connection to a server, once for each text: sessions are opened every few seconds.
pub(super) fn tell_once(address: &Address, what: &str) {
    static TOLD: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    /// Causes are few; a server that invents them does not fill our memory.
    const TOLD_MAX: usize = 1000;
    let text = format!("{}: {what}", escape(&address.to_string()));
    let mut told = TOLD.lock().expect("no holder panics");
    if told.len() < TOLD_MAX && told.insert(text.clone()) {
        tracing::warn!("{text}");
    }
}

async fn dial_unix(login: &Login, directory: &Path, port: u16) -> Result<Box<dyn Transport>, ConnectError> {
    let stream = UnixStream::connect(socket_path(directory, port)).await;
    let stream = stream.map_err(|error| ConnectError::Network {
        target: escape(&login.address.to_string()),
        tried: vec![error.to_string()],
    })?;
    Ok(Box::new(stream))
}

/// The socket's path; a leading zero byte, which `tokio` takes for the abstract namespace, stands for a leading `@`.
fn socket_path(directory: &Path, port: u16) -> PathBuf {
    let path = directory.join(format!(".s.PGSQL.{port}"));
    match path.to_str().and_then(|path| path.strip_prefix('@')) {
        Some(name) => PathBuf::from(format!("\0{name}")),
        None => path,
    }
}

/// Tries every address the name resolves to, in the resolver's order; names are resolved at each attempt.
async fn dial_tcp(login: &Login) -> Result<TcpStream, ConnectError> {
    let target = escape(&login.address.to_string());
    let addresses = match resolve(&login.address).await {
        Ok(addresses) => addresses,
        Err(error) => return Err(ConnectError::Network { target, tried: vec![error.to_string()] }),
    };
    let mut tried = Vec::new();
    // One silent address must not use up the time of the others.
    let share = login.connect_timeout / addresses.len().max(1) as u32;
    for address in addresses {
        let cause = match tokio::time::timeout(share.max(ADDRESS_TIMEOUT_MIN), TcpStream::connect(address)).await {
            Ok(Ok(stream)) => match prepare(&stream, login) {
                Ok(()) => return Ok(stream),
                Err(error) => error.to_string(),
            },
            Ok(Err(error)) => error.to_string(),
            Err(_) => "no answer".to_string(),
        };
        tried.push(format!("{address}: {cause}"));
    }
    Err(ConnectError::Network { target, tried })
}

async fn resolve(address: &Address) -> io::Result<Vec<SocketAddr>> {
    let addresses: Vec<_> = match address {
        Address::Tcp { ip: Some(ip), port, .. } => vec![SocketAddr::new(*ip, *port)],
        Address::Tcp { host, port, .. } => tokio::net::lookup_host((host.as_str(), *port)).await?.collect(),
        Address::Unix { .. } => Vec::new(),
    };
    if addresses.is_empty() { Err(io::Error::other("the name resolves to no address")) } else { Ok(addresses) }
}

/// Keepalives and TCP_USER_TIMEOUT find a vanished peer; no Nagle, because every status update is wanted at once.
fn prepare(stream: &TcpStream, login: &Login) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let socket = SockRef::from(stream);
    if let Some((idle, interval, count)) = login.keepalive {
        socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(count))?;
    }
    if login.tcp_user_timeout.is_some() {
        socket.set_tcp_user_timeout(login.tcp_user_timeout)?;
    }
    Ok(())
}

async fn negotiate_tls(login: &Login, host: &str) -> Result<Box<dyn Transport>, ConnectError> {
    let target = escape(&login.address.to_string());
    let mut stream = dial_tcp(login).await?;
    if !login.security.direct && !ask_for_tls(&mut stream, &target).await? {
        return match login.ssl_mode.permits_plain() {
            true => Ok(Box::new(stream)),
            false => Err(ConnectError::TlsNotOffered { target, mode: login.ssl_mode.name() }),
        };
    }
    let shaken = client::shake_hands(stream, host, login.ssl_mode, &login.security).await;
    let transport = shaken.map_err(|fault| ConnectError::Tls { target, fault: fault.into() })?;
    Ok(Box::new(transport))
}

/// Sends SSLRequest; whether the server speaks TLS from here on.
async fn ask_for_tls(stream: &mut TcpStream, target: &str) -> Result<bool, ConnectError> {
    let broken = |error: io::Error| ConnectError::Network {
        target: target.to_string(),
        tried: vec![format!("TLS request: {error}")],
    };
    stream.write_all(&SSL_REQUEST).await.map_err(broken)?;
    // Exactly one byte: what follows belongs to TLS, or to nobody (CVE-2021-23222).
    match stream.read_u8().await.map_err(broken)? {
        b'S' => Ok(true),
        b'N' => Ok(false),
        // An error text here comes from nobody who has proven anything: it is not shown (CVE-2024-10977).
        b'E' => Err(ConnectError::TlsError { target: target.to_string() }),
        _ => Err(ConnectError::TlsAnswer { target: target.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_have_postgresqls_paths() {
        assert_eq!(socket_path(Path::new("/run/pg"), 5433), Path::new("/run/pg/.s.PGSQL.5433"));
        assert_eq!(socket_path(Path::new("@pg"), 5432), Path::new("\0pg/.s.PGSQL.5432"));
    }

    #[test]
    fn the_tls_request_is_postgresqls() {
        assert_eq!(SSL_REQUEST[4..], 80_877_103u32.to_be_bytes());
    }
}
