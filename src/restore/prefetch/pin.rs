//! Owns: renewing and lifting the pin that keeps what a recovery needs in the archive.
//! Does not own: putting it (`restore/execute`), what it protects from (`retention`).
//!
//! All of it is worth trying and none of it worth failing for: the recovery goes on without, and a pin lapses.

use std::time::Duration;

use futures_util::future::join_all;
use jiff::{SignedDuration, Timestamp};

use crate::catalog::{CatalogError, PinFile};
use crate::repository::layout::PinName;
use crate::restore::marker::RestoreId;
use crate::restore::wal_get::Holder;

pub const RENEWAL: Duration = Duration::from_secs(3600);
/// A restore that is done within a minute has a fresh pin.
pub const FIRST_RENEWAL: Duration = Duration::from_secs(60);
pub const NEVER: Duration = Duration::from_secs(100 * 365 * 24 * 3600);
/// After its last renewal.
const LASTS: SignedDuration = SignedDuration::from_hours(24);
/// For one repository to take the word.
const PATIENCE: Duration = Duration::from_secs(20);

pub async fn renew(holders: &[Holder], id: RestoreId) {
    let next = |pin: PinFile| PinFile { expires: Some(Timestamp::now() + LASTS), ..pin };
    say(holders, id, "renew", next).await;
    join_all(holders.iter().map(|holder| look_for_losses(holder, id))).await;
}

/// A pin that nobody renewed in time (the machine slept, the store was away) holds nothing until it is renewed. Whoever
/// expires has announced by then what goes, or sees the renewal. Recovery cannot begin anew by itself: it is said.
async fn look_for_losses(holder: &Holder, id: RestoreId) {
    let (repository, archive) = (&holder.repository, &holder.archive);
    let looked = async {
        let expired = archive.expired().await?;
        if expired.is_empty() {
            return Ok::<_, CatalogError>(None);
        }
        let pins = archive.pins().await?;
        let pin = pins.into_iter().find(|(name, _)| name.id == id.0).map(|(_, pin)| pin);
        Ok(pin.filter(|pin| expired.backups().contains(&pin.backup)))
    };
    if let Ok(Ok(Some(pin))) = tokio::time::timeout(PATIENCE, looked).await {
        tracing::warn!(
            repository,
            "the pin {id} had lapsed, and backup {} with its WAL is deleted there: if this recovery stops for want of WAL, restore anew",
            pin.backup
        );
    }
}

pub async fn release(holders: &[Holder], id: RestoreId) {
    say(holders, id, "lift", |pin| PinFile { released: true, ..pin }).await;
}

/// Says the next word on a pin in every repository that has it in force.
async fn say(holders: &[Holder], id: RestoreId, verb: &str, next: impl Fn(PinFile) -> PinFile) {
    let said = holders.iter().map(async |holder| {
        let repository = &holder.repository;
        match tokio::time::timeout(PATIENCE, say_in(holder, id, &next)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::warn!(repository, "could not {verb} the pin {id}, which lapses by itself: {error}")
            }
            Err(_) => {
                tracing::warn!(repository, "could not {verb} the pin {id} within {PATIENCE:?}; it lapses by itself")
            }
        }
    });
    join_all(said).await;
}

async fn say_in(holder: &Holder, id: RestoreId, next: &impl Fn(PinFile) -> PinFile) -> Result<(), CatalogError> {
    let pins = holder.archive.pins().await?;
    let latest = pins.into_iter().find(|(name, _)| name.id == id.0);
    let Some((name, pin)) = latest.filter(|(_, pin)| !pin.released) else { return Ok(()) };
    let Some(number) = name.number.checked_add(1) else { return Ok(()) };
    // Somebody else's word is as good: only this restore speaks of its pin.
    holder.archive.put_pin(PinName { number, ..name }, &next(pin)).await.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use crate::catalog::Archive;
    use crate::catalog::backup::PinKind;
    use crate::repository::layout::Lineage;
    use crate::testkit::store::MemoryStore;
    use crate::wal::{Lsn, SystemId, TimelineId};

    #[tokio::test]
    async fn a_pin_is_renewed_until_it_is_lifted() {
        let archive = Archive::new(Arc::new(MemoryStore::default()), Lineage::new("main", SystemId(7), 1));
        let created: Timestamp = "2026-11-22T11:00:00Z".parse().unwrap();
        let pin = PinFile {
            schema: 1,
            kind: PinKind::Restore,
            backup: "20261122T110000Z-full".parse().unwrap(),
            from_lsn: Some(Lsn(0x200_0028)),
            to_lsn: None,
            timeline: TimelineId(1),
            created,
            expires: Some(created + LASTS),
            released: false,
            host: None,
        };
        let id = RestoreId(7);
        let holders = [Holder::new("local", archive.clone())];
        renew(&holders, id).await;
        assert!(archive.pins().await.unwrap().is_empty(), "there was none to renew");
        archive.put_pin(PinName { id: id.0, number: 1 }, &pin).await.unwrap();
        archive.put_pin(PinName { id: 8, number: 5 }, &pin).await.unwrap();
        renew(&holders, id).await;
        let renewed = archive.pins().await.unwrap()[&PinName { id: id.0, number: 2 }].clone();
        assert!(renewed.expires > pin.expires && !renewed.released);
        assert_eq!(PinFile { expires: pin.expires, ..renewed }, pin);
        for _ in 0..2 {
            release(&holders, id).await;
            renew(&holders, id).await;
        }
        let pins = archive.pins().await.unwrap();
        assert!(pins[&PinName { id: id.0, number: 3 }].released);
        assert_eq!(pins.len(), 2, "another's pin is left alone");
    }
}
