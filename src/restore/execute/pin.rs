//! Owns: the pin that keeps what a restore needs from being deleted while it runs, and whether it came in time.
//! Does not own: the pin of the recovery that follows (`prefetch/pin.rs`), what a pin means (`retention`).
//!
//! `expire` announces, then reads the pins; a restore puts its pin, then reads what is announced. Whichever is second
//! sees the other: `expire` takes back what a pin holds, a restore that needs what was announced plans anew.

use std::collections::BTreeSet;
use std::time::Duration;

use futures_util::future::join_all;

use jiff::{SignedDuration, Timestamp};

use crate::catalog::backup::{PinFile, PinKind};
use crate::catalog::{CatalogError, Expired};
use crate::repository::layout::{BackupId, PinName, WalDirectory};
use crate::restore::marker::RestoreId;
use crate::restore::plan::RestorePlan;
use crate::restore::prefetch;
use crate::restore::wal_get::Holder;
use crate::wal::{Lsn, SegmentName, SegmentNumber, TimelineId};

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

/// What of the plan is announced to be deleted and cannot be had from another repository: the pin came too late. A
/// repository that does not answer has announced nothing, and holds nothing: fetching from it will tell.
pub async fn too_late(plan: &RestorePlan, holders: &[Holder]) -> Option<String> {
    let asked = holders.iter().map(|holder| answer(holder, holder.archive.expired()));
    let announced: Vec<Option<Expired>> = join_all(asked).await;
    if let Some(backup) = lost_backup(plan, holders, &announced).await {
        return Some(format!("backup {backup}"));
    }
    let lost = lost_segment(plan, holders, &announced).await?;
    Some(format!("WAL segment {lost}"))
}

/// A member of the chain that no copy is left of.
async fn lost_backup(plan: &RestorePlan, holders: &[Holder], announced: &[Option<Expired>]) -> Option<BackupId> {
    let mut lost = None;
    for copy in &plan.copies {
        let Some(index) = holders.iter().position(|holder| holder.repository == copy.repository) else { continue };
        let mut gone = None;
        for member in &copy.chain {
            let is_announced = announced[index].as_ref().is_some_and(|all| all.backups().contains(&member.id));
            let is_kept = !is_announced && answer(&holders[index], holders[index].archive.is_kept(member.id)).await?;
            if !is_kept {
                gone = Some(member.id);
                break;
            }
        }
        lost = Some(gone?);
    }
    lost
}

async fn lost_segment(plan: &RestorePlan, holders: &[Holder], announced: &[Option<Expired>]) -> Option<SegmentName> {
    let size = plan.segment_size;
    let mut in_doubt: BTreeSet<SegmentName> = BTreeSet::new();
    for (timeline, first, last) in needed_segments(plan) {
        let names = (first.0..=last.0).map(|number| SegmentName::new(timeline, SegmentNumber(number), size));
        let covered = |name: &SegmentName| announced.iter().flatten().any(|expired| expired.contains(*name));
        if announced.iter().flatten().any(|expired| !expired.lsns(timeline, size).is_empty()) {
            in_doubt.extend(names.filter(covered));
        }
    }
    let directories: BTreeSet<WalDirectory> = in_doubt.iter().map(|name| WalDirectory::of(*name)).collect();
    for (holder, expired) in holders.iter().zip(announced) {
        let Some(expired) = expired else { continue };
        for &directory in &directories {
            let wanted = |name: SegmentName| in_doubt.contains(&name) && !expired.contains(name);
            let listed = answer(holder, holder.archive.segment_names(directory, size, wanted)).await;
            let held: BTreeSet<SegmentName> = listed.into_iter().flatten().collect();
            in_doubt.retain(|name| !held.contains(name));
        }
    }
    in_doubt.first().copied()
}

/// Along the path, each timeline up to the segment it is left in, which the next one has too.
fn needed_segments(plan: &RestorePlan) -> Vec<(TimelineId, SegmentNumber, SegmentNumber)> {
    let size = plan.segment_size;
    let ends = plan.path.ancestors().iter().map(|entry| (entry.timeline, size.floor(entry.end).min(plan.end_lsn)));
    let mut from: Lsn = size.floor(plan.start_lsn);
    let mut needed = Vec::new();
    for (timeline, end) in ends.chain([(plan.timeline(), plan.end_lsn)]) {
        if timeline >= plan.backup().timeline && from < end {
            needed.push((timeline, size.segment_of(from), size.segment_before(end)));
            from = end;
        }
    }
    needed
}

async fn answer<T>(holder: &Holder, asked: impl Future<Output = Result<T, CatalogError>>) -> Option<T> {
    let repository = &holder.repository;
    match tokio::time::timeout(DEADLINE, asked).await {
        Ok(Ok(answer)) => return Some(answer),
        Ok(Err(error)) => tracing::warn!(repository, "cannot tell whether anything expires there: {error}"),
        Err(_) => tracing::warn!(repository, "cannot tell whether anything expires there: no answer in {DEADLINE:?}"),
    }
    None
}

/// Never ends.
pub async fn keep_renewed(id: RestoreId, holders: &[Holder]) {
    loop {
        tokio::time::sleep(prefetch::pin::RENEWAL).await;
        prefetch::pin::renew(holders, id).await;
    }
}
