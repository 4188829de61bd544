//! Owns: the text of BASE_BACKUP in both syntaxes, and what its answer says, in both framings, as it arrives.
//! Does not own: sending and receiving (`connection`), what a tar holds (`codec::tar`), what is done with it (`backup`).
//! Pure. proto-notes/04-base-backup.md.

use std::fmt;

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
