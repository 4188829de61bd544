//! Owns: from stored bytes back to raw bytes, with bounded memory and nothing taken on trust.
//! Does not own: where the bytes come from, which CRC-32 they must have.
//!
//! An object is a concatenation of ordinary zstd frames, each with a content checksum. Everything else zstd allows
//! (skippable frames, dictionaries, frames without checksum, empty frames, trailing bytes) is refused: the only
//! writer never makes it, so it is damage or forgery.

use std::io;

use super::Form;
use super::encrypt::{DecryptError, Decryptor, Identities};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};
use zstd::zstd_safe::DParameter;

/// A frame that needs a larger window is refused: `zstd -19` needs this much, our writer a quarter of it.
const WINDOW_LOG_MAX: u32 = 23;
const OUTPUT_BYTES: usize = 128 << 10;
const MAGIC: [u8; 4] = 0xFD2F_B528_u32.to_le_bytes();
/// Magic number and frame header descriptor.
const HEADER_BYTES: usize = 5;
/// A frame of nothing but zeros takes fewer stored bytes, one of anything else hardly ever.
const ZERO_FRAME_BYTES_MAX: usize = 256;
static ZEROS: [u8; OUTPUT_BYTES] = [0; OUTPUT_BYTES];

#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error("no zstd frame at stored byte {offset}")]
    NotAFrame { offset: u64 },
    #[error("the zstd frame at stored byte {offset} {fault}")]
    Refused { offset: u64, fault: &'static str },
    #[error("the zstd frame at stored byte {offset} does not decode: {source}")]
    Frame { offset: u64, source: io::Error },
    #[error("it decodes to more than the {expected} bytes it should hold")]
    TooLong { expected: u64 },
    #[error("it ends inside the zstd frame at stored byte {offset}")]
    Truncated { offset: u64 },
    #[error("it decodes to {found} bytes, expected {expected}")]
    TooShort { found: u64, expected: u64 },
    #[error(transparent)]
    Decrypt(#[from] DecryptError),
    #[error("could not hand over decoded bytes: {0}")]
    Sink(#[from] io::Error),
}

impl DecodeError {
    /// Whether another key, rather than another object, is what is needed.
    pub fn is_about_keys(&self) -> bool {
        matches!(self, DecodeError::Decrypt(error) if error.is_about_keys())
    }
}

/// Decodes a stored object of either form.
#[derive(Debug)]
pub struct ObjectDecoder {
    decryptor: Option<Decryptor>,
    frames: FrameDecoder,
}

impl ObjectDecoder {
    /// A decoder of an object that holds exactly `expected` raw bytes. What is encrypted needs an identity.
    pub fn new(form: Form, identities: Option<&Identities>, expected: u64) -> Result<ObjectDecoder, DecodeError> {
        let decryptor = match form {
            Form::Plain => None,
            Form::Encrypted => Some(Decryptor::new(identities.ok_or(DecryptError::NoIdentity)?)),
        };
        Ok(ObjectDecoder { decryptor, frames: FrameDecoder::new(expected)? })
    }

    /// Takes the next stored bytes. After an error the decoder is of no more use, and so is what the sink got.
    pub fn feed(&mut self, stored: &[u8], sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<(), DecodeError> {
        let frames = &mut self.frames;
        match &mut self.decryptor {
            None => frames.feed(stored, sink),
            Some(decryptor) => decryptor.feed(stored, &mut |plain: &[u8]| frames.feed(plain, sink)),
        }
    }

    /// The last bytes go to the sink; then the CRC-32 of all raw bytes, if the object was complete.
    pub fn finish(mut self, sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<u32, DecodeError> {
        if let Some(decryptor) = self.decryptor.take() {
            let frames = &mut self.frames;
            decryptor.finish(&mut |plain: &[u8]| frames.feed(plain, sink))?;
        }
        self.frames.finish()
    }
}

/// Decodes an object that is fed in pieces of any size; decoded bytes go to a sink at once.
pub struct FrameDecoder {
    decoder: Decoder<'static>,
    output: Vec<u8>,
    /// The first bytes of a frame, held until its header can be judged; full while inside a frame.
    header: [u8; HEADER_BYTES],
    header_count: usize,
    /// Stored byte at which the current frame begins.
    frame_offset: u64,
    frame_raw_bytes: u64,
    stored_bytes: u64,
    raw_bytes: u64,
    expected: u64,
    raw_crc32: crc32fast::Hasher,
    /// The stored bytes of the current frame while they are few, and whether all it held so far are zeros.
    current: Vec<u8>,
    current_is_zeros: bool,
    zeros: Option<ZeroFrame>,
}

/// A frame that was decoded, found intact, and held zeros only: the same bytes again are the same zeros. Of a nearly
/// empty segment, all frames but the first are such.
struct ZeroFrame {
    stored: Vec<u8>,
    raw_bytes: u64,
    raw_crc32: crc32fast::Hasher,
}

impl ZeroFrame {
    fn new(stored: &[u8], raw_bytes: u64) -> ZeroFrame {
        let mut raw_crc32 = crc32fast::Hasher::new();
        parts_of_zeros(raw_bytes).for_each(|part| raw_crc32.update(part));
        ZeroFrame { stored: stored.to_vec(), raw_bytes, raw_crc32 }
    }
}

fn parts_of_zeros(bytes: u64) -> impl Iterator<Item = &'static [u8]> {
    let part = OUTPUT_BYTES as u64;
    (0..bytes.div_ceil(part)).map(move |index| &ZEROS[..part.min(bytes - index * part) as usize])
}

impl std::fmt::Debug for FrameDecoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FrameDecoder")
            .field("stored_bytes", &self.stored_bytes)
            .field("raw_bytes", &self.raw_bytes)
            .field("expected", &self.expected)
            .finish_non_exhaustive()
    }
}

impl FrameDecoder {
    /// A decoder of an object that holds exactly `expected` raw bytes.
    pub fn new(expected: u64) -> Result<FrameDecoder, DecodeError> {
        let start = |source| DecodeError::Frame { offset: 0, source };
        let mut decoder = Decoder::new().map_err(start)?;
        decoder.set_parameter(DParameter::WindowLogMax(WINDOW_LOG_MAX)).map_err(start)?;
        Ok(FrameDecoder {
            decoder,
            output: vec![0; OUTPUT_BYTES],
            header: [0; HEADER_BYTES],
            header_count: 0,
            frame_offset: 0,
            frame_raw_bytes: 0,
            stored_bytes: 0,
            raw_bytes: 0,
            expected,
            raw_crc32: crc32fast::Hasher::new(),
            current: Vec::with_capacity(ZERO_FRAME_BYTES_MAX),
            current_is_zeros: true,
            zeros: None,
        })
    }

    /// Takes the next stored bytes. After an error the decoder is of no more use, and so is what the sink got.
    pub fn feed(&mut self, mut input: &[u8], sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<(), DecodeError> {
        while !input.is_empty() {
            if let Some(used) = self.take_zero_frame(input, sink)? {
                input = &input[used..];
            } else if self.header_count < HEADER_BYTES {
                input = self.take_header(input);
                if self.header_count == HEADER_BYTES {
                    self.check_header()?;
                    let header = self.header;
                    self.decode(&header, sink)?;
                }
            } else {
                let used = self.decode(input, sink)?;
                self.stored_bytes += used as u64;
                input = &input[used..];
            }
        }
        Ok(())
    }

    /// The CRC-32 of all raw bytes, once the object is complete.
    pub fn finish(self) -> Result<u32, DecodeError> {
        if self.header_count > 0 {
            return Err(DecodeError::Truncated { offset: self.frame_offset });
        }
        if self.raw_bytes != self.expected {
            return Err(DecodeError::TooShort { found: self.raw_bytes, expected: self.expected });
        }
        Ok(self.raw_crc32.finalize())
    }

    fn take_header<'a>(&mut self, input: &'a [u8]) -> &'a [u8] {
        if self.header_count == 0 {
            self.frame_offset = self.stored_bytes;
            self.frame_raw_bytes = 0;
            self.current.clear();
            self.current_is_zeros = self.zeros.is_none();
        }
        let count = input.len().min(HEADER_BYTES - self.header_count);
        self.header[self.header_count..self.header_count + count].copy_from_slice(&input[..count]);
        self.header_count += count;
        // Counted here only; the decoder gets these bytes from `header`.
        self.stored_bytes += count as u64;
        &input[count..]
    }

    fn check_header(&self) -> Result<(), DecodeError> {
        let offset = self.frame_offset;
        let refused = |fault| Err(DecodeError::Refused { offset, fault });
        if self.raw_bytes == self.expected {
            return refused("follows the last one it should hold");
        }
        if self.header[..4] != MAGIC {
            return Err(DecodeError::NotAFrame { offset });
        }
        let descriptor = self.header[4];
        match descriptor {
            _ if descriptor & 0b0000_0011 != 0 => refused("needs a dictionary"),
            _ if descriptor & 0b0000_0100 == 0 => refused("has no checksum"),
            _ => Ok(()),
        }
    }

    /// Feeds the decoder until the input is used up or the frame ends; tells how much was used.
    fn decode(&mut self, input: &[u8], sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<usize, DecodeError> {
        let mut source = InBuffer::around(input);
        loop {
            let mut output = OutBuffer::around(&mut self.output[..]);
            let hint = self
                .decoder
                .run(&mut source, &mut output)
                .map_err(|source| DecodeError::Frame { offset: self.frame_offset, source })?;
            let produced = output.pos();
            let full = produced == OUTPUT_BYTES;
            self.hand_over(produced, sink)?;
            if hint == 0 {
                self.keep(&input[..source.pos()]);
                self.end_frame()?;
                break;
            }
            if source.pos() == input.len() && !full {
                self.keep(input);
                break;
            }
        }
        Ok(source.pos())
    }

    /// Keeps the stored bytes of a frame that may be one of zeros.
    fn keep(&mut self, stored: &[u8]) {
        self.current_is_zeros &= self.current.len() + stored.len() <= ZERO_FRAME_BYTES_MAX;
        if self.current_is_zeros {
            self.current.extend_from_slice(stored);
        }
    }

    /// Hands over what a frame holds that was met before; tells how many stored bytes it takes.
    fn take_zero_frame(
        &mut self,
        input: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> Result<Option<usize>, DecodeError> {
        let Some(zeros) = self.zeros.as_ref().filter(|_| self.header_count == 0) else { return Ok(None) };
        // One too many is refused where all are.
        if !input.starts_with(&zeros.stored) || self.raw_bytes + zeros.raw_bytes > self.expected {
            return Ok(None);
        }
        let used = zeros.stored.len();
        self.raw_crc32.combine(&zeros.raw_crc32);
        self.raw_bytes += zeros.raw_bytes;
        self.stored_bytes += used as u64;
        for part in parts_of_zeros(zeros.raw_bytes) {
            sink(part)?;
        }
        Ok(Some(used))
    }

    /// The next byte begins another frame. A frame that held nothing is refused: any number of them would fit.
    fn end_frame(&mut self) -> Result<(), DecodeError> {
        if self.frame_raw_bytes == 0 {
            return Err(DecodeError::Refused { offset: self.frame_offset, fault: "holds nothing" });
        }
        if self.current_is_zeros {
            self.zeros = Some(ZeroFrame::new(&self.current, self.frame_raw_bytes));
        }
        self.header_count = 0;
        Ok(())
    }

    fn hand_over(&mut self, produced: usize, sink: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> Result<(), DecodeError> {
        self.raw_bytes += produced as u64;
        self.frame_raw_bytes += produced as u64;
        if self.raw_bytes > self.expected {
            return Err(DecodeError::TooLong { expected: self.expected });
        }
        let raw = &self.output[..produced];
        self.current_is_zeros = self.current_is_zeros && *raw == ZEROS[..produced];
        self.raw_crc32.update(raw);
        Ok(sink(raw)?)
    }
}

/// Decodes a small object in memory; tells its raw CRC-32.
pub fn decode_exact(stored: &[u8], expected: usize) -> Result<(Vec<u8>, u32), DecodeError> {
    let mut raw = Vec::new();
    let mut decoder = FrameDecoder::new(expected as u64)?;
    decoder.feed(stored, &mut |bytes| {
        raw.extend_from_slice(bytes);
        Ok(())
    })?;
    Ok((raw, decoder.finish()?))
}

/// The first zstd frame of `stored`, which may go on behind it: its raw bytes, and how many stored bytes it takes.
/// It holds at most [`FRAME_BYTES`](super::FRAME_BYTES) and must have a checksum.
pub fn decode_first(stored: &[u8]) -> Result<(Vec<u8>, usize), DecodeError> {
    match stored.get(..HEADER_BYTES) {
        None => return Err(DecodeError::Truncated { offset: 0 }),
        Some(header) if header[..4] != MAGIC => return Err(DecodeError::NotAFrame { offset: 0 }),
        Some(header) if header[4] & 0b0000_0100 == 0 => {
            return Err(DecodeError::Refused { offset: 0, fault: "has no checksum" });
        }
        Some(_) => {}
    }
    let length =
        zstd::zstd_safe::find_frame_compressed_size(stored).map_err(|_| DecodeError::Truncated { offset: 0 })?;
    let raw = zstd::bulk::decompress(&stored[..length], super::FRAME_BYTES)
        .map_err(|source| DecodeError::Frame { offset: 0, source })?;
    Ok((raw, length))
}

#[cfg(test)]
mod tests {
    use super::*;
    use zstd::zstd_safe::CParameter;

    fn frame(raw: &[u8], checksum: bool) -> Vec<u8> {
        let mut compressor = zstd::bulk::Compressor::new(1).unwrap();
        compressor.set_parameter(CParameter::ChecksumFlag(checksum)).unwrap();
        compressor.compress(raw).unwrap()
    }

    fn sample(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|i| ((i * i) >> 7) as u8).collect()
    }

    /// Two frames, 300 000 raw bytes.
    fn object() -> (Vec<u8>, Vec<u8>) {
        let raw = sample(300_000);
        ([frame(&raw[..200_000], true), frame(&raw[200_000..], true)].concat(), raw)
    }

    #[test]
    fn frames_decode_in_pieces_of_any_size() {
        let (stored, raw) = object();
        for step in [1, 3, 4, 5, 6, 1000, stored.len()] {
            let mut decoder = FrameDecoder::new(raw.len() as u64).unwrap();
            let mut found = Vec::new();
            for piece in stored.chunks(step) {
                let mut sink = |bytes: &[u8]| {
                    found.extend_from_slice(bytes);
                    Ok(())
                };
                decoder.feed(piece, &mut sink).unwrap();
            }
            assert_eq!(decoder.finish().unwrap(), crc32fast::hash(&raw));
            assert!(found == raw, "step {step}");
        }
    }

    #[test]
    fn zeros_met_before_are_told_by_their_stored_bytes() {
        let mib = 1 << 20;
        let raw = [sample(200_000), vec![0; 4 * mib - 200_000]].concat();
        let mut frames: Vec<Vec<u8>> = raw.chunks(mib).map(|raw| frame(raw, true)).collect();
        frames.insert(1, frame(&[0; 70_000], true));
        let (stored, expected) = (frames.concat(), raw.len() + 70_000);
        let read = |stored: &[u8], step: usize| {
            let mut decoder = FrameDecoder::new(expected as u64)?;
            let mut found = Vec::new();
            for piece in stored.chunks(step) {
                decoder.feed(piece, &mut |bytes: &[u8]| {
                    found.extend_from_slice(bytes);
                    Ok(())
                })?;
            }
            Ok::<_, DecodeError>((decoder.finish()?, found))
        };
        let whole = [&raw[..mib], &[0; 70_000], &raw[mib..]].concat();
        for step in [1, 20, 57, 1000, stored.len()] {
            let (crc32, found) = read(&stored, step).unwrap();
            assert!(found == whole && crc32 == crc32fast::hash(&whole), "step {step}");
        }
        let last = stored.len() - frames[4].len();
        for bit in last * 8..stored.len() * 8 {
            let mut damaged = stored.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            if let Ok((_, found)) = read(&damaged, stored.len()) {
                assert!(found == whole, "bit {bit}");
            }
        }
        let error = read(&[&stored[..], &frames[4]].concat(), usize::MAX).unwrap_err().to_string();
        assert!(error.contains("follows the last one"), "{error}");
        assert!(matches!(read(&stored[..last], usize::MAX), Err(DecodeError::TooShort { .. })));
        assert!(matches!(read(&stored[..stored.len() - 1], usize::MAX), Err(DecodeError::Truncated { .. })));
    }

    #[test]
    fn every_truncation_and_every_flipped_bit_is_found() {
        let raw = sample(5000);
        let stored = frame(&raw, true);
        for length in 0..stored.len() {
            assert!(decode_exact(&stored[..length], raw.len()).is_err(), "{length} of {}", stored.len());
        }
        for bit in 0..stored.len() * 8 {
            let mut damaged = stored.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            // A bit no decoder looks at may flip; then the content is what it was.
            if let Ok((found, _)) = decode_exact(&damaged, raw.len()) {
                assert!(found == raw, "bit {bit}");
            }
        }
    }

    #[test]
    fn what_our_writer_never_makes_is_refused() {
        let (stored, raw) = object();
        let refused = |stored: &[u8]| decode_exact(stored, raw.len()).unwrap_err().to_string();
        let skippable = [&[0x50, 0x2A, 0x4D, 0x18, 4, 0, 0, 0, 1, 2, 3, 4][..], &stored].concat();
        assert!(refused(&skippable).contains("no zstd frame at stored byte 0"));
        assert!(refused(&[&stored[..], &frame(b"x", true)].concat()).contains("follows the last one"));
        assert!(refused(&[&stored[..], &frame(b"", true)].concat()).contains("follows the last one"));
        assert!(refused(&[&stored[..], b"\0"].concat()).contains("ends inside"));
        assert!(refused(&[frame(b"", true), stored.clone()].concat()).contains("holds nothing"));
        assert!(refused(&frame(&raw, false)).contains("no checksum"));
        assert!(refused(b"").contains("decodes to 0 bytes"));
        assert!(refused(&stored[..stored.len() / 4]).contains("ends inside"));
    }

    #[test]
    fn a_bomb_stops_at_the_expected_size_and_a_huge_window_is_refused() {
        let bomb = frame(&vec![0; 64 << 20], true);
        let mut handed_over = 0;
        let mut decoder = FrameDecoder::new(1 << 20).unwrap();
        let mut sink = |bytes: &[u8]| {
            handed_over += bytes.len();
            Ok(())
        };
        assert!(decoder.feed(&bomb, &mut sink).is_err());
        assert!(handed_over <= 1 << 20);

        let mut compressor = zstd::bulk::Compressor::new(1).unwrap();
        compressor.set_parameter(CParameter::ChecksumFlag(true)).unwrap();
        compressor.set_parameter(CParameter::WindowLog(25)).unwrap();
        let wide = compressor.compress(&vec![7; 40 << 20]).unwrap();
        let error = decode_exact(&wide, 40 << 20).unwrap_err().to_string();
        assert!(error.contains("memory"), "{error}");
    }
}
