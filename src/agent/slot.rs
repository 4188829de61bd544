//! Owns: the replication slot: is it there, is it lost, create it with reserved WAL.
//! Does not own: what a lost slot means for the archive (`cluster.rs` compares positions).
//! Rests on proto-notes/02-commands.md, "slots": a lost slot behaves differently in every version.

use super::startup::{Server, SlotPresence};
use super::world::World;
use crate::error::{ExitCode, Failure};
use crate::postgres::Purpose;
use crate::postgres::sql::{self, SlotRow};
use crate::replication::{Address, Connection, Login, SlotName, SlotReading};
use crate::wal::Lsn;

/// A slot as it was found.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    Absent,
    Usable {
        restart_lsn: Lsn,
    },
    /// Its WAL is given up, or none was ever reserved. Drop it and create it anew: on 16 and 17 a lost slot
    /// goes on moving without holding WAL, before 16 it comes back to life, from 18 on it is refused.
    Lost {
        why: String,
    },
    /// 13 and 14 without SQL: START_REPLICATION will tell.
    Unknown,
}

impl Found {
    pub fn presence(&self) -> SlotPresence {
        match self {
            Found::Absent => SlotPresence::Absent,
            Found::Usable { .. } | Found::Lost { .. } => SlotPresence::Present,
            Found::Unknown => SlotPresence::Unknown,
        }
    }
}

/// Looks at the slot: through SQL where a session is to be had, else as the walsender tells.
pub async fn find(
    world: &World,
    connection: &mut Connection,
    login: &Login,
    slot: &SlotName,
    server: &Server,
) -> Result<Found, Failure> {
    match row_of(world, login, slot, server.major).await {
        Ok(row) => return judge(slot, row),
        Err(failure) => tracing::debug!(%failure, "no SQL session: the slot's state comes from the walsender alone"),
    }
    Ok(match connection.read_slot(slot).await? {
        SlotReading::Missing => Found::Absent,
        SlotReading::Reserved { restart_lsn, .. } => Found::Usable { restart_lsn },
        SlotReading::NotReserved => Found::Lost { why: "it holds no WAL".into() },
        SlotReading::Unsupported => Found::Unknown,
    })
}

/// The slot's row, from an SQL session on the server the walsender runs on.
pub async fn row_of(world: &World, login: &Login, slot: &SlotName, major: u32) -> Result<Option<SlotRow>, Failure> {
    let login = sql_login(world, &login.address)?;
    sql::read_slot(world.dialer.as_ref(), &login, slot, major).await
}

/// For a session on the server a walsender runs on.
pub fn sql_login(world: &World, address: &Address) -> Result<Login, Failure> {
    let logins = world.logins.logins(Purpose::Sql)?;
    let same_server = logins.into_iter().find(|other| other.address == *address);
    same_server.ok_or_else(|| Failure::new(ExitCode::Internal, "no SQL login for this host"))
}

fn judge(slot: &SlotName, row: Option<SlotRow>) -> Result<Found, Failure> {
    let Some(row) = row else { return Ok(Found::Absent) };
    if row.slot_type != "physical" {
        let message = format!("slot {slot} is a {} slot; streaming WAL needs a physical one", row.slot_type);
        return Err(Failure::new(ExitCode::Config, message).hint("choose another name for `slot`"));
    }
    Ok(match row.restart_lsn {
        _ if row.is_lost() => {
            let reason = row.invalidation_reason.as_deref().unwrap_or("wal_removed");
            Found::Lost { why: format!("the server has invalidated it ({reason})") }
        }
        Some(restart_lsn) => Found::Usable { restart_lsn },
        None => Found::Lost { why: "it holds no WAL".into() },
    })
}

/// Creates the slot with its WAL reserved at once. True when it was there already (13 and 14 without SQL).
pub async fn create(connection: &mut Connection, slot: &SlotName) -> Result<bool, Failure> {
    match connection.create_physical_slot(slot).await {
        Ok(()) => Ok(false),
        Err(error) if error.sqlstate() == Some("42710") => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Replaces a lost slot. While somebody uses it, it cannot be dropped: `TryAgain`.
pub async fn replace(connection: &mut Connection, slot: &SlotName, why: &str) -> Result<(), Failure> {
    tracing::warn!(%slot, why, "the slot is lost: it is dropped and created anew");
    match connection.drop_slot(slot).await {
        Ok(()) => {}
        Err(error) if error.sqlstate() == Some("42704") => {}
        Err(error) => return Err(error.into()),
    }
    create(connection, slot).await.map(drop)
}

/// Where the slot holds WAL from, after it was created.
pub async fn restart_lsn(
    world: &World,
    connection: &mut Connection,
    login: &Login,
    slot: &SlotName,
    server: &Server,
) -> Result<Option<Lsn>, Failure> {
    match find(world, connection, login, slot, server).await? {
        Found::Usable { restart_lsn } => Ok(Some(restart_lsn)),
        Found::Absent | Found::Lost { .. } | Found::Unknown => Ok(None),
    }
}
