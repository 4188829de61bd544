//! Owns: the checksums a manifest has of files, computed as the files pass.
//! Does not own: comparing them (the caller). Pure.

use aws_lc_rs::digest;

/// How the server sums up files, as the option `MANIFEST_CHECKSUMS` and the manifest name it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ChecksumAlgorithm {
    None,
    /// The server's own default: finds damage, costs little.
    #[default]
    Crc32c,
    Sha224,
    Sha256,
    Sha384,
    Sha512,
}

impl ChecksumAlgorithm {
    pub const ALL: [ChecksumAlgorithm; 6] = {
        use ChecksumAlgorithm::*;
        [None, Crc32c, Sha224, Sha256, Sha384, Sha512]
    };

    pub fn name(self) -> &'static str {
        match self {
            ChecksumAlgorithm::None => "NONE",
            ChecksumAlgorithm::Crc32c => "CRC32C",
            ChecksumAlgorithm::Sha224 => "SHA224",
            ChecksumAlgorithm::Sha256 => "SHA256",
            ChecksumAlgorithm::Sha384 => "SHA384",
            ChecksumAlgorithm::Sha512 => "SHA512",
        }
    }

    /// By its name, in any case.
    pub fn parse(name: &str) -> Option<ChecksumAlgorithm> {
        ChecksumAlgorithm::ALL.into_iter().find(|algorithm| algorithm.name().eq_ignore_ascii_case(name))
    }

    pub fn digest_bytes(self) -> usize {
        match self {
            ChecksumAlgorithm::None => 0,
            ChecksumAlgorithm::Crc32c => 4,
            ChecksumAlgorithm::Sha224 => 28,
            ChecksumAlgorithm::Sha256 => 32,
            ChecksumAlgorithm::Sha384 => 48,
            ChecksumAlgorithm::Sha512 => 64,
        }
    }

    fn sha(self) -> Option<&'static digest::Algorithm> {
        match self {
            ChecksumAlgorithm::None | ChecksumAlgorithm::Crc32c => None,
            ChecksumAlgorithm::Sha224 => Some(&digest::SHA224),
            ChecksumAlgorithm::Sha256 => Some(&digest::SHA256),
            ChecksumAlgorithm::Sha384 => Some(&digest::SHA384),
            ChecksumAlgorithm::Sha512 => Some(&digest::SHA512),
        }
    }
}

impl std::fmt::Display for ChecksumAlgorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// A file's checksum: `algorithm.digest_bytes()` bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FileChecksum {
    algorithm: ChecksumAlgorithm,
    bytes: [u8; 64],
}

impl FileChecksum {
    pub fn algorithm(&self) -> ChecksumAlgorithm {
        self.algorithm
    }

    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.algorithm.digest_bytes()]
    }

    /// Of `algorithm.digest_bytes()` bytes.
    pub(super) fn new(algorithm: ChecksumAlgorithm, digest: &[u8]) -> FileChecksum {
        let mut bytes = [0; 64];
        bytes[..digest.len()].copy_from_slice(digest);
        FileChecksum { algorithm, bytes }
    }

    /// From lower-case hexadecimal; `None` where that is not as long as the algorithm's.
    pub(super) fn parse(algorithm: ChecksumAlgorithm, text: &str) -> Option<FileChecksum> {
        let digest = decode_hex(text)?;
        (digest.len() == algorithm.digest_bytes()).then(|| FileChecksum::new(algorithm, &digest))
    }
}

/// In hexadecimal, as the manifest has it.
impl std::fmt::Display for FileChecksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&encode_hex(self.as_bytes()))
    }
}

impl std::fmt::Debug for FileChecksum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {self}", self.algorithm)
    }
}

/// Sums up a file as its bytes pass.
#[derive(Clone)]
pub struct FileHasher {
    algorithm: ChecksumAlgorithm,
    crc32c: u32,
    sha: Option<digest::Context>,
}

impl std::fmt::Debug for FileHasher {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FileHasher({})", self.algorithm)
    }
}

impl FileHasher {
    pub fn new(algorithm: ChecksumAlgorithm) -> FileHasher {
        FileHasher { algorithm, crc32c: 0, sha: algorithm.sha().map(digest::Context::new) }
    }

    pub fn update(&mut self, bytes: &[u8]) {
        match &mut self.sha {
            Some(sha) => sha.update(bytes),
            None if self.algorithm == ChecksumAlgorithm::Crc32c => {
                self.crc32c = crc32c::crc32c_append(self.crc32c, bytes);
            }
            None => {}
        }
    }

    pub fn finish(self) -> FileChecksum {
        match (self.algorithm, self.sha) {
            (algorithm, Some(sha)) => FileChecksum::new(algorithm, sha.finish().as_ref()),
            // As it lies in the server's memory (`pg_checksum_final`), on every platform anybody has: least byte first.
            (ChecksumAlgorithm::Crc32c, None) => {
                FileChecksum::new(ChecksumAlgorithm::Crc32c, &self.crc32c.to_le_bytes())
            }
            (algorithm, None) => FileChecksum::new(algorithm, &[]),
        }
    }
}

pub(super) fn decode_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16).map(|digit| digit as u8);
    let bytes = text.as_bytes();
    if !bytes.len().is_multiple_of(2) {
        return None;
    }
    bytes.chunks_exact(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

pub(super) fn encode_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
