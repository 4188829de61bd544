//! Owns: the pin that keeps what a restore needs from being deleted while it runs.
//! Does not own: the pin of the recovery that follows (`prefetch/pin.rs`), what a pin means (`retention`).

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};

use crate::catalog::backup::{PinFile, PinKind};
use crate::repository::layout::PinName;
use crate::restore::marker::RestoreId;
use crate::restore::plan::RestorePlan;
use crate::restore::prefetch;
use crate::restore::wal_get::Holder;

/// A pin that nobody renews lapses.
const LASTS: SignedDuration = SignedDuration::from_hours(24);
/// No repository may hold a restore up for the sake of its pin.
const DEADLINE: Duration = Duration::from_secs(60);

/// Puts it into every repository; whether any took it. One that does not is warned about: a restore may have no
/// permission to write, and nothing may ever be deleted.
pub async fn put(id: RestoreId, plan: &RestorePlan, holders: &[Holder], host: Option<&str>) -> bool {
    let name = PinName { id: id.0, number: 1 };
    let created = Timestamp::now();
    let file = PinFile {
        schema: 1,
        kind: PinKind::Restore,
        backup: plan.backup().id,
        from_lsn: Some(plan.start_lsn),
        to_lsn: (!plan.standby).then_some(plan.end_lsn),
        timeline: plan.timeline(),
        created,
        expires: created.checked_add(LASTS).ok(),
        released: false,
        host: host.map(str::to_string),
    };
    let mut any = false;
    for Holder { repository, archive, .. } in holders {
        match tokio::time::timeout(DEADLINE, archive.put_pin(name, &file)).await {
            Ok(Ok(true)) => any = true,
            Ok(Ok(false)) => tracing::warn!(repository, "pin {name} is somebody else's"),
            Ok(Err(error)) => {
                tracing::warn!(repository, "the restore is not pinned there: let nothing expire meanwhile: {error}");
            }
            Err(_) => tracing::warn!(repository, "the restore is not pinned there: no answer within {DEADLINE:?}"),
        }
    }
    any
}

/// Never ends.
pub async fn keep_renewed(id: RestoreId, holders: &[Holder]) {
    loop {
        tokio::time::sleep(prefetch::pin::RENEWAL).await;
        prefetch::pin::renew(holders, id).await;
    }
}
