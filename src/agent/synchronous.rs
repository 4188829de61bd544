//! Owns: noticing, once in every stream, that the server's commits wait for this archive: a
//! `synchronous_standby_names` of `*` takes in everybody who reports what it has flushed.
//! Does not own: what the operator makes of it, `status` and `check` (which ask for themselves).

use std::time::Duration;

use super::slot;
use super::world::{ClusterOptions, World};
use crate::error::Failure;
use crate::postgres::sql;
use crate::replication::Address;

/// After this the server has heard of a flushed position and knows what we are to it.
const DELAY: Duration = Duration::from_secs(5);

/// Looks and warns. Where no SQL session is to be had, or the role may not see it, nothing is said.
pub async fn warn(world: World, options: ClusterOptions, address: Address) {
    tokio::time::sleep(DELAY).await;
    let cluster = &options.name;
    let state = match read_state(&world, &options, &address).await {
        Ok(state) => state,
        Err(failure) => return tracing::debug!(cluster, %failure, "cannot see whether commits wait for this archive"),
    };
    let what = match state.as_deref() {
        Some("sync" | "quorum") => "the server's commits wait for this archive: it is a synchronous standby",
        Some("potential") => "the server's commits may come to wait for this archive: it is a potential standby",
        _ => return,
    };
    let hint = "if that is not wanted, name the standbys in synchronous_standby_names instead of `*`";
    tracing::warn!(cluster, slot = %options.slot, sync_state = state, hint, "{what}");
}

async fn read_state(world: &World, options: &ClusterOptions, address: &Address) -> Result<Option<String>, Failure> {
    let login = slot::sql_login(world, address)?;
    sql::read_sync_state(world.dialer.as_ref(), &login, &options.slot).await
}
