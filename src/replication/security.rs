//! Owns: what a connection string says about TLS, channel binding and methods of authentication, as plain values.
//! Does not own: how it is spelt (`postgres`), TLS itself (`tls`), the handshake (`handshake`).
//! proto-notes/01-startup.md, "transport" and "authentication".

use std::fmt;
use std::path::PathBuf;

/// libpq's `sslmode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SslMode {
    Disable,
    /// Without TLS first; with it when the server refuses that.
    Allow,
    /// With TLS first; without it when that cannot be had.
    Prefer,
    /// Verifies the chain, as `verify-ca`, when the file of roots exists.
    Require,
    VerifyCa,
    VerifyFull,
}

impl SslMode {
    pub fn name(self) -> &'static str {
        match self {
            SslMode::Disable => "disable",
            SslMode::Allow => "allow",
            SslMode::Prefer => "prefer",
            SslMode::Require => "require",
            SslMode::VerifyCa => "verify-ca",
            SslMode::VerifyFull => "verify-full",
        }
    }

    /// The chain must be verified: no roots is an error, not a licence.
    pub fn verifies(self) -> bool {
        matches!(self, SslMode::VerifyCa | SslMode::VerifyFull)
    }

    /// Whether a session without TLS will do.
    pub fn permits_plain(self) -> bool {
        matches!(self, SslMode::Disable | SslMode::Allow | SslMode::Prefer)
    }
}

/// Whom to trust.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Roots {
    /// No file is named and there is no home to look for one.
    #[default]
    Nowhere,
    File(PathBuf),
    /// `sslrootcert=system`.
    System,
}

/// The protocol versions offered; nothing older than 1.2 exists here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TlsVersion {
    V12,
    V13,
}

/// `channel_binding`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ChannelBinding {
    Disable,
    #[default]
    Prefer,
    Require,
}

/// `sslcertmode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CertMode {
    Disable,
    #[default]
    Allow,
    Require,
}

/// Everything beside `sslmode`. Files are named here and read at every attempt: certificates are rotated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Security {
    pub roots: Roots,
    /// `sslcert`, or where libpq looks for one.
    pub certificate: Option<PathBuf>,
    pub key: Option<PathBuf>,
    pub cert_mode: CertMode,
    /// Named on purpose: it must be there.
    pub crl: Option<PathBuf>,
    pub crl_directory: Option<PathBuf>,
    /// libpq's own place, used when it exists.
    pub crl_default: Option<PathBuf>,
    pub sni: bool,
    pub min_version: TlsVersion,
    pub max_version: TlsVersion,
    /// `sslnegotiation=direct`: the first byte is TLS (servers from 17 on).
    pub direct: bool,
    pub channel_binding: ChannelBinding,
    pub require_auth: Option<AuthPolicy>,
}

impl Default for Security {
    fn default() -> Security {
        Security {
            roots: Roots::Nowhere,
            certificate: None,
            key: None,
            cert_mode: CertMode::Allow,
            crl: None,
            crl_directory: None,
            crl_default: None,
            sni: true,
            min_version: TlsVersion::V12,
            max_version: TlsVersion::V13,
            direct: false,
            channel_binding: ChannelBinding::Prefer,
            require_auth: None,
        }
    }
}

/// How a server lets somebody in, by `require_auth`'s words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AuthMethod {
    Password,
    Md5,
    Gss,
    Sspi,
    Scram,
    Oauth,
    /// Nothing is asked for: `trust`, or a client certificate.
    None,
}

impl AuthMethod {
    pub const ALL: [AuthMethod; 7] = [
        AuthMethod::Password,
        AuthMethod::Md5,
        AuthMethod::Gss,
        AuthMethod::Sspi,
        AuthMethod::Scram,
        AuthMethod::Oauth,
        AuthMethod::None,
    ];

    pub fn name(self) -> &'static str {
        match self {
            AuthMethod::Password => "password",
            AuthMethod::Md5 => "md5",
            AuthMethod::Gss => "gss",
            AuthMethod::Sspi => "sspi",
            AuthMethod::Scram => "scram-sha-256",
            AuthMethod::Oauth => "oauth",
            AuthMethod::None => "none",
        }
    }
}

/// `require_auth`: the methods allowed, or, with `!` before each, those forbidden.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthPolicy {
    methods: Vec<AuthMethod>,
    negated: bool,
}

impl AuthPolicy {
    /// `None` for a list libpq refuses: empty or unknown words, repetitions, `!` before some only.
    pub fn parse(text: &str) -> Option<AuthPolicy> {
        let mut policy = AuthPolicy { methods: Vec::new(), negated: text.starts_with('!') };
        for word in text.split(',') {
            let name = word.strip_prefix('!').unwrap_or(word);
            let method = AuthMethod::ALL.into_iter().find(|method| method.name() == name)?;
            if (name.len() != word.len()) != policy.negated || policy.methods.contains(&method) {
                return None;
            }
            policy.methods.push(method);
        }
        Some(policy)
    }

    pub fn allows(&self, method: AuthMethod) -> bool {
        self.methods.contains(&method) != self.negated
    }
}

impl fmt::Display for AuthPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let not = if self.negated { "!" } else { "" };
        let words: Vec<String> = self.methods.iter().map(|method| format!("{not}{}", method.name())).collect();
        f.write_str(&words.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn require_auth_is_libpqs_list() {
        let parse = |text: &str| AuthPolicy::parse(text);
        let one = parse("scram-sha-256,md5").unwrap();
        assert!(one.allows(AuthMethod::Scram) && one.allows(AuthMethod::Md5));
        assert!(!one.allows(AuthMethod::Password) && !one.allows(AuthMethod::None));
        let not = parse("!password,!md5").unwrap();
        assert!(not.allows(AuthMethod::Scram) && not.allows(AuthMethod::None) && !not.allows(AuthMethod::Md5));
        assert!(!parse("!none").unwrap().allows(AuthMethod::None));
        assert_eq!(not.to_string(), "!password,!md5");
        for wrong in ["", ",", "md5,", "md5,md5", "md5,!password", "!md5,password", "scram", "MD5", " md5", "!!md5"] {
            assert_eq!(parse(wrong), None, "{wrong}");
        }
    }
}
