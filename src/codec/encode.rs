//! Owns: turning raw bytes into an independent zstd frame with its checksums.
//! Does not own: how raw bytes are cut (`receiver/framer.rs`) or how frames make an object (`archiver/`).

use bytes::Bytes;
use zstd::bulk::Compressor;
use zstd::zstd_safe::{self, CParameter};

/// An aligned piece of a segment: larger frames save at most 1 % of ratio, smaller ones cost it and add
/// work per byte; 1 MiB is also the smallest segment.
pub const FRAME_BYTES: usize = 1 << 20;

/// zstd's fastest level, which WAL is given with parameters of its own ([`parameters`]).
pub const LEVEL_DEFAULT: i32 = 1;

/// What differs from the level's own parameters. On WAL of pgbench, of JSON documents and of random values, against plain
/// level 1: stored bytes 0.91, 0.97 and 1.002, CPU 0.96. Level 3 takes 1.4 times the CPU, on pgbench's for no fewer bytes.
///
/// * Matches of 5 bytes on (level 1: 7): what repeats in WAL are record headers and tuples with a few bytes changed
///   between them. With 4 there are more, and they cost more than they save.
/// * The window spans the frame (level 1: half of it).
/// * 2^13 entries in the hash table (level 1: 2^14), 32 KiB, fit into the L1 cache; what is near is also what matches.
///
/// No target length: any other than 0 stores literals as they are.
fn parameters() -> [CParameter; 4] {
    [
        CParameter::Strategy(zstd_safe::Strategy::ZSTD_fast),
        CParameter::WindowLog(FRAME_BYTES.ilog2()),
        CParameter::HashLog(13),
        CParameter::MinMatch(5),
    ]
}

/// One independent zstd frame.
#[derive(Clone, Debug)]
pub struct EncodedFrame {
    pub bytes: Bytes,
    pub raw_bytes: usize,
    /// CRC-32 (IEEE) of the raw bytes.
    pub raw_crc32: u32,
    /// CRC-32 (IEEE) of [`EncodedFrame::bytes`].
    pub stored_crc32: u32,
}

/// A zstd context and its output buffer, kept for reuse: about 1.3 MiB at level 1, for frames of WAL.
pub struct Encoder {
    compressor: Compressor<'static>,
    output: Vec<u8>,
    frame_bytes_max: usize,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder").finish_non_exhaustive()
    }
}

impl Encoder {
    /// For frames of WAL.
    pub fn new(level: i32) -> Encoder {
        let mut encoder = Encoder::for_frames(level, FRAME_BYTES);
        if level == LEVEL_DEFAULT {
            let known = "zstd takes parameters within its bounds";
            let set = |parameter| encoder.compressor.set_parameter(parameter).expect(known);
            parameters().into_iter().for_each(set);
        }
        encoder
    }

    /// For frames of other content.
    pub fn for_frames(level: i32, frame_bytes_max: usize) -> Encoder {
        let mut compressor = Compressor::new(level).expect("zstd accepts every level between its own bounds");
        compressor.set_parameter(CParameter::ChecksumFlag(true)).expect("zstd knows the checksum flag");
        let output = Vec::with_capacity(zstd_safe::compress_bound(frame_bytes_max));
        Encoder { compressor, output, frame_bytes_max }
    }

    /// Compresses `raw`, as much as a frame may hold at most, into one frame with a content checksum.
    pub fn encode(&mut self, raw: &[u8]) -> EncodedFrame {
        let most = self.frame_bytes_max;
        assert!(raw.len() <= most, "a frame holds at most {most} bytes, not {}", raw.len());
        self.output.clear();
        let written = self
            .compressor
            .compress_to_buffer(raw, &mut self.output)
            .expect("the output buffer holds zstd's own bound for a frame");
        // Copied out, so that a frame holds the memory it needs and the large buffer is used again.
        let bytes = Bytes::copy_from_slice(&self.output[..written]);
        let stored_crc32 = crc32fast::hash(&bytes);
        EncodedFrame { raw_bytes: raw.len(), raw_crc32: crc32fast::hash(raw), stored_crc32, bytes }
    }
}

/// The CRC-32 of a whole, put together from those of its parts.
#[derive(Clone, Debug, Default)]
pub struct Crc32Parts(crc32fast::Hasher);

impl Crc32Parts {
    pub fn new() -> Crc32Parts {
        Crc32Parts::default()
    }

    /// Appends a part known only by its CRC-32 and length.
    pub fn append(&mut self, crc32: u32, bytes: u64) {
        self.0.combine(&crc32fast::Hasher::new_with_initial_len(crc32, bytes));
    }

    pub fn update(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    pub fn finish(&self) -> u32 {
        self.0.clone().finalize()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_decode_one_by_one_and_together() {
        let raw: Vec<u8> = (0..FRAME_BYTES as u32 * 2).map(|i| (i / 7 % 251) as u8).collect();
        let mut encoder = Encoder::new(LEVEL_DEFAULT);
        let frames: Vec<_> = raw.chunks(FRAME_BYTES).map(|chunk| encoder.encode(chunk)).collect();
        let object: Vec<u8> = frames.iter().flat_map(|frame| frame.bytes.to_vec()).collect();
        assert_eq!(zstd::stream::decode_all(&object[..]).unwrap(), raw);
        let mut whole = Crc32Parts::new();
        frames.iter().for_each(|frame| whole.append(frame.raw_crc32, frame.raw_bytes as u64));
        assert_eq!(whole.finish(), crc32fast::hash(&raw));
    }

    #[test]
    fn incompressible_and_empty_input_fit_the_buffer() {
        let mut rng = fastrand::Rng::with_seed(1);
        let noise: Vec<u8> = (0..FRAME_BYTES).map(|_| rng.u8(..)).collect();
        let mut encoder = Encoder::new(LEVEL_DEFAULT);
        assert!(encoder.encode(&noise).bytes.len() > noise.len());
        assert_eq!(zstd::stream::decode_all(&encoder.encode(&[]).bytes[..]).unwrap(), b"");
    }
}
