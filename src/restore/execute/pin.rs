//! Owns: the pin that keeps what a restore needs from being deleted while it runs.
//! Does not own: the pin of the recovery that follows (`wal-get` renews it), what a pin means (`retention`).

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::catalog::backup::{PinFile, PinKind};
use crate::repository::layout::PinName;
use crate::restore::marker::RestoreId;
use crate::restore::plan::RestorePlan;
use crate::restore::wal_get::Holder;

/// A pin that nobody renews lapses.
const LASTS: SignedDuration = SignedDuration::from_hours(24);
const RENEWED_EVERY: Duration = Duration::from_secs(3600);
/// No repository may hold a restore up for the sake of its pin.
const DEADLINE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Pin<'a> {
    id: RestoreId,
    plan: &'a RestorePlan,
    holders: &'a [Holder],
    host: Option<String>,
    number: u32,
}

impl<'a> Pin<'a> {
    pub fn new(id: RestoreId, plan: &'a RestorePlan, holders: &'a [Holder], host: Option<String>) -> Pin<'a> {
        Pin { id, plan, holders, host, number: 0 }
    }

    /// Puts it, or its next number, into every repository; whether any took it. One that does not is warned about: a
    /// restore may have no permission to write, and nothing may ever be deleted.
    pub async fn put(&mut self) -> bool {
        self.number += 1;
        let name = PinName { id: self.id.0, number: self.number };
        let created = Timestamp::now();
        let file = PinFile {
            schema: 1,
            kind: PinKind::Restore,
            backup: self.plan.backup().id,
            from_lsn: Some(self.plan.start_lsn),
            to_lsn: (!self.plan.standby).then_some(self.plan.end_lsn),
            timeline: self.plan.timeline(),
            created,
            expires: created.checked_add(LASTS).ok(),
            released: false,
            host: self.host.clone(),
        };
        let mut any = false;
        for Holder { repository, archive } in self.holders {
            match tokio::time::timeout(DEADLINE, archive.put_pin(name, &file)).await {
                Ok(Ok(true)) => any = true,
                Ok(Ok(false)) => tracing::warn!(repository, "pin {name} is somebody else's"),
                Ok(Err(error)) => {
                    tracing::warn!(
                        repository,
                        "the restore is not pinned there: let nothing expire meanwhile: {error}"
                    );
                }
                Err(_) => tracing::warn!(repository, "the restore is not pinned there: no answer within {DEADLINE:?}"),
            }
        }
        any
    }

    /// Never ends.
    pub async fn keep_renewed(&mut self) {
        loop {
            tokio::time::sleep(RENEWED_EVERY).await;
            self.put().await;
        }
    }
}
