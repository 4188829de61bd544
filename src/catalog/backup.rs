//! Owns: what the JSON objects of a backup, a pin and a lease say, and what a backup is from what is there of it.
//! Does not own: their names (`repository::layout`), reading and creating them (`store/backups.rs`).
//! Pure.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::index::Crc32;
use crate::codec::Form;
use crate::repository::layout::{BackupId, BackupType, LeaseNumber, TarStream, VolumeName};
use crate::wal::{Lsn, SegmentSize, SystemId, TimelineId};

/// `begin.json`: the first object, before the server is asked for anything. While there is no `backup.json`, nothing of
/// the backup counts, and WAL from `slot_restart_lsn` on must stay.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BeginFile {
    pub schema: u32,
    pub id: BackupId,
    #[serde(rename = "type")]
    pub backup_type: BackupType,
    /// What it builds on; `None` for a full one.
    pub parent: Option<BackupId>,
    pub label: Option<String>,
    pub started: Timestamp,
    /// The slot's restart LSN when it began: the backup's start LSN lies at or after it.
    pub slot_restart_lsn: Lsn,
    pub timeline: TimelineId,
    /// Under which lease.
    pub lease: Option<LeaseNumber>,
    /// Who takes it.
    pub host: Option<String>,
    /// Of seawall.
    pub version: String,
}

/// `backup.json`: the last object. With it, and without `dead.json`, the backup exists.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BackupFile {
    pub schema: u32,
    pub id: BackupId,
    #[serde(rename = "type")]
    pub backup_type: BackupType,
    pub parent: Option<BackupId>,
    /// Why it is a full one where another type was asked for.
    #[serde(default)]
    pub fallback: Option<String>,
    pub label: Option<String>,
    pub started: Timestamp,
    pub finished: Timestamp,
    pub system_id: SystemId,
    /// As the server prints it: "18.1".
    pub server_version: String,
    pub segment_size: SegmentSize,
    /// Both start and stop lie on it.
    pub timeline: TimelineId,
    /// Where replay begins: the checkpoint's redo.
    pub start_lsn: Lsn,
    /// Replayed this far, the copy is consistent.
    pub stop_lsn: Lsn,
    /// The last commit known at or before `stop_lsn`: no instant before it can be restored from this backup.
    #[serde(default)]
    pub stop_time: Option<Timestamp>,
    /// Taken from a standby.
    #[serde(default)]
    pub from_standby: bool,
    /// Whether the server keeps data checksums (and so verified every page it sent); `None`: not known.
    pub data_checksums: Option<bool>,
    /// Of all tar streams, uncompressed.
    pub raw_bytes: u64,
    /// Of all objects of the backup.
    pub stored_bytes: u64,
    pub manifest: ManifestEntry,
    pub tablespaces: Vec<TablespaceEntry>,
    /// In the order of the stream: tablespaces first, PGDATA last, `global/pg_control` last of all.
    pub volumes: Vec<VolumeEntry>,
    /// Configuration that lives outside PGDATA.
    #[serde(default)]
    pub config: Vec<ConfigEntry>,
    /// Of seawall.
    pub version: String,
}

/// `backup_manifest`, stored as the server sent it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ManifestEntry {
    pub bytes: u64,
    pub crc32: Crc32,
    /// Files it lists.
    pub files: u64,
    /// Of the files: NONE, CRC32C, SHA224, ...
    pub checksums: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TablespaceEntry {
    pub oid: u32,
    /// Where it was on the server.
    pub location: String,
}

/// One tar of whole files.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeEntry {
    /// The OID of a tablespace; `None`: PGDATA.
    pub tablespace: Option<u32>,
    /// From 1 within its stream.
    pub number: u32,
    pub form: Form,
    /// Of the tar, with its trailer.
    pub raw_bytes: u64,
    pub raw_crc32: Crc32,
    pub stored_bytes: u64,
    pub stored_crc32: Crc32,
    /// How many files the manifest lists are in it. The manifest lists files in the order of the streams, so these
    /// counts say which are where; a hint only, every file is checked against the manifest by its name.
    pub manifest_files: u64,
}

impl VolumeEntry {
    pub fn name(&self) -> VolumeName {
        let stream = self.tablespace.map_or(TarStream::Base, TarStream::Tablespace);
        VolumeName { stream, number: self.number }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigEntry {
    /// Below `config/`, without the form's suffix.
    pub name: String,
    /// Where it was on the server, absolute.
    pub path: String,
    pub form: Form,
    pub raw_bytes: u64,
    pub raw_crc32: Crc32,
    pub stored_bytes: u64,
    pub stored_crc32: Crc32,
}

/// `dead.json`: an abandoned backup that is being deleted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeadFile {
    pub schema: u32,
    pub id: BackupId,
    pub at: Timestamp,
    pub reason: String,
}

/// `pins/<id>-<n>.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PinFile {
    pub schema: u32,
    pub kind: PinKind,
    /// What stays, with all it builds on.
    pub backup: BackupId,
    /// For a restore: WAL from here on, along the path of `timeline`; `None` for an operator's pin: the WAL that makes
    /// the backup consistent.
    pub from_lsn: Option<Lsn>,
    /// Up to here; `None`: whatever comes.
    pub to_lsn: Option<Lsn>,
    pub timeline: TimelineId,
    pub created: Timestamp,
    /// A restore's pin lapses then if it is not renewed; `None`: never.
    pub expires: Option<Timestamp>,
    /// The pin is lifted: everything before this number too.
    pub released: bool,
    pub host: Option<String>,
}

impl PinFile {
    pub fn is_in_force(&self, now: Timestamp) -> bool {
        !self.released && self.expires.is_none_or(|expires| now < expires)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PinKind {
    Restore,
    Operator,
}

/// `lease/<n>.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseFile {
    pub schema: u32,
    pub number: LeaseNumber,
    /// Random, one per holder's run, hexadecimal.
    pub holder: String,
    pub host: Option<String>,
    /// Says what it is for, to people.
    pub purpose: String,
    pub at: Timestamp,
    /// Not renewed for this long, it is nobody's.
    pub seconds: u32,
    /// Given back.
    pub released: bool,
    pub version: String,
}

/// A backup from what is there of it in one repository.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupRecord {
    pub id: BackupId,
    pub begin: Option<BeginFile>,
    pub backup: Option<BackupFile>,
    pub is_dead: bool,
    /// What of it is damaged here and not mended.
    pub damaged: Option<String>,
}

impl BackupRecord {
    /// The backup, if it can be relied on.
    pub fn complete(&self) -> Option<&BackupFile> {
        self.backup.as_ref().filter(|_| !self.is_dead && self.damaged.is_none())
    }
}
