//! Owns: what one certificate says: names, validity, what it may be used for, the hash channel binding takes.
//! Does not own: whether it is to be believed (`verify`).

use aws_lc_rs::digest::{self, Algorithm};
use rustls::pki_types::SubjectPublicKeyInfoDer;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;
use x509_parser::signature_algorithm::SignatureAlgorithm;
use x509_parser::time::ASN1Time;
use x509_parser::x509::{AlgorithmIdentifier, X509Name, X509Version};

use super::names::Names;
use crate::replication::error::escape;

/// One certificate, read.
#[derive(Debug)]
pub struct Certificate<'a> {
    der: &'a [u8],
    parsed: X509Certificate<'a>,
}

impl<'a> Certificate<'a> {
    pub fn read(der: &'a [u8]) -> Result<Certificate<'a>, String> {
        match X509Certificate::from_der(der) {
            Ok((rest, parsed)) if rest.is_empty() => Ok(Certificate { der, parsed }),
            Ok(_) => Err("bytes follow the certificate".to_string()),
            Err(error) => Err(format!("it is no X.509 certificate ({error})")),
        }
    }

    pub fn public_key(&self) -> SubjectPublicKeyInfoDer<'a> {
        self.parsed.tbs_certificate.subject_pki.raw.into()
    }

    pub fn is_version_1(&self) -> bool {
        self.parsed.version() == X509Version::V1
    }

    pub fn is_self_issued(&self) -> bool {
        self.subject_der() == self.issuer_der()
    }

    pub fn subject_der(&self) -> &[u8] {
        self.parsed.subject().as_raw()
    }

    pub fn issuer_der(&self) -> &[u8] {
        self.parsed.issuer().as_raw()
    }

    pub fn subject(&self) -> String {
        name(self.parsed.subject())
    }

    pub fn issuer(&self) -> String {
        name(self.parsed.issuer())
    }

    /// `None` while it is valid; else since or until when it is not.
    pub fn out_of_date(&self, seconds: u64) -> Option<String> {
        let (begin, end) = (self.parsed.validity().not_before, self.parsed.validity().not_after);
        let now = i64::try_from(seconds).unwrap_or(i64::MAX);
        match now {
            _ if now > end.timestamp() => Some(format!("expired on {}", date(end))),
            _ if now < begin.timestamp() => Some(format!("is not valid before {}", date(begin))),
            _ => None,
        }
    }

    /// Whether OpenSSL takes it for an authority, as `check_ca` does.
    pub fn is_authority(&self) -> bool {
        let Ok(usage) = self.parsed.key_usage() else { return false };
        let signs = usage.as_ref().is_none_or(|usage| usage.value.key_cert_sign());
        match self.parsed.basic_constraints() {
            Err(_) => false,
            Ok(Some(constraints)) => signs && constraints.value.ca,
            Ok(None) if self.is_version_1() => self.is_self_issued(),
            Ok(None) => signs && usage.is_some(),
        }
    }

    /// Whether it may stand for a TLS server; says why not.
    pub fn unfit_for_servers(&self) -> Option<&'static str> {
        const BROKEN: &str = "its extensions cannot be read";
        match self.parsed.key_usage() {
            Err(_) => return Some(BROKEN),
            Ok(Some(usage)) => {
                let usage = usage.value;
                if !(usage.digital_signature() || usage.key_encipherment() || usage.key_agreement()) {
                    return Some("its key usage is not that of a server");
                }
            }
            Ok(None) => {}
        }
        match self.parsed.extended_key_usage() {
            Err(_) => Some(BROKEN),
            Ok(Some(usage)) if !usage.value.server_auth => Some("its extended key usage does not include serverAuth"),
            Ok(_) => None,
        }
    }

    pub fn constrains_names(&self) -> bool {
        !matches!(self.parsed.name_constraints(), Ok(None))
    }

    /// An error where the alternative names cannot be read: they must not be taken for absent.
    pub fn names(&self) -> Result<Names, String> {
        const BROKEN: &str = "its subject alternative names cannot be read";
        let mut names = Names::default();
        let alternative = self.parsed.subject_alternative_name().map_err(|_| BROKEN.to_string())?;
        for general in alternative.iter().flat_map(|extension| &extension.value.general_names) {
            match general {
                GeneralName::DNSName(name) => names.dns.push(escape(name)),
                GeneralName::IPAddress(bytes) => names.addresses.push(bytes.to_vec()),
                GeneralName::Invalid(tag, _) if [2, 7].contains(&tag.0) => return Err(BROKEN.to_string()),
                _ => {}
            }
        }
        let common = self.parsed.subject().iter_common_name().next();
        names.common = common.and_then(|name| name.as_str().ok()).map(escape);
        Ok(names)
    }

    /// What was signed, the signature, and the DER of the algorithm's name; `None` where the two places that name the
    /// algorithm differ.
    pub fn signed(&self) -> Option<(&[u8], &[u8], Vec<u8>)> {
        let algorithm = &self.parsed.signature_algorithm;
        if *algorithm != self.parsed.tbs_certificate.signature {
            return None;
        }
        let oid = algorithm.algorithm.as_bytes();
        let name = [&[6, u8::try_from(oid.len()).ok()?], oid].concat();
        Some((self.parsed.tbs_certificate.as_ref(), &self.parsed.signature_value.data, name))
    }

    /// `tls-server-end-point` (RFC 5929): the hash of the whole certificate by its signature's hash, but by SHA-256
    /// for MD5 and SHA-1. A signature without one hash (Ed25519) has none.
    pub fn end_point(&self) -> Result<Vec<u8>, String> {
        let algorithm = &self.parsed.signature_algorithm;
        match signature_hash(algorithm) {
            Some(hash) => Ok(digest::digest(hash, self.der).as_ref().to_vec()),
            None => Err(format!("its signature algorithm ({}) names no hash", algorithm.algorithm)),
        }
    }
}

fn signature_hash(algorithm: &AlgorithmIdentifier<'_>) -> Option<&'static Algorithm> {
    let oid = algorithm.algorithm.to_id_string();
    match oid.as_str() {
        // md5, sha1, sha256, sha384, sha512, sha224 with RSA
        "1.2.840.113549.1.1.4" | "1.2.840.113549.1.1.5" | "1.2.840.113549.1.1.11" => Some(&digest::SHA256),
        "1.2.840.113549.1.1.12" => Some(&digest::SHA384),
        "1.2.840.113549.1.1.13" => Some(&digest::SHA512),
        "1.2.840.113549.1.1.14" => Some(&digest::SHA224),
        // ECDSA with SHA-1, 224, 256, 384, 512
        "1.2.840.10045.4.1" | "1.2.840.10045.4.3.2" => Some(&digest::SHA256),
        "1.2.840.10045.4.3.1" => Some(&digest::SHA224),
        "1.2.840.10045.4.3.3" => Some(&digest::SHA384),
        "1.2.840.10045.4.3.4" => Some(&digest::SHA512),
        // RSASSA-PSS: the hash is a parameter, SHA-1 by default.
        "1.2.840.113549.1.1.10" => match SignatureAlgorithm::try_from(algorithm).ok()? {
            SignatureAlgorithm::RSASSA_PSS(parameters) => match parameters.hash_algorithm_oid().to_id_string().as_str()
            {
                "1.3.14.3.2.26" | "2.16.840.1.101.3.4.2.1" => Some(&digest::SHA256),
                "2.16.840.1.101.3.4.2.2" => Some(&digest::SHA384),
                "2.16.840.1.101.3.4.2.3" => Some(&digest::SHA512),
                "2.16.840.1.101.3.4.2.4" => Some(&digest::SHA224),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    }
}

fn name(name: &X509Name<'_>) -> String {
    let text = escape(&name.to_string());
    if text.is_empty() { "(no name)".to_string() } else { text }
}

fn date(time: ASN1Time) -> String {
    time.to_rfc2822().unwrap_or_else(|_| time.to_string())
}
