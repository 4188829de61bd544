//! Owns: noticing that the server stops while its stream is not read, or stands still: an idle replication session,
//! held only then, that ends with 57P01 while a new one is refused with 57P03.
//! Does not own: a stop seen in the stream itself (`receiver/heartbeat.rs`), what follows from a stop (`receiver`).
//! Rests on proto-notes/03-streaming.md, "a stopping server".
//!
//! A fast stop refuses new sessions first, ends the ordinary ones, and only when all are gone the idle walsenders:
//! `tests/it/store_faults.rs` pins that on every major. A smart stop ends ours no sooner, so that 57P03 alone, which
//! every smart stop with sessions still writing answers, says nothing yet.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::session::Watched;
use super::world::World;
use crate::postgres::Purpose;
use crate::receiver::Activity;
use crate::replication::{Address, ConnectError, Connection};
use crate::wal::Lsn;

/// How often it is looked whether a session has to be held.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// "Terminating connection due to administrator command".
const ADMIN_SHUTDOWN: &str = "57P01";
/// The server is starting, recovering or stopping.
const CANNOT_CONNECT_NOW: &str = "57P03";

/// Watches one stream; ends when the server is stopping, and is dropped with the stream.
#[derive(Debug)]
pub struct Sentinel {
    world: World,
    /// The server the stream comes from.
    address: Address,
    watched: Watched,
    standing: Standing,
    started: Instant,
    /// Cancelled when the server is found to be stopping.
    stopping: CancellationToken,
}

impl Sentinel {
    /// `patience`: how long what is proven may stay unacknowledged before that is more than a tail on its way.
    pub fn new(
        world: World,
        address: Address,
        watched: Watched,
        patience: Duration,
        stopping: CancellationToken,
    ) -> Sentinel {
        let standing = Standing { patience, position: Lsn::ZERO, since: Duration::ZERO };
        Sentinel { world, address, watched, standing, started: Instant::now(), stopping }
    }

    pub async fn run(mut self) {
        loop {
            while !self.is_needed() {
                self.next_look().await;
            }
            if self.hold_session().await {
                tracing::warn!("the server is stopping while its stream stands still: it is let go within the grace");
                return self.stopping.cancel();
            }
            self.next_look().await;
        }
    }

    fn is_needed(&mut self) -> bool {
        let (acknowledged, proven) = {
            let progress = self.watched.progress.borrow();
            (progress.acknowledged(), progress.proven())
        };
        let is_still = self.standing.handle_look(self.started.elapsed(), acknowledged, proven);
        let is_paused = *self.watched.activity.borrow() == Activity::Paused;
        is_still || is_paused || self.watched.failure().is_some()
    }

    async fn next_look(&self) {
        let mut activity = self.watched.activity.subscribe();
        // A pause is looked at when it begins.
        let _ = tokio::time::timeout(LOOK_INTERVAL, activity.changed()).await;
    }

    /// Holds an idle session as long as it is needed. True when it ended because the server is stopping.
    async fn hold_session(&mut self) -> bool {
        let mut session = match self.open().await {
            Ok(session) => session,
            Err(error) => {
                tracing::debug!(%error, "no session to notice a stop of the server by");
                return false;
            }
        };
        let end = loop {
            tokio::select! {
                biased;
                end = session.wait_for_end() => break end,
                () = self.next_look() => {}
            }
            if !self.is_needed() {
                session.close().await;
                return false;
            }
        };
        if end.sqlstate() != Some(ADMIN_SHUTDOWN) {
            return false;
        }
        match self.open().await {
            Err(error) => error.sqlstate() == Some(CANNOT_CONNECT_NOW),
            // It was an administrator who ended that one session.
            Ok(probe) => {
                probe.close().await;
                false
            }
        }
    }

    async fn open(&self) -> Result<Connection, ConnectError> {
        let gone = || ConnectError::Closed { target: self.address.to_string() };
        let logins = self.world.logins.logins(Purpose::Physical).map_err(|_| gone())?;
        let login = logins.into_iter().find(|login| login.address == self.address).ok_or_else(gone)?;
        Connection::open(self.world.dialer.as_ref(), &login).await
    }
}

/// How long the acknowledged position has stood still behind what is proven. Pure.
#[derive(Debug)]
struct Standing {
    patience: Duration,
    position: Lsn,
    /// When it was last seen to move, or to be nowhere behind.
    since: Duration,
}

impl Standing {
    fn handle_look(&mut self, now: Duration, acknowledged: Lsn, proven: Lsn) -> bool {
        if acknowledged != self.position || acknowledged >= proven {
            (self.position, self.since) = (acknowledged, now);
        }
        now - self.since >= self.patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_position_that_stands_still_behind_is_still() {
        let mut standing = Standing { patience: Duration::from_secs(10), position: Lsn::ZERO, since: Duration::ZERO };
        let mut look = |second, acknowledged, proven| {
            standing.handle_look(Duration::from_secs(second), Lsn(acknowledged), Lsn(proven))
        };
        assert!(!look(5, 100, 100));
        assert!(!look(60, 100, 100), "an idle server is not behind");
        assert!(!look(69, 100, 200));
        assert!(look(70, 100, 200));
        assert!(!look(71, 150, 200), "it moved");
        assert!(!look(80, 150, 300));
        assert!(look(81, 150, 300));
    }
}
