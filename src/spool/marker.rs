//! Owns: `spool.json`: whose WAL a spool directory holds, and for which repositories.
//! Does not own: where it lies, when it is written. Pure.

use serde::{Deserialize, Serialize};

use crate::repository::layout::Epoch;
use crate::wal::{SegmentSize, SystemId};

/// Enough to bring the WAL into the repository without asking the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Marker {
    /// A higher one than [`Marker::SCHEMA`] is refused.
    pub schema: u32,
    pub cluster: String,
    /// The lineage's directory name, `<system id>` or `<system id>-<n>`: the spool directory's own name.
    pub lineage: String,
    pub system_id: SystemId,
    pub segment_size: SegmentSize,
    /// Of the server: what its pages must look like.
    pub server_major: u32,
    /// The repositories the WAL is on its way to.
    pub repositories: Vec<Destination>,
    /// Whether the server was told that what is here is durable.
    pub acknowledged: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Destination {
    /// `id` of `repository.json`.
    pub id: String,
    /// The epoch under which the WAL was received.
    pub epoch: Epoch,
}

impl Marker {
    pub const SCHEMA: u32 = 1;

    pub fn destination(&self, repository_id: &str) -> Option<&Destination> {
        self.repositories.iter().find(|destination| destination.id == repository_id)
    }
}
