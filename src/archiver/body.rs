//! Owns: the stored bytes of one object: its frames as they are, or in one age stream over all of them, made off the
//! network task and counted.
//! Does not own: which frames, names, storing them.

use std::sync::Arc;

use bytes::Bytes;

use super::encode::HeldFrame;
use super::workers::Workers;
use crate::codec::encrypt::{Encryptor, Recipients};
use crate::codec::{Crc32Parts, Form};
use crate::receiver::{MemoryBudget, MemoryHold};
use crate::repository::{Facts, StoreError};

/// What a body is made of, in order: zstd frames.
#[derive(Clone, Debug)]
pub enum Piece {
    Held(Arc<HeldFrame>),
    /// Encoded anew, or read back.
    Loose {
        bytes: Bytes,
        stored_crc32: u32,
    },
}

impl Piece {
    pub async fn load(&self) -> Result<Bytes, StoreError> {
        match self {
            Piece::Held(frame) => frame.load().await,
            Piece::Loose { bytes, .. } => Ok(bytes.clone()),
        }
    }

    fn stored_crc32(&self) -> u32 {
        match self {
            Piece::Held(frame) => frame.stored_crc32,
            Piece::Loose { stored_crc32, .. } => *stored_crc32,
        }
    }
}

/// An object's stored bytes. A repeated call sends the same ones: encrypted anew they would be others.
#[derive(Debug)]
pub struct Body {
    pub parts: Vec<Bytes>,
    pub stored_bytes: u64,
    pub stored_crc32: u32,
    /// What the parts count as in the memory budget.
    _counted: Vec<Counted>,
}

#[derive(Debug)]
#[allow(dead_code)] // held for what dropping them gives back
enum Counted {
    Frame(Arc<HeldFrame>),
    Encrypted(MemoryHold),
}

impl Body {
    /// Encrypts piece by piece, and lets go of each plain one as soon as that is done: a segment is never in memory
    /// twice.
    pub async fn new(
        pieces: Vec<Piece>,
        recipients: Option<&Recipients>,
        workers: &Workers,
        memory: &MemoryBudget,
    ) -> Result<Body, StoreError> {
        let mut wrapping = Wrapping::new(recipients);
        let (mut parts, mut counted) = (Vec::with_capacity(pieces.len() + 1), Vec::with_capacity(pieces.len()));
        for piece in pieces {
            let part = wrapping.add(&piece, workers).await?;
            match (wrapping.form(), piece) {
                (Form::Encrypted, _) if !part.is_empty() => {
                    counted.push(Counted::Encrypted(memory.hold(part.len() as u64)));
                }
                (Form::Plain, Piece::Held(frame)) => counted.push(Counted::Frame(frame)),
                _ => {}
            }
            parts.push(part);
        }
        parts.push(wrapping.finish(workers).await);
        parts.retain(|part| !part.is_empty());
        let (stored_bytes, stored_crc32) = wrapping.stored();
        Ok(Body { parts, stored_bytes, stored_crc32, _counted: counted })
    }

    /// What the store is told of an object with this body.
    pub fn facts(&self, form: Form, raw_crc32: u32) -> Facts {
        let raw_crc32 = (form == Form::Encrypted).then_some(raw_crc32);
        Facts { stored_crc32: Some(self.stored_crc32), raw_crc32 }
    }
}

/// What becomes of frames on their way into one object, and what the object is so far.
#[derive(Debug)]
pub struct Wrapping {
    form: Form,
    /// `None` for a plain object, and for an encrypted one whose end was written.
    encryptor: Option<Encryptor>,
    stored_crc32: Crc32Parts,
    stored_bytes: u64,
}

impl Wrapping {
    pub fn new(recipients: Option<&Recipients>) -> Wrapping {
        let form = if recipients.is_some() { Form::Encrypted } else { Form::Plain };
        let encryptor = recipients.map(Encryptor::new);
        Wrapping { form, encryptor, stored_crc32: Crc32Parts::new(), stored_bytes: 0 }
    }

    pub fn form(&self) -> Form {
        self.form
    }

    /// The next part of the object: empty where age waits for more.
    pub async fn add(&mut self, piece: &Piece, workers: &Workers) -> Result<Bytes, StoreError> {
        let (bytes, plain_crc32) = (piece.load().await?, piece.stored_crc32());
        let Some(mut encryptor) = self.encryptor.take() else {
            assert_eq!(self.form, Form::Plain, "nothing follows the end of an age stream");
            self.count(plain_crc32, &bytes);
            return Ok(bytes);
        };
        let (encryptor, part, crc32) = workers
            .run_alone(move || {
                let part = encryptor.push(&bytes);
                let crc32 = crc32fast::hash(&part);
                (encryptor, part, crc32)
            })
            .await;
        self.encryptor = Some(encryptor);
        self.count(crc32, &part);
        Ok(part)
    }

    /// The last part of the object; empty for a plain one.
    pub async fn finish(&mut self, workers: &Workers) -> Bytes {
        let Some(encryptor) = self.encryptor.take() else { return Bytes::new() };
        let part = workers.run_alone(move || encryptor.finish()).await;
        self.count(crc32fast::hash(&part), &part);
        part
    }

    /// Length and CRC-32 of what was made so far.
    pub fn stored(&self) -> (u64, u32) {
        (self.stored_bytes, self.stored_crc32.finish())
    }

    fn count(&mut self, crc32: u32, part: &Bytes) {
        self.stored_crc32.append(crc32, part.len() as u64);
        self.stored_bytes += part.len() as u64;
    }
}
