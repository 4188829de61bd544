//! Owns: what `[clusters.NAME.backup]` may say.
//! Does not own: what a backup does with it (`backup`), connection strings (`postgres`).

use std::path::Path;

use super::ConfigError;
use super::section::Section;
use crate::catalog::manifest::ChecksumAlgorithm;
use crate::postgres::{Conninfo, Environment};
use crate::replication::base_backup::{Checkpoint, CompressionMethod};
use crate::units::{parse_size, show_size};

/// What `MAX_RATE` may be, in KiB a second.
const RATE_KIB: std::ops::RangeInclusive<u64> = 32..=1_048_576;
/// The server keeps a label in a file of its own, one line of at most this.
const LABEL_BYTES_MAX: usize = 1023;

/// How base backups are taken.
#[derive(Clone, Debug)]
pub struct BackupConfig {
    /// Whether the agent takes them by itself.
    pub automatic: bool,
    pub max_rate_kib: Option<u32>,
    pub checkpoint: Checkpoint,
    pub label: Option<String>,
    /// Whose files are copied; `None`: those of the server WAL is streamed from.
    pub from: Option<Conninfo>,
    /// On the server, for the way to here; what is stored is compressed here.
    pub compression: Option<CompressionMethod>,
    pub checksums: ChecksumAlgorithm,
}

impl Default for BackupConfig {
    fn default() -> BackupConfig {
        BackupConfig {
            automatic: true,
            max_rate_kib: None,
            checkpoint: Checkpoint::default(),
            label: None,
            from: None,
            compression: None,
            checksums: ChecksumAlgorithm::default(),
        }
    }
}

pub(super) const COMPRESSIONS: [(&str, Option<CompressionMethod>); 4] = [
    ("none", None),
    ("gzip", Some(CompressionMethod::Gzip)),
    ("lz4", Some(CompressionMethod::Lz4)),
    ("zstd", Some(CompressionMethod::Zstd)),
];
/// `none` is left out: what nothing is summed up with cannot be verified.
pub(super) const CHECKSUMS: [(&str, ChecksumAlgorithm); 5] = [
    ("crc32c", ChecksumAlgorithm::Crc32c),
    ("sha224", ChecksumAlgorithm::Sha224),
    ("sha256", ChecksumAlgorithm::Sha256),
    ("sha384", ChecksumAlgorithm::Sha384),
    ("sha512", ChecksumAlgorithm::Sha512),
];
const CHECKPOINTS: [(&str, Checkpoint); 2] = [("fast", Checkpoint::Fast), ("spread", Checkpoint::Spread)];

pub(super) fn check(
    section: &Section<'_>,
    password_file: Option<&Path>,
    environment: &dyn Environment,
) -> Result<BackupConfig, ConfigError> {
    Ok(BackupConfig {
        automatic: section.flag("backup.automatic")?.unwrap_or(true),
        max_rate_kib: max_rate(section)?,
        checkpoint: one_of(section, "backup.checkpoint", &CHECKPOINTS)?,
        label: label(section)?,
        from: from(section, password_file, environment)?,
        compression: one_of(section, "backup.compression", &COMPRESSIONS)?,
        checksums: one_of(section, "backup.manifest_checksums", &CHECKSUMS)?,
    })
}

fn one_of<T: Copy + Default>(section: &Section<'_>, key: &str, words: &[(&str, T)]) -> Result<T, ConfigError> {
    let Some(text) = section.text(key)? else { return Ok(T::default()) };
    let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
    found.ok_or_else(|| {
        let words: Vec<String> = words.iter().map(|(word, _)| format!("\"{word}\"")).collect();
        section.invalid(key, Some(text), format!("one of {}", words.join(", ")))
    })
}

fn max_rate(section: &Section<'_>) -> Result<Option<u32>, ConfigError> {
    const KEY: &str = "backup.max_rate";
    let Some(text) = section.text(KEY)? else { return Ok(None) };
    let kib = parse_size(text).map(|bytes| bytes >> 10).filter(|kib| RATE_KIB.contains(kib));
    let kib = kib.and_then(|kib| u32::try_from(kib).ok()).ok_or_else(|| {
        let (least, most) = (show_size(RATE_KIB.start() << 10), show_size(RATE_KIB.end() << 10));
        section.invalid(KEY, Some(text), format!("a size, {least} to {most} (each second)"))
    })?;
    Ok(Some(kib))
}

fn label(section: &Section<'_>) -> Result<Option<String>, ConfigError> {
    const KEY: &str = "backup.label";
    let Some(text) = section.text(KEY)? else { return Ok(None) };
    match label_fault(text) {
        None => Ok(Some(text.to_string())),
        Some(expected) => Err(section.invalid(KEY, None, expected)),
    }
}

/// Why a text cannot be a backup's label, as what is expected of one.
pub fn label_fault(text: &str) -> Option<String> {
    let is_plain = !text.is_empty() && text.len() <= LABEL_BYTES_MAX && !text.chars().any(char::is_control);
    (!is_plain).then(|| format!("one line of 1 to {LABEL_BYTES_MAX} bytes"))
}

fn from(
    section: &Section<'_>,
    password_file: Option<&Path>,
    environment: &dyn Environment,
) -> Result<Option<Conninfo>, ConfigError> {
    const KEY: &str = "backup.from";
    let Some(text) = section.text(KEY)? else { return Ok(None) };
    let parsed = Conninfo::parse(text, environment).map_err(|source| ConfigError::Postgres {
        source_place: section.source(KEY),
        key: section.key(KEY),
        source: Box::new(source),
    })?;
    Ok(Some(match password_file {
        Some(path) if !parsed.password_in_string() => parsed.with_password_file(path),
        _ => parsed,
    }))
}
