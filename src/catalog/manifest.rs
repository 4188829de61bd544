//! Owns: PostgreSQL's `backup_manifest`, read as its bytes arrive.
//! Does not own: the files themselves (`backup`, `restore`), what may differ from it (the caller). Pure.
//!
//! proto-notes/04-base-backup.md, "the manifest". It is JSON of one object a line, in every version that writes one, and
//! its own checksum is defined by lines; so it is read line by line, in the memory of its longest line and what a caller
//! keeps of its files. A layout PostgreSQL does not write is refused.

mod checksum;
mod table;

use std::borrow::Cow;

use aws_lc_rs::digest;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::wal::{Lsn, SystemId, TimelineId};

pub use checksum::{ChecksumAlgorithm, FileChecksum, FileHasher};
use checksum::{decode_hex, encode_hex};
pub use table::FileTable;

/// A path has at most 1024 bytes, each at most six characters of JSON.
const LINE_BYTES_MAX: usize = 16 << 10;
/// One for each timeline a standby's backup crossed.
const WAL_RANGES_MAX: usize = 1000;

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("line {line} {fault}")]
    Line { line: u64, fault: String },
    #[error("it has version {found}; this seawall knows versions 1 and 2")]
    Version { found: u64 },
    #[error("its SHA-256 is {found}, it says {expected}: it was changed after the server wrote it")]
    Checksum { found: String, expected: String },
    #[error("it ends after line {line}, before its checksum")]
    Truncated { line: u64 },
    #[error("bytes follow its checksum")]
    AfterEnd,
    #[error("it lists file \"{path}\" twice")]
    Duplicate { path: String },
}

/// One file as the manifest lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestFile<'a> {
    /// Below PGDATA; a tablespace's begin with `pg_tblspc/<oid>/`.
    pub path: Cow<'a, [u8]>,
    pub size: u64,
    pub checksum: FileChecksum,
}

/// WAL without which the files are not consistent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WalRange {
    pub timeline: TimelineId,
    pub start: Lsn,
    pub end: Lsn,
}

/// Everything a manifest says but its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestSummary {
    pub version: u64,
    /// From version 2 (PostgreSQL 17) on.
    pub system_id: Option<SystemId>,
    /// Newest timeline first.
    pub wal_ranges: Vec<WalRange>,
    pub files: u64,
    pub bytes: u64,
    /// The checksum it carries, verified: SHA-256 in hexadecimal.
    pub sha256: String,
}

/// ```text
/// { "PostgreSQL-Backup-Manifest-Version": 2,       Version
/// "System-Identifier": 7…,                         SystemId (version 2)
/// "Files": [                                       Files
/// { "Path": …, "Size": …, … },                     InFiles …
/// { … }
/// ],
/// "WAL-Ranges": [                                  Ranges
/// { "Timeline": 1, "Start-LSN": …, "End-LSN": … }  InRanges …
/// ],
/// "Manifest-Checksum": "…"}                        Checksum
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expected {
    Version,
    SystemId,
    Files,
    InFiles(Listed),
    Ranges,
    InRanges(Listed),
    Checksum,
    End,
}

/// What a list's next line may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Listed {
    EntryOrEnd,
    /// The last one ended with a comma.
    Entry,
    End,
}

/// Reads a manifest that is fed in pieces of any size.
pub struct ManifestReader {
    expected: Expected,
    /// The beginning of a line whose end has not arrived.
    partial: Vec<u8>,
    line: u64,
    sha256: digest::Context,
    summary: ManifestSummary,
}

impl std::fmt::Debug for ManifestReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ManifestReader")
            .field("line", &self.line)
            .field("expected", &self.expected)
            .finish_non_exhaustive()
    }
}

impl Default for ManifestReader {
    fn default() -> ManifestReader {
        let summary = ManifestSummary {
            version: 0,
            system_id: None,
            wal_ranges: Vec::new(),
            files: 0,
            bytes: 0,
            sha256: String::new(),
        };
        ManifestReader {
            expected: Expected::Version,
            partial: Vec::new(),
            line: 0,
            sha256: digest::Context::new(&digest::SHA256),
            summary,
        }
    }
}

impl ManifestReader {
    pub fn new() -> ManifestReader {
        ManifestReader::default()
    }

    /// Takes the next bytes; each file whose line is complete goes to `sink`, in the manifest's order. What it got
    /// counts only once [`ManifestReader::finish`] has verified the manifest's own checksum.
    pub fn push<E: From<ManifestError>>(
        &mut self,
        mut bytes: &[u8],
        sink: &mut dyn FnMut(ManifestFile<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.summary.bytes += bytes.len() as u64;
        while let Some(end) = bytes.iter().position(|&byte| byte == b'\n') {
            let (line, rest) = bytes.split_at(end + 1);
            bytes = rest;
            if self.partial.is_empty() {
                self.take_line(line, sink)?;
            } else {
                self.partial.extend_from_slice(line);
                let line = std::mem::take(&mut self.partial);
                self.take_line(&line, sink)?;
                self.partial = line;
                self.partial.clear();
            }
        }
        self.partial.extend_from_slice(bytes);
        if self.partial.len() > LINE_BYTES_MAX {
            return Err(self.fault_in(self.line + 1, format!("is longer than {LINE_BYTES_MAX} bytes")).into());
        }
        Ok(())
    }

    /// No more bytes follow.
    pub fn finish(self) -> Result<ManifestSummary, ManifestError> {
        match self.expected {
            Expected::End if self.partial.is_empty() => Ok(self.summary),
            Expected::End => Err(ManifestError::AfterEnd),
            _ => Err(ManifestError::Truncated { line: self.line }),
        }
    }

    fn fault_in(&self, line: u64, fault: impl Into<String>) -> ManifestError {
        ManifestError::Line { line, fault: fault.into() }
    }

    fn fault(&self, fault: impl Into<String>) -> ManifestError {
        self.fault_in(self.line, fault)
    }

    fn take_line<E: From<ManifestError>>(
        &mut self,
        line: &[u8],
        sink: &mut dyn FnMut(ManifestFile<'_>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.line += 1;
        if line.len() > LINE_BYTES_MAX {
            return Err(self.fault(format!("is longer than {LINE_BYTES_MAX} bytes")).into());
        }
        let Ok(text) = std::str::from_utf8(line) else { return Err(self.fault("is not UTF-8").into()) };
        if self.expected == Expected::Checksum {
            return Ok(self.take_checksum(text.trim())?);
        }
        self.sha256.update(line);
        let text = text.trim();
        match self.expected {
            Expected::InFiles(listed) => match self.take_listed(text, listed)? {
                Some((entry, next)) => {
                    let file = self.file(entry)?;
                    self.summary.files += 1;
                    self.expected = Expected::InFiles(next);
                    sink(file)?;
                }
                None => self.expected = Expected::Ranges,
            },
            Expected::InRanges(listed) => match self.take_listed(text, listed)? {
                Some((entry, next)) => {
                    self.take_range(entry)?;
                    self.expected = Expected::InRanges(next);
                }
                None => self.expected = Expected::Checksum,
            },
            _ => self.take_plain(text)?,
        }
        Ok(())
    }

    /// A line outside the lists.
    fn take_plain(&mut self, text: &str) -> Result<(), ManifestError> {
        let number = |key: &str| text.strip_prefix(key)?.strip_suffix(',')?.trim().parse::<u64>().ok();
        self.expected = match self.expected {
            Expected::Version => {
                let version = number("{ \"PostgreSQL-Backup-Manifest-Version\":");
                self.summary.version =
                    version.ok_or_else(|| self.fault("is not the beginning of a backup manifest"))?;
                match self.summary.version {
                    1 => Expected::Files,
                    2 => Expected::SystemId,
                    found => return Err(ManifestError::Version { found }),
                }
            }
            Expected::SystemId => {
                let id = number("\"System-Identifier\":").ok_or_else(|| self.fault("is not the system identifier"))?;
                self.summary.system_id = Some(SystemId(id));
                Expected::Files
            }
            Expected::Files if text == "\"Files\": [" => Expected::InFiles(Listed::EntryOrEnd),
            Expected::Files => return Err(self.fault("does not begin the list of files")),
            Expected::Ranges if text == "\"WAL-Ranges\": [" => Expected::InRanges(Listed::EntryOrEnd),
            Expected::Ranges => return Err(self.fault("does not begin the list of WAL ranges")),
            Expected::End => return Err(ManifestError::AfterEnd),
            Expected::InFiles(_) | Expected::InRanges(_) | Expected::Checksum => {
                unreachable!("lines of lists, and the last one, are taken elsewhere")
            }
        };
        Ok(())
    }

    /// A line of a list: its entry and what may follow; `None` at the list's end.
    fn take_listed<'a>(&self, text: &'a str, listed: Listed) -> Result<Option<(&'a str, Listed)>, ManifestError> {
        if text == "]," {
            return match listed {
                Listed::Entry => Err(self.fault("ends a list whose last entry announced another")),
                _ => Ok(None),
            };
        }
        if listed == Listed::End {
            return Err(self.fault("should end a list: no comma stands before it"));
        }
        Ok(Some(match text.strip_suffix(',') {
            Some(entry) => (entry, Listed::Entry),
            None => (text, Listed::End),
        }))
    }

    fn file<'a>(&self, entry: &'a str) -> Result<ManifestFile<'a>, ManifestError> {
        let FileEntry { path, encoded_path, size, _last_modified: _, algorithm, checksum } =
            serde_json::from_str(entry).map_err(|error| self.fault(format!("is no file of a manifest: {error}")))?;
        let path = match (path, encoded_path) {
            (Some(Cow::Borrowed(path)), None) => Cow::Borrowed(path.as_bytes()),
            (Some(Cow::Owned(path)), None) => Cow::Owned(path.into_bytes()),
            (None, Some(hex)) => {
                Cow::Owned(decode_hex(hex).ok_or_else(|| self.fault("has an Encoded-Path that is not hexadecimal"))?)
            }
            _ => return Err(self.fault("has neither Path nor Encoded-Path, or both")),
        };
        if path.is_empty() {
            return Err(self.fault("has an empty path"));
        }
        let checksum = match (algorithm, checksum) {
            (None, None) => FileChecksum::new(ChecksumAlgorithm::None, &[]),
            (Some(name), Some(text)) => {
                let algorithm = ChecksumAlgorithm::parse(name).filter(|found| *found != ChecksumAlgorithm::None);
                let algorithm = algorithm.ok_or_else(|| self.fault("has a checksum of a kind nobody knows"))?;
                let checksum = FileChecksum::parse(algorithm, text);
                checksum.ok_or_else(|| self.fault(format!("has no {algorithm} checksum that can be read")))?
            }
            _ => return Err(self.fault("has a checksum without its algorithm, or the reverse")),
        };
        Ok(ManifestFile { path, size, checksum })
    }

    fn take_range(&mut self, entry: &str) -> Result<(), ManifestError> {
        let RangeEntry { timeline, start, end } =
            serde_json::from_str(entry).map_err(|error| self.fault(format!("is no WAL range: {error}")))?;
        let range = match (start.parse::<Lsn>(), end.parse::<Lsn>()) {
            (Ok(start), Ok(end)) if start <= end && timeline > 0 => {
                WalRange { timeline: TimelineId(timeline), start, end }
            }
            _ => return Err(self.fault("is no WAL range that can be")),
        };
        if self.summary.wal_ranges.len() >= WAL_RANGES_MAX {
            return Err(self.fault(format!("is WAL range number {}: too many", WAL_RANGES_MAX + 1)));
        }
        self.summary.wal_ranges.push(range);
        Ok(())
    }

    fn take_checksum(&mut self, text: &str) -> Result<(), ManifestError> {
        let value = text.strip_prefix("\"Manifest-Checksum\": \"").and_then(|rest| rest.strip_suffix("\"}"));
        let value = value.ok_or_else(|| self.fault("is not the manifest's checksum"))?;
        let found = encode_hex(self.sha256.clone().finish().as_ref());
        if found != value {
            let expected = value.chars().take(64).collect::<String>().escape_default().to_string();
            return Err(ManifestError::Checksum { found, expected });
        }
        self.summary.sha256 = found;
        self.expected = Expected::End;
        Ok(())
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FileEntry<'a> {
    #[serde(rename = "Path", borrow)]
    path: Option<Cow<'a, str>>,
    #[serde(rename = "Encoded-Path", borrow)]
    encoded_path: Option<&'a str>,
    #[serde(rename = "Size")]
    size: u64,
    /// The tar has it too.
    #[serde(rename = "Last-Modified")]
    _last_modified: Option<IgnoredAny>,
    #[serde(rename = "Checksum-Algorithm", borrow)]
    algorithm: Option<&'a str>,
    #[serde(rename = "Checksum", borrow)]
    checksum: Option<&'a str>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RangeEntry<'a> {
    #[serde(rename = "Timeline")]
    timeline: u32,
    #[serde(rename = "Start-LSN", borrow)]
    start: &'a str,
    #[serde(rename = "End-LSN", borrow)]
    end: &'a str,
}

/// A manifest with all its files.
#[derive(Clone, Debug)]
pub struct Manifest {
    pub summary: ManifestSummary,
    /// Sorted: it finds.
    pub files: FileTable,
}

/// Collects a manifest that is fed in pieces of any size.
#[derive(Debug, Default)]
pub struct ManifestCollector {
    reader: ManifestReader,
    files: FileTable,
}

impl ManifestCollector {
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), ManifestError> {
        let files = &mut self.files;
        self.reader.push(bytes, &mut |file| {
            files.push(&file.path, file.size, &file.checksum);
            Ok(())
        })
    }

    /// The manifest, whose own checksum is right and which lists no file twice.
    pub fn finish(mut self) -> Result<Manifest, ManifestError> {
        let summary = self.reader.finish()?;
        self.files.sort()?;
        Ok(Manifest { summary, files: self.files })
    }
}

impl Manifest {
    pub fn parse(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        let mut collector = ManifestCollector::default();
        collector.push(bytes)?;
        collector.finish()
    }
}

#[cfg(test)]
mod tests;
