//! Owns: holding the lease of a lineage in every repository that answers: acquiring, renewing in the background, losing
//! it, giving it back.
//! Does not own: whose it is (`catalog/lease.rs`), what is done under it (`mod.rs`).
//!
//! One repository after the other, in order of their ids: two who want all of them meet at the first. One that does not
//! answer is left out: nothing is done there under this lease.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use super::Place;
use crate::catalog::CatalogError;
use crate::catalog::backup::LeaseFile;
use crate::catalog::lease::{Claim, Standing};
use crate::error::{Disposition, ExitCode, Failure};
use crate::receiver::Clock;
use crate::repository::layout::LeaseNumber;

/// Not renewed for this long, a lease is nobody's. Longer: a crashed agent's backup is taken up later. Shorter: more
/// objects, and a store that hesitates makes a backup wait with its last step.
pub const SECONDS: u32 = 30;
/// Between two looks at another's lease.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);
/// For a look and a put together.
const STEP_DEADLINE: Duration = Duration::from_secs(20);
/// Between two attempts of a renewal that failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
const SCHEMA: u32 = 1;

/// Who wants a lease, and what for.
#[derive(Clone, Debug)]
pub struct Tenant {
    /// Random, one for each time somebody wants it.
    pub holder: String,
    pub host: Option<String>,
    pub purpose: String,
    pub clock: Clock,
}

/// A lease that is held, and renewed until it is dropped or given back.
#[derive(Debug)]
pub struct Lease {
    parts: Vec<Part>,
    lost: CancellationToken,
    _renewing: AbortOnDropHandle<()>,
}

/// The lease in one repository. Clones share it.
#[derive(Clone, Debug)]
pub struct Part {
    pub place: Place,
    tenant: Tenant,
    claim: Arc<Mutex<Claim>>,
    /// All times of the claim count from here.
    epoch: Instant,
}

impl Part {
    fn new(place: &Place, tenant: &Tenant) -> Part {
        let claim = Arc::new(Mutex::new(Claim::new(tenant.holder.clone(), SECONDS)));
        Part { place: place.clone(), tenant: tenant.clone(), claim, epoch: Instant::now() }
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    fn with_claim<T>(&self, work: impl FnOnce(&mut Claim) -> T) -> T {
        work(&mut self.claim.lock().expect("no holder panics"))
    }

    fn file(&self, number: LeaseNumber, released: bool) -> LeaseFile {
        LeaseFile {
            schema: SCHEMA,
            number,
            holder: self.tenant.holder.clone(),
            host: self.tenant.host.clone(),
            purpose: self.tenant.purpose.clone(),
            at: self.tenant.clock.now(),
            seconds: SECONDS,
            released,
            version: env!("CARGO_PKG_VERSION").to_string(),
        }
    }

    /// The number held; `None` once it is lost.
    pub fn number(&self) -> Option<LeaseNumber> {
        self.with_claim(|claim| claim.number())
    }

    /// Whether nobody else can hold it now.
    pub fn is_valid(&self) -> bool {
        let now = self.now();
        self.with_claim(|claim| claim.is_valid(now))
    }

    /// Makes sure of it, by a look at the store (a machine that was frozen may have frozen its clock too), with a renewal
    /// where it has not been renewed in time. For a step that must not be taken beside another holder.
    pub async fn confirm(&self) -> Result<(), Failure> {
        let standing = match self.is_valid() {
            true => self.within(self.look()).await?,
            false => match self.with_claim(|claim| claim.next()) {
                Some(next) => self.within(self.try_number(next)).await?,
                None => return Err(self.lost()),
            },
        };
        match standing == Standing::Held && self.is_valid() {
            true => Ok(()),
            false => Err(self.lost()),
        }
    }

    fn lost(&self) -> Failure {
        let message = format!("the lease on {} was lost: another process holds it now", self.place);
        Failure::new(ExitCode::TryAgain, message)
            .disposition(Disposition::Retry)
            .hint("was this process paused, or the store out of its reach, for longer than the lease lasts?")
    }

    async fn look(&self) -> Result<Standing, CatalogError> {
        let highest = self.place.archive.lease().await?;
        let now = self.now();
        Ok(self.with_claim(|claim| claim.handle_look(now, highest.as_ref())))
    }

    /// Tries to create a number, and looks what came of it.
    async fn try_number(&self, number: LeaseNumber) -> Result<Standing, CatalogError> {
        let now = self.now();
        self.with_claim(|claim| claim.handle_try(now, number));
        let put = self.place.archive.put_lease(&self.file(number, false)).await;
        // What the store said matters less than what is there; it matters when that cannot be seen either.
        match (self.look().await, put) {
            (Ok(standing), _) => Ok(standing),
            (Err(_), Err(error)) => Err(error),
            (Err(error), Ok(_)) => Err(error),
        }
    }

    /// One look, and one try where it is free.
    async fn take(&self) -> Result<Standing, Failure> {
        let step = async {
            match self.look().await? {
                Standing::Free { next } => self.try_number(next).await,
                standing => Ok(standing),
            }
        };
        self.within(step).await
    }

    /// A store may fail for a moment.
    async fn take_patiently(&self) -> Result<Standing, Failure> {
        const TRIES: u32 = 4;
        let mut tries = 1;
        loop {
            match self.take().await {
                Err(failure) if failure.disposition == Disposition::Retry && tries < TRIES => {
                    tries += 1;
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
                taken => return taken,
            }
        }
    }

    /// One renewal. An error leaves it as it was; losing it is none.
    async fn renew(&self) -> Result<(), Failure> {
        let Some(next) = self.with_claim(|claim| claim.next()) else { return Ok(()) };
        self.within(self.try_number(next)).await.map(drop)
    }

    async fn release(&self) {
        let Some(next) = self.with_claim(|claim| claim.next()) else { return };
        let released = self.within(self.place.archive.clone().put_lease(&self.file(next, true))).await;
        match released {
            Ok(_) => self.tidy(next).await,
            Err(failure) => {
                tracing::info!(repository = self.place.name, %failure, "the lease was not given back: it ends by itself");
            }
        }
    }

    /// The numbers below say nothing any more, and would make every look longer. Whoever still tries one of them looks
    /// at the highest afterwards.
    async fn tidy(&self, below: LeaseNumber) {
        if let Err(error) = self.place.archive.delete_leases_below(below).await {
            tracing::debug!(repository = self.place.name, %error, "old leases stay");
        }
    }

    async fn within<T>(&self, step: impl Future<Output = Result<T, CatalogError>>) -> Result<T, Failure> {
        match tokio::time::timeout(STEP_DEADLINE, step).await {
            Ok(done) => Ok(done?),
            Err(_) => {
                let message = format!("{} gave no answer within {STEP_DEADLINE:?}", self.place);
                Err(Failure::new(ExitCode::Unavailable, message).disposition(Disposition::Retry))
            }
        }
    }

    /// Until it is held, or another is seen to be alive; with `patience`, until it is held.
    ///
    /// One that stands still is watched until it is nobody's; that takes as long as it lasts.
    async fn acquire(&self, patience: Patience) -> Result<(), Failure> {
        let mut first = None;
        let mut is_said = false;
        loop {
            let (by, free_in) = match self.take_patiently().await? {
                Standing::Held => return Ok(()),
                // Somebody was faster, and has given it back already.
                Standing::Free { .. } => {
                    tokio::time::sleep(RETRY_INTERVAL).await;
                    continue;
                }
                Standing::Taken { by, free_in } => (by, free_in),
            };
            let is_alive = *first.get_or_insert(by.number) != by.number;
            if patience == Patience::None && is_alive {
                return Err(self.taken(&by));
            }
            if !is_said {
                let host = by.host.as_deref().unwrap_or("unknown");
                tracing::info!(repository = self.place.name, host, purpose = by.purpose, "waiting for the lease");
                is_said = true;
            }
            tokio::time::sleep(LOOK_INTERVAL.min(free_in)).await;
        }
    }

    fn taken(&self, by: &LeaseFile) -> Failure {
        let host = by.host.as_deref().unwrap_or("unknown");
        let message = format!("the lease on {} is held: {} by host {host}", self.place, by.purpose);
        Failure::new(ExitCode::TryAgain, message)
            .disposition(Disposition::Retry)
            .hint("one backup of a cluster is taken at a time; try again when that one is done, or wait with --wait")
    }
}

/// What to do while another holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// Give up as soon as it is seen to be renewed.
    None,
    Wait,
}

impl Lease {
    /// Takes the lease in every repository that answers; those that do not come back with why. At least one must.
    pub async fn acquire(
        places: &[Place],
        tenant: &Tenant,
        patience: Patience,
    ) -> Result<(Lease, Vec<(Place, Failure)>), Failure> {
        let mut ordered = places.to_vec();
        ordered.sort_by(|a, b| a.id.cmp(&b.id));
        let (mut parts, mut absent): (Vec<Part>, Vec<(Place, Failure)>) = (Vec::new(), Vec::new());
        for place in &ordered {
            let part = Part::new(place, tenant);
            match part.acquire(patience).await {
                Ok(()) => parts.push(part),
                Err(failure) if failure.exit_code == ExitCode::TryAgain => {
                    future::join_all(parts.iter().map(Part::release)).await;
                    return Err(failure);
                }
                Err(failure) => absent.push((place.clone(), failure)),
            }
        }
        match (parts.is_empty(), absent.first()) {
            (true, Some((_, why))) => Err(why.clone()),
            _ => Ok((Lease::holding(parts), absent)),
        }
    }

    fn holding(parts: Vec<Part>) -> Lease {
        let lost = CancellationToken::new();
        let renewing = future::join_all(parts.iter().map(|part| keep(part.clone(), lost.clone())).collect::<Vec<_>>());
        let renewing = AbortOnDropHandle::new(tokio::spawn(async move {
            renewing.await;
        }));
        Lease { parts, lost, _renewing: renewing }
    }

    /// In order of the repositories' ids.
    pub fn parts(&self) -> &[Part] {
        &self.parts
    }

    pub fn part(&self, index: usize) -> Option<&Part> {
        self.parts.iter().find(|part| part.place.index == index)
    }

    /// Cancelled when another process holds it in any of them.
    pub fn lost(&self) -> CancellationToken {
        self.lost.clone()
    }

    /// Gives it back: the next one need not wait until it has ended.
    pub async fn release(self) {
        let parts = self.parts.clone();
        // No renewal may come behind it.
        drop(self);
        future::join_all(parts.iter().map(Part::release)).await;
    }
}

/// Renews it in one repository for as long as it is held.
async fn keep(part: Part, lost: CancellationToken) {
    let mut is_said = false;
    loop {
        let Some(due) = part.with_claim(|claim| claim.renewal_due()) else {
            tracing::warn!(repository = part.place.name, "the lease was lost to another process");
            return lost.cancel();
        };
        tokio::time::sleep(due.saturating_sub(part.now())).await;
        match part.renew().await {
            Ok(()) => is_said = false,
            Err(failure) => {
                if !is_said {
                    tracing::warn!(repository = part.place.name, %failure, "the lease could not be renewed");
                    is_said = true;
                }
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::catalog::store::Archive;
    use crate::repository::layout::Lineage;
    use crate::testkit::store::{Faults, FaultyStore};
    use crate::wal::SystemId;

    fn place(index: usize, store: &FaultyStore) -> Place {
        let archive = Archive::new(Arc::new(store.clone()), Lineage::new("main", SystemId(7), 1));
        // The other way round than the configuration names them.
        Place { index, name: format!("store{index}"), id: format!("{:08x}", 99 - index), archive }
    }

    fn tenant(name: &str) -> Tenant {
        Tenant { holder: name.into(), host: None, purpose: format!("a backup by {name}"), clock: Clock::system() }
    }

    fn seconds(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_lives_is_left_alone_and_one_that_died_is_taken_over() {
        let store = FaultyStore::new(1);
        let places = [place(0, &store)];
        let (lease, _) = Lease::acquire(&places, &tenant("a"), Patience::None).await.unwrap();
        let refused = Lease::acquire(&places, &tenant("b"), Patience::None).await.unwrap_err();
        assert_eq!(refused.exit_code, ExitCode::TryAgain);
        assert!(refused.message.contains("a backup by a"), "{refused}");
        // As killed: no renewal any more, and nothing given back.
        drop(lease);
        let began = Instant::now();
        let (lease, _) = Lease::acquire(&places, &tenant("b"), Patience::None).await.unwrap();
        assert!((seconds(30)..=seconds(34)).contains(&began.elapsed()), "{:?}", began.elapsed());
        lease.parts()[0].confirm().await.unwrap();
        lease.release().await;
        // Given back: it is there at once.
        let began = Instant::now();
        let (lease, _) = Lease::acquire(&places, &tenant("c"), Patience::None).await.unwrap();
        assert!(began.elapsed() < seconds(1));
        drop(lease);
        let leases = store.memory().objects().keys().filter(|key| key.as_str().contains("/lease/")).count();
        assert_eq!(leases, 2, "what b gave back, and what c took");
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_held_in_every_repository_that_answers() {
        let stores = [FaultyStore::new(1), FaultyStore::new(2)];
        let places = [place(0, &stores[0]), place(1, &stores[1])];
        stores[0].set_outage(true);
        let (lease, absent) = Lease::acquire(&places, &tenant("a"), Patience::None).await.unwrap();
        assert_eq!((lease.parts().len(), absent[0].0.name.as_str()), (1, "store0"));
        stores[0].set_outage(false);
        // Free in the one, held in the other: both wait, and what was taken is given back.
        Lease::acquire(&places, &tenant("b"), Patience::None).await.unwrap_err();
        assert!(lease.part(1).unwrap().is_valid() && lease.part(0).is_none());
        lease.release().await;
        let (lease, absent) = Lease::acquire(&places, &tenant("b"), Patience::None).await.unwrap();
        assert_eq!((lease.parts().len(), absent.len()), (2, 0));
    }

    #[tokio::test(start_paused = true)]
    async fn out_of_the_stores_reach_it_is_not_trusted_and_counts_again_when_nobody_took_it() {
        let store = FaultyStore::new(1);
        let places = [place(0, &store)];
        let (lease, _) = Lease::acquire(&places, &tenant("a"), Patience::None).await.unwrap();
        store.set_outage(true);
        tokio::time::sleep(seconds(21)).await;
        assert!(!lease.parts()[0].is_valid());
        lease.parts()[0].confirm().await.unwrap_err();
        store.set_outage(false);
        lease.parts()[0].confirm().await.unwrap();
        // The same, but somebody else was there.
        store.set_outage(true);
        tokio::time::sleep(seconds(60)).await;
        let other = FaultyStore::around(store.memory().clone(), 2);
        let (other, _) = Lease::acquire(&[place(0, &other)], &tenant("b"), Patience::None).await.unwrap();
        store.set_outage(false);
        lease.lost().cancelled().await;
        assert!(lease.parts()[0].confirm().await.unwrap_err().message.contains("was lost"));
        other.parts()[0].confirm().await.unwrap();
    }

    /// On a store that loses answers and hangs, several take turns; nobody commits beside another.
    #[tokio::test(start_paused = true)]
    async fn they_take_turns_on_a_bad_store() {
        for seed in 0..20 {
            let store = FaultyStore::new(seed);
            store.set_faults(Faults::some());
            let trusting: Arc<Mutex<BTreeSet<usize>>> = Arc::default();
            let one = |number: usize, trusting: Arc<Mutex<BTreeSet<usize>>>, place: Place| async move {
                for round in 0..3 {
                    let name = format!("{number}-{round}");
                    let Ok((lease, _)) =
                        Lease::acquire(std::slice::from_ref(&place), &tenant(&name), Patience::Wait).await
                    else {
                        continue;
                    };
                    for _ in 0..30 {
                        tokio::time::sleep(seconds(1)).await;
                        let mut all = trusting.lock().unwrap();
                        match lease.parts()[0].is_valid() {
                            true => all.insert(number),
                            false => all.remove(&number),
                        };
                        assert!(all.len() <= 1, "seed {seed}: {all:?}");
                    }
                    trusting.lock().unwrap().remove(&number);
                    match round {
                        // As killed.
                        1 => drop(lease),
                        _ => lease.release().await,
                    }
                }
            };
            let all = (0..3).map(|number| tokio::spawn(one(number, trusting.clone(), place(0, &store))));
            for done in future::join_all(all).await {
                done.unwrap();
            }
        }
    }
}
