//! Owns: how an S3 repository is reached and what is asked of it.
//! Does not own: where these settings come from (`config`), credentials (the SDK's own sources). Pure.

use std::path::PathBuf;

/// One S3 repository.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct S3Options {
    pub bucket: String,
    /// Without slashes at its ends; empty for the bucket's root.
    pub prefix: String,
    /// `http(s)://host[:port]`; `None`: AWS's own, or `AWS_ENDPOINT_URL[_S3]`.
    pub endpoint: Option<String>,
    /// `None`: from the environment or the profile; stores other than AWS mostly take any.
    pub region: Option<String>,
    /// Bucket in the path instead of the host name; `None`: whenever an endpoint is given.
    pub path_style: Option<bool>,
    /// A profile of the shared AWS configuration files.
    pub profile: Option<String>,
    /// PEM file of the authorities that may sign the endpoint's certificate, instead of the system's.
    pub ca_file: Option<PathBuf>,
    pub storage_class: StorageClasses,
    pub sse: Option<ServerSideEncryption>,
    pub checksum: Checksum,
    /// The operator vouches that nobody else writes: for stores without conditional writes.
    pub single_writer: bool,
}

/// Storage classes as S3 names them (`STANDARD_IA`, …); `None`: the bucket's default. Small, short-lived and
/// metadata objects always get the default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StorageClasses {
    /// For sealed WAL segments.
    pub wal: Option<String>,
    /// For volumes of base backups.
    pub backup: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ServerSideEncryption {
    /// SSE-S3 (`AES256`).
    S3,
    /// SSE-KMS, with a key's id or ARN, or the account's default key.
    Kms { key: Option<String> },
}

/// The checksum a store is sent with every object, and checks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checksum {
    #[default]
    Crc32,
    /// For stores that reject the header.
    None,
}
