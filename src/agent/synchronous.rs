//! Owns: knowing whether the server's commits wait for this archive, and saying so where nobody asked for it: a
//! `synchronous_standby_names` of `*` takes in everybody who reports what it has flushed.
//! Does not own: what follows for the stream (`receiver`), `status` and `check` (which ask for themselves).

use std::time::Duration;

use tokio::sync::watch;

use super::slot;
use super::world::{ClusterOptions, World};
use crate::error::Failure;
use crate::postgres::sql;
use crate::replication::Address;

/// After this the server has heard of a flushed position and knows what we are to it.
const DELAY: Duration = Duration::from_secs(5);
/// The server's settings change rarely; every look is a short SQL session.
const INTERVAL: Duration = Duration::from_secs(60);

/// What the server's commits are to this archive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Waiting {
    No,
    Potential,
    Yes,
}

impl Waiting {
    /// `sync_state` of `pg_stat_replication`; `None` where no walsender of ours is seen.
    fn of(sync_state: Option<&str>) -> Waiting {
        match sync_state {
            Some("sync" | "quorum") => Waiting::Yes,
            Some("potential") => Waiting::Potential,
            _ => Waiting::No,
        }
    }
}

/// Looks now and then, for as long as the stream lasts. Where no SQL session is to be had, or the role may not see
/// it, nothing is known and nothing said.
///
/// What the operator configured decides how the stream is cut; without that, what the server does.
pub async fn watch(world: World, options: ClusterOptions, address: Address, synchronous: watch::Sender<bool>) {
    let mut said = None;
    tokio::time::sleep(varied(&world, DELAY)).await;
    loop {
        match read_state(&world, &options, &address).await {
            Ok(state) => {
                let waiting = Waiting::of(state.as_deref());
                if said != Some(waiting) && (said.is_some() || is_worth_saying(&options, waiting)) {
                    say(&options, waiting, state.as_deref());
                }
                said = Some(waiting);
                let is_synchronous = options.synchronous.unwrap_or(waiting == Waiting::Yes);
                synchronous.send_if_modified(|known| std::mem::replace(known, is_synchronous) != is_synchronous);
            }
            Err(failure) => {
                tracing::debug!(cluster = options.name, %failure, "cannot see whether commits wait for this archive");
            }
        }
        tokio::time::sleep(varied(&world, INTERVAL)).await;
    }
}

/// Many clusters in one process do not all ask at once.
fn varied(world: &World, duration: Duration) -> Duration {
    duration.mul_f64(0.8 + world.random.lock().expect("no holder panics").f64() * 0.4)
}

/// That nobody waits is news only where it was otherwise before, or should be.
fn is_worth_saying(options: &ClusterOptions, waiting: Waiting) -> bool {
    waiting != Waiting::No || options.synchronous == Some(true)
}

fn say(options: &ClusterOptions, waiting: Waiting, sync_state: Option<&str>) {
    let (cluster, slot) = (&options.name, &options.slot);
    let intended = options.synchronous == Some(true);
    match (waiting, intended) {
        (Waiting::Yes, true) => {
            tracing::info!(cluster, %slot, sync_state, "the server's commits wait for this archive, as configured");
        }
        (Waiting::Yes | Waiting::Potential, _) => {
            let what = match waiting {
                Waiting::Yes => "the server's commits wait for this archive: it is a synchronous standby",
                _ => "the server's commits may come to wait for this archive: it is a potential standby",
            };
            let hint = "if that is not wanted, name the standbys in synchronous_standby_names instead of `*`; if it \
                        is, set synchronous = true";
            tracing::warn!(cluster, %slot, sync_state, hint, "{what}");
        }
        (Waiting::No, true) => {
            let hint = "add its application_name to synchronous_standby_names on the server";
            tracing::warn!(cluster, %slot, sync_state, hint, "synchronous = true, but the server's commits do not wait for this archive");
        }
        (Waiting::No, false) => {
            tracing::info!(cluster, %slot, sync_state, "the server's commits no longer wait for this archive");
        }
    }
}

async fn read_state(world: &World, options: &ClusterOptions, address: &Address) -> Result<Option<String>, Failure> {
    let login = slot::sql_login(world, address)?;
    sql::read_sync_state(world.dialer.as_ref(), &login, &options.slot).await
}
