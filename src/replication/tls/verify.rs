//! Owns: whether the server that answered is the one that was meant: its chain, its names, its hold of the key.
//! Does not own: reading files (`files`), reading certificates (`certificate`), when to verify (`client`).
//!
//! Chains are built by `webpki`, whose rules are stricter than OpenSSL's. Two shapes it does not take at all are common
//! with PostgreSQL, whose own documentation makes them, and are verified here: a certificate that is itself in the file
//! of roots, and one of X.509 version 1 issued directly by a root. What OpenSSL refuses and `webpki` would take (an
//! expired root, an intermediate as the end of the chain) is refused. proto-notes/01-startup.md, "transport".

use std::sync::{Arc, Mutex};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, ServerName, TrustAnchor, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use webpki::{
    CertRevocationList, EndEntityCert, ExpirationPolicy, KeyUsage, RawPublicKeyEntity, RevocationCheckDepth,
    RevocationOptionsBuilder, UnknownStatusPolicy,
};

use super::certificate::Certificate;
use super::fault::CertificateFault;
use super::names::Match;
use crate::replication::error::escape;

/// The roots and revocation lists of one attempt.
pub struct Trust {
    /// For messages: the file, or the system.
    pub source: String,
    pub certificates: Vec<CertificateDer<'static>>,
    /// Empty: nothing is checked for revocation.
    pub revocations: Vec<CertRevocationList<'static>>,
}

/// What is demanded of the server's certificate.
pub enum Demand {
    /// Any: TLS keeps listeners out, not impostors.
    Nothing,
    Chain(Trust),
    /// The chain, and a name that is this host's.
    Name(Trust, String),
}

/// What was found out during the handshake, for whoever opened it.
#[derive(Debug, Default)]
pub struct Findings {
    pub refusal: Option<CertificateFault>,
    pub end_point: Option<Result<Vec<u8>, String>>,
}

pub struct Verifier {
    pub demand: Demand,
    pub algorithms: WebPkiSupportedAlgorithms,
    pub findings: Arc<Mutex<Findings>>,
}

impl std::fmt::Debug for Verifier {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Verifier")
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let outcome = self.examine(end_entity, intermediates, now);
        let mut findings = self.findings.lock().expect("no holder panics");
        findings.end_point = Certificate::read(end_entity).ok().map(|certificate| certificate.end_point());
        outcome.map(|()| ServerCertVerified::assertion()).map_err(|fault| {
            findings.refusal = Some(fault);
            // Its own words follow from `findings`; the server is told that its certificate was refused.
            rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)
        })
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // Not by rustls' own function, which reads certificates of version 3 only.
        let certificate = readable(certificate)?;
        let schemes = self.algorithms.mapping.iter().find(|(scheme, _)| *scheme == signature.scheme);
        let algorithms = schemes.map(|(_, algorithms)| *algorithms).unwrap_or_default();
        let key = certificate.public_key();
        let key = RawPublicKeyEntity::try_from(&key).map_err(|_| CertificateError::BadEncoding)?;
        // The key's kind decides which of a scheme's algorithms it is.
        match algorithms.iter().any(|one| key.verify_signature(*one, message, signature.signature()).is_ok()) {
            true => Ok(HandshakeSignatureValid::assertion()),
            false => Err(CertificateError::BadSignature.into()),
        }
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let certificate = readable(certificate)?;
        verify_tls13_signature_with_raw_key(message, &certificate.public_key(), signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

fn readable<'a>(der: &'a CertificateDer<'_>) -> Result<Certificate<'a>, rustls::Error> {
    Certificate::read(der).map_err(|_| CertificateError::BadEncoding.into())
}

impl Verifier {
    fn examine(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<(), CertificateFault> {
        let certificate = Certificate::read(end_entity).map_err(CertificateFault::Broken)?;
        let (trust, host) = match &self.demand {
            Demand::Nothing => return Ok(()),
            Demand::Chain(trust) => (trust, None),
            Demand::Name(trust, host) => (trust, Some(host)),
        };
        let names_constrained = self.chain(trust, &certificate, end_entity, intermediates, now)?;
        let Some(host) = host else { return Ok(()) };
        let names = certificate.names().map_err(CertificateFault::Broken)?;
        match names.find(host) {
            Match::Alternative => Ok(()),
            // `webpki` holds constraints against alternative names only.
            Match::Common if !names_constrained => Ok(()),
            Match::Common => Err(CertificateFault::ConstrainedCommonName { host: host.clone() }),
            Match::No => Err(CertificateFault::WrongName { host: host.clone(), names: names.list() }),
        }
    }

    /// Whether the chain leads to a root, and if so, whether a certificate of it constrains names.
    fn chain(
        &self,
        trust: &Trust,
        certificate: &Certificate<'_>,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<bool, CertificateFault> {
        let subject = certificate.subject();
        if let Some(when) = certificate.out_of_date(now.as_secs()) {
            return Err(CertificateFault::OutOfDate { subject, when });
        }
        if let Some(why) = certificate.unfit_for_servers() {
            return Err(CertificateFault::Unfit { subject, why: why.to_string() });
        }
        let is_root = certificate.is_self_issued() && trust.certificates.contains(end_entity);
        if is_root || certificate.is_version_1() {
            if !trust.revocations.is_empty() {
                let why = "it cannot be looked up in a revocation list".to_string();
                return Err(CertificateFault::Unfit { subject, why });
            }
            return match is_root || self.issued_by_root(trust, certificate, now) {
                true => Ok(false),
                false => Err(self.no_root(trust, certificate, now)),
            };
        }
        self.chain_of_version_3(trust, certificate, end_entity, intermediates, now)
    }

    /// An authority by OpenSSL's rules: self-issued, valid now, and allowed to sign certificates.
    fn roots<'t>(&self, trust: &'t Trust, now: UnixTime) -> impl Iterator<Item = &'t CertificateDer<'static>> {
        trust.certificates.iter().filter(move |der| {
            Certificate::read(der)
                .is_ok_and(|one| one.is_self_issued() && one.is_authority() && one.out_of_date(now.as_secs()).is_none())
        })
    }

    fn issued_by_root(&self, trust: &Trust, certificate: &Certificate<'_>, now: UnixTime) -> bool {
        self.roots(trust, now).any(|root| {
            let Ok(root) = Certificate::read(root) else { return false };
            root.subject_der() == certificate.issuer_der() && self.signed_by(certificate, &root)
        })
    }

    fn signed_by(&self, certificate: &Certificate<'_>, issuer: &Certificate<'_>) -> bool {
        let Some((content, signature, algorithm)) = certificate.signed() else { return false };
        let key = issuer.public_key();
        let Ok(key) = RawPublicKeyEntity::try_from(&key) else { return false };
        let candidates = self.algorithms.all.iter().filter(|one| one.signature_alg_id().starts_with(&algorithm));
        candidates.into_iter().any(|one| key.verify_signature(*one, content, signature).is_ok())
    }

    fn chain_of_version_3(
        &self,
        trust: &Trust,
        certificate: &Certificate<'_>,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<bool, CertificateFault> {
        let anchors: Vec<TrustAnchor<'_>> =
            self.roots(trust, now).filter_map(|root| webpki::anchor_from_trusted_cert(root).ok()).collect();
        // Other certificates of the file help to build the chain, and do not end it.
        let helpers =
            trust.certificates.iter().filter(|der| Certificate::read(der).is_ok_and(|one| !one.is_self_issued()));
        let between: Vec<CertificateDer<'_>> = intermediates.iter().chain(helpers).cloned().collect();
        let lists: Vec<&CertRevocationList<'_>> = trust.revocations.iter().collect();
        let revocation = RevocationOptionsBuilder::new(&lists).ok().map(|builder| {
            builder
                .with_depth(RevocationCheckDepth::Chain)
                .with_status_policy(UnknownStatusPolicy::Deny)
                .with_expiration_policy(ExpirationPolicy::Enforce)
                .build()
        });
        let parsed = EndEntityCert::try_from(end_entity)
            .map_err(|error| CertificateFault::Broken(format!("it is not taken: {error}")))?;
        let usage = KeyUsage::server_auth();
        let path = parsed.verify_for_usage(self.algorithms.all, &anchors, &between, now, usage, revocation, None);
        let path = path.map_err(|error| self.refused(trust, certificate, now, &error))?;
        let constrains = |der: &CertificateDer<'_>| Certificate::read(der).map_or(true, |one| one.constrains_names());
        Ok(path.anchor().name_constraints.is_some()
            || path.intermediate_certificates().any(|one| constrains(&one.der())))
    }

    fn refused(
        &self,
        trust: &Trust,
        certificate: &Certificate<'_>,
        now: UnixTime,
        error: &webpki::Error,
    ) -> CertificateFault {
        let subject = certificate.subject();
        match error {
            webpki::Error::UnknownIssuer => self.no_root(trust, certificate, now),
            webpki::Error::CertRevoked => CertificateFault::Revoked { subject },
            webpki::Error::CrlExpired { .. } | webpki::Error::UnknownRevocationStatus => {
                let why = match error {
                    webpki::Error::CrlExpired { .. } => "the revocation list that covers it is out of date",
                    _ => "no revocation list covers it, or one of its issuers",
                };
                CertificateFault::Unfit { subject, why: why.to_string() }
            }
            webpki::Error::CaUsedAsEndEntity => {
                let why = "it is an authority's certificate and not in the file of roots itself".to_string();
                CertificateFault::Unfit { subject, why }
            }
            webpki::Error::CertExpired { .. } => {
                CertificateFault::OutOfDate { subject, when: "has an intermediate that has expired".to_string() }
            }
            other => CertificateFault::Unfit { subject, why: escape(&format!("its chain is refused: {other}")) },
        }
    }

    /// Why no root was found, as exactly as can be said.
    fn no_root(&self, trust: &Trust, certificate: &Certificate<'_>, now: UnixTime) -> CertificateFault {
        let all = || trust.certificates.iter().filter_map(|der| Certificate::read(der).ok());
        let issuer = certificate.issuer();
        let expired = all().find_map(|one| {
            let is_issuer = one.subject_der() == certificate.issuer_der();
            one.out_of_date(now.as_secs()).filter(|_| is_issuer)
        });
        let namesake = all().any(|one| one.subject_der() == certificate.issuer_der());
        let why = match expired {
            Some(when) => format!("its issuer {issuer} {when}"),
            None if certificate.is_self_issued() && !namesake => "it is self-signed".to_string(),
            None if namesake => format!("{issuer} there has another key, or may not issue certificates"),
            None if certificate.is_version_1() => format!("it is of X.509 version 1, issued by {issuer}"),
            None => format!("it was issued by {issuer}"),
        };
        let held: Vec<String> = all().take(4).map(|one| one.subject()).collect();
        let count = trust.certificates.len();
        let held = if count <= 4 { held.join("; ") } else { format!("{count} roots") };
        CertificateFault::NoRoot { subject: certificate.subject(), why, place: trust.source.clone(), held }
    }
}
