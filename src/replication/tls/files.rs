//! Owns: reading certificates, keys and revocation lists, with libpq's rules about who else may read a key.
//! Does not own: where they are (`postgres`), what they are good for (`verify`, `client`).

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer};
use webpki::{CertRevocationList, OwnedCertRevocationList};

use super::fault::TlsFault;

/// A bundle of all public authorities is 250 KiB, a large revocation list a few MiB.
const FILE_BYTES_MAX: u64 = 16 << 20;
/// More files than this are not a directory of revocation lists.
const CRL_FILES_MAX: usize = 1000;

const ROOTS: &str = "root certificates";
const CERTIFICATE: &str = "client certificate";
const KEY: &str = "private key";
const CRL: &str = "revocation list";

/// A client's certificate with its chain, and its key.
pub struct Identity {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
    pub certificate_path: PathBuf,
    pub key_path: PathBuf,
}

/// `None` when there is no such file.
pub fn roots(path: &Path) -> Result<Option<Vec<CertificateDer<'static>>>, TlsFault> {
    let Some(bytes) = read_if_there(ROOTS, path)? else { return Ok(None) };
    certificates(ROOTS, path, &bytes).map(Some)
}

/// The system's, or those of `SSL_CERT_FILE` and `SSL_CERT_DIR`.
pub fn system_roots() -> Result<Vec<CertificateDer<'static>>, TlsFault> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        let causes: Vec<String> = found.errors.iter().map(ToString::to_string).collect();
        let cause = if causes.is_empty() { "there are none".to_string() } else { causes.join("; ") };
        return Err(TlsFault::SystemRoots { cause });
    }
    Ok(found.certs)
}

/// `None` when there is no certificate, which libpq takes for "send none" wherever it was named.
pub fn identity(certificate: &Path, key: Option<&Path>) -> Result<Option<Identity>, TlsFault> {
    let Some(bytes) = read_if_there(CERTIFICATE, certificate)? else { return Ok(None) };
    let chain = certificates(CERTIFICATE, certificate, &bytes)?;
    let Some(key_path) = key else {
        let hint = "name its key by sslkey=….";
        return Err(fault(CERTIFICATE, certificate, "it has no private key beside it".into(), hint));
    };
    let (certificate_path, key_path) = (certificate.to_path_buf(), key_path.to_path_buf());
    Ok(Some(Identity { chain, key: private_key(&key_path)?, certificate_path, key_path }))
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsFault> {
    let metadata = fs::metadata(path).map_err(|error| unreadable(KEY, path, &error))?;
    if !metadata.is_file() {
        return Err(fault(KEY, path, "it is not a plain file".into(), "name the key's file by sslkey=…."));
    }
    // Root's key may be read by a group: orchestrators and certificate daemons hand keys out that way.
    let others = if metadata.uid() == 0 { 0o037 } else { 0o077 };
    if metadata.mode() & others != 0 {
        let cause = format!("its mode {:04o} lets others use it", metadata.mode() & 0o7777);
        return Err(fault(KEY, path, cause, "chmod 0600 it (0640 will do where root owns it)."));
    }
    let bytes = read(KEY, path)?;
    let is_encrypted = bytes.windows(9).any(|window| window == b"ENCRYPTED");
    if is_encrypted {
        let hint = "store it without a passphrase, readable by this user only: openssl pkey -in OLD -out NEW.";
        return Err(fault(KEY, path, "it is encrypted, which is not supported".into(), hint));
    }
    PrivateKeyDer::from_pem_slice(&bytes)
        .map_err(|error| fault(KEY, path, format!("it holds no key ({error})"), "is it a PEM file?"))
}

/// The lists of a file and of a directory; `default` is used where it exists.
pub fn revocations(
    file: Option<&Path>,
    directory: Option<&Path>,
    default: Option<&Path>,
) -> Result<Vec<CertRevocationList<'static>>, TlsFault> {
    let mut lists = Vec::new();
    if let Some(path) = file {
        lists.extend(revocation_lists(path, &read(CRL, path)?)?);
    }
    if let Some(path) = directory {
        let entries = fs::read_dir(path).and_then(Iterator::collect::<io::Result<Vec<_>>>);
        let entries = entries.map_err(|error| unreadable(CRL, path, &error))?;
        if entries.len() > CRL_FILES_MAX {
            return Err(fault(CRL, path, format!("it holds {} files", entries.len()), "is it the right directory?"));
        }
        for path in entries.into_iter().map(|entry| entry.path()).filter(|path| path.is_file()) {
            lists.extend(revocation_lists(&path, &read(CRL, &path)?)?);
        }
        if lists.is_empty() {
            return Err(fault(CRL, path, "it holds no revocation list".into(), "is it the right directory?"));
        }
    }
    if let (None, None, Some(path)) = (file, directory, default)
        && let Some(bytes) = read_if_there(CRL, path)?
    {
        lists.extend(revocation_lists(path, &bytes)?);
    }
    Ok(lists)
}

fn revocation_lists(path: &Path, bytes: &[u8]) -> Result<Vec<CertRevocationList<'static>>, TlsFault> {
    let refused = |cause: String| fault(CRL, path, cause, "is it a PEM file of X.509 revocation lists?");
    let mut lists = Vec::new();
    for der in CertificateRevocationListDer::pem_slice_iter(bytes) {
        let der = der.map_err(|error| refused(format!("it is no PEM file ({error})")))?;
        let list = OwnedCertRevocationList::from_der(&der).map_err(|error| refused(format!("{error}")))?;
        lists.push(CertRevocationList::Owned(list));
    }
    if lists.is_empty() { Err(refused("it holds none".into())) } else { Ok(lists) }
}

fn certificates(what: &'static str, path: &Path, bytes: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsFault> {
    let refused = |cause: String| fault(what, path, cause, "is it a PEM file of certificates?");
    let all: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(bytes).collect();
    match all {
        Ok(all) if all.is_empty() => Err(refused("it holds no certificate".into())),
        Ok(all) => Ok(all),
        Err(error) => Err(refused(format!("it is no PEM file ({error})"))),
    }
}

fn read_if_there(what: &'static str, path: &Path) -> Result<Option<Vec<u8>>, TlsFault> {
    match fs::metadata(path) {
        Ok(_) => read(what, path).map(Some),
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(None),
        Err(error) => Err(unreadable(what, path, &error)),
    }
}

fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsFault> {
    let read = || -> io::Result<Vec<u8>> {
        // Looked at before opening: opening a pipe without a writer would wait forever.
        if !fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a plain file"));
        }
        let mut bytes = Vec::new();
        File::open(path)?.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > FILE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "larger than 16 MiB"));
        }
        Ok(bytes)
    };
    read().map_err(|error| unreadable(what, path, &error))
}

fn unreadable(what: &'static str, path: &Path, error: &io::Error) -> TlsFault {
    let hint = match error.kind() {
        io::ErrorKind::PermissionDenied => "may the user this process runs as read it?",
        _ => "does the file exist?",
    };
    fault(what, path, error.to_string(), hint)
}

fn fault(what: &'static str, path: &Path, cause: String, hint: &'static str) -> TlsFault {
    TlsFault::File { what, path: path.to_path_buf(), cause, hint }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_key_others_may_use_is_refused_as_in_libpq() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let key = rcgen::KeyPair::generate().unwrap().serialize_pem();
        fs::write(&path, &key).unwrap();
        let with_mode = |mode| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            private_key(&path).map(drop)
        };
        let is_roots = fs::metadata(&path).unwrap().uid() == 0;
        for (mode, fits) in [(0o600, true), (0o400, true), (0o640, is_roots), (0o660, false), (0o604, false)] {
            assert_eq!(with_mode(mode).is_ok(), fits, "{mode:04o}");
        }
        let text = with_mode(0o644).unwrap_err().to_string();
        assert!(text.contains("mode 0644") && !text.contains(&key[40..60]), "{text}");
    }

    #[test]
    fn files_that_are_not_what_they_should_be_are_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        assert!(matches!(roots(&path), Ok(None)));
        assert!(matches!(identity(&path, None), Ok(None)));
        assert!(roots(directory.path()).is_err());
        for content in [&b""[..], b"nonsense", b"-----BEGIN CERTIFICATE-----\n!!\n-----END CERTIFICATE-----\n"] {
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
            assert!(roots(&path).unwrap_err().to_string().contains(path.to_str().unwrap()));
            assert!(private_key(&path).is_err() && revocations(Some(&path), None, None).is_err());
        }
        fs::write(&path, "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n").unwrap();
        assert!(private_key(&path).unwrap_err().to_string().contains("encrypted"));
        let absent = directory.path().join("absent");
        assert!(revocations(Some(&absent), None, None).is_err(), "a list that is named must be there");
        assert_eq!(revocations(None, None, Some(&absent)).unwrap().len(), 0);
    }
}
