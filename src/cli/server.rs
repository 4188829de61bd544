//! Owns: what a server says through SQL, asked in one short session, for `status` and `check`.
//! Does not own: what follows from it (the verbs), questions of the agent (`postgres/sql.rs`).

use std::collections::BTreeMap;

use jiff::Timestamp;

use crate::agent::world::World;
use crate::error::Failure;
use crate::postgres::sql::{self, SlotRow};
use crate::postgres::{Purpose, connect};
use crate::replication::{Login, QueryResult, SlotName};
use crate::wal::{Lsn, SystemId, TimelineId};

/// A walsender that uses our slot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WalSender {
    pub state: Option<String>,
    pub write_lsn: Option<Lsn>,
    pub flush_lsn: Option<Lsn>,
    pub sync_state: Option<String>,
}

/// A server at one moment. What a role may not see is `None`.
#[derive(Clone, Debug)]
pub struct ServerFacts {
    pub login: Login,
    pub version: String,
    pub system_id: Option<SystemId>,
    pub timeline: Option<TimelineId>,
    /// What is on its disk.
    pub flush_lsn: Option<Lsn>,
    pub now: Option<Timestamp>,
    pub settings: BTreeMap<String, String>,
    pub slot: Option<SlotRow>,
    pub wal_sender: Option<WalSender>,
    pub wal_senders_used: Option<u64>,
    pub slots_used: Option<u64>,
    pub may_replicate: Option<bool>,
    /// Of `pg_read_all_stats`, which `pg_monitor` gives: without it the walsender's positions are not shown.
    pub monitors: Option<bool>,
}

/// Asks the server the connection string leads to.
pub async fn ask(world: &World, slot: &SlotName) -> Result<ServerFacts, Failure> {
    let logins = world.logins.logins(Purpose::Sql)?;
    let connected = connect::connect_or_explain(world.dialer.as_ref(), &logins, world.logins.wanted()).await?;
    let connect::Connected { mut connection, login, .. } = connected;
    let major = connection.server_major();
    let version = connection.parameter("server_version").unwrap_or("unknown").to_string();
    let facts = connection.query(FACTS).await?;
    let settings = connection.query(SETTINGS).await?;
    let sender = connection.query(&wal_sender(slot)).await?;
    connection.close().await;
    let slot = sql::read_slot(world.dialer.as_ref(), &login, slot, major).await?;
    let fact = |column: usize| facts.text(0, column);
    let flag = |column: usize| fact(column).map(|text| text == "t");
    Ok(ServerFacts {
        version,
        login,
        system_id: fact(0).and_then(|text| text.parse().ok()),
        timeline: fact(1).and_then(|text| u32::from_str_radix(text, 16).ok()).map(TimelineId),
        flush_lsn: fact(2).and_then(|text| text.parse().ok()),
        now: fact(3).and_then(|text| text.parse().ok()).and_then(|micros| Timestamp::from_microsecond(micros).ok()),
        wal_senders_used: fact(4).and_then(|text| text.parse().ok()),
        slots_used: fact(5).and_then(|text| text.parse().ok()),
        may_replicate: flag(6),
        monitors: flag(7),
        settings: rows(&settings),
        slot,
        wal_sender: (!sender.rows.is_empty()).then(|| WalSender {
            state: sender.text(0, 0).map(str::to_string),
            write_lsn: sender.text(0, 1).and_then(|text| text.parse().ok()),
            flush_lsn: sender.text(0, 2).and_then(|text| text.parse().ok()),
            sync_state: sender.text(0, 3).map(str::to_string),
        }),
    })
}

impl ServerFacts {
    pub fn setting(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str)
    }
}

/// A standby's timeline is not asked for: it changes under it.
const FACTS: &str = "\
    SELECT (SELECT system_identifier FROM pg_catalog.pg_control_system()), \
           CASE WHEN NOT r THEN substr(pg_catalog.pg_walfile_name(pg_catalog.pg_current_wal_flush_lsn()), 1, 8) END, \
           CASE WHEN r THEN pg_catalog.pg_last_wal_receive_lsn() ELSE pg_catalog.pg_current_wal_flush_lsn() END, \
           (extract(epoch FROM pg_catalog.clock_timestamp()) * 1000000)::bigint, \
           (SELECT count(*) FROM pg_catalog.pg_stat_replication), \
           (SELECT count(*) FROM pg_catalog.pg_replication_slots), \
           (SELECT rolreplication OR rolsuper FROM pg_catalog.pg_roles WHERE rolname = current_user), \
           pg_catalog.pg_has_role('pg_read_all_stats', 'USAGE') \
    FROM (SELECT pg_catalog.pg_is_in_recovery() AS r) AS recovery";

const SETTINGS: &str = "\
    SELECT name, CASE WHEN unit IS NULL THEN setting ELSE pg_catalog.current_setting(name) END \
    FROM pg_catalog.pg_settings WHERE name IN ('wal_level', 'max_wal_senders', 'max_replication_slots', \
    'max_slot_wal_keep_size', 'wal_sender_timeout', 'full_page_writes', 'synchronous_standby_names', \
    'idle_replication_slot_timeout', 'wal_segment_size', 'archive_mode', 'fsync', 'data_checksums')";

fn wal_sender(slot: &SlotName) -> String {
    // The name is `[a-z0-9_]` only: nothing in it needs quoting.
    format!(
        "SELECT s.state, s.write_lsn, s.flush_lsn, s.sync_state FROM pg_catalog.pg_stat_replication s \
         JOIN pg_catalog.pg_replication_slots r ON r.active_pid = s.pid WHERE r.slot_name = '{slot}'"
    )
}

fn rows(result: &QueryResult) -> BTreeMap<String, String> {
    let pair = |row: usize| Some((result.text(row, 0)?.to_string(), result.text(row, 1)?.to_string()));
    (0..result.rows.len()).filter_map(pair).collect()
}
