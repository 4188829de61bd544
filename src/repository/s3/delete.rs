//! Owns: deleting many objects, as many in one request as the API takes; where a store knows no such request, one by one.
//! Does not own: which (the caller), what an answer means (`answer.rs`).

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

use aws_sdk_s3::Client;
use aws_sdk_s3::types::{Delete, ObjectIdentifier};
use futures_util::stream::{self, StreamExt};

use super::answer::{Action, Answer, Refusal, refusal};
use super::client::Shared;
use crate::repository::{Key, StoreError, StoreErrorKind};

/// What one request may name (API reference, `DeleteObjects`).
const KEYS_MAX: usize = 1000;
/// Requests under way where each names one object.
const SINGLE_REQUESTS: usize = 8;
const LOCKED: &str = "Object Lock, a legal hold or a policy keeps it: it is tried again each time anything expires";

impl Shared {
    /// All that the store lets go; the others with why.
    pub(super) async fn delete_each(&self, keys: &[Key]) -> Result<Vec<(Key, StoreError)>, StoreError> {
        let mut kept = Vec::new();
        for some in keys.chunks(KEYS_MAX) {
            if some.len() == 1 || self.lacks_batches.load(Ordering::Relaxed) {
                kept.extend(self.delete_singly(some).await?);
                continue;
            }
            match self.delete_batch(some).await {
                Ok(refused) => kept.extend(self.sorted(refused)?),
                Err(refused) if refused.kind == StoreErrorKind::Misconfigured => {
                    tracing::debug!(cause = refused.cause, "the store deletes no objects together: one by one");
                    self.lacks_batches.store(true, Ordering::Relaxed);
                    kept.extend(self.delete_singly(some).await?);
                }
                Err(refused) if refused.kind == StoreErrorKind::PermissionDenied => {
                    let error = |key: &Key| self.error(Action::Delete, Some(key), refused.clone());
                    kept.extend(some.iter().map(|key| (key.clone(), error(key))));
                }
                Err(refused) => return Err(self.error(Action::Delete, some.first(), refused)),
            }
        }
        Ok(kept)
    }

    async fn delete_batch(&self, keys: &[Key]) -> Result<Vec<(Key, Refusal)>, Refusal> {
        let names: BTreeMap<String, &Key> = keys.iter().map(|key| (self.name(key), key)).collect();
        let identifier = |name: &String| ObjectIdentifier::builder().key(name).build().expect("a key is all it needs");
        let objects: Vec<ObjectIdentifier> = names.keys().map(identifier).collect();
        let delete = Delete::builder().set_objects(Some(objects)).quiet(true).build().expect("it names objects");
        let request =
            |client: Client| client.delete_objects().bucket(&self.options.bucket).delete(delete.clone()).send();
        let answer = self.send(Action::Delete, request).await?;
        let mut kept = Vec::new();
        for error in answer.errors() {
            let Some(&key) = error.key().and_then(|name| names.get(name)) else {
                let cause = format!("it refuses to delete {:?}, which it was not asked to", error.key());
                return Err(Refusal::new(StoreErrorKind::Unavailable, cause));
            };
            kept.push((key.clone(), of_one(error.code(), error.message())));
        }
        Ok(kept)
    }

    async fn delete_singly(&self, keys: &[Key]) -> Result<Vec<(Key, StoreError)>, StoreError> {
        let deleted = stream::iter(keys.to_vec()).map(|key| async move {
            let deleted = self.delete_object(&key).await;
            (key, deleted)
        });
        let deleted: Vec<(Key, Result<(), Refusal>)> = deleted.buffered(SINGLE_REQUESTS).collect().await;
        self.sorted(deleted.into_iter().filter_map(|(key, deleted)| Some((key, deleted.err()?))).collect())
    }

    /// Those that stay; an error where one could not be deleted for another reason.
    fn sorted(&self, refused: Vec<(Key, Refusal)>) -> Result<Vec<(Key, StoreError)>, StoreError> {
        let mut kept = Vec::new();
        for (key, refused) in refused {
            let is_kept = refused.kind == StoreErrorKind::PermissionDenied;
            let error = self.error(Action::Delete, Some(&key), refused);
            if !is_kept {
                return Err(error);
            }
            kept.push((key, error));
        }
        Ok(kept)
    }
}

/// The refusal of one object among many.
fn of_one(code: Option<&str>, message: Option<&str>) -> Refusal {
    let said = message.unwrap_or_default().to_ascii_lowercase();
    let is_locked = ["lock", "worm", "retention", "legal hold"].iter().any(|word| said.contains(word));
    let of_code = refusal(Action::Delete, &Answer { status: 200, code, message, ..Answer::default() });
    match is_locked {
        true => Refusal::new(StoreErrorKind::PermissionDenied, of_code.cause).hinted(LOCKED),
        false => of_code,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_keeps_one_object_and_trouble_ends_all() {
        let kind = |code, message| of_one(Some(code), Some(message)).kind;
        assert_eq!(kind("AccessDenied", "Access Denied"), StoreErrorKind::PermissionDenied);
        assert_eq!(
            kind("InvalidRequest", "Object is WORM protected and cannot be overwritten"),
            StoreErrorKind::PermissionDenied
        );
        assert_eq!(kind("InternalError", "We encountered an internal error."), StoreErrorKind::Unavailable);
        assert_eq!(kind("SlowDown", "Please reduce your request rate."), StoreErrorKind::Unavailable);
    }
}
