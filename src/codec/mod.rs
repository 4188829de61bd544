//! Raw bytes to stored bytes and back; the only address of the zstd crate.
//!
//! Owns: independent zstd frames with content checksums (`decode`).
//! Does not own: which bytes make an object, where it is stored.

pub mod decode;
