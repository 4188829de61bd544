//! Owns: why TLS was not set up, in words for whoever is woken by it.
//! Does not own: finding out (`verify`, `files`, `client`).

use std::path::PathBuf;

/// Why TLS failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TlsFault {
    #[error("could not read {what} {}: {cause}", .path.display())]
    File { what: &'static str, path: PathBuf, cause: String, hint: &'static str },
    #[error("sslmode={mode} verifies the server, and there is no file of root certificates{}", at(.path))]
    NoRoots { mode: &'static str, path: Option<PathBuf> },
    #[error("the system's root certificates could not be read: {cause}")]
    SystemRoots { cause: String },
    #[error("the server's certificate is refused: {0}")]
    Certificate(CertificateFault),
    #[error("the server spoke TLS without agreeing to the protocol `postgresql` (ALPN)")]
    NoAlpn,
    #[error("{0}")]
    Handshake(String),
    /// Not by a word of TLS: the connection ended.
    #[error("the connection broke during the handshake: {0}")]
    Broken(String),
}

fn at(path: &Option<PathBuf>) -> String {
    path.as_ref().map(|path| format!(": {} does not exist", path.display())).unwrap_or_default()
}

impl TlsFault {
    /// Whether it may pass by itself.
    pub fn is_passing(&self) -> bool {
        matches!(self, TlsFault::Broken(_))
    }

    pub fn hint(&self) -> String {
        match self {
            TlsFault::File { hint, .. } => hint.to_string(),
            TlsFault::NoRoots { .. } => {
                "name the authority's certificate by sslrootcert=…, or use sslrootcert=system for a public one.".into()
            }
            TlsFault::SystemRoots { .. } => {
                "install the system's package of CA certificates, or point SSL_CERT_FILE to a file of them.".into()
            }
            TlsFault::Certificate(fault) => fault.hint().to_string(),
            TlsFault::NoAlpn => {
                "sslnegotiation=direct needs PostgreSQL 17 or later, without a proxy that ends TLS before \
                                 it; leave it out otherwise."
                    .into()
            }
            TlsFault::Handshake(_) | TlsFault::Broken(_) => {
                "see the server's log for its side of the TLS handshake.".into()
            }
        }
    }
}

/// Why the server's certificate was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CertificateFault {
    #[error("{0}")]
    Broken(String),
    #[error("{subject} {when}")]
    OutOfDate { subject: String, when: String },
    #[error("{subject}: {why}")]
    Unfit { subject: String, why: String },
    #[error("{subject}: {why}; {place} holds {held}")]
    NoRoot { subject: String, why: String, place: String, held: String },
    #[error("{subject} was revoked")]
    Revoked { subject: String },
    #[error("it is for {names}, and the host asked for is {host}")]
    WrongName { host: String, names: String },
    #[error("it names {host} only as its common name, and an issuer of it constrains names")]
    ConstrainedCommonName { host: String },
}

impl CertificateFault {
    fn hint(&self) -> &'static str {
        match self {
            CertificateFault::Broken(_) | CertificateFault::Unfit { .. } => {
                "issue the server another certificate (X.509 version 3, for TLS servers)."
            }
            CertificateFault::OutOfDate { .. } => {
                "renew the certificate and reload the server; or is this machine's clock wrong?"
            }
            CertificateFault::NoRoot { .. } => {
                "is the server's authority in sslrootcert, and does the server send its intermediates? Or does \
                 something else answer at this address?"
            }
            CertificateFault::Revoked { .. } => "issue the server another certificate.",
            CertificateFault::WrongName { .. } => {
                "use a name of the certificate as `host` (with `hostaddr` for the address), or have the server's \
                 certificate issued for this name."
            }
            CertificateFault::ConstrainedCommonName { .. } => {
                "issue the server a certificate with a subject alternative name."
            }
        }
    }
}
