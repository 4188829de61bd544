//! Owns: storing one object under a name that must be free, and telling our own lost success from a stranger's object.
//! Does not own: attempts within a request (`client.rs`), whether equal content is success (the caller).
//! Rests on `proto-notes/08-durability.md`, "an object in S3".

use aws_sdk_s3::Client;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{ServerSideEncryption as SdkEncryption, StorageClass};
use aws_smithy_types::base64;
use bytes::Bytes;

use super::answer::{Action, Refusal, Reply};
use super::client::{Shared, allowance, deadlines};
use super::read::not_s3;
use super::{Checksum, S3Options, ServerSideEncryption, body};
use crate::repository::{Facts, Key, StoreError, StoreErrorKind};

/// Which call wrote an object: random, so that a call whose answer was lost recognises what it wrote.
pub(super) const PUT_ID: &str = "seawall-put-id";
/// CRC-32 of the raw content, eight hexadecimal digits.
pub(super) const RAW_CRC32: &str = "seawall-raw-crc32";
/// How often a write begins again because what had its name was deleted meanwhile.
const RACES_MAX: usize = 3;

/// From the system's randomness: two machines that started alike must not take each other's objects for their own.
pub(super) fn new_put_id() -> String {
    let mut id = [0; 16];
    aws_lc_rs::rand::fill(&mut id).expect("the system gives random bytes");
    format!("{:032x}", u128::from_be_bytes(id))
}

/// One object on its way.
#[derive(Debug)]
struct Object<'a> {
    key: &'a Key,
    parts: &'a [Bytes],
    bytes: u64,
    stored_crc32: u32,
    raw_crc32: Option<u32>,
    put_id: String,
    storage_class: Option<StorageClass>,
}

impl Shared {
    pub(super) async fn put_new(&self, key: &Key, parts: &[Bytes], facts: &Facts) -> Result<(), StoreError> {
        let object = Object {
            key,
            parts,
            bytes: body::length(parts),
            stored_crc32: facts.stored_crc32.unwrap_or_else(|| body::crc32(parts)),
            raw_crc32: facts.raw_crc32,
            put_id: new_put_id(),
            storage_class: storage_class(key, &self.options),
        };
        let stored = match self.honours_conditional_put().await? {
            true => self.put_conditionally(&object).await,
            false => self.put_checked(&object).await,
        };
        stored.map_err(|refused| self.error(Action::Put, Some(key), refused))
    }

    /// Stores a small object, whatever has its name, to see whether the store knows a class.
    pub(super) async fn put_with_class(&self, key: &Key, body: &Bytes, class: &str) -> Result<(), Refusal> {
        let parts = std::slice::from_ref(body);
        let object = Object {
            key,
            parts,
            bytes: body.len() as u64,
            stored_crc32: body::crc32(parts),
            raw_crc32: None,
            put_id: new_put_id(),
            storage_class: Some(StorageClass::from(class)),
        };
        self.put_object(&object, false).await
    }

    async fn put_conditionally(&self, object: &Object<'_>) -> Result<(), Refusal> {
        for _ in 0..RACES_MAX {
            let refused = match self.put_object(object, true).await {
                Err(refused) if refused.reply == Reply::Exists => refused,
                stored => return stored,
            };
            // The first attempt's success may have been lost on its way to us.
            match self.head(object.key).await? {
                Some(head) if head.put_id.as_deref() == Some(&object.put_id) => return Ok(()),
                Some(_) => return Err(refused),
                None => {}
            }
        }
        Err(Refusal::new(StoreErrorKind::Unavailable, "what has its name is deleted again and again"))
    }

    /// Where the store cannot refuse, and the operator vouches that nobody else writes: look, write, read back.
    async fn put_checked(&self, object: &Object<'_>) -> Result<(), Refusal> {
        if self.head(object.key).await?.is_some() {
            return Err(taken());
        }
        self.put_object(object, false).await?;
        self.verify(object.key, object.bytes, object.stored_crc32).await
    }

    async fn put_object(&self, object: &Object<'_>, conditional: bool) -> Result<(), Refusal> {
        let put = |client: Client| {
            let mut put = client
                .put_object()
                .bucket(&self.options.bucket)
                .key(self.name(object.key))
                .content_length(object.bytes as i64)
                .metadata(PUT_ID, &object.put_id)
                .set_storage_class(object.storage_class.clone());
            if conditional {
                put = put.if_none_match("*");
            }
            if let Some(raw) = object.raw_crc32 {
                put = put.metadata(RAW_CRC32, format!("{raw:08x}"));
            }
            let (encryption, kms_key) = encryption(&self.options);
            put = put.set_server_side_encryption(encryption).set_ssekms_key_id(kms_key);
            let (stream, checksum) = payload(&self.options, object.parts, object.stored_crc32);
            let signed = checksum.is_none();
            let mut put = put.set_checksum_crc32(checksum).body(stream).customize();
            if !signed {
                put = put.disable_payload_signing();
            }
            // The client's own deadlines do for what is small: a commit may wait for it, and an override costs it time.
            if !allowance(object.bytes).is_zero() {
                put = put.config_override(aws_sdk_s3::Config::builder().timeout_config(deadlines(object.bytes)));
            }
            put.send()
        };
        let output = self.send(Action::Put, put).await?;
        // "200" says every proxy and every captive portal: an S3 store says what it has stored.
        output.e_tag().map(drop).ok_or_else(not_s3)
    }
}

pub(super) fn taken() -> Refusal {
    let mut refused = Refusal::new(StoreErrorKind::AlreadyExists, "the name is taken");
    refused.reply = Reply::Exists;
    refused
}

/// A body, and the CRC-32 the store checks it with. Without one the body's SHA-256 becomes part of the signature: slower,
/// but something always tells the store what it should have received.
pub(super) fn payload(options: &S3Options, parts: &[Bytes], crc32: u32) -> (ByteStream, Option<String>) {
    match options.checksum {
        Checksum::Crc32 => (body::streamed(parts), Some(base64::encode(crc32.to_be_bytes()))),
        Checksum::None => (body::gathered(parts), None),
    }
}

pub(super) fn encryption(options: &S3Options) -> (Option<SdkEncryption>, Option<String>) {
    match &options.sse {
        None => (None, None),
        Some(ServerSideEncryption::S3) => (Some(SdkEncryption::Aes256), None),
        Some(ServerSideEncryption::Kms { key }) => (Some(SdkEncryption::AwsKms), key.clone()),
    }
}

/// Only sealed segments and volumes of backups: what is small, or deleted soon, costs more in other classes.
pub(super) fn storage_class(key: &Key, options: &S3Options) -> Option<StorageClass> {
    let class = if is_segment(key) {
        &options.storage_class.wal
    } else if is_volume(key) {
        &options.storage_class.backup
    } else {
        &None
    };
    class.as_deref().map(StorageClass::from)
}

/// `…/wal/<timeline and log>/<segment>.zst[.age]`
fn is_segment(key: &Key) -> bool {
    let is_hex = |text: &str, digits| text.len() == digits && text.bytes().all(|b| b.is_ascii_hexdigit());
    let parts: Vec<&str> = key.as_str().split('/').collect();
    let [.., wal, directory, name] = parts[..] else { return false };
    let name = name.strip_suffix(".age").unwrap_or(name);
    wal == "wal" && is_hex(directory, 16) && name.strip_suffix(".zst").is_some_and(|name| is_hex(name, 24))
}

/// `…/backups/<backup>/<tablespace>/<n>.tar.zst[.age]`
fn is_volume(key: &Key) -> bool {
    let name = key.as_str().strip_suffix(".age").unwrap_or(key.as_str());
    key.as_str().contains("/backups/") && name.ends_with(".tar.zst")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::repository::s3::StorageClasses;

    #[test]
    fn storage_classes_are_for_segments_and_volumes() {
        let options = S3Options {
            storage_class: StorageClasses { wal: Some("STANDARD_IA".into()), backup: Some("GLACIER_IR".into()) },
            ..S3Options::default()
        };
        let class = |key: &str| storage_class(&Key::new(key), &options).map(|class| class.as_str().to_string());
        let wal = "main/1/wal/0000000100000002/0000000100000002000000A7";
        assert_eq!(class(&format!("{wal}.zst")).as_deref(), Some("STANDARD_IA"));
        assert_eq!(class(&format!("{wal}.zst.age")).as_deref(), Some("STANDARD_IA"));
        assert_eq!(class("main/1/backups/20261122T110000Z-full/base/0001.tar.zst").as_deref(), Some("GLACIER_IR"));
        assert_eq!(class("main/1/backups/20261122T110000Z-full/base/0001.tar.zst.age").as_deref(), Some("GLACIER_IR"));
        for other in [
            format!("{wal}.tail/0000000003-00000002A8000000-00000002A8012340-00c0ffee-0.zst"),
            format!("{wal}.conflict-0000beef.zst"),
            format!("{wal}-0000000100000002000000B6-0000000003.index.json"),
            "main/1/backups/20261122T110000Z-full/backup.json".to_string(),
            "main/1/lineage.json".to_string(),
            "repository.json".to_string(),
        ] {
            assert_eq!(class(&other), None, "{other}");
        }
    }

    #[test]
    fn the_checksum_is_sent_as_the_store_expects_it() {
        let (_, checksum) = payload(&S3Options::default(), &[], crc32fast::hash(b"123456789"));
        assert_eq!(checksum.as_deref(), Some("y/Q5Jg=="), "big-endian CBF43926");
        let without = S3Options { checksum: Checksum::None, ..S3Options::default() };
        assert_eq!(payload(&without, &[], 0).1, None);
    }
}
