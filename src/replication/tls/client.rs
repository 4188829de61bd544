//! Owns: one TLS handshake with a server as the login asks for it, and what it found out.
//! Does not own: whether TLS is to be used at all, and what is done when it fails (`tls`).

use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::{fmt, io};

use rustls::client::ResolvesClientCert;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::ServerName;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ProtocolVersion, SignatureScheme, version};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::Transport;
use super::certificate::Certificate;
use super::fault::TlsFault;
use super::files;
use super::verify::{Demand, Findings, Trust, Verifier};
use crate::replication::error::escape;
use crate::replication::security::{CertMode, Roots, Security, SslMode, TlsVersion};

/// As libpq since 17; older servers ignore it.
const ALPN: &[u8] = b"postgresql";

/// What an encrypted session's handshake found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFacts {
    /// `TLSv1.3`.
    pub version: &'static str,
    /// How far the server was verified: `not verified`, `verify-ca`, `verify-full`.
    pub verified: &'static str,
    /// `tls-server-end-point`; why there is none otherwise.
    pub end_point: Result<Vec<u8>, String>,
    pub certificate_requested: bool,
    pub certificate_sent: bool,
}

/// A TLS stream and what its handshake found out.
#[derive(Debug)]
pub struct TlsTransport {
    stream: TlsStream<TcpStream>,
    facts: TlsFacts,
}

impl Transport for TlsTransport {
    fn tls(&self) -> Option<&TlsFacts> {
        Some(&self.facts)
    }
}

/// Does the handshake.
pub async fn shake_hands(
    stream: TcpStream,
    host: &str,
    ssl_mode: SslMode,
    security: &Security,
) -> Result<TlsTransport, TlsFault> {
    let name = server_name(host, &stream);
    let demand = demand(host, ssl_mode, security)?;
    let verified = match &demand {
        Demand::Nothing => "not verified",
        Demand::Chain(_) => "verify-ca",
        Demand::Name(..) => "verify-full",
    };
    let findings = Arc::new(Mutex::new(Findings::default()));
    let identity = Arc::new(Identity::read(security)?);
    let config = client_config(demand, findings.clone(), identity.clone(), security)?;
    let stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await;
    let mut findings = findings.lock().expect("no holder panics");
    let stream = stream.map_err(|error| match findings.refusal.take() {
        Some(refusal) => TlsFault::Certificate(refusal),
        None if error.get_ref().is_some_and(|cause| cause.is::<rustls::Error>()) => {
            TlsFault::Handshake(escape(&error.to_string()))
        }
        None => TlsFault::Broken(error.to_string()),
    })?;
    let (_, session) = stream.get_ref();
    if security.direct && session.alpn_protocol() != Some(ALPN) {
        return Err(TlsFault::NoAlpn);
    }
    let version = match session.protocol_version() {
        Some(ProtocolVersion::TLSv1_3) => "TLSv1.3",
        _ => "TLSv1.2",
    };
    let end_point = findings.end_point.take().unwrap_or_else(|| Err("the server showed no certificate".to_string()));
    let certificate = identity.shown.load(Ordering::Relaxed);
    let facts = TlsFacts {
        version,
        verified,
        end_point,
        certificate_requested: certificate >= REQUESTED,
        certificate_sent: certificate == SENT,
    };
    Ok(TlsTransport { stream, facts })
}

/// The name for SNI; a host TLS knows no name for goes without, by its address.
fn server_name(host: &str, stream: &TcpStream) -> ServerName<'static> {
    ServerName::try_from(host.to_string()).unwrap_or_else(|_| {
        let address = stream.peer_addr().map_or(std::net::IpAddr::from([0, 0, 0, 0]), |address| address.ip());
        ServerName::IpAddress(address.into())
    })
}

/// A file of roots that is there is used in every mode, as in libpq; without one, only `verify-*` refuses to go on.
fn demand(host: &str, ssl_mode: SslMode, security: &Security) -> Result<Demand, TlsFault> {
    let no_roots = |path| match ssl_mode.verifies() {
        true => Err(TlsFault::NoRoots { mode: ssl_mode.name(), path }),
        false => Ok(Demand::Nothing),
    };
    let (source, certificates) = match &security.roots {
        Roots::System => ("the system's store".to_string(), files::system_roots()?),
        Roots::Nowhere => return no_roots(None),
        Roots::File(path) => match files::roots(path)? {
            Some(certificates) => (path.display().to_string(), certificates),
            None => return no_roots(Some(path.clone())),
        },
    };
    let (file, directory) = (security.crl.as_deref(), security.crl_directory.as_deref());
    let default = security.crl_default.as_deref().filter(|_| security.roots != Roots::System);
    let revocations = files::revocations(file, directory, default)?;
    let trust = Trust { source, certificates, revocations };
    Ok(match ssl_mode {
        SslMode::VerifyFull => Demand::Name(trust, host.to_string()),
        _ => Demand::Chain(trust),
    })
}

fn client_config(
    demand: Demand,
    findings: Arc<Mutex<Findings>>,
    identity: Arc<Identity>,
    security: &Security,
) -> Result<ClientConfig, TlsFault> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let algorithms = provider.signature_verification_algorithms;
    let all = [(TlsVersion::V12, &version::TLS12), (TlsVersion::V13, &version::TLS13)];
    let offered = |(version, _): &(TlsVersion, _)| (security.min_version..=security.max_version).contains(version);
    let versions: Vec<_> = all.into_iter().filter(offered).map(|(_, version)| version).collect();
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions)
        .map_err(|error| TlsFault::Handshake(error.to_string()))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier { demand, algorithms, findings }))
        .with_client_cert_resolver(identity);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = security.sni;
    Ok(config)
}

const REQUESTED: u8 = 1;
const SENT: u8 = 2;

/// The client's certificate, if there is one, and whether the server wanted and got it.
struct Identity {
    key: Option<Arc<CertifiedKey>>,
    shown: AtomicU8,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Identity")
    }
}

impl Identity {
    fn read(security: &Security) -> Result<Identity, TlsFault> {
        let path = security.certificate.as_deref().filter(|_| security.cert_mode != CertMode::Disable);
        let found = path.map(|path| files::identity(path, security.key.as_deref())).transpose()?.flatten();
        let key = found.map(|found| certified(found, &aws_lc_rs::default_provider())).transpose()?;
        Ok(Identity { key: key.map(Arc::new), shown: AtomicU8::new(0) })
    }
}

/// Not by rustls' own functions, which read certificates of version 3 only.
fn certified(found: files::Identity, provider: &CryptoProvider) -> Result<CertifiedKey, TlsFault> {
    let fault = |what, path: &std::path::Path, cause: String, hint| TlsFault::File {
        what,
        path: path.to_path_buf(),
        cause,
        hint,
    };
    let (certificate_path, key_path) = (found.certificate_path, found.key_path);
    let key = provider.key_provider.load_private_key(found.key);
    let key = key
        .map_err(|error| fault("private key", &key_path, format!("{error}"), "is it an RSA, ECDSA or Ed25519 key?"))?;
    let ours = Certificate::read(&found.chain[0])
        .map_err(|cause| fault("client certificate", &certificate_path, cause, "is it the right file?"))?;
    if key.public_key().is_some_and(|public| public != ours.public_key()) {
        let cause = format!("it is not the key of the certificate {}", certificate_path.display());
        return Err(fault("private key", &key_path, cause, "were both replaced when the certificate was renewed?"));
    }
    Ok(CertifiedKey::new(found.chain, key))
}

impl ResolvesClientCert for Identity {
    fn resolve(&self, _issuers: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        // As OpenSSL: whatever issuers the server hints at, it gets the one there is.
        let fits = self.key.as_ref().filter(|certified| certified.key.choose_scheme(schemes).is_some());
        self.shown.store(if fits.is_some() { SENT } else { REQUESTED }, Ordering::Relaxed);
        fits.cloned()
    }

    /// True, so that `resolve` is asked and the request noticed.
    fn has_certs(&self) -> bool {
        true
    }
}

impl AsyncRead for TlsTransport {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for TlsTransport {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
