//! Owns: an S3 store's meaning, over memory: objects written once or over each other, conditions, checksums, listings
//! in pages, multipart uploads.
//! Does not own: HTTP and faults (`s3.rs`), signatures (the crate `s3s`).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::SystemTime;

use async_trait::async_trait;
use axum::http::HeaderMap;
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use s3s::checksum::ChecksumHasher;
use s3s::crypto::{Checksum as _, Md5};
use s3s::dto::*;
use s3s::{Body, S3, S3Request, S3Response, S3Result, TrailingHeaders, s3_error};

/// What S3 leaves as it is when a listing is asked for with `encoding-type=url`.
const LISTED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'_').remove(b'.').remove(b'/');
/// S3's own least size of every part but the last.
const PART_BYTES_MIN: usize = 5 << 20;

/// An object as it is stored.
#[derive(Clone, Debug)]
pub struct Stored {
    pub body: Bytes,
    pub metadata: BTreeMap<String, String>,
    pub storage_class: Option<String>,
    pub sse: Option<String>,
    pub crc32: Option<String>,
    pub is_multipart: bool,
    pub modified: SystemTime,
    e_tag: String,
}

/// A multipart upload nobody has completed or aborted.
#[derive(Clone, Debug)]
pub struct Unfinished {
    pub key: String,
    pub initiated: SystemTime,
    pub parts: BTreeMap<i32, Bytes>,
    metadata: BTreeMap<String, String>,
    storage_class: Option<String>,
    sse: Option<String>,
}

#[derive(Debug, Default)]
pub struct Bucket {
    pub objects: BTreeMap<String, Stored>,
    pub uploads: BTreeMap<String, Unfinished>,
}

#[derive(Debug, Default)]
pub struct Content {
    pub buckets: BTreeMap<String, Bucket>,
    /// The most keys in one page of a listing; S3's own is 1000.
    pub page_keys: usize,
    /// A store that ignores `If-None-Match` on a PUT, or on the completion of a multipart upload.
    pub ignores_put_condition: bool,
    pub ignores_complete_condition: bool,
    /// Without permission to list, a name that is not there is "access denied", not "not found".
    pub may_not_list: bool,
    last_upload: u64,
}

/// Shared by the server and the test that looks into it.
#[derive(Clone, Debug)]
pub struct Memory(Arc<Mutex<Content>>);

impl Memory {
    pub fn new(bucket: &str) -> Memory {
        let buckets = BTreeMap::from([(bucket.to_owned(), Bucket::default())]);
        Memory(Arc::new(Mutex::new(Content { buckets, page_keys: 1000, ..Content::default() })))
    }

    pub fn lock(&self) -> MutexGuard<'_, Content> {
        self.0.lock().expect("no test panics while it holds the content")
    }
}

impl Content {
    fn bucket(&mut self, name: &str) -> S3Result<&mut Bucket> {
        self.buckets.get_mut(name).ok_or_else(|| s3_error!(NoSuchBucket, "The specified bucket does not exist"))
    }

    fn object(&mut self, bucket: &str, key: &str) -> S3Result<&Stored> {
        let may_not_list = self.may_not_list;
        match self.bucket(bucket)?.objects.get(key) {
            Some(stored) => Ok(stored),
            None if may_not_list => Err(s3_error!(AccessDenied, "Access Denied")),
            None => Err(s3_error!(NoSuchKey, "The specified key does not exist.")),
        }
    }

    fn upload(&mut self, bucket: &str, id: &str, key: &str) -> S3Result<&mut Unfinished> {
        let upload = self.bucket(bucket)?.uploads.get_mut(id).filter(|upload| upload.key == key);
        upload.ok_or_else(|| s3_error!(NoSuchUpload, "The specified multipart upload does not exist."))
    }
}

/// A body that has arrived whole, and what it hashes to.
struct Received {
    body: Bytes,
    e_tag: String,
    crc32: Option<String>,
}

/// The checksums a request promises, in its headers or behind its body.
#[derive(Default)]
struct Promised {
    md5: Option<String>,
    crc32: Option<String>,
    crc32c: Option<String>,
    crc64nvme: Option<String>,
    sha1: Option<String>,
    sha256: Option<String>,
}

async fn receive(
    body: Option<StreamingBlob>,
    length: Option<i64>,
    mut promised: Promised,
    trailers: Option<TrailingHeaders>,
) -> S3Result<Received> {
    let mut whole = BytesMut::new();
    if let Some(mut body) = body {
        while let Some(chunk) = body.next().await {
            whole.extend_from_slice(&chunk.map_err(|error| s3_error!(IncompleteBody, "{error}"))?);
        }
    }
    let whole = whole.freeze();
    if length.is_some_and(|length| length != whole.len() as i64) {
        return Err(s3_error!(IncompleteBody, "{} bytes of {length:?}", whole.len()));
    }
    if let Some(trailers) = trailers.and_then(|trailers| trailers.take()) {
        let trailer = |name: &str| trailers.get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        promised.crc32 = promised.crc32.or(trailer("x-amz-checksum-crc32"));
        promised.crc32c = promised.crc32c.or(trailer("x-amz-checksum-crc32c"));
        promised.crc64nvme = promised.crc64nvme.or(trailer("x-amz-checksum-crc64nvme"));
        promised.sha1 = promised.sha1.or(trailer("x-amz-checksum-sha1"));
        promised.sha256 = promised.sha256.or(trailer("x-amz-checksum-sha256"));
    }
    let mut hasher = ChecksumHasher {
        crc32: promised.crc32.as_ref().map(|_| Default::default()),
        crc32c: promised.crc32c.as_ref().map(|_| Default::default()),
        sha1: promised.sha1.as_ref().map(|_| Default::default()),
        sha256: promised.sha256.as_ref().map(|_| Default::default()),
        crc64nvme: promised.crc64nvme.as_ref().map(|_| Default::default()),
    };
    hasher.update(&whole);
    let computed = hasher.finalize();
    let pairs = [
        ("CRC32", &promised.crc32, computed.checksum_crc32),
        ("CRC32C", &promised.crc32c, computed.checksum_crc32c),
        ("CRC64NVME", &promised.crc64nvme, computed.checksum_crc64nvme),
        ("SHA1", &promised.sha1, computed.checksum_sha1),
        ("SHA256", &promised.sha256, computed.checksum_sha256),
    ];
    for (name, promised, computed) in pairs {
        if *promised != computed {
            return Err(s3_error!(BadDigest, "The {name} you specified did not match the calculated checksum."));
        }
    }
    // Content-MD5 is base64 where an ETag is hexadecimal; nothing of ours sends it.
    assert!(promised.md5.is_none(), "Content-MD5 is not checked here");
    let e_tag = Md5::checksum(&whole).iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Received { body: whole, e_tag, crc32: promised.crc32 })
}

/// A body in chunks of its own signatures has two lengths; the second is the content's.
fn length_of(headers: &HeaderMap, content_length: Option<i64>) -> Option<i64> {
    let decoded = headers.get("x-amz-decoded-content-length");
    decoded.map_or(content_length, |length| length.to_str().ok()?.parse().ok())
}

fn metadata_of(metadata: Option<Metadata>) -> BTreeMap<String, String> {
    metadata.unwrap_or_default().into_iter().collect()
}

/// Only `*` is known: nothing of ours asks for another condition.
fn is_create(condition: &Option<ETagCondition>) -> S3Result<bool> {
    match condition {
        None => Ok(false),
        Some(ETagCondition::Any) => Ok(true),
        Some(ETagCondition::ETag(_)) => Err(s3_error!(NotImplemented, "only If-None-Match: * is implemented")),
    }
}

fn taken() -> s3s::S3Error {
    s3_error!(PreconditionFailed, "At least one of the pre-conditions you specified did not hold")
}

/// Once per field, as the generated types share no trait.
macro_rules! promised {
    ($input:expr) => {
        Promised {
            md5: $input.content_md5.take(),
            crc32: $input.checksum_crc32.take(),
            crc32c: $input.checksum_crc32c.take(),
            crc64nvme: $input.checksum_crc64nvme.take(),
            sha1: $input.checksum_sha1.take(),
            sha256: $input.checksum_sha256.take(),
        }
    };
}

#[async_trait]
impl S3 for Memory {
    async fn create_bucket(&self, req: S3Request<CreateBucketInput>) -> S3Result<S3Response<CreateBucketOutput>> {
        self.lock().buckets.entry(req.input.bucket).or_default();
        Ok(S3Response::new(CreateBucketOutput::default()))
    }

    async fn head_bucket(&self, req: S3Request<HeadBucketInput>) -> S3Result<S3Response<HeadBucketOutput>> {
        let mut content = self.lock();
        content.bucket(&req.input.bucket)?;
        if content.may_not_list {
            return Err(s3_error!(AccessDenied, "Access Denied"));
        }
        Ok(S3Response::new(HeadBucketOutput::default()))
    }

    async fn put_object(&self, req: S3Request<PutObjectInput>) -> S3Result<S3Response<PutObjectOutput>> {
        let mut input = req.input;
        let promised = promised!(input);
        let length = length_of(&req.headers, input.content_length);
        let received = receive(input.body.take(), length, promised, req.trailing_headers).await?;
        let is_create = is_create(&input.if_none_match)?;
        let mut content = self.lock();
        let is_create = is_create && !content.ignores_put_condition;
        let objects = &mut content.bucket(&input.bucket)?.objects;
        if is_create && objects.contains_key(&input.key) {
            return Err(taken());
        }
        let stored = Stored {
            body: received.body,
            metadata: metadata_of(input.metadata),
            storage_class: input.storage_class.map(|class| class.as_str().to_owned()),
            sse: input.server_side_encryption.as_ref().map(|sse| sse.as_str().to_owned()),
            crc32: received.crc32.clone(),
            is_multipart: false,
            modified: SystemTime::now(),
            e_tag: received.e_tag.clone(),
        };
        objects.insert(input.key, stored);
        Ok(S3Response::new(PutObjectOutput {
            e_tag: Some(ETag::Strong(received.e_tag)),
            checksum_crc32: received.crc32,
            server_side_encryption: input.server_side_encryption,
            ..Default::default()
        }))
    }

    async fn get_object(&self, req: S3Request<GetObjectInput>) -> S3Result<S3Response<GetObjectOutput>> {
        let input = req.input;
        let mut content = self.lock();
        let stored = content.object(&input.bucket, &input.key)?.clone();
        if let Some(ETagCondition::ETag(e_tag)) = &input.if_match
            && e_tag.value() != stored.e_tag
        {
            return Err(taken());
        }
        let total = stored.body.len() as u64;
        let (body, content_range) = match &input.range {
            None => (stored.body.clone(), None),
            Some(range) => {
                let range = range.check(total)?;
                let shown = format!("bytes {}-{}/{total}", range.start, range.end - 1);
                (stored.body.slice(range.start as usize..range.end as usize), Some(shown))
            }
        };
        let output = GetObjectOutput {
            content_length: Some(body.len() as i64),
            checksum_crc32: stored.crc32.clone().filter(|_| content_range.is_none() && input.checksum_mode.is_some()),
            content_range,
            body: Some(StreamingBlob::from(Body::from(body))),
            e_tag: Some(ETag::Strong(stored.e_tag)),
            last_modified: Some(stored.modified.into()),
            metadata: Some(stored.metadata.into_iter().collect()),
            storage_class: stored.storage_class.map(StorageClass::from),
            ..Default::default()
        };
        Ok(S3Response::new(output))
    }

    async fn head_object(&self, req: S3Request<HeadObjectInput>) -> S3Result<S3Response<HeadObjectOutput>> {
        let mut content = self.lock();
        let stored = content.object(&req.input.bucket, &req.input.key)?.clone();
        Ok(S3Response::new(HeadObjectOutput {
            content_length: Some(stored.body.len() as i64),
            checksum_crc32: stored.crc32.filter(|_| req.input.checksum_mode.is_some()),
            e_tag: Some(ETag::Strong(stored.e_tag)),
            last_modified: Some(stored.modified.into()),
            metadata: Some(stored.metadata.into_iter().collect()),
            server_side_encryption: stored.sse.map(ServerSideEncryption::from),
            storage_class: stored.storage_class.map(StorageClass::from),
            ..Default::default()
        }))
    }

    async fn delete_object(&self, req: S3Request<DeleteObjectInput>) -> S3Result<S3Response<DeleteObjectOutput>> {
        self.lock().bucket(&req.input.bucket)?.objects.remove(&req.input.key);
        Ok(S3Response::with_status(DeleteObjectOutput::default(), axum::http::StatusCode::NO_CONTENT))
    }

    async fn delete_objects(&self, req: S3Request<DeleteObjectsInput>) -> S3Result<S3Response<DeleteObjectsOutput>> {
        let mut content = self.lock();
        let objects = &mut content.bucket(&req.input.bucket)?.objects;
        let mut deleted = Vec::new();
        for object in req.input.delete.objects {
            objects.remove(&object.key);
            deleted.push(DeletedObject { key: Some(object.key), ..Default::default() });
        }
        Ok(S3Response::new(DeleteObjectsOutput { deleted: Some(deleted), ..Default::default() }))
    }

    async fn list_objects_v2(&self, req: S3Request<ListObjectsV2Input>) -> S3Result<S3Response<ListObjectsV2Output>> {
        let input = req.input;
        let mut content = self.lock();
        let asked = input.max_keys.map_or(1000, |keys| keys.clamp(0, 1000) as usize);
        let page_keys = asked.min(content.page_keys);
        let prefix = input.prefix.clone().unwrap_or_default();
        let is_encoded = input.encoding_type.as_ref().is_some_and(|encoding| encoding.as_str() == "url");
        let spell = |text: &str| match is_encoded {
            true => utf8_percent_encode(text, LISTED).to_string(),
            false => text.to_owned(),
        };
        // The token is the last name given, opaque as S3's is.
        let after = match &input.continuation_token {
            Some(token) => Some(untoken(token).ok_or_else(|| s3_error!(InvalidArgument, "no token of ours"))?),
            None => input.start_after.clone(),
        };
        let (mut contents, mut prefixes) = (Vec::new(), BTreeSet::new());
        let (mut last, mut is_truncated) = (None, false);
        for (key, stored) in &content.bucket(&input.bucket)?.objects {
            let Some(rest) = key.strip_prefix(&prefix) else { continue };
            let delimiter = input.delimiter.as_deref().filter(|delimiter| !delimiter.is_empty());
            let group = delimiter.and_then(|delimiter| {
                rest.find(delimiter).map(|at| format!("{prefix}{}", &rest[..at + delimiter.len()]))
            });
            let name = group.as_ref().unwrap_or(key);
            if after.as_ref().is_some_and(|after| name <= after) || prefixes.contains(name) {
                continue;
            }
            if contents.len() + prefixes.len() == page_keys {
                is_truncated = true;
                break;
            }
            last = Some(name.clone());
            match group {
                Some(group) => {
                    prefixes.insert(group);
                }
                None => contents.push(Object {
                    key: Some(spell(key)),
                    size: Some(stored.body.len() as i64),
                    e_tag: Some(ETag::Strong(stored.e_tag.clone())),
                    last_modified: Some(stored.modified.into()),
                    ..Default::default()
                }),
            }
        }
        let common: Vec<_> = prefixes.iter().map(|group| CommonPrefix { prefix: Some(spell(group)) }).collect();
        Ok(S3Response::new(ListObjectsV2Output {
            name: Some(input.bucket),
            prefix: Some(spell(&prefix)),
            max_keys: Some(page_keys as i32),
            key_count: Some((contents.len() + common.len()) as i32),
            continuation_token: input.continuation_token,
            next_continuation_token: last.filter(|_| is_truncated).map(|last| token(&last)),
            is_truncated: Some(is_truncated),
            contents: Some(contents),
            common_prefixes: Some(common),
            delimiter: input.delimiter.as_deref().map(spell),
            encoding_type: input.encoding_type,
            ..Default::default()
        }))
    }

    async fn create_multipart_upload(
        &self,
        req: S3Request<CreateMultipartUploadInput>,
    ) -> S3Result<S3Response<CreateMultipartUploadOutput>> {
        let input = req.input;
        let mut content = self.lock();
        content.last_upload += 1;
        let id = format!("upload-{:08}", content.last_upload);
        let upload = Unfinished {
            key: input.key.clone(),
            initiated: SystemTime::now(),
            parts: BTreeMap::new(),
            metadata: metadata_of(input.metadata),
            storage_class: input.storage_class.map(|class| class.as_str().to_owned()),
            sse: input.server_side_encryption.map(|sse| sse.as_str().to_owned()),
        };
        content.bucket(&input.bucket)?.uploads.insert(id.clone(), upload);
        Ok(S3Response::new(CreateMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            upload_id: Some(id),
            checksum_algorithm: input.checksum_algorithm,
            ..Default::default()
        }))
    }

    async fn upload_part(&self, req: S3Request<UploadPartInput>) -> S3Result<S3Response<UploadPartOutput>> {
        let mut input = req.input;
        let promised = promised!(input);
        let length = length_of(&req.headers, input.content_length);
        let received = receive(input.body.take(), length, promised, req.trailing_headers).await?;
        let mut content = self.lock();
        let upload = content.upload(&input.bucket, &input.upload_id, &input.key)?;
        upload.parts.insert(input.part_number, received.body);
        Ok(S3Response::new(UploadPartOutput {
            e_tag: Some(ETag::Strong(received.e_tag)),
            checksum_crc32: received.crc32,
            ..Default::default()
        }))
    }

    async fn complete_multipart_upload(
        &self,
        req: S3Request<CompleteMultipartUploadInput>,
    ) -> S3Result<S3Response<CompleteMultipartUploadOutput>> {
        let input = req.input;
        let is_create = is_create(&input.if_none_match)?;
        let mut content = self.lock();
        let is_create = is_create && !content.ignores_complete_condition;
        let upload = content.upload(&input.bucket, &input.upload_id, &input.key)?.clone();
        let bucket = content.bucket(&input.bucket)?;
        if is_create && bucket.objects.contains_key(&input.key) {
            return Err(taken());
        }
        let named = input.multipart_upload.and_then(|upload| upload.parts).unwrap_or_default();
        let mut body = BytesMut::new();
        for (index, part) in named.iter().enumerate() {
            let stored = part.part_number.and_then(|number| upload.parts.get(&number));
            let stored = stored.ok_or_else(|| s3_error!(InvalidPart, "a part is not there"))?;
            let tag: String = Md5::checksum(stored).iter().map(|byte| format!("{byte:02x}")).collect();
            if part.e_tag.as_ref().is_none_or(|named| named.value() != tag) {
                return Err(s3_error!(InvalidPart, "a part's entity tag does not match"));
            }
            if index + 1 < named.len() && stored.len() < PART_BYTES_MIN {
                return Err(s3_error!(EntityTooSmall, "a part that is not the last has {} bytes", stored.len()));
            }
            body.extend_from_slice(stored);
        }
        if named.is_empty() || !named.is_sorted_by_key(|part| part.part_number) {
            return Err(s3_error!(InvalidPartOrder, "parts must be named in ascending order"));
        }
        let body = body.freeze();
        let tag: String = Md5::checksum(&body).iter().map(|byte| format!("{byte:02x}")).collect();
        let e_tag = format!("{tag}-{}", named.len());
        let stored = Stored {
            body,
            metadata: upload.metadata,
            storage_class: upload.storage_class,
            sse: upload.sse,
            crc32: None,
            is_multipart: true,
            modified: SystemTime::now(),
            e_tag: e_tag.clone(),
        };
        bucket.objects.insert(input.key.clone(), stored);
        bucket.uploads.remove(&input.upload_id);
        Ok(S3Response::new(CompleteMultipartUploadOutput {
            bucket: Some(input.bucket),
            key: Some(input.key),
            e_tag: Some(ETag::Strong(e_tag)),
            ..Default::default()
        }))
    }

    async fn abort_multipart_upload(
        &self,
        req: S3Request<AbortMultipartUploadInput>,
    ) -> S3Result<S3Response<AbortMultipartUploadOutput>> {
        let input = req.input;
        let mut content = self.lock();
        content.upload(&input.bucket, &input.upload_id, &input.key)?;
        content.bucket(&input.bucket)?.uploads.remove(&input.upload_id);
        let output = AbortMultipartUploadOutput::default();
        Ok(S3Response::with_status(output, axum::http::StatusCode::NO_CONTENT))
    }

    async fn list_multipart_uploads(
        &self,
        req: S3Request<ListMultipartUploadsInput>,
    ) -> S3Result<S3Response<ListMultipartUploadsOutput>> {
        let input = req.input;
        let mut content = self.lock();
        let page_keys = content.page_keys;
        let is_encoded = input.encoding_type.as_ref().is_some_and(|encoding| encoding.as_str() == "url");
        let prefix = input.prefix.clone().unwrap_or_default();
        let marker = input.key_marker.clone().map(|key| (key, input.upload_id_marker.clone().unwrap_or_default()));
        let mut all: Vec<_> = content.bucket(&input.bucket)?.uploads.iter().collect();
        all.sort_by_key(|(id, upload)| (upload.key.clone(), (*id).clone()));
        all.retain(|(id, upload)| {
            let is_after = |marker: &(String, String)| (&upload.key, *id) > (&marker.0, &marker.1);
            upload.key.starts_with(&prefix) && marker.as_ref().is_none_or(is_after)
        });
        let is_truncated = all.len() > page_keys;
        all.truncate(page_keys);
        let spell = |text: &str| match is_encoded {
            true => utf8_percent_encode(text, LISTED).to_string(),
            false => text.to_owned(),
        };
        let last = all.last().filter(|_| is_truncated).map(|(id, upload)| (spell(&upload.key), (*id).clone()));
        let uploads = all.iter().map(|(id, upload)| MultipartUpload {
            key: Some(spell(&upload.key)),
            upload_id: Some((*id).clone()),
            initiated: Some(upload.initiated.into()),
            ..Default::default()
        });
        Ok(S3Response::new(ListMultipartUploadsOutput {
            uploads: Some(uploads.collect()),
            bucket: Some(input.bucket),
            prefix: input.prefix,
            is_truncated: Some(is_truncated),
            next_key_marker: last.as_ref().map(|last| last.0.clone()),
            next_upload_id_marker: last.map(|last| last.1),
            encoding_type: input.encoding_type,
            ..Default::default()
        }))
    }
}

fn token(name: &str) -> String {
    name.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn untoken(token: &str) -> Option<String> {
    let digits = token.as_bytes().chunks(2);
    let bytes: Option<Vec<u8>> =
        digits.map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok()).collect();
    String::from_utf8(bytes?).ok()
}
