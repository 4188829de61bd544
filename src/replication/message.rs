//! Owns: the messages inside CopyData while WAL is streamed, and decoding them as they arrive.
//! Does not own: whether WAL continues where it should (`receiver`), the connection. proto-notes/03-streaming.md.

use std::ops::Range;

use crate::wal::Lsn;

use super::framing::{Fields, Frame, HEADER_BYTES, Header, ProtocolError, ReadBuffer};

/// `w`, start, server's end, time: what stands before the WAL in a WALData message.
pub const WAL_DATA_HEADER_BYTES: usize = 25;
/// `k`, server's end, time, reply requested.
pub const KEEPALIVE_BYTES: usize = 18;
/// A framed status update: header, `r`, three positions, time, reply requested.
pub const STATUS_FRAME_BYTES: usize = HEADER_BYTES + 34;

/// Microseconds between the Unix epoch and PostgreSQL's, 2000-01-01 00:00:00 UTC.
pub const PG_EPOCH_UNIX_MICROS: i64 = 946_684_800_000_000;

/// What the client tells the server: positions are "last byte + 1", times microseconds since PostgreSQL's epoch.
///
/// The server believes `flush` without a check and moves the slot to exactly it; 0 means "not reporting".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatusUpdate {
    pub write: Lsn,
    pub flush: Lsn,
    pub apply: Lsn,
    /// Asks for a keepalive at once.
    pub reply_requested: bool,
    pub now: i64,
}

impl StatusUpdate {
    /// The whole CopyData message.
    pub fn encode(&self) -> [u8; STATUS_FRAME_BYTES] {
        let mut frame = [0; STATUS_FRAME_BYTES];
        frame[0] = b'd';
        frame[1..5].copy_from_slice(&(STATUS_FRAME_BYTES as u32 - 1).to_be_bytes());
        frame[5] = b'r';
        frame[6..14].copy_from_slice(&self.write.0.to_be_bytes());
        frame[14..22].copy_from_slice(&self.flush.0.to_be_bytes());
        frame[22..30].copy_from_slice(&self.apply.0.to_be_bytes());
        frame[30..38].copy_from_slice(&self.now.to_be_bytes());
        frame[38] = u8::from(self.reply_requested);
        frame
    }

    /// Reads the payload of a CopyData message from a client; `None` when it is no status update.
    pub fn decode(payload: &[u8]) -> Option<StatusUpdate> {
        let mut fields = Fields(payload.strip_prefix(b"r")?);
        let mut lsn = || fields.u64().map(Lsn);
        let (write, flush, apply) = (lsn()?, lsn()?, lsn()?);
        let (now, reply) = (fields.i64()?, fields.u8()?);
        fields.0.is_empty().then_some(StatusUpdate { write, flush, apply, now, reply_requested: reply != 0 })
    }
}

/// One thing the stream says; WAL is named by its place in the read buffer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamItem {
    Wal {
        start: Lsn,
        server_end: Lsn,
        sent_at: i64,
        bytes: Range<usize>,
    },
    Keepalive {
        server_end: Lsn,
        sent_at: i64,
        reply_requested: bool,
    },
    CopyDone,
    /// Any message that is not part of the copy: an error, a notice, a parameter, a command's end.
    Other(Frame),
}

/// Decodes the streaming sub-protocol. A WALData message is handed out in the pieces it arrives in.
#[derive(Debug, Default)]
pub struct StreamDecoder {
    /// The WALData message whose payload has not all arrived.
    open: Option<OpenWalData>,
}

#[derive(Clone, Copy, Debug)]
struct OpenWalData {
    next: Lsn,
    server_end: Lsn,
    sent_at: i64,
    left: usize,
}

impl StreamDecoder {
    /// The next item, or `None` when more bytes are needed.
    pub fn next(&mut self, buffer: &mut ReadBuffer) -> Result<Option<StreamItem>, ProtocolError> {
        if let Some(open) = self.open {
            return Ok(self.next_piece(open, buffer));
        }
        let Some(header) = Header::decode(buffer.unread())? else { return Ok(None) };
        if header.tag != b'd' {
            let Some(frame) = buffer.next_frame()? else { return Ok(None) };
            return Ok(Some(if frame.tag == b'c' { StreamItem::CopyDone } else { StreamItem::Other(frame) }));
        }
        self.next_copy_data(header, buffer)
    }

    fn next_piece(&mut self, open: OpenWalData, buffer: &mut ReadBuffer) -> Option<StreamItem> {
        let count = open.left.min(buffer.unread().len());
        if count == 0 && open.left > 0 {
            return None;
        }
        let rest = OpenWalData { next: open.next + count as u64, left: open.left - count, ..open };
        self.open = (rest.left > 0).then_some(rest);
        let bytes = buffer.consume(count);
        Some(StreamItem::Wal { start: open.next, server_end: open.server_end, sent_at: open.sent_at, bytes })
    }

    fn next_copy_data(&mut self, header: Header, buffer: &mut ReadBuffer) -> Result<Option<StreamItem>, ProtocolError> {
        let malformed = |cause| ProtocolError::Malformed { tag: b'd', cause };
        let body = &buffer.unread()[HEADER_BYTES..];
        let body = &body[..body.len().min(header.body_bytes)];
        match body.first() {
            None if header.body_bytes == 0 => Err(malformed("it is empty")),
            None => Ok(None),
            Some(b'w') if header.body_bytes < WAL_DATA_HEADER_BYTES => Err(malformed("WALData is too short")),
            Some(b'w') => {
                let Some(open) = decode_wal_data(body, header.body_bytes)? else { return Ok(None) };
                buffer.consume(HEADER_BYTES + WAL_DATA_HEADER_BYTES);
                // An empty payload is an item too: it carries the server's end.
                self.open = Some(open);
                Ok(self.next_piece(open, buffer))
            }
            Some(b'k') if header.body_bytes != KEEPALIVE_BYTES => Err(malformed("keepalive has a wrong length")),
            Some(b'k') => {
                let Some(keepalive) = decode_keepalive(body) else { return Ok(None) };
                buffer.consume(HEADER_BYTES + KEEPALIVE_BYTES);
                Ok(Some(keepalive))
            }
            // 19 knows `s` (primary status), which a server sends only when asked. Fail closed.
            Some(_) => Err(malformed("it is neither WALData nor a keepalive")),
        }
    }
}

fn decode_wal_data(body: &[u8], body_bytes: usize) -> Result<Option<OpenWalData>, ProtocolError> {
    let mut fields = Fields(&body[1..]);
    let (Some(start), Some(end), Some(sent_at)) = (fields.u64(), fields.u64(), fields.i64()) else { return Ok(None) };
    let left = body_bytes - WAL_DATA_HEADER_BYTES;
    if start.checked_add(left as u64).is_none() {
        return Err(ProtocolError::Malformed { tag: b'd', cause: "WALData reaches beyond the last possible LSN" });
    }
    Ok(Some(OpenWalData { next: Lsn(start), server_end: Lsn(end), sent_at, left }))
}

fn decode_keepalive(body: &[u8]) -> Option<StreamItem> {
    let mut fields = Fields(&body[1..]);
    let (server_end, sent_at, reply) = (Lsn(fields.u64()?), fields.i64()?, fields.u8()?);
    Some(StreamItem::Keepalive { server_end, sent_at, reply_requested: reply != 0 })
}

/// Appends a whole WALData message: the server's side, for the model and the benches.
pub fn encode_wal_data(out: &mut Vec<u8>, start: Lsn, server_end: Lsn, sent_at: i64, payload: &[u8]) {
    out.push(b'd');
    out.extend_from_slice(&((4 + WAL_DATA_HEADER_BYTES + payload.len()) as u32).to_be_bytes());
    out.push(b'w');
    out.extend_from_slice(&start.0.to_be_bytes());
    out.extend_from_slice(&server_end.0.to_be_bytes());
    out.extend_from_slice(&sent_at.to_be_bytes());
    out.extend_from_slice(payload);
}

/// Appends a keepalive: the server's side.
pub fn encode_keepalive(out: &mut Vec<u8>, server_end: Lsn, sent_at: i64, reply_requested: bool) {
    out.push(b'd');
    out.extend_from_slice(&(4 + KEEPALIVE_BYTES as u32).to_be_bytes());
    out.push(b'k');
    out.extend_from_slice(&server_end.0.to_be_bytes());
    out.extend_from_slice(&sent_at.to_be_bytes());
    out.push(u8::from(reply_requested));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replication::framing::{WAL_DATA_MAX, frame};

    /// Everything the decoder says when `bytes` arrive in pieces of `size`; WAL pieces are joined.
    fn decode(bytes: &[u8], size: usize) -> Result<(Vec<u8>, Vec<StreamItem>, usize), ProtocolError> {
        let (mut buffer, mut decoder) = (ReadBuffer::default(), StreamDecoder::default());
        let (mut wal, mut others, mut expected, mut gaps) = (Vec::new(), Vec::new(), None, 0);
        for chunk in bytes.chunks(size) {
            buffer.spare()[..chunk.len()].copy_from_slice(chunk);
            buffer.received(chunk.len());
            while let Some(item) = decoder.next(&mut buffer)? {
                match item {
                    StreamItem::Wal { start, bytes, .. } => {
                        gaps += usize::from(expected.is_some_and(|expected| expected != start));
                        expected = Some(start + bytes.len() as u64);
                        wal.extend_from_slice(buffer.slice(bytes));
                    }
                    other => others.push(other),
                }
            }
        }
        Ok((wal, others, gaps))
    }

    #[test]
    fn any_framing_gives_the_same_wal() {
        let wal: Vec<u8> = (0..5000u32).map(|i| i as u8).collect();
        let mut bytes = Vec::new();
        let mut at = 0;
        for count in [1, 0, 7, 1000, 3992] {
            encode_wal_data(&mut bytes, Lsn(0x1000 + at as u64), Lsn(0x9000), 5, &wal[at..at + count]);
            encode_keepalive(&mut bytes, Lsn(0x9000), 6, count == 7);
            at += count;
        }
        bytes.extend_from_slice(&frame(b'c', b""));
        for size in [1, 2, 3, 30, 31, 100, 100_000] {
            let (found, others, gaps) = decode(&bytes, size).unwrap();
            assert!(found == wal && gaps == 0, "in pieces of {size}");
            assert_eq!(others.len(), 6);
            let asked = StreamItem::Keepalive { server_end: Lsn(0x9000), sent_at: 6, reply_requested: true };
            assert_eq!(others[2], asked);
            assert_eq!(others[5], StreamItem::CopyDone);
        }
    }

    #[test]
    fn hostile_copy_data_is_refused() {
        let mut beyond = Vec::new();
        encode_wal_data(&mut beyond, Lsn(u64::MAX - 1), Lsn(0), 0, b"abc");
        let long = [&b"d"[..], &(WAL_DATA_MAX as i32 + 30).to_be_bytes()].concat();
        let cases =
            [frame(b'd', b""), frame(b'd', b"w"), frame(b'd', b"kshort"), frame(b'd', b"x"), beyond, long, vec![0; 9]];
        for bytes in cases {
            for size in [1, bytes.len()] {
                assert!(decode(&bytes, size).is_err(), "{:?} in pieces of {size}", &bytes[..6]);
            }
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes: Vec<u8>, tag in 0..4usize, kind in 0..4usize, size in 1..40usize) {
            let mut hostile = vec![b"dcEZ"[tag], 0, 0, 0, bytes.len() as u8 & 0x3F, b"wkrx"[kind]];
            hostile.extend_from_slice(&bytes);
            let _ = decode(&hostile, size);
        }
    }

    #[test]
    fn a_status_update_survives_the_round_trip() {
        let status =
            StatusUpdate { write: Lsn(3), flush: Lsn(2), apply: Lsn(u64::MAX), reply_requested: true, now: -7 };
        let bytes = status.encode();
        assert_eq!(Header::decode(&bytes), Ok(Some(Header { tag: b'd', body_bytes: 34 })));
        assert_eq!(StatusUpdate::decode(&bytes[5..]), Some(status));
        assert_eq!(StatusUpdate::decode(&bytes[5..38]), None);
        assert_eq!(StatusUpdate::decode(b"h"), None);
    }
}
