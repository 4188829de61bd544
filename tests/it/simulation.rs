//! Owns: the agent's core (receiver, archiver, progress, resume) under a seeded model server and model store on
//! virtual time, with faults; the oracle that looks at what came of it.
//!
//! One seed, one history: `SEAWALL_SEED=1234 cargo test --test it simulation` replays it, with its log.
//! More seeds: `SEAWALL_SEEDS=100000 cargo test --release --test it simulation`, or `1000..5000` of them.
//!
//! After every crash and at the end: what was acknowledged is durable, contiguous and proven, in as many repositories as
//! are required; the archive's bytes are the server's; nothing was overwritten. When all faults are over every
//! repository holds every byte.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use jiff::Timestamp;
use seawall::agent::cluster::{ClusterAgent, State, Status};
use seawall::agent::session::RepositoryState;
use seawall::agent::world::{ClusterOptions, World};
use seawall::archiver::Workers;
use seawall::catalog::store::{self, Archive};
use seawall::codec::Form;
use seawall::codec::decode::ObjectDecoder;
use seawall::codec::encrypt::{Identities, Keys, Recipients};
use seawall::error::{Disposition, Failure};
use seawall::receiver::{Acknowledge, Clock};
use seawall::replication::SlotName;
use seawall::repository::layout::{TailName, WalObject};
use seawall::testkit::logins::ModelLogins;
use seawall::testkit::store::{Event, Faults, FaultyStore, Traits};
use seawall::testkit::wal_writer::WalWriter;
use seawall::testkit::walsender::ModelServer;
use seawall::wal::{Lsn, SegmentName, SegmentSize, SystemId, TimelineId};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::support::model::repositories;

const MIB: u64 = 1 << 20;
const CLUSTER: &str = "main";
const SLOT: &str = "seawall";
/// A key nobody uses for anything else. Encryption is random; what depends on it is nothing but a few bytes of length.
const IDENTITY: &str = "AGE-SECRET-KEY-1GQ9778VQXMMJVE8SK7J6VT8UJ4HDQAJUVSFCWCM02D8GEWQ72PVQ2Y5J33";

#[test]
fn seeds() {
    let total = run_seeds("simulation::seeds", 1000, |seed| simulate(seed, 1));
    let Some((count, total)) = total else { return };
    // A simulation in which nothing happens proves nothing.
    assert!(total.crashes > count / 2 && total.promotions > count / 10 && total.segments > count, "{total:?}");
}

#[test]
fn seeds_of_several_repositories() {
    let total = run_seeds("simulation::seeds_of_several", 320, |seed| simulate(seed, 2 + (seed % 2) as usize));
    let Some((count, total)) = total else { return };
    assert!(total.crashes > count / 2 && total.promotions > count / 10 && total.segments > count, "{total:?}");
    assert!(total.wipes > count / 20 && total.left > count / 20 && total.healed > count / 20, "{total:?}");
}

/// Runs every seed; how many there were, and what happened in them. `None` after the one that was asked for.
fn run_seeds(
    name: &str,
    default_count: u64,
    simulate: impl Fn(u64) -> Tally + Sync + std::panic::RefUnwindSafe,
) -> Option<(u64, Tally)> {
    if let Ok(seed) = std::env::var("SEAWALL_SEED") {
        let _ = tracing_subscriber::fmt().with_env_filter("seawall=debug").with_test_writer().try_init();
        println!("{:?}", simulate(seed.parse().expect("SEAWALL_SEED is a number")));
        return None;
    }
    let seeds = std::env::var("SEAWALL_SEEDS").map_or(0..default_count, |text| {
        let (first, end) = text.split_once("..").unwrap_or(("0", &text));
        let number = |text: &str| text.parse().expect("SEAWALL_SEEDS is a number, or two: 500..1000");
        number(first)..number(end)
    });
    let next = std::sync::atomic::AtomicU64::new(seeds.start);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let total = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                let (next, simulate) = (&next, &simulate);
                scope.spawn(move || {
                    let mut total = Tally::default();
                    loop {
                        let seed = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        if seed >= seeds.end {
                            return total;
                        }
                        let replay = format!("replay with: SEAWALL_SEED={seed} cargo test --test it {name}");
                        let _watch = Watchdog::over(replay.clone());
                        match std::panic::catch_unwind(|| simulate(seed)) {
                            Ok(tally) => total.add(&tally),
                            Err(panic) => {
                                eprintln!("{replay}");
                                std::panic::resume_unwind(panic);
                            }
                        }
                    }
                })
            })
            .collect();
        let mut total = Tally::default();
        for worker in workers {
            match worker.join() {
                Ok(tally) => total.add(&tally),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        total
    });
    println!("seeds {seeds:?}: {total:?}");
    Some((seeds.end - seeds.start, total))
}

/// Ends the process, naming the seed, when one history takes too long: virtual time that stands still.
struct Watchdog {
    /// Dropped when the history ends.
    _done: std::sync::mpsc::Sender<()>,
}

impl Watchdog {
    fn over(replay: String) -> Watchdog {
        let (done, waiting) = std::sync::mpsc::channel::<()>();
        std::thread::spawn(move || {
            let limit = Duration::from_secs(900);
            if waiting.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("a history stands still; {replay}");
                std::process::exit(101);
            }
        });
        Watchdog { _done: done }
    }
}

/// What happened, over all seeds.
#[derive(Clone, Debug, Default)]
struct Tally {
    crashes: u64,
    promotions: u64,
    lost_tails: u64,
    cuts: u64,
    outages: u64,
    corruptions: u64,
    segments: u64,
    encrypted_segments: u64,
    tails: u64,
    gaps: u64,
    bytes: u64,
    /// Repositories emptied and taken into use again.
    wipes: u64,
    /// Histories in which a repository was out.
    left: u64,
    /// Objects in repositories that were copied there.
    healed: u64,
}

impl Tally {
    fn add(&mut self, other: &Tally) {
        self.crashes += other.crashes;
        self.promotions += other.promotions;
        self.lost_tails += other.lost_tails;
        self.cuts += other.cuts;
        self.outages += other.outages;
        self.corruptions += other.corruptions;
        self.segments += other.segments;
        self.encrypted_segments += other.encrypted_segments;
        self.tails += other.tails;
        self.gaps += other.gaps;
        self.bytes += other.bytes;
        self.wipes += other.wipes;
        self.left += other.left;
        self.healed += other.healed;
    }
}

fn simulate(seed: u64, repositories: usize) -> Tally {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime needs nothing of the machine");
    runtime.block_on(async { Simulation::new(seed, repositories).run().await })
}

struct Simulation {
    rng: fastrand::Rng,
    size: SegmentSize,
    server: ModelServer,
    writers: BTreeMap<TimelineId, WalWriter>,
    current: TimelineId,
    xid: u32,
    stores: Vec<Store>,
    /// Whether encryption is switched on and off.
    encrypts: bool,
    options: ClusterOptions,
    agent: Option<Agent>,
    started: Instant,
    /// The first session on the machine that is the server now.
    first_session: u64,
    tally: Tally,
}

struct Agent {
    task: JoinHandle<Result<(), Failure>>,
    stop: CancellationToken,
    status: watch::Receiver<Status>,
}

/// A repository's store.
struct Store {
    store: FaultyStore,
    /// How many events of its journal came before it was emptied last.
    emptied_at: usize,
    /// It was emptied, and has not got back everything acknowledged since.
    is_excused: bool,
    was_out: bool,
}

impl Simulation {
    fn new(seed: u64, repositories: usize) -> Simulation {
        let mut rng = fastrand::Rng::with_seed(seed);
        let size = SegmentSize::new(MIB << rng.u32(0..2)).expect("a power of two");
        let system_id = SystemId(7_000_000_000_000_000_000 + seed);
        let start = Lsn(size.bytes() * rng.u64(1..5000));
        let major = rng.u32(15..=18);
        let server = ModelServer::new(system_id, size, start);
        let sizes = (0..8).map(|_| [1, 7, 24, 8192, 131_072][rng.usize(0..5)].max(rng.usize(1..4000))).collect();
        server.with(|state| {
            state.server_version = format!("{major}.1");
            state.message_sizes = sizes;
            state.wal_sender_timeout = Some(Duration::from_secs(rng.u64(2..60)));
        });
        let mut writer = WalWriter::new(major, system_id, size, TimelineId(1), start);
        writer.noop(120);
        let traits = Traits { reads_back: rng.bool(), keeps_facts: rng.bool() };
        let encrypts = rng.bool();
        let reads_back = traits.reads_back && !encrypts;
        let options = ClusterOptions {
            name: CLUSTER.into(),
            slot: SlotName::new(SLOT).expect("a valid name"),
            tail_interval: Duration::from_millis(rng.u64(100..6000)),
            shutdown_grace: Duration::from_secs(10),
            // Where nothing can be read back, the budget has to hold a whole segment.
            memory_bytes: if reads_back { rng.u64(1..8) * MIB / 4 } else { size.bytes() * rng.u64(4..8) / 2 },
            required: if repositories == 1 { 1 } else { rng.usize(1..=repositories) },
            acknowledge: Acknowledge::Repository,
            spool: None,
            synchronous: None,
            keys: if encrypts && rng.bool() { encrypted() } else { Keys::default() },
            host: None,
        };
        let mut simulation = Simulation {
            stores: (0..repositories)
                .map(|_| Store {
                    store: FaultyStore::new(rng.u64(..)).with_traits(traits),
                    emptied_at: 0,
                    is_excused: false,
                    was_out: false,
                })
                .collect(),
            encrypts,
            rng,
            size,
            server,
            writers: BTreeMap::from([(TimelineId(1), writer)]),
            current: TimelineId(1),
            xid: 100,
            options,
            agent: None,
            started: Instant::now(),
            first_session: 0,
            tally: Tally::default(),
        };
        simulation.publish();
        simulation
    }

    async fn run(mut self) -> Tally {
        self.start_agent();
        for _ in 0..self.rng.u32(8..30) {
            self.step().await;
            self.check_acknowledged().await;
        }
        self.heal_and_settle().await;
        self.check_archive().await;
        self.check_journal();
        self.stop_agent().await;
        self.check_idle().await;
        self.check_by_verifier().await;
        self.tally
    }

    async fn step(&mut self) {
        match self.rng.u32(0..20) {
            0..=8 => self.write(),
            9 => self.writer().switch(),
            10 => {
                self.tally.cuts += 1;
                let after = self.rng.u64(0..600_000);
                self.server.with(|state| state.faults.cut_after = Some(after));
            }
            11 => self.any_store().store.set_faults(Faults::some()),
            12 => self.any_store().store.set_faults(Faults::none()),
            13 => {
                self.tally.outages += 1;
                self.any_store().store.set_outage(true);
            }
            14 => self.any_store().store.set_outage(false),
            15 | 16 => self.crash().await,
            17 => self.promote().await,
            18 => {
                let flush = self.writers[&self.current].flush_lsn();
                let at = Lsn(flush.0 - self.rng.u64(1..400).min(flush.0 - 1));
                self.tally.corruptions += 1;
                // Shorter than the shortest pause before a reconnect: the second answer is sound.
                self.server.with(|state| state.faults.corrupt.insert(at));
                self.sleep(300).await;
                self.server.with(|state| state.faults.corrupt.clear());
            }
            _ => {
                let refusal = ["57P03", "53300", "28P01"][self.rng.usize(0..3)].to_string();
                self.server.with(|state| state.faults.refuse = Some(refusal));
                self.sleep(4000).await;
                self.server.with(|state| state.faults.refuse = None);
            }
        }
        if self.stores.len() > 1 && self.rng.u32(0..25) == 0 {
            self.wipe().await;
        }
        self.publish();
        self.sleep(8000).await;
        self.note_who_is_out();
    }

    fn any_store(&mut self) -> &mut Store {
        let at = if self.stores.len() == 1 { 0 } else { self.rng.usize(0..self.stores.len()) };
        &mut self.stores[at]
    }

    /// One repository is lost and made anew, as `seawall init --create` does it, while the others hold everything
    /// that was acknowledged, and together everything that anyone holds: what a server that is no more wrote, and was
    /// never acknowledged, would be lost by right with the last that has it, and the archive be left with a gap.
    async fn wipe(&mut self) {
        let lost = self.rng.usize(0..self.stores.len());
        let restart = self.acknowledged();
        let mut archives = Vec::new();
        for at in 0..self.stores.len() {
            archives.push(self.archive(at).await);
        }
        let reached = |archive: &ModelArchive, to: Lsn| self.reached(archive, to);
        let mut others = archives.iter().enumerate().filter(|(at, _)| *at != lost).map(|(_, archive)| archive);
        let others_hold = others.all(|archive| archive.as_ref().is_some_and(|it| reached(it, restart) >= restart));
        let all = ModelArchive::together(archives.iter().flatten());
        let others = archives.iter().enumerate().filter(|(at, _)| *at != lost);
        let others = ModelArchive::together(others.filter_map(|(_, archive)| archive.as_ref()));
        let nothing_is_lost = match (others, all) {
            (Some(others), Some(all)) => reached(&others, Lsn::MAX) >= reached(&all, Lsn::MAX),
            (_, all) => all.is_none(),
        };
        if !others_hold || !nothing_is_lost || self.options.required != self.stores.len() {
            return;
        }
        self.tally.wipes += 1;
        let store = &mut self.stores[lost];
        store.store.memory().tamper(|objects| objects.clear());
        let now = Timestamp::from_second(1_767_225_600).expect("in range");
        store::create_repository(store.store.memory(), now, "feedface").await.expect("the model store takes it");
        (store.emptied_at, store.is_excused) = (store.store.journal().len(), true);
    }

    fn note_who_is_out(&mut self) {
        let Some(agent) = &self.agent else { return };
        let Some(watched) = agent.status.borrow().watched.clone() else { return };
        for (store, watched) in self.stores.iter_mut().zip(&watched.repositories) {
            store.was_out |= matches!(watched.state(), RepositoryState::Absent(_));
        }
    }

    async fn sleep(&mut self, up_to_ms: u64) {
        let ms = self.rng.u64(0..up_to_ms);
        tokio::time::sleep(Duration::from_millis(ms)).await;
    }

    fn writer(&mut self) -> &mut WalWriter {
        self.writers.get_mut(&self.current).expect("the current timeline has a writer")
    }

    /// Now, in the simulation's own time.
    fn now(&self) -> Timestamp {
        Timestamp::from_second(1_767_225_600).expect("in range") + self.started.elapsed()
    }

    fn write(&mut self) {
        let now = self.now();
        for _ in 0..self.rng.u32(1..60) {
            self.xid += 1;
            let (xid, kind) = (self.xid, self.rng.u32(0..100));
            let length = match kind {
                0 => self.rng.usize(0..3_000_000),
                1..=10 => self.rng.usize(0..60_000),
                _ => self.rng.usize(0..300),
            };
            let noise = self.rng.bool();
            // Incompressible, or 256 bytes over and over.
            let mut payload: Vec<u8> = (0..256.min(length)).map(|i| (i as u32 ^ xid) as u8).collect();
            payload = payload.repeat(length.div_ceil(payload.len().max(1)));
            payload.truncate(length);
            if noise {
                self.rng.fill(&mut payload);
            }
            let writer = self.writer();
            match kind {
                11..=40 => writer.commit(xid, now),
                41 => writer.restore_point("point", now),
                _ => writer.insert(xid, &payload),
            };
        }
    }

    /// What the writer wrote is flushed on the server. Sometimes only a part of it is, up to the end of a record.
    fn publish(&mut self) {
        let writer = &self.writers[&self.current];
        let flush = self.server.with(|state| state.flush_lsn());
        let bytes = writer.bytes(flush..writer.flush_lsn()).to_vec();
        self.server.with(|state| state.append(&bytes));
    }

    fn start_agent(&mut self) {
        let started = self.started;
        let clock =
            Clock(Arc::new(move || Timestamp::from_second(1_767_225_600).expect("in range") + started.elapsed()));
        let world = World {
            dialer: Arc::new(self.server.dialer()),
            logins: Arc::new(ModelLogins),
            repositories: repositories(&self.stores.iter().map(|store| store.store.clone()).collect::<Vec<_>>()),
            clock,
            random: Arc::new(Mutex::new(self.rng.fork())),
            workers: Workers::inline(),
        };
        let stop = CancellationToken::new();
        let (agent, status) = ClusterAgent::new(world, self.options.clone(), stop.clone());
        self.agent = Some(Agent { task: tokio::spawn(agent.run()), stop, status });
    }

    /// The process dies here, wherever it is; another starts, with nothing but the repository and the slot.
    async fn crash(&mut self) {
        self.tally.crashes += 1;
        if let Some(agent) = self.agent.take() {
            agent.task.abort();
            let _ = agent.task.await;
        }
        self.check_acknowledged().await;
        self.sleep(3000).await;
        if self.encrypts && self.rng.u32(0..4) == 0 {
            let is_on = self.options.keys.recipients.is_some();
            self.options.keys = if is_on { Keys::default() } else { encrypted() };
        }
        self.start_agent();
    }

    async fn stop_agent(&mut self) {
        let Some(agent) = self.agent.take() else { return };
        agent.stop.cancel();
        let ended = tokio::time::timeout(Duration::from_secs(120), agent.task).await;
        ended.expect("the agent stops within its grace").expect("no panic").expect("a healthy agent ends well");
    }

    /// A failover. Either everything was received by the promoted server, or the end of the WAL was not.
    async fn promote(&mut self) {
        self.publish();
        // A promoted server and an empty repository is refused, and rightly: see the tests of `init`.
        if self.archive(0).await.is_none() {
            return;
        }
        self.tally.promotions += 1;
        let old = &self.writers[&self.current];
        let ends = old.record_ends();
        let begin = old.start();
        let loses = self.rng.bool();
        let recent: Vec<Lsn> = ends.iter().copied().filter(|end| *end > begin).rev().take(40).collect();
        let at = match recent.as_slice() {
            [] => return,
            [last, ..] if !loses => *last,
            several => several[self.rng.usize(0..several.len())],
        };
        if at < old.flush_lsn() {
            self.tally.lost_tails += 1;
        }
        let next = TimelineId(self.current.0 + self.rng.u32(1..3));
        let mut child = old.fork(at, next);
        child.end_of_recovery(self.now());
        let same_server = at == old.flush_lsn() && self.rng.bool();
        if !same_server {
            self.first_session = self.server.with(|state| state.sessions_opened) + 1;
        }
        self.server.with(|state| {
            state.promote(next, at);
            if !same_server {
                // Another machine: its slots are its own.
                state.slots.clear();
                state.faults.cut_after = Some(0);
                state.statuses.clear();
            }
        });
        self.writers.insert(next, child);
        self.current = next;
        self.publish();
    }

    /// What the server was told is durable.
    fn acknowledged(&self) -> Lsn {
        self.server.with(|state| {
            let here = state.statuses.iter().filter(|status| status.session >= self.first_session);
            let told = here.map(|status| status.status.flush).max().unwrap_or_default();
            let restart = state.slots.get(SLOT).and_then(|slot| slot.restart_lsn);
            restart.map_or(Lsn::ZERO, |restart| restart.min(told))
        })
    }

    /// What the server was told is durable is durable, in as many repositories as are required.
    async fn check_acknowledged(&mut self) {
        let restart = self.acknowledged();
        let mut holding = 0;
        let mut told = Vec::new();
        for at in 0..self.stores.len() {
            let reached = match self.archive(at).await {
                Some(archive) => self.reached(&archive, restart),
                None => Lsn::ZERO,
            };
            told.push(reached);
            if reached >= restart {
                self.stores[at].is_excused = false;
            }
            holding += usize::from(reached >= restart || self.stores[at].is_excused);
        }
        let required = self.options.required;
        assert!(holding >= required, "acknowledged up to {restart}, required {required}, the archives end at {told:?}");
    }

    /// How far the path to the current timeline is held byte by byte, from the archive's start, up to `restart`.
    fn reached(&self, archive: &ModelArchive, restart: Lsn) -> Lsn {
        let history = self.writers[&self.current].history();
        let mut reached = archive.start;
        while reached < restart {
            let timeline = history
                .ancestors()
                .iter()
                .find(|entry| reached < entry.end)
                .map_or(self.current, |entry| entry.timeline);
            let end = history.end_of(timeline).unwrap_or(Lsn::MAX);
            let held = archive.held.get(&timeline).map_or(reached, |held| held.end_from(reached));
            // A tail of the child may repeat the parent's bytes; either holds them.
            let held = archive
                .held
                .iter()
                .filter(|(other, _)| history.contains(**other) && **other > timeline)
                .map(|(_, child)| child.end_from(reached))
                .fold(held, Lsn::max);
            if held <= reached {
                return reached;
            }
            reached = held.min(end.max(held));
        }
        reached
    }

    async fn archive(&self, at: usize) -> Option<ModelArchive> {
        let memory = self.stores[at].store.memory().clone();
        let lineages = store::lineages(&memory, CLUSTER).await.ok()?;
        let (lineage, file) = lineages.last()?;
        let archive = Archive::new(Arc::new(memory.clone()), lineage.clone());
        let mut held: BTreeMap<TimelineId, Held> = BTreeMap::new();
        let catalog = archive.load_catalog().await.expect("the catalog is readable at every moment");
        for &timeline in catalog.timelines.keys() {
            let pieces = catalog.pieces(timeline).into_iter().map(|piece| (piece.from, piece.to)).collect();
            held.insert(timeline, Held(pieces));
        }
        let sealed =
            catalog.directories().flat_map(|digest| digest.sealed.iter().map(|sealed| sealed.segment)).collect();
        Some(ModelArchive { start: file.start_lsn?, held, sealed })
    }

    /// All faults end; then everything becomes durable and acknowledged.
    async fn heal_and_settle(&mut self) {
        for store in &self.stores {
            store.store.set_faults(Faults::none());
            store.store.set_outage(false);
        }
        self.server.with(|state| {
            state.faults = Default::default();
        });
        if self.agent.as_ref().is_none_or(|agent| agent.task.is_finished()) {
            if let Some(agent) = self.agent.take() {
                let failure = agent.task.await.expect("no panic").expect_err("only a failure ends an agent");
                panic!("the agent gave up: {failure} ({:?})", failure.hint);
            }
            self.start_agent();
        }
        if self.stores.len() > 1 {
            // A writer looks whether its repository is still the one it was every 30 s.
            tokio::time::sleep(Duration::from_secs(31)).await;
        }
        // Something to acknowledge, so that an agent that resumed at a segment's start can link up.
        let now = self.now();
        self.xid += 1;
        let xid = self.xid;
        self.writer().commit(xid, now);
        self.publish();
        let flush = self.writers[&self.current].flush_lsn();
        for _ in 0..1200 {
            let restart = self.server.with(|state| state.slots.get(SLOT).and_then(|slot| slot.restart_lsn));
            if restart == Some(flush) && self.all_are_whole(flush) {
                return;
            }
            let agent = self.agent.as_ref().expect("started above");
            if agent.task.is_finished() {
                let failure = agent.status.borrow().failure.clone();
                panic!("the agent gave up: {failure:?}");
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        let status = self.agent.as_ref().expect("started above").status.borrow().clone();
        panic!("{flush} was not acknowledged, or not everywhere, twenty minutes after all faults ended: {status:?}");
    }

    /// Every repository takes part, has no hole, and holds everything.
    fn all_are_whole(&self, flush: Lsn) -> bool {
        let agent = self.agent.as_ref().expect("it is running");
        let Some(watched) = agent.status.borrow().watched.clone() else { return false };
        watched.repositories.iter().all(|repository| {
            matches!(repository.state(), RepositoryState::Writing)
                && repository.is_complete()
                && repository.frontier().is_some_and(|stored| stored.record_end == flush)
        })
    }

    /// Every object decodes to the server's bytes, and every repository holds all of them.
    async fn check_archive(&mut self) {
        let mut names: Vec<BTreeSet<SegmentName>> = Vec::new();
        for at in 0..self.stores.len() {
            self.check_repository(at).await;
            let archive = self.archive(at).await.expect("there is an archive");
            names.push(archive.sealed);
        }
        for (at, others) in names.iter().enumerate() {
            assert!(others == &names[0], "repository {at}: {:?}", others.symmetric_difference(&names[0]).next());
        }
    }

    /// Of some histories: what is left is read in full.
    async fn check_by_verifier(&mut self) {
        if self.rng.u32(0..8) == 0 {
            let identities = Identities::parse(IDENTITY.as_bytes()).expect("an identity");
            let keys = Keys { recipients: None, identities: Some(identities) };
            for store in &self.stores {
                crate::verify::assert_no_fault(store.store.memory(), &keys, self.stores.len() == 1).await;
            }
        }
    }

    async fn check_repository(&mut self, at: usize) {
        let objects = self.stores[at].store.memory().objects();
        let mut segments = BTreeSet::new();
        for (key, body) in &objects {
            let path: Vec<&str> = key.as_str().split('/').collect();
            let [_, _, "wal", rest @ ..] = path.as_slice() else { continue };
            match rest {
                [_, name] => match WalObject::parse(name) {
                    Some(WalObject::Segment(segment, form)) => {
                        self.tally.segments += 1;
                        self.tally.encrypted_segments += u64::from(form == Form::Encrypted);
                        assert!(segments.insert(segment), "{segment} has two objects");
                        let number = segment.number(self.size).expect("a name of this size");
                        self.compare(segment, self.size.start_of(number), self.size.bytes(), form, body);
                    }
                    Some(WalObject::Index(_)) => {}
                    // Left by a crash before the segment was stored, or after it was indexed.
                    Some(WalObject::RawMarker(..)) => assert!(body.is_empty()),
                    other => panic!("an unexpected object: {key} ({other:?})"),
                },
                [_, directory, name] => {
                    let segment: SegmentName = directory.strip_suffix(".tail").unwrap().parse().unwrap();
                    let tail = TailName::parse(name).expect("only tails lie in a tail directory");
                    self.tally.tails += 1;
                    self.compare(segment, tail.from, tail.to - tail.from, tail.form, body);
                }
                _ => {}
            }
        }
        let archive = self.archive(at).await.expect("there is an archive");
        let flush = self.writers[&self.current].flush_lsn();
        let held = &archive.held[&self.current];
        // A child's own files begin with the fork's segment, even where that lies before the archive's start, or with
        // the archive where nothing of the parent was stored.
        let begin = match self.current {
            TimelineId(1) => archive.start,
            _ => {
                let fork = self.writers[&self.current].start();
                if held.end_from(fork) > fork { fork } else { fork.max(archive.start) }
            }
        };
        let tails: Vec<&str> = objects.keys().map(|key| key.as_str()).filter(|key| key.contains(".tail/")).collect();
        let end = held.end_from(begin);
        assert!(end == flush, "repository {at} holds the current timeline up to {end}, not {flush}; tails: {tails:?}");
        if self.stores.len() > 1 {
            assert!(self.reached(&archive, flush) >= flush, "repository {at} holds {}", self.reached(&archive, flush));
        }
    }

    fn compare(&mut self, segment: SegmentName, start: Lsn, length: u64, form: Form, body: &Bytes) {
        let identities = Identities::parse(IDENTITY.as_bytes()).expect("an identity");
        let mut raw = Vec::new();
        let mut sink = |bytes: &[u8]| {
            raw.extend_from_slice(bytes);
            Ok(())
        };
        let mut decoder = ObjectDecoder::new(form, Some(&identities), length).expect("there is an identity");
        decoder.feed(body, &mut sink).expect("every object decodes");
        decoder.finish(&mut sink).expect("every object decodes");
        let end = start + length;
        let writer = &self.writers[&segment.timeline];
        assert!(end <= writer.flush_lsn(), "{segment}: the archive holds {end}, the server never wrote it");
        assert!(raw == writer.bytes(start..end), "{segment}: other bytes than the server's from {start} to {end}");
        self.tally.bytes += raw.len() as u64;
    }

    /// No name ever had two contents.
    fn check_journal(&mut self) {
        for Store { store, emptied_at, was_out, .. } in &self.stores {
            let mut stored: BTreeMap<String, Bytes> = BTreeMap::new();
            for event in store.journal().into_iter().skip(*emptied_at) {
                match event {
                    Event::Stored { key, body } => {
                        if key.as_str().ends_with(".probe") {
                            continue;
                        }
                        let before = stored.insert(key.to_string(), body.clone());
                        assert!(before.is_none_or(|before| before == body), "{key} was stored twice, differently");
                    }
                    Event::Deleted { key, .. } => {
                        let kinds = [".tail/", ".index.json", ".raw-", ".probe"];
                        let harmless = kinds.iter().any(|kind| key.as_str().contains(kind));
                        assert!(harmless, "{key} was deleted");
                    }
                    Event::Refused { .. } => {}
                }
            }
            self.tally.left += u64::from(*was_out);
            self.tally.healed += u64::from(*was_out && stored.len() > 10);
        }
    }

    /// A stopped agent leaves a slot that is where the archive is; a server that writes nothing costs no writes.
    async fn check_idle(&mut self) {
        self.start_agent();
        tokio::time::sleep(Duration::from_secs(60)).await;
        let writes = |stores: &[Store]| stores.iter().map(|store| store.store.calls().writes()).sum::<u64>();
        let before = writes(&self.stores);
        tokio::time::sleep(Duration::from_secs(3600)).await;
        assert_eq!(writes(&self.stores), before, "an idle server costs no writes");
        let agent = self.agent.as_ref().expect("just started");
        let status = agent.status.borrow().clone();
        assert_eq!(status.state, State::Streaming, "{:?}", status.failure);
        assert!(status.failure.is_none_or(|failure| failure.disposition != Disposition::Stop));
        self.stop_agent().await;
    }
}

fn encrypted() -> Keys {
    let identities = Identities::parse(IDENTITY.as_bytes()).expect("an identity");
    let recipients = Recipients::parse(&identities.public_keys()).expect("its recipient");
    Keys { recipients: Some(recipients), identities: None }
}

/// What the archive holds, as its catalog tells.
#[derive(Clone)]
struct ModelArchive {
    start: Lsn,
    held: BTreeMap<TimelineId, Held>,
    /// Indexed, and there.
    sealed: BTreeSet<SegmentName>,
}

impl ModelArchive {
    /// What several hold together.
    fn together<'a>(archives: impl Iterator<Item = &'a ModelArchive>) -> Option<ModelArchive> {
        archives.cloned().reduce(|mut all, one| {
            all.start = all.start.min(one.start);
            all.sealed.extend(one.sealed);
            for (timeline, Held(pieces)) in one.held {
                let Held(together) = all.held.entry(timeline).or_insert_with(|| Held(Vec::new()));
                together.extend(pieces);
                together.sort_unstable();
            }
            all
        })
    }
}

#[derive(Clone)]
struct Held(Vec<(Lsn, Lsn)>);

impl Held {
    /// The end of the contiguous bytes that hold `from`, or `from` itself.
    fn end_from(&self, from: Lsn) -> Lsn {
        let mut end = from;
        for &(begin, to) in &self.0 {
            if begin <= end && to > end {
                end = to;
            }
        }
        end
    }
}
