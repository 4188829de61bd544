//! S3 and the stores that speak it.
//!
//! Owns: every request to an S3 store, and the only use of aws-sdk-s3.
//! Does not own: what is stored (`archiver`, `catalog`), retries beyond one call's own (the caller).
//! Rests on `proto-notes/07-repository-format.md` and `08-durability.md`, "an object in S3".
//!
//! `client.rs` builds the SDK's client and has its patience, `request.rs` sends with it, `answer.rs` says what a refusal
//! means. `put.rs`, `multipart.rs` and `read.rs` are the backend's calls; `probe.rs` finds out what the store can.

mod answer;
mod body;
mod client;
mod delete;
mod multipart;
mod options;
mod probe;
mod put;
mod read;
mod request;
mod survey;

use std::net::IpAddr;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

pub use options::{Checksum, S3Options, ServerSideEncryption, StorageClasses};

use self::answer::Action;
use self::client::Shared;
use self::multipart::S3Upload;
pub use self::survey::{Finding, Outcome};
use super::{Backend, Entry, Facts, Key, StoreError, Upload};

/// A repository in a bucket; `s3://bucket/prefix`. Clones, and others opened with equal options, share one client.
#[derive(Clone, Debug)]
pub struct S3Backend {
    shared: Arc<Shared>,
}

impl S3Backend {
    /// Asks nobody anything: the operations do.
    pub fn open(options: S3Options) -> S3Backend {
        S3Backend { shared: Shared::of(options) }
    }

    /// Aborts multipart uploads below the prefix that were begun more than `older_than` ago; how many.
    pub async fn clean_debris(&self, older_than: Duration) -> Result<usize, StoreError> {
        self.shared.abort_abandoned(older_than).await
    }
}

/// Whether this endpoint is reached over a network without encryption.
fn is_open_wire(endpoint: &str) -> bool {
    let Some((scheme, rest)) = endpoint.split_once("://") else { return false };
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    let name = match host.strip_prefix('[') {
        Some(v6) => v6.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let is_loopback = name.parse::<IpAddr>().map_or(name.eq_ignore_ascii_case("localhost"), |ip| ip.is_loopback());
    scheme.eq_ignore_ascii_case("http") && !is_loopback
}

#[async_trait]
impl Backend for S3Backend {
    fn describe(&self) -> String {
        self.shared.url()
    }

    async fn put_new_with(&self, key: &Key, body: &[Bytes], facts: &Facts) -> Result<(), StoreError> {
        self.shared.put_new(key, body, facts).await
    }

    fn keeps_facts(&self) -> bool {
        true
    }

    async fn raw_crc32(&self, key: &Key) -> Result<Option<u32>, StoreError> {
        let head = self.shared.head(key).await;
        let head = head.map_err(|refused| self.shared.error(Action::Head, Some(key), refused))?;
        Ok(head.and_then(|head| head.raw_crc32))
    }

    fn reads_back(&self) -> bool {
        false
    }

    async fn begin_upload(&self, key: &Key) -> Result<Box<dyn Upload>, StoreError> {
        Ok(Box::new(S3Upload::new(Arc::clone(&self.shared), key)))
    }

    async fn stat(&self, key: &Key) -> Result<Option<u64>, StoreError> {
        let head = self.shared.head(key).await;
        let head = head.map_err(|refused| self.shared.error(Action::Head, Some(key), refused))?;
        Ok(head.map(|head| head.bytes))
    }

    async fn fetch(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let content = self.shared.fetch(key, range).await;
        content.map_err(|refused| self.shared.error(Action::Get, Some(key), refused))
    }

    async fn list(&self, directory: Option<&Key>) -> Result<Vec<Entry>, StoreError> {
        let entries = self.shared.list_directory(directory).await;
        entries.map_err(|refused| self.shared.error(Action::List, directory, refused))
    }

    fn lists_deep(&self) -> bool {
        true
    }

    async fn list_deep(
        &self,
        directory: &Key,
        first: &str,
        last: &str,
    ) -> Result<Option<Vec<(String, u64)>>, StoreError> {
        let names = self.shared.list_deep(directory, first, last).await;
        names.map_err(|refused| self.shared.error(Action::List, Some(directory), refused))
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let deleted = self.shared.delete_object(key).await;
        deleted.map_err(|refused| self.shared.error(Action::Delete, Some(key), refused))
    }

    async fn delete_each(&self, keys: &[Key]) -> Result<Vec<(Key, StoreError)>, StoreError> {
        self.shared.delete_each(keys).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn open_wires_are_told_from_loopback_and_tls() {
        for open in ["http://minio.example", "HTTP://10.0.0.1:9000/x", "http://[fd00::1]:80", "http://localhost.evil"] {
            assert!(is_open_wire(open), "{open}");
        }
        for fine in ["https://minio.example", "http://localhost:9000", "http://127.0.0.9", "http://[::1]:3900/", "x"] {
            assert!(!is_open_wire(fine), "{fine}");
        }
    }
}
