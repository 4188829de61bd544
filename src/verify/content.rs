//! Owns: one object from stored bytes to what it holds: checksums of both, decryption and decompression on the way; what
//! is wrong with it.
//! Does not own: getting the bytes (`reader.rs`), what WAL or a tar must hold (`chain.rs`, `files.rs`).
//!
//! Bytes are worked on in threads for blocking work, one piece at a time: whatever else the process does goes on.

use super::reader::{Lack, Reader, Wanted, pieces};
use super::report::FaultKind;
use crate::codec::Form;
use crate::codec::decode::{DecodeError, ObjectDecoder};
use crate::codec::encrypt::{DecryptError, Decryptor, Identities};
use crate::error::{ExitCode, Failure};
use crate::repository::Key;

/// How stored bytes are made from raw ones, encryption aside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// zstd frames.
    Frames,
    AsIs,
}

/// An object, and what it must be.
#[derive(Clone, Debug)]
pub struct Object {
    pub key: Key,
    /// Its path below the lineage.
    pub below: String,
    pub form: Form,
    pub coding: Coding,
    pub stored_bytes: u64,
    pub stored_crc32: Option<u32>,
    pub raw_bytes: u64,
    pub raw_crc32: Option<u32>,
    /// Who says so: "the index", "backup.json", "its name".
    pub by: &'static str,
}

impl Object {
    pub fn wanted(&self) -> Wanted {
        Wanted { key: self.key.clone(), bytes: self.stored_bytes }
    }
}

/// What takes an object's raw bytes, in order. It never stops the reading: checksums come first, and tell more.
pub trait Sink: Send + 'static {
    fn take(&mut self, raw: &[u8]);
}

/// Nobody wants to know more than the checksums.
#[derive(Clone, Copy, Debug)]
pub struct Nothing;

impl Sink for Nothing {
    fn take(&mut self, _: &[u8]) {}
}

/// What came of reading an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// All that could be told is right.
    Sound {
        is_content_examined: bool,
    },
    Faulty(FaultKind, String),
}

/// Reads object `index` of `reader`. The store failing is no verdict.
pub async fn examine<S: Sink>(
    reader: &mut Reader,
    index: usize,
    object: &Object,
    identities: Option<&Identities>,
    sink: S,
) -> Result<(Verdict, S), Failure> {
    let mut work = Work::new(object, identities, sink);
    for _ in 0..pieces(object.stored_bytes) {
        match reader.next(index).await {
            Some(Ok(chunk)) => {
                let done = tokio::task::spawn_blocking(move || {
                    work.feed(&chunk);
                    work
                });
                work = done.await.map_err(|error| Failure::new(ExitCode::Internal, format!("verify: {error}")))?;
            }
            Some(Err(Lack::Missing)) => {
                return Ok((Verdict::Faulty(FaultKind::Missing, "it is not there".to_string()), work.sink));
            }
            Some(Err(Lack::Damaged(fault))) => return Ok((Verdict::Faulty(FaultKind::Content, fault), work.sink)),
            Some(Err(Lack::Store(failure))) => return Err(*failure),
            None => return Err(Failure::new(ExitCode::Internal, "verify: the reader ended early")),
        }
    }
    Ok(work.finish(object))
}

enum Decoder {
    Frames(Box<ObjectDecoder>),
    Decrypted(Box<Decryptor>),
    AsIs,
    /// There is no key: the stored bytes are all that is looked at.
    None,
}

struct Work<S> {
    decoder: Decoder,
    stored_crc32: crc32fast::Hasher,
    stored_bytes: u64,
    /// Of what does not come through frames.
    raw_crc32: crc32fast::Hasher,
    raw_bytes: u64,
    fault: Option<String>,
    sink: S,
}

impl<S: Sink> Work<S> {
    fn new(object: &Object, identities: Option<&Identities>, sink: S) -> Work<S> {
        let mut fault = None;
        let decoder = match (object.coding, object.form) {
            (Coding::AsIs, Form::Plain) => Decoder::AsIs,
            (Coding::AsIs, Form::Encrypted) => {
                identities.map_or(Decoder::None, |identities| Decoder::Decrypted(Box::new(Decryptor::new(identities))))
            }
            (Coding::Frames, form) => match ObjectDecoder::new(form, identities, object.raw_bytes) {
                Ok(decoder) => Decoder::Frames(Box::new(decoder)),
                Err(error) if error.is_about_keys() => Decoder::None,
                Err(error) => {
                    fault = Some(error.to_string());
                    Decoder::None
                }
            },
        };
        Work {
            decoder,
            stored_crc32: crc32fast::Hasher::new(),
            stored_bytes: 0,
            raw_crc32: crc32fast::Hasher::new(),
            raw_bytes: 0,
            fault,
            sink,
        }
    }

    fn feed(&mut self, chunk: &[u8]) {
        self.stored_crc32.update(chunk);
        self.stored_bytes += chunk.len() as u64;
        if self.fault.is_some() {
            return;
        }
        let Work { sink, raw_crc32, raw_bytes, .. } = self;
        let fed = match &mut self.decoder {
            Decoder::None => Ok(()),
            Decoder::AsIs => {
                take(raw_crc32, raw_bytes, sink, chunk);
                Ok(())
            }
            Decoder::Frames(decoder) => decoder.feed(chunk, &mut |raw: &[u8]| {
                sink.take(raw);
                Ok(())
            }),
            Decoder::Decrypted(decryptor) => decryptor
                .feed(chunk, &mut |raw: &[u8]| -> Result<(), DecryptError> {
                    take(raw_crc32, raw_bytes, sink, raw);
                    Ok(())
                })
                .map_err(DecodeError::from),
        };
        self.note(fed);
    }

    fn note(&mut self, done: Result<(), DecodeError>) {
        match done {
            Ok(()) => {}
            // For other recipients than those at hand.
            Err(error) if error.is_about_keys() => self.decoder = Decoder::None,
            Err(error) => self.fault = Some(error.to_string()),
        }
    }

    fn finish(mut self, object: &Object) -> (Verdict, S) {
        let mut raw = None;
        match std::mem::replace(&mut self.decoder, Decoder::None) {
            _ if self.fault.is_some() => {}
            Decoder::None => {}
            Decoder::AsIs => raw = Some((self.raw_bytes, self.raw_crc32.clone().finalize())),
            Decoder::Decrypted(decryptor) => {
                let Work { sink, raw_crc32, raw_bytes, .. } = &mut self;
                let ended = decryptor.finish(&mut |bytes: &[u8]| -> Result<(), DecryptError> {
                    take(raw_crc32, raw_bytes, sink, bytes);
                    Ok(())
                });
                match ended {
                    Ok(()) => raw = Some((self.raw_bytes, self.raw_crc32.clone().finalize())),
                    Err(error) => self.note(Err(error.into())),
                }
            }
            Decoder::Frames(decoder) => {
                let sink = &mut self.sink;
                let ended = decoder.finish(&mut |bytes: &[u8]| {
                    sink.take(bytes);
                    Ok(())
                });
                match ended {
                    Ok(crc32) => raw = Some((object.raw_bytes, crc32)),
                    Err(error) => self.note(Err(error)),
                }
            }
        }
        let verdict = judge(object, self.stored_bytes, self.stored_crc32.finalize(), raw, self.fault);
        (verdict, self.sink)
    }
}

fn take<S: Sink>(crc32: &mut crc32fast::Hasher, bytes: &mut u64, sink: &mut S, raw: &[u8]) {
    crc32.update(raw);
    *bytes += raw.len() as u64;
    sink.take(raw);
}

/// The stored checksum first: where it is wrong, everything else follows from that.
fn judge(
    object: &Object,
    stored_bytes: u64,
    stored_crc32: u32,
    raw: Option<(u64, u32)>,
    fault: Option<String>,
) -> Verdict {
    let by = object.by;
    if stored_bytes != object.stored_bytes {
        let expected = object.stored_bytes;
        return Verdict::Faulty(FaultKind::Size, format!("it has {stored_bytes} bytes, {by} says {expected}"));
    }
    if let Some(expected) = object.stored_crc32.filter(|&expected| expected != stored_crc32) {
        let what = format!("the CRC-32 of its stored bytes is {stored_crc32:08x}, {by} says {expected:08x}");
        let detail = fault.map_or(String::new(), |fault| format!(" ({fault})"));
        return Verdict::Faulty(FaultKind::Content, format!("{what}{detail}"));
    }
    if let Some(fault) = fault {
        return Verdict::Faulty(FaultKind::Content, fault);
    }
    let Some((raw_bytes, raw_crc32)) = raw else { return Verdict::Sound { is_content_examined: false } };
    if raw_bytes != object.raw_bytes {
        let expected = object.raw_bytes;
        return Verdict::Faulty(FaultKind::Content, format!("it holds {raw_bytes} bytes, {by} says {expected}"));
    }
    match object.raw_crc32 {
        Some(expected) if expected != raw_crc32 => {
            let what = format!("the CRC-32 of what it holds is {raw_crc32:08x}, {by} says {expected:08x}");
            Verdict::Faulty(FaultKind::Content, what)
        }
        _ => Verdict::Sound { is_content_examined: true },
    }
}
