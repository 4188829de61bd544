//! Owns: the text of BASE_BACKUP in both syntaxes, and what its answer says, in both framings, as it arrives.
//! Does not own: sending and receiving (`connection`), what a tar holds (`codec::tar`), what is done with it (`backup`).
//! Pure. proto-notes/04-base-backup.md.

use std::fmt;

use super::command::{BadAnswer, QueryResult, one_row, parse, parse_timeline};
use super::error::escape;
use super::framing::{Fields, ProtocolError};
use crate::wal::{Lsn, TimelineId};

/// MAXPGPATH, less the byte that ends it.
pub const LABEL_BYTES_MAX: usize = 1023;
/// `MAX_RATE` in KiB/s: the server refuses others, 0 too.
pub const MAX_RATE_KIB: std::ops::RangeInclusive<u32> = 32..=1_048_576;
/// From here on the options stand in parentheses, and one copy carries everything.
const FIRST_MAJOR_WITH_TYPED_COPY: u32 = 15;

/// How the server makes the checkpoint a backup begins with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Checkpoint {
    /// At once: costs the server a burst of writes.
    #[default]
    Fast,
    /// Over most of `checkpoint_timeout`.
    Spread,
}

/// What the server compresses the stream with, where its build can (15 and later): it spares the network, not the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompressionMethod {
    Gzip,
    Lz4,
    Zstd,
}

impl CompressionMethod {
    pub const ALL: [CompressionMethod; 3] = [CompressionMethod::Gzip, CompressionMethod::Lz4, CompressionMethod::Zstd];

    pub fn name(self) -> &'static str {
        match self {
            CompressionMethod::Gzip => "gzip",
            CompressionMethod::Lz4 => "lz4",
            CompressionMethod::Zstd => "zstd",
        }
    }

    /// What the server's archive names end with.
    fn suffix(self) -> &'static str {
        match self {
            CompressionMethod::Gzip => ".gz",
            CompressionMethod::Lz4 => ".lz4",
            CompressionMethod::Zstd => ".zst",
        }
    }
}

impl fmt::Display for CompressionMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServerCompression {
    pub method: CompressionMethod,
    /// `None`: the method's own default.
    pub level: Option<i32>,
}

/// What BASE_BACKUP is asked for. The manifest, progress and `tablespace_map` always; WAL never; and never that the server
/// waits for its own archiver, which may hang for ever.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BaseBackupOptions {
    /// At most [`LABEL_BYTES_MAX`] bytes, none of them a line's end.
    pub label: String,
    pub checkpoint: Checkpoint,
    /// Within [`MAX_RATE_KIB`]; `None`: as fast as it goes.
    pub max_rate_kib: Option<u32>,
    /// NONE, CRC32C, SHA224, …
    pub manifest_checksums: &'static str,
    pub compression: Option<ServerCompression>,
}

/// Options no server would take, or that would spoil `backup_label`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OptionsError {
    #[error("a label may have {LABEL_BYTES_MAX} bytes, this one has {0}")]
    LabelTooLong(usize),
    #[error("a label is one line of text, without control characters")]
    LabelNotALine,
    #[error("max_rate is {0} KiB/s; it may be 32 to 1048576 KiB/s, or absent")]
    MaxRate(u32),
    #[error("PostgreSQL {0} does not compress what it sends: that came with 15")]
    NoCompression(u32),
}

impl BaseBackupOptions {
    /// The command as a server of this major version takes it.
    pub fn command(&self, major: u32) -> Result<String, OptionsError> {
        self.check(major)?;
        let label = self.label.replace('\'', "''");
        let is_typed = major >= FIRST_MAJOR_WITH_TYPED_COPY;
        let mut options = vec![format!("LABEL '{label}'"), "PROGRESS".to_string()];
        options.extend(match (self.checkpoint, is_typed) {
            (Checkpoint::Fast, true) => Some("CHECKPOINT 'fast'".to_string()),
            (Checkpoint::Spread, true) => Some("CHECKPOINT 'spread'".to_string()),
            (Checkpoint::Fast, false) => Some("FAST".to_string()),
            (Checkpoint::Spread, false) => None,
        });
        options.push(if is_typed { "WAIT 0" } else { "NOWAIT" }.to_string());
        options.extend(self.max_rate_kib.map(|rate| format!("MAX_RATE {rate}")));
        options.push("TABLESPACE_MAP".to_string());
        options.push("MANIFEST 'yes'".to_string());
        options.push(format!("MANIFEST_CHECKSUMS '{}'", self.manifest_checksums));
        if let Some(ServerCompression { method, level }) = self.compression {
            options.push(format!("COMPRESSION '{method}'"));
            options.extend(level.map(|level| format!("COMPRESSION_DETAIL 'level={level}'")));
        }
        Ok(match is_typed {
            true => format!("BASE_BACKUP ({})", options.join(", ")),
            false => format!("BASE_BACKUP {}", options.join(" ")),
        })
    }

    pub fn check(&self, major: u32) -> Result<(), OptionsError> {
        if self.label.len() > LABEL_BYTES_MAX {
            return Err(OptionsError::LabelTooLong(self.label.len()));
        }
        if self.label.chars().any(char::is_control) {
            return Err(OptionsError::LabelNotALine);
        }
        if let Some(rate) = self.max_rate_kib.filter(|rate| !MAX_RATE_KIB.contains(rate)) {
            return Err(OptionsError::MaxRate(rate));
        }
        match self.compression.is_some() && major < FIRST_MAJOR_WITH_TYPED_COPY {
            true => Err(OptionsError::NoCompression(major)),
            false => Ok(()),
        }
    }
}

/// One row of the second answer: a tar stream to come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TablespaceRow {
    /// `None`: PGDATA, the last row.
    pub tablespace: Option<Tablespace>,
    /// What the server thinks it comes to.
    pub bytes: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tablespace {
    pub oid: u32,
    pub location: String,
}

/// Where the backup begins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupStart {
    pub lsn: Lsn,
    pub timeline: TimelineId,
    /// In the order of their streams.
    pub streams: Vec<TablespaceRow>,
}

/// One thing the server says during BASE_BACKUP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackupEvent<'a> {
    /// Nothing of interest.
    Aside,
    /// The checkpoint is made, and the files follow.
    Start(BackupStart),
    /// The tar of this index in [`BackupStart::streams`] follows.
    Archive(usize),
    /// The next bytes of its tar, compressed if that was asked for.
    Data(&'a [u8]),
    /// All tars are complete; the manifest follows.
    ManifestBegins,
    Manifest(&'a [u8]),
    /// The copy is complete, and this is where it ends. **Not yet success**: the server says last that pages were damaged.
    End {
        stop: Lsn,
        timeline: TimelineId,
    },
    /// The command is complete.
    Complete,
}

/// Why an answer to BASE_BACKUP is none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackupFault {
    Protocol(ProtocolError),
    Answer(BadAnswer),
}

impl From<ProtocolError> for BackupFault {
    fn from(error: ProtocolError) -> BackupFault {
        BackupFault::Protocol(error)
    }
}

impl From<BadAnswer> for BackupFault {
    fn from(cause: BadAnswer) -> BackupFault {
        BackupFault::Answer(cause)
    }
}

/// ```text
/// StartRow ─► Streams ─► Between ─► Copy ─┐
///                          ▲              │ 13, 14: a copy for each stream, and one for the manifest
///                          └──── CopyDone ┤
///                                         └─► EndRow ─► Command ─► Ready ─► Over
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    StartRow,
    Streams,
    Between,
    Copy,
    EndRow,
    Command,
    Ready,
    Over,
}

/// What the bytes in the copy belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Nothing,
    Archive(usize),
    Manifest,
}

/// Reads the answer to BASE_BACKUP message by message. Errors, notices and parameters are the connection's.
#[derive(Debug)]
pub struct BackupDecoder {
    is_typed: bool,
    /// What archives' names end with.
    suffix: &'static str,
    step: Step,
    content: Content,
    result: QueryResult,
    start: Option<(Lsn, TimelineId)>,
    /// OIDs of the streams, `None` for PGDATA.
    streams: Vec<Option<u32>>,
}

impl BackupDecoder {
    pub fn new(major: u32, compression: Option<CompressionMethod>) -> BackupDecoder {
        BackupDecoder {
            is_typed: major >= FIRST_MAJOR_WITH_TYPED_COPY,
            suffix: compression.map_or("", CompressionMethod::suffix),
            step: Step::StartRow,
            content: Content::Nothing,
            result: QueryResult::default(),
            start: None,
            streams: Vec::new(),
        }
    }

    /// Takes one message.
    pub fn handle<'a>(&mut self, tag: u8, body: &'a [u8]) -> Result<BackupEvent<'a>, BackupFault> {
        match (self.step, tag) {
            (Step::StartRow | Step::Streams, b'T') => self.result.describe(body)?,
            (Step::StartRow | Step::Streams | Step::EndRow, b'D') => self.result.push_row(body)?,
            (Step::StartRow, b'C') => {
                let result = std::mem::take(&mut self.result);
                self.start = Some(decode_position(&result)?);
                self.step = Step::Streams;
            }
            (Step::Streams, b'C') => return self.begin_streams(),
            (Step::Between, b'H') => return self.begin_copy(),
            (Step::Between, b'T') if self.is_copied() => {
                self.step = Step::EndRow;
                self.result.describe(body)?;
            }
            (Step::Copy, b'd') => return self.take_copy_data(body),
            (Step::Copy, b'c') => {
                if self.is_typed && !self.is_copied() {
                    return Err(malformed(b'c', "it ends a backup that is not complete").into());
                }
                self.step = Step::Between;
            }
            (Step::EndRow, b'C') => {
                let (stop, timeline) = decode_position(&std::mem::take(&mut self.result))?;
                self.step = Step::Command;
                return Ok(BackupEvent::End { stop, timeline });
            }
            (Step::Command, b'C') => self.step = Step::Ready,
            (Step::Ready, b'Z') => {
                self.step = Step::Over;
                return Ok(BackupEvent::Complete);
            }
            (_, tag) => return Err(ProtocolError::Unexpected { tag, during: "taking a base backup" }.into()),
        }
        Ok(BackupEvent::Aside)
    }

    fn begin_streams(&mut self) -> Result<BackupEvent<'static>, BackupFault> {
        let streams = decode_streams(&std::mem::take(&mut self.result))?;
        self.streams = streams.iter().map(|row| row.tablespace.as_ref().map(|space| space.oid)).collect();
        self.step = Step::Between;
        let (lsn, timeline) = self.start.expect("the first answer came before the second");
        Ok(BackupEvent::Start(BackupStart { lsn, timeline, streams }))
    }

    /// Whether the manifest, the last part, was begun. It cannot be half of one: its end is its checksum.
    fn is_copied(&self) -> bool {
        self.content == Content::Manifest
    }

    /// A copy begins: the only one, or the next stream's, or the manifest's.
    fn begin_copy(&mut self) -> Result<BackupEvent<'static>, BackupFault> {
        self.step = Step::Copy;
        match (self.is_typed, self.content) {
            (true, Content::Nothing) => Ok(BackupEvent::Aside),
            (true, _) | (false, Content::Manifest) => Err(malformed(b'H', "it begins another copy").into()),
            (false, _) => Ok(self.next_content()),
        }
    }

    /// Goes on to the next stream, or after the last one to the manifest.
    fn next_content(&mut self) -> BackupEvent<'static> {
        let next = match self.content {
            Content::Nothing => 0,
            Content::Archive(index) => index + 1,
            Content::Manifest => unreachable!("nothing follows the manifest"),
        };
        if next < self.streams.len() {
            self.content = Content::Archive(next);
            BackupEvent::Archive(next)
        } else {
            self.content = Content::Manifest;
            BackupEvent::ManifestBegins
        }
    }

    fn take_copy_data<'a>(&mut self, body: &'a [u8]) -> Result<BackupEvent<'a>, BackupFault> {
        if !self.is_typed {
            return self.bytes(body);
        }
        let Some((&kind, rest)) = body.split_first() else { return Err(malformed(b'd', "it is empty").into()) };
        match kind {
            b'd' => self.bytes(rest),
            b'n' => self.take_archive(rest),
            b'm' if !rest.is_empty() => Err(malformed(b'd', "bytes follow the word that the manifest begins").into()),
            b'm' => match (self.content, self.next_content_is_manifest()) {
                (Content::Manifest, _) | (_, false) => Err(malformed(b'd', "the manifest begins out of turn").into()),
                _ => Ok(self.next_content()),
            },
            b'p' if rest.len() != 8 => Err(malformed(b'd', "a progress report has a wrong length").into()),
            // Bytes sent, compressed: we count raw ones ourselves.
            b'p' => Ok(BackupEvent::Aside),
            _ => Err(malformed(b'd', "it is of a kind this seawall does not know").into()),
        }
    }

    fn next_content_is_manifest(&self) -> bool {
        match self.content {
            Content::Nothing => self.streams.is_empty(),
            Content::Archive(index) => index + 1 == self.streams.len(),
            Content::Manifest => false,
        }
    }

    fn bytes<'a>(&self, bytes: &'a [u8]) -> Result<BackupEvent<'a>, BackupFault> {
        match self.content {
            Content::Archive(_) => Ok(BackupEvent::Data(bytes)),
            Content::Manifest => Ok(BackupEvent::Manifest(bytes)),
            Content::Nothing => Err(malformed(b'd', "data comes before any archive").into()),
        }
    }

    /// Archive name and the tablespace's path, each ended by a zero byte. The name must be the one whose turn it is.
    fn take_archive(&mut self, body: &[u8]) -> Result<BackupEvent<'static>, BackupFault> {
        let mut fields = Fields(body);
        let (Some(name), Some(_path), true) = (fields.c_string(), fields.c_string(), fields.0.is_empty()) else {
            return Err(malformed(b'd', "an archive's beginning cannot be read").into());
        };
        let next = match self.content {
            Content::Nothing => 0,
            Content::Archive(index) => index + 1,
            Content::Manifest => return Err(malformed(b'd', "an archive follows the manifest").into()),
        };
        let stem = match self.streams.get(next) {
            Some(Some(oid)) => oid.to_string(),
            Some(None) => "base".to_string(),
            None => return Err(malformed(b'd', "there are more archives than were announced").into()),
        };
        let expected = format!("{stem}.tar{}", self.suffix);
        if name != expected.as_bytes() {
            let found = escape(&String::from_utf8_lossy(name));
            return Err(format!("archive {found:?} comes where {expected:?} should").into());
        }
        Ok(self.next_content())
    }
}

fn malformed(tag: u8, cause: &'static str) -> ProtocolError {
    ProtocolError::Malformed { tag, cause }
}

/// The row of the first and the last answer.
fn decode_position(result: &QueryResult) -> Result<(Lsn, TimelineId), BadAnswer> {
    one_row(result, 2)?;
    Ok((parse(result, 0, "position")?, parse_timeline(result, 1)?))
}

fn decode_streams(result: &QueryResult) -> Result<Vec<TablespaceRow>, BadAnswer> {
    let mut streams = Vec::with_capacity(result.rows.len());
    for (index, row) in result.rows.iter().enumerate() {
        if row.len() < 3 {
            return Err(format!("the list of tablespaces has {} columns, expected 3", row.len()));
        }
        let kib = |text: &str| text.parse::<u64>().ok().and_then(|kib| kib.checked_mul(1024));
        let bytes = result.text(index, 2).and_then(kib);
        let tablespace = match (&row[0], &row[1]) {
            (None, _) => None,
            (Some(_), None) => return Err("a tablespace has no location".to_string()),
            (Some(_), Some(_)) => {
                let oid = result.text(index, 0).and_then(|text| text.parse().ok());
                let oid = oid.ok_or("a tablespace's OID cannot be read")?;
                let location = result.text(index, 1).ok_or("a tablespace's location is not UTF-8")?.to_string();
                Some(Tablespace { oid, location })
            }
        };
        streams.push(TablespaceRow { tablespace, bytes });
    }
    let is_base = |row: &TablespaceRow| row.tablespace.is_none();
    match streams.iter().position(is_base) {
        Some(at) if at + 1 == streams.len() => {}
        _ => return Err("the list of tablespaces does not end with PGDATA, and only there".to_string()),
    }
    let mut oids: Vec<u32> = streams.iter().filter_map(|row| Some(row.tablespace.as_ref()?.oid)).collect();
    oids.sort_unstable();
    if let Some(pair) = oids.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(format!("tablespace {} is listed twice", pair[0]));
    }
    Ok(streams)
}

#[cfg(test)]
mod tests;
