//! Owns: one stored object read through into a target: fetched in parts, decrypted, decoded.
//! Does not own: which object, what its content must be.

use std::io;

use super::error::WalGetError;
use super::target::{Target, destination};
use crate::catalog::store::{self, Archive};
use crate::codec::Form;
use crate::codec::decode::{DecodeError, ObjectDecoder};
use crate::repository::{Key, StoreError, StoreErrorKind};

/// Stored bytes fetched at a time.
const FETCH_BYTES: u64 = 4 << 20;

#[derive(Clone, Debug)]
pub struct Object {
    pub key: Key,
    pub form: Form,
    pub stored_bytes: u64,
    /// What it must decode to.
    pub raw_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Bytes that are not there yet are written, the others compared.
    Write,
    Compare,
}

/// A decoder of the object, or why there can be none: asked before anything is written.
pub fn decoder(archive: &Archive, object: &Object) -> Result<ObjectDecoder, WalGetError> {
    let decoder = ObjectDecoder::new(object.form, archive.keys.identities.as_ref(), object.raw_bytes);
    decoder.map_err(|error| undecodable(archive, &object.key, error))
}

/// Reads the object through, its raw bytes to `offset` and on; tells their CRC-32.
pub async fn read(
    archive: &Archive,
    object: &Object,
    offset: u64,
    target: &mut Target,
    purpose: Use,
) -> Result<u32, WalGetError> {
    let Object { key, stored_bytes, .. } = object;
    let mut decoder = decoder(archive, object)?;
    let mut position = offset;
    let mut fetched = 0;
    while fetched < *stored_bytes {
        let range = fetched..(*stored_bytes).min(fetched + FETCH_BYTES);
        let length = range.end - range.start;
        let part = archive.backend.fetch(key, range).await.map_err(|error| unfetched(archive, key, error))?;
        if part.len() as u64 != length {
            return Err(damaged(archive, key, format!("it ends before its {stored_bytes} bytes")));
        }
        fetched += length;
        let fed = decoder.feed(&part, &mut |raw: &[u8]| put(target, purpose, &mut position, raw));
        fed.map_err(|error| failed(archive, key, error, target))?;
    }
    let finished = decoder.finish(&mut |raw: &[u8]| put(target, purpose, &mut position, raw));
    finished.map_err(|error| failed(archive, key, error, target))
}

fn put(target: &mut Target, purpose: Use, position: &mut u64, raw: &[u8]) -> io::Result<()> {
    match purpose {
        Use::Write => target.write_at(*position, raw)?,
        Use::Compare => drop(target.compare_at(*position, raw)?),
    }
    *position += raw.len() as u64;
    Ok(())
}

fn failed(archive: &Archive, key: &Key, error: DecodeError, target: &Target) -> WalGetError {
    match error {
        DecodeError::Sink(_) if target.contradicted => {
            WalGetError::Contradicts { object: store::place(archive.backend.as_ref(), key) }
        }
        DecodeError::Sink(source) => destination(&target.dest, source),
        error => undecodable(archive, key, error),
    }
}

fn undecodable(archive: &Archive, key: &Key, error: DecodeError) -> WalGetError {
    match error.is_about_keys() {
        true => WalGetError::Key { object: store::place(archive.backend.as_ref(), key), source: error },
        false => damaged(archive, key, error.to_string()),
    }
}

fn unfetched(archive: &Archive, key: &Key, error: StoreError) -> WalGetError {
    match error.kind {
        StoreErrorKind::NotFound => WalGetError::Vanished { object: store::place(archive.backend.as_ref(), key) },
        StoreErrorKind::Corrupt => damaged(archive, key, error.cause),
        _ => WalGetError::Store(error),
    }
}

pub fn damaged(archive: &Archive, key: &Key, fault: String) -> WalGetError {
    WalGetError::Damaged { object: store::place(archive.backend.as_ref(), key), fault }
}
