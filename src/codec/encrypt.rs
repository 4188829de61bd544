//! Owns: encryption of whole objects to age X25519 recipients, and their decryption with bounded memory; the only use
//! of age.
//! Does not own: which objects are encrypted (`archiver`), where keys are configured and their files read.
//!
//! age hides content and shows that it was changed; it does not prove who wrote it.

use std::io::{self, BufRead, Read, Write};
use std::str::FromStr;
use std::sync::{Arc, Mutex};

use age::stream::{StreamReader, StreamWriter};
use age::x25519;
use bytes::Bytes;

/// More would not fit the header a reader accepts.
const RECIPIENTS_MAX: usize = 100;
/// A longer age header is refused: a recipient takes about 100 bytes of it, and age parses what it has got again with
/// every line.
const HEADER_BYTES_MAX: usize = 16 << 10;
const MAGIC_LINE: &[u8] = b"age-encryption.org/v1\n";
/// What the last line of a header begins with; no other line does.
const MAC_LINE: &[u8] = b"\n--- ";
/// Follows the header.
const NONCE_BYTES: usize = 16;
/// Encrypted bytes taken at a time: about one chunk of age's.
const STEP_BYTES: usize = 64 << 10;

/// Public keys: whoever holds one of the identities that belong to them can read.
#[derive(Clone)]
pub struct Recipients(Arc<Vec<x25519::Recipient>>);

impl std::fmt::Debug for Recipients {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.0.iter().map(ToString::to_string)).finish()
    }
}

impl Recipients {
    /// `age1…` public keys, at least one.
    pub fn parse(keys: &[String]) -> Result<Recipients, String> {
        if keys.is_empty() {
            return Err("at least one age recipient (age1…)".into());
        }
        if keys.len() > RECIPIENTS_MAX {
            return Err(format!("at most {RECIPIENTS_MAX} age recipients, not {}", keys.len()));
        }
        let parse = |key: &String| {
            x25519::Recipient::from_str(key.trim()).map_err(|why| format!("{key:?} is no age X25519 recipient: {why}"))
        };
        Ok(Recipients(Arc::new(keys.iter().map(parse).collect::<Result<_, _>>()?)))
    }
}

/// Private keys. Printed, they show how many they are and the public keys they belong to.
#[derive(Clone)]
pub struct Identities(Arc<Vec<x25519::Identity>>);

impl std::fmt::Debug for Identities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identities of {:?}", self.public_keys())
    }
}

impl Identities {
    /// The content of an identity file as `age-keygen` writes it: one `AGE-SECRET-KEY-1…` per line, empty lines and
    /// lines that begin with `#`. Errors name the line, never what it holds.
    pub fn parse(content: &[u8]) -> Result<Identities, String> {
        let content = std::str::from_utf8(content).map_err(|_| "it is not text".to_string())?;
        let mut identities = Vec::new();
        for (index, line) in content.lines().enumerate() {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let identity = x25519::Identity::from_str(line)
                .map_err(|why| format!("line {} is no age X25519 identity (AGE-SECRET-KEY-1…): {why}", index + 1))?;
            identities.push(identity);
        }
        if identities.is_empty() {
            return Err("it holds no identity (AGE-SECRET-KEY-1…)".to_string());
        }
        Ok(Identities(Arc::new(identities)))
    }

    /// The recipients these identities read for, as `age1…`.
    pub fn public_keys(&self) -> Vec<String> {
        self.0.iter().map(|identity| identity.to_public().to_string()).collect()
    }
}

/// What a lineage's objects are encrypted to, and what can read them. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Keys {
    /// New objects are encrypted to these; `None`: they are not encrypted.
    pub recipients: Option<Recipients>,
    /// Needed to read encrypted objects, and never to write them.
    pub identities: Option<Identities>,
}

/// One age stream being written: every object has its own, with a key nobody has seen before.
pub struct Encryptor {
    writer: StreamWriter<Output>,
    output: Output,
}

impl std::fmt::Debug for Encryptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encryptor").finish_non_exhaustive()
    }
}

/// Where age writes to. It gives no access to what it wraps, so this end is shared; only one thread is ever here.
#[derive(Clone, Debug, Default)]
struct Output(Arc<Mutex<Vec<u8>>>);

impl Output {
    fn take(&self, further: usize) -> Bytes {
        let mut bytes = self.0.lock().expect("no holder panics");
        std::mem::replace(&mut *bytes, Vec::with_capacity(further)).into()
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().expect("no holder panics").extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Encryptor {
    pub fn new(recipients: &Recipients) -> Encryptor {
        let all = recipients.0.iter().map(|recipient| recipient as &dyn age::Recipient);
        let output = Output::default();
        let writer = age::Encryptor::with_recipients(all)
            .expect("any number of X25519 recipients above zero go together")
            .wrap_output(output.clone())
            .expect("a vector takes every byte");
        Encryptor { writer, output }
    }

    /// Encrypts the next bytes. What comes out (often nothing, because age works in chunks of 64 KiB) is the next part
    /// of the stream.
    pub fn push(&mut self, plain: &[u8]) -> Bytes {
        self.writer.write_all(plain).expect("a vector takes every byte");
        self.output.take(0)
    }

    /// The last part of the stream, without which nobody takes it for whole.
    pub fn finish(self) -> Bytes {
        self.writer.finish().expect("a vector takes every byte");
        self.output.take(0)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum DecryptError {
    #[error("it is encrypted, and there is no identity to read it with")]
    NoIdentity,
    #[error("it is encrypted to other recipients: none of the {tried} identities at hand can read it")]
    NoMatchingIdentity { tried: usize },
    #[error("it is no age file of version 1")]
    NotAge,
    #[error("its age header is longer than {HEADER_BYTES_MAX} bytes")]
    HeaderTooLong,
    #[error("its age header is damaged: {0}")]
    Header(String),
    #[error("its age stream ends after {stored_bytes} stored bytes, before its last chunk")]
    Truncated { stored_bytes: u64 },
    /// Cut off inside a chunk looks the same as changed.
    #[error("its age stream is damaged: no authentic chunk ends at or before stored byte {stored_bytes}")]
    Damaged { stored_bytes: u64 },
}

impl DecryptError {
    /// Whether another key, rather than another object, is what is needed.
    pub fn is_about_keys(&self) -> bool {
        matches!(self, DecryptError::NoIdentity | DecryptError::NoMatchingIdentity { .. })
    }
}

/// Decrypts an object that is fed in pieces of any size; every authentic chunk goes to a sink at once. Only
/// [`Decryptor::finish`] shows that nothing is missing.
pub struct Decryptor {
    identities: Identities,
    state: State,
    stored_bytes: u64,
}

enum State {
    /// The bytes so far: header and nonce are not complete.
    Header(Vec<u8>),
    Stream {
        reader: Box<StreamReader<Input>>,
        pending: Arc<Mutex<Pending>>,
    },
}

impl std::fmt::Debug for Decryptor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Decryptor").field("stored_bytes", &self.stored_bytes).finish_non_exhaustive()
    }
}

impl Decryptor {
    pub fn new(identities: &Identities) -> Decryptor {
        Decryptor { identities: identities.clone(), state: State::Header(Vec::new()), stored_bytes: 0 }
    }

    /// Takes the next stored bytes. After an error the decryptor is of no more use, and so is what the sink got.
    pub fn feed<E: From<DecryptError>>(
        &mut self,
        stored: &[u8],
        sink: &mut dyn FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        for step in stored.chunks(STEP_BYTES) {
            self.stored_bytes += step.len() as u64;
            match &mut self.state {
                State::Header(header) => {
                    header.extend_from_slice(step);
                    self.open_stream()?;
                }
                State::Stream { pending, .. } => pending.lock().expect("no holder panics").put(step),
            }
            self.drain(sink)?;
        }
        Ok(())
    }

    /// No more bytes follow.
    pub fn finish<E: From<DecryptError>>(mut self, sink: &mut dyn FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        match &self.state {
            State::Header(_) => Err(DecryptError::Truncated { stored_bytes: self.stored_bytes }.into()),
            State::Stream { pending, .. } => {
                pending.lock().expect("no holder panics").ended = true;
                self.drain(sink)
            }
        }
    }

    /// Goes on to the stream when header and nonce are there.
    fn open_stream(&mut self) -> Result<(), DecryptError> {
        let State::Header(header) = &mut self.state else { return Ok(()) };
        let known = header.len().min(MAGIC_LINE.len());
        if header[..known] != MAGIC_LINE[..known] {
            return Err(DecryptError::NotAge);
        }
        let Some(header_bytes) = header_bytes(header) else {
            return if header.len() > HEADER_BYTES_MAX { Err(DecryptError::HeaderTooLong) } else { Ok(()) };
        };
        if header_bytes > HEADER_BYTES_MAX {
            return Err(DecryptError::HeaderTooLong);
        }
        if header.len() < header_bytes + NONCE_BYTES {
            return Ok(());
        }
        let pending = Arc::new(Mutex::new(Pending::default()));
        let input = Input { beginning: io::Cursor::new(std::mem::take(header)), pending: pending.clone() };
        let identities = self.identities.0.iter().map(|identity| identity as &dyn age::Identity);
        let opened = age::Decryptor::new_buffered(input).and_then(|decryptor| decryptor.decrypt(identities));
        let reader = opened.map_err(|error| match error {
            age::DecryptError::NoMatchingKeys => DecryptError::NoMatchingIdentity { tried: self.identities.0.len() },
            age::DecryptError::UnknownFormat => DecryptError::NotAge,
            other => DecryptError::Header(other.to_string()),
        })?;
        self.state = State::Stream { reader: Box::new(reader), pending };
        Ok(())
    }

    fn drain<E: From<DecryptError>>(&mut self, sink: &mut dyn FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let State::Stream { reader, .. } = &mut self.state else { return Ok(()) };
        let mut plain = [0; 16 << 10];
        loop {
            match reader.read(&mut plain) {
                Ok(0) => return Ok(()),
                Ok(count) => sink(&plain[..count])?,
                Err(error) => {
                    let stored_bytes = self.stored_bytes;
                    return match error.kind() {
                        io::ErrorKind::WouldBlock => Ok(()),
                        io::ErrorKind::UnexpectedEof => Err(DecryptError::Truncated { stored_bytes }.into()),
                        _ => Err(DecryptError::Damaged { stored_bytes }.into()),
                    };
                }
            }
        }
    }
}

/// The length of the age header `bytes` begins with, if it is complete.
fn header_bytes(bytes: &[u8]) -> Option<usize> {
    let mac_line = bytes.windows(MAC_LINE.len()).position(|window| window == MAC_LINE)? + 1;
    let mac_line_bytes = bytes[mac_line..].iter().position(|&byte| byte == b'\n')? + 1;
    Some(mac_line + mac_line_bytes)
}

/// What was fed and not read yet.
#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    read_bytes: usize,
    ended: bool,
}

impl Pending {
    fn put(&mut self, further: &[u8]) {
        if self.read_bytes == self.bytes.len() {
            self.bytes.clear();
            self.read_bytes = 0;
        }
        self.bytes.extend_from_slice(further);
    }
}

/// What age reads from: the beginning, which it parses line by line, then what is fed. Where that ends for now it
/// answers `WouldBlock`; the reader keeps what it has and goes on from there at its next call.
#[derive(Debug)]
struct Input {
    beginning: io::Cursor<Vec<u8>>,
    pending: Arc<Mutex<Pending>>,
}

impl Read for Input {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.beginning.read(buffer)?;
        if count > 0 || buffer.is_empty() {
            return Ok(count);
        }
        let mut pending = self.pending.lock().expect("no holder panics");
        let mut unread = &pending.bytes[pending.read_bytes..];
        let count = unread.read(buffer)?;
        pending.read_bytes += count;
        if count == 0 && !pending.ended { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(count) }
    }
}

impl BufRead for Input {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.beginning.fill_buf()
    }

    fn consume(&mut self, count: usize) {
        self.beginning.consume(count);
    }
}

#[cfg(test)]
mod tests;
