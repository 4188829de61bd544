//! Owns: `repository.json`, `lineage.json` and `writers/<epoch>.json`.
//! Does not own: their names (`repository::layout`), who may create them (`archiver`, `cli`).

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::repository::layout::Epoch;
use crate::wal::{Lsn, SegmentSize, SystemId, TimelineId};

/// `repository.json`: its `format` is read before anything else.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryFile {
    pub schema: u32,
    /// A higher one than [`crate::repository::layout::FORMAT_VERSION`] is refused.
    pub format: u32,
    pub created: Timestamp,
    /// Random, hexadecimal: tells two repositories with equal content apart.
    pub id: String,
}

/// `lineage.json`: one cluster from one `initdb` (or `init --new-lineage`) on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LineageFile {
    pub schema: u32,
    pub system_id: SystemId,
    /// As the server prints it: "18.1".
    pub server_version: String,
    pub segment_size: SegmentSize,
    pub created: Timestamp,
    pub start_timeline: TimelineId,
    /// Where the archive starts; `None` while nothing has been received.
    pub start_lsn: Option<Lsn>,
    #[serde(default)]
    pub slot: Option<String>,
}

/// `writers/<epoch>.json`: who took the epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WriterFile {
    pub schema: u32,
    pub epoch: Epoch,
    pub slot: String,
    pub created: Timestamp,
    pub host: Option<String>,
    /// Of seawall.
    pub version: String,
}
