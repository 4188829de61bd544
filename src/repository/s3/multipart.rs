//! Owns: an object written piece by piece as a multipart upload; uploads nobody finished.
//! Does not own: when they are cleaned up (the caller), whether completion may be conditional (`probe.rs`).
//! Rests on `proto-notes/08-durability.md`, "an object in S3".

use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use aws_sdk_s3::Client;
use aws_sdk_s3::operation::list_multipart_uploads::ListMultipartUploadsOutput;
use aws_sdk_s3::types::{ChecksumAlgorithm, CompletedMultipartUpload, CompletedPart};
use bytes::Bytes;

use super::answer::{Action, Refusal, Reply};
use super::client::{Shared, deadlines};
use super::put::{PUT_ID, encryption, new_put_id, payload, storage_class, taken};
use super::read::absent;
use super::{Checksum, body};
use crate::repository::{Facts, Key, StoreError, StoreErrorKind, Upload};

/// The least S3 takes for any part but the last, and all of one size, as R2 wants it. Larger: fewer requests, but this
/// much memory for each upload.
const PART_BYTES: u64 = 5 << 20;
/// S3's own limit: 48 GiB of parts, while a volume has about one.
const PARTS_MAX: usize = 10_000;
/// Pages of unfinished uploads looked at in one run, of up to 1000 each.
const DEBRIS_PAGES_MAX: usize = 20;

#[derive(Debug)]
pub(super) struct S3Upload {
    shared: Arc<Shared>,
    key: Key,
    put_id: String,
    /// Gone while a call works on it, and for good after one that was dropped, or gave the object its name.
    state: Option<State>,
}

/// Cheap to copy: what a failed call must leave as it was.
#[derive(Clone, Debug, Default)]
struct State {
    /// Not begun before there is more than one part.
    upload_id: Option<String>,
    parts: Vec<CompletedPart>,
    /// In `parts`.
    stored_bytes: u64,
    gathered: Vec<Bytes>,
    gathered_bytes: u64,
    /// Of everything appended.
    crc32: crc32fast::Hasher,
}

impl State {
    fn gather(&mut self, part: Bytes) {
        self.crc32.update(&part);
        self.gathered_bytes += part.len() as u64;
        if !part.is_empty() {
            self.gathered.push(part);
        }
    }

    /// The first `bytes` of what is gathered.
    fn cut(&mut self, bytes: u64) -> Vec<Bytes> {
        let mut cut = Vec::new();
        let mut missing = bytes as usize;
        let mut pieces = std::mem::take(&mut self.gathered).into_iter();
        while let Some(mut piece) = (missing > 0).then(|| pieces.next()).flatten() {
            let taken = piece.split_to(piece.len().min(missing));
            missing -= taken.len();
            cut.push(taken);
            if !piece.is_empty() {
                self.gathered.push(piece);
            }
        }
        self.gathered.extend(pieces);
        self.gathered_bytes -= bytes - missing as u64;
        cut
    }
}

impl S3Upload {
    pub(super) fn new(shared: Arc<Shared>, key: &Key) -> S3Upload {
        S3Upload { shared, key: key.clone(), put_id: new_put_id(), state: Some(State::default()) }
    }

    fn error(&self, refused: Refusal) -> StoreError {
        self.shared.error(Action::UploadPart, Some(&self.key), refused)
    }

    fn take(&mut self) -> Result<State, StoreError> {
        self.state.take().ok_or_else(|| self.error(absent("an earlier write of it was given up")))
    }

    /// What a failed call leaves: the upload as it was, or nothing.
    fn settle<T>(&mut self, before: State, result: Result<T, Refusal>) -> Result<T, StoreError> {
        result.map_err(|refused| {
            if refused.kind != StoreErrorKind::NotFound {
                self.state = Some(before);
            }
            self.error(refused)
        })
    }

    /// Stores parts until less than one is gathered, or nothing when it is the `last`.
    async fn store_parts(&self, state: &mut State, last: bool) -> Result<(), Refusal> {
        while state.gathered_bytes >= PART_BYTES || (last && state.gathered_bytes > 0) {
            if state.parts.len() >= PARTS_MAX {
                let cause = format!("more than {PARTS_MAX} parts of {PART_BYTES} bytes");
                return Err(Refusal::new(StoreErrorKind::Unsupported, cause));
            }
            let id = match &state.upload_id {
                Some(id) => id.clone(),
                None => state.upload_id.insert(self.shared.create_upload(&self.key, &self.put_id).await?).clone(),
            };
            let part = state.cut(PART_BYTES.min(state.gathered_bytes));
            let number = state.parts.len() as i32 + 1;
            state.parts.push(self.shared.upload_part(&self.key, &id, number, &part).await?);
            state.stored_bytes += body::length(&part);
        }
        Ok(())
    }

    async fn finish(&self, state: &mut State) -> Result<(), Refusal> {
        let conditional = self.shared.honours_conditional_completion().await?;
        self.store_parts(state, true).await?;
        let id = state.upload_id.clone().expect("more than one part was gathered");
        if !conditional && self.shared.head(&self.key).await?.is_some() {
            return Err(taken());
        }
        match self.shared.complete_upload(&self.key, &id, &state.parts, conditional).await {
            Ok(()) => {}
            // Gone, or taken: by our own completion, whose answer was lost, or by a stranger.
            Err(refused) if matches!(refused.reply, Reply::UploadGone | Reply::Exists | Reply::Unclear) => {
                match self.shared.head(&self.key).await? {
                    Some(head) if head.put_id.as_deref() == Some(&self.put_id) => {}
                    Some(_) => return Err(taken()),
                    None if refused.reply == Reply::Unclear => return Err(refused),
                    None => return Err(absent("the store has lost the upload")),
                }
            }
            // S3's word for "begin anew".
            Err(refused) if refused.reply == Reply::Conflict => {
                return Err(Refusal { kind: StoreErrorKind::NotFound, ..refused });
            }
            Err(refused) => return Err(refused),
        }
        self.check_stored(state, conditional).await
    }

    /// A completed object has every byte of its parts: stores have answered success and lost some.
    async fn check_stored(&self, state: &State, conditional: bool) -> Result<(), Refusal> {
        if !conditional {
            return self.shared.verify(&self.key, state.stored_bytes, state.crc32.clone().finalize()).await;
        }
        let head = self.shared.head(&self.key).await?.ok_or_else(|| absent("completed, and gone"))?;
        match head.bytes == state.stored_bytes {
            true => Ok(()),
            false => {
                let cause = format!("{} bytes completed, {} there", state.stored_bytes, head.bytes);
                Err(Refusal::new(StoreErrorKind::Corrupt, cause))
            }
        }
    }
}

#[async_trait]
impl Upload for S3Upload {
    async fn append(&mut self, part: Bytes) -> Result<(), StoreError> {
        let before = self.take()?;
        let mut state = before.clone();
        state.gather(part);
        // Exactly one part may still be the whole object.
        if state.gathered_bytes <= PART_BYTES {
            self.state = Some(state);
            return Ok(());
        }
        if let Err(refused) = self.shared.may_write().await {
            self.state = Some(before);
            return Err(refused);
        }
        let result = self.store_parts(&mut state, false).await;
        // An upload that was begun stays begun: it is what clean-up would otherwise find.
        let before = State { upload_id: before.upload_id.clone().or_else(|| state.upload_id.clone()), ..before };
        self.settle(before, result)?;
        self.state = Some(state);
        Ok(())
    }

    async fn read_back(&mut self, range: Range<u64>) -> Result<Bytes, StoreError> {
        let cause = format!("bytes {} to {}: parts of an upload cannot be read", range.start, range.end);
        Err(self.shared.error(Action::Get, Some(&self.key), Refusal::new(StoreErrorKind::Unsupported, cause)))
    }

    async fn complete(&mut self) -> Result<(), StoreError> {
        let mut state = self.take()?;
        if state.upload_id.is_none() {
            let facts = Facts { stored_crc32: Some(state.crc32.clone().finalize()), raw_crc32: None };
            let stored = self.shared.put_new(&self.key, &state.gathered, &facts).await;
            if stored.as_ref().is_err_and(|error| !error.is(StoreErrorKind::NotFound)) {
                self.state = Some(state);
            }
            return stored;
        }
        let before = state.clone();
        match self.finish(&mut state).await {
            Ok(()) => Ok(()),
            // The last part may be stored by now, and is not stored again.
            Err(refused) if refused.kind != StoreErrorKind::NotFound => {
                let before = if state.parts.len() > before.parts.len() { state } else { before };
                self.settle(before, Err(refused))
            }
            Err(refused) => self.settle(before, Err(refused)),
        }
    }

    async fn abort(mut self: Box<Self>) -> Result<(), StoreError> {
        let id = self.state.take().and_then(|state| state.upload_id);
        let Some(id) = id else { return Ok(()) };
        let aborted = self.shared.abort_upload(&self.shared.name(&self.key), &id).await;
        aborted.map_err(|refused| self.shared.error(Action::AbortUpload, Some(&self.key), refused))
    }
}

impl Shared {
    pub(super) async fn create_upload(&self, key: &Key, put_id: &str) -> Result<String, Refusal> {
        let create = |client: Client| {
            let (encryption, kms_key) = encryption(&self.options);
            let checksum = (self.options.checksum == Checksum::Crc32).then_some(ChecksumAlgorithm::Crc32);
            client
                .create_multipart_upload()
                .bucket(&self.options.bucket)
                .key(self.name(key))
                .metadata(PUT_ID, put_id)
                .set_storage_class(storage_class(key, &self.options))
                .set_server_side_encryption(encryption)
                .set_ssekms_key_id(kms_key)
                .set_checksum_algorithm(checksum)
                .send()
        };
        let created = self.send(Action::CreateUpload, create).await?;
        created.upload_id().map(str::to_string).ok_or_else(super::read::not_s3)
    }

    pub(super) async fn upload_part(
        &self,
        key: &Key,
        id: &str,
        number: i32,
        part: &[Bytes],
    ) -> Result<CompletedPart, Refusal> {
        let bytes = body::length(part);
        let crc32 = body::crc32(part);
        let upload = |client: Client| {
            let (stream, checksum) = payload(&self.options, part, crc32);
            let signed = checksum.is_none();
            let upload = client.upload_part().bucket(&self.options.bucket).key(self.name(key));
            let upload = upload.upload_id(id).part_number(number).content_length(bytes as i64);
            let mut upload = upload.set_checksum_crc32(checksum).body(stream).customize();
            if !signed {
                upload = upload.disable_payload_signing();
            }
            upload.config_override(aws_sdk_s3::Config::builder().timeout_config(deadlines(bytes))).send()
        };
        let output = self.send(Action::UploadPart, upload).await?;
        let (_, checksum) = payload(&self.options, &[], crc32);
        let tag = output.e_tag().ok_or_else(super::read::not_s3)?;
        Ok(CompletedPart::builder().part_number(number).e_tag(tag).set_checksum_crc32(checksum).build())
    }

    pub(super) async fn complete_upload(
        &self,
        key: &Key,
        id: &str,
        parts: &[CompletedPart],
        conditional: bool,
    ) -> Result<(), Refusal> {
        let complete = |client: Client| {
            let upload = CompletedMultipartUpload::builder().set_parts(Some(parts.to_vec())).build();
            let complete = client.complete_multipart_upload().bucket(&self.options.bucket).key(self.name(key));
            let complete = complete.upload_id(id).multipart_upload(upload);
            let complete = if conditional { complete.if_none_match("*") } else { complete };
            // Putting parts together takes a store longer the more there are.
            let deadlines = deadlines(parts.len() as u64 * PART_BYTES / 4);
            complete.customize().config_override(aws_sdk_s3::Config::builder().timeout_config(deadlines)).send()
        };
        self.send(Action::CompleteUpload, complete).await.map(drop)
    }

    /// `name` with the repository's prefix. An upload that is not there is success.
    pub(super) async fn abort_upload(&self, name: &str, id: &str) -> Result<(), Refusal> {
        let abort = |client: Client| {
            client.abort_multipart_upload().bucket(&self.options.bucket).key(name).upload_id(id).send()
        };
        match self.send(Action::AbortUpload, abort).await {
            Ok(_) => Ok(()),
            Err(refused) if refused.kind == StoreErrorKind::NotFound => Ok(()),
            Err(refused) => Err(refused),
        }
    }

    /// Aborts uploads below our prefix that were begun more than `older_than` ago; how many.
    pub(super) async fn abort_abandoned(&self, older_than: Duration) -> Result<usize, StoreError> {
        let cutoff = SystemTime::now().checked_sub(older_than).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut aborted = 0;
        let mut after = None;
        for _ in 0..DEBRIS_PAGES_MAX {
            let page = self.list_uploads(after).await;
            let page = page.map_err(|refused| self.error(Action::ListUploads, None, refused))?;
            for upload in page.uploads() {
                let begun = upload.initiated().and_then(|time| SystemTime::try_from(*time).ok());
                let (Some(name), Some(id)) = (upload.key(), upload.upload_id()) else { continue };
                // The prefix once more: a store that ignores it must not cost a neighbour his upload.
                if begun.is_none_or(|begun| begun > cutoff) || !name.starts_with(&self.directory_prefix()) {
                    continue;
                }
                let result = self.abort_upload(name, id).await;
                result.map_err(|refused| self.error(Action::AbortUpload, None, refused))?;
                aborted += 1;
            }
            let next =
                page.next_key_marker().map(|key| (key.to_string(), page.next_upload_id_marker().map(str::to_string)));
            match page.is_truncated().unwrap_or(false) {
                true if next.is_some() => after = next,
                _ => break,
            }
        }
        Ok(aborted)
    }

    /// A page of unfinished uploads below our prefix, those behind this name and upload.
    pub(super) async fn list_uploads(
        &self,
        after: Option<(String, Option<String>)>,
    ) -> Result<ListMultipartUploadsOutput, Refusal> {
        let (key, id) = after.unzip();
        let list = |client: Client| {
            let list = client.list_multipart_uploads().bucket(&self.options.bucket).prefix(self.directory_prefix());
            list.set_key_marker(key.clone()).set_upload_id_marker(id.clone().flatten()).send()
        };
        self.send(Action::ListUploads, list).await
    }

    fn directory_prefix(&self) -> String {
        match self.options.prefix.as_str() {
            "" => String::new(),
            prefix => format!("{prefix}/"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_cut_exactly() {
        let mut state = State::default();
        for piece in ["abc", "", "defgh", "i"] {
            state.gather(Bytes::from_static(piece.as_bytes()));
        }
        let concat = |parts: Vec<Bytes>| String::from_utf8(parts.concat()).unwrap();
        assert_eq!(concat(state.cut(4)), "abcd");
        assert_eq!(state.gathered_bytes, 5);
        assert_eq!(concat(state.cut(4)), "efgh");
        assert_eq!(concat(state.cut(1)), "i");
        assert_eq!((state.gathered_bytes, state.gathered.len()), (0, 0));
        assert_eq!(state.crc32.finalize(), crc32fast::hash(b"abcdefghi"));
    }
}
