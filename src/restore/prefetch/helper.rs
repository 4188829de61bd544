//! Owns: the helper's one loop: what is fetched next, what is in the way, who is told what, when it ends.
//! Does not own: which segments are wanted (`window.rs`), fetching (`source.rs`), what it listens to (`events.rs`),
//! whether anybody needs it (`life.rs`), its process (`cli/wal_get.rs`).
//!
//! It may be killed at any point: a file has its name only when it is whole, and `wal-get` does without a helper.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::events::Taken;
use super::life::{Ended, Life};
use super::pin;
use super::place::{self, Place};
use super::serve::{self, Ask, Found};
use super::source::{Listing, Source};
use super::window::Window;
use crate::repository::durable::Directory;
use crate::repository::layout::WalDirectory;
use crate::restore::marker::RestoreMarker;
use crate::restore::wal_get::{PathChoice, WalGet, WalGetError};
use crate::wal::{History, SegmentName};

/// What is fetched ahead when nothing else is said.
pub const LIMIT_BYTES: u64 = 256 << 20;
/// Segments on their way at the same time: with 50 ms for each, 320 of them a second.
const FETCHES_MAX: usize = 16;
/// Their stored bytes in memory, each at most a part's. One is always fetched.
const FETCH_BYTES_MAX: u64 = 32 << 20;
const PART_BYTES: u64 = 4 << 20;
/// Directories are listed again when segments have been handed over since, no more often than this.
const LISTING_AGE: Duration = Duration::from_secs(1);
const LISTINGS_MAX: usize = 4;
/// A segment that could not be had is left to PostgreSQL's own request, and tried again after this.
const FAILURE_AGE: Duration = Duration::from_secs(10);
const TICK: Duration = Duration::from_secs(1);
/// Requests answered at the same time: PostgreSQL has one, impatient repetitions of it may add to that.
const REQUESTS_MAX: usize = 16;

#[derive(Debug)]
pub struct Options {
    pub marker: RestoreMarker,
    /// With the marker's path and end.
    pub wal_get: WalGet,
    pub limit_bytes: u64,
    /// What PostgreSQL was asking for when the helper was started: that is had without it.
    pub from: Option<SegmentName>,
}

/// The path and the end of what the marker tells about.
pub fn path_choice(marker: &RestoreMarker) -> PathChoice {
    let line = marker.history().expect("a marker that was read has one");
    if marker.follow { PathChoice::Following(line) } else { PathChoice::Fixed(line) }
}

struct Helper {
    marker: RestoreMarker,
    source: Arc<Source>,
    place: Place,
    window: Window,
    ready: BTreeSet<SegmentName>,
    fetching: BTreeMap<SegmentName, u64>,
    failed: BTreeMap<SegmentName, Instant>,
    listed: BTreeMap<WalDirectory, Listed>,
    /// Counts what was handed over: without that nobody can be ahead of a listing.
    progress: u64,
    work: JoinSet<Done>,
    /// Something is ready, or will not be.
    changed: watch::Sender<()>,
}

/// A directory as it was listed last.
struct Listed {
    listing: Option<Listing>,
    is_under_way: bool,
    at: Instant,
    progress: u64,
}

enum Done {
    Listed(WalDirectory, Result<Listing, WalGetError>),
    Fetched(SegmentName, Result<bool, WalGetError>),
    Followed(Result<History, WalGetError>),
    Pinned { goes_on: bool },
}

/// Holds segments ready until nobody needs them. `Ok` also when another helper does that already.
pub async fn run(options: Options, place: Place) -> io::Result<Ended> {
    place.create()?;
    let directory = Directory::open(place.path())?;
    let lock = match directory.lock_file(place::LOCK) {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Ended::AnotherIsThere),
        lock => lock?,
    };
    let mut helper = Helper::new(options, place.clone());
    let mut serving = JoinSet::new();
    let ended = helper.hold_ready(&mut serving).await;
    // Whoever has told it to end waits until nothing is left: its connection closes last.
    helper.work.shutdown().await;
    if let Err(error) = place.remove_all() {
        tracing::warn!("could not remove {}: {error}", place.path().display());
    }
    drop::<File>(lock);
    serving.shutdown().await;
    ended
}

impl Helper {
    fn new(options: Options, place: Place) -> Helper {
        let Options { marker, wal_get, limit_bytes, from } = options;
        let path = marker.history().expect("a marker that was read has one");
        let size = marker.segment_size;
        let mut window = Window::new(path, size, marker.start_lsn, marker.end_lsn, limit_bytes);
        if let Some(name) = from {
            window.delivered(name);
        }
        let source = Source { wal_get, place: place.clone(), size, system_id: marker.system_id };
        Helper {
            marker,
            source: Arc::new(source),
            place,
            window,
            ready: BTreeSet::new(),
            fetching: BTreeMap::new(),
            failed: BTreeMap::new(),
            listed: BTreeMap::new(),
            progress: 0,
            work: JoinSet::new(),
            changed: watch::Sender::new(()),
        }
    }

    async fn hold_ready(&mut self, serving: &mut JoinSet<()>) -> io::Result<Ended> {
        self.place.remove_leftovers()?;
        for other in self.place.others()? {
            if let Err(error) = other.remove_all() {
                tracing::warn!("could not remove {} of an earlier restore: {error}", other.path().display());
            }
        }
        place::remove(&self.place.socket())?;
        let listener = UnixListener::bind(self.place.socket())?;
        let mut taken = Taken::watch(self.place.path());
        let mut life = Life::begin(self.marker.id, self.place.log());
        let (asks, mut asked) = mpsc::channel::<Ask>(REQUESTS_MAX);
        let mut tick = tokio::time::interval(TICK);
        let mut pin_due = Instant::now() + pin::FIRST_RENEWAL;
        self.look()?;
        loop {
            self.top_up();
            tokio::select! {
                ask = asked.recv() => {
                    life.is_needed();
                    match ask.expect("this end has a sender too") {
                        Ask::End => return Ok(Ended::RestoreEnded),
                        ask => self.hear(ask)?,
                    }
                }
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => self.serve(serving, stream, asks.clone()),
                    // Out of files: others are being answered.
                    Err(error) => {
                        tracing::warn!("could not take a request: {error}");
                        tokio::time::sleep(TICK).await;
                    }
                },
                () = taken.next() => {
                    if self.look()? {
                        life.is_needed();
                    }
                }
                Some(done) = self.work.join_next() => match done.expect("work neither panics nor is aborted") {
                    Done::Pinned { goes_on: false } => pin_due += pin::NEVER,
                    done => self.take(done)?,
                },
                Some(_) = serving.join_next() => {}
                _ = tick.tick() => {
                    if let Some(ended) = life.ended() {
                        return Ok(ended);
                    }
                    self.forget_failures();
                    self.place.remove_stale_answers()?;
                    if self.marker.pinned && Instant::now() >= pin_due {
                        pin_due = Instant::now() + pin::RENEWAL;
                        self.renew_pin();
                    }
                }
            }
        }
    }

    /// Looks what is still there, and removes what is in the way; true when PostgreSQL has taken something.
    fn look(&mut self) -> io::Result<bool> {
        let present = self.place.all_ready()?;
        let names: BTreeSet<SegmentName> = present.iter().map(|(name, _)| *name).collect();
        let taken = self.ready.difference(&names).max().copied();
        if let Some(name) = taken {
            self.delivered(name);
        }
        self.ready = names;
        for (name, raw_crc32) in present {
            if !self.window.wants(name) {
                place::remove(&self.place.ready(name, raw_crc32))?;
                self.ready.remove(&name);
            }
        }
        Ok(taken.is_some())
    }

    fn delivered(&mut self, name: SegmentName) {
        self.window.delivered(name);
        self.progress += 1;
    }

    /// Begins whatever can be done now.
    fn top_up(&mut self) {
        let wanted: Vec<SegmentName> = self.window.wanted().collect();
        for name in wanted {
            if self.ready.contains(&name) || self.fetching.contains_key(&name) || self.failed.contains_key(&name) {
                continue;
            }
            let directory = WalDirectory::of(name);
            let listing = self.listed.get(&directory).and_then(|listed| listed.listing.clone());
            let sealed = listing.as_ref().and_then(|listing| listing.sealed(name));
            let (Some(listing), Some(stored_bytes)) = (listing, sealed) else {
                self.list_if_due(directory);
                // What comes after one that is not there is not asked for soon.
                return;
            };
            let cost = stored_bytes.min(PART_BYTES);
            let under_way: u64 = self.fetching.values().sum();
            let fits = self.fetching.len() < FETCHES_MAX && under_way + cost <= FETCH_BYTES_MAX;
            if !fits && !self.fetching.is_empty() {
                return;
            }
            self.fetching.insert(name, cost);
            let source = self.source.clone();
            self.work.spawn(async move { Done::Fetched(name, source.hold_ready(name, listing).await) });
        }
    }

    /// Lists a directory that is not known, or was listed before PostgreSQL went on.
    fn list_if_due(&mut self, directory: WalDirectory) {
        if let Some(listed) = self.listed.get(&directory)
            && (listed.is_under_way || listed.progress == self.progress || listed.at.elapsed() < LISTING_AGE)
        {
            return;
        }
        while self.listed.len() >= LISTINGS_MAX && !self.listed.contains_key(&directory) {
            let oldest = self.listed.iter().min_by_key(|(_, listed)| listed.at).map(|(directory, _)| *directory);
            self.listed.remove(&oldest.expect("there are some"));
        }
        let listing = self.listed.remove(&directory).and_then(|listed| listed.listing);
        let listed = Listed { listing, is_under_way: true, at: Instant::now(), progress: self.progress };
        self.listed.insert(directory, listed);
        let source = self.source.clone();
        self.work.spawn(async move { Done::Listed(directory, source.list(directory).await) });
    }

    fn take(&mut self, done: Done) -> io::Result<()> {
        match done {
            Done::Listed(directory, result) => {
                let Some(listed) = self.listed.get_mut(&directory) else { return Ok(()) };
                listed.is_under_way = false;
                match result {
                    Ok(listing) => listed.listing = Some(listing),
                    // As if nothing had been listed: after a while it is tried again.
                    Err(error) => {
                        tracing::warn!(%error, "could not list what is in the archive");
                        listed.progress = u64::MAX;
                    }
                }
            }
            Done::Fetched(name, result) => {
                self.fetching.remove(&name);
                match result {
                    Ok(true) => drop(self.ready.insert(name)),
                    Ok(false) => drop(self.failed.insert(name, Instant::now())),
                    Err(error) => {
                        tracing::warn!(%error, segment = %name, "could not hold a segment ready");
                        self.failed.insert(name, Instant::now());
                    }
                }
                self.look()?;
            }
            Done::Followed(Ok(path)) => {
                if path != *self.window.path() {
                    tracing::info!(timeline = %path.timeline, "following another timeline");
                    self.window.follow(path);
                    self.look()?;
                }
            }
            Done::Followed(Err(error)) => tracing::warn!(%error, "could not tell which timeline to follow"),
            Done::Pinned { .. } => {}
        }
        self.changed.send_replace(());
        Ok(())
    }

    fn forget_failures(&mut self) {
        self.failed.retain(|_, at| at.elapsed() < FAILURE_AGE);
    }

    fn serve(&self, serving: &mut JoinSet<()>, stream: UnixStream, asks: mpsc::Sender<Ask>) {
        if serving.len() < REQUESTS_MAX {
            serving.spawn(serve::serve(stream, self.source.clone(), asks, self.changed.subscribe()));
        }
    }

    /// What a request wants to know, and what it has found.
    fn hear(&mut self, ask: Ask) -> io::Result<()> {
        match ask {
            Ask::Where { name, reply } => self.tell(name, reply)?,
            Ask::Delivered(name) => {
                self.delivered(name);
                self.look()?;
            }
            Ask::HistoryDelivered { done } => {
                if self.marker.follow {
                    // PostgreSQL may take the other line now: nothing of the old one waits for it.
                    for (name, raw_crc32) in self.place.all_ready()? {
                        place::remove(&self.place.ready(name, raw_crc32))?;
                    }
                    self.ready.clear();
                    let source = self.source.clone();
                    self.work.spawn(async move { Done::Followed(source.wal_get.survey().await.map(|(_, path)| path)) });
                }
                let _ = done.send(());
            }
            Ask::End => {}
        }
        Ok(())
    }

    /// PostgreSQL waits for this segment: it is the first that is wanted now.
    fn tell(&mut self, name: SegmentName, reply: oneshot::Sender<Found>) -> io::Result<()> {
        self.look()?;
        if !self.ready.contains(&name) {
            self.window.asked(name);
            self.look()?;
            self.top_up();
        }
        let listed = self.listed.get(&WalDirectory::of(name));
        let is_being_listed = listed.is_some_and(|listed| listed.is_under_way) && self.window.wants(name);
        let found = if self.ready.contains(&name) {
            Found::Ready
        } else if self.fetching.contains_key(&name) || is_being_listed {
            Found::OnItsWay
        } else {
            Found::Unknown
        };
        let _ = reply.send(found);
        Ok(())
    }

    fn renew_pin(&mut self) {
        let (source, id) = (self.source.clone(), self.marker.id);
        // A standby that has caught up needs no more than any other reader.
        let goes_on = !self.marker.standby || self.ready.len() + self.fetching.len() > 0;
        self.work.spawn(async move {
            if goes_on {
                pin::renew(&source.wal_get.holders, id).await;
            }
            Done::Pinned { goes_on }
        });
    }
}
