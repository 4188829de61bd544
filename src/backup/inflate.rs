//! Owns: decompressing what the server compressed, on a thread of its own, a bounded number of pieces at a time.
//! Does not own: the formats (`codec::inflate`).

use std::io::{self, Read};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;

use super::BackupError;
use crate::codec::inflate;
use crate::replication::base_backup::CompressionMethod;

/// A piece of output.
const PIECE_BYTES: usize = 128 << 10;
/// Pieces on their way in, and out: enough that neither side waits for each single one.
const PIECES_QUEUED: usize = 8;

/// One compressed stream.
#[derive(Debug)]
pub struct Inflater {
    compressed: Option<mpsc::Sender<Bytes>>,
    raw: mpsc::Receiver<io::Result<Bytes>>,
}

impl Inflater {
    pub fn new(method: CompressionMethod) -> Inflater {
        let (compressed, input) = mpsc::channel(PIECES_QUEUED);
        let (output, raw) = mpsc::channel(PIECES_QUEUED);
        let method = match method {
            CompressionMethod::Gzip => inflate::Method::Gzip,
            CompressionMethod::Lz4 => inflate::Method::Lz4,
            CompressionMethod::Zstd => inflate::Method::Zstd,
        };
        tokio::task::spawn_blocking(move || {
            if let Err(error) = inflate(method, ChannelReader { input, piece: Bytes::new() }, &output) {
                let _ = output.blocking_send(Err(error)); // nobody listens: the backup has ended
            }
        });
        Inflater { compressed: Some(compressed), raw }
    }

    /// Hands `piece` over, or gives what is ready: then it is to be called again with the same piece.
    pub async fn push(&mut self, piece: &mut Option<Bytes>) -> Result<Option<Bytes>, BackupError> {
        let compressed = self.compressed.as_ref().expect("nothing is pushed after the end");
        tokio::select! {
            biased;
            raw = self.raw.recv() => match raw {
                Some(Ok(raw)) => Ok(Some(raw)),
                Some(Err(error)) => Err(BackupError::Decompress(error.to_string())),
                None => Err(BackupError::Decompress("bytes follow its end".to_string())),
            },
            permit = compressed.reserve() => {
                if let (Ok(permit), Some(piece)) = (permit, piece.take()) {
                    permit.send(piece);
                }
                Ok(None)
            }
        }
    }

    /// No more is pushed: gives what is left, `None` at the end.
    pub async fn rest(&mut self) -> Result<Option<Bytes>, BackupError> {
        self.compressed = None;
        self.raw.recv().await.transpose().map_err(|error| BackupError::Decompress(error.to_string()))
    }
}

fn inflate(
    method: inflate::Method,
    mut input: ChannelReader,
    output: &mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<()> {
    {
        let mut reader = inflate::reader(method, &mut input)?;
        loop {
            let mut piece = vec![0; PIECE_BYTES];
            let mut filled = 0;
            while filled < PIECE_BYTES {
                match reader.read(&mut piece[filled..]) {
                    Ok(0) => break,
                    Ok(count) => filled += count,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            piece.truncate(filled);
            if filled == 0 || output.blocking_send(Ok(piece.into())).is_err() {
                break;
            }
        }
    }
    // What the decoder did not want: nothing, in a stream that is whole.
    match input.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "bytes follow the end of the compressed stream")),
    }
}

struct ChannelReader {
    input: mpsc::Receiver<Bytes>,
    piece: Bytes,
}

impl Read for ChannelReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.piece.is_empty() {
            match self.input.blocking_recv() {
                Some(piece) => self.piece = piece,
                None => return Ok(0),
            }
        }
        let count = buffer.len().min(self.piece.len());
        self.piece.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}
