//! Owns: a store in memory that behaves like a real one, and the faults a real one can have.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};

use crate::repository::{Backend, Entry, Key, StoreError, StoreErrorKind, Upload};

/// Objects in memory; clones share them.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    objects: Arc<Mutex<BTreeMap<Key, Bytes>>>,
}

impl MemoryStore {
    fn error(kind: StoreErrorKind, operation: &'static str, key: &Key) -> StoreError {
        StoreError { kind, operation, location: format!("memory:{key}"), cause: format!("{kind:?}") }
    }

    /// Everything stored, in order of key.
    pub fn objects(&self) -> BTreeMap<Key, Bytes> {
        self.objects.lock().unwrap().clone()
    }

    /// Changes the store behind everybody's back, as an operator or a fault would.
    pub fn tamper(&self, change: impl FnOnce(&mut BTreeMap<Key, Bytes>)) {
        change(&mut self.objects.lock().unwrap());
    }
}

#[async_trait]
impl Backend for MemoryStore {
    fn describe(&self) -> String {
        "memory:".to_string()
    }

    async fn put_new(&self, key: &Key, body: &[Bytes]) -> Result<(), StoreError> {
        let mut objects = self.objects.lock().unwrap();
        if objects.contains_key(key) {
            return Err(Self::error(StoreErrorKind::AlreadyExists, "store", key));
        }
        objects.insert(key.clone(), body.concat().into());
        Ok(())
    }

    async fn begin_upload(&self, key: &Key) -> Result<Box<dyn Upload>, StoreError> {
        Ok(Box::new(MemoryUpload { store: self.clone(), key: key.clone(), body: BytesMut::new() }))
    }

    async fn stat(&self, key: &Key) -> Result<Option<u64>, StoreError> {
        Ok(self.objects.lock().unwrap().get(key).map(|body| body.len() as u64))
    }

    async fn fetch(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let objects = self.objects.lock().unwrap();
        let body = objects.get(key).ok_or_else(|| Self::error(StoreErrorKind::NotFound, "read", key))?;
        let inside = range.start <= range.end && range.end <= body.len() as u64;
        if !inside {
            return Err(Self::error(StoreErrorKind::Corrupt, "read", key));
        }
        Ok(body.slice(range.start as usize..range.end as usize))
    }

    async fn list(&self, directory: Option<&Key>) -> Result<Vec<Entry>, StoreError> {
        let prefix = directory.map_or(String::new(), |key| format!("{key}/"));
        let mut found: Vec<Entry> = Vec::new();
        for (key, body) in self.objects.lock().unwrap().iter() {
            let Some(rest) = key.as_str().strip_prefix(&prefix) else { continue };
            let entry = match rest.split_once('/') {
                Some((name, _)) => Entry::Directory(name.to_string()),
                None => Entry::Object { name: rest.to_string(), bytes: body.len() as u64 },
            };
            if found.last() != Some(&entry) {
                found.push(entry);
            }
        }
        found.sort();
        found.dedup();
        Ok(found)
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.objects.lock().unwrap().remove(key);
        Ok(())
    }
}

#[derive(Debug)]
struct MemoryUpload {
    store: MemoryStore,
    key: Key,
    body: BytesMut,
}

#[async_trait]
impl Upload for MemoryUpload {
    async fn append(&mut self, part: Bytes) -> Result<(), StoreError> {
        self.body.extend_from_slice(&part);
        Ok(())
    }

    async fn read_back(&mut self, range: Range<u64>) -> Result<Bytes, StoreError> {
        Ok(Bytes::copy_from_slice(&self.body[range.start as usize..range.end as usize]))
    }

    async fn complete(self: Box<Self>) -> Result<(), StoreError> {
        self.store.put_new(&self.key, &[self.body.freeze()]).await
    }

    async fn abort(self: Box<Self>) -> Result<(), StoreError> {
        Ok(())
    }
}
