//! Compression and encryption: raw WAL to zstd frames and back, in an age stream where recipients are configured.
//! Every object is what `zstd -d`, or `age -d | zstd -d`, reads.
//!
//! Owns: frame size, level, checksums of frames; bounded decoding of bytes from a store.
//! Does not own: threads (`archiver/workers.rs`), names, storage. Pure.

pub mod decode;
mod encode;
pub mod encrypt;
pub mod inflate;
pub mod tar;

pub use encode::{Crc32Parts, EncodedFrame, Encoder, FRAME_BYTES, LEVEL_DEFAULT};

/// How the stored bytes of an object are made from its raw ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Form {
    /// zstd frames.
    #[default]
    Plain,
    /// One age stream over the zstd frames.
    Encrypted,
}
