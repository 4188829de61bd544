//! Owns: how a server's stop is recognised while nothing is read from its stream: an idle connection, held only then,
//! that the server ends, and a new one that it refuses.
//! Does not own: a stop that shows in the stream (`receiver/heartbeat.rs`), what follows from it (`receiver`).
//!
//! A stopping server waits until its walsender has sent everything. While the receiver does not read that is never,
//! and the statuses that keep the stream alive keep the server waiting.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::receiver::Activity;
use crate::replication::{Connection, Dial, Login};

/// Between two looks at the idle connection: what recognising a stop adds to it.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
const ADMINISTRATOR_SHUTDOWN: &str = "57P01";
const CANNOT_CONNECT_NOW: &str = "57P03";

/// Cancels `stopping` when the server stops while the receiver does not read. Ends with it, or never.
pub async fn watch(
    dialer: Arc<dyn Dial>,
    login: Login,
    activity: watch::Sender<Activity>,
    stopping: CancellationToken,
) {
    let mut paused = activity.subscribe();
    let mut resumed = activity.subscribe();
    loop {
        let is_paused = |activity: &Activity| *activity == Activity::Paused;
        paused.wait_for(is_paused).await.expect("this task holds a sender");
        tokio::select! {
            biased;
            _ = resumed.wait_for(|activity| !is_paused(activity)) => {}
            () = server_stops(dialer.as_ref(), &login) => {
                tracing::info!("the server is stopping while nothing is read from it: the slot holds the rest");
                return stopping.cancel();
            }
        }
    }
}

/// Returns once the server has ended an idle replication connection and refuses a new one. A refusal alone can be a
/// smart stop, whose sessions still write; an ended connection alone an administrator.
async fn server_stops(dialer: &dyn Dial, login: &Login) {
    loop {
        if let Ok(mut idle) = Connection::open(dialer, login).await {
            let ended = loop {
                tokio::time::sleep(LOOK_INTERVAL).await;
                if let Err(error) = idle.identify_system().await {
                    break error;
                }
            };
            // The words of an ended connection may be lost with it.
            let by_server = ended.sqlstate().is_none_or(|code| code == ADMINISTRATOR_SHUTDOWN);
            if by_server && refuses(dialer, login).await {
                return;
            }
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn refuses(dialer: &dyn Dial, login: &Login) -> bool {
    match Connection::open(dialer, login).await {
        Ok(connection) => {
            connection.close().await;
            false
        }
        Err(error) => error.sqlstate() == Some(CANNOT_CONNECT_NOW),
    }
}
