//! Owns: a store in memory that behaves like a real one, the faults a real one can have, a journal of both.
//! Does not own: what every store must do (`conformance.rs`), the oracle that reads the journal.
//!
//! Deterministic: every draw comes from the seed, every delay from tokio's clock (paused in the simulation).

use std::collections::BTreeMap;
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use tokio::time::sleep;

use crate::repository::{Backend, Entry, Facts, Key, StoreError, StoreErrorKind, Upload};

/// Objects in memory; clones share them.
#[derive(Clone, Debug, Default)]
pub struct MemoryStore {
    objects: Arc<Mutex<BTreeMap<Key, Bytes>>>,
    lists_deep: bool,
}

impl MemoryStore {
    /// One that shows the names below many directories at once, as S3 does.
    pub fn listing_deep() -> MemoryStore {
        MemoryStore { lists_deep: true, ..MemoryStore::default() }
    }

    /// The same objects, listed the other way.
    pub fn listing_plainly(&self) -> MemoryStore {
        MemoryStore { lists_deep: false, ..self.clone() }
    }

    fn error(kind: StoreErrorKind, operation: &'static str, key: &Key) -> StoreError {
        StoreError::new(kind, operation, format!("memory:{key}"), format!("{kind:?}"))
    }

    /// Everything stored, in order of key.
    pub fn objects(&self) -> BTreeMap<Key, Bytes> {
        self.objects.lock().unwrap().clone()
    }

    /// Stores an object at once; the body of the one that has the name already, if there is one.
    fn insert_new(&self, key: &Key, body: Bytes) -> Result<(), Bytes> {
        let mut objects = self.objects.lock().unwrap();
        match objects.get(key) {
            Some(stored) => Err(stored.clone()),
            None => {
                objects.insert(key.clone(), body);
                Ok(())
            }
        }
    }

    /// Changes the store behind everybody's back, as an operator or a fault would.
    pub fn tamper(&self, change: impl FnOnce(&mut BTreeMap<Key, Bytes>)) {
        change(&mut self.objects.lock().unwrap());
    }
}

#[async_trait]
impl Backend for MemoryStore {
    fn describe(&self) -> String {
        "memory:".to_string()
    }

    async fn put_new_with(&self, key: &Key, body: &[Bytes], _facts: &Facts) -> Result<(), StoreError> {
        let stored = self.insert_new(key, body.concat().into());
        stored.map_err(|_| Self::error(StoreErrorKind::AlreadyExists, "store", key))
    }

    async fn begin_upload(&self, key: &Key) -> Result<Box<dyn Upload>, StoreError> {
        Ok(Box::new(MemoryUpload { store: self.clone(), key: key.clone(), body: BytesMut::new() }))
    }

    async fn stat(&self, key: &Key) -> Result<Option<u64>, StoreError> {
        Ok(self.objects.lock().unwrap().get(key).map(|body| body.len() as u64))
    }

    async fn fetch(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        let objects = self.objects.lock().unwrap();
        let body = objects.get(key).ok_or_else(|| Self::error(StoreErrorKind::NotFound, "read", key))?;
        let inside = range.start <= range.end && range.end <= body.len() as u64;
        if !inside {
            return Err(Self::error(StoreErrorKind::Corrupt, "read", key));
        }
        Ok(body.slice(range.start as usize..range.end as usize))
    }

    async fn list(&self, directory: Option<&Key>) -> Result<Vec<Entry>, StoreError> {
        let prefix = directory.map_or(String::new(), |key| format!("{key}/"));
        let mut found: Vec<Entry> = Vec::new();
        for (key, body) in self.objects.lock().unwrap().iter() {
            let Some(rest) = key.as_str().strip_prefix(&prefix) else { continue };
            let entry = match rest.split_once('/') {
                Some((name, _)) => Entry::Directory(name.to_string()),
                None => Entry::Object { name: rest.to_string(), bytes: body.len() as u64 },
            };
            if found.last() != Some(&entry) {
                found.push(entry);
            }
        }
        found.sort();
        found.dedup();
        Ok(found)
    }

    fn lists_deep(&self) -> bool {
        self.lists_deep
    }

    async fn list_deep(
        &self,
        directory: &Key,
        first: &str,
        last: &str,
    ) -> Result<Option<Vec<(String, u64)>>, StoreError> {
        let prefix = format!("{directory}/");
        let found = self.objects.lock().unwrap();
        let found = found.iter().filter_map(|(key, body)| {
            let path = key.as_str().strip_prefix(&prefix)?;
            let (name, _) = path.split_once('/')?;
            (first <= name && name <= last).then(|| (path.to_string(), body.len() as u64))
        });
        Ok(Some(found.collect()))
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.objects.lock().unwrap().remove(key);
        Ok(())
    }
}

#[derive(Debug)]
struct MemoryUpload {
    store: MemoryStore,
    key: Key,
    body: BytesMut,
}

#[async_trait]
impl Upload for MemoryUpload {
    async fn append(&mut self, part: Bytes) -> Result<(), StoreError> {
        self.body.extend_from_slice(&part);
        Ok(())
    }

    async fn read_back(&mut self, range: Range<u64>) -> Result<Bytes, StoreError> {
        read_back(&self.body, &self.key, range)
    }

    async fn complete(&mut self) -> Result<(), StoreError> {
        self.store.put_new(&self.key, &[self.body.clone().freeze()]).await
    }

    async fn abort(self: Box<Self>) -> Result<(), StoreError> {
        Ok(())
    }
}

fn read_back(body: &[u8], key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
    let inside = range.start <= range.end && range.end <= body.len() as u64;
    if !inside {
        return Err(MemoryStore::error(StoreErrorKind::Corrupt, "read", key));
    }
    Ok(Bytes::copy_from_slice(&body[range.start as usize..range.end as usize]))
}

/// What goes wrong from now on. Chances are between 0 and 1, drawn once for every call.
#[derive(Clone, Debug)]
pub struct Faults {
    /// Every call takes this long, drawn evenly, before anything happens.
    pub latency: RangeInclusive<Duration>,
    /// Refused without effect, with `failure`.
    pub fail: f64,
    pub failure: StoreErrorKind,
    /// Carried out, and then answered with `Unavailable`.
    pub lose_answer: f64,
    /// No answer for `hang_for`, then `Unavailable`; whether it was carried out is drawn.
    pub hang: f64,
    pub hang_for: Duration,
    /// Every call is refused with `Unavailable`, without effect.
    pub outage: bool,
}

impl Faults {
    /// A store that answers at once and does what it is told.
    pub fn none() -> Faults {
        Faults {
            latency: Duration::ZERO..=Duration::ZERO,
            fail: 0.0,
            failure: StoreErrorKind::Unavailable,
            lose_answer: 0.0,
            hang: 0.0,
            hang_for: Duration::from_secs(30),
            outage: false,
        }
    }

    /// Slow at times, wrong at times: about one call in twelve has a fault.
    pub fn some() -> Faults {
        let latency = Duration::from_millis(5)..=Duration::from_millis(800);
        Faults { latency, fail: 0.04, lose_answer: 0.03, hang: 0.01, ..Faults::none() }
    }
}

impl Default for Faults {
    fn default() -> Faults {
        Faults::none()
    }
}

/// Calls received since the store was made, whatever became of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Calls {
    /// `put_new` and completed uploads.
    pub puts: u64,
    pub put_bytes: u64,
    pub uploads_begun: u64,
    pub appends: u64,
    pub stats: u64,
    pub fetches: u64,
    pub fetched_bytes: u64,
    pub lists: u64,
    pub deletes: u64,
}

impl Calls {
    /// Calls that are meant to change the store: an idle server must cause none.
    pub fn writes(&self) -> u64 {
        self.puts + self.uploads_begun + self.appends + self.deletes
    }

    pub fn reads(&self) -> u64 {
        self.stats + self.fetches + self.lists
    }
}

/// What happened to the objects, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The name was free and is now taken, whatever the writer was told.
    Stored { key: Key, body: Bytes },
    /// The name was taken. Equal bodies are a repeated put; others are somebody's attempt to overwrite.
    Refused { key: Key, body: Bytes, stored: Bytes },
    /// `body` is what was lost.
    Deleted { key: Key, body: Bytes },
}

/// What kind of store it is, which never changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traits {
    /// Whether unfinished uploads can be read back: a directory's can, a multipart upload cannot.
    pub reads_back: bool,
    /// Whether objects stored whole keep their writer's facts, as metadata does in an object store.
    pub keeps_facts: bool,
}

impl Traits {
    pub const LOCAL: Traits = Traits { reads_back: true, keeps_facts: false };
    pub const OBJECT_STORE: Traits = Traits { reads_back: false, keeps_facts: true };
}

/// A [`MemoryStore`] behind a network that cannot be relied on. Clones share everything.
#[derive(Clone, Debug)]
pub struct FaultyStore {
    store: MemoryStore,
    state: Arc<Mutex<FaultState>>,
}

#[derive(Debug)]
struct FaultState {
    rng: fastrand::Rng,
    faults: Faults,
    calls: Calls,
    journal: Vec<Event>,
    traits: Traits,
    /// Raw CRC-32s kept with objects.
    raw_crc32s: BTreeMap<Key, u32>,
}

/// Drawn for one call, after its latency.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    Done,
    /// Carried out or not, then this error.
    Broken {
        carried_out: bool,
        kind: StoreErrorKind,
    },
}

impl FaultyStore {
    /// Without faults until [`FaultyStore::set_faults`].
    pub fn new(seed: u64) -> FaultyStore {
        FaultyStore::around(MemoryStore::default(), seed)
    }

    /// Objects already in `store` are not in the journal.
    pub fn around(store: MemoryStore, seed: u64) -> FaultyStore {
        let rng = fastrand::Rng::with_seed(seed);
        let state = FaultState {
            rng,
            faults: Faults::none(),
            calls: Calls::default(),
            journal: Vec::new(),
            traits: Traits::LOCAL,
            raw_crc32s: BTreeMap::new(),
        };
        FaultyStore { store, state: Arc::new(Mutex::new(state)) }
    }

    /// The same store as another kind: to be said before it is used.
    pub fn with_traits(self, traits: Traits) -> FaultyStore {
        self.state.lock().unwrap().traits = traits;
        self
    }

    /// What is really there, without faults.
    pub fn memory(&self) -> &MemoryStore {
        &self.store
    }

    pub fn set_faults(&self, faults: Faults) {
        self.state.lock().unwrap().faults = faults;
    }

    /// Begins or ends an outage; the other faults stay as they are. Calls under way fail too.
    pub fn set_outage(&self, outage: bool) {
        self.state.lock().unwrap().faults.outage = outage;
    }

    pub fn calls(&self) -> Calls {
        self.state.lock().unwrap().calls
    }

    pub fn journal(&self) -> Vec<Event> {
        self.state.lock().unwrap().journal.clone()
    }

    fn count(&self, count: impl FnOnce(&mut Calls)) {
        count(&mut self.state.lock().unwrap().calls);
    }

    /// Waits as long as this call takes, and says what becomes of it.
    async fn fate(&self) -> Fate {
        let latency = self.state.lock().unwrap().latency();
        sleep(latency).await;
        let (fate, hang_for) = self.state.lock().unwrap().draw();
        sleep(hang_for).await;
        fate
    }

    /// For calls that change nothing: comes back when the question may be asked of the store behind.
    async fn reach(&self, operation: &'static str, key: &Key) -> Result<(), StoreError> {
        match self.fate().await {
            Fate::Done => Ok(()),
            Fate::Broken { kind, .. } => Err(MemoryStore::error(kind, operation, key)),
        }
    }

    async fn put(&self, key: &Key, body: Bytes, raw_crc32: Option<u32>) -> Result<(), StoreError> {
        self.count(|calls| {
            calls.puts += 1;
            calls.put_bytes += body.len() as u64;
        });
        let mut pending = Pending { store: self, effect: Some(Effect::Put(key.clone(), body, raw_crc32)) };
        let fate = self.fate().await;
        pending.finish(fate, "store", key)
    }

    fn apply(&self, effect: Effect) -> Result<(), StoreErrorKind> {
        match effect {
            Effect::Put(key, body, raw_crc32) => {
                let stored = self.store.insert_new(&key, body.clone());
                if let (Ok(()), Some(raw_crc32)) = (&stored, raw_crc32) {
                    self.state.lock().unwrap().raw_crc32s.insert(key.clone(), raw_crc32);
                }
                let answer = stored.as_ref().map_err(|_| StoreErrorKind::AlreadyExists).copied();
                let event = match stored {
                    Ok(()) => Event::Stored { key, body },
                    Err(stored) => Event::Refused { key, body, stored },
                };
                self.state.lock().unwrap().journal.push(event);
                answer
            }
            Effect::Delete(key) => {
                let removed = self.store.objects.lock().unwrap().remove(&key);
                let event = removed.map(|body| Event::Deleted { key, body });
                self.state.lock().unwrap().journal.extend(event);
                Ok(())
            }
        }
    }
}

impl FaultState {
    fn latency(&mut self) -> Duration {
        let (least, most) = (self.faults.latency.start().as_micros(), self.faults.latency.end().as_micros());
        Duration::from_micros(self.rng.u64(least as u64..=most.max(least) as u64))
    }

    /// What becomes of a call, and how long it hangs before. Draws the same number of values in every case, so
    /// that changing one chance does not change the fate of all later calls more than it must.
    fn draw(&mut self) -> (Fate, Duration) {
        let (chance, carried_out) = (self.rng.f64(), self.rng.bool());
        let Faults { fail, failure, lose_answer, hang, hang_for, outage, .. } = self.faults;
        let unavailable = |carried_out| Fate::Broken { carried_out, kind: StoreErrorKind::Unavailable };
        if outage {
            (unavailable(false), Duration::ZERO)
        } else if chance < fail {
            (Fate::Broken { carried_out: false, kind: failure }, Duration::ZERO)
        } else if chance < fail + lose_answer {
            (unavailable(true), Duration::ZERO)
        } else if chance < fail + lose_answer + hang {
            (unavailable(carried_out), hang_for)
        } else {
            (Fate::Done, Duration::ZERO)
        }
    }
}

#[derive(Debug)]
enum Effect {
    /// With the raw CRC-32 that is kept with it.
    Put(Key, Bytes, Option<u32>),
    Delete(Key),
}

/// A change on its way. Dropped before its answer it took effect or did not, as the seed draws; never partly.
struct Pending<'a> {
    store: &'a FaultyStore,
    effect: Option<Effect>,
}

impl Pending<'_> {
    fn finish(&mut self, fate: Fate, operation: &'static str, key: &Key) -> Result<(), StoreError> {
        let effect = self.effect.take().expect("finished once");
        let answer = match fate {
            Fate::Done => self.store.apply(effect),
            Fate::Broken { carried_out, kind } => {
                if carried_out {
                    // The answer is lost, be it success or "already exists".
                    let _ = self.store.apply(effect);
                }
                Err(kind)
            }
        };
        answer.map_err(|kind| MemoryStore::error(kind, operation, key))
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        let Some(effect) = self.effect.take() else { return };
        let took_effect = {
            let mut state = self.store.state.lock().unwrap();
            state.rng.bool() && !state.faults.outage
        };
        if took_effect {
            let _ = self.store.apply(effect);
        }
    }
}

#[async_trait]
impl Backend for FaultyStore {
    fn describe(&self) -> String {
        self.store.describe()
    }

    async fn put_new_with(&self, key: &Key, body: &[Bytes], facts: &Facts) -> Result<(), StoreError> {
        let body: Bytes = body.concat().into();
        if let Some(stored_crc32) = facts.stored_crc32 {
            assert_eq!(crc32fast::hash(&body), stored_crc32, "{key} is not what its writer says");
        }
        self.put(key, body, facts.raw_crc32.filter(|_| self.keeps_facts())).await
    }

    fn keeps_facts(&self) -> bool {
        self.state.lock().unwrap().traits.keeps_facts
    }

    async fn raw_crc32(&self, key: &Key) -> Result<Option<u32>, StoreError> {
        self.count(|calls| calls.stats += 1);
        self.reach("read", key).await?;
        Ok(self.state.lock().unwrap().raw_crc32s.get(key).copied())
    }

    fn reads_back(&self) -> bool {
        self.state.lock().unwrap().traits.reads_back
    }

    async fn begin_upload(&self, key: &Key) -> Result<Box<dyn Upload>, StoreError> {
        self.count(|calls| calls.uploads_begun += 1);
        self.reach("store", key).await?;
        Ok(Box::new(FaultyUpload { store: self.clone(), key: key.clone(), body: BytesMut::new(), broken: false }))
    }

    async fn stat(&self, key: &Key) -> Result<Option<u64>, StoreError> {
        self.count(|calls| calls.stats += 1);
        self.reach("read", key).await?;
        self.store.stat(key).await
    }

    async fn fetch(&self, key: &Key, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.count(|calls| calls.fetches += 1);
        self.reach("read", key).await?;
        let content = self.store.fetch(key, range).await?;
        self.count(|calls| calls.fetched_bytes += content.len() as u64);
        Ok(content)
    }

    async fn list(&self, directory: Option<&Key>) -> Result<Vec<Entry>, StoreError> {
        self.count(|calls| calls.lists += 1);
        let root = Key::new("root");
        self.reach("list", directory.unwrap_or(&root)).await?;
        self.store.list(directory).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.count(|calls| calls.deletes += 1);
        let mut pending = Pending { store: self, effect: Some(Effect::Delete(key.clone())) };
        let fate = self.fate().await;
        pending.finish(fate, "delete", key)
    }
}

#[derive(Debug)]
struct FaultyUpload {
    store: FaultyStore,
    key: Key,
    body: BytesMut,
    /// An append was dropped: what was written is unknown, so the upload cannot be completed.
    broken: bool,
}

impl FaultyUpload {
    fn check(&self) -> Result<(), StoreError> {
        let lost = || MemoryStore::error(StoreErrorKind::NotFound, "store", &self.key);
        if self.broken { Err(lost()) } else { Ok(()) }
    }
}

#[async_trait]
impl Upload for FaultyUpload {
    async fn append(&mut self, part: Bytes) -> Result<(), StoreError> {
        self.store.count(|calls| calls.appends += 1);
        self.check()?;
        self.broken = true;
        let reached = self.store.reach("store", &self.key).await;
        self.broken = false;
        reached?;
        self.body.extend_from_slice(&part);
        Ok(())
    }

    async fn read_back(&mut self, range: Range<u64>) -> Result<Bytes, StoreError> {
        self.check()?;
        if !self.store.reads_back() {
            return Err(MemoryStore::error(StoreErrorKind::Unsupported, "read back", &self.key));
        }
        self.store.reach("read", &self.key).await?;
        read_back(&self.body, &self.key, range)
    }

    async fn complete(&mut self) -> Result<(), StoreError> {
        self.check()?;
        self.store.put(&self.key, self.body.clone().freeze(), None).await
    }

    async fn abort(self: Box<Self>) -> Result<(), StoreError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testkit::conformance;
    use tokio::time::{Instant, timeout};

    fn key(name: &str) -> Key {
        Key::new(name)
    }

    fn body(text: &'static str) -> [Bytes; 1] {
        [Bytes::from_static(text.as_bytes())]
    }

    #[tokio::test(start_paused = true)]
    async fn without_faults_it_conforms() {
        let store = FaultyStore::new(1);
        conformance::run_all(&store, &key("scratch")).await;
        let latency = Duration::from_millis(1)..=Duration::from_secs(2);
        store.set_faults(Faults { latency, ..Faults::none() });
        conformance::run_all(&store, &key("slow")).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_lost_answer_is_met_again_as_already_exists() {
        let store = FaultyStore::new(2);
        store.set_faults(Faults { lose_answer: 1.0, ..Faults::none() });
        assert_eq!(store.put_new(&key("a"), &body("x")).await.unwrap_err().kind, StoreErrorKind::Unavailable);
        store.set_faults(Faults::none());
        assert_eq!(store.put_new(&key("a"), &body("x")).await.unwrap_err().kind, StoreErrorKind::AlreadyExists);
        let [Event::Stored { .. }, Event::Refused { body, stored, .. }] = &store.journal()[..] else {
            panic!("{:?}", store.journal());
        };
        assert_eq!(body, stored);
    }

    #[tokio::test(start_paused = true)]
    async fn failed_calls_change_nothing() {
        let store = FaultyStore::new(3);
        store.put_new(&key("a"), &body("x")).await.unwrap();
        for faults in [
            Faults { fail: 1.0, failure: StoreErrorKind::NoSpace, ..Faults::none() },
            Faults { outage: true, lose_answer: 1.0, ..Faults::none() },
        ] {
            store.set_faults(faults);
            store.put_new(&key("b"), &body("x")).await.unwrap_err();
            store.delete(&key("a")).await.unwrap_err();
            store.stat(&key("a")).await.unwrap_err();
            store.list(None).await.unwrap_err();
            store.begin_upload(&key("c")).await.unwrap_err();
        }
        assert_eq!(store.memory().objects().len(), 1);
        assert_eq!(store.journal().len(), 1);
        let calls = store.calls();
        assert_eq!((calls.puts, calls.deletes, calls.lists, calls.writes()), (3, 2, 2, 7));
    }

    #[tokio::test(start_paused = true)]
    async fn a_hang_ends_with_an_error_and_either_effect() {
        let store = FaultyStore::new(4);
        store.set_faults(Faults { hang: 1.0, ..Faults::none() });
        let begun = Instant::now();
        for i in 0..40 {
            store.put_new(&key(&format!("{i}")), &body("x")).await.unwrap_err();
        }
        assert_eq!(begun.elapsed().as_secs(), 40 * 30);
        assert!((5..35).contains(&store.memory().objects().len()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_put_took_effect_or_did_not() {
        let store = FaultyStore::new(5);
        let latency = Duration::from_secs(1)..=Duration::from_secs(2);
        store.set_faults(Faults { latency, ..Faults::none() });
        for i in 0..40 {
            let key = key(&format!("{i}"));
            timeout(Duration::from_millis(500), store.put_new(&key, &body("whole"))).await.unwrap_err();
        }
        let objects = store.memory().objects();
        assert!((5..35).contains(&objects.len()), "{}", objects.len());
        assert!(objects.values().all(|body| body == "whole"));
        assert_eq!(store.journal().len(), objects.len());
    }

    /// The same seed gives the same run, another seed another one.
    #[tokio::test(start_paused = true)]
    async fn a_seed_decides_everything() {
        async fn run(seed: u64) -> (Vec<Event>, Duration) {
            let store = FaultyStore::new(seed);
            store.set_faults(Faults::some());
            let begun = Instant::now();
            for i in 0..200 {
                let (key_again, body) = (key(&format!("{}", i % 150)), body("x"));
                let _ = timeout(Duration::from_millis(600), store.put_new(&key_again, &body)).await;
                let _ = store.delete(&key(&format!("{}", i / 3))).await;
            }
            (store.journal(), begun.elapsed())
        }
        assert_eq!(run(6).await, run(6).await);
        assert_ne!(run(6).await, run(7).await);
    }
}
