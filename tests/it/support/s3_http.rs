//! Owns: as much of HTTP/1.1 as an S3 client speaks: one request read, one response written.
//! Does not own: what is answered, and what is done to an answer on its way (`s3.rs`).
//!
//! Written by hand because a server that behaves badly is what the tests need, down to bytes that are no HTTP; for
//! honest requests the meaning is the crate `s3s`'s.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

const HEAD_BYTES_MAX: usize = 64 << 10;

#[derive(Clone, Debug)]
pub struct Head {
    pub method: String,
    /// Path and query, as they came.
    pub target: String,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
}

impl Head {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str())
    }

    fn parse(text: &str) -> Option<Head> {
        let mut lines = text.split("\r\n");
        let mut first = lines.next()?.split(' ');
        let (method, target) = (first.next()?.to_owned(), first.next()?.to_owned());
        let header = |line: &str| {
            line.split_once(':').map(|(name, value)| (name.trim().to_lowercase(), value.trim().to_owned()))
        };
        let headers = lines.filter(|line| !line.is_empty()).map(header).collect::<Option<_>>()?;
        Some(Head { method, target, headers })
    }
}

#[derive(Clone, Debug, Default)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Bytes,
    /// Without a body by its nature; `content-length` then says what a GET would send.
    pub is_to_head: bool,
}

impl Answer {
    /// Everything before the body.
    pub fn head(&self) -> Bytes {
        let mut text = format!("HTTP/1.1 {} Status\r\n", self.status);
        for (name, value) in &self.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        let has_length = self.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-length"));
        let may_have_length = !matches!(self.status, 100..200 | 204 | 304);
        if !has_length && may_have_length {
            text.push_str(&format!("content-length: {}\r\n", self.body.len()));
        }
        text.push_str("\r\n");
        Bytes::from(text)
    }
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// One connection of a client, TLS already taken off.
#[derive(Debug)]
pub struct Wire<S> {
    stream: S,
    buffer: BytesMut,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub fn new(stream: S) -> Wire<S> {
        Wire { stream, buffer: BytesMut::with_capacity(64 << 10) }
    }

    /// The next request's head; `None` when the client is gone.
    pub async fn read_head(&mut self) -> io::Result<Option<Head>> {
        loop {
            if let Some(end) = self.buffer.windows(4).position(|four| four == b"\r\n\r\n") {
                let head = self.buffer.split_to(end + 4);
                let text = std::str::from_utf8(&head).map_err(|_| bad("a head that is no text"))?;
                return Head::parse(text).map(Some).ok_or_else(|| bad("no request"));
            }
            if self.buffer.len() > HEAD_BYTES_MAX {
                return Err(bad("a head without end"));
            }
            if !self.more().await? {
                return Ok(None);
            }
        }
    }

    async fn more(&mut self) -> io::Result<bool> {
        Ok(self.stream.read_buf(&mut self.buffer).await? > 0)
    }

    /// At least `bytes` in the buffer.
    async fn fill(&mut self, bytes: usize) -> io::Result<()> {
        while self.buffer.len() < bytes {
            if !self.more().await? {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(())
    }

    /// The body that belongs to a head.
    pub async fn read_body(&mut self, head: &Head) -> io::Result<Bytes> {
        self.expect_body(head).await?;
        if let Some(length) = head.header("content-length") {
            let length: usize = length.parse().map_err(|_| bad("no length"))?;
            self.buffer.reserve(length.saturating_sub(self.buffer.len()));
            self.fill(length).await?;
            return Ok(self.buffer.split_to(length).freeze());
        }
        if !head.header("transfer-encoding").is_some_and(|encoding| encoding.contains("chunked")) {
            return Ok(Bytes::new());
        }
        let mut body = BytesMut::new();
        loop {
            let line = self.read_line().await?;
            let digits = line.split(';').next().unwrap_or_default().trim();
            let length = usize::from_str_radix(digits, 16).map_err(|_| bad("no chunk"))?;
            if length == 0 {
                while !self.read_line().await?.is_empty() {}
                return Ok(body.freeze());
            }
            self.fill(length + 2).await?;
            body.extend_from_slice(&self.buffer[..length]);
            self.buffer.advance(length + 2);
        }
    }

    /// The first bytes of a body, and no more of it ever.
    pub async fn read_start_of_body(&mut self, head: &Head, bytes: usize) -> io::Result<()> {
        self.expect_body(head).await?;
        self.fill(bytes).await
    }

    async fn expect_body(&mut self, head: &Head) -> io::Result<()> {
        if head.header("expect").is_some_and(|expected| expected.eq_ignore_ascii_case("100-continue")) {
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        Ok(())
    }

    async fn read_line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = self.buffer.windows(2).position(|two| two == b"\r\n") {
                let line = self.buffer.split_to(end + 2);
                return Ok(String::from_utf8_lossy(&line[..end]).into_owned());
            }
            self.fill(self.buffer.len() + 1).await?;
        }
    }

    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// Waits until the client gives up, reading nothing into memory that it still sends.
    pub async fn wait_for_end(&mut self) {
        let mut sink = [0; 4096];
        while self.stream.read(&mut sink).await.is_ok_and(|bytes| bytes > 0) {}
    }
}
