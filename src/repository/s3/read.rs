//! Owns: what is in the store: heads, ranges, listings; deleting.
//! Does not own: what an answer means (`answer.rs`).
//!
//! A listing never proves that one object is absent, and neither does a `HEAD` that says 404: its answer has no body
//! that would tell a missing object from a missing bucket, or an S3 store from any web server. A `GET` does.

use std::ops::Range;

use aws_sdk_s3::Client;
use aws_sdk_s3::operation::list_objects_v2::ListObjectsV2Output;
use aws_sdk_s3::types::EncodingType;
use bytes::{Bytes, BytesMut};
use percent_encoding::percent_decode_str;
use tokio::time::{Instant, timeout_at};

use super::answer::{Action, Refusal};
use super::client::{STALL, Shared, allowance, deadlines};
use super::put::{PUT_ID, RAW_CRC32};
use crate::repository::{Entry, Key, StoreErrorKind};

/// More than any object has; a range beyond it is not even asked for.
const OBJECT_BYTES_MAX: u64 = 1 << 50;
/// Of 1000 names each. A directory of ours has some hundred names.
const LIST_PAGES_MAX: usize = 2000;
/// Reads begin again this often when the answer breaks off.
const READ_ATTEMPTS: usize = 3;
/// Read back in pieces of this size, so that verifying needs little memory.
const VERIFY_BYTES: u64 = 4 << 20;

/// What the store says of an object without sending it.
#[derive(Clone, Debug)]
pub(super) struct Head {
    pub bytes: u64,
    pub put_id: Option<String>,
    pub raw_crc32: Option<u32>,
}

impl Shared {
    /// `None` only when an S3 store says, in so many words, that there is no such object.
    pub(super) async fn head(&self, key: &Key) -> Result<Option<Head>, Refusal> {
        let head = |client: Client| client.head_object().bucket(&self.options.bucket).key(self.name(key)).send();
        let output = match self.send(Action::Head, head).await {
            Ok(output) => output,
            // Refused without words: a GET is refused with some.
            Err(refused) if refused.kind != StoreErrorKind::Unavailable => return self.head_by_get(key).await,
            Err(refused) => return Err(refused),
        };
        output.e_tag().ok_or_else(not_s3)?;
        let metadata = |name: &str| output.metadata().and_then(|all| all.get(name)).cloned();
        let bytes = output.content_length().and_then(|bytes| u64::try_from(bytes).ok());
        Ok(Some(Head {
            bytes: bytes.ok_or_else(not_s3)?,
            put_id: metadata(PUT_ID),
            raw_crc32: metadata(RAW_CRC32).and_then(|text| u32::from_str_radix(&text, 16).ok()),
        }))
    }

    /// The same by asking for the first byte.
    async fn head_by_get(&self, key: &Key) -> Result<Option<Head>, Refusal> {
        let get = |client: Client| {
            client.get_object().bucket(&self.options.bucket).key(self.name(key)).range("bytes=0-0").send()
        };
        let output = match self.send(Action::Get, get).await {
            Ok(output) => output,
            Err(refused) if refused.kind == StoreErrorKind::NotFound => return Ok(None),
            // There is no first byte.
            Err(refused) if refused.kind == StoreErrorKind::Corrupt => {
                return Ok(Some(Head { bytes: 0, put_id: None, raw_crc32: None }));
            }
            Err(refused) => return Err(refused),
        };
        output.e_tag().ok_or_else(not_s3)?;
        let metadata = |name: &str| output.metadata().and_then(|all| all.get(name)).cloned();
        let total = output.content_range().and_then(|range| range.rsplit_once('/')?.1.parse().ok());
        let whole = output.content_length().and_then(|bytes| u64::try_from(bytes).ok());
        Ok(Some(Head {
            bytes: total.or(whole).ok_or_else(not_s3)?,
            put_id: metadata(PUT_ID),
            raw_crc32: metadata(RAW_CRC32).and_then(|text| u32::from_str_radix(&text, 16).ok()),
        }))
    }

    pub(super) async fn fetch(&self, key: &Key, range: Range<u64>) -> Result<Bytes, Refusal> {
        if range.is_empty() || range.end > OBJECT_BYTES_MAX {
            let head = self.head(key).await?.ok_or_else(|| absent("no such object"))?;
            return match range.start <= range.end && range.end <= head.bytes {
                true => Ok(Bytes::new()),
                false => Err(short(&range, head.bytes)),
            };
        }
        let mut broken_off = None;
        for _ in 0..READ_ATTEMPTS {
            match self.fetch_once(key, &range).await? {
                Ok(content) => return Ok(content),
                Err(cause) => broken_off = Some(cause),
            }
        }
        Err(Refusal::new(StoreErrorKind::Unavailable, broken_off.unwrap_or_default()))
    }

    /// The inner error is an answer that began well and broke off.
    async fn fetch_once(&self, key: &Key, range: &Range<u64>) -> Result<Result<Bytes, String>, Refusal> {
        let wanted = range.end - range.start;
        let get = |client: Client| {
            let get = client.get_object().bucket(&self.options.bucket).key(self.name(key));
            let get = get.range(format!("bytes={}-{}", range.start, range.end - 1)).customize();
            get.config_override(aws_sdk_s3::Config::builder().timeout_config(deadlines(0))).send()
        };
        let output = self.send(Action::Get, get).await.map_err(|refused| match refused.kind {
            StoreErrorKind::Corrupt => {
                Refusal::new(StoreErrorKind::Corrupt, format!("{}: {}", asked(range), refused.cause))
            }
            _ => refused,
        })?;
        // Every object of an S3 store has an entity tag; a page that answers to everything mostly has none.
        output.e_tag().ok_or_else(not_s3)?;
        let bytes = output.content_length().and_then(|bytes| u64::try_from(bytes).ok()).ok_or_else(not_s3)?;
        match output.content_range() {
            Some(got) if got.starts_with(&format!("bytes {}-", range.start)) && bytes == wanted => {}
            Some(got) => {
                let total = got.rsplit_once('/').and_then(|(_, total)| total.parse().ok());
                return Err(short(range, total.unwrap_or(range.start + bytes)));
            }
            // A store may send the whole object, and say so by not saying anything of a range.
            None if range.start == 0 && bytes == wanted => {}
            None if range.end > bytes => return Err(short(range, bytes)),
            None => {
                return Err(Refusal::new(
                    StoreErrorKind::Misconfigured,
                    "the store sends whole objects when asked for a range",
                )
                .hinted(
                    "restoring needs ranges (RFC 9110, section 14): use another store, or mend what stands between",
                ));
            }
        }
        Ok(collect(output.body, wanted).await)
    }

    /// Names directly below `directory`, of every page.
    pub(super) async fn list_directory(&self, directory: Option<&Key>) -> Result<Vec<Entry>, Refusal> {
        let prefix = match (directory, self.options.prefix.as_str()) {
            (Some(key), _) => format!("{}/", self.name(key)),
            (None, "") => String::new(),
            (None, prefix) => format!("{prefix}/"),
        };
        let mut entries = Vec::new();
        let mut token: Option<String> = None;
        for _ in 0..LIST_PAGES_MAX {
            let list = |client: Client| {
                let list = client.list_objects_v2().bucket(&self.options.bucket).prefix(&prefix).delimiter("/");
                list.encoding_type(EncodingType::Url).set_continuation_token(token.clone()).send()
            };
            let page = self.send(Action::List, list).await?;
            entries.extend(entries_of(&page, &prefix)?);
            token = next_page(&page, token)?;
            if token.is_none() {
                // Pages may overlap when names appear between them.
                entries.sort();
                entries.dedup();
                return Ok(entries);
            }
        }
        Err(Refusal::new(StoreErrorKind::Unavailable, format!("more than {LIST_PAGES_MAX} pages of names")))
    }

    /// Objects at any depth below the names `first` to `last` of `directory`, a thousand in a page. `None` where the
    /// store does not list in the order of the names (as "directory buckets" do not).
    pub(super) async fn list_deep(
        &self,
        directory: &Key,
        first: &str,
        last: &str,
    ) -> Result<Option<Vec<(String, u64)>>, Refusal> {
        let root = format!("{}/", self.name(directory));
        // As much as all of them have in common: one directory is listed by its own prefix.
        let prefix = match first == last {
            true => format!("{root}{first}/"),
            false => format!("{root}{}", common(first, last)),
        };
        let after = (first != last).then(|| format!("{root}{first}"));
        let is_inside = |path: &str| {
            let name = path.split('/').next().unwrap_or(path);
            first <= name && name <= last
        };
        let mut names: Vec<(String, u64)> = Vec::new();
        let mut token: Option<String> = None;
        let mut reached: Option<String> = None;
        for _ in 0..LIST_PAGES_MAX {
            let list = |client: Client| {
                let list = client.list_objects_v2().bucket(&self.options.bucket).prefix(&prefix);
                let list = list.set_start_after(after.clone().filter(|_| token.is_none()));
                list.encoding_type(EncodingType::Url).set_continuation_token(token.clone()).send()
            };
            let page = self.send(Action::List, list).await?;
            let found = objects_of(&page, &root)?;
            let is_sorted = found.is_sorted_by(|one, other| one.0 < other.0);
            if !is_sorted || found.first().is_some_and(|(path, _)| reached.as_ref().is_some_and(|last| path <= last)) {
                return Ok(None);
            }
            reached = found.last().map(|(path, _)| path.clone()).or(reached);
            token = next_page(&page, token)?;
            // In their order, slashes count too: `<last>-x/` would come before `<last>/`, and is no name of ours.
            let is_past = reached.as_deref().is_some_and(|path| path.split('/').next().is_some_and(|name| name > last));
            names.extend(found.into_iter().filter(|(path, _)| is_inside(path)));
            if token.is_none() || is_past {
                return Ok(Some(names));
            }
        }
        Err(Refusal::new(StoreErrorKind::Unavailable, format!("more than {LIST_PAGES_MAX} pages of names")))
    }

    pub(super) async fn delete_object(&self, key: &Key) -> Result<(), Refusal> {
        let delete = |client: Client| client.delete_object().bucket(&self.options.bucket).key(self.name(key)).send();
        match self.send(Action::Delete, delete).await {
            Ok(_) => Ok(()),
            Err(refused) if refused.kind == StoreErrorKind::NotFound => Ok(()),
            Err(refused) => Err(refused),
        }
    }

    /// Reads an object back and compares it with what was sent.
    pub(super) async fn verify(&self, key: &Key, bytes: u64, crc32: u32) -> Result<(), Refusal> {
        let differs = |cause: String| {
            Refusal::new(StoreErrorKind::Corrupt, cause)
                .hinted("does something else write there? `single_writer = true` vouches that nothing does")
        };
        let head = self.head(key).await?.ok_or_else(|| absent("stored, and gone when read back"))?;
        if head.bytes != bytes {
            return Err(differs(format!("{bytes} bytes stored, {} read back", head.bytes)));
        }
        let mut hasher = crc32fast::Hasher::new();
        for start in (0..bytes).step_by(VERIFY_BYTES as usize) {
            hasher.update(&self.fetch(key, start..bytes.min(start + VERIFY_BYTES)).await?);
        }
        match hasher.finalize() {
            found if found == crc32 => Ok(()),
            found => Err(differs(format!("CRC-32 {crc32:08x} stored, {found:08x} read back"))),
        }
    }
}

/// The rest of an answer. What is too slow, or ends early, is an error to be tried again.
async fn collect(mut body: aws_sdk_s3::primitives::ByteStream, wanted: u64) -> Result<Bytes, String> {
    let deadline = Instant::now() + STALL + allowance(wanted);
    let mut content = BytesMut::new();
    loop {
        let stalled = Instant::now() + STALL;
        let chunk = match timeout_at(deadline.min(stalled), body.next()).await {
            Ok(Some(Ok(chunk))) => chunk,
            Ok(Some(Err(error))) => return Err(format!("the answer broke off: {error}")),
            Ok(None) => break,
            Err(_) => return Err(format!("the answer stalled after {} of {wanted} bytes", content.len())),
        };
        if content.is_empty() && chunk.len() as u64 == wanted {
            return Ok(chunk);
        }
        if (content.len() + chunk.len()) as u64 > wanted {
            return Err(format!("the answer is longer than the {wanted} bytes it says"));
        }
        // The length is the caller's wish and the store's word: nothing is reserved far beyond what came.
        if content.is_empty() {
            content.reserve(wanted.min(64 << 20) as usize);
        }
        content.extend_from_slice(&chunk);
    }
    match content.len() as u64 {
        bytes if bytes == wanted => Ok(content.freeze()),
        bytes => Err(format!("the answer ended after {bytes} of {wanted} bytes")),
    }
}

/// How the page after this one is asked for; `None` after the last.
fn next_page(page: &ListObjectsV2Output, token: Option<String>) -> Result<Option<String>, Refusal> {
    match (page.is_truncated().unwrap_or(false), page.next_continuation_token()) {
        (false, _) => Ok(None),
        (true, Some(next)) if token.as_deref() != Some(next) => Ok(Some(next.to_string())),
        (true, _) => Err(Refusal::new(StoreErrorKind::Unavailable, "the listing is cut off, and cannot be continued")),
    }
}

/// What two names begin with.
fn common<'a>(one: &'a str, other: &str) -> &'a str {
    let differ = one.char_indices().zip(other.chars()).find(|((_, one), other)| one != other);
    differ.map_or(&one[..one.len().min(other.len())], |((at, _), _)| &one[..at])
}

/// Objects of a page at any depth below `root`.
fn objects_of(page: &ListObjectsV2Output, root: &str) -> Result<Vec<(String, u64)>, Refusal> {
    if page.name().is_none() {
        return Err(not_s3());
    }
    let encoded = page.encoding_type() == Some(&EncodingType::Url);
    let objects = page.contents().iter().filter_map(|object| {
        let name = if encoded { decode(object.key()?) } else { object.key()?.to_string() };
        Some((name.strip_prefix(root)?.to_string(), u64::try_from(object.size()?).ok()?))
    });
    Ok(objects.collect())
}

fn entries_of(page: &ListObjectsV2Output, prefix: &str) -> Result<Vec<Entry>, Refusal> {
    // Anything that answers 200 looks like an empty listing otherwise.
    if page.name().is_none() {
        return Err(not_s3());
    }
    let encoded = page.encoding_type() == Some(&EncodingType::Url);
    let below = |name: Option<&str>| {
        let name = if encoded { decode(name?) } else { name?.to_string() };
        name.strip_prefix(prefix).map(str::to_string)
    };
    let plain = |name: &String| !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']);
    let directories = page.common_prefixes().iter().filter_map(|directory| {
        let name = below(directory.prefix())?.strip_suffix('/')?.to_string();
        Some(name).filter(plain).map(Entry::Directory)
    });
    let objects = page.contents().iter().filter_map(|object| {
        let name = below(object.key()).filter(plain)?;
        Some(Entry::Object { name, bytes: u64::try_from(object.size()?).ok()? })
    });
    Ok(directories.chain(objects).collect())
}

/// As forms are encoded: a space is a plus.
fn decode(name: &str) -> String {
    percent_decode_str(&name.replace('+', " ")).decode_utf8_lossy().into_owned()
}

fn asked(range: &Range<u64>) -> String {
    format!("bytes {} to {} asked for", range.start, range.end)
}

fn short(range: &Range<u64>, bytes: u64) -> Refusal {
    Refusal::new(StoreErrorKind::Corrupt, format!("{}, {bytes} there", asked(range)))
}

pub(super) fn absent(cause: &str) -> Refusal {
    Refusal::new(StoreErrorKind::NotFound, cause)
}

pub(super) fn not_s3() -> Refusal {
    Refusal::new(StoreErrorKind::Misconfigured, "the answer is not one of an S3 store")
        .hinted("does `endpoint` name an S3 store (scheme, host, port), and not a console, a proxy or a web server?")
}

#[cfg(test)]
mod tests {
    use super::*;
    use aws_sdk_s3::types::{CommonPrefix, Object};

    #[test]
    fn a_page_becomes_names_below_its_prefix() {
        let object = |key: &str, size| Object::builder().key(key).size(size).build();
        let page = ListObjectsV2Output::builder()
            .name("bucket")
            .encoding_type(EncodingType::Url)
            .contents(object("p/a%2Bb+c", 3))
            .contents(object("p/", 0))
            .contents(object("elsewhere/x", 1))
            .contents(object("p/negative", -1))
            .common_prefixes(CommonPrefix::builder().prefix("p/d/").build())
            .common_prefixes(CommonPrefix::builder().prefix("p//").build())
            .common_prefixes(CommonPrefix::builder().prefix("p/../").build())
            .build();
        let entries = entries_of(&page, "p/").unwrap();
        let expected = [Entry::Directory("d".to_string()), Entry::Object { name: "a+b c".to_string(), bytes: 3 }];
        assert_eq!(entries, expected);
    }

    #[test]
    fn what_does_not_name_the_bucket_is_no_listing() {
        let page = ListObjectsV2Output::builder().build();
        assert_eq!(entries_of(&page, "").unwrap_err().kind, StoreErrorKind::Misconfigured);
    }
}
