//! Owns: the frame of a server message (tag, length, body) and the one buffer frames are decoded from.
//! Does not own: what a body says (`message`, `command`, `handshake`), sockets. proto-notes/01-startup.md.

use std::ops::Range;

/// Tag and length: a length counts itself but not the tag.
pub const HEADER_BYTES: usize = 5;

/// What the read buffer holds: two full WALData messages. Larger reads save few system calls and leave the
/// second-level cache; smaller ones split each message.
pub const BUFFER_BYTES: usize = 256 << 10;

/// The server's limit is 128 KiB of WAL in a message (16 blocks); 1 MiB leaves room for 64 KiB blocks.
pub const WAL_DATA_MAX: usize = 1 << 20;

/// A DataRow may hold a whole history file.
pub const DATA_ROW_MAX: usize = 16 << 20;

/// Everything else: error texts, parameters, row descriptions.
pub const MESSAGE_MAX: usize = 1 << 20;

/// Bytes that are not the protocol. The connection they came from is of no further use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    #[error("server message {} has an impossible length {length}", show_tag(*.tag))]
    Length { tag: u8, length: i32 },
    #[error("server message {} of {length} bytes is longer than the {limit} allowed", show_tag(*.tag))]
    TooLong { tag: u8, length: usize, limit: usize },
    #[error("unexpected server message {} while {during}", show_tag(*.tag))]
    Unexpected { tag: u8, during: &'static str },
    #[error("malformed server message {}: {cause}", show_tag(*.tag))]
    Malformed { tag: u8, cause: &'static str },
    #[error("the answer holds more than {limit} bytes")]
    AnswerTooLong { limit: usize },
}

/// A tag as people know it: `'E'`, or in hexadecimal when it is no letter.
fn show_tag(tag: u8) -> String {
    if tag.is_ascii_graphic() { format!("'{}'", tag as char) } else { format!("0x{tag:02x}") }
}

/// The tag of a message and the length of what follows its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    pub tag: u8,
    pub body_bytes: usize,
}

impl Header {
    /// Reads a header; `None` means more bytes are needed. A length beyond its limit is refused here, before
    /// anything is reserved for it.
    pub fn decode(bytes: &[u8]) -> Result<Option<Header>, ProtocolError> {
        let Some((header, _)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return Ok(None) };
        let [tag, length @ ..] = *header;
        let length = i32::from_be_bytes(length);
        let body_bytes = match usize::try_from(length) {
            Ok(length) if length >= 4 => length - 4,
            _ => return Err(ProtocolError::Length { tag, length }),
        };
        let limit = limit_of(tag);
        if body_bytes > limit {
            return Err(ProtocolError::TooLong { tag, length: body_bytes, limit });
        }
        Ok(Some(Header { tag, body_bytes }))
    }
}

fn limit_of(tag: u8) -> usize {
    match tag {
        b'd' => WAL_DATA_MAX + super::message::WAL_DATA_HEADER_BYTES,
        b'D' => DATA_ROW_MAX,
        _ => MESSAGE_MAX,
    }
}

/// One whole message: its tag and where in the buffer its body lies (valid until the next fill).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    pub tag: u8,
    pub body: Range<usize>,
}

/// Received bytes: written at `end`, consumed from `start`. It keeps its size except for the one message that
/// is larger, and gives the extra room back afterwards.
#[derive(Debug)]
pub struct ReadBuffer {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    /// How many contiguous bytes the message being decoded needs.
    wanted: usize,
}

impl Default for ReadBuffer {
    fn default() -> ReadBuffer {
        ReadBuffer { bytes: vec![0; BUFFER_BYTES], start: 0, end: 0, wanted: 0 }
    }
}

impl ReadBuffer {
    /// What was received and not consumed.
    pub fn unread(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    pub fn slice(&self, range: Range<usize>) -> &[u8] {
        &self.bytes[range]
    }

    /// Consumes `count` bytes; they stay readable through the returned range until the next [`spare`](Self::spare).
    pub fn consume(&mut self, count: usize) -> Range<usize> {
        assert!(count <= self.end - self.start, "only received bytes are consumed");
        let range = self.start..self.start + count;
        self.start += count;
        range
    }

    /// Room to receive into, never empty. Moves what is left to the front: while streaming that is less than a
    /// message header, because WAL is consumed as it arrives.
    pub fn spare(&mut self) -> &mut [u8] {
        let left = self.end - self.start;
        if self.start > 0 {
            self.bytes.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, left);
        }
        let size = BUFFER_BYTES.max(self.wanted).max(left + HEADER_BYTES);
        if self.bytes.len() != size {
            self.bytes.resize(size, 0);
            self.bytes.shrink_to(size);
        }
        &mut self.bytes[self.end..]
    }

    /// Says that `count` bytes of the spare room were filled.
    pub fn received(&mut self, count: usize) {
        assert!(count <= self.bytes.len() - self.end, "a read fills the spare room at most");
        self.end += count;
    }

    /// Takes one whole message; `None` means more bytes are needed.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, ProtocolError> {
        self.wanted = 0;
        let Some(header) = Header::decode(self.unread())? else { return Ok(None) };
        let whole = HEADER_BYTES + header.body_bytes;
        if self.unread().len() < whole {
            self.wanted = whole;
            return Ok(None);
        }
        let range = self.consume(whole);
        Ok(Some(Frame { tag: header.tag, body: range.start + HEADER_BYTES..range.end }))
    }
}

/// Reads a body field by field; every step says `None` when the bytes run out.
#[derive(Clone, Debug)]
pub struct Fields<'a>(pub &'a [u8]);

impl<'a> Fields<'a> {
    pub fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(count)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub fn i16(&mut self) -> Option<i16> {
        self.array().map(i16::from_be_bytes)
    }

    pub fn i32(&mut self) -> Option<i32> {
        self.array().map(i32::from_be_bytes)
    }

    pub fn i64(&mut self) -> Option<i64> {
        self.array().map(i64::from_be_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// A string that ends with a zero byte.
    pub fn c_string(&mut self) -> Option<&'a [u8]> {
        let length = self.0.iter().position(|&byte| byte == 0)?;
        let text = self.take(length)?;
        self.take(1)?;
        Some(text)
    }
}

/// Frames a client message: tag, length, body.
pub fn frame(tag: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.push(tag);
    bytes.extend_from_slice(&(body.len() as u32 + 4).to_be_bytes());
    bytes.extend_from_slice(body);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(buffer: &mut ReadBuffer, bytes: &[u8]) {
        for chunk in bytes.chunks(1000) {
            buffer.spare()[..chunk.len()].copy_from_slice(chunk);
            buffer.received(chunk.len());
        }
    }

    #[test]
    fn a_message_is_read_one_byte_at_a_time() {
        let mut buffer = ReadBuffer::default();
        let message = frame(b'S', b"name\0value\0");
        for (at, byte) in message.iter().enumerate() {
            assert_eq!(buffer.next_frame().unwrap(), None, "after {at} bytes");
            feed(&mut buffer, &[*byte]);
        }
        let found = buffer.next_frame().unwrap().unwrap();
        assert_eq!((found.tag, buffer.slice(found.body)), (b'S', &b"name\0value\0"[..]));
        assert_eq!(buffer.next_frame().unwrap(), None);
    }

    #[test]
    fn impossible_lengths_are_refused_before_memory_is_reserved() {
        for (tag, length) in [(b'E', 0), (b'E', 3), (b'E', -1), (b'E', i32::MIN)] {
            let bytes = [&[tag][..], &i32::to_be_bytes(length)].concat();
            assert_eq!(Header::decode(&bytes), Err(ProtocolError::Length { tag, length }));
        }
        for tag in 0..=255u8 {
            let bytes = [&[tag][..], &i32::MAX.to_be_bytes()].concat();
            assert!(matches!(Header::decode(&bytes), Err(ProtocolError::TooLong { .. })), "{tag}");
        }
    }

    #[test]
    fn a_large_row_grows_the_buffer_and_gives_the_room_back() {
        let mut buffer = ReadBuffer::default();
        let message = frame(b'D', &vec![7; 3 << 20]);
        for chunk in message.chunks(100_000) {
            assert_eq!(buffer.next_frame().unwrap(), None);
            feed(&mut buffer, chunk);
        }
        let found = buffer.next_frame().unwrap().unwrap();
        assert_eq!(buffer.slice(found.body).len(), 3 << 20);
        assert_eq!(buffer.next_frame().unwrap(), None);
        buffer.spare();
        assert_eq!(buffer.bytes.len(), BUFFER_BYTES);
        assert_eq!(buffer.bytes.capacity(), BUFFER_BYTES);
    }

    #[test]
    fn fields_stop_at_the_end() {
        let mut fields = Fields(b"ab\0\x01");
        assert_eq!(fields.c_string(), Some(&b"ab"[..]));
        assert_eq!(fields.i16(), None);
        assert_eq!(fields.u8(), Some(1));
        assert_eq!((fields.u8(), fields.c_string(), fields.take(1)), (None, None, None));
    }
}
