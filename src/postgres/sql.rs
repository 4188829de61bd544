//! Owns: the questions asked in SQL, each in a session of its own that ends with its answer: an open one would
//! block a smart shutdown.
//! Does not own: what follows from the answers (`agent/slot.rs`, `agent/synchronous.rs`, `cli/check.rs`).

use crate::error::Failure;
use crate::replication::{Connection, Dial, Login, QueryResult, SlotName};
use crate::wal::Lsn;

/// A row of `pg_replication_slots`, as far as it matters for a physical slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SlotRow {
    pub slot_type: String,
    pub active: bool,
    pub restart_lsn: Option<Lsn>,
    /// `reserved`, `extended`, `unreserved`, `lost`; NULL when no WAL was ever reserved.
    pub wal_status: Option<String>,
    /// Bytes that can be written before the slot is in danger; NULL without a limit.
    pub safe_wal_bytes: Option<i64>,
    /// 17 and later.
    pub invalidation_reason: Option<String>,
}

impl SlotRow {
    /// The server has given up the WAL this slot held, whatever it still says about its position.
    pub fn is_lost(&self) -> bool {
        self.wal_status.as_deref() == Some("lost") || self.invalidation_reason.is_some()
    }
}

/// Runs one query in a session of its own.
pub async fn ask(dialer: &dyn Dial, login: &Login, query: &str) -> Result<QueryResult, Failure> {
    let mut connection = Connection::open(dialer, login).await?;
    let answer = connection.query(query).await;
    connection.close().await;
    Ok(answer?)
}

/// Looks the slot up; `None` when there is none of this name.
pub async fn read_slot(
    dialer: &dyn Dial,
    login: &Login,
    slot: &SlotName,
    server_major: u32,
) -> Result<Option<SlotRow>, Failure> {
    let reason = if server_major >= 17 { "invalidation_reason" } else { "NULL" };
    // The name is `[a-z0-9_]` only: nothing in it needs quoting.
    let query = format!(
        "SELECT slot_type, active, restart_lsn, wal_status, safe_wal_size, {reason} \
         FROM pg_catalog.pg_replication_slots WHERE slot_name = '{slot}'"
    );
    let answer = ask(dialer, login, &query).await?;
    let text = |column: usize| answer.text(0, column).map(str::to_string);
    Ok(text(0).map(|slot_type| SlotRow {
        slot_type,
        active: text(1).as_deref() == Some("t"),
        restart_lsn: text(2).and_then(|lsn| lsn.parse().ok()),
        wal_status: text(3),
        safe_wal_bytes: text(4).and_then(|bytes| bytes.parse().ok()),
        invalidation_reason: text(5),
    }))
}

/// What the walsender on `slot` is to the server's commits: `async`, `potential`, `sync`, `quorum`; `None` where there
/// is none, or the role may not see it.
pub async fn read_sync_state(dialer: &dyn Dial, login: &Login, slot: &SlotName) -> Result<Option<String>, Failure> {
    // The name is `[a-z0-9_]` only: nothing in it needs quoting.
    let query = format!(
        "SELECT s.sync_state FROM pg_catalog.pg_stat_replication s \
         JOIN pg_catalog.pg_replication_slots r ON r.active_pid = s.pid WHERE r.slot_name = '{slot}'"
    );
    Ok(ask(dialer, login, &query).await?.text(0, 0).map(str::to_string))
}
