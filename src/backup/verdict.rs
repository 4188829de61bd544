//! Owns: whether what came is what the server says it sent: every file against the manifest, and the manifest, the
//! `backup_label` and `global/pg_control` against the rows of BASE_BACKUP.
//! Does not own: reading any of them. Pure. proto-notes/04-base-backup.md, "what must agree".

use crate::catalog::manifest::{
    ChecksumAlgorithm, FileTable, ManifestError, ManifestFile, ManifestReader, ManifestSummary,
};
use crate::codec::tar::shown;
use crate::wal::{Lsn, SystemId, TimelineId};

use super::BackupError;
use super::intake::KeptFiles;

/// Compares the manifest, as it arrives, with the files that came before it.
#[derive(Debug)]
pub struct ManifestCheck {
    reader: ManifestReader,
    pairing: Pairing,
}

/// Which files that came the manifest has listed. Both are in the order the server sent them, so the next one is almost
/// always the right one.
#[derive(Debug)]
struct Pairing {
    files: FileTable,
    algorithm: ChecksumAlgorithm,
    is_listed: Vec<bool>,
    next: usize,
    is_sorted: bool,
}

impl ManifestCheck {
    pub fn new(files: FileTable, algorithm: ChecksumAlgorithm) -> ManifestCheck {
        let is_listed = vec![false; files.len()];
        let pairing = Pairing { files, algorithm, is_listed, next: 0, is_sorted: false };
        ManifestCheck { reader: ManifestReader::new(), pairing }
    }

    pub fn push(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        let pairing = &mut self.pairing;
        self.reader.push(bytes, &mut |file| pairing.compare(&file))
    }

    /// The manifest is complete, as its own checksum shows, and lists exactly what came.
    pub fn finish(self) -> Result<ManifestSummary, BackupError> {
        let summary = self.reader.finish()?;
        let Pairing { files, is_listed, .. } = &self.pairing;
        if let Some(index) = is_listed.iter().position(|listed| !listed) {
            let path = shown(files.path(index));
            return Err(BackupError::Mismatch(format!("file \"{path}\" came, and the manifest does not list it")));
        }
        Ok(summary)
    }
}

impl Pairing {
    fn compare(&mut self, listed: &ManifestFile<'_>) -> Result<(), BackupError> {
        let mismatch = |what: String| BackupError::Mismatch(format!("file \"{}\" {what}", shown(&listed.path)));
        let index = self.find(&listed.path)?.ok_or_else(|| mismatch("is in the manifest, and did not come".into()))?;
        self.next = index + 1;
        if std::mem::replace(&mut self.is_listed[index], true) {
            return Err(ManifestError::Duplicate { path: shown(&listed.path) }.into());
        }
        let came = self.files.file(index);
        if came.size != listed.size {
            return Err(mismatch(format!("came with {} bytes, the manifest says {}", came.size, listed.size)));
        }
        if listed.checksum.algorithm() != self.algorithm {
            let found = listed.checksum.algorithm();
            return Err(mismatch(format!("has a {found} checksum in the manifest, {} was asked for", self.algorithm)));
        }
        if came.checksum != listed.checksum {
            let (found, said) = (came.checksum, listed.checksum);
            return Err(mismatch(format!("came with checksum {found:?}, the manifest says {said}")));
        }
        Ok(())
    }

    fn find(&mut self, path: &[u8]) -> Result<Option<usize>, BackupError> {
        if self.next < self.files.len() && self.files.path(self.next) == path {
            return Ok(Some(self.next));
        }
        if !self.is_sorted {
            self.files.sort().map_err(|error| BackupError::Mismatch(format!("among the files that came: {error}")))?;
            self.is_sorted = true;
        }
        Ok(self.files.find(path))
    }
}

/// What BASE_BACKUP's own rows say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bounds {
    pub system_id: SystemId,
    pub timeline: TimelineId,
    pub start: Lsn,
    pub stop: Lsn,
}

/// Checks everything against everything; tells whether a standby was the source.
pub fn agree(bounds: &Bounds, label: &str, kept: &KeptFiles, manifest: &ManifestSummary) -> Result<bool, BackupError> {
    let mismatch = |what: String| Err(BackupError::Mismatch(what));
    let Bounds { system_id, timeline, start, stop } = *bounds;
    if start > stop {
        return mismatch(format!("it starts at {start} and stops at {stop}, before that"));
    }
    match manifest.wal_ranges[..] {
        [range] if (range.timeline, range.start, range.end) == (timeline, start, stop) => {}
        [range] => {
            let (other, from, to) = (range.timeline, range.start, range.end);
            return mismatch(format!(
                "its manifest needs WAL {from} to {to} of timeline {other}, the server said {start} to {stop} of {timeline}"
            ));
        }
        _ => return mismatch(format!("its manifest needs WAL of {} timelines", manifest.wal_ranges.len())),
    }
    if let Some(other) = manifest.system_id.filter(|&other| other != system_id) {
        return mismatch(format!("its manifest is of system {other}, the server said {system_id}"));
    }
    match kept.pg_control.as_deref().and_then(|control| control.first_chunk::<8>()) {
        None => return mismatch("it holds no global/pg_control".into()),
        // In the server's byte order: one of the two is right.
        Some(&id) if u64::from_le_bytes(id) != system_id.0 && u64::from_be_bytes(id) != system_id.0 => {
            return mismatch("its global/pg_control is of another system than the server said".into());
        }
        Some(_) => {}
    }
    let Some(text) = &kept.backup_label else { return mismatch("it holds no backup_label".into()) };
    let found = BackupLabel::parse(text)?;
    if (found.start, found.timeline) != (start, timeline) {
        let (at, line) = (found.start, found.timeline);
        return mismatch(format!(
            "its backup_label says {at} on timeline {line}, the server said {start} on {timeline}"
        ));
    }
    if found.label != label {
        return mismatch(format!("its backup_label is labelled {:?}, not {label:?}", shown(found.label.as_bytes())));
    }
    Ok(found.from_standby)
}

/// What `backup_label` says (proto-notes/04-base-backup.md, "backup_label").
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupLabel {
    pub start: Lsn,
    pub checkpoint: Lsn,
    pub timeline: TimelineId,
    pub from_standby: bool,
    pub label: String,
}

impl BackupLabel {
    fn parse(text: &[u8]) -> Result<BackupLabel, BackupError> {
        let fault = |what: &str| BackupError::Mismatch(format!("its backup_label {what}"));
        let text = std::str::from_utf8(text).map_err(|_| fault("is not UTF-8"))?;
        let value = |key: &str| text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
        let lsn = |key: &str| value(key)?.split_whitespace().next()?.parse::<Lsn>().ok();
        if text.lines().any(|line| line.starts_with("INCREMENTAL FROM")) {
            return Err(fault("is of an incremental backup"));
        }
        if value("BACKUP METHOD") != Some("streamed") {
            return Err(fault("does not say that it was streamed"));
        }
        let from_standby = match value("BACKUP FROM") {
            Some("standby") => true,
            // Version 13 says master.
            Some("primary" | "master") => false,
            _ => return Err(fault("does not say what it was taken from")),
        };
        let timeline = value("START TIMELINE").and_then(|text| text.parse().ok());
        Ok(BackupLabel {
            start: lsn("START WAL LOCATION").ok_or_else(|| fault("has no START WAL LOCATION"))?,
            checkpoint: lsn("CHECKPOINT LOCATION").ok_or_else(|| fault("has no CHECKPOINT LOCATION"))?,
            timeline: TimelineId(timeline.ok_or_else(|| fault("has no START TIMELINE"))?),
            from_standby,
            label: value("LABEL").ok_or_else(|| fault("has no LABEL"))?.to_string(),
        })
    }
}
