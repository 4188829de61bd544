//! Owns: how a transport is opened: TCP with its options, Unix sockets, and TLS on top as `sslmode` says.
//! Does not own: anything said over it. Certificates are not verified in this version (`prefer` and `require`, as
//! libpq without a root file): TLS keeps listeners out, not impostors. proto-notes/01-startup.md.

use std::fmt::Debug;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::error::{ConnectError, escape};
use super::{Address, Login, SslMode};

/// SSLRequest: its length and its magic number.
const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];

/// The least time one of several addresses gets: shorter ones would fail over slow networks.
const ADDRESS_TIMEOUT_MIN: Duration = Duration::from_secs(1);

/// A byte stream to a server.
pub trait Transport: AsyncRead + AsyncWrite + Unpin + Send {
    fn encrypted(&self) -> bool {
        false
    }
}

impl Transport for TcpStream {}
impl Transport for UnixStream {}
impl Transport for DuplexStream {}
impl Transport for TlsStream<TcpStream> {
    fn encrypted(&self) -> bool {
        true
    }
}

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
            Ok(transport) => Ok(transport),
            // `prefer` tries again without TLS when the server is there but TLS fails.
            Err(ConnectError::Tls { .. } | ConnectError::TlsAnswer { .. }) if login.ssl_mode == SslMode::Prefer => {
                Ok(Box::new(dial_tcp(login).await?))
            }
            Err(error) => Err(error),
        }
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
    let broken = |error: io::Error| ConnectError::Network {
        target: target.clone(),
        tried: vec![format!("TLS request: {error}")],
    };
    stream.write_all(&SSL_REQUEST).await.map_err(broken)?;
    // Exactly one byte: what follows belongs to TLS, or to nobody (CVE-2021-23222).
    match stream.read_u8().await.map_err(broken)? {
        b'S' => {}
        b'N' if login.ssl_mode == SslMode::Prefer => return Ok(Box::new(stream)),
        b'N' => return Err(ConnectError::TlsNotOffered { target }),
        // An error text here comes from nobody who has proven anything: it is not shown (CVE-2024-10977).
        _ => return Err(ConnectError::TlsAnswer { target }),
    }
    let name = server_name(host, &stream);
    let tls = TlsConnector::from(Arc::new(client_config())).connect(name, stream).await;
    let tls = tls.map_err(|error| ConnectError::Tls { target, cause: escape(&error.to_string()) })?;
    Ok(Box::new(tls))
}

/// The name for SNI; a host TLS knows no name for goes without, by its address.
fn server_name(host: &str, stream: &TcpStream) -> ServerName<'static> {
    ServerName::try_from(host.to_string()).unwrap_or_else(|_| {
        let address = stream.peer_addr().map_or(std::net::IpAddr::from([0, 0, 0, 0]), |address| address.ip());
        ServerName::IpAddress(address.into())
    })
}

fn client_config() -> ClientConfig {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("aws-lc-rs supports TLS 1.2 and 1.3")
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyCertificate { provider }))
        .with_no_client_auth();
    // As libpq since 17; older servers ignore it.
    config.alpn_protocols = vec![b"postgresql".to_vec()];
    config
}

/// Takes any certificate, but still demands that the server holds its key.
#[derive(Debug)]
struct AnyCertificate {
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
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
        client_config();
    }
}
