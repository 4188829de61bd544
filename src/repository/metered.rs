//! Owns: counting what a store is asked, what it answers and how long it takes, whatever the store is.
//! Does not own: the metrics (`telemetry/meters.rs`), the calls themselves.

use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;

use super::backend::{Backend, Entry, Facts, Key, StoreError, StoreErrorKind, Upload};
use super::layout;
use crate::telemetry::meters::StoreMeter;

/// A backend whose calls are counted. Every method goes to the one inside, also those with an answer of their own.
#[derive(Debug)]
pub struct MeteredBackend {
    inner: Arc<dyn Backend>,
    meter: StoreMeter,
}

impl MeteredBackend {
    pub fn new(inner: Arc<dyn Backend>, meter: StoreMeter) -> MeteredBackend {
        MeteredBackend { inner, meter }
    }

    fn call(&self, operation: &'static str) -> Call {
        Call::begin(&self.meter, operation)
    }
}

/// One call under way. Dropped before its answer came, by whoever lost patience, it counts as a failure.
struct Call {
    meter: StoreMeter,
    operation: &'static str,
    is_answered: bool,
}

impl Call {
    fn begin(meter: &StoreMeter, operation: &'static str) -> Call {
        meter.called(operation);
        Call { meter: meter.clone(), operation, is_answered: false }
    }

    fn end<T>(mut self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        self.is_answered = true;
        if let Err(error) = &result {
            self.meter.failed(self.operation, class(error.kind));
        }
        result
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        if !self.is_answered {
            self.meter.failed(self.operation, "abandoned");
        }
    }
}

fn class(kind: StoreErrorKind) -> &'static str {
    match kind {
        StoreErrorKind::AlreadyExists => "exists",
        StoreErrorKind::NotFound => "not_found",
        StoreErrorKind::PermissionDenied => "permission",
        StoreErrorKind::NoSpace => "no_space",
        StoreErrorKind::RootMissing => "root_missing",
        StoreErrorKind::ReadOnly => "read_only",
        StoreErrorKind::Unavailable => "unavailable",
        StoreErrorKind::Corrupt => "corrupt",
        StoreErrorKind::Unsupported => "unsupported",
        StoreErrorKind::Credentials => "credentials",
        StoreErrorKind::Misconfigured => "misconfigured",
        StoreErrorKind::SourceLost => "source_lost",
    }
}

fn length(parts: &[Bytes]) -> u64 {
    parts.iter().map(|part| part.len() as u64).sum()
}

#[async_trait]
impl Backend for MeteredBackend {
    fn describe(&self) -> String {
        self.inner.describe()
    }

    async fn put_new_with(&self, key: &Key, body: &[Bytes], facts: &Facts) -> Result<(), StoreError> {
        let began = Instant::now();
        self.call("put").end(self.inner.put_new_with(key, body, facts).await)?;
        self.meter.wrote(length(body));
        self.meter.stored(layout::kind(key), Some(began.elapsed()));
        Ok(())
    }

    async fn put_new(&self, key: &Key, body: &[Bytes]) -> Result<(), StoreError> {
        let began = Instant::now();
        self.call("put").end(self.inner.put_new(key, body).await)?;
        self.meter.wrote(length(body));
        self.meter.stored(layout::kind(key), Some(began.elapsed()));
        Ok(())
    }

    fn keeps_facts(&self) -> bool {
        self.inner.keeps_facts()
    }

    async fn raw_crc32(&self, key: &Key) -> Result<Option<u32>, StoreError> {
        self.call("stat").end(self.inner.raw_crc32(key).await)
    }

    fn reads_back(&self) -> bool {
        self.inner.reads_back()
    }

    async fn begin_upload(&self, key: &Key) -> Result<Box<dyn Upload>, StoreError> {
        let inner = self.call("begin").end(self.inner.begin_upload(key).await)?;
        Ok(Box::new(MeteredUpload { inner, meter: self.meter.clone(), kind: layout::kind(key) }))
    }

    async fn stat(&self, key: &Key) -> Result<Option<u64>, StoreError> {
        self.call("stat").end(self.inner.stat(key).await)
    }

    async fn fetch(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let bytes = self.call("read").end(self.inner.fetch(key, range).await)?;
        self.meter.read(bytes.len() as u64);
        Ok(bytes)
    }

    async fn list(&self, directory: Option<&Key>) -> Result<Vec<Entry>, StoreError> {
        self.call("list").end(self.inner.list(directory).await)
    }

    fn lists_deep(&self) -> bool {
        self.inner.lists_deep()
    }

    async fn list_deep(
        &self,
        directory: &Key,
        first: &str,
        last: &str,
    ) -> Result<Option<Vec<(String, u64)>>, StoreError> {
        self.call("list").end(self.inner.list_deep(directory, first, last).await)
    }

    async fn look_anew(&self) -> Result<(), StoreError> {
        self.inner.look_anew().await
    }

    async fn create_missing_root(&self) -> Result<(), StoreError> {
        self.inner.create_missing_root().await
    }

    async fn create_root(&self) -> Result<(), StoreError> {
        self.inner.create_root().await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.call("delete").end(self.inner.delete(key).await)
    }

    async fn delete_all(&self, keys: &[Key]) -> Result<(), StoreError> {
        self.call("delete").end(self.inner.delete_all(keys).await)
    }

    async fn delete_each(&self, keys: &[Key]) -> Result<Vec<(Key, StoreError)>, StoreError> {
        self.call("delete").end(self.inner.delete_each(keys).await)
    }
}

#[derive(Debug)]
struct MeteredUpload {
    inner: Box<dyn Upload>,
    meter: StoreMeter,
    kind: &'static str,
}

#[async_trait]
impl Upload for MeteredUpload {
    async fn append(&mut self, part: Bytes) -> Result<(), StoreError> {
        let bytes = part.len() as u64;
        Call::begin(&self.meter, "append").end(self.inner.append(part).await)?;
        self.meter.wrote(bytes);
        Ok(())
    }

    async fn read_back(&mut self, range: Range<u64>) -> Result<Bytes, StoreError> {
        let bytes = Call::begin(&self.meter, "read").end(self.inner.read_back(range).await)?;
        self.meter.read(bytes.len() as u64);
        Ok(bytes)
    }

    async fn complete(&mut self) -> Result<(), StoreError> {
        Call::begin(&self.meter, "complete").end(self.inner.complete().await)?;
        self.meter.stored(self.kind, None);
        Ok(())
    }

    async fn abort(self: Box<Self>) -> Result<(), StoreError> {
        let call = Call::begin(&self.meter, "abort");
        call.end(self.inner.abort().await)
    }
}
