//! S3 and the stores that speak it.
//!
//! Owns: every request to an S3 store, and the only use of aws-sdk-s3.
//! Does not own: what is stored (`archiver`, `catalog`), retries beyond one call's own (the caller).

mod options;

pub use options::{Checksum, S3Options, ServerSideEncryption, StorageClasses};
