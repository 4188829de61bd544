//! Compression: raw WAL to zstd frames and back. Every object is what `zstd -d` reads.
//!
//! Owns: frame size, level, checksums of frames; bounded decoding of bytes from a store.
//! Does not own: threads (`archiver/workers.rs`), names, storage. Pure.

pub mod decode;
mod encode;
pub mod encrypt;

pub use encode::{Crc32Parts, EncodedFrame, Encoder, FRAME_BYTES, LEVEL_DEFAULT};
